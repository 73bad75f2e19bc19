// SPDX-License-Identifier: GPL-2.0-only

//! The device is a loop device to everybody.

use anyhow::Result;
use dtloop_tests::{Disk, Kernel, Vm, patience};

use crate::module_rig::{LOOP, Rig};

#[test]
fn the_usual_tools_work_on_it() -> Result<()> {
    let rig = Rig::start("tools", 32)?;
    let vm = &rig.vm;
    let node = vm.device("source")?;
    rig.attach("--partscan")?;
    let consumer = rig.drain("")?;
    let dev = format!("/dev/loop{LOOP}");
    assert_eq!(vm.sh(format!("lsblk -rdno TYPE,SIZE {dev}"))?, "loop 32M");
    let listed = vm.sh(format!(
        "losetup -ln -O NAME,BACK-FILE,OFFSET,SIZELIMIT,RO {dev}"
    ))?;
    assert_eq!(
        listed.split_whitespace().collect::<Vec<_>>(),
        [&dev, &node, "0", "0", "0"],
        "{listed}"
    );
    assert!(vm.sh("losetup -a")?.contains(&format!("({node})")));
    assert_eq!(
        vm.sh(format!("blockdev --getss --getpbsz --getsz --getro {dev}"))?,
        "512\n512\n65536\n0"
    );

    // The backing device is held: nobody else gets it.
    vm.sh(format!("mkfs.ext4 -q {dev}"))?;
    for taken in [
        "mkfs.ext4 -q",
        "mount -t ext4",
        "dtctl attach --set set",
        "pvcreate -q",
        "mkswap -q",
    ] {
        let refused = match taken {
            "mount -t ext4" => format!("mount -t ext4 {node} /mnt"),
            // It only warns of what others hold, unless it may not open it exclusively.
            "mkswap -q" => format!("blkdiscard {node}"),
            _ => format!("{taken} {node}"),
        };
        let outcome = vm.try_sh(&refused)?;
        assert!(!outcome.ok(), "{refused}: {outcome}");
    }

    // Partitions.
    vm.sh(format!(
        "wipefs -qa {dev} && printf 'size=8M\nsize=8M\n' | sfdisk -q {dev} && dtguest settle"
    ))?;
    vm.sh(format!(
        "mkfs.ext4 -q {dev}p1 && mount {dev}p1 /mnt && echo kept >/mnt/file && umount /mnt"
    ))?;
    vm.sh(format!(
        "mkswap -q {dev}p2 && swapon {dev}p2 && grep -q {dev}p2 /proc/swaps && swapoff {dev}p2"
    ))?;
    let refused = vm.try_sh(format!(
        "mount {dev}p1 /mnt && losetup -d {dev} && losetup {dev}"
    ))?;
    assert_eq!(
        vm.sh(format!("cat /mnt/file; [ -b {dev} ] && umount /mnt"))?,
        "kept",
        "{refused}"
    );

    // LVM.
    if vm.kernel() == Kernel::Stock {
        vm.sh(format!(
            "wipefs -qa {dev}p1 {dev}p2 {dev} && blockdev --rereadpt {dev} && dtguest settle && export LVM_SUPPRESS_FD_WARNINGS=1 && \
             c='--devicesfile= --config devices{{filter=[\"a|{dev}$|\",\"r|.*|\"]}}' && pvcreate -qq $c {dev} && vgcreate -qq $c vg {dev} && \
             lvcreate -qq $c -an -Zn -L 12M -n lv vg && lvchange -qq $c -ay vg/lv && dd if=/dev/urandom of=/dev/mapper/vg-lv bs=1M count=12 \
             oflag=direct status=none && vgchange -qq $c -an vg && vgremove -qqf $c vg && pvremove -qq $c {dev}"
        ))?;
    }

    // Counters.
    let counter = |field: u32| {
        vm.sh(format!(
            "awk '{{ print ${field} }}' /sys/block/loop{LOOP}/stat"
        ))
    };
    let (reads, writes) = (counter(1)?, counter(5)?);
    vm.sh(format!(
        "dd if={dev} of=/dev/null bs=4k count=10 iflag=direct status=none; \
         dd if=/dev/zero of={dev} bs=4k count=10 oflag=direct status=none"
    ))?;
    let more = |before: &str, after: &str| {
        before.parse::<u64>().map(|n| n + 10).ok() <= after.parse().ok()
    };
    assert!(more(&reads, &counter(1)?) && more(&writes, &counter(5)?));
    assert!(vm.sh("iostat -xd 1 1")?.contains(&format!("loop{LOOP}")));
    assert_eq!(counter(9)?, "0", "nothing is in flight");

    rig.end_drain(consumer)?;
    rig.drain_all("--resync")?;
    rig.same()?;
    vm.sh(format!(
        "losetup -d {dev} && dtguest settle && [ ! -e {dev} ]"
    ))?;
    assert_eq!(vm.sh("dtctl status | jq '.devices | length'")?, "0");
    rig.finish()
}

