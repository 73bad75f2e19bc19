// SPDX-License-Identifier: GPL-2.0-only

//! Backing devices that fail, hang and vanish; devices that are detached under load.

use anyhow::Result;
use dtloop_tests::{Disk, Job, Kernel, patience, wait_until};

use crate::module_rig::{LOOP, Rig};

/// Writes to the usual device that go on for ever and tell errors by ending.
fn load(rig: &Rig) -> Result<Job> {
    let before = rig.count(LOOP, "writes")?;
    let job = rig.vm.spawn(format!(
        "exec fio --name=load --filename=/dev/loop{LOOP} --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite \
         --bs=4k --time_based --runtime=300 >/dev/null 2>&1"
    ))?;
    wait_until("the load", patience(20), || {
        Ok(rig.count(LOOP, "writes")? > before + 20)
    })?;
    Ok(job)
}

#[test]
fn what_the_backing_device_fails_is_made_good() -> Result<()> {
    let rig = Rig::start("failing", 16)?;
    let back = rig.mapped("source")?;
    let dev = format!("/dev/loop{LOOP}");
    rig.attach_node(&back, LOOP, "")?;
    rig.drain_all("")?;
    let node = rig.vm.device("source")?;
    // Sectors 8192 to 16383 fail.
    let broken =
        format!("0 8192 linear {node} 0\n8192 8192 error\n16384 16384 linear {node} 16384");
    let swap =
        |table: &str| format!("printf '{table}\n' | dmsetup load back && dmsetup resume back");
    let script = swap(&broken.replace('\n', "\\n"));
    rig.vm.sh(script)?;
    let write = |seek: u32| {
        format!("dd if=/dev/urandom of={dev} bs=512k count=1 seek={seek} oflag=direct status=none")
    };
    rig.vm.sh(write(0))?;
    let failed = rig.vm.try_sh(write(9))?;
    assert!(
        !failed.ok() && failed.complaint().contains("Input/output error"),
        "{failed}"
    );
    let failed = rig
        .vm
        .try_sh(format!("blkdiscard -f -z -o 5M -l 64k {dev}"))?;
    assert!(
        !failed.ok() && failed.complaint().contains("Input/output error"),
        "{failed}"
    );
    // One that is half in the broken part.
    let failed = rig.vm.try_sh(format!(
        "dd if=/dev/urandom of={dev} bs=512k count=1 seek=15M oflag=direct,seek_bytes status=none"
    ))?;
    assert!(failed.ok(), "{failed}");
    let failed = rig.vm.try_sh(format!(
        "dd if=/dev/urandom of={dev} bs=512k count=1 seek={} oflag=direct,seek_bytes status=none",
        (4 << 20) - (256 << 10)
    ))?;
    assert!(!failed.ok(), "{failed}");
    let status = rig.vm.sh("dtctl status")?;
    assert!(rig.count(LOOP, "failed")? >= 3, "{status}");
    assert!(rig.count(LOOP, "dirty_blocks")? > 0);
    let report = rig.drain_all("")?;
    assert!(report["failed"].as_u64() >= Some(3), "{report}");

    // A read into the stream fails as well, and what it was to clean stays dirty.
    let dirty = rig.count(LOOP, "dirty_blocks")?;
    let report = rig.drain_all(&format!("--mirror {LOOP} --range 10000:100"))?;
    assert_eq!(report["failed"], 1, "{report}");
    assert!(rig.count(LOOP, "dirty_blocks")? >= dirty);

    rig.vm.sh(swap(&format!("0 32768 linear {node} 0")))?;
    rig.vm.sh(write(10))?;
    rig.drain_all("--resync")?;
    assert_eq!(rig.count(LOOP, "dirty_blocks")?, 0);
    rig.same()?;

    // Errors now and then, under load.
    rig.vm
        .sh(swap(&format!("0 32768 flakey {node} 0 0 1 1 error_writes")))?;
    let fails = format!(
        "fio --name=f --filename={dev} --direct=1 --ioengine=io_uring --iodepth=8 --rw=randwrite --bsrange=512-64k \
         --io_size=24M --continue_on_error=write >/dev/null 2>&1 || true"
    );
    rig.vm.sh_within(patience(60), fails)?;
    rig.vm.sh(swap(&format!("0 32768 linear {node} 0")))?;
    rig.drain_all("--resync")?;
    rig.same()?;
    rig.detach()?;
    rig.vm.sh("dmsetup remove --retry back")?;
    rig.finish()
}

