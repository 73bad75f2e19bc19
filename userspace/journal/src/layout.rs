// SPDX-License-Identifier: GPL-2.0-only

//! The layout on disk.
//!
//! A journal is a row of segment files. A segment begins with a header block; behind it batches
//! follow, each at a multiple of [`BLOCK_BYTES`]: a batch header and the very frames that came by
//! the wire (`dtloop-proto`), which carry sequence number, epoch and time of every record.
//!
//! ```text
//! segment  | SegmentHeader, 4096 | batch | batch | batch ...
//! batch    | BatchHeader, 64 | frame | frame | ... | zeroes up to a multiple of 4096 |
//! ```
//!
//! A batch is written by one write and made durable by one fdatasync before anything in it is
//! acknowledged. It counts only if its header names this segment and this offset and its digest,
//! over the headers of all its frames (which hold the checksums of everything in them), is right:
//! a torn batch and what an earlier use of the file left behind are never taken for records. Neither is what somebody wrote
//! to the source's disk to look like a batch: every batch repeats the salt of its segment, which nobody can guess.
//!
//! `index_offset` of a sealed segment is the place for an index by block, from which any point in
//! time can be served later; it is 0 in this version.

use dtloop_proto::Uuid;

/// Batches begin at multiples of this, so that no write needs to read a page first.
pub const BLOCK_BYTES: u64 = 4096;

/// Size of the segment header in bytes.
pub const SEGMENT_HEADER_BYTES: usize = 4096;

/// Size of the batch header in bytes.
pub const BATCH_HEADER_BYTES: usize = 64;

/// Version of the layout.
pub const JOURNAL_VERSION: u32 = 1;

const SEGMENT_MAGIC: [u8; 8] = *b"DTLJSEG1";
const BATCH_MAGIC: [u8; 4] = *b"DTJB";

/// Why a segment is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// It is something else.
    #[error("The file is no journal segment")]
    Magic,
    /// Its header is damaged.
    #[error("The header of the journal segment is damaged")]
    Checksum,
    /// A later version wrote it.
    #[error("The journal segment has version {0}; this program knows {JOURNAL_VERSION}")]
    Version(u32),
}

/// First block of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Rises by one from segment to segment and is never used again.
    pub number: u64,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Whose it is: the source.
    pub owner: Uuid,
    /// The stream at the beginning of the segment.
    pub stream_uuid: Uuid,
    /// The record expected at the beginning of the segment.
    pub first_seq: u64,
    /// Where the index begins; 0: none.
    pub index_offset: u64,
    /// Repeated in the header of every batch.
    pub salt: u64,
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

fn uuid_at(bytes: &[u8], at: usize) -> Uuid {
    let mut uuid = Uuid::NONE;
    uuid.0.copy_from_slice(&bytes[at..at + 16]);
    uuid
}

impl SegmentHeader {
    /// The bytes of the header block.
    #[must_use]
    pub fn pack(&self) -> Box<[u8; SEGMENT_HEADER_BYTES]> {
        let mut bytes = Box::new([0; SEGMENT_HEADER_BYTES]);
        put(&mut bytes[..], 0, &SEGMENT_MAGIC);
        put(&mut bytes[..], 12, &JOURNAL_VERSION.to_le_bytes());
        put(&mut bytes[..], 16, &self.number.to_le_bytes());
        put(&mut bytes[..], 24, &self.bytes.to_le_bytes());
        put(&mut bytes[..], 32, &self.owner.0);
        put(&mut bytes[..], 48, &self.stream_uuid.0);
        put(&mut bytes[..], 64, &self.first_seq.to_le_bytes());
        put(&mut bytes[..], 72, &self.index_offset.to_le_bytes());
        put(&mut bytes[..], 80, &self.salt.to_le_bytes());
        let crc = crc32fast::hash(&bytes[12..]);
        put(&mut bytes[..], 8, &crc.to_le_bytes());
        bytes
    }

    /// Reads a header block.
    ///
    /// # Errors
    ///
    /// The reason for which it is refused.
    pub fn parse(bytes: &[u8; SEGMENT_HEADER_BYTES]) -> Result<Self, SegmentError> {
        if bytes[..8] != SEGMENT_MAGIC {
            return Err(SegmentError::Magic);
        }
        if u32_at(bytes, 8) != crc32fast::hash(&bytes[12..]) {
            return Err(SegmentError::Checksum);
        }
        if u32_at(bytes, 12) != JOURNAL_VERSION {
            return Err(SegmentError::Version(u32_at(bytes, 12)));
        }
        Ok(Self {
            number: u64_at(bytes, 16),
            bytes: u64_at(bytes, 24),
            owner: uuid_at(bytes, 32),
            stream_uuid: uuid_at(bytes, 48),
            first_seq: u64_at(bytes, 64),
            index_offset: u64_at(bytes, 72),
            salt: u64_at(bytes, 80),
        })
    }
}

