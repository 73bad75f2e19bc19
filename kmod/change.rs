// SPDX-License-Identifier: GPL-2.0-only

//! The way of a bio: reads pass by, changes are captured.
//!
//! ```text
//!  submit ─ read ──────────────────────────────────────────────> backing device
//!     │
//!     └─ change ─ 1 gate ─ 2 intent ─ 3 reserve ─ 4 copy ─ 5 lower bio ─> backing device
//!                  (wait while an overlapping               built from the ring's pages
//!                   change is in flight)                          │
//!        upper bio ends <─ gate opens <─ record complete <── ended
//! ```
//!
//! Steps 1 and 3 are one critical section ([`Stream::admit`](crate::stream::Stream::admit)).
//! Step 2, the durable mark of a cold region, is not built yet; its place is before the admission,
//! where a change holds nothing that others wait for.
//!
//! # Why waiting here can not deadlock
//!
//! What `submit_bio` submits waits on `current->bio_list` until it returns. So a change here never
//! waits after it has submitted or while it is in the gate: it submits one lower bio and returns;
//! a bio too large for one record is cut, and the rest comes back through `submit_bio` when the first
//! part is on its way down. What it may wait for is held by changes whose lower bios were
//! handed down: the block layer works off the lower bios of one bio before it comes to the next bio
//! of the same list, and a task's plug is flushed when it sleeps.
//!
//! Memory comes from mempools, one a level. A captured change allocates before the gate, where it
//! holds nothing: the elements it may wait for belong to changes in flight, which end, or to
//! changes at the gate, which wait for nothing but changes in flight. A change that turns out to go
//! by the stream is in the gate by then, so its clone comes from a second pool, whose elements all
//! belong to changes in flight. SYNC has a third one: changes that wait for room in the ring hold
//! elements of the first, and the consumer, who makes that room, must not wait for them.

use crate::{
    abi,
    device::Device,
    ffi::{
        bio::{Accounting, OpFlags, Operation, Status, UpperBio},
        bio_set::LowerState,
        time,
    },
    gate::SlotId,
    stream::{Admitted, Completion, Request},
};
use core::sync::atomic::Ordering;
use kernel::{
    prelude::*,
    sync::{Arc, ArcBorrow},
};

/// What the end of a change brings with it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Effect {
    /// It closes an epoch.
    closes_epoch: bool,
    /// It leaves its range with content that nobody knows: dirty.
    unspecified: bool,
    /// It is a SYNC read, which changes nothing.
    sync: bool,
    /// A SYNC read whose record holds the content of the range: clean.
    clean: bool,
}

/// What travels with a lower bio.
pub(crate) struct InFlight {
    device: Arc<Device>,
    /// Of a change that is not captured: its data is shared, so it can not be ended early.
    upper: Option<(UpperBio, Accounting)>,
    start: u64,
    sectors: u64,
    /// 0 when it is not captured.
    seq: u64,
    slot: SlotId,
    flags: u16,
    effect: Effect,
}

impl InFlight {
    /// A SYNC read that clears the dirty bits of its range if `clean`.
    pub(crate) fn sync(
        device: Arc<Device>,
        slot: SlotId,
        seq: u64,
        start: u64,
        sectors: u64,
        clean: bool,
    ) -> Self {
        device.change_begins();
        Self {
            device,
            upper: None,
            start,
            sectors,
            seq,
            slot,
            flags: 0,
            effect: Effect {
                sync: true,
                clean,
                ..Effect::default()
            },
        }
    }
}

impl LowerState for InFlight {
    #[inline]
    fn ended(self, status: Status) {
        let failed = !status.is_ok();
        let device = self.device;
        if failed {
            device.counters().failed.fetch_add(1, Ordering::Relaxed);
        }
        let effect = self.effect;
        let parked = device.stream().complete(&Completion {
            device: &device,
            slot: self.slot,
            seq: (self.seq != 0).then_some(self.seq),
            flags: self.flags,
            errno: if failed { status.errno().max(1) } else { 0 },
            start: self.start,
            sectors: self.sectors,
            // What failed left old content, new content or a mix of them.
            dirty: self.sectors != 0 && !effect.sync && (effect.unspecified || failed),
            clean: effect.clean && !failed,
            closes_epoch: effect.closes_epoch,
        });
        if let Some((upper, started)) = self.upper.or(parked) {
            upper.end_accounted(started, status);
        }
        Device::change_ends(device);
    }
}

