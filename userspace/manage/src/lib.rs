// SPDX-License-Identifier: GPL-2.0-only

//! Managing the devices of this machine: what `dtloop` and `dtmount` share.
//!
//! - [`system`]: what the machine says about its block devices; reads only.
//! - [`preflight`]: what speaks against attaching a device; pure.
//! - [`attach`], [`detach`]: both, one device at a time.
//! - [`entries`]: `/etc/DT/dtloop_devices`, what is attached when the machine starts.
//! - [`fleet`]: attaching and detaching all of them.
//! - [`crypt`]: encryption below a loop device.
//! - [`stock`]: living beside the stock loop driver.
//! - [`size`]: sizes and durations as people write and read them.

#![forbid(unsafe_code)]

pub mod attach;
pub mod crypt;
pub mod detach;
pub mod entries;
pub mod fleet;
pub mod gather;
mod intent;
pub mod preflight;
pub mod size;
pub mod stock;
pub mod system;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use dtloop_abi::{Control, raw};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::attach::loop_number;
use crate::preflight::Refusals;
use crate::system::{DevNumber, System};

/// What every change of devices works with.
#[derive(Clone, Debug)]
pub struct Manager {
    /// This machine.
    pub system: System,
    /// The module's control device.
    pub control: PathBuf,
    /// Where programs keep their state until the next boot.
    pub run_dir: PathBuf,
    /// Where goes what is neither a result nor an error.
    pub notes: fn(&str),
}

impl Manager {
    /// The module.
    ///
    /// # Errors
    ///
    /// If it is not loaded, or this program may not use it.
    pub fn control(&self) -> dtloop_abi::Result<Control> {
        Control::open_path(&self.control)
    }

    /// All devices of the module.
    ///
    /// # Errors
    ///
    /// Those of the module.
    pub fn attached(control: &Control) -> dtloop_abi::Result<Vec<raw::DeviceStatus>> {
        control.devices().collect()
    }

    fn note(&self, text: &str) {
        (self.notes)(text);
    }

    /// Changes devices, while no other command does. Afterwards the stock driver has its spare
    /// devices, for which [`Manager::spare`] relies on whoever holds the lock.
    ///
    /// # Errors
    ///
    /// If the lock cannot be had, and those of the change.
    pub fn change<T>(
        &self,
        control: &Control,
        change: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let (file, path) = self.lock_file()?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| anyhow::anyhow!("Cannot lock {}: {errno}", path.display()))?;
        let result = change();
        self.keep_spares(control);
        result
    }

    fn lock_file(&self) -> anyhow::Result<(File, PathBuf)> {
        let path = self.run_dir.join("lock");
        let open = || {
            fs::create_dir_all(&self.run_dir)?;
            File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
        };
        let file = open().with_context(|| format!("Cannot open {}", path.display()))?;
        Ok((file, path))
    }

    /// Tops up the stock devices beside ours. Its failure is not the command's.
    fn keep_spares(&self, control: &Control) {
        let topped = Self::attached(control)
            .map_err(anyhow::Error::from)
            .and_then(|devices| stock::top_up(&self.system, &numbers(&devices)));
        if let Err(error) = topped {
            self.note(&format!(
                "warning: losetup -f may fail beside a low loop number: {error:#}"
            ));
        }
    }

    /// Called by udev, which keeps the device that it is about open until this returns. A command that
    /// holds the lock may be waiting for just that, so the lock is not waited for: whoever holds it
    /// does the same before letting go.
    ///
    /// # Errors
    ///
    /// If the stock driver refuses.
    pub fn spare(&self) -> anyhow::Result<()> {
        if !self.system.has_stock_loop() {
            return Ok(());
        }
        let control = match self.control() {
            Err(dtloop_abi::Error::NoModule) => return Ok(()),
            other => other?,
        };
        let (file, _) = self.lock_file()?;
        let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
            return Ok(());
        };
        stock::top_up(&self.system, &numbers(&Self::attached(&control)?))?;
        Ok(())
    }
}

