// SPDX-License-Identifier: GPL-2.0-only

//! A test machine.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::json;
use tempfile::TempDir;

use crate::channel::{Channel, Job, Output};
use crate::console::{self, Problem};
use crate::disk::Disk;
use crate::link::Link;
use crate::permits::Permits;
use crate::qemu::{self, Config, Kernel, Places};
use crate::qmp::Qmp;
use crate::story::{note, run_dir};
use crate::wait::{patience, wait_until};

/// How often a machine is started whose emulator fails one of its own assertions while the machine boots. With several
/// processors it does now and then, when the guest moves the memory of its devices (`iotlb_to_section`).
const BOOT_ATTEMPTS: u32 = 3;

/// How many machines may boot at a time: as many as a story with a source and a target has. Stories that begin together
/// would only slow each other down, until a kernel that boots takes its clocks for broken.
static BOOTS: Permits = Permits::new(2);

/// The signal of a failed assertion.
const SIGABRT: i32 = 6;

/// Why a machine did not boot.
struct Failure {
    error: anyhow::Error,
    /// The emulator has ended by a failed assertion of its own.
    aborted: bool,
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            error: error.into(),
            aborted: false,
        }
    }
}

/// Describes a machine before it is started.
#[derive(Clone, Debug)]
pub struct Builder(Config);

impl Builder {
    /// Sets the kernel; otherwise the one that the run is about.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.0.kernel = kernel;
        self
    }

    /// Sets the memory; 1024 MiB otherwise.
    pub fn memory_mib(mut self, memory_mib: u32) -> Self {
        self.0.memory_mib = memory_mib;
        self
    }

    /// Sets the number of processors; 2 otherwise.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.0.cpus = cpus;
        self
    }

    /// Sets QEMU's processor model; all that the emulator can otherwise.
    pub fn cpu(mut self, model: &str) -> Self {
        model.clone_into(&mut self.0.cpu);
        self
    }

    /// Makes time deterministic: one processor, one guest nanosecond per guest instruction. For benchmarks.
    pub fn icount(mut self) -> Self {
        self.0.icount = true;
        self
    }

    /// Adds kernel parameters.
    pub fn append(mut self, parameters: &str) -> Self {
        if !self.0.append.is_empty() {
            self.0.append.push(' ');
        }
        self.0.append += parameters;
        self
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: Disk) -> Self {
        self.0.disks.push(disk);
        self
    }

    /// Plugs in a cable that was made for a machine of this name.
    pub fn link(mut self, link: &Link) -> Self {
        self.0.link = Some(link.clone());
        self
    }

    /// Starts the machine and waits until it takes commands.
    pub fn start(self) -> Result<Vm> {
        let mut vm = self.create()?;
        vm.power_on()?;
        Ok(vm)
    }

    /// Makes the machine without switching it on.
    pub fn create(self) -> Result<Vm> {
        let dir = run_dir().join(&self.0.name);
        // What an earlier run of the story left.
        if dir.exists() {
            fs::remove_dir_all(&dir).with_context(|| format!("cannot clear {}", dir.display()))?;
        }
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let sockets = tempfile::Builder::new()
            .prefix("dtvm-")
            .tempdir()
            .context("no place for sockets")?;
        let places = Places {
            dir,
            sockets: sockets.path().to_owned(),
        };
        Ok(Vm {
            config: self.0,
            places,
            _sockets: sockets,
            running: None,
            allowed: Mutex::default(),
            plugged: 0,
        })
    }
}

/// A machine. When it is dropped it is switched off, and the story fails if its kernel has complained.
#[derive(Debug)]
pub struct Vm {
    config: Config,
    places: Places,
    _sockets: TempDir,
    running: Option<Running>,
    allowed: Mutex<Vec<String>>,
    plugged: usize,
}

#[derive(Debug)]
struct Running {
    process: Child,
    qmp: Mutex<Qmp>,
    channel: Channel,
    release: String,
    since: Instant,
}

