// SPDX-License-Identifier: GPL-2.0-only

//! What the set's thread tells about itself.

use std::sync::atomic::Ordering;
use std::time::Instant;

use dtloop_abi::{CaptureStream, raw};
use dtloop_api::{Connection, DeviceState, DeviceStatus, Pass, ProofStatus, Rates, SetStatus};
use dtloop_core::mirror::JobKind;
use dtloop_core::replica::DeviceMemory;
use dtloop_proto::Code;
use dtloop_proto::message::{Ack, StagingPhase, VolumeSync};

use super::{BUSY_WAIT, End, Measured, PUBLISH_EVERY, RATES_EVERY_MS, Session, Worker, lock};
use crate::snapshot::{Snapshot, ms, unix_ms};

/// Differing extents of the last verification that the status lists; all are in the log.
const EXTENTS_IN_STATUS: usize = 16;

/// What is told of a session.
#[derive(Clone, Copy)]
pub(super) struct View {
    since: Instant,
    ack: Ack,
    next_to_send: u64,
    /// When the oldest record was made that is not applied.
    oldest_ns: Option<u64>,
}

impl Session {
    pub(super) fn view(&self) -> View {
        View {
            since: self.since,
            ack: *self.core.ack(),
            next_to_send: self.core.next_to_send(),
            oldest_ns: self.batches.front().map(|sent| sent.time_ns),
        }
    }
}

impl Worker {
    pub(super) fn publish_if_due(
        &mut self,
        stream: &dyn CaptureStream,
        session: &Session,
    ) -> Result<(), End> {
        if !self.is_publication_due() {
            return Ok(());
        }
        if stream.status()?.has(raw::STREAM_BAD_CONSUMER) {
            return Err(End::Stream(
                "The kernel refused a release of this agent".to_owned(),
            ));
        }
        self.publish(Some(stream), Some(session.view()));
        Ok(())
    }

    pub(super) fn is_publication_due(&self) -> bool {
        let watched = self.shared.watchers.load(Ordering::Relaxed) > 0;
        let every = if watched {
            BUSY_WAIT * 10
        } else {
            PUBLISH_EVERY
        };
        dtloop_runtime::elapsed(self.published) >= every
    }

    pub(super) fn publish(&mut self, stream: Option<&dyn CaptureStream>, session: Option<View>) {
        self.published = dtloop_runtime::now();
        if let (Some(planner), Some(job)) = (&self.planner, &mut self.job) {
            job.state = planner.state().clone();
        }
        let mut snapshot = Snapshot::new(&self.config.name, &self.config.target);
        snapshot.status.connection = self.connection.clone();
        if let Some(session) = session {
            snapshot.status.connection = Connection::Connected {
                since_ms: ms(dtloop_runtime::elapsed(session.since)),
            };
        }
        snapshot.status.shaping = self.shaper.report();
        self.fill_ladder(&mut snapshot.status, stream, session.is_some());
        if let Some(stream) = stream {
            self.fill_positions(&mut snapshot.status, stream, session);
            snapshot.status.staging = self.staging_status();
            if let Ok(devices) = stream.devices() {
                self.watch(&devices);
                snapshot.status.devices = devices
                    .iter()
                    .map(|device| self.device_status(device))
                    .collect();
            }
        }
        snapshot.job.clone_from(&self.job);
        snapshot.status.proven = self.memory.proven.map(|proven| ProofStatus {
            seq: proven.seq,
            unix_ms: proven.unix_ms,
            since_seq: proven.since_seq,
        });
        snapshot.status.verify_schedule = self.schedule_status();
        let states = || snapshot.status.devices.iter().map(|device| &device.state);
        // What is staged is not in the volumes, where who waits will look for it.
        let direct = self.staging.phase == StagingPhase::Direct;
        let whole = |session: View| session.ack.applied_seq.saturating_add(1) >= self.whole_at;
        snapshot.settled = session.is_some_and(whole)
            && direct
            && self.resync.is_idle()
            && states().all(DeviceState::is_consistent);
        // A device that was mirrored once, or is to be, is mirrored without asking, as soon as the target is there; unless nobody
        // knows which of device and copy is newer.
        let by_itself = |device: &DeviceStatus| {
            let memory = self.memory.devices.get(&device.label);
            memory.is_some_and(|memory| memory.is_wanted() && memory.doubt.is_none())
        };
        let stuck = |device: &&DeviceStatus| match device.state {
            DeviceState::Error | DeviceState::VerifyNeeded { .. } => true,
            DeviceState::MirrorNeeded => !by_itself(device),
            _ => false,
        };
        snapshot.hopeless = snapshot.status.devices.iter().find(stuck).map(|device| {
            format!(
                "loop{} ({}): {}",
                device.number,
                device.state.label(),
                device.reason
            )
        });
        let mut published = lock(&self.shared.snapshot);
        *published = snapshot;
        self.shared.publications.fetch_add(1, Ordering::Relaxed);
        drop(published);
        self.shared.changed.notify_all();
    }

