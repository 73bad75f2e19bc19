// SPDX-License-Identifier: GPL-2.0-only

//! The range gate: at no time are two changes in flight whose sectors overlap.
//!
//! A change enters before it gets its sequence number and leaves when the backing device has
//! completed it. So the order of the records of overlapping changes is the order in which they
//! reached the backing device, and a SYNC read of a range sees the backing device stand still.
//!
//! # How
//!
//! As the ranges in flight are pairwise disjoint, their starts have the same order as their ends.
//! A search tree keyed by the start therefore finds an overlap with `[start, end)` on one path
//! from the root: of the ranges that start before `end`, the last one also ends last, and the
//! search for `end` passes it. When there is no overlap nothing starts within `[start, end)`
//! either, and the same path ends where the new range belongs.
//!
//! The tree is a treap: a heap by a random priority, so about `1.4 log2(n)` deep whatever the
//! order of the changes, with less than two links to mend on average per insertion or removal. It
//! lives in an array of [`Node`]s that the caller allocates; links are indexes. Node 0 is not a
//! range: as a child it means "none", as a parent it holds the root, so that no code treats
//! the root or a missing child as a special case. What is written to its `parent` is never read.
//!
//! Who must wait may [`Gate::queue`]. The queue is first in, first out among ranges that overlap:
//! nobody enters past an earlier waiter that it overlaps, so a SYNC of a large range gets its turn
//! in a stream of small writes.
//!
//! # Who is woken
//!
//! The gate does not sleep; its caller does, in a loop that tries under the lock of the gate before
//! each sleep. Whenever [`Gate::leave`] or [`Gate::cancel`] returns true, the caller wakes everybody
//! who waits. For somebody who sleeps after a refusal, one of these holds, and stays so until such a
//! call returns true:
//!
//! 1. it is queued, and a range in flight overlaps its own: that range's `leave` returns true;
//! 2. it is queued, and an earlier waiter overlaps it: that one cancels, which returns true, or
//!    enters, which is case 1;
//! 3. it found no slot free, or no place in the queue: `retry_all` is set, the next `leave` or
//!    `cancel` returns true.

use core::ops::DerefMut;

/// Most ranges that wait in the queue of one gate.
pub(crate) const WAITERS_MAX: u32 = 64;

/// "No node", and as a parent the root's link.
const NIL: u32 = 0;

/// Indexes of [`Node::link`]: the children in the tree, the neighbours in the queue, and, in a free
/// node, `LEFT` is the next free one.
const LEFT: usize = 0;
const RIGHT: usize = 1;

/// Values of [`Node::priority`]. A range in flight has a random odd one.
const FREE: u32 = 0;
const IN_FLIGHT: u32 = 1;
const WAITING: u32 = 2;

/// Storage for one range.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Node {
    start: u64,
    end: u64,
    link: [u32; 2],
    parent: u32,
    priority: u32,
}

impl Node {
    /// What storage is filled with before it is handed to [`Gate::new`].
    pub(crate) const EMPTY: Self = Self {
        start: 0,
        end: 0,
        link: [NIL; 2],
        parent: NIL,
        priority: FREE,
    };

    #[inline]
    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start < end && start < self.end
    }

    /// Side and child to go on with in a search for `start..end`, or None when this one overlaps it.
    #[inline(always)]
    fn step(&self, start: u64, end: u64) -> Option<(usize, u32)> {
        let [left, right] = self.link;
        if self.start >= end {
            Some((LEFT, left))
        } else if self.end <= start {
            Some((RIGHT, right))
        } else {
            None
        }
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::EMPTY
    }
}

/// A range in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SlotId(u32);

impl SlotId {
    /// Its number, below [`Gate::nodes_for`] the capacity: for tables of what is in flight.
    #[inline]
    pub(crate) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A place in the queue, until [`Gate::try_enter_queued`] succeeds or [`Gate::cancel`] gives it up.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ticket(u32);

/// Why a range may not enter now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It overlaps a range in flight, or one that has waited longer.
    Overlap,
    /// As many ranges are in flight as the gate can hold, or the free slots belong to waiters.
    Full,
}

