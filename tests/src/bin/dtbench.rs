// SPDX-License-Identifier: GPL-2.0-only

//! `scripts/bench`: what capturing costs, measured in instructions.
//!
//! A machine with one virtual processor on which one guest instruction takes one guest nanosecond, so that two runs agree
//! to a fraction of a percent whatever else the host does. Each row is a device over the same RAM disk, written once
//! before; each column a fio workload; a figure is operations per guest second, with its ratio to the raw RAM disk of the
//! same run. The capturing rows have a consumer that drains and releases, on the same processor.
//!
//! Then what the write-intent map costs: the first write of a region, which waits for its mark, against a later one. Its
//! file lies on a RAM disk as well, so the figures are what the processor does; a disk's own write comes on top.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use dtloop_tests::Vm;
use serde_json::{Value, json};

const USAGE: &str =
    "usage: scripts/bench [--json FILE] [--rows raw,dm-linear,loop,dtloop-unmarked,dtloop]";

/// Where the machine keeps intent files: a RAM disk of their own.
const INTENT_DIR: &str = "/run/intent";

/// Least ratio of hot writes with an intent map to those without.
const HOT_GOAL: f64 = 0.98;

/// Size of the RAM disk in MiB.
const DISK_MIB: u64 = 256;

struct Workload {
    name: &'static str,
    rw: &'static str,
    block: &'static str,
    depth: u32,
    mib: u32,
    /// Least ratio to raw for the capturing row.
    goal: f64,
}

/// The four of the design. Amounts are so large that fio's clock of milliseconds does not matter.
const WORKLOADS: [Workload; 4] = [
    Workload {
        name: "4k-randwrite-qd1",
        rw: "randwrite",
        block: "4k",
        depth: 1,
        mib: 256,
        goal: 0.65,
    },
    Workload {
        name: "4k-randwrite-qd16",
        rw: "randwrite",
        block: "4k",
        depth: 16,
        mib: 256,
        goal: 0.65,
    },
    Workload {
        name: "128k-write-qd8",
        rw: "write",
        block: "128k",
        depth: 8,
        mib: 1024,
        goal: 0.50,
    },
    Workload {
        name: "4k-randread-qd16",
        rw: "randread",
        block: "4k",
        depth: 16,
        mib: 256,
        goal: 0.95,
    },
];

#[derive(Clone, Copy, PartialEq)]
enum Target {
    Raw,
    DmLinear,
    Loop,
    /// Without an intent map.
    Unmarked,
    /// As it comes: with one, whose regions are hot.
    Dtloop,
}

const TARGETS: [(Target, &str); 5] = [
    (Target::Raw, "raw"),
    (Target::DmLinear, "dm-linear"),
    (Target::Loop, "loop"),
    (Target::Unmarked, "dtloop-unmarked"),
    (Target::Dtloop, "dtloop"),
];

impl Target {
    /// Sets the device up and gives its node.
    fn set_up(self, vm: &Vm) -> Result<String> {
        match self {
            Self::Raw => Ok("/dev/ram0".into()),
            Self::DmLinear => {
                vm.sh(format!(
                    "echo 0 {} linear /dev/ram0 0 | dmsetup create bench",
                    DISK_MIB * 2048
                ))?;
                Ok("/dev/mapper/bench".into())
            }
            Self::Loop => vm.sh("modprobe loop; losetup -f --show --direct-io=on /dev/ram0"),
            Self::Unmarked => attach(vm, "off"),
            Self::Dtloop => {
                let node = attach(vm, &format!("{INTENT_DIR}/default"))?;
                // Every region is hot from here on.
                vm.sh(format!(
                    "dd if=/dev/zero of={node} bs=1M count={DISK_MIB} oflag=direct status=none"
                ))?;
                Ok(node)
            }
        }
    }

    /// Takes the device down; an error if not everything went through the stream.
    fn take_down(self, vm: &Vm, node: &str) -> Result<()> {
        match self {
            Self::Raw => {}
            Self::DmLinear => drop(vm.sh("dmsetup remove bench")?),
            Self::Loop => drop(vm.sh(format!("losetup -d {node}"))?),
            Self::Unmarked | Self::Dtloop => detach(vm)?,
        }
        Ok(())
    }