impl Vm {
    /// Begins a machine of this name (its host name, its directory, and its end of a cable).
    pub fn builder(name: &str) -> Builder {
        Builder(Config {
            name: name.to_owned(),
            kernel: Kernel::of_run(),
            memory_mib: 1024,
            cpus: 2,
            icount: false,
            cpu: qemu::CPU.to_owned(),
            append: String::new(),
            disks: Vec::new(),
            link: None,
        })
    }

    /// Starts several machines at once.
    pub fn start_all<const N: usize>(builders: [Builder; N]) -> Result<[Self; N]> {
        let mut machines = Vec::with_capacity(N);
        for builder in builders {
            machines.push(builder.create()?);
        }
        thread::scope(|scope| {
            let mut starts = Vec::with_capacity(N);
            for machine in &mut machines {
                // Named as the story, for its remarks.
                let name = thread::current().name().unwrap_or("story").to_owned();
                let start = thread::Builder::new().name(name);
                starts.push(start.spawn_scoped(scope, || machine.power_on())?);
            }
            starts.into_iter().try_for_each(|start| match start.join() {
                Ok(outcome) => outcome,
                Err(_) => bail!("a start panicked"),
            })
        })?;
        machines
            .try_into()
            .map_err(|_| anyhow!("a machine is missing"))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// The kernel it boots.
    pub fn kernel(&self) -> Kernel {
        self.config.kernel
    }

    /// Release of the kernel that runs.
    pub fn release(&self) -> Result<&str> {
        Ok(&self.running()?.release)
    }

    /// Its address on the cable.
    pub fn address(&self) -> Result<String> {
        self.config
            .link
            .as_ref()
            .context("no cable")?
            .address(&self.config.name)
    }

    // Power.

    /// Switches the machine on, with the disks as they are now, and waits until it takes commands.
    pub fn power_on(&mut self) -> Result<()> {
        if self.running.is_some() {
            bail!("{} is on already", self.config.name);
        }
        let _permit = BOOTS.take();
        for attempt in 1.. {
            match self.boot() {
                Ok(running) => {
                    self.running = Some(running);
                    break;
                }
                Err(Failure { aborted: true, .. }) if attempt < BOOT_ATTEMPTS => {
                    note(format!("{}: QEMU crashed; once more", self.config.name));
                }
                Err(failure) => return Err(failure.error),
            }
        }
        Ok(())
    }

    fn boot(&self) -> Result<Running, Failure> {
        let since = Instant::now();
        let (process, qmp, channel) = self.launch()?;
        let mut running = Running {
            process,
            qmp: Mutex::new(qmp),
            channel,
            release: String::new(),
            since,
        };
        match running.channel.wait_hello(patience(60)) {
            Ok(release) => running.release = release,
            Err(error) => {
                // What it ended by, if it ends by itself.
                let mut status = None;
                let _ = wait_until("QEMU's end", Duration::from_secs(3), || {
                    status = running.process.try_wait()?;
                    Ok(status.is_some())
                });
                running.stop();
                let tail = last_lines(&self.console_text(), 40);
                let error = error.context(format!(
                    "{} does not boot; its console:\n{tail}",
                    self.config.name
                ));
                let aborted = status.and_then(|status| status.signal()) == Some(SIGABRT);
                return Err(Failure { error, aborted });
            }
        }
        note(format!(
            "{} is up after {:.1} s ({})",
            self.config.name,
            since.elapsed().as_secs_f64(),
            running.release
        ));
        Ok(running)
    }

    fn launch(&self) -> Result<(Child, Qmp, Channel)> {
        qemu::make_root(&self.config, &self.places)?;
        for stale in [self.places.qmp(), self.places.channel()] {
            // Usually there is none.
            let _ = fs::remove_file(stale);
        }
        let log = self.log("qemu.log")?;
        let mut command = qemu::command(&self.config, &self.places)?;
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut process = command.spawn().context("cannot run qemu-system-x86_64")?;
        match self.connect(&mut process) {
            Ok((qmp, channel)) => Ok((process, qmp, channel)),
            Err(error) => {
                stop(&mut process);
                let log = fs::read_to_string(self.places.dir.join("qemu.log")).unwrap_or_default();
                Err(error.context(format!("QEMU does not start: {}", last_lines(&log, 10))))
            }
        }
    }

    /// A log that goes on from one start of the machine to the next.
    fn log(&self, name: &str) -> Result<File> {
        let path = self.places.dir.join(name);
        File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("cannot write {}", path.display()))
    }

