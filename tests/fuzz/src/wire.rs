// SPDX-License-Identifier: GPL-2.0-only

//! Frames, messages and compressed runs.

use std::cell::RefCell;

use dtloop_pack::{Method, Packer, Unpacker};
use dtloop_proto::frame::{encode_message, encode_packed, encode_record};
use dtloop_proto::header::{HEADER_BYTES, MAGIC};
use dtloop_proto::limits::{FRAME_BYTES_MAX, PACKED_RAW_BYTES_MAX, PAYLOAD_BYTES_MAX};
use dtloop_proto::message::*;
use dtloop_proto::record::STATE_COMMITTED;
use dtloop_proto::{
    Code, Codec, Decoded, Frame, Header, Message, MessageType, Op, Packed, RecordBody, RecordKind,
    Uuid, decode,
};

/// Makes checksums right, so that what is behind them is reached: for every place that looks like a header, its own and
/// that of what follows.
fn repair(data: &mut [u8]) {
    let mut at = 0;
    while let Some(frame) = data.get_mut(at..).filter(|rest| rest.len() >= HEADER_BYTES) {
        frame[..4].copy_from_slice(&MAGIC);
        let length = |at: usize| {
            u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]) as usize
        };
        let bytes = HEADER_BYTES
            .saturating_add(length(40))
            .saturating_add(length(44));
        if let Some(content) = frame.get(HEADER_BYTES..bytes) {
            let crc = crc32fast::hash(content);
            frame[8..12].copy_from_slice(&crc.to_le_bytes());
        }
        let crc = crc32fast::hash(&frame[8..HEADER_BYTES]);
        frame[4..8].copy_from_slice(&crc.to_le_bytes());
        at += bytes.min(data.len());
    }
}

/// Decodes the frame at the beginning and checks that it is what encoding it again gives. Returns its length.
fn check_frame(data: &[u8]) -> Option<usize> {
    match decode(data) {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            None
        }
        Ok(Decoded::Incomplete { needed }) => {
            assert!(needed > data.len() && needed <= FRAME_BYTES_MAX);
            None
        }
        Ok(Decoded::Complete {
            header,
            frame,
            bytes,
        }) => {
            assert!((HEADER_BYTES..=data.len()).contains(&bytes) && bytes == header.frame_bytes());
            let mut again = vec![];
            let Header { session, seq, .. } = header;
            match frame {
                Frame::Record {
                    kind,
                    body,
                    payload,
                } => {
                    encode_record(&mut again, session, seq, kind, &body, payload).unwrap();
                    again.extend_from_slice(payload);
                }
                Frame::Packed(packed) => {
                    assert!(packed.raw_bytes <= PACKED_RAW_BYTES_MAX);
                    encode_packed(&mut again, session, &packed).unwrap();
                    again.extend_from_slice(packed.payload);
                    // It has no number.
                    if seq != 0 {
                        return Some(bytes);
                    }
                }
                Frame::Message(message) => {
                    encode_message(&mut again, session, seq, &message).unwrap();
                }
            }
            assert_eq!(again, data[..bytes], "it is encoded differently");
            Some(bytes)
        }
    }
}

/// A stream of frames. The first byte says whether checksums are made right.
pub(crate) fn frames(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else {
        return;
    };
    let mut data = data.to_vec();
    if mode & 1 == 0 {
        repair(&mut data);
    }
    let mut at = 0;
    while let Some(bytes) = check_frame(&data[at..]) {
        // A frame that is cut anywhere is no frame yet.
        let cut = at + bytes - 1;
        assert!(matches!(
            decode(&data[at..cut]),
            Ok(Decoded::Incomplete { needed }) if needed <= bytes
        ));
        at += bytes;
    }
}

/// The body of a message: its type, then its bytes.
pub(crate) fn messages(data: &[u8]) {
    let Some((number, body)) = data.split_first() else {
        return;
    };
    let Some(message_type) = MessageType::from_number(u16::from(*number)) else {
        return;
    };
    let Ok(Some(message)) = Message::decode_body(message_type, body) else {
        return;
    };
    assert_eq!(message.message_type(), message_type);
    let mut again = vec![];
    message.encode_body(&mut again).unwrap();
    assert_eq!(again, body, "it is encoded differently");
}

