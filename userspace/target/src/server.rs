// SPDX-License-Identifier: GPL-2.0-only

//! The listening side and the sets of all sources.

use std::collections::HashMap;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use dtloop_core::binding::Refusal;
use dtloop_disk::{Disk, RealDisk};
use dtloop_proto::{Code, Uuid};
use dtloop_runtime::{JoinHandle, TcpListener, TcpStream};
use dtloop_store::{Hold, StateFileError};

use crate::applier::OpenError;
use crate::catalog::Catalog;
use crate::config::{Config, TransportKind};
use crate::replica::Replica;
use crate::session;
use crate::strangers::{Strangers, Ticket};
use crate::transport::Connection;
use crate::trust::Trust;

/// Most connections at one time: every set has one, and some may just be coming.
const CONNECTIONS_MAX: usize = 256;

/// How often the listener looks whether the program ends.
const ACCEPT_TICK: Duration = Duration::from_millis(200);

/// How long an end waits for a set that is being opened.
const CLOSE_TRIES: u32 = 50;

type Slot = Arc<Mutex<Option<Arc<Replica>>>>;

/// What all connections share.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// Who this target is.
    pub target_id: Uuid,
    /// Whom it lets in; none in plaintext.
    pub trust: Option<Trust>,
    /// Those who have not yet shown who they are.
    pub strangers: Arc<Strangers>,
    catalog: Arc<Catalog>,
    /// Where sets keep what they know.
    disk: Arc<dyn Disk>,
    slots: Mutex<HashMap<(Uuid, String), Slot>>,
    sessions: AtomicU64,
    connections: AtomicUsize,
    stopping: AtomicBool,
}

impl Shared {
    /// What a target that has just started has. Session numbers count from `first_session`.
    #[must_use]
    pub fn new(
        disk: Arc<dyn Disk>,
        catalog: Catalog,
        config: Config,
        target_id: Uuid,
        trust: Option<Trust>,
        first_session: u64,
    ) -> Self {
        Self {
            config,
            target_id,
            trust,
            strangers: Arc::default(),
            catalog: Arc::new(catalog),
            disk,
            slots: Mutex::default(),
            sessions: AtomicU64::new(first_session),
            connections: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
        }
    }

    /// A number for a new session, different from all others of this target's life.
    #[must_use]
    pub fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::Relaxed)
    }

    /// The set of a source, opened if it is not.
    ///
    /// # Errors
    ///
    /// The refusal to be told to the source.
    pub fn replica(
        &self,
        source_id: Uuid,
        set: &str,
        in_place: bool,
    ) -> Result<Arc<Replica>, Refusal> {
        let slot = {
            let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(slots.entry((source_id, set.to_owned())).or_default())
        };
        let mut slot = dtloop_runtime::lock(&slot);
        if let Some(replica) = &*slot {
            return Ok(Arc::clone(replica));
        }
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Refusal::new(Code::SHUTTING_DOWN, "The target ends"));
        }
        let catalog = Arc::clone(&self.catalog);
        let disk = Arc::clone(&self.disk);
        let opened = Replica::open(source_id, set, catalog, disk, &self.config, in_place);
        let replica = opened.map_err(|error| {
            let code = match &error {
                OpenError::Blocked(complaint) => complaint.code,
                OpenError::Journal(_) | OpenError::State(StateFileError::Io { .. }) => {
                    Code::JOURNAL_IO
                }
                _ => Code::STATE_DAMAGED,
            };
            let chain = format!("{:#}", anyhow::Error::from(error));
            Refusal::new(code, format!("Set \"{set}\" cannot be opened: {chain}"))
        })?;
        let replica = Arc::new(replica);
        *slot = Some(Arc::clone(&replica));
        Ok(replica)
    }
}

/// A running target.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
    _lock: Hold,
}

