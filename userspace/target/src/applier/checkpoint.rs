// SPDX-License-Identifier: GPL-2.0-only

//! Checkpoints: volumes and overlays durable, then the state that says so, then the journal before it is free.

use std::time::Duration;

use dtloop_canary::Canary;
use dtloop_core::apply::action;
use dtloop_core::set::{Phase, SetState};
use dtloop_proto::Code;

use super::apply::{complaint, volume_failed};
use super::{Applier, Batch, Item, OpenError, Pause, Saved};
use dtloop_store::{self as state_file, StateFileError};

/// Longest time between a change of a volume and the checkpoint behind it.
const CHECKPOINT_AFTER: Duration = Duration::from_secs(5);

impl Applier {
    /// Whether a checkpoint should be made now. Not while a batch is applied in part.
    #[must_use]
    pub fn is_checkpoint_due(&self) -> bool {
        if self.is_within_batch() {
            return false;
        }
        let now = self.parts.clock.now();
        let late = |since| now.saturating_sub(since) >= CHECKPOINT_AFTER;
        self.dirty_since.is_some_and(late)
            || self.bytes_since >= self.settings.checkpoint_bytes
            || (self.dirty_since.is_some() && self.parts.horizon.is_wanted())
            || self.state.is_publishable()
            || self.is_drained()
    }

    /// Whether a batch is applied in part: only [`Applier::apply`] can go on then.
    #[must_use]
    pub fn is_within_batch(&self) -> bool {
        self.cursor > 0 || self.row.is_some()
    }

    /// Makes volumes and overlays durable, then the state, and frees the journal before it. Not within a batch.
    ///
    /// # Errors
    ///
    /// [`Pause`].
    pub fn checkpoint(&mut self) -> Result<(), Pause> {
        debug_assert!(!self.is_within_batch());
        self.watch_volumes();
        self.take_choice()?;
        self.write_again(None)?;
        let is_drained = self.is_drained();
        self.sync_all()?;
        let mut state = self.state.clone();
        self.note_identities(&mut state);
        let left = if is_drained {
            state.stage = None;
            vec![]
        } else if state.is_publishable() {
            state.publish()
        } else {
            vec![]
        };
        let checkpoint = self.applied;
        self.save(Saved {
            state: state.clone(),
            checkpoint,
            overlays: self.log_ends(),
        })?;
        let stage_changed = self.state.stage != state.stage;
        self.state = state;
        if stage_changed {
            self.on_stage_changed(&left);
        }
        self.parts.horizon.advance(self.applied);
        self.dirty_since = None;
        self.bytes_since = 0;
        let seq = self.state.applied_seq;
        self.parts.outlet.update(|ack| {
            ack.applied_seq = seq;
            ack.checkpoint_seq = seq;
            ack.journal_bytes = 0;
        });
        Ok(())
    }

    /// Replaces the state file.
    pub(super) fn save(&mut self, saved: Saved) -> Result<(), Pause> {
        match state_file::store_on(&*self.parts.disk, &self.dir.join("state"), &saved) {
            Ok(()) => {
                self.saved = saved;
                Ok(())
            }
            Err(StateFileError::Io { path, source }) => {
                let what = format!("State file {} cannot be written", path.display());
                Err(complaint(Code::JOURNAL_IO, &what, &source))
            }
            Err(error) => Err(Pause::Fatal(error.into())),
        }
    }

    /// Changes the state file in what concerns staging only; what it says of records stays as of the last checkpoint.
    ///
    /// That is right at any moment at which volumes and overlays are durable: all records behind that checkpoint
    /// are applied again after a crash, to wherever the new phase sends them, and leave the same bytes (see
    /// `dtloop_core::overlay`).
    pub(super) fn save_stage(&mut self, change: impl FnOnce(&mut SetState)) -> Result<(), Pause> {
        let mut saved = self.saved.clone();
        change(&mut saved.state);
        self.note_identities(&mut saved.state);
        saved.overlays = self.log_ends();
        self.save(saved)
    }

    /// Makes volumes and overlays durable: first the volumes, as a block that was folded into its volume may leave the
    /// overlay only then.
    pub(super) fn sync_all(&mut self) -> Result<(), Pause> {
        if dtloop_canary::bites(Canary::CheckpointBeforeSync) {
            return Ok(());
        }
        for volume in self.volumes.values() {
            if let Err(error) = volume.sync() {
                self.redo = true;
                return Err(volume_failed(volume.name(), &error));
            }
        }
        let mut overlays = self.overlays.values_mut();
        let failed = overlays.find_map(|overlay| overlay.sync().err());
        if let Some(error) = failed {
            self.redo = true;
            return Err(self.staging_failed(&error));
        }
        Ok(())
    }

    /// Writes all records since the checkpoint again, if something could not be made durable.
    ///
    /// A page that could not be written is reported by one fdatasync and counts as clean from then on: the next one
    /// succeeds, and the page is lost when it leaves the cache. So a failed fdatasync takes back everything since
    /// the last one that succeeded, and the journal has all of it: it is freed only behind a checkpoint. The volume goes
    /// through the states it had since then once more, as in the replay after a crash. An overlay goes back to the
    /// map that is durable first, so that blocks are copied up, or folded, once more.
    pub(super) fn write_again(&mut self, current: Option<&Batch>) -> Result<(), Pause> {
        if !self.redo {
            return Ok(());
        }
        self.overlays
            .values_mut()
            .for_each(crate::overlay::Overlay::reset);
        self.row = None;
        let (mut at, mut reader) = (self.saved.checkpoint, self.reader());
        let fatal = |error| Pause::Fatal(OpenError::Journal(error));
        let failed = |error| complaint(Code::JOURNAL_IO, "The journal cannot be read", &error);
        while at < self.applied {
            let gone = || {
                let text = "what was applied since the checkpoint is not in it";
                fatal(std::io::Error::other(text))
            };
            let read = reader.next_batch().map_err(failed)?.ok_or_else(gone)?;
            at = read.end;
            let first_seq = read.header.first_seq;
            let batch = Batch::parse(read, first_seq).ok_or_else(gone)?;
            self.change_again(&batch, batch.items.len())?;
        }
        if let Some(batch) = current {
            self.change_again(batch, self.cursor)?;
        }
        self.redo = false;
        Ok(())
    }

    fn change_again(&mut self, batch: &Batch, items: usize) -> Result<(), Pause> {
        for item in &batch.items[..items] {
            if let Item::Record {
                kind,
                body,
                payload: (start, end),
                ..
            } = item
            {
                let action = action(*kind, body, &batch.buffer[*start..*end]);
                // What passed the volume by then does so now.
                if self.fits(body.device, &action) {
                    self.change_volume(body.device, &action)?;
                }
            }
        }
        Ok(())
    }

    /// Whether what was staged is published, and all of it is in the volumes.
    pub(super) fn is_drained(&self) -> bool {
        let publishing =
            matches!(&self.state.stage, Some(stage) if stage.phase == Phase::Publishing);
        let mut overlays = self.overlays.values();
        publishing && overlays.all(crate::overlay::Overlay::is_empty)
    }
}
