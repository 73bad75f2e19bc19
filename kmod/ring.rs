// SPDX-License-Identifier: GPL-2.0-only

//! The arithmetic of a stream's ring: which record gets which sequence number and which payload
//! space, up to where records are complete, what the consumer has released, and when changes go
//! unrecorded. The pages themselves belong to the caller; see `abi.rs` for what is in them.
//!
//! ```text
//! sequence numbers   SEQ_FIRST ... released ......... committed ......... next_seq
//!                              (reusable)  (consumer's)       (in flight)
//! payload positions                 tail ........................ head
//! ```
//!
//! Payload positions are counted through, like sequence numbers; a position's place in the payload area
//! is its value modulo the area's length. A payload is contiguous: one that would cross the end of the
//! area starts at the beginning, and the rest of the area stays unused until it is released along with it.
//! In an empty ring every payload of up to a quarter of the area finds room, padding included, so a
//! writer that waits for room always gets it in the end.
//!
//! # The order of memory accesses
//!
//! Everything here runs under the lock of the stream. What is shared with the consumer without a lock
//! goes through [`Shared`], and these sequences are all there is. `tests/logic` runs this code
//! against a model of the consumer under loom, and checks that leaving out a step is noticed.
//!
//! 1. **Fill and complete.** The fields of a descriptor and its payload are written after the `reserve`
//!    that handed out their space; the payload and the final `state` are written before `complete`.
//!    Both may happen outside the lock, as `reserve` and `complete` are themselves under it.
//! 2. **Publish.** When `complete` returned true: [`Ring::publish`] in the same critical section, or a
//!    later one: it stores `committed` with release ordering, issues a full fence, and then loads
//!    `wake_seq`. Wake the consumer when it returns true, after unlocking. The fence pairs with the
//!    consumer's, between its store of `wake_seq` and its load of `committed`: one of the two sees the
//!    other's store. The release of `committed` covers what *other* processors wrote to their
//!    records, because they completed them under the same lock before.
//! 3. **Take back.** [`Ring::pull_release`] loads `released` with acquire ordering, so that nothing
//!    that the consumer read below it can be overwritten too early. It is called when there is
//!    no room, on a KICK and for a status; there is no need to call it for every record.
//! 4. **Wait for room.** Before *each* sleep, with the sleeper already on the wait queue:
//!    [`Ring::want_room`] stores `space_wanted`, issues a full fence, and loads `released` once more; if
//!    that moved, try again instead of sleeping. The consumer needs a full fence between its store of
//!    `released` and its load of `space_wanted` as well. The same call is made when a GAP record has to
//!    wait. [`Ring::want_no_room`] follows when nobody waits and no gap is open.
//! 5. **Poll.** `poll` puts the task on the wait queue first, then takes the lock and asks
//!    [`Ring::readable`] with the `wake_seq` of that moment.

use core::ops::DerefMut;

use crate::abi;

/// Alignment of every payload, in bytes.
const ALIGN_SMALL: u64 = 512;

/// Alignment of a payload of at least this length, in bytes.
const ALIGN_LARGE: u64 = 4096;

/// What the ring remembers about a record, besides its descriptor. 16 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Meta {
    /// `head` after this record.
    payload_end: u64,
    /// `sync_sectors` after this record.
    sync_sectors: u32,
    /// 0: not complete. Otherwise complete; at both ends of an unbroken run of complete records that
    /// `committed` has not reached, the length of that run.
    run: u32,
}

impl Meta {
    /// What storage is filled with before it is handed to [`Ring::new`].
    pub(crate) const EMPTY: Self = Self {
        payload_end: 0,
        sync_sectors: 0,
        run: 0,
    };
}

/// Space for one record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Reservation {
    /// Sequence number.
    pub(crate) seq: u64,
    /// Position of the payload; 0 without payload.
    pub(crate) pos: u64,
}

/// Why there is no space for a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// No descriptor or no payload space.
    Ring,
    /// SYNC records use their share already.
    SyncShare,
    /// Changes went unrecorded, and the GAP record comes first: [`Ring::reserve_gap`].
    Gap,
    /// Larger than a quarter of the payload area. There will never be space for it.
    TooLarge,
}

/// The consumer published a `released` that moves backwards or passes `committed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadRelease;