    pub(super) fn fill_positions(
        &mut self,
        status: &mut SetStatus,
        stream: &dyn CaptureStream,
        session: Option<View>,
    ) {
        let Ok(ring) = stream.status() else { return };
        status.stream_uuid = self.memory.stream_uuid.to_string();
        status.next_seq = ring.next_seq;
        status.released_seq = ring.released;
        status.durable_seq = self.first_unacknowledged(stream);
        status.applied_seq = lock(&self.shared.snapshot).status.applied_seq;
        let (queued, bytes) = self.queued();
        status.backlog_bytes = ring.used_bytes + bytes;
        status.backlog_records = ring.next_seq - ring.released + queued;
        if let Some(session) = session {
            status.sent_seq = session.next_to_send;
            status.durable_seq = session.ack.durable_seq + 1;
            status.applied_seq = session.ack.applied_seq + 1;
        }
        let oldest = session.and_then(|session| session.oldest_ns);
        let oldest = oldest.or_else(|| self.oldest_queued_ns());
        let oldest = oldest.or_else(|| {
            stream
                .ring()
                .desc(ring.released)
                .ok()
                .map(|desc| desc.time_ns)
        });
        let now_ns = unix_ms().saturating_mul(1_000_000);
        status.lag_ms = oldest.map_or(0, |time| now_ns.saturating_sub(time) / 1_000_000);
        self.measure(ring.next_seq);
        status.rates = self.rates;
        status.totals = self.totals;
    }

    pub(super) fn measure(&mut self, next_seq: u64) {
        let before = self.measured;
        let elapsed = ms(dtloop_runtime::elapsed(before.at));
        if elapsed < RATES_EVERY_MS {
            return;
        }
        let (payload, sent, applied) = (
            self.totals.payload_bytes,
            self.totals.sent_bytes,
            self.applied_bytes,
        );
        let per_s = |now: u64, before: u64| now.saturating_sub(before) * 1000 / elapsed;
        self.rates = Rates {
            captured_bytes_per_s: per_s(payload, before.payload),
            captured_records_per_s: per_s(next_seq, before.next_seq),
            sent_bytes_per_s: per_s(sent, before.sent),
            acknowledged_bytes_per_s: per_s(applied, before.applied),
        };
        self.measured = Measured {
            at: dtloop_runtime::now(),
            next_seq,
            payload,
            sent,
            applied,
        };
    }

