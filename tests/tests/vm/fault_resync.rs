// SPDX-License-Identifier: GPL-2.0-only

//! Mirrors and resyncs that are disturbed, and outages longer than everything that holds records.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use dtloop_tests::{full_run, note, patience, wait_until};

use crate::fault_frame::{Resend, Story};
use crate::replication_rig::{DEV, Rig};

/// A link so slow that there is time to disturb what goes over it.
fn narrow(rig: &Rig, rate: &str) -> Result<()> {
    rig.source()
        .sh(format!(
            "tc qdisc replace dev eth0 root tbf rate {rate} burst 128kb latency 100ms"
        ))
        .map(drop)
}

fn widen(rig: &Rig) -> Result<()> {
    rig.source().sh("tc qdisc del dev eth0 root").map(drop)
}

/// How far the pass over the device is, in percent; None: there is none.
fn percent_done(rig: &Rig) -> Result<Option<u64>> {
    let pass = rig.device()?["agent"]["state"]["pass"].clone();
    let (done, total) = (pass["done_bytes"].as_u64(), pass["total_bytes"].as_u64());
    Ok(done
        .zip(total)
        .and_then(|(done, total)| (done * 100).checked_div(total)))
}

/// How a mirror is interrupted.
#[derive(Clone, Copy, Debug)]
enum Interruption {
    Cut,
    Agent,
    Target,
    Both,
}

impl Interruption {
    const ALL: [Self; 4] = [Self::Cut, Self::Agent, Self::Target, Self::Both];

    fn act(self, rig: &Rig) -> Result<()> {
        if matches!(self, Self::Cut) {
            rig.source().set_link(false)?;
            rig.kill_target()?;
            rig.start_target()?;
            return rig.source().set_link(true);
        }
        if matches!(self, Self::Agent | Self::Both) {
            rig.kill_agent()?;
        }
        if matches!(self, Self::Target | Self::Both) {
            rig.kill_target()?;
            rig.start_target()?;
        }
        if matches!(self, Self::Agent | Self::Both) {
            rig.start_agent()?;
        }
        Ok(())
    }
}

/// A full mirror under load is interrupted in its beginning, its middle and its end; it goes on at its place.
#[test]
fn a_mirror_interrupted_at_each_stage_goes_on() -> Result<()> {
    const MIB: u64 = 48;
    let rig = Rig::pair(MIB)?;
    rig.start_target()?;
    rig.attach("")?;
    rig.write(0, MIB)?;
    rig.start_agent()?;
    rig.wait_state("mirror-needed")?;
    let mut story = Story::of(rig, MIB)?;
    for (round, interruption) in Interruption::ALL.into_iter().enumerate() {
        let load = story.load()?;
        narrow(&story.rig, "80mbit")?;
        story.rig.expect("mirror start --full --background", 0)?;
        for stage in [0, 45, 85] {
            let mut seen = None;
            wait_until(&format!("{stage} % of the mirror"), patience(60), || {
                seen = percent_done(&story.rig)?;
                Ok(seen.is_none_or(|percent| percent >= stage))
            })?;
            let percent = seen.context("the mirror is over too early")?;
            note(format!("{interruption:?} at {percent} %"));
            interruption.act(&story.rig)?;
            let after = story.rig.state()?;
            ensure!(after == "mirroring", "{after}: {}", story.rig.agent_log()?);
        }
        widen(&story.rig)?;
        story.rig.wait_state("in-sync")?;
        story.end_load(load)?;
        // What was on its way is read again each time.
        story.settles(Resend::Compared { times: 2 })?;
        if round == 0 && !full_run() {
            // The plain run takes the cut and the worst of the others.
            let load = story.load()?;
            narrow(&story.rig, "80mbit")?;
            story.rig.expect("mirror start --full --background", 0)?;
            wait_until("half of the mirror", patience(60), || {
                Ok(percent_done(&story.rig)?.is_none_or(|percent| percent >= 50))
            })?;
            Interruption::Both.act(&story.rig)?;
            widen(&story.rig)?;
            story.rig.wait_state("in-sync")?;
            story.end_load(load)?;
            story.settles(Resend::Compared { times: 2 })?;
            break;
        }
    }
    story.finish(Resend::Nothing)
}

