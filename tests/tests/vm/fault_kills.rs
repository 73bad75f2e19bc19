// SPDX-License-Identifier: GPL-2.0-only

//! Daemons that are killed all the time, and ones that are replaced.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dtloop_tests::{Job, Vm, full_run, patience};
use serde_json::json;

use crate::fault_frame::{Resend, Story};
use crate::replication_rig::{AGENT, TARGET, start_script};

#[test]
fn an_agent_killed_every_100_ms_loses_nothing() -> Result<()> {
    killed_every_100_ms(&["dtagent"])
}

#[test]
fn a_target_killed_every_100_ms_loses_nothing() -> Result<()> {
    killed_every_100_ms(&["dttarget"])
}

#[test]
fn both_killed_every_100_ms_lose_nothing() -> Result<()> {
    killed_every_100_ms(&["dtagent", "dttarget"])
}

fn killed_every_100_ms(victims: &[&str]) -> Result<()> {
    let mut story = Story::alone(64, "")?;
    let load = story.load()?;
    let rounds = if full_run() { 400 } else { 60 };
    let murders = victims
        .iter()
        .map(|name| murder(story.rig.source(), name, rounds, "0.1"))
        .collect::<Result<Vec<_>>>()?;
    for murder in murders {
        // It ends early when there is nobody to kill: a daemon has ended by itself, and has said why.
        let ended = murder.finish(patience(120));
        ended.with_context(|| story.rig.logs().unwrap_or_default())?;
    }
    story.wait_writes(50)?;
    story.end_load(load)?;
    ensure!(story.rig.counter("tracked")? == 0, "the ring was full");
    story.finish(Resend::Nothing)
}

/// Kills and restarts a daemon, so many times, after so many seconds each time.
fn murder(vm: &Vm, name: &str, rounds: u32, seconds: &str) -> Result<Job> {
    let command = if name == "dtagent" { AGENT } else { TARGET };
    let start = start_script(name, command);
    vm.spawn(format!(
        "for round in $(seq {rounds}); do
             sleep {seconds}; kill -9 $(cat /run/{name}.pid); rm /run/{name}.pid
             {start}
             while [ ! -s /run/{name}.pid ]; do sleep 0.01; done
         done"
    ))
}

/// An agent that is killed while its disk makes something durable is not gone before that is done: the next one is there
/// earlier.
#[test]
fn an_agent_that_takes_long_to_die_is_waited_for() -> Result<()> {
    let mut story = Story::alone(64, "")?;
    let load = story.load()?;
    // A second is enough for the agent to have something to make durable, most of the time.
    throttle(story.rig.source(), 25)?;
    let rounds = if full_run() { 40 } else { 8 };
    let ended = murder(story.rig.source(), "dtagent", rounds, "1.2")?.finish(patience(120));
    ended.with_context(|| story.rig.logs().unwrap_or_default())?;
    throttle(story.rig.source(), 0)?;
    story.wait_writes(50)?;
    story.end_load(load)?;
    story.finish(Resend::Nothing)
}

/// Lets the root disk, with state and journal on it, do so many operations a second; 0: as many as it can.
fn throttle(vm: &Vm, operations: u32) -> Result<()> {
    let limits = json!({
        "device": "root", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": operations, "iops_rd": 0, "iops_wr": 0,
    });
    vm.qmp_execute("block_set_io_throttle", &limits).map(drop)
}

/// A package upgrade: other files under the same names, then a restart; at a moment nobody chose.
#[test]
fn daemons_are_replaced_under_load() -> Result<()> {
    let mut story = Story::alone(64, "")?;
    let load = story.load()?;
    let rig = &story.rig;
    for round in 1..=2 {
        // Before the others on the path; under the same name, but another file each time.
        rig.source().sh(
            "cd /usr/local/sbin; for name in dtagent dttarget; do cp ../bin/$name $name.new; mv $name.new $name; done",
        )?;
        if round == 1 {
            rig.stop_agent()?;
            rig.start_agent()?;
        }
        rig.stop_target()?;
        sleep(Duration::from_millis(300));
        rig.start_target()?;
        if round == 2 {
            rig.stop_agent()?;
            rig.start_agent()?;
        }
        rig.wait()?;
        rig.source().sh(
            "for name in dtagent dttarget; do [ /proc/$(cat /run/$name.pid)/exe -ef /usr/local/sbin/$name ]; done",
        )?;
    }
    story.wait_writes(50)?;
    story.end_load(load)?;
    story.finish(Resend::Nothing)
}

/// The module goes and comes back between two loads: the stream is another one, the copy is compared, not sent.
#[test]
fn a_module_loaded_anew_is_compared() -> Result<()> {
    let mut story = Story::alone(64, "")?;
    for round in 0..2 {
        let load = story.load()?;
        story.wait_writes(100)?;
        story.end_load(load)?;
        let rig = &story.rig;
        if round == 0 {
            rig.wait()?;
        }
        rig.source().sh("dtguest settle; dtloop detach 101")?;
        if round == 1 {
            // Records that the target does not have are thrown away, knowingly.
            rig.kill_target()?;
        }
        rig.stop_agent()?;
        rig.source()
            .sh("dtloop set default --remove --discard-records; rmmod dtloop")?;
        rig.attach("")?;
        rig.start_agent()?;
        if round == 1 {
            rig.start_target()?;
        }
        story.counts_anew();
        story.settles(Resend::Compared { times: 1 })?;
    }
    let load = story.load()?;
    story.wait_writes(100)?;
    story.end_load(load)?;
    story.finish(Resend::Nothing)
}
