// SPDX-License-Identifier: GPL-2.0-only

//! A device: `/dev/loop<N>` over a part of one backing block device, captured into one stream.
//!
//! # Life
//!
//! ```text
//!            attach                    detach: claim                 last opener gone,
//!   (none) ----------> live ------------------------> closing ------> last change ended ----> (none)
//!                        |  detach --force                ^
//!                        +---> failing (outstanding I/O ends with EIO) --+
//! ```
//!
//! The registry holds the device while it is live; the disk holds it until its last opener is
//! gone; each change in flight holds it until it ends. Whoever is last drops it; a change ends in
//! interrupt context, so that one hands it to the workqueue.

use crate::{
    abi, change,
    dirty::{self, DirtyMap},
    ffi::{
        bio::UpperBio,
        block_device::{BackingDevice, DevNumber, Held, Holder},
        gendisk::{Disk, DiskOperations, DiskOptions, LoopInfo},
        global::with_registry,
        module_ref::ModuleRef,
        work,
    },
    registry::DeviceEntry,
    stream::{check_name, filled, DirtyWords, Stream},
};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use kernel::{
    impl_has_work, new_work,
    prelude::*,
    sync::{Arc, ArcBorrow},
    workqueue::{Work, WorkItem},
};

/// What the backing device tells its holder.
pub(crate) struct BackingEvents {
    number: u32,
    dead: AtomicBool,
}

impl Holder for BackingEvents {
    fn backing_dead(&self) {
        if !self.dead.swap(true, Ordering::Relaxed) {
            pr_err!(
                "loop{}: the backing device is gone: all I/O fails; detach, and attach again when it is back\n",
                self.number
            );
        }
    }
}

/// What a device counts; see [`abi::DeviceStatus`].
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) writes: AtomicU64,
    pub(crate) write_sectors: AtomicU64,
    pub(crate) flushes: AtomicU64,
    pub(crate) discards: AtomicU64,
    pub(crate) discard_sectors: AtomicU64,
    pub(crate) syncs: AtomicU64,
    pub(crate) sync_sectors: AtomicU64,
    pub(crate) tracked: AtomicU64,
    pub(crate) tracked_sectors: AtomicU64,
    pub(crate) failed: AtomicU64,
    pub(crate) gate_waits: AtomicU64,
    pub(crate) nowait_retries: AtomicU64,
    /// Sectors that this module sent to the backing device in writes and write-zeroes.
    pub(crate) lower_sectors: AtomicU64,
}

/// One attached block device.
#[pin_data(PinnedDrop)]
pub(crate) struct Device {
    number: u32,
    id: u32,
    lane: u32,
    backing: Held<BackingEvents>,
    events: Arc<BackingEvents>,
    backing_dev: u64,
    backing_name: [u8; abi::NAME_BYTES],
    label: [u8; abi::NAME_BYTES],
    identity: [u8; 16],
    /// `FOUND_*`: what the intent file knew of it.
    intent_found: u32,
    /// First sector on the backing device.
    start: u64,
    limit_bytes: AtomicU64,
    sectors: AtomicU64,
    block_bytes: u32,
    read_only: bool,
    partscan: bool,
    discard_zeroes: bool,
    /// The backing device's count of written sectors at attach.
    written_before: u64,
    /// No new openers.
    closing: AtomicBool,
    /// Outstanding I/O fails.
    failing: AtomicBool,
    in_flight: AtomicU32,
    counters: Counters,
    #[pin]
    last_put: Work<Device>,
    stream: Arc<Stream>,
    // Last: while anything of the device exists, so does the module.
    _module: ModuleRef,
}

impl_has_work! {
    impl HasWork<Device> for Device { self.last_put }
}

impl WorkItem for Device {
    type Pointer = Arc<Device>;

    fn run(device: Arc<Device>) {
        // The last reference, or nearly so: it goes here, where sleeping is allowed.
        drop(device);
    }
}

impl Device {
    /// Loop number.
    pub(crate) fn number(&self) -> u32 {
        self.number
    }

