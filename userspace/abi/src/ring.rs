// SPDX-License-Identifier: GPL-2.0-only

//! The ring as its consumer sees it.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::MmapOptions;
use nix::errno::Errno;

use crate::ffi::Shared;
use crate::{Error, Operation, Result, raw};

const RELEASED: usize = std::mem::offset_of!(raw::ConsumerPage, released);
const WAKE_SEQ: usize = std::mem::offset_of!(raw::ConsumerPage, wake_seq);
const MAGIC: usize = std::mem::offset_of!(raw::ProducerPage, magic);
const NEXT_SEQ: usize = std::mem::offset_of!(raw::ProducerPage, next_seq);
const COMMITTED: usize = std::mem::offset_of!(raw::ProducerPage, committed);
const SPACE_WANTED: usize = std::mem::offset_of!(raw::ProducerPage, space_wanted);

/// Where things are in the ring mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Number of descriptors, a power of two.
    pub desc_count: u32,
    /// Payload area in bytes, a power of two.
    pub payload_bytes: usize,
    /// Offset of the descriptors in bytes.
    pub desc_offset: usize,
    /// Offset of the payload area in bytes.
    pub payload_offset: usize,
    /// Length of the mapping in bytes.
    pub ring_bytes: usize,
}

impl Geometry {
    /// Takes the geometry from a status and checks that all parts lie inside of the mapping.
    pub fn new(status: &raw::StreamStatus) -> Result<Self> {
        let bytes = |value: u64, what: &str| {
            usize::try_from(value).map_err(|_| Error::Corrupt {
                what: format!("its {what} is {value}"),
            })
        };
        let geometry = Self {
            desc_count: status.desc_count,
            payload_bytes: bytes(status.payload_bytes, "payload size")?,
            desc_offset: bytes(status.desc_offset, "descriptor offset")?,
            payload_offset: bytes(status.payload_offset, "payload offset")?,
            ring_bytes: bytes(status.ring_bytes, "length")?,
        };
        match geometry.fault() {
            None => Ok(geometry),
            Some(what) => Err(Error::Corrupt { what: what.into() }),
        }
    }

    fn fault(&self) -> Option<&'static str> {
        let page = |offset: usize| offset % raw::PAGE_BYTES == 0;
        let descs_end = (self.desc_count as usize)
            .checked_mul(raw::DESC_BYTES)
            .and_then(|bytes| bytes.checked_add(self.desc_offset));
        let payload_end = self.payload_offset.checked_add(self.payload_bytes);
        if !self.desc_count.is_power_of_two() || !self.payload_bytes.is_power_of_two() {
            Some("a size is not a power of two")
        } else if self.desc_offset < raw::PAGE_BYTES
            || !page(self.desc_offset)
            || !page(self.payload_offset)
        {
            Some("an offset is not a page of its own")
        } else if descs_end.is_none_or(|end| end > self.payload_offset) {
            Some("descriptors and payload overlap")
        } else if payload_end.is_none_or(|end| end > self.ring_bytes) {
            Some("the payload reaches beyond the mapping")
        } else {
            None
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "masked to less than 2^32")]
    const fn desc_at(&self, seq: u64) -> usize {
        self.desc_offset + (seq & (self.desc_count as u64 - 1)) as usize * raw::DESC_BYTES
    }

    /// Where a payload lies in the mapping; `None` when it would wrap.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "masked to less than the size of a mapping"
    )]
    fn payload_at(&self, position: u64, bytes: u32) -> Option<usize> {
        let start = (position & (self.payload_bytes as u64 - 1)) as usize;
        let end = start.checked_add(bytes as usize)?;
        (end <= self.payload_bytes).then_some(self.payload_offset + start)
    }
}

/// The ring of a stream that this process consumes. Clones share it.
#[derive(Clone)]
pub struct Ring {
    inner: Arc<Inner>,
}

/// # Invariants
///
/// - `consumer` is mapped writable; nobody but this object stores to it while the stream is open.
/// - The word `released` in it is `State::published`, which only rises.
/// - Everybody who reads a record holds its sequence number or a lower one in `State::holds`, and
///   `published` never passes the lowest number in there. The kernel does not touch descriptors
///   and payload of records in `published..committed`.
struct Inner {
    consumer: Shared,
    ring: Shared,
    geometry: Geometry,
    state: Mutex<State>,
}

