// SPDX-License-Identifier: GPL-2.0-only

//! How the set's thread moves records to the target.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::Instant;

use dtloop_abi::{CaptureStream, Extent, raw};
use dtloop_api::Connection;
use dtloop_core::resync;
use dtloop_proto::message::Refuse;
use dtloop_proto::{Code, Message, Op};

use super::{
    BUSY_WAIT, DEVICE_WAIT, End, IDLE_WAIT, JOB_WAIT, PING_AFTER, PUBLISH_EVERY, Sent, Session,
    WAKE_AHEAD, Worker,
};
use crate::link::{LinkError, SILENCE_MAX};
use crate::ship::Shipped;

impl Worker {
    pub(super) fn ship(&mut self, stream: &dyn CaptureStream, mut session: Session) -> End {
        self.connection = Connection::Connected { since_ms: 0 };
        let end = self.ship_until_the_end(stream, &mut session);
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
                // The target notices the end without it as well.
                let _ = session.outbox.send(&mut session.link, None);
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
            session.link.receive()?;
            self.take_messages(stream, session)?;
            self.release(stream, session)?;
            if std::mem::take(&mut self.renew_chain) {
                let reason = "the hash chain begins anew";
                return Err(LinkError::Io(std::io::Error::other(reason)).into());
            }
            self.tend_intents(stream, session)?;
            self.tend_timetable(stream);
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
            self.ping(session)?;
            self.sleep(stream, session, &mut quiet, waits)?;
        }
        Ok(())
    }

    /// Sends the next batch. False: there was nothing to send.
    pub(super) fn send_records(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<bool, End> {
        let first = session.core.next_to_send();
        let hold = stream.ring().hold(first)?;
        let mut seq = first;
        let mut sent = Sent::default();
        while seq < hold.end() && !session.outbox.is_full() {
            let record = hold.record(seq)?;
            if matches!(
                record.desc.op,
                raw::OP_ATTACH | raw::OP_DETACH | raw::OP_RESIZE | raw::OP_GAP
            ) {
                self.before_special(stream, session, &record.desc)?;
            }
            let shipped = session
                .outbox
                .record(session.id, &record.desc, record.payload)?;
            if seq == first {
                sent.time_ns = record.desc.time_ns;
            }
            self.after_record(&shipped);
            let (kind, content) = shipped.form.parts(&shipped.body, record.payload);
            self.on_content(seq, kind, &shipped.body, content);
            sent.bytes += record.payload.len() as u64;
            seq += 1;
        }
        if session.outbox.is_empty() {
            if seq == first {
                return Ok(false);
            }
        } else {
            self.totals.sent_bytes += session.outbox.bytes() as u64;
            session.outbox.send(&mut session.link, Some(&hold))?;
        }
        if seq > first {
            self.totals.records += seq - first;
            self.totals.payload_bytes += sent.bytes;
            sent.last = seq - 1;
            session.batches.push_back(sent);
        }
        session.core.on_sent(seq);
        Ok(true)
    }

    pub(super) fn before_special(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        desc: &raw::Desc,
    ) -> Result<(), End> {
        let known = self
            .reports
            .iter()
            .any(|report| report.device == desc.device);
        self.refresh_devices(stream)?;
        if desc.op == raw::OP_ATTACH {
            self.await_device(stream, desc.device)?;
        }
        let changed: Vec<u32> = match desc.op {
            raw::OP_ATTACH if known => vec![],
            raw::OP_ATTACH => vec![desc.device],
            raw::OP_RESIZE => {
                self.on_resize(stream, desc);
                vec![desc.device]
            }
            raw::OP_GAP if desc.flags & raw::F_DEVICES != 0 => {
                self.devices.iter().map(|device| device.device_id).collect()
            }
            raw::OP_DETACH => {
                self.on_detach(desc.device);
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
        let begin = Instant::now();
        let is_there =
            |devices: &[raw::DeviceStatus]| devices.iter().any(|d| d.device_id >= device);
        while !is_there(&self.devices) && begin.elapsed() < DEVICE_WAIT {
            std::thread::sleep(BUSY_WAIT);
            self.refresh_devices(stream)?;
        }
        Ok(())
    }

    pub(super) fn on_resize(&mut self, stream: &dyn CaptureStream, desc: &raw::Desc) {
        let (before, after) = (desc.start_sector, desc.aux);
        if let Some(planner) = &mut self.planner {
            planner.on_resize(desc.device, after);
        }
        if after > before {
            // What the new part holds was never in the stream.
            let extent = Extent {
                start_sector: before,
                sectors: after - before,
            };
            if let Err(error) = stream.dirty_set(desc.device, extent) {
                tracing::error!(
                    "Set \"{}\", device {}: {error}.",
                    self.config.name,
                    desc.device
                );
            }
            self.verifier.outside.on_loss(desc.seq);
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
            }
        }
    }

    pub(super) fn after_record(&mut self, shipped: &Shipped) {
        let Shipped { desc, body, .. } = shipped;
        if body.op == Op::Sync {
            let failed = !body.is_committed();
            let sectors = u64::from(desc.sectors);
            if desc.aux == resync::COOKIE {
                self.resync
                    .on_record(desc.device, desc.start_sector, sectors, failed);
            } else if let Some(planner) = &mut self.planner {
                planner.on_record(
                    desc.seq,
                    desc.device,
                    desc.start_sector,
                    sectors,
                    desc.aux,
                    failed,
                );
            }
        } else if body.loses_order() {
            let (from, last) = self.lost.unwrap_or((desc.seq, desc.seq));
            self.lost = Some((from, last.max(desc.seq)));
            self.verifier.outside.on_loss(desc.seq);
            self.resync.on_loss();
        }
    }

    pub(super) fn release(
        &mut self,
        stream: &dyn CaptureStream,
        session: &Session,
    ) -> Result<(), End> {
        let ring = stream.ring();
        if session.core.releasable() > ring.released() {
            self.chain
                .keep(self.memory.stream_uuid, session.core.releasable() - 1);
            ring.release(session.core.releasable())?;
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
                    self.reports = volumes.volumes;
                    for report in self.reports.iter().filter(|report| report.code != Code::OK) {
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
                Message::Notice(notice) => {
                    tracing::warn!(
                        "Set \"{}\", target {}: {}.",
                        self.config.name,
                        self.config.target,
                        notice.text
                    );
                    self.notice = (notice.code != Code::OK).then_some(notice.text);
                }
                Message::Ping(number) => {
                    session
                        .outbox
                        .message(session.id, 0, &Message::Pong(number))?;
                }
                Message::Pong(_) => {}
                Message::Bye(refuse) => return Err(End::Refused(refuse)),
                _ => return Err(LinkError::Flood.into()),
            }
        }
        Ok(())
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

    pub(super) fn ping(&self, session: &mut Session) -> Result<(), End> {
        if session.link.heard.elapsed() > SILENCE_MAX {
            return Err(LinkError::Silent.into());
        }
        if session.link.heard.elapsed() > PING_AFTER && session.pinged.elapsed() > PING_AFTER {
            session.pinged = Instant::now();
            session
                .outbox
                .message(session.id, 0, &Message::Ping(session.core.next_to_send()))?;
            session.outbox.send(&mut session.link, None)?;
        }
        Ok(())
    }

    /// Sleeps until something comes. After a batch it waits a moment for more records at once, so
    /// that a busy stream costs few wake-ups.
    pub(super) fn sleep(
        &self,
        stream: &dyn CaptureStream,
        session: &Session,
        quiet: &mut bool,
        waits: bool,
    ) -> Result<(), End> {
        let ring = stream.ring();
        let next = session.core.next_to_send();
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
        Ok(())
    }
}
