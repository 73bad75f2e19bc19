// SPDX-License-Identifier: GPL-2.0-only

//! The intent file of a stream: opened, read, given to devices, written.
//!
//! Whoever has the store may sleep: it is behind a mutex of the stream. The marks themselves are behind the stream's
//! spinlock (`intent.rs`).

use crate::{
    abi,
    ffi::{
        intent_file::{crc32, IntentFile, BLOCK_BYTES},
        pages::Pages,
        time,
    },
    intent::{chunks_for, Cell, Chunk, IntentMap, CHUNK_BYTES, CHUNK_WORDS},
    intent_layout::{
        parse, version_of, Content, DeviceSector, Head, MarksSector, Sector, BASES_MAX, MARKS_AT,
        SECTOR,
    },
    stream::filled,
};
use kernel::prelude::*;

/// The map of a device.
pub(crate) type Map = IntentMap<KVVec<Cell>, KVVec<Chunk>>;

/// Sectors of a block.
const PER_BLOCK: usize = BLOCK_BYTES / SECTOR;

/// What a stream wants of its intent file.
pub(crate) struct Wish {
    pub(crate) fd: i32,
    pub(crate) format: bool,
    pub(crate) shift: u32,
    pub(crate) source: [u8; 16],
    pub(crate) set: [u8; 64],
    pub(crate) stream: [u8; 16],
}

/// See the module documentation.
///
/// # Invariants
///
/// `image` is what was last written to the file, or what waits to be, block by block.
pub(crate) struct Store {
    file: IntentFile,
    image: Pages,
    head: Head,
    found: u32,
    found_version: u64,
    /// By base of the head: what the target must have of it.
    acked: [u64; BASES_MAX],
    /// A bit for each block that waits to be written.
    waiting: KVVec<u64>,
    writes: u64,
}

impl Store {
    /// Opens a file and reads it; writes nothing yet, see [`Store::begin`].
    pub(crate) fn open(wish: &Wish) -> Result<Self> {
        let mut file = IntentFile::open(wish.fd)?;
        let image = Pages::new(file.blocks() * BLOCK_BYTES)?;
        file.read_all(&image)?;
        let waiting = filled(file.blocks().div_ceil(64), || 0_u64)?;
        let mut id = [0; 16];
        time::random_bytes(&mut id);
        let fresh = Head {
            version: 0,
            file: id,
            shift: wish.shift,
            life: 0,
            void: false,
            source: wish.source,
            set: wish.set,
            bases: Default::default(),
        };
        let mut store = Self {
            file,
            image,
            head: fresh,
            found: abi::FOUND_NEW,
            found_version: 0,
            acked: [0; BASES_MAX],
            waiting,
            writes: 0,
        };
        if !wish.format {
            store.found = store.take_up(wish);
            if store.found != abi::FOUND_KNOWN {
                store.head = fresh;
            }
        }
        store.head.enter(wish.stream);
        store.load_acked();
        Ok(store)
    }

    /// Takes over the head that is in the file, if it can be used; gives `FOUND_*`.
    fn take_up(&mut self, wish: &Wish) -> u32 {
        let head = match parse(&self.sector(0), None, crc32) {
            Content::Head(head) => head,
            Content::OtherFormat => return abi::FOUND_FORMAT,
            Content::Free if self.is_empty() => return abi::FOUND_NEW,
            _ => return abi::FOUND_DAMAGED,
        };
        let region = 1_u64.checked_shl(head.shift).unwrap_or(0) * abi::SECTOR_BYTES;
        let sizes = u64::from(abi::REGION_BYTES_MIN)..=u64::from(abi::REGION_BYTES_MAX);
        self.head = head;
        self.found_version = self.last_version();
        self.head.version = self.found_version;
        if head.source != wish.source || head.set != wish.set {
            return abi::FOUND_FOREIGN;
        }
        if head.void {
            return abi::FOUND_VOID;
        }
        let damaged = |content| matches!(content, Content::Damaged | Content::OtherFormat);
        if !sizes.contains(&region) || !head.covers_any() || self.contents().any(damaged) {
            return abi::FOUND_DAMAGED;
        }
        abi::FOUND_KNOWN
    }

    fn sector(&self, number: usize) -> Sector {
        self.image.read(number * SECTOR).unwrap_or([0; SECTOR])
    }

    fn sectors(&self) -> usize {
        self.file.blocks() * PER_BLOCK
    }

