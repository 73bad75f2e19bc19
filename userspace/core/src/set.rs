// SPDX-License-Identifier: GPL-2.0-only

//! What the target knows of a set: whose it is, how far it is, and what its volumes are worth.
//!
//! # What a volume is worth
//!
//! ```text
//!                 bound to a device            Marker MirrorBegin
//!   (unbound) ---------------------> Unmirrored -----------------> Mirroring
//!                                        ^  ^                        |    |
//!            new stream, new device id,  |  +------------------------+    | Marker MirrorEnd
//!            records passed it by,       |     the same reasons           v
//!            Marker Unmirrored           +---------------------------- Mirrored
//! ```
//!
//! `Mirrored` alone does not mean "in sync": that also needs the set's order, see [`Lost`], and
//! that records of the device are being applied. [`SetState::in_sync`] is the one place that says so.

use std::collections::{BTreeMap, BTreeSet};

use dtloop_canary::Canary;
use dtloop_proto::message::{
    self, Alarm, DeviceOffer, Hello, Marker, Past, VolumeReport, VolumeSync,
};
use dtloop_proto::{Code, Op, RecordBody, RecordKind, Uuid};
use serde::{Deserialize, Serialize};

use crate::binding::Refusal;
use crate::chain::Chain;
use crate::identity::VolumeIdentity;

/// The order of the source's writes is lost: the target is no prefix of them from `from` until a
/// resync that begins after `last` is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// First record at which it was lost.
    pub from: u64,
    /// Last record at which it was lost again.
    pub last: u64,
    /// A [`Code`], if no record but source or target gave the reason.
    pub code: u16,
}

/// A moment at which a volume was equal to its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Consistent {
    /// The stream.
    #[serde(with = "crate::uuid_text")]
    pub stream_uuid: Uuid,
    /// The last record applied then.
    pub seq: u64,
    /// When that record was made, in nanoseconds of the source's clock; 0: unknown.
    #[serde(default)]
    pub time_ns: u64,
}

/// Where the truth about the staged volumes is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// The volumes are as they were when they were last consistent; changes go to the overlays.
    Staged,
    /// The overlays over the volumes are what the target holds; the overlays are being written into the volumes.
    Publishing,
}

/// Changes are kept beside the volumes. All staged volumes of a set change over to a new phase at once, by the one write of
/// the set's state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stage {
    /// Number of the stage; the names of its files have it.
    pub number: u64,
    /// Where the truth is.
    pub phase: Phase,
    /// The volumes concerned.
    pub labels: BTreeSet<String>,
    /// What they hold while they are [`Phase::Staged`].
    pub since: Consistent,
}

/// A stage that has to begin before anything more is applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// The volumes that were consistent.
    pub labels: BTreeSet<String>,
    /// When.
    pub since: Consistent,
}

/// [`VolumeSync`] in the state file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sync {
    /// See [`VolumeSync::Unmirrored`].
    #[default]
    Unmirrored,
    /// See [`VolumeSync::Mirroring`].
    Mirroring,
    /// See [`VolumeSync::Mirrored`].
    Mirrored,
}

impl From<Sync> for VolumeSync {
    fn from(sync: Sync) -> Self {
        match sync {
            Sync::Unmirrored => Self::Unmirrored,
            Sync::Mirroring => Self::Mirroring,
            Sync::Mirrored => Self::Mirrored,
        }
    }
}

/// Something that was noticed about a volume, until a verification has made it good.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeAlarm {
    /// Rises with every alarm of the volume.
    pub number: u64,
    /// A [`Code`].
    pub code: u16,
    /// When, in milliseconds since 1970.
    pub unix_ms: u64,
    /// For people.
    pub text: String,
}

/// A volume of the set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeState {
    /// The device id that feeds it in the current stream.
    pub device: u32,
    /// Size of that device in sectors.
    pub sectors: u64,
    /// What it is worth.
    pub sync: Sync,
    /// Position at which `sync` was entered.
    pub sync_seq: u64,
    /// Since when and why records of the device are not applied: the code and the reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<(u16, String)>,
    /// The last moment at which it was known to be equal to its device, once it no longer is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub consistent: Option<Consistent>,
    /// See [`VolumeAlarm`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<VolumeAlarm>,
    /// Alarms raised so far.
    #[serde(default)]
    pub alarms: u64,
    /// What the volume is known by, as of the checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<VolumeIdentity>,
}

/// Everything that the target remembers of a set. A copy of it is made durable at checkpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetState {
    /// The source.
    #[serde(with = "crate::uuid_text")]
    pub source_id: Uuid,
    /// Name of the set.
    pub set: String,
    /// Highest generation seen.
    pub generation: u64,
    /// Current stream.
    #[serde(with = "crate::uuid_text")]
    pub stream_uuid: Uuid,
    /// Last record applied.
    pub applied_seq: u64,
    /// When it was made, in nanoseconds of the source's clock.
    #[serde(default)]
    pub applied_time_ns: u64,
    /// Whether the order is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<Lost>,
    /// Changes are staged.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// Changes have to be staged from here on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<Wanted>,
    /// Number of the last stage.
    #[serde(default)]
    pub stages: u64,
    /// An operator gave up the last consistent state: until the set is consistent again, nothing is staged.
    #[serde(default)]
    pub in_place: bool,
    /// The hash chain over the records that were applied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chain: Option<Chain>,
    /// Volumes by label.
    pub volumes: BTreeMap<String, VolumeState>,
    /// The last version of the source's intent file that was told.
    #[serde(default)]
    pub intent_version: u64,
}

