// SPDX-License-Identifier: GPL-2.0-only

//! The ring between writers and a consumer that shares memory with them and takes no lock, as `abi.rs`
//! describes it.
//!
//! The kernel's side of it is the code of `ring.rs`. The consumer sleeps the way that leaves the most to
//! the protocol: like somebody in `epoll_wait`, it sleeps until an event was raised, without asking
//! the kernel once more. (`poll` does ask, under the lock, which alone would make up for a lost fence.)
//!
//! Descriptors are cells in which loom notices every access that the protocol does not order. In every
//! interleaving all changes must reach the consumer, recorded or counted in a GAP, in order; a
//! writer or a consumer that sleeps for ever is a deadlock, which loom finds.

use std::cell::Cell;

use loom::{
    cell::UnsafeCell,
    sync::{
        atomic::{
            fence, AtomicU64,
            Ordering::{Acquire, Relaxed, Release, SeqCst},
        },
        Arc, Condvar, Mutex,
    },
    thread,
};

use crate::{
    abi::SEQ_FIRST,
    loom_tools::{canary, explore, ASLEEP, RACE},
    ring::{Meta, NoRoom, Ring, Shared},
};

/// A step that is left out or done in the wrong order, to see that it is missed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// The kernel looks at `wake_seq` without a fence after it stored `committed`.
    PublishFence,
    /// The kernel looks at `released` without a fence after it stored `space_wanted`.
    WantRoomFence,
    /// The kernel goes to sleep although `want_room` said that there is more room.
    WantRoomAnswer,
    /// The consumer looks at `committed` without a fence after it stored `wake_seq`.
    ArmFence,
    /// The consumer looks at `space_wanted` without a fence after it stored `released`.
    ReleaseFence,
    /// `committed` is stored without release ordering.
    CommittedOrder,
    /// `committed` is loaded without acquire ordering.
    CommittedAcquire,
    /// `released` is stored without release ordering.
    ReleasedOrder,
    /// `released` is loaded without acquire ordering.
    ReleasedAcquire,
    /// A descriptor is written after its completion.
    FillAfterComplete,
}

/// What a descriptor says, as far as it matters here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Desc {
    seq: u64,
    /// Changes that it stands for: 1, or those of a gap.
    changes: u64,
    is_gap: bool,
}

struct State {
    ring: Ring<Vec<Meta>>,
    writers_waiting: u32,
}

struct Stream {
    broken: Broken,
    /// Full ring: true: writers wait, false: changes go unrecorded.
    block: bool,
    descs: Vec<UnsafeCell<Desc>>,
    committed: AtomicU64,
    space_wanted: AtomicU64,
    released: AtomicU64,
    wake_seq: AtomicU64,
    state: Mutex<State>,
    room: Condvar,
    event: Mutex<bool>,
    event_raised: Condvar,
}

/// The kernel's view of the shared words, for one call.
struct Words<'a> {
    stream: &'a Stream,
    unfenced: Cell<bool>,
}

impl Shared for Words<'_> {
    fn store_committed(&self, seq: u64) {
        let broken = self.stream.broken == Broken::CommittedOrder;
        let order = if broken { Relaxed } else { Release };
        self.stream.committed.store(seq, order);
    }

    fn load_released(&self) -> u64 {
        let broken = self.stream.broken == Broken::ReleasedAcquire;
        self.stream
            .released
            .load(if broken { Relaxed } else { Acquire })
    }

    fn load_wake_seq(&self) -> u64 {
        self.stream.wake_seq.load(Relaxed)
    }

    fn store_space_wanted(&self, wanted: bool) {
        self.stream.space_wanted.store(u64::from(wanted), Relaxed);
    }

    fn full_fence(&self) {
        if !self.unfenced.get() {
            fence(SeqCst);
        }
    }
}

impl Stream {
    fn new(broken: Broken, block: bool, desc_count: usize) -> Arc<Self> {
        let ring = Ring::new(vec![Meta::EMPTY; desc_count], 16384, 0).unwrap();
        Arc::new(Self {
            broken,
            block,
            descs: (0..desc_count).map(|_| UnsafeCell::default()).collect(),
            committed: AtomicU64::new(SEQ_FIRST),
            space_wanted: AtomicU64::new(0),
            released: AtomicU64::new(SEQ_FIRST),
            wake_seq: AtomicU64::new(0),
            state: Mutex::new(State {
                ring,
                writers_waiting: 0,
            }),
            room: Condvar::new(),
            event: Mutex::new(false),
            event_raised: Condvar::new(),
        })
    }