    fn connect(&self, process: &mut Child) -> Result<(Qmp, Channel)> {
        let socket = connect(&self.places.channel(), process)?;
        let channel = Channel::new(socket, self.log("scripts.log")?)?;
        let qmp = Qmp::new(connect(&self.places.qmp(), process)?)?;
        Ok((qmp, channel))
    }

    /// Cuts the power: whatever had not reached a disk is lost. Disks and root file system stay for [`Vm::power_on`].
    pub fn power_cut(&mut self) -> Result<()> {
        let mut running = self.running.take().context("the machine is off")?;
        running.stop();
        note(format!("{}: power cut", self.config.name));
        Ok(())
    }

    /// Shuts the machine down in an orderly way.
    pub fn shutdown(&mut self) -> Result<()> {
        let mut running = self.running.take().context("the machine is off")?;
        // The machine may be gone before it can answer.
        let _ = running
            .channel
            .start("sync; dtguest poweroff")
            .map(|job| job.wait(patience(30)));
        let limit = patience(30);
        let outcome = wait_until("the machine to switch off", limit, || {
            Ok(running.process.try_wait()?.is_some())
        });
        running.stop();
        outcome
    }

    // Commands.

    /// Runs a script with `bash -euo pipefail`, and returns what it printed. Fails, with all output, when the script does.
    pub fn sh(&self, script: impl AsRef<str>) -> Result<String> {
        self.sh_within(patience(60), script)
    }

    /// The same with its own deadline.
    pub fn sh_within(&self, limit: Duration, script: impl AsRef<str>) -> Result<String> {
        let script = script.as_ref();
        let output = self.try_sh_within(limit, script)?;
        if !output.ok() {
            bail!("failed on {}: {script}\n{output}", self.config.name);
        }
        Ok(output.text())
    }

    /// Runs a script, and returns how it ended. Fails only when it takes too long or the machine goes down.
    pub fn try_sh(&self, script: impl AsRef<str>) -> Result<Output> {
        self.try_sh_within(patience(60), script)
    }

    /// The same with its own deadline.
    pub fn try_sh_within(&self, limit: Duration, script: impl AsRef<str>) -> Result<Output> {
        let outcome = self.spawn(script)?.wait(limit);
        if outcome.is_err() {
            self.log_blocked_tasks();
        }
        outcome.with_context(|| format!("on {}", self.config.name))
    }

    /// Starts a script in the background.
    pub fn spawn(&self, script: impl AsRef<str>) -> Result<Job> {
        self.running()?.channel.start(script.as_ref())
    }

    /// What these devices and files hold, each in a line: length and hash.
    pub fn digests(&self, paths: &[&str]) -> Result<Job> {
        self.spawn(format!("dtguest digest {}", paths.join(" ")))
    }

    /// Waits until a script ends with 0.
    pub fn wait_sh(&self, limit: Duration, script: &str) -> Result<()> {
        wait_until(script, limit, || {
            Ok(self.try_sh_within(limit, script)?.ok())
        })
    }

    /// Has the kernel write to the console where blocked tasks are, for whoever reads why a script did not end.
    fn log_blocked_tasks(&self) {
        let script = "echo w >/proc/sysrq-trigger; echo l >/proc/sysrq-trigger";
        // A machine that cannot even do this is explained by its console.
        let _ = self
            .spawn(script)
            .map(|job| job.wait(Duration::from_secs(15)));
    }

    // Files.

    /// Writes a file in the guest; it survives a power cut.
    pub fn put(&self, path: &str, bytes: &[u8]) -> Result<()> {
        let job = self.spawn(format!("cat > '{path}'; sync -f '{path}'"))?;
        job.write(bytes)?;
        job.end_input()?;
        job.finish(patience(120)).map(drop)
    }