/// How a source that says hello is received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It goes on where it was.
    Resume,
    /// It begins a stream that the target does not know.
    NewStream,
    /// The source no longer has records that the target needs.
    Hole {
        /// The first one missing.
        from: u64,
        /// The first one it has.
        to: u64,
    },
}

impl SetState {
    /// A set that nothing is known of.
    #[must_use]
    pub fn new(source_id: Uuid, set: &str) -> Self {
        Self {
            source_id,
            set: set.to_owned(),
            generation: 0,
            stream_uuid: Uuid::NONE,
            applied_seq: 0,
            applied_time_ns: 0,
            lost: None,
            stage: None,
            wanted: None,
            stages: 0,
            in_place: false,
            chain: None,
            volumes: BTreeMap::new(),
            intent_version: 0,
        }
    }

    /// What the volumes of these devices have been worth so far. To be asked before the devices are bound.
    #[must_use]
    pub fn past(&self, offers: &[DeviceOffer], durable_seq: u64) -> Past {
        let mirrored = |offer: &&DeviceOffer| {
            let volume = self.volumes.get(&offer.label);
            volume.is_some_and(|volume| volume.sync == Sync::Mirrored && volume.refused.is_none())
        };
        Past {
            stream: self.stream_uuid,
            durable_seq,
            intent_version: self.intent_version,
            mirrored: offers
                .iter()
                .filter(mirrored)
                .map(|offer| offer.device)
                .collect(),
        }
    }

    /// How to receive a source, given the last durable record. Changes nothing.
    ///
    /// # Errors
    ///
    /// The refusal to be sent.
    pub fn admit(&self, hello: &Hello, durable_seq: u64) -> Result<Admission, Refusal> {
        let older = hello.generation < self.generation
            || (hello.generation == self.generation && hello.stream_uuid != self.stream_uuid);
        if older {
            return Err(Refusal::new(
                Code::OLDER_GENERATION,
                format!(
                    "Set \"{}\" of source {} comes with generation {} but this target has seen {}: an older \
                     state of the source was restored, or it was cloned; if this is the source whose data counts, \
                     run \"dttarget accept {}\" on the target",
                    self.set, self.source_id, hello.generation, self.generation, self.set
                ),
            ));
        }
        if hello.stream_uuid != self.stream_uuid {
            self.check_lineage(hello)?;
            return Ok(Admission::NewStream);
        }
        if durable_seq >= hello.next_seq {
            return Err(Refusal::new(
                Code::TARGET_AHEAD,
                format!(
                    "The target holds record {durable_seq} of set \"{}\", the source has made only those below {}",
                    self.set, hello.next_seq
                ),
            ));
        }
        if durable_seq + 1 < hello.first_seq {
            return Ok(Admission::Hole {
                from: durable_seq + 1,
                to: hello.first_seq,
            });
        }
        Ok(Admission::Resume)
    }

    /// A source with a new stream must have offered the one that the target followed: what the target holds is then part
    /// of its past. Otherwise the target holds data of a clone, or of a later state than the one that was restored.
    fn check_lineage(&self, hello: &Hello) -> Result<(), Refusal> {
        let lineage = message::option(&hello.options, message::OPTION_LINEAGE);
        let knows =
            lineage.is_none_or(|list| list.chunks(16).any(|uuid| uuid == self.stream_uuid.0));
        if knows || self.stream_uuid.is_none() {
            return Ok(());
        }
        Err(Refusal::new(
            Code::UNRELATED,
            format!(
                "Set \"{}\" of source {}: the target followed stream {}, which is not in this source's past. It is a \
                 clone of the source, or an older state of it was restored, and the copy may be newer than the source. \
                 If this is the source whose data counts, run \"dttarget accept {}\" on the target",
                self.set,
                self.source_id,
                self.stream_uuid.short(),
                self.set
            ),
        ))
    }

    /// An operator wants this source to be followed, whatever its past.
    ///
    /// # Errors
    ///
    /// The refusal to be sent, for what no decision can change.
    pub fn accept(&mut self, hello: &Hello, durable_seq: u64) -> Result<Admission, Refusal> {
        self.generation = hello.generation;
        if hello.stream_uuid != self.stream_uuid {
            return Ok(Admission::NewStream);
        }
        self.admit(hello, durable_seq)
    }

    /// An operator wants the volume to be overwritten, whatever it is now. What is staged for the volume that it was goes.
    pub fn accept_volume(&mut self, label: &str) {
        self.distrust(label);
        if let Some(volume) = self.volumes.get_mut(label) {
            volume.identity = None;
            volume.refused = None;
            volume.alarm = None;
            volume.consistent = None;
        }
        self.leave_stage(label);
    }