struct State {
    /// The highest sequence number that [`Ring::release`] was asked for.
    wanted: u64,
    /// What the kernel was told.
    published: u64,
    /// First sequence numbers of the holds that live, with their count.
    holds: BTreeMap<u64, usize>,
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic cannot leave the state half changed: nothing in here panics between stores.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn committed(&self) -> u64 {
        self.ring.load(COMMITTED)
    }

    /// Tells the kernel what nobody holds and somebody wanted released.
    fn publish(&self, state: &mut State) {
        let held = state.holds.keys().next().copied().unwrap_or(u64::MAX);
        let target = state.wanted.min(held);
        if target > state.published {
            state.published = target;
            self.consumer.store(RELEASED, target);
        }
    }
}

impl Ring {
    /// Maps the ring of an open stream file, or of a memory file with the same layout.
    pub(crate) fn map(file: &impl AsRawFd, status: &raw::StreamStatus) -> Result<Self> {
        let geometry = Geometry::new(status)?;
        let failed = |error: std::io::Error| Error::Refused {
            operation: Operation::StreamMap,
            errno: Errno::from_raw(error.raw_os_error().unwrap_or_default()),
        };
        let consumer = MmapOptions::new()
            .offset(raw::MMAP_CONSUMER)
            .len(raw::PAGE_BYTES)
            .map_raw(file)
            .map_err(failed)?;
        let ring = MmapOptions::new()
            .offset(raw::MMAP_RING)
            .len(geometry.ring_bytes)
            .map_raw_read_only(file)
            .map_err(failed)?;
        let (consumer, ring) = (Shared::new(consumer), Shared::new(ring));
        if ring.load(MAGIC) != raw::RING_MAGIC {
            return Err(Error::Corrupt {
                what: "its magic number is wrong".into(),
            });
        }
        // INVARIANT: One consumer at a time, and the kernel does not store to the consumer page
        // while it is open, so what it reports as released is what the page says.
        consumer.store(RELEASED, status.released);
        consumer.store(WAKE_SEQ, 0);
        Ok(Self {
            inner: Arc::new(Inner {
                consumer,
                ring,
                geometry,
                state: Mutex::new(State {
                    wanted: status.released,
                    published: status.released,
                    holds: BTreeMap::new(),
                }),
            }),
        })
    }

    /// Where things are.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.inner.geometry
    }

    /// Every record below is complete.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.inner.committed()
    }

    /// Every record below has been reserved, though perhaps not completed.
    #[must_use]
    pub fn next_seq(&self) -> u64 {
        self.inner.ring.load(NEXT_SEQ)
    }

    /// Every record below may be overwritten: what the kernel was told.
    #[must_use]
    pub fn released(&self) -> u64 {
        self.inner.state().published
    }

    /// True while somebody waits for room: `kick()` the stream after a release. A release that
    /// was put off by a [`Hold`] takes effect when that is dropped, so ask again then.
    #[must_use]
    pub fn space_wanted(&self) -> bool {
        // The kernel stores `space_wanted`, then loads `released`; we do it the other way round. With
        // a fence on both sides, one of the two sees the other's store.
        fence(Ordering::SeqCst);
        self.inner.ring.load(SPACE_WANTED) != 0
    }

    /// Holds all complete records from `from` on, which keeps them readable.
    pub fn hold(&self, from: u64) -> Result<Hold> {
        let mut state = self.inner.state();
        let end = self.inner.committed().max(state.published);
        let range = state.published..end;
        if from < range.start || from > range.end {
            return Err(Error::OutOfRange { seq: from, range });
        }
        *state.holds.entry(from).or_default() += 1;
        drop(state);
        Ok(Hold {
            inner: Arc::clone(&self.inner),
            range: from..end,
        })
    }

    /// The descriptor of one complete record.
    pub fn desc(&self, seq: u64) -> Result<raw::Desc> {
        self.hold(seq)?.desc(seq)
    }

    /// Gives up all records below `seq`. What is held stays until the [`Hold`] is dropped.
    /// Returns what the kernel was told. A `seq` below an earlier one changes nothing.
    pub fn release(&self, seq: u64) -> Result<u64> {
        let mut state = self.inner.state();
        let end = self.inner.committed().max(state.published);
        if seq > end {
            let range = state.published..end;
            return Err(Error::OutOfRange { seq, range });
        }
        state.wanted = state.wanted.max(seq);
        self.inner.publish(&mut state);
        Ok(state.published)
    }

    /// Asks to be woken when record `seq` is complete. True: it is not yet, so poll the stream;
    /// false: it is complete already and there is nothing to wait for.
    #[must_use]
    pub fn arm_wake(&self, seq: u64) -> bool {
        self.inner.consumer.store(WAKE_SEQ, seq);
        // Either the kernel sees the number when it completes the record, or the load below sees
        // the completed record.
        fence(Ordering::SeqCst);
        self.inner.committed() <= seq
    }

    /// Asks not to be woken.
    pub fn disarm_wake(&self) {
        self.inner.consumer.store(WAKE_SEQ, 0);
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("released", &self.released())
            .field("committed", &self.committed())
            .field("next_seq", &self.next_seq())
            .finish_non_exhaustive()
    }
}

