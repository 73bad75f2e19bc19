// SPDX-License-Identifier: GPL-2.0-only

//! From the kernel's first process to a system that takes commands.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::wait::wait;
use nix::unistd::{chdir, chroot, sethostname};

use crate::device;

const SYSROOT: &str = "/sysroot";
const PROGRAMS: &str = "/opt/dtloop/bin";

/// Says something on the console.
pub(crate) fn log(text: &str) {
    if let Ok(mut kmsg) = OpenOptions::new().write(true).open("/dev/kmsg") {
        // Nobody could be told that it failed.
        let _ = kmsg.write_all(format!("<6>dtguest: {text}\n").as_bytes());
    }
}

/// In the initial RAM disk: load the drivers, mount the root file system, go on there.
pub(crate) fn early() -> Result<()> {
    mount_fs("devtmpfs", "/dev")?;
    mount_fs("proc", "/proc")?;
    mount_fs("sysfs", "/sys")?;
    load_modules("/load-first")?;
    let root = wait_for_root()?;
    mount(
        Some(root.as_str()),
        SYSROOT,
        Some("ext4"),
        MsFlags::MS_NOATIME,
        None::<&str>,
    )
    .with_context(|| format!("cannot mount {root}"))?;
    bind("/lib/modules", &format!("{SYSROOT}/usr/lib/modules"))?;
    bind(PROGRAMS, &format!("{SYSROOT}/usr/local/bin"))?;
    for dir in ["/dev", "/proc", "/sys"] {
        move_mount(dir, &format!("{SYSROOT}{dir}"))?;
    }
    chdir(SYSROOT)?;
    move_mount(".", "/")?;
    chroot(".")?;
    chdir("/")?;
    Err(Command::new("/usr/local/bin/dtguest").arg("init").exec())
        .context("cannot go on in the root file system")
}

fn load_modules(list: &str) -> Result<()> {
    for path in fs::read_to_string(list)
        .with_context(|| format!("no {list}"))?
        .lines()
    {
        let file = File::open(path).with_context(|| format!("no module {path}"))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(error) => bail!("cannot load {path}: {error}"),
        }
    }
    Ok(())
}

fn wait_for_root() -> Result<String> {
    let deadline = Instant::now() + Duration::from_secs(60);
    while Instant::now() < deadline {
        if let Some(node) = device::find("dtroot") {
            return Ok(node);
        }
        sleep(Duration::from_millis(20));
    }
    bail!("no root disk")
}

fn mount_fs(kind: &str, place: &str) -> Result<()> {
    match mount(
        Some(kind),
        place,
        Some(kind),
        MsFlags::empty(),
        None::<&str>,
    ) {
        // The kernel may have mounted it already.
        Ok(()) | Err(Errno::EBUSY) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("cannot mount {kind}")),
    }
}

fn bind(from: &str, to: &str) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("cannot bind {from} to {to}"))
}

fn move_mount(from: &str, to: &str) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .with_context(|| format!("cannot move {from} to {to}"))
}

/// In the root file system: bring everything up, then watch over it. Never returns.
pub(crate) fn system() -> Result<()> {
    let outcome = bring_up().and_then(|server| reap(&server));
    if let Err(error) = outcome {
        log(&format!("{error:#}"));
    }
    power_off()
}

fn bring_up() -> Result<Child> {
    mounts()?;
    let parameters = parameters()?;
    let name = parameters.get("name").map_or("guest", String::as_str);
    sethostname(name)?;
    hosts(name, parameters.get("hosts").map_or("", String::as_str))?;
    udev()?;
    run("ip", &["link", "set", "lo", "up"])?;
    if let Some(address) = parameters.get("ip") {
        run("ip", &["address", "add", address, "dev", "eth0"])?;
        run("ip", &["link", "set", "eth0", "up"])?;
    }
    Command::new("/usr/local/bin/dtguest")
        .arg("serve")
        .spawn()
        .context("cannot start the server")
}

fn mounts() -> Result<()> {
    for dir in ["/dev/pts", "/dev/shm"] {
        fs::create_dir_all(dir)?;
    }
    for (kind, place) in [
        ("tmpfs", "/run"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/dev/shm"),
        ("devpts", "/dev/pts"),
        ("debugfs", "/sys/kernel/debug"),
        ("cgroup2", "/sys/fs/cgroup"),
    ] {
        mount_fs(kind, place)?;
    }
    std::os::unix::fs::symlink("/proc/self/fd", "/dev/fd")?;
    // Stories scan when they want to; the scan in the background would only take time. Most kernels have none.
    let _ = fs::write("/sys/kernel/debug/kmemleak", "scan=off");
    fs::create_dir_all("/run/lock")?;
    Ok(())
}

/// Parameters of the kernel command line that begin with `dtguest.`.
fn parameters() -> Result<HashMap<String, String>> {
    let line = fs::read_to_string("/proc/cmdline")?;
    let own = line
        .split_whitespace()
        .filter_map(|word| word.strip_prefix("dtguest.")?.split_once('='));
    Ok(own
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect())
}

fn hosts(name: &str, others: &str) -> Result<()> {
    let mut text = String::from("127.0.0.1 localhost\n");
    for (address, name) in others.split(',').filter_map(|entry| entry.split_once(':')) {
        text += &format!("{address} {name}\n");
    }
    if others.is_empty() {
        text += &format!("127.0.1.1 {name}\n");
    }
    fs::write("/etc/hosts", text).context("cannot write /etc/hosts")
}

fn udev() -> Result<()> {
    run(
        "/usr/lib/systemd/systemd-udevd",
        &["--daemon", "--resolve-names=never"],
    )?;
    // Of what was there before udevd, only disks and network cards matter.
    run(
        "udevadm",
        &[
            "trigger",
            "--action=add",
            "--subsystem-match=block",
            "--subsystem-match=net",
        ],
    )?;
    crate::settle::settle(&["--timeout=60".to_owned()])
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program)
        .args(args)
        .status()
        .with_context(|| format!("cannot run {program}"))?;
    if !status.success() {
        bail!("{program} {}: {status}", args.join(" "));
    }
    Ok(())
}

/// Reaps whatever has lost its parent, until the server ends.
fn reap(server: &Child) -> Result<()> {
    let server = i32::try_from(server.id())?;
    loop {
        match wait() {
            Ok(status) if status.pid().is_some_and(|pid| pid.as_raw() == server) => {
                bail!("the server ended: {status:?}")
            }
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("wait"),
        }
    }
}

/// Ends the machine: by a reset, which works without ACPI too; QEMU takes it for the end.
pub(crate) fn power_off() -> Result<()> {
    nix::unistd::sync();
    let ended: nix::Result<Infallible> = reboot(RebootMode::RB_AUTOBOOT);
    match ended {
        Ok(never) => match never {},
        Err(error) => Err(error).context("cannot switch off"),
    }
}