    /// What is known of the content of a range of the volume is known no more.
    pub fn forget_content(&mut self, device: u32, start: u64, end: u64) {
        let mut volumes = self.volumes.values_mut();
        let volume = volumes.find(|volume| volume.device == device);
        if let Some(identity) = volume.and_then(|volume| volume.identity.as_mut()) {
            identity.forget(start, end);
        }
    }

    /// Takes up what [`SetState::admit`] found, once everything received before has been applied.
    pub fn enter(&mut self, hello: &Hello, admission: Admission) {
        self.watch(|state| state.take_up(hello, admission));
    }

    fn take_up(&mut self, hello: &Hello, admission: Admission) {
        self.generation = hello.generation;
        match admission {
            Admission::Resume => {}
            Admission::NewStream => {
                self.distrust_all();
                self.stream_uuid = hello.stream_uuid;
                self.applied_seq = hello.first_seq - 1;
                self.lost = None;
                self.chain = None;
                for volume in self.volumes.values_mut() {
                    volume.device = 0;
                    volume.sync_seq = self.applied_seq;
                }
            }
            Admission::Hole { from, to } => {
                self.distrust_all();
                self.lose(from, to - 1, Code::SEQUENCE_HOLE);
                self.applied_seq = to - 1;
                self.chain = None;
            }
        }
        // Also where an earlier version of this program has left none.
        let (stream_uuid, seq) = (self.stream_uuid, self.applied_seq);
        if message::option(&hello.options, message::OPTION_UNCHAINED).is_some() {
            self.chain = None;
        } else if self.chain.is_none_or(|chain| chain.seq != seq) {
            self.chain = Some(Chain::begin(stream_uuid, seq));
        }
    }

    /// Makes a change, and wants a stage if a volume was consistent before it and no longer is. No such change
    /// touches the content of a volume itself, so the volumes are still what they were.
    fn watch(&mut self, change: impl FnOnce(&mut Self)) {
        let (labels, since) = (self.consistent_labels(), self.moment());
        let was_consistent = self.is_consistent();
        change(self);
        let broken = labels.iter().any(|label| !self.is_whole(label));
        let staged = matches!(&self.stage, Some(stage) if stage.phase == Phase::Staged);
        if broken && !staged && !self.in_place && self.wanted.is_none() {
            self.wanted = Some(Wanted { labels, since });
        }
        if self.in_place && !was_consistent && self.is_consistent() {
            self.in_place = false;
        }
    }

    /// The volumes whose changes are all there, in order.
    #[must_use]
    pub fn consistent_labels(&self) -> BTreeSet<String> {
        let labels = self.volumes.keys();
        labels
            .filter(|label| self.is_whole(label))
            .cloned()
            .collect()
    }

    /// Whether that is so for all volumes that the stream feeds.
    fn is_consistent(&self) -> bool {
        let mut fed = self.volumes.iter().filter(|(_, volume)| volume.device != 0);
        self.lost.is_none() && fed.all(|(label, _)| self.is_whole(label))
    }

    fn moment(&self) -> Consistent {
        Consistent {
            stream_uuid: self.stream_uuid,
            seq: self.applied_seq,
            time_ns: self.applied_time_ns,
        }
    }

    /// Where changes of a volume go: the phase of the stage, if the volume is staged.
    #[must_use]
    pub fn phase_of(&self, label: &str) -> Option<Phase> {
        let stage = self.stage.as_ref()?;
        stage.labels.contains(label).then_some(stage.phase)
    }

    /// Begins the stage that is wanted, with those of its volumes that `may` be staged.
    pub fn begin_stage(&mut self, may: impl Fn(&str) -> bool) {
        let Some(mut wanted) = self.wanted.take() else {
            return;
        };
        wanted.labels.retain(|label| may(label));
        if wanted.labels.is_empty() {
            return;
        }
        self.stages += 1;
        self.stage = Some(Stage {
            number: self.stages,
            phase: Phase::Staged,
            labels: wanted.labels,
            since: wanted.since,
        });
    }

    /// Whether the staged volumes are consistent again, so that they can be published. A volume whose device is not in the
    /// stream any more does not hold the others back.
    #[must_use]
    pub fn is_publishable(&self) -> bool {
        let Some(stage) = self
            .stage
            .as_ref()
            .filter(|stage| stage.phase == Phase::Staged)
        else {
            return false;
        };
        let fed = |label: &&String| {
            let volume = self.volumes.get(*label);
            volume.is_some_and(|volume| volume.device != 0)
        };
        let mut fed = stage.labels.iter().filter(fed).peekable();
        let whole =
            |label: &String| self.is_whole(label) || dtloop_canary::bites(Canary::PublishedTooSoon);
        fed.peek().is_some() && fed.all(whole)
    }

