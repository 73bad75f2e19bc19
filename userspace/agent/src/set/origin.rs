// SPDX-License-Identifier: GPL-2.0-only

//! Whether the disks behind the devices are those that the copies were made of. See `dtloop_core::origin`.
//!
//! Blocks are read by a thread of their own, so that a disk that hangs holds up nothing. What they held is
//! forgotten when a record that changes them is sent, and durably so before the kernel hears that the target has it.

use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use dtloop_abi::{CaptureStream, Extent, Found, raw};
use dtloop_core::identity::{Ranges, SAMPLE_BYTES, SAMPLE_LENGTH, Sample};
use dtloop_proto::{Op, RecordBody, RecordKind};

use super::{End, Worker};
use crate::ship::body_of;

/// How often blocks are read that are not known. Those that are written all the time never are.
const READ_EVERY: Duration = Duration::from_secs(20);

/// How soon after the start the first ones are.
const READ_FIRST: Duration = Duration::from_secs(3);

/// Longest time for the look at a disk in a new stream.
const LOOK_PATIENCE: Duration = Duration::from_secs(10);

/// Blocks that are being read.
struct Reading {
    device: u32,
    /// Those that no record has changed since.
    offsets: Vec<u64>,
    answer: Receiver<Vec<Sample>>,
}

/// See the module documentation.
pub(super) struct Origins {
    reading: Option<Reading>,
    next_at: Instant,
    last_device: u32,
    /// Something was forgotten, and is not durably so yet.
    forgotten: bool,
}

impl Origins {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            reading: None,
            next_at: now + READ_FIRST,
            last_device: 0,
            forgotten: false,
        }
    }
}

/// The bytes of a device that a record changes.
fn changed(body: &RecordBody) -> Option<(u64, u64)> {
    let changes = matches!(
        body.op,
        Op::Write | Op::WriteZeroes | Op::Discard | Op::SecureErase
    );
    let start = body.start_sector.saturating_mul(raw::SECTOR_BYTES);
    let bytes = u64::from(body.sectors) * raw::SECTOR_BYTES;
    changes.then(|| (start, start.saturating_add(bytes)))
}

/// Reads blocks beside.
fn read_blocks(
    stream: &dyn CaptureStream,
    device: &raw::DeviceStatus,
    offsets: Vec<u64>,
) -> Option<Receiver<Vec<Sample>>> {
    let disk = stream.backing(device)?;
    let (answer, answered) = channel();
    let read = move || {
        let mut block = [0; SAMPLE_LENGTH];
        let mut sample = |offset: u64| {
            // What cannot be read says nothing.
            disk.read(offset, &mut block).ok()?;
            Some(Sample::of(offset, &block))
        };
        let samples = offsets.into_iter().filter_map(&mut sample).collect();
        let _ = dtloop_runtime::post(&answer, samples);
    };
    dtloop_runtime::spawn("blocks", read)
        .is_ok()
        .then_some(answered)
}

/// Whether a block may have been changed by a crash, or since the device joined the stream.
fn is_explained(
    stream: &dyn CaptureStream,
    device: &raw::DeviceStatus,
    offset: u64,
) -> Result<bool, End> {
    let end = offset + SAMPLE_BYTES;
    let overlaps = |extent: Option<Extent>| {
        extent.is_some_and(|extent| extent.start_sector * raw::SECTOR_BYTES < end)
    };
    let (id, sector) = (device.device_id, offset / raw::SECTOR_BYTES);
    if overlaps(stream.suspect_next(id, sector)?)
        || overlaps(stream.dirty_next(id, sector, SAMPLE_BYTES / raw::SECTOR_BYTES)?)
    {
        return Ok(true);
    }
    let ring = stream.ring();
    let hold = ring.hold(ring.released())?;
    let mut all_there = false;
    for seq in ring.released()..hold.end() {
        let body = body_of(&hold.desc(seq)?)?;
        let touches = changed(&body).is_some_and(|range| Ranges(&[range]).covers(offset));
        if body.op == Op::Gap || touches {
            return Ok(true);
        }
        all_there |= body.op == Op::Attach && body.device == id;
    }
    // Records may have gone to the disk queue already, and a change that is under way has no complete one yet.
    Ok(!all_there || hold.end() < ring.next_seq())
}

