// SPDX-License-Identifier: GPL-2.0-only

//! Requests and replies.

use serde::{Deserialize, Serialize};

use crate::shaping::{Bandwidth, BandwidthChange, Shaping};

/// What a client asks for. `devices` are loop numbers; empty: all devices of the set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// State and figures of one set or of all. Answered by [`Outcome::Status`].
    Status {
        /// The set; none: all.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        set: Option<String>,
    },
    /// Start a mirror. Answered by [`Outcome::Started`], or with `follow` by
    /// [`Outcome::Mirror`] when it has ended.
    MirrorStart {
        /// The set.
        set: String,
        /// Which devices.
        #[serde(default)]
        devices: Vec<u32>,
        /// How.
        kind: MirrorKind,
        /// Report progress until it has ended.
        #[serde(default)]
        follow: bool,
    },
    /// Pause mirrors; they keep their place. Answered by [`Outcome::Ok`].
    MirrorPause {
        /// The set.
        set: String,
        /// Which devices.
        #[serde(default)]
        devices: Vec<u32>,
    },
    /// Go on with paused mirrors. Answered like [`Request::MirrorStart`].
    MirrorResume {
        /// The set.
        set: String,
        /// Which devices.
        #[serde(default)]
        devices: Vec<u32>,
        /// Report progress until they have ended.
        #[serde(default)]
        follow: bool,
    },
    /// Give mirrors up; the devices need one again. Answered by [`Outcome::Ok`].
    MirrorStop {
        /// The set.
        set: String,
        /// Which devices.
        #[serde(default)]
        devices: Vec<u32>,
    },
    /// Compare source and target. Answered by [`Outcome::Verify`], without `follow` by
    /// [`Outcome::Started`].
    Verify {
        /// The set.
        set: String,
        /// Which devices.
        #[serde(default)]
        devices: Vec<u32>,
        /// Send again what differs.
        #[serde(default)]
        repair: bool,
        /// Report progress until it has ended.
        #[serde(default)]
        follow: bool,
    },
    /// Let the target give up the last consistent state of its volumes for this once, so that a resync or mirror needs
    /// no space beside them. Answered by [`Outcome::Ok`].
    ResyncInPlace {
        /// The set.
        set: String,
    },
    /// What verifications found, the newest entries. Answered by [`Outcome::VerifyLog`].
    VerifyLog {
        /// The set.
        set: String,
        /// Most entries.
        most: usize,
    },
    /// Wait until the target has applied everything written before the request. Answered by
    /// [`Outcome::Wait`], or [`FailureCode::TimedOut`].
    Wait {
        /// The set.
        set: String,
        /// Longest wait; none: no limit.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        timeout_ms: Option<u64>,
    },
    /// Show the bandwidth limit, or change it. Answered by [`Outcome::Bandwidth`], as it is afterwards.
    Bandwidth {
        /// The set.
        set: String,
        /// The change; none: only show it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        change: Option<BandwidthChange>,
    },
}

/// How a mirror finds what to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorKind {
    /// Everything.
    Full,
    /// What differs, by hash.
    Difference,
}

/// One line of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// More lines follow.
    Progress(Progress),
    /// The last line: it was done.
    Done(Outcome),
    /// The last line: it was not.
    Failed(Failure),
}

/// How far it is. Sent about twice a second, and when something has changed that matters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// The set.
    pub set: String,
    /// The devices that are worked on, for mirrors and verifications.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<DeviceProgress>,
    /// For [`Request::Wait`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait: Option<WaitProgress>,
    /// Why it does not go on just now, for people: "the target is not connected: ...".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stalled: Option<String>,
}

/// How far one device is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceProgress {
    /// The loop number.
    pub number: u32,
    /// The volume's label.
    #[serde(default)]
    pub label: String,
    /// What is being done.
    pub job: Job,
    /// How far.
    pub pass: Pass,
}

/// What works its way through a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Job {
    /// [`MirrorKind::Full`].
    FullMirror,
    /// [`MirrorKind::Difference`].
    DifferenceMirror,
    /// The blocks of the dirty map are sent.
    Resync,
    /// The regions that the intent map names are compared, after a crash.
    Recovery,
    /// Hashes are compared.
    Verify,
}

