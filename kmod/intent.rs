// SPDX-License-Identifier: GPL-2.0-only

//! The write-intent map of a device: which regions may differ from the target after a power cut.
//!
//! A region is `1 << shift` sectors. Before the first change of a region goes ahead, its mark is durable in the
//! intent file; `intent_layout.rs` has the file. Here is what is known of the marks in memory. All of it is guarded
//! by the stream's lock.
//!
//! # The bits of a region
//!
//! | bit | says |
//! |---|---|
//! | `want` | the file is to hold the mark |
//! | `image` | what was last written to the file, or is being written right now, holds it |
//! | `safe` | it is wanted, and on disk whatever happens: changes may go ahead |
//! | `recent` | it was changed, or read for a resync, since the last round of clearing |
//! | `suspect` | the mark comes from an earlier life of the file: the region has to be compared |
//!
//! Invariant: `safe` is a subset of `want`, and of both the last and the next content of the file. So a power cut at
//! any moment of a write of the file leaves every safe mark there. It holds because a mark becomes safe only when the write
//! that has it is complete, or, while no write is under way, when the last one had it; and a mark that is no longer
//! wanted stops being safe before the file is written without it.
//!
//! # When a mark may go
//!
//! Rounds follow each other. At round *k* a mark goes if its region was not touched since round *k-1*, everything in
//! the stream before the end of round *k-1* is durable on the target and on the disk, no block of it is dirty, and it is not
//! suspect. Then every change of the region has a number from before the end of round *k-1*, so both sides have it; or it is not
//! in the stream, and then it left a dirty block, which only a SYNC read clears: that touches the region as well.

use core::ops::DerefMut;

/// Bytes of marks in one sector of the file, after its 64 bytes of head.
pub(crate) const CHUNK_BYTES: usize = 448;

/// Words of marks in one sector of the file.
pub(crate) const CHUNK_WORDS: usize = CHUNK_BYTES / 8;

/// Regions in one sector of the file.
pub(crate) const CHUNK_REGIONS: u64 = CHUNK_BYTES as u64 * 8;

/// log2 of the sectors in the smallest region: 64 KiB.
pub(crate) const SHIFT_MIN: u32 = 7;

/// log2 of the sectors in the largest region: 1 GiB.
pub(crate) const SHIFT_MAX: u32 = 21;

/// Five words for each 64 regions, side by side: what one change looks at lies in one cache line.
#[derive(Clone, Copy, Default)]
pub(crate) struct Cell {
    safe: u64,
    want: u64,
    image: u64,
    recent: u64,
    suspect: u64,
}

/// What a sector of the file that holds marks needs.
#[derive(Clone, Copy, Default)]
pub(crate) struct Chunk {
    /// Sector of the file.
    place: u32,
    /// It is to hold other marks than it does.
    due: bool,
    /// A write of it is under way.
    flying: bool,
}

/// Regions of `1 << shift` sectors that cover a device of `sectors`.
pub(crate) fn regions_for(sectors: u64, shift: u32) -> u64 {
    match sectors.checked_sub(1) {
        Some(last) => last.wrapping_shr(shift).saturating_add(1),
        None => 0,
    }
}

/// Sectors of the file that the marks of a device take.
pub(crate) fn chunks_for(sectors: u64, shift: u32) -> usize {
    usize::try_from(regions_for(sectors, shift).div_ceil(CHUNK_REGIONS)).unwrap_or(usize::MAX)
}

/// The write-intent map of one device. See the module documentation.
///
/// # Invariants
///
/// `cells` has [`CHUNK_WORDS`] cells for each of `chunks`, which cover all regions; no bit beyond `regions` is set.
pub(crate) struct IntentMap<C, P> {
    cells: C,
    chunks: P,
    shift: u32,
    sectors: u64,
    regions: u64,
    marked: u64,
    suspects: u64,
    /// Changes that had to wait for a mark.
    misses: u64,
    /// The stream's position up to which the target had everything at the last round that cleared something.
    acked: u64,
    /// Set whenever a chunk that is not flying is due; a look at all of them that finds none takes it back.
    pending: bool,
}

/// The part of word `word` that regions `first..=last` cover.
#[inline]
fn mask_of(word: u64, first: u64, last: u64) -> u64 {
    let from = first.saturating_sub(word.wrapping_mul(64));
    let to = last.saturating_sub(word.wrapping_mul(64)).min(63);
    let up = u64::MAX.wrapping_shl(from as u32);
    let down = u64::MAX.wrapping_shr(63_u64.wrapping_sub(to) as u32);
    up & down
}

