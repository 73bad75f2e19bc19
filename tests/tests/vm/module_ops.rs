// SPDX-License-Identifier: GPL-2.0-only

//! Every operation and every shape of it, byte for byte.

use anyhow::Result;
use dtloop_tests::{Bus, Disk, Kernel, Vm, full_run, patience, wait_until};

use crate::module_rig::{LOOP, Rig};

/// What every kind of backing device goes through. `$dev` is the loop device.
const OPERATIONS: &str = "
    dd if=/dev/urandom of=$dev bs=1M count=12 oflag=direct status=none
    dd if=/dev/urandom of=$dev bs=4k count=20 seek=30 oflag=direct,dsync status=none
    dd if=/dev/urandom of=$dev bs=64k count=20 seek=70 conv=fsync status=none
    blockdev --flushbufs $dev
    blkdiscard -o 1M -l 1M $dev || echo no discard
    blkdiscard -z -o 3M -l 512k $dev
    blkdiscard -z -o 5M -l 4096 $dev
    fallocate -p -o 6M -l 64k $dev || echo no punching
    fallocate -z -o 7M -l 64k $dev || echo no zeroing
    blkdiscard -s -o 8M -l 1M $dev 2>/dev/null || echo no secure erase
    dd if=/dev/urandom of=$dev bs=512k count=1 seek=3 oflag=direct status=none
";

fn operations_on(rig: &Rig, node: &str, number: u32) -> Result<()> {
    let replica = format!("/tmp/replica-{number}");
    rig.attach_node(node, number, "")?;
    let consumer = rig.vm.spawn(format!(
        "exec dtdrain run --set set --apply {number}={replica}"
    ))?;
    let block = rig.count(number, "block_bytes")?;
    rig.vm.sh(format!("dev=/dev/loop{number}; {OPERATIONS}"))?;
    rig.vm.sh(format!("dd if=/dev/urandom of=/dev/loop{number} bs={block} count=9 seek=77 oflag=direct status=none"))?;
    let report = rig.end_drain(consumer)?;
    assert_eq!(report["failed"], 0, "{report}");
    let zeroes = rig.vm.sh(format!(
        "cat /sys/block/loop{number}/queue/write_zeroes_max_bytes"
    ))?;
    // Without it the kernel writes zeroes itself.
    let operations = if zeroes == "0" {
        &["write", "flush"][..]
    } else {
        &["write", "flush", "write_zeroes"]
    };
    for operation in operations {
        assert!(
            report["by_operation"][operation].as_u64() > Some(0),
            "{operation}: {report}"
        );
    }
    let discard_zeroes = rig.get(number, "discard_zeroes")? == "true";
    let dirty = rig.count(number, "dirty_blocks")?;
    if discard_zeroes && report["by_operation"].get("secure_erase").is_none() {
        assert_eq!(dirty, 0, "a discard that zeroes leaves nothing unknown");
    }
    // What was discarded without a defined content comes from the dirty map.
    rig.vm.sh(format!(
        "dtdrain run --set set --apply {number}={replica} --until-drained --resync"
    ))?;
    assert_eq!(rig.count(number, "dirty_blocks")?, 0);
    assert_eq!(
        rig.count(number, "bypass_sectors")?,
        0,
        "all that was written went through the module"
    );
    rig.vm.sh(format!(
        "dtctl same {node} {replica} && cmp /dev/loop{number} {replica}"
    ))?;
    rig.vm
        .sh(format!("dtctl detach {number} --patient"))
        .map(drop)
}

#[test]
fn every_operation_is_bit_exact() -> Result<()> {
    let disks = Vm::builder("ops")
        .disk(Disk::new("source", 16))
        .disk(Disk::new("large", 16).block_bytes(4096))
        .disk(Disk::new("sdisk", 16).bus(Bus::Scsi));
    let rig = Rig::with(disks, "")?;
    operations_on(&rig, &rig.vm.device("source")?, 101)?;
    operations_on(&rig, &rig.vm.device("large")?, 102)?;
    operations_on(&rig, &rig.vm.device("sdisk")?, 103)?;
    if rig.vm.kernel() == Kernel::Stock {
        rig.vm.sh("mount -t configfs configfs /sys/kernel/config; modprobe null_blk nr_devices=0 && cd /sys/kernel/config/nullb && mkdir nullb0 && cd nullb0 && \
                   echo 16 >size && echo 1 >memory_backed && echo 1 >discard && echo 1 >power && dtguest settle")?;
        operations_on(&rig, "/dev/nullb0", 104)?;
        rig.vm
            .sh("modprobe scsi_debug dev_size_mb=16 lbpu=1 lbpws=1 lbprz=0 && dtguest settle")?;
        let node = rig
            .vm
            .sh("lsblk -dnpo NAME,MODEL | awk '/scsi_debug/ { print $1 }'")?;
        operations_on(&rig, &node, 105)?;
    }
    rig.finish()
}

