// SPDX-License-Identifier: GPL-2.0-only

//! Control messages. Limits are checked by [`Message::check`] on encode and on decode.

use bincode::{Decode, Encode};

use crate::body::{self, BodyError};
use crate::code::Code;
use crate::header::MessageType;
use crate::limits;
use crate::uuid::Uuid;

/// A key with a value, for what later versions add to the handshake. Unknown keys are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HandshakeOption {
    /// Key; see the `OPTION_*` constants.
    pub key: u16,
    /// Value.
    pub value: Vec<u8>,
}

/// Key of an option of [`Hello`]: the streams that this source offered before, newest first, 16 bytes each.
pub const OPTION_LINEAGE: u16 = 16;

/// Key of an option of [`Hello`]: the source does not compute the hash chain, so the target need not. No value.
pub const OPTION_UNCHAINED: u16 = 18;

/// Key of an option of [`Welcome`]: the link of the hash chain behind `durable_seq`, 16 bytes.
pub const OPTION_CHAIN: u16 = 17;

/// The value of an option, if it was given.
#[must_use]
pub fn option(options: &[HandshakeOption], key: u16) -> Option<&[u8]> {
    let mut options = options.iter();
    options
        .find(|option| option.key == key)
        .map(|option| option.value.as_slice())
}

/// A device of the set as the source describes it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct DeviceOffer {
    /// Device id in the records of this stream.
    pub device: u32,
    /// Name of the volume on the target.
    pub label: String,
    /// Size in sectors.
    pub sectors: u64,
    /// Logical block size in bytes.
    pub block_bytes: u32,
}

/// First frame of a connection, source to target. Its encoding never changes.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// Oldest protocol version the source speaks.
    pub version_min: u16,
    /// Newest protocol version the source speaks.
    pub version_max: u16,
    /// Name and version of the program, for people.
    pub software: String,
    /// Who the source is.
    pub source_id: Uuid,
    /// Name of the set.
    pub set: String,
    /// The stream that sequence numbers belong to.
    pub stream_uuid: Uuid,
    /// Rises whenever the source begins a new stream; a lower one is an older state of the source.
    pub generation: u64,
    /// The oldest record the source can still send.
    pub first_seq: u64,
    /// The first record the source has not made yet.
    pub next_seq: u64,
    /// Devices of the set.
    pub devices: Vec<DeviceOffer>,
    /// For later versions.
    pub options: Vec<HandshakeOption>,
}

/// How far a volume's content can be trusted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[repr(u8)]
pub enum VolumeSync {
    /// Not mirrored since it was bound, since the stream changed or since records passed it by.
    #[default]
    Unmirrored,
    /// A mirror is under way.
    Mirroring,
    /// Mirrored; equal to the source at the set's position unless the set lost its order.
    Mirrored,
}

/// A volume of the set as the target sees it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct VolumeReport {
    /// Device id.
    pub device: u32,
    /// [`Code::OK`] if records of the device are applied.
    pub code: Code,
    /// The reason, if they are not, and what to do.
    pub text: String,
    /// Content.
    pub sync: VolumeSync,
    /// Position at which `sync` was entered.
    pub sync_seq: u64,
    /// Size of the volume in sectors.
    pub sectors: u64,
}

/// Target to source: the set may be shipped from `durable_seq + 1`. Its encoding never changes.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// Protocol version of the connection from here on.
    pub version: u16,
    /// Name and version of the program, for people.
    pub software: String,
    /// Who the target is.
    pub target_id: Uuid,
    /// To be repeated in every frame.
    pub session: u64,
    /// The stream the target knew before; [`Uuid::NONE`] if none.
    pub known_stream: Uuid,
    /// Last record of the offered stream that is durable here; `first_seq - 1` for a new stream.
    pub durable_seq: u64,
    /// Last record of the offered stream that is applied here.
    pub applied_seq: u64,
    /// Record from which on the order is lost; 0 if it is not.
    pub lost_from: u64,
    /// Last record at which the order was lost.
    pub lost_last: u64,
    /// Volumes of the set.
    pub volumes: Vec<VolumeReport>,
    /// For later versions.
    pub options: Vec<HandshakeOption>,
}

