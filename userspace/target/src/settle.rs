// SPDX-License-Identifier: GPL-2.0-only

//! `dttarget volume settle`: the last consistent state of a set is brought into its volumes, which can then be used here, for
//! example when the source is lost.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dtloop_core::set::{Consistent, Phase, SetState};
use dtloop_disk::RealDisk;
use dtloop_proto::Code;
use dtloop_store as state_file;

use crate::applier::{Applier, Parts, Pause, Saved, Settings, moments_of};
use crate::catalog::Catalog;
use crate::clock::RealClock;
use crate::config::Config;
use crate::replica::set_dir;
use crate::server::lock_state_dir;

/// How often something that fails is tried again.
const TRIES: u32 = 3;

/// Pause before it is.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What came of it.
pub struct Settled {
    /// The set.
    pub set: String,
    /// What each of its volumes holds; none: it never was consistent.
    pub volumes: BTreeMap<String, Option<Consistent>>,
    /// Changes that are not in the volumes, as they belong to no consistent state.
    pub left_out: bool,
}

/// Settles the set of a volume. `discard_staged`: without reading what is staged, or the journal.
///
/// # Errors
///
/// If dttarget is running, or a disk fails.
pub fn settle(config: &Config, name: &str, discard_staged: bool) -> Result<Settled> {
    let _lock = lock_state_dir(&config.state_dir)?;
    let catalog = Arc::new(Catalog::new(&config.state_dir, config.volumes.clone()));
    let Some(owner) = catalog.owner(name)? else {
        bail!("Volume \"{name}\" belongs to nobody; there is nothing to settle")
    };
    if owner.released {
        bail!("Volume \"{name}\" is settled already");
    }
    let dir = set_dir(&config.state_dir, owner.source_id, &owner.set);
    let settled = if discard_staged {
        without_staged(&dir, &owner.set)?
    } else {
        let parts = Parts {
            disk: Arc::new(RealDisk),
            clock: Arc::new(RealClock::default()),
            catalog: Arc::clone(&catalog),
            outlet: Arc::default(),
            horizon: Arc::default(),
            flags: Arc::default(),
        };
        let settings = Settings {
            checkpoint_bytes: config.journal.size.0 / 4,
            staging: config.staging.clone(),
            threads: 1,
        };
        let mut applier = Applier::load(parts, settings, &dir, owner.source_id, &owner.set)?;
        applier.open_volumes();
        refuse_others(applier.state())?;
        patiently(|| applier.replay())?;
        finish(&mut applier)?
    };
    for label in settled.volumes.keys() {
        catalog
            .release(label)
            .with_context(|| format!("Cannot release volume \"{label}\""))?;
    }
    Ok(settled)
}

/// What is not the volume that was left must not get the end of its journal.
fn refuse_others(state: &SetState) -> Result<()> {
    let not_ours = [Code::VOLUME_REPLACED.0, Code::VOLUME_CHANGED.0];
    let mut refused = state.volumes.values().filter_map(|v| v.refused.as_ref());
    if let Some((_, text)) = refused.find(|(code, _)| not_ours.contains(code)) {
        bail!("{text}. Nothing was changed");
    }
    Ok(())
}

/// Makes a call until it succeeds. The first fdatasync may tell of writes that failed long ago, under another process: what has
/// to be written again is written again then, and the next one tells the truth.
fn patiently<T>(mut call: impl FnMut() -> Result<T, Pause>) -> Result<T> {
    let mut left = TRIES;
    loop {
        match call() {
            Ok(value) => return Ok(value),
            Err(Pause::Again) => {}
            Err(Pause::Blocked(complaint)) if left > 0 => {
                tracing::warn!("{}.", complaint.text);
                left -= 1;
                dtloop_runtime::sleep(RETRY_AFTER);
            }
            Err(Pause::Blocked(complaint)) => bail!("{}", complaint.text),
            Err(Pause::Fatal(error)) => return Err(error.into()),
        }
    }
}

fn finish(applier: &mut Applier) -> Result<Settled> {
    let stage = applier.state().stage.as_ref();
    let left_out = stage.is_some_and(|stage| stage.phase == Phase::Staged)
        && !applier.state().is_publishable();
    let volumes = patiently(|| applier.settle())?;
    Ok(Settled {
        set: applier.state().set.clone(),
        volumes,
        left_out,
    })
}

/// The volumes hold the last consistent state as they are. Nothing may be replayed into them.
fn without_staged(dir: &std::path::Path, set: &str) -> Result<Settled> {
    let path = dir.join("state");
    let saved = state_file::load::<Saved>(&path)?;
    let mut saved = saved.with_context(|| format!("Set \"{set}\" has no state"))?;
    let stage = saved.state.stage.as_ref();
    if stage.is_none_or(|stage| stage.phase != Phase::Staged) {
        bail!("Nothing is staged for set \"{set}\" that its volumes could do without");
    }
    saved.state.release();
    let volumes = moments_of(&saved.state);
    state_file::store(&path, &saved)?;
    Ok(Settled {
        set: set.to_owned(),
        volumes,
        left_out: true,
    })
}

/// A time as people write it, in UTC, from nanoseconds since 1970.
#[must_use]
pub fn utc(time_ns: u64) -> String {
    let seconds = time_ns / 1_000_000_000;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since 0000-03-01, in eras of 400 years: H. Hinnant, "chrono-compatible low-level date algorithms".
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_people_do() {
        let of = |seconds: u64| utc(seconds * 1_000_000_000);
        assert_eq!(of(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(of(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(of(1_735_689_599), "2024-12-31 23:59:59 UTC");
    }
}
