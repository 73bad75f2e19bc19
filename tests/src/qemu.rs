// SPDX-License-Identifier: GPL-2.0-only

//! QEMU's command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::disk::{Bus, Disk};
use crate::link::{End, Link};
use crate::wire;

/// Which kernel a machine boots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The distribution's cloud kernel.
    Stock,
    /// The one with KASAN, lockdep, kmemleak and fault injection.
    Debug,
}

impl Kernel {
    /// The kernel that this run of the tests is about (`DTLOOP_KERNEL`): [`Kernel::Stock`] unless told otherwise.
    pub fn of_run() -> Self {
        match std::env::var("DTLOOP_KERNEL").as_deref() {
            Ok("debug") => Self::Debug,
            _ => Self::Stock,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Stock => "stock",
            Self::Debug => "debug",
        }
    }

    /// Directory with `vmlinuz`, `initrd` and `root.img`.
    fn dir(self) -> Result<PathBuf> {
        let base = std::env::var_os("DTLOOP_GUEST")
            .context("DTLOOP_GUEST is not set: start the stories by scripts/test")?;
        let dir = Path::new(&base).join(self.name());
        if !dir.join("initrd").exists() {
            bail!(
                "no {} guest in {}: run scripts/test --prepare",
                self.name(),
                dir.display()
            );
        }
        Ok(dir)
    }
}

/// Everything a machine is made of.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) name: String,
    pub(crate) kernel: Kernel,
    pub(crate) memory_mib: u32,
    pub(crate) cpus: u32,
    pub(crate) icount: bool,
    pub(crate) cpu: String,
    pub(crate) append: String,
    pub(crate) disks: Vec<Disk>,
    pub(crate) link: Option<Link>,
}

/// All that the emulator can, without five-level page tables: while the kernel identifies its first processor it
/// forgets for a moment that it has them, and an interrupt then makes KASAN report a wild access.
pub(crate) const CPU: &str = "max,la57=off";

/// Spare PCI ports for disks plugged in later.
const SPARE_PORTS: usize = 4;

/// Number of PCI ports that can be unplugged from. Without ACPI the kernel would serve them by a driver about which
/// lockdep complains, and which is switched off thereby; so the debug kernel has none.
fn port_count(config: &Config) -> usize {
    match config.kernel {
        Kernel::Stock => config.disks.len() + SPARE_PORTS,
        Kernel::Debug => 0,
    }
}

/// Where one machine's files are.
#[derive(Debug)]
pub(crate) struct Places {
    /// Logs and disks.
    pub(crate) dir: PathBuf,
    /// Sockets: a path that is short enough for them.
    pub(crate) sockets: PathBuf,
}

impl Places {
    pub(crate) fn console(&self) -> PathBuf {
        self.dir.join("console.log")
    }

    pub(crate) fn qmp(&self) -> PathBuf {
        self.sockets.join("qmp")
    }

    pub(crate) fn channel(&self) -> PathBuf {
        self.sockets.join("channel")
    }

    fn root(&self) -> PathBuf {
        self.dir.join("root.qcow2")
    }
}

