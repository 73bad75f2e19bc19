// SPDX-License-Identifier: GPL-2.0-only

//! The stage of a set: when it begins, what it may take, how it ends. See the documentation above.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use dtloop_core::set::{Consistent, Phase, SetState};
use dtloop_proto::message::{Staging, StagingPhase};
use dtloop_proto::{Code, Message};

use super::apply::complaint;
use super::{Applier, Batch, Complaint, OpenError, Pause, Saved};
use crate::config::ResyncPolicy;
use crate::overlay::{self, Overlay};
use crate::volume::Volume;

/// How often the source is told how much is staged.
const TELL_EVERY: Duration = Duration::from_secs(2);

impl Applier {
    /// Opens the overlays of the stage under way, and removes what is left of others.
    pub(super) fn open_overlays(&mut self) -> Result<(), OpenError> {
        let dir = self.space.dir.clone();
        let failed = |source| OpenError::Staging {
            dir: dir.clone(),
            source,
        };
        let stage = self.state.stage.clone();
        let (labels, number): (Vec<&str>, u64) = stage.as_ref().map_or((vec![], 0), |stage| {
            (
                stage.labels.iter().map(String::as_str).collect(),
                stage.number,
            )
        });
        let disk = self.disk();
        if let Err(error) = overlay::clean(&*disk, &dir, &labels, number) {
            tracing::warn!(
                "What is left in {} cannot be removed: {error}.",
                dir.display()
            );
        }
        for label in labels {
            let last = self.saved.overlays.get(label).copied().unwrap_or(0);
            let opened = Overlay::open(self.disk(), &dir, label, number, last);
            let overlay = opened.map_err(failed)?;
            self.overlays.insert(label.to_owned(), overlay);
        }
        Ok(())
    }

    pub(super) fn log_ends(&self) -> BTreeMap<String, u64> {
        let overlays = self.overlays.iter();
        overlays
            .map(|(label, overlay)| (label.clone(), overlay.last()))
            .collect()
    }

    /// Bytes that are staged.
    #[must_use]
    pub fn staged_bytes(&self) -> u64 {
        self.overlays.values().map(Overlay::staged_bytes).sum()
    }

    pub(super) fn staging_failed(&self, error: &io::Error) -> Pause {
        let what = format!(
            "The changes of set \"{}\" cannot be staged in {}",
            self.state.set,
            self.space.dir.display()
        );
        match complaint(Code::STAGING, &what, error) {
            Pause::Blocked(Complaint { code, text }) => {
                let text = format!("{text}; {}", self.way_out());
                Pause::Blocked(Complaint { code, text })
            }
            other => other,
        }
    }

    fn way_out(&self) -> String {
        format!(
            "make room there, or give up the last consistent state for this once by \"dtloop resync --in-place --set {}\" on the \
             source",
            self.state.set
        )
    }

    /// Begins the stage that is wanted, before anything more is applied.
    pub(super) fn begin_wanted_stage(&mut self, batch: Option<&Batch>) -> Result<(), Pause> {
        if self.state.wanted.is_none() {
            return Ok(());
        }
        self.write_again(batch)?;
        // What was published before must all be in the volumes: they are to keep it.
        if self.drain()? {
            return Err(Pause::Again);
        }
        if !self.is_drained() && self.state.stage.is_some() {
            return Err(Pause::Blocked(Complaint {
                code: Code::VOLUME_NOT_FOUND,
                text: format!(
                    "Set \"{}\" has changes for a volume that is not there; make it available and restart dttarget, or {}",
                    self.state.set,
                    self.way_out()
                ),
            }));
        }
        self.sync_all()?;
        let mut state = self.state.clone();
        state.stage = None;
        let catalog = &self.parts.catalog;
        state.begin_stage(|label| {
            let config = catalog.config(label);
            config.is_none_or(|config| config.resync == ResyncPolicy::Staged)
        });
        let overlays = self.make_overlays(state.stage.as_ref())?;
        let former = std::mem::replace(&mut self.overlays, overlays);
        let (stage, stages) = (state.stage.clone(), state.stages);
        let saved = self.save_stage(|saved| {
            saved.stage = stage;
            saved.stages = stages;
            saved.wanted = None;
        });
        if let Err(pause) = saved {
            self.overlays = former;
            return Err(pause);
        }
        self.state = state;
        self.on_stage_changed(&[]);
        Ok(())
    }

