// SPDX-License-Identifier: GPL-2.0-only

//! What the source remembers of a set, and which of its devices must be mirrored.
//!
//! A device that was mirrored once is mirrored again by itself (by difference, since most of it
//! will be equal) when something breaks the relation: a new stream, a hole, a device that was
//! away, a volume that the target no longer trusts. A device that was never mirrored waits for the
//! operator, who may not want its target overwritten yet.

use std::collections::BTreeMap;

use dtloop_proto::message::{DeviceOffer, VolumeReport, VolumeSync};
use dtloop_proto::{Code, Uuid};
use serde::{Deserialize, Serialize};

use crate::alarm::{self, Alarm, Cause};
use crate::identity::Sample;
use crate::mirror::{DeviceJob, JobState};
use crate::origin::{self, Origin};
use crate::timetable;

/// A device of the set by label.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// Its id in the stream.
    pub device: u32,
    /// Its size in sectors.
    pub sectors: u64,
    /// A mirror of it was complete at some time.
    pub mirrored_once: bool,
    /// The mirror that is complete still holds.
    pub mirrored: bool,
    /// Why the copy must be verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<Alarm>,
    /// Sectors that others wrote to the backing device since it was attached, as far as they are known.
    #[serde(default)]
    pub bypassed_sectors: u64,
    /// The boot in which it was last looked at.
    #[serde(default)]
    pub boot_id: String,
    /// What some of its blocks held.
    #[serde(default, skip_serializing_if = "Origin::is_empty")]
    pub origin: Origin,
    /// Why nobody knows whether the device or its copy is newer; an operator decides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub doubt: Option<String>,
    /// The device id about which one has decided.
    #[serde(default)]
    pub decided: u32,
    /// An operator wants a copy of it: a first mirror that was interrupted begins again by itself.
    #[serde(default)]
    pub wanted: bool,
}

impl DeviceMemory {
    /// Whether there was a copy, or an operator wants one: it is made, or made good, without asking.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.mirrored_once || self.wanted
    }
}

/// Both sides had the same link of the hash chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proven {
    /// The last record in it.
    pub seq: u64,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The chain is unbroken since this record.
    pub since_seq: u64,
}

/// Streams that are remembered. The target follows one of the last few that were offered to it.
const LINEAGE_MAX: usize = 32;

/// What survives a restart of the agent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetMemory {
    /// Raised with every new stream; the target refuses a lower one.
    pub generation: u64,
    /// The stream.
    #[serde(with = "crate::uuid_text")]
    pub stream_uuid: Uuid,
    /// Devices by label.
    pub devices: BTreeMap<String, DeviceMemory>,
    /// Number of the last job.
    pub last_job: u64,
    /// The job under way, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobState>,
    /// Streams that were offered to the target, newest first: the past of this source.
    #[serde(default, with = "uuid_list")]
    pub lineage: Vec<Uuid>,
    /// The last proof.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven: Option<Proven>,
    /// What is known of scheduled verifications.
    #[serde(default)]
    pub timetable: timetable::Memory,
    /// The job under way is a scheduled verification.
    #[serde(default)]
    pub scheduled: bool,
    /// A scheduled verification that made way for something else; it goes on at its place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suspended: Option<JobState>,
    /// Streams in which the intent file could not be written: marks that go back to one of them are not complete.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unmarked_streams: Vec<StreamId>,
    /// Version of the intent file that was last seen: an older one is a copy.
    #[serde(default)]
    pub intent_version: u64,
    /// The same, as of the stream before this one.
    #[serde(default)]
    pub intent_seen: u64,
}

