// SPDX-License-Identifier: GPL-2.0-only

//! What the set's thread does with the disk queue: sends from it what the ring no longer holds.
//!
//! Order: the next record to be sent is `next_to_send`, wherever it is. The ring is asked first; a record that it has
//! given back is in the queue or acknowledged (`core::spool`). A hole in the queue is never stepped over: when
//! everything before it is acknowledged, the connection is ended and the next hello begins behind it. The target then
//! finds the hole as it finds any other, and the devices are compared.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use dtloop_abi::{CaptureStream, Error, Hold};
use dtloop_api as api;
use dtloop_core::ladder::{Ladder, QueueHealth, Rung, Seen};
use dtloop_core::mirror::Planner;
use dtloop_core::resync::Resync;
use dtloop_core::spool::{Batch, Place};
use dtloop_journal::Position;
use dtloop_proto::Op;

use super::{End, Sent, Session, Worker};
use crate::link::LinkError;
use crate::queue::{Home, Owner, stored};
use crate::snapshot::unix_ms;
use crate::spooler::{self, QueueHandle, log_step, ring_percent};

/// How long the ring is held for a target that does not take its records, when there is a queue that could take them.
const HOLD_PATIENCE: Duration = Duration::from_millis(100);

/// How long a connection waits for the look at what is in the queue before it says so.
const QUEUE_WAIT: Duration = Duration::from_secs(1);

/// Where the next records to be sent are.
pub(super) enum Source {
    /// In the ring.
    Ring(Hold),
    /// In this batch of the queue.
    Queue(Batch<Position>),
    /// Nowhere, and what was sent before is waited for; or it has just changed places.
    Nothing,
}

/// What was put into the outbox out of a batch.
struct Packed {
    /// The first record that was not.
    next: u64,
    sent: Sent,
    /// Why that one was not.
    fault: Option<String>,
}

impl Packed {
    fn up_to(next: u64, sent: Sent, fault: impl Into<String>) -> Self {
        let fault = Some(fault.into());
        Self { next, sent, fault }
    }

    fn nothing(next: u64, fault: String) -> Self {
        Self::up_to(next, Sent::default(), fault)
    }
}

/// Records that can no longer be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LostRange {
    from: u64,
    to: u64,
    reason: String,
}

impl fmt::Display for LostRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (from, last, reason) = (self.from, self.to - 1, &self.reason);
        write!(
            f,
            "records {from} to {last} cannot be read back from the disk queue ({reason})"
        )
    }
}

impl Worker {
    /// Starts the queue of a stream, if one is configured.
    pub(super) fn start_queue(&mut self, stream: &Arc<dyn CaptureStream>) {
        let Some(config) = &self.config.queue else {
            return;
        };
        let owner = Owner {
            source_id: self.source_id,
            stream_uuid: self.memory.stream_uuid,
        };
        let home = Home {
            disk: Arc::clone(&self.queue_disk),
            dir: config.dir.join(&self.config.name),
            config: config.clone(),
            owner,
        };
        let started = QueueHandle::start(
            &self.config.name,
            home,
            Arc::clone(stream),
            self.ladder.clone(),
            self.began,
        );
        match started {
            Ok(queue) => self.queue = Some(queue),
            Err(error) => tracing::error!(
                "Set \"{}\": it goes on without its disk queue: {error}.",
                self.config.name
            ),
        }
    }

    pub(super) fn stop_queue(&mut self) {
        if let Some(queue) = self.queue.take() {
            self.ladder = queue.stop();
        }
        self.hole = None;
    }

    pub(super) fn tell_queue(&self, connected: bool) {
        if let Some(queue) = &self.queue {
            queue.set_connected(connected);
        }
    }

    pub(super) fn tell_acked(&mut self, session: &Session) {
        if let Some(queue) = &mut self.queue {
            queue.on_ack(session.core.ack().durable_seq);
        }
    }

    /// Where the set begins is known only when it is known what is in the queue.
    pub(super) fn await_queue(&self) -> Result<(), End> {
        let ready = |queue: &QueueHandle| queue.await_ready(QUEUE_WAIT);
        if self.queue.as_ref().is_none_or(ready) {
            return Ok(());
        }
        let text = "the disk queue is being looked at";
        Err(LinkError::Io(io::Error::other(text)).into())
    }

    /// The oldest record that can be sent.
    pub(super) fn first_seq(&self, stream: &dyn CaptureStream) -> u64 {
        let released = stream.ring().released();
        let queue = self.queue.as_ref();
        queue.map_or(released, |queue| queue.first_seq(released))
    }

    pub(super) fn is_all_shipped(&self, stream: &dyn CaptureStream) -> bool {
        let queued = self.queue.as_ref().map_or(0, QueueHandle::records);
        queued == 0 && stream.ring().released() == stream.ring().next_seq()
    }

    /// How long the ring may be held while a batch is sent.
    pub(super) fn hold_patience(&self) -> Option<Duration> {
        self.queue.as_ref().map(|_| HOLD_PATIENCE)
    }

