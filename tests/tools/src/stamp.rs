// SPDX-License-Identifier: GPL-2.0-only

//! Stamped sectors: every sector says which write it is from, and a log says when each write began and ended. From
//! both follows whether an image is a state that the device was in.
//!
//! # What is a legal prefix
//!
//! A write that ended before another one began comes before it, whatever a device does with writes that run at the
//! same time. An image is legal when the writes that it shows can be completed to a set of writes in which, with each
//! write, all that come before it are contained, and which leaves exactly this image. That is checked sector by sector:
//!
//! - Every sector shows a write of the log that covers it, undamaged, or what was there in the beginning.
//! - Be `M` the latest begin of a write that is visible anywhere. Whatever ended before `M` has to be in the set, and so
//!   has every visible write. None of their sectors may show something that ended before they began.
//! - No two writes are each above the other, in different sectors.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;

/// Bytes of a stamped sector.
pub const SECTOR: usize = 512;

const MAGIC: u64 = u64::from_le_bytes(*b"DTSTAMP1");

/// What a sector says about itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Where it belongs, from the start of the device.
    pub sector: u64,
    /// Number of the write, from 1; unique in its generation.
    pub write: u64,
    /// Run of the writer.
    pub generation: u32,
    /// Who wrote it.
    pub thread: u32,
}

impl Stamp {
    /// Fills a sector.
    pub fn fill(&self, sector: &mut [u8]) {
        let words = [
            MAGIC,
            self.sector,
            self.write,
            u64::from(self.generation) | (u64::from(self.thread) << 32),
        ];
        let seed = self.write.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ self.sector;
        for (index, chunk) in sector[..SECTOR - 8].chunks_exact_mut(8).enumerate() {
            let word = words
                .get(index)
                .copied()
                .unwrap_or_else(|| seed.rotate_left(u32::try_from(index).unwrap_or(0)));
            chunk.copy_from_slice(&word.to_le_bytes());
        }
        let crc = crc32fast::hash(&sector[..SECTOR - 8]);
        sector[SECTOR - 8..].copy_from_slice(&u64::from(crc).to_le_bytes());
    }

    /// Reads a sector; `None` when it is not stamped or damaged.
    pub fn read(sector: &[u8]) -> Option<Self> {
        let word = |index: usize| {
            Some(u64::from_le_bytes(
                sector.get(index * 8..index * 8 + 8)?.try_into().ok()?,
            ))
        };
        let crc = u64::from(crc32fast::hash(sector.get(..SECTOR - 8)?));
        if word(0)? != MAGIC || word(SECTOR / 8 - 1)? != crc {
            return None;
        }
        let who = word(3)?;
        Some(Self {
            sector: word(1)?,
            write: word(2)?,
            generation: u32::try_from(who & 0xffff_ffff).ok()?,
            thread: u32::try_from(who >> 32).ok()?,
        })
    }
}

/// A write of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Write {
    /// Its number.
    pub write: u64,
    /// First sector.
    pub start: u64,
    /// Length in sectors.
    pub sectors: u64,
    /// Tick at which it was submitted.
    pub began: u64,
    /// Tick after its end was seen; `u64::MAX` if it never was.
    pub ended: u64,
}

/// Text of one write in the log file.
impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} {} {} {}",
            self.write, self.start, self.sectors, self.began, self.ended
        )
    }
}

impl Write {
    /// Reads a line of the log file.
    pub fn parse(line: &str) -> Option<Self> {
        let mut numbers = line.split_whitespace().map(|word| word.parse().ok());
        let mut next = || numbers.next().flatten();
        Some(Self {
            write: next()?,
            start: next()?,
            sectors: next()?,
            began: next()?,
            ended: next()?,
        })
    }

    fn covers(&self) -> std::ops::Range<u64> {
        self.start..self.start + self.sectors
    }
}

/// What speaks against an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// A sector is neither stamped nor as it was in the beginning.
    Damaged {
        /// Where.
        sector: u64,
    },
    /// A sector shows what was never written there.
    Foreign {
        /// Where.
        sector: u64,
        /// What it says.
        stamp: Stamp,
    },
    /// A write is missing that has to be there.
    Missing {
        /// Where.
        sector: u64,
        /// The write that should be visible there, or something later.
        missing: Write,
        /// What is visible there, if anything.
        instead: Option<Write>,
        /// The write that proves that it should be there: visible somewhere, begun when the missing one had ended; or
        /// the missing one itself, visible in another sector.
        witness: Write,
    },
    /// Two writes are each above the other.
    Crossed {
        /// One.
        a: Write,
        /// The other.
        b: Write,
    },
}