mod uuid_list {
    use dtloop_proto::Uuid;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(
        list: &[Uuid],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(list.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<Uuid>, D::Error> {
        let list = Vec::<String>::deserialize(deserializer)?;
        list.iter()
            .map(|text| text.parse().map_err(D::Error::custom))
            .collect()
    }
}

/// A stream in the state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamId(#[serde(with = "crate::uuid_text")] pub Uuid);

/// Why a device must be mirrored, and whether that happens by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Device id.
    pub device: u32,
    /// Its label.
    pub label: String,
    /// Its size in sectors.
    pub sectors: u64,
    /// For people.
    pub reason: String,
    /// A difference mirror is started; otherwise an operator decides.
    pub automatic: bool,
}

impl SetMemory {
    /// Takes up a stream. True: it is another one than before.
    pub fn enter_stream(&mut self, stream_uuid: Uuid) -> bool {
        if self.stream_uuid == stream_uuid {
            return false;
        }
        self.stream_uuid = stream_uuid;
        self.generation += 1;
        self.intent_seen = self.intent_version;
        self.job = None;
        self.scheduled = false;
        self.suspended = None;
        self.proven = None;
        for device in self.devices.values_mut() {
            device.mirrored = false;
            device.device = 0;
            device.decided = 0;
        }
        true
    }

    /// Takes up a device that is in the stream. A device that comes back under its name has
    /// perhaps changed meanwhile. True: it has joined just now.
    pub fn enter_device(&mut self, offer: &DeviceOffer) -> bool {
        if offer.label.is_empty() {
            return false;
        }
        let device = self
            .devices
            .entry(offer.label.clone())
            .or_insert(DeviceMemory {
                device: offer.device,
                sectors: offer.sectors,
                mirrored_once: false,
                mirrored: false,
                alarm: None,
                bypassed_sectors: 0,
                boot_id: String::new(),
                origin: Origin::default(),
                doubt: None,
                decided: 0,
                wanted: false,
            });
        let is_other = device.device != offer.device;
        if is_other {
            device.device = offer.device;
            device.mirrored = false;
            device.bypassed_sectors = 0;
        }
        device.sectors = offer.sectors;
        is_other
    }

    /// The intent file could not be written in the present stream. True: that is news.
    pub fn note_unmarked(&mut self) -> bool {
        /// More streams than one intent file remembers.
        const MOST: usize = 16;
        let id = StreamId(self.stream_uuid);
        if self.unmarked_streams.contains(&id) {
            return false;
        }
        if self.unmarked_streams.len() >= MOST {
            self.unmarked_streams.remove(0);
        }
        self.unmarked_streams.push(id);
        true
    }

    /// A mirror of the device is complete, or holds no longer.
    pub fn set_mirrored(&mut self, device: u32, mirrored: bool) {
        if let Some(memory) = self
            .devices
            .values_mut()
            .find(|memory| memory.device == device)
        {
            memory.mirrored = mirrored;
            memory.mirrored_once |= mirrored;
            memory.doubt.take_if(|_| mirrored);
        }
    }

    /// The device may not be the one that its copy was made of: it is mirrored only when an operator says so. True: that
    /// is news.
    pub fn doubt(&mut self, device: u32, reason: String) -> bool {
        let memory = self.device_mut(device);
        let Some(memory) = memory.filter(|memory| memory.mirrored_once) else {
            return false;
        };
        let news = memory.decided != device && memory.doubt.is_none();
        if news {
            (memory.doubt, memory.mirrored) = (Some(reason), false);
        }
        news
    }

    /// What is known of the right disk is what this one holds: it is back.
    pub fn reassure(&mut self, device: u32) {
        if let Some(memory) = self.device_mut(device) {
            memory.doubt = None;
        }
    }

    /// An operator wants the copy to become what the device is.
    pub fn decide(&mut self, device: u32) {
        if let Some(memory) = self.device_mut(device) {
            (memory.doubt, memory.decided) = (None, device);
            memory.wanted = true;
            memory.origin = Origin::default();
        }
    }

    /// No copy of the device is wanted until an operator asks for one again.
    pub fn want_no_more(&mut self, device: u32) {
        if let Some(memory) = self.device_mut(device) {
            memory.wanted = false;
        }
    }

    /// Whether nobody knows which of device and copy is newer.
    #[must_use]
    pub fn is_doubtful(&self, device: u32) -> bool {
        let mut devices = self.devices.values();
        devices.any(|memory| memory.device == device && memory.doubt.is_some())
    }

