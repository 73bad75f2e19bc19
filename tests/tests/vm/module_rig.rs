// SPDX-License-Identifier: GPL-2.0-only

//! What the stories of the module share: a machine with the module loaded and a set named `set`.

use anyhow::{Context, Result, bail};
use dtloop_tests::{Builder, Disk, Job, Kernel, Vm, note, patience, wait_until};
use serde_json::Value;

/// Number of the loop device that most stories use.
pub(crate) const LOOP: u32 = 101;

/// A machine with the module, and the set `set` on it.
pub(crate) struct Rig {
    pub(crate) vm: Vm,
}

impl Rig {
    /// Starts a machine with a disk `source` of `mib` MiB; the replica is `/tmp/replica`, in memory.
    pub(crate) fn start(name: &str, mib: u64) -> Result<Self> {
        Self::with(Vm::builder(name).disk(Disk::new("source", mib)), "")
    }

    /// The same with other disks, and options for the set.
    pub(crate) fn with(builder: Builder, set_options: &str) -> Result<Self> {
        let vm = builder.start()?;
        if vm.kernel() == Kernel::Debug {
            // Its own scans take what is on its way from place to place for lost; `finish` looks twice.
            vm.sh("echo scan=off >/sys/kernel/debug/kmemleak")?;
        }
        vm.sh(format!("modprobe dtloop && dtctl create set {set_options}"))?;
        Ok(Self { vm })
    }

    /// Attaches the disk `source` to the usual loop device.
    pub(crate) fn attach(&self, options: &str) -> Result<()> {
        self.attach_disk("source", LOOP, options)
    }

    /// Attaches the disk with this serial.
    pub(crate) fn attach_disk(&self, serial: &str, number: u32, options: &str) -> Result<()> {
        let node = self.vm.device(serial)?;
        self.attach_node(&node, number, options)
    }

    /// Attaches a block device.
    pub(crate) fn attach_node(&self, node: &str, number: u32, options: &str) -> Result<()> {
        self.vm
            .sh(format!(
                "dtctl attach {node} --set set --number {number} {options} && dtguest settle"
            ))
            .map(drop)
    }

    /// Puts a device-mapper device `back` over the disk with this serial; gives its node.
    pub(crate) fn mapped(&self, serial: &str) -> Result<String> {
        let node = self.vm.device(serial)?;
        self.vm.sh(format!(
            "dmsetup create back --table \"0 $(blockdev --getsz {node}) linear {node} 0\" && dtguest settle"
        ))?;
        Ok("/dev/mapper/back".to_owned())
    }

    /// Detaches the usual loop device, when udev has looked at it.
    pub(crate) fn detach(&self) -> Result<()> {
        self.vm
            .sh(format!("dtctl detach {LOOP} --patient"))
            .map(drop)
    }

    /// Starts a consumer that applies the usual device to `/tmp/replica`, until it is told to end.
    pub(crate) fn drain(&self, options: &str) -> Result<Job> {
        self.vm.spawn(format!(
            "exec dtdrain run --set set --apply {LOOP}=/tmp/replica {options}"
        ))
    }

    /// The same, when it has the stream.
    pub(crate) fn draining(&self, options: &str) -> Result<Job> {
        let consumer = self.drain(options)?;
        wait_until("the consumer", patience(10), || {
            Ok(self.get("set", "consumer")? == "true")
        })?;
        Ok(consumer)
    }

    /// Drains all that is there, and gives the consumer's report.
    pub(crate) fn drain_all(&self, options: &str) -> Result<Value> {
        report(
            &self
                .drain(&format!("--until-drained {options}"))?
                .finish(patience(60))?,
        )
    }

    /// Ends a consumer once it has everything, and gives its report.
    pub(crate) fn end_drain(&self, consumer: Job) -> Result<Value> {
        self.wait_drained()?;
        consumer.kill(15)?;
        report(&consumer.finish(patience(20))?)
    }

    /// Waits until the consumer has released everything.
    pub(crate) fn wait_drained(&self) -> Result<()> {
        let script = "[ $(dtctl get set released) = $(dtctl get set next_seq) ] && [ $(dtctl get set gap) = false ]";
        self.vm.wait_sh(patience(60), script)
    }

    /// A number or flag of the status, as text.
    pub(crate) fn get(&self, what: impl std::fmt::Display, field: &str) -> Result<String> {
        self.vm.sh(format!("dtctl get {what} {field}"))
    }

    /// A number of the status.
    pub(crate) fn count(&self, what: impl std::fmt::Display, field: &str) -> Result<u64> {
        let text = self.get(what, field)?;
        text.parse().with_context(|| format!("{field} is {text}"))
    }

    /// Fails unless the disk with this serial and the replica are the same, byte for byte.
    pub(crate) fn same(&self) -> Result<()> {
        let node = self.vm.device("source")?;
        self.vm
            .sh_within(patience(60), format!("dtctl same {node} /tmp/replica"))
            .map(drop)
    }

    /// Detaches, throws the set away, unloads the module, and looks for leaks.
    pub(crate) fn finish(self) -> Result<()> {
        self.vm.sh("dtguest settle; dtctl destroy set --discard")?;
        // The last reference to a device goes by a workqueue.
        self.vm.wait_sh(patience(10), "rmmod dtloop")?;
        // Said at once: what the kernel has on its console about it would come first otherwise.
        self.vm
            .check_leaks()
            .inspect_err(|leaks| note(format!("{leaks:#}")))?;
        self.vm.check()
    }
}

/// The report that a consumer printed as its last line.
pub(crate) fn report(text: &str) -> Result<Value> {
    let Some(line) = text.lines().last() else {
        bail!("no report")
    };
    serde_json::from_str(line).with_context(|| format!("no report: {text}"))
}