/// How far a pass over a device is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    /// Bytes looked at, of `total_bytes`.
    pub done_bytes: u64,
    /// Bytes to look at in all.
    pub total_bytes: u64,
    /// Payload bytes sent.
    #[serde(default)]
    pub sent_bytes: u64,
    /// Bytes that were found to differ.
    #[serde(default)]
    pub differing_bytes: u64,
    /// Time since it began, pauses left out.
    #[serde(default)]
    pub elapsed_ms: u64,
    /// Time left at the rate of the last seconds; none while that is unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_ms: Option<u64>,
    /// It has been paused.
    #[serde(default)]
    pub paused: bool,
}

/// How far a wait is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitProgress {
    /// Every record below has to be applied.
    pub seq: u64,
    /// Every record below is.
    pub applied_seq: u64,
}

/// What came of a request.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// There is nothing to report.
    Ok,
    /// The devices whose mirror or verification was started and goes on by itself.
    Started(Vec<u32>),
    /// Answer to [`Request::Status`].
    Status(Status),
    /// A mirror has ended on all its devices.
    Mirror(Vec<MirrorResult>),
    /// A verification has ended on all its devices.
    Verify(Vec<VerifyResult>),
    /// Answer to [`Request::VerifyLog`], oldest first.
    VerifyLog(Vec<VerifyEntry>),
    /// Answer to [`Request::Wait`].
    Wait(WaitResult),
    /// Answer to [`Request::Bandwidth`].
    Bandwidth(Bandwidth),
}

/// How a mirror ended on one device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorResult {
    /// The loop number.
    pub number: u32,
    /// The volume's label.
    #[serde(default)]
    pub label: String,
    /// The device is in sync.
    pub complete: bool,
    /// Otherwise why not: stopped by whom, which error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Its figures.
    pub pass: Pass,
}

/// What a verification of one device found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyResult {
    /// The loop number.
    pub number: u32,
    /// The volume's label.
    #[serde(default)]
    pub label: String,
    /// Everything was compared.
    pub complete: bool,
    /// Otherwise why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Bytes compared.
    pub compared_bytes: u64,
    /// Bytes of the blocks that differed.
    pub differing_bytes: u64,
    /// Of these, bytes that were sent again and applied.
    pub repaired_bytes: u64,
    /// The first differing extents, at most [`VerifyResult::EXTENTS_MAX`].
    #[serde(default)]
    pub extents: Vec<ByteRange>,
    /// Sequence number at which it began.
    pub from_seq: u64,
    /// Sequence number at which it ended.
    pub to_seq: u64,
    /// End of the verification, milliseconds since 1970-01-01 UTC.
    #[serde(default)]
    pub finished_unix_ms: u64,
    /// How long it took, pauses left out.
    #[serde(default)]
    pub elapsed_ms: u64,
}

impl VerifyResult {
    /// Most extents that are listed: a damaged disk has more, and they are all in the log.
    pub const EXTENTS_MAX: usize = 1000;

    /// True when all was compared and nothing differs any more.
    #[must_use]
    pub const fn is_identical(&self) -> bool {
        self.complete && self.differing_bytes == self.repaired_bytes
    }
}

/// A range of bytes of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByteRange {
    /// Its first byte.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
    /// Its first part was compared at this record.
    #[serde(default)]
    pub first_seq: u64,
    /// Its last part was compared at this record.
    #[serde(default)]
    pub last_seq: u64,
}

/// What happened in a verification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VerifyEvent {
    /// It began.
    Begins,
    /// A range differs.
    Differs,
    /// The range was sent again.
    Repaired,
    /// Compared again after the repair, the range is equal.
    Confirmed,
    /// It compared everything, and nothing differs any more.
    Identical,
    /// It compared everything, and something differs.
    EndsDifferent,
    /// It ended before its time.
    EndsEarly,
}

