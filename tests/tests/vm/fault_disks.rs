// SPDX-License-Identifier: GPL-2.0-only

//! Disks of the source that fail and vanish, disks of the target that fill up.

use anyhow::{Result, bail, ensure};
use dtloop_tests::{Disk, Vm, note, patience, wait_until};

use crate::fault_frame::{Resend, Story};
use crate::replication_rig::{DEV, Rig};

const MIB: u64 = 32;

/// A mirrored device over a device-mapper device `back`.
fn mapped(attach_options: &str) -> Result<Story> {
    let vm = Vm::builder("both").disk(Disk::new("disk", MIB)).start()?;
    let node = vm.device("disk")?;
    vm.sh(format!(
        "dmsetup create back --table \"0 $(blockdev --getsz {node}) linear {node} 0\"; dtguest settle"
    ))?;
    let mut rig = Rig::with(vm, None, MIB)?;
    rig.disk = "/dev/mapper/back".to_owned();
    rig.begin(attach_options)?;
    Story::of(rig, MIB)
}

/// What the disk behind the device does from now on.
fn disk_does(story: &Story, target: &str, options: &str) -> Result<()> {
    let vm = story.rig.source();
    let node = vm.device("disk")?;
    vm.sh(format!(
        "dmsetup load back --table \"0 $(blockdev --getsz {node}) {target} {node} 0 {options}\"
         dmsetup resume back --noflush --nolockfs"
    ))
    .map(drop)
}

/// Writers and their copy go on while the disk cannot be read; what needs a read says so, and is made good afterwards.
#[test]
fn a_disk_that_fails_reads_stops_no_write() -> Result<()> {
    let mut story = mapped("--ring-size 4M")?;
    let load = story.load()?;
    disk_does(&story, "flakey", "0 1 1 error_reads")?;
    let read = format!("dd if={DEV} of=/dev/null bs=4k count=1 iflag=direct status=none");
    let refused = story.rig.source().try_sh(&read)?;
    ensure!(
        refused.complaint().contains("Input/output error"),
        "{refused}"
    );
    story.wait_writes(50)?;
    story.rig.wait()?;
    let verified = story.rig.dtloop("verify --json")?;
    ensure!(
        !verified.ok() && (verified.text() + &verified.complaint()).contains("read"),
        "{verified}"
    );
    // What did not fit into the ring has to be read, and waits for that.
    story.rig.stop_agent()?;
    wait_until("the ring to be full", patience(60), || {
        Ok(story.rig.counter("tracked")? > 0)
    })?;
    story.rig.start_agent()?;
    story.end_load(load)?;
    story.rig.expect("status --check", 3)?;
    disk_does(&story, "linear", "")?;
    story.finish(Resend::Compared { times: 2 })
}

/// The application gets the disk's errors, and no others; the ranges are read again once the disk is well.
#[test]
fn a_disk_that_fails_writes_is_made_good() -> Result<()> {
    let mut story = mapped("")?;
    for round in 0..2 {
        let load = story.load_with("--overlap --most 32768 --per-second 100 --tolerate")?;
        disk_does(&story, "flakey", "0 1 1 error_writes")?;
        story.wait_writes(50)?;
        if round == 1 {
            // Nobody is there who could read the ranges again.
            story.rig.kill_agent()?;
        }
        story.wait_writes(20)?;
        disk_does(&story, "linear", "")?;
        story.wait_writes(20)?;
        if round == 1 {
            story.rig.start_agent()?;
        }
        let report = story.end_load_with_errors(load)?;
        ensure!(report["errors"].as_u64() > Some(0), "{report}");
        story.settles(Resend::Compared { times: 1 })?;
    }
    let load = story.load()?;
    story.wait_writes(50)?;
    story.end_load(load)?;
    story.finish(Resend::Nothing)
}

/// The disk is pulled out and put back: errors until then, a comparison afterwards.
#[test]
fn a_disk_that_vanishes_is_compared_when_it_is_back() -> Result<()> {
    let mut story = Story::alone(MIB, "")?;
    let load = story.load_with("--overlap --most 32768 --per-second 100 --tolerate")?;
    let file = story.rig.source().disk_file("disk")?;
    story.rig.source().unplug("disk")?;
    story.wait_writes(20)?;
    let report = story.end_load_with_errors(load)?;
    ensure!(report["errors"].as_u64() > Some(0), "{report}");
    story
        .rig
        .source()
        .sh("dtguest settle; dtloop detach 101 --force")?;
    let disk = Disk::new("disk", MIB).file(file);
    story.rig.source_mut().plug(&disk)?;
    story.rig.disk = story.rig.source().device("disk")?;
    story.rig.attach("")?;
    story.counts_anew();
    let load = story.load()?;
    story.wait_writes(50)?;
    story.end_load(load)?;
    story.finish(Resend::Compared { times: 1 })
}

