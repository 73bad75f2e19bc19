// SPDX-License-Identifier: GPL-2.0-only

//! Mirror and verify: which range to have read into the stream next, and what has been settled.
//!
//! A job goes over its devices one after the other in chunks of [`CHUNK_BYTES`]. Every chunk is
//! read into the stream at the kernel's choice of position; live writes before and behind it are
//! in the same stream, so nothing can overtake.
//!
//! ```text
//!            asked for          its record was sent         durable on the target (data)
//!   Want ---------------> Asked ------------------> Sent ---------------------------------> settled
//!    ^                                               |   equal (hash), or verify without repair
//!    +---- cut connection (hash), failed read -------+
//!    +---- differs: Want as data --------------------+
//! ```
//!
//! A verification with repair does not believe its repair: what was sent again is compared once more, and only then settled.
//! What was found is counted when the chunk is settled, so that a job that goes on at its place after a restart counts
//! nothing twice and leaves nothing out.
//!
//! The job's place is the first chunk that is not settled. It is what survives a restart of the
//! agent: chunks behind it are read again, which changes nothing on the target.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

/// Unit of mirror and verify: small enough to repair little, large enough for a disk.
pub const CHUNK_BYTES: u32 = 128 << 10;

/// The same in sectors.
pub const SECTORS_PER_CHUNK: u64 = (CHUNK_BYTES / 512) as u64;

/// Most sectors in flight: 8 MiB, half of what SYNC may use of the default ring.
pub const WINDOW_SECTORS: u64 = 16384;

/// Longest request in sectors: 1 MiB, so that a pause takes effect soon.
const REQUEST_SECTORS: u64 = 8 * SECTORS_PER_CHUNK;

/// Most mismatching ranges that are remembered one by one.
pub const MISMATCHES_MAX: usize = 1000;

/// Repairs of one chunk, after each of which it differs again, before the job gives up.
const REPAIRS_MAX: u8 = 3;

/// Failed reads of one chunk before the job gives up.
const FAILURES_MAX: u8 = 3;

/// Lowest byte of a cookie: send the payload.
pub const MODE_DATA: u8 = 1;
/// Lowest byte of a cookie: send the payload's hash.
pub const MODE_HASH: u8 = 2;

/// Whether a SYNC record with that cookie travels as a hash. Holds for records that a former
/// agent asked for as well.
#[must_use]
pub fn is_hash_cookie(cookie: u64) -> bool {
    cookie & 0xff == u64::from(MODE_HASH)
}

/// A range to be read into the stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Device id.
    pub device: u32,
    /// First sector.
    pub start: u64,
    /// Length in sectors.
    pub sectors: u64,
    /// Clear the dirty bits.
    pub clear: bool,
    /// Comes back in the records.
    pub cookie: u64,
}

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobKind {
    /// Sends everything.
    Full,
    /// Compares hashes and sends what differs.
    Difference,
    /// Compares hashes.
    Verify {
        /// Sends what differs.
        repair: bool,
    },
    /// Compares hashes of the regions that the intent map names, and sends what differs.
    Recover,
}

impl JobKind {
    /// Whether the volume becomes mirrored by it.
    #[must_use]
    pub fn is_mirror(self) -> bool {
        matches!(self, Self::Full | Self::Difference)
    }

    /// Whether it only compares, and repairs if it is told to.
    #[must_use]
    pub fn is_verify(self) -> bool {
        matches!(self, Self::Verify { .. })
    }

    fn first_mode(self) -> u8 {
        if self == Self::Full {
            MODE_DATA
        } else {
            MODE_HASH
        }
    }

    fn repairs(self) -> bool {
        matches!(
            self,
            Self::Difference | Self::Recover | Self::Verify { repair: true }
        )
    }
}

/// A range in sectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// First sector.
    pub start: u64,
    /// Length.
    pub sectors: u64,
    /// The record at which the first part of it was compared.
    #[serde(default)]
    pub first_seq: u64,
    /// The record at which the last part of it was compared.
    #[serde(default)]
    pub last_seq: u64,
}

/// What a verification found about a chunk, for its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finding {
    /// The target's data differs at that record.
    Differs(Found),
    /// The source's data was sent again with that record, and is durable on the target.
    Repaired(Found),
    /// Compared again at that record, it is equal.
    Confirmed(Found),
}