    /// Id in the stream.
    #[inline]
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// Lane of the gate and of the dirty maps.
    #[inline]
    pub(crate) fn lane(&self) -> u32 {
        self.lane
    }

    /// The stream that captures it.
    #[inline]
    pub(crate) fn stream(&self) -> &Stream {
        &self.stream
    }

    /// The same, for who keeps it.
    pub(crate) fn stream_ref(&self) -> &Arc<Stream> {
        &self.stream
    }

    /// Name of its volume on the target.
    pub(crate) fn label(&self) -> &[u8; abi::NAME_BYTES] {
        &self.label
    }

    /// Which disk it is; see [`abi::Attach`].
    pub(crate) fn identity(&self) -> &[u8; 16] {
        &self.identity
    }

    /// The backing device.
    #[inline]
    pub(crate) fn backing(&self) -> &BackingDevice {
        &self.backing
    }

    /// First sector on the backing device.
    #[inline]
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    /// Size in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        self.sectors.load(Ordering::Relaxed)
    }

    /// Logical block size in bytes.
    pub(crate) fn block_bytes(&self) -> u32 {
        self.block_bytes
    }

    /// Counters.
    #[inline]
    pub(crate) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Whether outstanding I/O is to fail.
    #[inline]
    pub(crate) fn is_failing(&self) -> bool {
        self.failing.load(Ordering::Acquire)
    }

    /// Whether a discard is made as a write of zeroes that deallocates, so that its range reads as
    /// zeroes on the source.
    #[inline]
    pub(crate) fn discard_zeroes(&self) -> bool {
        self.discard_zeroes
    }

    /// A change goes to the backing device.
    #[inline]
    pub(crate) fn change_begins(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// It has ended. Gives the reference up, in interrupt context too.
    #[inline]
    pub(crate) fn change_ends(device: Arc<Self>) {
        device.in_flight.fetch_sub(1, Ordering::Relaxed);
        let Some(last) = Arc::into_unique_or_drop(device) else {
            return;
        };
        match work::queue() {
            // Refused only when it is queued already, which holds a reference: not the last then.
            Some(queue) => drop(queue.enqueue(Arc::from(last))),
            // The queue lives as long as the module, which the device keeps.
            None => drop(last),
        }
    }

    /// Everything about the device.
    pub(crate) fn status(&self, entry: &DeviceEntry) -> abi::DeviceStatus {
        let counters = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        // What the backing device counts, it counts when a request ends, and we count ours before
        // they begin: read in this order, an excess is somebody else's.
        let written = self.backing.written_sectors();
        core::sync::atomic::fence(Ordering::SeqCst);
        let ours = get(&counters.lower_sectors);
        let bypass = written
            .saturating_sub(self.written_before)
            .saturating_sub(ours);
        let mut flags = 0;
        let mut set = |condition: bool, flag: u32| {
            if condition {
                flags |= flag;
            }
        };
        set(self.read_only, abi::DEVICE_READ_ONLY);
        set(self.partscan, abi::DEVICE_PARTSCAN);
        set(self.events.dead.load(Ordering::Relaxed), abi::DEVICE_DEAD);
        set(bypass > 0, abi::DEVICE_BYPASSED);
        set(self.closing.load(Ordering::Relaxed), abi::DEVICE_DETACHING);
        set(self.discard_zeroes, abi::DEVICE_DISCARD_ZEROES);
        let (dirty_blocks, shift) = self
            .stream
            .with_map(self, |map| (map.count(), map.shift()))
            .unwrap_or((0, 0));
        let (reads, read_sectors) = entry.disk.reads();
        let (regions_marked, regions_suspect) = self.stream.regions(self);
        abi::DeviceStatus {
            number: self.number as i32,
            flags,
            stream_id: self.stream.id(),
            device_id: self.id,
            backing_dev: self.backing_dev,
            loop_dev: entry.disk.number(),
            backing_name: self.backing_name,
            label: self.label,
            offset_bytes: self.start * abi::SECTOR_BYTES,
            limit_bytes: get(&self.limit_bytes),
            sectors: self.sectors(),
            block_bytes: self.block_bytes,
            dirty_block_bytes: (abi::SECTOR_BYTES << shift) as u32,
            dirty_blocks,
            openers: entry.disk.openers(),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            reads,
            read_sectors,
            writes: get(&counters.writes),
            write_sectors: get(&counters.write_sectors),
            flushes: get(&counters.flushes),
            discards: get(&counters.discards),
            discard_sectors: get(&counters.discard_sectors),
            syncs: get(&counters.syncs),
            sync_sectors: get(&counters.sync_sectors),
            tracked: get(&counters.tracked),
            tracked_sectors: get(&counters.tracked_sectors),
            failed: get(&counters.failed),
            gate_waits: get(&counters.gate_waits),
            nowait_retries: get(&counters.nowait_retries),
            bypass_sectors: bypass,
            intent_found: self.intent_found,
            reserved0: 0,
            regions_marked,
            regions_suspect,
            reserved: [0; 5],
        }
    }

    fn note(&self, op: u8, start_sector: u64, aux: u64) {
        // Without room the next GAP record tells that the devices changed.
        let _noted = self.stream.note(&abi::Desc {
            op,
            device: self.id,
            start_sector,
            aux,
            ..abi::Desc::default()
        });
    }
}

