// SPDX-License-Identifier: GPL-2.0-only

//! The ring against a plain list of records.

use std::collections::VecDeque;

use proptest::{collection::vec, prelude::*, sample::Index};

use crate::{
    abi,
    ring::{BadRelease, Gap, Meta, NoRoom, Ring},
};

fn ring(desc_count: usize, payload_bytes: u64, sync_bytes_max: u64) -> Ring<Vec<Meta>> {
    Ring::new(vec![Meta::EMPTY; desc_count], payload_bytes, sync_bytes_max)
        .expect("the sizes are sane")
}

struct Record {
    seq: u64,
    /// Payload as (position, length).
    payload: (u64, u64),
    /// Positions taken: the payload, and the padding before it.
    taken: u64,
    sync_bytes: u64,
    complete: bool,
}

/// Unreleased records in order.
struct Model {
    records: VecDeque<Record>,
    next_seq: u64,
    head: u64,
    desc_count: usize,
    payload_bytes: u64,
    sync_bytes_max: u64,
}

impl Model {
    fn used(&self) -> u64 {
        self.records.iter().map(|r| r.taken).sum()
    }

    fn sync_used(&self) -> u64 {
        self.records.iter().map(|r| r.sync_bytes).sum()
    }

    fn released(&self) -> u64 {
        self.records.front().map_or(self.next_seq, |r| r.seq)
    }

    fn committed(&self) -> u64 {
        self.records
            .iter()
            .find(|r| !r.complete)
            .map_or(self.next_seq, |r| r.seq)
    }

    fn reserve(&mut self, length: u64, is_sync: bool) -> Result<(u64, u64), NoRoom> {
        if self.records.len() == self.desc_count {
            return Err(NoRoom::Ring);
        }
        if length > self.payload_bytes / 4 {
            return Err(NoRoom::TooLarge);
        }
        let mut pos = self.head;
        if length > 0 {
            // Try one sector after the other.
            let align = if length >= 4096 { 4096 } else { 512 };
            while pos % align != 0 || pos % self.payload_bytes + length > self.payload_bytes {
                pos += 512;
            }
        }
        let taken = pos + length - self.head;
        if self.used() + taken > self.payload_bytes {
            return Err(NoRoom::Ring);
        }
        let sync_bytes = if is_sync { length } else { 0 };
        if sync_bytes > 0
            && self.sync_used() > 0
            && self.sync_used() + sync_bytes > self.sync_bytes_max
        {
            return Err(NoRoom::SyncShare);
        }
        let seq = self.next_seq;
        self.records.push_back(Record {
            seq,
            payload: (pos, length),
            taken,
            sync_bytes,
            complete: false,
        });
        self.next_seq += 1;
        self.head += taken;
        Ok((seq, if length > 0 { pos } else { 0 }))
    }
}

#[derive(Clone, Debug)]
enum Step {
    Reserve(u32, bool),
    Complete(Index),
    CompleteAnything(u64),
    Release(Index),
    ReleaseAnything(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (prop_oneof![0..20_u32, 0..140_u32], prop::bool::weighted(0.3)).prop_map(|(sectors, sync)| Step::Reserve(sectors * 512, sync)),
        8 => any::<Index>().prop_map(Step::Complete),
        1 => prop_oneof![0..100_u64, any::<u64>()].prop_map(Step::CompleteAnything),
        2 => any::<Index>().prop_map(Step::Release),
        1 => prop_oneof![0..100_u64, any::<u64>()].prop_map(Step::ReleaseAnything),
    ]
}

