// SPDX-License-Identifier: GPL-2.0-only

//! What a crash of the source costs: the marked regions, and not the whole device.

use anyhow::{Context, Result, ensure};
use dtloop_tests::{note, patience, wait_until};
use serde_json::Value;

use crate::replication_rig::{DEV, Rig};

const INTENT: &str = "/var/lib/dtloop/intent/default";

/// A mirrored pair of machines, and the options with which its device is attached.
const OPTIONS: &str = "--region-size 64K";

fn recovery(rig: &Rig) -> Result<Value> {
    Ok(rig.device()?["agent"]["last_recovery"].clone())
}

/// The source crashes and comes back.
fn crash(rig: &mut Rig) -> Result<()> {
    rig.source_mut().power_cut()?;
    rig.source_mut().power_on()?;
    rig.attach(OPTIONS)?;
    rig.start_agent()
}

#[test]
fn a_power_cut_of_the_source_costs_the_marked_regions() -> Result<()> {
    let mut rig = Rig::pair(96)?;
    rig.begin(OPTIONS)?;
    rig.write(0, 64)?;
    rig.wait()?;
    for round in 0..2 {
        let load = rig.load(200)?;
        // The second time the target is away, and the map has to hold all that was written meanwhile.
        if round == 1 {
            rig.stop_target()?;
        }
        let before = rig.counter("writes")?;
        wait_until("some writes", patience(30), || {
            Ok(rig.counter("writes")? > before + 150)
        })?;
        let marked = rig.counter("regions_marked")?;
        rig.source_mut().power_cut()?;
        drop(load);
        rig.source_mut().power_on()?;
        rig.attach(OPTIONS)?;
        if round == 1 {
            rig.start_target()?;
        }
        rig.start_agent()?;
        rig.same()?;
        let cost = recovery(&rig)?;
        note(format!(
            "{marked} regions were marked before the power cut; {cost}"
        ));
        let field = |name: &str| {
            cost[name]
                .as_u64()
                .with_context(|| format!("{name} in {cost}"))
        };
        ensure!(cost["complete"] == true, "{cost}");
        ensure!(field("regions")? > 0 && field("regions")? < 1536, "{cost}");
        ensure!(
            field("compared_bytes")? <= field("regions")? * 65536,
            "{cost}"
        );
        ensure!(field("sent_bytes")? <= field("compared_bytes")?, "{cost}");
    }
    rig.finish()
}

#[test]
fn an_intent_file_that_cannot_be_relied_on_is_named_and_everything_compared() -> Result<()> {
    let mut rig = Rig::pair(32)?;
    rig.begin(OPTIONS)?;
    rig.source().sh(format!(
        "dd if={INTENT} of=/root/older bs=64k iflag=direct conv=fsync status=none; sync"
    ))?;
    // Past the page cache, which knows nothing of what the kernel writes there. Something to be told about: another version of the file.
    rig.write(3, 1)?;
    rig.wait()?;
    wait_until("the version to be told", patience(20), told(&rig))?;
    let cases = [
        ("rm", format!("rm {INTENT}"), "new"),
        (
            "damage",
            format!("printf x | dd of={INTENT} bs=1 seek=700 conv=notrunc status=none"),
            "damaged",
        ),
        (
            "an older copy",
            format!("cp --sparse=never /root/older {INTENT}"),
            "older copy",
        ),
    ];
    for (what, harm, reason) in cases.into_iter().rev() {
        rig.source_mut().power_cut()?;
        rig.source_mut().power_on()?;
        rig.source().sh(format!("{harm}; sync"))?;
        rig.attach(OPTIONS)?;
        // Behind the back of all marks.
        rig.start_agent()?;
        rig.same()?;
        let log = rig.agent_log()?;
        ensure!(log.contains(reason), "{what} is not named:\n{log}");
        ensure!(recovery(&rig)?.is_null(), "{what}: marks were relied on");
        rig.wait()?;
        wait_until("the version to be told", patience(20), told(&rig))?;
    }
    rig.finish()
}

/// Whether the target has heard of the newest version of the intent file.
fn told(rig: &Rig) -> impl FnMut() -> Result<bool> + '_ {
    || {
        let log = rig.target().sh("cat /var/log/dttarget.log")?;
        let version = rig.status()?["sets"][0]["intent"]["version"].clone();
        Ok(log.contains(&format!("Intent {{ version: {version} }}")))
    }
}

#[test]
fn a_module_loaded_anew_costs_no_comparison_when_the_target_had_everything() -> Result<()> {
    let mut rig = Rig::pair(64)?;
    rig.begin(OPTIONS)?;
    rig.write(1, 8)?;
    rig.wait()?;
    // The region stays marked for a while after its last change.
    wait_until("the marks to go", patience(120), || {
        Ok(rig.counter("regions_marked")? == 0)
    })?;
    rig.source().sh("dtguest settle; dtloop detach 101")?;
    rig.stop_agent()?;
    rig.source()
        .sh("dtloop set default --remove --discard-records; rmmod dtloop")?;
    rig.attach(OPTIONS)?;
    rig.start_agent()?;
    rig.same()?;
    let cost = recovery(&rig)?;
    ensure!(
        cost["regions"] == 0 && cost["compared_bytes"] == 0,
        "{cost}"
    );
    // Detached and attached again, with a change in between through the loop device only.
    rig.write(1, 1)?;
    rig.source().sh("dtguest settle; dtloop detach 101")?;
    rig.attach("")?;
    rig.source().sh(format!(
        "dd if=/dev/urandom of={DEV} bs=4k count=3 oflag=direct status=none"
    ))?;
    rig.same()?;
    let cost = recovery(&rig)?;
    ensure!(cost["compared_bytes"].as_u64() < Some(8 << 20), "{cost}");
    crash(&mut rig)?;
    rig.same()?;
    rig.finish()
}
