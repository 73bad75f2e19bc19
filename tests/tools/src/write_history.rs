// SPDX-License-Identifier: GPL-2.0-only

//! What a device showed at any time, from the log of its writes, and whether another device shows a state that a crash
//! could have left of it.
//!
//! # What is legal
//!
//! Be `e` a flush of the source. An image is legal at `e` when each of its sectors shows what the source had there when `e`
//! was made, or a write that was logged soon after `e`: before the second next flush, since a write that was under way
//! while a flush was made stands behind that flush in the log, but may stand before it in the stream. So nothing is missing
//! of what a flush had made durable, and nothing is there of what came later. There must be one `e` for all sectors.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::RangeInclusive;

/// Bytes of what is compared.
pub const SECTOR: usize = 512;

/// Flushes after `e` before which a write may be there already.
const WINDOW: usize = 2;

/// The state before the first write.
const ZERO: &[u8; SECTOR] = &[0; SECTOR];

fn digest(sector: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    sector.hash(&mut hasher);
    hasher.finish()
}

/// Everything a device was written.
#[derive(Clone, Debug)]
pub struct History {
    /// Writes logged so far.
    writes: u64,
    /// For each flush, the number of writes before it. The first one stands for the beginning.
    flushes: Vec<u64>,
    /// For each sector that was written: number of the write, and what it wrote.
    sectors: HashMap<u64, Vec<(u64, u64)>>,
    zero: u64,
}

impl Default for History {
    fn default() -> Self {
        Self {
            writes: 0,
            flushes: vec![0],
            sectors: HashMap::new(),
            zero: digest(ZERO),
        }
    }
}

impl History {
    /// A write at a sector.
    pub fn write(&mut self, first: u64, data: &[u8]) {
        self.writes += 1;
        for (sector, bytes) in (first..).zip(data.chunks(SECTOR)) {
            let entry = (self.writes, digest(bytes));
            self.sectors.entry(sector).or_default().push(entry);
        }
    }

    /// A flush of what was written before.
    pub fn flush(&mut self) {
        self.flushes.push(self.writes);
    }

    /// Flushes so far, the beginning counted.
    pub fn flushes(&self) -> usize {
        self.flushes.len()
    }

    /// The flushes at which an image is legal: the first and the last; or a sector for which there is none together with
    /// most of the others.
    ///
    /// # Errors
    ///
    /// Why it is not legal at any flush.
    pub fn legal_at(&self, image: &Image) -> Result<RangeInclusive<usize>, String> {
        if let Some((sector, _)) = image
            .sectors
            .iter()
            .find(|(sector, digest)| **digest != self.zero && !self.sectors.contains_key(sector))
        {
            return Err(format!("sector {sector} was never written on the source"));
        }
        let mut steps = vec![0i64; self.flushes.len() + 1];
        let mut ranges = Vec::new();
        for (sector, history) in &self.sectors {
            let shown = image.sectors.get(sector).copied().unwrap_or(self.zero);
            let legal = self.sector_legal_at(history, shown);
            if legal.is_empty() {
                return Err(format!(
                    "sector {sector} shows what was never written there; {} writes",
                    history.len()
                ));
            }
            for range in &legal {
                steps[*range.start()] += 1;
                steps[*range.end() + 1] -= 1;
            }
            ranges.push((*sector, legal));
        }
        let (mut covered, mut best) = (0, (0, 0));
        let mut legal: Option<RangeInclusive<usize>> = None;
        for (flush, step) in steps[..self.flushes.len()].iter().enumerate() {
            covered += step;
            best = best.max((covered, flush));
            if covered == i64::try_from(self.sectors.len()).unwrap_or(i64::MAX) {
                let first = legal.as_ref().map_or(flush, |legal| *legal.start());
                legal = Some(first..=flush);
            }
        }
        legal.ok_or_else(|| self.blame(&ranges, best.1))
    }

