// SPDX-License-Identifier: GPL-2.0-only

//! Which records are where: in the kernel's ring, durable in the disk queue, or nowhere.
//!
//! ```text
//!   acked          released                 append_at                 next_seq
//!     |               |                         |                         |
//!     v    queue      v     queue and ring      v          ring           v
//!     |===============|=========================|-------------------------|
//! ```
//!
//! # Invariants
//!
//! - **Nothing is given back too early.** The ring is released up to what the target has acknowledged, or to the end of
//!   the records that the queue holds *durably* without a gap from the first unreleased one on ([`Spool::releasable`]),
//!   whichever is more. What was written but not synced, or whose sync failed, is not in the queue.
//! - **Nothing is freed too early.** A batch leaves the queue only when the target has acknowledged all of it.
//! - **Order.** Records are sent by their number, one after the other. [`Spool::place`] says where the next one is; the
//!   ring is asked first, so what is in both is sent without a read of the disk.
//! - **No silence.** A record that is at neither place is [`Place::Missing`], with the first one behind it that is there:
//!   a hole, which is never stepped over but given up by [`Spool::give_up`]. The next hello begins behind it, and the
//!   target then finds and names the hole.
//!
//! After a restart nothing but the batches on disk and `released` is known; a missing record that the target says it
//! holds is none. Where two batches hold the same record, the later one counts: it was written because a sync behind
//! the earlier one had failed.

use std::collections::VecDeque;

/// Records that were written at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch<P> {
    /// First record.
    pub first: u64,
    /// First record that is not in it.
    pub next: u64,
    /// Bytes on disk.
    pub bytes: u64,
    /// When its first record was made, in nanoseconds of the source's clock.
    pub time_ns: u64,
    /// Where it is on disk.
    pub place: P,
}

/// Where a record is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place<P> {
    /// In the kernel's ring.
    Ring,
    /// In this batch of the queue.
    Queue(Batch<P>),
    /// Nowhere; the next one that is somewhere is `to`.
    Missing {
        /// See above.
        to: u64,
    },
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Spool<P> {
    /// Ascending and without overlaps.
    durable: VecDeque<Batch<P>>,
    /// Written behind them, not synced.
    pending: Vec<Batch<P>>,
    /// Every record below is durable on the target.
    acked: u64,
    /// Records below are given up.
    floor: u64,
}

impl<P> Default for Spool<P> {
    fn default() -> Self {
        Self {
            durable: VecDeque::new(),
            pending: vec![],
            acked: 0,
            floor: 0,
        }
    }
}

impl<P: Copy> Spool<P> {
    /// Takes up what was found on disk, in the order in which it was written. Only what the ring no longer holds counts:
    /// it was durable, or it would not have been released. Of the rest, which may be torn, or lost in a sync that failed,
    /// nothing is needed.
    #[must_use]
    pub fn restore(found: impl IntoIterator<Item = Batch<P>>, released: u64) -> Self {
        let mut spool = Self::default();
        for batch in found.into_iter().filter(|batch| batch.next <= released) {
            spool.found(batch);
        }
        spool
    }

    fn found(&mut self, batch: Batch<P>) {
        while self
            .durable
            .back()
            .is_some_and(|last| last.first >= batch.first)
        {
            self.durable.pop_back();
        }
        if let Some(last) = self.durable.back_mut() {
            last.next = last.next.min(batch.first);
        }
        self.durable.push_back(batch);
    }

    /// The first record to be appended next.
    #[must_use]
    pub fn append_at(&self, released: u64) -> u64 {
        let last = self.pending.last().or(self.durable.back());
        last.map_or(0, |batch| batch.next).max(released)
    }

    /// A batch was written behind the others.
    pub fn on_written(&mut self, batch: Batch<P>) {
        debug_assert!(batch.first < batch.next);
        self.pending.push(batch);
    }

    /// Everything written is durable.
    pub fn on_synced(&mut self) {
        self.durable.extend(self.pending.drain(..));
        self.drop_acked();
    }

    /// A write or a sync failed: nothing is known of what was written since the last sync.
    pub fn on_failed(&mut self) {
        self.pending.clear();
    }

    /// Records up to this one are durable on the target.
    pub fn on_ack(&mut self, durable_seq: u64) {
        self.acked = self.acked.max(durable_seq.saturating_add(1));
        self.drop_acked();
    }

    fn drop_acked(&mut self) {
        let done = self.acked.max(self.floor);
        while self.durable.front().is_some_and(|batch| batch.next <= done) {
            self.durable.pop_front();
        }
    }

    /// Records below this need not be in the ring.
    #[must_use]
    pub fn releasable(&self, released: u64) -> u64 {
        let mut end = released.max(self.acked);
        for batch in self.durable.range(self.behind(end)..) {
            if batch.first > end {
                break;
            }
            end = end.max(batch.next);
        }
        end
    }

    /// Index of the first batch that reaches beyond a record.
    fn behind(&self, seq: u64) -> usize {
        self.durable.partition_point(|batch| batch.next <= seq)
    }

    /// Where a record is.
    #[must_use]
    pub fn place(&self, seq: u64, released: u64) -> Place<P> {
        if seq >= released {
            return Place::Ring;
        }
        match self.durable.get(self.behind(seq)) {
            Some(batch) if batch.first <= seq => Place::Queue(*batch),
            Some(batch) => Place::Missing {
                to: batch.first.min(released),
            },
            None => Place::Missing { to: released },
        }
    }

    /// Records `from` and those behind it in the same batch cannot be read back.
    pub fn on_unreadable(&mut self, from: u64) {
        let at = self.behind(from);
        let Some(batch) = self.durable.get_mut(at) else {
            return;
        };
        if batch.first >= from {
            self.durable.remove(at);
        } else {
            batch.next = from;
        }
    }

