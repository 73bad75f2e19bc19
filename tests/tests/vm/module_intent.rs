// SPDX-License-Identifier: GPL-2.0-only

//! The write-intent map: what may differ is marked on disk before it does, whatever happens.

use anyhow::{Result, ensure};
use dtloop_tests::{Disk, Vm, full_run, note, patience, wait_until};

use crate::module_rig::{LOOP, Rig};

const FILE: &str = "/var/lib/intent";

/// A machine with an empty intent file.
fn start(name: &str, mib: u64) -> Result<Rig> {
    let rig = Rig::start(name, mib)?;
    rig.vm.sh(format!(
        "dd if=/dev/zero of={FILE} bs=64k count=4 conv=fsync status=none"
    ))?;
    Ok(rig)
}

impl Rig {
    /// Gives the set its intent file; says what was found.
    fn intent(&self, options: &str) -> Result<String> {
        self.vm
            .sh(format!("dtctl intent set {FILE} --region 65536 {options}"))
    }

    fn refused(&self, script: &str) -> Result<String> {
        let output = self.vm.try_sh(script)?;
        ensure!(!output.ok(), "{script} was not refused");
        Ok(output.complaint())
    }

    /// Makes the set anew, as after a boot.
    fn again(&self) -> Result<()> {
        self.detach()?;
        self.vm
            .sh("dtctl destroy set --discard && dtctl create set")
            .map(drop)
    }
}

#[test]
fn what_was_written_before_a_power_cut_is_marked() -> Result<()> {
    let mut rig = start("intent-cut", 64)?;
    rig.intent("")?;
    rig.attach("--label vol")?;
    let node = rig.vm.device("source")?;
    let rounds = if full_run() { 10 } else { 3 };
    for round in 0..rounds {
        // One writer waits for each write, the others have many under way.
        let load = rig.vm.spawn(format!(
            "fio --name=x --filename=/dev/loop{LOOP} --direct=1 --rw=randwrite --bs=4k --ioengine=io_uring --iodepth=8 \
             --numjobs=2 --time_based --runtime=60 --randseed={round} --size=64M"
        ))?;
        wait_until("some writes", patience(20), || {
            Ok(rig.count(LOOP, "writes")? > 50 + 37 * round)
        })?;
        rig.vm.power_cut()?;
        drop(load);
        rig.vm.power_on()?;
        rig.vm.sh("modprobe dtloop && dtctl create set")?;
        assert_eq!(rig.intent("")?, "Known");
        rig.attach("--label vol")?;
        assert_eq!(rig.get(LOOP, "intent_found")?, "Known");
        assert_eq!(rig.count("set", "intent.life")?, round + 2);
        let covered = rig.vm.sh(format!(
            "dtctl suspects set {LOOP} --cover {node} | tail -1"
        ))?;
        let suspect = rig.count(LOOP, "regions_suspect")?;
        note(format!(
            "round {round}: {covered}, {suspect} of 1024 regions to be compared"
        ));
        assert!(suspect > 0);
    }
    rig.detach()?;
    rig.finish()
}