/// Target to source instead of [`Welcome`]. Its encoding never changes.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Refuse {
    /// Reason.
    pub code: Code,
    /// Reason for people, and what to do.
    pub text: String,
}

/// First frame of a pairing, source to target, inside a TLS connection in which the source has proved the target's key
/// by the code and shown its own. Its encoding never changes.
#[derive(Clone, PartialEq, Eq, Encode, Decode)]
pub struct Pair {
    /// Name and version of the program, for people.
    pub software: String,
    /// The name that the source proposes for itself.
    pub name: String,
    /// The one-time token of the code: a secret.
    pub token: [u8; limits::TOKEN_BYTES],
    /// For later versions.
    pub options: Vec<HandshakeOption>,
}

impl std::fmt::Debug for Pair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Without the token: what is printed may be logged.
        f.debug_struct("Pair")
            .field("software", &self.software)
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

/// Target to source: from now on each knows the other's key. Its encoding never changes.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Paired {
    /// Name and version of the program, for people.
    pub software: String,
    /// The name under which the target knows the source.
    pub name: String,
    /// Who the target is.
    pub target_id: Uuid,
    /// For later versions.
    pub options: Vec<HandshakeOption>,
}

/// A statement of the source about the stream; the frame's `seq` is the position: it holds when
/// every record below has been applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub enum Marker {
    /// A mirror of the device begins: its volume is neither old nor new state from here on.
    MirrorBegin {
        /// Device id.
        device: u32,
    },
    /// The mirror is complete: the volume equals the device at this position.
    MirrorEnd {
        /// Device id.
        device: u32,
    },
    /// The volume can no longer be trusted, for a reason the source knows.
    Unmirrored {
        /// Device id.
        device: u32,
        /// Reason.
        code: Code,
    },
    /// Every change that was not in the stream has been sent again below this position.
    OrderRestored,
    /// From this position on the target is no prefix, for a reason that is in no record.
    OrderLost {
        /// Reason.
        code: Code,
    },
    /// The volume equals the device but for blocks that are sent again before the next [`Marker::OrderRestored`]: the
    /// source's intent map has them all.
    Covered {
        /// Device id.
        device: u32,
    },
    /// The source's intent file is on disk in this version: an older one is no longer to be relied on.
    Intent {
        /// Version.
        version: u64,
    },
    /// So much of the device is about to be sent again, by a resync or by a mirror. Said before it begins, so that the target
    /// can say whether it has the space to stage it.
    Plan {
        /// Device id.
        device: u32,
        /// At least so many bytes; less, if they are zeroes.
        least_bytes: u64,
        /// At most so many bytes.
        most_bytes: u64,
    },
    /// The source's link of the hash chain behind the record before this position. Answered by [`Proof`].
    Prove {
        /// It.
        link: [u8; limits::LINK_BYTES],
    },
    /// A verification that began after that alarm found nothing that is not repaired.
    Cleared {
        /// Device id.
        device: u32,
        /// Number of the [`Alarm`].
        number: u64,
    },
}

/// Target to source: how far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Ack {
    /// Last record that is durable in the journal. The source may forget it.
    pub durable_seq: u64,
    /// Last record that is applied to the volumes.
    pub applied_seq: u64,
    /// Last record that is durable in the volumes.
    pub checkpoint_seq: u64,
    /// Bytes that are in the journal and not yet durable in the volumes.
    pub journal_bytes: u64,
}

/// A range whose content differed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Mismatch {
    /// The Hash record.
    pub seq: u64,
    /// Device id.
    pub device: u32,
    /// First sector.
    pub start_sector: u64,
    /// Length in sectors.
    pub sectors: u32,
    /// blake3 of what the volume held there; all zero: there is nothing, as the range is not applied.
    pub hash: [u8; limits::HASH_BYTES],
}

/// Target to source: every Hash record up to `through_seq` has been compared, and these differed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Verified {
    /// See above.
    pub through_seq: u64,
    /// Those that differed, in the order of `seq`.
    pub mismatches: Vec<Mismatch>,
}

/// Target to source: the volumes of the set after a [`DeviceOffer`] or a change on the target.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Volumes {
    /// All of them.
    pub volumes: Vec<VolumeReport>,
}

