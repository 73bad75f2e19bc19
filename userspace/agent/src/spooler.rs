// SPDX-License-Identifier: GPL-2.0-only

//! The thread that moves records from the ring into the disk queue. It has a thread of its own so that neither waits
//! for the other: a target that does not answer does not keep the ring from being emptied, and a queue disk that
//! hangs does not keep records from being sent.
//!
//! ```text
//!            ring ----------------- set's thread ----> target
//!              |                       ^
//!              | fill > start_at       | records that the ring no longer holds
//!              v                       |
//!           spooler --> disk queue ----+
//! ```
//!
//! Both release the ring: the set's thread what the target has acknowledged, this one what the queue holds durably.
//! What they share is in one mutex, held for no I/O.

mod handle;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dtloop_abi::{CaptureStream, Hold, raw};
use dtloop_core::ladder::{Ladder, Moment, QueueHealth, Seen, Step};
use dtloop_core::spool::{Batch, Spool};
use dtloop_journal::{BatchInfo, Position};

pub use handle::{QueueHandle, View};

use crate::config::SyncMode;
use crate::queue::{Home, Queue, Trouble, Usage};
use crate::ship::Outbox;
use crate::site::{System, Taken, Verdict};
use crate::snapshot::{ms, unix_ms};

/// How often the ring is looked at: the default ring takes longer to fill from the start level on.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// And how often while nothing is in it.
const LOOK_IDLE: Duration = Duration::from_millis(100);

/// Pause before a full, failing or refused queue is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Bytes that are made durable at once.
const GROUP_BYTES: u64 = 8 << 20;

/// How often its space is looked at.
const MEASURE_EVERY: Duration = Duration::from_secs(1);

/// What cannot be read at first is tried again for this long.
const FIND_PATIENCE: Duration = Duration::from_secs(15);

/// What the set's thread and this one share.
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    ladder: Ladder,
    spool: Spool<Position>,
    health: QueueHealth,
    usage: Usage,
    connected: bool,
    /// It is known what is in the queue.
    found: bool,
    /// When the look at it last got on.
    found_at: Instant,
    stop: bool,
}

/// Time on two clocks.
#[must_use]
pub fn now(begin: Instant) -> Moment {
    Moment {
        steady_ms: ms(dtloop_runtime::elapsed(begin)),
        unix_ms: unix_ms(),
    }
}

/// How full the ring is in percent, by payload or by descriptors, whichever is more.
#[must_use]
pub fn ring_percent(status: &raw::StreamStatus) -> u8 {
    let percent = |part: u64, all: u64| part.saturating_mul(100) / all.max(1);
    let records = status.next_seq.saturating_sub(status.released);
    let fill = percent(status.used_bytes, status.payload_bytes)
        .max(percent(records, status.desc_count.into()));
    u8::try_from(fill.min(100)).unwrap_or(100)
}