    /// What is in each sector.
    fn contents(&self) -> impl Iterator<Item = Content> + '_ {
        let file = self.head.file;
        (0..self.sectors()).map(move |number| parse(&self.sector(number), Some(file), crc32))
    }

    fn is_empty(&self) -> bool {
        (0..self.sectors()).all(|number| self.sector(number).iter().all(|byte| *byte == 0))
    }

    fn last_version(&self) -> u64 {
        let ours = |number: usize| {
            let sector = self.sector(number);
            match parse(&sector, Some(self.head.file), crc32) {
                Content::Free | Content::Damaged => 0,
                _ => version_of(&sector),
            }
        };
        (0..self.sectors()).map(ours).max().unwrap_or(0)
    }

    fn load_acked(&mut self) {
        let mut acked = [0; BASES_MAX];
        for content in self.contents() {
            if let Content::Marks(marks) = content {
                for (base, acked) in self.head.bases.iter().zip(&mut acked) {
                    if base.life == marks.life {
                        *acked = marks.acked.max(*acked);
                    }
                }
            }
        }
        self.acked = acked;
    }

    /// Writes the head: from here on the file is the stream's.
    pub(crate) fn begin(&mut self) -> Result {
        self.put_head()
    }

    fn put_head(&mut self) -> Result {
        self.head.version += 1;
        let sector = self.head.format(crc32);
        self.put(0, sector);
        self.flush()
    }

    fn put(&mut self, number: u32, sector: Sector) {
        let number = number as usize;
        self.image.write(number * SECTOR, sector);
        let block = number / PER_BLOCK;
        if let Some(word) = self.waiting.get_mut(block / 64) {
            *word |= 1 << (block % 64);
        }
    }

    fn is_waiting(&self, block: usize) -> bool {
        let word = self.waiting.get(block / 64).copied().unwrap_or(0);
        word >> (block % 64) & 1 != 0
    }

    /// Writes what waits; it is durable then.
    pub(crate) fn flush(&mut self) -> Result {
        let blocks = self.file.blocks();
        let mut at = 0;
        while at < blocks {
            if self.waiting.get(at / 64) == Some(&0) {
                at = (at / 64 + 1) * 64;
                continue;
            }
            let mut end = at;
            while end < blocks && self.is_waiting(end) {
                end += 1;
            }
            if end > at {
                self.file.write(&self.image, at, end - at)?;
                self.writes += 1;
            }
            at = end + 1;
        }
        for word in self.waiting.iter_mut() {
            *word = 0;
        }
        Ok(())
    }

    /// The marks of a chunk are to be written with the next flush.
    pub(crate) fn put_marks(
        &mut self,
        place: u32,
        slot: u32,
        index: u32,
        acked: u64,
        bits: &[u8; CHUNK_BYTES],
    ) {
        self.head.version += 1;
        let marks = MarksSector {
            slot,
            index,
            life: self.head.life,
            acked,
        };
        let sector = marks.format(self.head.version, self.head.file, bits, crc32);
        self.put(place, sector);
    }

    /// Before marks are taken away by what the target has of the current stream: the file covers no other one then.
    pub(crate) fn trim(&mut self) -> Result {
        if self.head.is_current_only() {
            return Ok(());
        }
        self.head.keep_current();
        self.put_head()?;
        self.load_acked();
        Ok(())
    }

    /// The marks are not to be relied on any more.
    pub(crate) fn void(&mut self) -> Result {
        self.head.void = true;
        self.put_head()
    }

    /// Finds the marks of a device, or makes room for them. Gives the map, the device's slot and `FOUND_*`. What is new in
    /// the file is durable then. `None`: a device without a label, or one whose slot `is_taken` by a device of the same
    /// label.
    pub(crate) fn join(
        &mut self,
        label: [u8; 64],
        identity: [u8; 16],
        sectors: u64,
        is_taken: impl FnOnce(u32) -> bool,
    ) -> Result<Option<(KBox<Map>, u32, u32)>> {
        let known = self.device(label);
        let taken = known.is_some_and(|(_, device)| is_taken(device.slot));
        if label == [0; 64] || taken {
            return Ok(None);
        }
        let wanted = |slot| DeviceSector {
            slot,
            sectors,
            identity,
            label,
        };
        let (place, device, found) = match known {
            None => {
                let slot = self.free_slot();
                (
                    self.free_sector(0).ok_or(ENOSPC)?,
                    wanted(slot),
                    abi::FOUND_NEW,
                )
            }
            Some((place, old)) => {
                let found = match old {
                    _ if old.identity != identity => abi::FOUND_REPLACED,
                    _ if old.sectors != sectors => abi::FOUND_RESIZED,
                    _ => abi::FOUND_KNOWN,
                };
                (place, wanted(old.slot), found)
            }
        };
        let mut map = self.new_map(sectors)?;
        if found != abi::FOUND_KNOWN {
            self.head.version += 1;
            let sector = device.format(self.head.version, self.head.file, crc32);
            self.put(place, sector);
        }
        let whole = self.load(&mut map, device.slot)?;
        self.flush()?;
        let found = match found {
            // A piece of its marks is gone.
            abi::FOUND_KNOWN if !whole => abi::FOUND_DAMAGED,
            found => found,
        };
        Ok(Some((map, device.slot, found)))
    }

    /// A map for the device in `slot`, which has another size now; see [`IntentMap::take_over`].
    pub(crate) fn resized(&mut self, slot: u32, sectors: u64) -> Result<KBox<Map>> {
        let mut map = self.new_map(sectors)?;
        let file = self.head.file;
        let found = (0..self.sectors()).find_map(|number| {
            match parse(&self.sector(number), Some(file), crc32) {
                Content::Device(device) if device.slot == slot => Some((number as u32, device)),
                _ => None,
            }
        });
        let (place, device) = found.ok_or(ENOENT)?;
        self.allot(&mut map, slot, |_, _, _| {})?;
        self.head.version += 1;
        let device = DeviceSector { sectors, ..device };
        let sector = device.format(self.head.version, file, crc32);
        self.put(place, sector);
        self.flush()?;
        Ok(map)
    }

    fn new_map(&self, sectors: u64) -> Result<KBox<Map>> {
        let shift = self.head.shift;
        let chunks = chunks_for(sectors, shift);
        let words = chunks.checked_mul(CHUNK_WORDS).ok_or(EFBIG)?;
        let cells = filled(words, Cell::default)?;
        let map = Map::new(cells, filled(chunks, Chunk::default)?, sectors, shift).ok_or(EINVAL)?;
        Ok(KBox::new(map, GFP_KERNEL)?)
    }

    fn device(&self, label: [u8; 64]) -> Option<(u32, DeviceSector)> {
        let mut contents = self.contents().enumerate();
        contents.find_map(|(number, content)| match content {
            Content::Device(device) if device.label == label => Some((number as u32, device)),
            _ => None,
        })
    }

    fn free_slot(&self) -> u32 {
        let slots = self.contents().filter_map(|content| match content {
            Content::Device(device) => Some(device.slot),
            _ => None,
        });
        slots.max().map_or(0, |slot| slot.saturating_add(1))
    }

    /// The first free sector from `from` on.
    fn free_sector(&self, from: usize) -> Option<u32> {
        let file = self.head.file;
        let is_free = |number: &usize| {
            matches!(
                parse(&self.sector(*number), Some(file), crc32),
                Content::Free | Content::Head(_)
            )
        };
        // Sector 0 is the head's.
        let mut numbers = from.max(1)..self.sectors();
        numbers.find(is_free).map(|number| number as u32)
    }

    /// Fills a map with the marks of the device in `slot`. False if the file did not have all chunks: those are there now, and
    /// empty.
    fn load(&mut self, map: &mut Map, slot: u32) -> Result<bool> {
        self.allot(map, slot, |map, index, sector| {
            map.inherit(index, sector.get(MARKS_AT..).unwrap_or_default());
        })
    }

    /// Gives each chunk of a map the sector that holds it, and `take` that sector; or a free one.
    fn allot(
        &mut self,
        map: &mut Map,
        slot: u32,
        take: impl Fn(&mut Map, usize, &Sector),
    ) -> Result<bool> {
        let mut have = filled(map.chunks(), || false)?;
        let file = self.head.file;
        for number in 1..self.sectors() {
            let sector = self.sector(number);
            let Content::Marks(marks) = parse(&sector, Some(file), crc32) else {
                continue;
            };
            let index = marks.index as usize;
            if let Some(have) = have.get_mut(index).filter(|_| marks.slot == slot) {
                map.set_place(index, number as u32);
                take(map, index, &sector);
                *have = true;
            }
        }
        let mut from = 1;
        for (index, _) in have.iter().enumerate().filter(|(_, have)| !**have) {
            let place = self.free_sector(from).ok_or(ENOSPC)?;
            from = place as usize + 1;
            map.set_place(index, place);
            self.put_marks(place, slot, index as u32, 0, &[0; CHUNK_BYTES]);
        }
        Ok(have.iter().all(|have| *have))
    }

    /// Fills in what the store knows.
    pub(crate) fn status(&self, status: &mut abi::IntentStatus) {
        status.found = self.found;
        status.region_bytes = (abi::SECTOR_BYTES << self.head.shift) as u32;
        status.life = self.head.life;
        status.found_version = self.found_version;
        status.file_bytes = (self.file.blocks() * BLOCK_BYTES) as u64;
        status.writes = self.writes;
        status.version = self.head.version;
        let bases = self.head.bases.iter().zip(&self.acked);
        for (place, (base, acked)) in status.bases.iter_mut().zip(bases) {
            *place = abi::IntentBase {
                stream_uuid: base.stream,
                acked: *acked,
            };
        }
    }

    /// Version of the file.
    pub(crate) fn version(&self) -> u64 {
        self.head.version
    }

    /// Whether the file was used before.
    pub(crate) fn found(&self) -> u32 {
        self.found
    }
}
