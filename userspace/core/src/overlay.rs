// SPDX-License-Identifier: GPL-2.0-only

//! Which blocks of a volume are staged: what the target keeps beside the volume, and how it is written down.
//!
//! A block is *under* (the volume has it), *data* (the staging file has it at the same offset) or *zero*. What the
//! target holds is the overlay over the volume.
//!
//! # The log
//!
//! ```text
//! | header, 512 | batch | batch | ...      batch: | header, 32 | cell, 136 | cell | ... | zeroes up to 512 |
//! ```
//!
//! A batch holds the cells that changed since the one before, as they are now, and a number that rises by one. It is
//! appended at a checkpoint, behind the fdatasync of the staging file and before the state of the set says
//! that it counts. So a log may be ahead of the state, by at most the last batch, never behind it.
//!
//! Being ahead does no harm. Say the state is that of checkpoint `c`, and the map, the staging file or the volume hold more
//! of a block, written by records behind `c`. All records behind `c` are applied again, in their order, before anybody looks:
//! each writes the bytes that it wrote before, at wherever the block is now. Bytes that no record behind
//! `c` touches were durable at `c` wherever the map of `c` says they are, and a block moves (copied up when it is
//! staged, folded when it is published) only with all its bytes, the copy being durable before the map that names it is.

use std::collections::BTreeMap;

/// Size of a block in bytes.
pub const BLOCK_BYTES: u64 = 4096;

/// Blocks of a cell: 2 MiB.
pub const CELL_BLOCKS: u64 = 512;

const WORDS: usize = 8;

/// Size of a cell in the log in bytes.
const CELL_BYTES: usize = 8 + 16 * WORDS;

/// What the log is written in multiples of, so that a torn write never touches what was there before.
const PIECE_BYTES: usize = 512;

const HEADER_BYTES: usize = PIECE_BYTES;
const BATCH_HEADER_BYTES: usize = 32;
const MAGIC: [u8; 8] = *b"DTLSTAGE";
const BATCH_MAGIC: [u8; 4] = *b"DTSB";
const VERSION: u32 = 1;

/// Where a block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the volume.
    Under,
    /// In the staging file.
    Data,
    /// Nowhere: it is all zero.
    Zero,
}

/// The blocks of 2 MiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cell {
    data: [u64; WORDS],
    zero: [u64; WORDS],
}

/// See the module documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockMap {
    cells: BTreeMap<u64, Cell>,
    /// Cells that changed since the last batch, as they were then.
    changed: BTreeMap<u64, Cell>,
    data_blocks: u64,
    zero_blocks: u64,
}