#[pinned_drop]
impl PinnedDrop for Device {
    fn drop(self: Pin<&mut Self>) {
        self.stream.leave(self.lane);
    }
}

impl DiskOperations for Device {
    #[inline]
    fn submit(this: ArcBorrow<'_, Self>, bio: UpperBio) {
        change::submit(this, bio);
    }

    fn may_open(&self) -> bool {
        !self.closing.load(Ordering::Relaxed)
    }

    fn set_closing(&self, closing: bool) {
        self.closing.store(closing, Ordering::Relaxed);
    }

    fn loop_info(&self) -> LoopInfo {
        LoopInfo {
            number: self.number,
            offset_bytes: self.start * abi::SECTOR_BYTES,
            limit_bytes: self.limit_bytes.load(Ordering::Relaxed),
            backing_dev: self.backing_dev,
            backing_name: self.backing_name,
            read_only: self.read_only,
            partscan: self.partscan,
        }
    }

    fn clear_fd(&self) -> Result {
        // The caller has the disk open.
        detach_if(self.number, false, 1, |device| core::ptr::eq(device, self))
    }

    fn set_capacity(&self) -> Result {
        let limit_bytes = self.limit_bytes.load(Ordering::Relaxed);
        resize_if(self.number, limit_bytes, |device| {
            core::ptr::eq(device, self)
        })
        .map(|_| ())
    }
}

/// An empty dirty map for a device of `sectors`.
fn new_map(sectors: u64) -> Result<Arc<DirtyMap<DirtyWords>>> {
    let shift = dirty::shift_for(sectors);
    let words = filled(dirty::words_for(sectors, shift), || AtomicU64::new(0))?;
    let map = DirtyMap::new(words, sectors, shift).ok_or(EFBIG)?;
    Ok(Arc::new(map, GFP_KERNEL)?)
}

/// Size of a device in sectors: what lies between offset and end or limit, in whole blocks.
fn size(backing: &BackingDevice, start: u64, limit_bytes: u64) -> Result<u64> {
    // At least one sector, by what a block device is.
    let block = u64::from(backing.block_bytes()).max(abi::SECTOR_BYTES);
    if !is_multiple(limit_bytes, block) {
        return Err(EINVAL);
    }
    let end = backing.sectors();
    let rest = end
        .checked_sub(start)
        .filter(|rest| *rest > 0)
        .ok_or(ERANGE)?;
    let sectors = match limit_bytes / abi::SECTOR_BYTES {
        0 => rest,
        limit if limit > rest => return Err(ERANGE),
        limit => limit,
    };
    let tail = sectors.checked_rem(block / abi::SECTOR_BYTES).unwrap_or(0);
    match sectors.wrapping_sub(tail) {
        0 => Err(ERANGE),
        sectors => Ok(sectors),
    }
}

