// SPDX-License-Identifier: GPL-2.0-only

//! A source in memory, an agent, a target, and a network that can be cut.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "shared by test files that do not use all of it"
)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
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
use dtloop_agent::config::{SetConfig, TransportKind};
use dtloop_agent::control::{self, Sets};
use dtloop_agent::set::{SetShared, Worker};
use dtloop_agent::streams::Streams;
use dtloop_agent::verify_config::VerifyConfig;
use dtloop_api::{Client, ClientError, Connection, Failure, Outcome, Request, SetStatus};
use dtloop_core::replica::SetMemory;
use dtloop_target::applier::Saved;
use dtloop_target::config::Config;
use dtloop_target::server::Server;

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
            verify: None,
        };
        lab.set_image_sectors(sectors);
        lab
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

    pub fn agent_dir(&self) -> PathBuf {
        self.dir.path().join("agent")
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
            "listen = \"{listen}\"\ntransport = \"plaintext\"\nstate_dir = {:?}\n[journal]\nsize = {}\n\
             segment_size = {}\n[[volume]]\nname = \"vol\"\npath = {:?}\n",
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
        let state_dir = self.dir.path().join("agent");
        std::fs::create_dir_all(&state_dir).unwrap();
        let source_id = dtloop_store::identity(&state_dir.join("source-id")).unwrap();
        let config = SetConfig {
            name: "db".into(),
            target: address.to_string(),
            transport: TransportKind::Plaintext,
            retry_ms_max: 100,
            chain: true,
            verify: self.verify.clone(),
        };
        let shared = Arc::new(SetShared::new(&config).unwrap());
        let streams = Arc::new(OneStream(Mutex::new(self.stream.clone())));
        let worker =
            Worker::new(config, &state_dir, source_id, streams, Arc::clone(&shared)).unwrap();
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

    pub fn wait_for(&self, what: impl Fn(&SetStatus) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            let status = self.shared.next_snapshot(Duration::from_millis(50)).status;
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

/// A network that cuts connections after a number of bytes, in either direction, or is slow.
pub struct Faults {
    pub address: SocketAddr,
    cutting: Arc<AtomicBool>,
    slow: Arc<AtomicBool>,
    cuts: Arc<AtomicUsize>,
}

impl Faults {
    pub fn new(target: SocketAddr, seed: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (cutting, cuts) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicUsize::new(0)),
        );
        let (flag, count) = (Arc::clone(&cutting), Arc::clone(&cuts));
        let slow = Arc::new(AtomicBool::new(false));
        let crawling = Arc::clone(&slow);
        std::thread::spawn(move || {
            for (index, client) in listener.incoming().enumerate() {
                let Ok(client) = client else { return };
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
                    let (flag, count) = (Arc::clone(&flag), Arc::clone(&count));
                    let crawling = Arc::clone(&crawling);
                    std::thread::spawn(move || {
                        relay(&mut from, &mut to, limit, &flag, &count, &crawling);
                    });
                }
            }
        });
        Self {
            address,
            cutting,
            slow,
            cuts,
        }
    }

    pub fn cut_often(&self) {
        self.cutting.store(true, Ordering::Relaxed);
    }

    /// 5 MB a second at most.
    pub fn crawl(&self) {
        self.slow.store(true, Ordering::Relaxed);
    }

    pub fn heal(&self) {
        self.cutting.store(false, Ordering::Relaxed);
    }

    pub fn cuts(&self) -> usize {
        self.cuts.load(Ordering::Relaxed)
    }
}

fn relay(
    from: &mut TcpStream,
    to: &mut TcpStream,
    limit: u64,
    cutting: &AtomicBool,
    cuts: &AtomicUsize,
    slow: &AtomicBool,
) {
    let mut buffer = [0; 5000];
    let mut moved = 0;
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        moved += bytes as u64;
        if slow.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let cut = cutting.load(Ordering::Relaxed) && moved > limit;
        let keep = if cut {
            bytes - (moved - limit).min(bytes as u64) as usize
        } else {
            bytes
        };
        if to.write_all(&buffer[..keep]).is_err() || cut {
            cuts.fetch_add(usize::from(cut), Ordering::Relaxed);
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}