fn count(words: &[u64; WORDS]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The bits `from..to` of a word.
fn mask(from: u64, to: u64) -> u64 {
    let below = |bit: u64| if bit >= 64 { u64::MAX } else { (1 << bit) - 1 };
    below(to) & !below(from)
}

impl Cell {
    fn get(&self, block: u64) -> Place {
        let (word, bit) = ((block / 64) as usize % WORDS, block % 64);
        if (self.data[word] >> bit) & 1 == 1 {
            Place::Data
        } else if (self.zero[word] >> bit) & 1 == 1 {
            Place::Zero
        } else {
            Place::Under
        }
    }

    fn set(&mut self, from: u64, to: u64, place: Place) {
        for word in 0..WORDS {
            let base = word as u64 * 64;
            let mask = mask(from.max(base) - base, to.max(base) - base);
            if from >= base + 64 || mask == 0 {
                continue;
            }
            self.data[word] &= !mask;
            self.zero[word] &= !mask;
            match place {
                Place::Under => {}
                Place::Data => self.data[word] |= mask,
                Place::Zero => self.zero[word] |= mask,
            }
        }
    }

    /// The first block from `from` on that is elsewhere.
    fn end_of(&self, from: u64, place: Place) -> u64 {
        let mut at = from;
        while at < CELL_BLOCKS {
            let word = (at / 64) as usize % WORDS;
            let here = match place {
                Place::Under => !(self.data[word] | self.zero[word]),
                Place::Data => self.data[word],
                Place::Zero => self.zero[word],
            };
            let same = u64::from((!(here >> (at % 64))).trailing_zeros());
            if at % 64 + same < 64 {
                return at + same;
            }
            at = (at / 64 + 1) * 64;
        }
        CELL_BLOCKS
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl BlockMap {
    /// Where a block is.
    #[must_use]
    pub fn get(&self, block: u64) -> Place {
        let cell = self.cells.get(&(block / CELL_BLOCKS));
        cell.map_or(Place::Under, |cell| cell.get(block % CELL_BLOCKS))
    }

    /// Where the block is, and up to which block, `end` at most, it is the same.
    #[must_use]
    pub fn run(&self, block: u64, end: u64) -> (Place, u64) {
        let place = self.get(block);
        let mut to = block;
        while to < end {
            let number = to / CELL_BLOCKS;
            let base = number * CELL_BLOCKS;
            let Some(cell) = self.cells.get(&number) else {
                if place != Place::Under {
                    break;
                }
                // Up to the next cell that has anything.
                let next = self.cells.range(number..).next();
                to = next.map_or(end, |(next, _)| next * CELL_BLOCKS);
                continue;
            };
            let until = cell.end_of(to - base, place);
            to = base + until;
            if until < CELL_BLOCKS {
                break;
            }
        }
        (place, to.min(end))
    }

    /// The first block from `block` on that is not under.
    #[must_use]
    pub fn next_staged(&self, block: u64) -> Option<u64> {
        let mut from = block % CELL_BLOCKS;
        for (number, cell) in self.cells.range(block / CELL_BLOCKS..) {
            let base = number * CELL_BLOCKS;
            let start = if *number == block / CELL_BLOCKS {
                from
            } else {
                0
            };
            from = 0;
            let found = cell.end_of(start, Place::Under);
            if found < CELL_BLOCKS {
                return Some(base + found);
            }
        }
        None
    }

    /// Puts the blocks `from..to` to a place.
    pub fn set(&mut self, from: u64, to: u64, place: Place) {
        let mut at = from;
        while at < to {
            let (number, end) = (at / CELL_BLOCKS, (at / CELL_BLOCKS + 1) * CELL_BLOCKS);
            let before = self.cells.get(&number).copied().unwrap_or_default();
            let mut cell = before;
            cell.set(at % CELL_BLOCKS, end.min(to) - number * CELL_BLOCKS, place);
            if cell != before {
                self.changed.entry(number).or_insert(before);
                self.put(number, cell);
            }
            at = end;
        }
    }

    fn put(&mut self, number: u64, cell: Cell) {
        let before = if cell.is_empty() {
            self.cells.remove(&number)
        } else {
            self.cells.insert(number, cell)
        };
        let before = before.unwrap_or_default();
        self.data_blocks = self.data_blocks + count(&cell.data) - count(&before.data);
        self.zero_blocks = self.zero_blocks + count(&cell.zero) - count(&before.zero);
    }

    /// How many of the blocks `from..to` are not data.
    #[must_use]
    pub fn missing(&self, from: u64, to: u64) -> u64 {
        let (mut at, mut missing) = (from, 0);
        while at < to {
            let (place, end) = self.run(at, to);
            missing += if place == Place::Data { 0 } else { end - at };
            at = end;
        }
        missing
    }

    /// Bytes of the blocks that are data.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.data_blocks * BLOCK_BYTES
    }

    /// Bytes of the blocks that are zero.
    #[must_use]
    pub fn zero_bytes(&self) -> u64 {
        self.zero_blocks * BLOCK_BYTES
    }

    /// Whether every block is under.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }

    /// Whether it changed since the last batch.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    /// Everything that changed is durable. Gives the blocks that no longer are data, as ranges.
    pub fn on_durable(&mut self) -> Vec<(u64, u64)> {
        let mut freed: Vec<(u64, u64)> = vec![];
        for (number, before) in std::mem::take(&mut self.changed) {
            if count(&before.data) == 0 {
                continue;
            }
            for block in number * CELL_BLOCKS..(number + 1) * CELL_BLOCKS {
                let was = before.get(block % CELL_BLOCKS) == Place::Data;
                if !was || self.get(block) == Place::Data {
                    continue;
                }
                match freed.last_mut() {
                    Some(range) if range.1 == block => range.1 += 1,
                    _ => freed.push((block, block + 1)),
                }
            }
        }
        freed
    }

    /// Goes back to what the last batch said.
    pub fn reset(&mut self) {
        for (number, cell) in std::mem::take(&mut self.changed) {
            self.put(number, cell);
        }
    }

    /// The batch of that number with all cells that changed; `all`: with all there are.
    #[must_use]
    pub fn batch(&self, number: u64, all: bool) -> Vec<u8> {
        let mut cells = vec![];
        let mut push = |number: &u64, cell: &Cell| {
            cells.extend(number.to_le_bytes());
            for word in cell.data.iter().chain(&cell.zero) {
                cells.extend(word.to_le_bytes());
            }
        };
        if all {
            self.cells
                .iter()
                .for_each(|(number, cell)| push(number, cell));
        } else {
            for number in self.changed.keys() {
                push(number, &self.cells.get(number).copied().unwrap_or_default());
            }
        }
        let mut bytes = vec![0; BATCH_HEADER_BYTES];
        bytes[..4].copy_from_slice(&BATCH_MAGIC);
        bytes[8..16].copy_from_slice(&number.to_le_bytes());
        bytes[16..24].copy_from_slice(&((cells.len() / CELL_BYTES) as u64).to_le_bytes());
        bytes.append(&mut cells);
        let crc = crc32fast::hash(&bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(PIECE_BYTES), 0);
        bytes
    }
}

/// The first piece of a log: which stage of the set it belongs to, and the number before its first batch.
#[must_use]
pub fn log_header(stage: u64, before: u64) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    bytes[..8].copy_from_slice(&MAGIC);
    bytes[12..16].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&stage.to_le_bytes());
    bytes[24..32].copy_from_slice(&before.to_le_bytes());
    let crc = crc32fast::hash(&bytes[12..]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// A log read back.
#[derive(Debug, PartialEq, Eq)]
pub struct Log {
    /// What it says.
    pub map: BlockMap,
    /// Number of the last batch.
    pub last: u64,
    /// Where the next one goes.
    pub end: u64,
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_le_bytes(field.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(field.try_into().ok()?))
}

/// Reads the log of that stage up to its end or to the first batch that is torn. `None`: it is no such log.
#[must_use]
pub fn read_log(bytes: &[u8], stage: u64) -> Option<Log> {
    let header = bytes.get(..HEADER_BYTES)?;
    let right = header[..8] == MAGIC
        && u32_at(header, 8)? == crc32fast::hash(&header[12..])
        && u32_at(header, 12)? == VERSION
        && u64_at(header, 16)? == stage;
    if !right {
        return None;
    }
    let (mut map, mut last, mut at) = (BlockMap::default(), u64_at(header, 24)?, HEADER_BYTES);
    while let Some(end) = read_batch(&bytes[at..], last.checked_add(1)?, &mut map) {
        last += 1;
        at += end;
    }
    map.changed.clear();
    let end = at as u64;
    Some(Log { map, last, end })
}

/// Takes in the batch of that number; gives its length.
fn read_batch(bytes: &[u8], number: u64, map: &mut BlockMap) -> Option<usize> {
    if bytes.get(..4)? != BATCH_MAGIC || u64_at(bytes, 8)? != number {
        return None;
    }
    let cells = usize::try_from(u64_at(bytes, 16)?).ok()?;
    let end = cells
        .checked_mul(CELL_BYTES)?
        .checked_add(BATCH_HEADER_BYTES)?;
    if u32_at(bytes, 4)? != crc32fast::hash(bytes.get(8..end)?) {
        return None;
    }
    for item in bytes[BATCH_HEADER_BYTES..end].chunks_exact(CELL_BYTES) {
        let mut cell = Cell::default();
        for word in 0..WORDS {
            cell.data[word] = u64_at(item, 8 + word * 8)?;
            cell.zero[word] = u64_at(item, 8 + (WORDS + word) * 8)?;
        }
        map.put(u64_at(item, 0)?, cell);
    }
    Some(end.next_multiple_of(PIECE_BYTES))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 3 * CELL_BLOCKS;

    fn changes() -> impl Strategy<Value = Vec<(u64, u64, u8)>> {
        prop::collection::vec((0..BLOCKS, 1..700_u64, 0..3_u8), 0..30)
    }

    fn place(number: u8) -> Place {
        [Place::Under, Place::Data, Place::Zero][usize::from(number)]
    }

    proptest! {
        #[test]
        fn a_map_is_what_was_set_and_its_log_says_the_same(rounds in prop::collection::vec(changes(), 1..4), torn: prop::sample::Index) {
            let mut model = vec![Place::Under; usize::try_from(BLOCKS).unwrap() + 700];
            let mut map = BlockMap::default();
            let mut log = log_header(5, 0).to_vec();
            let mut states = vec![map.clone()];
            for (number, changes) in rounds.iter().enumerate() {
                for (from, blocks, kind) in changes {
                    map.set(*from, from + blocks, place(*kind));
                    for block in *from..from + blocks {
                        model[usize::try_from(block).unwrap()] = place(*kind);
                    }
                }
                log.extend(map.batch(number as u64 + 1, false));
                map.on_durable();
                states.push(map.clone());
            }
            let mut at = 0;
            let end = model.len() as u64;
            while at < end {
                let (found, to) = map.run(at, end);
                prop_assert!(to > at);
                for block in at..to {
                    prop_assert_eq!(model[usize::try_from(block).unwrap()], found);
                    prop_assert_eq!(map.get(block), found);
                }
                at = to;
            }
            let count = |place| model.iter().filter(|p| **p == place).count() as u64;
            prop_assert_eq!(map.data_bytes(), count(Place::Data) * BLOCK_BYTES);
            prop_assert_eq!(map.zero_bytes(), count(Place::Zero) * BLOCK_BYTES);
            prop_assert_eq!(map.missing(3, 900), 897 - model[3..900].iter().filter(|p| **p == Place::Data).count() as u64);
            let first = model.iter().position(|p| *p != Place::Under).map(|p| p as u64);
            prop_assert_eq!(map.next_staged(0), first);

            let read = read_log(&log, 5).unwrap();
            prop_assert_eq!((&read.map, read.last, read.end), (&map, rounds.len() as u64, log.len() as u64));
            prop_assert!(read_log(&log, 6).is_none());
            // Rewritten as a whole it says the same.
            let mut whole = log_header(5, read.last).to_vec();
            whole.extend(map.batch(read.last + 1, true));
            prop_assert_eq!(&read_log(&whole, 5).unwrap().map, &map);
            // Any damage takes away whole batches from there on, and nothing else.
            let at = torn.index(log.len());
            log[at] ^= 4;
            match read_log(&log, 5) {
                None => prop_assert!(at < HEADER_BYTES),
                Some(read) => prop_assert_eq!(&read.map, &states[usize::try_from(read.last).unwrap()]),
            }
        }

        #[test]
        fn what_is_not_durable_can_be_taken_back(first in changes(), second in changes()) {
            let mut map = BlockMap::default();
            let apply = |map: &mut BlockMap, changes: &[(u64, u64, u8)]| {
                for (from, blocks, kind) in changes {
                    map.set(*from, from + blocks, place(*kind));
                }
            };
            apply(&mut map, &first);
            map.on_durable();
            let before = map.clone();
            apply(&mut map, &second);
            let mut after = map.clone();
            for (from, to) in after.on_durable() {
                for block in from..to {
                    prop_assert_eq!((before.get(block), map.get(block) == Place::Data), (Place::Data, false));
                }
            }
            map.reset();
            prop_assert_eq!(map, before);
        }
    }

    #[test]
    fn large_ranges_cost_little() {
        let mut map = BlockMap::default();
        let tib = (1 << 40) / BLOCK_BYTES;
        map.set(7, tib, Place::Zero);
        assert_eq!(map.run(7, u64::MAX), (Place::Zero, tib));
        assert_eq!(map.data_bytes(), 0);
        assert!(map.batch(1, false).len() < 100 << 20);
        map.set(0, tib, Place::Under);
        assert!(map.is_empty());
        assert_eq!(map.run(0, u64::MAX), (Place::Under, u64::MAX));
    }
}