#[test]
fn marks_go_when_the_target_has_everything() -> Result<()> {
    let rig = start("intent-clear", 64)?;
    rig.intent("--idle-ms 1")?;
    rig.attach("--label vol")?;
    let write = |at: u32| {
        rig.vm.sh(format!(
            "dd if=/dev/urandom of=/dev/loop{LOOP} bs=4k count=1 seek={at} oflag=direct status=none"
        ))
    };
    for region in 0..5 {
        write(region * 16)?;
    }
    assert_eq!(rig.count(LOOP, "regions_marked")?, 5);
    let (misses, writes) = (
        rig.count("set", "intent.misses")?,
        rig.count("set", "intent.writes")?,
    );
    for region in 0..5 {
        write(region * 16 + 3)?;
    }
    assert_eq!(
        rig.count("set", "intent.misses")?,
        misses,
        "a marked region costs nothing"
    );
    assert_eq!(rig.count("set", "intent.writes")?, writes);
    // A round begins, one finds the regions touched since, the next one clears.
    rig.vm.sh("dtctl clear set; dtctl clear set")?;
    write(0)?;
    rig.vm.sh("dtctl clear set")?;
    assert_eq!(
        rig.count(LOOP, "regions_marked")?,
        1,
        "the region just written stays"
    );
    rig.vm.sh(format!(
        "dtctl dirty set {LOOP} 0 8; dtctl clear set; dtctl clear set"
    ))?;
    assert_eq!(rig.count(LOOP, "regions_marked")?, 1, "what is dirty stays");
    rig.drain_all("--resync")?;
    rig.vm.sh("dtctl clear set; dtctl clear set")?;
    assert_eq!(rig.count(LOOP, "regions_marked")?, 0);
    rig.again()?;
    assert_eq!(rig.intent("")?, "Known");
    rig.attach("--label vol")?;
    assert_eq!(
        rig.count(LOOP, "regions_suspect")?,
        0,
        "a clean end leaves nothing to compare"
    );
    write(99)?;
    rig.again()?;
    rig.intent("")?;
    rig.attach("--label vol")?;
    assert_eq!(
        rig.vm.sh(format!("dtctl suspects set {LOOP} --settle"))?,
        "768 128"
    );
    assert_eq!(rig.count(LOOP, "regions_suspect")?, 0);
    rig.detach()?;
    rig.finish()
}

#[test]
fn an_intent_file_that_does_not_fit_is_told_apart() -> Result<()> {
    let rig = start("intent-found", 16)?;
    let attach = |options: &str| -> Result<String> {
        rig.attach(&format!("--label vol {options}"))?;
        let found = rig.get(LOOP, "intent_found")?;
        rig.again()?;
        Ok(found)
    };
    assert_eq!(rig.intent("")?, "New");
    assert_eq!(attach("")?, "New");
    assert_eq!(rig.intent("")?, "Known");
    assert_eq!(attach("")?, "Known");
    rig.intent("")?;
    assert_eq!(attach("--identity 7")?, "Replaced");
    rig.intent("")?;
    assert_eq!(attach("--identity 7 --limit 8388608")?, "Resized");
    assert_eq!(rig.intent("--source 2")?, "Foreign");
    assert_eq!(attach("")?, "New", "it was begun anew");
    assert_eq!(rig.intent("--source 2 --format")?, "New");
    attach("")?;
    // A byte of the head, then of a sector of marks.
    for at in [100, 1024 + 300] {
        rig.vm.sh(format!(
            "echo 3 >/proc/sys/vm/drop_caches
             printf x | dd of={FILE} bs=1 seek={at} conv=notrunc,fsync status=none"
        ))?;
        assert_eq!(rig.intent("--source 2")?, "Damaged", "byte {at}");
        assert_eq!(attach("")?, "New");
    }
    rig.vm.sh("dtctl destroy set --discard")?;
    rig.vm.wait_sh(patience(10), "rmmod dtloop")?;
    rig.vm.check()
}

