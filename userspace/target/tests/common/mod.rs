// SPDX-License-Identifier: GPL-2.0-only

//! A source in memory, an agent, a target, and a network that can be cut.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::misnamed_getters,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "shared by test files that do not use all of it"
)]

use std::collections::BTreeMap;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use dtloop_abi::CaptureStream;
use dtloop_abi::testing::FakeStream;
use dtloop_agent::config::{Compression, QueueConfig, SetConfig, SyncMode, TransportKind};
use dtloop_agent::control::{self, Sets};
use dtloop_agent::set::{SetShared, Worker};
use dtloop_agent::streams::Streams;
use dtloop_agent::verify_config::VerifyConfig;
use dtloop_api::{Client, ClientError, Connection, Failure, Outcome, Request, SetStatus};
use dtloop_core::mirror::JobState;
use dtloop_core::replica::SetMemory;
use dtloop_core::size::Size;
use dtloop_disk::{Disk, DiskFile, SimDisk, Space};
use dtloop_target::applier::Saved;
use dtloop_target::config::Config;
use dtloop_target::server::Server;
use dtloop_target::trust::now_unix_s;
use dtloop_trust::code::Token;
use dtloop_trust::{Pin, Vault};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

/// Nothing in these tests takes longer, even on a busy machine.
const DEADLINE: Duration = Duration::from_secs(120);

/// Bytes that look random, the same for the same seed.
pub fn random(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..bytes.div_ceil(8))
        .flat_map(|_| next().to_le_bytes())
        .take(bytes)
        .collect()
}

pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

struct OneStream(Mutex<FakeStream>);

impl Streams for OneStream {
    fn open(&self, _set: &str) -> Result<Arc<dyn CaptureStream>, String> {
        Ok(Arc::new(self.0.lock().unwrap().clone()))
    }
}

/// A source device, directories for both sides.
pub struct Lab {
    dir: tempfile::TempDir,
    pub stream: FakeStream,
    pub device: u32,
    sectors: u64,
    /// Size of the target's journal and of its segments.
    pub journal_bytes: (u64, u64),
    /// Over TLS, between paired peers.
    pub tls: bool,
    /// Longest pause between two connections.
    pub retry_ms_max: u64,
    /// What the agent is told to do.
    pub compression: Compression,
    /// The agent's disk queue, and the disk it is on if it is not this machine's.
    pub queue: Option<QueueConfig>,
    pub queue_disk: Option<Arc<dyn Disk>>,
    /// When the set is verified by itself.
    pub verify: Option<VerifyConfig>,
}

impl Lab {
    pub fn new(sectors: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let stream = FakeStream::new("db", 4 << 20, 1024);
        let device = stream.attach(1, sectors, "vol");
        let lab = Self {
            dir,
            stream,
            device,
            sectors,
            journal_bytes: (64 << 20, 16 << 20),
            tls: false,
            retry_ms_max: 100,
            compression: Compression::default(),
            queue: None,
            queue_disk: None,
            verify: None,
        };
        lab.set_image_sectors(sectors);
        lab
    }

    /// Gives the agents of this lab a disk queue of this size, in segments of 4 MiB.
    pub fn with_queue(mut self, bytes: u64) -> Self {
        self.queue = Some(QueueConfig {
            dir: self.dir.path().join("queue"),
            size: Size(bytes),
            min_free: Size(0),
            segment_size: Size(4 << 20),
            start_at: 50,
            sync: SyncMode::Group,
        });
        self
    }

    /// Where the queue's segments are.
    pub fn queue_dir(&self) -> PathBuf {
        self.queue.as_ref().unwrap().dir.join("db")
    }

    /// One whose peers are paired, over TLS.
    pub fn secure(sectors: u64) -> Self {
        Self {
            tls: true,
            ..Self::new(sectors)
        }
    }

