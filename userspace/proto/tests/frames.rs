// SPDX-License-Identifier: GPL-2.0-only

//! Round trips of everything, every flipped byte, every truncation, and the limits.

#![expect(
    clippy::cast_possible_truncation,
    clippy::unwrap_used,
    reason = "a test with small numbers"
)]

use dtloop_proto::body::BodyError;
use dtloop_proto::frame::{FrameError, encode_message, encode_record};
use dtloop_proto::header::{HEADER_BYTES, Header, HeaderError, MessageType};
use dtloop_proto::limits::{self, PAYLOAD_BYTES_MAX};
use dtloop_proto::message::*;
use dtloop_proto::packed::PackedError;
use dtloop_proto::record::{RecordError, STATE_COMMITTED, STATE_FAILED};
use dtloop_proto::{
    Code, Codec, Decoded, Frame, Message, Op, Packed, RecordBody, RecordKind, Uuid, decode,
};
use proptest::prelude::*;

fn name() -> impl Strategy<Value = String> {
    "[A-Za-z0-9_][A-Za-z0-9_.-]{0,62}"
}

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,200}"
}

fn uuid() -> impl Strategy<Value = Uuid> {
    any::<[u8; 16]>().prop_map(Uuid)
}

fn options() -> impl Strategy<Value = Vec<HandshakeOption>> {
    let option = (any::<u16>(), prop::collection::vec(any::<u8>(), 0..64));
    prop::collection::vec(
        option.prop_map(|(key, value)| HandshakeOption { key, value }),
        0..4,
    )
}

prop_compose! {
    fn offer()(device: u32, label in name(), sectors in 0..1_u64 << 50, block_bytes: u32) -> DeviceOffer {
        DeviceOffer { device, label, sectors, block_bytes }
    }
}

fn volume_sync() -> impl Strategy<Value = VolumeSync> {
    prop_oneof![
        Just(VolumeSync::Unmirrored),
        Just(VolumeSync::Mirroring),
        Just(VolumeSync::Mirrored)
    ]
}

prop_compose! {
    fn volume()(device: u32, code: u16, text in text(), sync in volume_sync(), sync_seq: u64, sectors: u64)
        -> VolumeReport {
        VolumeReport { device, code: Code(code), text, sync, sync_seq, sectors }
    }
}

prop_compose! {
    fn hello()(version_min: u16, version_max: u16, source_id in uuid(), set in name(), stream_uuid in uuid(),
               generation: u64, first_seq in 1..1_u64 << 40, more in 0..1_u64 << 40,
               devices in prop::collection::vec(offer(), 0..8), options in options()) -> Hello {
        Hello { version_min, version_max, software: "dtagent".into(), source_id, set, stream_uuid, generation,
                first_seq, next_seq: first_seq + more, devices, options }
    }
}

prop_compose! {
    fn welcome()(version: u16, target_id in uuid(), session: u64, known_stream in uuid(), seqs: [u64; 4],
                 volumes in prop::collection::vec(volume(), 0..8), options in options()) -> Welcome {
        Welcome { version, software: "dttarget".into(), target_id, session, known_stream, durable_seq: seqs[0],
                  applied_seq: seqs[1], lost_from: seqs[2], lost_last: seqs[3], volumes, options }
    }
}

fn marker() -> impl Strategy<Value = Marker> {
    prop_oneof![
        any::<u32>().prop_map(|device| Marker::MirrorBegin { device }),
        any::<u32>().prop_map(|device| Marker::MirrorEnd { device }),
        any::<(u32, u16)>().prop_map(|(device, code)| Marker::Unmirrored {
            device,
            code: Code(code)
        }),
        Just(Marker::OrderRestored),
        any::<u16>().prop_map(|code| Marker::OrderLost { code: Code(code) }),
        any::<u32>().prop_map(|device| Marker::Covered { device }),
        any::<u64>().prop_map(|version| Marker::Intent { version }),
        any::<[u8; 16]>().prop_map(|link| Marker::Prove { link }),
        any::<(u32, u64)>().prop_map(|(device, number)| Marker::Cleared { device, number }),
    ]
}

