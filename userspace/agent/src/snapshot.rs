// SPDX-License-Identifier: GPL-2.0-only

//! What a set looks like from outside, as its thread publishes it.

use std::time::{Duration, Instant};

use dtloop_api::{
    ByteRange, Connection, DeviceProgress, DeviceState, DeviceStatus, Job, MirrorKind,
    MirrorResult, Pass, Recovery, SetStatus, VerifyResult,
};
use dtloop_core::mirror::{DeviceJob, JobKind, JobState};

const SECTOR_BYTES: u64 = dtloop_proto::limits::SECTOR_BYTES;

/// A job with what only the running agent knows of it.
#[derive(Clone, Debug)]
pub struct JobView {
    /// The job.
    pub state: JobState,
    /// When this agent took it up.
    pub started: Instant,
    /// How long it took, once it is over.
    pub finished: Option<Duration>,
    /// When it ended, in milliseconds since 1970.
    pub finished_unix_ms: u64,
    /// Next sequence number when it was taken up.
    pub from_seq: u64,
    /// Next sequence number when it ended.
    pub to_seq: u64,
    /// Sectors that were done when it was taken up.
    pub done_before: u64,
}

/// Milliseconds since 1970.
#[must_use]
pub fn unix_ms() -> u64 {
    let since = dtloop_runtime::unix_time();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A duration in whole milliseconds.
#[must_use]
pub fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

impl JobView {
    /// A job that is taken up now.
    #[must_use]
    pub fn new(state: JobState, from_seq: u64) -> Self {
        let done_before = state.progress().0;
        let started = dtloop_runtime::now();
        Self {
            state,
            started,
            finished: None,
            finished_unix_ms: 0,
            from_seq,
            to_seq: 0,
            done_before,
        }
    }

    fn elapsed(&self) -> Duration {
        self.finished
            .unwrap_or_else(|| dtloop_runtime::elapsed(self.started))
    }

    /// How far a device is.
    #[must_use]
    pub fn pass(&self, device: &DeviceJob) -> Pass {
        let (done, total) = self.state.progress();
        let elapsed_ms = ms(self.elapsed());
        let rate = (done - self.done_before.min(done)) as f64 / (elapsed_ms.max(1)) as f64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "an estimate of a positive number"
        )]
        let eta_ms =
            (rate > 0.0 && elapsed_ms > 500).then(|| ((total - done) as f64 / rate) as u64);
        let sent = if self.state.kind == JobKind::Full {
            device.position
        } else {
            device.repaired_sectors
        };
        Pass {
            done_bytes: device.position.min(device.sectors) * SECTOR_BYTES,
            total_bytes: device.sectors * SECTOR_BYTES,
            sent_bytes: sent * SECTOR_BYTES,
            differing_bytes: device.mismatched_sectors * SECTOR_BYTES,
            elapsed_ms,
            eta_ms: eta_ms.filter(|_| !self.state.paused && self.finished.is_none()),
            paused: self.state.paused,
        }
    }

    /// How a device's verification ended, or stands.
    #[must_use]
    pub fn verify_result(&self, device: &DeviceJob, number: u32) -> VerifyResult {
        let extent = |range: &dtloop_core::mirror::Range| ByteRange {
            start: range.start * SECTOR_BYTES,
            bytes: range.sectors * SECTOR_BYTES,
            first_seq: range.first_seq,
            last_seq: range.last_seq,
        };
        let complete = device.is_done();
        VerifyResult {
            number,
            label: device.label.clone(),
            complete,
            reason: self.state.failed.clone().filter(|_| !complete),
            compared_bytes: device.position * SECTOR_BYTES,
            differing_bytes: device.mismatched_sectors * SECTOR_BYTES,
            repaired_bytes: device.repaired_sectors * SECTOR_BYTES,
            extents: device
                .mismatches
                .iter()
                .take(VerifyResult::EXTENTS_MAX)
                .map(extent)
                .collect(),
            from_seq: self.from_seq,
            to_seq: self.to_seq,
            finished_unix_ms: self.finished_unix_ms,
            elapsed_ms: ms(self.elapsed()),
        }
    }

    /// How a device's mirror ended.
    #[must_use]
    pub fn mirror_result(&self, device: &DeviceJob, number: u32) -> MirrorResult {
        let complete = device.is_done();
        MirrorResult {
            number,
            label: device.label.clone(),
            complete,
            reason: self.state.failed.clone().filter(|_| !complete),
            pass: self.pass(device),
        }
    }

    /// What a device's recovery cost.
    #[must_use]
    pub fn recovery(&self, device: &DeviceJob) -> Recovery {
        recovery(&self.state, device)
    }

    /// What it does, in the words of the control socket.
    #[must_use]
    pub fn job(&self) -> Job {
        match self.state.kind {
            JobKind::Full => Job::FullMirror,
            JobKind::Difference => Job::DifferenceMirror,
            JobKind::Recover => Job::Recovery,
            JobKind::Verify { .. } => Job::Verify,
        }
    }

    /// The state of a device that it works on.
    #[must_use]
    pub fn device_state(&self, device: &DeviceJob) -> DeviceState {
        let pass = self.pass(device);
        match self.state.kind {
            JobKind::Full => DeviceState::Mirroring {
                kind: MirrorKind::Full,
                pass,
            },
            JobKind::Difference => DeviceState::Mirroring {
                kind: MirrorKind::Difference,
                pass,
            },
            JobKind::Recover => DeviceState::Resyncing { pass },
            JobKind::Verify { .. } => DeviceState::Verifying { pass },
        }
    }

    /// How far all devices are.
    #[must_use]
    pub fn progress(&self, number_of: impl Fn(u32) -> u32) -> Vec<DeviceProgress> {
        let progress = |device: &DeviceJob| DeviceProgress {
            number: number_of(device.device),
            label: device.label.clone(),
            job: self.job(),
            pass: self.pass(device),
        };
        self.state.devices.iter().map(progress).collect()
    }
}

