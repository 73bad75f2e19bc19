// SPDX-License-Identifier: GPL-2.0-only

//! A ring that is not what a sound kernel module leaves behind.

use dtloop_abi::testing::FakeStream;
use dtloop_abi::{CaptureStream, Geometry, raw};

/// Records looked at: with a counter that was scribbled over there may seem to be any number of them.
const RECORDS_MAX: u64 = 64;

fn word(bytes: &[u8]) -> u64 {
    let mut word = [0; 8];
    word[..bytes.len().min(8)].copy_from_slice(&bytes[..bytes.len().min(8)]);
    u64::from_le_bytes(word)
}

/// Words are stored all over the ring, twelve bytes each: where, what and which half of the geometry. Then it is read.
pub(crate) fn ring(data: &[u8]) {
    geometry(data);
    let stream = FakeStream::new("fuzz", 16384, 16);
    let device = stream.attach(1, 1024, "vol");
    stream.write(device, 8, &[1; 4096]);
    stream.write(device, 16, &[2; 512]);
    stream.flush(device);
    for store in data.chunks(12).take(32) {
        let place = usize::from(store[0]) | usize::from(*store.get(1).unwrap_or(&0)) << 8;
        stream.scribble(place, word(store.get(4..).unwrap_or_default()));
    }
    let ring = stream.ring();
    let Ok(hold) = ring.hold(raw::SEQ_FIRST) else {
        return;
    };
    for seq in (raw::SEQ_FIRST..hold.end()).take(RECORDS_MAX as usize) {
        let Ok(record) = hold.record(seq) else {
            continue;
        };
        assert_eq!(record.desc.seq, seq);
        assert!(record.payload.len() <= 16384);
        // All of it can be read, and what cannot travel is refused.
        let sum: u64 = record.payload.iter().map(|byte| u64::from(*byte)).sum();
        assert!(sum <= 16384 * 255);
        let mut outbox = dtloop_agent::ship::Outbox::default();
        let _ = outbox.record(1, &record.desc, record.payload);
    }
    drop(hold);
    let end = ring.committed().max(ring.released());
    assert!(ring.release(end.saturating_add(1)).is_err() || end == u64::MAX);
}

/// A geometry that is taken lies inside of its mapping.
fn geometry(data: &[u8]) {
    let mut status = raw::StreamStatus::query(1);
    status.desc_count = u32::try_from(word(data.get(..4).unwrap_or_default())).unwrap_or(u32::MAX);
    let field = |at: usize| word(data.get(at..at + 8).unwrap_or_default());
    (status.payload_bytes, status.desc_offset) = (field(4), field(12));
    (status.payload_offset, status.ring_bytes) = (field(20), field(28));
    let Ok(geometry) = Geometry::new(&status) else {
        return;
    };
    let descs = geometry.desc_offset + geometry.desc_count as usize * raw::DESC_BYTES;
    assert!(descs <= geometry.payload_offset);
    assert!(geometry.payload_offset + geometry.payload_bytes <= geometry.ring_bytes);
}

pub(crate) fn seeds() -> Vec<(String, Vec<u8>)> {
    let descs = raw::PAGE_BYTES as u64;
    let mut sound = 16_u32.to_le_bytes().to_vec();
    for field in [16384, descs, 2 * descs, 2 * descs + 16384] {
        sound.extend_from_slice(&field.to_le_bytes());
    }
    let mut store = vec![0; 12];
    store[0] = 8;
    store[4] = 200;
    vec![("geometry".into(), sound), ("counter".into(), store)]
}