    /// Reads a file of the guest.
    pub fn get(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.spawn(format!("cat '{path}'"))?.wait(patience(120))?;
        if !output.ok() {
            bail!("cannot read {path}: {output}");
        }
        Ok(output.stdout)
    }

    /// Copies a file of the host into the guest.
    pub fn copy_in(&self, host: &Path, guest: &str) -> Result<()> {
        self.put(
            guest,
            &fs::read(host).with_context(|| format!("cannot read {}", host.display()))?,
        )
    }

    /// Copies a file of the guest to the host.
    pub fn copy_out(&self, guest: &str, host: &Path) -> Result<()> {
        fs::write(host, self.get(guest)?)
            .with_context(|| format!("cannot write {}", host.display()))
    }

    // Disks and network.

    /// Device node of the disk with this serial, for example `/dev/vdb`. A disk that has just come is waited for.
    pub fn device(&self, serial: &str) -> Result<String> {
        let mut node = None;
        wait_until(
            &format!("disk {serial} on {}", self.config.name),
            patience(1),
            || {
                node = Some(self.try_sh(format!("dtguest device {serial}"))?).filter(Output::ok);
                Ok(node.is_some())
            },
        )?;
        Ok(node.context("no disk")?.text())
    }

    /// The host's file behind the disk with this serial.
    pub fn disk_file(&self, serial: &str) -> Result<PathBuf> {
        let disk = self.config.disks.iter().find(|disk| disk.serial == serial);
        disk.with_context(|| format!("no disk {serial}"))?
            .realise(&self.places.dir)
    }

    /// Plugs a further virtio disk into the running machine, and waits until the guest sees it. The debug kernel has no
    /// port for it.
    pub fn plug(&mut self, disk: &Disk) -> Result<()> {
        let file = disk.realise(&self.places.dir)?;
        let port = self.config.disks.len() + self.plugged;
        let serial = &disk.serial;
        {
            let mut qmp = self.qmp()?;
            qmp.execute(
                "blockdev-add",
                &json!({ "node-name": format!("node-{serial}"), "driver": "raw", "discard": "unmap",
                    "file": { "driver": "file", "filename": file } }),
            )?;
            qmp.execute(
                "device_add",
                &json!({ "driver": "virtio-blk-pci", "drive": format!("node-{serial}"), "id": serial, "serial": serial,
                    "bus": format!("port{port}") }),
            )?;
        }
        self.plugged += 1;
        self.wait_sh(patience(30), &format!("dtguest device {serial}"))
    }

    /// Takes a virtio disk from the running machine, and waits until it is gone. It is back after the next
    /// [`Vm::power_on`].
    pub fn unplug(&self, serial: &str) -> Result<()> {
        if self.config.kernel == Kernel::Debug {
            return self.remove_pci_device(serial);
        }
        let mut qmp = self.qmp()?;
        qmp.execute("device_del", &json!({ "id": serial }))?;
        qmp.wait_event("DEVICE_DELETED", serial, patience(60))
    }

    /// What the kernel does when a device is pulled out, without pulling it out.
    fn remove_pci_device(&self, serial: &str) -> Result<()> {
        let disk = self.device(serial)?.replace("/dev/", "");
        self.sh(format!(
            "echo 1 >$(realpath /sys/block/{disk}/device/..)/remove"
        ))
        .map(drop)
    }

    /// Makes the backing disk larger while the machine runs, as far as QEMU is concerned.
    pub fn resize_disk(&mut self, serial: &str, mib: u64) -> Result<()> {
        let bytes = mib << 20;
        self.qmp()?.execute(
            "block_resize",
            &json!({ "device": format!("drive-{serial}"), "size": bytes }),
        )?;
        for disk in self
            .config
            .disks
            .iter_mut()
            .filter(|disk| disk.serial == serial)
        {
            disk.bytes = bytes;
        }
        Ok(())
    }

    /// Cuts or restores the machine's network.
    pub fn set_link(&self, up: bool) -> Result<()> {
        self.qmp()?
            .execute("set_link", &json!({ "name": "nic0", "up": up }))?;
        note(format!(
            "{}: network {}",
            self.config.name,
            if up { "restored" } else { "cut" }
        ));
        Ok(())
    }

