// SPDX-License-Identifier: GPL-2.0-only

//! Whether the disk behind a device of the source is still the one that the copy was made of, as it was left.
//!
//! The intent map says in which regions a device may differ from its copy after a crash. It cannot know that the disk was
//! restored to an older state, swapped for another one of the same name, or written to by something that ran before the device
//! was attached. So the agent remembers what some blocks held:
//!
//! ```text
//!   not known --read--> known --a record changes it: forgotten, durably before the mark of its region may go--> not known
//! ```
//!
//! A block that is known in the state file holds the same on the disk, or its region is marked: whatever changed it
//! is in a record that was not sent yet, or that was sent and whose forgetting is not durable, so the target's
//! acknowledgement has not been passed on to the intent map.
//!
//! A block that is known, holds something else and is neither marked nor changed in the present stream was changed by
//! somebody else. Then nobody knows which side is newer, and an operator decides.
//!
//! Which blocks: some all over the device, which tell it from another one, and a *trail* of blocks that were written. An
//! older state of the very same disk is alike nearly everywhere, but not where something was written since. So the trail
//! goes back in steps that grow with their age: whether the state is from a minute ago or from last week, the trail most likely
//! has a block that was written later. What is written again leaves the trail, as it leaves what is known.

use serde::{Deserialize, Serialize};

use crate::identity::{Ranges, SAMPLE_BYTES, SAMPLE_LENGTH, Sample, sample_offsets};

/// Blocks in a trail: with steps that double, from ten seconds to a year, and some for each of them, as most are written again.
const TRAIL_MAX: usize = 48;

/// How far apart the blocks of a trail are at least, by the clock of the records.
const TRAIL_STEP_NS: u64 = 10_000_000_000;

/// A block that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Trace {
    #[serde(flatten)]
    sample: Sample,
    /// By the clock of the record.
    time_ns: u64,
}

/// What some blocks of a device held. Offsets are those of the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    samples: Vec<Sample>,
    /// Oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    trail: Vec<Trace>,
}

/// The first whole block in what was written from that byte on.
#[must_use]
pub fn block_in(start: u64, content: &[u8]) -> Option<(u64, &[u8])> {
    let offset = start.checked_next_multiple_of(SAMPLE_BYTES)?;
    let from = usize::try_from(offset - start).ok()?;
    let block = content.get(from..from.checked_add(SAMPLE_LENGTH)?)?;
    Some((offset, block))
}

