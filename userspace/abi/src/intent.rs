// SPDX-License-Identifier: GPL-2.0-only

//! The write-intent map of a stream.

use std::fmt;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::ffi::ioctls;
use crate::{Control, Operation, Result, raw};

/// What [`Control::set_intent`] asks for.
#[derive(Clone, Copy, Debug)]
pub struct IntentRequest<'a> {
    /// The stream.
    pub stream_id: u32,
    /// The file, open for reading and writing.
    pub file: BorrowedFd<'a>,
    /// Region in bytes, a power of two from 64 KiB to 1 GiB; 0: [`raw::REGION_BYTES_DEFAULT`].
    pub region_bytes: u32,
    /// Marks are cleared early when more regions are marked; 0: [`raw::HOT_REGIONS_DEFAULT`].
    pub hot_max: u32,
    /// How long a region stays marked at least after its last change, in milliseconds; 0:
    /// [`raw::INTENT_IDLE_MS_DEFAULT`].
    pub idle_ms: u32,
    /// Who the source is.
    pub source: [u8; 16],
    /// Begin the file anew, whatever it holds.
    pub format: bool,
}

/// What an intent file, or a device in it, was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Found {
    /// There is no intent file.
    None,
    /// It is new.
    New,
    /// Its marks were kept without a gap.
    Known,
    /// It once could not be written.
    Void,
    /// It belongs to another source or set.
    Foreign,
    /// It has a format that the module does not know.
    Format,
    /// It is damaged.
    Damaged,
    /// Another disk has the device's name.
    Replaced,
    /// The device has another size.
    Resized,
    /// Something that a newer module says.
    Other(u32),
}

impl Found {
    /// Reads a `raw::FOUND_*`.
    #[must_use]
    pub const fn from_raw(found: u32) -> Self {
        match found {
            raw::FOUND_NONE => Self::None,
            raw::FOUND_NEW => Self::New,
            raw::FOUND_KNOWN => Self::Known,
            raw::FOUND_VOID => Self::Void,
            raw::FOUND_FOREIGN => Self::Foreign,
            raw::FOUND_FORMAT => Self::Format,
            raw::FOUND_DAMAGED => Self::Damaged,
            raw::FOUND_REPLACED => Self::Replaced,
            raw::FOUND_RESIZED => Self::Resized,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "there is no intent file",
            Self::New => "the intent file was new",
            Self::Known => "the intent file was usable",
            Self::Void => "the intent file once could not be written",
            Self::Foreign => "the intent file belonged to another source or set",
            Self::Format => "the intent file had an unknown format",
            Self::Damaged => "the intent file was damaged",
            Self::Replaced => "the intent file knew another disk under the device's name",
            Self::Resized => "the device has another size than in the intent file",
            Self::Other(number) => return write!(f, "the module says {number} of the intent file"),
        })
    }
}

impl Control {
    /// Gives a stream its intent file; says what was found in it.
    pub fn set_intent(&self, request: &IntentRequest<'_>) -> Result<Found> {
        let mut argument = raw::StreamIntent {
            stream_id: request.stream_id,
            flags: if request.format {
                raw::INTENT_FORMAT
            } else {
                0
            },
            fd: request.file.as_raw_fd(),
            region_bytes: request.region_bytes,
            hot_max: request.hot_max,
            idle_ms: request.idle_ms,
            source: request.source,
            ..Default::default()
        };
        self.call(
            Operation::StreamIntent,
            &ioctls::STREAM_INTENT,
            &mut argument,
        )?;
        Ok(Found::from_raw(argument.found))
    }

    /// Everything about the intent map of a stream.
    pub fn intent_status(&self, stream_id: u32) -> Result<raw::IntentStatus> {
        let mut argument = raw::IntentStatus {
            stream_id,
            ..Default::default()
        };
        self.call(
            Operation::IntentStatus,
            &ioctls::INTENT_STATUS,
            &mut argument,
        )?;
        Ok(argument)
    }
}

impl raw::IntentStatus {
    /// True when a `raw::INTENT_*` flag is set.
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_finding_is_a_sentence() {
        for number in 0..12 {
            let found = Found::from_raw(number);
            assert!(found.to_string().len() > 20, "{number}");
            assert_eq!(
                matches!(found, Found::Other(_)),
                number > raw::FOUND_RESIZED
            );
        }
    }
}