/// Makes the state directory. Journals hold what was on other people's disks: nobody else is to read them.
///
/// # Errors
///
/// Those of the file system.
pub fn make_private(dir: &Path) -> std::io::Result<()> {
    if let Some(above) = dir.parent() {
        fs::create_dir_all(above)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Makes the state directory and takes it for this process.
///
/// # Errors
///
/// If it cannot be made or another process has it.
pub fn lock_state_dir(dir: &Path) -> Result<Hold> {
    make_private(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    for part in ["sets", "volumes"] {
        let path = dir.join(part);
        fs::create_dir_all(&path).with_context(|| format!("Cannot make {}", path.display()))?;
    }
    let hold = dtloop_store::hold(dir, dtloop_store::DYING);
    hold.with_context(|| format!("Cannot use {}", dir.display()))?
        .ok_or_else(|| {
            anyhow::anyhow!(
                "{} is in use by another dttarget; stop that first",
                dir.display()
            )
        })
}

/// The sets that are known from before, by source and name.
///
/// # Errors
///
/// If the state directory cannot be read.
pub fn known_sets(dir: &Path) -> Result<Vec<(Uuid, String)>> {
    let mut sets = vec![];
    for entry in fs::read_dir(dir.join("sets"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if let Some((set, Ok(id))) = name.rsplit_once('.').map(|(set, id)| (set, id.parse())) {
            sets.push((id, set.to_owned()));
        }
    }
    sets.sort();
    Ok(sets)
}

/// A target that listens and does nothing yet.
pub struct Door {
    shared: Arc<Shared>,
    listener: TcpListener,
    address: SocketAddr,
    lock: Hold,
}

/// Plaintext shows everything to whoever is on the way, and lets everybody in: it stays on this machine.
fn check_plaintext(address: SocketAddr) -> Result<()> {
    anyhow::ensure!(
        address.ip().to_canonical().is_loopback(),
        "Plaintext is for loopback addresses only, and {address} is none; leave out transport = \"plaintext\" and pair \
         the sources (dttarget invite), or listen on 127.0.0.1"
    );
    Ok(())
}

impl Door {
    /// Takes the state directory and the address.
    ///
    /// # Errors
    ///
    /// If they cannot be used.
    pub fn open(config: Config) -> Result<Self> {
        let lock = lock_state_dir(&config.state_dir)?;
        let target_id = dtloop_store::identity(&config.state_dir.join("target-id"))?;
        let first_session = u64::from_le_bytes(dtloop_store::random_uuid()?.0[..8].try_into()?) | 1;
        let trust = match config.transport {
            TransportKind::Tls => Some(Trust::open(&config.state_dir)?),
            TransportKind::Plaintext => None,
        };
        let listener = TcpListener::bind(&config.listen)
            .with_context(|| format!("Cannot listen on {}", config.listen))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        if trust.is_none() {
            check_plaintext(address)?;
        }
        let catalog = Catalog::new(&config.state_dir, config.volumes.clone());
        let disk = Arc::new(RealDisk);
        let shared = Shared::new(disk, catalog, config, target_id, trust, first_session);
        let shared = Arc::new(shared);
        Ok(Self {
            shared,
            listener,
            address,
            lock,
        })
    }

    /// Lets sources in, and replays the journals of all known sets.
    ///
    /// # Errors
    ///
    /// If there can be no threads.
    pub fn serve(self) -> Result<Server> {
        let Self {
            shared,
            listener,
            address,
            lock,
        } = self;
        for (source_id, set) in known_sets(&shared.config.state_dir)? {
            open_set(&shared, source_id, set)?;
        }
        let accepting = accept(&shared, listener)?;
        let how = if shared.trust.is_some() {
            "TLS 1.3, for paired sources"
        } else {
            "in plaintext"
        };
        tracing::info!("Target {} listens on {address}, {how}.", shared.target_id);
        Ok(Server {
            address,
            shared,
            accepting: Some(accepting),
            _lock: lock,
        })
    }
}

impl Server {
    /// Starts: listens, and replays the journals of all known sets.
    ///
    /// # Errors
    ///
    /// If the state directory or the address cannot be used.
    pub fn start(config: Config) -> Result<Self> {
        Door::open(config)?.serve()
    }

    /// Ends with a checkpoint of every set; `abandon` ends as if killed.
    pub fn stop(mut self, abandon: bool) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        if let Some(accepting) = self.accepting.take() {
            // It ends by itself within a tick.
            let _ = accepting.join();
        }
        let slots: Vec<Slot> = {
            let slots = self
                .shared
                .slots
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            slots.values().cloned().collect()
        };
        for slot in slots {
            close(&slot, abandon);
        }
    }
}

fn close(slot: &Slot, abandon: bool) {
    for _ in 0..CLOSE_TRIES {
        if let Ok(mut slot) = slot.try_lock() {
            if let Some(replica) = slot.take() {
                replica.stop(abandon);
            }
            return;
        }
        dtloop_runtime::sleep(Duration::from_millis(100));
    }
    tracing::warn!("A set is still being opened; its journal is replayed again at the next start.");
}

/// Replays the journal of a set that is known from before, beside.
///
/// # Errors
///
/// If there can be no thread.
pub fn open_set(shared: &Arc<Shared>, source_id: Uuid, set: String) -> std::io::Result<()> {
    let shared = Arc::clone(shared);
    let name = format!("open {set}");
    dtloop_runtime::spawn(&name, move || {
        if let Err(refusal) = shared.replica(source_id, &set, false) {
            tracing::error!("{refusal}.");
        }
    })?;
    Ok(())
}

/// Lets sources in until the target ends.
///
/// # Errors
///
/// If there can be no thread.
pub fn accept(shared: &Arc<Shared>, listener: TcpListener) -> std::io::Result<JoinHandle<()>> {
    let shared = Arc::clone(shared);
    dtloop_runtime::spawn("accept", move || accept_loop(&shared, &listener))
}

fn accept_loop(shared: &Arc<Shared>, listener: &TcpListener) {
    while !shared.stopping.load(Ordering::Relaxed) {
        // Whatever ends the wait, who is there is looked for.
        let _ = dtloop_runtime::wait_listener(listener, ACCEPT_TICK);
        shared.strangers.sweep();
        if let Some(trust) = &shared.trust {
            trust.sweep();
        }
        match listener.accept() {
            Ok((stream, peer)) => take_in(shared, stream, peer),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Without files or memory: it would be the same again at once.
                tracing::error!("Nobody can be let in: {error}.");
                dtloop_runtime::sleep(ACCEPT_TICK);
            }
        }
    }
}

/// Gives a connection a thread of its own: whoever is slow, or hostile, is slow alone.
fn take_in(shared: &Arc<Shared>, stream: TcpStream, peer: SocketAddr) {
    if shared.connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
        shared.connections.fetch_sub(1, Ordering::Relaxed);
        let what = format!("{peer} was turned away: {CONNECTIONS_MAX} connections are open.");
        shared.strangers.complain(&what);
        return;
    }
    let ticket = match shared.strangers.enter(&stream, peer) {
        Ok(ticket) => ticket,
        Err(error) => {
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            shared.strangers.log(peer, &error);
            return;
        }
    };
    let sharing = Arc::clone(shared);
    let serve = move || {
        converse(&sharing, stream, peer, ticket);
        sharing.connections.fetch_sub(1, Ordering::Relaxed);
    };
    if let Err(error) = dtloop_runtime::spawn(&format!("session {peer}"), serve) {
        shared.connections.fetch_sub(1, Ordering::Relaxed);
        tracing::error!("{peer} could not be served: {error}.");
    }
}

fn converse(shared: &Arc<Shared>, stream: TcpStream, peer: SocketAddr, ticket: Ticket) {
    let tls = shared.trust.as_ref().map(Trust::tls);
    let connection = stream
        .set_nonblocking(false)
        .and_then(|()| session::bound_handshake(&stream))
        .map_err(Into::into)
        .and_then(|()| Connection::accept(stream, tls, &|| ticket.makes_sense()));
    match connection {
        Ok(connection) => session::serve(shared, connection, peer, ticket),
        Err(error) => shared.strangers.log(peer, &error),
    }
}
