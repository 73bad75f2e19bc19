// SPDX-License-Identifier: GPL-2.0-only

//! The copy is consistent always: during mirrors and resyncs, without space, and when the target's disks are full.

use anyhow::{Result, ensure};
use dtloop_tests::{patience, wait_until};

use crate::replication_rig::{DEV, IMAGE, Rig};

const LOG: &str = "/var/log/dttarget.log";

/// A device with a file system and some files in it, mirrored. What mkfs discards may read as anything afterwards, so all
/// of it would be sent again, and staged.
fn with_files(rig: &Rig) -> Result<()> {
    rig.source().sh(format!(
        "mkfs.ext4 -q -E nodiscard {DEV}; mkdir -p /mnt/dev; mount {DEV} /mnt/dev; cp -r /usr/lib/udev /mnt/dev; umount /mnt/dev"
    ))?;
    rig.same()
}

fn hash(rig: &Rig) -> Result<String> {
    rig.target().digests(&[IMAGE])?.finish(patience(60))
}

/// The copy as anybody finds it who does not run dttarget.
fn ensure_kept(rig: &Rig, expected: &str) -> Result<()> {
    ensure!(hash(rig)? == expected, "the copy is not what it was");
    rig.target().sh(format!("e2fsck -fn {IMAGE}")).map(drop)
}

fn count(rig: &Rig, line: &str) -> Result<usize> {
    let text = rig.target().sh(format!("grep -c '{line}' {LOG} || true"))?;
    Ok(text.parse()?)
}

fn wait_for_line(rig: &Rig, line: &str, times: usize) -> Result<()> {
    wait_until(line, patience(60), || Ok(count(rig, line)? >= times))
}

fn staging(rig: &Rig) -> Result<String> {
    let status = rig
        .target()
        .sh("dttarget volume status vol --json | jq -r '.[0].staging'")?;
    Ok(status)
}

#[test]
fn the_last_consistent_state_stays_available_during_a_mirror() -> Result<()> {
    let rig = Rig::mirrored(96, "")?;
    with_files(&rig)?;
    let kept = hash(&rig)?;
    rig.expect("mirror start --full --background", 0)?;
    wait_for_line(&rig, "changes are staged", 1)?;
    let load = rig.load(40)?;
    for round in 0..3 {
        rig.kill_target()?;
        let staged = staging(&rig)? == "staged";
        ensure!(
            staged || round > 0,
            "nothing was staged: {}",
            rig.agent_log()?
        );
        if staged {
            ensure_kept(&rig, &kept)?;
        }
        rig.start_target()?;
    }
    wait_for_line(&rig, "is published", 1)?;
    rig.kill_target()?;
    rig.start_target()?;
    rig.wait()?;
    rig.end_load(load)?;
    rig.same()?;
    ensure!(staging(&rig)? == "null", "something stayed staged");
    rig.target()
        .sh("[ -z \"$(ls /var/lib/dtloop/target/sets/*/staging)\" ]")?;
    rig.finish()
}

/// What does not fit is announced before anything is staged, and the operator decides.
#[test]
fn staging_without_space_is_told_before_and_can_be_given_up() -> Result<()> {
    let rig = Rig::alone(64)?;
    rig.configure_target(&format!(
        "[[volume]]\nname = \"vol\"\npath = \"{IMAGE}\"\nsize = \"64MiB\"\n[staging]\nmax = \"4MiB\"\n"
    ))?;
    rig.begin("")?;
    with_files(&rig)?;
    let kept = hash(&rig)?;
    rig.expect("mirror start --full --background", 0)?;
    wait_for_line(&rig, "have to be staged", 1)?;
    rig.wait_state("error")?;
    let reason = rig.device()?["agent"]["reason"].to_string();
    ensure!(
        reason.contains("dtloop resync --in-place --set default"),
        "{reason}"
    );
    // The source goes on, and is held back; the copy is what it was.
    rig.write(40, 8)?;
    for round in 0..2 {
        rig.kill_target()?;
        ensure!(staging(&rig)? == "staged");
        ensure_kept(&rig, &kept)?;
        rig.start_target()?;
        wait_for_line(&rig, "cannot be staged\\|have to be staged", round + 2)?;
    }
    rig.expect("resync --in-place", 0)?;
    wait_for_line(&rig, "is given up", 1)?;
    rig.wait_state("in-sync")?;
    rig.same()?;
    rig.finish()
}