thread_local! {
    static UNPACKER: RefCell<Unpacker> = RefCell::default();
}

/// A compressed run: codec, three bytes of its length, then the payload.
pub(crate) fn packed(data: &[u8]) {
    let Some(([codec, a, b, c], payload)) = data.split_first_chunk() else {
        return;
    };
    let Some(codec) = Codec::from_number(u16::from(*codec)) else {
        return;
    };
    let packed = Packed {
        codec,
        raw_bytes: u32::from_le_bytes([*a, *b, *c, 0]) as usize,
        payload,
    };
    let mut frame = vec![];
    if encode_packed(&mut frame, 1, &packed).is_err() {
        return;
    }
    frame.extend_from_slice(payload);
    assert_eq!(check_frame(&frame), Some(frame.len()));
    // Behind what it may fill there are bytes that must stay.
    const CANARY: [u8; 64] = [0x5a; 64];
    let mut out = vec![0; packed.raw_bytes + CANARY.len()];
    let (plain, canary) = out.split_at_mut(packed.raw_bytes);
    canary.copy_from_slice(&CANARY);
    let unpacked = UNPACKER.with_borrow_mut(|unpacker| unpacker.unpack(codec, payload, plain));
    assert_eq!(canary, CANARY, "it wrote beyond its end");
    if unpacked.is_err() {
        return;
    }
    // It is the same when the tables are new.
    let mut other = vec![1; packed.raw_bytes];
    Unpacker::default()
        .unpack(codec, payload, &mut other)
        .unwrap();
    assert_eq!(other, plain);
    let mut at = 0;
    while let Some(bytes) = check_frame(&plain[at..]) {
        at += bytes;
    }
}

fn record(kind: RecordKind, op: Op, sectors: u32, payload: &[u8]) -> Vec<u8> {
    let body = RecordBody {
        epoch: 1,
        start_sector: 64,
        time_ns: 1_700_000_000_000_000_000,
        aux: 0,
        sectors,
        device: 1,
        flags: 0,
        op,
        state: STATE_COMMITTED,
    };
    let mut bytes = vec![];
    encode_record(&mut bytes, 7, 9, kind, &body, payload).unwrap();
    bytes.extend_from_slice(payload);
    bytes
}

fn all_messages() -> Vec<Message> {
    let report = VolumeReport {
        device: 1,
        code: Code::VOLUME_TOO_SMALL,
        text: "small".into(),
        sync: VolumeSync::Mirrored,
        sync_seq: 8,
        sectors: 2048,
    };
    let offer = DeviceOffer {
        device: 1,
        label: "vol1".into(),
        sectors: 2048,
        block_bytes: 512,
    };
    let option = HandshakeOption {
        key: 20,
        value: vec![1, 2],
    };
    let refuse = Refuse {
        code: Code::FOREIGN_SOURCE,
        text: "no".into(),
    };
    vec![
        Message::Hello(Hello {
            version_min: 1,
            version_max: 1,
            software: "dtagent".into(),
            source_id: Uuid([1; 16]),
            set: "db".into(),
            stream_uuid: Uuid([2; 16]),
            generation: 3,
            first_seq: 4,
            next_seq: 5,
            devices: vec![offer.clone()],
            options: vec![option.clone()],
        }),
        Message::Welcome(Welcome {
            version: 1,
            software: "dttarget".into(),
            target_id: Uuid([3; 16]),
            session: 7,
            known_stream: Uuid([2; 16]),
            durable_seq: 10,
            applied_seq: 9,
            lost_from: 0,
            lost_last: 0,
            volumes: vec![report.clone()],
            options: vec![option],
        }),
        Message::Refuse(refuse.clone()),
        Message::Marker(Marker::MirrorEnd { device: 7 }),
        Message::Bind(offer),
        Message::Ack(Ack::default()),
        Message::Volumes(Volumes {
            volumes: vec![report],
        }),
        Message::Notice(Notice {
            code: Code::OK,
            text: String::new(),
        }),
        Message::Verified(Verified {
            through_seq: 9,
            mismatches: vec![],
        }),
        Message::Ping(1),
        Message::Pong(1),
        Message::Bye(refuse),
        Message::Marker(Marker::Plan {
            device: 7,
            least_bytes: 8,
            most_bytes: 9,
        }),
        Message::Marker(Marker::Prove { link: [6; 16] }),
        Message::Marker(Marker::Cleared {
            device: 7,
            number: 8,
        }),
        Message::Past(Past {
            stream: Uuid([2; 16]),
            durable_seq: 9,
            intent_version: 3,
            mirrored: vec![7],
        }),
        Message::Staging(Staging::default()),
        Message::Proof(Proof {
            seq: 5,
            source: [6; 16],
            target: [7; 16],
        }),
        Message::Alarm(Alarm {
            device: 7,
            number: 8,
            code: Code::VOLUME_CHANGED,
            unix_ms: 9,
            text: "changed".into(),
        }),
        Message::Verified(Verified {
            through_seq: 9,
            mismatches: vec![Mismatch {
                seq: 8,
                device: 7,
                start_sector: 64,
                sectors: 8,
                hash: [5; 32],
            }],
        }),
    ]
}

