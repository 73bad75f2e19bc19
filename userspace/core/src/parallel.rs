// SPDX-License-Identifier: GPL-2.0-only

//! Which records may be applied at the same time.
//!
//! A record may begin when every record before it that is not finished is of its own epoch and does not overlap it,
//! unless both only read. So at any moment the volumes hold all epochs before the oldest unfinished one, a part of that one, and
//! nothing of those behind it. Of overlapping records the later one is applied later. That is what a
//! crash of the source just before the end of that epoch could have left (`kmod/DESIGN.md`, "Epochs").

/// What a record touches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Epoch.
    pub epoch: u64,
    /// Device.
    pub device: u32,
    /// First byte.
    pub start: u64,
    /// The byte behind the last one.
    pub end: u64,
    /// It changes nothing.
    pub reads: bool,
}

impl Span {
    fn must_wait_for(&self, earlier: &Self) -> bool {
        let overlaps = self.device == earlier.device
            && self.start < earlier.end
            && earlier.start < self.end
            && !(self.reads && earlier.reads);
        self.epoch != earlier.epoch || overlaps
    }
}

/// How many records behind the first unfinished one are looked at.
const WINDOW: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Waiting,
    Begun,
    Finished,
}

/// See the module documentation. Records are named by their place in the row, from 0.
#[derive(Clone, Debug, Default)]
pub struct Schedule {
    row: Vec<(Span, Step)>,
    /// Every record before it is finished.
    first: usize,
}

impl Schedule {
    /// The next record of the row.
    pub fn push(&mut self, span: Span) {
        self.row.push((span, Step::Waiting));
    }

    /// Number of records.
    #[must_use]
    pub fn len(&self) -> usize {
        self.row.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.row.is_empty()
    }

    /// A record that may begin now; it counts as begun. `None`: those that are begun must be finished first.
    pub fn begin_next(&mut self) -> Option<usize> {
        let end = self.row.len().min(self.first + WINDOW);
        let may_begin = |index: &usize| {
            let (span, step) = &self.row[*index];
            let before = &self.row[self.first..*index];
            let unfinished = before.iter().filter(|(_, step)| *step != Step::Finished);
            *step == Step::Waiting
                && unfinished
                    .map(|(earlier, _)| earlier)
                    .all(|earlier| !span.must_wait_for(earlier))
        };
        let index = (self.first..end).find(may_begin)?;
        self.row[index].1 = Step::Begun;
        Some(index)
    }

    /// A record that was begun is finished, or has failed and is to begin again.
    pub fn on_end(&mut self, index: usize, finished: bool) {
        let step = if finished {
            Step::Finished
        } else {
            Step::Waiting
        };
        if let Some(entry) = self.row.get_mut(index) {
            entry.1 = step;
        }
        let is_finished = |entry: &(Span, Step)| entry.1 == Step::Finished;
        while self.row.get(self.first).is_some_and(is_finished) {
            self.first += 1;
        }
    }

    /// Whether all are finished.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.first == self.row.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BYTES: usize = 24;

    /// Length of the step of the epoch, first byte, length, whether it reads.
    fn rows() -> impl Strategy<Value = Vec<Span>> {
        let record = (
            0..5_u64,
            0..20_u64,
            1..5_u64,
            0..2_u32,
            prop::bool::weighted(0.2),
        );
        prop::collection::vec(record, 1..120).prop_map(|records| {
            let mut epoch = 0;
            let span = |(step, start, bytes, device, reads): (u64, u64, u64, u32, bool)| {
                epoch += u64::from(step == 0);
                Span {
                    epoch,
                    device,
                    start,
                    end: start + bytes,
                    reads,
                }
            };
            records.into_iter().map(span).collect()
        })
    }

    type Disks = [[usize; BYTES]; 2];

    fn write(disks: &mut Disks, span: &Span, number: usize) {
        let range = usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap();
        disks[span.device as usize][range].fill(number);
    }

    /// Whether the content can come about by applying, in order, every record of the epochs before one epoch and some of
    /// that epoch's.
    fn is_legal(disks: &Disks, row: &[Span], applied: &[bool]) -> bool {
        let first = applied.iter().position(|applied| !applied);
        let Some(first) = first else {
            return true;
        };
        let epoch = row[first].epoch;
        // What is finished is a set of records: check that it is of the right form, and that it is on the disk.
        let form = row
            .iter()
            .zip(applied)
            .all(|(span, applied)| span.epoch == epoch || *applied == (span.epoch < epoch));
        let mut model = [[0; BYTES]; 2];
        for (number, (span, applied)) in row.iter().zip(applied).enumerate() {
            if *applied && !span.reads {
                write(&mut model, span, number + 1);
            }
        }
        form && model == *disks
    }

    proptest! {
        #[test]
        fn every_moment_is_a_legal_state_and_the_end_is_the_sequential_one(
            row in rows(),
            picks in prop::collection::vec((0..8_usize, prop::bool::weighted(0.15)), 2000),
        ) {
            let mut schedule = Schedule::default();
            row.iter().for_each(|span| schedule.push(*span));
            let mut sequential = [[0; BYTES]; 2];
            let mut expected = vec![];
            for (number, span) in row.iter().enumerate() {
                if span.reads {
                    expected.push((number, sequential[span.device as usize]));
                } else {
                    write(&mut sequential, span, number + 1);
                }
            }
            let (mut disks, mut applied) = ([[0; BYTES]; 2], vec![false; row.len()]);
            let mut running: Vec<usize> = vec![];
            let mut picks = picks.into_iter().cycle();
            let mut widest = 0;
            while !schedule.is_over() {
                let (pick, fails) = picks.next().unwrap();
                // A number of threads, each ending when it likes.
                while running.len() < 1 + pick % 4 {
                    let Some(index) = schedule.begin_next() else { break };
                    running.push(index);
                }
                widest = widest.max(running.len());
                prop_assert!(!running.is_empty(), "it is stuck");
                let index = running.remove(pick % running.len());
                if fails {
                    schedule.on_end(index, false);
                    continue;
                }
                let span = &row[index];
                if span.reads {
                    let seen = disks[span.device as usize];
                    let (_, right) = expected.iter().find(|(number, _)| *number == index).unwrap();
                    let range = usize::try_from(span.start).unwrap()..usize::try_from(span.end).unwrap();
                    prop_assert_eq!(&seen[range.clone()], &right[range]);
                } else {
                    write(&mut disks, span, index + 1);
                }
                applied[index] = true;
                schedule.on_end(index, true);
                prop_assert!(is_legal(&disks, &row, &applied));
            }
            prop_assert_eq!(disks, sequential);
        }
    }

    #[test]
    fn what_does_not_overlap_runs_together_and_epochs_do_not() {
        let mut schedule = Schedule::default();
        let span = |epoch, start, end| Span {
            epoch,
            device: 1,
            start,
            end,
            reads: false,
        };
        for span in [span(1, 0, 4), span(1, 4, 8), span(1, 3, 5), span(2, 9, 10)] {
            schedule.push(span);
        }
        assert_eq!(
            [(); 3].map(|()| schedule.begin_next()),
            [Some(0), Some(1), None]
        );
        schedule.on_end(0, true);
        assert_eq!(
            schedule.begin_next(),
            None,
            "it overlaps the second one, too"
        );
        schedule.on_end(1, false);
        assert_eq!(schedule.begin_next(), Some(1), "again");
        schedule.on_end(1, true);
        assert_eq!([(); 2].map(|()| schedule.begin_next()), [Some(2), None]);
        schedule.on_end(2, true);
        assert_eq!(schedule.begin_next(), Some(3));
    }
}