    /// A range of a device, in bytes, was changed. True: something of what its blocks held was known.
    pub fn forget_blocks(&mut self, device: u32, start: u64, end: u64) -> bool {
        let memory = self.device_mut(device);
        memory.is_some_and(|memory| memory.origin.forget(start, end))
    }

    /// A record that changed the device goes to the target: one of its blocks may be remembered. Behind
    /// [`SetMemory::forget_blocks`].
    pub fn trace_block(&mut self, device: u32, start: u64, content: &[u8], time_ns: u64) {
        let memory = self.device_mut(device).filter(|memory| memory.mirrored);
        let Some(memory) = memory.filter(|memory| memory.origin.wants_trace(time_ns)) else {
            return;
        };
        if let Some((offset, block)) = origin::block_in(start, content) {
            memory.origin.trace(Sample::of(offset, block), time_ns);
        }
    }

    /// The present stream is about to be offered to the target. True: that is new, and must be durable first.
    pub fn offer_stream(&mut self) -> bool {
        if self.lineage.first() == Some(&self.stream_uuid) {
            return false;
        }
        self.lineage.insert(0, self.stream_uuid);
        self.lineage.truncate(LINEAGE_MAX);
        true
    }

    fn device_mut(&mut self, device: u32) -> Option<&mut DeviceMemory> {
        let mut devices = self.devices.values_mut();
        devices.find(|memory| memory.device == device)
    }

    /// What the module counts of others' writes to the device behind it. True: there is a reason for alarm that was not
    /// known. A device that was never mirrored has no copy to be worried about.
    pub fn on_bypass_count(&mut self, device: u32, sectors: u64, unix_ms: u64) -> bool {
        let Some(memory) = self.device_mut(device) else {
            return false;
        };
        let more = sectors.saturating_sub(memory.bypassed_sectors);
        memory.bypassed_sectors = memory.bypassed_sectors.max(sectors);
        if more > 0 {
            // Any block may hold something else now: the alarm is for that, and a verification ends it.
            memory.origin = Origin::default();
        }
        let matters = more > 0 && memory.mirrored_once;
        matters
            && alarm::raise(
                &mut memory.alarm,
                unix_ms,
                Cause::Bypassed { sectors: more },
            )
    }

    /// A device is seen, in that boot, with so many sectors that were written before it was attached. It is judged once a
    /// boot: in one in which it was attached before, they are most likely our own. True: there is a reason for alarm.
    pub fn on_boot(&mut self, device: u32, boot_id: &str, sectors: u64, unix_ms: u64) -> bool {
        let Some(memory) = self.device_mut(device) else {
            return false;
        };
        if memory.boot_id == boot_id {
            return false;
        }
        let former = std::mem::replace(&mut memory.boot_id, boot_id.to_owned());
        let matters = sectors > 0 && memory.mirrored_once && !former.is_empty();
        matters && alarm::raise(&mut memory.alarm, unix_ms, Cause::WrittenBefore { sectors })
    }

    /// The copy of a device must be verified. True: that was not known.
    pub fn raise(&mut self, device: u32, unix_ms: u64, cause: Cause) -> bool {
        self.device_mut(device)
            .is_some_and(|memory| alarm::raise(&mut memory.alarm, unix_ms, cause))
    }

    /// The number of a device's alarm, 0 without.
    #[must_use]
    pub fn alarm_number(&self, device: u32) -> u64 {
        let mut devices = self.devices.values();
        let memory = devices.find(|memory| memory.device == device);
        let alarm = memory.and_then(|memory| memory.alarm.as_ref());
        alarm.map_or(0, |alarm| alarm.number)
    }

    /// A job is done with a device. Gives the alarm that is over.
    pub fn settle_alarm(&mut self, item: &DeviceJob) -> Option<Alarm> {
        let memory = self.device_mut(item.device).filter(|_| item.is_clean())?;
        alarm::settle(&mut memory.alarm, item.alarm_number)
    }

    /// Number for a new job.
    pub fn next_job_id(&mut self) -> u64 {
        self.last_job += 1;
        self.last_job
    }

