// SPDX-License-Identifier: GPL-2.0-only

//! A set of a source, as long as the program runs: its journal, its applier, its one session.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dtloop_core::sequence::Sequencer;
use dtloop_disk::Disk;
use dtloop_journal::Options;
use dtloop_proto::Uuid;
use dtloop_proto::limits::FRAME_BYTES_MAX;
use dtloop_runtime::JoinHandle;

use crate::applier::{self, Applier, Batch, Command, Flags, OpenError, Parts, Pause, Settings};
use crate::catalog::Catalog;
use crate::clock::RealClock;
use crate::config::Config;
use crate::journal::{Horizon, Journal};
use crate::outlet::Outlet;
use crate::transport::Connection;

/// Bytes of a receive buffer: a largest frame, and enough for a batch that is worth its fdatasync.
pub const BUFFER_BYTES: usize = 2 << 20;
const _: () = assert!(BUFFER_BYTES > FRAME_BYTES_MAX);

/// Receive buffers of a set: one being filled, the others on their way to the volumes.
const BUFFERS: usize = if cfg!(feature = "simulation") { 3 } else { 6 };

/// What a session needs for itself alone.
pub struct Writer {
    /// The journal.
    pub journal: Journal,
    /// The sequence of durable records.
    pub sequence: Sequencer,
    /// The stream.
    pub stream_uuid: Uuid,
    /// The way to the applier.
    pub commands: SyncSender<Command>,
    /// Empty buffers.
    pub buffers: Receiver<Batch>,
    /// The buffers that the last session had at hand.
    pub stash: Vec<Batch>,
}

/// See the module documentation.
pub struct Replica {
    /// What is told to the source.
    pub outlet: Arc<Outlet>,
    dir: PathBuf,
    flags: Arc<Flags>,
    horizon: Arc<Horizon>,
    writer: Mutex<Option<Writer>>,
    session: Mutex<Option<Connection>>,
    takeovers: AtomicU64,
    commands: SyncSender<Command>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The directory of a set: its name for people, the source's id because names repeat.
#[must_use]
pub fn set_dir(state_dir: &Path, source_id: Uuid, set: &str) -> PathBuf {
    state_dir.join("sets").join(format!("{set}.{source_id}"))
}

fn random_salt() -> std::io::Result<u64> {
    let bytes = dtloop_store::random_uuid()?.0;
    let low = bytes.first_chunk().copied().unwrap_or_default();
    Ok(u64::from_le_bytes(low))
}

/// Replays the journal. Whoever asked for the set is told what fails, and asks again.
///
/// # Errors
///
/// If state, journal or a volume cannot be used.
fn replay(applier: &mut Applier) -> Result<(), OpenError> {
    loop {
        match applier.replay() {
            Ok(()) => return Ok(()),
            Err(Pause::Again) => {}
            Err(Pause::Blocked(complaint)) => return Err(OpenError::Blocked(complaint)),
            Err(Pause::Fatal(error)) => return Err(error),
        }
    }
}

impl Replica {
    /// Opens a set, replays its journal and starts its applier.
    ///
    /// # Errors
    ///
    /// If its state or journal cannot be used.
    pub fn open(
        source_id: Uuid,
        set: &str,
        catalog: Arc<Catalog>,
        disk: Arc<dyn Disk>,
        config: &Config,
        in_place: bool,
    ) -> Result<Self, OpenError> {
        let dir = set_dir(&config.state_dir, source_id, set);
        disk.make_dir(&dir)?;
        let parts = Parts {
            disk: Arc::clone(&disk),
            clock: Arc::new(RealClock::default()),
            catalog,
            outlet: Arc::default(),
            horizon: Arc::default(),
            flags: Arc::default(),
        };
        parts.flags.in_place.store(in_place, Ordering::Relaxed);
        let mut applier = Self::load(parts.clone(), &dir, source_id, set, config)?;
        replay(&mut applier)?;
        let next_seq = applier.state().applied_seq + 1;
        let stream_uuid = applier.state().stream_uuid;
        let (outlet, horizon, flags) = (parts.outlet, parts.horizon, parts.flags);
        let config = config.journal;
        let options = Options {
            bytes: config.size.0,
            segment_bytes: config.segment_size.0,
            min_free: 0,
            owner: source_id,
            salt: random_salt()?,
        };
        let horizon_of_journal = Arc::clone(&horizon);
        let journal = Journal::open(disk, &dir.join("journal"), options, horizon_of_journal)?;
        outlet.update(|ack| ack.durable_seq = next_seq - 1);
        let (commands, inbox) = sync_channel(BUFFERS);
        let (returns, buffers) = channel();
        for _ in 0..BUFFERS {
            let _ = returns.send(Batch {
                buffer: vec![0; BUFFER_BYTES],
                ..Batch::default()
            });
        }
        let thread = Self::spawn(set, applier, inbox, returns)?;
        let sequence = Sequencer::new(next_seq);
        let writer = Writer {
            journal,
            sequence,
            stream_uuid,
            commands: commands.clone(),
            buffers,
            stash: vec![],
        };
        Ok(Self {
            outlet,
            dir,
            flags,
            horizon,
            writer: Mutex::new(Some(writer)),
            session: Mutex::new(None),
            takeovers: AtomicU64::new(0),
            commands,
            thread: Mutex::new(Some(thread)),
        })
    }