/// Their loop numbers.
pub fn numbers(devices: &[raw::DeviceStatus]) -> Vec<u32> {
    devices.iter().map(raw::DeviceStatus::loop_number).collect()
}

/// The path of a loop device.
pub fn loop_path(number: u32) -> String {
    format!("/dev/loop{number}")
}

/// The device that is meant by a loop number, a loop device or a backing device.
pub fn find_device(
    system: &System,
    devices: &[raw::DeviceStatus],
    text: &str,
) -> Result<raw::DeviceStatus, Refusals> {
    if let Some(number) = loop_number(text) {
        let found = devices.iter().find(|d| d.loop_number() == number);
        return found.copied().ok_or_else(|| not_ours(system, number));
    }
    let dev = match System::dev_number(Path::new(text)) {
        Ok(Some(dev)) => dev,
        Ok(None) => return Err(Refusals::one(text, "it is not a block device")),
        Err(error) => return Err(Refusals::one(text, plain(&error))),
    };
    let is = |raw: u64| DevNumber::from_raw(raw) == dev;
    let found: Vec<_> = devices
        .iter()
        .filter(|d| is(d.backing_dev) || is(d.loop_dev))
        .collect();
    match found[..] {
        [device] => Ok(*device),
        [] => Err(Refusals::one(text, "it is not attached to DTLOOP")),
        _ => Err(Refusals::one(
            text,
            "it is attached more than once; name the loop device",
        )),
    }
}

fn not_ours(system: &System, number: u32) -> Refusals {
    let stock = system.block(&format!("loop{number}"));
    let reason = match stock.map(|device| device.backing_file) {
        Some(Some(file)) => format!(
            "it is a stock loop device for {file}, not one of DTLOOP; losetup -d detaches it"
        ),
        Some(None) => "it is an unbound stock loop device, not one of DTLOOP".into(),
        None => "there is no such device".into(),
    };
    Refusals::one(loop_path(number), reason)
}

/// An I/O error without "(os error 2)".
pub fn plain(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "it does not exist".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied; run as root".into(),
        _ => error.to_string(),
    }
}

/// How long udev may keep a device open after an event. It takes milliseconds as a rule.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tries something again while it is `EBUSY` only because of somebody who is `passing`.
pub fn patient<T>(
    mut attempt: impl FnMut() -> dtloop_abi::Result<T>,
    passing: impl Fn() -> bool,
) -> dtloop_abi::Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match attempt() {
            Err(error) if error.is(Errno::EBUSY) && Instant::now() < deadline && passing() => {
                thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_passing_user_is_waited_for() {
        let busy = || dtloop_abi::Error::Refused {
            operation: dtloop_abi::Operation::Detach,
            errno: Errno::EBUSY,
        };
        let mut left = 3;
        let attempt = || {
            left -= 1;
            if left == 0 { Ok(()) } else { Err(busy()) }
        };
        assert!(patient(attempt, || true).is_ok());
        let mut tries = 0;
        let attempt = || -> dtloop_abi::Result<()> {
            tries += 1;
            Err(busy())
        };
        assert!(patient(attempt, || false).is_err());
        assert_eq!(tries, 1);
    }

    #[test]
    fn devices_are_found_by_number_or_refused_with_the_reason() {
        let (_dir, system) =
            crate::system::tests::machine("sys/class/block/loop3/loop/backing_file: /srv/image");
        let ours = [raw::DeviceStatus::query(7)];
        assert_eq!(find_device(&system, &ours, "/dev/loop7").unwrap().number, 7);
        let reason = |text| find_device(&system, &ours, text).unwrap_err().to_string();
        assert!(reason("3").contains("/srv/image"));
        assert!(reason("loop9").contains("no such device"));
        assert!(reason("/dev/null").contains("not a block device"));
        assert!(reason("/nonexistent").contains("does not exist"));
    }
}