    /// Whether the job under way mirrors the device.
    fn is_being_mirrored(&self, device: u32) -> bool {
        let job = self
            .job
            .as_ref()
            .filter(|job| job.kind.is_mirror() && !job.is_over());
        job.is_some_and(|job| {
            job.devices
                .iter()
                .any(|item| item.device == device && !item.ended)
        })
    }

    /// Which devices must be mirrored, given what the target reports. `broken` is a reason that
    /// concerns all of them: a new stream, a hole.
    #[must_use]
    pub fn needs(
        &self,
        offers: &[DeviceOffer],
        reports: &[VolumeReport],
        broken: Option<&str>,
    ) -> Vec<Need> {
        let mut needs = vec![];
        for offer in offers {
            let Some(report) = reports.iter().find(|report| report.device == offer.device) else {
                continue;
            };
            if report.code != Code::OK || self.is_being_mirrored(offer.device) {
                continue;
            }
            let memory = self.devices.get(&offer.label);
            let trusted = memory.is_some_and(|memory| memory.mirrored);
            let holds = broken.is_none() && trusted && report.sync == VolumeSync::Mirrored;
            if holds {
                continue;
            }
            let once = memory.is_some_and(|memory| memory.mirrored_once);
            let reason = match broken {
                Some(reason) => reason.to_owned(),
                None if !once => "it was never mirrored".to_owned(),
                None if trusted => "the target no longer trusts its volume".to_owned(),
                None => "the device was away, its stream began anew, or a mirror was interrupted"
                    .to_owned(),
            };
            let doubt = memory.and_then(|memory| memory.doubt.clone());
            let wanted = memory.is_some_and(DeviceMemory::is_wanted);
            let automatic = wanted && doubt.is_none();
            let reason = doubt.unwrap_or(reason);
            needs.push(Need {
                device: offer.device,
                label: offer.label.clone(),
                sectors: offer.sectors,
                reason: match (once, wanted) {
                    (true, _) => reason,
                    (false, true) => "its first mirror was interrupted".to_owned(),
                    (false, false) => "it was never mirrored".to_owned(),
                },
                automatic,
            });
        }
        needs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(device: u32) -> DeviceOffer {
        DeviceOffer {
            device,
            label: "vol".into(),
            sectors: 64,
            block_bytes: 512,
        }
    }

    fn report(device: u32, sync: VolumeSync) -> VolumeReport {
        VolumeReport {
            device,
            code: Code::OK,
            text: String::new(),
            sync,
            sync_seq: 0,
            sectors: 64,
        }
    }

    fn memory(mirrored: bool) -> SetMemory {
        let mut memory = SetMemory::default();
        assert!(memory.enter_stream(Uuid([1; 16])));
        memory.enter_device(&offer(1));
        if mirrored {
            memory.set_mirrored(1, true);
        }
        memory
    }

    #[test]
    fn a_device_that_was_never_mirrored_waits_for_the_operator() {
        let needs = memory(false).needs(&[offer(1)], &[report(1, VolumeSync::Unmirrored)], None);
        assert!(!needs[0].automatic);
    }

    #[test]
    fn a_first_mirror_that_was_interrupted_begins_again() {
        let mut memory = memory(false);
        memory.decide(1);
        assert!(memory.enter_stream(Uuid([2; 16])));
        memory.enter_device(&offer(1));
        let needs = |memory: &SetMemory| {
            memory.needs(&[offer(1)], &[report(1, VolumeSync::Unmirrored)], None)
        };
        assert!(needs(&memory)[0].automatic);
        memory.want_no_more(1);
        assert!(!needs(&memory)[0].automatic);
    }

    #[test]
    fn what_both_sides_trust_needs_nothing() {
        let needs = memory(true).needs(&[offer(1)], &[report(1, VolumeSync::Mirrored)], None);
        assert!(needs.is_empty());
    }

    #[test]
    fn every_broken_relation_leads_to_a_difference_mirror() {
        let untrusted = memory(true).needs(&[offer(1)], &[report(1, VolumeSync::Unmirrored)], None);
        assert!(untrusted[0].automatic);
        let hole = memory(true).needs(
            &[offer(1)],
            &[report(1, VolumeSync::Mirrored)],
            Some("a hole"),
        );
        assert_eq!(hole[0].reason, "a hole");
        let mut renewed = memory(true);
        assert!(renewed.enter_stream(Uuid([2; 16])));
        assert_eq!(renewed.generation, 2);
        renewed.enter_device(&offer(1));
        assert!(renewed.needs(&[offer(1)], &[report(1, VolumeSync::Mirrored)], None)[0].automatic);
        let mut returned = memory(true);
        returned.enter_device(&offer(2));
        assert!(returned.needs(&[offer(2)], &[report(2, VolumeSync::Mirrored)], None)[0].automatic);
    }

    #[test]
    fn a_bypass_is_an_alarm_until_a_pass_that_began_later_is_clean() {
        let mut memory = memory(true);
        assert!(!memory.on_bypass_count(1, 0, 5));
        assert!(memory.on_bypass_count(1, 8, 5));
        assert!(!memory.on_bypass_count(1, 8, 6), "it is known");
        let mut item = DeviceJob::new(1, "vol", 64);
        item.alarm_number = memory.alarm_number(1);
        item.begun = true;
        assert_eq!(memory.settle_alarm(&item), None, "it is not done");
        item.position = 64;
        item.mismatched_sectors = 8;
        assert_eq!(memory.settle_alarm(&item), None, "something differs");
        item.repaired_sectors = 8;
        assert!(!memory.on_bypass_count(1, 16, 6));
        assert_eq!(memory.settle_alarm(&item), None, "there was another write");
        item.alarm_number = memory.alarm_number(1);
        assert!(memory.settle_alarm(&item).is_some());
        assert_eq!(memory.alarm_number(1), 0);
        // What is known is kept apart from the alarm.
        assert!(!memory.on_bypass_count(1, 16, 7) && memory.on_bypass_count(1, 17, 8));
    }

    #[test]
    fn writes_between_boot_and_attach_are_an_alarm() {
        let mut memory = memory(true);
        assert!(
            !memory.on_boot(1, "first", 8, 5),
            "nothing is known of it yet"
        );
        assert!(!memory.on_boot(1, "first", 8, 5));
        assert!(!memory.on_boot(1, "second", 0, 5));
        assert!(memory.on_boot(1, "third", 8, 5));
        assert!(memory.alarm_number(1) > 0);
    }

    #[test]
    fn the_past_of_a_source_is_bounded_and_has_the_newest_stream_first() {
        let mut memory = memory(true);
        assert!(memory.offer_stream() && !memory.offer_stream());
        for stream in 2..100 {
            memory.enter_stream(Uuid([stream; 16]));
            // Not every stream was offered.
            assert!(stream % 2 == 0 || memory.offer_stream());
        }
        assert_eq!(memory.lineage.len(), LINEAGE_MAX);
        assert_eq!(memory.lineage[..2], [Uuid([99; 16]), Uuid([97; 16])]);
    }

    #[test]
    fn a_device_that_is_in_doubt_waits_for_an_operator() {
        let offers = [offer(1)];
        let reports = [report(1, VolumeSync::Unmirrored)];
        let mut memory = memory(true);
        assert!(memory.doubt(1, "another disk".into()) && !memory.doubt(1, "again".into()));
        let need = |memory: &SetMemory| {
            let mut needs = memory.needs(&offers, &reports, Some("new stream"));
            needs.pop().map(|need| (need.reason, need.automatic))
        };
        assert_eq!(need(&memory), Some(("another disk".into(), false)));
        memory.decide(1);
        assert!(!memory.is_doubtful(1) && !memory.doubt(1, "another disk".into()));
        assert_eq!(need(&memory), Some(("new stream".into(), true)));
        // It is asked again about a disk that comes later.
        memory.enter_stream(Uuid([2; 16]));
        memory.enter_device(&offer(1));
        assert!(memory.doubt(1, "another disk".into()));
    }

    #[test]
    fn a_refused_device_is_not_mirrored() {
        let refused = VolumeReport {
            code: Code::VOLUME_TOO_SMALL,
            ..report(1, VolumeSync::Unmirrored)
        };
        assert!(memory(true).needs(&[offer(1)], &[refused], None).is_empty());
    }
}
