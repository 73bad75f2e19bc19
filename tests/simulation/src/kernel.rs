// SPDX-License-Identifier: GPL-2.0-only

//! The kernel of the source with its disks: a model that keeps the module's promises (`kmod/DESIGN.md`). The ring is the real
//! one, in the model of `dtloop-abi`; added are disks with a cache that a power cut empties, and the intent file.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use dtloop_abi::testing::{Change, DIRTY_BLOCK_SECTORS, FakeStream, REGION_SECTORS};
use dtloop_abi::{
    BackingBlocks, CaptureStream, Error, Extent, Operation, Result, Ring, SyncRequest, raw,
};

use crate::history::{Digest, History};
use crate::random::Random;

const SECTOR: usize = 512;

/// Payload of the ring: a quarter of it, what SYNC may use, is one chunk of a mirror.
const RING_BYTES: u64 = 512 << 10;

/// Rounds of clearing follow each other no faster than this.
const ROUND: Duration = Duration::from_secs(3);

/// A device, and the disk behind it.
struct Device {
    id: u32,
    label: String,
    /// What programs see.
    content: Vec<u8>,
    digest: Digest,
    /// What a power cut leaves.
    durable: Vec<u8>,
    /// Written since the last flush, in sectors.
    cached: BTreeSet<usize>,
    marked: BTreeSet<u64>,
    recent: BTreeSet<u64>,
    suspect: BTreeSet<u64>,
    found: u32,
}

impl Device {
    fn flush(&mut self) {
        for sector in std::mem::take(&mut self.cached) {
            let range = sector * SECTOR..(sector + 1) * SECTOR;
            self.durable[range.clone()].copy_from_slice(&self.content[range]);
        }
    }
}

/// The intent file: it survives everything.
#[derive(Clone, Default)]
struct IntentFile {
    bases: Vec<raw::IntentBase>,
    version: u64,
    /// By device, once the file holds it.
    marks: Vec<Option<BTreeSet<u64>>>,
}

struct Round {
    end: u64,
    began: Duration,
}

struct Model {
    stream: FakeStream,
    uuid: [u8; 16],
    devices: Vec<Device>,
    file: IntentFile,
    copy: Option<IntentFile>,
    found: u32,
    found_version: u64,
    round: Option<Round>,
    history: History,
    /// Records that the history has.
    noted: u64,
    /// Records that are not complete: what they changed.
    open: Vec<(u64, usize, u64, u64)>,
    is_tracking: bool,
}

/// See the module documentation. Clones are the same kernel.
#[derive(Clone)]
pub struct Kernel {
    model: Arc<Mutex<Model>>,
}

fn new_stream(random: &mut Random, descs: u32) -> (FakeStream, [u8; 16]) {
    let mut uuid = [0; 16];
    uuid[..8].copy_from_slice(&random.draw().to_le_bytes());
    uuid[8..].copy_from_slice(&random.draw().to_le_bytes());
    (
        FakeStream::new("db", RING_BYTES, descs).with_uuid(uuid),
        uuid,
    )
}

fn bytes(sectors: u64) -> usize {
    sectors as usize * SECTOR
}

impl Model {
    /// Takes note of what the devices held when the records since were made.
    fn note(&mut self) {
        let next = self.stream.status().expect("a stream").next_seq;
        while self.noted < next {
            let sums = self
                .devices
                .iter()
                .map(|device| device.digest.sum())
                .collect();
            self.history.note(self.uuid, self.noted, sums);
            let devices = &self.devices;
            self.history.note_full(self.uuid, self.noted, || {
                devices
                    .iter()
                    .map(|device| device.content.clone())
                    .collect()
            });
            self.noted += 1;
        }
    }

    fn store_marks(&mut self, device: usize) {
        self.file.marks[device] = Some(self.devices[device].marked.clone());
        self.file.version += 1;
    }

    /// Marks the regions of a change, before it is made.
    fn admit(&mut self, device: usize, start: u64, sectors: u64) {
        let regions = start / REGION_SECTORS..(start + sectors).div_ceil(REGION_SECTORS);
        let known = &mut self.devices[device];
        let cold = regions
            .clone()
            .any(|region| !known.marked.contains(&region));
        known.marked.extend(regions.clone());
        known.recent.extend(regions);
        if cold && self.is_tracking {
            self.store_marks(device);
        }
    }

