// SPDX-License-Identifier: GPL-2.0-only

//! The listening side and the sets of all sources.

use std::collections::HashMap;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use dtloop_core::binding::Refusal;
use dtloop_proto::{Code, Uuid};
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::applier::OpenError;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::door::Door;
use crate::replica::Replica;
use crate::session;
use crate::transport::Connection;

/// Most connections at one time: every set has one, and some may just be coming.
const CONNECTIONS_MAX: usize = 256;

/// How often the listener looks whether the program ends.
const ACCEPT_TICK: u16 = 200;

/// How long an end waits for a set that is being opened.
const CLOSE_TRIES: u32 = 50;

type Slot = Arc<Mutex<Option<Arc<Replica>>>>;

/// What all connections share.
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// Who this target is.
    pub target_id: Uuid,
    catalog: Arc<Catalog>,
    /// Who has not said hello yet.
    pub door: Arc<Door>,
    slots: Mutex<HashMap<(Uuid, String), Slot>>,
    sessions: AtomicU64,
    connections: AtomicUsize,
    stopping: AtomicBool,
}

impl Shared {
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
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(replica) = &*slot {
            return Ok(Arc::clone(replica));
        }
        if self.stopping.load(Ordering::Relaxed) {
            return Err(Refusal::new(Code::SHUTTING_DOWN, "The target ends"));
        }
        let catalog = Arc::clone(&self.catalog);
        let opened = Replica::open(source_id, set, catalog, &self.config, in_place);
        let replica = opened.map_err(|error| {
            let code = match &error {
                OpenError::Blocked(complaint) => complaint.code,
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
    _lock: Flock<File>,
}

/// Makes the state directory and takes it for this process.
///
/// # Errors
///
/// If it cannot be made or another process has it.
pub fn lock_state_dir(dir: &Path) -> Result<Flock<File>> {
    for part in ["sets", "volumes"] {
        let path = dir.join(part);
        fs::create_dir_all(&path).with_context(|| format!("Cannot make {}", path.display()))?;
    }
    let path = dir.join("lock");
    let file = File::create(&path).with_context(|| format!("Cannot open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        anyhow::anyhow!(
            "{} is in use by another dttarget ({errno}); stop that first",
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

impl Server {
    /// Starts: listens, and replays the journals of all known sets.
    ///
    /// # Errors
    ///
    /// If the state directory or the address cannot be used.
    pub fn start(config: Config) -> Result<Self> {
        let lock = lock_state_dir(&config.state_dir)?;
        let target_id = dtloop_store::identity(&config.state_dir.join("target-id"))?;
        let first_session = u64::from_le_bytes(dtloop_store::random_uuid()?.0[..8].try_into()?) | 1;
        let listener = TcpListener::bind(&config.listen)
            .with_context(|| format!("Cannot listen on {}", config.listen))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let catalog = Arc::new(Catalog::new(&config.state_dir, config.volumes.clone()));
        let known = known_sets(&config.state_dir)?;
        let shared = Arc::new(Shared {
            config,
            target_id,
            catalog,
            door: Arc::default(),
            slots: Mutex::default(),
            sessions: AtomicU64::new(first_session),
            connections: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
        });
        for (source_id, set) in known {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name(format!("open {set}"))
                .spawn(move || {
                    if let Err(refusal) = shared.replica(source_id, &set, false) {
                        tracing::error!("{refusal}.");
                    }
                })?;
        }
        let accepting = {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new()
                .name("accept".into())
                .spawn(move || accept_loop(&shared, &listener))?
        };
        tracing::info!("Target {target_id} listens on {address}, in plaintext.");
        Ok(Self {
            address,
            shared,
            accepting: Some(accepting),
            _lock: lock,
        })
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
        std::thread::sleep(Duration::from_millis(100));
    }
    tracing::warn!("A set is still being opened; its journal is replayed again at the next start.");
}

fn accept_loop(shared: &Arc<Shared>, listener: &TcpListener) {
    while !shared.stopping.load(Ordering::Relaxed) {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        // An interruption is as good as a time-out.
        let _ = nix::poll::poll(&mut fds, PollTimeout::from(ACCEPT_TICK));
        let Ok((stream, peer)) = listener.accept() else {
            continue;
        };
        if shared.connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            let what = format!("{peer} was turned away: {CONNECTIONS_MAX} connections are open.");
            shared.door.complain(&what);
            continue;
        }
        let shared = Arc::clone(shared);
        let Ok(place) = shared.door.enter(&stream) else {
            // It has gone already.
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            continue;
        };
        let serve = move || {
            let connection = stream
                .set_nonblocking(false)
                .and_then(|()| Connection::accept(shared.config.transport, stream));
            match connection {
                Ok(connection) => session::serve(&shared, connection, place),
                Err(error) => shared
                    .door
                    .complain(&format!("{peer} could not be served: {error}.")),
            }
            shared.connections.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(error) = std::thread::Builder::new()
            .name(format!("session {peer}"))
            .spawn(serve)
        {
            tracing::error!("{peer} could not be served: {error}.");
        }
    }
}