    /// Mirror and resync wait while records are in the queue or on their way into it: what they read would come behind
    /// those, and only make the queue longer.
    pub(super) fn spares_the_queue(&self, stream: &dyn CaptureStream, session: &Session) -> bool {
        let waits = session.core.next_to_send() < stream.ring().released();
        let queue = self.queue.as_ref();
        queue.is_some_and(|queue| waits || queue.spools())
    }

    /// Finds the next record to be sent.
    pub(super) fn source_of(
        &mut self,
        stream: &dyn CaptureStream,
        session: &Session,
    ) -> Result<Source, End> {
        let (ring, next) = (stream.ring(), session.core.next_to_send());
        let Some(queue) = &self.queue else {
            return Ok(Source::Ring(ring.hold(next)?));
        };
        match queue.place(next, ring.released()) {
            Place::Queue(batch) => Ok(Source::Queue(batch)),
            Place::Missing { to } => self.meet_hole(session, to),
            Place::Ring => match ring.hold(next) {
                Ok(hold) => Ok(Source::Ring(hold)),
                // It has just gone into the queue.
                Err(Error::OutOfRange { .. }) if next < ring.released() => Ok(Source::Nothing),
                Err(error) => Err(error.into()),
            },
        }
    }

    /// Sends what is left of a batch of the queue. False: nothing could be sent.
    pub(super) fn send_stored(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        batch: &Batch<Position>,
        room: usize,
    ) -> Result<bool, End> {
        let Some(queue) = &mut self.queue else {
            return Ok(false);
        };
        let first = session.core.next_to_send();
        let packed = match queue.read(batch) {
            Ok(frames) => self.pack_stored(stream, session, batch.next, &frames, room)?,
            Err(reason) => Packed::nothing(first, reason),
        };
        if let Some(reason) = packed.fault {
            self.on_unreadable(packed.next, batch, reason);
        }
        self.send_batch(stream, session, None, packed.sent, packed.next)
    }

    /// Puts the records of a batch that are to be sent, those below `end`, into the outbox, up to the first damaged one or
    /// until it holds `room` bytes.
    fn pack_stored(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        end: u64,
        frames: &[u8],
        room: usize,
    ) -> Result<Packed, End> {
        let first = session.core.next_to_send();
        let (mut seq, mut sent, mut rest) = (first, Sent::default(), frames);
        while seq < end && session.outbox.bytes() < room {
            let (record, bytes) = match stored(rest) {
                Ok(found) if found.0.seq <= seq => found,
                Ok(_) => return Ok(Packed::up_to(seq, sent, "a record is missing in it")),
                Err(reason) => return Ok(Packed::up_to(seq, sent, reason)),
            };
            rest = &rest[bytes..];
            if record.seq < seq {
                continue;
            }
            self.before_record(stream, session, &record.body)?;
            session.outbox.stored(session.id, record.frame)?;
            if seq == first {
                sent.time_ns = record.body.time_ns;
            }
            if sent.live_ns.is_none() && record.body.op != Op::Sync {
                sent.live_ns = Some(record.body.time_ns);
            }
            self.after_record(seq, &record.body);
            self.on_content(seq, record.kind, &record.body, record.payload);
            sent.bytes += record.payload.len() as u64;
            seq += 1;
        }
        Ok(Packed {
            next: seq,
            sent,
            fault: None,
        })
    }

    /// Adds records to the hash chain that a former agent sent, from `first` on and up to `last` at most, wherever they are.
    pub(super) fn chain_stored(
        &mut self,
        stream: &dyn CaptureStream,
        first: u64,
        last: u64,
    ) -> Result<(), End> {
        let ring = stream.ring();
        let queue = self.queue.as_mut();
        let place = match &queue {
            Some(queue) => queue.place(first, ring.released()),
            None if first < ring.released() => Place::Missing { to: first },
            None => Place::Ring,
        };
        match (place, queue) {
            (Place::Queue(batch), Some(queue)) => {
                // What cannot be read is no part of the chain, which then begins anew.
                let frames = queue.read(&batch).unwrap_or_default();
                let mut rest = &frames[..];
                while let Ok((record, bytes)) = stored(rest) {
                    rest = &rest[bytes..];
                    if (first..=last).contains(&record.seq) {
                        let (kind, body) = (record.kind, &record.body);
                        self.chain.chain.add(record.seq, kind, body, record.payload);
                    }
                }
            }
            (Place::Ring, _) => match ring.hold(first) {
                Ok(hold) => self.chain_held(&hold, first, last)?,
                // It has just gone into the queue.
                Err(Error::OutOfRange { .. }) => {}
                Err(error) => return Err(error.into()),
            },
            _ => {}
        }
        Ok(())
    }

    fn on_unreadable(&mut self, seq: u64, batch: &Batch<Position>, reason: String) {
        if let Some(queue) = &self.queue {
            queue.on_unreadable(seq);
        }
        self.hole = Some(LostRange {
            from: seq,
            to: batch.next,
            reason,
        });
    }