    fn desc(&self, seq: u64) -> &UnsafeCell<Desc> {
        &self.descs[seq as usize % self.descs.len()]
    }

    fn write_desc(&self, desc: Desc) {
        let place = self.desc(desc.seq);
        // SAFETY: loom's cell checks on its own that nobody else has access.
        place.with_mut(|place| unsafe { *place = desc });
    }

    fn words(&self, without: Broken) -> Words<'_> {
        Words {
            stream: self,
            unfenced: Cell::new(self.broken == without),
        }
    }

    // -- kernel -------------------------------------------------------------------------------

    fn publish(&self, state: &mut State) -> bool {
        state.ring.publish(&self.words(Broken::PublishFence))
    }

    fn pull_release(&self, state: &mut State) -> bool {
        let words = self.words(Broken::Nothing);
        state.ring.pull_release(&words).expect("a good consumer")
    }

    fn want_room(&self, state: &mut State) -> bool {
        let words = self.words(Broken::WantRoomFence);
        let moved = state.ring.want_room(&words).expect("a good consumer");
        moved && self.broken != Broken::WantRoomAnswer
    }

    /// `POLLIN`, after the lock was dropped.
    fn raise(&self, wake: bool) {
        if wake {
            *self.event.lock().unwrap() = true;
            self.event_raised.notify_all();
        }
    }

    /// Writes the GAP record, if it is due. True: wake the consumer.
    fn close_gap(&self, state: &mut State) -> bool {
        let Some((place, gap)) = state.ring.reserve_gap() else {
            return false;
        };
        self.write_desc(Desc {
            seq: place.seq,
            changes: gap.changes,
            is_gap: true,
        });
        state.ring.complete(place.seq) && self.publish(state)
    }

    /// One change, up to its submission to the backing device. None: it went unrecorded.
    fn admit(&self) -> Option<u64> {
        let mut state = self.state.lock().unwrap();
        let mut wake = false;
        let seq = loop {
            let outcome = state.ring.reserve(0, false);
            if let Ok(place) = outcome {
                break Some(place.seq);
            }
            assert_ne!(outcome, Err(NoRoom::TooLarge));
            if self.pull_release(&mut state) {
                wake |= self.close_gap(&mut state);
                continue;
            }
            if !self.block {
                state.ring.miss(1, 0, 0);
                if self.want_room(&mut state) {
                    wake |= self.close_gap(&mut state);
                }
                break None;
            }
            if self.want_room(&mut state) {
                continue;
            }
            state.writers_waiting += 1;
            state = self.room.wait(state).unwrap();
            state.writers_waiting -= 1;
        };
        drop(state);
        self.raise(wake);
        if let (Some(seq), true) = (seq, self.broken != Broken::FillAfterComplete) {
            self.write_change(seq);
        }
        seq
    }

    fn write_change(&self, seq: u64) {
        self.write_desc(Desc {
            seq,
            changes: 1,
            is_gap: false,
        });
    }

    fn complete(&self, seq: u64) {
        let wake = {
            let mut state = self.state.lock().unwrap();
            state.ring.complete(seq) && self.publish(&mut state)
        };
        if self.broken == Broken::FillAfterComplete {
            self.write_change(seq);
        }
        self.raise(wake);
    }

    /// `IOC_KICK`.
    fn kick(&self) {
        let wake = {
            let mut state = self.state.lock().unwrap();
            self.pull_release(&mut state);
            let wake = self.close_gap(&mut state);
            if state.writers_waiting == 0 && !state.ring.gap().is_open() {
                state.ring.want_no_room(&self.words(Broken::Nothing));
            }
            wake
        };
        self.room.notify_all();
        self.raise(wake);
    }

    // -- consumer -----------------------------------------------------------------------------

    fn load_committed(&self) -> u64 {
        let broken = self.broken == Broken::CommittedAcquire;
        self.committed.load(if broken { Relaxed } else { Acquire })
    }

    /// Consumes until `changes` changes are accounted for. Gives the GAP records seen.
    fn consume(&self, changes: u64) -> u64 {
        let (mut next, mut accounted, mut gaps) = (SEQ_FIRST, 0, 0);
        while accounted < changes {
            let committed = self.load_committed();
            if committed == next {
                self.sleep(next);
                continue;
            }
            for seq in next..committed {
                // SAFETY: loom's cell checks on its own that nobody writes.
                let desc = self.desc(seq).with(|place| unsafe { *place });
                assert_eq!(desc.seq, seq, "a record that is not there");
                accounted += desc.changes;
                gaps += u64::from(desc.is_gap);
            }
            next = committed;
            self.release(next);
        }
        assert_eq!(accounted, changes);
        gaps
    }

    fn release(&self, seq: u64) {
        let broken = self.broken == Broken::ReleasedOrder;
        let order = if broken { Relaxed } else { Release };
        self.released.store(seq, order);
        if self.broken != Broken::ReleaseFence {
            fence(SeqCst);
        }
        if self.space_wanted.load(Relaxed) != 0 {
            self.kick();
        }
    }

    fn sleep(&self, seq: u64) {
        self.wake_seq.store(seq, Relaxed);
        if self.broken != Broken::ArmFence {
            fence(SeqCst);
        }
        if self.load_committed() > seq {
            return;
        }
        let mut event = self.event.lock().unwrap();
        while !*event {
            event = self.event_raised.wait(event).unwrap();
        }
        *event = false;
    }
}

