// SPDX-License-Identifier: GPL-2.0-only

//! The fixed frame header.
//!
//! | offset | bytes | field | |
//! |---|---|---|---|
//! | 0 | 4 | magic | `DTLP` |
//! | 4 | 4 | header_crc | CRC-32 of bytes 8..48 |
//! | 8 | 4 | body_crc | CRC-32 of body and payload |
//! | 12 | 2 | version | 0 in the handshake, else the version chosen |
//! | 14 | 2 | type | [`MessageType`] |
//! | 16 | 4 | set | 0: one set a connection; for several later |
//! | 20 | 4 | reserved | zero |
//! | 24 | 8 | session | drawn by the target, 0 in the handshake |
//! | 32 | 8 | seq | record's number, or a marker's position |
//! | 40 | 4 | body_bytes | |
//! | 44 | 4 | payload_bytes | |
//!
//! All integers are little-endian.

use crate::limits;

/// Size of the header in bytes.
pub const HEADER_BYTES: usize = 48;

/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"DTLP";

/// The first byte that the header's CRC covers.
const CRC_FROM: usize = 8;

macro_rules! message_types {
    ($($(#[$doc:meta])* $name:ident = $number:literal;)*) => {
        /// What a frame is.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[repr(u16)]
        pub enum MessageType {
            $($(#[$doc])* $name = $number,)*
        }

        impl MessageType {
            /// Every type of this version.
            pub const ALL: &'static [Self] = &[$(Self::$name),*];

            /// The type of that number.
            #[must_use]
            pub fn from_number(number: u16) -> Option<Self> {
                match number {
                    $($number => Some(Self::$name),)*
                    _ => None,
                }
            }
        }
    };
}

message_types! {
    /// Source to target, first frame.
    Hello = 1;
    /// Target to source: the set may be shipped.
    Welcome = 2;
    /// Target to source: it may not; the connection ends.
    Refuse = 3;
    /// Source to target, first frame of a pairing.
    Pair = 4;
    /// Target to source: they are paired; the connection ends.
    Paired = 5;
    /// A record with its payload, if it has one.
    Record = 0x10;
    /// A SYNC record whose payload is all zero; the payload is left out.
    Zeroes = 0x11;
    /// A SYNC record of which only the hash is sent, to be compared.
    Hash = 0x12;
    /// A statement about the stream at a position.
    Marker = 0x13;
    /// A run of the frames above, compressed.
    Packed = 0x14;
    /// Source to target: a device that joined or changed size.
    Bind = 0x20;
    /// Target to source: how far it is.
    Ack = 0x30;
    /// Target to source: results of hash comparisons.
    Verified = 0x31;
    /// Target to source: the volumes of the set, after a change.
    Volumes = 0x32;
    /// Target to source: a condition that began or ended.
    Notice = 0x33;
    /// Target to source: what the volumes were worth so far.
    Past = 0x38;
    /// Target to source: the link of the hash chain at a position.
    Proof = 0x34;
    /// Target to source: a volume is perhaps not what it should be.
    Alarm = 0x35;
    /// Target to source: where changes go.
    Staging = 0x39;
    /// Are you there?
    Ping = 0x40;
    /// Yes.
    Pong = 0x41;
    /// The sender closes the connection, and why.
    Bye = 0x42;
}

impl MessageType {
    /// Whether this type belongs to the handshake, whose encoding never changes.
    #[must_use]
    pub fn is_handshake(self) -> bool {
        matches!(
            self,
            Self::Hello | Self::Welcome | Self::Refuse | Self::Pair | Self::Paired
        )
    }

    /// Whether frames of this type have a place in the record sequence.
    #[must_use]
    pub fn is_record(self) -> bool {
        matches!(self, Self::Record | Self::Zeroes | Self::Hash)
    }

    /// Largest payload of this type.
    #[must_use]
    pub fn payload_bytes_max(self) -> usize {
        match self {
            Self::Record | Self::Packed => limits::PAYLOAD_BYTES_MAX,
            Self::Hash => limits::HASH_BYTES,
            _ => 0,
        }
    }
}

/// A frame header; see the module documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// CRC-32 of body and payload.
    pub body_crc: u32,
    /// Protocol version of this frame.
    pub version: u16,
    /// What the frame is.
    pub message_type: MessageType,
    /// Session, drawn by the target.
    pub session: u64,
    /// Sequence number or position.
    pub seq: u64,
    /// Length of the body.
    pub body_bytes: u32,
    /// Length of the payload.
    pub payload_bytes: u32,
}

/// Why a header is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// The first four bytes are something else.
    #[error("The peer does not speak the DTLOOP protocol: a frame began with {0:02x?}")]
    Magic([u8; 4]),
    /// The header was damaged on the way.
    #[error("Frame header damaged: its checksum is {found:08x}, the header gives {computed:08x}")]
    Checksum {
        /// As received.
        found: u32,
        /// As computed.
        computed: u32,
    },
    /// A field that must be zero is not.
    #[error("Frame header field \"{0}\" must be zero")]
    Reserved(&'static str),
    /// A version that was not agreed on.
    #[error("Frame of protocol version {0}; this program speaks {min} to {max}", min = crate::VERSION_MIN, max = crate::VERSION_MAX)]
    Version(u16),
    /// A type that this version does not have.
    #[error("Frame of unknown type {0:#x}")]
    Type(u16),
    /// The body is longer than any body may be.
    #[error("Frame body of {0} bytes; the limit is {max}", max = limits::BODY_BYTES_MAX)]
    BodyLength(u32),
    /// The payload is longer than the type allows.
    #[error("Frame payload of {bytes} bytes; the limit for this type is {max}")]
    PayloadLength {
        /// As claimed.
        bytes: u32,
        /// As allowed.
        max: usize,
    },
}

fn u16_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | (u64::from(u32_at(bytes, at + 4)) << 32)
}

impl Header {
    /// Length of the whole frame.
    #[must_use]
    pub fn frame_bytes(&self) -> usize {
        HEADER_BYTES + self.body_bytes as usize + self.payload_bytes as usize
    }

    /// The bytes of this header, with its checksum.
    #[must_use]
    pub fn pack(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&self.body_crc.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.version.to_le_bytes());
        bytes[14..16].copy_from_slice(&(self.message_type as u16).to_le_bytes());
        bytes[24..32].copy_from_slice(&self.session.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.seq.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.body_bytes.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.payload_bytes.to_le_bytes());
        let crc = crc32fast::hash(&bytes[CRC_FROM..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header and checks everything in it that can be checked without the body.
    ///
    /// # Errors
    ///
    /// The reason for which the header is refused.
    pub fn parse(bytes: &[u8; HEADER_BYTES]) -> Result<Self, HeaderError> {
        if bytes[0..4] != MAGIC {
            return Err(HeaderError::Magic([bytes[0], bytes[1], bytes[2], bytes[3]]));
        }
        let (found, computed) = (u32_at(bytes, 4), crc32fast::hash(&bytes[CRC_FROM..]));
        if found != computed {
            return Err(HeaderError::Checksum { found, computed });
        }
        if u32_at(bytes, 16) != 0 {
            return Err(HeaderError::Reserved("set"));
        }
        if u32_at(bytes, 20) != 0 {
            return Err(HeaderError::Reserved("reserved"));
        }
        let number = u16_at(bytes, 14);
        let message_type = MessageType::from_number(number).ok_or(HeaderError::Type(number))?;
        let header = Self {
            body_crc: u32_at(bytes, 8),
            version: u16_at(bytes, 12),
            message_type,
            session: u64_at(bytes, 24),
            seq: u64_at(bytes, 32),
            body_bytes: u32_at(bytes, 40),
            payload_bytes: u32_at(bytes, 44),
        };
        header.check_version()?;
        header.check_lengths()?;
        Ok(header)
    }

    /// What [`Header::parse`] would refuse is not sent either.
    pub(crate) fn check_encode(&self) -> Result<(), HeaderError> {
        self.check_version()?;
        self.check_lengths()
    }

    fn check_version(&self) -> Result<(), HeaderError> {
        let known = if self.message_type.is_handshake() {
            self.version == crate::VERSION_HANDSHAKE
        } else {
            (crate::VERSION_MIN..=crate::VERSION_MAX).contains(&self.version)
        };
        if known {
            Ok(())
        } else {
            Err(HeaderError::Version(self.version))
        }
    }

    fn check_lengths(&self) -> Result<(), HeaderError> {
        if self.body_bytes as usize > limits::BODY_BYTES_MAX {
            return Err(HeaderError::BodyLength(self.body_bytes));
        }
        let max = self.message_type.payload_bytes_max();
        if self.payload_bytes as usize > max {
            return Err(HeaderError::PayloadLength {
                bytes: self.payload_bytes,
                max,
            });
        }
        Ok(())
    }
}
