// SPDX-License-Identifier: GPL-2.0-only

//! What `dtloop` refuses on a real system: with the reason, a code of its own, and nothing changed.

use anyhow::{Result, ensure};
use dtloop_tests::{Disk, Vm};

/// What must be as before after a refusal.
const STATE: &str = "ls /sys/block /dev/dtloop-* /run/dtloop/stock-loops 2>/dev/null || true
    (dtloop status --json 2>/dev/null || true) | jq -c '[.sets[] | [.name, [.devices[].loop]]]'";

struct Rig {
    vm: Vm,
}

impl Rig {
    /// Runs `dtloop`, which must end with this code, name these words, and change nothing.
    fn refused(&self, arguments: &str, code: i32, words: &[&str]) -> Result<()> {
        self.script_refused(&format!("dtloop {arguments}"), code, words)
    }

    fn script_refused(&self, script: &str, code: i32, words: &[&str]) -> Result<()> {
        let before = self.vm.sh(STATE)?;
        let output = self.vm.try_sh(script)?;
        ensure!(output.code == code, "{script}: not {code} but {output}");
        let said = output.complaint();
        ensure!(
            words.iter().all(|word| said.contains(word)) && output.stdout.is_empty(),
            "{script}: no {words:?} in: {output}"
        );
        ensure!(
            said.lines().count() == 1,
            "{script}: more than one line: {said}"
        );
        let after = self.vm.sh(STATE)?;
        ensure!(before == after, "{script}: {before}\nbecame\n{after}");
        Ok(())
    }
}