    fn index(&self, id: u32, operation: Operation) -> Result<usize> {
        let at = self.devices.iter().position(|device| device.id == id);
        at.ok_or(Error::Refused {
            operation,
            errno: nix::errno::Errno::ENXIO,
        })
    }

    fn is_dirty(&self, id: u32, start: u64, sectors: u64) -> bool {
        let found = self.stream.dirty_next(id, start, DIRTY_BLOCK_SECTORS);
        let found = found.expect("a device");
        found.is_some_and(|extent| extent.start_sector < start + sectors)
    }

    fn flush_disks(&mut self) {
        self.devices.iter_mut().for_each(Device::flush);
    }

    fn intent_status(&self) -> raw::IntentStatus {
        let mut bases = [raw::IntentBase::default(); raw::INTENT_BASES];
        for (place, base) in bases.iter_mut().zip(&self.file.bases) {
            *place = *base;
        }
        raw::IntentStatus {
            flags: if self.is_tracking { raw::INTENT_ON } else { 0 },
            found: self.found,
            region_bytes: (REGION_SECTORS * 512) as u32,
            version: self.file.version,
            found_version: self.found_version,
            bases,
            ..Default::default()
        }
    }

    fn clear(&mut self, acked: u64, now: Duration) {
        let due = match &self.round {
            None => true,
            Some(round) if acked >= round.end && now >= round.began + ROUND => {
                let mut gone = false;
                for at in 0..self.devices.len() {
                    let (id, marked) = (self.devices[at].id, self.devices[at].marked.clone());
                    for region in marked {
                        let device = &self.devices[at];
                        let rests =
                            !device.recent.contains(&region) && !device.suspect.contains(&region);
                        if rests && !self.is_dirty(id, region * REGION_SECTORS, REGION_SECTORS) {
                            self.devices[at].marked.remove(&region);
                            gone = true;
                        }
                    }
                    self.devices[at].recent.clear();
                    if gone {
                        self.store_marks(at);
                    }
                }
                if gone {
                    let uuid = self.uuid;
                    self.file.bases.retain(|base| base.stream_uuid == uuid);
                    for base in &mut self.file.bases {
                        base.acked = base.acked.max(acked);
                    }
                }
                true
            }
            Some(_) => false,
        };
        if due {
            let end = self.stream.status().expect("a stream").next_seq;
            self.round = Some(Round { end, began: now });
        }
    }

    /// A new stream, after a boot or with the module loaded anew.
    fn begin(&mut self, random: &mut Random, descs: u32) {
        let (stream, uuid) = new_stream(random, descs);
        (self.stream, self.uuid) = (stream, uuid);
        self.noted = raw::SEQ_FIRST;
        self.round = None;
        self.open.clear();
        let is_new = self.file.version == 0;
        self.found = match (self.is_tracking, is_new) {
            (false, _) => raw::FOUND_NONE,
            (true, true) => raw::FOUND_NEW,
            (true, false) => raw::FOUND_KNOWN,
        };
        self.found_version = self.file.version;
        if self.is_tracking {
            self.file.bases.push(raw::IntentBase {
                stream_uuid: uuid,
                acked: 0,
            });
            if self.file.bases.len() > raw::INTENT_BASES {
                self.file.bases.remove(0);
            }
            self.file.version += 1;
        }
        for at in 0..self.devices.len() {
            let device = &mut self.devices[at];
            let sectors = (device.content.len() / SECTOR) as u64;
            device.id = self.stream.attach(at as u32 + 1, sectors, &device.label);
            self.stream.set_content(device.id, &device.content);
            device.digest = Digest::of(&device.content);
            device.recent.clear();
            device.suspect.clear();
            device.marked.clear();
            let all = 0..sectors.div_ceil(REGION_SECTORS);
            match &self.file.marks[at] {
                _ if !self.is_tracking => device.found = raw::FOUND_NONE,
                None => {
                    device.found = raw::FOUND_NEW;
                    device.marked.extend(all);
                    self.store_marks(at);
                }
                Some(marks) => {
                    device.found = raw::FOUND_KNOWN;
                    device.marked.clone_from(marks);
                    device.suspect.clone_from(marks);
                }
            }
        }
        self.note();
    }
}

