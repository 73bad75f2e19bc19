// SPDX-License-Identifier: GPL-2.0-only

//! The body of Record, Zeroes and Hash frames: what the target needs of a kernel descriptor.
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 8 | epoch |
//! | 8 | 8 | start_sector |
//! | 16 | 8 | time_ns |
//! | 24 | 8 | aux |
//! | 32 | 4 | sectors |
//! | 36 | 4 | device |
//! | 40 | 2 | flags |
//! | 42 | 1 | op |
//! | 43 | 1 | state |
//! | 44 | 4 | reserved, zero |
//!
//! The layout is fixed and packed by hand: this is done once for every write of the application.

use crate::header::MessageType;
use crate::limits::{HASH_BYTES, PAYLOAD_BYTES_MAX, SECTOR_BYTES};

/// Size of the body in bytes.
pub const RECORD_BYTES: usize = 48;

/// `state`: the change was made.
pub const STATE_COMMITTED: u8 = 2;
/// `state`: the backing device failed the change; the record only keeps the sequence whole.
pub const STATE_FAILED: u8 = 3;

/// `flags`: the discarded range reads as zeroes.
pub const F_ZEROES: u16 = 1 << 3;
/// `flags` of a GAP: devices joined, left or changed size unrecorded.
pub const F_DEVICES: u16 = 1 << 5;

/// What a record did. The numbers are those of the kernel interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Op {
    /// Data was written.
    Write = 1,
    /// The range reads as zeroes from here on.
    WriteZeroes = 2,
    /// The range was discarded.
    Discard = 3,
    /// The range was securely erased.
    SecureErase = 4,
    /// The device was flushed.
    Flush = 5,
    /// The content of a range at this position.
    Sync = 6,
    /// Changes were made that are not in the stream.
    Gap = 7,
    /// A device joined.
    Attach = 8,
    /// A device left.
    Detach = 9,
    /// A device changed its size.
    Resize = 10,
}

impl Op {
    /// The operation of that number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Write,
            2 => Self::WriteZeroes,
            3 => Self::Discard,
            4 => Self::SecureErase,
            5 => Self::Flush,
            6 => Self::Sync,
            7 => Self::Gap,
            8 => Self::Attach,
            9 => Self::Detach,
            10 => Self::Resize,
            _ => return None,
        })
    }
}

/// In which form a record travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// As it is, with its payload if it has one.
    Data,
    /// Its payload is all zero and left out.
    Zeroes,
    /// Only the hash of its payload.
    Hash,
}

impl RecordKind {
    /// The frame type of this form.
    #[must_use]
    pub fn message_type(self) -> MessageType {
        match self {
            Self::Data => MessageType::Record,
            Self::Zeroes => MessageType::Zeroes,
            Self::Hash => MessageType::Hash,
        }
    }

    /// The form of that frame type.
    #[must_use]
    pub fn from_message_type(message_type: MessageType) -> Option<Self> {
        match message_type {
            MessageType::Record => Some(Self::Data),
            MessageType::Zeroes => Some(Self::Zeroes),
            MessageType::Hash => Some(Self::Hash),
            _ => None,
        }
    }
}

/// See the module documentation. The sequence number is in the frame header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordBody {
    /// Records of one epoch that do not overlap may be applied in any order.
    pub epoch: u64,
    /// First sector on the device.
    pub start_sector: u64,
    /// When the change was made: nanoseconds of the source's clock.
    pub time_ns: u64,
    /// By operation, as in the kernel interface.
    pub aux: u64,
    /// Length in sectors.
    pub sectors: u32,
    /// Device id.
    pub device: u32,
    /// Flags of the kernel interface.
    pub flags: u16,
    /// Operation.
    pub op: Op,
    /// [`STATE_COMMITTED`] or [`STATE_FAILED`].
    pub state: u8,
}

/// Why a record body is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// The body has another length.
    #[error("Record body of {0} bytes instead of {RECORD_BYTES}")]
    Length(usize),
    /// A reserved field is not zero.
    #[error("Reserved field of a record is not zero")]
    Reserved,
    /// An operation this version does not have.
    #[error("Record of unknown operation {0}")]
    Op(u8),
    /// A state that cannot be shipped.
    #[error("Record in state {0}")]
    State(u8),
    /// The payload does not fit the record.
    #[error(
        "Record of {sectors} sectors (operation {op:?}) with a payload of {payload_bytes} bytes"
    )]
    Payload {
        /// Operation of the record.
        op: Op,
        /// Sectors it says.
        sectors: u32,
        /// Payload it has.
        payload_bytes: usize,
    },
    /// The form is for SYNC records only.
    #[error("A {0:?} record travels as zeroes or as a hash")]
    Form(Op),
    /// The range wraps around.
    #[error("Record range overflows: {0} sectors from sector {1}")]
    Range(u32, u64),
}

