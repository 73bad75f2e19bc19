// SPDX-License-Identifier: GPL-2.0-only

//! Verifications: their log, what counts as a difference, and those that the timetable asks for.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtloop_abi::{CaptureStream, raw};
use dtloop_api::{VerifyEntry, VerifyEvent, VerifyResult, VerifySchedule};
use dtloop_core::mirror::{DeviceJob, Finding, JobKind, JobState, Planner};
use dtloop_core::outside::Outside;
use dtloop_core::timetable::{Pace, Plan};
use dtloop_disk::Disk;
use dtloop_proto::message::{Verified, VolumeSync};
use dtloop_proto::{Code, RecordKind};
use dtloop_store::log::{LOG_BYTES_MAX, Log};

use super::Worker;
use crate::clock;
use crate::snapshot::{JobView, ms, unix_ms};

/// Why a job was started that the timetable asked for.
const SCHEDULED: &str = "it was due";

/// The timetable waits so long after another job, whose end somebody may be waiting to see.
const REST: Duration = Duration::from_secs(10);

/// How often the timetable is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// When a verification may ask for the next range.
pub(super) enum Turn {
    /// Now.
    Now,
    /// In some milliseconds.
    Soon,
    /// When something happens, or at the next look in a second.
    Later,
}

/// Everything that only verifications need.
pub(super) struct Verifier {
    disk: Arc<dyn Disk>,
    log_path: PathBuf,
    log: Option<Log>,
    /// Hashes of the source's data by record, until they are compared.
    hashes: BTreeMap<u64, [u8; 32]>,
    pub(super) outside: Outside,
    pace: Option<Pace>,
    began: Instant,
    looked: Instant,
}

impl Verifier {
    pub(super) fn new(disk: Arc<dyn Disk>, log_path: PathBuf) -> Self {
        let now = dtloop_runtime::now();
        Self {
            disk,
            log_path,
            log: None,
            hashes: BTreeMap::new(),
            outside: Outside::default(),
            pace: None,
            began: now,
            looked: now,
        }
    }

    /// Appends to the log. One that cannot be written stops no verification: the findings are in the result as well.
    fn write(&mut self, set: &str, entries: &[VerifyEntry]) {
        let open = |path| Log::open(Arc::clone(&self.disk), path, LOG_BYTES_MAX);
        let log = match self.log.take() {
            Some(log) => Ok(log),
            None => open(&self.log_path),
        };
        let written = log.and_then(|mut log| {
            log.write(entries)?;
            log.sync()?;
            Ok(log)
        });
        match written {
            Ok(log) => self.log = Some(log),
            Err(error) => tracing::error!(
                "Set \"{set}\": the log of verifications {} cannot be written: {error}.",
                self.log_path.display()
            ),
        }
    }
}

fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

impl Worker {
    /// A record that travels as its hash: the hash is kept until it was compared.
    pub(super) fn note_hash(&mut self, seq: u64, kind: RecordKind, content: &[u8]) {
        if kind == RecordKind::Hash && self.planner.is_some() {
            if let Ok(hash) = content.try_into() {
                self.verifier.hashes.insert(seq, hash);
            }
        }
    }

    /// A session begins. What is dirty from before, and was told by records of before, is sent again before the order
    /// is declared whole; until then no difference counts.
    pub(super) fn begin_comparing(&mut self, next: u64) {
        self.verifier.hashes.clear();
        self.verifier.outside.on_loss(next - 1);
    }

    /// What the target compared.
    pub(super) fn on_verified(&mut self, verified: &Verified) {
        let outside = self.verifier.outside;
        // Mirror and recovery send what differs, and do not ask why.
        let is_verify = |planner: &Planner| planner.state().kind.is_verify();
        let judges = self.planner.as_ref().is_some_and(is_verify);
        let seqs = verified.mismatches.iter().map(|mismatch| mismatch.seq);
        let (differing, undecided): (Vec<u64>, Vec<u64>) =
            seqs.partition(|seq| !judges || outside.is_decisive(*seq));
        let Some(planner) = &mut self.planner else {
            self.verifier.hashes.clear();
            return;
        };
        planner.on_undecided(&undecided);
        planner.on_verified(verified.through_seq, &differing);
        self.log_findings(Some(verified));
        self.verifier.hashes = self.verifier.hashes.split_off(&(verified.through_seq + 1));
    }

