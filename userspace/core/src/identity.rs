// SPDX-License-Identifier: GPL-2.0-only

//! Whether what is found where a volume was is that volume, as the target left it.
//!
//! | evidence | says | compared |
//! |---|---|---|
//! | `id`: inode and birth of a file, serial number or UUID of a disk | which thing it is | always |
//! | `samples`: hashes of some blocks | what it holds | always, but for blocks that the journal changes again |
//! | `mark`: time of the last change of a file, sectors written to a disk since boot | that nobody wrote to it since | if the journal holds nothing behind the checkpoint |
//!
//! All of it is taken at a checkpoint, when the volume is durable and nobody writes to it, and kept in the state that says
//! so. After a crash the volume may be ahead of its checkpoint, but only where the journal has records.
//!
//! A volume that is not as it was is not written to: it may be another disk, with data of somebody else, or the copy may
//! have been put to use and be newer than the source. An operator decides.

use dtloop_proto::Code;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

use crate::binding::Refusal;

/// Length of a sample in bytes.
pub const SAMPLE_BYTES: u64 = 4096;

/// The same, for buffers.
pub const SAMPLE_LENGTH: usize = 4096;

/// Samples of a volume.
const SAMPLES: u64 = 16;

/// What a block held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sample {
    /// First byte.
    pub offset: u64,
    /// Hash of the block.
    pub hash: u64,
}

impl Sample {
    /// A sample of that content.
    #[must_use]
    pub fn of(offset: u64, content: &[u8]) -> Self {
        let hash = xxh3_64(content);
        Self { offset, hash }
    }
}

/// Something that changes when somebody writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mark", rename_all = "kebab-case")]
pub enum Mark {
    /// When a file was last written to, in nanoseconds since 1970.
    Written {
        /// Time.
        at_ns: u64,
    },
    /// Sectors written to a disk since boot.
    Count {
        /// How many.
        sectors: u64,
    },
}

/// A volume at a checkpoint, or as it is found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeIdentity {
    /// Which thing it is; empty if nothing tells.
    pub id: String,
    /// Size.
    pub bytes: u64,
    /// Some of its blocks.
    pub samples: Vec<Sample>,
    /// Whether somebody wrote to it; none if nothing tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<Mark>,
}

impl VolumeIdentity {
    /// The range may have been changed.
    pub fn forget(&mut self, start: u64, end: u64) {
        let range = [(start, end)];
        self.samples
            .retain(|sample| !Ranges(&range).covers(sample.offset));
        self.mark = None;
    }
}

/// Where the samples of a volume are: at its beginning, where a file system has its identity, and all over it. A very small
/// one is looked at as a whole.
#[must_use]
pub fn sample_offsets(bytes: u64) -> Vec<u64> {
    let blocks = bytes / SAMPLE_BYTES;
    if blocks <= SAMPLES {
        return (0..blocks).map(|block| block * SAMPLE_BYTES).collect();
    }
    let spread = (0..SAMPLES - 2).map(|index| {
        // Not at regular distances, at which file systems put things that never change.
        let step = blocks / (SAMPLES - 2);
        let within = xxh3_64(&index.to_le_bytes()).checked_rem(step).unwrap_or(0);
        (index * step + within) * SAMPLE_BYTES
    });
    let begin = [0, 64 << 10].into_iter();
    let mut offsets: Vec<u64> = begin
        .chain(spread)
        .filter(|offset| offset + SAMPLE_BYTES <= bytes)
        .collect();
    offsets.sort_unstable();
    offsets.dedup();
    offsets
}

/// Whether somebody wrote after the mark was taken. A file's time that went back (not everything of it is durable after
/// a power cut) says nothing.
fn was_written(saved: &Mark, found: &Mark) -> bool {
    match (saved, found) {
        (Mark::Written { at_ns: saved }, Mark::Written { at_ns: found }) => found > saved,
        // After a boot it begins at 0. Which boot it is may not be known: a target that is confined sees little of it.
        (Mark::Count { sectors: saved }, Mark::Count { sectors: found }) => {
            found != saved && *found > 0
        }
        _ => false,
    }
}

/// Whether the journal holds changes of a volume behind its checkpoint.
pub trait Pending {
    /// Any.
    fn is_any(&self) -> bool;
    /// Of that sample.
    fn touches(&self, offset: u64) -> bool;
}

/// Nothing is pending.
#[derive(Clone, Copy, Debug)]
pub struct NothingPending;

impl Pending for NothingPending {
    fn is_any(&self) -> bool {
        false
    }

    fn touches(&self, _: u64) -> bool {
        false
    }
}

/// Anything may be.
#[derive(Clone, Copy, Debug)]
pub struct Everything;

impl Pending for Everything {
    fn is_any(&self) -> bool {
        true
    }

    fn touches(&self, _: u64) -> bool {
        true
    }
}

/// Changes of these ranges are pending, in bytes from and to.
#[derive(Clone, Copy, Debug)]
pub struct Ranges<'a>(pub &'a [(u64, u64)]);

impl Ranges<'_> {
    /// Whether one of them has some of the sample at that offset.
    #[must_use]
    pub fn covers(&self, offset: u64) -> bool {
        let mut ranges = self.0.iter();
        ranges.any(|(start, end)| *start < offset + SAMPLE_BYTES && offset < *end)
    }
}

impl Pending for Ranges<'_> {
    fn is_any(&self) -> bool {
        !self.0.is_empty()
    }

    fn touches(&self, offset: u64) -> bool {
        self.covers(offset)
    }
}