/// Takes a bio for the disk of `device`.
#[inline]
pub(crate) fn submit(device: ArcBorrow<'_, Device>, bio: UpperBio) {
    match bio.op_flags().operation() {
        Operation::Read => bio.pass_read(device.backing(), device.start()),
        Operation::Write => submit_write(device, bio),
        Operation::WriteZeroes | Operation::Discard | Operation::SecureErase => {
            submit_change(device, bio, 0);
        }
        Operation::Other => bio.end(EOPNOTSUPP.into()),
    }
}

const SECTOR: u32 = abi::SECTOR_BYTES as u32;

/// A write: cut so that its data fits one record.
#[inline]
fn submit_write(device: ArcBorrow<'_, Device>, bio: UpperBio) {
    let most = device.stream().record_bytes_max();
    let bytes = bio.bytes();
    if bytes <= most {
        return submit_change(device, bio, bytes);
    }
    if bio.op_flags().nowait() {
        // Part of it would be under way when the rest is refused.
        return refuse(&device, bio, None, EAGAIN);
    }
    if let Some(first) = bio.split(most / SECTOR) {
        submit_change(device, first, most);
    }
}

/// Steps 1 to 5 of the module documentation.
#[inline]
fn submit_change(device: ArcBorrow<'_, Device>, bio: UpperBio, payload_bytes: u32) {
    let stream = device.stream();
    let op_flags = bio.op_flags();
    let sectors = bio.bytes() / SECTOR;
    let request = Request {
        start: bio.start_sector(),
        sectors: u64::from(sectors),
        payload_bytes,
        nowait: op_flags.nowait(),
    };
    // One that is refused because it would wait comes again, and must not count twice.
    let started = (!request.nowait).then(|| bio.account());
    let segments = if payload_bytes == 0 {
        0
    } else {
        stream.payload().segments(payload_bytes)
    };
    let lower = stream
        .bios()
        .alloc(op_flags.for_lower(), segments, request.nowait);
    let mut lower = match lower {
        Ok(lower) => lower,
        Err(e) => return refuse(&device, bio, started, e),
    };
    let (slot, place) = match stream.admit(&device, &request) {
        Ok(Admitted::Captured(slot, place)) => (slot, place),
        Ok(Admitted::Tracked(slot)) => {
            drop(lower);
            return submit_tracked(device, bio, started, &request, slot);
        }
        Err(e) => return refuse(&device, bio, started, e),
    };
    let started = started.unwrap_or_else(|| bio.account());
    let kind = Kind::of(&device, op_flags, sectors);
    stream.write_desc(&abi::Desc {
        seq: place.seq,
        epoch: place.epoch,
        start_sector: request.start,
        payload_pos: place.pos,
        time_ns: time::real_ns(),
        sectors,
        payload_bytes,
        device: device.id(),
        flags: kind.flags,
        op: kind.op,
        state: abi::STATE_RESERVED,
        aux: 0,
    });
    let mut ready = Ok(());
    if payload_bytes != 0 {
        let offset = stream.payload_offset(place.pos);
        // The one copy: what the stream holds is what the backing device gets, whatever the
        // application does to its buffer meanwhile.
        ready = bio
            .copy_to(stream.payload(), offset)
            .and_then(|()| lower.add_pages(stream.payload(), offset, payload_bytes));
    } else {
        lower.set_op_flags(kind.op_flags);
        lower.set_bytes(bio.bytes());
    }
    lower.set_start_sector(device.start().wrapping_add(request.start));
    lower.inherit(device.backing(), &bio);
    count(&device, op_flags.operation(), sectors);
    device.change_begins();
    let in_flight = InFlight {
        device: Arc::from(device),
        upper: None,
        start: request.start,
        sectors: request.sectors,
        seq: place.seq,
        slot,
        flags: kind.flags,
        effect: kind.effect,
    };
    if let Some(parking) = stream.parking(slot) {
        parking.park(device.id(), bio, started);
        if device.is_failing() {
            // A forced detach may have looked here before the bio was.
            if let Some((bio, started)) = parking.take_if(device.id()) {
                bio.end_accounted(started, EIO.into());
            }
        }
    }
    match ready {
        Ok(()) => lower.submit(in_flight),
        // Not reached while ring and bio agree on sizes; if they do not, nothing is written.
        Err(e) => in_flight.ended(e.into()),
    }
}

