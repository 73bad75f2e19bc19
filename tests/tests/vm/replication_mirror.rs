// SPDX-License-Identifier: GPL-2.0-only

//! Mirrors and verifications of a device that is in use.

use anyhow::{Result, ensure};
use dtloop_tests::{patience, wait_until};

use crate::replication_rig::{IMAGE, Rig};

#[test]
fn a_full_mirror_under_load_ends_identical() -> Result<()> {
    let rig = Rig::alone(48)?;
    rig.start_target()?;
    rig.attach("")?;
    rig.start_agent()?;
    rig.write(0, 48)?;
    rig.wait_state("mirror-needed")?;
    rig.expect("wait", 7)?;
    rig.expect("status --check", 3)?;
    let load = rig.load(100)?;
    let result = rig.mirror("--full")?;
    ensure!(result["pass"]["sent_bytes"] == 48 << 20, "{result}");

    // Writes in flight are no differences.
    let result = rig.verify("", 0)?;
    ensure!(
        result["differing_bytes"] == 0 && result["compared_bytes"] == 48 << 20,
        "{result}"
    );
    rig.end_load(load)?;
    rig.same()?;
    rig.finish()
}

#[test]
fn what_changed_behind_the_targets_back_is_found_and_repaired() -> Result<()> {
    let rig = Rig::mirrored(32, "")?;
    rig.write(0, 32)?;
    rig.wait()?;
    rig.target().sh(format!(
        "printf X | dd of={IMAGE} bs=1 seek=5000000 conv=notrunc status=none
         dd if=/dev/urandom of={IMAGE} bs=512 seek=40000 count=1 conv=notrunc status=none; sync"
    ))?;
    let load = rig.load(50)?;
    let result = rig.verify("", 3)?;
    ensure!(result["differing_bytes"].as_u64() > Some(0), "{result}");
    ensure!(
        result["extents"]
            .as_array()
            .is_some_and(|list| list.len() == 2),
        "{result}"
    );
    let result = rig.verify("--repair", 0)?;
    ensure!(
        result["repaired_bytes"] == result["differing_bytes"],
        "{result}"
    );
    let result = rig.verify("", 0)?;
    ensure!(result["differing_bytes"] == 0, "{result}");
    rig.end_load(load)?;
    rig.same()?;
    rig.finish()
}

#[test]
fn a_difference_mirror_sends_what_changed_while_detached() -> Result<()> {
    let rig = Rig::mirrored(64, "")?;
    rig.write(0, 64)?;
    rig.wait()?;
    rig.source().sh("dtguest settle; dtloop detach 101")?;
    let disk = &rig.disk;
    rig.source().sh(format!(
        "for at in 3 1000 5000 16000; do dd if=/dev/urandom of={disk} bs=4k seek=$at count=1 oflag=direct status=none; done"
    ))?;
    rig.attach("")?;
    // The agent may have begun by itself.
    wait_until("the mirror", patience(40), || {
        let output = rig.dtloop("mirror start --difference --json")?;
        Ok(output.ok() || rig.state()? == "in-sync")
    })?;
    let sent = rig.set()?["totals"]["sent_bytes"].as_u64();
    rig.same()?;
    ensure!(rig.counter("syncs")? > 0, "nothing was compared");
    // 64 MiB went with the full mirror, 64 MiB with the writes.
    ensure!(
        sent.is_some_and(|sent| sent < 140 << 20),
        "{sent:?} bytes were sent"
    );
    rig.finish()
}

#[test]
fn a_paused_mirror_keeps_its_place_across_a_killed_agent() -> Result<()> {
    let rig = Rig::alone(96)?;
    rig.start_target()?;
    rig.attach("")?;
    rig.write(0, 8)?;
    rig.start_agent()?;
    rig.wait_state("mirror-needed")?;
    rig.expect("mirror pause", 7)?;
    rig.expect("mirror start --full --background", 0)?;
    let done = || -> Result<u64> {
        let device = rig.device()?;
        Ok(device["agent"]["state"]["pass"]["done_bytes"]
            .as_u64()
            .unwrap_or(0))
    };
    wait_until("the mirror's first part", patience(20), || Ok(done()? > 0))?;
    rig.expect("mirror pause", 0)?;
    rig.expect("mirror start --full", 7)?;
    // What is on its way still arrives.
    let mut before = 0;
    wait_until("the mirror to rest", patience(20), || {
        let earlier = std::mem::replace(&mut before, done()?);
        std::thread::sleep(std::time::Duration::from_millis(600));
        Ok(earlier == before)
    })?;
    ensure!(before > 0 && before < 96 << 20, "paused at {before}");

    rig.kill_agent()?;
    rig.start_agent()?;
    rig.wait_state("mirroring")?;
    wait_until("its place", patience(20), || {
        Ok(rig.device()?["agent"]["state"]["pass"]["paused"] == true)
    })?;
    let after = done()?;
    ensure!(
        after == before,
        "the mirror was at {before} and is at {after}"
    );
    let synced = rig.counter("sync_sectors")?;
    rig.expect("mirror resume", 0)?;
    let more = (rig.counter("sync_sectors")? - synced) * 512;
    ensure!(
        more <= (96 << 20) - after,
        "{more} bytes were read again from {after}"
    );
    rig.same()?;

    // Given up, the place is gone and the copy is none.
    rig.expect("mirror start --full --background", 0)?;
    rig.expect("mirror stop", 0)?;
    rig.wait_state("mirror-needed")?;
    rig.expect("wait", 7)?;
    rig.kill_agent()?;
    rig.start_agent()?;
    rig.wait_state("mirror-needed")?;
    rig.mirror("--difference")?;
    rig.same()?;
    rig.finish()
}
