// SPDX-License-Identifier: GPL-2.0-only

//! SYNC: the content of a range, read at a position of the stream.
//!
//! Each chunk passes the gate like a change, so nothing changes the range between the reservation of
//! its record and the end of its read: the payload is the range's state at that place of the stream.
//! The dirty bits of the range are cleared at that end, still behind the gate.

use crate::{
    abi,
    change::InFlight,
    device::{is_multiple, Device},
    dirty::Next,
    ffi::{bio::OpFlags, bio_set::LowerState as _, time},
    stream::SyncAdmitted,
};
use core::sync::atomic::Ordering;
use kernel::{prelude::*, sync::Arc};

/// Words of the dirty map that are looked at with the lock held.
const WORDS_PER_LOOK: usize = 4096;

/// Starts the reads of [`abi::IOC_SYNC`]; gives the sectors taken.
///
/// Must not be called from atomic context.
pub(crate) fn start(device: &Arc<Device>, request: &abi::Sync) -> Result<u64> {
    let block = u64::from(device.block_bytes()) / abi::SECTOR_BYTES;
    let chunk = u64::from(request.chunk_bytes) / abi::SECTOR_BYTES;
    let aligned = is_multiple(request.start_sector, block) && is_multiple(request.sectors, block);
    if request.flags & !abi::SYNC_CLEAR != 0
        || request.reserved0 != 0
        || request.reserved != [0; 3]
        || request.sectors == 0
        || !request.chunk_bytes.is_power_of_two()
        || !(4096..=abi::RECORD_BYTES_MAX).contains(&request.chunk_bytes)
        || chunk < block
        || !aligned
    {
        return Err(EINVAL);
    }
    let end = request
        .start_sector
        .checked_add(request.sectors)
        .filter(|end| *end <= device.sectors())
        .ok_or(ERANGE)?;
    let mut at = request.start_sector;
    while at < end {
        let sectors = (chunk - at % chunk).min(end - at);
        // At most one record's worth of sectors.
        match read_chunk(device, request, at, sectors as u32) {
            Ok(true) => at += sectors,
            Ok(false) if at == request.start_sector => return Err(EAGAIN),
            Err(e) if at == request.start_sector => return Err(e),
            // Some of it is under way: say how much.
            Ok(false) | Err(_) => break,
        }
    }
    Ok(at - request.start_sector)
}

/// Starts the read of one record; false without room.
fn read_chunk(device: &Arc<Device>, request: &abi::Sync, start: u64, sectors: u32) -> Result<bool> {
    let stream = device.stream();
    let bytes = sectors * abi::SECTOR_BYTES as u32;
    let segments = stream.payload().segments(bytes);
    let mut lower = stream
        .syncs()
        .alloc(OpFlags::BACKGROUND_READ, segments, false)?;
    lower.bind(device.backing());
    let (slot, place) = match stream.admit_sync(device, start, sectors, bytes)? {
        SyncAdmitted::Ready(slot, place) => (slot, place),
        SyncAdmitted::NoRoom => return Ok(false),
    };
    let clean = request.flags & abi::SYNC_CLEAR != 0;
    stream.write_desc(&abi::Desc {
        seq: place.seq,
        epoch: place.epoch,
        start_sector: start,
        payload_pos: place.pos,
        time_ns: time::real_ns(),
        sectors,
        payload_bytes: bytes,
        device: device.id(),
        flags: if clean { abi::F_CLEARED } else { 0 },
        op: abi::OP_SYNC,
        state: abi::STATE_RESERVED,
        aux: request.cookie,
    });
    let offset = stream.payload_offset(place.pos);
    let ready = lower.add_pages(stream.payload(), offset, bytes);
    lower.set_start_sector(device.start() + start);
    let counters = device.counters();
    counters.syncs.fetch_add(1, Ordering::Relaxed);
    counters
        .sync_sectors
        .fetch_add(u64::from(sectors), Ordering::Relaxed);
    let in_flight = InFlight::sync(
        device.clone(),
        slot,
        place.seq,
        start,
        u64::from(sectors),
        clean,
    );
    match ready {
        Ok(()) => lower.submit(in_flight),
        Err(e) => in_flight.ended(e.into()),
    }
    Ok(true)
}

/// Finds the next dirty extent; see [`abi::IOC_DIRTY_NEXT`].
pub(crate) fn next_dirty(device: &Device, from: u64, max_sectors: u64) -> Result<(u64, u64)> {
    let mut from = from;
    loop {
        let next = device
            .stream()
            .with_map(device, |map| map.next(from, max_sectors, WORDS_PER_LOOK))
            .ok_or(ENXIO)?;
        match next {
            Next::Found { start, sectors } => return Ok((start, sectors)),
            Next::Nothing => return Err(ENOENT),
            // Advances by thousands of blocks each time, and the map has an end.
            Next::ContinueAt(sector) => from = sector,
        }
    }
}

/// Marks a range dirty; see [`abi::IOC_DIRTY_SET`].
pub(crate) fn set_dirty(device: &Device, start: u64, sectors: u64) -> Result {
    /// Sectors that are marked with the lock held: 1 GiB.
    const STEP: u64 = 1 << 21;

    let end = start
        .checked_add(sectors)
        .filter(|end| *end <= device.sectors())
        .ok_or(ERANGE)?;
    let mut at = start;
    while at < end {
        let step = STEP.min(end - at);
        device
            .stream()
            .with_map(device, |map| map.mark(at, step))
            .ok_or(ENXIO)?;
        at += step;
    }
    Ok(())
}