#[test]
fn parts_of_a_disk_are_attached_and_grow() -> Result<()> {
    let disks = Vm::builder("parts")
        .disk(Disk::new("source", 16))
        .disk(Disk::new("large", 16).block_bytes(4096));
    let mut rig = Rig::with(disks, "")?;
    let node = rig.vm.device("source")?;
    let dev = format!("/dev/loop{LOOP}");
    // A window.
    rig.attach("--offset 1048576 --limit 2097152 --by-number")?;
    assert_eq!(rig.vm.sh(format!("blockdev --getsize64 {dev}"))?, "2097152");
    rig.vm.sh(format!(
        "dd if=/dev/urandom of={dev} bs=64k oflag=direct count=32 status=none"
    ))?;
    assert!(
        !rig.vm
            .try_sh(format!(
                "dd if=/dev/zero of={dev} bs=64k oflag=direct seek=32 count=1"
            ))?
            .ok()
    );
    rig.drain_all("")?;
    rig.vm.sh(format!(
        "dtctl same {node} /tmp/replica --offset 1048576 --bytes 2097152"
    ))?;
    rig.vm.sh(format!(
        "dd if={node} bs=1M count=1 iflag=direct status=none | tr -d '\\0' | wc -c | grep -qx 0"
    ))?;
    rig.detach()?;
    for bad in [
        "--offset 100",
        "--limit 100",
        "--offset 99999999999488",
        "--limit 99999999999488",
    ] {
        assert!(rig.attach(bad).is_err(), "{bad}");
    }
    // Read-only.
    rig.attach("--ro")?;
    assert_eq!(
        rig.vm.sh(format!(
            "blockdev --getro {dev}; losetup -nO RO {dev} | tr -d ' '"
        ))?,
        "1\n1"
    );
    assert!(
        !rig.vm
            .try_sh(format!("dd if=/dev/zero of={dev} bs=4k count=1"))?
            .ok()
    );
    rig.vm.sh(format!(
        "dd if={dev} of=/dev/null bs=1M count=3 status=none"
    ))?;
    rig.detach()?;
    rig.vm.sh(format!("blockdev --setro {node}"))?;
    assert!(rig.attach("").is_err());
    rig.attach("--ro")?;
    rig.detach()?;
    rig.vm.sh(format!("blockdev --setrw {node}"))?;
    // Blocks of 4096 bytes.
    assert!(rig.attach_disk("large", 102, "--offset 512").is_err());
    rig.attach_disk("large", 102, "")?;
    assert_eq!(rig.vm.sh("blockdev --getss /dev/loop102")?, "4096");
    assert!(
        !rig.vm
            .try_sh("dd if=/dev/zero of=/dev/loop102 bs=512 count=1 oflag=direct")?
            .ok()
    );
    rig.vm.sh("dtctl detach 102 --patient")?;

    // The disk grows: the device follows when it is told to, and tells everybody.
    rig.attach("")?;
    rig.vm.sh("rm -f /tmp/replica")?;
    rig.drain_all(&format!("--mirror {LOOP}"))?;
    let consumer = rig.drain("")?;
    rig.vm.resize_disk("source", 24)?;
    rig.vm.wait_sh(
        patience(20),
        &format!("[ $(blockdev --getsize64 {node}) = {} ]", 24 << 20),
    )?;
    assert_eq!(
        rig.vm.sh(format!("blockdev --getsize64 {dev}"))?,
        (16 << 20).to_string()
    );
    let events = rig
        .vm
        .spawn("exec timeout 60 udevadm monitor -k -s block >/tmp/events")?;
    rig.vm.wait_sh(patience(10), "grep -q KERNEL /tmp/events")?;
    rig.vm.sh(format!("losetup -c {dev}"))?;
    assert_eq!(
        rig.vm.sh(format!("blockdev --getsize64 {dev}"))?,
        (24 << 20).to_string()
    );
    rig.vm.wait_sh(
        patience(10),
        &format!("grep -q 'change.*loop{LOOP} ' /tmp/events"),
    )?;
    events.kill(15)?;
    events.wait(patience(10))?;
    rig.vm.sh(format!(
        "dd if=/dev/urandom of={dev} bs=1M count=10 seek=14 oflag=direct status=none"
    ))?;
    let report = rig.end_drain(consumer)?;
    assert_eq!(report["by_operation"]["resize"], 1, "{report}");
    rig.same()?;
    // Smaller, when nobody has it open.
    assert_eq!(
        rig.vm.sh(format!(
            "dtguest settle; dtctl resize {LOOP} --limit 4194304"
        ))?,
        "4194304"
    );
    assert!(
        rig.vm
            .try_sh(format!("exec 3<{dev}; dtctl resize {LOOP} --limit 2097152"))?
            .complaint()
            .contains("is open")
    );
    assert_eq!(
        rig.vm.sh(format!("dtctl resize {LOOP}"))?,
        (24 << 20).to_string()
    );
    rig.drain_all("")?;
    rig.same()?;
    rig.detach()?;
    rig.finish()
}