    /// From here on the overlays over the volumes are the truth. A volume that the stream does not feed keeps what
    /// it last held; gives the names of those.
    pub fn publish(&mut self) -> Vec<String> {
        let volumes = &self.volumes;
        let Some(stage) = &mut self.stage else {
            return vec![];
        };
        let left = |label: &&String| volumes.get(*label).is_none_or(|volume| volume.device == 0);
        let left: Vec<String> = stage.labels.iter().filter(left).cloned().collect();
        stage.labels.retain(|label| !left.contains(label));
        stage.phase = Phase::Publishing;
        left
    }

    /// An operator gives up the last consistent state, for this once. The state may be that of a checkpoint, at which the set was
    /// still consistent: then what ended that is in the journal behind it, and the stage tells of it.
    pub fn give_up_stage(&mut self) {
        let staged = matches!(&self.stage, Some(stage) if stage.phase == Phase::Staged);
        if self.is_consistent() && self.wanted.is_none() && !staged {
            return;
        }
        self.in_place = true;
        self.wanted = None;
        if let Some(stage) = &mut self.stage {
            stage.phase = Phase::Publishing;
        }
    }

    /// What is staged is lost, or left out: the volumes are what they are without it. One that is half published is no
    /// state of the source.
    pub fn abandon_stage(&mut self) {
        let Some(stage) = self.stage.take() else {
            return;
        };
        let since = (stage.phase == Phase::Staged).then_some(stage.since);
        for label in &stage.labels {
            self.distrust(label);
            if let Some(volume) = self.volumes.get_mut(label) {
                volume.consistent = since;
            }
        }
    }

    /// The volumes are settled, to be used on the target: they keep what they hold, and nothing is applied to them any more.
    /// From here on [`VolumeState::consistent`] says what that is, or nothing if it is between two states.
    pub fn release(&mut self) {
        let staged = self.stage.as_ref().map(|stage| stage.labels.clone());
        let staged = staged.unwrap_or_default();
        self.abandon_stage();
        let (now, whole) = (self.moment(), self.consistent_labels());
        for (label, volume) in &mut self.volumes {
            if whole.contains(label) {
                volume.consistent = Some(now);
            } else if !staged.contains(label) {
                volume.consistent = None;
            }
            if volume.alarm.is_some() {
                // Somebody else wrote to it.
                volume.consistent = None;
            }
            let refusal = crate::binding::released(label);
            volume.refused = Some((refusal.code.0, refusal.text));
            volume.sync = Sync::Unmirrored;
        }
        (self.wanted, self.in_place) = (None, false);
    }

    /// Forgets a volume.
    pub fn remove(&mut self, label: &str) {
        self.volumes.remove(label);
        self.leave_stage(label);
    }

    fn leave_stage(&mut self, label: &str) {
        if let Some(wanted) = &mut self.wanted {
            wanted.labels.remove(label);
        }
        if let Some(stage) = &mut self.stage {
            stage.labels.remove(label);
            if stage.labels.is_empty() {
                self.stage = None;
            }
        }
    }

    fn distrust_all(&mut self) {
        let labels: Vec<String> = self.volumes.keys().cloned().collect();
        for label in labels {
            self.distrust(&label);
        }
    }

    /// The volume is no longer known to be equal to its device.
    pub fn distrust(&mut self, label: &str) {
        let (moment, seq, whole) = (self.moment(), self.applied_seq, self.lost.is_none());
        if let Some(volume) = self.volumes.get_mut(label) {
            if volume.sync == Sync::Mirrored && whole {
                volume.consistent = Some(moment);
            }
            if volume.sync != Sync::Unmirrored {
                volume.sync = Sync::Unmirrored;
                volume.sync_seq = seq;
            }
        }
    }

    fn lose(&mut self, from: u64, last: u64, code: Code) {
        if self.lost.is_none() {
            for volume in self
                .volumes
                .values_mut()
                .filter(|volume| volume.sync == Sync::Mirrored)
            {
                volume.consistent = Some(Consistent {
                    stream_uuid: self.stream_uuid,
                    seq: from.saturating_sub(1),
                    time_ns: self.applied_time_ns,
                });
            }
        }
        let lost = self.lost.get_or_insert(Lost {
            from,
            last,
            code: code.0,
        });
        lost.last = lost.last.max(last);
    }

    /// A device was bound to its volume, or refused.
    pub fn bind(&mut self, label: &str, device: u32, sectors: u64, refused: Option<&Refusal>) {
        self.watch(|state| state.take_up_device(label, device, sectors, refused));
    }

    fn take_up_device(
        &mut self,
        label: &str,
        device: u32,
        sectors: u64,
        refused: Option<&Refusal>,
    ) {
        let seq = self.applied_seq;
        let volume = self.volumes.entry(label.to_owned()).or_insert(VolumeState {
            device,
            sectors,
            sync: Sync::Unmirrored,
            sync_seq: seq,
            refused: None,
            consistent: None,
            alarm: None,
            alarms: 0,
            identity: None,
        });
        volume.sectors = sectors;
        volume.refused = refused.map(|refusal| (refusal.code.0, refusal.text.clone()));
        if volume.device != device || refused.is_some() {
            self.distrust(label);
        }
        if let Some(volume) = self.volumes.get_mut(label) {
            volume.device = device;
        }
    }