/// A line of the log of verifications.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyEntry {
    /// When, milliseconds since 1970-01-01 UTC.
    pub unix_ms: u64,
    /// Number of the job; 0 on the target, which does not know it.
    pub job: u64,
    /// What happened.
    pub event: VerifyEvent,
    /// The volume.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub label: String,
    /// First byte of the range.
    #[serde(default)]
    pub start: u64,
    /// Length of the range; at an end, bytes compared.
    #[serde(default)]
    pub bytes: u64,
    /// The record at which it was compared or sent.
    #[serde(default)]
    pub seq: u64,
    /// blake3 of the source's data at that record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// blake3 of the target's data at that record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub text: String,
}

impl VerifyEntry {
    /// An entry that says nothing more.
    #[must_use]
    pub const fn new(unix_ms: u64, job: u64, event: VerifyEvent) -> Self {
        Self {
            unix_ms,
            job,
            event,
            label: String::new(),
            start: 0,
            bytes: 0,
            seq: 0,
            source: None,
            target: None,
            text: String::new(),
        }
    }
}

/// Both sides went through the same sequence of records up to here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProofStatus {
    /// The last record.
    pub seq: u64,
    /// When that was found, milliseconds since 1970-01-01 UTC.
    pub unix_ms: u64,
    /// The chain is unbroken since this record.
    pub since_seq: u64,
}

/// When a set is verified by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifySchedule {
    /// For people: "every 1week, between 22:00 and 06:00".
    pub text: String,
    /// The interval is counted from here, milliseconds since 1970-01-01 UTC; 0: the plan has not been looked at.
    pub last_unix_ms: u64,
    /// It is under way.
    pub under_way: bool,
    /// It made way for something else and goes on later.
    pub suspended: bool,
}

/// Why a copy must be verified.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlarmStatus {
    /// Since when that is known, milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: u64,
    /// For people.
    pub text: String,
}

/// Answer to [`Request::Wait`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitResult {
    /// Every record below is applied on the target.
    pub seq: u64,
    /// How long it took.
    pub elapsed_ms: u64,
}

/// Answer to [`Request::Status`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// [`API_VERSION`](crate::API_VERSION).
    pub api_version: u32,
    /// The agent's version.
    pub agent_version: String,
    /// Its process id.
    pub pid: u32,
    /// Since when it runs, milliseconds since 1970-01-01 UTC.
    #[serde(default)]
    pub started_unix_ms: u64,
    /// The sets, by name.
    pub sets: Vec<SetStatus>,
}

/// A replication set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SetStatus {
    /// Its name.
    pub name: String,
    /// The target's address, as configured.
    pub target: String,
    /// The connection to it.
    pub connection: Connection,
    /// The stream's UUID, 32 hexadecimal digits; empty without a stream.
    #[serde(default)]
    pub stream_uuid: String,
    /// Next sequence number to be given.
    pub next_seq: u64,
    /// Every record below was given back to the kernel.
    pub released_seq: u64,
    /// Every record below has been sent on the present connection.
    #[serde(default)]
    pub sent_seq: u64,
    /// Every record below is durable on the target.
    pub durable_seq: u64,
    /// Every record below is applied on the target.
    pub applied_seq: u64,
    /// Payload bytes that are not durable on the target yet.
    pub backlog_bytes: u64,
    /// And the number of records.
    pub backlog_records: u64,
    /// Age of the oldest record that is not applied on the target; 0 with none.
    pub lag_ms: u64,
    /// Averages of the last seconds.
    #[serde(default)]
    pub rates: Rates,
    /// Totals since the agent began.
    #[serde(default)]
    pub totals: Totals,
    /// Bandwidth limit, compression, pace of mirror and resync.
    #[serde(default)]
    pub shaping: Shaping,
    /// Where records wait for the target.
    #[serde(default)]
    pub ladder: Ladder,
    /// The disk queue; none is configured without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<QueueStatus>,
    /// What the target keeps beside its volumes; none: nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staging: Option<StagingStatus>,
    /// Up to where both sides proved that they went through the same records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven: Option<ProofStatus>,
    /// When the set is verified by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verify_schedule: Option<VerifySchedule>,
    /// The devices, by loop number.
    pub devices: Vec<DeviceStatus>,
}

