// SPDX-License-Identifier: GPL-2.0-only

//! What this program may still open once it serves, by Landlock: its state directory, its configuration to read, its volumes,
//! and what the kernel says of block devices. It may also not connect to anything. Whoever takes the program over from the
//! network gets no more than that, whichever user it runs as.
//!
//! A rule belongs to the file that is there when the program starts, not to its name. So an image is made before, and a volume
//! that is replaced later (a disk that went and came back, a file system mounted over it) needs a restart, which the
//! refusal says.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetStatus, Scope,
};

use crate::config::Config;
use crate::volume::Volume;

/// The newest set of rights asked for; an older kernel gives those it has.
const RIGHTS: ABI = ABI::V6;

static CONFINED: AtomicBool = AtomicBool::new(false);

/// Whether this process is confined.
#[must_use]
pub fn is_confined() -> bool {
    CONFINED.load(Ordering::Relaxed)
}

fn read() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::ReadDir
}

fn volume() -> BitFlags<AccessFs> {
    AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev
}

fn state() -> BitFlags<AccessFs> {
    let files = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::Truncate;
    let names = AccessFs::MakeReg | AccessFs::MakeDir | AccessFs::RemoveFile | AccessFs::RemoveDir;
    files | names | AccessFs::ReadDir | AccessFs::Refer
}

/// What may be opened, and how.
fn allowed(config: &Config, config_path: &Path) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let mut allowed = vec![
        (config.state_dir.clone(), state()),
        ("/sys".into(), read()),
        ("/dev/urandom".into(), AccessFs::ReadFile.into()),
    ];
    if let Some(dir) = config_path.parent() {
        allowed.push((dir.to_owned(), read()));
    }
    if let Some(dir) = &config.staging.dir {
        allowed.push((dir.clone(), state()));
    }
    let volumes = config.volumes.iter();
    allowed.extend(volumes.map(|item| (item.path.clone(), volume())));
    allowed
}

/// What is to be made is made now: there can be no rule for what is not there.
fn make_missing(config: &Config) {
    if let Some(dir) = &config.staging.dir {
        // Its absence is told below.
        let _ = std::fs::create_dir_all(dir);
    }
    for item in config.volumes.iter().filter(|item| item.size.is_some()) {
        if std::fs::metadata(&item.path).is_err() {
            if let Err(refusal) = Volume::open(item) {
                tracing::warn!("{refusal}.");
            }
        }
    }
}

fn add(rules: RulesetCreated, path: &Path, access: BitFlags<AccessFs>) -> Result<RulesetCreated> {
    match PathFd::new(path) {
        Ok(file) => Ok(rules.add_rule(PathBeneath::new(file, access))?),
        Err(error) => {
            tracing::warn!(
                "{} cannot be opened until dttarget is started again: {error}.",
                path.display()
            );
            Ok(rules)
        }
    }
}

/// Confines this thread and those that it will start. There must be no others.
///
/// # Errors
///
/// If the kernel refuses a rule, which it has no reason for.
pub fn confine(config: &Config, config_path: &Path) -> Result<()> {
    make_missing(config);
    let apply = || -> Result<RulesetStatus> {
        let mut rules = Ruleset::default()
            .handle_access(AccessFs::from_all(RIGHTS))?
            .handle_access(AccessNet::from_all(RIGHTS))?
            .scope(Scope::from_all(RIGHTS))?
            .create()?;
        for (path, access) in allowed(config, config_path) {
            rules = add(rules, &path, access)?;
        }
        Ok(rules.restrict_self()?.ruleset)
    };
    match apply().context("This process cannot be confined")? {
        RulesetStatus::FullyEnforced => {
            tracing::info!("Only the state directory and the volumes can be opened from now on.");
        }
        RulesetStatus::PartiallyEnforced => tracing::info!(
            "Only the state directory and the volumes can be opened from now on; a newer kernel would confine more."
        ),
        RulesetStatus::NotEnforced => {
            tracing::warn!(
                "This kernel has no Landlock: dttarget can open whatever its user can. Run it as a user of its own."
            );
            return Ok(());
        }
    }
    CONFINED.store(true, Ordering::Relaxed);
    Ok(())
}
