// SPDX-License-Identifier: GPL-2.0-only

//! The range gate against a list of ranges.

use proptest::{collection::vec, prelude::*, sample::Index};

use crate::gate::{Gate, Node, Refused, SlotId, Ticket, WAITERS_MAX};

fn gate(nodes: usize) -> Gate<Vec<Node>> {
    Gate::new(vec![Node::EMPTY; nodes])
}

/// What the gate promises, in the plainest form: ranges in flight, waiters in order of arrival.
struct Model {
    in_flight: Vec<(SlotId, u64, u64)>,
    /// The last of each is the identity of its ticket.
    waiters: Vec<(u64, u64, usize)>,
    capacity: usize,
}

fn overlap(a: (u64, u64), b: (u64, u64)) -> bool {
    a.0 < b.1 && b.0 < a.1
}

impl Model {
    fn verdict(&self, range: (u64, u64), ahead: usize) -> Result<(), Refused> {
        let earlier = &self.waiters[..ahead];
        if earlier.iter().any(|w| overlap((w.0, w.1), range)) {
            return Err(Refused::Overlap);
        }
        if self.capacity - self.in_flight.len() <= ahead {
            return Err(Refused::Full);
        }
        if self.in_flight.iter().any(|f| overlap((f.1, f.2), range)) {
            return Err(Refused::Overlap);
        }
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Enter(u64, u64),
    Leave(Index),
    Queue(u64, u64),
    EnterQueued(Index),
    Cancel(Index),
}

fn range(sectors: u64) -> impl Strategy<Value = (u64, u64)> {
    (0..sectors, prop_oneof![4 => 1..9_u64, 1 => 1..sectors])
        .prop_map(|(start, length)| (start, start + length))
}

fn step(sectors: u64) -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => range(sectors).prop_map(|(start, end)| Step::Enter(start, end)),
        4 => any::<Index>().prop_map(Step::Leave),
        2 => range(sectors).prop_map(|(start, end)| Step::Queue(start, end)),
        3 => any::<Index>().prop_map(Step::EnterQueued),
        1 => any::<Index>().prop_map(Step::Cancel),
    ]
}

fn run(nodes: usize, steps: Vec<Step>) {
    let mut gate = gate(nodes);
    let waiters_max = (nodes - 1) - gate.capacity() as usize;
    let mut model = Model {
        in_flight: Vec::new(),
        waiters: Vec::new(),
        capacity: gate.capacity() as usize,
    };
    let mut tickets: Vec<Option<Ticket>> = Vec::new();
    for step in steps {
        match step {
            Step::Enter(start, end) => {
                let expected = model.verdict((start, end), model.waiters.len());
                let got = gate.try_enter(start, end);
                assert_eq!(got.map(drop), expected);
                if let Ok(slot) = got {
                    assert!(slot.index() < nodes);
                    model.in_flight.push((slot, start, end));
                }
            }
            Step::Leave(which) => {
                if model.in_flight.is_empty() {
                    continue;
                }
                let (slot, start, end) = model
                    .in_flight
                    .swap_remove(which.index(model.in_flight.len()));
                let wake = gate.leave(slot);
                let concerned = model
                    .waiters
                    .iter()
                    .any(|w| overlap((w.0, w.1), (start, end)));
                assert!(wake || !concerned, "a waiter for this range is not woken");
                assert!(!gate.leave(slot), "left twice");
            }
            Step::Queue(start, end) => {
                let ticket = gate.queue(start, end);
                assert_eq!(ticket.is_some(), model.waiters.len() < waiters_max);
                if ticket.is_some() {
                    model.waiters.push((start, end, tickets.len()));
                    tickets.push(ticket);
                }
            }
            Step::EnterQueued(which) => {
                if model.waiters.is_empty() {
                    continue;
                }
                let place = which.index(model.waiters.len());
                let (start, end, id) = model.waiters[place];
                let expected = model.verdict((start, end), place);
                let got = gate.try_enter_queued(tickets[id].as_ref().expect("still in the queue"));
                assert_eq!(got.map(drop), expected);
                if let Ok(slot) = got {
                    model.waiters.remove(place);
                    tickets[id] = None;
                    model.in_flight.push((slot, start, end));
                }
            }
            Step::Cancel(which) => {
                if model.waiters.is_empty() {
                    continue;
                }
                let place = which.index(model.waiters.len());
                let (start, end, id) = model.waiters.remove(place);
                let wake = gate.cancel(tickets[id].take().expect("still in the queue"));
                let concerned = model.waiters[place..]
                    .iter()
                    .any(|w| overlap((w.0, w.1), (start, end)));
                assert!(
                    wake || !concerned,
                    "who waited for the canceled waiter is not woken"
                );
            }
        }
        gate.check();
        assert_eq!(gate.in_flight() as usize, model.in_flight.len());
        assert_eq!(gate.waiting() as usize, model.waiters.len());
        assert_eq!(gate.is_idle(), model.in_flight.is_empty());
    }
}