    fn make_overlays(
        &mut self,
        stage: Option<&dtloop_core::set::Stage>,
    ) -> Result<BTreeMap<String, Overlay>, Pause> {
        let Some(stage) = stage else {
            return Ok(BTreeMap::new());
        };
        let (disk, dir) = (self.disk(), self.space.dir.clone());
        let make = |label: &String| {
            let overlay = Overlay::create(self.disk(), &dir, label, stage.number)?;
            Ok((label.clone(), overlay))
        };
        let made = disk
            .make_dir(&dir)
            .and_then(|()| stage.labels.iter().map(make).collect());
        made.map_err(|error| self.staging_failed(&error))
    }

    /// Says what the stage is now, and removes the files of overlays that are over.
    pub(super) fn on_stage_changed(&mut self, left: &[String]) {
        for label in left {
            self.overlays.remove(label);
            tracing::warn!(
                "Volume \"{label}\" keeps its last consistent state: its device is not in set \"{}\" any more.",
                self.state.set
            );
        }
        let set = &self.state.set;
        let mut number = 0;
        match &self.state.stage {
            None => {
                self.overlays.clear();
                self.plans.clear();
                tracing::info!("Set \"{set}\": what was staged is in the volumes.");
            }
            Some(stage) => {
                number = stage.number;
                let staged = self.overlays.values().map(Overlay::staged_bytes);
                let bytes: u64 = staged.sum();
                match stage.phase {
                    Phase::Staged => tracing::info!(
                        "Set \"{set}\": the volumes keep their state of record {}, changes are staged in {}.",
                        stage.since.seq,
                        self.space.dir.display()
                    ),
                    Phase::Publishing => tracing::info!(
                        "Set \"{set}\": record {} is published, {bytes} bytes are being written into the volumes.",
                        self.state.applied_seq
                    ),
                }
            }
        }
        let labels: Vec<&str> = self.overlays.keys().map(String::as_str).collect();
        let removed = overlay::clean(&*self.parts.disk, &self.space.dir, &labels, number);
        if let Err(error) = removed {
            // They are removed at the next start, and never taken for anything.
            tracing::warn!("What was staged cannot be removed: {error}.");
        }
        self.tell_staging();
    }

    /// Where changes go, as it is told to the source.
    #[must_use]
    pub fn staging_phase(&self) -> StagingPhase {
        match self.state.stage.as_ref().map(|stage| stage.phase) {
            None => StagingPhase::Direct,
            Some(Phase::Staged) => StagingPhase::Staged,
            Some(Phase::Publishing) => StagingPhase::Publishing,
        }
    }

    /// Tells the source where changes go.
    pub fn tell_staging(&mut self) {
        self.told_staging = self.parts.clock.now();
        let mut told = Staging {
            phase: self.staging_phase(),
            staged_bytes: self.staged_bytes(),
            ..Staging::default()
        };
        if let Some(stage) = &self.state.stage {
            if stage.phase == Phase::Staged {
                told.consistent_seq = stage.since.seq;
                told.consistent_time_ns = stage.since.time_ns;
            }
        }
        self.parts.outlet.send(&Message::Staging(told));
    }

    /// The same now and then, while it changes.
    pub(super) fn tell_staging_if_due(&mut self) {
        let elapsed = self.parts.clock.now().saturating_sub(self.told_staging);
        if self.state.stage.is_some() && elapsed >= TELL_EVERY {
            self.tell_staging();
        }
    }

    /// Waits unless there is space for what the source announced.
    pub(super) fn check_plan(&self) -> Result<(), Pause> {
        if self.replaying {
            return Ok(());
        }
        let staged = |device: &u32| {
            let label = self.state.label_of(*device);
            label.and_then(|label| self.state.phase_of(label)) == Some(Phase::Staged)
        };
        let plans = self.plans.iter().filter(|(device, _)| staged(device));
        let (least, most) = plans.fold((0_u64, 0_u64), |(least, most), (_, plan)| {
            (least.saturating_add(plan.0), most.saturating_add(plan.1))
        });
        if most == 0 {
            return Ok(());
        }
        let used = self.staged_bytes();
        let available = self.space.available(used);
        let available = available.map_err(|error| self.staging_failed(&error))?;
        let (set, dir) = (&self.state.set, self.space.dir.display());
        if available < least {
            let text = format!(
                "To keep the last consistent state of set \"{set}\" until it is complete again, up to {least} bytes have to be staged \
                 in {dir}, where {available} may be; {}",
                self.way_out()
            );
            let code = Code::STAGING;
            return Err(Pause::Blocked(Complaint { code, text }));
        }
        tracing::info!(
            "Set \"{set}\": {least} to {most} bytes will be staged in {dir}, {available} may be."
        );
        if available < most {
            tracing::warn!(
                "Set \"{set}\": if it is more than {available} bytes, staging has to wait for room."
            );
        }
        Ok(())
    }

