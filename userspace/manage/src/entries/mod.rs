// SPDX-License-Identifier: GPL-2.0-only

//! `/etc/DT/dtloop_devices`: the devices that are attached when the machine starts.
//!
//! ```text
//! # block device                     loop device   options
//! /dev/disk/by-id/virtio-pgdata      /dev/loop1    set=db,volume=pgdata
//! PARTUUID=5a1c0e6f-02               auto          offset=1M,ro
//! ```
//!
//! - [`text`]: lines and what they say; an edit leaves all other bytes as they are.
//! - [`options`]: the third field.
//! - [`name`]: how a device is named, which device that is today, and a name that stays.
//! - [`file`]: reading and replacing the file.
//! - [`check`]: what is wrong with the entries on this machine.
//! - [`numbers`]: which loop number an entry had last.

pub mod check;
pub mod file;
mod fstab;
pub mod name;
pub mod numbers;
pub mod options;
pub mod text;

use std::fmt;
use std::path::Path;

use dtloop_abi::raw;

use crate::Manager;
use crate::attach::{LoopNumber, loop_number};
use crate::preflight::Refusals;
use crate::system::System;
use name::DeviceName;
use options::Options;
use text::{Lines, Placed};

/// Where the entries are.
pub const ENTRIES_PATH: &str = "/etc/DT/dtloop_devices";

/// One device to attach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The block device.
    pub device: DeviceName,
    /// The loop device.
    pub number: LoopNumber,
    /// How.
    pub options: Options,
}

impl fmt::Display for Entry {
    /// As a line of the file, without its end.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let device = text::escape(&self.device.to_string());
        let options = self.options.to_string();
        write!(f, "{device}\t{}", self.number)?;
        if !options.is_empty() {
            write!(f, "\t{options}")?;
        }
        Ok(())
    }
}

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The entry can be used.
    Warning,
    /// It cannot.
    Error,
}

/// Something to be said about the file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Finding {
    /// Line, from 1 up.
    pub line: usize,
    /// Character of the line at which it begins, from 1 up.
    pub column: usize,
    /// How much it matters.
    pub severity: Severity,
    /// What, why, and what to do.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Warning => "warning: ",
            Severity::Error => "",
        };
        write!(
            f,
            "{}:{}: {severity}{}",
            self.line, self.column, self.message
        )
    }
}

/// Adds an entry, and gives what is to be said about it. With `force` also one that cannot be used now, because its disk is
/// not there yet for example.
///
/// # Errors
///
/// [`Refusals`] if it cannot be used, or those of the file; nothing has changed then.
pub fn add(
    manager: &Manager,
    path: &Path,
    entry: &Entry,
    attached: &[raw::DeviceStatus],
    force: bool,
) -> anyhow::Result<Vec<Finding>> {
    file::change(path, |lines| {
        lines.add(entry);
        let line = lines.count();
        let mut found = check::check(manager, lines, attached);
        found.retain(|finding| finding.line == line);
        let errors = found
            .iter()
            .filter(|finding| finding.severity == Severity::Error);
        let reasons: Vec<_> = errors.map(|finding| finding.message.clone()).collect();
        if !reasons.is_empty() && !force {
            let what = format!("{} was not added", entry.device);
            return Err(Refusals { what, reasons }.into());
        }
        Ok(found)
    })
}

/// Removes the entry that is meant by its device, its loop device or its number; gives it.
///
/// # Errors
///
/// [`Refusals`] if there is none or more than one, or those of the file; nothing has changed then.
pub fn remove(manager: &Manager, path: &Path, which: &str) -> anyhow::Result<Placed> {
    file::change(path, |lines| {
        let placed = find(&manager.system, lines, which)?;
        lines.remove(placed.line);
        Ok(placed)
    })
}

/// The entry that is meant by its device, under any of its names, its loop device or its number.
///
/// # Errors
///
/// If there is none or more than one.
pub fn find(system: &System, lines: &Lines, which: &str) -> Result<Placed, Refusals> {
    let entries = lines.entries().0;
    let number = loop_number(which).map(LoopNumber::Pinned);
    let name = DeviceName::parse(which).ok();
    let dev = |name: &DeviceName| {
        System::dev_number(&system.path(&name.path().to_string_lossy()))
            .ok()
            .flatten()
    };
    let wanted = name.as_ref().and_then(dev);
    let is = |placed: &Placed| {
        let entry = &placed.entry;
        Some(entry.number) == number
            || Some(&entry.device) == name.as_ref()
            || (wanted.is_some() && dev(&entry.device) == wanted)
    };
    let mut found: Vec<Placed> = entries.into_iter().filter(is).collect();
    match (found.pop(), found.pop()) {
        (Some(placed), None) => Ok(placed),
        (None, _) => Err(Refusals::one(
            which,
            "there is no entry for it; dtloop config list shows them",
        )),
        (Some(one), Some(two)) => Err(Refusals::one(
            which,
            format!(
                "lines {} and {} are about it; name the loop device",
                two.line, one.line
            ),
        )),
    }
}