    /// Whether it captures changes.
    fn captures(self) -> bool {
        matches!(self, Self::Unmarked | Self::Dtloop)
    }
}

/// Attaches the RAM disk with a consumer; gives the node.
fn attach(vm: &Vm, intent: &str) -> Result<String> {
    vm.sh(format!(
        "modprobe dtloop; dtloop attach /dev/ram0 --loop 150 --volume bench --intent {intent} --region-size 64K >/dev/null
         dtguest settle
         dtdrain run --set default --discard >/tmp/drained 2>&1 & echo $! >/run/drain.pid"
    ))?;
    Ok("/dev/loop150".into())
}

/// Detaches it and removes the set; an error if not everything went through the stream.
fn detach(vm: &Vm) -> Result<()> {
    let status: Value = serde_json::from_str(&vm.try_sh("dtloop status --json")?.text())?;
    let gaps = &status["sets"][0]["kernel"]["gap_changes"];
    if gaps != &json!(0) {
        bail!(
            "{gaps} changes went by the stream: the consumer did not keep up, the figures are worthless"
        );
    }
    vm.sh(format!(
        "kill $(cat /run/drain.pid); while [ -e /proc/$(cat /run/drain.pid) ]; do sleep 0.1; done
         dtloop detach loop150 && rm -f {INTENT_DIR}/default"
    ))?;
    Ok(())
}

/// What the first and the second write of each region take, in microseconds as the application sees them; a region is
/// 64 KiB, and one block of each is written.
fn strides(vm: &Vm, depth: u32) -> Result<(f64, f64)> {
    let node = attach(vm, &format!("{INTENT_DIR}/default"))?;
    let regions = DISK_MIB * 16;
    let pass = || -> Result<f64> {
        let report = vm.sh_within(
            Duration::from_secs(600),
            format!(
                "fio --name=stride --filename={node} --ioengine=io_uring --direct=1 --rw=write:60k --bs=4k --iodepth={depth} \
                 --size={DISK_MIB}m --number_ios={regions} --output-format=json"
            ),
        )?;
        let report: Value = serde_json::from_str(&report).context("fio's report")?;
        let done = &report["jobs"][0]["write"];
        if done["total_ios"] != json!(regions) {
            bail!("not one write for each of {regions} regions: {done}");
        }
        Ok(done["lat_ns"]["mean"].as_f64().context("a latency")? / 1000.0)
    };
    let misses = || -> Result<u64> {
        let status: Value = serde_json::from_str(&vm.try_sh("dtloop status --json")?.text())?;
        status["sets"][0]["intent"]["misses"]
            .as_u64()
            .with_context(|| format!("no misses in {status}"))
    };
    let cold = pass()?;
    let waited = misses()?;
    let hot = pass()?;
    if waited < regions || misses()? != waited {
        bail!(
            "{waited} writes waited for a mark at first, {} in the end",
            misses()?
        );
    }
    detach(vm)?;
    Ok((cold, hot))
}

fn measure(vm: &Vm, node: &str, load: &Workload) -> Result<f64> {
    let command = format!(
        "fio --name=bench --filename={node} --ioengine=io_uring --direct=1 --rw={} --bs={} --iodepth={} --size={DISK_MIB}m \
         --io_size={}m --norandommap --randrepeat=1 --output-format=json",
        load.rw, load.block, load.depth, load.mib
    );
    let report = vm.sh_within(Duration::from_secs(600), &command)?;
    let report: Value = serde_json::from_str(&report).context("fio's report")?;
    let side = if load.rw.ends_with("read") {
        "read"
    } else {
        "write"
    };
    let done = &report["jobs"][0][side];
    let (ops, ms) = (
        done["total_ios"].as_f64().unwrap_or(0.0),
        done["runtime"].as_f64().unwrap_or(0.0),
    );
    if ops < 1.0 || ms < 1.0 {
        bail!("fio did nothing on {node}: {report}");
    }
    Ok(ops / ms * 1000.0)
}

