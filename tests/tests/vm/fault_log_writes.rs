// SPDX-License-Identifier: GPL-2.0-only

//! Every write of the disk behind the device and of the volume is logged by the device-mapper target `log-writes`. The
//! volume, cut off at any of its flushes, must be a state that a crash could have left of the source, and a file system
//! that is whole.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dtloop_tests::{Disk, Vm, full_run, note, patience};
use serde_json::Value;

use crate::replication_rig::{DEV, IMAGE, Rig};

const MIB: u64 = 64;
const LOG_MIB: u64 = 1024;

/// Files come and go, most of them soon durable.
const WORK: &str = "for round in $(seq 1000); do
    [ ! -e /tmp/enough ] || exit 0
    mkdir /mnt/$round; cp -a /etc/[a-f]* /mnt/$round/; sync -f /mnt
    for file in 1 2 3 4 5; do dd if=/dev/urandom of=/mnt/$round/$file bs=20k count=$file conv=fsync status=none; done
    mv /mnt/$round/3 /mnt/last; find /mnt/$round -name '*.conf' -delete
    [ $round -lt 3 ] || rm -r /mnt/$((round - 2))
done";

#[test]
fn every_flush_of_the_copy_is_a_prefix_of_the_source() -> Result<()> {
    let rig = logged()?;
    let vm = rig.source();
    rig.start_target()?;
    rig.attach("")?;
    rig.start_agent()?;
    // What a discarded range shows is in no log.
    vm.sh(format!(
        "mkfs.ext4 -q -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 {DEV}; mount {DEV} /mnt"
    ))?;
    rig.mirror("--full")?;
    // Ending, the target makes all durable; from there on it is a state at each of its flushes.
    rig.stop_target()?;
    mark(vm, "copy", "mirrored")?;
    rig.start_target()?;
    let work = vm.spawn(WORK)?;
    for round in 0..if full_run() { 24 } else { 6 } {
        // Checkpoints of its own, those of an end, and the journal replayed after a kill.
        sleep(Duration::from_secs(3));
        if round % 3 == 1 {
            rig.kill_target()?;
        } else {
            rig.stop_target()?;
        }
        rig.start_target()?;
    }
    vm.sh("touch /tmp/enough")?;
    work.finish(patience(60))?;
    vm.sh("umount /mnt")?;
    rig.same()?;
    rig.stop_target()?;
    for name in ["source", "copy"] {
        mark(vm, name, "end")?;
    }
    let entries = compare(&rig)?;
    canary(&rig)?;
    mount_each(&rig, &entries)?;
    rig.start_target()?;
    rig.finish()
}

/// Disk and volume, both with a log of their writes.
fn logged() -> Result<Rig> {
    let builder = ["disk", "copy"]
        .iter()
        .fold(Vm::builder("both"), |builder, disk| {
            builder.disk(Disk::new(disk, MIB))
        });
    let vm = builder
        .disk(Disk::new("sourcelog", LOG_MIB))
        .disk(Disk::new("copylog", LOG_MIB))
        .start()?;
    for (name, disk, log) in [("source", "disk", "sourcelog"), ("copy", "copy", "copylog")] {
        let (disk, log) = (vm.device(disk)?, vm.device(log)?);
        vm.sh(format!(
            "dmsetup create {name} --table \"0 $(blockdev --getsz {disk}) log-writes {disk} {log}\"; dtguest settle"
        ))?;
    }
    vm.sh(format!("mkdir -p /srv; ln -s /dev/mapper/copy {IMAGE}"))?;
    let mut rig = Rig::with(vm, None, MIB)?;
    rig.disk = "/dev/mapper/source".to_owned();
    Ok(rig)
}

fn mark(vm: &Vm, name: &str, text: &str) -> Result<()> {
    vm.sh(format!("dmsetup message {name} 0 mark {text}"))
        .map(drop)
}

fn comparison(rig: &Rig, options: &str) -> Result<dtloop_tests::Output> {
    let vm = rig.source();
    let (source, copy) = (vm.device("sourcelog")?, vm.device("copylog")?);
    vm.try_sh_within(
        patience(120),
        format!(
            "dtwritelog compare --source {source} --target {copy} --from-mark mirrored {options}"
        ),
    )
}

/// Proves the prefix at each flush; gives how many entries of the copy's log come before each.
fn compare(rig: &Rig) -> Result<Vec<u64>> {
    let output = comparison(rig, "")?;
    ensure!(output.ok(), "{output}");
    let report: Value = serde_json::from_str(&output.text())?;
    let flushes = report["target_flushes"].as_array().context("no flushes")?;
    note(format!(
        "the copy was a prefix of the source ({} flushes) at each of {} flushes, the last one that after flush {}",
        report["source_flushes"],
        flushes.len(),
        flushes.last().map_or(&Value::Null, |last| &last["to"]),
    ));
    ensure!(
        flushes.len() > 5,
        "too few flushes to prove anything: {report}"
    );
    flushes
        .iter()
        .map(|flush| flush["entries"].as_u64().context("no number"))
        .collect()
}

/// A copy that leaves a write out is no prefix. One that wrote what was there already is not missed, so some are tried.
fn canary(rig: &Rig) -> Result<()> {
    let mut found = 0;
    for behind in [2, 5, 13] {
        let output = comparison(rig, &format!("--leave-out {behind}"))?;
        if !output.ok() {
            ensure!(
                output.complaint().contains("not a legal prefix"),
                "{output}"
            );
            found += 1;
        }
    }
    note(format!(
        "of 3 writes that were left out, {found} were missed"
    ));
    ensure!(found > 0, "a write was left out, and nobody noticed");
    Ok(())
}

/// The copy as it was at its flushes: it is mounted, and whole.
fn mount_each(rig: &Rig, entries: &[u64]) -> Result<()> {
    let log = rig.source().device("copylog")?;
    let step = if full_run() {
        1
    } else {
        entries.len().div_ceil(5)
    };
    for through in entries.iter().rev().step_by(step) {
        rig.source()
            .sh_within(
                patience(60),
                format!(
                    "modprobe loop; mkdir -p /srv/at
                     dtwritelog replay {log} --image /srv/at.img --bytes {} --through {through}
                     mount -o loop /srv/at.img /srv/at; ls -lR /srv/at >/dev/null; umount /srv/at; e2fsck -fn /srv/at.img",
                    MIB << 20
                ),
            )
            .with_context(|| format!("the copy after {through} entries of its log"))?;
    }
    Ok(())
}
