// SPDX-License-Identifier: GPL-2.0-only

//! The dirty map: which blocks of a device have to be sent again.
//!
//! One bit stands for a block of `1 << shift` sectors. The methods take `&self`: the bits are atomic
//! words, and no lock is held around them.
//!
//! # Why relaxed, word by word
//!
//! Whoever marks or clears a range holds the gate for it, so no two calls that run at one time concern
//! overlapping ranges, and what one did is visible to the next through the lock of the gate. A *block*
//! can be concerned twice at one time only at the edges of ranges that share it; only marks go that
//! far, as only blocks wholly inside a range are cleared, and two marks of one bit are as good as one.
//! A *word* can be concerned by many calls at one time, each with other bits: `fetch_or` and
//! `fetch_and` lose none of them. Nobody needs to see two words change together, and nobody takes a bit
//! as a message about other memory, so there is nothing for a stronger ordering to order.
//!
//! One more case: a mark that shares an edge block with a range being cleared. The block is not wholly
//! inside the cleared range then, so the clear leaves it alone.
//!
//! The counter follows the bits one step behind. Between two calls it is exact.

use core::{
    ops::Deref,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

/// log2 of the sectors in the smallest block: 4 KiB.
const SHIFT_MIN: u32 = 3;

/// log2 of the sectors in the largest block: 64 KiB.
const SHIFT_MAX: u32 = 7;

/// log2 of the blocks that a map may have before its blocks grow: 1 TiB of 4 KiB, 32 MiB of bits.
const BLOCKS_SHIFT: u32 = 28;

const WORD_BITS: u64 = 64;

/// log2 of the sectors that a block stands for, on a device of `sectors`: the smallest of 4 KiB to
/// 64 KiB with which the map takes at most 32 MiB, or 64 KiB if none does (2 MiB per TiB then).
pub(crate) fn shift_for(sectors: u64) -> u32 {
    let mut shift = SHIFT_MIN;
    while shift < SHIFT_MAX && sectors > 1 << (BLOCKS_SHIFT + shift) {
        shift += 1;
    }
    shift
}

/// Blocks of `1 << shift` sectors that cover a device of `sectors`.
fn blocks_for(sectors: u64, shift: u32) -> u64 {
    match sectors.checked_sub(1) {
        Some(last) => last.wrapping_shr(shift).saturating_add(1),
        None => 0,
    }
}

/// Words of the map of a device of `sectors`.
pub(crate) fn words_for(sectors: u64, shift: u32) -> usize {
    usize::try_from(blocks_for(sectors, shift).div_ceil(WORD_BITS)).unwrap_or(usize::MAX)
}

/// What [`DirtyMap::next`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// A run of dirty blocks, cut at the end of the device. It may go on after that.
    Found {
        /// First sector: a multiple of the block.
        start: u64,
        /// Length in sectors, not 0.
        sectors: u64,
    },
    /// There is none up to the end of the device.
    Nothing,
    /// There is none before this sector; not looked further.
    ContinueAt(u64),
}

/// The dirty map of one device. See the module documentation.
///
/// # Invariants
///
/// `words` holds at least `blocks` bits, and none beyond `blocks` is ever set.
pub(crate) struct DirtyMap<S> {
    words: S,
    sectors: u64,
    blocks: u64,
    shift: u32,
    count: AtomicU64,
}

impl<S: Deref<Target = [AtomicU64]>> DirtyMap<S> {
    /// An empty map on `words`, which are all zero. None when they are fewer than
    /// [`words_for`] the device, or its size is beyond what the block layer has (2^63 sectors).
    pub(crate) fn new(words: S, sectors: u64, shift: u32) -> Option<Self> {
        if sectors > 1 << 63 || shift > 32 || words.len() < words_for(sectors, shift) {
            return None;
        }
        Some(Self {
            words,
            sectors,
            blocks: blocks_for(sectors, shift),
            shift,
            count: AtomicU64::new(0),
        })
    }

    /// Size of the device in sectors.
    #[inline]
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// log2 of the sectors in a block.
    #[inline]
    pub(crate) fn shift(&self) -> u32 {
        self.shift
    }

