// SPDX-License-Identifier: GPL-2.0-only

//! A full ring, and what waiting means.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use dtloop_tests::patience;

use crate::replication_rig::{DEV, IMAGE, Rig};

#[test]
fn changes_that_did_not_fit_are_sent_again() -> Result<()> {
    let rig = Rig::mirrored(64, "--ring-size 4M")?;
    let syncs = rig.counter("sync_sectors")?;
    rig.stop_agent()?;
    rig.write(8, 24)?;
    rig.write(20, 1)?;
    ensure!(rig.counter("tracked")? > 0, "nothing was tracked");
    ensure!(rig.counter("dirty_blocks")? > 0, "nothing is dirty");
    // Without the agent nobody knows anything.
    rig.expect("status --check", 6)?;

    // Without a target the loss of order is known, and said.
    rig.stop_target()?;
    rig.start_agent()?;
    let load = rig.load(30)?;
    rig.start_target()?;
    rig.wait()?;
    rig.end_load(load)?;
    rig.same()?;
    ensure!(rig.counter("dirty_blocks")? == 0, "blocks stayed dirty");
    let read = (rig.counter("sync_sectors")? - syncs) * 512;
    ensure!(
        read > 0 && read < 48 << 20,
        "{read} bytes were read to send 24 MiB again"
    );
    rig.finish()
}

#[test]
fn with_the_policy_block_writers_wait_for_the_target() -> Result<()> {
    let rig = Rig::mirrored(32, "--ring-size 4M --policy block")?;
    // Writers wait for it: it must not wait for memory that their writes would free.
    rig.source().sh(
        "agent=$(cat /run/dtagent.pid); [ $(awk '/^VmLck/ { print $2 }' /proc/$agent/status) -gt 0 ]
         for stat in /proc/$agent/task/*/stat; do
             flags=$(sed 's/.*) //' $stat | cut -d' ' -f7); [ $((flags & 0x80000)) != 0 ]  # PF_MEMALLOC_NOIO
         done",
    )?;
    // The agent stays: without one nobody would ever make room, and changes are tracked instead.
    rig.stop_target()?;
    let mut writer = rig.source().spawn(format!(
        "dd if=/dev/urandom of={DEV} bs=256k count=64 oflag=direct conv=notrunc,fsync status=none"
    ))?;
    sleep(Duration::from_secs(4));
    if !writer.is_running() {
        let output = writer.wait(patience(1))?;
        bail!("the writer did not wait: {output}\n{}", rig.status()?);
    }
    ensure!(rig.counter("tracked")? == 0, "a change went by the stream");
    rig.start_target()?;
    writer.finish(patience(60))?;
    rig.same()?;
    ensure!(rig.counter("tracked")? == 0, "a change went by the stream");
    rig.finish()
}

#[test]
fn wait_means_what_was_written_before() -> Result<()> {
    let rig = Rig::mirrored(32, "")?;
    let load = rig.load(50)?;
    for block in 0..8 {
        // At the end, where the load would hardly write just now.
        let at = 8191 - block;
        rig.source().sh(format!(
            "dd if=/dev/urandom of=/tmp/block bs=4k count=1 status=none
             dd if=/tmp/block of={DEV} bs=4k seek={at} oflag=direct conv=notrunc status=none; dtloop wait --timeout 2m"
        ))?;
        let script =
            format!("dd if={IMAGE} bs=4k skip={at} count=1 status=none | cmp - /tmp/block");
        let here = rig.target().try_sh(&script)?;
        if !here.ok() {
            // The load may have hit the block.
            rig.source().sh(format!(
                "! dd if={DEV} bs=4k skip={at} count=1 iflag=direct status=none | cmp -s - /tmp/block"
            ))?;
        }
    }
    rig.end_load(load)?;

    rig.stop_target()?;
    rig.write(3, 1)?;
    rig.expect("wait --timeout 1s", 4)?;
    rig.stop_agent()?;
    rig.expect("wait --timeout 1s", 6)?;
    rig.expect("wait --set other", 6)?;
    rig.start_agent()?;
    rig.expect("wait --set other", 7)?;
    rig.start_target()?;
    rig.same()?;
    rig.finish()
}
