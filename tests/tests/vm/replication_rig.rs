// SPDX-License-Identifier: GPL-2.0-only

//! What the stories of replication share: module, agent and target, on one machine or on two joined by a cable.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dtloop_tests::{Disk, Job, Link, Output, Vm, patience, wait_until};
use serde_json::Value;

/// The loop device of the stories.
pub(crate) const DEV: &str = "/dev/loop101";

/// Where the target keeps the copy.
pub(crate) const IMAGE: &str = "/srv/vol.img";

/// Commands of the daemons.
pub(crate) const AGENT: &str = "dtagent";
pub(crate) const TARGET: &str = "dttarget serve";

/// A source and a target. Agent and target are configured but not started.
pub(crate) struct Rig {
    source: Vm,
    /// None: the same machine, over loopback.
    target: Option<Vm>,
    /// The disk behind the loop device.
    pub(crate) disk: String,
}

impl Rig {
    /// Both on one machine; for stories in which the network does not matter.
    pub(crate) fn alone(mib: u64) -> Result<Self> {
        let source = Vm::builder("both").disk(Disk::new("disk", mib)).start()?;
        Self::configure(source, None, mib)
    }

    /// Both on one machine, and the copy on a device-mapper device `copy` that a story may let fail.
    pub(crate) fn alone_with_copy_disk(mib: u64) -> Result<Self> {
        let source = Vm::builder("both")
            .disk(Disk::new("disk", mib))
            .disk(Disk::new("copy", mib))
            .start()?;
        let node = source.device("copy")?;
        source.sh(format!(
            "dmsetup create copy --table \"0 $(blockdev --getsz {node}) linear {node} 0\"; dtguest settle
             mkdir -p /srv; ln -s /dev/mapper/copy {IMAGE}"
        ))?;
        Self::configure(source, None, mib)
    }

    /// Two machines.
    pub(crate) fn pair(mib: u64) -> Result<Self> {
        Self::pair_with(Disk::new("disk", mib), mib)
    }

    /// Two machines; the disk has the serial `disk`.
    pub(crate) fn pair_with(disk: Disk, mib: u64) -> Result<Self> {
        let link = Link::new("source", "target")?;
        let [source, target] = Vm::start_all([
            Vm::builder("source").link(&link).disk(disk),
            Vm::builder("target").link(&link),
        ])?;
        source.wait_sh(patience(20), "ping -c1 -W1 target")?;
        Self::configure(source, Some(target), mib)
    }

    /// Machines of the story's own; the source has a disk `disk`.
    pub(crate) fn with(source: Vm, target: Option<Vm>, mib: u64) -> Result<Self> {
        Self::configure(source, target, mib)
    }

    /// Both on one machine, everything started, and the device mirrored.
    pub(crate) fn mirrored(mib: u64, attach_options: &str) -> Result<Self> {
        let rig = Self::alone(mib)?;
        rig.begin(attach_options)?;
        Ok(rig)
    }

    /// Attaches the device, starts both daemons, and makes a full mirror.
    pub(crate) fn begin(&self, attach_options: &str) -> Result<()> {
        self.start_target()?;
        self.attach(attach_options)?;
        self.start_agent()?;
        self.mirror("--full").map(drop)
    }

    fn configure(source: Vm, target: Option<Vm>, mib: u64) -> Result<Self> {
        let disk = source.device("disk")?;
        let rig = Self {
            source,
            target,
            disk,
        };
        let agent = rig.set_config("default");
        rig.source.put("/etc/DT/dtloop.toml", agent.as_bytes())?;
        let volume =
            format!("[[volume]]\nname = \"vol\"\npath = \"{IMAGE}\"\nsize = \"{mib}MiB\"\n");
        rig.configure_target(&volume)?;
        Ok(rig)
    }

    /// Two machines talk TLS and must be paired; on one, over loopback, plaintext is allowed.
    fn transport(&self) -> [&str; 3] {
        if self.target.is_some() {
            ["target:7788", "0.0.0.0:7788", "tls"]
        } else {
            ["127.0.0.1:7788", "127.0.0.1:7788", "plaintext"]
        }
    }