    fn transport(&self) -> &'static str {
        if self.tls { "tls" } else { "plaintext" }
    }

    pub fn agent_dir(&self) -> PathBuf {
        self.dir.path().join("agent")
    }

    /// As after an exchange of codes: each side knows the other's key.
    pub fn pair_at(&self, address: &str) {
        let (source, target) = (
            Vault::new(&self.agent_dir()),
            Vault::new(&self.target_dir()),
        );
        self.trust_target(address, target.identity().unwrap().pin());
        let pin = source.identity().unwrap().pin();
        let pair = |ledger: &mut dtloop_trust::Ledger| {
            if ledger.peer(&pin).is_none() {
                let (now, token) = (now_unix_s(), Token::draw().unwrap());
                ledger.invite(now, &token, None, 60).unwrap();
                ledger.pair(now, &token, pin, "alpha").outcome.unwrap();
            }
        };
        target.change_ledger(pair).unwrap();
    }

    /// The source takes this key for the target's.
    pub fn trust_target(&self, address: &str, pin: Pin) {
        let known = dtloop_trust::targets::Target {
            address: address.into(),
            pin,
            known_as: "alpha".into(),
            paired_unix_s: 0,
        };
        let source = Vault::new(&self.agent_dir());
        source
            .change_targets(|targets| targets.insert(known))
            .unwrap();
    }

    pub fn renew_stream(&mut self) {
        self.renew_stream_as(*b"another stream!!");
    }

    /// The module was loaded anew.
    pub fn renew_stream_as(&mut self, uuid: [u8; 16]) {
        let content = self.stream.content(self.device);
        self.stream = FakeStream::new("db", 4 << 20, 1024).with_uuid(uuid);
        self.device = self.stream.attach(1, self.sectors, "vol");
        self.stream.set_content(self.device, &content);
    }

    pub fn target_dir(&self) -> PathBuf {
        self.dir.path().join("target")
    }

    /// A machine with a copy of this one's disks, and another stream.
    pub fn clone_source(&self, uuid: [u8; 16]) -> Self {
        let mut clone = Self::new(self.sectors);
        clone
            .stream
            .set_content(clone.device, &self.stream.content(self.device));
        clone.renew_stream_as(uuid);
        copy_dir(&self.agent_dir(), &clone.agent_dir());
        clone
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("vol.img")
    }

    pub fn set_image_sectors(&self, sectors: u64) {
        std::fs::File::create(self.image())
            .unwrap()
            .set_len(sectors * 512)
            .unwrap();
    }

    pub fn config_text(&self, listen: &str) -> String {
        format!(
            "listen = \"{listen}\"\ntransport = \"{}\"\nstate_dir = {:?}\n[journal]\nsize = {}\n\
             segment_size = {}\n[[volume]]\nname = \"vol\"\npath = {:?}\n",
            self.transport(),
            self.target_dir(),
            self.journal_bytes.0,
            self.journal_bytes.1,
            self.image()
        )
    }

    pub fn start_target(&self) -> Target {
        let config = Config::parse(&self.config_text(&self.listen())).unwrap();
        let deadline = Instant::now() + DEADLINE;
        let server = loop {
            match Server::start(config.clone()) {
                Ok(server) => break server,
                Err(error) => assert!(Instant::now() < deadline, "{error:#}"),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        self.remember_address(server.address);
        Target {
            address: server.address,
            server: Some(server),
        }
    }

    /// The same address for every target of the lab, so that the agent finds the next one.
    fn listen(&self) -> String {
        std::fs::read_to_string(self.dir.path().join("address"))
            .unwrap_or_else(|_| "127.0.0.1:0".into())
    }

    /// Where the next target will listen.
    pub fn free_address(&self) -> SocketAddr {
        self.listen().parse().unwrap()
    }

    fn remember_address(&self, address: SocketAddr) {
        std::fs::write(self.dir.path().join("address"), address.to_string()).unwrap();
    }

    pub fn start_agent(&self, target: Target) -> Agent {
        self.start_agent_with(Some(target))
    }

    pub fn start_agent_with(&self, target: Option<Target>) -> Agent {
        let address = target.as_ref().unwrap().address;
        let mut agent = self.start_agent_to(address);
        agent.target = target;
        agent
    }

    pub fn start_agent_to(&self, address: SocketAddr) -> Agent {
        if self.tls {
            self.pair_at(&address.to_string());
        }
        self.start_agent_as_it_is(address)
    }

    /// Whoever it trusts, and whoever trusts it.
    pub fn start_agent_as_it_is(&self, address: SocketAddr) -> Agent {
        let state_dir = self.agent_dir();
        std::fs::create_dir_all(&state_dir).unwrap();
        let source_id = dtloop_store::identity(&state_dir.join("source-id")).unwrap();
        let config = SetConfig {
            name: "db".into(),
            target: address.to_string(),
            transport: if self.tls {
                TransportKind::Tls
            } else {
                TransportKind::Plaintext
            },
            retry_ms_max: self.retry_ms_max,
            bandwidth: Default::default(),
            compression: self.compression,
            mirror_rate: Default::default(),
            resync_rate: Default::default(),
            queue: self.queue.clone(),
            chain: true,
            verify: self.verify.clone(),
        };
        let shared = Arc::new(SetShared::new(&config).unwrap());
        let streams = Arc::new(OneStream(Mutex::new(self.stream.clone())));
        let worker =
            Worker::new(config, &state_dir, source_id, streams, Arc::clone(&shared)).unwrap();
        let worker = match &self.queue_disk {
            Some(disk) => worker.with_queue_disk(Arc::clone(disk)),
            None => worker,
        };
        let thread = std::thread::spawn(move || worker.run());
        let socket = self.dir.path().join(format!("agent-{}.sock", free_port()));
        let listener = control::listen(&socket).unwrap();
        let sets = BTreeMap::from([("db".to_owned(), Arc::clone(&shared))]);
        let sets = Arc::new(Sets {
            sets,
            started_unix_ms: 0,
        });
        std::thread::spawn(move || control::serve(&listener, &sets));
        Agent {
            shared,
            thread: Some(thread),
            socket,
            target: None,
        }
    }

    pub fn write(&self, sector: u64, payload: &[u8]) {
        self.stream.write(self.device, sector, payload);
    }

    pub fn fill(&self) {
        self.fill_with(1);
    }

    /// Writes the whole device, as fast as it goes; what finds no room becomes dirty.
    pub fn fill_with(&self, seed: u64) {
        for sector in (0..self.sectors).step_by(64) {
            self.write(sector, &random((seed << 32) | sector, 64 * 512));
        }
    }

    /// Writes this much, waiting for room in the ring before each write.
    pub fn write_when_there_is_room(&self, seed: u64, bytes: u64) {
        let deadline = Instant::now() + DEADLINE;
        for step in 0..bytes / (32 << 10) {
            while self.ring_percent() > 80 {
                assert!(Instant::now() < deadline, "nothing makes room in the ring");
                std::thread::yield_now();
            }
            let sector = (step * 7919 * 64) % (self.sectors - 64);
            self.write(sector, &random((seed << 32) | step, 32 << 10));
        }
    }

    pub fn ring_percent(&self) -> u8 {
        dtloop_agent::spooler::ring_percent(&self.stream.status().unwrap())
    }

    /// How often changes went to the dirty map instead of the stream.
    pub fn gaps(&self) -> u64 {
        self.stream.status().unwrap().gap_changes
    }

    /// Some writes that fit into the ring.
    pub fn fill_some(&self, seed: u64) {
        for step in 0..10 {
            let sector = (seed * 131 + step * 37) % (self.sectors / 8) * 8;
            self.write(sector, &random((seed << 32) | step, 4096));
        }
    }

    pub fn write_in_background(&self, writes: u64) -> JoinHandle<()> {
        let (stream, device, sectors) = (self.stream.clone(), self.device, self.sectors);
        std::thread::spawn(move || {
            for step in 0..writes {
                let payload = random(step + 1000, 512 * (1 + step as usize % 16));
                let sector = (step * 7919) % (sectors - 16);
                stream.write(device, sector, &payload);
                if step % 10 == 0 {
                    stream.flush(device);
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        })
    }

    /// Waits until a change of that size surely finds room in the ring.
    pub fn await_room(&self, bytes: u64) {
        let deadline = Instant::now() + DEADLINE;
        while self.stream.status().unwrap().used_bytes + bytes > 2 << 20 {
            assert!(Instant::now() < deadline, "the ring is never emptied");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn is_dirty(&self) -> bool {
        self.stream
            .devices()
            .unwrap()
            .iter()
            .any(|device| device.dirty_blocks > 0)
    }

    pub fn damage_image(&self, offset: u64, bytes: &[u8]) {
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(self.image())
            .unwrap();
        file.write_all_at(bytes, offset).unwrap();
    }

    pub fn assert_identical(&self) {
        let (source, copy) = (
            self.stream.content(self.device),
            std::fs::read(self.image()).unwrap(),
        );
        assert_eq!(source.len(), copy.len());
        let differing = source
            .chunks(512)
            .zip(copy.chunks(512))
            .enumerate()
            .filter(|(_, (a, b))| a != b);
        let sectors: Vec<usize> = differing.map(|(sector, _)| sector).collect();
        assert!(
            sectors.is_empty(),
            "{} sectors differ: {:?}",
            sectors.len(),
            &sectors[..sectors.len().min(20)]
        );
    }

    /// The agent's last job.
    pub fn last_job(&self) -> JobState {
        self.agent_memory().job.unwrap()
    }

    /// What the agent remembers. It must not run when it is stored.
    pub fn agent_memory(&self) -> SetMemory {
        dtloop_store::load(&self.dir.path().join("agent/db.set"))
            .unwrap()
            .unwrap()
    }

    pub fn store_agent_memory(&self, memory: &SetMemory) {
        dtloop_store::store(&self.dir.path().join("agent/db.set"), memory).unwrap();
    }

    pub fn saved_dir(&self) -> PathBuf {
        let sets = std::fs::read_dir(self.target_dir().join("sets")).unwrap();
        sets.map(|entry| entry.unwrap().path())
            .find(|path| path.join("state").exists())
            .unwrap()
    }

    pub fn saved(&self) -> Saved {
        dtloop_store::load(&self.saved_dir().join("state"))
            .unwrap()
            .unwrap()
    }
}

/// A disk on which some syncs of records fail, and forget what was written.
#[derive(Clone)]
pub struct SyncFails {
    disk: SimDisk,
    left: Arc<AtomicUsize>,
}

struct SyncFailsFile {
    file: Arc<dyn DiskFile>,
    disk: SimDisk,
    left: Arc<AtomicUsize>,
    /// Bytes since the last sync: headers are small.
    written: AtomicUsize,
}

impl Default for SyncFails {
    fn default() -> Self {
        Self {
            disk: SimDisk::new(1),
            left: Arc::default(),
        }
    }
}

impl SyncFails {
    pub fn fail(&self, times: usize) {
        self.left.store(times, Ordering::Relaxed);
    }

    pub fn left(&self) -> usize {
        self.left.load(Ordering::Relaxed)
    }
}

impl Disk for SyncFails {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(SyncFailsFile {
            file: self.disk.open(path, create)?,
            disk: self.disk.clone(),
            left: Arc::clone(&self.left),
            written: AtomicUsize::new(0),
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.disk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.disk.remove(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.disk.list(dir)
    }

    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.make_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.disk.sync_dir(dir)
    }

    fn space(&self, dir: &Path) -> io::Result<Space> {
        self.disk.space(dir)
    }
}

impl DiskFile for SyncFailsFile {
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_at(data, offset)
    }

    fn write_at(&self, pieces: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        let bytes = pieces.iter().map(|piece| piece.len()).sum();
        self.written.fetch_add(bytes, Ordering::Relaxed);
        self.file.write_at(pieces, offset)
    }

    fn sync(&self) -> io::Result<()> {
        let records = self.written.swap(0, Ordering::Relaxed) > 100_000;
        if records && self.left.load(Ordering::Relaxed) > 0 {
            self.left.fetch_sub(1, Ordering::Relaxed);
            self.disk.fail(0, 1, Errno::EIO as i32);
        }
        self.file.sync()
    }

    fn bytes(&self) -> io::Result<u64> {
        self.file.bytes()
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.file.set_bytes(bytes)
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.file.allocate(offset, bytes)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.file.zero(offset, bytes)
    }
}

/// The files of a directory.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A target in this process.
pub struct Target {
    pub address: SocketAddr,
    server: Option<Server>,
}

impl Target {
    pub fn stop(mut self) {
        self.server.take().unwrap().stop(false);
    }

    /// Ends without a checkpoint, as if killed.
    pub fn kill(mut self) {
        self.server.take().unwrap().stop(true);
    }

    /// The real program.
    pub fn program(lab: &Lab, port: u16) -> Program {
        let path = lab.dir.path().join("dttarget.toml");
        std::fs::write(&path, lab.config_text(&format!("127.0.0.1:{port}"))).unwrap();
        Program {
            child: Some(spawn(&path)),
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop(true);
        }
    }
}

fn spawn(config: &Path) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dttarget"));
    command
        .arg("--config")
        .arg(config)
        .arg("serve")
        .stderr(Stdio::null());
    command.spawn().unwrap()
}

/// A process of `dttarget`.
pub struct Program {
    child: Option<Child>,
}

impl Program {
    pub fn kill_9(mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn terminate(mut self) {
        let mut child = self.child.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        assert!(child.wait().unwrap().success());
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

/// An agent in this process.
pub struct Agent {
    shared: Arc<SetShared>,
    thread: Option<JoinHandle<()>>,
    socket: PathBuf,
    pub target: Option<Target>,
}

impl Agent {
    pub fn request(&mut self, request: &Request) -> Result<Outcome, Failure> {
        let mut client = Client::connect_path(&self.socket).unwrap();
        match client.request(request).unwrap().finish(|_| ()) {
            Ok(outcome) => Ok(outcome),
            Err(ClientError::Failed(failure)) => Err(failure),
            Err(error) => panic!("{error}"),
        }
    }

    pub fn status(&self) -> SetStatus {
        let mut client = Client::connect_path(&self.socket).unwrap();
        client.status(Some("db")).unwrap().sets.remove(0)
    }

    /// The status as it is published next.
    pub fn next_status(&self) -> SetStatus {
        self.shared.next_snapshot(Duration::from_millis(50)).status
    }

    pub fn wait_for(&self, what: impl Fn(&SetStatus) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let status = self.next_status();
            if what(&status) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "it did not come to that: {status:#?}"
            );
        }
    }

    pub fn wait_state(&self, label: &str) {
        self.wait_for(|status| {
            status
                .devices
                .first()
                .is_some_and(|device| device.state.label() == label)
        });
    }

    /// Until the target has everything.
    pub fn wait_in_sync(&mut self) {
        self.wait_for(|status| matches!(status.connection, Connection::Connected { .. }));
        let deadline = Instant::now() + DEADLINE;
        let request = Request::Wait {
            set: "db".into(),
            timeout_ms: Some(60_000),
        };
        loop {
            match self.request(&request) {
                Ok(_) => return,
                Err(failure) => {
                    assert!(Instant::now() < deadline, "{failure}: {:#?}", self.status());
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn stop(mut self) {
        self.shared.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.shared.stop();
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// A network that cuts connections after a number of bytes, in either direction, is slow, or no longer moves any.
pub struct Faults {
    pub address: SocketAddr,
    switches: Arc<Switches>,
}

#[derive(Default)]
struct Switches {
    cutting: AtomicBool,
    flipping: AtomicBool,
    stuck: AtomicBool,
    slow: AtomicBool,
    cuts: AtomicUsize,
    accepted: AtomicUsize,
}

impl Faults {
    pub fn new(target: SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // So that little is on its way.
        setsockopt(&listener, sockopt::RcvBuf, &(64 << 10)).unwrap();
        let address = listener.local_addr().unwrap();
        let switches = Arc::<Switches>::default();
        let shared = Arc::clone(&switches);
        std::thread::spawn(move || {
            for (index, client) in listener.incoming().enumerate() {
                let Ok(client) = client else { return };
                shared.accepted.fetch_add(1, Ordering::Relaxed);
                let Ok(server) = TcpStream::connect(target) else {
                    continue;
                };
                let numbers = random(seed + index as u64, 16);
                let limit = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap());
                for (mut from, mut to, limit) in [
                    (
                        client.try_clone().unwrap(),
                        server.try_clone().unwrap(),
                        limit(0) % 300_000,
                    ),
                    (
                        server.try_clone().unwrap(),
                        client.try_clone().unwrap(),
                        limit(8) % 20_000,
                    ),
                ] {
                    let switches = Arc::clone(&shared);
                    std::thread::spawn(move || relay(&mut from, &mut to, limit, &switches));
                }
            }
        });
        Self { address, switches }
    }

    /// Changes one bit of each connection, and goes on.
    pub fn flip_often(&self) {
        self.switches.flipping.store(true, Ordering::Relaxed);
    }

    pub fn cut_often(&self) {
        self.switches.cutting.store(true, Ordering::Relaxed);
    }

    /// Connections stay, and nothing moves on them.
    pub fn hold(&self) {
        self.switches.stuck.store(true, Ordering::Relaxed);
    }

    /// 5 MB a second at most.
    pub fn crawl(&self) {
        self.switches.slow.store(true, Ordering::Relaxed);
    }

    pub fn heal(&self) {
        self.switches.cutting.store(false, Ordering::Relaxed);
        self.switches.flipping.store(false, Ordering::Relaxed);
        self.switches.stuck.store(false, Ordering::Relaxed);
    }

    /// Connections made.
    pub fn accepted(&self) -> usize {
        self.switches.accepted.load(Ordering::Relaxed)
    }

    pub fn cuts(&self) -> usize {
        self.switches.cuts.load(Ordering::Relaxed)
    }
}

fn relay(from: &mut TcpStream, to: &mut TcpStream, limit: u64, switches: &Switches) {
    let mut buffer = [0; 5000];
    let mut moved = 0;
    let mut flipped = false;
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        while switches.stuck.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        moved += bytes as u64;
        if switches.slow.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if switches.flipping.load(Ordering::Relaxed) && moved > limit && !flipped {
            flipped = true;
            buffer[limit as usize % bytes] ^= 1 << (limit % 8);
            switches.cuts.fetch_add(1, Ordering::Relaxed);
        }
        let cut = switches.cutting.load(Ordering::Relaxed) && moved > limit;
        let keep = if cut {
            bytes - (moved - limit).min(bytes as u64) as usize
        } else {
            bytes
        };
        if to.write_all(&buffer[..keep]).is_err() || cut {
            switches.cuts.fetch_add(usize::from(cut), Ordering::Relaxed);
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}