/// Target to source, behind every Welcome and before the Volumes that answer a [`DeviceOffer`]: what the volumes were
/// worth until then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Past {
    /// The stream that the target knew; [`Uuid::NONE`]: none.
    pub stream: Uuid,
    /// Last record of that stream that it has durably.
    pub durable_seq: u64,
    /// The last [`Marker::Intent`] it was told.
    pub intent_version: u64,
    /// Devices, by their present ids, whose volumes were mirrored.
    pub mirrored: Vec<u32>,
}

/// Target to source: a condition of the set that began, or ended with [`Code::OK`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Notice {
    /// Condition.
    pub code: Code,
    /// For people, and what to do.
    pub text: String,
}

/// Target to source: where [`Marker::Prove`] was applied, the target's own link was this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Proof {
    /// The last record before the position.
    pub seq: u64,
    /// The link that the source gave.
    pub source: [u8; limits::LINK_BYTES],
    /// The target's, over the records that it applied.
    pub target: [u8; limits::LINK_BYTES],
}

/// Target to source: something was noticed for which a volume must be verified. Told again with every connection until
/// [`Marker::Cleared`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Alarm {
    /// Device id.
    pub device: u32,
    /// Rises with every alarm of the volume.
    pub number: u64,
    /// Reason.
    pub code: Code,
    /// When it was noticed, in milliseconds since 1970 by the target's clock.
    pub unix_ms: u64,
    /// For people, and what to do.
    pub text: String,
}

/// How the target keeps its volumes consistent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[repr(u8)]
pub enum StagingPhase {
    /// Changes go to the volumes.
    #[default]
    Direct,
    /// Changes go to the staging area; the volumes keep the last consistent state.
    Staged,
    /// The set is consistent again, and what was staged is being written into the volumes.
    Publishing,
}

/// Target to source: where changes go. Sent when that changes, and now and then.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Staging {
    /// Where they go.
    pub phase: StagingPhase,
    /// Bytes in the staging area.
    pub staged_bytes: u64,
    /// The last consistent state that the volumes can be used at: its last record; 0: none.
    pub consistent_seq: u64,
    /// When that was made, in nanoseconds of the source's clock.
    pub consistent_time_ns: u64,
}

/// Key of [`Hello::options`]: an operator lets the target give up the last consistent state of the set for this once. The
/// value is empty.
pub const OPTION_IN_PLACE: u16 = 30;

/// Key of [`Welcome::options`]: where changes go. The value is one byte, the number of the [`StagingPhase`].
pub const OPTION_STAGING: u16 = 31;

impl StagingPhase {
    /// The phase in a welcome: [`Self::Direct`] if it says nothing.
    #[must_use]
    pub fn of(options: &[HandshakeOption]) -> Self {
        let option = options.iter().find(|option| option.key == OPTION_STAGING);
        match option.map(|option| &option.value[..]) {
            Some([1]) => Self::Staged,
            Some([2]) => Self::Publishing,
            _ => Self::Direct,
        }
    }

    /// The option for a welcome; none for [`Self::Direct`].
    #[must_use]
    pub fn option(self) -> Option<HandshakeOption> {
        let value = match self {
            Self::Direct => return None,
            Self::Staged => vec![1],
            Self::Publishing => vec![2],
        };
        let key = OPTION_STAGING;
        Some(HandshakeOption { key, value })
    }
}

/// Any control message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`Welcome`].
    Welcome(Welcome),
    /// See [`Refuse`].
    Refuse(Refuse),
    /// See [`Pair`].
    Pair(Pair),
    /// See [`Paired`].
    Paired(Paired),
    /// See [`Marker`].
    Marker(Marker),
    /// See [`DeviceOffer`].
    Bind(DeviceOffer),
    /// See [`Ack`].
    Ack(Ack),
    /// See [`Verified`].
    Verified(Verified),
    /// See [`Volumes`].
    Volumes(Volumes),
    /// See [`Notice`].
    Notice(Notice),
    /// See [`Staging`].
    Staging(Staging),
    /// See [`Past`].
    Past(Past),
    /// See [`Proof`].
    Proof(Proof),
    /// See [`Alarm`].
    Alarm(Alarm),
    /// A number to be returned.
    Ping(u64),
    /// The number returned.
    Pong(u64),
    /// The sender closes the connection.
    Bye(Refuse),
}