    /// The label of the volume that a device feeds.
    #[must_use]
    pub fn label_of(&self, device: u32) -> Option<&str> {
        let mut volumes = self.volumes.iter();
        volumes
            .find(|(_, volume)| volume.device == device)
            .map(|(label, _)| label.as_str())
    }

    /// A record was applied.
    pub fn on_record(&mut self, seq: u64, body: &RecordBody) {
        debug_assert_eq!(seq, self.applied_seq + 1);
        if body.loses_order() && !dtloop_canary::bites(Canary::GapsIgnored) {
            self.watch(|state| state.lose(seq, seq, Code::OK));
        }
        if body.op == Op::Resize && body.is_committed() {
            if let Some(volume) = self
                .volumes
                .values_mut()
                .find(|volume| volume.device == body.device)
            {
                volume.sectors = body.aux;
            }
        }
        self.applied_seq = seq;
        self.applied_time_ns = body.time_ns;
    }

    /// A record was applied: its place in the hash chain. To be called before [`SetState::on_record`].
    pub fn chain(&mut self, kind: RecordKind, body: &RecordBody, payload: &[u8]) {
        if let Some(chain) = &mut self.chain {
            chain.add(kind, body, payload);
        }
    }

    /// Something was noticed about a volume for which it must be verified.
    pub fn raise_alarm(&mut self, label: &str, code: Code, unix_ms: u64, text: String) {
        if let Some(volume) = self.volumes.get_mut(label) {
            volume.alarms += 1;
            let number = volume.alarms;
            let unix_ms = volume.alarm.as_ref().map_or(unix_ms, |alarm| alarm.unix_ms);
            volume.alarm = Some(VolumeAlarm {
                number,
                code: code.0,
                unix_ms,
                text,
            });
        }
    }

