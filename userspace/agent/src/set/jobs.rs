// SPDX-License-Identifier: GPL-2.0-only

//! What the set's thread does for mirror, verify and resync.

use dtloop_abi::{CaptureStream, SyncRequest};
use dtloop_core::mirror::{self, Event, JobKind, Planner, Request};
use dtloop_core::resync::Step;
use dtloop_proto::Message;
use dtloop_proto::limits::SECTOR_BYTES;
use dtloop_proto::message::{Marker, VolumeSync};
use nix::errno::Errno;

use super::verify::Turn;
use super::{End, PUBLISH_EVERY, REQUESTS_PER_TURN, RESYNC_RETRY, Session, Worker};
use crate::snapshot::unix_ms;

impl Worker {
    /// Asks the kernel for what mirror and resync want next. True: they wait for something.
    pub(super) fn drive(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<bool, End> {
        if self.spares_the_queue(stream, session) {
            // An operator may end a job all the same.
            self.drive_events(stream, session)?;
            return Ok(true);
        }
        let resyncs = self.drive_resync(stream, session)?;
        let mirrors = self.drive_job(stream, session)?;
        Ok(resyncs || mirrors)
    }

    pub(super) fn request(
        stream: &dyn CaptureStream,
        request: &Request,
    ) -> Result<u64, dtloop_abi::Error> {
        stream.sync(&SyncRequest {
            device_id: request.device,
            start_sector: request.start,
            sectors: request.sectors,
            chunk_bytes: mirror::CHUNK_BYTES,
            cookie: request.cookie,
            clear: request.clear,
        })
    }

    fn drive_events(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<(), End> {
        self.search_regions(stream)?;
        while let Some(event) = self.planner.as_mut().and_then(Planner::next_event) {
            self.on_event(stream, session, &event)?;
            self.search_regions(stream)?;
        }
        Ok(())
    }

    pub(super) fn drive_job(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<bool, End> {
        self.drive_events(stream, session)?;
        self.settle_regions(stream)?;
        for _ in 0..REQUESTS_PER_TURN {
            let Some(mut request) = self.planner.as_ref().and_then(Planner::next_request) else {
                break;
            };
            match self.verify_waits(request.sectors) {
                Turn::Now => {}
                Turn::Soon => return Ok(true),
                Turn::Later => return Ok(false),
            }
            let Some(planner) = &mut self.planner else {
                break;
            };
            let now = self.shaper.now();
            let in_flight = planner.in_flight() * SECTOR_BYTES;
            let allowed = self.shaper.mirror.allowance(in_flight, now) / SECTOR_BYTES;
            if allowed == 0 {
                return Ok(true);
            }
            request.sectors = request.sectors.min(allowed);
            match Self::request(stream, &request) {
                Ok(0) => return Ok(true),
                Ok(taken) => {
                    self.shaper.mirror.on_asked(taken * SECTOR_BYTES, now);
                    planner.on_taken(&request, taken);
                    self.pay(taken);
                }
                Err(error) => planner.fail(format!("{error}; start again")),
            }
        }
        Ok(false)
    }

    pub(super) fn on_event(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        event: &Event,
    ) -> Result<(), End> {
        let kind = self.planner.as_ref().map(|planner| planner.state().kind);
        let is_mirror = kind.is_some_and(JobKind::is_mirror);
        let position = session.core.next_to_send();
        match *event {
            // A recovery looks at the marked regions only, which says nothing about an alarm.
            _ if kind == Some(JobKind::Recover) => {}
            Event::DeviceBegins { device } => {
                let number = self.memory.alarm_number(device);
                if let Some(planner) = &mut self.planner {
                    planner.set_alarm_number(number);
                }
            }
            Event::DeviceDone { device } => {
                let items = self
                    .planner
                    .as_ref()
                    .map(|planner| &planner.state().devices);
                let item = items.and_then(|items| items.iter().find(|item| item.device == device));
                if let Some(item) = item.cloned() {
                    self.settle_alarm(session, &item)?;
                }
            }
            Event::Over => {}
        }
        match *event {
            Event::DeviceBegins { device } if is_mirror => {
                self.memory.set_mirrored(device, false);
                let marker = Message::Marker(Marker::MirrorBegin { device });
                session.outbox.message(session.id, position, &marker)?;
                self.plan_mirror(session, device)?;
                self.set_report(device, VolumeSync::Mirroring);
                self.set_resync_devices();
            }
            Event::DeviceDone { device } if is_mirror => {
                self.memory.set_mirrored(device, true);
                self.settle_device(stream, device)?;
                let marker = Message::Marker(Marker::MirrorEnd { device });
                session.outbox.message(session.id, position, &marker)?;
                self.set_report(device, VolumeSync::Mirrored);
                self.whole_at = self.whole_at.max(position);
                self.set_resync_devices();
                tracing::info!(
                    "Set \"{}\": the mirror of device {device} is complete.",
                    self.config.name
                );
            }
            Event::DeviceDone { device } if kind == Some(JobKind::Recover) => {
                self.settle_device(stream, device)?;
            }
            Event::DeviceBegins { .. } | Event::DeviceDone { .. } => {}
            Event::Over => self.end_job(stream),
        }
        self.persist(true);
        Ok(())
    }

    pub(super) fn set_report(&mut self, device: u32, sync: VolumeSync) {
        if let Some(report) = self
            .reports
            .iter_mut()
            .find(|report| report.device == device)
        {
            report.sync = sync;
        }
    }

    pub(super) fn end_job(&mut self, stream: &dyn CaptureStream) {
        let Some(planner) = self.planner.take() else {
            return;
        };
        let state = planner.state().clone();
        self.settled = None;
        if let Some(reason) = &state.failed {
            tracing::warn!(
                "Set \"{}\": job {} ended before its time: {reason}.",
                self.config.name,
                state.id
            );
        }
        self.memory.job = Some(state.clone());
        self.note_scheduled_end(&state);
        let mut results = vec![];
        if let Some(job) = &mut self.job {
            job.state = state.clone();
            job.finished = Some(dtloop_runtime::elapsed(job.started));
            job.finished_unix_ms = unix_ms();
            job.to_seq = stream.ring().next_seq();
            let job = &*job;
            if job.state.kind.is_verify() {
                let items = job.state.devices.iter();
                results = items
                    .map(|item| (job.state.id, job.verify_result(item, 0)))
                    .collect();
            }
            if job.state.kind == JobKind::Recover {
                for item in &job.state.devices {
                    let recovery = job.recovery(item);
                    tracing::info!(
                        "Set \"{}\", volume \"{}\": {} marked regions, {} bytes compared, {} bytes in {} blocks differed, \
                         {} bytes sent.",
                        self.config.name,
                        item.label,
                        recovery.regions,
                        recovery.compared_bytes,
                        recovery.differing_bytes,
                        recovery.differing_blocks,
                        recovery.sent_bytes
                    );
                    self.last_recovery.retain(|other| other.label != item.label);
                    self.last_recovery.push(recovery);
                }
            }
        }
        for (id, result) in results {
            self.note_result(id, result);
        }
        self.published = dtloop_runtime::now() - PUBLISH_EVERY;
        if state.kind == JobKind::Recover {
            // What it sent lies behind the position that a pass under way would declare.
            self.resync.on_loss();
        }
        let mut needs = self.needs(None);
        needs.retain(|need| need.automatic);
        self.mirror_needed(stream, &needs, None);
    }

    pub(super) fn drive_resync(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<bool, End> {
        if self
            .resync_after
            .is_some_and(|after| dtloop_runtime::now() < after)
        {
            return Ok(true);
        }
        self.resync_after = None;
        for _ in 0..REQUESTS_PER_TURN {
            match self.resync.step(session.core.next_to_send()) {
                Step::Idle => return Ok(false),
                Step::Wait => return Ok(true),
                Step::Position => {
                    if self.resync.take_failed() {
                        self.resync_after = Some(dtloop_runtime::now() + RESYNC_RETRY);
                        return Ok(true);
                    }
                    self.plan_resync(stream, session)?;
                    self.resync.on_position(stream.ring().next_seq());
                }
                Step::Find {
                    device,
                    from,
                    sectors_max,
                } => match stream.dirty_next(device, from, sectors_max) {
                    Ok(extent) => self
                        .resync
                        .on_found(extent.map(|extent| (extent.start_sector, extent.sectors))),
                    // Beyond the end, or detached meanwhile: nothing of it is left to be sent.
                    Err(error) if error.is(Errno::ENXIO) || error.is(Errno::ERANGE) => {
                        self.resync.on_found(None);
                    }
                    Err(error) => return Err(error.into()),
                },
                Step::Sync(mut request) => {
                    let now = self.shaper.now();
                    let in_flight = self.resync.outstanding_sectors() * SECTOR_BYTES;
                    let allowed = self.shaper.resync.allowance(in_flight, now) / SECTOR_BYTES;
                    if allowed == 0 {
                        return Ok(true);
                    }
                    request.sectors = request.sectors.min(allowed);
                    match Self::request(stream, &request) {
                        Ok(0) => return Ok(true),
                        Ok(taken) => {
                            self.shaper.resync.on_asked(taken * SECTOR_BYTES, now);
                            self.resync.on_taken(taken);
                        }
                        Err(error) if error.is(Errno::ENXIO) || error.is(Errno::ERANGE) => {
                            self.refresh_devices(stream)?;
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                Step::Declare { .. } if self.recovers(stream)? => {
                    self.resync_after = Some(dtloop_runtime::now() + RESYNC_RETRY);
                    return Ok(true);
                }
                Step::Declare { at } => {
                    let marker = Message::Marker(Marker::OrderRestored);
                    session.outbox.message(session.id, at, &marker)?;
                    self.verifier.outside.on_restored(at);
                    self.whole_at = self.whole_at.max(at);
                    self.resync.on_declared();
                }
            }
        }
        Ok(false)
    }
}