/// Whether `value` is a multiple of `unit`; nothing is one of 0.
pub(crate) fn is_multiple(value: u64, unit: u64) -> bool {
    value.checked_rem(unit) == Some(0)
}

/// Gives a loop number back when an attach fails half-way.
struct Number(u32);

impl Drop for Number {
    fn drop(&mut self) {
        with_registry(|registry| registry.release_number(self.0));
    }
}

/// Attaches a device; see [`abi::Attach`]. Gives loop number and device id.
pub(crate) fn attach(request: &abi::Attach) -> Result<(u32, u32)> {
    let known = abi::ATTACH_FD | abi::ATTACH_READ_ONLY | abi::ATTACH_PARTSCAN;
    if request.flags & !known != 0 || request.reserved0 != 0 || request.reserved != [0; 2] {
        return Err(EINVAL);
    }
    check_name(&request.label, 0)?;
    let dev = if request.flags & abi::ATTACH_FD != 0 {
        DevNumber::from_fd(request.backing_fd)?
    } else {
        DevNumber(request.backing_dev)
    };
    let (stream, number) = with_registry(|registry| {
        let stream = registry.stream(request.stream_id).ok_or(ENOENT)?.clone();
        Ok::<_, Error>((stream, registry.reserve_number(request.number)?))
    })?;
    let number = Number(number);
    let (device, disk) = build(request, dev, stream, number.0)?;
    let id = device.id;
    let entry = DeviceEntry { disk, device };
    with_registry(|registry| registry.add_device(entry)).map_err(|(e, entry)| {
        let DeviceEntry { disk, device } = entry;
        take_down(disk, &device);
        e
    })?;
    Ok((number.0, id))
}

/// Opens the backing device and makes device and disk.
fn build(
    request: &abi::Attach,
    dev: DevNumber,
    stream: Arc<Stream>,
    number: u32,
) -> Result<(Arc<Device>, Disk<Device>)> {
    let read_only = request.flags & abi::ATTACH_READ_ONLY != 0;
    let partscan = request.flags & abi::ATTACH_PARTSCAN != 0;
    let events = Arc::new(
        BackingEvents {
            number,
            dead: AtomicBool::new(false),
        },
        GFP_KERNEL,
    )?;
    let backing = BackingDevice::open(dev, !read_only, events.clone())?;
    if !read_only && backing.read_only() {
        return Err(EROFS);
    }
    if backing.is_zoned() {
        return Err(EOPNOTSUPP);
    }
    let block_bytes = backing.block_bytes();
    if !is_multiple(request.offset_bytes, block_bytes.into()) {
        return Err(EINVAL);
    }
    let start = request.offset_bytes / abi::SECTOR_BYTES;
    let sectors = size(&backing, start, request.limit_bytes)?;
    let map = new_map(sectors)?;
    let mut backing_name = [0; abi::NAME_BYTES];
    backing.name(&mut backing_name);
    let module = ModuleRef::try_get()?;
    let (lane, id) = stream.join(map)?;
    // From here on the device's drop gives the lane back.
    let lane_guard = kernel::types::ScopeGuard::new_with_data(stream.clone(), |stream| {
        stream.leave(lane);
    });
    let intent_found = stream.join_intents(lane, &request.label, &request.identity, sectors)?;
    let device = Arc::pin_init(
        try_pin_init!(Device {
            number,
            id,
            lane,
            backing_dev: backing.number().0,
            written_before: backing.written_sectors(),
            discard_zeroes: backing.unmaps_by_write_zeroes(),
            backing,
            events,
            backing_name,
            label: request.label,
            identity: request.identity,
            intent_found,
            start,
            limit_bytes: AtomicU64::new(request.limit_bytes),
            sectors: AtomicU64::new(sectors),
            block_bytes,
            read_only,
            partscan,
            closing: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            in_flight: AtomicU32::new(0),
            counters: Counters::default(),
            last_put <- new_work!("dtloop_last_put"),
            stream,
            _module: module,
        }),
        GFP_KERNEL,
    )?;
    lane_guard.dismiss();
    // Before the first change can be.
    device.note(abi::OP_ATTACH, 0, sectors);
    let disk = Disk::add(
        device.clone(),
        &DiskOptions {
            number,
            sectors,
            backing_start: start,
            backing: &device.backing,
            write_sectors_max: device.stream.record_bytes_max() / abi::SECTOR_BYTES as u32,
            read_only,
            partscan,
        },
    )
    .inspect_err(|_| device.note(abi::OP_DETACH, 0, 0))?;
    Ok((device, disk))
}