impl<C: DerefMut<Target = [Cell]>, P: DerefMut<Target = [Chunk]>> IntentMap<C, P> {
    /// A map without marks. `None` if `cells` or `chunks` are too few, or `shift` is out of range.
    pub(crate) fn new(cells: C, chunks: P, sectors: u64, shift: u32) -> Option<Self> {
        let needed = chunks_for(sectors, shift);
        let fits = (SHIFT_MIN..=SHIFT_MAX).contains(&shift)
            && chunks.len() >= needed
            && cells.len() / CHUNK_WORDS >= needed;
        fits.then_some(Self {
            cells,
            chunks,
            shift,
            sectors,
            regions: regions_for(sectors, shift),
            marked: 0,
            suspects: 0,
            misses: 0,
            acked: 0,
            pending: false,
        })
    }

    /// Marked regions.
    pub(crate) fn marked(&self) -> u64 {
        self.marked
    }

    /// Suspect regions.
    pub(crate) fn suspects(&self) -> u64 {
        self.suspects
    }

    /// Changes that had to wait for a mark.
    pub(crate) fn misses(&self) -> u64 {
        self.misses
    }

    /// Chunks of the file.
    pub(crate) fn chunks(&self) -> usize {
        chunks_for(self.sectors, self.shift)
    }

    /// The sector of the file that holds a chunk.
    pub(crate) fn place(&self, chunk: usize) -> u32 {
        self.chunks.get(chunk).map_or(0, |chunk| chunk.place)
    }

    /// Sets the sector of the file that holds a chunk.
    pub(crate) fn set_place(&mut self, chunk: usize, place: u32) {
        if let Some(chunk) = self.chunks.get_mut(chunk) {
            chunk.place = place;
        }
    }

    /// See the field.
    pub(crate) fn acked(&self) -> u64 {
        self.acked
    }

    /// First and last region of a range, which is not empty.
    #[inline]
    fn span(&self, start: u64, sectors: u64) -> (u64, u64) {
        let last = start.saturating_add(sectors).saturating_sub(1);
        let most = self.regions.saturating_sub(1);
        let region = |sector: u64| sector.wrapping_shr(self.shift).min(most);
        (region(start), region(last))
    }

    /// Whether a change of a range may go ahead; if so, its regions count as touched.
    #[inline]
    pub(crate) fn touch(&mut self, start: u64, sectors: u64) -> bool {
        let (first, last) = self.span(start, sectors);
        for word in first / 64..=last / 64 {
            let mask = mask_of(word, first, last);
            match self.cells.get_mut(word as usize) {
                Some(cell) if cell.safe & mask == mask => cell.recent |= mask,
                _ => return false,
            }
        }
        true
    }

    /// The regions of a range were read for a resync, or changed otherwise: their marks stay for a round.
    #[inline]
    pub(crate) fn note(&mut self, start: u64, sectors: u64) {
        let (first, last) = self.span(start, sectors);
        for word in first / 64..=last / 64 {
            if let Some(cell) = self.cells.get_mut(word as usize) {
                cell.recent |= mask_of(word, first, last);
            }
        }
    }

    /// Wants the regions of a range marked. True: they are already safe; else the file is to be written, and the
    /// change asks again. `first_try` counts the change.
    pub(crate) fn mark(&mut self, start: u64, sectors: u64, first_try: bool) -> bool {
        let (first, last) = self.span(start, sectors);
        self.misses = self.misses.wrapping_add(u64::from(first_try));
        let mut safe = true;
        for word in first / 64..=last / 64 {
            safe &= self.mark_word(word as usize, mask_of(word, first, last));
        }
        safe
    }

    fn mark_word(&mut self, word: usize, mask: u64) -> bool {
        let (Some(cell), Some(chunk)) = (
            self.cells.get_mut(word),
            self.chunks.get_mut(word / CHUNK_WORDS),
        ) else {
            // Beyond the map: there is no such sector.
            return true;
        };
        let new = mask & !cell.want;
        cell.want |= mask;
        cell.recent |= mask;
        self.marked = self.marked.wrapping_add(u64::from(new.count_ones()));
        if !chunk.flying {
            // It was to be cleared, and the file still has it.
            cell.safe |= cell.image & mask;
        }
        let safe = cell.safe & mask == mask;
        // The end of a write looks again at what it lacks.
        if !safe && !chunk.flying {
            chunk.due = true;
            self.pending = true;
        }
        safe
    }

    /// Whether the whole range is safe.
    #[allow(dead_code, reason = "for the tests on the host")]
    pub(crate) fn is_safe(&self, start: u64, sectors: u64) -> bool {
        let (first, last) = self.span(start, sectors);
        (first / 64..=last / 64).all(|word| {
            let mask = mask_of(word, first, last);
            let cell = self.cells.get(word as usize);
            cell.is_none_or(|cell| cell.safe & mask == mask)
        })
    }