/// Where records wait for the target, and how it came to that.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ladder {
    /// Where.
    pub rung: Rung,
    /// Since when, milliseconds since 1970-01-01 UTC.
    pub since_unix_ms: u64,
    /// Why, for people.
    pub reason: String,
    /// The last steps of this agent, at most 32, oldest first.
    #[serde(default)]
    pub history: Vec<LadderStep>,
}

/// A rung of the ladder, the best first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rung {
    /// In the kernel's ring.
    #[default]
    Ring,
    /// In the disk queue, which is being emptied, and in the ring.
    Draining,
    /// They are moved from the ring into the disk queue.
    Spooling,
    /// The ring is full and no queue can take them: blocks are marked, and sent again later without their order.
    Tracking,
    /// A rung that this program does not know.
    #[serde(other)]
    Other,
}

impl Rung {
    /// In one word, for people.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Draining => "draining",
            Self::Spooling => "spooling",
            Self::Tracking => "tracking",
            Self::Other => "unknown",
        }
    }
}

/// A step of the ladder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LadderStep {
    /// When, milliseconds since 1970-01-01 UTC.
    pub at_unix_ms: u64,
    /// Before.
    pub from: Rung,
    /// From then on.
    pub to: Rung,
    /// Why, for people.
    pub reason: String,
}

/// The disk queue of a set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStatus {
    /// Where it is.
    pub dir: String,
    /// `usable`, `full`, `failing` or `refused`.
    pub state: String,
    /// Why it is not usable, for people; else empty.
    #[serde(default)]
    pub reason: String,
    /// Records in it that the target has not acknowledged.
    pub records: u64,
    /// Bytes of the batches that hold them.
    pub bytes: u64,
    /// Bytes that its segments take on disk.
    pub disk_bytes: u64,
    /// Most bytes it may take.
    pub size_bytes: u64,
    /// Bytes free on its file system.
    pub free_bytes: u64,
    /// Bytes that are to stay free there.
    pub min_free_bytes: u64,
    /// Age of the oldest record in it; none: it is empty, or that is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub oldest_ms: Option<u64>,
}

/// The target keeps changes beside its volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StagingStatus {
    /// `staged`: the volumes keep the last consistent state. `publishing`: the set is consistent again, and what was staged is
    /// being written into the volumes.
    pub phase: String,
    /// Bytes that are beside the volumes.
    pub staged_bytes: u64,
    /// While it is staged, the last record in the volumes.
    pub consistent_seq: u64,
    /// When that was made, milliseconds since 1970-01-01 UTC by the source's clock.
    pub consistent_unix_ms: u64,
}

/// Averages over the last seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Payload bytes captured.
    pub captured_bytes_per_s: u64,
    /// Records captured.
    pub captured_records_per_s: u64,
    /// Bytes sent, everything counted.
    pub sent_bytes_per_s: u64,
    /// Payload bytes that became durable on the target.
    pub acknowledged_bytes_per_s: u64,
}

/// Totals since the agent began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Records taken from the stream.
    pub records: u64,
    /// Their payload bytes.
    pub payload_bytes: u64,
    /// Bytes sent, everything counted.
    pub sent_bytes: u64,
    /// Connections made.
    pub connections: u64,
}

/// The connection to a target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum Connection {
    /// Records flow.
    Connected {
        /// For how long.
        #[serde(default)]
        since_ms: u64,
    },
    /// It is being made, or made again after a while.
    Connecting {
        /// Why there is none.
        reason: String,
        /// Time to the next attempt; 0: it is under way.
        #[serde(default)]
        retry_ms: u64,
    },
    /// The target refuses, and trying again is of no use before somebody acts.
    Refused {
        /// Why, and what to do.
        reason: String,
    },
    /// The set has no target, or no device.
    Idle {
        /// Which.
        reason: String,
    },
}