/// One record.
#[derive(Clone, Copy, Debug)]
pub struct Record<'a> {
    /// What happened where.
    pub desc: raw::Desc,
    /// The bytes; empty for operations without payload and for failed ones, whose payload must
    /// not be applied.
    pub payload: &'a [u8],
}

/// Complete records that stay readable as long as this lives. It can be sent to another thread,
/// for example to the one that ships the records.
///
/// # Invariants
///
/// `range.start` is counted in `State::holds`, and `range.end` is at most `committed`.
pub struct Hold {
    inner: Arc<Inner>,
    range: Range<u64>,
}

impl Hold {
    /// The first record held.
    #[must_use]
    pub const fn start(&self) -> u64 {
        self.range.start
    }

    /// The first record not held any more; where the next hold begins.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.range.end
    }

    /// True when nothing was complete.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    fn check(&self, seq: u64) -> Result<()> {
        if self.range.contains(&seq) {
            return Ok(());
        }
        Err(Error::OutOfRange {
            seq,
            range: self.range.clone(),
        })
    }

    /// The descriptor of a held record.
    pub fn desc(&self, seq: u64) -> Result<raw::Desc> {
        self.check(seq)?;
        // SAFETY: By the invariants of `Hold` and `Inner` the record is complete and not
        // released, so the kernel does not write to its descriptor.
        let desc = unsafe { self.inner.ring.desc(self.inner.geometry.desc_at(seq)) };
        if desc.seq != seq {
            return Err(Error::Corrupt {
                what: format!("the place of record {seq} holds record {}", desc.seq),
            });
        }
        if !matches!(desc.state, raw::STATE_COMMITTED | raw::STATE_FAILED) {
            return Err(Error::Corrupt {
                what: format!(
                    "record {seq} is counted as complete in state {}",
                    desc.state
                ),
            });
        }
        Ok(desc)
    }

    /// A held record with its payload.
    pub fn record(&self, seq: u64) -> Result<Record<'_>> {
        let desc = self.desc(seq)?;
        if desc.payload_bytes == 0 || desc.state == raw::STATE_FAILED {
            return Ok(Record { desc, payload: &[] });
        }
        let bytes = desc.payload_bytes as usize;
        let offset = self
            .inner
            .geometry
            .payload_at(desc.payload_pos, desc.payload_bytes)
            .ok_or_else(|| Error::Corrupt {
                what: format!("the payload of record {seq} wraps around"),
            })?;
        // SAFETY: The descriptor was read from the ring just now, so this is the payload of a
        // record that is complete and, by the invariants of `Hold` and `Inner`, not released as
        // long as `self` lives: the kernel does not write to it. `self` is borrowed for as long
        // as the slice, and the hold's `Arc` keeps the mapping.
        let payload = unsafe { self.inner.ring.slice(offset, bytes) };
        Ok(Record { desc, payload })
    }

    /// The payload of a held record.
    pub fn payload(&self, seq: u64) -> Result<&[u8]> {
        self.record(seq).map(|record| record.payload)
    }

    /// All held records in order.
    pub fn iter(&self) -> impl Iterator<Item = Result<Record<'_>>> {
        self.range.clone().map(|seq| self.record(seq))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.inner.state();
        if let Some(count) = state.holds.get_mut(&self.range.start) {
            *count -= 1;
            if *count == 0 {
                state.holds.remove(&self.range.start);
            }
        }
        self.inner.publish(&mut state);
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Hold").field(&self.range).finish()
    }
}
