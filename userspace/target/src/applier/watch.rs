// SPDX-License-Identifier: GPL-2.0-only

//! What the applier does so that nobody else writes to its volumes unnoticed, and how it proves what it applied.
//!
//! # When a volume is not as it was left
//!
//! What a volume is known by is taken whenever the state file is written, with the volume durable, and compared before
//! anything is written to it by another process. What may differ without anybody else's doing:
//!
//! - *Records behind the checkpoint.* They may have been applied before a crash, and the journal has all of them. The
//!   ranges that they change do not count, wherever they go: into the volume or into its overlay.
//! - *A drain.* What is published moves from the overlay into the volume at any time, and no record tells of it. While
//!   the set is being published only its size and what names it count.
//! - *A stage that begins.* Nothing writes to the volume from there on. It is taken anew with the write that begins
//!   the stage, as a drain may have come before it.
//!
//! A volume that was not there when its journal was replayed may hold any of the records that passed it by then, so what is
//! known of their ranges is forgotten.

use std::collections::HashMap;

use dtloop_core::apply::{Action, action};
use dtloop_core::binding::Refusal;
use dtloop_core::chain::{self, Link};
use dtloop_core::identity::{Everything, NothingPending, Pending, Ranges};
use dtloop_core::set::{Admission, Phase, SetState};
use dtloop_proto::message::{Hello, Proof};
use dtloop_proto::{Code, Message};

use super::{Applier, Batch, Item};
use crate::volume::Volume;

/// In the directory of a set: an operator decided that the next source is followed, whatever its past.
pub const ACCEPT_FILE: &str = "accept";

/// The ranges that a journal changes, by device.
pub(super) type Survey = HashMap<u32, Vec<(u64, u64)>>;

impl Applier {
    /// Whether a volume that was opened is the one that was left, as it was left. `survey`: what the journal may have
    /// changed since, looked at only if it matters.
    pub(super) fn examine(
        &self,
        label: &str,
        volume: &mut Volume,
        survey: impl FnOnce() -> Vec<(u64, u64)>,
    ) -> Result<(), Refusal> {
        let state = self.state.volumes.get(label);
        let known = state.and_then(|volume| volume.identity.as_ref());
        if self.state.phase_of(label) == Some(Phase::Publishing) {
            return volume.examine(known, &Everything);
        }
        if volume.examine(known, &NothingPending).is_ok() {
            return Ok(());
        }
        let ranges = survey();
        volume.examine(known, &Ranges(&ranges) as &dyn Pending)
    }

    /// The ranges that the journal changes behind the checkpoint.
    pub(super) fn survey(&self) -> Survey {
        let mut ranges = Survey::new();
        let mut reader = self.reader();
        let mut next_seq = self.saved.state.applied_seq + 1;
        // A journal that cannot be read ends the replay as well, with the reason.
        while let Ok(Some(read)) = reader.next_batch() {
            let (first_seq, behind) = (read.header.first_seq, read.header.next_seq);
            let Some(batch) = Some(read)
                .filter(|_| first_seq == next_seq)
                .and_then(|read| Batch::parse(read, first_seq))
            else {
                break;
            };
            next_seq = behind;
            for item in &batch.items {
                if let Item::Record {
                    kind,
                    body,
                    payload: (start, end),
                    ..
                } = item
                {
                    let action = action(*kind, body, &batch.buffer[*start..*end]);
                    if let Some(range) = changed(&action) {
                        ranges.entry(body.device).or_default().push(range);
                    }
                }
            }
        }
        ranges
    }

    /// A record passed a volume by that is not there. In a replay it may have been applied before.
    pub(super) fn pass_by(&mut self, device: u32, action: &Action<'_>) {
        if self.replaying {
            if let Some((start, end)) = changed(action) {
                self.state.forget_content(device, start, end);
            }
        }
        self.state.on_passed_by(device);
    }

    /// Records of the device pass the volume by until it is bound again.
    pub(super) fn refuse(&mut self, label: &str, device: u32, refusal: &Refusal) {
        let sectors = self.state.volumes.get(label).map(|volume| volume.sectors);
        self.state
            .bind(label, device, sectors.unwrap_or(0), Some(refusal));
    }

