// SPDX-License-Identifier: GPL-2.0-only

//! Applying batches, and replaying the journal.

use dtloop_canary::Canary;
use dtloop_core::apply::{Action, action};
use dtloop_core::set::Phase;
use dtloop_proto::message::{Marker, Mismatch, Verified};
use dtloop_proto::{Code, Message, Op, RecordBody, RecordKind};

use super::{Applier, Batch, Complaint, Item, Pause};
use crate::overlay::Failure;

/// The complaint about a volume or a staging area that fails.
pub(super) fn complaint(code: Code, what: &str, error: &std::io::Error) -> Pause {
    let text = format!("{what}: {error}; it is tried again every second, nothing is lost");
    Pause::Blocked(Complaint { code, text })
}

pub(super) fn volume_failed(name: &str, error: &std::io::Error) -> Pause {
    use std::io::ErrorKind;
    let code = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Code::VOLUME_FULL,
        _ => Code::VOLUME_IO,
    };
    complaint(code, &format!("Volume \"{name}\" cannot be used"), error)
}

impl Applier {
    /// Opens the volumes that the set had, replays the journal and makes the result durable. It may be called again
    /// until it is finished.
    ///
    /// # Errors
    ///
    /// [`Pause`].
    pub fn replay(&mut self) -> Result<(), Pause> {
        self.harden_journal()?;
        self.open_volumes();
        self.replaying = true;
        let from = self.state.applied_seq;
        let replayed = self.replay_all();
        self.replaying = false;
        replayed?;
        if self.state.applied_seq > from {
            tracing::info!(
                "Set \"{}\": records {} to {} of the journal were applied again.",
                self.state.set,
                from + 1,
                self.state.applied_seq
            );
        }
        self.checkpoint()
    }

    /// What is replayed must not be gone after a power cut while its effects on the volumes are not.
    fn harden_journal(&mut self) -> Result<(), Pause> {
        if self.hardened || dtloop_canary::bites(Canary::ReplayedUnsynced) {
            return Ok(());
        }
        let failed = |error| {
            complaint(
                Code::JOURNAL_IO,
                "The journal cannot be made durable",
                &error,
            )
        };
        self.reader_from(self.applied).harden().map_err(failed)?;
        self.hardened = true;
        Ok(())
    }

    fn replay_all(&mut self) -> Result<(), Pause> {
        let mut reader = self.reader_from(self.applied);
        let failed = |error| complaint(Code::JOURNAL_IO, "The journal cannot be read", &error);
        while let Some(read) = reader.next_batch().map_err(failed)? {
            let first_seq = self.state.applied_seq + 1;
            // A batch that is tried again has been applied in part.
            let begun = self.cursor > 0 || self.row.is_some();
            if read.header.first_seq != first_seq && !begun {
                break;
            }
            let first_seq = read.header.first_seq;
            let Some(batch) = Batch::parse(read, first_seq) else {
                tracing::warn!(
                    "The journal of set \"{}\" ends in a torn batch behind record {}; nothing in it was \
                     acknowledged.",
                    self.state.set,
                    self.state.applied_seq
                );
                break;
            };
            loop {
                match self.apply(&batch) {
                    Ok(()) => break,
                    Err(Pause::Again) => {}
                    Err(pause) => return Err(pause),
                }
            }
        }
        Ok(())
    }

    /// Applies a batch, or goes on with the one that was begun.
    ///
    /// # Errors
    ///
    /// [`Pause`]: to be called again with the same batch.
    pub fn apply(&mut self, batch: &Batch) -> Result<(), Pause> {
        self.watch_volumes();
        let applied = self.apply_items(batch);
        self.settle_volumes();
        applied
    }

