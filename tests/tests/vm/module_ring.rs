// SPDX-License-Identifier: GPL-2.0-only

//! The full ring, and SYNC reads.

use anyhow::Result;
use dtloop_tests::{Disk, Vm, patience, wait_until};

use crate::module_rig::{LOOP, Rig};

/// Signals.
const SIGCONT: i32 = 18;
const SIGSTOP: i32 = 19;

/// A set with the smallest ring.
fn small_ring(name: &str, policy: &str) -> Result<Rig> {
    let rig = Rig::with(
        Vm::builder(name).disk(Disk::new("source", 24)),
        &format!("--ring 4194304 --policy {policy}"),
    )?;
    rig.attach("")?;
    Ok(rig)
}

fn write(mib: u32, seek_mib: u32) -> String {
    format!(
        "dd if=/dev/urandom of=/dev/loop{LOOP} bs=256k count={} seek={} oflag=direct status=none",
        mib * 4,
        seek_mib * 4
    )
}

#[test]
fn a_full_ring_is_tracked_and_made_good() -> Result<()> {
    let rig = small_ring("track", "track")?;
    rig.vm.sh(write(2, 0))?;
    assert_eq!(rig.count("set", "gap_changes")?, 0);
    // Nobody drains: the application goes on all the same.
    rig.vm.sh(write(12, 4))?;
    assert!(rig.count("set", "gap_changes")? > 0);
    assert!(rig.count(LOOP, "dirty_blocks")? > 0);
    assert_eq!(rig.get("set", "gap")?, "true");
    rig.vm
        .sh(format!("blkdiscard -z -o 20M -l 1M /dev/loop{LOOP}"))?;
    let report = rig.drain_all("")?;
    assert!(
        report["by_operation"]["gap"].as_u64() >= Some(1),
        "{report}"
    );
    assert_eq!(
        report["gap_changes"].as_u64(),
        Some(rig.count("set", "gap_changes")?),
        "{report}"
    );
    assert!(
        rig.same().is_err(),
        "the replica can not know what was not captured"
    );
    let report = rig.drain_all("--resync")?;
    assert!(
        report["by_operation"]["sync"].as_u64() >= Some(1),
        "{report}"
    );
    assert_eq!(rig.count(LOOP, "dirty_blocks")?, 0);
    rig.same()?;

    // The same with a consumer that does not come along, and goes on by itself.
    let (gaps, changes) = (rig.count("set", "gaps")?, rig.count("set", "gap_changes")?);
    let consumer = rig.draining("")?;
    consumer.kill(SIGSTOP)?;
    rig.vm.sh(write(12, 2))?;
    assert!(rig.count("set", "gap_changes")? > changes);
    consumer.kill(SIGCONT)?;
    rig.end_drain(consumer)?;
    assert!(rig.count("set", "gaps")? > gaps);
    rig.drain_all("--resync")?;
    rig.same()?;
    rig.detach()?;
    rig.finish()
}

#[test]
fn a_full_ring_makes_writers_wait_if_wanted() -> Result<()> {
    let rig = small_ring("block", "block")?;
    let writers_wait = || {
        wait_until("a full ring", patience(30), || {
            Ok(rig.count("set", "used_bytes")? > 3 << 20)
        })?;
        rig.vm
            .wait_sh(patience(20), "pgrep -x dd && ! pgrep -x dd --runstates R")
    };
    // A consumer that is asleep, and then not: everything is captured, nothing is tracked.
    let consumer = rig.draining("")?;
    consumer.kill(SIGSTOP)?;
    let writer = rig.vm.spawn(write(16, 0))?;
    writers_wait()?;
    consumer.kill(SIGCONT)?;
    writer.finish(patience(60))?;
    rig.end_drain(consumer)?;
    assert_eq!(rig.count("set", "gap_changes")?, 0);
    assert!(rig.count("set", "room_waits")? > 0);
    assert_eq!(rig.count(LOOP, "dirty_blocks")?, 0);
    rig.same()?;

    // A consumer that never releases: writers wait, and can be killed.
    let consumer = rig.draining("--hold")?;
    let mut victim = rig.vm.spawn(write(12, 0))?;
    let mut other = rig.vm.spawn(write(12, 12))?;
    writers_wait()?;
    assert!(victim.is_running() && other.is_running());
    victim.kill(9)?;
    assert_eq!(victim.wait(patience(20))?.code, 128 + 9);
    assert!(other.is_running());
    // Its death releases them.
    consumer.kill(9)?;
    consumer.wait(patience(20))?;
    other.finish(patience(30))?;
    rig.drain_all("--resync")?;
    rig.same()?;

    // So does a change of the policy.
    let consumer = rig.draining("--hold")?;
    let waiter = rig.vm.spawn(write(12, 0))?;
    writers_wait()?;
    rig.vm.sh("dtctl policy set track")?;
    waiter.finish(patience(30))?;
    consumer.kill(15)?;
    consumer.finish(patience(20))?;
    rig.drain_all("--resync")?;
    rig.same()?;
    rig.detach()?;
    rig.finish()
}

