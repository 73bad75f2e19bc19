// SPDX-License-Identifier: GPL-2.0-only

//! Encoding of control bodies: bincode 2 with fixed-width little-endian integers and a size limit.
//!
//! This is the only module that knows the library. The layout it yields is written down in
//! `PROTOCOL.md` and held by golden tests, so it could be replaced without a change on the wire:
//! fields in their order, integers as they are, a `u64` length before texts and lists.

use bincode::config::{self, Configuration, Fixint, Limit, LittleEndian};
use bincode::{Decode, Encode};

use crate::limits::BODY_BYTES_MAX;

/// Bodies come from a peer: nothing is allocated beyond this limit, whatever the lengths in them say.
const CONFIG: Configuration<LittleEndian, Fixint, Limit<BODY_BYTES_MAX>> = config::standard()
    .with_fixed_int_encoding()
    .with_limit::<BODY_BYTES_MAX>();

/// Why a body could not be encoded or decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// It does not follow the layout, or is beyond the limit.
    #[error("Message body cannot be decoded: {0}")]
    Decode(String),
    /// Bytes are left over.
    #[error("Message body has {0} bytes too many")]
    Trailing(usize),
    /// It would be beyond the limit.
    #[error("Message body cannot be encoded: {0}")]
    Encode(String),
    /// A field is beyond its limit.
    #[error("Message field \"{field}\" is {found} long; the limit is {max}")]
    Limit {
        /// Which one.
        field: &'static str,
        /// Its length.
        found: usize,
        /// The longest allowed.
        max: usize,
    },
    /// A field has a value that it cannot have.
    #[error("Message field \"{0}\" has an impossible value")]
    Value(&'static str),
}

/// Appends the encoding of a value.
///
/// # Errors
///
/// [`BodyError::Encode`] if it would be longer than [`BODY_BYTES_MAX`].
pub fn encode<T: Encode>(value: &T, out: &mut Vec<u8>) -> Result<(), BodyError> {
    let bytes = bincode::encode_to_vec(value, CONFIG)
        .map_err(|error| BodyError::Encode(error.to_string()))?;
    if bytes.len() > BODY_BYTES_MAX {
        return Err(BodyError::Limit {
            field: "body",
            found: bytes.len(),
            max: BODY_BYTES_MAX,
        });
    }
    out.extend_from_slice(&bytes);
    Ok(())
}

/// Decodes a value that takes all of the bytes.
///
/// # Errors
///
/// The reason for which it is refused.
pub fn decode<T: Decode<()>>(bytes: &[u8]) -> Result<T, BodyError> {
    let (value, used) = bincode::decode_from_slice(bytes, CONFIG)
        .map_err(|error| BodyError::Decode(error.to_string()))?;
    if used != bytes.len() {
        return Err(BodyError::Trailing(bytes.len() - used));
    }
    Ok(value)
}