fn run(desc_count: usize, payload_bytes: u64, sync_bytes_max: u64, steps: Vec<Step>) {
    let mut ring = ring(desc_count, payload_bytes, sync_bytes_max);
    let mut model = Model {
        records: VecDeque::new(),
        next_seq: abi::SEQ_FIRST,
        head: 0,
        desc_count,
        payload_bytes,
        sync_bytes_max,
    };
    for step in steps {
        let committed = model.committed();
        match step {
            Step::Reserve(bytes, is_sync) => {
                let empty = model.records.is_empty();
                let got = ring.reserve(bytes, is_sync);
                assert_eq!(
                    got.map(|r| (r.seq, r.pos)),
                    model.reserve(u64::from(bytes), is_sync)
                );
                assert!(
                    !empty || got.is_ok() || got == Err(NoRoom::TooLarge),
                    "an empty ring refuses"
                );
            }
            Step::Complete(which) => {
                let open: Vec<u64> = model
                    .records
                    .iter()
                    .filter(|r| !r.complete)
                    .map(|r| r.seq)
                    .collect();
                if open.is_empty() {
                    continue;
                }
                let seq = open[which.index(open.len())];
                model
                    .records
                    .iter_mut()
                    .for_each(|r| r.complete |= r.seq == seq);
                assert_eq!(ring.complete(seq), model.committed() != committed);
                assert!(!ring.complete(seq), "completed twice");
            }
            Step::CompleteAnything(seq) => {
                model
                    .records
                    .iter_mut()
                    .for_each(|r| r.complete |= r.seq == seq);
                assert_eq!(ring.complete(seq), model.committed() != committed);
            }
            Step::Release(which) => {
                let span = committed - model.released();
                let to = model.released()
                    + which.index(usize::try_from(span).expect("small") + 1) as u64;
                assert_eq!(ring.release(to), Ok(to != model.released()));
                model.records.retain(|r| r.seq >= to);
            }
            Step::ReleaseAnything(to) => {
                let valid = (model.released()..=committed).contains(&to);
                let expected = if valid {
                    Ok(to != model.released())
                } else {
                    Err(BadRelease)
                };
                assert_eq!(ring.release(to), expected);
                if valid {
                    model.records.retain(|r| r.seq >= to);
                }
            }
        }
        assert_eq!(
            (
                ring.next_seq(),
                ring.committed(),
                ring.released(),
                ring.used_bytes(),
                ring.sync_bytes()
            ),
            (
                model.next_seq,
                model.committed(),
                model.released(),
                model.used(),
                model.sync_used()
            ),
        );
        assert_eq!(ring.free_descs() as usize, desc_count - model.records.len());
        assert_eq!(
            ring.room_for_capture_again(),
            model.used() <= payload_bytes / 4 * 3
                && model.records.len() <= desc_count - (desc_count / 4).max(1),
        );
        check_payloads(&model);
    }
}