/// Ends a change that is not let in; `EAGAIN`: it would have to wait, and must not.
#[cold]
fn refuse(device: &Device, bio: UpperBio, started: Option<Accounting>, error: Error) {
    if error == EAGAIN {
        device
            .counters()
            .nowait_retries
            .fetch_add(1, Ordering::Relaxed);
    }
    match started {
        Some(started) => bio.end_accounted(started, error.into()),
        None => bio.end(error.into()),
    }
}

/// A change for which there was no room: to the backing device as it is.
#[cold]
fn submit_tracked(
    device: ArcBorrow<'_, Device>,
    bio: UpperBio,
    started: Option<Accounting>,
    request: &Request,
    slot: SlotId,
) {
    let stream = device.stream();
    let op_flags = bio.op_flags();
    let clone = stream
        .clones()
        .clone_of(device.backing(), &bio, request.nowait);
    let mut lower = match clone {
        Ok(lower) => lower,
        Err(e) => {
            // Its range stays dirty: at worst it is sent again for nothing.
            stream.open_gate(slot);
            return refuse(&device, bio, started, e);
        }
    };
    let started = started.unwrap_or_else(|| bio.account());
    lower.set_op_flags(op_flags.for_lower());
    lower.set_start_sector(device.start().wrapping_add(request.start));
    let counters = device.counters();
    counters.tracked.fetch_add(1, Ordering::Relaxed);
    counters
        .tracked_sectors
        .fetch_add(request.sectors, Ordering::Relaxed);
    count_lower(&device, op_flags.operation(), request.sectors);
    device.change_begins();
    lower.submit(InFlight {
        device: Arc::from(device),
        upper: Some((bio, started)),
        start: request.start,
        sectors: request.sectors,
        seq: 0,
        slot,
        flags: 0,
        effect: Effect {
            closes_epoch: op_flags.fua() || op_flags.preflush(),
            ..Effect::default()
        },
    });
}

/// What a change is in the stream, and on its way down.
struct Kind {
    op: u8,
    flags: u16,
    op_flags: OpFlags,
    effect: Effect,
}

impl Kind {
    #[inline]
    fn of(device: &Device, op_flags: OpFlags, sectors: u32) -> Self {
        let mut flags = 0;
        if op_flags.fua() {
            flags |= abi::F_FUA;
        }
        if op_flags.preflush() {
            flags |= abi::F_PREFLUSH;
        }
        let mut effect = Effect {
            // A completed flush makes durable what was complete before it, a completed FUA write
            // itself: neither may be applied together with what comes after.
            closes_epoch: flags != 0,
            ..Effect::default()
        };
        let mut lower = op_flags.for_lower();
        let op = match op_flags.operation() {
            Operation::WriteZeroes => {
                if op_flags.nounmap() {
                    flags |= abi::F_NOUNMAP;
                }
                abi::OP_WRITE_ZEROES
            }
            Operation::Discard => {
                if device.discard_zeroes() {
                    flags |= abi::F_ZEROES;
                    lower = lower.as_write_zeroes();
                } else {
                    effect.unspecified = true;
                }
                abi::OP_DISCARD
            }
            Operation::SecureErase => {
                effect.unspecified = true;
                abi::OP_SECURE_ERASE
            }
            _ if sectors == 0 => abi::OP_FLUSH,
            _ => abi::OP_WRITE,
        };
        Self {
            op,
            flags,
            op_flags: lower,
            effect,
        }
    }
}

#[inline]
fn count(device: &Device, operation: Operation, sectors: u32) {
    let counters = device.counters();
    let sectors = u64::from(sectors);
    match operation {
        Operation::Write if sectors == 0 => {
            counters.flushes.fetch_add(1, Ordering::Relaxed);
        }
        Operation::Write => {
            counters.writes.fetch_add(1, Ordering::Relaxed);
            counters.write_sectors.fetch_add(sectors, Ordering::Relaxed);
        }
        _ => {
            counters.discards.fetch_add(1, Ordering::Relaxed);
            counters
                .discard_sectors
                .fetch_add(sectors, Ordering::Relaxed);
        }
    }
    count_lower(device, operation, sectors);
}

/// Counts what the backing device counts as written. A discard that is made as write-zeroes counts
/// there, any other does not.
#[inline]
fn count_lower(device: &Device, operation: Operation, sectors: u64) {
    let counts = match operation {
        Operation::Write | Operation::WriteZeroes => true,
        Operation::Discard => device.discard_zeroes(),
        _ => false,
    };
    if counts {
        device
            .counters()
            .lower_sectors
            .fetch_add(sectors, Ordering::Relaxed);
    }
}