fn refuse() -> impl Strategy<Value = Refuse> {
    (any::<u16>(), text()).prop_map(|(code, text)| Refuse {
        code: Code(code),
        text,
    })
}

fn mismatch() -> impl Strategy<Value = Mismatch> {
    any::<(u64, u32, u64, u32, [u8; 32])>().prop_map(
        |(seq, device, start_sector, sectors, hash)| Mismatch {
            seq,
            device,
            start_sector,
            sectors,
            hash,
        },
    )
}

fn message() -> impl Strategy<Value = Message> {
    prop_oneof![
        hello().prop_map(Message::Hello),
        welcome().prop_map(Message::Welcome),
        refuse().prop_map(Message::Refuse),
        refuse().prop_map(Message::Bye),
        (name(), any::<[u8; 10]>(), options()).prop_map(|(name, token, options)| Message::Pair(
            Pair {
                software: "dtloop".into(),
                name,
                token,
                options,
            }
        )),
        (name(), uuid(), options()).prop_map(|(name, target_id, options)| Message::Paired(
            Paired {
                software: "dttarget".into(),
                name,
                target_id,
                options,
            }
        )),
        marker().prop_map(Message::Marker),
        offer().prop_map(Message::Bind),
        any::<[u64; 4]>().prop_map(|seqs| Message::Ack(Ack {
            durable_seq: seqs[0],
            applied_seq: seqs[1],
            checkpoint_seq: seqs[2],
            journal_bytes: seqs[3],
        })),
        (any::<u64>(), prop::collection::vec(mismatch(), 0..20)).prop_map(
            |(through_seq, mismatches)| Message::Verified(Verified {
                through_seq,
                mismatches
            })
        ),
        prop::collection::vec(volume(), 0..8)
            .prop_map(|volumes| Message::Volumes(Volumes { volumes })),
        (any::<u16>(), text()).prop_map(|(code, text)| Message::Notice(Notice {
            code: Code(code),
            text
        })),
        (0..3_usize, any::<[u64; 3]>()).prop_map(|(phase, numbers)| Message::Staging(Staging {
            phase: [
                StagingPhase::Direct,
                StagingPhase::Staged,
                StagingPhase::Publishing
            ][phase],
            staged_bytes: numbers[0],
            consistent_seq: numbers[1],
            consistent_time_ns: numbers[2],
        })),
        any::<(u32, u64, u64)>().prop_map(|(device, least_bytes, most_bytes)| {
            Message::Marker(Marker::Plan {
                device,
                least_bytes,
                most_bytes,
            })
        }),
        (
            uuid(),
            any::<[u64; 2]>(),
            prop::collection::vec(any::<u32>(), 0..20)
        )
            .prop_map(
                |(stream, [durable_seq, intent_version], mirrored)| Message::Past(Past {
                    stream,
                    durable_seq,
                    intent_version,
                    mirrored,
                })
            ),
        any::<(u64, [u8; 16], [u8; 16])>().prop_map(|(seq, source, target)| Message::Proof(
            Proof {
                seq,
                source,
                target
            }
        )),
        (any::<(u32, u64, u16, u64)>(), text()).prop_map(
            |((device, number, code, unix_ms), text)| Message::Alarm(Alarm {
                device,
                number,
                code: Code(code),
                unix_ms,
                text
            })
        ),
        any::<u64>().prop_map(Message::Ping),
        any::<u64>().prop_map(Message::Pong),
    ]
}

prop_compose! {
    fn record()(numbers: [u64; 3], start_sector in 0..1_u64 << 40, sectors in 1..16_u32, device: u32, flags: u16,
                op in 1..=10_u8, failed: bool, kind in 0..3_usize, fill: u8)
        -> (RecordKind, RecordBody, Vec<u8>) {
        let kind = [RecordKind::Data, RecordKind::Zeroes, RecordKind::Hash][kind];
        let op = if kind == RecordKind::Data { Op::from_number(op).unwrap() } else { Op::Sync };
        let failed = failed && kind == RecordKind::Data;
        let body = RecordBody { epoch: numbers[0], start_sector, time_ns: numbers[1], aux: numbers[2], sectors, device,
                                flags, op, state: if failed { STATE_FAILED } else { STATE_COMMITTED } };
        let bytes = match kind {
            RecordKind::Hash => 32,
            RecordKind::Data if body.has_payload() => sectors as usize * 512,
            _ => 0,
        };
        (kind, body, vec![fill; bytes])
    }
}