/// Where a range belongs in the tree.
struct Spot {
    parent: u32,
    side: usize,
    /// The subtree there, of lower priorities; the new node goes between it and `parent`.
    below: u32,
}

/// The changes in flight of one device. See the module documentation.
///
/// # Invariants
///
/// - Ranges in flight are pairwise disjoint, and no two waiters or ranges share a node.
/// - Every node but node 0 is in exactly one of the tree, the queue and the free list.
/// - `in_flight <= capacity`, `waiting <= waiters_max`, and `capacity + waiters_max` nodes exist, so
///   the free list is not empty while one of the two limits is not reached.
pub(crate) struct Gate<S> {
    nodes: S,
    free: u32,
    capacity: u32,
    in_flight: u32,
    random: u64,
    waiting: u32,
    waiters_max: u32,
    earliest: u32,
    latest: u32,
    retry_all: bool,
}

#[inline(always)]
fn node(nodes: &[Node], index: u32) -> &Node {
    nodes.get(index as usize).unwrap_or(&Node::EMPTY)
}

/// Makes `child` the child of `parent` on `side`, in both nodes.
#[inline(always)]
fn attach(nodes: &mut [Node], parent: u32, side: usize, child: u32) {
    link(nodes, parent, side, child);
    if let Some(node) = nodes.get_mut(child as usize) {
        node.parent = parent;
    }
}

#[inline(always)]
fn link(nodes: &mut [Node], from: u32, side: usize, to: u32) {
    if let Some(node) = nodes.get_mut(from as usize) {
        // PANIC: `link` has two entries and the index is 0 or 1.
        node.link[side & 1] = to;
    }
}

impl<S: DerefMut<Target = [Node]>> Gate<S> {
    /// Number of nodes of a gate for `capacity` ranges in flight. As many may wait, but not more
    /// than [`WAITERS_MAX`].
    pub(crate) const fn nodes_for(capacity: u32) -> usize {
        let waiters = if capacity < WAITERS_MAX {
            capacity
        } else {
            WAITERS_MAX
        };
        capacity as usize + waiters as usize + 1
    }

    /// An empty gate on [`Gate::nodes_for`] the wanted capacity. With less than two nodes, nothing
    /// ever enters.
    pub(crate) fn new(mut nodes: S) -> Self {
        let usable = u32::try_from(nodes.len())
            .unwrap_or(u32::MAX)
            .saturating_sub(1);
        let waiters_max = WAITERS_MAX.min(usable / 2);
        for (index, node) in (0..=usable).zip(nodes.iter_mut()) {
            let next = if index < usable { index + 1 } else { NIL };
            *node = Node::EMPTY;
            node.link[LEFT] = if index == NIL { NIL } else { next };
        }
        Self {
            nodes,
            free: usable.min(1),
            capacity: usable - waiters_max,
            in_flight: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            waiting: 0,
            waiters_max,
            earliest: NIL,
            latest: NIL,
            retry_all: false,
        }
    }

    /// Ranges in flight.
    #[inline]
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Whether nothing is in flight. Somebody may be waiting all the same.
    #[inline]
    pub(crate) fn is_idle(&self) -> bool {
        self.in_flight == 0
    }

    /// Ranges in the queue.
    #[inline]
    pub(crate) fn waiting(&self) -> u32 {
        self.waiting
    }

    /// Most ranges in flight.
    #[inline]
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Lets sectors `start..end` in, `start < end`. An empty change has no business here.
    #[inline]
    pub(crate) fn try_enter(&mut self, start: u64, end: u64) -> Result<SlotId, Refused> {
        let end = end.max(start);
        if self.waiting != 0 {
            self.yield_to_waiters(start, end, NIL)?;
        }
        if self.in_flight >= self.capacity {
            return Err(Refused::Full);
        }
        let priority = self.draw();
        let spot = self.find(start, end, priority).ok_or(Refused::Overlap)?;
        let slot = self.free;
        let Some(node) = self.nodes.get(slot as usize) else {
            // Cannot be, by the invariants.
            return Err(Refused::Full);
        };
        self.free = node.link[LEFT];
        self.insert(&spot, slot, start, end, priority);
        Ok(SlotId(slot))
    }