impl Kernel {
    /// With devices of these sizes in sectors, labelled "vol0" and so on. `descs`: records in the ring at most.
    pub fn new(random: &mut Random, sizes: &[u64], tracks: bool, descs: u32) -> Self {
        let (stream, uuid) = new_stream(random, descs);
        let device = |(number, sectors): (usize, &u64)| Device {
            id: 0,
            label: format!("vol{number}"),
            content: vec![0; bytes(*sectors)],
            digest: Digest::default(),
            durable: vec![0; bytes(*sectors)],
            cached: BTreeSet::new(),
            marked: BTreeSet::new(),
            recent: BTreeSet::new(),
            suspect: BTreeSet::new(),
            found: 0,
        };
        let devices: Vec<Device> = sizes.iter().enumerate().map(device).collect();
        let mut model = Model {
            stream,
            uuid,
            file: IntentFile {
                marks: vec![None; devices.len()],
                ..IntentFile::default()
            },
            devices,
            copy: None,
            found: 0,
            found_version: 0,
            round: None,
            history: History::default(),
            noted: raw::SEQ_FIRST,
            open: vec![],
            is_tracking: tracks,
        };
        model.begin(random, descs);
        Self {
            model: Arc::new(Mutex::new(model)),
        }
    }

    fn model(&self) -> MutexGuard<'_, Model> {
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An application's change: `op` with this payload, or as many sectors. `late`: the record is complete later only.
    pub fn change(
        &self,
        device: usize,
        op: u8,
        start: u64,
        sectors: u64,
        payload: &[u8],
        late: bool,
    ) {
        let mut model = self.model();
        if op == raw::OP_FLUSH {
            // A flush that ends says that all is durable that had ended before.
            let (stream, id) = (model.stream.clone(), model.devices[device].id);
            stream.flush(id);
            let open: Vec<_> = model
                .open
                .iter()
                .map(|(.., device, at, sectors)| (*device, *at, *sectors))
                .collect();
            let known = &mut model.devices[device];
            for sector in std::mem::take(&mut known.cached) {
                let is_open = open
                    .iter()
                    .any(|(_, at, sectors)| (*at..at + sectors).contains(&(sector as u64)));
                if is_open {
                    known.cached.insert(sector);
                }
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                known.durable[range.clone()].copy_from_slice(&known.content[range]);
            }
            model.note();
            return;
        }
        model.finish_overlapping(device, start, sectors);
        model.admit(device, start, sectors);
        let known = &mut model.devices[device];
        let (from, to) = (bytes(start), bytes(start + sectors));
        match op {
            raw::OP_WRITE => known.content[from..to].copy_from_slice(payload),
            _ => known.content[from..to].fill(0),
        }
        known.cached.extend(from / SECTOR..to / SECTOR);
        let Device {
            content,
            digest,
            id,
            ..
        } = known;
        digest.update(content, from, to - from);
        let change = Change {
            op,
            device: *id,
            flags: if op == raw::OP_WRITE {
                0
            } else {
                raw::F_ZEROES
            },
            start_sector: start,
            sectors: sectors as u32,
            payload,
            aux: 0,
        };
        let stream = model.stream.clone();
        let seq = stream.reserve(&change);
        model.note();
        crate::world::trace(|| format!("    record {seq:?}"));
        match seq {
            Some(seq) if late => model.open.push((seq, device, start, sectors)),
            Some(seq) => stream.complete(seq, None),
            None => {}
        }
    }

    /// Changes that were under way end, some of them with an error.
    pub fn finish_open(&self, random: &mut Random) {
        let mut model = self.model();
        let mut open = std::mem::take(&mut model.open);
        while !open.is_empty() {
            let at = random.below(open.len() as u64) as usize;
            let (seq, ..) = open.swap_remove(at);
            let errno = random.one_in(8).then_some(nix::errno::Errno::EIO as u8);
            model.stream.complete(seq, errno);
        }
    }

    /// A copy of the intent file is made.
    pub fn copy_intent_file(&self) {
        let mut model = self.model();
        model.copy = Some(model.file.clone());
    }