/// Makes an outage in which the ring overflows, and so many MiB from `at_mib` on are tracked.
fn outage(story: &mut Story, at_mib: u64, mib: u64) -> Result<()> {
    story.rig.source().set_link(false)?;
    story.rig.write(at_mib, mib)?;
    ensure!(story.rig.counter("tracked")? > 0, "nothing was tracked");
    Ok(())
}

/// A resync is cut off again and again, while writes overtake it where it is working.
#[test]
fn a_resync_survives_new_outages_and_writes_that_overtake_it() -> Result<()> {
    let mut story = Story::pair(64, "--ring-size 4M")?;
    let load = story.load()?;
    narrow(&story.rig, "60mbit")?;
    for round in 0..if full_run() { 8 } else { 3 } {
        outage(&mut story, round % 3 * 16, 24)?;
        story.rig.source().set_link(true)?;
        wait_until("the resync", patience(60), || {
            Ok(story.rig.state()? == "resyncing")
        })?;
        // Where it has been, where it is, and where it will be.
        let overtakes = format!(
            "for at in $(seq 0 7 63); do dd if=/dev/urandom of={DEV} bs=64k seek=$((at * 16)) count=1 oflag=direct conv=notrunc status=none; done"
        );
        story.rig.source().sh(overtakes)?;
        note(format!("round {round}: {:?} %", percent_done(&story.rig)?));
    }
    widen(&story.rig)?;
    story.end_load(load)?;
    // Each outage leaves at most the whole device dirty.
    story.finish(Resend::Compared { times: 8 })
}

/// A device is detached while the target is away; its records wait, and another attachment of it is compared.
#[test]
fn a_device_detached_while_disconnected_is_made_good() -> Result<()> {
    let mut story = Story::alone(32, "")?;
    for agent_is_there in [true, false] {
        story.rig.stop_target()?;
        if !agent_is_there {
            story.rig.kill_agent()?;
        }
        let load = story.load()?;
        story.wait_writes(100)?;
        story.end_load(load)?;
        story.rig.source().sh("dtguest settle; dtloop detach 101")?;
        story.rig.attach("")?;
        // The counters are those of a new device.
        story.counts_anew();
        let load = story.load()?;
        story.rig.start_target()?;
        if !agent_is_there {
            story.rig.start_agent()?;
        }
        story.wait_writes(50)?;
        story.end_load(load)?;
        story.settles(Resend::Compared { times: 1 })?;
    }
    story.finish(Resend::Nothing)
}

/// An outage that fills the ring, the target's absence and the whole map: the writers never wait, the state says what was
/// lost, and the way back is found without help.
#[test]
fn an_outage_that_fills_ring_and_map_is_caught_up_with() -> Result<()> {
    const MIB: u64 = 48;
    let mut story = Story::alone(MIB, "--ring-size 4M")?;
    story.rig.stop_target()?;
    let load = story.load_with("--overlap --most 131072")?;
    for round in 0..2 {
        story.rig.write(0, MIB)?;
        if round == 0 {
            story.rig.kill_agent()?;
            story.wait_writes(100)?;
            story.rig.start_agent()?;
        }
    }
    let device = story.rig.device()?;
    let block = device["kernel"]["dirty_block_bytes"].as_u64().unwrap_or(0);
    let dirty = story.rig.counter("dirty_blocks")? * block;
    ensure!(dirty > (MIB << 20) / 10 * 9, "only {dirty} bytes are dirty");
    story.rig.expect("status --check", 3)?;
    story.end_load(load)?;
    let load = story.load()?;
    let begin = Instant::now();
    story.rig.start_target()?;
    story.rig.wait_state("in-sync")?;
    note(format!(
        "{} KiB were dirty, in sync again after {:.1} s under load",
        dirty >> 10,
        begin.elapsed().as_secs_f64()
    ));
    ensure!(begin.elapsed() < patience(120), "it took too long");
    story.end_load(load)?;
    story.finish(Resend::Compared { times: 3 })
}