#[test]
fn file_systems_are_the_same_on_both_sides() -> Result<()> {
    let stock = Kernel::of_run() == Kernel::Stock;
    let rig = Rig::start("fs", if stock { 320 } else { 64 })?;
    rig.attach("")?;
    let dev = format!("/dev/loop{LOOP}");
    let all = [
        ("ext4", "mkfs.ext4 -q -F", "e2fsck -fn"),
        ("xfs", "mkfs.xfs -q -f", "xfs_repair -n"),
        ("btrfs", "mkfs.btrfs -q -f -M", "btrfs check"),
    ];
    for (kind, make, check) in all {
        if !rig
            .vm
            .try_sh(format!(
                "modprobe -q {kind}; grep -qw {kind} /proc/filesystems"
            ))?
            .ok()
        {
            continue;
        }
        let consumer = rig.drain("")?;
        rig.vm.sh_within(
            patience(120),
            format!(
                "{make} {dev} >/dev/null && mount -o discard {dev} /mnt && cp -r /usr/lib/udev /usr/sbin /mnt/ && sync && \
                 rm -r /mnt/sbin && dd if=/dev/urandom of=/mnt/file bs=64k count=100 status=none && \
                 (cd /mnt && find . -type f | sort | xargs md5sum >/tmp/sums) && fstrim /mnt && umount /mnt"
            ),
        )?;
        rig.end_drain(consumer)?;
        rig.drain_all("--resync")?;
        rig.same()?;
        let looked = format!(
            "{check} {dev} >/dev/null 2>&1 && {check} /tmp/replica >/dev/null 2>&1 && mount -o ro,loop /tmp/replica /mnt && \
             (cd /mnt && md5sum --quiet -c /tmp/sums) && umount /mnt"
        );
        rig.vm
            .sh_within(patience(120), format!("modprobe -q loop; {looked}"))?;
    }
    rig.detach()?;
    rig.finish()
}

#[test]
fn stock_loop_devices_work_beside_it() -> Result<()> {
    let rig = Rig::start("beside", 8)?;
    rig.vm
        .sh("modprobe loop && truncate -s 1M /tmp/file && dtguest settle")?;
    // A number of ours, from the middle of theirs.
    rig.vm.sh("dtctl stock 1 --remove || true")?;
    rig.attach_disk("source", 1, "")?;
    let times = 200;
    // What the tools do when the stock driver's free devices run out: one more for each that is bound.
    rig.vm.sh_within(
        patience(120),
        format!(
            "for i in $(seq {times}); do dtctl stock $((i + 7)) 2>/dev/null || true; losetup -f --show /tmp/file; done >/tmp/names; \
             [ $(sort -u /tmp/names | wc -l) = {times} ] && ! grep -qx /dev/loop1 /tmp/names"
        ),
    )?;
    rig.vm.sh(
        "dd if=/dev/urandom of=/dev/loop1 bs=1M count=8 oflag=direct status=none; dtguest settle",
    )?;
    rig.vm
        .sh("dtdrain run --set set --apply 1=/tmp/replica --until-drained")?;
    rig.same()?;
    rig.vm.sh(
        "while read d; do losetup -d $d; done </tmp/names; dtguest settle; losetup -d /dev/loop1",
    )?;
    rig.vm.wait_sh(patience(20), "[ -z \"$(losetup -a)\" ]")?;
    rig.vm
        .sh("dtctl stock 1 && losetup /dev/loop1 /tmp/file && losetup -d /dev/loop1")?;
    // A number of theirs in use is refused.
    rig.vm.sh("losetup /dev/loop3 /tmp/file")?;
    assert!(rig.attach_disk("source", 3, "").is_err());
    rig.vm.sh("losetup -d /dev/loop3")?;
    rig.finish()
}