#[test]
fn what_can_not_be_attached_is_refused_and_nothing_changes() -> Result<()> {
    let vm = Vm::builder("refusals")
        .disk(Disk::new("disk", 32))
        .disk(Disk::new("large", 16).block_bytes(4096))
        .start()?;
    let (disk, large) = (vm.device("disk")?, vm.device("large")?);
    let rig = Rig { vm };
    let vm = &rig.vm;

    rig.refused(&format!("attach {disk}"), 5, &["modprobe dtloop"])?;
    rig.refused("detach 1", 5, &["modprobe dtloop"])?;
    vm.sh("modprobe dtloop; dtguest settle; truncate -s 8M /tmp/file; touch /tmp/empty")?;

    // Nobody but root.
    for command in [
        format!("attach {disk}"),
        "detach 1".into(),
        "set db --policy track".into(),
    ] {
        let script = format!("runuser -u postgres -- dtloop {command}");
        rig.script_refused(&script, 8, &["root"])?;
    }

    // What is no block device, or none that there is.
    for path in ["/dev/null", "/tmp/file", "/tmp"] {
        rig.refused(&format!("attach {path}"), 7, &[path, "not a block device"])?;
    }
    rig.refused("attach /dev/nosuch", 7, &["/dev/nosuch", "does not exist"])?;
    vm.sh("mknod /tmp/stale b 240 77")?;
    rig.refused("attach /tmp/stale", 7, &["no driver"])?;

    // Windows that do not fit.
    let window = |device: &str, options: &str, words: &[&str]| {
        rig.refused(&format!("attach {device} {options}"), 7, words)
    };
    window(&disk, "--offset 32M", &["offset", "33554432"])?;
    window(&disk, "--offset 33M", &["offset", "33554432"])?;
    window(&disk, "--offset 100", &["offset", "multiple", "512"])?;
    window(&disk, "--size-limit 100", &["limit", "multiple", "512"])?;
    window(&disk, "--size-limit 33M", &["limit", "33554432"])?;
    window(
        &disk,
        "--offset 16M --size-limit 17M",
        &["limit", "16777216"],
    )?;
    window(&large, "--offset 512", &["offset", "multiple", "4096"])?;
    window(&large, "--size-limit 512", &["limit", "multiple", "4096"])?;

    // More than there is memory for: an error, and nobody is killed for it.
    rig.refused(
        &format!("attach {disk} --ring-size 2G"),
        7,
        &["default", "memory", "smaller"],
    )?;

    // In use.
    vm.sh(format!("mkfs.ext4 -q {disk}; mount {disk} /mnt"))?;
    rig.refused(&format!("attach {disk}"), 7, &["mounted on /mnt"])?;
    rig.refused(
        &format!("attach {disk} --read-only"),
        7,
        &["mounted on /mnt"],
    )?;
    vm.sh(format!("umount /mnt; wipefs -qa {disk}; mkswap -q {disk}"))?;
    rig.refused(&format!("attach {disk}"), 7, &["swap", "--allow-signature"])?;
    vm.sh(format!("swapon {disk}"))?;
    rig.refused(&format!("attach {disk} --allow-signature"), 7, &["swapoff"])?;
    vm.sh(format!("swapoff {disk}; wipefs -qa {disk}"))?;
    vm.sh(format!(
        "export LVM_SUPPRESS_FD_WARNINGS=1; pvcreate -qq {disk}"
    ))?;
    rig.refused(
        &format!("attach {disk}"),
        7,
        &["LVM physical volume", "--allow-signature"],
    )?;
    vm.sh(format!("wipefs -qa {disk}; dtguest settle"))?;
    vm.sh(format!(
        "dmsetup create over --table '0 100 linear {disk} 0'; dtguest settle"
    ))?;
    rig.refused(&format!("attach {disk}"), 7, &["in use by", "over"])?;
    vm.sh("dmsetup remove --retry over")?;
    vm.sh(format!(
        "echo 'size=8M' | sfdisk -q {disk}; dtguest settle; mkfs.ext4 -q {disk}1; mount {disk}1 /mnt"
    ))?;
    rig.refused(&format!("attach {disk}"), 7, &["partition", "/mnt"])?;
    vm.sh(format!(
        "umount /mnt; wipefs -qa {disk}1 {disk}; blockdev --rereadpt {disk}; dtguest settle"
    ))?;
    vm.sh(format!("blockdev --setro {disk}"))?;
    rig.refused(&format!("attach {disk}"), 7, &["--read-only"])?;
    vm.sh(format!("blockdev --setrw {disk}"))?;
    vm.sh("modprobe null_blk nr_devices=1 gb=1 zoned=1 zone_size=16; dtguest settle")?;
    rig.refused("attach /dev/nullb0", 7, &["zoned"])?;

    // A number that the stock driver has in use; one that is free makes room.
    vm.sh("modprobe loop; losetup /dev/loop3 /tmp/file; dtguest settle")?;
    rig.refused(
        &format!("attach {disk} --loop 3"),
        7,
        &["/dev/loop3", "/tmp/file"],
    )?;
    rig.refused("detach 3", 7, &["/dev/loop3", "/tmp/file", "losetup -d"])?;
    rig.refused("attach /dev/loop3 --loop 3", 7, &["/dev/loop3"])?;

    // What is attached already, and contradictions.
    vm.sh(format!(
        "dtloop attach {disk} --loop 1 --volume data; dtguest settle"
    ))?;
    rig.refused(&format!("attach {disk}"), 7, &["/dev/loop1"])?;
    rig.refused(
        &format!("attach {large} --loop 1"),
        7,
        &[&disk, "/dev/loop1"],
    )?;
    rig.refused("attach /dev/loop1", 7, &["DTLOOP"])?;
    rig.refused(
        &format!("attach {large} --ring-size 8M"),
        7,
        &["default", "--ring-size"],
    )?;
    rig.refused(
        &format!("attach {large} --policy block"),
        7,
        &["default", "policy"],
    )?;
    vm.sh("mkfs.ext4 -q /dev/loop1; mount /dev/loop1 /mnt")?;
    rig.refused("detach 1", 7, &["/mnt"])?;
    rig.refused("resize 1 --size-limit 8M", 7, &["/dev/loop1", "shrink"])?;
    rig.refused("set default --remove", 7, &["default"])?;
    vm.sh("umount /mnt; dtguest settle; dtloop detach 1; dtloop set default --remove --discard-records || true")?;
    vm.sh("losetup -d /dev/loop3; [ -b /dev/loop1 ]; rmmod dtloop")?;
    vm.check()
}