/// A chunk and the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Device id.
    pub device: u32,
    /// First sector.
    pub start: u64,
    /// Length in sectors.
    pub sectors: u64,
    /// The record.
    pub seq: u64,
}

/// A device of a job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceJob {
    /// Device id.
    pub device: u32,
    /// Its label.
    pub label: String,
    /// Its size in sectors when the job began.
    pub sectors: u64,
    /// Everything below is settled.
    pub position: u64,
    /// Sectors that differed.
    pub mismatched_sectors: u64,
    /// The first ranges that differed.
    pub mismatches: Vec<Range>,
    /// Of these, sectors that were sent again; by a verification, and that were equal when they were compared again.
    pub repaired_sectors: u64,
    /// Number of the device's alarm when it was begun.
    #[serde(default)]
    pub alarm_number: u64,
    /// Sectors compared.
    #[serde(default)]
    pub compared_sectors: u64,
    /// Regions of the intent map that were to be compared.
    #[serde(default)]
    pub regions: u64,
    /// The device was begun.
    pub begun: bool,
    /// That it is done was passed on as [`Event::DeviceDone`]. A restart in between passes it on.
    #[serde(default)]
    pub ended: bool,
}

impl DeviceJob {
    /// A device at its beginning.
    #[must_use]
    pub fn new(device: u32, label: &str, sectors: u64) -> Self {
        Self {
            device,
            label: label.to_owned(),
            sectors,
            position: 0,
            mismatched_sectors: 0,
            mismatches: vec![],
            repaired_sectors: 0,
            alarm_number: 0,
            compared_sectors: 0,
            regions: 0,
            begun: false,
            ended: false,
        }
    }

    /// Whether everything is settled, and nothing differs any more.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.is_done() && self.mismatched_sectors == self.repaired_sectors
    }

    /// Whether everything is settled.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.begun && self.position >= self.sectors
    }
}

/// A job as it survives a restart.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobState {
    /// Number of the job, from 1; part of its cookies.
    pub id: u64,
    /// What it does.
    pub kind: JobKind,
    /// Why it was started.
    pub reason: String,
    /// Devices in their order.
    pub devices: Vec<DeviceJob>,
    /// An operator paused it.
    pub paused: bool,
    /// Why it ended before its time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

impl JobState {
    /// Whether there is nothing left to do.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.failed.is_some() || self.devices.iter().all(|device| device.ended)
    }

    /// Sectors settled and sectors in all.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let done = self
            .devices
            .iter()
            .map(|device| device.position.min(device.sectors))
            .sum();
        (done, self.devices.iter().map(|device| device.sectors).sum())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Want { mode: u8 },
    Asked { mode: u8 },
    Sent { mode: u8, seq: u64 },
    Settled,
}

#[derive(Clone, Copy, Debug)]
struct Chunk {
    start: u64,
    sectors: u64,
    stage: Stage,
    failures: u8,
    /// The record at which it was found to differ.
    differed: Option<u64>,
    repairs: u8,
}

impl Chunk {
    fn found(&self, device: u32, seq: u64) -> Found {
        Found {
            device,
            start: self.start,
            sectors: self.sectors,
            seq,
        }
    }
}

/// Something the agent must act on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A device begins; for a mirror, tell the target first.
    DeviceBegins {
        /// Device id.
        device: u32,
    },
    /// A device is done; for a mirror, tell the target.
    DeviceDone {
        /// Device id.
        device: u32,
    },
    /// The job is over; its state says how.
    Over,
}

/// Runs one job.
#[derive(Clone, Debug)]
pub struct Planner {
    state: JobState,
    index: usize,
    /// First sector behind the chunks.
    next: u64,
    /// Of [`JobKind::Recover`]: end of the run of regions that is being compared, once it was found.
    run_end: Option<u64>,
    chunks: VecDeque<Chunk>,
    over: bool,
    findings: Vec<Finding>,
}

impl Planner {
    /// Goes on with a job at its place.
    #[must_use]
    pub fn new(state: JobState) -> Self {
        let index = state
            .devices
            .iter()
            .position(|device| !device.ended)
            .unwrap_or(state.devices.len());
        let next = state.devices.get(index).map_or(0, |device| device.position);
        Self {
            state,
            index,
            next,
            run_end: None,
            chunks: VecDeque::new(),
            over: false,
            findings: vec![],
        }
    }

