// SPDX-License-Identifier: GPL-2.0-only

//! The intent file of the kernel module: the very files that the kernel compiles.

#[path = "../../../kmod/intent.rs"]
#[allow(dead_code, reason = "the kernel uses more of it")]
mod map;

#[path = "../../../kmod/intent_layout.rs"]
#[allow(dead_code, reason = "the kernel uses more of it")]
mod layout;

use layout::{Content, DeviceSector, Head, MarksSector, SECTOR, Sector};
use map::{CHUNK_BYTES, CHUNK_WORDS, Cell, Chunk, IntentMap, chunks_for, regions_for};

const FILE: [u8; 16] = [7; 16];

fn sector_of(data: &[u8], is_sealed: bool) -> Sector {
    let mut sector = [0; SECTOR];
    let bytes = data.len().min(SECTOR);
    sector[..bytes].copy_from_slice(&data[..bytes]);
    if is_sealed {
        let crc = crc32fast::hash(&sector[8..]);
        sector[4..8].copy_from_slice(&crc.to_le_bytes());
    }
    sector
}

/// A sector, with its checksum made right if the first byte says so; marks go into the map of a device whose size the
/// next bytes say.
pub(crate) fn intent(data: &[u8]) {
    let Some((&[mode, shift, a, b, c], data)) = data.split_first_chunk() else {
        return;
    };
    let sector = sector_of(data, mode & 1 == 0);
    for file in [None, Some(FILE)] {
        let found = layout::parse(&sector, file, crc32fast::hash);
        let version = layout::version_of(&sector);
        let again = match found {
            Content::Head(mut head) => {
                let packed = head.format(crc32fast::hash);
                let life = head.life;
                assert_eq!(layout::parse(&packed, file, crc32fast::hash), found);
                head.enter([9; 16]);
                assert!(head.life > life || life == u32::MAX);
                head.keep_current();
                assert!(head.is_current_only() && head.covers_any());
                continue;
            }
            Content::Device(device) => device.format(version, id_of(&sector), crc32fast::hash),
            Content::Marks(marks) => {
                let bits = sector[SECTOR - CHUNK_BYTES..].try_into().unwrap();
                inherit(bits, shift, u32::from_le_bytes([a, b, c, 0]));
                marks.format(version, id_of(&sector), bits, crc32fast::hash)
            }
            Content::Free | Content::Damaged | Content::OtherFormat => continue,
        };
        assert_eq!(layout::parse(&again, file, crc32fast::hash), found);
    }
}

fn id_of(sector: &Sector) -> [u8; 16] {
    sector[16..32].try_into().unwrap()
}

/// Whatever the bits are, what has to be compared lies inside of the device, and comparing it leaves nothing.
fn inherit(bits: &[u8; CHUNK_BYTES], shift: u8, sectors: u32) {
    let sectors = u64::from(sectors);
    let shift = map::SHIFT_MIN + u32::from(shift) % (map::SHIFT_MAX - map::SHIFT_MIN + 1);
    let count = chunks_for(sectors, shift);
    let cells = vec![Cell::default(); count * CHUNK_WORDS];
    let mut map = IntentMap::new(cells, vec![Chunk::default(); count], sectors, shift).unwrap();
    for chunk in 0..=count {
        // The last one lies beyond the map.
        map.inherit(chunk, bits);
    }
    let suspects = map.suspects();
    assert_eq!(suspects, map.marked());
    assert!(suspects <= regions_for(sectors, shift));
    let (mut from, mut regions) = (0, 0);
    loop {
        match map.next_suspect(from, 5) {
            Ok((start, length)) => {
                assert!(start >= from && length > 0 && start + length <= sectors);
                regions += length.div_ceil(1 << shift);
                from = start + length;
            }
            Err(Some(next)) => {
                assert!(next > from);
                from = next;
            }
            Err(None) => break,
        }
    }
    assert_eq!(regions, suspects);
    map.settle(0, sectors);
    assert_eq!(map.suspects(), 0);
}

pub(crate) fn intent_seeds() -> Vec<(String, Vec<u8>)> {
    let head = Head {
        version: 3,
        file: FILE,
        shift: 13,
        life: 2,
        void: false,
        source: [1; 16],
        set: [b's'; 64],
        bases: Default::default(),
    };
    let device = DeviceSector {
        slot: 1,
        sectors: 2048,
        identity: [2; 16],
        label: [b'v'; 64],
    };
    let marks = MarksSector {
        slot: 1,
        index: 0,
        life: 2,
        acked: 99,
    };
    let mut bits = [0; CHUNK_BYTES];
    bits[..3].copy_from_slice(&[0xff, 0x01, 0x80]);
    let seed = |name: &str, sector: Sector| {
        let mode = [1, 0, 0x40, 0x42, 0x0f];
        (name.to_owned(), [&mode[..], &sector[..]].concat())
    };
    vec![
        seed("head", head.format(crc32fast::hash)),
        seed("device", device.format(4, FILE, crc32fast::hash)),
        seed("marks", marks.format(5, FILE, &bits, crc32fast::hash)),
    ]
}
