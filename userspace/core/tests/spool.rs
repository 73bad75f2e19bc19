// SPDX-License-Identifier: GPL-2.0-only

//! Ring, queue and target as a model, and schedules of writes, failing syncs, cut connections, restarts and rotten
//! batches. Whatever happens: a record is in the ring, durable in the queue, or on the target; the target gets them in
//! order; and what it does not get is exactly what rotted.

#![expect(clippy::cast_possible_truncation, reason = "a test with small numbers")]

use std::collections::BTreeSet;

use dtloop_core::spool::{Batch, Place, Spool};
use proptest::prelude::*;

const RING: u64 = 12;

#[derive(Clone, Copy, Debug)]
enum Op {
    /// The application writes.
    Produce(u64),
    /// Some records are written to the queue.
    Write(u64),
    /// And made durable.
    Sync,
    /// A write or sync failed.
    Fail,
    /// The ring is released as far as it may be.
    Release,
    /// The target receives some records, if it is there.
    Send(u64),
    /// What it has received becomes durable there, and this many of the acknowledgements arrive.
    Ack(u64),
    /// The connection is cut, and made anew by the next `Send`.
    Cut,
    /// The agent is killed; of what it wrote last some batches are there.
    Kill(u64),
    /// A durable batch becomes unreadable.
    Rot(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        4 => (1u64..6).prop_map(Op::Produce),
        3 => (1u64..6).prop_map(Op::Write),
        2 => Just(Op::Sync),
        1 => Just(Op::Fail),
        3 => Just(Op::Release),
        3 => (1u64..8).prop_map(Op::Send),
        2 => (0u64..20).prop_map(Op::Ack),
        1 => Just(Op::Cut),
        1 => (0u64..4).prop_map(Op::Kill),
        1 => any::<u64>().prop_map(Op::Rot),
    ]
}

struct World {
    released: u64,
    next: u64,
    spool: Spool<usize>,
    /// All batches ever written, by place: whether they are durable on disk, and readable.
    disk: Vec<(Batch<usize>, bool, bool)>,
    written_since_sync: Vec<usize>,
    /// The next record to be sent; none: not connected.
    cursor: Option<u64>,
    /// The target expects this record next, and holds everything below durably.
    expects: u64,
    target_durable: u64,
    lost: BTreeSet<u64>,
}

impl World {
    fn new() -> Self {
        Self {
            released: 1,
            next: 1,
            spool: Spool::default(),
            disk: vec![],
            written_since_sync: vec![],
            cursor: None,
            expects: 1,
            target_durable: 1,
            lost: BTreeSet::new(),
        }
    }

    fn run(&mut self, op: Op) {
        match op {
            Op::Produce(count) => self.next = (self.next + count).min(self.released + RING),
            Op::Write(count) => self.write(count),
            Op::Sync => {
                for place in self.written_since_sync.drain(..) {
                    self.disk[place].1 = true;
                }
                self.spool.on_synced();
            }
            Op::Fail => {
                self.written_since_sync.clear();
                self.spool.on_failed();
            }
            Op::Release => self.release(self.spool.releasable(self.released)),
            Op::Send(count) => self.send(count),
            Op::Ack(count) => self.ack(count),
            Op::Cut => self.cursor = None,
            Op::Kill(survive) => self.kill(survive),
            Op::Rot(which) => {
                let durable: Vec<usize> =
                    (0..self.disk.len()).filter(|at| self.disk[*at].1).collect();
                if let Some(at) = durable.get(which as usize % durable.len().max(1)) {
                    self.disk[*at].2 = false;
                }
            }
        }
        self.check();
    }

    fn write(&mut self, count: u64) {
        let first = self.spool.append_at(self.released);
        assert!(first >= self.released, "the ring no longer holds {first}");
        let next = (first + count).min(self.next);
        if first < next {
            let place = self.disk.len();
            let batch = Batch {
                first,
                next,
                bytes: 1,
                time_ns: 0,
                place,
            };
            self.disk.push((batch, false, true));
            self.written_since_sync.push(place);
            self.spool.on_written(batch);
        }
    }