#[test]
fn odd_shapes_are_bit_exact() -> Result<()> {
    let rig = Rig::start("shapes", 24)?;
    rig.vm
        .sh("echo always >/sys/kernel/mm/transparent_hugepage/enabled || true")?;
    rig.attach("")?;
    let dev = format!("/dev/loop{LOOP}");
    let times = if full_run() { 200 } else { 25 };
    let consumer = rig.drain("")?;
    rig.vm.sh_within(
        patience(120),
        format!("dtscribble shapes {dev} --times {}", times / 5),
    )?;
    rig.vm.sh_within(
        patience(120),
        format!("dtscribble scribble {dev} --times {times}"),
    )?;
    rig.vm.sh_within(
        patience(120),
        format!("dtscribble overlap {dev} --times {times} --within 2097152"),
    )?;
    rig.end_drain(consumer)?;
    rig.same()?;
    assert!(rig.count(LOOP, "gate_waits")? > 0, "nothing overlapped");
    // The same, with overlaps, while nothing is captured.
    rig.vm.sh_within(
        patience(120),
        format!("dtscribble overlap {dev} --times {times} --within 2097152"),
    )?;
    rig.drain_all("--resync")?;
    rig.same()?;
    rig.detach()?;
    rig.finish()
}

#[test]
fn fio_verifies_what_it_wrote() -> Result<()> {
    let rig = Rig::start("fio", 64)?;
    rig.attach("")?;
    let consumer = rig.drain("")?;
    let size = if full_run() { "32M" } else { "3M" };
    let mut jobs = String::from("set -x\n");
    for (index, (engine, options)) in [
        (
            "io_uring",
            "--direct=1 --iodepth=16 --bsrange=512-64k --blockalign=512",
        ),
        ("io_uring", "--direct=1 --iodepth=4 --bs=1M"),
        ("libaio", "--direct=1 --iodepth=8 --bs=4k"),
        ("psync", "--bs=16k --fsync=10"),
        ("psync", "--direct=1 --bs=4M"),
        // fio cannot verify what it wrote by mmap on any block device; the comparison below can.
        ("mmap", "--bs=4k"),
    ]
    .into_iter()
    .enumerate()
    {
        let offset = index * 8;
        let size = if options.ends_with('M') { "8M" } else { size };
        let verify = if engine == "mmap" {
            ""
        } else {
            "--verify=crc32c --verify_fatal=1"
        };
        jobs += &format!(
            "fio --name=j{index} --filename=/dev/loop{LOOP} --ioengine={engine} {options} --rw=randwrite --size={size} \
             --offset={offset}M {verify} --randrepeat=1 --output-format=terse >/dev/null\n"
        );
    }
    rig.vm.sh_within(patience(240), jobs)?;
    rig.end_drain(consumer)?;
    rig.same()?;
    rig.detach()?;
    rig.finish()
}

