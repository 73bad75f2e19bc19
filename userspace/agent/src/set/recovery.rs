// SPDX-License-Identifier: GPL-2.0-only

//! What the set's thread does with the intent map: after a crash only the marked regions are compared.
//!
//! ```text
//!  Past of the target + marks of the kernel
//!       | they fit: Covered, the order is lost, job "recover"     | they do not: the reason, a difference mirror
//!       v                                                         v
//!  marked regions: hash, differing blocks sent, settled        whole devices
//!       +--> resync: OrderRestored
//! ```

use dtloop_abi::{CaptureStream, Extent, Found, raw};
use dtloop_canary::Canary;
use dtloop_core::coverage::{Base, Marks};
use dtloop_core::mirror::{DeviceJob, JobKind, Planner};
use dtloop_core::replica::StreamId;
use dtloop_proto::message::{Marker, Past, VolumeSync};
use dtloop_proto::{Message, Uuid};

use super::{End, INTENT_EVERY, Session, Worker};

/// What a stream's intent map says, in the terms of the core. `seen`: the version that was seen last in the stream before.
fn marks(
    status: &raw::IntentStatus,
    past: &Past,
    current: Uuid,
    unmarked: &[StreamId],
    seen: u64,
) -> Marks {
    let stream = |base: &&raw::IntentBase| base.stream_uuid != [0; 16];
    let bases: Vec<Base> = status
        .bases
        .iter()
        .filter(stream)
        .map(|base| Base {
            stream: Uuid(base.stream_uuid),
            acked: base.acked,
        })
        .collect();
    let failed = |base: &Base| unmarked.contains(&StreamId(base.stream));
    let broken = if status.has(raw::INTENT_FAILED) || bases.iter().any(failed) {
        Some("the intent file could not be written for some time".to_owned())
    } else if !status.has(raw::INTENT_ON) {
        Some("the set has no intent map".to_owned())
    } else {
        match Found::from_raw(status.found) {
            // In the stream that began it, a new file has all marks.
            Found::Known | Found::New => None,
            other if past.stream != current => Some(other.to_string()),
            _ => None,
        }
    };
    // Of an earlier stream the target was told, and this machine saw, the version that was found, or a lower one.
    let (version, seen) = if past.stream == current {
        (status.version, 0)
    } else {
        (status.found_version, seen)
    };
    Marks {
        broken,
        version,
        seen,
        bases,
    }
}

impl Worker {
    /// Devices that hold their mirror in the present stream.
    pub(super) fn held(&self) -> Vec<u32> {
        let held = self.memory.devices.values().filter(|item| item.mirrored);
        held.map(|item| item.device).collect()
    }

    /// Has devices recovered by their marks instead of mirrored, where that is enough. `held`: devices whose mirror held in
    /// this very stream until now. Gives the devices that need no mirror, and for the others why marks are not enough.
    pub(super) fn cover(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        past: &Past,
        held: &[u32],
        candidates: &[u32],
    ) -> Result<(Vec<u32>, Option<String>), End> {
        let status = stream.intent_status()?;
        let current = self.memory.stream_uuid;
        let (unmarked, seen) = (&self.memory.unmarked_streams, self.memory.intent_seen);
        let marks = marks(&status, past, current, unmarked, seen);
        let (mut covered, mut doubt) = (vec![], None);
        for device in self.devices.clone() {
            let id = device.device_id;
            if !candidates.contains(&id) || self.memory.is_doubtful(id) {
                continue;
            }
            let kept = held.contains(&id);
            let file = match Found::from_raw(device.intent_found) {
                Found::Known => Ok(()),
                Found::None => Err("the intent map does not hold the device".to_owned()),
                _ if kept => Ok(()),
                other => Err(other.to_string()),
            };
            let covers = marks.cover(past, id, file);
            let trusted = dtloop_canary::bites(Canary::MarksTrusted) && status.has(raw::INTENT_ON);
            if let Some(reason) = covers.err().filter(|_| !trusted) {
                doubt.get_or_insert(reason);
                continue;
            }
            if kept {
                // Its marks are of this stream, and none of them is suspect by itself.
                let extent = Extent {
                    start_sector: 0,
                    sectors: device.sectors,
                };
                stream.suspect_set(id, extent)?;
            }
            self.memory.set_mirrored(id, true);
            self.set_report(id, VolumeSync::Mirrored);
            let position = session.core.next_to_send();
            let marker = Message::Marker(Marker::Covered { device: id });
            session.outbox.message(session.id, position, &marker)?;
            let last = position.saturating_sub(1);
            self.lost.get_or_insert((last.max(1), last));
            self.verifier.outside.on_loss(last);
            covered.push(id);
        }
        if !covered.is_empty() {
            self.devices = stream.devices()?;
            self.resync.on_loss();
        }
        Ok((covered, doubt))
    }