/// What a legal image shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    /// Writes that must be in it.
    pub writes: u64,
    /// Different writes that are visible.
    pub visible: u64,
    /// Tick up to which everything is in it.
    pub tick: u64,
}

/// Checks the sectors of an image, the first of which is sector `first`.
///
/// `at_least`: everything that had ended by this tick has to be in it.
pub fn check(
    sectors: impl Iterator<Item = Shown>,
    first: u64,
    log: &[Write],
    generation: u32,
    at_least: u64,
) -> Result<Prefix, Vec<Violation>> {
    let by_number: HashMap<u64, &Write> = log.iter().map(|write| (write.write, write)).collect();
    let mut violations = Vec::new();
    let mut shown: Vec<Option<&Write>> = Vec::new();
    for (sector, what) in (first..).zip(sectors) {
        let write = match what {
            Shown::Initial => None,
            Shown::Damaged => {
                violations.push(Violation::Damaged { sector });
                None
            }
            Shown::Stamped(stamp) => {
                let write = by_number.get(&stamp.write).copied();
                let fits = write.is_some_and(|write| write.covers().contains(&sector))
                    && stamp.sector == sector
                    && stamp.generation == generation;
                if !fits {
                    violations.push(Violation::Foreign { sector, stamp });
                }
                write.filter(|_| fits)
            }
        };
        shown.push(write);
    }
    let visible: BTreeMap<u64, &Write> = shown
        .iter()
        .flatten()
        .map(|write| (write.write, *write))
        .collect();
    let latest = visible.values().copied().max_by_key(|write| write.began);
    let tick = latest.map_or(0, |write| write.began).max(at_least);
    let mut crossings = Crossings::default();
    let mut writes = 0;
    for write in log {
        let before = write.ended < tick;
        if !before && !visible.contains_key(&write.write) {
            continue;
        }
        writes += 1;
        for sector in write.covers() {
            let Some(at) = sector
                .checked_sub(first)
                .and_then(|at| usize::try_from(at).ok())
            else {
                continue;
            };
            let Some(instead) = shown.get(at).copied() else {
                continue;
            };
            if instead.is_none_or(|instead| instead.ended < write.began) {
                let witness = if before {
                    latest.unwrap_or(write)
                } else {
                    write
                };
                violations.push(Violation::Missing {
                    sector,
                    missing: *write,
                    instead: instead.copied(),
                    witness: *witness,
                });
                break;
            }
            if let Some(crossed) = instead.and_then(|above| crossings.note(write, above)) {
                violations.push(crossed);
            }
        }
        if violations.len() > 20 {
            break;
        }
    }
    if violations.is_empty() {
        Ok(Prefix {
            writes,
            visible: visible.len() as u64,
            tick,
        })
    } else {
        Err(violations)
    }
}

/// What an image shows in a sector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    /// What was there before the first write: zeroes, or a stamp of an earlier generation.
    Initial,
    /// Neither that nor a stamp.
    Damaged,
    /// A stamp.
    Stamped(Stamp),
}

impl Shown {
    /// Reads a sector of an image whose writes are of `generation`.
    pub fn read(sector: &[u8], generation: u32) -> Self {
        match Stamp::read(sector) {
            Some(stamp) if stamp.generation < generation => Self::Initial,
            Some(stamp) => Self::Stamped(stamp),
            None if sector.iter().all(|byte| *byte == 0) => Self::Initial,
            None => Self::Damaged,
        }
    }
}

/// Which write is above which.
#[derive(Default)]
struct Crossings {
    above: HashSet<(u64, u64)>,
}