    /// Dirty blocks.
    #[inline]
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Relaxed)
    }

    /// Marks every block that `sectors` sectors from `start` on touch, and returns how many of them
    /// were clean. What lies beyond the end of the device is ignored. One step per 64 blocks.
    pub(crate) fn mark(&self, start: u64, sectors: u64) -> u64 {
        let end = start.saturating_add(sectors).min(self.sectors);
        if start >= end {
            return 0;
        }
        let mut newly = 0_u64;
        self.each_word(
            self.block_of(start),
            blocks_for(end, self.shift),
            |word, mask| {
                // Most of what a busy device marks is marked already: do not take the cache line then.
                if word.load(Relaxed) & mask != mask {
                    let old = word.fetch_or(mask, Relaxed);
                    newly = newly.wrapping_add(u64::from((!old & mask).count_ones()));
                }
            },
        );
        if newly != 0 {
            self.count.fetch_add(newly, Relaxed);
        }
        newly
    }

    /// Clears the blocks that lie wholly inside a range, and returns how many of them were dirty. A
    /// range that reaches the end of the device has the last block inside, however short that is.
    /// One step per 64 blocks.
    pub(crate) fn clear_covered(&self, start: u64, sectors: u64) -> u64 {
        let end = start.saturating_add(sectors);
        let first = blocks_for(start, self.shift);
        let end = if end >= self.sectors {
            self.blocks
        } else {
            self.block_of(end)
        };
        let mut cleared = 0_u64;
        self.each_word(first, end, |word, mask| {
            if word.load(Relaxed) & mask != 0 {
                let old = word.fetch_and(!mask, Relaxed);
                cleared = cleared.wrapping_add(u64::from((old & mask).count_ones()));
            }
        });
        if cleared != 0 {
            self.count.fetch_sub(cleared, Relaxed);
        }
        cleared
    }

    /// Whether any block that the range touches is dirty. One step per 64 blocks.
    pub(crate) fn any(&self, start: u64, sectors: u64) -> bool {
        let end = start.saturating_add(sectors).min(self.sectors);
        if start >= end {
            return false;
        }
        let mut found = false;
        self.each_word(
            self.block_of(start),
            blocks_for(end, self.shift),
            |word, mask| found |= word.load(Relaxed) & mask != 0,
        );
        found
    }

    /// The next dirty extent: its first block holds `from` or lies behind it, and it is not longer than
    /// `max_sectors`, but at least one block. Looks at no more than `max_words + 1` words, so that the
    /// caller can breathe between calls; a map of 16 TiB has 4 Mi of them.
    pub(crate) fn next(&self, from: u64, max_sectors: u64, max_words: usize) -> Next {
        if from >= self.sectors {
            return Next::Nothing;
        }
        let (first, bit) = Self::split(self.block_of(from));
        let words = self.words.get(first..).unwrap_or_default();
        let max_words = max_words.max(1);
        let mut mask = u64::MAX.wrapping_shl(bit);
        for (nth, word) in words.iter().take(max_words).enumerate() {
            let bits = word.load(Relaxed) & mask;
            if bits != 0 {
                let block = Self::join(first.wrapping_add(nth), bits.trailing_zeros());
                let max_words = max_words.wrapping_sub(nth);
                return self.extent(block, self.block_of(max_sectors), max_words);
            }
            mask = u64::MAX;
        }
        if words.len() <= max_words {
            return Next::Nothing;
        }
        let next = Self::join(first.wrapping_add(max_words), 0);
        Next::ContinueAt(self.sector_of(next))
    }

    /// Marks what is dirty in `other`, up to the end of this device. The block sizes may differ: each
    /// block is marked that touches a dirty block of the other map.
    ///
    /// For a resize. Takes time proportional to both maps; nothing may change `other` meanwhile.
    pub(crate) fn copy_from<T: Deref<Target = [AtomicU64]>>(&self, other: &DirtyMap<T>) {
        let mut from = 0;
        // Ends: `from` grows in each round.
        loop {
            match other.next(from, u64::MAX, usize::MAX) {
                Next::Found { start, sectors } => {
                    self.mark(start, sectors);
                    from = start.saturating_add(sectors);
                }
                Next::ContinueAt(sector) => from = sector,
                Next::Nothing => return,
            }
        }
    }

    /// The extent that begins with `block`, which was dirty a moment ago.
    fn extent(&self, block: u64, max_blocks: u64, max_words: usize) -> Next {
        let (first, mut bit) = Self::split(block);
        let mut length = 0_u64;
        for word in self
            .words
            .get(first..)
            .unwrap_or_default()
            .iter()
            .take(max_words)
        {
            let run = word.load(Relaxed).wrapping_shr(bit).trailing_ones();
            length = length.wrapping_add(u64::from(run));
            if bit.wrapping_add(run) < u64::BITS || length >= max_blocks {
                break;
            }
            bit = 0;
        }
        let start = self.sector_of(block);
        let sectors = self.sector_of(length.min(max_blocks).max(1));
        Next::Found {
            start,
            sectors: sectors.min(self.sectors.saturating_sub(start)),
        }
    }

    /// Calls `change` for each word of blocks `first..end`, with the bits concerned.
    #[inline]
    fn each_word(&self, first: u64, end: u64, mut change: impl FnMut(&AtomicU64, u64)) {
        if first >= end {
            return;
        }
        let (first, first_bit) = Self::split(first);
        let (last, last_bit) = Self::split(end.wrapping_sub(1));
        // Always there, by the invariant.
        let words = self.words.get(first..=last).unwrap_or_default();
        let mut mask = u64::MAX.wrapping_shl(first_bit);
        for (nth, word) in (first..).zip(words) {
            if nth == last {
                mask &= u64::MAX.wrapping_shr(63_u32.wrapping_sub(last_bit));
            }
            change(word, mask);
            mask = u64::MAX;
        }
    }

    /// The block that a sector lies in.
    #[inline]
    fn block_of(&self, sector: u64) -> u64 {
        sector.wrapping_shr(self.shift)
    }

    /// The first sector of a block, or the length of so many.
    #[inline]
    fn sector_of(&self, block: u64) -> u64 {
        block.wrapping_shl(self.shift)
    }

    /// Word and bit of a block.
    #[inline]
    fn split(block: u64) -> (usize, u32) {
        let word = usize::try_from(block / WORD_BITS).unwrap_or(usize::MAX);
        (word, (block % WORD_BITS) as u32)
    }

    /// The block of a word and bit.
    #[inline]
    fn join(word: usize, bit: u32) -> u64 {
        (word as u64)
            .wrapping_mul(WORD_BITS)
            .wrapping_add(u64::from(bit))
    }
}
