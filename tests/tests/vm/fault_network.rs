// SPDX-License-Identifier: GPL-2.0-only

//! Networks that lose, reorder, delay and narrow, and connections of which only one side knows that they are gone.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dtloop_tests::{Vm, full_run, note, patience, wait_until};

use crate::fault_frame::{Resend, Story};

/// What a machine's network does to all that it sends.
fn disturb(vm: &Vm, how: &str) -> Result<()> {
    vm.sh(format!("tc qdisc add dev eth0 root {how}")).map(drop)
}

fn heal(vm: &Vm) -> Result<()> {
    vm.sh("tc qdisc del dev eth0 root").map(drop)
}

fn durable(story: &Story) -> Result<u64> {
    let set = story.rig.set()?;
    set["durable_seq"]
        .as_u64()
        .with_context(|| format!("no durable_seq: {set}"))
}

/// Each for a while under load: the copy goes on meanwhile, and is whole afterwards.
#[test]
fn loss_reordering_latency_and_a_narrow_link_are_borne() -> Result<()> {
    let mut story = Story::pair(64, "")?;
    for how in [
        "netem loss 1%",
        "netem delay 20ms reorder 25% 50%",
        "netem delay 500ms",
        "tbf rate 1mbit burst 16kb latency 400ms",
    ] {
        let load = story.load()?;
        for vm in [story.rig.source(), story.rig.target()] {
            disturb(vm, how)?;
        }
        let before = durable(&story)?;
        let goal = before + if full_run() { 2000 } else { 150 };
        wait_until(&format!("progress through {how}"), patience(60), || {
            Ok(durable(&story)? > goal)
        })?;
        for vm in [story.rig.source(), story.rig.target()] {
            heal(vm)?;
        }
        story.end_load(load)?;
        note(how);
        story.settles(Resend::Nothing)?;
    }
    story.finish(Resend::Nothing)
}

/// What one machine sends is lost, and nobody says so: no FIN, no RST. The agent's time-out acts, the target's session is
/// taken over by the next connection, and the writers notice nothing.
#[test]
fn a_half_open_connection_is_given_up_and_made_anew() -> Result<()> {
    let mut story = Story::pair(64, "")?;
    let load = story.load()?;
    for source_is_mute in [true, false] {
        let rig = &story.rig;
        let mute = if source_is_mute {
            rig.source()
        } else {
            rig.target()
        };
        let connections = rig.set()?["totals"]["connections"].as_u64();
        disturb(mute, "netem loss 100%")?;
        wait_until("the agent to notice", patience(40), || {
            Ok(rig.set()?["connection"]["state"] != "connected")
        })?;
        story.wait_writes(20)?;
        heal(mute)?;
        rig.wait()?;
        let after = rig.set()?["totals"]["connections"].as_u64();
        ensure!(after > connections, "{connections:?}, then {after:?}");
    }
    story.end_load(load)?;
    story.finish(Resend::Nothing)
}

/// A cable that is loose: off and on faster than anybody notices, and then longer.
#[test]
fn a_loose_cable_is_borne() -> Result<()> {
    let mut story = Story::pair(64, "")?;
    let load = story.load()?;
    for round in 1..=if full_run() { 40 } else { 8 } {
        story.rig.source().set_link(false)?;
        sleep(Duration::from_millis(round * 5003 % 1700));
        story.rig.source().set_link(true)?;
        sleep(Duration::from_millis(round * 3001 % 500));
    }
    story.wait_writes(20)?;
    story.end_load(load)?;
    story.finish(Resend::Nothing)
}
