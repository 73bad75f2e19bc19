// SPDX-License-Identifier: GPL-2.0-only

//! The commands, and what they share.

mod attach;
mod detach;
mod devices;
mod gather;
mod intent;
mod jobs;
mod peers;
mod progress;
mod resize;
mod shaping;
mod status;
mod verify_log;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::CommandFactory;
use dtloop_abi::{Control, raw};
use dtloop_api::Client;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::args::{Cli, Command, Global, loop_number};
use crate::exit::Code;
use crate::preflight::Refusals;
use crate::system::{DevNumber, System};
use crate::{output, stock};

/// Runs what was typed.
pub(crate) fn run(cli: &Cli) -> anyhow::Result<Code> {
    let context = Context {
        system: System::new(),
        global: &cli.global,
    };
    match &cli.command {
        Command::Devices(args) => devices::run(&context, args),
        Command::Attach(args) => attach::run(&context, args),
        Command::Detach(args) => detach::run(&context, args),
        Command::Status(args) => status::run(&context, args),
        Command::Resize(args) => resize::run(&context, args),
        Command::Set(args) => resize::set(&context, args),
        Command::Mirror(args) => jobs::mirror(&context, args),
        Command::Verify(args) => jobs::verify(&context, args),
        Command::Resync(args) => jobs::resync(&context, args),
        Command::Wait(args) => jobs::wait(&context, args),
        Command::Bandwidth(args) => shaping::run(&context, args),
        Command::Pair(args) => peers::pair(&context, args),
        Command::Peers(args) => peers::list(&context, args),
        Command::Unpair(args) => peers::unpair(&context, args),
        Command::Spare => spare(&context),
        Command::Man { dir } => man(dir),
    }
}

/// What every command works with.
pub(crate) struct Context<'a> {
    pub(crate) system: System,
    pub(crate) global: &'a Global,
}

impl Context<'_> {
    /// The module.
    pub(crate) fn control(&self) -> dtloop_abi::Result<Control> {
        Control::open_path(&self.global.control)
    }

    /// The agent.
    pub(crate) fn agent(&self) -> Result<Client, dtloop_api::ClientError> {
        Client::connect_path(&self.global.socket)
    }

    /// Changes devices, while no other command does. Afterwards the stock driver has its spare
    /// devices, for which [`spare`] relies on whoever holds the lock.
    pub(crate) fn change<T>(
        &self,
        control: &Control,
        change: impl FnOnce() -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let (file, path) = self.lock_file()?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| anyhow::anyhow!("Cannot lock {}: {errno}", path.display()))?;
        let result = change();
        keep_spares(self, control);
        result
    }

    fn lock_file(&self) -> anyhow::Result<(File, PathBuf)> {
        let path = self.global.run_dir.join("lock");
        let open = || {
            fs::create_dir_all(&self.global.run_dir)?;
            File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)
        };
        let file = open().with_context(|| format!("Cannot open {}", path.display()))?;
        Ok((file, path))
    }
}

/// All devices of the module.
pub(crate) fn attached(control: &Control) -> dtloop_abi::Result<Vec<raw::DeviceStatus>> {
    control.devices().collect()
}

/// Their loop numbers.
pub(crate) fn numbers(devices: &[raw::DeviceStatus]) -> Vec<u32> {
    devices.iter().map(raw::DeviceStatus::loop_number).collect()
}

/// The path of a loop device.
pub(crate) fn loop_path(number: u32) -> String {
    format!("/dev/loop{number}")
}

/// The device that is meant by a loop number, a loop device or a backing device.
pub(crate) fn find_device(
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
pub(crate) fn plain(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::NotFound => "it does not exist".into(),
        std::io::ErrorKind::PermissionDenied => "permission denied; run as root".into(),
        _ => error.to_string(),
    }
}

/// How long udev may keep a device open after an event. It takes milliseconds as a rule.
const PATIENCE: Duration = Duration::from_secs(5);

/// Tries something again while it is `EBUSY` only because of somebody who is `passing`.
pub(crate) fn patient<T>(
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

/// Tops up the stock devices beside ours. Its failure is not the command's.
fn keep_spares(context: &Context<'_>, control: &Control) {
    let topped = attached(control)
        .map_err(anyhow::Error::from)
        .and_then(|devices| stock::top_up(&context.system, &numbers(&devices)));
    if let Err(error) = topped {
        output::note(&format!(
            "warning: losetup -f may fail beside a low loop number: {error:#}"
        ));
    }
}

/// Called by udev, which keeps the device that it is about open until this returns. A command that
/// holds the lock may be waiting for just that, so the lock is not waited for: whoever holds it
/// does the same before letting go.
fn spare(context: &Context<'_>) -> anyhow::Result<Code> {
    if !context.system.has_stock_loop() {
        return Ok(Code::Done);
    }
    let control = match context.control() {
        Err(dtloop_abi::Error::NoModule) => return Ok(Code::Done),
        other => other?,
    };
    let (file, _) = context.lock_file()?;
    let Ok(_lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else {
        return Ok(Code::Done);
    };
    stock::top_up(&context.system, &numbers(&attached(&control)?))?;
    Ok(Code::Done)
}

fn man(dir: &PathBuf) -> anyhow::Result<Code> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("Cannot write to {}", dir.display()))?;
    Ok(Code::Done)
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
