// SPDX-License-Identifier: GPL-2.0-only

//! The power fails, or the kernel does.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use dtloop_tests::{Cache, Disk, full_run, note, patience, wait_until};

use crate::fault_frame::{Resend, Story};

const MIB: u64 = 64;

/// Small regions: the loads of a moment do not mark all.
const OPTIONS: &str = "--region-size 64K";
const REGION_BYTES: u64 = 64 << 10;

#[test]
fn a_source_without_power_is_made_good_past_the_host_cache() -> Result<()> {
    source_ends(Cache::None, if full_run() { 20 } else { 2 }, |story| {
        story.rig.source_mut().power_cut()
    })
}

#[test]
fn a_source_without_power_is_made_good_with_a_write_back_cache() -> Result<()> {
    source_ends(Cache::Writeback, if full_run() { 20 } else { 2 }, |story| {
        story.rig.source_mut().power_cut()
    })
}

#[test]
fn a_panic_of_the_source_is_made_good() -> Result<()> {
    source_ends(Cache::Writeback, if full_run() { 4 } else { 1 }, |story| {
        let source = story.rig.source_mut();
        source.allow("sysrq triggered crash");
        // Nothing comes back from it.
        let _job = source.spawn("echo c >/proc/sysrq-trigger")?;
        wait_until("the panic", patience(20), || {
            Ok(source.console_text().contains("sysrq triggered crash"))
        })?;
        source.power_cut()
    })
}

/// The source ends at a random moment under load, again and again; each time the copy is a state that the device was in,
/// and made equal by itself afterwards.
fn source_ends(cache: Cache, rounds: u64, end: impl Fn(&mut Story) -> Result<()>) -> Result<()> {
    let disk = Disk::new("disk", MIB).cache(cache);
    let mut story = Story::pair_with(disk, MIB, OPTIONS)?;
    for round in 1..=rounds {
        // What one writer did can be told without its log; many writers at full speed leave more on their way.
        let single = round % 2 == 1;
        let load = if single {
            story.single_load(400)?
        } else {
            story.load_with("--overlap --most 32768")?
        };
        let moment = Duration::from_millis(200 + round * 7919 % 1300);
        sleep(moment);
        note(format!("round {round} of {rounds}, after {moment:?}"));
        end(&mut story)?;
        drop(load);
        if single {
            // Ending, the target applies what it has.
            story.rig.stop_target()?;
            story.holds_a_prefix()?;
            story.rig.start_target()?;
        }
        story.rig.source_mut().power_on()?;
        story.counts_anew();
        story.rig.attach(OPTIONS)?;
        story.rig.start_agent()?;
        story.settles(Resend::Marked {
            region_bytes: REGION_BYTES,
        })?;
    }
    let load = story.load()?;
    story.wait_writes(50)?;
    story.end_load(load)?;
    story.finish(Resend::Nothing)
}

/// What the target acknowledged, it has after a power cut; nothing is mirrored again.
#[test]
fn a_target_without_power_goes_on_where_it_was() -> Result<()> {
    let mut story = Story::pair(MIB, "")?;
    for round in 1..=if full_run() { 10 } else { 2 } {
        let load = story.single_load(200)?;
        sleep(Duration::from_millis(400 + round * 6007 % 1500));
        story.rig.target_mut().power_cut()?;
        story.wait_writes(50)?;
        // Nobody brings more while it is looked at.
        story.rig.source().set_link(false)?;
        story.rig.target_mut().power_on()?;
        story.rig.start_target()?;
        story.rig.stop_target()?;
        story.holds_a_prefix()?;
        story.rig.start_target()?;
        story.rig.source().set_link(true)?;
        story.wait_writes(50)?;
        story.end_load(load)?;
        story.settles(Resend::Nothing)?;
    }
    story.finish(Resend::Nothing)
}
