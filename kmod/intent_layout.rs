// SPDX-License-Identifier: GPL-2.0-only

//! The intent file of a set.
//!
//! It is made of sectors of 512 bytes, the unit that a disk writes as a whole, each with a checksum of its own. So a power
//! cut in the middle of a larger write leaves each of them old or new, and either will do (`intent.rs`).
//!
//! ```text
//! sector 0   head of the file: whose it is, which streams its marks cover
//! sector 1.. DEVICE: a device by its label     } in any order; what is neither is free
//!            MARKS:  a piece of its marks      }
//! ```
//!
//! All integers are little-endian. The first 32 bytes are the same in every sector:
//!
//! | offset | bytes | field | |
//! |---|---|---|---|
//! | 0 | 4 | magic | `DTIH`, `DTID`, `DTIB` |
//! | 4 | 4 | crc | CRC-32 (IEEE) of bytes 8..512 |
//! | 8 | 8 | version | of the file when the sector was written; rises with every write |
//! | 16 | 16 | file | drawn when the file was begun; a sector with another one is free |
//!
//! Then, by kind:
//!
//! | head | | DEVICE | | MARKS | |
//! |---|---|---|---|---|---|
//! | 32 | format u32, 1 | 32 | slot u32 | 32 | slot u32 |
//! | 36 | shift u32: sectors of a region | 40 | sectors u64 | 36 | index u32 |
//! | 40 | life u32 | 48 | identity, 16 bytes | 40 | life u32 |
//! | 44 | flags u32: 1 void | 64 | label, 64 bytes | 48 | acked u64 |
//! | 48 | source, 16 bytes | | | 64 | 448 bytes of bits |
//! | 64 | set, 64 bytes | | | | |
//! | 128 | 8 streams: uuid, life u32, 0 u32 | | | | |
//!
//! A *life* is a stream that has used the file, counted from 1. The streams in the head are those whose changes the marks
//! cover without a gap: whatever the target has of one of them, what it lacks is marked. `acked` says up to which position of
//! its life's stream the target had everything when marks were last taken away: a target that has less (its state was
//! restored from a backup) can not rely on the marks.

/// Size of a sector of the file in bytes.
pub(crate) const SECTOR: usize = 512;

/// One sector.
pub(crate) type Sector = [u8; SECTOR];

/// Streams in the head of the file.
pub(crate) const BASES_MAX: usize = 8;

/// The format that this module writes.
const FORMAT: u32 = 1;

/// Flag of the head: the marks are not to be relied on.
const FLAG_VOID: u32 = 1;

/// Offset of the marks in a sector.
pub(crate) const MARKS_AT: usize = 64;

const MAGIC_HEAD: [u8; 4] = *b"DTIH";
const MAGIC_DEVICE: [u8; 4] = *b"DTID";
const MAGIC_MARKS: [u8; 4] = *b"DTIB";

/// A checksum: CRC-32 (IEEE).
pub(crate) type Crc = fn(&[u8]) -> u32;

/// A stream whose changes the marks cover.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Base {
    /// The stream; zero: none.
    pub(crate) stream: [u8; 16],
    /// Its life.
    pub(crate) life: u32,
}

/// The head of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) version: u64,
    pub(crate) file: [u8; 16],
    pub(crate) shift: u32,
    pub(crate) life: u32,
    pub(crate) void: bool,
    pub(crate) source: [u8; 16],
    pub(crate) set: [u8; 64],
    pub(crate) bases: [Base; BASES_MAX],
}

/// A device of the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceSector {
    pub(crate) slot: u32,
    pub(crate) sectors: u64,
    pub(crate) identity: [u8; 16],
    pub(crate) label: [u8; 64],
}

/// Where a sector of marks belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MarksSector {
    pub(crate) slot: u32,
    pub(crate) index: u32,
    pub(crate) life: u32,
    pub(crate) acked: u64,
}

/// What a sector of the file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Content {
    Head(Head),
    Device(DeviceSector),
    Marks(MarksSector),
    /// Nothing, or something of an earlier file.
    Free,
    /// It has one of the magics, and its checksum does not fit.
    Damaged,
    /// The head of another format.
    OtherFormat,
}

fn put<const N: usize>(sector: &mut Sector, at: usize, bytes: [u8; N]) {
    if let Some(place) = sector.get_mut(at..at.saturating_add(N)) {
        place.copy_from_slice(&bytes);
    }
}

fn get<const N: usize>(sector: &Sector, at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some(from) = sector.get(at..at.saturating_add(N)) {
        bytes.copy_from_slice(from);
    }
    bytes
}

fn get_u32(sector: &Sector, at: usize) -> u32 {
    u32::from_le_bytes(get(sector, at))
}

fn get_u64(sector: &Sector, at: usize) -> u64 {
    u64::from_le_bytes(get(sector, at))
}

fn begin(magic: [u8; 4], version: u64, file: [u8; 16]) -> Sector {
    let mut sector = [0; SECTOR];
    put(&mut sector, 0, magic);
    put(&mut sector, 8, version.to_le_bytes());
    put(&mut sector, 16, file);
    sector
}

fn seal(mut sector: Sector, crc: Crc) -> Sector {
    let sum = crc(sector.get(8..).unwrap_or_default());
    put(&mut sector, 4, sum.to_le_bytes());
    sector
}

