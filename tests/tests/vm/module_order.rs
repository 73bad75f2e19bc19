// SPDX-License-Identifier: GPL-2.0-only

//! What a replica shows at any moment is a state that the source was in.

use anyhow::Result;
use dtloop_tests::{Disk, Job, Vm, full_run, patience, wait_until};

use crate::module_rig::{LOOP, Rig, report};

/// Starts the writer of stamped sectors; its log comes when it is told to end.
fn stamp(rig: &Rig, devices: &str, options: &str) -> Result<Job> {
    rig.vm.spawn(format!(
        "exec dtstamp write {devices} --log /tmp/log --overlap {options}"
    ))
}

/// Lets the writer get on by so many records.
fn wait_records(rig: &Rig, more: u64) -> Result<()> {
    let goal = rig.count("set", "next_seq")? + more;
    wait_until("records", patience(60), || {
        Ok(rig.count("set", "next_seq")? >= goal)
    })
}

fn end(writer: Job) -> Result<()> {
    writer.kill(15)?;
    let text = writer.finish(patience(30))?;
    assert_eq!(report(&text)?["errors"], 0, "{text}");
    Ok(())
}

#[test]
fn every_state_of_the_replica_is_a_legal_prefix() -> Result<()> {
    let rig = Rig::start("prefix", 8)?;
    rig.attach("")?;
    let cuts = if full_run() { 30 } else { 5 };
    let writer = stamp(&rig, &format!("/dev/loop{LOOP}"), "")?;
    for cut in 0..cuts {
        // Somewhere in what waits, near its end: the ring must not get full meanwhile.
        let waiting = rig.count("set", "next_seq")? - rig.count("set", "released")?;
        let records = waiting.saturating_sub(cut * 37 % 211).max(40);
        rig.drain(&format!("--stop-after {records}"))?
            .finish(patience(60))?;
        rig.vm.sh(format!("cp /tmp/replica /tmp/cut-{cut}"))?;
    }
    end(writer)?;
    assert_eq!(rig.count("set", "gap_changes")?, 0, "the ring got full");
    for cut in 0..cuts {
        rig.vm
            .sh(format!("dtstamp check /tmp/cut-{cut} --log /tmp/log"))?;
    }
    rig.drain_all("--resync")?;
    rig.vm
        .sh("dtstamp check /tmp/replica --log /tmp/log --complete")?;
    rig.same()?;
    rig.detach()?;
    rig.finish()
}

/// The canary: a consumer that leaves a record out must not pass.
#[test]
fn a_broken_order_is_found() -> Result<()> {
    let rig = Rig::start("broken", 8)?;
    rig.attach("")?;
    let seeds = if full_run() { 10 } else { 3 };
    let writer = stamp(&rig, &format!("/dev/loop{LOOP}"), "--most 8192")?;
    for seed in 0..seeds {
        rig.drain(&format!("--break-order {seed}"))?
            .finish(patience(60))?;
        rig.vm.sh(format!("cp /tmp/replica /tmp/cut-{seed}"))?;
    }
    end(writer)?;
    for seed in 0..seeds {
        let verdict = rig
            .vm
            .try_sh(format!("dtstamp check /tmp/cut-{seed} --log /tmp/log"))?;
        assert!(
            !verdict.ok() && verdict.complaint().contains("not a legal prefix"),
            "seed {seed}: {verdict}"
        );
        assert!(verdict.text().contains("Missing"), "{verdict}");
    }
    rig.detach()?;
    rig.finish()
}

#[test]
fn order_holds_across_the_devices_of_a_set() -> Result<()> {
    let disks = Vm::builder("across")
        .disk(Disk::new("source", 8))
        .disk(Disk::new("second", 4));
    let rig = Rig::with(disks, "")?;
    rig.attach("")?;
    rig.attach_disk("second", 102, "--label second")?;
    let writer = stamp(&rig, &format!("/dev/loop{LOOP} /dev/loop102"), "")?;
    for cut in 0..4 {
        rig.drain(&format!(
            "--apply 102=/tmp/second --stop-after {}",
            50 + cut * 41
        ))?
        .finish(patience(60))?;
        rig.vm.sh(format!(
            "cp /tmp/replica /tmp/cut-{cut}; cp /tmp/second /tmp/second-{cut}"
        ))?;
    }
    end(writer)?;
    for cut in 0..4 {
        rig.vm.sh(format!(
            "dtstamp check /tmp/cut-{cut} /tmp/second-{cut} --log /tmp/log"
        ))?;
    }
    // One device ahead of the other is no state of the set.
    let skewed = rig
        .vm
        .try_sh("dtstamp check /tmp/cut-0 /tmp/second-3 --log /tmp/log")?;
    assert!(!skewed.ok(), "{skewed}");
    rig.drain_all("--apply 102=/tmp/second --resync")?;
    rig.vm
        .sh("dtstamp check /tmp/replica /tmp/second --log /tmp/log --complete")?;
    rig.same()?;
    rig.detach()?;
    rig.vm.sh("dtctl detach 102 --patient")?;
    rig.finish()
}

#[test]
fn killed_consumers_lose_and_repeat_nothing() -> Result<()> {
    let rig = Rig::start("kill", 8)?;
    rig.attach("")?;
    let writer = stamp(&rig, &format!("/dev/loop{LOOP}"), "")?;
    let rounds = if full_run() { 40 } else { 6 };
    for round in 0..rounds {
        let consumer = rig.drain(&format!(
            "--progress /tmp/progress --batch {}",
            1 << (round % 6)
        ))?;
        wait_records(&rig, 20 + round * 7 % 90)?;
        consumer.kill(9)?;
        assert_eq!(consumer.wait(patience(20))?.code, 128 + 9);
        assert_eq!(rig.get("set", "consumer")?, "false");
    }
    // The simple way to read does as well.
    let reader = format!(
        "dtdrain read --set set --apply {LOOP}=/tmp/replica --progress /tmp/progress --stop-after 100"
    );
    rig.vm.sh(reader)?;
    end(writer)?;
    rig.drain_all("--progress /tmp/progress --resync")?;
    rig.vm
        .sh("dtstamp check /tmp/replica --log /tmp/log --complete")?;
    rig.same()?;
    rig.detach()?;
    rig.finish()
}