/// Writers with one change after the other each, and the consumer. Gives the GAP records seen.
fn replicate(broken: Broken, block: bool, desc_count: usize, writers: &[u64]) {
    let stream = Stream::new(broken, block, desc_count);
    let threads: Vec<_> = writers
        .iter()
        .map(|&changes| {
            let stream = Arc::clone(&stream);
            thread::spawn(move || {
                for _ in 0..changes {
                    if let Some(seq) = stream.admit() {
                        stream.complete(seq);
                    }
                }
            })
        })
        .collect();
    let gaps = stream.consume(writers.iter().sum());
    for thread in threads {
        thread.join().unwrap();
    }
    assert!(!block || gaps == 0);
    let state = stream.state.lock().unwrap();
    assert!(!state.ring.gap().is_open());
    assert_eq!(state.ring.committed(), state.ring.next_seq());
}

#[test]
fn consumer_gets_every_record_of_two_writers() {
    explore(|| replicate(Broken::Nothing, true, 4, &[1, 1]));
}

#[test]
fn writers_wait_for_room_and_get_it() {
    explore(|| replicate(Broken::Nothing, true, 1, &[1, 1]));
}

#[test]
fn descriptors_are_used_again_after_their_release() {
    explore(|| replicate(Broken::Nothing, true, 2, &[3]));
}

#[test]
fn every_unrecorded_change_is_in_a_gap_record() {
    explore(|| replicate(Broken::Nothing, false, 1, &[1, 1]));
}

#[test]
fn one_writer_alternates_between_records_and_gaps() {
    explore(|| replicate(Broken::Nothing, false, 1, &[3]));
}

canary!(
    no_fence_in_publish,
    ASLEEP,
    replicate(Broken::PublishFence, true, 4, &[1, 1])
);
canary!(
    no_fence_in_arm,
    ASLEEP,
    replicate(Broken::ArmFence, true, 4, &[1, 1])
);
canary!(
    no_fence_in_want_room,
    ASLEEP,
    replicate(Broken::WantRoomFence, true, 1, &[2])
);
canary!(
    no_fence_after_release,
    ASLEEP,
    replicate(Broken::ReleaseFence, true, 1, &[2])
);
canary!(
    sleep_although_there_is_room,
    ASLEEP,
    replicate(Broken::WantRoomAnswer, true, 1, &[2])
);
canary!(
    gap_not_closed_although_there_is_room,
    ASLEEP,
    replicate(Broken::WantRoomAnswer, false, 1, &[2])
);
canary!(
    committed_without_release,
    RACE,
    replicate(Broken::CommittedOrder, true, 4, &[1, 1])
);
canary!(
    committed_without_acquire,
    RACE,
    replicate(Broken::CommittedAcquire, true, 4, &[1, 1])
);
canary!(
    released_without_release,
    RACE,
    replicate(Broken::ReleasedOrder, true, 1, &[2])
);
canary!(
    released_without_acquire,
    RACE,
    replicate(Broken::ReleasedAcquire, true, 1, &[2])
);
canary!(
    descriptor_written_after_completion,
    RACE,
    replicate(Broken::FillAfterComplete, true, 4, &[1])
);