/// Makes the machine's own layer over the root image, unless it has one already.
pub(crate) fn make_root(config: &Config, places: &Places) -> Result<()> {
    if places.root().exists() {
        return Ok(());
    }
    let base = config.kernel.dir()?.join("root.img").canonicalize()?;
    let output = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(base)
        .arg(places.root())
        .output()
        .context("cannot run qemu-img")?;
    if !output.status.success() {
        bail!("qemu-img: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// The command that starts the machine.
pub(crate) fn command(config: &Config, places: &Places) -> Result<Command> {
    let mut args = Args::default();
    machine(&mut args, config);
    boot(&mut args, config)?;
    consoles(&mut args, places);
    disks(&mut args, config, places)?;
    if let Some(link) = &config.link {
        network(&mut args, &link.end(&config.name)?);
    }
    let mut command = Command::new("qemu-system-x86_64");
    command.args(args.0);
    Ok(command)
}

#[derive(Default)]
struct Args(Vec<OsString>);

impl Args {
    fn add(&mut self, option: &str, value: impl Into<OsString>) {
        self.0.push(option.into());
        self.0.push(value.into());
    }

    fn flag(&mut self, option: &str) {
        self.0.push(option.into());
    }
}

fn machine(args: &mut Args, config: &Config) {
    let acpi = if config.kernel == Kernel::Debug {
        ",acpi=off"
    } else {
        ""
    };
    args.add("-machine", format!("q35{acpi}"));
    args.add("-cpu", &config.cpu);
    args.add("-m", config.memory_mib.to_string());
    if config.icount {
        // One guest instruction is one guest nanosecond.
        args.add("-accel", "tcg,thread=single");
        args.add("-icount", "shift=0,sleep=off");
        args.add("-smp", "1");
    } else {
        args.add("-accel", "tcg,thread=multi");
        // Of a socket, the firmware's MP table, all there is without ACPI, lists only the first processor.
        args.add("-smp", format!("{0},sockets={0}", config.cpus));
    }
    for flag in ["-nodefaults", "-no-user-config", "-no-reboot"] {
        args.flag(flag);
    }
    args.add("-display", "none");
}

fn boot(args: &mut Args, config: &Config) -> Result<()> {
    let dir = config.kernel.dir()?;
    args.add("-kernel", dir.join("vmlinuz"));
    args.add("-initrd", dir.join("initrd"));
    args.add("-append", kernel_parameters(config));
    Ok(())
}

fn kernel_parameters(config: &Config) -> String {
    let mut parameters = format!(
        "console=ttyS0 loglevel=7 panic=-1 mitigations=off no_timer_check net.ifnames=0 printk.devkmsg=on random.trust_cpu=on \
         sysctl.kernel.hung_task_timeout_secs=60 sysctl.kernel.hung_task_warnings=-1 rcupdate.rcu_cpu_stall_timeout=60 \
         watchdog_thresh=30 dtguest.name={}",
        config.name
    );
    if let Some(link) = &config.link {
        if let Ok(address) = link.address(&config.name) {
            parameters += &format!(" dtguest.ip={address}/24");
        }
        parameters += &format!(" dtguest.hosts={}", link.hosts());
    }
    if config.kernel == Kernel::Debug {
        // Under KASAN the ACPI interpreter is too slow for its own time-outs. Without ACPI there is no other clock to
        // calibrate the TSC with.
        parameters += &format!(
            " acpi=off tsc=reliable tsc_early_khz={} kmemleak=on",
            tsc_khz(config)
        );
    }
    if !config.append.is_empty() {
        parameters += " ";
        parameters += &config.append;
    }
    parameters
}

/// Frequency of the guest's time stamp counter: the host's, or one tick per guest nanosecond.
fn tsc_khz(config: &Config) -> u64 {
    if config.icount {
        return 1_000_000;
    }
    let interval = Duration::from_millis(50);
    let (begin, ticks) = (Instant::now(), read_tsc());
    std::thread::sleep(interval);
    let (elapsed, ticks) = (begin.elapsed(), read_tsc() - ticks);
    u64::try_from(u128::from(ticks) * 1_000_000 / elapsed.as_nanos()).unwrap_or(u64::MAX)
}

fn read_tsc() -> u64 {
    // SAFETY: Every x86-64 processor has the instruction, and it changes nothing.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn consoles(args: &mut Args, places: &Places) {
    args.add(
        "-chardev",
        path_option("file,id=console,append=on,path=", &places.console()),
    );
    args.add("-serial", "chardev:console");
    args.add(
        "-chardev",
        path_option("socket,id=qmp,server=on,wait=off,path=", &places.qmp()),
    );
    args.add("-mon", "chardev=qmp,mode=control");
    args.add("-device", "virtio-serial-pci");
    args.add(
        "-chardev",
        path_option(
            "socket,id=channel,server=on,wait=off,path=",
            &places.channel(),
        ),
    );
    args.add(
        "-device",
        format!("virtserialport,chardev=channel,name={}", wire::PORT),
    );
    args.add("-device", "virtio-rng-pci");
}

fn disks(args: &mut Args, config: &Config, places: &Places) -> Result<()> {
    args.add(
        "-drive",
        path_option(
            "if=none,id=root,format=qcow2,cache=unsafe,discard=unmap,file=",
            &places.root(),
        ),
    );
    args.add("-device", "virtio-blk-pci,drive=root,serial=dtroot");
    if config.disks.iter().any(|disk| disk.bus == Bus::Scsi) {
        args.add("-device", "virtio-scsi-pci,id=scsi");
    }
    for port in 0..port_count(config) {
        args.add(
            "-device",
            format!(
                "pcie-root-port,id=port{port},chassis={},slot={port}",
                port + 1
            ),
        );
    }
    for (port, disk) in config.disks.iter().enumerate() {
        let file = disk.realise(&places.dir)?;
        let drive = format!(
            "if=none,id=drive-{},format=raw,cache={},discard=unmap,file=",
            disk.serial,
            disk.cache.name()
        );
        args.add("-drive", path_option(&drive, &file));
        let bus = if port < port_count(config) {
            format!("port{port}")
        } else {
            "pcie.0".to_owned()
        };
        args.add("-device", disk_device(disk, &bus));
    }
    Ok(())
}

fn disk_device(disk: &Disk, bus: &str) -> String {
    let common = format!(
        "drive=drive-{0},serial={0},id={0},logical_block_size={1},physical_block_size={1}",
        disk.serial, disk.block_bytes
    );
    match disk.bus {
        Bus::Virtio => format!("virtio-blk-pci,bus={bus},{common}"),
        Bus::Scsi => format!("scsi-hd,bus=scsi.0,dpofua=on,{common}"),
    }
}

fn network(args: &mut Args, end: &End) {
    let role = if end.listens {
        "server=on"
    } else {
        "server=off,reconnect-ms=300"
    };
    let netdev = format!("stream,id=net0,{role},addr.type=unix,addr.path=");
    args.add("-netdev", path_option(&netdev, &end.socket));
    args.add(
        "-device",
        format!("virtio-net-pci,id=nic0,netdev=net0,mac={}", end.mac),
    );
}

fn path_option(options: &str, path: &Path) -> OsString {
    let mut text = OsString::from(options);
    text.push(path);
    text
}
