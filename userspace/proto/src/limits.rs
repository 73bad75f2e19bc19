// SPDX-License-Identifier: GPL-2.0-only

//! Every limit of the wire format, each with its reason. They hold on encode and on decode.

/// Largest body in bytes. The largest real one is a [`Hello`](crate::message::Hello) with
/// [`DEVICES_MAX`] devices of the longest label, about 23 KiB.
pub const BODY_BYTES_MAX: usize = 64 << 10;

/// Largest payload in bytes: the largest record the kernel module makes.
pub const PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// Largest frame in bytes; a receive buffer of this size can always make progress.
pub const FRAME_BYTES_MAX: usize = crate::header::HEADER_BYTES + BODY_BYTES_MAX + PAYLOAD_BYTES_MAX;

/// Longest set name or volume label in bytes, as in the kernel interface (64 with its zero).
pub const NAME_BYTES_MAX: usize = 63;

/// Longest free text in bytes: some sentences. A peer cannot fill a log with one message.
pub const TEXT_BYTES_MAX: usize = 1024;

/// Longest software version text in bytes.
pub const SOFTWARE_BYTES_MAX: usize = 64;

/// Most devices of one set: well above what shares one ring sensibly.
pub const DEVICES_MAX: usize = 256;

/// Most options in a handshake message, and the longest value in bytes.
pub const OPTIONS_MAX: usize = 32;
/// Longest value of one handshake option in bytes.
pub const OPTION_BYTES_MAX: usize = 1024;

/// Most mismatching ranges in one [`Verified`](crate::message::Verified); the target sends
/// several messages for more.
pub const RANGES_MAX: usize = 1024;

/// Unit of `start_sector` and `sectors` in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// Length of a link of the hash chain: 128 bits.
pub const LINK_BYTES: usize = 16;

/// Length of the hash in a Hash frame: blake3, 32 bytes.
pub const HASH_BYTES: usize = 32;

/// Most bytes that a [`Packed`](crate::header::MessageType::Packed) frame unpacks to: a receive buffer of the target.
pub const PACKED_RAW_BYTES_MAX: usize = 2 << 20;

/// Length of the one-time token of a pairing in bytes: 20 bits that name the invitation, 60 that nobody can guess.
pub const TOKEN_BYTES: usize = 10;