    fn apply_items(&mut self, batch: &Batch) -> Result<(), Pause> {
        self.take_choice()?;
        self.write_again(Some(batch))?;
        loop {
            self.begin_wanted_stage(Some(batch))?;
            let Some(item) = batch.items.get(self.cursor) else {
                break;
            };
            match *item {
                Item::Record { .. } if self.is_worth_threads(batch) => self.apply_row(batch)?,
                Item::Record {
                    seq,
                    kind,
                    body,
                    payload: (start, end),
                } => {
                    let payload = &batch.buffer[start..end];
                    self.apply_record(seq, kind, &body, payload)?;
                    self.state.chain(kind, &body, payload);
                    self.state.on_record(seq, &body);
                    self.cursor += 1;
                }
                Item::Marker {
                    position,
                    marker: Marker::Prove { link },
                } => {
                    self.prove(position, link);
                    self.cursor += 1;
                }
                Item::Marker { position, marker } => {
                    self.apply_marker(position, marker)?;
                    self.cursor += 1;
                }
            }
        }
        self.end_batch(batch);
        Ok(())
    }

    fn end_batch(&mut self, batch: &Batch) {
        self.cursor = 0;
        self.applied = batch.end;
        self.bytes_since += batch.bytes;
        let now = self.parts.clock.now();
        self.dirty_since.get_or_insert(now);
        let (seq, journal_bytes) = (self.state.applied_seq, self.bytes_since);
        self.parts.outlet.update(|ack| {
            ack.applied_seq = seq;
            ack.journal_bytes = journal_bytes;
        });
        self.report_compared();
    }

    fn apply_marker(&mut self, position: u64, marker: Marker) -> Result<(), Pause> {
        if let Marker::Plan {
            device,
            least_bytes,
            most_bytes,
        } = marker
        {
            self.plans.insert(device, (least_bytes, most_bytes));
            self.check_plan()?;
        }
        if let Marker::MirrorEnd { device } = marker {
            self.plans.remove(&device);
        }
        self.state.on_marker(position, marker);
        tracing::info!(
            "Set \"{}\", position {position}: {marker:?}.",
            self.state.set
        );
        Ok(())
    }

    fn apply_record(
        &mut self,
        seq: u64,
        kind: RecordKind,
        body: &RecordBody,
        payload: &[u8],
    ) -> Result<(), Pause> {
        let action = action(kind, body, payload);
        if action == Action::Nothing {
            return Ok(());
        }
        if !self.fits(body.device, &action) {
            if kind == RecordKind::Hash {
                self.note_compared(seq, body, payload, [0; 32]);
            }
            self.pass_by(body.device, &action);
            return Ok(());
        }
        match action {
            Action::Write { .. } | Action::Zero { .. } => self.change_volume(body.device, &action),
            // After a crash the volume may be ahead of this position: the source asks again.
            Action::Compare { .. } if self.replaying => Ok(()),
            Action::Compare {
                offset,
                bytes,
                hash,
            } => {
                let mut scratch = std::mem::take(&mut self.scratch);
                scratch.resize(usize::try_from(bytes).unwrap_or(0), 0);
                let read = self.read(body.device, offset, &mut scratch);
                let found = read.map(|()| *blake3::hash(&scratch).as_bytes());
                self.scratch = scratch;
                self.note_compared(seq, body, hash, found?);
                Ok(())
            }
            Action::Nothing => Ok(()),
        }
    }

    /// Whether the device has a volume that is large enough.
    pub(super) fn fits(&self, device: u32, action: &Action<'_>) -> bool {
        let volume = self.volumes.get(&device);
        volume.is_some_and(|volume| action.end() <= volume.bytes())
    }

    /// Reads what the target holds of a device.
    pub(super) fn read(&self, device: u32, offset: u64, data: &mut [u8]) -> Result<(), Pause> {
        let Some(volume) = self.volumes.get(&device) else {
            return Ok(());
        };
        let name = volume.name();
        match self.overlays.get(name) {
            Some(overlay) => overlay
                .read(volume, offset, data)
                .map_err(|failure| self.overlay_failed(name, &failure)),
            None => volume
                .read(offset, data)
                .map_err(|error| volume_failed(name, &error)),
        }
    }