fn run() -> Vec<u8> {
    let mut run = record(RecordKind::Data, Op::Write, 1, &[9; 512]);
    run.extend(record(RecordKind::Zeroes, Op::Sync, 8, &[]));
    run.extend(record(RecordKind::Data, Op::Flush, 0, &[]));
    run
}

pub(crate) fn frame_seeds() -> Vec<(String, Vec<u8>)> {
    let mut seeds = vec![];
    let mut add = |name: &str, bytes: Vec<u8>| {
        seeds.push((name.to_owned(), [&[1][..], &bytes].concat()));
    };
    add("write", record(RecordKind::Data, Op::Write, 1, &[9; 512]));
    add("zeroes", record(RecordKind::Zeroes, Op::Sync, 8, &[]));
    add("hash", record(RecordKind::Hash, Op::Sync, 8, &[5; 32]));
    add("several", run());
    for (index, message) in all_messages().iter().enumerate() {
        let mut bytes = vec![];
        encode_message(&mut bytes, 7, 0, message).unwrap();
        add(&format!("message-{index:02}"), bytes);
    }
    for (name, bytes) in packed_seeds() {
        let packed = Packed {
            codec: Codec::from_number(bytes[0].into()).unwrap(),
            raw_bytes: run().len(),
            payload: &bytes[4..],
        };
        let mut frame = vec![];
        encode_packed(&mut frame, 7, &packed).unwrap();
        frame.extend_from_slice(packed.payload);
        add(&name, frame);
    }
    seeds
}

pub(crate) fn message_seeds() -> Vec<(String, Vec<u8>)> {
    let seed = |(index, message): (usize, &Message)| {
        let number = u8::try_from(message.message_type() as u16).unwrap();
        let mut bytes = vec![number];
        message.encode_body(&mut bytes).unwrap();
        (format!("message-{index:02}"), bytes)
    };
    all_messages().iter().enumerate().map(seed).collect()
}

pub(crate) fn packed_seeds() -> Vec<(String, Vec<u8>)> {
    let run = run();
    let methods = [
        ("lz4", Method::Lz4),
        ("zstd-1", Method::Zstd(1)),
        ("zstd-9", Method::Zstd(9)),
    ];
    let seed = |(name, method): (&str, Method)| {
        let mut packer = Packer::default();
        let payload = packer.pack(method, &run, PAYLOAD_BYTES_MAX).unwrap();
        let raw = u32::try_from(run.len()).unwrap().to_le_bytes();
        let bytes = [&[method.codec() as u8, raw[0], raw[1], raw[2]], payload].concat();
        (name.to_owned(), bytes)
    };
    methods.into_iter().map(seed).collect()
}