    /// Records below `to` are not sent any more; the next hello begins there.
    pub fn give_up(&mut self, to: u64) {
        self.floor = self.floor.max(to);
        self.drop_acked();
    }

    /// The oldest record that can be sent.
    #[must_use]
    pub fn first_seq(&self, released: u64) -> u64 {
        let oldest = self.durable.front().map_or(released, |batch| batch.first);
        oldest.min(released).max(self.floor)
    }

    /// The oldest batch that is still needed, whether durable or not.
    #[must_use]
    pub fn oldest(&self) -> Option<&Batch<P>> {
        self.durable.front().or(self.pending.first())
    }

    /// The newest durable batch.
    #[must_use]
    pub fn newest(&self) -> Option<&Batch<P>> {
        self.durable.back()
    }

    /// Records in the queue that the target has not acknowledged.
    #[must_use]
    pub fn records(&self) -> u64 {
        let unacked = |batch: &Batch<P>| batch.next - batch.first.max(self.acked);
        self.durable.iter().map(unacked).sum()
    }

    /// The same without a look at every batch, holes counted in.
    #[must_use]
    pub fn span(&self) -> u64 {
        let (first, last) = (self.durable.front(), self.durable.back());
        first
            .zip(last)
            .map_or(0, |(first, last)| last.next - first.first.max(self.acked))
    }

    /// Bytes of the batches that hold them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.durable.iter().map(|batch| batch.bytes).sum()
    }

    /// Every record below is durable on the target, as far as is known; 0: nothing is known.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.acked
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(first: u64, next: u64) -> Batch<u64> {
        Batch {
            first,
            next,
            bytes: 4096,
            time_ns: first,
            place: first,
        }
    }

    fn durable(ranges: &[(u64, u64)]) -> Spool<u64> {
        let mut spool = Spool::default();
        for (first, next) in ranges {
            spool.on_written(batch(*first, *next));
        }
        spool.on_synced();
        spool
    }

    #[test]
    fn only_what_is_durable_is_released() {
        let mut spool = Spool::default();
        assert_eq!((spool.append_at(5), spool.releasable(5)), (5, 5));
        spool.on_written(batch(5, 9));
        assert_eq!((spool.append_at(5), spool.releasable(5)), (9, 5));
        spool.on_failed();
        assert_eq!((spool.append_at(5), spool.releasable(5)), (5, 5));
        spool.on_written(batch(5, 7));
        spool.on_written(batch(7, 9));
        spool.on_synced();
        assert_eq!(spool.releasable(5), 9);
        assert_eq!(spool.place(8, 9), Place::Queue(batch(7, 9)));
        assert_eq!(spool.place(8, 8), Place::Ring);
        assert_eq!(spool.place(9, 9), Place::Ring);
        assert_eq!((spool.first_seq(9), spool.records()), (5, 4));
        let gap = durable(&[(5, 7), (8, 9)]);
        assert_eq!(gap.releasable(5), 7, "nothing is released across a gap");
    }

    #[test]
    fn a_batch_goes_when_all_of_it_is_acknowledged() {
        let mut spool = durable(&[(5, 7), (7, 9)]);
        spool.on_ack(5);
        assert_eq!((spool.first_seq(9), spool.records()), (5, 3));
        assert_eq!(spool.span(), 3);
        spool.on_ack(7);
        assert_eq!((spool.first_seq(9), spool.records()), (7, 1));
        spool.on_ack(8);
        assert_eq!((spool.oldest(), spool.first_seq(9)), (None, 9));
        spool.on_ack(20);
        assert_eq!(spool.releasable(9), 21);
    }

    #[test]
    fn what_cannot_be_read_is_a_hole_with_its_range() {
        let mut spool = durable(&[(5, 7), (7, 9), (9, 12)]);
        spool.on_unreadable(8);
        assert_eq!(spool.place(7, 12), Place::Queue(batch(7, 8)));
        assert_eq!(spool.place(8, 12), Place::Missing { to: 9 });
        spool.on_unreadable(9);
        assert_eq!(spool.place(8, 12), Place::Missing { to: 12 });
        spool.give_up(12);
        assert_eq!((spool.first_seq(12), spool.records()), (12, 0));
    }

    #[test]
    fn a_restart_finds_what_counts() {
        // 7 to 9 were written twice: a sync had failed. 12 to 15 may be torn.
        let found = [(5, 7), (7, 9), (7, 8), (8, 12), (12, 15)];
        let spool = Spool::restore(found.map(|(first, next)| batch(first, next)), 12);
        assert_eq!(spool.place(7, 12), Place::Queue(batch(7, 8)));
        assert_eq!((spool.append_at(12), spool.releasable(12)), (12, 12));
        assert_eq!((spool.first_seq(12), spool.records()), (5, 7));
        let spool = Spool::restore([batch(5, 9), batch(7, 10)], 12);
        assert_eq!(spool.place(6, 12), Place::Queue(batch(5, 7)));
        assert_eq!(spool.place(8, 12), Place::Queue(batch(7, 10)));
        // All of it is older than the ring: the target has what is between, or there is a hole.
        let spool = Spool::restore([batch(5, 7)], 10);
        assert_eq!((spool.append_at(10), spool.releasable(10)), (10, 10));
        assert_eq!(spool.place(8, 10), Place::Missing { to: 10 });
        // A gap in what is only here stays a hole.
        let spool = Spool::restore([batch(5, 7), batch(9, 10)], 10);
        assert_eq!((spool.append_at(10), spool.first_seq(10)), (10, 5));
        assert_eq!(spool.place(7, 10), Place::Missing { to: 9 });
    }
}