    /// Writes what was found since the last time.
    pub(super) fn log_findings(&mut self, verified: Option<&Verified>) {
        let Some(planner) = &mut self.planner else {
            return;
        };
        let findings = planner.take_findings();
        let (job, is_verify) = (planner.state().id, planner.state().kind.is_verify());
        if findings.is_empty() || !is_verify {
            return;
        }
        let target = |seq| {
            let mut mismatches = verified?.mismatches.iter();
            mismatches
                .find(|mismatch| mismatch.seq == seq)
                .map(|found| found.hash)
        };
        let entry = |finding: &Finding| {
            let (found, event) = match finding {
                Finding::Differs(found) => (found, VerifyEvent::Differs),
                Finding::Repaired(found) => (found, VerifyEvent::Repaired),
                Finding::Confirmed(found) => (found, VerifyEvent::Confirmed),
            };
            let source = self.verifier.hashes.get(&found.seq);
            let target = match event {
                VerifyEvent::Confirmed => source.copied(),
                _ => target(found.seq).filter(|hash| *hash != [0; 32]),
            };
            VerifyEntry {
                label: self.label_of(found.device),
                start: found.start * raw::SECTOR_BYTES,
                bytes: found.sectors * raw::SECTOR_BYTES,
                seq: found.seq,
                source: source.map(hex),
                target: target.as_ref().map(hex),
                ..VerifyEntry::new(unix_ms(), job, event)
            }
        };
        let entries: Vec<_> = findings.iter().map(entry).collect();
        self.verifier.write(&self.config.name, &entries);
    }

    fn label_of(&self, device: u32) -> String {
        let mut devices = self.memory.devices.iter();
        let found = devices.find(|(_, memory)| memory.device == device);
        found.map(|(label, _)| label.clone()).unwrap_or_default()
    }

    /// Writes that a verification began.
    pub(super) fn log_begin(&mut self, state: &JobState) {
        let labels: Vec<&str> = state
            .devices
            .iter()
            .map(|item| item.label.as_str())
            .collect();
        let repair = match state.kind {
            JobKind::Verify { repair: true } => ", with repair",
            JobKind::Verify { repair: false } => "",
            _ => return,
        };
        let entry = VerifyEntry {
            label: labels.join(", "),
            text: format!("{}{repair}", state.reason),
            ..VerifyEntry::new(unix_ms(), state.id, VerifyEvent::Begins)
        };
        self.verifier.write(&self.config.name, &[entry]);
    }

    /// Writes, logs and remembers how a verification ended on a device.
    pub(super) fn note_result(&mut self, job: u64, result: VerifyResult) {
        tracing::info!(
            "Set \"{}\", volume \"{}\": verified {} bytes from record {} to {}, {} differed, {} repaired.",
            self.config.name,
            result.label,
            result.compared_bytes,
            result.from_seq,
            result.to_seq,
            result.differing_bytes,
            result.repaired_bytes
        );
        let event = match &result {
            result if !result.complete => VerifyEvent::EndsEarly,
            result if result.is_identical() => VerifyEvent::Identical,
            _ => VerifyEvent::EndsDifferent,
        };
        let entry = VerifyEntry {
            label: result.label.clone(),
            bytes: result.compared_bytes,
            seq: result.to_seq,
            text: result.reason.clone().unwrap_or_else(|| {
                let (differed, repaired) = (result.differing_bytes, result.repaired_bytes);
                format!(
                    "{differed} bytes differed, {repaired} of them were repaired and compared again"
                )
            }),
            ..VerifyEntry::new(unix_ms(), job, event)
        };
        self.verifier.write(&self.config.name, &[entry]);
        self.last_verify.retain(|other| other.label != result.label);
        self.last_verify.push(result);
        let path = self.path.with_extension("verified");
        if let Err(error) = dtloop_store::store_on(&*self.disk, &path, &self.last_verify) {
            tracing::error!(
                "Set \"{}\": {:#}.",
                self.config.name,
                anyhow::Error::from(error)
            );
        }
    }

    // The timetable.

    fn timetable(&self) -> Option<&Plan> {
        self.config.verify.as_ref().map(|verify| &verify.plan)
    }

    /// Begins or takes up a scheduled verification when it is time.
    pub(super) fn tend_timetable(&mut self, stream: &dyn CaptureStream) {
        if self.planner.is_some() || dtloop_runtime::elapsed(self.verifier.looked) < LOOK_EVERY {
            return;
        }
        self.verifier.looked = dtloop_runtime::now();
        let Some(plan) = self.timetable().cloned() else {
            return;
        };
        let now = clock::now();
        let is_due = plan.is_due(&mut self.memory.timetable, now);
        let finished = self
            .job
            .as_ref()
            .and_then(|job| Some(job.started + job.finished?));
        let rests = finished.is_some_and(|at| dtloop_runtime::elapsed(at) < REST);
        if rests || !self.resync.is_idle() || !self.verifier.outside.is_settled() {
            return;
        }
        if let Some(state) = self.memory.suspended.take_if(|_| plan.is_open(now)) {
            let id = self.memory.next_job_id();
            tracing::info!(
                "Set \"{}\": the scheduled verification goes on at its place.",
                self.config.name
            );
            self.begin_scheduled(stream, JobState { id, ..state });
        } else if is_due {
            let devices = self.devices_to_verify();
            if !devices.is_empty() {
                Plan::on_begin(&mut self.memory.timetable, now);
                let state = self.scheduled_job(devices);
                self.log_begin(&state);
                self.begin_scheduled(stream, state);
            }
        }
    }

