// SPDX-License-Identifier: GPL-2.0-only

//! The ring's consumer side against the model.

use std::time::Duration;

use dtloop_abi::testing::{Change, FakeStream};
use dtloop_abi::{CaptureStream, Error, Extent, Ring, SyncRequest, raw};

const SMALL: u64 = 16 * 1024;

fn stream() -> (FakeStream, u32) {
    let stream = FakeStream::new("test", SMALL, 16);
    let device = stream.attach(100, 1024, "vol");
    (stream, device)
}

fn release_all(ring: &Ring) {
    ring.release(ring.committed()).expect("complete records");
}

#[test]
fn records_come_in_order_with_their_payload() {
    let (stream, device) = stream();
    stream.write(device, 8, &[1; 4096]).unwrap();
    stream.flush(device).unwrap();
    stream.write(device, 16, &[2; 512]).unwrap();
    let hold = stream.ring().hold(raw::SEQ_FIRST).unwrap();
    let records: Vec<_> = hold.iter().map(Result::unwrap).collect();
    let ops: Vec<_> = records.iter().map(|r| r.desc.op).collect();
    assert_eq!(
        ops,
        [raw::OP_ATTACH, raw::OP_WRITE, raw::OP_FLUSH, raw::OP_WRITE]
    );
    assert_eq!(records[1].payload, [1; 4096]);
    assert_eq!(records[3].payload, [2; 512]);
    assert_eq!((records[1].desc.epoch, records[3].desc.epoch), (0, 1));
}

#[test]
fn an_incomplete_record_hides_all_behind_it() {
    let (stream, device) = stream();
    let change = Change {
        op: raw::OP_WRITE,
        device,
        sectors: 1,
        payload: &[7; 512],
        ..Change::default()
    };
    let late = stream.reserve(&change).unwrap();
    stream.write(device, 8, &[1; 512]).unwrap();
    assert_eq!(stream.ring().committed(), late);
    assert!(stream.ring().next_seq() > late + 1);
    assert!(stream.ring().desc(late).is_err());
    stream.complete(late, None);
    assert_eq!(stream.ring().committed(), late + 2);
    assert_eq!(stream.ring().desc(late).unwrap().seq, late);
}

#[test]
fn a_failed_record_shows_its_errno_and_no_payload() {
    let (stream, device) = stream();
    let change = Change {
        op: raw::OP_WRITE,
        device,
        start_sector: 16,
        sectors: 1,
        payload: &[7; 512],
        ..Change::default()
    };
    let seq = stream.reserve(&change).unwrap();
    stream.complete(seq, Some(5));
    let hold = stream.ring().hold(seq).unwrap();
    let record = hold.record(seq).unwrap();
    assert_eq!(record.desc.failure(), Some(5));
    assert!(record.payload.is_empty());
    let dirty = stream.dirty_next(device, 0, 1024).unwrap();
    assert_eq!(
        dirty,
        Some(Extent {
            start_sector: 16,
            sectors: 8
        })
    );
}

#[test]
fn what_is_held_is_not_released() {
    let (stream, device) = stream();
    let ring = stream.ring();
    let first = stream.write(device, 0, &[1; 4096]).unwrap();
    let hold = ring.hold(first).unwrap();
    assert_eq!(ring.release(ring.committed()).unwrap(), first);
    // The ring has 16 KiB; the held 4 KiB must survive what comes.
    let mut taken = 0;
    while stream.write(device, 0, &[2; 4096]).is_some() {
        taken += 1;
    }
    assert_eq!(taken, 3);
    assert_eq!(hold.payload(first).unwrap(), [1; 4096]);
    drop(hold);
    assert_eq!(ring.released(), first + 1);
    assert!(matches!(ring.hold(first), Err(Error::OutOfRange { .. })));
}

#[test]
fn holds_release_in_any_order() {
    let (stream, device) = stream();
    let ring = stream.ring();
    let a = stream.write(device, 0, &[1; 512]).unwrap();
    let b = stream.write(device, 8, &[2; 512]).unwrap();
    let (hold_a, hold_b, again) = (
        ring.hold(a).unwrap(),
        ring.hold(b).unwrap(),
        ring.hold(a).unwrap(),
    );
    release_all(ring);
    drop(hold_a);
    assert_eq!(ring.released(), a);
    drop(again);
    assert_eq!(ring.released(), b);
    drop(hold_b);
    assert_eq!(ring.released(), ring.committed());
}