    fn release(&mut self, to: u64) {
        assert!(to <= self.next);
        self.released = self.released.max(to);
    }

    fn connect(&mut self) {
        // What was under way may have become durable or not; here it did not.
        self.expects = self.target_durable;
        let first = self.spool.first_seq(self.released);
        if self.expects < first {
            // The target finds the hole and names it.
            self.lost.extend(self.expects..first);
            self.expects = first;
            self.target_durable = first;
        }
        self.spool.on_ack(self.expects - 1);
        self.release(self.expects);
        self.cursor = Some(self.expects);
    }

    fn send(&mut self, count: u64) {
        if self.cursor.is_none() {
            self.connect();
        }
        for _ in 0..count {
            let Some(seq) = self.cursor.filter(|seq| *seq < self.next) else {
                return;
            };
            match self.spool.place(seq, self.released) {
                Place::Ring => {}
                Place::Queue(batch) if self.disk[batch.place].2 => {
                    assert!(
                        (self.disk[batch.place].0.first..self.disk[batch.place].0.next)
                            .contains(&seq)
                    );
                }
                Place::Queue(_) => {
                    self.spool.on_unreadable(seq);
                    continue;
                }
                Place::Missing { to } => {
                    // Only when everything before it is known to be there.
                    if self.spool.acked() == seq {
                        self.spool.give_up(to);
                        self.cursor = None;
                    }
                    return;
                }
            }
            assert_eq!(seq, self.expects, "out of order");
            self.expects += 1;
            self.cursor = Some(seq + 1);
        }
    }

    fn ack(&mut self, count: u64) {
        self.target_durable = self.expects;
        if self.cursor.is_some() {
            let acked = (self.spool.acked() + count).min(self.target_durable);
            if acked > self.spool.acked() {
                self.spool.on_ack(acked - 1);
                self.release(acked);
            }
        }
    }

    fn kill(&mut self, survive: u64) {
        self.cursor = None;
        let written = std::mem::take(&mut self.written_since_sync);
        for place in written.iter().take(survive as usize) {
            self.disk[*place].1 = true;
        }
        // Batches that were freed may still be found, and what was not synced may be there, torn.
        let torn = written.get(survive as usize).copied();
        let found = (self.disk.iter().enumerate())
            .filter(|(at, (_, durable, _))| *durable || Some(*at) == torn)
            .map(|(_, (batch, ..))| *batch);
        self.spool = Spool::restore(found, self.released);
    }

    /// No record is lost.
    fn check(&self) {
        for seq in self.target_durable..self.next {
            let on_disk = self
                .disk
                .iter()
                .any(|(batch, durable, _)| *durable && (batch.first..batch.next).contains(&seq));
            assert!(
                seq >= self.released || on_disk || self.lost.contains(&seq),
                "record {seq} is nowhere"
            );
        }
        for seq in &self.lost {
            let rotten = self
                .disk
                .iter()
                .any(|(batch, _, readable)| !readable && (batch.first..batch.next).contains(seq));
            assert!(rotten, "record {seq} was given up but never rotted");
        }
    }

    /// Everything arrives in the end.
    fn finish(&mut self) {
        for _ in 0..10_000 {
            self.send(1000);
            self.ack(1000);
            self.check();
            let all = (self.cursor, self.released) == (Some(self.next), self.next);
            if all && self.target_durable == self.next {
                assert_eq!(self.spool.records(), 0);
                return;
            }
        }
        panic!("it does not come to an end at {:?}", self.cursor);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn no_record_is_lost_and_their_order_is_kept(ops in prop::collection::vec(op(), 1..120)) {
        let mut world = World::new();
        for op in ops {
            world.run(op);
        }
        world.finish();
    }
}