/// Waits until the source tells this reason, be it that the target holds it back or sends it away.
fn wait_told(story: &Story, words: &str) -> Result<()> {
    let mut last = String::new();
    let told = wait_until("the reason", patience(90), || {
        let (set, device) = (story.rig.set()?, story.rig.device()?);
        last = format!("{} {}", set["connection"], device["agent"]);
        Ok(last.contains(words))
    });
    if told.is_err() {
        bail!("no \"{words}\" in {last}\n{}", story.rig.agent_log()?);
    }
    note(format!("the source tells: {last}"));
    Ok(())
}

/// The file system of the copy is full, then that of the journal, which has room for one segment: the reason is told,
/// writers go on, nothing is lost.
#[test]
fn a_full_target_disk_holds_the_source_back_with_the_reason() -> Result<()> {
    let vm = Vm::builder("both").disk(Disk::new("disk", 64)).start()?;
    let places = [("/srv", 36), ("/var/lib/dtloop/target", 20)];
    for (place, mib) in places {
        vm.sh(format!(
            "mkdir -p {place}; mount -t tmpfs -o size={mib}M none {place}"
        ))?;
    }
    let rig = Rig::with(vm, None, 64)?;
    rig.begin("")?;
    let mut story = Story::of(rig, 64)?;
    for (place, _) in places.into_iter().rev() {
        let load = story.load_with("--overlap --most 131072 --per-second 150")?;
        wait_told(&story, "No space left")?;
        story.wait_writes(50)?;
        story.end_load(load)?;
        ensure!(
            story.rig.counter("tracked")? == 0,
            "the ring was full: {}\n{}",
            story.rig.status()?,
            story.rig.agent_log()?
        );
        // What does not change is not said again and again.
        let said = story.rig.source().sh("cat /var/log/dt*.log | wc -l")?;
        ensure!(
            said.parse::<u32>().is_ok_and(|lines| lines < 200),
            "{said} lines in the logs:\n{}",
            story.rig.agent_log()?
        );
        story
            .rig
            .target()
            .sh(format!("mount -o remount,size=300M {place}"))?;
        story.settles(Resend::Nothing)?;
    }
    story.finish(Resend::Nothing)
}

/// The disk of the journal fails, its file system gives up, and is repaired: the reason is told, writers go on, and what was
/// acknowledged is still there.
#[test]
fn a_journal_disk_that_fails_loses_nothing() -> Result<()> {
    const PLACE: &str = "/var/lib/dtloop/target";
    let vm = Vm::builder("both")
        .disk(Disk::new("disk", MIB))
        .disk(Disk::new("journal", 256))
        .start()?;
    let node = vm.device("journal")?;
    let table = |what: &str| format!("0 $(blockdev --getsz {node}) {what}");
    vm.sh(format!(
        "dmsetup create journal --table \"{}\"; dtguest settle; mkfs.ext4 -q /dev/mapper/journal
         mkdir -p {PLACE}; mount /dev/mapper/journal {PLACE}",
        table(&format!("linear {node} 0"))
    ))?;
    let rig = Rig::with(vm, None, MIB)?;
    rig.begin("")?;
    let mut story = Story::of(rig, MIB)?;
    let load = story.single_load(100)?;
    let swap = |story: &Story, what: &str| {
        story.rig.target().sh(format!(
            "dmsetup load journal --table \"{}\"; dmsetup resume journal --noflush --nolockfs",
            table(what)
        ))
    };
    swap(&story, "error")?;
    wait_told(&story, "cannot be written")?;
    story.wait_writes(50)?;
    // It is told as long as it lasts.
    wait_told(&story, "cannot be written")?;
    story.rig.kill_target()?;
    swap(&story, &format!("linear {node} 0"))?;
    story.rig.target().sh(format!(
        "umount {PLACE}; e2fsck -fp /dev/mapper/journal || [ $? = 1 ]; mount /dev/mapper/journal {PLACE}"
    ))?;
    // What is there before anybody brings more.
    story.rig.kill_agent()?;
    story.rig.start_target()?;
    story.rig.stop_target()?;
    story.holds_a_prefix()?;
    story.rig.start_target()?;
    story.rig.start_agent()?;
    story.wait_writes(50)?;
    story.end_load(load)?;
    ensure!(story.rig.counter("tracked")? == 0, "the ring was full");
    story.finish(Resend::Nothing)
}