/// Whether the volume that is found is the one that was left, as it was left. `name` and `place` are for the message.
///
/// # Errors
///
/// The refusal to be told to the source.
pub fn examine(
    saved: &VolumeIdentity,
    found: &VolumeIdentity,
    pending: &dyn Pending,
    name: &str,
    place: &str,
) -> Result<(), Refusal> {
    let decide = format!(
        "to let the source overwrite it, run \"dttarget volume accept {name}\" there with dttarget stopped"
    );
    if !saved.id.is_empty() && !found.id.is_empty() && saved.id != found.id {
        return Err(Refusal::new(
            Code::VOLUME_REPLACED,
            format!(
                "Volume \"{name}\" ({place}) is another file or disk than before: {}, it was {}. Put the right one back, or, \
                 {decide}",
                found.id, saved.id
            ),
        ));
    }
    if found.bytes < saved.bytes {
        return Err(Refusal::new(
            Code::VOLUME_REPLACED,
            format!(
                "Volume \"{name}\" ({place}) has {} bytes, it had {}: it is another one, or was cut short. Put the right one \
                 back, or, {decide}",
                found.bytes, saved.bytes
            ),
        ));
    }
    let still = |sample: &&Sample| !pending.touches(sample.offset);
    let untouched: Vec<&Sample> = saved.samples.iter().filter(still).collect();
    let changed = untouched.iter().filter(|sample| {
        let mut found = found.samples.iter();
        found.any(|other| other.offset == sample.offset && other.hash != sample.hash)
    });
    let (changed, all) = (changed.count(), untouched.len());
    let marks = saved.mark.as_ref().zip(found.mark.as_ref());
    let written =
        marks.is_some_and(|(saved, found)| was_written(saved, found)) && !pending.is_any();
    if changed == 0 && !written {
        return Ok(());
    }
    let how = if changed > 0 {
        format!("{changed} of {all} blocks looked at are not as the target left them")
    } else {
        "it was written to since the target let go of it".to_owned()
    };
    Err(Refusal::new(
        Code::VOLUME_CHANGED,
        format!(
            "Volume \"{name}\" ({place}) was changed by something else than the target: {how}. If the copy was put to use, \
             it may be newer than the source: keep it. Otherwise, {decide}"
        ),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> VolumeIdentity {
        let samples = sample_offsets(1 << 20);
        VolumeIdentity {
            id: "inode 5".into(),
            bytes: 1 << 20,
            samples: samples
                .iter()
                .map(|offset| Sample {
                    offset: *offset,
                    hash: *offset,
                })
                .collect(),
            mark: Some(Mark::Written { at_ns: 9 }),
        }
    }

    struct From(u64);

    impl Pending for From {
        fn is_any(&self) -> bool {
            true
        }

        fn touches(&self, offset: u64) -> bool {
            offset >= self.0
        }
    }

    fn judge(found: &VolumeIdentity, pending: &dyn Pending) -> Option<Code> {
        examine(&identity(), found, pending, "vol", "/vol")
            .err()
            .map(|refusal| refusal.code)
    }

    #[test]
    fn a_volume_as_it_was_left_is_taken() {
        assert_eq!(judge(&identity(), &NothingPending), None);
        let larger = VolumeIdentity {
            bytes: 2 << 20,
            ..identity()
        };
        assert_eq!(judge(&larger, &NothingPending), None);
        let nameless = VolumeIdentity {
            id: String::new(),
            mark: None,
            ..identity()
        };
        assert_eq!(judge(&nameless, &NothingPending), None);
    }

    #[test]
    fn another_one_is_not() {
        let other = VolumeIdentity {
            id: "inode 6".into(),
            ..identity()
        };
        assert_eq!(judge(&other, &NothingPending), Some(Code::VOLUME_REPLACED));
        assert_eq!(judge(&other, &From(0)), Some(Code::VOLUME_REPLACED));
        let shorter = VolumeIdentity {
            bytes: 4096,
            ..identity()
        };
        assert_eq!(
            judge(&shorter, &NothingPending),
            Some(Code::VOLUME_REPLACED)
        );
    }

    #[test]
    fn a_changed_block_is_noticed_unless_the_journal_changes_it_again() {
        for at in 0..identity().samples.len() {
            let mut found = identity();
            found.samples[at].hash ^= 1;
            let offset = found.samples[at].offset;
            assert_eq!(judge(&found, &NothingPending), Some(Code::VOLUME_CHANGED));
            assert_eq!(judge(&found, &From(offset)), None);
            assert_eq!(judge(&found, &From(offset + 1)), Some(Code::VOLUME_CHANGED));
        }
    }

    #[test]
    fn a_later_write_is_noticed_unless_it_may_be_our_own() {
        let mut found = identity();
        found.mark = Some(Mark::Written { at_ns: 10 });
        assert_eq!(judge(&found, &NothingPending), Some(Code::VOLUME_CHANGED));
        assert_eq!(judge(&found, &From(u64::MAX)), None);
        found.mark = Some(Mark::Written { at_ns: 8 });
        assert_eq!(judge(&found, &NothingPending), None);
        let count = |sectors| Mark::Count { sectors };
        for (saved, found, written) in [
            (count(5), count(5), false),
            (count(5), count(6), true),
            (count(5), count(0), false),
            (count(5), count(1), true),
        ] {
            assert_eq!(was_written(&saved, &found), written);
        }
    }

    #[test]
    fn samples_lie_within_the_volume() {
        for bytes in [0, 512, 4096, 8192, 1 << 20, 1 << 40] {
            let offsets = sample_offsets(bytes);
            assert!(offsets.iter().all(|offset| offset + SAMPLE_BYTES <= bytes));
            assert!(offsets.windows(2).all(|pair| pair[0] < pair[1]));
            assert_eq!(offsets.is_empty(), bytes < SAMPLE_BYTES);
        }
        assert_eq!(sample_offsets(1 << 40).len(), 16);
    }
}
