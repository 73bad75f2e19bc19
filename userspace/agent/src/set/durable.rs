// SPDX-License-Identifier: GPL-2.0-only

//! Up to which record the disks behind the devices hold everything, past their own caches.
//!
//! A mark of the intent map may go when source and target hold the same. The target has a change durably when it
//! acknowledges it; the source's disk may have it in a volatile cache for as long as nobody flushes. If such a disk loses its
//! power, it holds the older data, and nothing but the mark would tell. So the kernel hears of an acknowledgement only when
//! the disks were flushed behind it:
//!
//! ```text
//!   record n complete on the disk --> acknowledged --> flush of all disks begins --> ends --> marks up to n may go
//! ```
//!
//! Disks are flushed by a thread of its own, so that one that hangs holds up nothing. One that cannot be flushed keeps its
//! marks, at the worst all of them.

use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::{Duration, Instant};

use dtloop_abi::{BackingBlocks, CaptureStream, raw};
use dtloop_canary::Canary;

use super::Worker;

/// How often disks are flushed while something is written: as often as a journaling file system commits, and a fraction of the time that
/// a region must be at rest before its mark goes.
const FLUSH_EVERY: Duration = Duration::from_secs(5);

/// What a flush of all disks came to: why one could not be.
type Outcome = Result<(), String>;

/// The disk behind a device.
struct Disk {
    name: String,
    blocks: Box<dyn BackingBlocks>,
}

/// See the module documentation.
pub(super) struct Flushes {
    /// What is being flushed: everything below this record, and the answer.
    running: Option<(u64, Receiver<Outcome>)>,
    /// Everything below this record was.
    below: u64,
    next_at: Instant,
    /// The last failure, which is said once.
    said: Option<String>,
}

impl Flushes {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            running: None,
            below: 0,
            next_at: now,
            said: None,
        }
    }
}

/// Flushes disks beside.
fn flush_beside(disks: Vec<Disk>) -> Option<Receiver<Outcome>> {
    let (answer, answered) = channel();
    let flush = move || {
        let failed = disks.iter().find_map(|disk| {
            let error = disk.blocks.settle().err()?;
            Some(format!("{} cannot be flushed: {error}", disk.name))
        });
        // The set's thread may be gone.
        let _ = dtloop_runtime::post(&answer, failed.map_or(Ok(()), Err));
    };
    dtloop_runtime::spawn("flush", flush)
        .is_ok()
        .then_some(answered)
}

impl Worker {
    /// Another stream numbers its records anew.
    pub(super) fn forget_flushes(&mut self) {
        self.flushes = Flushes::new(dtloop_runtime::now());
    }

    /// Below which record both sides have everything durably, given that the target has it below `acked`. Has the disks
    /// flushed when that is not enough.
    pub(super) fn durable_below(&mut self, stream: &dyn CaptureStream, acked: u64) -> u64 {
        if dtloop_canary::bites(Canary::MarksGoUnflushed) {
            return acked;
        }
        self.take_flush();
        let now = dtloop_runtime::now();
        let wanted = acked > self.flushes.below;
        if wanted && self.flushes.running.is_none() && now >= self.flushes.next_at {
            self.flushes.next_at = now + FLUSH_EVERY;
            match self.disks(stream) {
                Ok(disks) => {
                    self.flushes.running = flush_beside(disks).map(|answer| (acked, answer));
                }
                Err(reason) => self.note_flush_failure(reason),
            }
        }
        acked.min(self.flushes.below)
    }

    fn take_flush(&mut self) {
        let Some((below, answer)) = &self.flushes.running else {
            return;
        };
        let (below, outcome) = match answer.try_recv() {
            Ok(outcome) => (*below, outcome),
            Err(TryRecvError::Empty) => return,
            Err(TryRecvError::Disconnected) => (*below, Err("no disk was flushed".to_owned())),
        };
        self.flushes.running = None;
        match outcome {
            Ok(()) => {
                self.flushes.below = self.flushes.below.max(below);
                self.flushes.said = None;
            }
            Err(reason) => self.note_flush_failure(reason),
        }
    }

    /// The disks behind all devices.
    fn disks(&self, stream: &dyn CaptureStream) -> Result<Vec<Disk>, String> {
        let disk = |device: &raw::DeviceStatus| {
            let name = device.backing_name().to_owned();
            match stream.backing(device) {
                Some(blocks) => Ok(Disk { name, blocks }),
                None => Err(format!("{name} cannot be opened")),
            }
        };
        self.devices.iter().map(disk).collect()
    }

    fn note_flush_failure(&mut self, reason: String) {
        if self.flushes.said.as_ref() == Some(&reason) {
            return;
        }
        tracing::warn!(
            "Set \"{}\": {reason}. Regions that were written to stay marked, so that a crash costs more to make good.",
            self.config.name
        );
        self.flushes.said = Some(reason);
    }
}
