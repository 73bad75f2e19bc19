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

use serde::{Deserialize, Serialize};

use crate::identity::{Ranges, Sample, sample_offsets};

/// What some blocks of a device held. Offsets are those of the device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    samples: Vec<Sample>,
}

impl Origin {
    /// Nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// Offsets of the blocks that are known.
    #[must_use]
    pub fn known(&self) -> Vec<u64> {
        self.samples.iter().map(|sample| sample.offset).collect()
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
        self.samples.retain(|known| known.offset != sample.offset);
        self.samples.push(sample);
    }

    /// A range was changed. True: something in it was known.
    pub fn forget(&mut self, start: u64, end: u64) -> bool {
        let before = self.samples.len();
        let range = [(start, end)];
        self.samples
            .retain(|sample| !Ranges(&range).covers(sample.offset));
        self.samples.len() < before
    }

    /// Keeps only what was found again: the marks that would explain a change may be gone by the next look.
    pub fn keep_only(&mut self, found: &[Sample]) {
        self.samples.retain(|sample| found.contains(sample));
    }

    /// Whether that is the disk, without a doubt: enough is known of it, and all of it was found again.
    #[must_use]
    pub fn is_certain(&self, found: &[Sample]) -> bool {
        /// Fewer may be alike on two disks.
        const ENOUGH: usize = 4;
        let mut samples = self.samples.iter();
        self.samples.len() >= ENOUGH && samples.all(|sample| found.contains(sample))
    }

    /// Offsets of the blocks that hold something else than they did.
    #[must_use]
    pub fn changed(&self, found: &[Sample]) -> Vec<u64> {
        let differs = |sample: &&Sample| {
            let mut known = self.samples.iter();
            known.any(|known| known.offset == sample.offset && known.hash != sample.hash)
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
}