    /// The next record is nowhere. When all before it is acknowledged, the hole is given up.
    fn meet_hole(&mut self, session: &Session, to: u64) -> Result<Source, End> {
        if session.core.in_flight() > 0 {
            return Ok(Source::Nothing);
        }
        let from = session.core.next_to_send();
        // One hole for all that cannot be read, and not one after the other.
        let to = self
            .queue
            .as_mut()
            .map_or(to, |queue| queue.next_readable(to));
        let reason = self.hole.take().map(|hole| hole.reason);
        let lost = LostRange {
            from,
            to,
            reason: reason.unwrap_or_else(|| "they are not there".to_owned()),
        };
        tracing::error!(
            "Set \"{}\": {lost}. The devices will be compared.",
            self.config.name
        );
        if let Some(queue) = &self.queue {
            queue.give_up(to);
        }
        // The target begins its chain anew behind the hole. An agent that comes after this one must not go on with the
        // old one: the records may be readable for it.
        self.chain.forget();
        // Records that mirror and resync wait for may be among those lost.
        let planner = self.planner.take();
        self.planner = planner.map(|planner| Planner::new(planner.state().clone()));
        self.resync = Resync::new(vec![]);
        self.set_resync_devices();
        self.hole = Some(lost);
        Err(End::Lost)
    }

    /// Why records are missing, for people.
    pub(super) fn explain_hole(&mut self, from: u64, to: u64) -> String {
        match self.hole.take().filter(|hole| hole.to == to) {
            Some(hole) => LostRange { from, ..hole }.to_string(),
            None => format!("records {from} to {} are lost on the target", to - 1),
        }
    }

    /// Records in the queue that the target has not acknowledged, and bytes of the batches that hold them.
    pub(super) fn queued(&self) -> (u64, u64) {
        let view = self.queue.as_ref().map(QueueHandle::view);
        view.map_or((0, 0), |view| (view.records, view.bytes))
    }

    pub(super) fn oldest_queued_ns(&self) -> Option<u64> {
        let view = self.queue.as_ref().map(QueueHandle::view);
        view.map(|view| view.oldest_ns).filter(|time| *time > 0)
    }

    /// As far as is known while the target is away.
    pub(super) fn first_unacknowledged(&self, stream: &dyn CaptureStream) -> u64 {
        let acked = self.queue.as_ref().map_or(0, QueueHandle::acked);
        self.first_seq(stream).max(acked)
    }

    /// The ladder, looked at here when no queue has a thread that does.
    fn current_ladder(&mut self, stream: Option<&dyn CaptureStream>, connected: bool) -> Ladder {
        if let Some(queue) = &self.queue {
            return queue.ladder();
        }
        let status = stream.and_then(|stream| stream.status().ok());
        if let Some(status) = status {
            let seen = Seen {
                ring_percent: ring_percent(&status),
                gap: status.has(dtloop_abi::raw::STREAM_GAP),
                marked: status.gap_changes,
                connected,
                queued: 0,
                health: QueueHealth::Absent,
            };
            let now = spooler::now(self.began);
            if let Some(step) = self.ladder.observe(now, &seen).cloned() {
                log_step(&self.config.name, &step);
            }
        }
        self.ladder.clone()
    }

    pub(super) fn fill_ladder(
        &mut self,
        status: &mut api::SetStatus,
        stream: Option<&dyn CaptureStream>,
        connected: bool,
    ) {
        let ladder = self.current_ladder(stream, connected);
        let history = ladder.history().map(|step| api::LadderStep {
            at_unix_ms: step.at.unix_ms,
            from: rung(step.from),
            to: rung(step.to),
            reason: step.reason.clone(),
        });
        status.ladder = api::Ladder {
            rung: rung(ladder.rung()),
            since_unix_ms: ladder.since().unix_ms,
            reason: ladder.reason().to_owned(),
            history: history.collect(),
        };
        status.queue = self.queue.as_ref().map(queue_status);
    }
}

fn rung(rung: Rung) -> api::Rung {
    match rung {
        Rung::Ring => api::Rung::Ring,
        Rung::Draining => api::Rung::Draining,
        Rung::Spooling => api::Rung::Spooling,
        Rung::Tracking => api::Rung::Tracking,
    }
}

fn queue_status(queue: &QueueHandle) -> api::QueueStatus {
    let view = queue.view();
    let oldest_ms = (view.records > 0 && view.oldest_ns > 0)
        .then(|| unix_ms().saturating_sub(view.oldest_ns / 1_000_000));
    api::QueueStatus {
        dir: queue.dir().display().to_string(),
        state: view.health.label().to_owned(),
        reason: view.health.reason().to_owned(),
        records: view.records,
        bytes: view.bytes,
        disk_bytes: view.usage.used,
        size_bytes: queue.config().size.0,
        free_bytes: view.usage.free,
        min_free_bytes: queue.config().min_free.0,
        oldest_ms,
    }
}