    /// Takes a range out again. True: somebody who waits may be able to enter now; wake all.
    ///
    /// A slot that has left already is ignored.
    #[inline]
    pub(crate) fn leave(&mut self, slot: SlotId) -> bool {
        let SlotId(slot) = slot;
        let Some((start, end)) = self.remove(slot) else {
            return false;
        };
        self.in_flight = self.in_flight.wrapping_sub(1);
        if self.waiting == 0 && !self.retry_all {
            return false;
        }
        self.concerns_waiters(start, end)
    }

    /// Takes a place in the queue; call [`Gate::try_enter_queued`] before the first sleep.
    ///
    /// None when the queue is full. The caller then sleeps without a place, and begins anew with
    /// `try_enter` when it is woken; `queue` must have failed under the same lock before each sleep.
    pub(crate) fn queue(&mut self, start: u64, end: u64) -> Option<Ticket> {
        if self.waiting >= self.waiters_max {
            self.retry_all = true;
            return None;
        }
        let place = self.free;
        self.free = node(&self.nodes, place).link[LEFT];
        if let Some(node) = self.nodes.get_mut(place as usize) {
            *node = Node {
                start,
                end: end.max(start),
                link: [self.latest, NIL],
                parent: NIL,
                priority: WAITING,
            };
        }
        if self.latest == NIL {
            self.earliest = place;
        } else {
            link(&mut self.nodes, self.latest, RIGHT, place);
        }
        self.latest = place;
        self.waiting = self.waiting.wrapping_add(1);
        Some(Ticket(place))
    }

    /// Lets a waiter in; its ticket is used up when that succeeds, and must not be used again.
    pub(crate) fn try_enter_queued(&mut self, ticket: &Ticket) -> Result<SlotId, Refused> {
        let Ticket(place) = *ticket;
        let waiter = *node(&self.nodes, place);
        if waiter.priority != WAITING {
            return Err(Refused::Overlap);
        }
        if let Err(refused) = self.yield_to_waiters(waiter.start, waiter.end, place) {
            self.retry_all |= refused == Refused::Full;
            return Err(refused);
        }
        let priority = self.draw();
        let spot = self
            .find(waiter.start, waiter.end, priority)
            .ok_or(Refused::Overlap)?;
        self.unqueue(&waiter);
        self.insert(&spot, place, waiter.start, waiter.end, priority);
        Ok(SlotId(place))
    }

    /// Gives a place in the queue up. True: somebody who waits may be able to enter now; wake all.
    pub(crate) fn cancel(&mut self, ticket: Ticket) -> bool {
        let Ticket(place) = ticket;
        let waiter = *node(&self.nodes, place);
        if waiter.priority != WAITING {
            return false;
        }
        self.unqueue(&waiter);
        self.give_back(place);
        self.concerns_waiters(waiter.start, waiter.end)
    }

    /// Refuses `start..end` when it would pass a waiter that it overlaps, or take a free slot
    /// that one of them could use. Only those before `place` count; all of them when it is `NIL`.
    #[cold]
    fn yield_to_waiters(&self, start: u64, end: u64, place: u32) -> Result<(), Refused> {
        let mut next = self.earliest;
        let mut ahead = 0;
        while ahead < self.waiting && next != place {
            let waiter = node(&self.nodes, next);
            if waiter.overlaps(start, end) {
                return Err(Refused::Overlap);
            }
            next = waiter.link[RIGHT];
            ahead += 1;
        }
        if self.capacity.wrapping_sub(self.in_flight) <= ahead {
            return Err(Refused::Full);
        }
        Ok(())
    }