    /// What a record does to the content of its volume.
    pub(super) fn change_volume(&mut self, device: u32, action: &Action<'_>) -> Result<(), Pause> {
        let Some(volume) = self.volumes.get(&device) else {
            return Ok(());
        };
        let (offset, bytes) = match *action {
            Action::Write { offset, data } => (offset, data.len() as u64),
            Action::Zero { offset, bytes } => (offset, bytes),
            Action::Compare { .. } | Action::Nothing => return Ok(()),
        };
        let used = self.staged_bytes();
        let (name, space) = (volume.name(), &mut self.space);
        let overlay = self.overlays.get_mut(name);
        let mut phase = self.state.phase_of(name);
        if self.replaying && dtloop_canary::bites(Canary::StagedReplayedInPlace) {
            phase = None;
        }
        let write = || match *action {
            Action::Write { data, .. } => volume.write(offset, data),
            _ => volume.zero(offset, bytes),
        };
        let done = match (overlay, phase) {
            (Some(overlay), Some(Phase::Staged)) => match *action {
                Action::Write { data, .. } => overlay.stage(volume, offset, data, used, space),
                _ => overlay.stage_zeroes(volume, offset, bytes, used, space),
            },
            (Some(overlay), Some(Phase::Publishing)) => overlay
                .fold_edges(volume, offset, bytes)
                .and_then(|()| write().map_err(Failure::Volume))
                .map(|()| overlay.pass_on(offset, bytes)),
            _ => write().map_err(Failure::Volume),
        };
        let name = name.to_owned();
        done.map_err(|failure| self.overlay_failed(&name, &failure))
    }

    pub(super) fn overlay_failed(&self, name: &str, failure: &Failure) -> Pause {
        match failure {
            Failure::Volume(error) => volume_failed(name, error),
            Failure::Staging(error) => self.staging_failed(error),
        }
    }

    /// A range was compared: what the source has, and what is here; zero if that cannot be said.
    pub(super) fn note_compared(
        &mut self,
        seq: u64,
        body: &RecordBody,
        source: &[u8],
        hash: [u8; 32],
    ) {
        self.compared = Some(seq);
        let (device, start_sector, sectors) = (body.device, body.start_sector, body.sectors);
        let found = Mismatch {
            seq,
            device,
            start_sector,
            sectors,
            hash,
        };
        let label = self.state.label_of(device).unwrap_or_default();
        let unix_ms = self.parts.clock.unix_ms();
        self.findings.on_compared(unix_ms, label, &found, source);
        if source != hash {
            self.mismatches.push(found);
        }
    }

    fn report_compared(&mut self) {
        self.findings.write(&self.state.set);
        let Some(last) = self.compared.take() else {
            return;
        };
        let mut mismatches = std::mem::take(&mut self.mismatches);
        while !mismatches.is_empty() {
            let rest = mismatches.split_off(mismatches.len().min(dtloop_proto::limits::RANGES_MAX));
            let through_seq = if rest.is_empty() {
                last
            } else {
                mismatches.last().map_or(last, |m| m.seq)
            };
            self.parts.outlet.send(&Message::Verified(Verified {
                through_seq,
                mismatches,
            }));
            mismatches = rest;
        }
        self.parts.outlet.send(&Message::Verified(Verified {
            through_seq: last,
            mismatches: vec![],
        }));
    }

    /// Whether the record can be applied beside others: it changes or reads one volume that it fits, and says nothing of
    /// the set. What goes through an overlay changes its map, so only reads do there.
    pub(super) fn is_plain(&self, body: &RecordBody, action: &Action<'_>) -> bool {
        if body.loses_order() || body.op == Op::Resize {
            return false;
        }
        let writes = matches!(action, Action::Write { .. } | Action::Zero { .. });
        let Some(volume) = self.volumes.get(&body.device) else {
            return *action == Action::Nothing;
        };
        let overlaid = self.overlays.contains_key(volume.name());
        action.end() <= volume.bytes() && !(writes && overlaid)
    }
}