    /// Takes up that an operator gave up the last consistent state, if there is one to be given up.
    pub(super) fn take_choice(&mut self) -> Result<(), Pause> {
        if !self.parts.flags.in_place.load(Ordering::Relaxed) {
            return Ok(());
        }
        let mut state = self.state.clone();
        state.give_up_stage();
        if state == self.state {
            self.parts.flags.in_place.store(false, Ordering::Relaxed);
            return Ok(());
        }
        tracing::warn!(
            "Set \"{}\": the last consistent state is given up, as an operator asked for it.",
            self.state.set
        );
        if let Err(error) = self.sync_overlays() {
            self.abandon_overlays(&mut state, &error);
        }
        let (stage, volumes) = (state.stage.clone(), state.volumes.clone());
        let abandoned = state.stage.is_none() && self.state.stage.is_some();
        let former = if abandoned {
            std::mem::take(&mut self.overlays)
        } else {
            BTreeMap::new()
        };
        let saved = self.save_stage(|saved| {
            saved.in_place = true;
            saved.wanted = None;
            saved.stage = stage;
            if abandoned {
                saved.volumes = volumes;
            }
        });
        if let Err(pause) = saved {
            self.overlays.extend(former);
            return Err(pause);
        }
        self.parts.flags.in_place.store(false, Ordering::Relaxed);
        self.state = state;
        self.on_stage_changed(&[]);
        if abandoned {
            self.report_volumes();
        }
        Ok(())
    }

    fn sync_overlays(&mut self) -> io::Result<()> {
        self.overlays.values_mut().try_for_each(Overlay::sync)
    }

    /// The staging area cannot be written at all: the volumes go on without what is in it, and are compared.
    fn abandon_overlays(&self, state: &mut SetState, error: &io::Error) {
        tracing::error!(
            "Set \"{}\": what was staged is lost ({error}); the volumes have to be mirrored by difference.",
            state.set
        );
        state.abandon_stage();
    }

    /// Writes some of what is published into the volumes. False: there is nothing that could be.
    ///
    /// # Errors
    ///
    /// [`Pause`].
    pub fn drain(&mut self) -> Result<bool, Pause> {
        let publishing =
            matches!(&self.state.stage, Some(stage) if stage.phase == Phase::Publishing);
        if !publishing || self.redo {
            return Ok(false);
        }
        self.watch_volumes();
        let drained = self.drain_some();
        self.settle_volumes();
        drained
    }

    fn drain_some(&mut self) -> Result<bool, Pause> {
        let mut failed = None;
        for (label, overlay) in &mut self.overlays {
            let named = |volume: &&Volume| volume.name() == label;
            let Some(volume) = self.volumes.values().find(named) else {
                continue;
            };
            match overlay.drain(volume) {
                Ok(false) => {}
                Ok(true) => {
                    let now = self.parts.clock.now();
                    self.dirty_since.get_or_insert(now);
                    return Ok(true);
                }
                Err(failure) => failed = Some((label.clone(), failure)),
            }
        }
        match failed {
            Some((label, failure)) => Err(self.overlay_failed(&label, &failure)),
            None => Ok(false),
        }
    }

    /// Settles the set: all of what is published is written into the volumes, and what is only staged is left out. The volumes
    /// then hold the last consistent state that there is, and belong to whoever uses them here. Gives the moment of the
    /// state of each volume; none: it never was consistent.
    ///
    /// # Errors
    ///
    /// [`Pause`].
    pub fn settle(&mut self) -> Result<BTreeMap<String, Option<Consistent>>, Pause> {
        self.checkpoint()?;
        while self.drain()? {}
        self.checkpoint()?;
        if self
            .state
            .stage
            .as_ref()
            .is_some_and(|stage| stage.phase == Phase::Publishing)
        {
            let code = Code::VOLUME_NOT_FOUND;
            let text = format!("A volume of set \"{}\" is not there", self.state.set);
            return Err(Pause::Blocked(Complaint { code, text }));
        }
        let mut state = self.state.clone();
        state.release();
        let moments = moments_of(&state);
        self.save(Saved {
            state: state.clone(),
            checkpoint: self.applied,
            overlays: BTreeMap::new(),
        })?;
        self.state = state;
        self.overlays.clear();
        // What cannot be removed is removed later, and never taken for anything.
        let _ = overlay::clean(&*self.parts.disk, &self.space.dir, &[], 0);
        Ok(moments)
    }
}

/// What each volume of a set that is released holds.
#[must_use]
pub fn moments_of(state: &SetState) -> BTreeMap<String, Option<Consistent>> {
    let volumes = state.volumes.iter();
    volumes
        .map(|(label, volume)| (label.clone(), volume.consistent))
        .collect()
}