    /// Compares the regions of these devices that the intent map names.
    pub(super) fn start_recovery(
        &mut self,
        stream: &dyn CaptureStream,
        devices: &[u32],
        reason: &str,
    ) {
        let chosen = self
            .devices
            .iter()
            .filter(|device| devices.contains(&device.device_id));
        let items: Vec<DeviceJob> = chosen
            .map(|device| DeviceJob {
                regions: device.regions_suspect,
                ..DeviceJob::new(device.device_id, device.label(), device.sectors)
            })
            .collect();
        let regions: u64 = items.iter().map(|item| item.regions).sum();
        tracing::warn!(
            "Set \"{}\": {regions} marked regions are compared, and what differs is sent, because {reason}.",
            self.config.name
        );
        self.start_job(stream, JobKind::Recover, items, reason.to_owned());
    }

    /// Whether regions of mirrored devices have yet to be compared: the order is not whole before they are. Starts the
    /// comparison again if nothing is under way.
    pub(super) fn recovers(&mut self, stream: &dyn CaptureStream) -> Result<bool, End> {
        self.devices = stream.devices()?;
        let held = self.held();
        let suspect: Vec<u32> = self
            .devices
            .iter()
            .filter(|device| device.regions_suspect > 0 && held.contains(&device.device_id))
            .map(|device| device.device_id)
            .collect();
        if suspect.is_empty() {
            return Ok(false);
        }
        self.stop_verification();
        if self.planner.is_none() {
            self.start_recovery(stream, &suspect, "a comparison was not completed");
        }
        Ok(true)
    }

    /// Answers the planner's question for the next regions.
    pub(super) fn search_regions(&mut self, stream: &dyn CaptureStream) -> Result<(), End> {
        let Some((device, from)) = self.planner.as_ref().and_then(Planner::next_search) else {
            return Ok(());
        };
        let run = stream.suspect_next(device, from)?;
        if let Some(planner) = &mut self.planner {
            planner.on_run(run.map(|extent| (extent.start_sector, extent.sectors)));
        }
        Ok(())
    }

    /// Settles the regions that a recovery is done with, so that a crash does not have them compared again.
    pub(super) fn settle_regions(&mut self, stream: &dyn CaptureStream) -> Result<(), End> {
        let Some(planner) = self
            .planner
            .as_ref()
            .filter(|planner| planner.state().kind == JobKind::Recover)
        else {
            return Ok(());
        };
        let Some(item) = planner.state().devices.iter().find(|item| !item.ended) else {
            return Ok(());
        };
        let (device, mut position) = (item.device, item.position);
        if dtloop_canary::bites(Canary::SettledTooSoon) && item.begun {
            position = item.sectors;
        }
        let from = match self.settled {
            Some((settled, from)) if settled == device => from,
            _ => 0,
        };
        // Only whole regions can be settled: what is left of one is settled with its end.
        let region = self.region_sectors.max(1);
        if position / region > from / region {
            let start = from / region * region;
            let extent = Extent {
                start_sector: start,
                sectors: position - start,
            };
            stream.suspect_clear(device, extent)?;
            self.settled = Some((device, position));
        }
        Ok(())
    }

    /// Every region of a device was compared, or sent.
    pub(super) fn settle_device(&mut self, stream: &dyn CaptureStream, id: u32) -> Result<(), End> {
        let device = self.devices.iter().find(|device| device.device_id == id);
        if let Some(device) = device {
            let extent = Extent {
                start_sector: 0,
                sectors: device.sectors,
            };
            stream.suspect_clear(id, extent)?;
        }
        Ok(())
    }