impl Crossings {
    fn note(&mut self, below: &Write, above: &Write) -> Option<Violation> {
        if below.write == above.write || !self.above.insert((below.write, above.write)) {
            return None;
        }
        let crossed = self.above.contains(&(above.write, below.write));
        crossed.then_some(Violation::Crossed {
            a: *below,
            b: *above,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn write(write: u64, start: u64, sectors: u64, began: u64, ended: u64) -> Write {
        Write {
            write,
            start,
            sectors,
            began,
            ended,
        }
    }

    fn stamped(write: u64, sector: u64) -> Shown {
        Shown::Stamped(Stamp {
            sector,
            write,
            generation: 1,
            thread: 0,
        })
    }

    /// Image of four sectors; 0 is the beginning.
    fn image(writes: [u64; 4]) -> impl Iterator<Item = Shown> {
        writes.into_iter().zip(0..).map(|(write, sector)| {
            if write == 0 {
                Shown::Initial
            } else {
                stamped(write, sector)
            }
        })
    }

    fn verdict(writes: [u64; 4], log: &[Write]) -> Result<Prefix, Vec<Violation>> {
        check(image(writes), 0, log, 1, 0)
    }

    #[test]
    fn stamps_survive_and_notice_damage() {
        let stamp = Stamp {
            sector: 77,
            write: 5,
            generation: 2,
            thread: 3,
        };
        let mut sector = [0; SECTOR];
        stamp.fill(&mut sector);
        assert_eq!(Stamp::read(&sector), Some(stamp));
        assert_eq!(Shown::read(&sector, 3), Shown::Initial);
        for at in [0, 40, 300, 511] {
            let mut damaged = sector;
            damaged[at] ^= 1;
            assert_eq!(Shown::read(&damaged, 2), Shown::Damaged);
        }
    }

    #[test]
    fn log_lines_survive() {
        let entry = write(1, 2, 3, 4, u64::MAX);
        assert_eq!(Write::parse(&entry.to_string()), Some(entry));
        assert_eq!(Write::parse("1 2 x"), None);
    }

    #[test]
    fn every_prefix_of_a_sequence_is_legal() {
        let log = [
            write(1, 0, 1, 1, 2),
            write(2, 1, 2, 3, 4),
            write(3, 0, 1, 5, 6),
        ];
        for good in [[0; 4], [1, 0, 0, 0], [1, 2, 2, 0], [3, 2, 2, 0]] {
            verdict(good, &log).unwrap();
        }
    }

    #[test]
    fn a_hole_in_a_sequence_is_found() {
        let log = [write(1, 0, 1, 1, 2), write(2, 1, 1, 3, 4)];
        let violations = verdict([0, 2, 0, 0], &log).unwrap_err();
        assert_eq!(
            violations,
            [Violation::Missing {
                sector: 0,
                missing: log[0],
                instead: None,
                witness: log[1]
            }]
        );
    }

    #[test]
    fn an_older_write_on_top_is_found() {
        let log = [
            write(1, 0, 1, 1, 2),
            write(2, 0, 1, 3, 4),
            write(3, 1, 1, 5, 6),
        ];
        verdict([2, 3, 0, 0], &log).unwrap();
        assert!(verdict([1, 3, 0, 0], &log).is_err());
    }

    #[test]
    fn writes_at_the_same_time_may_be_there_or_not() {
        let log = [write(1, 0, 1, 1, 4), write(2, 1, 1, 2, 3)];
        verdict([0, 2, 0, 0], &log).unwrap();
        verdict([1, 0, 0, 0], &log).unwrap();
    }

    #[test]
    fn a_torn_write_is_found() {
        let log = [write(1, 0, 2, 1, 2)];
        assert!(verdict([1, 0, 0, 0], &log).is_err());
    }

    #[test]
    fn overlapping_writes_cover_each_other_one_way_only() {
        let log = [write(1, 0, 2, 1, 10), write(2, 0, 2, 2, 9)];
        verdict([1, 1, 0, 0], &log).unwrap();
        verdict([2, 2, 0, 0], &log).unwrap();
        let violations = verdict([1, 2, 0, 0], &log).unwrap_err();
        assert!(matches!(violations[0], Violation::Crossed { .. }));
    }

    #[test]
    fn what_was_never_written_is_found() {
        let log = [write(1, 0, 1, 1, 2)];
        assert!(matches!(
            verdict([0, 1, 0, 0], &log).unwrap_err()[0],
            Violation::Foreign { sector: 1, .. }
        ));
        assert!(matches!(
            verdict([9, 0, 0, 0], &log).unwrap_err()[0],
            Violation::Foreign { sector: 0, .. }
        ));
    }

    #[test]
    fn what_is_asked_for_has_to_be_there() {
        let log = [write(1, 0, 1, 1, 2)];
        assert!(check(image([0; 4]), 0, &log, 1, 3).is_err());
        assert_eq!(
            check(image([1, 0, 0, 0]), 0, &log, 1, 3),
            Ok(Prefix {
                writes: 1,
                visible: 1,
                tick: 3
            })
        );
    }
}