proptest! {
    #[test]
    fn gate_agrees_with_a_list_of_ranges(steps in vec(step(64), 0..200)) {
        run(WAITERS_MAX as usize * 2 + 1, steps);
    }

    #[test]
    fn small_gate_agrees_with_a_list_of_ranges(nodes in 3..12_usize, steps in vec(step(200), 0..200)) {
        run(nodes, steps);
    }
}

proptest! {
    /// Whatever the caller hands in: no panic, no overflow, and a sound structure after it.
    #[test]
    fn gate_survives_any_numbers(ranges in vec((any::<u64>(), any::<u64>()), 0..40)) {
        let mut gate = gate(20);
        let mut slots = Vec::new();
        for (start, end) in ranges {
            match gate.try_enter(start, end) {
                Ok(slot) => slots.push(slot),
                Err(_) => drop(gate.queue(start, end)),
            }
            assert_eq!(gate.in_flight() as usize, slots.len());
        }
        for slot in slots {
            gate.leave(slot);
        }
        assert!(gate.is_idle());
    }
}

#[test]
fn large_range_gets_its_turn_in_a_stream_of_small_writes() {
    let mut gate = gate(Gate::<Vec<Node>>::nodes_for(64));
    let mut writes: Vec<SlotId> = (0..8)
        .map(|n| gate.try_enter(n * 8, n * 8 + 8).unwrap())
        .collect();
    let sync = gate.queue(0, 1 << 20).unwrap();
    let mut elsewhere = 1 << 20;
    while let Err(refused) = gate.try_enter_queued(&sync) {
        assert_eq!(refused, Refused::Overlap);
        assert_eq!(
            gate.try_enter(800, 808),
            Err(Refused::Overlap),
            "passes an earlier waiter"
        );
        let slot = gate
            .try_enter(elsewhere, elsewhere + 8)
            .expect("overlaps nobody");
        elsewhere += 8;
        assert!(!gate.leave(slot), "wakes somebody who does not wait for it");
        assert!(gate.leave(writes.pop().expect("the wait ends with the last write")));
    }
    assert!(writes.is_empty());
}

#[test]
fn waiters_keep_their_order() {
    let mut gate = gate(Gate::<Vec<Node>>::nodes_for(64));
    let first = gate.try_enter(0, 8).unwrap();
    let tickets: Vec<Ticket> = (0..WAITERS_MAX)
        .map(|_| gate.queue(0, 8).unwrap())
        .collect();
    assert_eq!(gate.queue(0, 8), None);
    assert!(gate.leave(first));
    for (place, ticket) in tickets.iter().enumerate() {
        for later in &tickets[place + 1..] {
            assert_eq!(gate.try_enter_queued(later), Err(Refused::Overlap));
        }
        let slot = gate.try_enter_queued(ticket).unwrap();
        // Who found the queue full is woken as well: once, as it says so again if it stays refused.
        assert_eq!(gate.leave(slot), place + 1 < tickets.len());
    }
    assert!(gate.is_idle());
}

#[test]
fn free_slots_are_for_waiters_first() {
    let mut gate = gate(Gate::<Vec<Node>>::nodes_for(2));
    let slots = [gate.try_enter(0, 1).unwrap(), gate.try_enter(1, 2).unwrap()];
    assert_eq!(gate.try_enter(2, 3), Err(Refused::Full));
    let ticket = gate.queue(2, 3).unwrap();
    assert_eq!(gate.try_enter_queued(&ticket), Err(Refused::Full));
    assert!(gate.leave(slots[0]), "the waiter could have the slot");
    assert_eq!(
        gate.try_enter(3, 4),
        Err(Refused::Full),
        "takes the slot of the waiter"
    );
    assert!(gate.try_enter_queued(&ticket).is_ok());
    assert!(!gate.leave(slots[1]));
    assert!(gate.try_enter(3, 4).is_ok());
}

#[test]
fn tree_stays_flat_in_any_order() {
    let capacity = 4096;
    for scattered in [false, true] {
        let mut gate = gate(Gate::<Vec<Node>>::nodes_for(capacity));
        let mut slots = std::collections::VecDeque::new();
        for n in 0..u64::from(capacity) * 3 {
            let start = if scattered {
                n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8
            } else {
                n * 8
            };
            if slots.len() == capacity as usize {
                gate.leave(slots.pop_front().unwrap());
            }
            // A scattered range may hit another one; that is another test.
            slots.extend(gate.try_enter(start, start + 8));
        }
        // 12 is perfect; a treap of 4096 nodes is deeper than 40 once in about a million times.
        assert!(gate.check() <= 40, "{} levels", gate.check());
    }
}
