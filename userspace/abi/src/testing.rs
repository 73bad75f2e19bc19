// SPDX-License-Identifier: GPL-2.0-only

//! A model of a capture stream in plain memory: the real [`Ring`] over a memory file, with a
//! producer that keeps the module's promises, one change at a time.
//!
//! It follows policy `track`: a change that finds no room goes to the dirty map, and a GAP record
//! is written as soon as there is room. [`FakeStream::reserve`] and [`FakeStream::complete`] make
//! records that complete late or fail.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use memmap2::MmapOptions;
use nix::errno::Errno;
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::ffi::Shared;
use crate::{
    BackingBlocks, CaptureStream, Error, Extent, Name, Operation, Result, Ring, SyncRequest, raw,
};

const RING_AT: usize = raw::PAGE_BYTES;
const NEXT_SEQ: usize = RING_AT + std::mem::offset_of!(raw::ProducerPage, next_seq);
const COMMITTED: usize = RING_AT + std::mem::offset_of!(raw::ProducerPage, committed);
const SPACE_WANTED: usize = RING_AT + std::mem::offset_of!(raw::ProducerPage, space_wanted);
const RELEASED: usize = std::mem::offset_of!(raw::ConsumerPage, released);
const WAKE_SEQ: usize = std::mem::offset_of!(raw::ConsumerPage, wake_seq);

/// Sectors of a dirty block of the model's devices: 4 KiB.
pub const DIRTY_BLOCK_SECTORS: u64 = 8;

/// Sectors of a region of the model's intent map: 64 KiB.
pub const REGION_SECTORS: u64 = 128;

/// A stream of the model. Clones share it: keep one to make changes, give one to the agent.
#[derive(Clone)]
pub struct FakeStream {
    inner: Arc<Inner>,
    ring: Ring,
}

struct Inner {
    memory: Shared,
    status: raw::StreamStatus,
    model: Mutex<Model>,
    completed: Condvar,
    wake: EventFd,
}

#[derive(Default)]
struct Model {
    next_seq: u64,
    committed: u64,
    epoch: u64,
    head: u64,
    /// Records not released, oldest first.
    records: VecDeque<Entry>,
    devices: BTreeMap<u32, Device>,
    gap_changes: u64,
    gap_sectors: u64,
    /// Changes since the last GAP record that went to a dirty map.
    gap: Option<(u64, u64)>,
    gaps: u64,
    kicks: u64,
    intent: raw::IntentStatus,
    /// Records below this one were complete when a disk was flushed.
    flushed: u64,
    fails_flushes: bool,
    /// The last word on what may lose its marks.
    cleared: u64,
}

struct Entry {
    desc: raw::Desc,
    /// Position behind the payload.
    end: u64,
    complete: bool,
}

struct Device {
    number: i32,
    label: Name,
    content: Vec<u8>,
    dirty: BTreeSet<u64>,
    bypass_sectors: u64,
    /// Regions, marked and suspect.
    marked: BTreeSet<u64>,
    suspect: BTreeSet<u64>,
    found: u32,
}

/// A record to be made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change<'a> {
    /// `raw::OP_*`.
    pub op: u8,
    /// The device's id.
    pub device: u32,
    /// `raw::F_*`.
    pub flags: u16,
    /// First sector.
    pub start_sector: u64,
    /// Length in sectors.
    pub sectors: u32,
    /// The payload.
    pub payload: &'a [u8],
    /// By operation.
    pub aux: u64,
}