fn encoded_record(kind: RecordKind, body: &RecordBody, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_record(&mut bytes, 7, 9, kind, body, payload).unwrap();
    bytes.extend_from_slice(payload);
    bytes
}

fn encoded(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode_message(&mut bytes, 7, 9, message).unwrap();
    bytes
}

fn assert_every_damage_is_noticed(bytes: &[u8]) {
    for at in 0..bytes.len() {
        let mut damaged = bytes.to_vec();
        damaged[at] ^= 1 << (at % 8);
        assert!(decode(&damaged).is_err(), "flip at {at} of {}", bytes.len());
    }
    for end in 0..bytes.len() {
        match decode(&bytes[..end]) {
            Ok(Decoded::Incomplete { needed }) => assert!(needed > end && needed <= bytes.len()),
            other => panic!("cut at {end}: {other:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn messages_round_trip(message in message(), tail in prop::collection::vec(any::<u8>(), 0..60)) {
        let mut bytes = encoded(&message);
        let length = bytes.len();
        bytes.extend_from_slice(&tail);
        let Decoded::Complete { header, frame, bytes: used } = decode(&bytes).unwrap() else {
            panic!("incomplete");
        };
        prop_assert_eq!(used, length);
        prop_assert_eq!((header.session, header.seq), (7, 9));
        prop_assert_eq!(frame, Frame::Message(message));
    }

    #[test]
    fn records_round_trip((kind, body, payload) in record()) {
        let bytes = encoded_record(kind, &body, &payload);
        let Decoded::Complete { header, frame, bytes: used } = decode(&bytes).unwrap() else {
            panic!("incomplete");
        };
        prop_assert_eq!(used, bytes.len());
        prop_assert_eq!((header.session, header.seq), (7, 9));
        prop_assert_eq!(frame, Frame::Record { kind, body, payload: &payload });
    }

    #[test]
    fn every_flip_and_every_cut_of_a_message_is_noticed(message in message()) {
        assert_every_damage_is_noticed(&encoded(&message));
    }

    #[test]
    fn garbage_is_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let refused = matches!(decode(&bytes), Err(_) | Ok(Decoded::Incomplete { .. }));
        prop_assert!(refused);
    }

    #[test]
    fn bodies_of_garbage_are_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for message_type in MessageType::ALL {
            let _ = Message::decode_body(*message_type, &bytes);
        }
        for kind in [RecordKind::Data, RecordKind::Zeroes, RecordKind::Hash] {
            let _ = RecordBody::parse(&bytes, kind, bytes.len());
        }
    }
}

fn plain_record() -> RecordBody {
    RecordBody {
        epoch: 3,
        start_sector: 64,
        time_ns: 5,
        aux: 0,
        sectors: 1,
        device: 2,
        flags: 0,
        op: Op::Write,
        state: STATE_COMMITTED,
    }
}

#[test]
fn every_flip_and_every_cut_of_a_record_is_noticed() {
    assert_every_damage_is_noticed(&encoded_record(
        RecordKind::Data,
        &plain_record(),
        &[0x5a; 512],
    ));
}

#[test]
fn a_list_length_beyond_the_body_does_not_allocate() {
    // A Verified that claims 2^60 mismatches.
    let mut bytes = 4_u64.to_le_bytes().to_vec();
    bytes.extend_from_slice(&(1_u64 << 60).to_le_bytes());
    let error = Message::decode_body(MessageType::Verified, &bytes).unwrap_err();
    assert!(matches!(error, BodyError::Decode(_)), "{error}");
}