/// Detaches a device; see [`abi::Detach`].
pub(crate) fn detach(number: u32, force: bool) -> Result {
    detach_if(number, force, 0, |_| true)
}

/// Detaches the device `number` if it is the one that is `wanted`: an open file may belong to a
/// disk that is gone, whose number another has by now. `openers` may be left, for a caller that is
/// one.
fn detach_if(
    number: u32,
    force: bool,
    openers: u32,
    wanted: impl FnOnce(&Device) -> bool,
) -> Result {
    let entry = with_registry(|registry| {
        registry.remove_device(number, |entry| {
            if !wanted(&entry.device) {
                return Err(ENXIO);
            }
            if force {
                // Waiters see it before the disk waits for them.
                entry.device.failing.store(true, Ordering::Release);
                entry.device.set_closing(true);
                Ok(())
            } else {
                entry.disk.claim(openers)
            }
        })
    })?;
    let number = Number(number);
    let DeviceEntry { disk, device } = entry;
    if force {
        device.stream.fail_outstanding(&device);
        disk.mark_dead();
    }
    take_down(disk, &device);
    drop(number);
    Ok(())
}

/// Deletes a claimed disk; closes the backing device if nobody has the disk open any more.
fn take_down(disk: Disk<Device>, device: &Device) {
    if let Some(proof) = disk.delete(&device.backing) {
        device.backing.close(proof);
    }
    let dirty = device.stream.with_map(device, DirtyMap::count).unwrap_or(0);
    device.note(abi::OP_DETACH, 0, dirty);
}

/// Follows the size of the backing device; see [`abi::Resize`]. Gives the new size in sectors.
pub(crate) fn resize(number: u32, limit_bytes: u64) -> Result<u64> {
    resize_if(number, limit_bytes, |_| true)
}

fn resize_if(number: u32, limit_bytes: u64, wanted: impl FnOnce(&Device) -> bool) -> Result<u64> {
    // The registry stays locked: two resizes at a time would mix their steps.
    with_registry(|registry| {
        let entry = registry.device(number).ok_or(ENXIO)?;
        let device = &entry.device;
        if !wanted(device) {
            return Err(ENXIO);
        }
        let sectors = size(&device.backing, device.start, limit_bytes)?;
        let before = device.sectors();
        if sectors == before {
            device.limit_bytes.store(limit_bytes, Ordering::Relaxed);
            return Ok(sectors);
        }
        if sectors < before && entry.disk.openers() > 0 {
            return Err(EBUSY);
        }
        let map = new_map(sectors)?;
        let gate = device.stream.close_gate(device)?;
        if let Err(e) = device.stream.resize_intents(device.lane, sectors) {
            device.stream.open_gate(gate);
            return Err(e);
        }
        device.stream.replace_map(device, map);
        device.sectors.store(sectors, Ordering::Relaxed);
        device.limit_bytes.store(limit_bytes, Ordering::Relaxed);
        // Before a change can use the new sectors.
        device.note(abi::OP_RESIZE, before, sectors);
        entry.disk.set_sectors(sectors);
        device.stream.open_gate(gate);
        Ok(sectors)
    })
}