    /// What was found since it was last asked, in its order.
    pub fn take_findings(&mut self) -> Vec<Finding> {
        std::mem::take(&mut self.findings)
    }

    /// The device that begins has this alarm, which a clean end of the job ends.
    pub fn set_alarm_number(&mut self, number: u64) {
        if let Some(device) = self.state.devices.get_mut(self.index) {
            device.alarm_number = number;
        }
    }

    /// What is to be kept.
    #[must_use]
    pub fn state(&self) -> &JobState {
        &self.state
    }

    /// Pauses or resumes. Chunks in flight are settled all the same.
    pub fn pause(&mut self, paused: bool) {
        self.state.paused = paused;
    }

    /// Ends the job.
    pub fn fail(&mut self, reason: impl Into<String>) {
        self.state.failed.get_or_insert(reason.into());
    }

    /// Sectors that were asked for and are not settled.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        let busy = self
            .chunks
            .iter()
            .filter(|chunk| matches!(chunk.stage, Stage::Asked { .. } | Stage::Sent { .. }));
        busy.map(|chunk| chunk.sectors).sum()
    }

    fn cookie(&self, mode: u8) -> u64 {
        (self.state.id << 8) | u64::from(mode)
    }

    fn request(&self, start: u64, sectors: u64, mode: u8) -> Request {
        let device = self.state.devices[self.index].device;
        Request {
            device,
            start,
            sectors,
            clear: mode == MODE_DATA,
            cookie: self.cookie(mode),
        }
    }

    /// What to act on before the next request, if anything.
    pub fn next_event(&mut self) -> Option<Event> {
        if self.over {
            return None;
        }
        let is_done = self
            .state
            .devices
            .get(self.index)
            .map(|device| (device.device, device.is_done()));
        match is_done {
            _ if self.state.failed.is_some() => {}
            None => {}
            Some((device, true)) => {
                self.state.devices[self.index].ended = true;
                self.index += 1;
                self.run_end = None;
                self.chunks.clear();
                self.next = self
                    .state
                    .devices
                    .get(self.index)
                    .map_or(0, |device| device.position);
                return Some(Event::DeviceDone { device });
            }
            Some((device, false)) => {
                let begun = &mut self.state.devices[self.index].begun;
                return (!std::mem::replace(begun, true)).then_some(Event::DeviceBegins { device });
            }
        }
        self.over = true;
        Some(Event::Over)
    }

    /// Which regions come next? To be answered with [`Planner::on_run`] before the next request. Device id, and where to
    /// look from.
    #[must_use]
    pub fn next_search(&self) -> Option<(u32, u64)> {
        let device = self.state.devices.get(self.index)?;
        let busy = self.state.kind == JobKind::Recover
            && !self.state.paused
            && self.state.failed.is_none()
            && device.begun
            && self.next < device.sectors;
        let at_end = self.run_end.is_none_or(|end| self.next >= end);
        (busy && at_end).then_some((device.device, self.next))
    }

    /// The next run of regions: first sector and length; `None`: there is none up to the end of the device.
    pub fn on_run(&mut self, run: Option<(u64, u64)>) {
        let Some(device) = self.state.devices.get(self.index) else {
            return;
        };
        let (start, end) = match run {
            Some((start, sectors)) => (start, start + sectors),
            None => (device.sectors, device.sectors),
        };
        // Regions are found as wholes, also those that were settled in part.
        self.next = self.next.max(start);
        self.run_end = Some(end.min(device.sectors));
        self.settle();
    }

    /// The next range to have read; `None` while there is nothing to ask for.
    #[must_use]
    pub fn next_request(&self) -> Option<Request> {
        let device = self.state.devices.get(self.index)?;
        let idle = self.state.paused || self.state.failed.is_some() || !device.begun;
        if idle || self.in_flight() >= WINDOW_SECTORS {
            return None;
        }
        for chunk in &self.chunks {
            if let Stage::Want { mode } = chunk.stage {
                return Some(self.request(chunk.start, chunk.sectors, mode));
            }
        }
        // Chunks that are settled out of order are bounded as well.
        let ahead = self.next - device.position >= 4 * WINDOW_SECTORS;
        let end = match self.state.kind {
            JobKind::Recover => self.run_end?,
            _ => device.sectors,
        };
        let sectors = REQUEST_SECTORS.min(end.saturating_sub(self.next));
        (sectors > 0 && !ahead)
            .then(|| self.request(self.next, sectors, self.state.kind.first_mode()))
    }

    /// How many sectors of a request were taken.
    pub fn on_taken(&mut self, request: &Request, taken: u64) {
        let mode = if is_hash_cookie(request.cookie) {
            MODE_HASH
        } else {
            MODE_DATA
        };
        let end = request.start + taken;
        if request.start >= self.next {
            let mut at = request.start;
            while at < end {
                let next = ((at / SECTORS_PER_CHUNK + 1) * SECTORS_PER_CHUNK).min(end);
                let stage = Stage::Asked { mode };
                self.chunks.push_back(Chunk {
                    start: at,
                    sectors: next - at,
                    stage,
                    failures: 0,
                    differed: None,
                    repairs: 0,
                });
                at = next;
            }
            self.next = end;
        } else if let Some(chunk) = self.split_out(request.start, taken) {
            chunk.stage = Stage::Asked { mode };
        }
    }

    /// The chunk of exactly that range, cut out of the one that holds it.
    fn split_out(&mut self, start: u64, sectors: u64) -> Option<&mut Chunk> {
        let end = start + sectors;
        let after = self.chunks.partition_point(|chunk| chunk.start <= start);
        let mut at = after.checked_sub(1)?;
        let chunk = self.chunks[at];
        if sectors == 0 || end > chunk.start + chunk.sectors {
            return None;
        }
        if end < chunk.start + chunk.sectors {
            let rest = Chunk {
                start: end,
                sectors: chunk.start + chunk.sectors - end,
                ..chunk
            };
            self.chunks.insert(at + 1, rest);
            self.chunks[at].sectors = end - chunk.start;
        }
        if chunk.start < start {
            self.chunks[at].sectors = start - chunk.start;
            at += 1;
            self.chunks.insert(
                at,
                Chunk {
                    start,
                    sectors,
                    ..chunk
                },
            );
        }
        self.chunks.get_mut(at)
    }

    /// A SYNC record was seen and, unless it failed, sent. Those of other jobs are passed over.
    pub fn on_record(
        &mut self,
        seq: u64,
        device: u32,
        start: u64,
        sectors: u64,
        cookie: u64,
        failed: bool,
    ) {
        let mode = if is_hash_cookie(cookie) {
            MODE_HASH
        } else {
            MODE_DATA
        };
        let current = self
            .state
            .devices
            .get(self.index)
            .map(|device| device.device);
        if cookie != self.cookie(mode) || current != Some(device) {
            return;
        }
        let Some(chunk) = self.split_out(start, sectors) else {
            return;
        };
        let expected = match chunk.stage {
            Stage::Want { mode } | Stage::Asked { mode } | Stage::Sent { mode, .. } => mode,
            Stage::Settled => return,
        };
        if expected != mode {
            return;
        }
        if !failed {
            chunk.stage = Stage::Sent { mode, seq };
            return;
        }
        chunk.stage = Stage::Want { mode };
        chunk.failures += 1;
        if chunk.failures >= FAILURES_MAX {
            let label = &self.state.devices[self.index].label;
            let reason = format!(
                "The source cannot read {sectors} sectors from sector {start} of \"{label}\"; repair its disk, then \
                 start again"
            );
            self.fail(reason);
        }
    }

    /// Records up to this one are durable on the target.
    pub fn on_durable(&mut self, durable: u64) {
        let is_verify = self.state.kind.is_verify();
        let device = self.state.devices.get(self.index);
        let device = device.map_or(0, |device| device.device);
        for chunk in &mut self.chunks {
            let Stage::Sent {
                mode: MODE_DATA,
                seq,
            } = chunk.stage
            else {
                continue;
            };
            if seq > durable {
                continue;
            }
            chunk.stage = Stage::Settled;
            if is_verify {
                chunk.repairs += 1;
                chunk.stage = Stage::Want { mode: MODE_HASH };
                self.findings
                    .push(Finding::Repaired(chunk.found(device, seq)));
            }
        }
        self.settle();
    }

    /// What was found at these records may be nothing but a change that is on its way; it is compared again.
    pub fn on_undecided(&mut self, seqs: &[u64]) {
        for chunk in &mut self.chunks {
            if matches!(chunk.stage, Stage::Sent { mode: MODE_HASH, seq } if seqs.contains(&seq)) {
                chunk.stage = Stage::Want { mode: MODE_HASH };
            }
        }
    }

    /// Every hash record up to `through` was compared, and those in `differing` were different.
    pub fn on_verified(&mut self, through: u64, differing: &[u64]) {
        let repairs = self.state.kind.repairs();
        let Some(item) = self.state.devices.get_mut(self.index) else {
            return;
        };
        let (device, mut hopeless) = (item.device, None);
        for chunk in &mut self.chunks {
            let Stage::Sent {
                mode: MODE_HASH,
                seq,
            } = chunk.stage
            else {
                continue;
            };
            if seq <= through {
                item.compared_sectors += chunk.sectors;
            }
            if differing.contains(&seq) {
                chunk.differed.get_or_insert(seq);
                self.findings
                    .push(Finding::Differs(chunk.found(device, seq)));
                chunk.stage = if repairs {
                    Stage::Want { mode: MODE_DATA }
                } else {
                    Stage::Settled
                };
                if chunk.repairs >= REPAIRS_MAX {
                    hopeless = Some(*chunk);
                }
            } else if seq <= through {
                chunk.stage = Stage::Settled;
                if chunk.differed.is_some() {
                    self.findings
                        .push(Finding::Confirmed(chunk.found(device, seq)));
                }
            }
        }
        self.settle();
        if let Some(Chunk { start, sectors, .. }) = hopeless {
            let reason = format!(
                "{sectors} sectors from sector {start} differ again after {REPAIRS_MAX} repairs: the target's disk \
                 does not keep what is written to it, or something else writes there; look after it, then verify again"
            );
            self.fail(reason);
        }
    }

    /// Counts what was found when a chunk is settled, see the module documentation.
    fn settle(&mut self) {
        let repairs = self.state.kind.repairs();
        let Some(device) = self.state.devices.get_mut(self.index) else {
            return;
        };
        while let Some(chunk) = self
            .chunks
            .front()
            .filter(|chunk| chunk.stage == Stage::Settled)
        {
            if let Some(seq) = chunk.differed {
                device.mismatched_sectors += chunk.sectors;
                device.repaired_sectors += if repairs { chunk.sectors } else { 0 };
                let range = Range {
                    start: chunk.start,
                    sectors: chunk.sectors,
                    first_seq: seq,
                    last_seq: seq,
                };
                note_mismatch(&mut device.mismatches, range);
            }
            self.chunks.pop_front();
        }
        // What lies between chunks need not be compared.
        device.position = self.chunks.front().map_or(self.next, |chunk| chunk.start);
    }

    /// The connection was cut: answers to hashes are lost. Data is sent again out of the ring.
    pub fn on_disconnect(&mut self) {
        for chunk in &mut self.chunks {
            if let Stage::Asked { mode: MODE_HASH }
            | Stage::Sent {
                mode: MODE_HASH, ..
            } = chunk.stage
            {
                chunk.stage = Stage::Want { mode: MODE_HASH };
            }
        }
    }

    /// A device changed its size: what is beyond the new end is not read any more.
    pub fn on_resize(&mut self, device: u32, sectors: u64) {
        let Some(job) = self
            .state
            .devices
            .iter_mut()
            .find(|job| job.device == device)
        else {
            return;
        };
        if sectors < job.sectors {
            job.sectors = sectors;
            job.position = job.position.min(sectors);
            if self
                .state
                .devices
                .get(self.index)
                .is_some_and(|job| job.device == device)
            {
                self.chunks
                    .retain(|chunk| chunk.start + chunk.sectors <= sectors);
                self.next = self.next.min(sectors);
                let begin = self.state.devices[self.index].position;
                self.next = self
                    .chunks
                    .back()
                    .map_or(begin, |chunk| chunk.start + chunk.sectors);
            }
        }
    }
}

