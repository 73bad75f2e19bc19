// SPDX-License-Identifier: GPL-2.0-only

//! Applying records of an epoch at the same time. Which may be is up to `dtloop_core::parallel`.
//!
//! Writes into the page cache take as long as copying does, and threads would only be in each other's way. They are used where
//! a volume makes them wait: for rows of comparisons, which read, and when writes were slow lately.

use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dtloop_core::apply::{Action, action};
use dtloop_core::parallel::{Schedule, Span};
use dtloop_proto::{Op, RecordBody, RecordKind};

use super::{Applier, Batch, Item, Pause};

/// Most records of a row.
const ROW_MAX: usize = 256;

/// A record that takes longer than this, on average, is worth a thread.
const SLOW: Duration = Duration::from_micros(250);

/// What the threads of a row share.
struct Shared {
    schedule: Schedule,
    /// What comparisons found, by place in the row.
    found: HashMap<usize, [u8; 32]>,
    running: usize,
    failed: Option<Pause>,
}

fn lock(shared: &Mutex<Shared>) -> MutexGuard<'_, Shared> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The record at that place of a batch, with what it does.
fn record(batch: &Batch, index: usize) -> Option<(RecordBody, Action<'_>)> {
    match batch.items.get(index)? {
        Item::Record {
            kind,
            body,
            payload: (start, end),
            ..
        } => Some((*body, action(*kind, body, &batch.buffer[*start..*end]))),
        Item::Marker { .. } => None,
    }
}

impl Applier {
    /// Whether the records at the cursor are better applied by several threads.
    pub(super) fn is_worth_threads(&self, batch: &Batch) -> bool {
        if self.row.is_some() {
            return true;
        }
        if self.settings.threads < 2 || self.replaying {
            return false;
        }
        let is_hash = |index| {
            let item: Option<&Item> = batch.items.get(index);
            matches!(
                item,
                Some(Item::Record {
                    kind: RecordKind::Hash,
                    ..
                })
            )
        };
        let compares = is_hash(self.cursor) && is_hash(self.cursor + 1);
        (compares || self.slow) && self.row_length(batch) > 1
    }

    /// How many records from the cursor on can be a row.
    fn row_length(&self, batch: &Batch) -> usize {
        let plain = |index: &usize| {
            let record = record(batch, *index);
            record.is_some_and(|(body, action)| self.is_plain(&body, &action))
        };
        (self.cursor..self.cursor + ROW_MAX)
            .take_while(plain)
            .count()
    }

    /// Applies a row of records, or goes on with the one that was begun: what is finished of it stays so.
    pub(super) fn apply_row(&mut self, batch: &Batch) -> Result<(), Pause> {
        let (schedule, found) = match self.row.take() {
            Some(row) => row,
            None => (self.plan_row(batch), HashMap::new()),
        };
        let (length, began) = (schedule.len(), self.parts.clock.now());
        let shared = Mutex::new(Shared {
            schedule,
            found,
            running: 0,
            failed: None,
        });
        let (ended, threads) = (Condvar::new(), self.settings.threads.min(length));
        let this = &*self;
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // The row is finished by fewer if there can be no more.
                let _ = std::thread::Builder::new()
                    .spawn_scoped(scope, || this.work(batch, &shared, &ended));
            }
            this.work(batch, &shared, &ended);
        });
        let shared = shared.into_inner().unwrap_or_else(PoisonError::into_inner);
        if let Some(pause) = shared.failed {
            self.row = Some((shared.schedule, shared.found));
            return Err(pause);
        }
        let each =
            (self.parts.clock.now().saturating_sub(began)) / u32::try_from(length).unwrap_or(1);
        self.slow = each * u32::try_from(threads).unwrap_or(1) >= SLOW / 2;
        for index in 0..length {
            if let Some(Item::Record {
                seq,
                kind,
                body,
                payload: (start, end),
            }) = batch.items.get(self.cursor)
            {
                let payload = &batch.buffer[*start..*end];
                if let Some(found) = shared.found.get(&index) {
                    self.note_compared(*seq, body, payload, *found);
                }
                self.state.chain(*kind, body, payload);
                self.state.on_record(*seq, body);
            }
            self.cursor += 1;
        }
        Ok(())
    }

    fn plan_row(&self, batch: &Batch) -> Schedule {
        let mut schedule = Schedule::default();
        for index in self.cursor..self.cursor + self.row_length(batch) {
            let Some((body, action)) = record(batch, index) else {
                break;
            };
            let (start, end) = match action {
                Action::Write { offset, .. }
                | Action::Zero { offset, .. }
                | Action::Compare { offset, .. } => (offset, action.end()),
                Action::Nothing => (0, 0),
            };
            schedule.push(Span {
                epoch: body.epoch,
                device: body.device,
                start,
                end,
                reads: matches!(action, Action::Compare { .. }),
            });
        }
        schedule
    }

    /// What each thread does: records, until none is left or one fails.
    fn work(&self, batch: &Batch, shared: &Mutex<Shared>, ended: &Condvar) {
        let mut guard = lock(shared);
        loop {
            if guard.failed.is_some() || guard.schedule.is_over() {
                ended.notify_all();
                return;
            }
            let Some(index) = guard.schedule.begin_next() else {
                // Those that are running make room when they end; with none, everything is over.
                guard = ended.wait(guard).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            guard.running += 1;
            drop(guard);
            let done = self.carry_out(batch, self.cursor + index);
            guard = lock(shared);
            guard.running -= 1;
            guard.schedule.on_end(index, done.is_ok());
            match done {
                Ok(Some(found)) => drop(guard.found.insert(index, found)),
                Ok(None) => {}
                Err(pause) => guard.failed = Some(pause),
            }
            ended.notify_all();
        }
    }

    /// Gives the hash of what is compared.
    fn carry_out(&self, batch: &Batch, index: usize) -> Result<Option<[u8; 32]>, Pause> {
        let Some((body, action)) = record(batch, index) else {
            return Ok(None);
        };
        let Some(volume) = self.volumes.get(&body.device) else {
            return Ok(None);
        };
        let failed = |error| super::apply::volume_failed(volume.name(), &error);
        match action {
            Action::Write { offset, data } => volume.write(offset, data).map_err(failed)?,
            Action::Zero { offset, bytes } => volume.zero(offset, bytes).map_err(failed)?,
            Action::Compare { offset, bytes, .. } => {
                let mut data = vec![0; usize::try_from(bytes).unwrap_or(0)];
                self.read(body.device, offset, &mut data)?;
                return Ok(Some(*blake3::hash(&data).as_bytes()));
            }
            Action::Nothing => {}
        }
        Ok(None)
    }

    /// Takes note of how long the records of a batch took one after the other.
    pub(super) fn note_speed(&mut self, batch: &Batch, began: Duration) {
        let moves =
            |item: &&Item| matches!(item, Item::Record { body, .. } if body.op != Op::Flush);
        let records = batch.items.iter().filter(moves).count();
        let took = self.parts.clock.now().saturating_sub(began);
        if records > 1 && self.row.is_none() {
            self.slow = took / u32::try_from(records).unwrap_or(u32::MAX) >= SLOW;
        }
    }
}