/// A write that must not wait is done at once or refused, and one that is refused has changed nothing.
#[test]
fn a_write_that_must_not_wait_does_not() -> Result<()> {
    let builder = Vm::builder("nowait").disk(Disk::new("source", 16));
    let rig = Rig::with(builder, "--ring 4194304 --policy block")?;
    let dev = format!("/dev/loop{LOOP}");
    let back = rig.mapped("source")?;
    rig.attach_node(&back, LOOP, "")?;
    // The kernel refuses it as well where there is page cache, and udev, which looks at the device after each close of a
    // writer, leaves some.
    let outcome = |at: u64, bytes: u64| {
        rig.vm.sh_within(
            patience(10),
            format!(
                "dtguest settle && blockdev --flushbufs {dev}
                 dtscribble once nowait {dev} --at {at} --bytes {bytes}"
            ),
        )
    };
    let sum = |at: u64, bytes: u64| {
        rig.vm.sh(format!(
            "dd if={back} iflag=direct,skip_bytes bs={bytes} skip={at} count=1 status=none | md5sum"
        ))
    };
    assert_eq!(outcome(0, 4096)?, "written");
    assert_eq!(outcome(8192, 512)?, "written");
    rig.drain_all("")?;

    // Larger than a record: the rest would be refused when the first part is under way.
    let before = sum(4 << 20, 2 << 20)?;
    assert_eq!(outcome(4 << 20, 2 << 20)?, "refused");
    assert_eq!(sum(4 << 20, 2 << 20)?, before);

    // Over a change in flight. It is counted as refused, not as a write.
    let written = || {
        rig.vm
            .sh(format!("awk '{{ print $5 }}' /sys/block/loop{LOOP}/stat"))
    };
    let retries = rig.count(LOOP, "nowait_retries")?;
    rig.vm
        .sh("dtguest settle; dmsetup suspend --noflush --nolockfs back")?;
    let stuck = rig.vm.spawn(format!(
        "exec dd if=/dev/urandom of={dev} bs=8k seek=128 count=1 oflag=direct status=none"
    ))?;
    wait_until("a write in flight", patience(20), || {
        Ok(rig.count(LOOP, "in_flight")? > 0)
    })?;
    let before = written()?;
    assert_eq!(outcome((1 << 20) + 4096, 4096)?, "refused");
    assert_eq!(written()?, before);
    assert!(rig.count(LOOP, "nowait_retries")? > retries);
    rig.vm.sh("dmsetup resume back")?;
    stuck.finish(patience(20))?;
    assert_eq!(outcome((1 << 20) + 4096, 4096)?, "written");
    rig.drain_all("")?;
    rig.same()?;

    // With a full ring.
    let holder = rig.draining("--hold")?;
    let writer = rig.vm.spawn(format!(
        "exec dd if=/dev/urandom of={dev} bs=64k count=256 oflag=direct status=none"
    ))?;
    wait_until("a full ring", patience(30), || {
        Ok(rig.count("set", "used_bytes")? > 3 << 20)
    })?;
    rig.vm
        .wait_sh(patience(20), "pgrep -x dd && ! pgrep -x dd --runstates R")?;
    let before = sum(12 << 20, 65536)?;
    assert_eq!(outcome(12 << 20, 65536)?, "refused");
    assert_eq!(sum(12 << 20, 65536)?, before);
    holder.kill(9)?;
    holder.wait(patience(20))?;
    writer.finish(patience(30))?;
    assert_eq!(outcome(12 << 20, 65536)?, "written");
    rig.drain_all("--resync")?;
    rig.same()?;
    rig.detach()?;
    rig.vm.sh("dmsetup remove --retry back")?;
    rig.finish()
}

/// What the backing device promises not to tear is offered above it, and is one record.
#[test]
fn an_atomic_write_stays_whole() -> Result<()> {
    let rig = Rig::start("atomic", 8)?;
    let dev = format!("/dev/loop{LOOP}");
    let limit = |node: &str, name: &str| {
        let disk = node.trim_start_matches("/dev/");
        rig.vm.sh(format!(
            "cat /sys/block/{disk}/queue/atomic_write_{name}_bytes"
        ))
    };
    // Not promised below, not promised above.
    rig.attach("")?;
    assert_eq!(limit(&dev, "unit_max")?, "0");
    assert!(!rig.vm.try_sh(format!("dtscribble once atomic {dev}"))?.ok());
    rig.detach()?;

    rig.vm
        .sh("modprobe scsi_debug dev_size_mb=16 atomic_wr=1 && dtguest settle")?;
    let node = rig
        .vm
        .sh("lsblk -dnpo NAME,MODEL | awk '/scsi_debug/ { print $1 }'")?;
    rig.attach_node(&node, LOOP, "")?;
    for name in ["unit_min", "unit_max"] {
        assert_eq!(limit(&dev, name)?, limit(&node, name)?, "{name}");
    }
    let bytes = limit(&dev, "unit_max")?;
    let before = rig.drain_all("")?["records"].clone();
    rig.vm.sh(format!(
        "dtscribble once atomic {dev} --at {bytes} --bytes {bytes}"
    ))?;
    let report = rig.drain_all("")?;
    assert_eq!(report["by_operation"]["write"], 1, "{before} {report}");
    rig.vm.sh(format!("dtctl same {node} /tmp/replica"))?;
    rig.detach()?;
    rig.finish()
}