    /// How a set reaches the target: lines of the agent's configuration.
    fn set_config(&self, set: &str) -> String {
        let [target, _, transport] = self.transport();
        format!(
            "[[set]]\nname = \"{set}\"\ntarget = \"{target}\"\ntransport = \"{transport}\"\nretry_ms_max = 300\n"
        )
    }

    /// Pairs an agent of the source with the target, which runs, unless that has been done.
    fn pair_agent(&self, agent: &str) -> Result<()> {
        if self.target.is_none() {
            return Ok(());
        }
        let known = format!("dttarget peers --json | jq -e '[.peers[].name] | index(\"{agent}\")'");
        if self.target().try_sh(known)?.ok() {
            return Ok(());
        }
        let code = self
            .target()
            .sh(format!("dttarget invite --name {agent}"))?;
        self.source
            .sh(format!(
                "dtloop pair target:7788 {code} --state-dir /var/lib/dtloop/{agent}"
            ))
            .map(drop)
    }

    /// Adds a set to the agent's configuration.
    pub(crate) fn add_set(&self, set: &str) -> Result<()> {
        let config = self.set_config("default") + &self.set_config(set);
        self.source.put("/etc/DT/dtloop.toml", config.as_bytes())
    }

    /// Configures another agent on the source, which is another source to the target, and starts it.
    pub(crate) fn start_other_agent(&self, name: &str, set: &str) -> Result<()> {
        let socket = format!("/run/dtloop/{name}.sock");
        let config = format!(
            "state_dir = \"/var/lib/dtloop/{name}\"\nsocket = \"{socket}\"\n{}",
            self.set_config(set)
        );
        let path = format!("/etc/DT/{name}.toml");
        self.source.put(&path, config.as_bytes())?;
        self.pair_agent(name)?;
        start(&self.source, name, &format!("{AGENT} --config {path}"))?;
        self.source.wait_sh(
            patience(20),
            &format!("dtloop --socket {socket} status --json | jq -e '.agent_error == null'"),
        )
    }

    /// Gives the target other volumes.
    pub(crate) fn configure_target(&self, volumes: &str) -> Result<()> {
        let [_, listen, transport] = self.transport();
        let text = format!(
            "listen = \"{listen}\"\ntransport = \"{transport}\"\n[journal]\nsize = \"128MiB\"\nsegment_size = \"16MiB\"\n{volumes}"
        );
        self.target().put("/etc/DT/dttarget.toml", text.as_bytes())
    }

    pub(crate) fn source(&self) -> &Vm {
        &self.source
    }

    pub(crate) fn source_mut(&mut self) -> &mut Vm {
        &mut self.source
    }

    pub(crate) fn target(&self) -> &Vm {
        self.target.as_ref().unwrap_or(&self.source)
    }

    pub(crate) fn target_mut(&mut self) -> &mut Vm {
        self.target.as_mut().unwrap_or(&mut self.source)
    }

    // Devices.

    /// Attaches the disk as volume `vol`.
    pub(crate) fn attach(&self, options: &str) -> Result<()> {
        let disk = &self.disk;
        self.source
            .sh(format!("modprobe dtloop; dtloop attach {disk} --loop 101 --volume vol {options}; dtguest settle"))
            .map(drop)
    }

    /// Attaches another disk, by its serial.
    pub(crate) fn attach_other(&self, serial: &str, number: u32, options: &str) -> Result<()> {
        let disk = self.source.device(serial)?;
        self.source
            .sh(format!(
                "modprobe dtloop; dtloop attach {disk} --loop {number} {options}; dtguest settle"
            ))
            .map(drop)
    }

    // Daemons.

    pub(crate) fn start_agent(&self) -> Result<()> {
        start(&self.source, "dtagent", AGENT)?;
        self.source.wait_sh(
            patience(20),
            "dtloop status --json | jq -e '.agent_error == null'",
        )
    }

    /// Starts the target, and pairs it with the agent when it is the first time.
    pub(crate) fn start_target(&self) -> Result<()> {
        self.start_target_by(TARGET)?;
        self.pair_agent("agent")
    }

