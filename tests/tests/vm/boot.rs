// SPDX-License-Identifier: GPL-2.0-only

//! The test machines themselves: what every other story relies on.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::Result;
use dtloop_tests::{Bus, Disk, Kernel, Vm, patience, wait_until};

#[test]
fn machine_boots_and_runs_commands() -> Result<()> {
    let mut vm = Vm::builder("plain").disk(Disk::new("data", 64)).start()?;
    assert_eq!(vm.sh("uname -r")?, vm.release()?);
    assert_eq!(
        vm.release()?.ends_with("-debug"),
        vm.kernel() == Kernel::Debug
    );
    assert_eq!(vm.sh("hostname; nproc")?, "plain\n2");

    let failed = vm.try_sh("echo out; echo err >&2; exit 3")?;
    assert_eq!(
        (failed.code, failed.text(), failed.complaint()),
        (3, "out".into(), "err".into())
    );
    assert!(
        vm.sh("false; true").is_err(),
        "scripts stop at the first failure"
    );
    assert!(
        vm.sh_within(patience(1), "sleep 1000").is_err(),
        "deadlines hold"
    );

    let data = vm.device("data")?;
    assert_eq!(
        vm.sh(format!("blockdev --getsize64 {data}"))?,
        (64 << 20).to_string()
    );
    vm.sh(format!(
        "mkfs.ext4 -q {data} && mount {data} /mnt && echo kept >/mnt/file && umount /mnt"
    ))?;

    let bytes: Vec<u8> = (0..200_000u32).flat_map(u32::to_le_bytes).collect();
    vm.put("/tmp/blob", &bytes)?;
    assert_eq!(vm.get("/tmp/blob")?, bytes);

    let mut job = vm.spawn("echo started; exec sleep 1000")?;
    wait_until("its first words", patience(10), || {
        Ok(job.printed() == "started\n")
    })?;
    assert!(job.is_running());
    job.kill(15)?;
    assert_eq!(job.wait(patience(10))?.code, 128 + 15);
    vm.shutdown()
}

#[test]
fn scsi_disks_are_found() -> Result<()> {
    let vm = Vm::builder("scsi")
        .disk(Disk::new("sdisk", 32).bus(Bus::Scsi).block_bytes(4096))
        .start()?;
    let sdisk = vm.device("sdisk")?;
    assert_eq!(
        vm.sh(format!("lsblk -dno SERIAL,LOG-SEC {sdisk} | tr -s ' '"))?,
        "sdisk 4096"
    );
    Ok(())
}

#[test]
fn disks_and_root_survive_a_power_cut() -> Result<()> {
    let mut vm = Vm::builder("cut").disk(Disk::new("data", 16)).start()?;
    let data = vm.device("data")?;
    vm.sh(format!("echo precious | dd of={data} oflag=direct conv=sync bs=512 status=none; echo root >/root/file; sync"))?;
    vm.power_cut()?;
    assert!(vm.sh("true").is_err());
    vm.power_on()?;
    assert_eq!(
        vm.sh(format!("head -n1 {}; cat /root/file", vm.device("data")?))?,
        "precious\nroot"
    );
    Ok(())
}

#[test]
fn disks_come_and_go_while_it_runs() -> Result<()> {
    let mut vm = Vm::builder("hot")
        .disk(Disk::new("first", 16))
        .disk(Disk::new("grows", 16))
        .start()?;
    vm.unplug("first")?;
    assert!(vm.device("first").is_err());
    if vm.kernel() == Kernel::Stock {
        vm.plug(&Disk::new("second", 8))?;
        assert_eq!(
            vm.sh(format!("blockdev --getsize64 {}", vm.device("second")?))?,
            (8 << 20).to_string()
        );
    }
    vm.resize_disk("grows", 24)?;
    let script = format!(
        "[ $(blockdev --getsize64 {}) = {} ]",
        vm.device("grows")?,
        24 << 20
    );
    vm.wait_sh(patience(20), &script)
}

/// The proof that nothing the kernel complains about goes unnoticed.
#[test]
fn complaints_of_the_kernel_fail_the_story() -> Result<()> {
    let vm = Vm::builder("canary").start()?;
    vm.check()?;
    vm.sh("echo '<4>WARNING: this is the canary' >/dev/kmsg")?;
    wait_until("the canary on the console", patience(10), || {
        Ok(!vm.problems().is_empty())
    })?;
    assert!(vm.problems()[0].line.contains("the canary"));
    assert!(vm.check().is_err());
    let dropped = catch_unwind(AssertUnwindSafe(|| drop(vm)));
    assert!(
        dropped.is_err(),
        "a machine whose kernel complained must not go quietly"
    );

    let vm = Vm::builder("allowed").start()?;
    vm.allow("canary");
    vm.sh("echo '<4>WARNING: this is the canary' >/dev/kmsg")?;
    wait_until("the canary on the console", patience(10), || {
        Ok(vm.console_text().contains("the canary"))
    })?;
    vm.check()
}

#[test]
fn leaks_are_looked_for() -> Result<()> {
    Vm::builder("leaks").start()?.check_leaks()
}