    // -----------------------------------------------------------------------------------------
    // The file
    // -----------------------------------------------------------------------------------------

    /// Begins to write the next chunk that needs it, from `from` on: gives its number and fills `bits` with what it is
    /// to hold. Ends with [`IntentMap::written`].
    pub(crate) fn begin_write(
        &mut self,
        from: usize,
        bits: &mut [u8; CHUNK_BYTES],
    ) -> Option<usize> {
        if !self.pending {
            return None;
        }
        let due = |chunk: &Chunk| !chunk.flying && chunk.due;
        let Some(found) = self.chunks.get(from..)?.iter().position(due) else {
            // Those that fly tell at the end of their write whether they are due again.
            self.pending = from != 0;
            return None;
        };
        let number = from.saturating_add(found);
        let chunk = self.chunks.get_mut(number)?;
        *chunk = Chunk {
            place: chunk.place,
            flying: true,
            ..Chunk::default()
        };
        let first = number.saturating_mul(CHUNK_WORDS);
        let cells = self.cells.get_mut(first..)?.iter_mut();
        for (cell, bytes) in cells.zip(bits.chunks_exact_mut(8)) {
            cell.image = cell.want;
            bytes.copy_from_slice(&cell.image.to_le_bytes());
        }
        Some(number)
    }

    /// Ends the write of a chunk.
    pub(crate) fn written(&mut self, number: usize, success: bool) {
        let Some(chunk) = self.chunks.get_mut(number) else {
            return;
        };
        chunk.flying = false;
        let first = number.saturating_mul(CHUNK_WORDS);
        let cells = self.cells.get_mut(first..).unwrap_or_default();
        for cell in cells.iter_mut().take(CHUNK_WORDS) {
            if success {
                cell.safe = cell.image & cell.want;
            } else {
                // The file holds the old or the new content: what was safe before is in both.
                cell.image = cell.safe;
            }
            chunk.due |= cell.want != cell.image;
        }
        self.pending |= chunk.due;
    }

    /// Takes the marks of a chunk from the file: they are there, and their regions are suspect.
    pub(crate) fn inherit(&mut self, number: usize, bits: &[u8]) {
        let first = number.saturating_mul(CHUNK_WORDS);
        for (nth, bytes) in bits.chunks_exact(8).enumerate() {
            let word = first.saturating_add(nth);
            let Some(cell) = self.cells.get_mut(word) else {
                return;
            };
            let mut bits = [0; 8];
            bits.copy_from_slice(bytes);
            let within = match (word as u64).wrapping_mul(64) {
                begin if begin >= self.regions => 0,
                begin => mask_of(word as u64, begin, self.regions.saturating_sub(1)),
            };
            let bits = u64::from_le_bytes(bits) & within;
            let count = u64::from(bits.count_ones());
            *cell = Cell {
                safe: bits,
                want: bits,
                image: bits,
                recent: bits,
                suspect: bits,
            };
            self.marked = self.marked.wrapping_add(count);
            self.suspects = self.suspects.wrapping_add(count);
        }
    }

    /// Wants every region marked: nobody knows what was changed before. To be written before anything goes ahead.
    pub(crate) fn mark_all(&mut self) {
        if self.sectors != 0 {
            self.mark(0, self.sectors, false);
        }
    }

    /// Takes over what a map of another size knows; `self` has the places of its chunks and no marks. What the device
    /// has gained is not marked.
    pub(crate) fn take_over(&mut self, old: &Self) {
        let Some(last) = self.regions.min(old.regions).checked_sub(1) else {
            return;
        };
        for word in 0..=last / 64 {
            let mask = mask_of(word, 0, last);
            let index = word as usize;
            if let (Some(cell), Some(from)) = (self.cells.get_mut(index), old.cells.get(index)) {
                *cell = Cell {
                    safe: from.safe & mask,
                    want: from.want & mask,
                    image: from.image & mask,
                    recent: from.recent & mask,
                    suspect: from.suspect & mask,
                };
                self.marked = self.marked.wrapping_add(u64::from(cell.want.count_ones()));
                self.suspects = self
                    .suspects
                    .wrapping_add(u64::from(cell.suspect.count_ones()));
            }
        }
        (self.misses, self.acked) = (old.misses, old.acked);
        for (chunk, from) in self.chunks.iter_mut().zip(old.chunks.iter()) {
            chunk.due = from.due;
            self.pending |= chunk.due;
        }
    }

    // -----------------------------------------------------------------------------------------
    // Clearing
    // -----------------------------------------------------------------------------------------