    /// The power fails, and comes back: of what was not flushed, each sector survives or not. `older`: the copy of the intent
    /// file is put in its place, if there is one. True: it was.
    pub fn power_cut(&self, random: &mut Random, descs: u32, older: bool) -> bool {
        let mut model = self.model();
        let copy = model.copy.clone().filter(|_| older);
        let is_older = copy.is_some();
        if let Some(copy) = copy {
            model.file = copy;
        }
        for device in &mut model.devices {
            for sector in std::mem::take(&mut device.cached) {
                let range = sector * SECTOR..(sector + 1) * SECTOR;
                if random.one_in(2) {
                    device.durable[range.clone()].copy_from_slice(&device.content[range]);
                }
            }
            device.content.clone_from(&device.durable);
        }
        model.begin(random, descs);
        is_older
    }

    /// The module is unloaded and loaded anew; the disks keep what they have.
    pub fn reload(&self, random: &mut Random, descs: u32) {
        let mut model = self.model();
        model.flush_disks();
        model.begin(random, descs);
    }

    pub fn content(&self, device: usize) -> Vec<u8> {
        self.model().devices[device].content.clone()
    }

    pub fn uuid(&self) -> [u8; 16] {
        self.model().uuid
    }

    /// Everything below was given back by the agent.
    pub fn released(&self) -> u64 {
        self.model().stream.ring().released()
    }

    /// What a device held at that record.
    pub fn at(&self, stream: [u8; 16], seq: u64, device: usize) -> Option<u64> {
        self.model().history.get(stream, seq, device)
    }

    /// Keeps everything that the devices held, to explain differences.
    pub fn keep_all(&self) {
        self.model().history.keep_all();
    }

    /// How a volume differs from what a device held at that record.
    pub fn explain(&self, stream: [u8; 16], seq: u64, device: usize, content: &[u8]) -> String {
        self.model().history.explain(stream, seq, device, content)
    }

    /// The stream, as the agent opens it.
    pub fn open(&self) -> Arc<dyn CaptureStream> {
        let model = self.model();
        Arc::new(Opened {
            kernel: self.clone(),
            stream: model.stream.clone(),
        })
    }
}

impl Model {
    /// The gate: a change waits for those that overlap.
    fn finish_overlapping(&mut self, device: usize, start: u64, sectors: u64) {
        let stream = self.stream.clone();
        self.open.retain(|(seq, of, at, length)| {
            let overlaps = *of == device && *at < start + sectors && start < at + length;
            if overlaps {
                stream.complete(*seq, None);
            }
            !overlaps
        });
    }
}

/// A handle of the stream, good as long as the stream is.
struct Opened {
    kernel: Kernel,
    stream: FakeStream,
}

/// The disk behind a device.
struct Disk {
    disk: Box<dyn BackingBlocks>,
    kernel: Kernel,
    device: u32,
}

impl BackingBlocks for Disk {
    fn read(&self, offset: u64, block: &mut [u8]) -> std::io::Result<()> {
        crate::world::preempt_current();
        self.disk.read(offset, block)
    }

    fn settle(&self) -> std::io::Result<()> {
        crate::world::preempt_current();
        let mut model = self.kernel.model();
        let mut devices = model.devices.iter_mut();
        if let Some(device) = devices.find(|device| device.id == self.device) {
            device.flush();
        }
        Ok(())
    }
}

fn gone(operation: Operation) -> Error {
    Error::Refused {
        operation,
        errno: nix::errno::Errno::ENODEV,
    }
}

impl Opened {
    fn model(&self, operation: Operation) -> Result<MutexGuard<'_, Model>> {
        let model = self.kernel.model();
        let status = self.stream.status()?;
        if model.uuid == status.stream_uuid {
            Ok(model)
        } else {
            Err(gone(operation))
        }
    }
}

impl CaptureStream for Opened {
    fn backing(&self, device: &raw::DeviceStatus) -> Option<Box<dyn BackingBlocks>> {
        let disk = self.stream.backing(device)?;
        Some(Box::new(Disk {
            disk,
            kernel: self.kernel.clone(),
            device: device.device_id,
        }))
    }

    fn status(&self) -> Result<raw::StreamStatus> {
        drop(self.model(Operation::StreamStatus)?);
        self.stream.status()
    }

    fn devices(&self) -> Result<Vec<raw::DeviceStatus>> {
        let model = self.model(Operation::DeviceStatus)?;
        let mut devices = self.stream.devices()?;
        for (status, device) in devices.iter_mut().zip(&model.devices) {
            status.intent_found = device.found;
            status.regions_marked = device.marked.len() as u64;
            status.regions_suspect = device.suspect.len() as u64;
        }
        Ok(devices)
    }

