// SPDX-License-Identifier: GPL-2.0-only

//! Two devices of one set keep one order: whatever is cut, the pair of copies is a state that the pair of devices was in.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};
use dtloop_tests::{Disk, Job, Link, Output, Vm, full_run, note, patience};

use crate::replication_rig::{DEV, IMAGE, Rig};

const MIB: u64 = 24;
const LOG_MIB: u64 = 8;
const LOG_DEV: &str = "/dev/loop102";
const LOG_IMAGE: &str = "/srv/log.img";

/// One writer that goes from one device to the other, each write begun when the one before has ended, many of them made
/// durable: what a database does with its data and its log.
const DEPENDENT: &str = "--threads 1 --most 16384 --flush 200 --fua 200";

/// Volumes of both devices.
pub(crate) fn volumes(mib: u64, log_mib: u64) -> String {
    format!(
        "[[volume]]\nname = \"vol\"\npath = \"{IMAGE}\"\nsize = \"{mib}MiB\"\n\
         [[volume]]\nname = \"log\"\npath = \"{LOG_IMAGE}\"\nsize = \"{log_mib}MiB\"\n"
    )
}

/// Both devices attached to the default set.
pub(crate) fn attach(rig: &Rig, log_options: &str) -> Result<()> {
    rig.attach("")?;
    rig.attach_other("log", 102, &format!("--volume log {log_options}"))
}

/// Waits until both devices are in sync.
pub(crate) fn wait_in_sync(rig: &Rig) -> Result<()> {
    rig.source()
        .wait_sh(patience(40), "dtloop status --check >/dev/null")
}

fn write(rig: &Rig, generation: u64) -> Result<Job> {
    rig.source().spawn(format!(
        "exec dtstamp write {DEV} {LOG_DEV} --per-second 400 --generation {generation} --seed {generation} {DEPENDENT}"
    ))
}

/// Looks at images of both volumes on the target.
fn check(rig: &Rig, images: [&str; 2], generation: u64) -> Result<Output> {
    rig.target().try_sh_within(
        patience(60),
        format!(
            "dtstamp check {} {} --predict --generation {generation} --seed {generation} {DEPENDENT}",
            images[0], images[1]
        ),
    )
}

fn holds_a_prefix(rig: &Rig, generation: u64) -> Result<()> {
    let checked = check(rig, [IMAGE, LOG_IMAGE], generation)?;
    ensure!(checked.ok(), "generation {generation}: {checked}");
    note(format!("the pair is a prefix: {}", checked.text()));
    Ok(())
}

#[test]
fn the_copies_of_a_set_are_one_state_wherever_it_is_cut() -> Result<()> {
    let link = Link::new("source", "target")?;
    let [source, target] = Vm::start_all([
        Vm::builder("source")
            .link(&link)
            .disk(Disk::new("disk", MIB))
            .disk(Disk::new("log", LOG_MIB)),
        Vm::builder("target").link(&link),
    ])?;
    let mut rig = Rig::with(source, Some(target), MIB)?;
    rig.configure_target(&volumes(MIB, LOG_MIB))?;
    rig.start_target()?;
    attach(&rig, "")?;
    rig.start_agent()?;
    rig.mirror("--full")?;
    wait_in_sync(&rig)?;
    for vm in [rig.source(), rig.target()] {
        vm.sh("sync")?;
    }
    for generation in 1..=if full_run() { 12 } else { 4 } {
        let writer = write(&rig, generation)?;
        sleep(Duration::from_millis(1200 + generation * 4001 % 1100));
        // Killed, cut off, or without power; then the target ends, having applied what it has.
        match generation % 4 {
            1 => rig.kill_target()?,
            2 => {
                rig.source().set_link(false)?;
                rig.stop_target()?;
            }
            3 => rig.target_mut().power_cut()?,
            _ => {
                rig.source_mut().power_cut()?;
                rig.stop_target()?;
            }
        }
        if generation % 4 == 1 || generation % 4 == 3 {
            rig.kill_agent()?;
        }
        if generation % 4 == 3 {
            rig.target_mut().power_on()?;
        }
        if generation % 4 != 0 {
            writer.kill(15)?;
            writer.finish(patience(30))?;
            rig.start_target()?;
            // There is nobody that could bring more: no agent, or no cable.
            rig.stop_target()?;
        }
        holds_a_prefix(&rig, generation)?;
        if generation == 2 {
            skewed_is_found(&rig, generation)?;
        }
        rig.start_target()?;
        match generation % 4 {
            2 => rig.source().set_link(true)?,
            0 => {
                rig.source_mut().power_on()?;
                attach(&rig, "")?;
                rig.start_agent()?;
            }
            _ => rig.start_agent()?,
        }
        wait_in_sync(&rig)?;
        rig.wait()?;
        rig.target()
            .sh(format!("cp {LOG_IMAGE} /srv/earlier.img"))?;
        same_log(&rig)?;
        if generation % 4 != 0 {
            holds_a_prefix(&rig, generation)?;
        }
    }
    rig.same()?;
    rig.source().sh("dtguest settle; dtloop detach 102")?;
    rig.finish()
}

/// The canary: with a log from before, the data is ahead of it, which must not pass.
fn skewed_is_found(rig: &Rig, generation: u64) -> Result<()> {
    let skewed = check(rig, [IMAGE, "/srv/earlier.img"], generation)?;
    ensure!(
        skewed.complaint().contains("not a legal prefix"),
        "data ahead of its log has passed: {skewed}"
    );
    Ok(())
}

/// The second device and its copy are the same.
pub(crate) fn same_log(rig: &Rig) -> Result<()> {
    rig.alike(LOG_DEV, LOG_IMAGE, &[])
}