    /// A step of a round: takes away the marks of `words` words from `from` on that may go, where `is_dirty` says whether
    /// a range of the device has dirty blocks. `acked` is the position up to which the target has everything, which is not
    /// before the end of the last round. Gives where to go on; `None` at the end.
    pub(crate) fn clear_step(
        &mut self,
        from: usize,
        words: usize,
        acked: u64,
        is_dirty: impl Fn(u64, u64) -> bool,
    ) -> Option<usize> {
        let shift = self.shift;
        let mut gone = 0_u64;
        for word in from..from.saturating_add(words) {
            let (Some(cell), Some(chunk)) = (
                self.cells.get_mut(word),
                self.chunks.get_mut(word / CHUNK_WORDS),
            ) else {
                break;
            };
            let mut idle = cell.want & cell.safe & !cell.recent & !cell.suspect;
            cell.recent = 0;
            let mut left = idle;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left.wrapping_sub(1);
                let region = (word as u64).wrapping_mul(64).wrapping_add(u64::from(bit));
                if is_dirty(region.wrapping_shl(shift), 1 << shift) {
                    idle &= !(1 << bit);
                }
            }
            if idle != 0 {
                cell.want &= !idle;
                cell.safe &= !idle;
                chunk.due = true;
                gone = gone.wrapping_add(u64::from(idle.count_ones()));
            }
        }
        if gone != 0 {
            self.marked = self.marked.wrapping_sub(gone);
            self.acked = self.acked.max(acked);
            self.pending = true;
        }
        let next = from.saturating_add(words);
        (next < self.chunks().saturating_mul(CHUNK_WORDS)).then_some(next)
    }

    /// The next run of suspect regions at or behind a sector: first sector and length, cut at the end of the device.
    /// Looks at no more than `words` words, which are two at least: else where to go on.
    pub(crate) fn next_suspect(&self, from: u64, words: usize) -> Result<(u64, u64), Option<u64>> {
        if from >= self.sectors {
            // The last region may not be a whole one.
            return Err(None);
        }
        let mut region = from.wrapping_shr(self.shift);
        let mut start = None;
        for _ in 0..words {
            if region >= self.regions {
                break;
            }
            let cell = self.cells.get((region / 64) as usize);
            let bits = cell
                .map_or(0, |cell| cell.suspect)
                .wrapping_shr((region % 64) as u32);
            let run = match start {
                None => bits.trailing_zeros(),
                Some(_) => bits.trailing_ones(),
            };
            let left = 64_u64.wrapping_sub(region % 64);
            let step = u64::from(run).min(left);
            region = region.wrapping_add(step);
            if step < left {
                match start {
                    None => start = Some(region),
                    Some(_) => break,
                }
            }
        }
        let sector = |region: u64| region.wrapping_shl(self.shift).min(self.sectors);
        match start {
            // Found by the last look, which was not enough to see how long it is.
            Some(first) if first == region => Err(Some(sector(first))),
            Some(first) => {
                let end = region.min(self.regions);
                Ok((sector(first), sector(end).wrapping_sub(sector(first))))
            }
            None if region >= self.regions => Err(None),
            None => Err(Some(sector(region))),
        }
    }

    /// Makes the marked regions of a range suspect: the target lacks what it once had, or was to have.
    pub(crate) fn suspect(&mut self, start: u64, sectors: u64) {
        let (first, last) = self.span(start, sectors);
        for word in first / 64..=last / 64 {
            if let Some(cell) = self.cells.get_mut(word as usize) {
                let new = cell.want & !cell.suspect & mask_of(word, first, last);
                cell.suspect |= new;
                self.suspects = self.suspects.wrapping_add(u64::from(new.count_ones()));
            }
        }
    }

    /// The suspect regions wholly inside a range are known to be equal on both sides, or on their way to be, by records
    /// that the target has.
    pub(crate) fn settle(&mut self, start: u64, sectors: u64) {
        let end = start.saturating_add(sectors);
        let first = start
            .saturating_add((1 << self.shift) - 1)
            .wrapping_shr(self.shift);
        let end = if end >= self.sectors {
            self.regions
        } else {
            end.wrapping_shr(self.shift)
        };
        let Some(last) = end.checked_sub(1).filter(|last| *last >= first) else {
            return;
        };
        for word in first / 64..=last / 64 {
            if let Some(cell) = self.cells.get_mut(word as usize) {
                let gone = cell.suspect & mask_of(word, first, last);
                cell.suspect &= !gone;
                cell.recent |= gone;
                self.suspects = self.suspects.wrapping_sub(u64::from(gone.count_ones()));
            }
        }
    }
}