impl Origin {
    /// Nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty() && self.trail.is_empty()
    }

    fn all(&self) -> impl Iterator<Item = &Sample> {
        let trail = self.trail.iter().map(|trace| &trace.sample);
        self.samples.iter().chain(trail)
    }

    /// Keeps the blocks that please.
    fn retain(&mut self, pleases: impl Fn(&Sample) -> bool) {
        self.samples.retain(&pleases);
        self.trail.retain(|trace| pleases(&trace.sample));
    }

    /// Offsets of the blocks that are known.
    #[must_use]
    pub fn known(&self) -> Vec<u64> {
        self.all().map(|sample| sample.offset).collect()
    }

    /// Offsets of the blocks that ought to be known of a device of that size.
    #[must_use]
    pub fn missing(&self, bytes: u64) -> Vec<u64> {
        let known = self.known();
        let mut offsets = sample_offsets(bytes);
        offsets.retain(|offset| !known.contains(offset));
        offsets
    }

    /// A block was read.
    pub fn learn(&mut self, sample: Sample) {
        self.retain(|known| known.offset != sample.offset);
        self.samples.push(sample);
    }

    /// Something was written that may be in the trail: is it time for that?
    #[must_use]
    pub fn wants_trace(&self, time_ns: u64) -> bool {
        let last = self.trail.last();
        // A clock that was set back begins a new step.
        last.is_none_or(|last| time_ns.abs_diff(last.time_ns) >= TRAIL_STEP_NS)
    }

    /// A block was written, and everything that was known of it forgotten.
    pub fn trace(&mut self, sample: Sample, time_ns: u64) {
        self.trail.push(Trace { sample, time_ns });
        if self.trail.len() > TRAIL_MAX {
            self.thin_out(time_ns);
        }
    }

    /// Leaves out the block whose neighbours are the nearest to each other, for their age.
    fn thin_out(&mut self, now_ns: u64) {
        let gap = |at: usize| {
            let (before, this, behind) = (
                self.trail[at - 1].time_ns,
                self.trail[at].time_ns,
                self.trail[at + 1].time_ns,
            );
            let (gap, age) = (behind.abs_diff(before), now_ns.abs_diff(this).max(1));
            u128::from(gap) * 1_000_000 / u128::from(age)
        };
        let inner = 1..self.trail.len().saturating_sub(1);
        if let Some(at) = inner.min_by_key(|at| gap(*at)) {
            self.trail.remove(at);
        }
    }

    /// A range was changed. True: something in it was known.
    pub fn forget(&mut self, start: u64, end: u64) -> bool {
        let before = self.samples.len() + self.trail.len();
        let range = [(start, end)];
        self.retain(|sample| !Ranges(&range).covers(sample.offset));
        self.samples.len() + self.trail.len() < before
    }

    /// Keeps only what was found again: the marks that would explain a change may be gone by the next look.
    pub fn keep_only(&mut self, found: &[Sample]) {
        self.retain(|sample| found.contains(sample));
    }

    /// Whether that is the disk, without a doubt: enough is known of it, and all of it was found again.
    #[must_use]
    pub fn is_certain(&self, found: &[Sample]) -> bool {
        /// Fewer may be alike on two disks.
        const ENOUGH: usize = 4;
        self.samples.len() >= ENOUGH && self.all().all(|sample| found.contains(sample))
    }

    /// Offsets of the blocks that hold something else than they did.
    #[must_use]
    pub fn changed(&self, found: &[Sample]) -> Vec<u64> {
        let differs = |sample: &&Sample| {
            self.all()
                .any(|known| known.offset == sample.offset && known.hash != sample.hash)
        };
        let changed = found.iter().filter(differs);
        changed.map(|sample| sample.offset).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_known_from_its_reading_to_its_change() {
        let mut origin = Origin::default();
        let offsets = sample_offsets(1 << 20);
        assert_eq!(origin.missing(1 << 20), offsets);
        for offset in &offsets {
            origin.learn(Sample::of(*offset, b"old"));
        }
        assert!(origin.missing(1 << 20).is_empty());
        let at = offsets[3];
        let newer = [Sample::of(at, b"new"), Sample::of(offsets[4], b"old")];
        assert_eq!(origin.changed(&newer), [at]);
        assert!(!origin.is_certain(&newer));
        let old: Vec<Sample> = offsets
            .iter()
            .map(|offset| Sample::of(*offset, b"old"))
            .collect();
        assert!(origin.is_certain(&old) && !Origin::default().is_certain(&old));
        let mut kept = origin.clone();
        kept.keep_only(&newer);
        assert_eq!(kept.known(), [offsets[4]]);
        assert!(!origin.forget(at + 4096, at + 4097), "the block behind it");
        assert!(origin.forget(at + 4095, at + 4096) && !origin.forget(at, at + 1));
        assert_eq!(origin.missing(1 << 20), [at]);
        assert!(origin.changed(&newer).is_empty());
    }

    #[test]
    fn the_trail_goes_back_in_growing_steps() {
        const SECOND: u64 = 1_000_000_000;
        let day = 24 * 3600;
        let mut origin = Origin::default();
        let mut taken = 0;
        // A week of writes, one every three seconds.
        for second in (0..7 * day).step_by(3) {
            let (offset, time) = (second * SAMPLE_BYTES, second * SECOND);
            if origin.wants_trace(time) {
                origin.trace(Sample::of(offset, b"new"), time);
                taken += 1;
            }
        }
        assert!(taken < 7 * day / 10 && origin.trail.len() == TRAIL_MAX);
        let ages: Vec<u64> = origin
            .trail
            .iter()
            .map(|trace| 7 * day - trace.time_ns / SECOND)
            .collect();
        // Whatever the age of a state, something was written in the first half of the time since.
        for age in [60, 600, 3600, day, 3 * day] {
            assert!(
                ages.iter().any(|at| (age / 2..=age).contains(at)),
                "{age}: {ages:?}"
            );
        }
        // What was written again leaves it.
        let last = origin.trail[TRAIL_MAX - 1];
        let at = last.sample.offset;
        assert!(origin.forget(at + 4095, at + 9000));
        assert!(!origin.trail.contains(&last));
    }

    #[test]
    fn a_clock_that_jumps_stops_no_trail() {
        let mut origin = Origin::default();
        for time in [0, u64::MAX, 7, u64::MAX - 1] {
            for step in 0..u64::try_from(TRAIL_MAX).unwrap() {
                let time = time ^ (step * TRAIL_STEP_NS);
                if origin.wants_trace(time) {
                    origin.trace(Sample::of(step * SAMPLE_BYTES, b"x"), time);
                }
            }
        }
        assert_eq!(origin.trail.len(), TRAIL_MAX);
    }

    #[test]
    fn the_trail_takes_whole_blocks() {
        let content = vec![7; 3 * SAMPLE_LENGTH];
        let found = block_in(512, &content).map(|(at, block)| (at, block.len()));
        assert_eq!(found, Some((4096, SAMPLE_LENGTH)));
        assert_eq!(block_in(4096, &content[..4095]), None);
        assert_eq!(block_in(1, &content[..4096]), None);
        assert_eq!(block_in(u64::MAX, &content), None);
    }
}
