// SPDX-License-Identifier: GPL-2.0-only

//! The range gate under its lock, with tasks that sleep: in every interleaving, overlapping ranges
//! exclude each other and every task ends. A task that nobody wakes is a deadlock, which loom finds.

use loom::{
    cell::UnsafeCell,
    sync::{Arc, Condvar, Mutex},
    thread,
};

use crate::{
    gate::{Gate, Node, Refused, SlotId, Ticket},
    loom_tools::{canary, explore, ASLEEP, RACE},
};

/// A step that is left out, to see that it is missed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// `leave` returned true and nobody is woken.
    WakeOnLeave,
    /// `cancel` returned true and nobody is woken.
    WakeOnCancel,
    /// Who finds the queue full sleeps although the gate has changed since it was refused.
    QueueUnderSameLock,
    /// Ranges enter although the gate refused them.
    Exclusion,
}

struct Device {
    broken: Broken,
    gate: Mutex<Gate<Vec<Node>>>,
    wait: Condvar,
    /// Touched by who is in flight; loom objects when two do so at a time.
    sectors: [UnsafeCell<u32>; 4],
}

impl Device {
    fn new(broken: Broken, nodes: usize) -> Arc<Self> {
        Arc::new(Self {
            broken,
            gate: Mutex::new(Gate::new(vec![Node::EMPTY; nodes])),
            wait: Condvar::new(),
            sectors: std::array::from_fn(|_| UnsafeCell::new(0)),
        })
    }

    fn wake(&self, wanted: bool, unless: Broken) {
        if wanted && self.broken != unless {
            self.wait.notify_all();
        }
    }

    /// What a writer does before its change is in flight.
    fn enter(&self, start: u64, end: u64) -> Option<SlotId> {
        let mut gate = self.gate.lock().unwrap();
        let mut ticket: Option<Ticket> = None;
        loop {
            let entered = match &ticket {
                Some(ticket) => gate.try_enter_queued(ticket),
                None => gate.try_enter(start, end),
            };
            match entered {
                Ok(slot) => return Some(slot),
                Err(Refused::Overlap) if self.broken == Broken::Exclusion => return None,
                Err(_) => {}
            }
            if ticket.is_none() {
                if self.broken == Broken::QueueUnderSameLock {
                    drop(gate);
                    gate = self.gate.lock().unwrap();
                }
                ticket = gate.queue(start, end);
                if ticket.is_some() && self.broken != Broken::QueueUnderSameLock {
                    continue;
                }
            }
            gate = self.wait.wait(gate).unwrap();
        }
    }

    fn write(&self, start: u64, end: u64) {
        let slot = self.enter(start, end);
        for sector in &self.sectors[start as usize..end as usize] {
            // SAFETY: loom's cell checks on its own that nobody else has access.
            sector.with_mut(|sector| unsafe { *sector += 1 });
        }
        if let Some(slot) = slot {
            let wake = self.gate.lock().unwrap().leave(slot);
            self.wake(wake, Broken::WakeOnLeave);
        }
    }
}

fn spawn(device: &Arc<Device>, start: u64, end: u64) -> thread::JoinHandle<()> {
    let device = Arc::clone(device);
    thread::spawn(move || device.write(start, end))
}

/// Three writers, two of which overlap the third; `nodes` decides how many fit and may queue.
fn writers(broken: Broken, nodes: usize) {
    let device = Device::new(broken, nodes);
    let others = [spawn(&device, 0, 2), spawn(&device, 1, 3)];
    device.write(1, 4);
    for other in others {
        other.join().unwrap();
    }
    let gate = device.gate.lock().unwrap();
    gate.check();
    assert!(gate.is_idle() && gate.waiting() == 0);
}

/// A task gives its place up, behind which another one waits that overlaps nothing in flight.
fn canceled(broken: Broken) {
    let device = Device::new(broken, 9);
    let (first, ticket) = {
        let mut gate = device.gate.lock().unwrap();
        (gate.try_enter(0, 1).unwrap(), gate.queue(0, 3).unwrap())
    };
    let other = spawn(&device, 2, 4);
    let wake = device.gate.lock().unwrap().cancel(ticket);
    device.wake(wake, Broken::WakeOnCancel);
    let wake = device.gate.lock().unwrap().leave(first);
    device.wake(wake, Broken::WakeOnLeave);
    other.join().unwrap();
}

#[test]
fn writers_exclude_each_other_and_all_end() {
    explore(|| writers(Broken::Nothing, 9));
}

#[test]
fn writers_end_when_the_queue_is_too_short_for_them() {
    // One place in the queue, and two slots.
    explore(|| writers(Broken::Nothing, 4));
}

#[test]
fn writers_end_when_one_fits_at_a_time() {
    explore(|| writers(Broken::Nothing, 3));
}

#[test]
fn writer_goes_on_when_an_earlier_waiter_gives_up() {
    explore(|| canceled(Broken::Nothing));
}

canary!(no_wake_after_leave, ASLEEP, writers(Broken::WakeOnLeave, 9));
canary!(no_wake_after_cancel, ASLEEP, canceled(Broken::WakeOnCancel));
canary!(
    sleep_on_an_old_refusal,
    ASLEEP,
    writers(Broken::QueueUnderSameLock, 4)
);
canary!(no_exclusion, RACE, writers(Broken::Exclusion, 9));