fn check_length(field: &'static str, found: usize, max: usize) -> Result<(), BodyError> {
    if found <= max {
        Ok(())
    } else {
        Err(BodyError::Limit { field, found, max })
    }
}

/// Whether a set name or a label has the form the kernel interface asks for.
#[must_use]
pub fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= limits::NAME_BYTES_MAX
        && name != "."
        && name != ".."
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

fn check_options(options: &[HandshakeOption]) -> Result<(), BodyError> {
    check_length("options", options.len(), limits::OPTIONS_MAX)?;
    options
        .iter()
        .try_for_each(|option| check_length("option", option.value.len(), limits::OPTION_BYTES_MAX))
}

impl DeviceOffer {
    fn check(&self) -> Result<(), BodyError> {
        if !self.label.is_empty() && !is_name(&self.label) {
            return Err(BodyError::Value("label"));
        }
        if self.sectors.checked_mul(limits::SECTOR_BYTES).is_none() {
            return Err(BodyError::Value("sectors"));
        }
        Ok(())
    }
}

fn check_volumes(volumes: &[VolumeReport]) -> Result<(), BodyError> {
    check_length("volumes", volumes.len(), limits::DEVICES_MAX)?;
    volumes
        .iter()
        .try_for_each(|volume| check_length("text", volume.text.len(), limits::TEXT_BYTES_MAX))
}

impl Hello {
    fn check(&self) -> Result<(), BodyError> {
        check_length("software", self.software.len(), limits::SOFTWARE_BYTES_MAX)?;
        check_length("devices", self.devices.len(), limits::DEVICES_MAX)?;
        check_options(&self.options)?;
        if !is_name(&self.set) {
            return Err(BodyError::Value("set"));
        }
        if self.first_seq == 0 || self.first_seq > self.next_seq {
            return Err(BodyError::Value("first_seq"));
        }
        self.devices.iter().try_for_each(DeviceOffer::check)
    }
}

impl Message {
    /// The frame type of this message.
    #[must_use]
    pub fn message_type(&self) -> MessageType {
        match self {
            Self::Hello(_) => MessageType::Hello,
            Self::Welcome(_) => MessageType::Welcome,
            Self::Refuse(_) => MessageType::Refuse,
            Self::Pair(_) => MessageType::Pair,
            Self::Paired(_) => MessageType::Paired,
            Self::Marker(_) => MessageType::Marker,
            Self::Bind(_) => MessageType::Bind,
            Self::Ack(_) => MessageType::Ack,
            Self::Verified(_) => MessageType::Verified,
            Self::Volumes(_) => MessageType::Volumes,
            Self::Notice(_) => MessageType::Notice,
            Self::Staging(_) => MessageType::Staging,
            Self::Past(_) => MessageType::Past,
            Self::Proof(_) => MessageType::Proof,
            Self::Alarm(_) => MessageType::Alarm,
            Self::Ping(_) => MessageType::Ping,
            Self::Pong(_) => MessageType::Pong,
            Self::Bye(_) => MessageType::Bye,
        }
    }

    /// Whether every field is within its limits.
    ///
    /// # Errors
    ///
    /// The field that is not.
    pub fn check(&self) -> Result<(), BodyError> {
        match self {
            Self::Hello(hello) => hello.check(),
            Self::Welcome(welcome) => {
                check_length(
                    "software",
                    welcome.software.len(),
                    limits::SOFTWARE_BYTES_MAX,
                )?;
                check_options(&welcome.options)?;
                check_volumes(&welcome.volumes)
            }
            Self::Refuse(refuse) | Self::Bye(refuse) => {
                check_length("text", refuse.text.len(), limits::TEXT_BYTES_MAX)
            }
            Self::Pair(Pair {
                software,
                name,
                options,
                ..
            })
            | Self::Paired(Paired {
                software,
                name,
                options,
                ..
            }) => {
                check_length("software", software.len(), limits::SOFTWARE_BYTES_MAX)?;
                check_options(options)?;
                if is_name(name) {
                    Ok(())
                } else {
                    Err(BodyError::Value("name"))
                }
            }
            Self::Bind(offer) => offer.check(),
            Self::Verified(verified) => {
                check_length("mismatches", verified.mismatches.len(), limits::RANGES_MAX)
            }
            Self::Volumes(volumes) => check_volumes(&volumes.volumes),
            Self::Notice(notice) => check_length("text", notice.text.len(), limits::TEXT_BYTES_MAX),
            Self::Past(past) => check_length("mirrored", past.mirrored.len(), limits::DEVICES_MAX),
            Self::Alarm(alarm) => check_length("text", alarm.text.len(), limits::TEXT_BYTES_MAX),
            Self::Marker(_)
            | Self::Ack(_)
            | Self::Proof(_)
            | Self::Staging(_)
            | Self::Ping(_)
            | Self::Pong(_) => Ok(()),
        }
    }