#[test]
fn limits_hold_on_encode_and_decode() {
    let long = Message::Notice(Notice {
        code: Code::OK,
        text: "x".repeat(limits::TEXT_BYTES_MAX + 1),
    });
    let mut out = vec![1, 2, 3];
    assert!(encode_message(&mut out, 0, 0, &long).is_err());
    assert_eq!(out, [1, 2, 3], "a refused message leaves nothing behind");

    let many = vec![
        Mismatch {
            seq: 1,
            device: 1,
            start_sector: 0,
            sectors: 8,
            hash: [0; 32]
        };
        limits::RANGES_MAX + 1
    ];
    let verified = Message::Verified(Verified {
        through_seq: 1,
        mismatches: many,
    });
    assert!(matches!(
        verified.check(),
        Err(BodyError::Limit {
            field: "mismatches",
            ..
        })
    ));

    let mut body = Vec::new();
    dtloop_proto::body::encode(
        &Refuse {
            code: Code::OK,
            text: "x".repeat(2000),
        },
        &mut body,
    )
    .unwrap();
    let error = Message::decode_body(MessageType::Refuse, &body).unwrap_err();
    assert!(matches!(
        error,
        BodyError::Limit {
            field: "text",
            found: 2000,
            max: 1024
        }
    ));
}

#[test]
fn the_largest_hello_fits() {
    let device = |index| DeviceOffer {
        device: index,
        label: "l".repeat(limits::NAME_BYTES_MAX),
        sectors: 1 << 40,
        block_bytes: 4096,
    };
    let option = HandshakeOption {
        key: 1,
        value: vec![0; limits::OPTION_BYTES_MAX],
    };
    let hello = Message::Hello(Hello {
        version_min: 1,
        version_max: 1,
        software: "s".repeat(limits::SOFTWARE_BYTES_MAX),
        source_id: Uuid([1; 16]),
        set: "s".repeat(limits::NAME_BYTES_MAX),
        stream_uuid: Uuid([2; 16]),
        generation: 1,
        first_seq: 1,
        next_seq: 1,
        devices: (0..limits::DEVICES_MAX as u32).map(device).collect(),
        options: vec![option; limits::OPTIONS_MAX],
    });
    let bytes = encoded(&hello);
    assert!(matches!(decode(&bytes), Ok(Decoded::Complete { .. })));
}

#[test]
fn trailing_bytes_in_a_body_are_refused() {
    let error = Message::decode_body(MessageType::Ping, &[0; 9]).unwrap_err();
    assert_eq!(error, BodyError::Trailing(1));
}