    pub(super) fn device_status(&self, device: &raw::DeviceStatus) -> DeviceStatus {
        let (state, reason) = self.device_state(device);
        let number = device.loop_number();
        let last_verify = self
            .last_verify
            .iter()
            .find(|result| result.label == device.label())
            .cloned();
        let last_recovery = self
            .last_recovery
            .iter()
            .find(|recovery| recovery.label == device.label())
            .cloned();
        DeviceStatus {
            last_recovery,
            device_id: device.device_id,
            number,
            label: device.label().to_owned(),
            size_bytes: device.size_bytes(),
            state,
            reason,
            dirty_blocks: device.dirty_blocks,
            dirty_bytes: device.dirty_blocks * u64::from(device.dirty_block_bytes),
            last_verify: last_verify.map(|mut result| {
                result.extents.truncate(EXTENTS_IN_STATUS);
                dtloop_api::VerifyResult { number, ..result }
            }),
            alarm: self.alarm_status(device),
        }
    }

    pub(super) fn device_state(&self, device: &raw::DeviceStatus) -> (DeviceState, String) {
        let report = self
            .reports
            .iter()
            .find(|report| report.device == device.device_id);
        if let Some(report) = report.filter(|report| report.code != Code::OK) {
            return (DeviceState::Error, report.text.clone());
        }
        if let Connection::Refused { reason } = &self.connection {
            return (DeviceState::Error, reason.clone());
        }
        if let Some(notice) = &self.notice {
            return (DeviceState::Error, notice.clone());
        }
        let memory = self
            .memory
            .devices
            .get(device.label())
            .filter(|memory| memory.device == device.device_id);
        let mirrored = memory.is_some_and(|memory| memory.mirrored)
            && report.is_none_or(|report| report.sync == VolumeSync::Mirrored);
        let job = self.job.as_ref().filter(|_| self.planner.is_some());
        let item = job.and_then(|job| {
            job.state
                .devices
                .iter()
                .find(|item| item.device == device.device_id)
        });
        let item = item.filter(|item| !item.ended);
        if let (Some(job), Some(item)) = (job, item) {
            let recovers = job.state.kind == JobKind::Recover && mirrored;
            let is_quiet = self.alarm_status(device).is_none() && self.lost.is_none();
            if job.state.kind.is_mirror() || recovers || (mirrored && is_quiet) {
                return (job.device_state(item), job.state.reason.clone());
            }
        }
        if !mirrored {
            let last = self.memory.job.as_ref().and_then(|job| job.failed.clone());
            let once = memory.is_some_and(DeviceMemory::is_wanted);
            let doubt = memory.and_then(|memory| memory.doubt.clone());
            let reason = match doubt.or(last) {
                Some(reason) if self.planner.is_none() => reason,
                _ if once => "the target no longer holds a complete copy".to_owned(),
                _ => "it was never mirrored; run dtloop mirror start".to_owned(),
            };
            return (DeviceState::MirrorNeeded, reason);
        }
        if let Some(alarm) = self.alarm_status(device) {
            let pass = self.verify_pass(device.device_id);
            return (DeviceState::VerifyNeeded { pass }, alarm.text);
        }
        let dirty = device.dirty_blocks > 0;
        if dirty || self.lost.is_some() {
            let total_bytes = device.size_bytes();
            let left = device.dirty_blocks * u64::from(device.dirty_block_bytes);
            let pass = Pass {
                done_bytes: total_bytes.saturating_sub(left),
                total_bytes,
                ..Pass::default()
            };
            let reason =
                "changes were made that did not fit the stream; they are sent again".to_owned();
            return match self.lost {
                Some((from, to)) if !matches!(self.connection, Connection::Connected { .. }) => {
                    (DeviceState::OrderLost { from, to }, reason)
                }
                _ => (DeviceState::Resyncing { pass }, reason),
            };
        }
        if self.staging.phase != StagingPhase::Direct {
            let total_bytes = device.size_bytes();
            let pass = Pass {
                done_bytes: total_bytes.saturating_sub(self.staging.staged_bytes),
                total_bytes,
                ..Pass::default()
            };
            let reason = "the target writes what it staged into its volumes".to_owned();
            return (DeviceState::Resyncing { pass }, reason);
        }
        (DeviceState::InSync, String::new())
    }
}