    /// Executes any command of QEMU's control protocol.
    pub fn qmp_execute(
        &self,
        command: &str,
        arguments: &serde_json::Value,
    ) -> Result<serde_json::Value> {
        self.qmp()?.execute(command, arguments)
    }

    // What the kernel says.

    /// All that the console has shown.
    pub fn console_text(&self) -> String {
        fs::read(self.places.console())
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Complaints of the kernel so far that were not allowed.
    pub fn problems(&self) -> Vec<Problem> {
        let allowed = self.allowed.lock().unwrap_or_else(PoisonError::into_inner);
        console::problems(&self.console_text(), &allowed)
    }

    /// Lets pass complaints whose first line holds `text`. Only for what the story provokes deliberately.
    pub fn allow(&self, text: &str) {
        self.allowed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text.to_owned());
    }

    /// Fails when the kernel has complained.
    pub fn check(&self) -> Result<()> {
        match self.problems().first() {
            None => Ok(()),
            Some(problem) => bail!(
                "the kernel of {} complains:\n{}",
                self.config.name,
                problem.excerpt
            ),
        }
    }

    /// Has kmemleak look for memory that nothing points to, where the kernel can (the debug kernel). It must have got old
    /// enough to be looked at, so this takes some seconds.
    pub fn check_leaks(&self) -> Result<()> {
        if self.config.kernel != Kernel::Debug {
            return Ok(());
        }
        // Two scans: what was allocated during the last five seconds is not reported.
        let script = "f=/sys/kernel/debug/kmemleak; echo scan >$f; sleep 6; echo scan >$f; cat $f";
        let report = self.sh_within(patience(180), script)?;
        if !report.is_empty() {
            bail!("kmemleak on {}:\n{report}", self.config.name);
        }
        Ok(())
    }

    fn running(&self) -> Result<&Running> {
        self.running
            .as_ref()
            .with_context(|| format!("{} is off", self.config.name))
    }

    fn qmp(&self) -> Result<MutexGuard<'_, Qmp>> {
        Ok(self
            .running()?
            .qmp
            .lock()
            .unwrap_or_else(PoisonError::into_inner))
    }

    /// Removes what is large and of no use afterwards.
    fn remove_disks(&self) {
        if std::env::var_os("DTLOOP_KEEP_DISKS").is_some() {
            return;
        }
        for entry in fs::read_dir(&self.places.dir)
            .into_iter()
            .flatten()
            .flatten()
        {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "raw" || extension == "qcow2")
            {
                let _ = fs::remove_file(path);
            }
        }
    }
}

impl Running {
    fn stop(&mut self) {
        stop(&mut self.process);
    }
}

/// Ends the process as a power cut does. It may have ended by itself.
fn stop(process: &mut Child) {
    let _ = process.kill();
    let _ = process.wait();
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Some(mut running) = self.running.take() {
            running.stop();
            note(format!(
                "{} was on for {:.1} s",
                self.config.name,
                running.since.elapsed().as_secs_f64()
            ));
        }
        self.remove_disks();
        let problems = self.problems();
        for problem in &problems {
            note(format!(
                "the kernel of {} complains:\n{}",
                self.config.name, problem.excerpt
            ));
        }
        if thread::panicking() || !problems.is_empty() {
            note(format!(
                "whole console: {}",
                self.places.console().display()
            ));
        }
        if !thread::panicking() {
            assert!(
                problems.is_empty(),
                "the kernel of {} complains: {}",
                self.config.name,
                problems[0].line
            );
        }
    }
}

/// Connects to a socket that QEMU is about to make.
fn connect(path: &Path, process: &mut Child) -> Result<UnixStream> {
    let mut socket = None;
    wait_until("QEMU's sockets", patience(20), || {
        if let Some(status) = process.try_wait()? {
            bail!("QEMU ended: {status}");
        }
        socket = UnixStream::connect(path).ok();
        Ok(socket.is_some())
    })?;
    socket.context("no socket")
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