/// Changes that went unrecorded.
///
/// ```text
///               add, add_devices
///     closed ------------------------> open --+ add, add_devices
///        ^                              |  ^--+
///        +------------------------------+
///            take (the GAP record is reserved)
/// ```
///
/// While it is open, nothing else is recorded ([`NoRoom::Gap`]). So what follows the GAP record in the
/// stream was recorded after the last unrecorded change, and what precedes it before the first.
///
/// The GAP record needs a descriptor and no payload. None is set aside for it: as nothing else gets one
/// while a gap is open, the first ones that the consumer releases are left for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gap {
    /// Changes.
    pub(crate) changes: u64,
    /// Their length in sectors.
    pub(crate) sectors: u64,
    /// The device of all of them, or [`abi::DEVICE_NONE`] when there were several, or no change.
    pub(crate) device: u32,
    /// Devices joined, left or changed size unrecorded.
    pub(crate) devices_changed: bool,
    /// Time of the first of it all, in nanoseconds.
    pub(crate) since_ns: u64,
    open: bool,
}

impl Gap {
    /// No gap.
    pub(crate) const CLOSED: Self = Self {
        changes: 0,
        sectors: 0,
        device: abi::DEVICE_NONE,
        devices_changed: false,
        since_ns: 0,
        open: false,
    };

    /// Whether anything went unrecorded.
    #[inline]
    pub(crate) fn is_open(&self) -> bool {
        self.open
    }

    /// A change went unrecorded.
    pub(crate) fn add(&mut self, device: u32, sectors: u64, now_ns: u64) {
        self.begin(now_ns);
        if self.changes == 0 {
            self.device = device;
        } else if self.device != device {
            self.device = abi::DEVICE_NONE;
        }
        self.changes = self.changes.saturating_add(1);
        self.sectors = self.sectors.saturating_add(sectors);
    }

    /// A device joined, left or changed its size unrecorded.
    pub(crate) fn add_devices(&mut self, now_ns: u64) {
        self.begin(now_ns);
        self.devices_changed = true;
    }

    /// Closes the gap and returns what it was.
    pub(crate) fn take(&mut self) -> Option<Self> {
        if !self.open {
            return None;
        }
        Some(core::mem::replace(self, Self::CLOSED))
    }

    fn begin(&mut self, now_ns: u64) {
        if !self.open {
            self.open = true;
            self.since_ns = now_ns;
        }
    }
}

/// The words that kernel and consumer share. See "The order of memory accesses" above.
pub(crate) trait Shared {
    /// Stores `ProducerPage::committed` with release ordering.
    fn store_committed(&self, seq: u64);
    /// Loads `ConsumerPage::released` with acquire ordering.
    fn load_released(&self) -> u64;
    /// Loads `ConsumerPage::wake_seq`; no ordering.
    fn load_wake_seq(&self) -> u64;
    /// Stores `ProducerPage::space_wanted`; no ordering.
    fn store_space_wanted(&self, wanted: bool);
    /// Orders everything before it against everything after it (`smp_mb`).
    fn full_fence(&self);
}

/// The ring of one stream. See the module documentation.
///
/// # Invariants
///
/// - `SEQ_FIRST <= released <= committed <= next_seq <= released + desc_count`.
/// - `head - tail <= payload_bytes`; `tail` is `payload_end` of the last released record.
/// - The record `committed`, if it is reserved, is not complete.
pub(crate) struct Ring<S> {
    meta: S,
    desc_count: u64,
    payload_bytes: u64,
    next_seq: u64,
    committed: u64,
    released: u64,
    head: u64,
    tail: u64,
    /// Sectors of all SYNC payloads up to `next_seq`, and up to `released`; counted modulo 2^32.
    sync_sectors: u32,
    sync_released: u32,
    sync_sectors_max: u32,
    /// The `wake_seq` that the consumer was last woken for.
    last_woken: u64,
    gap: Gap,
}

impl<S: DerefMut<Target = [Meta]>> Ring<S> {
    /// An empty ring. None when the number of descriptors or `payload_bytes` is not a power of two,
    /// or either is absurd (more than 2^30 descriptors, less than 16 KiB or more than 1 TiB).
    ///
    /// One SYNC record is let in when none is in the ring, even if it alone is more than
    /// `sync_bytes_max`, so that a small share is slow, and not stuck.
    pub(crate) fn new(meta: S, payload_bytes: u64, sync_bytes_max: u64) -> Option<Self> {
        let desc_count = meta.len() as u64;
        if !desc_count.is_power_of_two()
            || desc_count > 1 << 30
            || !payload_bytes.is_power_of_two()
            || !(4 * ALIGN_LARGE..=1 << 40).contains(&payload_bytes)
        {
            return None;
        }
        let sync_bytes_max = sync_bytes_max.min(payload_bytes);
        Some(Self {
            meta,
            desc_count,
            payload_bytes,
            next_seq: abi::SEQ_FIRST,
            committed: abi::SEQ_FIRST,
            released: abi::SEQ_FIRST,
            head: 0,
            tail: 0,
            sync_sectors: 0,
            sync_released: 0,
            sync_sectors_max: u32::try_from(sync_bytes_max / abi::SECTOR_BYTES).unwrap_or(u32::MAX),
            last_woken: 0,
            gap: Gap::CLOSED,
        })
    }