impl Shared {
    fn new(ladder: Ladder) -> Self {
        let inner = Inner {
            ladder,
            spool: Spool::default(),
            health: QueueHealth::Usable,
            usage: Usage::default(),
            connected: false,
            found: false,
            found_at: dtloop_runtime::now(),
            stop: false,
        };
        Self {
            inner: Mutex::new(inner),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread.
struct Spooler {
    set: String,
    shared: Arc<Shared>,
    home: Home,
    stream: Arc<dyn CaptureStream>,
    system: System,
    queue: Option<Queue>,
    outbox: Outbox,
    /// The beginning of the ladder's time.
    begin: Instant,
    /// When this thread began.
    began: Instant,
    retry_at: Option<Instant>,
    /// What was logged last.
    said: QueueHealth,
    doubted: bool,
    /// What was released when writers were last woken.
    kicked: u64,
    /// When the space was last looked at.
    measured: Option<Instant>,
}

/// A batch that was put together.
struct Packed {
    hold: Hold,
    info: BatchInfo,
    time_ns: u64,
    /// A device joined.
    joins: bool,
}

impl Spooler {
    fn new(
        set: &str,
        shared: &Arc<Shared>,
        home: Home,
        stream: Arc<dyn CaptureStream>,
        begin: Instant,
    ) -> Self {
        Self {
            set: set.to_owned(),
            shared: Arc::clone(shared),
            home,
            stream,
            system: System::default(),
            queue: None,
            outbox: Outbox::default(),
            begin,
            began: dtloop_runtime::now(),
            retry_at: None,
            said: QueueHealth::Usable,
            doubted: false,
            kicked: 0,
            measured: None,
        }
    }

    fn run(mut self) {
        loop {
            let pause = self.turn();
            let inner = self.shared.lock();
            if inner.stop {
                return;
            }
            if !pause.is_zero() {
                let (changed, mutex) = (&self.shared.changed, &self.shared.inner);
                drop(dtloop_runtime::wait_timeout(changed, mutex, inner, pause));
            }
        }
    }

    /// Looks once, and does what is to be done. Gives the time to the next look.
    fn turn(&mut self) -> Duration {
        let due = self.retry_at.is_none_or(|at| dtloop_runtime::now() >= at);
        if self.queue.is_none() && due {
            self.find();
        }
        let Ok(status) = self.stream.status() else {
            return LOOK_IDLE;
        };
        self.look(&status);
        if due && self.queue.is_some() {
            self.free();
            let spools = self.shared.lock().ladder.spools();
            if spools && self.spool_group() {
                return Duration::ZERO;
            }
            if !spools {
                self.probe();
            }
        }
        self.wake_writers();
        if status.next_seq == status.released {
            LOOK_IDLE
        } else {
            LOOK_EVERY
        }
    }

    /// Whoever waits for room learns of what a hold kept from being released.
    fn wake_writers(&mut self) {
        let ring = self.stream.ring();
        let released = ring.released();
        if released > self.kicked && ring.space_wanted() {
            self.kicked = released;
            // The set's thread notices when the stream is of no more use.
            let _ = self.stream.kick();
        }
    }

    fn look(&mut self, status: &raw::StreamStatus) {
        let now = now(self.begin);
        let mut inner = self.shared.lock();
        let seen = Seen {
            ring_percent: ring_percent(status),
            gap: status.has(raw::STREAM_GAP),
            marked: status.gap_changes,
            connected: inner.connected,
            queued: inner.spool.span(),
            health: inner.health.clone(),
        };
        let step = inner.ladder.observe(now, &seen).cloned();
        drop(inner);
        if let Some(step) = step {
            log_step(&self.set, &step);
        }
    }

    fn find(&mut self) {
        let released = self.stream.ring().released();
        let shared = Arc::clone(&self.shared);
        let tolerant = dtloop_runtime::elapsed(self.began) > FIND_PATIENCE;
        let found = Queue::find(self.home.clone(), released, tolerant, || {
            shared.lock().found_at = dtloop_runtime::now();
        });
        match found {
            Ok((queue, spool)) => {
                if spool.records() > 0 {
                    tracing::info!(
                        "Set \"{}\": the disk queue {} holds {} records.",
                        self.set,
                        self.home.dir.display(),
                        spool.records()
                    );
                }
                self.queue = Some(queue);
                let mut inner = self.shared.lock();
                inner.spool = spool;
                inner.found = true;
                drop(inner);
                dtloop_runtime::notify_all(&self.shared.changed);
                // What is there is sent, wherever it lies.
                let judged = self.judge();
                self.on_health(judged.err().unwrap_or(QueueHealth::Usable));
            }
            Err(health) => {
                // Nothing of somebody else's queue is needed.
                if matches!(health, QueueHealth::Refused(_)) {
                    self.shared.lock().found = true;
                }
                self.on_health(health);
            }
        }
    }

    /// Refuses a queue that lies on a device of the set.
    fn judge(&mut self) -> Result<(), QueueHealth> {
        let devices = self.stream.devices().unwrap_or_default();
        match self.system.judge(&self.home.dir, &Taken::of(&devices)) {
            Verdict::Good => Ok(()),
            Verdict::Doubtful(reason) => {
                if !std::mem::replace(&mut self.doubted, true) {
                    tracing::warn!("Set \"{}\": {reason}.", self.set);
                }
                Ok(())
            }
            Verdict::Refused(reason) => Err(QueueHealth::Refused(reason)),
        }
    }

    fn on_health(&mut self, health: QueueHealth) {
        self.retry_at = (health != QueueHealth::Usable).then(|| dtloop_runtime::now() + RETRY);
        self.shared.lock().health = health.clone();
        if health == self.said {
            return;
        }
        match &health {
            QueueHealth::Usable => {
                tracing::info!("Set \"{}\": the disk queue can be used again.", self.set);
            }
            other => tracing::error!(
                "Set \"{}\": the disk queue {} is {}: {}. Without it a full ring means the dirty map.",
                self.set,
                self.home.dir.display(),
                other.label(),
                other.reason()
            ),
        }
        self.said = health;
    }

    /// Gives back what the target holds.
    fn free(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        let oldest = self.shared.lock().spool.oldest().map(|batch| batch.place);
        let mut result = queue.free(oldest);
        if result.is_ok()
            && self
                .measured
                .is_none_or(|at| dtloop_runtime::elapsed(at) > MEASURE_EVERY)
        {
            self.measured = Some(dtloop_runtime::now());
            result = queue.usage().map(|usage| self.shared.lock().usage = usage);
        }
        if let Err(health) = result {
            self.on_health(health);
        }
    }

    /// Whether a queue that was full or refused is so no longer. One that failed has to be written to.
    fn probe(&mut self) {
        if !matches!(self.said, QueueHealth::Full(_) | QueueHealth::Refused(_)) {
            return;
        }
        let judged = self.judge();
        let probed = judged.and_then(|()| self.queue.as_mut().map_or(Ok(()), Queue::probe));
        self.on_health(probed.err().unwrap_or(QueueHealth::Usable));
    }

    /// Moves some records into the queue. False: there is nothing to be moved, or it does not work just now.
    fn spool_group(&mut self) -> bool {
        // Every time: something else may have been mounted there.
        let (mut bytes, mut full) = (0, self.judge().err());
        while bytes < GROUP_BYTES && full.is_none() && !self.shared.lock().stop {
            match self.write_batch() {
                Ok(None) => break,
                Ok(Some(batch)) => {
                    bytes += batch.bytes;
                    self.shared.lock().spool.on_written(batch);
                    if self.home.config.sync == SyncMode::Each && !self.settle() {
                        return false;
                    }
                }
                Err(trouble) if trouble.keeps => full = Some(trouble.health),
                Err(trouble) => {
                    self.shared.lock().spool.on_failed();
                    self.on_health(trouble.health);
                    return false;
                }
            }
        }
        if bytes > 0 && !self.settle() {
            return false;
        }
        match full {
            Some(health) => {
                self.on_health(health);
                false
            }
            None => {
                if bytes > 0 {
                    self.on_health(QueueHealth::Usable);
                }
                bytes > 0
            }
        }
    }

    /// Makes durable what was written, and only then lets the ring go.
    fn settle(&mut self) -> bool {
        let Some(queue) = &mut self.queue else {
            return false;
        };
        if let Err(health) = queue.sync() {
            self.shared.lock().spool.on_failed();
            self.on_health(health);
            return false;
        }
        let ring = self.stream.ring();
        let releasable = {
            let mut inner = self.shared.lock();
            inner.spool.on_synced();
            inner.spool.releasable(ring.released())
        };
        if let Err(error) = ring.release(releasable) {
            tracing::error!("Set \"{}\": {error}.", self.set);
            return false;
        }
        self.wake_writers();
        true
    }

    fn write_batch(&mut self) -> Result<Option<Batch<Position>>, Trouble> {
        let Some(packed) = self.pack() else {
            return Ok(None);
        };
        if packed.joins {
            self.judge().map_err(Trouble::refused)?;
        }
        let Some(queue) = &mut self.queue else {
            return Ok(None);
        };
        let slices = self.outbox.slices(Some(&packed.hold));
        let Ok(slices) = slices else { return Ok(None) };
        let written = queue.append(&slices, packed.info, packed.time_ns);
        self.outbox.clear();
        written.map(Some)
    }

    /// Puts the next records of the ring into the outbox. What cannot be read from the ring, the set's thread meets too,
    /// and says so.
    fn pack(&mut self) -> Option<Packed> {
        let ring = self.stream.ring();
        let from = self.shared.lock().spool.append_at(ring.released());
        let hold = ring.hold(from).ok()?;
        self.outbox.clear();
        let (mut seq, mut digest) = (from, crc32fast::Hasher::new());
        let (mut time_ns, mut joins) = (0, false);
        while seq < hold.end() && !self.outbox.is_full() {
            let record = hold.record(seq).ok()?;
            let place = self.outbox.place();
            self.outbox.record(0, &record.desc, record.payload).ok()?;
            digest.update(self.outbox.header_at(place));
            if seq == from {
                time_ns = record.desc.time_ns;
            }
            joins |= matches!(record.desc.op, raw::OP_ATTACH | raw::OP_GAP);
            seq += 1;
        }
        let frames = u32::try_from(seq - from)
            .ok()
            .filter(|frames| *frames > 0)?;
        let info = BatchInfo {
            frames,
            digest: digest.finalize(),
            first_seq: from,
            next_seq: seq,
        };
        Some(Packed {
            hold,
            info,
            time_ns,
            joins,
        })
    }
}

/// Logs a step of the ladder.
pub fn log_step(set: &str, step: &Step) {
    let (from, to) = (step.from.label(), step.to.label());
    if step.to > step.from {
        tracing::warn!("Set \"{set}\": {from} -> {to}: {}.", step.reason);
    } else {
        tracing::info!("Set \"{set}\": {from} -> {to}: {}.", step.reason);
    }
}
