// SPDX-License-Identifier: GPL-2.0-only

//! The set's thread's end of the disk queue.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtloop_abi::CaptureStream;
use dtloop_core::ladder::{Ladder, QueueHealth};
use dtloop_core::spool::{Batch, Place};
use dtloop_journal::Position;
use dtloop_runtime::JoinHandle;

use super::{Shared, Spooler};
use crate::config::QueueConfig;
use crate::queue::{Home, QueueReader, Usage};

/// A connection waits for the look at what is in the queue, unless that does not get on for this long.
const READY_PATIENCE: Duration = Duration::from_secs(30);

/// What people see of a queue.
#[derive(Clone, Debug)]
pub struct View {
    /// Records that the target has not acknowledged.
    pub records: u64,
    /// Bytes of the batches that hold them.
    pub bytes: u64,
    /// When the oldest was made, in nanoseconds of this machine's clock; 0: none, or not known.
    pub oldest_ns: u64,
    /// State.
    pub health: QueueHealth,
    /// Space.
    pub usage: Usage,
}

/// See the module documentation.
pub struct QueueHandle {
    shared: Arc<Shared>,
    reader: QueueReader,
    home: Home,
    thread: Option<JoinHandle<()>>,
    /// What the thread was last told to be acknowledged.
    told: u64,
}

impl QueueHandle {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// If the system gives none.
    pub fn start(
        set: &str,
        home: Home,
        stream: Arc<dyn CaptureStream>,
        ladder: Ladder,
        begin: Instant,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::new(ladder));
        let spooler = Spooler::new(set, &shared, home.clone(), stream, begin);
        Ok(Self {
            shared,
            reader: QueueReader::new(home.clone()),
            home,
            thread: Some(dtloop_runtime::spawn(&format!("queue {set}"), move || {
                spooler.run();
            })?),
            told: 0,
        })
    }

    /// Ends the thread; gives the ladder back.
    #[must_use]
    pub fn stop(mut self) -> Ladder {
        self.end();
        self.shared.lock().ladder.clone()
    }

    fn end(&mut self) {
        self.shared.lock().stop = true;
        dtloop_runtime::notify_all(&self.shared.changed);
        if let Some(thread) = self.thread.take() {
            if thread.join().is_err() {
                tracing::error!("The thread of a disk queue ended with a panic.");
            }
        }
    }

    /// Waits until it is known what is in the queue, or that has been waited for long enough. False: it is not yet.
    #[must_use]
    pub fn await_ready(&self, timeout: Duration) -> bool {
        let begin = dtloop_runtime::now();
        let mut inner = self.shared.lock();
        loop {
            if inner.found || dtloop_runtime::elapsed(inner.found_at) > READY_PATIENCE {
                return true;
            }
            let left = timeout.saturating_sub(dtloop_runtime::elapsed(begin));
            if left.is_zero() {
                return false;
            }
            let (changed, mutex) = (&self.shared.changed, &self.shared.inner);
            inner = dtloop_runtime::wait_timeout(changed, mutex, inner, left);
        }
    }

    /// The oldest record that can be sent.
    #[must_use]
    pub fn first_seq(&self, released: u64) -> u64 {
        self.shared.lock().spool.first_seq(released)
    }

    /// Where a record is.
    #[must_use]
    pub fn place(&self, seq: u64, released: u64) -> Place<Position> {
        self.shared.lock().spool.place(seq, released)
    }

    /// Reads a batch.
    ///
    /// # Errors
    ///
    /// Why it cannot be read.
    pub fn read(&mut self, batch: &Batch<Position>) -> Result<Arc<Vec<u8>>, String> {
        self.reader.read(batch)
    }

    /// The first record from `seq` on that can be read, as far as is known from looking at the batches there.
    pub fn next_readable(&mut self, mut seq: u64) -> u64 {
        loop {
            let place = {
                let inner = self.shared.lock();
                inner.spool.place(seq, u64::MAX)
            };
            let Place::Queue(batch) = place else {
                return seq;
            };
            if self.reader.read(&batch).is_ok() {
                return seq;
            }
            self.on_unreadable(seq);
            seq = batch.next;
        }
    }

    /// Record `seq` and what is behind it in its batch cannot be read.
    pub fn on_unreadable(&self, seq: u64) {
        self.shared.lock().spool.on_unreadable(seq);
    }

    /// Records below `to` are not sent any more.
    pub fn give_up(&self, to: u64) {
        self.shared.lock().spool.give_up(to);
    }

    /// Records up to this one are durable on the target.
    pub fn on_ack(&mut self, durable_seq: u64) {
        if durable_seq >= self.told {
            self.told = durable_seq + 1;
            let mut inner = self.shared.lock();
            inner.spool.on_ack(durable_seq);
            let emptied = inner.spool.records() == 0;
            drop(inner);
            if emptied {
                self.reader.let_go();
            }
        }
    }

    /// The target takes records, or does not.
    pub fn set_connected(&self, connected: bool) {
        self.shared.lock().connected = connected;
    }

    /// Whether records are being moved into the queue: what mirrors read would only make it longer.
    #[must_use]
    pub fn spools(&self) -> bool {
        let inner = self.shared.lock();
        inner.health == QueueHealth::Usable && inner.ladder.spools()
    }

    /// The ladder as it stands.
    #[must_use]
    pub fn ladder(&self) -> Ladder {
        self.shared.lock().ladder.clone()
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.home.dir
    }

    /// How it is configured.
    #[must_use]
    pub fn config(&self) -> &QueueConfig {
        &self.home.config
    }

    /// Records in the queue that the target has not acknowledged.
    #[must_use]
    pub fn records(&self) -> u64 {
        self.shared.lock().spool.records()
    }

    /// Every record below is durable on the target, as far as this agent knows.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.shared.lock().spool.acked()
    }

    /// For people.
    #[must_use]
    pub fn view(&self) -> View {
        let inner = self.shared.lock();
        let oldest = inner.spool.oldest();
        View {
            records: inner.spool.records(),
            bytes: inner.spool.bytes(),
            oldest_ns: oldest.map_or(0, |batch| batch.time_ns),
            health: inner.health.clone(),
            usage: inner.usage,
        }
    }
}

impl Drop for QueueHandle {
    fn drop(&mut self) {
        self.end();
    }
}
