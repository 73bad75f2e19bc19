// SPDX-License-Identifier: GPL-2.0-only

//! The bytes on the wire, literally. The handshake messages can never change. The others
//! can change only together with a new protocol version.

#![expect(clippy::unwrap_used, reason = "a test")]

use dtloop_proto::frame::{encode_message, encode_packed, encode_record};
use dtloop_proto::message::*;
use dtloop_proto::packed::OPTION_CODECS;
use dtloop_proto::record::STATE_COMMITTED;
use dtloop_proto::{
    Code, Codec, Decoded, Frame, Message, Op, Packed, RecordBody, RecordKind, Uuid, decode,
};

fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.chunks(16) {
        for byte in line {
            text += &format!("{byte:02x}");
        }
        text.push('\n');
    }
    text
}

fn unhex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

fn assert_golden(name: &str, session: u64, seq: u64, message: &Message, golden: &str) {
    let mut bytes = Vec::new();
    encode_message(&mut bytes, session, seq, message).unwrap();
    assert_eq!(hex(&bytes), golden, "{name} is encoded differently");
    let golden = unhex(golden);
    let Ok(Decoded::Complete { frame, .. }) = decode(&golden) else {
        panic!("{name} is not decoded");
    };
    assert_eq!(
        frame,
        Frame::Message(message.clone()),
        "{name} is decoded differently"
    );
}

#[test]
fn hello_is_frozen() {
    let hello = Hello {
        version_min: 1,
        version_max: 2,
        software: "dtagent 0.1.0".into(),
        source_id: Uuid(*b"source-id-16-byt"),
        set: "db".into(),
        stream_uuid: Uuid(*b"stream-uuid-16by"),
        generation: 3,
        first_seq: 0x0102_0304,
        next_seq: 0x0102_0305,
        devices: vec![DeviceOffer {
            device: 1,
            label: "vol1".into(),
            sectors: 2048,
            block_bytes: 512,
        }],
        options: vec![HandshakeOption {
            key: 9,
            value: vec![0xaa, 0xbb],
        }],
    };
    assert_golden("Hello", 0, 0, &Message::Hello(hello), HELLO);
}

#[test]
fn welcome_is_frozen() {
    let welcome = Welcome {
        version: 1,
        software: "dttarget 0.1.0".into(),
        target_id: Uuid(*b"target-id-16-byt"),
        session: 0x1122_3344_5566_7788,
        known_stream: Uuid(*b"stream-uuid-16by"),
        durable_seq: 10,
        applied_seq: 9,
        lost_from: 4,
        lost_last: 5,
        volumes: vec![VolumeReport {
            device: 1,
            code: Code::VOLUME_TOO_SMALL,
            text: "small".into(),
            sync: VolumeSync::Mirrored,
            sync_seq: 8,
            sectors: 2048,
        }],
        options: vec![],
    };
    assert_golden("Welcome", 0, 0, &Message::Welcome(welcome), WELCOME);
}

#[test]
fn refuse_is_frozen() {
    let refuse = Refuse {
        code: Code::FOREIGN_SOURCE,
        text: "no".into(),
    };
    assert_golden("Refuse", 0, 0, &Message::Refuse(refuse), REFUSE);
}

#[test]
fn pairing_is_frozen() {
    let pair = Pair {
        software: "dtloop 0.1.0".into(),
        name: "alpha".into(),
        token: *b"ten_bytes!",
        options: vec![],
    };
    assert!(!format!("{pair:?}").contains("116"), "the token is shown");
    assert_golden("Pair", 0, 0, &Message::Pair(pair), PAIR);
    let paired = Paired {
        software: "dttarget 0.1.0".into(),
        name: "alpha".into(),
        target_id: Uuid(*b"target-id-16-byt"),
        options: vec![],
    };
    assert_golden("Paired", 0, 0, &Message::Paired(paired), PAIRED);
}