/// A copy whose target ended between publishing and the end of the drain is brought to its end by hand, and used.
#[test]
fn a_copy_that_is_being_published_can_be_settled() -> Result<()> {
    let rig = Rig::alone_with_copy_disk(32)?;
    rig.begin("")?;
    with_files(&rig)?;
    let node = rig.target().device("copy")?;
    let swap = |table: &str| {
        rig.target().sh(format!(
            "dmsetup load copy --table \"0 $(blockdev --getsz {node}) {table}\"; dmsetup resume copy --noflush --nolockfs"
        ))
    };
    rig.source().sh(format!(
        "mount {DEV} /mnt/dev; cp -r /usr/lib/udev/rules.d /mnt/dev/more; umount /mnt/dev"
    ))?;
    rig.wait()?;
    // While it is staged, nothing is written to the copy: that its disk fails shows when it is published.
    rig.expect("mirror start --full --background", 0)?;
    wait_for_line(&rig, "changes are staged", 1)?;
    swap("error")?;
    wait_for_line(&rig, "is published", 1)?;
    wait_for_line(&rig, "cannot be used", 1)?;
    rig.kill_target()?;
    ensure!(staging(&rig)? == "publishing");
    swap(&format!("linear {node} 0"))?;
    let said = rig.target().sh("dttarget volume settle vol 2>&1")?;
    ensure!(
        said.contains("holds the source's state at record"),
        "{said}"
    );
    rig.target().sh(format!("e2fsck -fn {IMAGE}"))?;
    rig.alike(DEV, IMAGE, &[])?;
    // From now on it belongs to whoever uses it here, until that is over.
    rig.start_target()?;
    // The state is "error" already, for what was told before the target ended.
    wait_until("the reason", patience(60), || {
        let device = rig.device()?["agent"].clone();
        let reason = device["reason"].to_string();
        Ok(device["state"]["state"] == "error" && reason.contains("dttarget volume unbind vol"))
    })?;
    rig.stop_target()?;
    rig.target().sh("dttarget volume unbind vol")?;
    rig.start_target()?;
    rig.wait_state("in-sync")?;
    rig.same()?;
    rig.finish()
}

#[test]
fn a_full_volume_disk_holds_the_source_back_and_loses_nothing() -> Result<()> {
    let rig = Rig::alone(64)?;
    rig.target()
        .sh("mkdir -p /srv; mount -t tmpfs -o size=24M copy /srv")?;
    rig.begin("")?;
    let syncs = rig.counter("syncs")?;
    rig.write(0, 40)?;
    rig.wait_state("error")?;
    let reason = rig.device()?["agent"]["reason"].to_string();
    ensure!(reason.contains("No space left"), "{reason}");
    rig.target().sh("mount -o remount,size=96M /srv")?;
    rig.wait_state("in-sync")?;
    rig.same()?;
    ensure!(rig.counter("syncs")? == syncs, "it was mirrored again");
    rig.finish()
}

#[test]
fn a_full_journal_disk_holds_the_source_back_and_loses_nothing() -> Result<()> {
    let rig = Rig::alone(64)?;
    rig.target().sh(
        "mkdir -p /var/lib/dtloop/target; mount -t tmpfs -o size=96M state /var/lib/dtloop/target",
    )?;
    rig.begin("")?;
    let syncs = rig.counter("syncs")?;
    // Nothing is left, neither for a segment nor for the state.
    rig.target()
        .sh("dd if=/dev/zero of=/var/lib/dtloop/target/filler bs=64k status=none || true")?;
    for part in 0..3 {
        rig.write(part * 20, 20)?;
    }
    rig.wait_state("error")?;
    let reason = rig.device()?["agent"]["reason"].to_string();
    ensure!(reason.contains("No space left"), "{reason}");
    rig.target().sh("rm /var/lib/dtloop/target/filler")?;
    rig.wait_state("in-sync")?;
    rig.same()?;
    ensure!(rig.counter("syncs")? == syncs, "it was mirrored again");
    rig.finish()
}
