// SPDX-License-Identifier: GPL-2.0-only

//! What every story about a fault begins and ends with: a mirrored device under a load of stamped writes, then the end:
//! the load had no error that it should not have had and no write took too long, both sides are identical, and it is
//! known what was read again to get there.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dtloop_tests::{Disk, Job, Output, note, patience, wait_until};
use serde_json::Value;

use crate::replication_rig::{DEV, IMAGE, Rig};

/// Longest write or flush that a fault may cost: well above what an emulated machine among others takes, and below all
/// time-outs of the daemons, of which the shortest that could hold a writer up is 15 s.
const STALL_MAX: Duration = Duration::from_secs(10);

/// What a load is like, in words of `dtstamp`: several writers all over the device, so slow that the ring carries it
/// through an outage.
const STEADY: &str = "--overlap --most 32768 --per-second 100";

/// One writer, each of whose writes begins when the one before has ended: what it wrote can be told without its log.
const SINGLE: &str = "--threads 1 --most 32768 --flush 60";

/// What had to be looked at and sent again after a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Resend {
    /// No more than the records that were on their way.
    Nothing,
    /// What was not known to be on the target, after so many losses of the stream.
    Compared {
        /// Losses.
        times: u64,
    },
}

/// A mirrored device, and what happens to it.
pub(crate) struct Story {
    pub(crate) rig: Rig,
    /// Number of the last load; stamps of earlier ones are what was there in the beginning.
    generation: u64,
    /// Size of the device in bytes.
    bytes: u64,
    /// What the module had read for mirrors when the fault began; 0 after it was loaded anew.
    read_before: u64,
    slowest_ms: u64,
}

impl Story {
    /// On one machine, mirrored.
    pub(crate) fn alone(mib: u64, attach_options: &str) -> Result<Self> {
        let rig = Rig::alone(mib)?;
        rig.begin(attach_options)?;
        Self::of(rig, mib)
    }

    /// On two machines, mirrored.
    pub(crate) fn pair(mib: u64, attach_options: &str) -> Result<Self> {
        Self::pair_with(Disk::new("disk", mib), mib, attach_options)
    }

    /// On two machines, with this disk, mirrored.
    pub(crate) fn pair_with(disk: Disk, mib: u64, attach_options: &str) -> Result<Self> {
        let rig = Rig::pair_with(disk, mib)?;
        rig.begin(attach_options)?;
        Self::of(rig, mib)
    }

    /// About a rig whose device is mirrored.
    pub(crate) fn of(rig: Rig, mib: u64) -> Result<Self> {
        // Configuration and logs survive power cuts.
        rig.source().sh("sync")?;
        rig.target().sh("sync")?;
        let read_before = rig.counter("sync_sectors")? * 512;
        Ok(Self {
            rig,
            generation: 0,
            bytes: mib << 20,
            read_before,
            slowest_ms: 0,
        })
    }

    // Load.

    /// Starts several writers, and waits until they write.
    pub(crate) fn load(&mut self) -> Result<Job> {
        self.load_with(STEADY)
    }

    /// Starts one writer of which [`Story::holds_a_prefix`] knows what it writes.
    pub(crate) fn single_load(&mut self, per_second: u32) -> Result<Job> {
        self.load_with(&format!("{SINGLE} --per-second {per_second}"))
    }

    /// Starts a load of this kind.
    pub(crate) fn load_with(&mut self, options: &str) -> Result<Job> {
        self.generation += 1;
        let generation = self.generation;
        let before = self.written()?;
        let mut load = self.rig.source().spawn(format!(
            "exec dtstamp write {DEV} --generation {generation} --seed {generation} {options}"
        ))?;
        let began = wait_until("the load", patience(20), || {
            Ok(!load.is_running() || self.written()? > before + 10)
        });
        if began.is_err() || !load.is_running() {
            bail!("the load does not write: {}", load.wait(patience(1))?);
        }
        Ok(load)
    }

    /// Ends a load, which must have gone on until now without an error.
    pub(crate) fn end_load(&mut self, load: Job) -> Result<()> {
        let report = self.end_load_with_errors(load)?;
        ensure!(report["errors"] == 0, "the load had errors: {report}");
        Ok(())
    }

    /// Ends a load that went on through errors; gives its report.
    pub(crate) fn end_load_with_errors(&mut self, mut load: Job) -> Result<Value> {
        if !load.is_running() {
            bail!(
                "the load has ended by itself: {}",
                load.wait(Duration::ZERO)?
            );
        }
        load.kill(15)?;
        let text = load.finish(patience(30))?;
        let report: Value =
            serde_json::from_str(&text).with_context(|| format!("no report: {text}"))?;
        let slowest = report["slowest_ms"].as_u64().context("no slowest write")?;
        ensure!(
            u128::from(slowest) <= STALL_MAX.as_millis(),
            "a write took {slowest} ms: {report}"
        );
        self.slowest_ms = self.slowest_ms.max(slowest);
        Ok(report)
    }

    /// Waits until the load has written so much more.
    pub(crate) fn wait_writes(&self, more: u64) -> Result<()> {
        let goal = self.written()? + more;
        wait_until("writes", patience(60), || Ok(self.written()? >= goal))
    }

    /// Writes so far, captured or tracked.
    fn written(&self) -> Result<u64> {
        Ok(self.rig.counter("writes")? + self.rig.counter("tracked")?)
    }

    // What the target holds.

    /// Fails unless the copy, which nobody writes just now, is a prefix of what [`Story::single_load`] wrote.
    pub(crate) fn holds_a_prefix(&self) -> Result<()> {
        let generation = self.generation;
        let checked: Output = self.rig.target().try_sh_within(
            patience(60),
            format!("dtstamp check {IMAGE} --predict --generation {generation} --seed {generation} {SINGLE}"),
        )?;
        ensure!(checked.ok(), "generation {generation}: {checked}");
        note(format!("the copy is a prefix: {}", checked.text()));
        Ok(())
    }

    /// The module was loaded anew, and counts from 0.
    pub(crate) const fn counts_anew(&mut self) {
        self.read_before = 0;
    }

    /// Waits until both sides are known to be identical and are, and looks at what that took.
    pub(crate) fn settles(&mut self, resend: Resend) -> Result<()> {
        self.rig.wait_state("in-sync")?;
        self.rig.same()?;
        let read = self.rig.counter("sync_sectors")? * 512;
        let looked_at = read - self.read_before;
        self.read_before = read;
        let set = self.rig.set()?;
        let sent = set["totals"]["sent_bytes"].as_u64().context("no total")?;
        note(format!(
            "identical; longest write {} ms, {} KiB of {} KiB read again, {} KiB sent since the agent began",
            self.slowest_ms,
            looked_at >> 10,
            self.bytes >> 10,
            sent >> 10,
        ));
        self.check_resent(resend, looked_at, sent)
    }

    /// The one place that says how much may be read again.
    fn check_resent(&self, resend: Resend, looked_at: u64, sent: u64) -> Result<()> {
        let most = match resend {
            Resend::Nothing => 0,
            // A difference mirror reads all, and again what differs and is sent. With the write-intent map it will be the
            // marked regions.
            Resend::Compared { times } => times * self.bytes + sent,
        };
        if looked_at > most {
            bail!(
                "{looked_at} bytes were read again, at most {most} should be: {}",
                self.rig.agent_log()?
            );
        }
        Ok(())
    }

    /// The story's end: identical, quiet kernels, nothing left.
    pub(crate) fn finish(mut self, resend: Resend) -> Result<()> {
        self.settles(resend)?;
        self.rig.finish()
    }
}
