// SPDX-License-Identifier: GPL-2.0-only

//! The body of a Packed frame: what its payload unpacks to.
//!
//! | offset | bytes | field | |
//! |---|---|---|---|
//! | 0 | 2 | codec | [`Codec`] |
//! | 2 | 2 | reserved | zero |
//! | 4 | 4 | raw_bytes | what the payload unpacks to, exactly |
//!
//! The payload is a run of whole Record, Zeroes, Hash and Marker frames, compressed as one block. Nothing is allocated
//! for it: a receiver has a buffer of [`PACKED_RAW_BYTES_MAX`], and a payload that gives more or less than `raw_bytes`
//! is refused. The frames inside have their own checksums, so a codec that errs is noticed.

use crate::limits::{PACKED_RAW_BYTES_MAX, PAYLOAD_BYTES_MAX};

/// Size of the body in bytes.
pub const PACKED_BODY_BYTES: usize = 8;

/// Key of an option of Welcome: the codecs that the target unpacks, one byte each. Without it nothing is packed.
pub const OPTION_CODECS: u16 = 20;

/// How a run is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Codec {
    /// A block of LZ4, without its frame format.
    Lz4 = 1,
    /// A frame of Zstandard, of any level.
    Zstd = 2,
}

impl Codec {
    /// Every codec of this version.
    pub const ALL: [Self; 2] = [Self::Lz4, Self::Zstd];

    /// The codec of that number.
    #[must_use]
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| *codec as u16 == number)
    }
}

/// Why a description is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PackedError {
    /// The body has another length.
    #[error("Packed frame with a body of {0} bytes; it has {PACKED_BODY_BYTES}")]
    Length(usize),
    /// A field that must be zero is not.
    #[error("Packed frame: the reserved field must be zero")]
    Reserved,
    /// A codec that this version does not have.
    #[error("Packed frame of unknown codec {0}")]
    Codec(u16),
    /// It unpacks to more than any may.
    #[error("Packed frame that unpacks to {0} bytes; the limit is {PACKED_RAW_BYTES_MAX}")]
    RawLength(usize),
    /// The payload is empty, or not shorter than what it unpacks to.
    #[error("Packed frame of {payload} bytes that unpacks to {raw}: nothing is gained by it")]
    Useless {
        /// Length of the payload.
        payload: usize,
        /// What it unpacks to.
        raw: usize,
    },
}

/// A compressed run of frames; see the module documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packed<'a> {
    /// How it is compressed.
    pub codec: Codec,
    /// What it unpacks to, in bytes.
    pub raw_bytes: usize,
    /// The compressed bytes.
    pub payload: &'a [u8],
}

impl<'a> Packed<'a> {
    /// The bytes of the body.
    pub(crate) fn pack(&self) -> [u8; PACKED_BODY_BYTES] {
        let mut bytes = [0; PACKED_BODY_BYTES];
        bytes[0..2].copy_from_slice(&(self.codec as u16).to_le_bytes());
        let raw = u32::try_from(self.raw_bytes).unwrap_or(u32::MAX);
        bytes[4..8].copy_from_slice(&raw.to_le_bytes());
        bytes
    }

    /// Reads a body and checks it.
    pub(crate) fn parse(body: &[u8], payload: &'a [u8]) -> Result<Self, PackedError> {
        let body: &[u8; PACKED_BODY_BYTES] = body
            .try_into()
            .map_err(|_| PackedError::Length(body.len()))?;
        let number = u16::from_le_bytes([body[0], body[1]]);
        let codec = Codec::from_number(number).ok_or(PackedError::Codec(number))?;
        if body[2..4] != [0, 0] {
            return Err(PackedError::Reserved);
        }
        let packed = Self {
            codec,
            raw_bytes: u32::from_le_bytes([body[4], body[5], body[6], body[7]]) as usize,
            payload,
        };
        packed.check()?;
        Ok(packed)
    }

    /// What [`Packed::parse`] would refuse is not sent either.
    pub(crate) fn check(&self) -> Result<(), PackedError> {
        let (payload, raw) = (self.payload.len(), self.raw_bytes);
        if raw > PACKED_RAW_BYTES_MAX {
            return Err(PackedError::RawLength(raw));
        }
        if payload == 0 || payload >= raw || payload > PAYLOAD_BYTES_MAX {
            return Err(PackedError::Useless { payload, raw });
        }
        Ok(())
    }
}