    /// The alarms that the source has not answered.
    pub fn alarms(&self) -> impl Iterator<Item = Alarm> + '_ {
        let volumes = self.volumes.values().filter(|volume| volume.device != 0);
        volumes.filter_map(|volume| {
            let alarm = volume.alarm.as_ref()?;
            Some(Alarm {
                device: volume.device,
                number: alarm.number,
                code: Code(alarm.code),
                unix_ms: alarm.unix_ms,
                text: message::bounded_text(alarm.text.clone()),
            })
        })
    }

    fn clear_alarm(&mut self, device: u32, number: u64) {
        let mut volumes = self.volumes.values_mut();
        if let Some(volume) = volumes.find(|volume| volume.device == device) {
            volume.alarm.take_if(|alarm| alarm.number <= number);
        }
    }

    /// A record passed a volume by: it was refused, or does not reach as far.
    pub fn on_passed_by(&mut self, device: u32) {
        if let Some(label) = self.label_of(device).map(str::to_owned) {
            self.watch(|state| state.distrust(&label));
        }
    }

    /// A marker took its place.
    pub fn on_marker(&mut self, position: u64, marker: Marker) {
        self.watch(|state| state.take_marker(position, marker));
    }

    fn take_marker(&mut self, position: u64, marker: Marker) {
        match marker {
            Marker::MirrorBegin { device } => {
                self.on_passed_by(device);
                self.enter_sync(device, Sync::Mirroring, position);
            }
            Marker::MirrorEnd { device } => {
                if self.sync_of(device) == Some(Sync::Mirroring) {
                    self.enter_sync(device, Sync::Mirrored, position);
                }
            }
            Marker::Unmirrored { device, .. } => self.on_passed_by(device),
            Marker::OrderRestored => {
                if self.lost.is_some_and(|lost| lost.last < position) {
                    self.lost = None;
                    let volumes = self.volumes.values_mut();
                    for volume in volumes.filter(|volume| volume.sync == Sync::Mirrored) {
                        volume.consistent = None;
                    }
                }
            }
            // Of concern only to the space that is kept for staging.
            Marker::Plan { .. } => {}
            Marker::OrderLost { code } => self.lose(position, position, code),
            Marker::Covered { device } => {
                // First, while the volume is worth nothing: it is equal to no state of the present stream yet.
                // It is told at no record, so it can be restored at this very position.
                let last = position.saturating_sub(1);
                self.lose(last.max(1), last, Code::OK);
                self.enter_sync(device, Sync::Mirrored, position);
            }
            Marker::Intent { version } => self.intent_version = version,
            Marker::Cleared { device, number } => self.clear_alarm(device, number),
            // Asks, and changes nothing.
            Marker::Prove { .. } => {}
        }
    }

    fn sync_of(&self, device: u32) -> Option<Sync> {
        self.volumes
            .values()
            .find(|volume| volume.device == device)
            .map(|volume| volume.sync)
    }

    fn enter_sync(&mut self, device: u32, sync: Sync, position: u64) {
        let whole = self.lost.is_none();
        if let Some(volume) = self
            .volumes
            .values_mut()
            .find(|volume| volume.device == device)
        {
            volume.sync = sync;
            volume.sync_seq = position;
            if sync == Sync::Mirrored && whole {
                volume.consistent = None;
            }
        }
    }

    /// Whether every change of the device up to `applied_seq` is in the volume, and nothing behind it.
    #[must_use]
    pub fn is_whole(&self, label: &str) -> bool {
        self.lost.is_none()
            && self
                .volumes
                .get(label)
                .is_some_and(|volume| volume.sync == Sync::Mirrored && volume.refused.is_none())
    }

    /// Whether the volume is equal to its device at `applied_seq`: it is whole, and nothing speaks against it.
    ///
    /// What is staged and published goes by [`SetState::is_whole`] alone: a stage does not help against somebody who writes
    /// to the volume.
    #[must_use]
    pub fn in_sync(&self, label: &str) -> bool {
        let volume = self.volumes.get(label);
        self.is_whole(label) && volume.is_some_and(|volume| volume.alarm.is_none())
    }

    /// The volumes as they are reported to the source.
    #[must_use]
    pub fn reports(&self, bytes_of: impl Fn(&str) -> u64) -> Vec<VolumeReport> {
        let report = |(label, volume): (&String, &VolumeState)| {
            let (code, text) = volume.refused.clone().unwrap_or_default();
            VolumeReport {
                device: volume.device,
                code: Code(code),
                text: dtloop_proto::message::bounded_text(text),
                sync: volume.sync.into(),
                sync_seq: volume.sync_seq,
                sectors: bytes_of(label) / dtloop_proto::limits::SECTOR_BYTES,
            }
        };
        self.volumes
            .iter()
            .filter(|(_, volume)| volume.device != 0)
            .map(report)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtloop_proto::record::{STATE_COMMITTED, STATE_FAILED};

    fn hello(stream: u8, generation: u64, first_seq: u64, next_seq: u64) -> Hello {
        Hello {
            version_min: 1,
            version_max: 1,
            software: String::new(),
            source_id: Uuid([9; 16]),
            set: "db".into(),
            stream_uuid: Uuid([stream; 16]),
            generation,
            first_seq,
            next_seq,
            devices: vec![],
            options: vec![],
        }
    }

    fn record(op: Op, state: u8) -> RecordBody {
        RecordBody {
            epoch: 0,
            start_sector: 0,
            time_ns: 0,
            aux: 0,
            sectors: 8,
            device: 1,
            flags: 0,
            op,
            state,
        }
    }

    fn mirrored() -> SetState {
        let mut state = SetState::new(Uuid([9; 16]), "db");
        let hello = hello(1, 1, 1, 10);
        assert_eq!(state.admit(&hello, 0), Ok(Admission::NewStream));
        state.enter(&hello, Admission::NewStream);
        state.bind("vol", 1, 64, None);
        state.on_marker(1, Marker::MirrorBegin { device: 1 });
        assert!(!state.in_sync("vol"));
        state.on_record(1, &record(Op::Sync, STATE_COMMITTED));
        state.on_marker(2, Marker::MirrorEnd { device: 1 });
        assert!(state.in_sync("vol"));
        state
    }

    #[test]
    fn what_the_target_holds_must_be_in_the_sources_past() {
        let state = mirrored();
        let coming = |stream, generation, past: &[u8]| {
            let value = past.iter().flat_map(|stream| [*stream; 16]).collect();
            let mut hello = hello(stream, generation, 1, 10);
            hello.options = vec![message::HandshakeOption {
                key: message::OPTION_LINEAGE,
                value,
            }];
            state.admit(&hello, 1).map_err(|refusal| refusal.code)
        };
        assert_eq!(coming(3, 3, &[3, 2, 1]), Ok(Admission::NewStream));
        // A clone, or a restored state, that has come further than the one the target knows.
        assert_eq!(coming(5, 7, &[5, 4, 3]), Err(Code::UNRELATED));
        assert_eq!(coming(5, 1, &[5, 1]), Err(Code::OLDER_GENERATION));
    }

    #[test]
    fn the_chain_goes_with_the_sequence() {
        let mut state = mirrored();
        let chain = |state: &SetState| state.chain.unwrap();
        assert_eq!(chain(&state).seq, 0, "nothing was added yet");
        state.enter(&hello(1, 1, 1, 10), Admission::Resume);
        assert_eq!(chain(&state), Chain::begin(Uuid([1; 16]), 1));
        let write = record(Op::Write, STATE_COMMITTED);
        state.chain(RecordKind::Data, &write, &[1; 4096]);
        state.on_record(2, &write);
        let before = chain(&state);
        state.enter(&hello(1, 1, 1, 10), Admission::Resume);
        assert_eq!(chain(&state), before);
        state.enter(&hello(1, 1, 7, 10), Admission::Hole { from: 3, to: 7 });
        assert_eq!(chain(&state), Chain::begin(Uuid([1; 16]), 6));
    }

    #[test]
    fn an_alarm_stands_until_it_is_cleared() {
        let mut state = mirrored();
        state.raise_alarm("vol", Code::VOLUME_CHANGED, 5, "changed".into());
        assert!(!state.in_sync("vol"));
        let alarm = state.alarms().next().unwrap();
        assert_eq!((alarm.device, alarm.number, alarm.unix_ms), (1, 1, 5));
        state.raise_alarm("vol", Code::VOLUME_CHANGED, 6, "changed again".into());
        state.on_marker(
            2,
            Marker::Cleared {
                device: 1,
                number: 1,
            },
        );
        assert!(!state.in_sync("vol"), "that was about the first one");
        state.on_marker(
            2,
            Marker::Cleared {
                device: 1,
                number: 2,
            },
        );
        assert!(state.in_sync("vol") && state.alarms().next().is_none());
    }

    #[test]
    fn in_sync_ends_with_every_reason() {
        for op in [Op::Gap, Op::Discard, Op::SecureErase] {
            let mut state = mirrored();
            state.on_record(2, &record(op, STATE_COMMITTED));
            assert!(!state.in_sync("vol"), "{op:?}");
            assert_eq!(state.volumes["vol"].consistent.map(|c| c.seq), Some(1));
        }
        let mut state = mirrored();
        state.on_record(2, &record(Op::Write, STATE_FAILED));
        assert!(!state.in_sync("vol"));
        let mut state = mirrored();
        state.on_passed_by(1);
        assert!(!state.in_sync("vol"));
        let mut state = mirrored();
        state.bind("vol", 2, 64, None);
        assert!(!state.in_sync("vol"), "another device of the same name");
        let mut state = mirrored();
        state.bind(
            "vol",
            1,
            64,
            Some(&Refusal::new(Code::VOLUME_TOO_SMALL, "small")),
        );
        assert!(!state.in_sync("vol"));
        let mut state = mirrored();
        state.on_marker(
            2,
            Marker::OrderLost {
                code: Code::MIRROR_NEEDED,
            },
        );
        assert!(!state.in_sync("vol"));
    }

    #[test]
    fn order_is_restored_only_behind_the_last_loss() {
        let mut state = mirrored();
        state.on_record(2, &record(Op::Gap, STATE_COMMITTED));
        state.on_record(3, &record(Op::Gap, STATE_COMMITTED));
        state.on_marker(3, Marker::OrderRestored);
        assert_eq!(
            state.lost,
            Some(Lost {
                from: 2,
                last: 3,
                code: 0
            })
        );
        state.on_marker(4, Marker::OrderRestored);
        assert!(state.in_sync("vol"));
    }

    #[test]
    fn a_mirror_that_never_began_does_not_end() {
        let mut state = mirrored();
        state.on_passed_by(1);
        state.on_marker(2, Marker::MirrorEnd { device: 1 });
        assert!(!state.in_sync("vol"));
    }

    #[test]
    fn a_covered_volume_keeps_its_worth_and_waits_for_the_order() {
        let offer = DeviceOffer {
            device: 7,
            label: "vol".into(),
            sectors: 64,
            block_bytes: 512,
        };
        let mut state = mirrored();
        state.on_marker(2, Marker::Intent { version: 5 });
        let past = state.past(std::slice::from_ref(&offer), 9);
        assert_eq!((past.stream, past.durable_seq), (Uuid([1; 16]), 9));
        assert_eq!((past.intent_version, &past.mirrored[..]), (5, &[7][..]));
        state.enter(&hello(2, 2, 1, 10), Admission::NewStream);
        state.bind("vol", 7, 64, None);
        assert_eq!(state.past(std::slice::from_ref(&offer), 0).mirrored, []);
        state.on_marker(1, Marker::Covered { device: 7 });
        assert!(
            !state.in_sync("vol"),
            "the marked regions are still to come"
        );
        let consistent = state.volumes["vol"]
            .consistent
            .map(|c| (c.stream_uuid, c.seq));
        assert_eq!(consistent, Some((Uuid([1; 16]), 1)));
        assert_eq!(state.past(std::slice::from_ref(&offer), 0).mirrored, [7]);
        state.on_marker(1, Marker::OrderRestored);
        assert!(state.in_sync("vol"), "without another record");
        assert_eq!(state.volumes["vol"].consistent, None);
    }

    #[test]
    fn admission_notices_older_states_holes_and_new_streams() {
        let state = mirrored();
        assert_eq!(state.admit(&hello(1, 1, 1, 10), 5), Ok(Admission::Resume));
        assert_eq!(
            state.admit(&hello(1, 1, 8, 10), 5),
            Ok(Admission::Hole { from: 6, to: 8 })
        );
        assert_eq!(
            state.admit(&hello(2, 2, 1, 10), 5),
            Ok(Admission::NewStream)
        );
        let code = |hello: &Hello| state.admit(hello, 5).unwrap_err().code;
        assert_eq!(code(&hello(1, 0, 1, 10)), Code::OLDER_GENERATION);
        assert_eq!(
            code(&hello(2, 1, 1, 10)),
            Code::OLDER_GENERATION,
            "a clone of the source"
        );
        assert_eq!(code(&hello(1, 1, 1, 5)), Code::TARGET_AHEAD);
    }

    #[test]
    fn what_breaks_a_consistent_set_wants_a_stage_and_what_mends_it_publishes() {
        let gap = record(Op::Gap, STATE_COMMITTED);
        let mut state = mirrored();
        state.bind("other", 2, 64, None);
        assert_eq!(state.wanted, None, "a volume that never was consistent");
        state.on_marker(2, Marker::MirrorBegin { device: 2 });
        assert_eq!(state.wanted, None);
        state.on_record(2, &gap);
        let wanted = state.wanted.clone().unwrap();
        assert_eq!((wanted.labels.len(), wanted.since.seq), (1, 1));
        state.begin_stage(|_| true);
        assert_eq!(state.phase_of("vol"), Some(Phase::Staged));
        assert_eq!(state.phase_of("other"), None, "nothing to protect");
        state.on_record(3, &gap);
        assert_eq!(state.wanted, None, "once is enough");
        state.on_marker(3, Marker::OrderRestored);
        assert!(!state.is_publishable());
        state.on_marker(4, Marker::OrderRestored);
        assert!(state.is_publishable());
        assert!(state.publish().is_empty());
        assert_eq!(state.phase_of("vol"), Some(Phase::Publishing));
        state.on_record(4, &gap);
        assert!(
            state.wanted.is_some(),
            "the next one waits for the end of this one"
        );

        // A mirror of one volume stages all that were consistent.
        let mut state = mirrored();
        state.bind("other", 2, 64, None);
        state.on_marker(2, Marker::MirrorBegin { device: 2 });
        state.on_marker(2, Marker::MirrorEnd { device: 2 });
        state.on_marker(2, Marker::MirrorBegin { device: 1 });
        state.begin_stage(|_| true);
        assert_eq!(
            state.stage.as_ref().map(|stage| stage.labels.len()),
            Some(2)
        );
        // A volume whose device is gone holds nothing back, and keeps its state.
        state.enter(&hello(2, 2, 1, 10), Admission::NewStream);
        state.bind("vol", 1, 64, None);
        assert!(!state.is_publishable());
        state.on_marker(1, Marker::MirrorBegin { device: 1 });
        state.on_marker(1, Marker::MirrorEnd { device: 1 });
        assert!(state.is_publishable());
        assert_eq!(state.publish(), ["other"]);
    }

    #[test]
    fn settled_volumes_say_what_they_hold() {
        let moment = |state: &SetState, label: &str| state.volumes[label].consistent.map(|c| c.seq);
        let mut whole = mirrored();
        whole.release();
        assert_eq!(moment(&whole, "vol"), Some(1));
        assert!(!whole.in_sync("vol"));

        // A mirror of one: the other one is staged as well, and has its state of before.
        let mut state = mirrored();
        state.bind("other", 2, 64, None);
        state.on_marker(2, Marker::MirrorBegin { device: 2 });
        state.on_marker(2, Marker::MirrorEnd { device: 2 });
        state.on_marker(2, Marker::MirrorBegin { device: 2 });
        state.begin_stage(|_| true);
        state.on_record(2, &record(Op::Write, STATE_COMMITTED));
        let mut given_up = state.clone();
        state.release();
        assert_eq!(
            (moment(&state, "vol"), moment(&state, "other")),
            (Some(1), Some(1))
        );
        given_up.give_up_stage();
        given_up.stage = None;
        given_up.release();
        assert_eq!(moment(&given_up, "other"), None, "it is between two states");
    }

    #[test]
    fn a_consistent_state_that_was_given_up_is_not_missed_until_there_is_another() {
        let gap = record(Op::Gap, STATE_COMMITTED);
        let mut state = mirrored();
        state.give_up_stage();
        assert!(!state.in_place, "there is nothing to give up");
        state.on_record(2, &gap);
        state.give_up_stage();
        assert_eq!((state.in_place, &state.wanted), (true, &None));
        state.on_record(3, &gap);
        state.on_passed_by(1);
        assert_eq!(state.wanted, None);
        state.on_marker(4, Marker::OrderRestored);
        state.on_marker(4, Marker::MirrorBegin { device: 1 });
        state.on_marker(4, Marker::MirrorEnd { device: 1 });
        assert!(state.in_sync("vol") && !state.in_place);
        state.on_record(4, &gap);
        assert!(state.wanted.is_some());
    }

    #[test]
    fn a_new_stream_and_a_hole_need_a_mirror() {
        let mut state = mirrored();
        state.enter(&hello(2, 2, 1, 10), Admission::NewStream);
        assert!(!state.in_sync("vol"));
        assert_eq!(state.volumes["vol"].consistent.map(|c| c.seq), Some(1));
        assert!(
            state.reports(|_| 0).is_empty(),
            "device ids of the old stream mean nothing"
        );
        let mut state = mirrored();
        state.enter(&hello(1, 1, 8, 10), Admission::Hole { from: 2, to: 8 });
        assert_eq!(state.applied_seq, 7);
        assert_eq!(state.lost.map(|lost| (lost.from, lost.last)), Some((2, 7)));
        assert!(!state.in_sync("vol"));
    }
}