impl FakeStream {
    /// Makes a stream with a ring of the given size.
    ///
    /// # Panics
    ///
    /// If the sizes are not powers of two or the memory cannot be had.
    #[must_use]
    pub fn new(name: &str, payload_bytes: u64, desc_count: u32) -> Self {
        let descs = u64::from(desc_count) * raw::DESC_BYTES as u64;
        let page = raw::PAGE_BYTES as u64;
        let payload_offset = page + descs.next_multiple_of(page);
        let mut status = raw::StreamStatus::query(1);
        status.name = Name::new(name).expect("a legal name").to_bytes();
        status.stream_uuid = *b"fake stream uuid";
        status.desc_count = desc_count;
        status.payload_bytes = payload_bytes;
        status.desc_offset = page;
        status.payload_offset = payload_offset;
        status.ring_bytes = payload_offset + payload_bytes;
        status.released = raw::SEQ_FIRST;
        status.sync_bytes_max = payload_bytes / 4;

        let file = File::from(memfd_create(c"dtloop-ring", MFdFlags::MFD_CLOEXEC).expect("memory"));
        file.set_len(page + status.ring_bytes).expect("memory");
        let memory = Shared::new(MmapOptions::new().map_raw(&file).expect("memory"));
        memory.store(RING_AT, raw::RING_MAGIC);
        memory.store(NEXT_SEQ, raw::SEQ_FIRST);
        memory.store(COMMITTED, raw::SEQ_FIRST);
        memory.store(RELEASED, raw::SEQ_FIRST);
        let ring = Ring::map(&file, &status).expect("a sound geometry");
        let model = Model {
            next_seq: raw::SEQ_FIRST,
            committed: raw::SEQ_FIRST,
            ..Model::default()
        };
        let inner = Inner {
            memory,
            status,
            model: Mutex::new(model),
            completed: Condvar::new(),
            wake: EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .expect("an event file"),
        };
        Self {
            inner: Arc::new(inner),
            ring,
        }
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.inner
            .model
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a word anywhere in the ring, as only a kernel module that is broken would. `word` is taken modulo the length.
    pub fn scribble(&self, word: usize, value: u64) {
        let words = self.inner.memory.len() / 8 - RING_AT / 8;
        self.inner.memory.store(RING_AT + word % words * 8, value);
    }

    /// A device of this many zero sectors joins the stream; returns its id.
    pub fn attach(&self, number: u32, sectors: u64, label: &str) -> u32 {
        let mut model = self.model();
        let id = model.devices.keys().next_back().map_or(1, |id| id + 1);
        let bytes = usize::try_from(sectors * raw::SECTOR_BYTES).expect("a small device");
        let device = Device {
            number: i32::try_from(number).expect("a legal number"),
            label: Name::new_or_empty(label).expect("a legal label"),
            content: vec![0; bytes],
            dirty: BTreeSet::new(),
            bypass_sectors: 0,
            marked: BTreeSet::new(),
            suspect: BTreeSet::new(),
            found: raw::FOUND_NONE,
        };
        model.devices.insert(id, device);
        let change = Change {
            op: raw::OP_ATTACH,
            device: id,
            aux: sectors,
            ..Change::default()
        };
        drop(model);
        self.change(&change);
        id
    }

    /// The same stream under another UUID, as after a restart of the module. To be called before
    /// anything else.
    ///
    /// # Panics
    ///
    /// If the stream has been cloned.
    #[must_use]
    pub fn with_uuid(mut self, uuid: [u8; 16]) -> Self {
        let inner = Arc::get_mut(&mut self.inner).expect("a stream of one owner");
        inner.status.stream_uuid = uuid;
        self
    }

    /// Has the disks behind all devices fail flushes, or no longer.
    pub fn fail_flushes(&self, fails: bool) {
        self.model().fails_flushes = fails;
    }

    /// Below which record marks may go, by the last word of the consumer.
    #[must_use]
    pub fn cleared(&self) -> u64 {
        self.model().cleared
    }

    /// Gives the stream an intent map as it may have been found. Marks are set by [`FakeStream::mark_regions`] only.
    pub fn set_intent(&self, status: &raw::IntentStatus) {
        self.model().intent = *status;
    }

    /// The intent file knew the device, and its regions that these ranges touch were marked.
    ///
    /// # Panics
    ///
    /// If there is no such device.
    pub fn mark_regions(&self, device: u32, extents: &[Extent]) {
        let mut model = self.model();
        let device = model.devices.get_mut(&device).expect("a device");
        device.found = raw::FOUND_KNOWN;
        for extent in extents {
            let end = extent.start_sector + extent.sectors;
            let regions = extent.start_sector / REGION_SECTORS..end.div_ceil(REGION_SECTORS);
            device.marked.extend(regions.clone());
            device.suspect.extend(regions);
        }
    }

    /// Regions of a device that have to be compared.
    #[must_use]
    pub fn suspects(&self, device: u32) -> usize {
        self.model().devices[&device].suspect.len()
    }

    /// Gives a device its content without a record, as it was before it joined.
    ///
    /// # Panics
    ///
    /// If there is no such device or the length is another.
    pub fn set_content(&self, device: u32, content: &[u8]) {
        let mut model = self.model();
        let device = model.devices.get_mut(&device).expect("a device");
        device.content.copy_from_slice(content);
    }

    /// Somebody writes to the backing device, past the module, which only counts the sectors.
    ///
    /// # Panics
    ///
    /// If there is no such device or it is smaller.
    pub fn bypass(&self, device: u32, start_sector: u64, payload: &[u8]) {
        let mut model = self.model();
        let device = model.devices.get_mut(&device).expect("a device");
        let start = usize::try_from(start_sector * raw::SECTOR_BYTES).expect("a small device");
        device.content[start..start + payload.len()].copy_from_slice(payload);
        device.bypass_sectors += payload.len() as u64 / raw::SECTOR_BYTES;
    }

    /// What the device holds.
    #[must_use]
    pub fn content(&self, device: u32) -> Vec<u8> {
        self.model().devices[&device].content.clone()
    }

    /// Writes; returns the record's number, or `None` when it went to the dirty map.
    pub fn write(&self, device: u32, start_sector: u64, payload: &[u8]) -> Option<u64> {
        let bytes = u32::try_from(payload.len()).expect("a small write");
        self.change(&Change {
            op: raw::OP_WRITE,
            device,
            start_sector,
            sectors: bytes / 512,
            payload,
            ..Change::default()
        })
    }

    /// Writes zeroes.
    pub fn write_zeroes(&self, device: u32, start_sector: u64, sectors: u32) -> Option<u64> {
        self.change(&Change {
            op: raw::OP_WRITE_ZEROES,
            device,
            start_sector,
            sectors,
            ..Change::default()
        })
    }

    /// Flushes.
    pub fn flush(&self, device: u32) -> Option<u64> {
        self.change(&Change {
            op: raw::OP_FLUSH,
            device,
            ..Change::default()
        })
    }

    /// Makes a record and completes it.
    pub fn change(&self, change: &Change<'_>) -> Option<u64> {
        let seq = self.reserve(change)?;
        self.complete(seq, None);
        Some(seq)
    }

    /// Changes the device and makes a record that is not complete yet. Without room the change
    /// goes to the dirty map: `None`.
    pub fn reserve(&self, change: &Change<'_>) -> Option<u64> {
        let mut model = self.model();
        apply(&mut model, change);
        self.reclaim(&mut model);
        self.write_gap(&mut model);
        if model.gap.is_none() {
            if let Some(seq) = self.push(&mut model, change) {
                return Some(seq);
            }
        }
        let sectors = u64::from(change.sectors);
        let (changes, total) = model.gap.unwrap_or_default();
        model.gap = Some((changes + 1, total + sectors));
        model.gap_changes += 1;
        model.gap_sectors += sectors;
        mark(&mut model, change.device, change.start_sector, sectors);
        self.inner.memory.store(SPACE_WANTED, 1);
        None
    }

    /// Completes a reserved record, with a failure if an errno is given.
    pub fn complete(&self, seq: u64, errno: Option<u8>) {
        let mut model = self.model();
        let position = model.records.iter().position(|e| e.desc.seq == seq);
        let Some(entry) = position.and_then(|at| model.records.get_mut(at)) else {
            return;
        };
        entry.complete = true;
        entry.desc.state = raw::STATE_COMMITTED;
        if let Some(errno) = errno {
            entry.desc.state = raw::STATE_FAILED;
            entry.desc.flags |= u16::from(errno) << raw::F_ERRNO_SHIFT;
        }
        let desc = entry.desc;
        self.store_desc(&desc);
        if errno.is_some() && desc.op != raw::OP_SYNC {
            mark(
                &mut model,
                desc.device,
                desc.start_sector,
                u64::from(desc.sectors),
            );
        }
        if desc.op == raw::OP_FLUSH {
            model.epoch += 1;
        }
        self.advance(&mut model);
    }

    /// How often the consumer kicked.
    #[must_use]
    pub fn kicks(&self) -> u64 {
        self.model().kicks
    }

    fn advance(&self, model: &mut Model) {
        let incomplete = model.records.iter().find(|entry| !entry.complete);
        model.committed = incomplete.map_or(model.next_seq, |entry| entry.desc.seq);
        self.inner.memory.store(COMMITTED, model.committed);
        self.inner.completed.notify_all();
        if self.is_awaited(model) {
            // It fails only when it is readable already.
            let _ = self.inner.wake.write(1);
        }
    }

    fn is_awaited(&self, model: &Model) -> bool {
        let wake = self.inner.memory.load(WAKE_SEQ);
        wake != 0 && model.committed > wake
    }

    /// Forgets what the consumer has released.
    fn reclaim(&self, model: &mut Model) {
        let released = self.inner.memory.load(RELEASED);
        assert!(
            released <= model.committed,
            "released {released} beyond {}",
            model.committed
        );
        while model.records.front().is_some_and(|e| e.desc.seq < released) {
            model.records.pop_front();
        }
    }

    fn write_gap(&self, model: &mut Model) {
        let Some((changes, sectors)) = model.gap else {
            return;
        };
        // Not before a quarter of the ring is free, or every other record would be a GAP.
        if used_bytes(model) > self.inner.status.payload_bytes / 4 * 3 {
            return;
        }
        let change = Change {
            op: raw::OP_GAP,
            device: raw::DEVICE_NONE,
            start_sector: sectors,
            aux: changes,
            ..Change::default()
        };
        if let Some(seq) = self.push(model, &change) {
            if let Some(entry) = model.records.back_mut() {
                entry.complete = true;
                entry.desc.state = raw::STATE_COMMITTED;
                let desc = entry.desc;
                self.store_desc(&desc);
            }
            debug_assert_eq!(model.next_seq, seq + 1);
            model.gap = None;
            model.gaps += 1;
            self.inner.memory.store(SPACE_WANTED, 0);
            self.advance(model);
        }
    }

    /// Puts a record into the ring if there is room.
    fn push(&self, model: &mut Model, change: &Change<'_>) -> Option<u64> {
        let status = &self.inner.status;
        let bytes = change.payload.len() as u64;
        let mut start = model.head;
        if start % status.payload_bytes + bytes > status.payload_bytes {
            start = start.next_multiple_of(status.payload_bytes);
        }
        let oldest = model.records.front().map_or(start, |entry| {
            entry.end - u64::from(entry.desc.payload_bytes)
        });
        let full = start + bytes - oldest > status.payload_bytes
            || model.records.len() as u64 >= u64::from(status.desc_count);
        if full {
            return None;
        }
        let seq = model.next_seq;
        let desc = raw::Desc {
            seq,
            epoch: model.epoch,
            start_sector: change.start_sector,
            payload_pos: if bytes == 0 { 0 } else { start },
            time_ns: now_ns(),
            sectors: change.sectors,
            payload_bytes: u32::try_from(bytes).expect("a small payload"),
            device: change.device,
            flags: change.flags,
            op: change.op,
            state: raw::STATE_RESERVED,
            aux: change.aux,
        };
        let offset = RING_AT as u64 + status.payload_offset + start % status.payload_bytes;
        let offset = usize::try_from(offset).expect("within the mapping");
        // SAFETY: The mapping is writable; the range belongs to no record that is not released, so
        // by the invariants of `Ring` no slice of it exists, and the model is locked.
        unsafe { self.inner.memory.fill(offset, change.payload) };
        self.store_desc(&desc);
        model.head = start + bytes;
        model.records.push_back(Entry {
            desc,
            end: start + bytes,
            complete: false,
        });
        model.next_seq += 1;
        self.inner.memory.store(NEXT_SEQ, model.next_seq);
        Some(seq)
    }

    /// Stores a descriptor that the consumer does not read yet.
    fn store_desc(&self, desc: &raw::Desc) {
        let status = &self.inner.status;
        let index = desc.seq & (u64::from(status.desc_count) - 1);
        let offset = RING_AT as u64 + status.desc_offset + index * raw::DESC_BYTES as u64;
        let offset = usize::try_from(offset).expect("within the mapping");
        // SAFETY: The mapping is writable; the record is not complete, so by the invariants of
        // `Ring` nobody reads its descriptor, and the model is locked.
        unsafe { self.inner.memory.fill(offset, &desc_bytes(desc)) };
    }

    fn sync_bytes(&self, model: &mut Model) -> u64 {
        self.reclaim(model);
        let sync = model.records.iter().filter(|e| e.desc.op == raw::OP_SYNC);
        sync.map(|e| u64::from(e.desc.payload_bytes)).sum()
    }
}

/// Payload bytes of the records that are not released.
fn used_bytes(model: &Model) -> u64 {
    match (model.records.front(), model.records.back()) {
        (Some(first), Some(last)) => last.end + u64::from(first.desc.payload_bytes) - first.end,
        _ => 0,
    }
}

/// A descriptor as it lies in memory.
#[must_use]
pub fn desc_bytes(desc: &raw::Desc) -> [u8; raw::DESC_BYTES] {
    let mut bytes = [0; raw::DESC_BYTES];
    let words = [
        desc.seq,
        desc.epoch,
        desc.start_sector,
        desc.payload_pos,
        desc.time_ns,
        u64::from(desc.sectors) | (u64::from(desc.payload_bytes) << 32),
        u64::from(desc.device)
            | (u64::from(desc.flags) << 32)
            | (u64::from(desc.op) << 48)
            | (u64::from(desc.state) << 56),
        desc.aux,
    ];
    for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

fn now_ns() -> u64 {
    u64::try_from(dtloop_runtime::unix_time().as_nanos()).unwrap_or(u64::MAX)
}

fn apply(model: &mut Model, change: &Change<'_>) {
    let Some(device) = model.devices.get_mut(&change.device) else {
        return;
    };
    let byte = |sector: u64| usize::try_from(sector * raw::SECTOR_BYTES).expect("a small device");
    let start = byte(change.start_sector);
    let end = start + byte(u64::from(change.sectors));
    match change.op {
        raw::OP_WRITE => device.content[start..end].copy_from_slice(change.payload),
        raw::OP_WRITE_ZEROES => device.content[start..end].fill(0),
        raw::OP_DISCARD if change.flags & raw::F_ZEROES != 0 => device.content[start..end].fill(0),
        _ => {}
    }
}

fn mark(model: &mut Model, device: u32, start_sector: u64, sectors: u64) {
    if let Some(device) = model.devices.get_mut(&device) {
        let first = start_sector / DIRTY_BLOCK_SECTORS;
        let end = (start_sector + sectors).div_ceil(DIRTY_BLOCK_SECTORS);
        device.dirty.extend(first..end);
    }
}

fn refused(operation: Operation, errno: Errno) -> Error {
    Error::Refused { operation, errno }
}

/// The model's disk.
struct FakeDisk(FakeStream, u32);

impl BackingBlocks for FakeDisk {
    fn read(&self, offset: u64, block: &mut [u8]) -> io::Result<()> {
        let model = self.0.model();
        let device = model.devices.get(&self.1);
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let found = device.and_then(|device| device.content.get(from..from + block.len()));
        block.copy_from_slice(found.ok_or(io::ErrorKind::NotFound)?);
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        let mut model = self.0.model();
        if model.fails_flushes {
            return Err(io::Error::other("the model fails flushes"));
        }
        model.flushed = model.committed;
        Ok(())
    }
}

impl CaptureStream for FakeStream {
    fn backing(&self, device: &raw::DeviceStatus) -> Option<Box<dyn BackingBlocks>> {
        Some(Box::new(FakeDisk(self.clone(), device.device_id)))
    }

    fn status(&self) -> Result<raw::StreamStatus> {
        let mut model = self.model();
        let sync_bytes = self.sync_bytes(&mut model);
        Ok(raw::StreamStatus {
            used_bytes: used_bytes(&model),
            next_seq: model.next_seq,
            committed: model.committed,
            released: self.inner.memory.load(RELEASED),
            epoch: model.epoch,
            sync_bytes,
            gaps: model.gaps,
            gap_changes: model.gap_changes,
            gap_sectors: model.gap_sectors,
            devices: u32::try_from(model.devices.len()).unwrap_or(u32::MAX),
            flags: if model.gap.is_some() {
                raw::STREAM_CONSUMER | raw::STREAM_GAP
            } else {
                raw::STREAM_CONSUMER
            },
            ..self.inner.status
        })
    }

    fn devices(&self) -> Result<Vec<raw::DeviceStatus>> {
        let status = |(&id, device): (&u32, &Device)| raw::DeviceStatus {
            stream_id: 1,
            device_id: id,
            label: device.label.to_bytes(),
            sectors: device.content.len() as u64 / raw::SECTOR_BYTES,
            block_bytes: 512,
            dirty_block_bytes: 4096,
            dirty_blocks: device.dirty.len() as u64,
            bypass_sectors: device.bypass_sectors,
            intent_found: device.found,
            regions_marked: device.marked.len() as u64,
            regions_suspect: device.suspect.len() as u64,
            ..raw::DeviceStatus::query(device.number)
        };
        Ok(self.model().devices.iter().map(status).collect())
    }

    fn sync(&self, request: &SyncRequest) -> Result<u64> {
        let mut model = self.model();
        let Some(device) = model.devices.get(&request.device_id) else {
            return Err(refused(Operation::Sync, Errno::ENXIO));
        };
        let size = device.content.len() as u64 / raw::SECTOR_BYTES;
        let end = request.start_sector + request.sectors;
        if end > size {
            return Err(refused(Operation::Sync, Errno::ERANGE));
        }
        let chunk = u64::from(request.chunk_bytes) / raw::SECTOR_BYTES;
        let mut at = request.start_sector;
        while at < end {
            let next = ((at / chunk + 1) * chunk).min(end);
            let byte = |sector: u64| usize::try_from(sector * raw::SECTOR_BYTES).unwrap_or(0);
            let payload = model.devices[&request.device_id].content[byte(at)..byte(next)].to_vec();
            let room = self.inner.status.sync_bytes_max;
            let over = self.sync_bytes(&mut model) + payload.len() as u64 > room;
            let change = Change {
                op: raw::OP_SYNC,
                device: request.device_id,
                flags: if request.clear { raw::F_CLEARED } else { 0 },
                start_sector: at,
                sectors: u32::try_from(next - at).unwrap_or(0),
                payload: &payload,
                aux: request.cookie,
            };
            if over || model.gap.is_some() || self.push(&mut model, &change).is_none() {
                break;
            }
            if let Some(entry) = model.records.back_mut() {
                entry.complete = true;
                entry.desc.state = raw::STATE_COMMITTED;
                let desc = entry.desc;
                self.store_desc(&desc);
            }
            if request.clear {
                let first = at.div_ceil(DIRTY_BLOCK_SECTORS);
                let last = if next == size {
                    next.div_ceil(DIRTY_BLOCK_SECTORS)
                } else {
                    next / DIRTY_BLOCK_SECTORS
                };
                if let Some(device) = model.devices.get_mut(&request.device_id) {
                    device.dirty.retain(|block| !(first..last).contains(block));
                }
            }
            self.advance(&mut model);
            at = next;
        }
        Ok(at - request.start_sector)
    }

    fn dirty_next(
        &self,
        device_id: u32,
        start_sector: u64,
        sectors_max: u64,
    ) -> Result<Option<Extent>> {
        let model = self.model();
        let Some(device) = model.devices.get(&device_id) else {
            return Err(refused(Operation::DirtyNext, Errno::ENXIO));
        };
        let mut dirty = device.dirty.range(start_sector / DIRTY_BLOCK_SECTORS..);
        let Some(&first) = dirty.next() else {
            return Ok(None);
        };
        let most = (sectors_max / DIRTY_BLOCK_SECTORS).max(1);
        let run = 1 + dirty
            .zip(first + 1..first + most)
            .take_while(|(a, b)| **a == *b)
            .count();
        let size = device.content.len() as u64 / raw::SECTOR_BYTES;
        let start_sector = first * DIRTY_BLOCK_SECTORS;
        let sectors = (run as u64 * DIRTY_BLOCK_SECTORS).min(size - start_sector);
        Ok(Some(Extent {
            start_sector,
            sectors,
        }))
    }

    fn dirty_set(&self, device_id: u32, extent: Extent) -> Result<()> {
        let mut model = self.model();
        let Some(device) = model.devices.get(&device_id) else {
            return Err(refused(Operation::DirtySet, Errno::ENXIO));
        };
        if extent.start_sector + extent.sectors > device.content.len() as u64 / raw::SECTOR_BYTES {
            return Err(refused(Operation::DirtySet, Errno::ERANGE));
        }
        mark(&mut model, device_id, extent.start_sector, extent.sectors);
        Ok(())
    }

    fn intent_status(&self) -> Result<raw::IntentStatus> {
        Ok(self.model().intent)
    }

    fn intent_clear(&self, acked: u64) -> Result<Option<raw::IntentClear>> {
        let mut model = self.model();
        if acked > model.committed {
            return Err(refused(Operation::IntentClear, Errno::EINVAL));
        }
        assert!(acked <= model.flushed, "marks go of what a cache may lose");
        model.cleared = acked;
        let on = model.intent.has(raw::INTENT_ON);
        Ok(on.then(|| raw::IntentClear {
            acked,
            version: model.intent.version,
            ..Default::default()
        }))
    }

    fn suspect_next(&self, device_id: u32, start_sector: u64) -> Result<Option<Extent>> {
        let model = self.model();
        let Some(device) = model.devices.get(&device_id) else {
            return Err(refused(Operation::SuspectNext, Errno::ENXIO));
        };
        let size = device.content.len() as u64 / raw::SECTOR_BYTES;
        let mut suspect = device.suspect.range(start_sector / REGION_SECTORS..);
        let first = suspect.next().map(|region| region * REGION_SECTORS);
        Ok(first.map(|start_sector| Extent {
            start_sector,
            sectors: REGION_SECTORS.min(size - start_sector),
        }))
    }

    fn suspect_clear(&self, device_id: u32, extent: Extent) -> Result<()> {
        let mut model = self.model();
        let Some(device) = model.devices.get_mut(&device_id) else {
            return Err(refused(Operation::SuspectClear, Errno::ENXIO));
        };
        let size = device.content.len() as u64 / raw::SECTOR_BYTES;
        let end = extent.start_sector + extent.sectors;
        let inside = |region: &u64| {
            let start = region * REGION_SECTORS;
            start >= extent.start_sector && (start + REGION_SECTORS).min(size) <= end
        };
        device.suspect.retain(|region| !inside(region));
        Ok(())
    }

    fn suspect_set(&self, device_id: u32, extent: Extent) -> Result<bool> {
        let mut model = self.model();
        let on = model.intent.has(raw::INTENT_ON);
        let Some(device) = model.devices.get_mut(&device_id) else {
            return Err(refused(Operation::SuspectSet, Errno::ENXIO));
        };
        let end = extent.start_sector + extent.sectors;
        let touched = |region: &&u64| {
            **region * REGION_SECTORS < end && (**region + 1) * REGION_SECTORS > extent.start_sector
        };
        let regions: Vec<u64> = device.marked.iter().filter(touched).copied().collect();
        device.suspect.extend(regions);
        Ok(on)
    }

    fn kick(&self) -> Result<()> {
        let mut model = self.model();
        model.kicks += 1;
        self.reclaim(&mut model);
        self.write_gap(&mut model);
        Ok(())
    }

    fn poll(&self, timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.map(|timeout| Instant::now() + timeout);
        let mut model = self.model();
        loop {
            if self.is_awaited(&model) {
                return Ok(true);
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(false);
            }
            let left = left.unwrap_or(Duration::from_secs(3600));
            let waited = self.inner.completed.wait_timeout(model, left);
            model = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        let model = self.model();
        // It fails only when nothing was signalled.
        let _ = self.inner.wake.read();
        if self.is_awaited(&model) {
            let _ = self.inner.wake.write(1);
        }
        self.inner.wake.as_fd()
    }

    fn ring(&self) -> &Ring {
        &self.ring
    }
}
