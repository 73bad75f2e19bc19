// SPDX-License-Identifier: GPL-2.0-only

//! Short memory, and faults that only the debug kernel can make. The other kernel plays none of these stories.

use anyhow::Result;
use dtloop_tests::{Disk, Vm, note, patience, wait_until};

use crate::module_rig::{LOOP, Rig};

/// Has the kernel take allocations that may sleep for candidates, too, and be quiet about those that it lets fail.
const FAULTS: &str = "cd /sys/kernel/debug && for kind in failslab fail_page_alloc; do
    echo N >$kind/ignore-gfp-wait; echo 0 >$kind/verbose; done; echo 0 >fail_page_alloc/min-order";

/// Whatever allocation fails while a set or a device is made, nothing is left of it.
#[test]
fn any_allocation_may_fail() -> Result<()> {
    let builder = Vm::builder("starved").disk(Disk::new("source", 8));
    let rig = Rig::with(builder, "--ring 4194304")?;
    let node = rig.vm.device("source")?;
    // Allocations whose failure the rest of the kernel thinks worth a line.
    rig.vm.allow("page allocation failure");
    rig.vm.allow("kobject_add_internal failed");
    rig.vm.sh(FAULTS)?;
    let script = format!("dtctl starve set {node}");
    note(rig.vm.sh_within(patience(400), script)?);
    // All is as before.
    rig.attach("")?;
    rig.vm.sh(format!(
        "dd if=/dev/urandom of=/dev/loop{LOOP} bs=64k count=16 oflag=direct status=none"
    ))?;
    rig.drain_all("--resync")?;
    rig.detach()?;
    rig.vm
        .sh("dtguest settle; dtctl destroy set --discard; rmmod dtloop")?;
    let script = "dtctl starve-load $(modinfo -n dtloop)";
    note(rig.vm.sh_within(patience(400), script)?);
    rig.vm.sh("modprobe dtloop; dtctl create set")?;
    rig.finish()
}

/// With no memory for a single bio, the changes go on with what was set aside for them: captured or not, overlapping
/// or not.
#[test]
fn changes_go_on_without_memory() -> Result<()> {
    let builder = Vm::builder("nomem").disk(Disk::new("source", 16));
    let rig = Rig::with(builder, "--ring 4194304")?;
    rig.vm.sh(FAULTS)?;
    rig.attach("")?;
    rig.vm.sh(
        "for cache in /sys/kernel/slab/bio-*; do echo 1 >$cache/failslab; done
         cd /sys/kernel/debug/failslab; echo Y >cache-filter; echo 1 >interval; echo 1000000 >times; echo 100 >probability",
    )?;
    // Not more of them: all caches of bios fail, and the pools of others have two elements.
    let times = 25;
    let load = || {
        let script = format!("dtscribble overlap /dev/loop{LOOP} --times {times} --within 2097152");
        rig.vm.sh_within(patience(120), script)
    };
    let consumer = rig.drain("")?;
    load()?;
    rig.end_drain(consumer)?;
    // And without a consumer: the ring gets full, and they go by it.
    load()?;
    assert!(rig.count(LOOP, "tracked")? > 0, "all fitted into the ring");
    rig.drain_all("--resync")?;
    let left: u64 = rig
        .vm
        .sh("cat /sys/kernel/debug/failslab/times; echo 0 >/sys/kernel/debug/failslab/probability")?
        .parse()?;
    assert!(left < 1_000_000 - 2 * times, "nothing failed: {left}");
    rig.same()?;
    rig.detach()?;
    rig.finish()
}

/// Requests to the backing device fail at random, reads of SYNC among them.
#[test]
fn requests_that_fail_at_random_are_made_good() -> Result<()> {
    let rig = Rig::start("unlucky", 16)?;
    let name = rig.vm.device("source")?.replace("/dev/", "");
    rig.attach("")?;
    rig.vm.sh(format!(
        "cd /sys/kernel/debug/fail_make_request; echo 0 >verbose; echo 1 >interval; echo -1 >times; echo 15 >probability
         echo 1 >/sys/block/{name}/make-it-fail"
    ))?;
    let consumer = rig.drain(&format!("--mirror {LOOP} --chunk 16384"))?;
    let fails = format!(
        "fio --name=f --filename=/dev/loop{LOOP} --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bsrange=512-64k \
         --io_size=16M --continue_on_error=all >/dev/null 2>&1 || true"
    );
    rig.vm.sh_within(patience(120), fails)?;
    wait_until("the mirror", patience(60), || {
        Ok(rig.count(LOOP, "sync_sectors")? >= 16 << 11)
    })?;
    let report = rig.end_drain(consumer)?;
    assert!(report["failed"].as_u64() > Some(0), "{report}");
    assert!(rig.count(LOOP, "dirty_blocks")? > 0, "{report}");
    rig.vm
        .sh(format!("echo 0 >/sys/block/{name}/make-it-fail"))?;
    // A SYNC that failed cleared nothing, so what it was about is mirrored again.
    rig.drain_all(&format!("--mirror {LOOP} --resync"))?;
    assert_eq!(rig.count(LOOP, "dirty_blocks")?, 0);
    rig.same()?;
    rig.detach()?;
    rig.finish()
}
