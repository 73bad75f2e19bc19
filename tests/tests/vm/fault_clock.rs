// SPDX-License-Identifier: GPL-2.0-only

//! Clocks that jump.

use anyhow::{Context, Result, ensure};

use crate::fault_frame::{Resend, Story};

/// A clock is set back and forward, on either side: the connection stays, nothing is sent again, and what is said of time
/// stays sensible.
#[test]
fn clocks_that_jump_disturb_nothing() -> Result<()> {
    let mut story = Story::pair(32, "")?;
    let load = story.load()?;
    let connections = story.rig.set()?["totals"]["connections"].clone();
    for (source, jump) in [
        (true, "-1 day"),
        (true, "+3 days"),
        (false, "-1 day"),
        (false, "+3 days"),
    ] {
        let rig = &story.rig;
        let vm = if source { rig.source() } else { rig.target() };
        vm.sh(format!("date -s '{jump}'"))?;
        story.wait_writes(30)?;
        rig.wait()?;
        rig.expect("status --check", 0)?;
        let set = rig.set()?;
        let lag_ms = set["lag_ms"].as_u64().context("no lag")?;
        ensure!(
            lag_ms < 3_600_000,
            "the lag is {lag_ms} ms after {jump}: {set}"
        );
        ensure!(
            set["totals"]["connections"] == connections,
            "it was connected anew after {jump}: {}",
            rig.agent_log()?
        );
    }
    story.end_load(load)?;
    story.finish(Resend::Nothing)
}
