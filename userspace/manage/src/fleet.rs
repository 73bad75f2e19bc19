// SPDX-License-Identifier: GPL-2.0-only

//! Attaching and detaching all entries.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use dtloop_abi::{Control, Throttle};
use nix::mount::{MntFlags, umount2};

use crate::attach::{LoopNumber, Wanted, attach};
use crate::detach::{Left, detach};
use crate::entries::check::{Seen, check, look};
use crate::entries::numbers::Numbers;
use crate::entries::options::Options;
use crate::entries::text::{Lines, Placed};
use crate::entries::{Entry, Finding, Severity};
use crate::preflight::Refusals;
use crate::system::System;
use crate::{Manager, crypt, loop_path};

/// How often is looked for a disk that is not there yet.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// What became of an entry that was to be attached.
#[derive(Debug)]
pub enum Attached {
    /// It is attached now.
    Now {
        /// The loop number.
        number: u32,
        /// `auto`: the number that it had before, and could not keep.
        before: Option<u32>,
    },
    /// It was attached already.
    Already(u32),
    /// It has `noauto`.
    NotWanted,
    /// Its disk is not there.
    Missing(String),
    /// It was not attached.
    Failed(anyhow::Error),
}

/// What became of an entry that was to be detached.
#[derive(Debug)]
pub enum Detached {
    /// It is detached now.
    Now {
        /// The loop number that it had.
        number: u32,
        /// Where it was mounted until now.
        unmounted: Vec<String>,
        /// What became of its set.
        left: Left,
    },
    /// It was not attached.
    NotAttached,
    /// It is attached still.
    Failed(anyhow::Error),
}

/// The entries and where their numbers are remembered.
#[derive(Clone, Debug)]
pub struct Fleet<'a> {
    /// What changes devices.
    pub manager: &'a Manager,
    /// The entries.
    pub lines: &'a Lines,
    /// See [`crate::entries::numbers`].
    pub numbers: PathBuf,
}