#[test]
fn releasing_what_is_not_complete_is_refused() {
    let (stream, _) = stream();
    let ring = stream.ring();
    let end = ring.committed();
    assert!(matches!(
        ring.release(end + 1),
        Err(Error::OutOfRange { .. })
    ));
    assert_eq!(ring.release(end).unwrap(), end);
    assert_eq!(ring.release(1).unwrap(), end, "backwards changes nothing");
}

#[test]
fn a_hold_ends_where_records_did_when_it_was_taken() {
    let (stream, device) = stream();
    let hold = stream.ring().hold(stream.ring().released()).unwrap();
    let seq = stream.write(device, 0, &[1; 512]).unwrap();
    assert!(matches!(hold.record(seq), Err(Error::OutOfRange { .. })));
    assert_eq!(hold.end(), seq);
    assert!(stream.ring().hold(seq + 2).is_err());
    assert!(stream.ring().hold(seq + 1).unwrap().is_empty());
}

#[test]
fn payloads_stay_whole_over_many_rounds_of_the_ring() {
    let (stream, device) = stream();
    let ring = stream.ring();
    release_all(ring);
    for round in 0u32..500 {
        let sectors = 1 + (round * 7) % 13;
        let payload = vec![round.to_le_bytes()[0]; sectors as usize * 512];
        let seq = stream.write(device, 0, &payload).expect("room");
        let hold = ring.hold(seq).unwrap();
        assert_eq!(hold.payload(seq).unwrap(), payload, "round {round}");
        drop(hold);
        ring.release(seq + 1).unwrap();
    }
}

#[test]
fn a_full_ring_leaves_a_gap_record_and_dirty_blocks() {
    let (stream, device) = stream();
    let ring = stream.ring();
    release_all(ring);
    while stream.write(device, 0, &[1; 4096]).is_some() {}
    assert!(stream.write(device, 80, &[2; 4096]).is_none());
    assert!(ring.space_wanted());
    let end = ring.committed();
    ring.release(end).unwrap();
    stream.kick().unwrap();
    let gap = ring.desc(end).unwrap();
    assert_eq!((gap.op, gap.aux, gap.start_sector), (raw::OP_GAP, 2, 16));
    assert!(!ring.space_wanted());

    let first = stream.dirty_next(device, 0, 1024).unwrap().unwrap();
    assert_eq!((first.start_sector, first.sectors), (0, 8));
    let second = stream.dirty_next(device, 8, 1024).unwrap().unwrap();
    assert_eq!((second.start_sector, second.sectors), (80, 8));
    let request = SyncRequest {
        device_id: device,
        start_sector: 80,
        sectors: 8,
        chunk_bytes: 4096,
        cookie: 9,
        clear: true,
    };
    assert_eq!(stream.sync(&request).unwrap(), 8);
    let hold = ring.hold(end + 1).unwrap();
    let record = hold.record(end + 1).unwrap();
    assert_eq!((record.desc.op, record.desc.aux), (raw::OP_SYNC, 9));
    assert_eq!(record.payload, [2; 4096]);
    assert_eq!(stream.dirty_next(device, 8, 1024).unwrap(), None);
}

#[test]
fn sync_takes_only_its_share_of_the_ring() {
    let (stream, device) = stream();
    let request = SyncRequest {
        device_id: device,
        start_sector: 0,
        sectors: 1024,
        chunk_bytes: 4096,
        cookie: 0,
        clear: false,
    };
    assert_eq!(stream.sync(&request).unwrap(), 8);
    assert_eq!(stream.sync(&request).unwrap(), 0);
    release_all(stream.ring());
    assert_eq!(stream.sync(&request).unwrap(), 8);
}

#[test]
fn a_sleeping_consumer_is_woken() {
    let (stream, device) = stream();
    let next = stream.ring().committed();
    assert!(stream.ring().arm_wake(next));
    assert!(!stream.poll(Some(Duration::ZERO)).unwrap());
    let writer = stream.clone();
    let thread = std::thread::spawn(move || writer.write(device, 0, &[1; 512]));
    assert!(stream.poll(Some(Duration::from_secs(60))).unwrap());
    thread.join().unwrap();
    assert!(
        !stream.ring().arm_wake(next),
        "complete: nothing to wait for"
    );
}