fn note_mismatch(mismatches: &mut Vec<Range>, range: Range) {
    if let Some(last) = mismatches.last_mut() {
        if last.start + last.sectors == range.start {
            last.sectors += range.sectors;
            last.last_seq = range.last_seq;
            return;
        }
    }
    if mismatches.len() < MISMATCHES_MAX {
        mismatches.push(range);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const C: u64 = SECTORS_PER_CHUNK;

    fn job(kind: JobKind, sectors: u64) -> Planner {
        Planner::new(JobState {
            id: 3,
            kind,
            reason: String::new(),
            devices: vec![DeviceJob::new(1, "vol", sectors)],
            paused: false,
            failed: None,
        })
    }

    fn begin(planner: &mut Planner) {
        assert_eq!(
            planner.next_event(),
            Some(Event::DeviceBegins { device: 1 })
        );
        assert_eq!(planner.next_event(), None);
    }

    /// Asks for the next range and lets its records appear, the first with number `seq`.
    fn ask_and_send(planner: &mut Planner, seq: u64) -> Request {
        let request = planner.next_request().unwrap();
        planner.on_taken(&request, request.sectors);
        let (mut at, mut seq) = (request.start, seq);
        while at < request.start + request.sectors {
            let end = ((at / C + 1) * C).min(request.start + request.sectors);
            planner.on_record(seq, 1, at, end - at, request.cookie, false);
            (at, seq) = (end, seq + 1);
        }
        request
    }

    #[test]
    fn a_recovery_goes_from_run_to_run() {
        let mut planner = job(JobKind::Recover, 100 * C);
        assert_eq!(planner.next_search(), None, "not before it has begun");
        begin(&mut planner);
        assert_eq!(planner.next_request(), None, "not before it was told where");
        assert_eq!(planner.next_search(), Some((1, 0)));
        planner.on_run(Some((10 * C, 2 * C)));
        assert_eq!(planner.next_search(), None);
        let request = ask_and_send(&mut planner, 1);
        assert_eq!((request.start, request.sectors), (10 * C, 2 * C));
        assert!(is_hash_cookie(request.cookie) && !request.clear);
        assert_eq!(planner.state().devices[0].position, 10 * C);
        assert_eq!(planner.next_search(), Some((1, 12 * C)));
        planner.on_run(Some((50 * C, C)));
        ask_and_send(&mut planner, 3);
        planner.on_verified(3, &[2]);
        assert_eq!(planner.state().devices[0].position, 11 * C, "one differs");
        let repair = ask_and_send(&mut planner, 4);
        assert_eq!(
            (repair.start, repair.sectors, repair.clear),
            (11 * C, C, true)
        );
        assert_eq!(planner.next_search(), Some((1, 51 * C)));
        planner.on_run(None);
        planner.on_durable(4);
        let device = &planner.state().devices[0];
        assert!(device.is_done());
        assert_eq!(device.compared_sectors, 3 * C);
        assert_eq!(device.repaired_sectors, C);
        assert_eq!(planner.next_event(), Some(Event::DeviceDone { device: 1 }));
        assert_eq!(planner.next_event(), Some(Event::Over));
    }

    #[test]
    fn a_recovery_without_regions_is_done_at_once() {
        let mut planner = job(JobKind::Recover, 100 * C);
        begin(&mut planner);
        planner.on_run(None);
        assert_eq!(planner.next_event(), Some(Event::DeviceDone { device: 1 }));
    }

    #[test]
    fn a_full_mirror_is_done_when_all_is_durable() {
        let mut planner = job(JobKind::Full, 2 * C + 8);
        begin(&mut planner);
        let request = ask_and_send(&mut planner, 10);
        assert!(request.clear && !is_hash_cookie(request.cookie));
        assert_eq!(planner.next_request(), None);
        planner.on_durable(10);
        assert_eq!(planner.state().devices[0].position, C);
        planner.on_durable(12);
        assert_eq!(planner.next_event(), Some(Event::DeviceDone { device: 1 }));
        assert_eq!(planner.next_event(), Some(Event::Over));
        assert_eq!(planner.next_event(), None);
        assert!(planner.state().is_over());
    }

    #[test]
    fn a_difference_mirror_sends_only_what_differs() {
        let mut planner = job(JobKind::Difference, 3 * C);
        begin(&mut planner);
        let request = ask_and_send(&mut planner, 10);
        assert!(!request.clear && is_hash_cookie(request.cookie));
        planner.on_verified(12, &[11]);
        assert_eq!(
            planner.state().devices[0].position,
            C,
            "the place waits for the repair"
        );
        let repair = ask_and_send(&mut planner, 20);
        assert_eq!((repair.start, repair.sectors, repair.clear), (C, C, true));
        planner.on_durable(20);
        let device = &planner.state().devices[0];
        assert_eq!(
            (
                device.position,
                device.mismatched_sectors,
                device.repaired_sectors
            ),
            (3 * C, C, C)
        );
        assert_eq!(
            device.mismatches,
            [Range {
                start: C,
                sectors: C,
                first_seq: 11,
                last_seq: 11
            }]
        );
    }

    #[test]
    fn verify_without_repair_only_reports() {
        let mut planner = job(JobKind::Verify { repair: false }, 2 * C);
        begin(&mut planner);
        ask_and_send(&mut planner, 1);
        planner.on_verified(2, &[1, 2]);
        let device = &planner.state().devices[0];
        assert!(device.is_done());
        assert_eq!(
            device.mismatches,
            [Range {
                start: 0,
                sectors: 2 * C,
                first_seq: 1,
                last_seq: 2
            }],
            "neighbours are joined"
        );
    }

    #[test]
    fn a_repair_counts_when_it_was_compared_again() {
        let mut planner = job(JobKind::Verify { repair: true }, 2 * C);
        begin(&mut planner);
        ask_and_send(&mut planner, 1);
        planner.on_verified(2, &[1]);
        let repair = ask_and_send(&mut planner, 3);
        assert!(repair.clear && repair.start == 0);
        planner.on_durable(3);
        assert_eq!(planner.state().devices[0].repaired_sectors, 0);
        assert_eq!(planner.state().devices[0].position, 0);
        let again = ask_and_send(&mut planner, 4);
        assert!(is_hash_cookie(again.cookie) && again.start == 0);
        planner.on_verified(4, &[]);
        let device = &planner.state().devices[0];
        assert!(device.is_clean() && device.repaired_sectors == C);
        let found = |seq| Found {
            device: 1,
            start: 0,
            sectors: C,
            seq,
        };
        assert_eq!(
            planner.take_findings(),
            [
                Finding::Differs(found(1)),
                Finding::Repaired(found(3)),
                Finding::Confirmed(found(4))
            ]
        );
        assert!(planner.take_findings().is_empty());
    }

    #[test]
    fn a_repair_that_does_not_hold_ends_the_job() {
        let mut planner = job(JobKind::Verify { repair: true }, C);
        begin(&mut planner);
        for round in 0..=u64::from(REPAIRS_MAX) {
            assert_eq!(planner.state().failed, None);
            ask_and_send(&mut planner, 2 * round + 1);
            planner.on_verified(2 * round + 1, &[2 * round + 1]);
            if planner.state().failed.is_none() {
                ask_and_send(&mut planner, 2 * round + 2);
                planner.on_durable(2 * round + 2);
            }
        }
        let reason = planner.state().failed.clone().unwrap();
        assert!(reason.contains("does not keep"), "{reason}");
        assert!(!planner.state().devices[0].is_done());
    }

    #[test]
    fn what_may_be_on_its_way_is_compared_again() {
        let mut planner = job(JobKind::Verify { repair: false }, C);
        begin(&mut planner);
        ask_and_send(&mut planner, 1);
        planner.on_undecided(&[1]);
        planner.on_verified(1, &[]);
        assert_eq!(planner.state().devices[0].position, 0);
        assert!(planner.take_findings().is_empty());
        ask_and_send(&mut planner, 2);
        planner.on_verified(2, &[]);
        assert!(planner.state().devices[0].is_clean());
    }

    #[test]
    fn a_restart_counts_nothing_twice() {
        let mut planner = job(JobKind::Verify { repair: true }, 2 * C);
        begin(&mut planner);
        ask_and_send(&mut planner, 1);
        planner.on_verified(2, &[1, 2]);
        let mut planner = Planner::new(planner.state().clone());
        ask_and_send(&mut planner, 3);
        planner.on_verified(4, &[3]);
        let repair = planner.next_request().unwrap();
        planner.on_taken(&repair, C);
        planner.on_record(5, 1, 0, C, repair.cookie, false);
        planner.on_durable(5);
        ask_and_send(&mut planner, 6);
        planner.on_verified(6, &[]);
        let device = &planner.state().devices[0];
        assert_eq!((device.mismatched_sectors, device.repaired_sectors), (C, C));
    }

    #[test]
    fn a_cut_connection_asks_for_hashes_again() {
        let mut planner = job(JobKind::Difference, C);
        begin(&mut planner);
        ask_and_send(&mut planner, 1);
        planner.on_disconnect();
        planner.on_verified(1, &[]);
        assert_eq!(
            planner.state().devices[0].position,
            0,
            "that answer belonged to nothing"
        );
        ask_and_send(&mut planner, 2);
        planner.on_verified(2, &[]);
        assert!(planner.state().devices[0].is_done());
    }

    #[test]
    fn a_restart_goes_on_at_the_place() {
        let mut planner = job(JobKind::Full, 100 * C);
        begin(&mut planner);
        ask_and_send(&mut planner, 1);
        planner.on_durable(3);
        let mut planner = Planner::new(planner.state().clone());
        assert_eq!(planner.next_event(), None, "it has begun before");
        assert_eq!(
            planner.next_request().map(|request| request.start),
            Some(3 * C)
        );
    }

    #[test]
    fn a_restart_before_the_end_was_passed_on_passes_it_on() {
        let mut planner = job(JobKind::Full, C);
        begin(&mut planner);
        ask_and_send(&mut planner, 1);
        planner.on_durable(1);
        assert!(!planner.state().is_over());
        let mut planner = Planner::new(planner.state().clone());
        assert_eq!(planner.next_event(), Some(Event::DeviceDone { device: 1 }));
        assert_eq!(planner.next_event(), Some(Event::Over));
        assert!(planner.state().is_over());
    }

    #[test]
    fn a_pause_asks_for_nothing_and_settles_what_is_in_flight() {
        let mut planner = job(JobKind::Full, 100 * C);
        begin(&mut planner);
        ask_and_send(&mut planner, 1);
        planner.pause(true);
        assert_eq!(planner.next_request(), None);
        planner.on_durable(8);
        assert_eq!(planner.state().devices[0].position, 8 * C);
        planner.pause(false);
        assert!(planner.next_request().is_some());
    }

    #[test]
    fn the_window_bounds_what_is_in_flight() {
        let mut planner = job(JobKind::Full, 10 * WINDOW_SECTORS);
        begin(&mut planner);
        let mut seq = 1;
        while planner.next_request().is_some() {
            ask_and_send(&mut planner, seq);
            seq += 8;
        }
        assert_eq!(planner.in_flight(), WINDOW_SECTORS);
    }

    #[test]
    fn an_unreadable_chunk_ends_the_job_with_a_reason() {
        let mut planner = job(JobKind::Full, C);
        begin(&mut planner);
        for seq in 1..=3 {
            let request = planner.next_request().unwrap();
            planner.on_taken(&request, request.sectors);
            planner.on_record(seq, 1, 0, C, request.cookie, true);
        }
        assert!(
            planner
                .state()
                .failed
                .as_ref()
                .is_some_and(|reason| reason.contains("\"vol\""))
        );
        assert_eq!(planner.next_event(), Some(Event::Over));
    }

    #[test]
    fn records_finer_than_chunks_are_understood() {
        let mut planner = job(JobKind::Full, C);
        begin(&mut planner);
        let request = planner.next_request().unwrap();
        planner.on_taken(&request, C);
        planner.on_record(1, 1, 0, 8, request.cookie, false);
        planner.on_record(2, 1, 8, C - 16, request.cookie, false);
        planner.on_durable(2);
        assert_eq!(planner.state().devices[0].position, C - 8);
        planner.on_record(3, 1, C - 8, 8, request.cookie, false);
        planner.on_durable(3);
        assert!(planner.state().devices[0].is_done());
    }
}