impl Worker {
    /// A record is sent: what the blocks held that it changes is not known any more.
    pub(super) fn forget_blocks(&mut self, body: &RecordBody) {
        if body.op == Op::Gap {
            self.forget_origins();
        } else if let Some((start, end)) = changed(body) {
            self.forget_range(body.device, start, end);
        }
    }

    /// Nothing is known of any block any more: changes were made that no record tells of, or an agent before this one may have
    /// sent records, and let them go, whose changes it did not forget durably.
    pub(super) fn forget_origins(&mut self) {
        for memory in self.memory.devices.values_mut() {
            self.origins.forgotten |= memory.origin.forget(0, u64::MAX);
        }
        self.origins.reading = None;
    }

    /// A record is sent, with this content: what it wrote may be remembered, behind [`Worker::forget_blocks`]. Whatever
    /// changes it again is in a record that comes later.
    pub(super) fn trace_block(&mut self, kind: RecordKind, body: &RecordBody, content: &[u8]) {
        if kind == RecordKind::Data && body.op == Op::Write && body.is_committed() {
            let start = body.start_sector.saturating_mul(raw::SECTOR_BYTES);
            self.memory
                .trace_block(body.device, start, content, body.time_ns);
        }
    }

    fn forget_range(&mut self, device: u32, start: u64, end: u64) {
        self.origins.forgotten |= self.memory.forget_blocks(device, start, end);
        let reading = self.origins.reading.as_mut();
        if let Some(reading) = reading.filter(|reading| reading.device == device) {
            let range = [(start, end)];
            reading.offsets.retain(|at| !Ranges(&range).covers(*at));
        }
    }

    /// Makes durable what was forgotten, before the marks of the regions may go. False: it is not.
    pub(super) fn settle_origins(&mut self) -> bool {
        if std::mem::take(&mut self.origins.forgotten) {
            self.persist(true);
            self.origins.forgotten = self.memory != self.persisted;
        }
        !self.origins.forgotten
    }

    /// Has blocks read that are not known, now and then, and takes note of what they held.
    pub(super) fn tend_origins(&mut self, stream: &dyn CaptureStream) {
        if let Some(reading) = &self.origins.reading {
            match reading.answer.try_recv() {
                Ok(samples) => self.learn(&samples),
                Err(TryRecvError::Empty) => return,
                Err(TryRecvError::Disconnected) => {}
            }
            self.origins.reading = None;
        }
        let now = dtloop_runtime::now();
        if now < self.origins.next_at {
            return;
        }
        self.origins.next_at = now + READ_EVERY;
        let missing = |device: &raw::DeviceStatus| {
            let memory = self.memory.devices.get(device.label());
            let memory =
                memory.filter(|memory| memory.mirrored && memory.device == device.device_id);
            let offsets = memory.map(|memory| memory.origin.missing(device.size_bytes()));
            offsets.filter(|offsets| !offsets.is_empty())
        };
        // In turn: blocks of a busy device may be missing for ever.
        let last = self.origins.last_device;
        let later = self.devices.iter().filter(|device| device.device_id > last);
        let earlier = self
            .devices
            .iter()
            .filter(|device| device.device_id <= last);
        let found = later
            .chain(earlier)
            .find_map(|device| Some((*device, missing(device)?)));
        let Some((device, offsets)) = found else {
            return;
        };
        self.origins.last_device = device.device_id;
        self.origins.reading =
            read_blocks(stream, &device, offsets.clone()).map(|answer| Reading {
                device: device.device_id,
                offsets,
                answer,
            });
    }

    fn learn(&mut self, samples: &[Sample]) {
        let Some(reading) = &self.origins.reading else {
            return;
        };
        let mut devices = self.memory.devices.values_mut();
        let memory = devices.find(|memory| memory.device == reading.device);
        if let Some(memory) = memory.filter(|memory| memory.mirrored) {
            let still = |sample: &&Sample| reading.offsets.contains(&sample.offset);
            for sample in samples.iter().filter(still) {
                memory.origin.learn(*sample);
            }
        }
    }

    /// Before the count of what others wrote is noted: what is being read may be from before.
    pub(super) fn distrust_bypassed(&mut self, device: &raw::DeviceStatus) {
        let known = self.memory.devices.get(device.label());
        if known.is_some_and(|memory| memory.bypassed_sectors < device.bypass_sectors) {
            let id = device.device_id;
            self.origins.reading.take_if(|reading| reading.device == id);
            self.origins.forgotten = true;
        }
    }