/// A device of a set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// Its id in the stream.
    pub device_id: u32,
    /// Its loop number.
    pub number: u32,
    /// The volume's label.
    pub label: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its state.
    pub state: DeviceState,
    /// Why it is in that state, for people; may be empty for `in-sync`.
    #[serde(default)]
    pub reason: String,
    /// Blocks in the dirty map.
    pub dirty_blocks: u64,
    /// And their length in bytes.
    pub dirty_bytes: u64,
    /// What the last verification found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_verify: Option<VerifyResult>,
    /// Why the copy must be verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alarm: Option<AlarmStatus>,
    /// What the last crash cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_recovery: Option<Recovery>,
}

/// What was compared and sent after a crash.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recovery {
    /// The volume's label.
    pub label: String,
    /// Why it was done.
    pub reason: String,
    /// It is complete.
    pub complete: bool,
    /// Regions of the intent map that were marked.
    pub regions: u64,
    /// Bytes compared.
    pub compared_bytes: u64,
    /// Blocks of [`Recovery::BLOCK_BYTES`] that differed.
    pub differing_blocks: u64,
    /// And their length in bytes.
    pub differing_bytes: u64,
    /// Bytes sent because they differed.
    pub sent_bytes: u64,
}

impl Recovery {
    /// Unit of the comparison in bytes.
    pub const BLOCK_BYTES: u64 = 128 << 10;
}

/// How the target's copy stands to the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum DeviceState {
    /// The target has no complete copy and none is being made.
    MirrorNeeded,
    /// A copy is being made.
    Mirroring {
        /// How.
        kind: MirrorKind,
        /// How far.
        pass: Pass,
    },
    /// The blocks of the dirty map are being sent.
    Resyncing {
        /// How far.
        pass: Pass,
    },
    /// The copy is the device at one point of its write order.
    InSync,
    /// Something was noticed, in `alarm`, for which the copy must be verified.
    VerifyNeeded {
        /// How far that is, if it is under way.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        pass: Option<Pass>,
    },
    /// In sync, while it is being compared.
    Verifying {
        /// How far.
        pass: Pass,
    },
    /// Changes were made out of the stream's order; the copy is complete again once they are
    /// sent.
    OrderLost {
        /// First sequence number concerned.
        from: u64,
        /// Last one.
        to: u64,
    },
    /// Something that does not heal by itself.
    Error,
}

impl DeviceState {
    /// The state in a word or two, for a table.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::MirrorNeeded => "mirror needed",
            Self::Mirroring { pass, .. } if pass.paused => "mirror paused",
            Self::Mirroring { .. } => "mirroring",
            Self::Resyncing { .. } => "resyncing",
            Self::InSync => "in sync",
            Self::VerifyNeeded { .. } => "verify needed",
            Self::Verifying { .. } => "verifying",
            Self::OrderLost { .. } => "order lost",
            Self::Error => "error",
        }
    }

    /// The pass that is under way.
    #[must_use]
    pub const fn pass(&self) -> Option<&Pass> {
        match self {
            Self::Mirroring { pass, .. } | Self::Resyncing { pass } | Self::Verifying { pass } => {
                Some(pass)
            }
            Self::VerifyNeeded { pass } => pass.as_ref(),
            _ => None,
        }
    }

    /// True when the copy is a state of the device at one point of its write order.
    #[must_use]
    pub const fn is_consistent(&self) -> bool {
        matches!(self, Self::InSync | Self::Verifying { .. })
    }
}

/// Why a request was not carried out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub code: FailureCode,
    /// For people: a sentence that says what to do next.
    pub message: String,
}

impl Failure {
    /// Puts a failure together.
    pub fn new(code: FailureCode, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }
}

/// Why, for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum FailureCode {
    /// The request cannot be read.
    BadRequest,
    /// There is no such set.
    UnknownSet,
    /// The set has no such device.
    UnknownDevice,
    /// Something else is under way on the device.
    Busy,
    /// There is nothing to pause, resume or stop.
    NothingToDo,
    /// The target is not connected and the request cannot wait for it.
    NotConnected,
    /// The target refused.
    TargetRefused,
    /// The time given is over.
    TimedOut,
    /// The agent is being stopped.
    ShuttingDown,
    /// The agent cannot do that.
    Unsupported,
    /// Something went wrong.
    Internal,
    /// A code that this program does not know.
    #[serde(other)]
    Other,
}