#[test]
fn a_header_is_refused_with_its_reason() {
    let header = Header {
        body_crc: 0,
        version: 1,
        message_type: MessageType::Ping,
        session: 1,
        seq: 0,
        body_bytes: 8,
        payload_bytes: 0,
    };
    let parse = |header: &Header| Header::parse(&header.pack());
    assert_eq!(parse(&header), Ok(header));
    assert_eq!(
        parse(&Header {
            version: 2,
            ..header
        }),
        Err(HeaderError::Version(2))
    );
    assert_eq!(
        parse(&Header {
            message_type: MessageType::Hello,
            ..header
        }),
        Err(HeaderError::Version(1)),
        "the handshake has its own version"
    );
    assert_eq!(
        parse(&Header {
            body_bytes: 70_000,
            ..header
        }),
        Err(HeaderError::BodyLength(70_000))
    );
    assert_eq!(
        parse(&Header {
            payload_bytes: 1,
            ..header
        }),
        Err(HeaderError::PayloadLength { bytes: 1, max: 0 })
    );
    let mut bytes = header.pack();
    bytes[0] = b'H';
    assert!(matches!(
        Header::parse(&bytes),
        Err(HeaderError::Magic([b'H', b'T', b'L', b'P']))
    ));
    let mut bytes: [u8; HEADER_BYTES] = header.pack();
    bytes[20] = 1;
    let crc = crc32fast::hash(&bytes[8..]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(
        Header::parse(&bytes),
        Err(HeaderError::Reserved("reserved"))
    );
    bytes[20] = 0;
    bytes[14] = 0xee;
    let crc = crc32fast::hash(&bytes[8..]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(Header::parse(&bytes), Err(HeaderError::Type(0xee)));
}

#[test]
fn records_that_contradict_themselves_are_refused() {
    let mut out = Vec::new();
    let mut refused = |kind, body: &RecordBody, payload: &[u8]| match encode_record(
        &mut out, 1, 1, kind, body, payload,
    ) {
        Err(FrameError::Record(error)) => error,
        other => panic!("{other:?}"),
    };
    let body = plain_record();
    assert!(matches!(
        refused(RecordKind::Data, &body, &[0; 511]),
        RecordError::Payload { .. }
    ));
    assert!(matches!(
        refused(
            RecordKind::Data,
            &RecordBody {
                state: STATE_FAILED,
                ..body
            },
            &[0; 512]
        ),
        RecordError::Payload { .. }
    ));
    assert_eq!(
        refused(RecordKind::Hash, &body, &[0; 32]),
        RecordError::Form(Op::Write)
    );
    assert_eq!(
        refused(
            RecordKind::Data,
            &RecordBody { state: 1, ..body },
            &[0; 512]
        ),
        RecordError::State(1)
    );
    let wraps = RecordBody {
        start_sector: u64::MAX,
        ..body
    };
    assert!(matches!(
        refused(RecordKind::Data, &wraps, &[0; 512]),
        RecordError::Range(..)
    ));
}

#[test]
fn versions_are_chosen_where_the_ranges_meet() {
    use dtloop_proto::choose_version;
    assert_eq!(choose_version(1, 1), Some(1));
    assert_eq!(choose_version(0, 9), Some(1));
    assert_eq!(choose_version(2, 9), None);
    assert_eq!(choose_version(0, 0), None);
}

/// A Packed frame with that body and payload, its checksums right.
fn packed_frame(body: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut crc = crc32fast::Hasher::new();
    crc.update(body);
    crc.update(payload);
    let header = Header {
        body_crc: crc.finalize(),
        version: 1,
        message_type: MessageType::Packed,
        session: 1,
        seq: 0,
        body_bytes: u32::try_from(body.len()).unwrap(),
        payload_bytes: u32::try_from(payload.len()).unwrap(),
    };
    [&header.pack()[..], body, payload].concat()
}

#[test]
fn a_packed_frame_says_what_it_unpacks_to_or_is_refused() {
    let body = |codec: u16, reserved: u16, raw: u32| {
        let mut body = vec![];
        body.extend_from_slice(&codec.to_le_bytes());
        body.extend_from_slice(&reserved.to_le_bytes());
        body.extend_from_slice(&raw.to_le_bytes());
        body
    };
    let refused = |body: &[u8], payload: &[u8]| match decode(&packed_frame(body, payload)) {
        Err(FrameError::Packed(error)) => error,
        other => panic!("{other:?}"),
    };
    assert!(decode(&packed_frame(&body(1, 0, 2 << 20), b"x")).is_ok());
    assert_eq!(refused(&body(3, 0, 100), b"x"), PackedError::Codec(3));
    assert_eq!(refused(&body(0, 0, 100), b"x"), PackedError::Codec(0));
    assert_eq!(refused(&body(1, 1, 100), b"x"), PackedError::Reserved);
    let beyond = refused(&body(2, 0, (2 << 20) + 1), b"x");
    assert_eq!(beyond, PackedError::RawLength((2 << 20) + 1));
    assert_eq!(
        refused(&body(2, 0, u32::MAX), b"x"),
        PackedError::RawLength(u32::MAX as usize)
    );
    for (payload, raw) in [(&b""[..], 100), (b"xyz", 3), (b"xyz", 0)] {
        let error = refused(&body(1, 0, raw), payload);
        assert!(matches!(error, PackedError::Useless { .. }), "{error}");
    }
    assert_eq!(refused(&[1, 0, 0], b"x"), PackedError::Length(3));
    let beyond = vec![7; PAYLOAD_BYTES_MAX + 1];
    assert!(matches!(
        decode(&packed_frame(&body(1, 0, 2 << 20), &beyond)),
        Err(FrameError::Header(HeaderError::PayloadLength { .. }))
    ));
    let mut out = vec![];
    let packed = Packed {
        codec: Codec::Lz4,
        raw_bytes: (2 << 20) + 1,
        payload: b"x",
    };
    assert!(dtloop_proto::frame::encode_packed(&mut out, 1, &packed).is_err());
    assert!(out.is_empty(), "what is refused is not sent either");
}