#[test]
fn a_device_is_detached_by_force_under_load() -> Result<()> {
    let rig = Rig::start("force", 16)?;
    let back = rig.mapped("source")?;
    rig.attach_node(&back, LOOP, "")?;
    let busy = load(&rig)?;
    let refused = rig.vm.try_sh(format!("dtctl detach {LOOP}"))?;
    assert!(
        !refused.ok() && refused.complaint().contains("is open"),
        "{refused}"
    );
    rig.vm.sh(format!("dtctl detach {LOOP} --force"))?;
    assert_ne!(busy.wait(patience(30))?.code, 0, "the load gets errors");
    rig.vm.sh("dtguest settle; [ ! -e /dev/loop101 ]")?;

    // Again, with a backing device that answers nothing.
    rig.attach_node(&back, LOOP, "")?;
    let busy = load(&rig)?;
    rig.vm.sh("dmsetup suspend --noflush --nolockfs back")?;
    wait_until("stuck writes", patience(20), || {
        Ok(rig.count(LOOP, "in_flight")? > 0)
    })?;
    rig.vm
        .sh_within(patience(20), format!("dtctl detach {LOOP} --force"))?;
    assert_ne!(busy.wait(patience(30))?.code, 0, "the load gets errors");
    rig.vm.sh("dmsetup resume back")?;
    // What was under way goes on, into the stream too.
    rig.drain_all("")?;
    rig.vm.sh("dtguest settle; dmsetup remove --retry back")?;

    // And with writers that wait for room in the ring.
    rig.vm.sh("dtctl policy set block")?;
    rig.attach("")?;
    let holder = rig.draining("--hold")?;
    let writer = rig.vm.spawn(format!(
        "exec dd if=/dev/zero of=/dev/loop{LOOP} conv=nocreat bs=64k oflag=direct status=none"
    ))?;
    let second = rig.vm.spawn(format!(
        "for i in 1 2 3 4 5 6 7; do dd if=/dev/zero of=/dev/loop{LOOP} conv=nocreat bs=1M count=16 oflag=direct status=none; done"
    ))?;
    wait_until("a full ring", patience(60), || {
        Ok(rig.count("set", "used_bytes")? > 60 << 20)
    })?;
    rig.vm
        .sh_within(patience(20), format!("dtctl detach {LOOP} --force"))?;
    assert_ne!(second.wait(patience(30))?.code, 0);
    writer.wait(patience(30))?;
    holder.kill(15)?;
    holder.finish(patience(20))?;
    rig.finish()
}

#[test]
fn a_backing_disk_is_pulled_out_under_load() -> Result<()> {
    let mut rig = Rig::start("unplug", 16)?;
    if rig.vm.kernel() == Kernel::Debug {
        // Its machine has no way to pull a disk in a short time.
        return rig.finish();
    }
    rig.attach("")?;
    let consumer = rig.drain("")?;
    let busy = load(&rig)?;
    rig.vm.unplug("source")?;
    assert_ne!(busy.wait(patience(30))?.code, 0, "the load gets errors");
    wait_until("its death", patience(20), || {
        Ok(rig.get(LOOP, "dead")? == "true")
    })?;
    let read = rig.vm.try_sh(format!(
        "dd if=/dev/loop{LOOP} of=/dev/null bs=4k count=1 iflag=direct"
    ))?;
    assert!(!read.ok(), "{read}");
    rig.end_drain(consumer)?;
    rig.vm
        .sh(format!("dtguest settle; dtctl detach {LOOP} --force"))?;
    // Another disk takes its place.
    rig.vm.plug(&Disk::new("fresh", 8))?;
    rig.attach_disk("fresh", LOOP, "")?;
    rig.vm.sh(format!(
        "dd if=/dev/urandom of=/dev/loop{LOOP} bs=1M oflag=direct count=8 status=none"
    ))?;
    rig.vm.sh(format!(
        "rm /tmp/replica; dtdrain run --set set --apply {LOOP}=/tmp/replica --until-drained"
    ))?;
    let node = rig.vm.device("fresh")?;
    rig.vm.sh(format!("dtctl same {node} /tmp/replica"))?;
    rig.detach()?;
    rig.finish()
}