    /// Devices have joined the stream: looks whether they are what they were when they were last in one.
    pub(super) fn check_origins(
        &mut self,
        stream: &dyn CaptureStream,
        joined: &[raw::DeviceStatus],
    ) -> Result<(), End> {
        if joined.is_empty() {
            return Ok(());
        }
        let status = stream.intent_status()?;
        let complete = status.has(raw::INTENT_ON)
            && !status.has(raw::INTENT_FAILED)
            && self.memory.unmarked_streams.is_empty();
        for device in joined {
            // Without marks nobody knows what the crash itself may have left.
            let marked = complete && Found::from_raw(device.intent_found) == Found::Known;
            let doubtful = self.memory.is_doubtful(device.device_id);
            let found = if marked || doubtful {
                self.check_origin(stream, device)?
            } else {
                vec![]
            };
            self.note_found(device, &found, doubtful);
        }
        Ok(())
    }

    fn note_found(&mut self, device: &raw::DeviceStatus, found: &[Sample], doubtful: bool) {
        let Some(memory) = self.memory.devices.get_mut(device.label()) else {
            return;
        };
        if doubtful && memory.origin.is_certain(found) {
            tracing::info!(
                "Set \"{}\", loop{}: it is the disk again that the copy was made of.",
                self.config.name,
                device.loop_number()
            );
            self.memory.reassure(device.device_id);
        } else if memory.doubt.is_none() {
            memory.origin.keep_only(found);
        }
    }

    /// Gives what its blocks hold.
    fn check_origin(
        &mut self,
        stream: &dyn CaptureStream,
        device: &raw::DeviceStatus,
    ) -> Result<Vec<Sample>, End> {
        let memory = self.memory.devices.get(device.label());
        let origin = memory.map(|memory| memory.origin.clone());
        let Some(origin) = origin.filter(|origin| !origin.is_empty()) else {
            return Ok(vec![]);
        };
        let fits = |at: &u64| at.saturating_add(SAMPLE_BYTES) <= device.size_bytes();
        let offsets: Vec<u64> = origin.known().into_iter().filter(fits).collect();
        let answer = read_blocks(stream, device, offsets.clone());
        let found =
            answer.and_then(|answer| dtloop_runtime::receive_timeout(&answer, LOOK_PATIENCE).ok());
        let Some(found) = found else {
            return Ok(vec![]);
        };
        // Without marks that were kept without a gap, nobody can tell a crash, which takes back what was in the disk's cache,
        // from a disk that was restored.
        if Found::from_raw(device.intent_found) != Found::Known
            || !stream.intent_status()?.has(raw::INTENT_ON)
        {
            return Ok(found);
        }
        let mut unexplained = vec![];
        for offset in origin.changed(&found) {
            if !is_explained(stream, device, offset)? {
                unexplained.push(offset);
            }
        }
        if let Some(first) = unexplained.first() {
            let reason = format!(
                "the disk behind it, {}, is not as it was when the copy was made: {} of {} blocks looked at hold something else (the \
                 first at byte {first}), and neither a record nor the intent file tells of a change. It was restored to \
                 another state, swapped, or written to past /dev/loop#",
                device.backing_name(),
                unexplained.len(),
                offsets.len()
            );
            self.doubt(device, &reason);
        }
        Ok(found)
    }

    /// Another disk has the device's name, as the kernel's intent map says.
    pub(super) fn doubt_replaced(&mut self) {
        for device in self.devices.clone() {
            let known = self.memory.devices.get(device.label());
            let undecided = known.is_some_and(|memory| !memory.mirrored);
            if undecided && Found::from_raw(device.intent_found) == Found::Replaced {
                let reason = format!(
                    "{} is another disk than the one that the copy was made of",
                    device.backing_name()
                );
                self.doubt(&device, &reason);
            }
        }
    }

    fn doubt(&mut self, device: &raw::DeviceStatus, reason: &str) {
        let text = format!(
            "{reason}. The copy may be the newer one, and is kept. If the disk is right, run dtloop mirror start --set {} {}",
            self.config.name,
            device.loop_number()
        );
        if self.memory.doubt(device.device_id, text.clone()) {
            tracing::error!(
                "Set \"{}\", loop{}: {text}.",
                self.config.name,
                device.loop_number()
            );
            self.persist(true);
        }
    }
}