#[test]
fn an_intent_file_is_guarded_and_chosen_with_care() -> Result<()> {
    let rig = start("intent-file", 64)?;
    let intent = |file: &str| rig.refused(&format!("dtctl intent set {file}"));
    rig.vm.sh("mkdir -p /mnt/t && mount -t tmpfs none /mnt/t")?;
    rig.vm.sh("head -c 262144 /dev/zero >/mnt/t/f; truncate -s 262144 /var/lib/holes; head -c 4096 /dev/zero >/var/lib/small")?;
    assert!(intent("/mnt/t/f")?.contains("where its blocks lie"));
    assert!(intent("/var/lib/holes")?.contains("has holes"));
    assert!(intent("/var/lib/small")?.contains("64 KiB"));
    assert!(intent("/dev/null")?.contains("no ordinary file"));
    // On a device of the set, as a file and beneath another layer.
    rig.attach("--label vol")?;
    rig.vm.sh(format!(
        "mkfs.ext4 -q /dev/loop{LOOP} && mount /dev/loop{LOOP} /mnt && head -c 262144 /dev/zero >/mnt/f && sync"
    ))?;
    assert!(intent("/mnt/f")?.contains("loop device of this module"));
    rig.vm.sh("umount /mnt")?;
    rig.detach()?;

    rig.intent("")?;
    assert!(
        rig.refused(&format!("dtctl intent set {FILE}"))?
            .contains("has one already")
    );
    rig.vm.sh("dtctl create other")?;
    assert!(
        rig.refused(&format!("dtctl intent other {FILE}"))?
            .contains("in use by another set")
    );
    for harm in [
        "rm",
        "truncate -s 0",
        "mv -t /tmp",
        "dd if=/dev/zero bs=1 count=1 conv=notrunc status=none of=",
    ] {
        let script = if harm.ends_with('=') {
            format!("{harm}{FILE}")
        } else {
            format!("{harm} {FILE}")
        };
        rig.refused(&script)?;
    }
    rig.vm.sh("dtctl destroy other")?;
    rig.finish()
}

#[test]
fn writes_go_on_when_the_intent_file_cannot_be_written() -> Result<()> {
    for kind in ["fails", "hangs"] {
        let vm = Vm::builder("intent-fail")
            .disk(Disk::new("source", 64))
            .disk(Disk::new("state", 64));
        let rig = Rig::with(vm, "")?;
        let node = rig.mapped("state")?;
        rig.vm.sh(format!(
            "mkfs.ext4 -q {node} && mount {node} /mnt && head -c 262144 /dev/zero >/mnt/f && sync
             dtctl intent set /mnt/f --region 65536"
        ))?;
        rig.attach("--label vol")?;
        let write = |at: u32| {
            rig.vm.sh_within(
                patience(40),
                format!("dd if=/dev/urandom of=/dev/loop{LOOP} bs=4k count=1 seek={at} oflag=direct status=none"),
            )
        };
        write(0)?;
        assert_eq!(rig.get("set", "intent.failed")?, "false");
        rig.vm.sh(match kind {
            "fails" => "dmsetup suspend --noflush --nolockfs back
                        dmsetup reload back --table \"0 $(blockdev --getsz /dev/mapper/back) error\" && dmsetup resume back",
            _ => "dmsetup suspend --noflush --nolockfs back",
        })?;
        rig.vm.allow("can not be written");
        rig.vm.allow("I/O error");
        write(100)?;
        write(200)?;
        assert_eq!(rig.get("set", "intent.failed")?, "true", "{kind}");
        let longest = rig.count("set", "intent.wait_ns_max")? / 1_000_000;
        note(format!(
            "intent file {kind}: the longest wait was {longest} ms"
        ));
        // Ten seconds are its limit; a busy machine is slower.
        assert!(longest < 10_000 + 10_000, "{longest} ms");
        let consumer = rig.draining("")?;
        rig.end_drain(consumer)?;
        rig.same()?;
        rig.vm.sh("dmsetup resume back")?;
        if kind == "hangs" {
            // The file can be written again: it says that it is not to be relied on.
            wait_until("the end of the write that hung", patience(20), || {
                Ok(rig.vm.try_sh("dtctl clear set")?.ok())
            })?;
            rig.again()?;
            assert_eq!(rig.vm.sh("dtctl intent set /mnt/f")?, "Void");
            rig.attach("--label vol")?;
        }
        rig.detach()?;
        rig.vm.sh("dtctl destroy set --discard && umount -l /mnt")?;
        rig.vm.wait_sh(patience(10), "rmmod dtloop")?;
        rig.vm.check()?;
    }
    Ok(())
}
