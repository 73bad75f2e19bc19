// SPDX-License-Identifier: GPL-2.0-only

//! What a device carries, by the magic numbers at its beginning.
//!
//! Only as much as is needed to refuse what must not be attached and to name the rest in a list;
//! `blkid` knows far more.

use std::fmt;

use serde::Serialize;

/// How much of a device [`probe`] wants: up to the end of the btrfs superblock's magic.
pub const PROBE_BYTES: usize = 128 * 1024;

/// Content that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Signature {
    /// Swap space.
    Swap,
    /// A physical volume of LVM.
    LvmPhysicalVolume,
    /// A LUKS header.
    Luks,
    /// A member of an md array.
    Raid,
    /// A bcache device.
    Bcache,
    /// ext2, ext3 or ext4.
    Ext,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// A GUID partition table.
    Gpt,
    /// A partition table in the first sector.
    Mbr,
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Swap => "swap",
            Self::LvmPhysicalVolume => "LVM2 PV",
            Self::Luks => "LUKS",
            Self::Raid => "md RAID",
            Self::Bcache => "bcache",
            Self::Ext => "ext2/3/4",
            Self::Xfs => "XFS",
            Self::Btrfs => "Btrfs",
            Self::Gpt => "GPT",
            Self::Mbr => "MBR",
        })
    }
}

/// Magic numbers: what, where, which bytes.
const MAGICS: [(Signature, usize, &[u8]); 14] = [
    (Signature::Luks, 0, b"LUKS\xba\xbe"),
    // md metadata 1.1 at the beginning, 1.2 at 4 KiB. 0.90 and 1.0 are at the end; an array that
    // runs is seen as a holder anyway.
    (Signature::Raid, 0, b"\xfc\x4e\x2b\xa9"),
    (Signature::Raid, 4096, b"\xfc\x4e\x2b\xa9"),
    (
        Signature::Bcache,
        4096 + 24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
    ),
    (Signature::Ext, 1024 + 56, b"\x53\xef"),
    (Signature::Xfs, 0, b"XFSB"),
    (Signature::Btrfs, 65_536 + 64, b"_BHRfS_M"),
    (Signature::Gpt, 512, b"EFI PART"),
    (Signature::Gpt, 4096, b"EFI PART"),
    (Signature::Mbr, 510, b"\x55\xaa"),
    // The swap magic ends the first page, whose size is the machine's that made it.
    (Signature::Swap, 4096 - 10, b"SWAPSPACE2"),
    (Signature::Swap, 16_384 - 10, b"SWAPSPACE2"),
    (Signature::Swap, 65_536 - 10, b"SWAPSPACE2"),
    (Signature::Swap, 4096 - 10, b"SWAP-SPACE"),
];

/// Says what the beginning of a device shows, the most telling first.
pub fn probe(head: &[u8]) -> Vec<Signature> {
    let at = |offset: usize, magic: &[u8]| head.get(offset..offset + magic.len()) == Some(magic);
    // LVM looks for its label in the first four sectors.
    let lvm = (0..4).any(|sector| {
        let label = sector * 512;
        at(label, b"LABELONE") && at(label + 24, b"LVM2 001")
    });
    let mut found = Vec::new();
    if lvm {
        found.push(Signature::LvmPhysicalVolume);
    }
    for (signature, offset, magic) in MAGICS {
        if at(offset, magic) && !found.contains(&signature) {
            found.push(signature);
        }
    }
    // GPT has a protective MBR, and boot sectors of file systems look like one.
    if found.len() > 1 {
        found.retain(|signature| *signature != Signature::Mbr);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(marks: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; PROBE_BYTES];
        for (offset, magic) in marks {
            head[*offset..offset + magic.len()].copy_from_slice(magic);
        }
        head
    }

    #[test]
    fn what_is_refused_is_recognised() {
        let pv = with(&[(512, b"LABELONE"), (536, b"LVM2 001")]);
        assert_eq!(probe(&pv), [Signature::LvmPhysicalVolume]);
        assert_eq!(probe(&with(&[(512, b"LABELONE")])), []);
        for page in [4096, 16_384, 65_536] {
            let swap = with(&[(page - 10, b"SWAPSPACE2")]);
            assert_eq!(probe(&swap), [Signature::Swap]);
        }
    }

    #[test]
    fn file_systems_are_named() {
        assert_eq!(probe(&with(&[(1080, b"\x53\xef")])), [Signature::Ext]);
        assert_eq!(probe(&with(&[(65_600, b"_BHRfS_M")])), [Signature::Btrfs]);
        let gpt = with(&[(510, b"\x55\xaa"), (512, b"EFI PART")]);
        assert_eq!(probe(&gpt), [Signature::Gpt]);
        assert_eq!(probe(&with(&[(510, b"\x55\xaa")])), [Signature::Mbr]);
    }

    #[test]
    fn short_devices_are_no_trouble() {
        assert_eq!(probe(&[]), []);
        assert_eq!(probe(&[0; 512]), []);
    }
}