    fn devices_to_verify(&self) -> Vec<DeviceJob> {
        let is_ready = |device: &&raw::DeviceStatus| {
            let memory = self.memory.devices.get(device.label());
            let report = self
                .reports
                .iter()
                .find(|report| report.device == device.device_id);
            memory.is_some_and(|memory| memory.mirrored && memory.device == device.device_id)
                && report.is_some_and(|report| {
                    report.code == Code::OK && report.sync == VolumeSync::Mirrored
                })
        };
        let job = |device: &raw::DeviceStatus| {
            DeviceJob::new(device.device_id, device.label(), device.sectors)
        };
        self.devices.iter().filter(is_ready).map(job).collect()
    }

    fn scheduled_job(&mut self, devices: Vec<DeviceJob>) -> JobState {
        let repair = self
            .config
            .verify
            .as_ref()
            .is_some_and(|verify| verify.repair);
        JobState {
            id: self.memory.next_job_id(),
            kind: JobKind::Verify { repair },
            reason: SCHEDULED.to_owned(),
            devices,
            paused: false,
            failed: None,
        }
    }

    fn begin_scheduled(&mut self, stream: &dyn CaptureStream, state: JobState) {
        self.memory.scheduled = true;
        self.job = Some(JobView::new(state.clone(), stream.ring().next_seq()));
        self.memory.job = Some(state.clone());
        self.planner = Some(Planner::new(state));
        self.persist(true);
    }

    /// A scheduled verification makes way for what cannot wait, and keeps its place. False: none is under way.
    pub(super) fn suspend_scheduled(&mut self) -> bool {
        if !self.memory.scheduled {
            return false;
        }
        let Some(planner) = self.planner.take() else {
            return false;
        };
        tracing::info!(
            "Set \"{}\": the scheduled verification makes way.",
            self.config.name
        );
        self.memory.suspended = Some(planner.state().clone());
        self.memory.scheduled = false;
        self.memory.job = None;
        true
    }

    /// Marked regions have to be compared, before which no difference counts: a verification would wait for that, and
    /// that for the verification.
    pub(super) fn stop_verification(&mut self) {
        let is_verify = |planner: &&mut Planner| planner.state().kind.is_verify();
        if self.suspend_scheduled() {
            return;
        }
        if let Some(planner) = self.planner.as_mut().filter(is_verify) {
            planner.fail("The marked regions had to be compared first; start again");
        }
    }

    /// The job under way has ended: the timetable needs to know if it was one of its own.
    pub(super) fn note_scheduled_end(&mut self, state: &JobState) {
        if !std::mem::take(&mut self.memory.scheduled) {
            return;
        }
        let now = clock::now();
        let failed = state.failed.as_deref();
        match self.timetable().cloned() {
            // What an operator stopped is not begun again by itself.
            Some(plan) if failed.is_none_or(|reason| reason == super::STOPPED) => {
                plan.on_done(&mut self.memory.timetable, now);
            }
            _ => Plan::on_failed(&mut self.memory.timetable, now),
        }
    }

    /// Whether a verification has to wait: for the order, for its time of day, for its rate.
    pub(super) fn verify_waits(&mut self, sectors: u64) -> Turn {
        let Some(planner) = &self.planner else {
            return Turn::Now;
        };
        if !planner.state().kind.is_verify() {
            return Turn::Now;
        }
        if !self.verifier.outside.is_settled() {
            return Turn::Later;
        }
        let Some(verify) = self
            .config
            .verify
            .as_ref()
            .filter(|_| self.memory.scheduled)
        else {
            return Turn::Now;
        };
        if !verify.plan.is_open(clock::now()) {
            return Turn::Later;
        }
        let Some(rate) = verify.bytes_per_s else {
            return Turn::Now;
        };
        let pace = self.verifier.pace.get_or_insert_with(|| Pace::new(rate));
        if pace.allows(
            ms(dtloop_runtime::elapsed(self.verifier.began)),
            sectors * raw::SECTOR_BYTES,
        ) {
            Turn::Now
        } else {
            Turn::Soon
        }
    }

    /// So much was asked for.
    pub(super) fn pay(&mut self, sectors: u64) {
        if let Some(pace) = &mut self.verifier.pace {
            pace.pay(sectors * raw::SECTOR_BYTES);
        }
    }

    /// What is shown of the timetable.
    pub(super) fn schedule_status(&self) -> Option<VerifySchedule> {
        let verify = self.config.verify.as_ref()?;
        Some(VerifySchedule {
            text: verify.text.clone(),
            last_unix_ms: self.memory.timetable.reference_ms,
            under_way: self.memory.scheduled,
            suspended: self.memory.suspended.is_some(),
        })
    }
}