#[test]
fn record_of_version_1() {
    let body = RecordBody {
        epoch: 0x11,
        start_sector: 0x22,
        time_ns: 0x33,
        aux: 0x44,
        sectors: 1,
        device: 0x55,
        flags: 0x0166,
        op: Op::Write,
        state: STATE_COMMITTED,
    };
    let mut bytes = Vec::new();
    encode_record(
        &mut bytes,
        0x77,
        0x88,
        RecordKind::Data,
        &body,
        &[0xa5; 512],
    )
    .unwrap();
    assert_eq!(hex(&bytes), RECORD);
}

#[test]
fn messages_of_version_1() {
    assert_golden(
        "Marker",
        5,
        6,
        &Message::Marker(Marker::MirrorEnd { device: 7 }),
        MARKER,
    );
    assert_golden(
        "Plan",
        5,
        6,
        &Message::Marker(Marker::Plan {
            device: 7,
            least_bytes: 8,
            most_bytes: 9,
        }),
        PLAN,
    );
    let staging = Staging {
        phase: StagingPhase::Publishing,
        staged_bytes: 1,
        consistent_seq: 2,
        consistent_time_ns: 3,
    };
    assert_golden("Staging", 5, 0, &Message::Staging(staging), STAGING);
    let ack = Ack {
        durable_seq: 1,
        applied_seq: 2,
        checkpoint_seq: 3,
        journal_bytes: 4,
    };
    assert_golden("Ack", 5, 0, &Message::Ack(ack), ACK);
    let mismatches = vec![Mismatch {
        seq: 1,
        device: 2,
        start_sector: 3,
        sectors: 4,
        hash: [0xcc; 32],
    }];
    assert_golden(
        "Verified",
        5,
        0,
        &Message::Verified(Verified {
            through_seq: 9,
            mismatches,
        }),
        VERIFIED,
    );
    let past = Past {
        stream: Uuid(*b"stream-uuid-16by"),
        durable_seq: 1,
        intent_version: 2,
        mirrored: vec![3, 4],
    };
    assert_golden("Past", 5, 0, &Message::Past(past), PAST);
    let prove = Marker::Prove { link: [0xab; 16] };
    assert_golden("Prove", 5, 6, &Message::Marker(prove), PROVE);
    let cleared = Marker::Cleared {
        device: 7,
        number: 8,
    };
    assert_golden("Cleared", 5, 6, &Message::Marker(cleared), CLEARED);
    let proof = Proof {
        seq: 5,
        source: [0xab; 16],
        target: [0xcd; 16],
    };
    assert_golden("Proof", 5, 0, &Message::Proof(proof), PROOF);
    let alarm = Alarm {
        device: 7,
        number: 8,
        code: Code::VOLUME_CHANGED,
        unix_ms: 9,
        text: "no".into(),
    };
    assert_golden("Alarm", 5, 0, &Message::Alarm(alarm), ALARM);
    assert_golden("Ping", 5, 0, &Message::Ping(0xabcd), PING);
}

#[test]
fn packed_of_version_1() {
    let packed = Packed {
        codec: Codec::Zstd,
        raw_bytes: 0x0001_2345,
        payload: b"compressed",
    };
    let mut bytes = Vec::new();
    encode_packed(&mut bytes, 5, &packed).unwrap();
    bytes.extend_from_slice(packed.payload);
    assert_eq!(hex(&bytes), PACKED);
    let Ok(Decoded::Complete {
        frame, bytes: used, ..
    }) = decode(&bytes)
    else {
        panic!("Packed is not decoded");
    };
    assert_eq!((frame, used), (Frame::Packed(packed), bytes.len()));
    assert_eq!(OPTION_CODECS, 20);
    assert_eq!((Codec::Lz4 as u8, Codec::Zstd as u8), (1, 2));
}

