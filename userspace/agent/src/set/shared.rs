// SPDX-License-Identifier: GPL-2.0-only

//! What the set's thread shares with the control socket.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use dtloop_api::{Bandwidth, BandwidthChange, Failure};
use dtloop_core::mirror::JobKind;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::config::SetConfig;
use crate::snapshot::Snapshot;

/// What `dtloop` asks of the thread. Answers go through the channel.
pub enum Command {
    /// Start a mirror or verification of these loop numbers, all if empty.
    Start {
        /// Loop numbers.
        devices: Vec<u32>,
        /// What.
        kind: JobKind,
        /// The job's id.
        reply: Sender<Result<u64, Failure>>,
    },
    /// Pause or resume.
    Pause {
        /// Which of the two.
        paused: bool,
        /// The job's id.
        reply: Sender<Result<u64, Failure>>,
    },
    /// Stop.
    Stop {
        /// The job's id.
        reply: Sender<Result<u64, Failure>>,
    },
    /// Show or change the bandwidth limit.
    Bandwidth {
        /// How.
        change: Option<BandwidthChange>,
        /// As it is afterwards.
        reply: Sender<Result<Bandwidth, Failure>>,
    },
    /// Let the target give up its last consistent state for this once.
    InPlace {
        /// Nothing.
        reply: Sender<Result<u64, Failure>>,
    },
    /// Report the next sequence number, after a look for changes outside of the stream.
    Wait {
        /// It.
        reply: Sender<Result<u64, Failure>>,
    },
}

/// What the thread shares with the control socket.
pub struct SetShared {
    pub(super) commands: Mutex<VecDeque<Command>>,
    pub(super) wake: EventFd,
    pub(super) snapshot: Mutex<Snapshot>,
    pub(super) publications: AtomicU64,
    pub(super) changed: Condvar,
    pub(super) watchers: AtomicUsize,
    stop: AtomicBool,
    verify_log: OnceLock<PathBuf>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SetShared {
    /// For a set that is about to start.
    ///
    /// # Errors
    ///
    /// If the system gives no event file.
    pub fn new(config: &SetConfig) -> std::io::Result<Self> {
        Ok(Self {
            commands: Mutex::default(),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?,
            snapshot: Mutex::new(Snapshot::new(&config.name, &config.target)),
            publications: AtomicU64::new(0),
            changed: Condvar::new(),
            watchers: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            verify_log: OnceLock::new(),
        })
    }

    /// Says where the log of verifications is.
    pub(super) fn set_verify_log(&self, path: &Path) {
        // There is one thread of a set, which says it once.
        let _ = self.verify_log.set(path.to_owned());
    }

    /// Where the log of verifications is.
    #[must_use]
    pub fn verify_log(&self) -> Option<&Path> {
        self.verify_log.get().map(PathBuf::as_path)
    }

    /// Asks the thread for something.
    pub fn command(&self, command: Command) {
        lock(&self.commands).push_back(command);
        self.wake();
    }

    fn wake(&self) {
        // It fails only when it is readable already.
        let _ = self.wake.write(1);
    }

    /// What was published last.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        lock(&self.snapshot).clone()
    }

    /// Waits for the next publication, which comes more often while somebody does. Without one in this time: the last one.
    pub fn next_snapshot(&self, timeout: Duration) -> Snapshot {
        let fresh = self.fresh_snapshot(timeout);
        fresh.unwrap_or_else(|| self.snapshot())
    }

    /// As [`SetShared::next_snapshot`], but nothing that was published before the call.
    pub fn fresh_snapshot(&self, timeout: Duration) -> Option<Snapshot> {
        let seen = self.publications.load(Ordering::Relaxed);
        self.watchers.fetch_add(1, Ordering::Relaxed);
        self.wake();
        let is_old = |_: &mut Snapshot| self.publications.load(Ordering::Relaxed) == seen;
        let (guard, waited) = self
            .changed
            .wait_timeout_while(lock(&self.snapshot), timeout, is_old)
            .unwrap_or_else(PoisonError::into_inner);
        self.watchers.fetch_sub(1, Ordering::Relaxed);
        (!waited.timed_out()).then(|| guard.clone())
    }

    /// Ends the thread.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
    }

    /// Whether it is to end.
    #[must_use]
    pub fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