    /// Tells the kernel what both sides have durably, so that marks can go, and the target how new the intent file is.
    pub(super) fn tend_intents(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<(), End> {
        if dtloop_runtime::elapsed(self.intents_tended) < INTENT_EVERY {
            return Ok(());
        }
        self.intents_tended = dtloop_runtime::now();
        self.watch_intents(stream)?;
        if !self.settle_origins() {
            return Ok(());
        }
        let acked = session.core.releasable().min(stream.ring().committed());
        let acked = self.durable_below(stream, acked);
        let Some(cleared) = stream.intent_clear(acked)? else {
            return Ok(());
        };
        if self.intent_told != cleared.version {
            self.tell_version(session, cleared.version)?;
        }
        Ok(())
    }

    pub(super) fn tell_version(&mut self, session: &mut Session, version: u64) -> Result<(), End> {
        self.intent_told = version;
        let position = session.core.next_to_send();
        let marker = Message::Marker(Marker::Intent { version });
        session.outbox.message(session.id, position, &marker)?;
        Ok(())
    }

    /// Also without a session: the target is told nothing then, and this agent alone can know an older copy of the file.
    pub(super) fn note_intents(&mut self, stream: &dyn CaptureStream) {
        if dtloop_runtime::elapsed(self.intents_tended) < INTENT_EVERY {
            return;
        }
        self.intents_tended = dtloop_runtime::now();
        // A stream that is of no more use is noticed elsewhere.
        let _ = self.watch_intents(stream);
        self.persist(false);
    }

    /// Remembers, on another disk than that of the intent file, its version, and that its marks are not to be relied on.
    pub(super) fn watch_intents(&mut self, stream: &dyn CaptureStream) -> Result<(), End> {
        let status = stream.intent_status()?;
        self.region_sectors = u64::from(status.region_bytes) / raw::SECTOR_BYTES;
        self.memory.intent_version = status.version;
        if status.has(raw::INTENT_FAILED) && self.memory.note_unmarked() {
            tracing::error!(
                "Set \"{}\": its intent file cannot be written. Changes go on; after a crash whole devices would be \
                 compared. Detach the devices and attach them with another --intent.",
                self.config.name
            );
            self.persist(true);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: Uuid = Uuid([1; 16]);
    const NOW: Uuid = Uuid([2; 16]);

    fn status() -> raw::IntentStatus {
        let mut status = raw::IntentStatus {
            flags: raw::INTENT_ON,
            found: raw::FOUND_KNOWN,
            version: 20,
            found_version: 10,
            ..Default::default()
        };
        for (place, stream) in status.bases.iter_mut().zip([OLD, NOW]) {
            *place = raw::IntentBase {
                stream_uuid: stream.0,
                acked: 5,
            };
        }
        status
    }

    fn past(stream: Uuid) -> Past {
        Past {
            stream,
            ..Past::default()
        }
    }

    #[test]
    fn the_version_that_counts_is_that_of_the_stream_the_target_knew() {
        let marks = |stream| marks(&status(), &past(stream), NOW, &[], 0);
        assert_eq!((marks(OLD).version, marks(NOW).version), (10, 20));
        assert_eq!(marks(OLD).bases.len(), 2);
        assert_eq!(marks(OLD).broken, None);
    }

    #[test]
    fn a_file_that_failed_in_any_stream_it_covers_is_not_relied_on() {
        for stream in [OLD, NOW] {
            let marks = marks(&status(), &past(OLD), NOW, &[StreamId(stream)], 0);
            assert!(
                marks
                    .broken
                    .is_some_and(|reason| reason.contains("written"))
            );
        }
        let foreign = raw::IntentStatus {
            found: raw::FOUND_FOREIGN,
            ..status()
        };
        assert!(marks(&foreign, &past(OLD), NOW, &[], 0).broken.is_some());
        assert!(marks(&foreign, &past(NOW), NOW, &[], 0).broken.is_none());
        let seen = |stream| marks(&status(), &past(stream), NOW, &[], 11).seen;
        assert_eq!((seen(OLD), seen(NOW)), (11, 0));
        let off = raw::IntentStatus {
            flags: 0,
            ..status()
        };
        assert!(marks(&off, &past(NOW), NOW, &[], 0).broken.is_some());
    }
}