    /// The sequence number of the next record.
    #[inline]
    pub(crate) fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Every record below is complete.
    #[inline]
    pub(crate) fn committed(&self) -> u64 {
        self.committed
    }

    /// Every record below was released.
    #[inline]
    pub(crate) fn released(&self) -> u64 {
        self.released
    }

    /// Payload bytes in use, padding included.
    #[inline]
    pub(crate) fn used_bytes(&self) -> u64 {
        self.head.wrapping_sub(self.tail)
    }

    /// Payload bytes of SYNC records, padding not included.
    #[inline]
    pub(crate) fn sync_bytes(&self) -> u64 {
        u64::from(self.sync_sectors.wrapping_sub(self.sync_released)) * abi::SECTOR_BYTES
    }

    /// Most payload bytes of SYNC records.
    #[inline]
    pub(crate) fn sync_bytes_max(&self) -> u64 {
        u64::from(self.sync_sectors_max) * abi::SECTOR_BYTES
    }

    /// Payload bytes not in use. A payload may need more than its length of them, for padding.
    #[inline]
    pub(crate) fn free_bytes(&self) -> u64 {
        self.payload_bytes.wrapping_sub(self.used_bytes())
    }

    /// Descriptors not in use.
    #[inline]
    pub(crate) fn free_descs(&self) -> u64 {
        self.desc_count
            .wrapping_sub(self.next_seq.wrapping_sub(self.released))
    }

    /// What went unrecorded, and is not told by a GAP record yet.
    #[inline]
    pub(crate) fn gap(&self) -> &Gap {
        &self.gap
    }

    /// Space for a record with `payload_bytes` of payload.
    #[inline]
    pub(crate) fn reserve(
        &mut self,
        payload_bytes: u32,
        is_sync: bool,
    ) -> Result<Reservation, NoRoom> {
        if self.gap.open {
            return Err(NoRoom::Gap);
        }
        self.reserve_any(payload_bytes, is_sync)
    }

    /// The change of `sectors` sectors of `device` goes unrecorded (its range is marked dirty), as does
    /// everything after it, until [`Ring::reserve_gap`] has succeeded.
    pub(crate) fn miss(&mut self, device: u32, sectors: u64, now_ns: u64) {
        self.gap.add(device, sectors, now_ns);
    }

    /// A device joined, left or changed its size, and that goes unrecorded.
    pub(crate) fn miss_devices(&mut self, now_ns: u64) {
        self.gap.add_devices(now_ns);
    }

    /// Space for the GAP record, and what to put into it, if a gap is open and there is room enough to
    /// go on recording for a while. Try it whenever `released` has moved, and when a change finds
    /// [`NoRoom::Gap`].
    pub(crate) fn reserve_gap(&mut self) -> Option<(Reservation, Gap)> {
        if !self.gap.open || !self.room_for_capture_again() {
            return None;
        }
        let reservation = self.reserve_any(0, false).ok()?;
        Some((reservation, self.gap.take()?))
    }

    /// Whether a quarter of the payload area and of the descriptors is free: hysteresis, so that a full
    /// ring does not alternate between one record and one gap. It comes true at the latest when
    /// everything is released.
    #[inline]
    pub(crate) fn room_for_capture_again(&self) -> bool {
        let descs_min = (self.desc_count / 4).max(1);
        self.free_bytes() >= self.payload_bytes / 4 && self.free_descs() >= descs_min
    }

    /// Marks a record complete. True when `committed` moved: [`Ring::publish`] then.
    ///
    /// Constant time, in whatever order records complete: runs of complete records behind one that
    /// is not are merged at their ends, and `committed` passes a whole run at once. A sequence number
    /// that is not reserved, or complete already, is ignored.
    #[inline]
    pub(crate) fn complete(&mut self, seq: u64) -> bool {
        if seq < self.committed || seq >= self.next_seq || self.meta(seq).run != 0 {
            return false;
        }
        let next = seq.wrapping_add(1);
        let right = if next < self.next_seq {
            self.meta(next).run
        } else {
            0
        };
        if seq == self.committed {
            self.committed = next.wrapping_add(u64::from(right));
            return true;
        }
        let left = self.meta(seq.wrapping_sub(1)).run;
        let run = left.wrapping_add(1).wrapping_add(right);
        self.set_run(seq, run);
        self.set_run(seq.wrapping_sub(u64::from(left)), run);
        self.set_run(seq.wrapping_add(u64::from(right)), run);
        false
    }