impl RecordBody {
    /// Whether the change was made, so that the record has an effect.
    #[must_use]
    pub fn is_committed(&self) -> bool {
        self.state == STATE_COMMITTED
    }

    /// The bytes of this body.
    #[must_use]
    pub fn pack(&self) -> [u8; RECORD_BYTES] {
        let mut bytes = [0; RECORD_BYTES];
        bytes[0..8].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.start_sector.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.time_ns.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.aux.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.sectors.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.device.to_le_bytes());
        bytes[40..42].copy_from_slice(&self.flags.to_le_bytes());
        bytes[42] = self.op as u8;
        bytes[43] = self.state;
        bytes
    }

    /// Reads a body and checks it against its form and the length of its payload.
    ///
    /// # Errors
    ///
    /// The reason for which the record is refused.
    pub fn parse(
        bytes: &[u8],
        kind: RecordKind,
        payload_bytes: usize,
    ) -> Result<Self, RecordError> {
        let bytes: &[u8; RECORD_BYTES] = bytes
            .try_into()
            .map_err(|_| RecordError::Length(bytes.len()))?;
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let u64_at = |at: usize| u64::from(u32_at(at)) | (u64::from(u32_at(at + 4)) << 32);
        if u32_at(44) != 0 {
            return Err(RecordError::Reserved);
        }
        let body = Self {
            epoch: u64_at(0),
            start_sector: u64_at(8),
            time_ns: u64_at(16),
            aux: u64_at(24),
            sectors: u32_at(32),
            device: u32_at(36),
            flags: u16::from_le_bytes([bytes[40], bytes[41]]),
            op: Op::from_number(bytes[42]).ok_or(RecordError::Op(bytes[42]))?,
            state: bytes[43],
        };
        body.check(kind, payload_bytes)?;
        Ok(body)
    }

    /// Whether form, range and payload belong together. Used on both sides of the wire.
    ///
    /// # Errors
    ///
    /// The reason for which they do not.
    pub fn check(&self, kind: RecordKind, payload_bytes: usize) -> Result<(), RecordError> {
        if !matches!(self.state, STATE_COMMITTED | STATE_FAILED) {
            return Err(RecordError::State(self.state));
        }
        if kind != RecordKind::Data && (self.op != Op::Sync || !self.is_committed()) {
            return Err(RecordError::Form(self.op));
        }
        if self.op != Op::Gap
            && self
                .end_sector()
                .and_then(|end| end.checked_mul(SECTOR_BYTES))
                .is_none()
        {
            return Err(RecordError::Range(self.sectors, self.start_sector));
        }
        let fits = match kind {
            RecordKind::Data if self.has_payload() => {
                u64::from(self.sectors) * SECTOR_BYTES == payload_bytes as u64 && payload_bytes > 0
            }
            RecordKind::Data => payload_bytes == 0,
            RecordKind::Zeroes => {
                payload_bytes == 0
                    && self.sectors > 0
                    && self.range_bytes() <= PAYLOAD_BYTES_MAX as u64
            }
            RecordKind::Hash => {
                payload_bytes == HASH_BYTES
                    && self.sectors > 0
                    && self.range_bytes() <= PAYLOAD_BYTES_MAX as u64
            }
        };
        if !fits {
            return Err(RecordError::Payload {
                op: self.op,
                sectors: self.sectors,
                payload_bytes,
            });
        }
        Ok(())
    }

    /// Whether this record travels with a payload when sent as data.
    #[must_use]
    pub fn has_payload(&self) -> bool {
        matches!(self.op, Op::Write | Op::Sync) && self.is_committed()
    }

    /// Length of the range in bytes.
    #[must_use]
    pub fn range_bytes(&self) -> u64 {
        u64::from(self.sectors) * SECTOR_BYTES
    }

    /// First sector behind the range, if there is one.
    #[must_use]
    pub fn end_sector(&self) -> Option<u64> {
        self.start_sector.checked_add(u64::from(self.sectors))
    }

    /// Whether from this record on the target cannot be a prefix of the source's writes until a
    /// resync: changes that are not in the stream, or a range whose content nobody knows.
    #[must_use]
    pub fn loses_order(&self) -> bool {
        match self.op {
            Op::Gap | Op::SecureErase => true,
            Op::Write | Op::WriteZeroes => !self.is_committed(),
            Op::Discard => !self.is_committed() || self.flags & F_ZEROES == 0,
            Op::Flush | Op::Sync | Op::Attach | Op::Detach | Op::Resize => false,
        }
    }
}