impl Fleet<'_> {
    /// Attaches every entry that is not attached, and with `no_auto` also those that have that option. Disks that are not
    /// there yet are waited for so long; the others do not wait for them. Tells of each entry as soon as it is known what
    /// became of it.
    ///
    /// # Errors
    ///
    /// Those of the module, before anything has been done.
    pub fn attach(
        &self,
        control: &Control,
        wait: Duration,
        no_auto: bool,
        mut told: impl FnMut(&Placed, Attached) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let deadline = Instant::now() + wait;
        let mut numbers = Numbers::read(&self.numbers);
        let mut waiting = self.lines.entries().0;
        loop {
            let attached = Manager::attached(control)?;
            let is_last = Instant::now() >= deadline;
            let mut missing = Vec::new();
            for seen in look(&self.manager.system, &waiting, &attached) {
                let options = &seen.placed.entry.options;
                let outcome = match (&seen.device, seen.attached) {
                    _ if options.no_auto && !no_auto => Attached::NotWanted,
                    (_, Some(number)) => Attached::Already(number),
                    (Err(_), None) if !is_last => {
                        missing.push(seen.placed);
                        continue;
                    }
                    (Err(reason), None) => Attached::Missing(reason.clone()),
                    (Ok(_), None) => self
                        .attach_one(control, &seen, &mut numbers)
                        .unwrap_or_else(Attached::Failed),
                };
                told(&seen.placed, outcome)?;
            }
            if missing.is_empty() {
                return Ok(());
            }
            waiting = missing;
            thread::sleep(LOOK_EVERY);
        }
    }

    fn attach_one(
        &self,
        control: &Control,
        seen: &Seen,
        numbers: &mut Numbers,
    ) -> anyhow::Result<Attached> {
        let entry = &seen.placed.entry;
        self.refuse_what_is_wrong(control, &seen.placed)?;
        let mut wanted = wanted(entry);
        self.set_options(control, &mut wanted)?;
        let before = numbers.of(entry);
        if let (LoopNumber::Auto, Some(number)) = (entry.number, before) {
            wanted.number = LoopNumber::Pinned(number);
        }
        if let Some(encryption) = &entry.options.encryption {
            wanted.device = crypt::open(entry, encryption)?;
        }
        let mut result = attach(self.manager, control, &wanted);
        // The number is somebody else's by now: any other is better than none.
        let is_refused = |error: &anyhow::Error| error.is::<Refusals>();
        if entry.number == LoopNumber::Auto
            && before.is_some()
            && result.as_ref().is_err_and(is_refused)
        {
            wanted.number = LoopNumber::Auto;
            result = attach(self.manager, control, &wanted);
        }
        let done = match result {
            Ok(done) => done,
            Err(error) => {
                if entry.options.encryption.is_some() {
                    if let Err(error) = crypt::close(entry) {
                        self.manager.note(&format!("{error:#}"));
                    }
                }
                return Err(error);
            }
        };
        let number = done.attached.number;
        self.policy(control, entry, done.stream_id)?;
        if let Err(error) = numbers.note(entry, number) {
            self.manager.note(&format!(
                "{} may get another number next time: {} cannot be written: {error}",
                loop_path(number),
                self.numbers.display()
            ));
        }
        Ok(Attached::Now {
            number,
            before: before.filter(|before| entry.number == LoopNumber::Auto && *before != number),
        })
    }

    /// The same as `dtloop config check` says, of this entry, at this moment.
    fn refuse_what_is_wrong(
        &self,
        control: &Control,
        placed: &Placed,
    ) -> Result<(), anyhow::Error> {
        let attached = Manager::attached(control)?;
        let wrong =
            |finding: &Finding| finding.line == placed.line && finding.severity == Severity::Error;
        let found = check(self.manager, self.lines, &attached);
        let reasons: Vec<_> = found
            .into_iter()
            .filter(wrong)
            .map(|finding| finding.message)
            .collect();
        if reasons.is_empty() {
            return Ok(());
        }
        let what = format!("line {}", placed.line);
        Err(Refusals { what, reasons }.into())
    }

    /// A set that is made gets what any of its entries says about it; one that is there keeps what can not be changed.
    fn set_options(&self, control: &Control, wanted: &mut Wanted) -> anyhow::Result<()> {
        let exists = control.stream_by_name(wanted.set.as_str())?.is_some();
        let of_set = self.options_of(wanted.set.as_str());
        wanted.ring_size = of_set.ring_size.filter(|_| !exists);
        wanted.intent = of_set.intent.filter(|_| !exists);
        wanted.region_size = of_set.region_size.filter(|_| !exists);
        wanted.hot_regions = of_set.hot_regions.filter(|_| !exists);
        // See `policy`.
        wanted.policy = None;
        Ok(())
    }

    /// What the entries of a set say about it together.
    fn options_of(&self, set: &str) -> Options {
        let mut options = Options::default();
        let entries = self.lines.entries().0;
        for other in entries.iter().map(|placed| &placed.entry.options) {
            if other.set_name().as_str() != set {
                continue;
            }
            let o = other.clone();
            options.ring_size = options.ring_size.or(o.ring_size);
            options.policy = options.policy.or(o.policy);
            options.throttle_start = options.throttle_start.or(o.throttle_start);
            options.throttle_stop = options.throttle_stop.or(o.throttle_stop);
            options.throttle_delay = options.throttle_delay.or(o.throttle_delay);
            options.intent = options.intent.or(o.intent);
            options.region_size = options.region_size.or(o.region_size);
            options.hot_regions = options.hot_regions.or(o.hot_regions);
        }
        options
    }

    /// The policy can be changed at any time.
    fn policy(&self, control: &Control, entry: &Entry, stream_id: u32) -> anyhow::Result<()> {
        let set = entry.options.set_name();
        let options = self.options_of(set.as_str());
        let Some(policy) = options.policy else {
            return Ok(());
        };
        let throttle = Throttle {
            start_percent: options.throttle_start.unwrap_or(0),
            stop_percent: options.throttle_stop.unwrap_or(0),
            delay_ms: options.throttle_delay.unwrap_or(0),
        };
        control
            .set_policy(stream_id, policy.to_raw(), throttle)
            .with_context(|| format!("set {set}: its policy was not set"))
    }

    /// Detaches every entry that is attached, the last one first; with `unmount`, file systems on them are unmounted before. Tells of each
    /// entry as soon as it is known what became of it.
    ///
    /// # Errors
    ///
    /// Those of the module, before anything has been done.
    pub fn detach(
        &self,
        control: &Control,
        unmount: bool,
        mut told: impl FnMut(&Placed, Detached) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let entries = self.lines.entries().0;
        let attached = Manager::attached(control)?;
        for seen in look(&self.manager.system, &entries, &attached)
            .into_iter()
            .rev()
        {
            let outcome = match seen.attached {
                None => Detached::NotAttached,
                Some(number) => self
                    .detach_one(control, &seen.placed.entry, number, unmount)
                    .unwrap_or_else(Detached::Failed),
            };
            told(&seen.placed, outcome)?;
        }
        Ok(())
    }

    fn detach_one(
        &self,
        control: &Control,
        entry: &Entry,
        number: u32,
        unmount: bool,
    ) -> anyhow::Result<Detached> {
        let unmounted = if unmount {
            unmount_all(&self.manager.system, number)?
        } else {
            Vec::new()
        };
        let (_, left) = detach(self.manager, control, &number.to_string(), false, false)?;
        if entry.options.encryption.is_some() {
            crypt::close(entry)?;
        }
        Ok(Detached::Now {
            number,
            unmounted,
            left,
        })
    }
}

/// Unmounts what is mounted of a loop device and its partitions, the last mount first. One that is in use stays, and all below it.
fn unmount_all(system: &System, number: u32) -> anyhow::Result<Vec<String>> {
    let mut unmounted = Vec::new();
    let disk = system.block(&format!("loop{number}"));
    let partitions = disk.iter().flat_map(|disk| disk.partitions.iter());
    let names = disk.iter().map(|disk| &disk.name).chain(partitions);
    let uses = system.uses();
    for name in names {
        let Some(dev) = system.block(name).and_then(|device| device.number) else {
            continue;
        };
        for place in uses.mounts(dev).iter().rev() {
            umount2(Path::new(place), MntFlags::UMOUNT_NOFOLLOW).map_err(|errno| {
                let users = system.users_of_mount(place);
                let who = if users.is_empty() {
                    errno.desc().to_owned()
                } else {
                    format!("in use by {}", users.join(", "))
                };
                Refusals::one(
                    loop_path(number),
                    format!("{place} was not unmounted: {who}; stop that first"),
                )
            })?;
            unmounted.push(place.clone());
        }
    }
    Ok(unmounted)
}

/// How an entry is attached.
#[must_use]
pub fn wanted(entry: &Entry) -> Wanted {
    let options = &entry.options;
    Wanted {
        device: entry.device.path(),
        number: entry.number,
        set: options.set_name(),
        offset: options.offset,
        size_limit: options.size_limit,
        read_only: options.read_only,
        partscan: options.partscan,
        ring_size: options.ring_size,
        policy: options.policy,
        volume: options.volume,
        intent: options.intent.clone(),
        region_size: options.region_size,
        hot_regions: options.hot_regions,
        allow_signature: options.allow_signature,
    }
}