impl Head {
    /// The head as a sector.
    pub(crate) fn format(&self, crc: Crc) -> Sector {
        let mut sector = begin(MAGIC_HEAD, self.version, self.file);
        put(&mut sector, 32, FORMAT.to_le_bytes());
        put(&mut sector, 36, self.shift.to_le_bytes());
        put(&mut sector, 40, self.life.to_le_bytes());
        let flags = if self.void { FLAG_VOID } else { 0 };
        put(&mut sector, 44, flags.to_le_bytes());
        put(&mut sector, 48, self.source);
        put(&mut sector, 64, self.set);
        for (nth, base) in self.bases.iter().enumerate() {
            let at = nth.saturating_mul(24).saturating_add(128);
            put(&mut sector, at, base.stream);
            put(&mut sector, at.saturating_add(16), base.life.to_le_bytes());
        }
        seal(sector, crc)
    }

    /// Whether the marks cover the changes of some stream.
    pub(crate) fn covers_any(&self) -> bool {
        self.bases.iter().any(|base| base.stream != [0; 16])
    }

    /// A new stream uses the file. Without room the oldest one is forgotten.
    pub(crate) fn enter(&mut self, stream: [u8; 16]) {
        self.life = self.life.saturating_add(1);
        let base = Base {
            stream,
            life: self.life,
        };
        let free = self.bases.iter().position(|base| base.stream == [0; 16]);
        let place = free.unwrap_or_else(|| {
            self.bases.rotate_left(1);
            BASES_MAX - 1
        });
        if let Some(place) = self.bases.get_mut(place) {
            *place = base;
        }
    }

    /// Marks will be taken away by what the target has of the current stream: only that one is covered from now on.
    pub(crate) fn keep_current(&mut self) {
        let life = self.life;
        let current = self.bases.iter().find(|base| base.life == life).copied();
        self.bases = [Base::default(); BASES_MAX];
        if let (Some(place), Some(current)) = (self.bases.first_mut(), current) {
            *place = current;
        }
    }

    /// Whether only the current stream is covered.
    pub(crate) fn is_current_only(&self) -> bool {
        let mut others = self.bases.iter().filter(|base| base.life != self.life);
        others.all(|base| base.stream == [0; 16])
    }
}

impl DeviceSector {
    /// The device as a sector.
    pub(crate) fn format(&self, version: u64, file: [u8; 16], crc: Crc) -> Sector {
        let mut sector = begin(MAGIC_DEVICE, version, file);
        put(&mut sector, 32, self.slot.to_le_bytes());
        put(&mut sector, 40, self.sectors.to_le_bytes());
        put(&mut sector, 48, self.identity);
        put(&mut sector, 64, self.label);
        seal(sector, crc)
    }
}

impl MarksSector {
    /// The marks `bits` as a sector.
    pub(crate) fn format(
        &self,
        version: u64,
        file: [u8; 16],
        bits: &[u8; SECTOR - MARKS_AT],
        crc: Crc,
    ) -> Sector {
        let mut sector = begin(MAGIC_MARKS, version, file);
        put(&mut sector, 32, self.slot.to_le_bytes());
        put(&mut sector, 36, self.index.to_le_bytes());
        put(&mut sector, 40, self.life.to_le_bytes());
        put(&mut sector, 48, self.acked.to_le_bytes());
        put(&mut sector, MARKS_AT, *bits);
        seal(sector, crc)
    }
}

/// Version of a sector that is not free.
pub(crate) fn version_of(sector: &Sector) -> u64 {
    get_u64(sector, 8)
}

/// Reads a sector; `file` is known from the head, which itself is read with `None`.
pub(crate) fn parse(sector: &Sector, file: Option<[u8; 16]>, crc: Crc) -> Content {
    let magic: [u8; 4] = get(sector, 0);
    if ![MAGIC_HEAD, MAGIC_DEVICE, MAGIC_MARKS].contains(&magic) {
        return Content::Free;
    }
    if get_u32(sector, 4) != crc(sector.get(8..).unwrap_or_default()) {
        return Content::Damaged;
    }
    if file.is_some_and(|file| get::<16>(sector, 16) != file) {
        return Content::Free;
    }
    match magic {
        MAGIC_HEAD if get_u32(sector, 32) != FORMAT => Content::OtherFormat,
        MAGIC_HEAD => Content::Head(parse_head(sector)),
        MAGIC_DEVICE => Content::Device(DeviceSector {
            slot: get_u32(sector, 32),
            sectors: get_u64(sector, 40),
            identity: get(sector, 48),
            label: get(sector, 64),
        }),
        _ => Content::Marks(MarksSector {
            slot: get_u32(sector, 32),
            index: get_u32(sector, 36),
            life: get_u32(sector, 40),
            acked: get_u64(sector, 48),
        }),
    }
}

fn parse_head(sector: &Sector) -> Head {
    let mut bases = [Base::default(); BASES_MAX];
    for (nth, base) in bases.iter_mut().enumerate() {
        let at = nth.saturating_mul(24).saturating_add(128);
        *base = Base {
            stream: get(sector, at),
            life: get_u32(sector, at.saturating_add(16)),
        };
    }
    Head {
        version: version_of(sector),
        file: get(sector, 16),
        shift: get_u32(sector, 36),
        life: get_u32(sector, 40),
        void: get_u32(sector, 44) & FLAG_VOID != 0,
        source: get(sector, 48),
        set: get(sector, 64),
        bases,
    }
}