    /// Appends the body.
    ///
    /// # Errors
    ///
    /// The field that is beyond its limit.
    pub fn encode_body(&self, out: &mut Vec<u8>) -> Result<(), BodyError> {
        self.check()?;
        match self {
            Self::Hello(value) => body::encode(value, out),
            Self::Welcome(value) => body::encode(value, out),
            Self::Refuse(value) | Self::Bye(value) => body::encode(value, out),
            Self::Pair(value) => body::encode(value, out),
            Self::Paired(value) => body::encode(value, out),
            Self::Marker(value) => body::encode(value, out),
            Self::Bind(value) => body::encode(value, out),
            Self::Ack(value) => body::encode(value, out),
            Self::Verified(value) => body::encode(value, out),
            Self::Volumes(value) => body::encode(value, out),
            Self::Notice(value) => body::encode(value, out),
            Self::Staging(value) => body::encode(value, out),
            Self::Past(value) => body::encode(value, out),
            Self::Proof(value) => body::encode(value, out),
            Self::Alarm(value) => body::encode(value, out),
            Self::Ping(value) | Self::Pong(value) => body::encode(value, out),
        }
    }

    /// Decodes a body of that type. `None` if the type is no control message.
    ///
    /// # Errors
    ///
    /// The reason for which the body is refused.
    pub fn decode_body(message_type: MessageType, bytes: &[u8]) -> Result<Option<Self>, BodyError> {
        let message = match message_type {
            MessageType::Hello => Self::Hello(body::decode(bytes)?),
            MessageType::Welcome => Self::Welcome(body::decode(bytes)?),
            MessageType::Refuse => Self::Refuse(body::decode(bytes)?),
            MessageType::Pair => Self::Pair(body::decode(bytes)?),
            MessageType::Paired => Self::Paired(body::decode(bytes)?),
            MessageType::Marker => Self::Marker(body::decode(bytes)?),
            MessageType::Bind => Self::Bind(body::decode(bytes)?),
            MessageType::Ack => Self::Ack(body::decode(bytes)?),
            MessageType::Verified => Self::Verified(body::decode(bytes)?),
            MessageType::Volumes => Self::Volumes(body::decode(bytes)?),
            MessageType::Notice => Self::Notice(body::decode(bytes)?),
            MessageType::Staging => Self::Staging(body::decode(bytes)?),
            MessageType::Past => Self::Past(body::decode(bytes)?),
            MessageType::Proof => Self::Proof(body::decode(bytes)?),
            MessageType::Alarm => Self::Alarm(body::decode(bytes)?),
            MessageType::Ping => Self::Ping(body::decode(bytes)?),
            MessageType::Pong => Self::Pong(body::decode(bytes)?),
            MessageType::Bye => Self::Bye(body::decode(bytes)?),
            MessageType::Record | MessageType::Zeroes | MessageType::Hash | MessageType::Packed => {
                return Ok(None);
            }
        };
        message.check()?;
        Ok(Some(message))
    }
}

/// Cuts a text to what a message may carry, at a character boundary.
#[must_use]
pub fn bounded_text(mut text: String) -> String {
    if text.len() > limits::TEXT_BYTES_MAX {
        let mut end = limits::TEXT_BYTES_MAX;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
    }
    text
}
