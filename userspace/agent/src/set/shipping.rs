// SPDX-License-Identifier: GPL-2.0-only

//! How the set's thread moves records to the target.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;

use dtloop_abi::{CaptureStream, Extent, Hold, raw};
use dtloop_api::Connection;
use dtloop_canary::Canary;
use dtloop_core::resync;
use dtloop_proto::message::{Notice, Refuse, VolumeReport};
use dtloop_proto::record::F_DEVICES;
use dtloop_proto::{Code, Message, Op, RecordBody};

use super::queueing::Source;
use super::{
    BUSY_WAIT, DEVICE_WAIT, End, IDLE_WAIT, JOB_WAIT, OFFER_EVERY, PING_AFTER, PUBLISH_EVERY, Sent,
    Session, WAKE_AHEAD, Worker,
};
use crate::link::{LinkError, SILENCE_MAX};
use crate::shaper::Flight;
use crate::ship::body_of;

impl Worker {
    pub(super) fn ship(&mut self, stream: &dyn CaptureStream, mut session: Session) -> End {
        self.connection = Connection::Connected { since_ms: 0 };
        self.tell_queue(true);
        let end = self.ship_until_the_end(stream, &mut session);
        self.tell_queue(false);
        stream.ring().disarm_wake();
        let end = end.err().unwrap_or(End::Stopping);
        if matches!(end, End::Stopping) {
            let bye = Refuse {
                code: Code::SHUTTING_DOWN,
                text: "dtagent ends".to_owned(),
            };
            let said = session
                .outbox
                .message(session.id, 0, &Message::Bye(bye))
                .is_ok();
            if said {
                // The target notices the end without it as well, so it is not waited for.
                let meanwhile = &mut self.meanwhile(stream, None);
                let _ = session
                    .outbox
                    .send(&mut session.link, None, None, meanwhile);
            }
        }
        self.publish(Some(stream), None);
        end
    }