    fn load(
        parts: Parts,
        dir: &Path,
        source_id: Uuid,
        set: &str,
        config: &Config,
    ) -> Result<Applier, OpenError> {
        let settings = Settings {
            checkpoint_bytes: config.journal.size.0 / 4,
            staging: config.staging.clone(),
            threads: config.apply_threads,
        };
        Applier::load(parts, settings, dir, source_id, set)
    }

    fn spawn(
        set: &str,
        applier: Applier,
        inbox: Receiver<Command>,
        returns: Sender<Batch>,
    ) -> std::io::Result<JoinHandle<()>> {
        let name = set.to_owned();
        dtloop_runtime::spawn(&format!("apply {set}"), move || {
            if let Err(error) = applier::thread::run(applier, &inbox, &returns) {
                tracing::error!(
                    "Set \"{name}\" is no longer applied: {:#}. Restart dttarget when the cause is removed.",
                    anyhow::Error::from(error)
                );
            }
        })
    }

    /// An operator gives up the last consistent state of the set, for this once.
    pub fn give_up_stage(&self) {
        self.flags.in_place.store(true, Ordering::Relaxed);
    }

    /// How often the set was taken over by a new connection.
    #[must_use]
    pub fn takeovers(&self) -> u64 {
        self.takeovers.load(Ordering::Relaxed)
    }

    /// Takes the set over for a new connection; an older one is ended first.
    pub fn take_over(&self, connection: Connection) -> MutexGuard<'_, Option<Writer>> {
        self.takeovers.fetch_add(1, Ordering::Relaxed);
        let former = lock(&self.session).replace(connection);
        if let Some(former) = former {
            former.shutdown();
        }
        dtloop_runtime::lock(&self.writer)
    }

    /// Where the set is kept.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Whether the program ends.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.flags.stop.load(Ordering::Relaxed)
    }

    /// Ends session and applier, with a checkpoint unless abandoned.
    pub fn stop(&self, abandon: bool) {
        self.flags.abandon.store(abandon, Ordering::Relaxed);
        self.flags.stop.store(true, Ordering::Relaxed);
        self.horizon.stop();
        if let Some(session) = lock(&self.session).take() {
            session.shutdown();
        }
        // The session has ended when its writer is free.
        drop(dtloop_runtime::lock(&self.writer).take());
        // The applier may have ended by itself.
        let _ = dtloop_runtime::send(&self.commands, Command::Stop);
        if let Some(thread) = lock(&self.thread).take() {
            if thread.join().is_err() {
                tracing::error!("The applier of {} ended with a panic.", self.dir.display());
            }
        }
    }
}
