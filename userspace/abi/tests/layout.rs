// SPDX-License-Identifier: GPL-2.0-only

//! The interface as numbers: a change here is a change of the interface and needs a new version.

use std::fmt::Write;
use std::mem::{offset_of, size_of};

use dtloop_abi::raw;
use dtloop_abi::testing::desc_bytes;

#[test]
fn ioctl_numbers_are_what_they_were() {
    let numbers = [
        (raw::IOC_GET_FEATURES, 0xc040_dd00),
        (raw::IOC_STREAM_CREATE, 0xc080_dd01),
        (raw::IOC_STREAM_DESTROY, 0xc040_dd02),
        (raw::IOC_STREAM_SET, 0xc040_dd03),
        (raw::IOC_STREAM_STATUS, 0xc140_dd04),
        (raw::IOC_ATTACH, 0xc090_dd05),
        (raw::IOC_DETACH, 0xc040_dd06),
        (raw::IOC_RESIZE, 0xc040_dd07),
        (raw::IOC_DEVICE_STATUS, 0xc188_dd08),
        (raw::IOC_STREAM_INTENT, 0xc080_dd09),
        (raw::IOC_INTENT_STATUS, 0xc160_dd0a),
        (raw::IOC_INTENT_CLEAR, 0xc040_dd24),
        (raw::IOC_SUSPECT_NEXT, 0xc040_dd25),
        (raw::IOC_SUSPECT_CLEAR, 0xc040_dd26),
        (raw::IOC_SUSPECT_SET, 0xc040_dd27),
        (raw::IOC_SYNC, 0xc040_dd20),
        (raw::IOC_DIRTY_NEXT, 0xc040_dd21),
        (raw::IOC_DIRTY_SET, 0xc040_dd22),
        (raw::IOC_KICK, 0x0000_dd23),
    ];
    for (at, (number, golden)) in numbers.into_iter().enumerate() {
        assert_eq!(number, golden, "number {at} of the table: {number:#x}");
    }
}

#[test]
fn sizes_are_what_they_were() {
    assert_eq!(size_of::<raw::Desc>(), 64);
    assert_eq!(size_of::<raw::ProducerPage>(), 4096);
    assert_eq!(size_of::<raw::ConsumerPage>(), 4096);
    assert_eq!(size_of::<raw::Features>(), 64);
    assert_eq!(size_of::<raw::StreamCreate>(), 128);
    assert_eq!(size_of::<raw::StreamStatus>(), 320);
    assert_eq!(size_of::<raw::Attach>(), 144);
    assert_eq!(size_of::<raw::DeviceStatus>(), 392);
    assert_eq!(size_of::<raw::Sync>(), 64);
    assert_eq!(size_of::<raw::Dirty>(), 64);
    assert_eq!(size_of::<raw::StreamIntent>(), 128);
    assert_eq!(size_of::<raw::IntentStatus>(), 352);
    assert_eq!(size_of::<raw::IntentClear>(), 64);
}

#[test]
fn offsets_are_what_they_were() {
    assert_eq!(offset_of!(raw::Desc, epoch), 8);
    assert_eq!(offset_of!(raw::Desc, start_sector), 16);
    assert_eq!(offset_of!(raw::Desc, payload_pos), 24);
    assert_eq!(offset_of!(raw::Desc, time_ns), 32);
    assert_eq!(offset_of!(raw::Desc, sectors), 40);
    assert_eq!(offset_of!(raw::Desc, payload_bytes), 44);
    assert_eq!(offset_of!(raw::Desc, device), 48);
    assert_eq!(offset_of!(raw::Desc, flags), 52);
    assert_eq!(offset_of!(raw::Desc, op), 54);
    assert_eq!(offset_of!(raw::Desc, state), 55);
    assert_eq!(offset_of!(raw::Desc, aux), 56);
    assert_eq!(offset_of!(raw::ProducerPage, committed), 72);
    assert_eq!(offset_of!(raw::ProducerPage, epoch), 80);
    assert_eq!(offset_of!(raw::ProducerPage, space_wanted), 88);
    assert_eq!(offset_of!(raw::StreamCreate, payload_bytes), 64);
    assert_eq!(offset_of!(raw::StreamStatus, stream_uuid), 72);
    assert_eq!(offset_of!(raw::StreamStatus, next_seq), 128);
    assert_eq!(offset_of!(raw::StreamStatus, devices), 248);
    assert_eq!(offset_of!(raw::StreamStatus, throttles), 264);
    assert_eq!(offset_of!(raw::StreamSet, throttle_delay_ms), 16);
    assert_eq!(offset_of!(raw::Attach, number), 32);
    assert_eq!(offset_of!(raw::Attach, label), 48);
    assert_eq!(offset_of!(raw::DeviceStatus, backing_name), 32);
    assert_eq!(offset_of!(raw::DeviceStatus, dirty_blocks), 192);
    assert_eq!(offset_of!(raw::DeviceStatus, bypass_sectors), 320);
    assert_eq!(offset_of!(raw::Attach, identity), 112);
    assert_eq!(offset_of!(raw::DeviceStatus, intent_found), 328);
    assert_eq!(offset_of!(raw::DeviceStatus, regions_suspect), 344);
    assert_eq!(offset_of!(raw::StreamIntent, source), 24);
    assert_eq!(offset_of!(raw::StreamIntent, found), 40);
    assert_eq!(offset_of!(raw::IntentStatus, bases), 128);
    assert_eq!(offset_of!(raw::Sync, chunk_bytes), 24);
    assert_eq!(offset_of!(raw::Sync, cookie), 32);
    assert_eq!(offset_of!(raw::Dirty, sectors), 16);
}

/// One descriptor, byte for byte.
#[test]
fn a_descriptor_has_its_golden_bytes() {
    let desc = raw::Desc {
        seq: 0x0102_0304_0506_0708,
        epoch: 0x1112_1314_1516_1718,
        start_sector: 0x2122_2324_2526_2728,
        payload_pos: 0x3132_3334_3536_3738,
        time_ns: 0x4142_4344_4546_4748,
        sectors: 0x5152_5354,
        payload_bytes: 0x6162_6364,
        device: 0x7172_7374,
        flags: 0x8182,
        op: 0x91,
        state: 0xa1,
        aux: 0xb1b2_b3b4_b5b6_b7b8,
    };
    let golden = "0807060504030201181716151413121128272625242322213837363534333231\
                  4847464544434241545352516463626174737271828191a1b8b7b6b5b4b3b2b1";
    let mut hex = String::new();
    for byte in desc_bytes(&desc) {
        write!(hex, "{byte:02x}").expect("memory");
    }
    assert_eq!(hex, golden);
}

#[test]
fn constants_are_what_they_were() {
    assert_eq!(raw::RING_MAGIC.to_le_bytes(), *b"DTLOOPR1");
    assert_eq!(raw::ABI_VERSION, 1);
    let ops = [
        raw::OP_WRITE,
        raw::OP_WRITE_ZEROES,
        raw::OP_DISCARD,
        raw::OP_SECURE_ERASE,
        raw::OP_FLUSH,
        raw::OP_SYNC,
        raw::OP_GAP,
        raw::OP_ATTACH,
        raw::OP_DETACH,
        raw::OP_RESIZE,
    ];
    assert_eq!(ops, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(
        (raw::STATE_RESERVED, raw::STATE_COMMITTED, raw::STATE_FAILED),
        (1, 2, 3)
    );
    assert_eq!(
        (raw::POLICY_TRACK, raw::POLICY_BLOCK, raw::POLICY_THROTTLE),
        (0, 1, 2)
    );
}