const HELLO: &str = "\
44544c500907b835fd8e14d400000100
00000000000000000000000000000000
00000000000000009300000000000000
010002000d0000000000000064746167
656e7420302e312e30736f757263652d
69642d31362d62797402000000000000
00646273747265616d2d757569642d31
36627903000000000000000403020100
00000005030201000000000100000000
00000001000000040000000000000076
6f6c3100080000000000000002000001
00000000000000090002000000000000
00aabb
";
const WELCOME: &str = "\
44544c5002cb67d7bb6e643700000200
00000000000000000000000000000000
00000000000000009700000000000000
01000e00000000000000647474617267
657420302e312e307461726765742d69
642d31362d6279748877665544332211
73747265616d2d757569642d31366279
0a000000000000000900000000000000
04000000000000000500000000000000
01000000000000000100000006000500
000000000000736d616c6c0200000008
00000000000000000800000000000000
00000000000000
";
const REFUSE: &str = "\
44544c509d7ec75142fecd2e00000300
00000000000000000000000000000000
00000000000000000c00000000000000
030002000000000000006e6f
";
const PAIR: &str = "\
44544c5066a4dcf6b0989d9300000400
00000000000000000000000000000000
00000000000000003300000000000000
0c0000000000000064746c6f6f702030
2e312e300500000000000000616c7068
6174656e5f6279746573210000000000
000000
";
const PAIRED: &str = "\
44544c509d78c2138a897c1100000500
00000000000000000000000000000000
00000000000000003b00000000000000
0e000000000000006474746172676574
20302e312e300500000000000000616c
7068617461726765742d69642d31362d
6279740000000000000000
";
const RECORD: &str = "\
44544c506163339bc471a57e01001000
00000000000000007700000000000000
88000000000000003000000000020000
11000000000000002200000000000000
33000000000000004400000000000000
01000000550000006601010200000000
";
const MARKER: &str = "\
44544c502241f6ac4ee75f3401001300
00000000000000000500000000000000
06000000000000000800000000000000
0100000007000000
";
const PLAN: &str = "\
44544c509a980659a0dfc11f01001300
00000000000000000500000000000000
06000000000000001800000000000000
07000000070000000800000000000000
0900000000000000
";
const STAGING: &str = "\
44544c501d9e1dcb74ca110b01003900
00000000000000000500000000000000
00000000000000001c00000000000000
02000000010000000000000002000000
000000000300000000000000
";
const ACK: &str = "\
44544c50fa55555e0026699c01003000
00000000000000000500000000000000
00000000000000002000000000000000
01000000000000000200000000000000
03000000000000000400000000000000
";
const VERIFIED: &str = "\
44544c50ab9b611812f7fdac01003100
00000000000000000500000000000000
00000000000000004800000000000000
09000000000000000100000000000000
01000000000000000200000003000000
0000000004000000cccccccccccccccc
cccccccccccccccccccccccccccccccc
cccccccccccccccc
";
const PROVE: &str = "\
44544c50482a40756825350701001300
00000000000000000500000000000000
06000000000000001400000000000000
08000000abababababababababababab
abababab
";
const CLEARED: &str = "\
44544c503e2755c8b1b7bd9601001300
00000000000000000500000000000000
06000000000000001000000000000000
09000000070000000800000000000000
";
const PROOF: &str = "\
44544c50b1930808207666f901003400
00000000000000000500000000000000
00000000000000002800000000000000
0500000000000000abababababababab
ababababababababcdcdcdcdcdcdcdcd
cdcdcdcdcdcdcdcd
";
const ALARM: &str = "\
44544c5023a5cf94106b501201003500
00000000000000000500000000000000
00000000000000002000000000000000
07000000080000000000000016000900
00000000000002000000000000006e6f
";
const PAST: &str = "\
44544c50c5d6cf537a8d28d501003800
00000000000000000500000000000000
00000000000000003000000000000000
73747265616d2d757569642d31366279
01000000000000000200000000000000
02000000000000000300000004000000
";
const PING: &str = "\
44544c50518d5e541b0a2dc101004000
00000000000000000500000000000000
00000000000000000800000000000000
cdab000000000000
";
const PACKED: &str = "\
44544c507e3bdf376e75184601001400
00000000000000000500000000000000
0000000000000000080000000a000000
0200000045230100636f6d7072657373
6564
";