    /// Sectors that do not fit to the flush at which most do.
    fn blame(&self, ranges: &[(u64, Vec<RangeInclusive<usize>>)], flush: usize) -> String {
        let misfits: Vec<_> = ranges
            .iter()
            .filter(|(_, legal)| !legal.iter().any(|range| range.contains(&flush)))
            .collect();
        let first: Vec<_> = misfits.iter().take(5).collect();
        format!(
            "{} of {} sectors do not fit to flush {flush} of {}, at which most do: {first:?}",
            misfits.len(),
            ranges.len(),
            self.flushes.len()
        )
    }

    /// The flushes at which a sector may show this, in ranges that do not touch.
    fn sector_legal_at(&self, history: &[(u64, u64)], shown: u64) -> Vec<RangeInclusive<usize>> {
        let last = self.flushes.len() - 1;
        let mut legal: Vec<RangeInclusive<usize>> = Vec::new();
        let initial = std::iter::once((0, self.zero));
        let ends = history.iter().map(|(write, _)| *write).chain([u64::MAX]);
        for ((write, content), next) in initial.chain(history.iter().copied()).zip(ends) {
            if content != shown {
                continue;
            }
            // The first flush with a flush at or after this write in its window, and the last one before the next write.
            let reaches = self.flushes.partition_point(|before| *before < write);
            let from = reaches.saturating_sub(WINDOW);
            let to = (self.flushes.partition_point(|before| *before < next)).saturating_sub(1);
            let (from, to) = (from.min(last), to.min(last));
            match legal.last_mut() {
                Some(earlier) if from <= *earlier.end() + 1 => {
                    *earlier = *earlier.start()..=to.max(*earlier.end());
                }
                _ if from <= to => legal.push(from..=to),
                _ => {}
            }
        }
        legal
    }
}

/// What a device shows.
#[derive(Clone, Debug, Default)]
pub struct Image {
    sectors: HashMap<u64, u64>,
}

impl Image {
    /// A write at a sector.
    pub fn write(&mut self, first: u64, data: &[u8]) {
        for (sector, bytes) in (first..).zip(data.chunks(SECTOR)) {
            self.sectors.insert(sector, digest(bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(fill: u8) -> [u8; SECTOR] {
        [fill; SECTOR]
    }

    /// Sectors 0 to 3 are written in turn, each with its number, a flush after each fourth write.
    fn history(writes: u8) -> History {
        let mut history = History::default();
        for write in 1..=writes {
            history.write(u64::from(write % 4), &bytes(write));
            if write % 4 == 0 {
                history.flush();
            }
        }
        history
    }

    fn image(fills: [u8; 4]) -> Image {
        let mut image = Image::default();
        for (sector, fill) in (0..).zip(fills) {
            image.write(sector, &bytes(fill));
        }
        image
    }

    #[test]
    fn every_flushed_state_is_legal() {
        let history = history(40);
        assert_eq!(history.flushes(), 11);
        for flush in 1..=9u8 {
            let at = flush * 4;
            let legal = history
                .legal_at(&image([at, at - 3, at - 2, at - 1]))
                .unwrap();
            assert!(legal.contains(&usize::from(flush)), "{flush}: {legal:?}");
        }
        assert!(history.legal_at(&Image::default()).unwrap().contains(&0));
    }

    #[test]
    fn later_writes_may_be_there_but_none_may_be_missing() {
        let history = history(40);
        // Of the epoch behind 20 some, in any order.
        assert!(history.legal_at(&image([20, 17, 22, 23])).is_ok());
        // 12 and less was durable long before 36 was written.
        assert!(history.legal_at(&image([36, 33, 34, 11])).is_err());
        // What nobody wrote, and what nobody wrote there.
        assert!(history.legal_at(&image([20, 99, 18, 19])).is_err());
        assert!(history.legal_at(&image([20, 18, 17, 19])).is_err());
        let mut elsewhere = image([20, 17, 18, 19]);
        elsewhere.write(77, &bytes(1));
        assert!(history.legal_at(&elsewhere).is_err());
    }
}