struct Options {
    json: Option<PathBuf>,
    rows: Vec<(Target, &'static str)>,
}

fn options() -> Result<Options> {
    let mut options = Options {
        json: None,
        rows: TARGETS.to_vec(),
    };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--json" => options.json = Some(args.next().context(USAGE)?.into()),
            "--rows" => {
                let wanted = args.next().context(USAGE)?;
                let find = |name: &str| {
                    TARGETS
                        .iter()
                        .find(|row| row.1 == name)
                        .copied()
                        .with_context(|| format!("no row {name}; {USAGE}"))
                };
                options.rows = wanted.split(',').map(find).collect::<Result<_>>()?;
            }
            _ => bail!("{USAGE}"),
        }
    }
    if options.rows.first().map(|row| row.0) != Some(Target::Raw) {
        options.rows.retain(|row| row.0 != Target::Raw);
        options.rows.insert(0, TARGETS[0]);
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = options()?;
    // A processor without fast string instructions: QEMU counts each step of those as an instruction, one a byte, while a
    // real one moves 32 bytes or more a cycle. Plain loops are nearer to the truth, and what the goals were set with.
    let mut vm = Vm::builder("bench")
        .icount()
        .cpu("qemu64")
        .memory_mib(1024)
        .start()?;
    vm.sh(format!(
        "modprobe brd rd_nr=2 rd_size={}; dd if=/dev/zero of=/dev/ram0 bs=1M count={DISK_MIB} oflag=direct status=none
         mkfs.ext4 -q /dev/ram1 16M; mkdir {INTENT_DIR}; mount /dev/ram1 {INTENT_DIR}",
        DISK_MIB * 1024
    ))?;
    println!("operations per guest second, and ratio to raw\n");
    print!("{:<16}", "");
    for load in &WORKLOADS {
        print!("{:>24}", load.name);
    }
    println!();
    let (mut raw, mut unmarked) = (Vec::new(), Vec::new());
    let mut rows = Vec::new();
    let mut missed = Vec::new();
    for (target, name) in &options.rows {
        let node = target.set_up(&vm)?;
        let mut line = format!("{name:<16}");
        for (column, load) in WORKLOADS.iter().enumerate() {
            let iops = measure(&vm, &node, load)?;
            if *target == Target::Raw {
                raw.push(iops);
            }
            let ratio = iops / raw[column];
            line += &format!("{:>24}", format!("{iops:.0} ({ratio:.2})"));
            rows.push(json!({"target": name, "workload": load.name, "iops": iops.round(), "ratio": (ratio * 1000.0).round() / 1000.0}));
            if target.captures() && ratio < load.goal {
                missed.push(format!(
                    "{name}, {}: {ratio:.3} of raw, the goal is {}",
                    load.name, load.goal
                ));
            }
            match target {
                Target::Unmarked => unmarked.push(iops),
                Target::Dtloop
                    if unmarked
                        .get(column)
                        .is_some_and(|than| iops < than * HOT_GOAL) =>
                {
                    missed.push(format!(
                        "{}: {:.3} of what it is without an intent map, the goal is {HOT_GOAL}",
                        load.name,
                        iops / unmarked[column]
                    ));
                }
                _ => (),
            }
        }
        println!("{line}");
        target.take_down(&vm, &node)?;
    }
    if options.rows.iter().any(|row| row.0 == Target::Dtloop) {
        println!("\nmicroseconds for a write of 4k, intent file on a RAM disk\n");
        for depth in [1, 16] {
            let (cold, hot) = strides(&vm, depth)?;
            println!("qd{depth:<4} cold region {cold:>8.1}   hot region {hot:>8.1}");
            for (workload, us) in [("cold", cold), ("hot", hot)] {
                rows.push(json!({"target": "dtloop", "workload": format!("4k-{workload}-region-qd{depth}"),
                    "us": (us * 10.0).round() / 10.0}));
            }
        }
    }
    vm.shutdown()?;
    if let Some(path) = options.json {
        std::fs::write(&path, serde_json::to_string_pretty(&rows)? + "\n")
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    if !missed.is_empty() {
        bail!("below the goal: {}", missed.join("; "));
    }
    Ok(())
}
