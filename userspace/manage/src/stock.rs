// SPDX-License-Identifier: GPL-2.0-only

//! Living beside the stock loop driver.
//!
//! Three things are done for it. An unbound stock device makes room for one of ours with the same
//! number, and is put back when ours goes; a file in the run directory remembers that.
//!
//! The stock driver registers its first devices when it is loaded, whoever has their names by then: the kernel complains with a
//! stack dump. So it is loaded before one of ours gets such a number.
//!
//! And unbound stock devices are kept on hand while one of our numbers is low. `losetup -f` takes
//! an unbound stock device; when there is none, the stock driver makes one with the lowest index
//! that is free *in its own table*. It does not know that the name is taken by us, fails to
//! register it, and so does every later `losetup -f`. As long as an unbound device exists, the
//! driver never comes to that. A udev rule calls `dtloop spare` whenever a loop device is bound;
//! [`SPARES`] devices bridge the time until it has run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;
use dtloop_abi::LoopControl;
use nix::errno::Errno;

use crate::patient;
use crate::preflight::Refusals;
use crate::system::System;

/// Unbound stock devices to keep. udev handles an event in some milliseconds and a `losetup` takes
/// as long, so a handful would do; an unbound device costs a few kilobytes.
const SPARES: usize = 16;

/// Which stock devices to make so that the stock driver never collides with `ours`. `stock` are its
/// devices, with true for the bound ones.
///
/// Nothing is needed while the next indexes that the stock driver would take are all free.
fn plan(stock: &BTreeMap<u32, bool>, ours: &BTreeSet<u32>) -> Vec<u32> {
    let absent = || (0..).filter(|number| !stock.contains_key(number));
    if !absent().take(SPARES).any(|number| ours.contains(&number)) {
        return Vec::new();
    }
    let unbound = stock.values().filter(|bound| !**bound).count();
    let free = absent().filter(|number| !ours.contains(number));
    free.take(SPARES.saturating_sub(unbound)).collect()
}