#[test]
fn writers_are_slowed_down_as_the_ring_fills() -> Result<()> {
    let rig = small_ring("throttle", "throttle")?;
    rig.vm
        .sh("dtctl policy set throttle --start 40 --stop 20 --delay 200")?;
    // Without a consumer nobody is slowed down: it would be of no use.
    rig.vm.sh(write(6, 0))?;
    assert_eq!(rig.count("set", "throttles")?, 0);
    rig.drain_all("--resync")?;

    // A consumer that is asleep: each write waits its time, and goes on when the ring is full.
    let consumer = rig.draining("")?;
    consumer.kill(SIGSTOP)?;
    let tracked = rig.count("set", "gap_changes")?;
    rig.vm.sh(write(6, 0))?;
    let (throttles, longest) = (
        rig.count("set", "throttles")?,
        rig.count("set", "throttle_ns_max")? / 1_000_000,
    );
    // 24 writes, of which the first ones found the ring below the start level.
    assert!((10..24).contains(&throttles), "{throttles}");
    assert!((20..1200).contains(&longest), "{longest} ms");
    assert!(rig.count("set", "gap_changes")? > tracked);
    assert_eq!(rig.get("set", "throttling")?, "true");
    // Awake, it drains below the stop level, and nobody waits any more.
    consumer.kill(SIGCONT)?;
    rig.wait_drained()?;
    assert_eq!(rig.get("set", "throttling")?, "false");
    rig.vm.sh(write(1, 0))?;
    assert_eq!(rig.count("set", "throttles")?, throttles);
    rig.end_drain(consumer)?;
    rig.drain_all("--resync")?;
    rig.same()?;

    let refused = |options: &str| -> Result<()> {
        let output = rig
            .vm
            .try_sh(format!("dtctl policy set throttle {options}"))?;
        assert!(output.complaint().contains("levels"), "{options}: {output}");
        Ok(())
    };
    refused("--start 101")?;
    refused("--start 30 --stop 30")?;
    refused("--delay 10001")?;
    rig.detach()?;
    rig.finish()
}

#[test]
fn a_mirror_of_a_device_in_use_is_identical() -> Result<()> {
    let rig = Rig::with(
        Vm::builder("mirror").disk(Disk::new("source", 24)),
        "--ring 8388608 --policy block",
    )?;
    let node = rig.vm.device("source")?;
    rig.vm.sh(format!(
        "dd if=/dev/urandom of={node} bs=1M oflag=direct status=none count=24"
    ))?;
    rig.vm
        .sh("dd if=/dev/urandom of=/tmp/replica bs=1M count=24 status=none")?;
    rig.attach("")?;
    let load = rig.vm.spawn(format!(
        "exec fio --name=load --filename=/dev/loop{LOOP} --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite \
         --bsrange=512-32k --time_based --runtime=300 >/dev/null"
    ))?;
    wait_until("the load", patience(20), || {
        Ok(rig.count(LOOP, "writes")? > 10)
    })?;
    let consumer = rig.drain(&format!("--mirror {LOOP}"))?;
    wait_until("the mirror", patience(60), || {
        Ok(rig.count(LOOP, "sync_sectors")? >= (24 << 11))
    })?;
    load.kill(15)?;
    load.wait(patience(30))?;
    let report = rig.end_drain(consumer)?;
    assert_eq!(report["synced_sectors"], 24 << 11, "{report}");
    assert_eq!(rig.count("set", "sync_bytes")?, 0);
    assert_eq!(rig.count(LOOP, "bypass_sectors")?, 0);
    rig.same()?;

    // A part of it, as dirty blocks that a consumer gives up.
    rig.vm.sh(format!("dtctl dirty set {LOOP} 1000 77"))?;
    assert!(rig.count(LOOP, "dirty_blocks")? >= 10);
    rig.vm.sh(
        "dd if=/dev/urandom of=/tmp/replica bs=512 seek=1000 count=77 conv=notrunc status=none",
    )?;
    rig.drain_all("--resync")?;
    rig.same()?;
    rig.detach()?;
    rig.finish()
}