    pub(super) fn ship_until_the_end(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<(), End> {
        let mut quiet = false;
        while !self.shared.is_stopping() {
            self.take_commands(Some(stream));
            if self.in_place {
                return Err(End::InPlace);
            }
            session.link.receive()?;
            self.take_messages(stream, session)?;
            self.release(stream, session)?;
            if std::mem::take(&mut self.renew_chain) {
                let reason = "the hash chain begins anew";
                return Err(LinkError::Io(std::io::Error::other(reason)).into());
            }
            self.tend_intents(stream, session)?;
            let next = session.core.next_to_send();
            self.shaper
                .tick(|| stream.ring().desc(next).ok().map(|desc| desc.time_ns));
            self.tend_timetable(stream);
            self.tend_origins(stream);
            self.offer_again(session)?;
            let waits = self.drive(stream, session)?;
            self.prove(session)?;
            self.restore_order(session.core.ack().applied_seq);
            if self.send_records(stream, session)? {
                quiet = false;
                self.publish_if_due(stream, session)?;
                continue;
            }
            self.publish_if_due(stream, session)?;
            self.persist(false);
            self.ping(stream, session)?;
            self.sleep(stream, session, &mut quiet, waits)?;
        }
        Ok(())
    }

    /// A volume that the target could not use may be usable by now: its disk works again, or is no longer mounted there.
    fn offer_again(&mut self, session: &mut Session) -> Result<(), End> {
        let can_pass = |report: &&VolumeReport| {
            let code = report.code;
            code != Code::OK && (code.is_passing() || code == Code::VOLUME_BUSY)
        };
        let refused = self.reports.iter().filter(can_pass);
        let refused: Vec<u32> = refused.map(|report| report.device).collect();
        if refused.is_empty() {
            self.offered_at = None;
            return Ok(());
        }
        let offered_at = *self.offered_at.get_or_insert_with(dtloop_runtime::now);
        if dtloop_runtime::elapsed(offered_at) < OFFER_EVERY {
            return Ok(());
        }
        self.offered_at = Some(dtloop_runtime::now());
        for offer in self.offers() {
            if refused.contains(&offer.device) {
                session
                    .outbox
                    .message(session.id, 0, &Message::Bind(offer))?;
            }
        }
        Ok(())
    }

    /// Sends the next batch. False: there was nothing to send.
    pub(super) fn send_records(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<bool, End> {
        let room = self.shaper.room();
        if room == 0 {
            return self.send_messages(stream, session);
        }
        let first = session.core.next_to_send();
        let hold = match self.source_of(stream, session)? {
            Source::Ring(hold) => hold,
            Source::Queue(batch) => return self.send_stored(stream, session, &batch, room),
            Source::Nothing => return self.send_messages(stream, session),
        };
        let mut seq = first;
        let mut sent = Sent::default();
        while seq < hold.end() && !session.outbox.is_full() && session.outbox.bytes() < room {
            let record = hold.record(seq)?;
            let body = body_of(&record.desc)?;
            self.before_record(stream, session, &body)?;
            let form = session
                .outbox
                .record(session.id, &record.desc, record.payload)?;
            if seq == first {
                sent.time_ns = record.desc.time_ns;
            }
            if sent.live_ns.is_none() && body.op != Op::Sync {
                sent.live_ns = Some(record.desc.time_ns);
            }
            self.after_record(seq, &body);
            let (kind, content) = form.parts(&body, record.payload);
            self.on_content(seq, kind, &body, content);
            sent.bytes += record.payload.len() as u64;
            seq += 1;
        }
        self.send_batch(stream, session, Some(hold), sent, seq)
    }

    /// Sends what is in the outbox: the records up to `next`, and messages. False: nothing is.
    pub(super) fn send_batch(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        hold: Option<Hold>,
        mut sent: Sent,
        next: u64,
    ) -> Result<bool, End> {
        let first = session.core.next_to_send();
        if session.outbox.is_empty() && next == first {
            return Ok(false);
        }
        self.shaper
            .pack(&mut session.outbox, session.id, hold.as_ref())?;
        let wire = session.outbox.bytes();
        if wire > 0 {
            self.totals.sent_bytes += wire as u64;
            let patience = self.hold_patience();
            let meanwhile = &mut self.meanwhile(stream, Some(session.view()));
            session
                .outbox
                .send(&mut session.link, hold, patience, meanwhile)?;
        }
        let mut flight = None;
        if next > first {
            self.totals.records += next - first;
            self.totals.payload_bytes += sent.bytes;
            sent.last = next - 1;
            flight = Some(Flight {
                last: sent.last,
                bytes: sent.bytes,
                live_ns: sent.live_ns,
            });
            session.batches.push_back(sent);
        }
        let blocked = std::mem::take(&mut session.link.blocked);
        self.shaper.on_sent(wire, blocked, flight);
        session.core.on_sent(next);
        Ok(true)
    }

    /// Sends what is no record: that is never held up by the bandwidth limit. False: there was nothing.
    fn send_messages(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<bool, End> {
        let wire = session.outbox.bytes();
        if wire == 0 {
            return Ok(false);
        }
        self.totals.sent_bytes += wire as u64;
        let meanwhile = &mut self.meanwhile(stream, Some(session.view()));
        session
            .outbox
            .send(&mut session.link, None, None, meanwhile)?;
        let blocked = std::mem::take(&mut session.link.blocked);
        self.shaper.on_sent(wire, blocked, None);
        Ok(true)
    }

    /// What must be said before a record that changes the devices.
    pub(super) fn before_record(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        body: &RecordBody,
    ) -> Result<(), End> {
        if matches!(body.op, Op::Attach | Op::Detach | Op::Resize | Op::Gap) {
            self.before_special(stream, session, body)?;
        }
        Ok(())
    }

    pub(super) fn before_special(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        body: &RecordBody,
    ) -> Result<(), End> {
        let known = self
            .reports
            .iter()
            .any(|report| report.device == body.device);
        self.refresh_devices(stream)?;
        if body.op == Op::Attach {
            self.await_device(stream, body.device)?;
        }
        let changed: Vec<u32> = match body.op {
            Op::Attach if known => vec![],
            Op::Attach => vec![body.device],
            Op::Resize => {
                self.on_resize(stream, session.core.next_to_send(), body);
                vec![body.device]
            }
            Op::Gap if body.flags & F_DEVICES != 0 => {
                self.devices.iter().map(|device| device.device_id).collect()
            }
            Op::Detach => {
                self.on_detach(body.device);
                vec![]
            }
            _ => vec![],
        };
        for offer in self
            .offers()
            .into_iter()
            .filter(|offer| changed.contains(&offer.device))
        {
            session
                .outbox
                .message(session.id, 0, &Message::Bind(offer))?;
        }
        Ok(())
    }

    /// The kernel announces a device before its disk is there, so that no change can come first. It never comes when
    /// its disk could not be made, or when it was detached long ago.
    fn await_device(&mut self, stream: &dyn CaptureStream, device: u32) -> Result<(), End> {
        let begin = dtloop_runtime::now();
        let is_there =
            |devices: &[raw::DeviceStatus]| devices.iter().any(|d| d.device_id >= device);
        while !is_there(&self.devices) && dtloop_runtime::elapsed(begin) < DEVICE_WAIT {
            dtloop_runtime::sleep(BUSY_WAIT);
            self.refresh_devices(stream)?;
        }
        Ok(())
    }

    pub(super) fn on_resize(&mut self, stream: &dyn CaptureStream, seq: u64, body: &RecordBody) {
        let (before, after) = (body.start_sector, body.aux);
        if let Some(planner) = &mut self.planner {
            planner.on_resize(body.device, after);
        }
        if after > before {
            // What the new part holds was never in the stream.
            let extent = Extent {
                start_sector: before,
                sectors: after - before,
            };
            if let Err(error) = stream.dirty_set(body.device, extent) {
                tracing::error!(
                    "Set \"{}\", device {}: {error}.",
                    self.config.name,
                    body.device
                );
            }
            self.verifier.outside.on_loss(seq);
            self.resync.on_loss();
        }
    }

    pub(super) fn on_detach(&mut self, device: u32) {
        if let Some(planner) = &mut self.planner {
            let works = planner
                .state()
                .devices
                .iter()
                .any(|item| item.device == device && !item.ended);
            if works {
                planner.fail("The device was detached; start again when it is back");
                self.memory.want_no_more(device);
            }
        }
    }

    /// What a record means for mirror and resync is decided when it is sent, not when it goes into the disk queue: a
    /// marker may stand only behind records that were sent, and an acknowledgement is for what was sent.
    pub(super) fn after_record(&mut self, seq: u64, body: &RecordBody) {
        self.forget_blocks(body);
        if body.op == Op::Sync {
            let failed = !body.is_committed();
            let (device, start, sectors) =
                (body.device, body.start_sector, u64::from(body.sectors));
            if body.aux == resync::COOKIE {
                self.resync.on_record(device, start, sectors, failed);
            } else if let Some(planner) = &mut self.planner {
                planner.on_record(seq, device, start, sectors, body.aux, failed);
            }
        } else if body.loses_order() {
            let (from, last) = self.lost.unwrap_or((seq, seq));
            self.lost = Some((from, last.max(seq)));
            self.verifier.outside.on_loss(seq);
            self.resync.on_loss();
        }
    }

    pub(super) fn release(
        &mut self,
        stream: &dyn CaptureStream,
        session: &Session,
    ) -> Result<(), End> {
        let ring = stream.ring();
        // Before ring or queue let go of what the next agent would need to go on with the chain.
        self.chain
            .keep(self.memory.stream_uuid, session.core.releasable() - 1);
        self.tell_acked(session);
        let releasable = if dtloop_canary::bites(Canary::ReleasedWhenSent) {
            session.core.next_to_send()
        } else {
            session.core.releasable()
        };
        if releasable > ring.released() {
            ring.release(releasable)?;
            if ring.space_wanted() {
                stream.kick()?;
            }
        }
        Ok(())
    }

    pub(super) fn take_messages(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<(), End> {
        while let Some((_, message)) = session.link.next_message()? {
            match message {
                Message::Ack(ack) => {
                    session.core.on_ack(&ack)?;
                    self.shaper.on_durable(ack.durable_seq);
                    let applied = |sent: &Sent| sent.last <= ack.applied_seq;
                    while let Some(sent) = session.batches.pop_front() {
                        if !applied(&sent) {
                            session.batches.push_front(sent);
                            break;
                        }
                        self.applied_bytes += sent.bytes;
                    }
                    if let Some(planner) = &mut self.planner {
                        planner.on_durable(ack.durable_seq);
                    }
                    self.log_findings(None);
                }
                Message::Verified(verified) => self.on_verified(&verified),
                Message::Proof(proof) => self.on_proof(&proof),
                Message::Alarm(alarm) => self.on_target_alarm(&alarm),
                Message::Volumes(volumes) => {
                    let known = std::mem::replace(&mut self.reports, volumes.volumes);
                    let is_new = |report: &&VolumeReport| {
                        report.code != Code::OK
                            && !known.iter().any(|other| other.text == report.text)
                    };
                    for report in self.reports.iter().filter(is_new) {
                        tracing::error!(
                            "Set \"{}\", target {}: {}.",
                            self.config.name,
                            self.config.target,
                            report.text
                        );
                    }
                    // A device that came back has its marks, too; none of it was held in its new place.
                    self.evaluate(stream, session, None, &[])?;
                }
                Message::Past(past) => self.past = past,
                Message::Notice(notice) => self.on_notice(&notice),
                Message::Staging(staging) => self.staging = staging,
                Message::Ping(number) => {
                    session
                        .outbox
                        .message(session.id, 0, &Message::Pong(number))?;
                }
                Message::Pong(_) => self.shaper.on_pong(dtloop_runtime::elapsed(session.pinged)),
                Message::Bye(refuse) => return Err(End::Refused(refuse)),
                _ => return Err(LinkError::Flood.into()),
            }
        }
        Ok(())
    }

    /// The target is held up, or no longer.
    pub(super) fn on_notice(&mut self, notice: &Notice) {
        let held_up = (notice.code != Code::OK).then(|| notice.text.clone());
        if self.notice == held_up {
            return;
        }
        tracing::warn!(
            "Set \"{}\", target {}: {}.",
            self.config.name,
            self.config.target,
            notice.text
        );
        self.notice = held_up;
    }

    /// The order is whole again once the target has applied everything below the position that was declared.
    fn restore_order(&mut self, applied_seq: u64) {
        let at = self.whole_at;
        let behind = |(_, last): (u64, u64)| last < at;
        if applied_seq + 1 >= at && self.resync.is_idle() && self.lost.is_some_and(behind) {
            tracing::info!(
                "Set \"{}\": the order is restored at record {at}.",
                self.config.name
            );
            self.lost = None;
        }
    }

    pub(super) fn ping(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<(), End> {
        if dtloop_runtime::elapsed(session.link.heard) > SILENCE_MAX {
            return Err(LinkError::Silent.into());
        }
        if dtloop_runtime::elapsed(session.link.heard) > PING_AFTER
            && dtloop_runtime::elapsed(session.pinged) > PING_AFTER
        {
            session.pinged = dtloop_runtime::now();
            session
                .outbox
                .message(session.id, 0, &Message::Ping(session.core.next_to_send()))?;
            self.send_messages(stream, session)?;
        }
        Ok(())
    }

    /// Sleeps until something comes. After a batch it waits a moment for more records at once, so
    /// that a busy stream costs few wake-ups.
    pub(super) fn sleep(
        &mut self,
        stream: &dyn CaptureStream,
        session: &Session,
        quiet: &mut bool,
        waits: bool,
    ) -> Result<(), End> {
        let ring = stream.ring();
        let next = session.core.next_to_send();
        let begin = dtloop_runtime::now();
        // With records at hand that may not be sent yet, to be woken by more of them is of no use.
        let limited = self
            .shaper
            .blocked_for()
            .filter(|_| next < ring.committed());
        if let Some(time) = limited {
            let time = time.min(if waits { JOB_WAIT } else { PUBLISH_EVERY });
            let others = [self.shared.wake.as_fd()];
            session
                .link
                .wait(false, &others, time)
                .map_err(LinkError::from)?;
            let _ = self.shared.wake.read();
            self.shaper.on_slept(dtloop_runtime::elapsed(begin), true);
            return Ok(());
        }
        if next < ring.released() {
            // A hole in the queue: what was sent before is waited for.
            let others = [self.shared.wake.as_fd()];
            session
                .link
                .wait(false, &others, JOB_WAIT)
                .map_err(LinkError::from)?;
            return Ok(());
        }
        let busy = !std::mem::replace(quiet, true);
        let ahead = WAKE_AHEAD.min(u64::from(ring.geometry().desc_count) / 8);
        let wake = if busy { next + ahead.max(1) - 1 } else { next };
        if !ring.arm_wake(wake) {
            return Ok(());
        }
        let watched = self.shared.watchers.load(Ordering::Relaxed) > 0;
        let timeout = match (busy, waits, watched) {
            (true, ..) => BUSY_WAIT,
            (_, true, _) => JOB_WAIT,
            (.., true) => PUBLISH_EVERY,
            _ => IDLE_WAIT,
        };
        let others = [stream.wake_fd(), self.shared.wake.as_fd()];
        session
            .link
            .wait(false, &others, timeout)
            .map_err(LinkError::from)?;
        let _ = self.shared.wake.read();
        self.shaper.on_slept(dtloop_runtime::elapsed(begin), false);
        Ok(())
    }
}