    /// Looks whether somebody else writes to the volumes, between what this program writes.
    pub fn watch_volumes(&mut self) {
        let disturbed = self.volumes.values_mut().filter_map(|volume| {
            let is_disturbed = volume.is_disturbed();
            is_disturbed.then(|| volume.name().to_owned())
        });
        let disturbed: Vec<String> = disturbed.collect();
        for label in disturbed {
            self.on_disturbed(&label);
        }
    }

    fn on_disturbed(&mut self, label: &str) {
        let staged = self.state.phase_of(label) == Some(Phase::Staged);
        let also = if staged {
            ", and so may the last consistent state that it keeps"
        } else {
            ""
        };
        let text = format!(
            "Volume \"{label}\" of set \"{}\" was written to by something else than the target; the copy may differ{also}. Find \
             who does it, then run dtloop verify --repair on the source",
            self.state.set
        );
        let volume = self.state.volumes.get(label);
        if volume.is_some_and(|volume| volume.alarm.is_none()) {
            tracing::error!("{text}.");
        }
        let (now, unix_ms) = (self.parts.clock.now(), self.parts.clock.unix_ms());
        self.state
            .raise_alarm(label, Code::VOLUME_CHANGED, unix_ms, text);
        self.dirty_since.get_or_insert(now);
        self.tell_alarms();
    }

    /// Tells the source what it has not answered yet.
    pub fn tell_alarms(&self) {
        for alarm in self.state.alarms() {
            self.parts.outlet.send(&Message::Alarm(alarm));
        }
    }

    /// This program stops writing for now.
    pub(super) fn settle_volumes(&mut self) {
        self.volumes.values_mut().for_each(Volume::settle);
    }

    /// Takes note of what the volumes are known by from here on, and of what was noticed about them, in the state that
    /// is about to be written.
    pub(super) fn note_identities(&mut self, state: &mut SetState) {
        for volume in self.volumes.values_mut() {
            let now = self.state.volumes.get(volume.name());
            if let (Some(saved), Some(now)) = (state.volumes.get_mut(volume.name()), now) {
                saved.identity = Some(volume.identity());
                saved.alarm.clone_from(&now.alarm);
                saved.alarms = now.alarms;
            }
        }
    }

    /// Admits the source, or follows what an operator decided with `dttarget accept`.
    pub(super) fn admit(&mut self, hello: &Hello, durable_seq: u64) -> Result<Admission, Refusal> {
        let refusal = match self.state.admit(hello, durable_seq) {
            Ok(admission) => return Ok(admission),
            Err(refusal) => refusal,
        };
        let can_decide = [Code::OLDER_GENERATION, Code::UNRELATED].contains(&refusal.code);
        let decision = self.dir.join(ACCEPT_FILE);
        if !can_decide || self.parts.disk.remove(&decision).is_err() {
            return Err(refusal);
        }
        tracing::warn!(
            "Set \"{}\": followed as an operator decided, although: {refusal}.",
            self.state.set
        );
        self.state.accept(hello, durable_seq)
    }

    /// Says what the chain is where the source asks; what was asked before a crash is asked again.
    pub(super) fn prove(&mut self, position: u64, source: Link) {
        let Some(chain) = self.state.chain.filter(|chain| chain.seq + 1 == position) else {
            return;
        };
        if self.replaying {
            return;
        }
        if chain.link != source {
            tracing::error!(
                "Set \"{}\": up to record {} something else was applied than the source sent: the hash chain is {} here \
                 and {} there; its volumes must be verified.",
                self.state.set,
                chain.seq,
                chain::text(&chain.link),
                chain::text(&source)
            );
        }
        self.parts.outlet.send(&Message::Proof(Proof {
            seq: chain.seq,
            source,
            target: chain.link,
        }));
    }
}

/// The range that an action changes.
fn changed(action: &Action<'_>) -> Option<(u64, u64)> {
    match *action {
        Action::Write { offset, .. } | Action::Zero { offset, .. } => Some((offset, action.end())),
        Action::Compare { .. } | Action::Nothing => None,
    }
}