    fn sync(&self, request: &SyncRequest) -> Result<u64> {
        let mut model = self.model(Operation::Sync)?;
        let at = model.index(request.device_id, Operation::Sync)?;
        model.finish_overlapping(at, request.start_sector, request.sectors);
        let before = self.stream.status()?.next_seq;
        let taken = self.stream.sync(request)?;
        crate::world::trace(|| {
            let next = self.stream.status().map_or(0, |status| status.next_seq);
            format!("    SYNC {request:?}: {taken} sectors, records {before} to {next}")
        });
        let end = request.start_sector + taken;
        let regions = request.start_sector / REGION_SECTORS..end.div_ceil(REGION_SECTORS);
        model.devices[at].recent.extend(regions);
        model.note();
        Ok(taken)
    }

    fn dirty_next(&self, id: u32, start: u64, most: u64) -> Result<Option<Extent>> {
        drop(self.model(Operation::DirtyNext)?);
        self.stream.dirty_next(id, start, most)
    }

    fn dirty_set(&self, id: u32, extent: Extent) -> Result<()> {
        drop(self.model(Operation::DirtySet)?);
        self.stream.dirty_set(id, extent)
    }

    fn kick(&self) -> Result<()> {
        let mut model = self.model(Operation::Kick)?;
        let before = self.stream.status()?.next_seq;
        self.stream.kick()?;
        model.note();
        crate::world::trace(|| {
            let next = self.stream.status().map_or(0, |status| status.next_seq);
            format!("    kick: records {before} to {next}")
        });
        Ok(())
    }

    fn intent_status(&self) -> Result<raw::IntentStatus> {
        Ok(self.model(Operation::IntentStatus)?.intent_status())
    }

    fn intent_clear(&self, acked: u64) -> Result<Option<raw::IntentClear>> {
        let now = crate::world::time();
        let mut model = self.model(Operation::IntentClear)?;
        if !model.is_tracking {
            return Ok(None);
        }
        assert!(
            acked <= self.stream.status()?.committed,
            "acknowledged {acked}, which is not committed"
        );
        model.clear(acked, now);
        Ok(Some(raw::IntentClear {
            acked,
            version: model.file.version,
            ..Default::default()
        }))
    }

    fn suspect_next(&self, id: u32, start: u64) -> Result<Option<Extent>> {
        let model = self.model(Operation::SuspectNext)?;
        let device = &model.devices[model.index(id, Operation::SuspectNext)?];
        let size = (device.content.len() / SECTOR) as u64;
        let first = device.suspect.range(start / REGION_SECTORS..).next();
        Ok(first.map(|region| {
            let start_sector = (region * REGION_SECTORS).max(start);
            let end = ((region + 1) * REGION_SECTORS).min(size);
            Extent {
                start_sector,
                sectors: end - start_sector,
            }
        }))
    }

    fn suspect_clear(&self, id: u32, extent: Extent) -> Result<()> {
        let mut model = self.model(Operation::SuspectClear)?;
        let at = model.index(id, Operation::SuspectClear)?;
        let device = &mut model.devices[at];
        let size = (device.content.len() / SECTOR) as u64;
        let end = extent.start_sector + extent.sectors;
        device.suspect.retain(|region| {
            let start = region * REGION_SECTORS;
            !(start >= extent.start_sector && (start + REGION_SECTORS).min(size) <= end)
        });
        Ok(())
    }

    fn suspect_set(&self, id: u32, extent: Extent) -> Result<bool> {
        let mut model = self.model(Operation::SuspectSet)?;
        let at = model.index(id, Operation::SuspectSet)?;
        let end = extent.start_sector + extent.sectors;
        let device = &mut model.devices[at];
        let touched = |region: &&u64| {
            **region * REGION_SECTORS < end && (**region + 1) * REGION_SECTORS > extent.start_sector
        };
        let regions: Vec<u64> = device.marked.iter().filter(touched).copied().collect();
        device.suspect.extend(regions);
        Ok(model.is_tracking)
    }

    fn poll(&self, timeout: Option<Duration>) -> Result<bool> {
        self.stream.poll(timeout)
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.stream.wake_fd()
    }

    fn ring(&self) -> &Ring {
        self.stream.ring()
    }
}
