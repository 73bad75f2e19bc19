// SPDX-License-Identifier: GPL-2.0-only

//! A cut network and killed daemons: it goes on by itself where it was, and nothing is mirrored again.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use dtloop_tests::{patience, wait_until};

use crate::replication_rig::{DEV, IMAGE, Rig};

#[test]
fn a_cut_network_is_caught_up_with() -> Result<()> {
    let rig = Rig::pair(32)?;
    rig.begin("")?;
    let syncs = rig.counter("syncs")?;
    let load = rig.load(40)?;
    // One cut that nobody notices, and one that is noticed.
    rig.source().set_link(false)?;
    sleep(Duration::from_secs(1));
    rig.source().set_link(true)?;
    rig.wait()?;
    rig.source().set_link(false)?;
    wait_until("the agent to notice", patience(40), || {
        Ok(rig.set()?["connection"]["state"] != "connected")
    })?;
    rig.expect("wait --timeout 1s", 4)?;
    rig.source().set_link(true)?;
    rig.wait()?;
    rig.end_load(load)?;
    rig.same()?;
    ensure!(
        rig.counter("syncs")? == syncs,
        "it was mirrored again: {}",
        rig.agent_log()?
    );
    rig.finish()
}

#[test]
fn a_killed_agent_goes_on_where_it_was() -> Result<()> {
    kill_repeatedly(5, |rig, round| {
        rig.kill_agent()?;
        sleep(Duration::from_millis(100 * round));
        rig.start_agent()
    })
}

#[test]
fn a_killed_target_goes_on_where_it_was() -> Result<()> {
    kill_repeatedly(5, |rig, round| {
        rig.kill_target()?;
        sleep(Duration::from_millis(100 * round));
        rig.start_target()
    })
}

#[test]
fn both_killed_go_on_where_they_were() -> Result<()> {
    kill_repeatedly(4, |rig, round| {
        if round % 2 == 0 {
            rig.kill_agent()?;
            rig.kill_target()?;
            rig.start_target()?;
            rig.start_agent()
        } else {
            rig.kill_target()?;
            rig.kill_agent()?;
            rig.start_agent()?;
            rig.start_target()
        }
    })
}

/// Disturbs while the device is written; in the end everything is there, and no mirror was needed.
fn kill_repeatedly(rounds: u64, disturb: impl Fn(&Rig, u64) -> Result<()>) -> Result<()> {
    let rig = Rig::mirrored(32, "")?;
    let syncs = rig.counter("syncs")?;
    let load = rig.load(60)?;
    for round in 1..=rounds {
        sleep(Duration::from_millis(300 * round));
        disturb(&rig, round)?;
    }
    rig.wait()?;
    rig.end_load(load)?;
    rig.same()?;
    ensure!(
        rig.counter("syncs")? == syncs,
        "it was mirrored again: {}",
        rig.agent_log()?
    );
    ensure!(rig.counter("tracked")? == 0, "the ring was full");
    rig.finish()
}

#[test]
fn a_mirror_survives_its_daemons() -> Result<()> {
    let rig = Rig::alone(96)?;
    rig.start_target()?;
    rig.attach("")?;
    rig.start_agent()?;
    rig.write(0, 16)?;
    rig.write(80, 16)?;
    rig.wait_state("mirror-needed")?;
    let load = rig.load(40)?;
    rig.expect("mirror start --full --background", 0)?;
    for _ in 0..2 {
        rig.kill_agent()?;
        rig.start_agent()?;
        rig.kill_target()?;
        rig.start_target()?;
    }
    rig.wait_state("in-sync")?;
    rig.end_load(load)?;
    rig.same()?;
    rig.finish()
}

/// What the target's disk lost on the way from the page cache is written again, not taken for written.
#[test]
fn a_failing_target_disk_loses_nothing() -> Result<()> {
    let rig = Rig::alone_with_copy_disk(32)?;
    rig.begin("")?;
    let syncs = rig.counter("syncs")?;
    let node = rig.target().device("copy")?;
    let swap = |table: &str| {
        rig.target().sh(format!(
            "dmsetup load copy --table \"0 $(blockdev --getsz {node}) {table}\"; dmsetup resume copy --noflush --nolockfs"
        ))
    };
    for round in 0..3 {
        // Whole pages stay in the page cache and fail at the checkpoint; others fail when they are written.
        let load = (round == 2).then(|| rig.load(40)).transpose()?;
        swap("error")?;
        rig.write(round * 8, 4)?;
        rig.target().wait_sh(
            patience(60),
            &format!("[ $(grep -c 'cannot be used' /var/log/dttarget.log) -gt {round} ]"),
        )?;
        ensure!(!rig.dtloop("status --check")?.ok(), "nothing is said");
        swap(&format!("linear {node} 0"))?;
        rig.wait_state("in-sync")?;
        rig.wait()?;
        if let Some(load) = load {
            rig.end_load(load)?;
        }
        // What is durable in the volume, not what is in the page cache.
        rig.stop_target()?;
        rig.start_target()?;
        rig.same()?;
    }
    ensure!(
        rig.counter("syncs")? == syncs,
        "it was mirrored again: {}",
        rig.agent_log()?
    );
    rig.finish()
}

/// What the target holds after it was killed at any moment is a state that the device was in.
#[test]
fn a_killed_target_holds_a_prefix() -> Result<()> {
    let rig = Rig::mirrored(32, "")?;
    for generation in 1..=3u64 {
        let log = format!("/tmp/stamps.{generation}");
        let writer = rig.source().spawn(format!(
            "exec dtstamp write {DEV} --log {log} --generation {generation} --seed {generation} --overlap"
        ))?;
        sleep(Duration::from_millis(1500 + 700 * generation));
        rig.kill_target()?;
        rig.kill_agent()?;
        writer.kill(15)?;
        writer.finish(patience(30))?;
        let checks = |more: &str| -> Result<()> {
            let script =
                format!("dtstamp check {IMAGE} --log {log} --generation {generation} {more}");
            let checked = rig.source().try_sh_within(patience(60), script)?;
            if !checked.ok() {
                let logs = rig
                    .source()
                    .sh("cat /var/log/dtagent.log /var/log/dttarget.log")?;
                bail!(
                    "generation {generation}: {checked}\n{}\n{logs}",
                    rig.status()?
                );
            }
            Ok(())
        };
        // The last write may be torn. The journal is replayed, at the latest when the target ends; there is no agent
        // that could bring more.
        rig.start_target()?;
        rig.stop_target()?;
        checks("")?;
        rig.start_target()?;
        rig.start_agent()?;
        rig.wait()?;
        checks("--complete")?;
    }
    rig.same()?;
    rig.finish()
}