/// Makes as many unbound stock devices as are needed beside `ours`; returns the new numbers.
pub fn top_up(system: &System, ours: &[u32]) -> anyhow::Result<Vec<u32>> {
    if !system.has_stock_loop() {
        return Ok(Vec::new());
    }
    let ours_set: BTreeSet<u32> = ours.iter().copied().collect();
    let wanted = plan(&system.stock_loops(ours), &ours_set);
    if wanted.is_empty() {
        return Ok(wanted);
    }
    let control = LoopControl::open()?;
    let mut made = Vec::new();
    for number in wanted {
        match control.add(number) {
            Ok(()) => made.push(number),
            // Somebody else made it just now, or it is one of ours by now.
            Err(error) if error.is(Errno::EEXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(made)
}

/// Loads the stock driver, if there is one, before one of ours gets a number that it would register by itself. How many those
/// are is a parameter of it; numbers of `auto`, from `auto_first` up, are beyond them.
pub(crate) fn load_first(system: &System, number: u32, auto_first: u32) {
    if number < auto_first && !system.has_stock_loop() {
        // Without it there is nothing to collide with.
        let _ = Command::new("modprobe").args(["--quiet", "loop"]).status();
    }
}

/// Remembers which numbers the stock driver gave up.
#[derive(Debug)]
pub struct Borrowed {
    dir: PathBuf,
}

impl Borrowed {
    /// In that directory.
    #[must_use]
    pub fn new(run_dir: &Path) -> Self {
        Self {
            dir: run_dir.join("stock-loops"),
        }
    }

    fn file(&self, number: u32) -> PathBuf {
        self.dir.join(number.to_string())
    }

    /// Has the stock driver give up an unbound device. False: it has none of that number.
    pub fn take(&self, system: &System, number: u32) -> anyhow::Result<bool> {
        match system.stock_loops(&[]).get(&number) {
            None => return Ok(false),
            Some(true) => {
                let file = system
                    .block(&format!("loop{number}"))
                    .and_then(|device| device.backing_file)
                    .unwrap_or_else(|| "a file".into());
                return Err(taken(number, &file).into());
            }
            Some(false) => {}
        }
        // The note is written first: one too many is harmless, a missing one loses the device.
        let note = self.file(number);
        fs::create_dir_all(&self.dir)
            .and_then(|()| fs::write(&note, []))
            .with_context(|| format!("Cannot write {}", note.display()))?;
        let removed = LoopControl::open().and_then(|control| {
            let passing = || {
                openers(system, number)
                    .iter()
                    .all(|program| program.contains("udev"))
            };
            patient(|| control.remove(number), passing)
        });
        if let Err(error) = removed {
            // Nothing to do about a note that cannot be removed: it is harmless.
            let _ = fs::remove_file(&note);
            if error.is(Errno::EBUSY) {
                return Err(in_use(system, number).into());
            }
            return Err(error.into());
        }
        Ok(true)
    }

    /// Puts a device back that [`Borrowed::take`] took; does nothing for others.
    pub fn give_back(&self, system: &System, number: u32) -> anyhow::Result<()> {
        let note = self.file(number);
        if !note.exists() {
            return Ok(());
        }
        if system.has_stock_loop() {
            match LoopControl::open()?.add(number) {
                Err(error) if !error.is(Errno::EEXIST) => return Err(error.into()),
                _ => {}
            }
        }
        fs::remove_file(&note).with_context(|| format!("Cannot remove {}", note.display()))
    }
}

/// A bound stock device has the number.
fn taken(number: u32, file: &str) -> Refusals {
    Refusals::one(
        format!("/dev/loop{number}"),
        format!(
            "the number is taken by the stock loop driver for {file}; choose another, or free it \
             with losetup -d /dev/loop{number}"
        ),
    )
}

fn openers(system: &System, number: u32) -> Vec<String> {
    system.openers(&[format!("/dev/loop{number}")])
}

/// An unbound stock device has the number and cannot be removed.
fn in_use(system: &System, number: u32) -> Refusals {
    let path = format!("/dev/loop{number}");
    let openers = openers(system, number);
    let who = if openers.is_empty() {
        "a program".to_owned()
    } else {
        openers.join(", ")
    };
    Refusals::one(
        path,
        format!("it belongs to the stock loop driver and {who} has it open; choose another"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stock(unbound: &[u32], bound: &[u32]) -> BTreeMap<u32, bool> {
        let unbound = unbound.iter().map(|&n| (n, false));
        unbound.chain(bound.iter().map(|&n| (n, true))).collect()
    }

    #[test]
    fn nothing_is_made_for_high_numbers() {
        let stock = stock(&[0, 1, 2, 3], &[4, 5]);
        assert!(plan(&stock, &BTreeSet::from([100, 101])).is_empty());
        assert!(plan(&stock, &BTreeSet::new()).is_empty());
    }

    #[test]
    fn a_low_number_gets_spares_beside_it() {
        // Ours is 1; the stock driver has 0 and 2..8, of which 2 and 3 are bound.
        let made = plan(&stock(&[0, 4, 5, 6, 7], &[2, 3]), &BTreeSet::from([1, 9]));
        assert_eq!(made, [8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]);
    }

    #[test]
    fn binding_one_after_the_other_never_meets_ours() {
        let ours = BTreeSet::from([1, 5]);
        let mut all = stock(&[0, 2, 3, 4, 6, 7], &[]);
        for _ in 0..200 {
            for number in plan(&all, &ours) {
                assert!(!ours.contains(&number));
                assert_eq!(all.insert(number, false), None);
            }
            let unbound = all.iter().find(|(_, bound)| !**bound);
            let number = *unbound.expect("losetup -f finds an unbound device").0;
            all.insert(number, true);
        }
    }

    #[test]
    fn a_number_comes_near_as_stock_devices_are_made() {
        let near: Vec<u32> = (0..90).collect();
        assert!(!plan(&stock(&[], &near), &BTreeSet::from([100])).is_empty());
    }

    #[test]
    fn a_bound_stock_device_is_named_with_its_file() {
        let (_dir, system) =
            crate::system::tests::machine("sys/class/block/loop3/loop/backing_file: /srv/image");
        let run = tempfile::tempdir().unwrap();
        let error = Borrowed::new(run.path()).take(&system, 3).unwrap_err();
        assert!(error.to_string().contains("/srv/image"), "{error}");
        assert!(!Borrowed::new(run.path()).take(&system, 4).unwrap());
    }
}