/// What a device's recovery cost, as far as it is.
#[must_use]
pub fn recovery(job: &JobState, device: &DeviceJob) -> Recovery {
    Recovery {
        label: device.label.clone(),
        reason: job.reason.clone(),
        complete: device.is_done(),
        regions: device.regions,
        compared_bytes: device.compared_sectors * SECTOR_BYTES,
        differing_blocks: (device.mismatched_sectors * SECTOR_BYTES)
            .div_ceil(Recovery::BLOCK_BYTES),
        differing_bytes: device.mismatched_sectors * SECTOR_BYTES,
        sent_bytes: device.repaired_sectors * SECTOR_BYTES,
    }
}

const _: () = assert!(Recovery::BLOCK_BYTES == dtloop_core::mirror::CHUNK_BYTES as u64);

/// What is published.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// For `status`.
    pub status: SetStatus,
    /// The job under way or the last one.
    pub job: Option<JobView>,
    /// The target is a prefix of the source, on all devices.
    pub settled: bool,
    /// Why waiting is of no use, if it is not.
    pub hopeless: Option<String>,
}

impl Snapshot {
    /// A set that is just starting.
    #[must_use]
    pub fn new(name: &str, target: &str) -> Self {
        let reason = "dtagent has just started".to_owned();
        Self {
            status: SetStatus {
                name: name.to_owned(),
                target: target.to_owned(),
                connection: Connection::Connecting {
                    reason,
                    retry_ms: 0,
                },
                stream_uuid: String::new(),
                next_seq: 0,
                released_seq: 0,
                sent_seq: 0,
                durable_seq: 0,
                applied_seq: 0,
                backlog_bytes: 0,
                backlog_records: 0,
                lag_ms: 0,
                rates: dtloop_api::Rates::default(),
                totals: dtloop_api::Totals::default(),
                shaping: dtloop_api::Shaping::default(),
                ladder: dtloop_api::Ladder::default(),
                queue: None,
                staging: None,
                proven: None,
                verify_schedule: None,
                devices: vec![],
            },
            job: None,
            settled: false,
            hopeless: None,
        }
    }

    /// The loop number of a device.
    #[must_use]
    pub fn number_of(&self, device: u32) -> u32 {
        let mut devices = self.status.devices.iter();
        devices
            .find(|status: &&DeviceStatus| status.device_id == device)
            .map_or(0, |status| status.number)
    }
}