    /// Starts the target by another command, and pairs nobody.
    pub(crate) fn start_target_by(&self, command: &str) -> Result<()> {
        start(self.target(), "dttarget", command)?;
        self.target().wait_sh(
            patience(20),
            "(exec 3<>/dev/tcp/127.0.0.1/7788) 2>/dev/null",
        )
    }

    /// `kill -9`.
    pub(crate) fn kill_agent(&self) -> Result<()> {
        end(&self.source, "dtagent", "KILL")
    }

    /// `kill -9`.
    pub(crate) fn kill_target(&self) -> Result<()> {
        end(self.target(), "dttarget", "KILL")
    }

    /// Ends the agent in an orderly way.
    pub(crate) fn stop_agent(&self) -> Result<()> {
        end(&self.source, "dtagent", "TERM")
    }

    /// Ends the target in an orderly way.
    pub(crate) fn stop_target(&self) -> Result<()> {
        end(self.target(), "dttarget", "TERM")
    }

    /// What both daemons have logged, for whoever has to find out why a story failed.
    pub(crate) fn logs(&self) -> Result<String> {
        let target = self.target().sh("cat /var/log/dttarget.log")?;
        Ok(format!("{}\n---- target:\n{target}", self.agent_log()?))
    }

    /// What the agent has logged.
    pub(crate) fn agent_log(&self) -> Result<String> {
        self.source.sh("cat /var/log/dtagent.log")
    }

    // Commands.

    /// Runs `dtloop`, and gives its end.
    pub(crate) fn dtloop(&self, arguments: &str) -> Result<Output> {
        self.source
            .try_sh_within(patience(60), format!("dtloop {arguments}"))
    }

    /// Runs `dtloop`, which must end with this code; gives all it said.
    pub(crate) fn expect(&self, arguments: &str, code: i32) -> Result<String> {
        let output = self.dtloop(arguments)?;
        if output.code != code {
            bail!(
                "dtloop {arguments}: not {code} but {output}\n{}",
                self.logs()?
            );
        }
        Ok(output.text() + &output.complaint())
    }

    /// Runs `dtloop` with `--json`, which must end with this code; gives the last line it printed.
    pub(crate) fn ask(&self, arguments: &str, code: i32) -> Result<Value> {
        let text = self.expect(&format!("{arguments} --json"), code)?;
        let line = text.lines().last().context("no answer")?;
        serde_json::from_str(line).with_context(|| format!("dtloop {arguments}: no answer: {text}"))
    }

    /// A mirror, to its end; gives what came of it.
    pub(crate) fn mirror(&self, kind: &str) -> Result<Value> {
        let answer = self.ask(&format!("mirror start {kind}"), 0)?;
        let result = answer["mirror"][0].clone();
        ensure!(result["complete"] == true, "{answer}");
        Ok(result)
    }

    /// A verification, to its end.
    pub(crate) fn verify(&self, options: &str, code: i32) -> Result<Value> {
        Ok(self.ask(&format!("verify {options}"), code)?["verify"][0].clone())
    }

    /// Waits until the target has everything.
    pub(crate) fn wait(&self) -> Result<()> {
        self.expect("wait --timeout 3m", 0).map(drop)
    }

    /// All of the status.
    pub(crate) fn status(&self) -> Result<Value> {
        let text = self.source.sh("dtloop status --json")?;
        serde_json::from_str(&text).with_context(|| format!("no status: {text}"))
    }

    /// What the status says of the device.
    pub(crate) fn device(&self) -> Result<Value> {
        Ok(self.status()?["sets"][0]["devices"][0].clone())
    }

    /// What the agent says of the set.
    pub(crate) fn set(&self) -> Result<Value> {
        Ok(self.status()?["sets"][0]["agent"].clone())
    }

    /// A counter that the module keeps of the device.
    pub(crate) fn counter(&self, name: &str) -> Result<u64> {
        let value = self.device()?["kernel"][name].clone();
        value.as_u64().with_context(|| format!("{name} is {value}"))
    }

    /// State of the device, as the agent sees it.
    pub(crate) fn state(&self) -> Result<String> {
        let state = self.device()?["agent"]["state"]["state"].clone();
        Ok(state.as_str().unwrap_or("unknown").to_owned())
    }