    /// Whether somebody who waits has to try again now that `start..end` is out of the way.
    #[cold]
    fn concerns_waiters(&mut self, start: u64, end: u64) -> bool {
        if core::mem::take(&mut self.retry_all) {
            return true;
        }
        let mut next = self.earliest;
        for _ in 0..self.waiting {
            let waiter = node(&self.nodes, next);
            if waiter.overlaps(start, end) {
                return true;
            }
            next = waiter.link[RIGHT];
        }
        false
    }

    /// The place of `start..end`, or None when it overlaps a range in flight.
    ///
    /// The loops end because each step goes one level down the tree.
    #[inline(always)]
    fn find(&self, start: u64, end: u64, priority: u32) -> Option<Spot> {
        let nodes: &[Node] = &self.nodes;
        let mut spot = Spot {
            parent: NIL,
            side: RIGHT,
            below: nodes.first()?.link[RIGHT],
        };
        while spot.below != NIL {
            let node = nodes.get(spot.below as usize)?;
            if node.priority < priority {
                break;
            }
            spot.parent = spot.below;
            (spot.side, spot.below) = node.step(start, end)?;
        }
        let mut next = spot.below;
        while next != NIL {
            (_, next) = nodes.get(next as usize)?.step(start, end)?;
        }
        Some(spot)
    }

    /// Puts `slot` into the tree at `spot`, with what was there divided between its two sides.
    #[inline(always)]
    fn insert(&mut self, spot: &Spot, slot: u32, start: u64, end: u64, priority: u32) {
        let nodes: &mut [Node] = &mut self.nodes;
        if let Some(node) = nodes.get_mut(slot as usize) {
            *node = Node {
                start,
                end,
                link: [NIL; 2],
                parent: spot.parent,
                priority,
            };
        }
        link(nodes, spot.parent, spot.side, slot);
        if spot.below != NIL {
            Self::split(nodes, spot.below, slot, end);
        }
        self.in_flight = self.in_flight.wrapping_add(1);
    }

    /// Hangs what lies before the new range under its left side, the rest under its right side. Each
    /// step goes one level down.
    #[inline(never)]
    fn split(nodes: &mut [Node], below: u32, slot: u32, end: u64) {
        let (mut before, mut before_side) = (slot, LEFT);
        let (mut after, mut after_side) = (slot, RIGHT);
        let mut next = below;
        while next != NIL {
            let Some(node) = nodes.get(next as usize) else {
                break;
            };
            let [left, right] = node.link;
            if node.start < end {
                attach(nodes, before, before_side, next);
                (before, before_side) = (next, RIGHT);
                next = right;
            } else {
                attach(nodes, after, after_side, next);
                (after, after_side) = (next, LEFT);
                next = left;
            }
        }
        link(nodes, before, before_side, NIL);
        link(nodes, after, after_side, NIL);
    }

    /// Takes a node out of the tree, puts it on the free list and returns its range; None if it
    /// is not in the tree.
    #[inline(always)]
    fn remove(&mut self, slot: u32) -> Option<(u64, u64)> {
        let nodes: &mut [Node] = &mut self.nodes;
        let node = nodes.get_mut(slot as usize)?;
        if node.priority & IN_FLIGHT == 0 {
            return None;
        }
        let (range, parent, [left, right]) = ((node.start, node.end), node.parent, node.link);
        node.link[LEFT] = self.free;
        node.priority = FREE;
        self.free = slot;
        let side = usize::from(nodes.get(parent as usize)?.link[RIGHT] == slot);
        // If there is one, it is the sum, as `NIL` is 0.
        let child = left | right;
        if child == NIL {
            link(nodes, parent, side, NIL);
        } else if left == NIL || right == NIL {
            attach(nodes, parent, side, child);
        } else {
            Self::merge(nodes, parent, side, [left, right]);
        }
        Some(range)
    }

