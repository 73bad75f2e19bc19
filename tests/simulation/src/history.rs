// SPDX-License-Identifier: GPL-2.0-only

//! What the source's devices held at each position of each stream.

use std::collections::BTreeMap;

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Bytes that are hashed together.
const BLOCK: usize = 4096;

/// A device's content in eight bytes, cheap to keep up to date.
#[derive(Clone, Debug, Default)]
pub struct Digest {
    blocks: Vec<u64>,
    sum: u64,
}

fn hash(index: usize, block: &[u8]) -> u64 {
    xxh3_64_with_seed(block, index as u64)
}

impl Digest {
    pub fn of(content: &[u8]) -> Self {
        let hashes = content.chunks(BLOCK).enumerate();
        let blocks: Vec<u64> = hashes.map(|(index, block)| hash(index, block)).collect();
        let sum = blocks
            .iter()
            .fold(0_u64, |sum, block| sum.wrapping_add(*block));
        Self { blocks, sum }
    }

    /// The bytes of that range are others now.
    pub fn update(&mut self, content: &[u8], start: usize, bytes: usize) {
        if bytes == 0 {
            return;
        }
        for index in start / BLOCK..=(start + bytes - 1) / BLOCK {
            let end = ((index + 1) * BLOCK).min(content.len());
            let now = hash(index, &content[index * BLOCK..end]);
            let before = std::mem::replace(&mut self.blocks[index], now);
            self.sum = self.sum.wrapping_sub(before).wrapping_add(now);
        }
    }

    pub fn sum(&self) -> u64 {
        self.sum
    }
}

/// A stream, and a record of it.
type Place = ([u8; 16], u64);

/// See the module documentation.
#[derive(Default)]
pub struct History {
    /// By stream and record: the devices, by label, once that record was made.
    at: BTreeMap<Place, Vec<u64>>,
    /// The same in full, for a schedule that is looked at.
    full: Option<BTreeMap<Place, Vec<Vec<u8>>>>,
}

impl History {
    pub fn note(&mut self, stream: [u8; 16], seq: u64, devices: Vec<u64>) {
        self.at.insert((stream, seq), devices);
    }

    pub fn keep_all(&mut self) {
        self.full = Some(BTreeMap::new());
    }

    pub fn note_full(
        &mut self,
        stream: [u8; 16],
        seq: u64,
        contents: impl FnOnce() -> Vec<Vec<u8>>,
    ) {
        if let Some(full) = &mut self.full {
            full.insert((stream, seq), contents());
        }
    }

    /// Which sectors differ from what a device held at that record: their numbers, what they hold, and what they held.
    pub fn explain(&self, stream: [u8; 16], seq: u64, device: usize, content: &[u8]) -> String {
        let full = self
            .full
            .as_ref()
            .and_then(|full| full.get(&(stream, seq))?.get(device));
        let Some(held) = full else {
            return String::new();
        };
        let number = |sector: &[u8]| {
            sector
                .first_chunk()
                .map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        let sectors = content.chunks(512).zip(held.chunks(512)).enumerate();
        let other: Vec<_> = sectors
            .filter(|(_, (a, b))| a != b)
            .map(|(at, (a, b))| format!("{at}: {} for {}", number(a), number(b)))
            .collect();
        format!(
            " (sectors, the numbers of their writes: {})",
            other.join(", ")
        )
    }

    pub fn get(&self, stream: [u8; 16], seq: u64, device: usize) -> Option<u64> {
        self.at.get(&(stream, seq))?.get(device).copied()
    }
}