    /// Waits for a state of the device.
    pub(crate) fn wait_state(&self, state: &str) -> Result<()> {
        let mut last = String::new();
        let outcome = wait_until(state, patience(40), || {
            last = self.state()?;
            Ok(last == state)
        });
        if outcome.is_err() {
            bail!(
                "the device is {last}, not {state}: {}\n{}",
                self.status()?,
                self.logs()?
            );
        }
        outcome
    }

    // Load and result.

    /// Writes to the device at random, not faster than this.
    pub(crate) fn load(&self, per_second: u32) -> Result<Job> {
        self.source.spawn(format!(
            "exec fio --name=load --filename={DEV} --ioengine=libaio --direct=1 --rw=randwrite --bssplit=512/20:4k/50:20k/15:64k/15 \
             --blockalign=512 --iodepth=8 --fsync=40 --time_based --runtime=600 --rate_iops={per_second}"
        ))
    }

    /// Ends a load, which must have gone on until now.
    pub(crate) fn end_load(&self, mut load: Job) -> Result<()> {
        if !load.is_running() {
            bail!(
                "the load has ended by itself: {}",
                load.wait(Duration::ZERO)?
            );
        }
        load.kill(2)?;
        load.wait(patience(30)).map(drop)
    }

    /// Writes random bytes.
    pub(crate) fn write(&self, at_mib: u64, mib: u64) -> Result<()> {
        self.source
            .sh(format!("dd if=/dev/urandom of={DEV} bs=1M seek={at_mib} count={mib} oflag=direct conv=notrunc,fsync status=none"))
            .map(drop)
    }

    /// Waits, and fails unless source and copy are the same byte for byte, and known to be.
    pub(crate) fn same(&self) -> Result<()> {
        self.wait()?;
        self.expect("status --check", 0)?;
        self.alike(DEV, IMAGE, &[&self.disk])
    }

    /// Fails unless a device of the source and its copy hold the same, and what else there is of it on the source.
    pub(crate) fn alike(&self, device: &str, copy: &str, others: &[&str]) -> Result<()> {
        let here = [&[device], others].concat();
        let jobs = [self.source.digests(&here)?, self.target().digests(&[copy])?];
        let mut digests = String::new();
        for job in jobs {
            digests += &job.finish(patience(60))?;
            digests.push('\n');
        }
        let mut lines = digests.lines();
        let first = lines.next();
        ensure!(
            lines.all(|line| Some(line) == first),
            "{here:?} and {copy} differ:\n{digests}"
        );
        Ok(())
    }

    /// Takes everything down; nothing may be left.
    pub(crate) fn finish(self) -> Result<()> {
        self.finish_with_sets(&[])
    }

    /// The same with further sets, whose devices are detached.
    pub(crate) fn finish_with_sets(self, sets: &[&str]) -> Result<()> {
        self.source.sh("dtguest settle; dtloop detach 101")?;
        self.stop_agent()?;
        self.stop_target()?;
        // The set is there until its last records are shipped.
        for set in sets {
            self.source
                .sh(format!("dtloop set {set} --remove --discard-records"))?;
        }
        self.source.sh(
            "dtloop set default --remove --discard-records || dtloop status >&2; rmmod dtloop",
        )?;
        for vm in [&self.source, self.target()] {
            let panics = vm.sh(
                "grep -h panicked /var/log/dtagent.log /var/log/dttarget.log 2>/dev/null || true",
            )?;
            ensure!(panics.is_empty(), "{}: {panics}", vm.name());
            vm.check()?;
        }
        Ok(())
    }
}

fn start(vm: &Vm, name: &str, command: &str) -> Result<()> {
    vm.sh(start_script(name, command)).map(drop)
}

/// Starts a daemon in the background, with its log and its number where they are looked for.
pub(crate) fn start_script(name: &str, command: &str) -> String {
    format!(
        "setsid -f bash -c 'echo $$ >/run/{name}.pid; exec {command}' >>/var/log/{name}.log 2>&1 </dev/null"
    )
}

fn end(vm: &Vm, name: &str, signal: &str) -> Result<()> {
    vm.sh(format!(
        "pid=$(cat /run/{name}.pid); kill -{signal} $pid; while [ -e /proc/$pid ]; do sleep 0.05; done"
    ))
    .map(drop)
}