/// Header of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    /// The segment it belongs to.
    pub segment: u64,
    /// Where in the segment it begins.
    pub offset: u64,
    /// Length of the frames in bytes, without padding.
    pub bytes: u32,
    /// Number of frames.
    pub frames: u32,
    /// CRC-32 of the headers of all frames, one after the other.
    pub digest: u32,
    /// The record expected before the batch.
    pub first_seq: u64,
    /// The record expected behind the batch.
    pub next_seq: u64,
    /// The salt of the segment.
    pub salt: u64,
}

impl BatchHeader {
    /// The bytes of the header.
    #[must_use]
    pub fn pack(&self) -> [u8; BATCH_HEADER_BYTES] {
        let mut bytes = [0; BATCH_HEADER_BYTES];
        put(&mut bytes, 0, &BATCH_MAGIC);
        put(&mut bytes, 8, &self.segment.to_le_bytes());
        put(&mut bytes, 16, &self.offset.to_le_bytes());
        put(&mut bytes, 24, &self.bytes.to_le_bytes());
        put(&mut bytes, 28, &self.frames.to_le_bytes());
        put(&mut bytes, 32, &self.digest.to_le_bytes());
        put(&mut bytes, 40, &self.first_seq.to_le_bytes());
        put(&mut bytes, 48, &self.next_seq.to_le_bytes());
        put(&mut bytes, 56, &self.salt.to_le_bytes());
        let crc = crc32fast::hash(&bytes[8..]);
        put(&mut bytes, 4, &crc.to_le_bytes());
        bytes
    }

    /// Reads the header at that place; `None` if there is none that belongs there, which is where
    /// the journal ends.
    #[must_use]
    pub fn parse(
        bytes: &[u8; BATCH_HEADER_BYTES],
        segment: &SegmentHeader,
        offset: u64,
    ) -> Option<Self> {
        if bytes[..4] != BATCH_MAGIC || u32_at(bytes, 4) != crc32fast::hash(&bytes[8..]) {
            return None;
        }
        let header = Self {
            segment: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            bytes: u32_at(bytes, 24),
            frames: u32_at(bytes, 28),
            digest: u32_at(bytes, 32),
            first_seq: u64_at(bytes, 40),
            next_seq: u64_at(bytes, 48),
            salt: u64_at(bytes, 56),
        };
        let here = header.segment == segment.number
            && header.salt == segment.salt
            && header.offset == offset;
        (here && header.first_seq <= header.next_seq).then_some(header)
    }
}

/// Length of a batch on disk, with header and padding.
#[must_use]
pub fn batch_bytes(frame_bytes: u64) -> u64 {
    (BATCH_HEADER_BYTES as u64 + frame_bytes).next_multiple_of(BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> BatchHeader {
        BatchHeader {
            segment: 3,
            offset: 4096,
            bytes: 100,
            frames: 2,
            digest: 9,
            first_seq: 5,
            next_seq: 7,
            salt: 11,
        }
    }

    fn segment() -> SegmentHeader {
        SegmentHeader {
            number: 3,
            bytes: 1 << 20,
            owner: Uuid([1; 16]),
            stream_uuid: Uuid([2; 16]),
            first_seq: 5,
            index_offset: 0,
            salt: 11,
        }
    }

    #[test]
    fn headers_round_trip_and_their_bytes_are_fixed() {
        let bytes = segment().pack();
        assert_eq!(SegmentHeader::parse(&bytes), Ok(segment()));
        assert_eq!(
            &bytes[..24],
            b"DTLJSEG1\xfe\x39\x70\x70\x01\0\0\0\x03\0\0\0\0\0\0\0"
        );
        let bytes = batch().pack();
        assert_eq!(BatchHeader::parse(&bytes, &segment(), 4096), Some(batch()));
        assert_eq!(&bytes[..16], b"DTJB\xf3\xf8\xfc\xf8\x03\0\0\0\0\0\0\0");
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        let good = batch().pack();
        for at in 0..good.len() {
            let mut bytes = good;
            bytes[at] ^= 0x10;
            assert_eq!(
                BatchHeader::parse(&bytes, &segment(), 4096),
                None,
                "byte {at}"
            );
        }
        for at in 0..SEGMENT_HEADER_BYTES {
            let mut bytes = segment().pack();
            bytes[at] ^= 0x10;
            assert!(SegmentHeader::parse(&bytes).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_batch_of_an_earlier_use_of_the_file_does_not_count() {
        let bytes = batch().pack();
        let parse = |segment: &SegmentHeader| BatchHeader::parse(&bytes, segment, 4096);
        let (number, salt) = (segment().number + 1, segment().salt + 1);
        assert_eq!(
            parse(&SegmentHeader {
                number,
                ..segment()
            }),
            None
        );
        assert_eq!(parse(&SegmentHeader { salt, ..segment() }), None);
        assert_eq!(BatchHeader::parse(&bytes, &segment(), 8192), None);
    }

    #[test]
    fn batches_fill_whole_blocks() {
        assert_eq!(batch_bytes(0), 4096);
        assert_eq!(batch_bytes(4032), 4096);
        assert_eq!(batch_bytes(4033), 8192);
    }
}