    /// The space of all records below `released` may be used again. Ok(true) when that moved.
    pub(crate) fn release(&mut self, released: u64) -> Result<bool, BadRelease> {
        if released < self.released || released > self.committed {
            return Err(BadRelease);
        }
        if released == self.released {
            return Ok(false);
        }
        let last = *self.meta(released.wrapping_sub(1));
        self.released = released;
        self.tail = last.payload_end;
        self.sync_released = last.sync_sectors;
        Ok(true)
    }

    /// Tells the consumer what is complete. True: wake it, once the lock is dropped.
    #[inline]
    pub(crate) fn publish(&mut self, shared: &impl Shared) -> bool {
        shared.store_committed(self.committed);
        shared.full_fence();
        let wake_seq = shared.load_wake_seq();
        if !self.readable(wake_seq) || wake_seq == self.last_woken {
            return false;
        }
        // Nobody goes to sleep for this number again: `committed` is above it for good.
        self.last_woken = wake_seq;
        true
    }

    /// Whether a consumer that asked to be woken for `wake_seq` has something to read.
    #[inline]
    pub(crate) fn readable(&self, wake_seq: u64) -> bool {
        wake_seq != 0 && self.committed > wake_seq
    }

    /// Takes over what the consumer has released. Ok(true) when there is more room now.
    #[inline]
    pub(crate) fn pull_release(&mut self, shared: &impl Shared) -> Result<bool, BadRelease> {
        self.release(shared.load_released())
    }

    /// Asks the consumer for a KICK after its next release, because somebody is about to wait for room.
    /// Ok(true): there is more room already, try again.
    pub(crate) fn want_room(&mut self, shared: &impl Shared) -> Result<bool, BadRelease> {
        shared.store_space_wanted(true);
        shared.full_fence();
        self.pull_release(shared)
    }

    /// Nobody waits for room any more, and no gap is open.
    pub(crate) fn want_no_room(&mut self, shared: &impl Shared) {
        shared.store_space_wanted(false);
    }

    #[inline(always)]
    fn reserve_any(&mut self, payload_bytes: u32, is_sync: bool) -> Result<Reservation, NoRoom> {
        let seq = self.next_seq;
        if seq.wrapping_sub(self.released) >= self.desc_count {
            return Err(NoRoom::Ring);
        }
        let mut pos = 0;
        if payload_bytes != 0 {
            let length = u64::from(payload_bytes);
            pos = self.place(length)?;
            if is_sync {
                // At most a quarter of 1 TiB in sectors, which fits.
                let sectors = payload_bytes.div_ceil(abi::SECTOR_BYTES as u32);
                let used = self.sync_sectors.wrapping_sub(self.sync_released);
                if used != 0 && used.saturating_add(sectors) > self.sync_sectors_max {
                    return Err(NoRoom::SyncShare);
                }
                self.sync_sectors = self.sync_sectors.wrapping_add(sectors);
            }
            self.head = pos.wrapping_add(length);
        }
        let meta = Meta {
            payload_end: self.head,
            sync_sectors: self.sync_sectors,
            run: 0,
        };
        if let Some(place) = self.meta_mut(seq) {
            *place = meta;
        }
        self.next_seq = seq.wrapping_add(1);
        Ok(Reservation { seq, pos })
    }

    /// Where a payload of `length` bytes can go.
    #[inline(always)]
    fn place(&self, length: u64) -> Result<u64, NoRoom> {
        if length > self.payload_bytes / 4 {
            return Err(NoRoom::TooLarge);
        }
        let align = if length >= ALIGN_LARGE {
            ALIGN_LARGE - 1
        } else {
            ALIGN_SMALL - 1
        };
        let mask = self.payload_bytes.wrapping_sub(1);
        let mut pos = self.head.wrapping_add(align) & !align;
        if (pos & mask).wrapping_add(length) > self.payload_bytes {
            pos = (pos | mask).wrapping_add(1);
        }
        if pos.wrapping_add(length).wrapping_sub(self.tail) > self.payload_bytes {
            return Err(NoRoom::Ring);
        }
        Ok(pos)
    }

    #[inline(always)]
    fn index(&self, seq: u64) -> usize {
        // Below `desc_count`, which was a `usize`.
        usize::try_from(seq & self.desc_count.wrapping_sub(1)).unwrap_or(0)
    }

    #[inline(always)]
    fn meta(&self, seq: u64) -> &Meta {
        self.meta.get(self.index(seq)).unwrap_or(&Meta::EMPTY)
    }

    #[inline(always)]
    fn meta_mut(&mut self, seq: u64) -> Option<&mut Meta> {
        let index = self.index(seq);
        self.meta.get_mut(index)
    }

    #[inline(always)]
    fn set_run(&mut self, seq: u64, run: u32) {
        if let Some(meta) = self.meta_mut(seq) {
            meta.run = run;
        }
    }
}