/// Payloads in use do not share a byte of the area.
fn check_payloads(model: &Model) {
    let mut spans: Vec<(u64, u64)> = model
        .records
        .iter()
        .filter(|r| r.payload.1 > 0)
        .map(|r| (r.payload.0 % model.payload_bytes, r.payload.1))
        .collect();
    spans.sort_unstable();
    assert!(spans
        .windows(2)
        .all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
    assert!(spans
        .iter()
        .all(|span| span.0 + span.1 <= model.payload_bytes));
}

proptest! {
    #[test]
    fn ring_agrees_with_a_list_of_records(
        desc_shift in 0..6_u32, payload_shift in 14..19_u32, sync_max in 0..300_000_u64, steps in vec(step(), 0..300),
    ) {
        run(1 << desc_shift, 1 << payload_shift, sync_max / 512 * 512, steps);
    }
}

/// The steps of a writer, a consumer and time, for the gap.
#[derive(Clone, Debug)]
enum GapStep {
    /// A change of a device: recorded if there is room, else missed.
    Change { device: u32, sectors: u16 },
    /// Devices change: recorded if there is room, else missed.
    Devices,
    /// Everything is completed and a part of it released.
    Release(Index),
}

fn gap_step() -> impl Strategy<Value = GapStep> {
    prop_oneof![
        12 => (1..3_u32, 0..100_u16).prop_map(|(device, sectors)| GapStep::Change { device, sectors }),
        1 => Just(GapStep::Devices),
        2 => any::<Index>().prop_map(GapStep::Release),
    ]
}

fn complete_all(ring: &mut Ring<Vec<Meta>>) {
    for seq in ring.committed()..ring.next_seq() {
        assert!(ring.complete(seq));
    }
}

/// What a stream should have said of changes that were missed since its last GAP record.
#[derive(Default)]
struct Missed {
    changes: Vec<(u32, u64)>,
    devices_changed: bool,
    since_ns: Option<u64>,
}

fn check_gap(gap: &Gap, missed: &Missed) {
    let devices: std::collections::BTreeSet<u32> = missed.changes.iter().map(|c| c.0).collect();
    let only = devices.iter().next().filter(|_| devices.len() == 1);
    assert_eq!(gap.changes, missed.changes.len() as u64);
    assert_eq!(gap.sectors, missed.changes.iter().map(|c| c.1).sum::<u64>());
    assert_eq!(gap.device, only.copied().unwrap_or(abi::DEVICE_NONE));
    assert_eq!(gap.devices_changed, missed.devices_changed);
    assert_eq!(Some(gap.since_ns), missed.since_ns);
}

proptest! {
    /// After the first unrecorded change nothing is recorded before the GAP record, which tells of
    /// all of them, and comes as soon as a quarter of the ring is free.
    #[test]
    fn nothing_is_recorded_between_an_unrecorded_change_and_the_gap_record(
        desc_shift in 0..5_u32, steps in vec(gap_step(), 0..300),
    ) {
        let mut ring = ring(1 << desc_shift, 64 << 10, 0);
        let mut missed = Missed::default();
        for (now_ns, step) in (1..).zip(steps) {
            let open = missed.since_ns.is_some();
            prop_assert_eq!(ring.gap().is_open(), open);
            let (device, bytes) = match step {
                GapStep::Change { device, sectors } => (Some(device), u32::from(sectors.min(32)) * 512),
                GapStep::Devices => (None, 0),
                GapStep::Release(which) => {
                    complete_all(&mut ring);
                    let span = usize::try_from(ring.committed() - ring.released()).unwrap();
                    ring.release(ring.released() + which.index(span + 1) as u64).unwrap();
                    let due = open && ring.room_for_capture_again();
                    let next_seq = ring.next_seq();
                    let written = ring.reserve_gap();
                    prop_assert_eq!(written.is_some(), due);
                    if let Some((place, gap)) = written {
                        prop_assert_eq!((place.seq, place.pos), (next_seq, 0));
                        check_gap(&gap, &std::mem::take(&mut missed));
                    }
                    continue;
                }
            };
            let reserved = ring.reserve(bytes, false);
            prop_assert_eq!(open, reserved == Err(NoRoom::Gap));
            if reserved.is_err() {
                missed.since_ns.get_or_insert(now_ns);
                if let Some(device) = device {
                    ring.miss(device, u64::from(bytes / 512), now_ns);
                    missed.changes.push((device, u64::from(bytes / 512)));
                } else {
                    ring.miss_devices(now_ns);
                    missed.devices_changed = true;
                }
            }
        }
        // Whatever happened: once everything is released, the gap is told.
        complete_all(&mut ring);
        ring.release(ring.committed()).unwrap();
        prop_assert_eq!(ring.reserve_gap().is_some(), missed.since_ns.is_some());
        prop_assert_eq!(ring.gap(), &Gap::CLOSED);
    }
}

#[test]
fn gap_is_taken_once() {
    let mut gap = Gap::CLOSED;
    assert_eq!(gap.take(), None);
    gap.add_devices(5);
    assert!(gap.is_open());
    gap.add(7, 10, 6);
    gap.add(7, u64::MAX, 7);
    let taken = gap.take().unwrap();
    assert_eq!(
        (taken.changes, taken.sectors, taken.device, taken.since_ns),
        (2, u64::MAX, 7, 5)
    );
    assert_eq!((gap.take(), gap), (None, Gap::CLOSED));
}

#[test]
fn absurd_rings_are_refused() {
    let sizes =
        |desc_count, payload| Ring::new(vec![Meta::EMPTY; desc_count], payload, 0).is_some();
    assert!(
        sizes(1, 16 << 10) && sizes(256, abi::RING_BYTES_MIN) && sizes(256, abi::RING_BYTES_MAX)
    );
    assert!(!sizes(0, 16 << 10) && !sizes(3, 16 << 10));
    assert!(!sizes(4, 0) && !sizes(4, 8 << 10) && !sizes(4, 48 << 10) && !sizes(4, 1 << 41));
}

#[test]
fn every_ring_takes_the_largest_record() {
    let mut ring = ring(256, abi::RING_BYTES_MIN, 0);
    for _ in 0..4 {
        assert!(ring.reserve(abi::RECORD_BYTES_MAX, false).is_ok());
    }
    assert_eq!(ring.reserve(512, false), Err(NoRoom::Ring));
    assert!(
        ring.reserve(0, false).is_ok(),
        "a flush needs no payload space"
    );
    assert_eq!(
        ring.reserve(abi::RECORD_BYTES_MAX + 512, false),
        Err(NoRoom::TooLarge)
    );
}

#[test]
fn sync_leaves_the_rest_of_the_ring_to_writes() {
    let mut ring = ring(256, 1 << 20, 128 << 10);
    assert!(ring.reserve(96 << 10, true).is_ok());
    assert_eq!(ring.reserve(64 << 10, true), Err(NoRoom::SyncShare));
    assert!(ring.reserve(32 << 10, true).is_ok());
    assert_eq!(
        (ring.sync_bytes(), ring.sync_bytes_max()),
        (128 << 10, 128 << 10)
    );
    for _ in 0..7 {
        assert!(ring.reserve(128 << 10, false).is_ok());
    }
    // Once it is released its share is free again, also for a record that is larger than the share.
    (1..3).for_each(|seq| assert!(ring.complete(seq)));
    assert_eq!(ring.release(3), Ok(true));
    assert_eq!(ring.sync_bytes(), 0);
    assert!(ring.reserve(128 << 10, true).is_ok());
}

/// The case that `complete` must not turn into a long loop: everything but the first is complete.
#[test]
fn committed_passes_a_whole_run_at_once() {
    let mut ring = ring(1 << 16, 1 << 20, 0);
    let count = 1 << 16;
    for _ in 0..count {
        ring.reserve(0, false).unwrap();
    }
    for seq in (2..=count).step_by(2).chain((3..=count).step_by(2)) {
        assert!(!ring.complete(seq));
    }
    assert!(ring.complete(1));
    assert_eq!(ring.committed(), count + 1);
}