    /// Hangs two subtrees, what is in the first before what is in the second, under one parent. Each
    /// step goes one level down.
    #[inline(never)]
    fn merge(nodes: &mut [Node], parent: u32, side: usize, subtrees: [u32; 2]) {
        let (mut parent, mut side) = (parent, side);
        let [mut left, mut right] = subtrees;
        while left != NIL && right != NIL {
            let (Some(first), Some(second)) = (nodes.get(left as usize), nodes.get(right as usize))
            else {
                break;
            };
            if first.priority > second.priority {
                let next = first.link[RIGHT];
                attach(nodes, parent, side, left);
                (parent, side, left) = (left, RIGHT, next);
            } else {
                let next = second.link[LEFT];
                attach(nodes, parent, side, right);
                (parent, side, right) = (right, LEFT, next);
            }
        }
        attach(nodes, parent, side, left | right);
    }

    /// Puts a node on the free list.
    #[inline(always)]
    fn give_back(&mut self, index: u32) {
        if let Some(node) = self.nodes.get_mut(index as usize) {
            node.link = [self.free, NIL];
            node.priority = FREE;
            self.free = index;
        }
    }

    fn unqueue(&mut self, waiter: &Node) {
        let [earlier, later] = waiter.link;
        if earlier == NIL {
            self.earliest = later;
        } else {
            link(&mut self.nodes, earlier, RIGHT, later);
        }
        if later == NIL {
            self.latest = earlier;
        } else {
            link(&mut self.nodes, later, LEFT, earlier);
        }
        self.waiting = self.waiting.wrapping_sub(1);
    }

    /// A priority for the treap: the upper half of a linear congruential generator (the constants
    /// are Knuth's for MMIX). Two instructions, and the lower half, which is weak, is not used.
    #[inline(always)]
    fn draw(&mut self) -> u32 {
        self.random = self
            .random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        // The upper half always fits.
        u32::try_from(self.random >> 32).unwrap_or(0) | IN_FLIGHT
    }
}

#[cfg(test)]
impl<S: DerefMut<Target = [Node]>> Gate<S> {
    /// Depth of the tree; panics when an invariant of the structure does not hold.
    pub(crate) fn check(&self) -> usize {
        let mut seen = vec![false; self.nodes.len()];
        let root = self.nodes[0].link[RIGHT];
        assert_eq!(self.nodes[0].link[LEFT], NIL);
        let mut ranges = Vec::new();
        let depth = self.check_tree(root, NIL, u32::MAX, &mut seen, &mut ranges);
        assert_eq!(ranges.len(), self.in_flight as usize);
        assert!(ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0));
        let (mut at, mut earlier, mut waiting) = (self.earliest, NIL, 0);
        while at != NIL {
            let node = &self.nodes[at as usize];
            assert!(!std::mem::replace(&mut seen[at as usize], true));
            assert_eq!((node.priority, node.link[LEFT]), (WAITING, earlier));
            (earlier, at, waiting) = (at, node.link[RIGHT], waiting + 1);
        }
        assert_eq!((self.latest, self.waiting), (earlier, waiting));
        let (mut at, mut free) = (self.free, 0);
        while at != NIL {
            assert!(!std::mem::replace(&mut seen[at as usize], true));
            assert_eq!(self.nodes[at as usize].priority, FREE);
            (at, free) = (self.nodes[at as usize].link[LEFT], free + 1);
        }
        assert_eq!(
            self.in_flight + self.waiting + free,
            self.capacity + self.waiters_max
        );
        depth
    }

    fn check_tree(
        &self,
        at: u32,
        parent: u32,
        priority_max: u32,
        seen: &mut [bool],
        ranges: &mut Vec<(u64, u64)>,
    ) -> usize {
        if at == NIL {
            return 0;
        }
        let node = &self.nodes[at as usize];
        assert!(!std::mem::replace(&mut seen[at as usize], true));
        assert_eq!(node.parent, parent);
        assert!(node.priority <= priority_max && node.priority & IN_FLIGHT != 0);
        let left = self.check_tree(node.link[LEFT], at, node.priority, seen, ranges);
        ranges.push((node.start, node.end));
        let right = self.check_tree(node.link[RIGHT], at, node.priority, seen, ranges);
        1 + left.max(right)
    }
}
