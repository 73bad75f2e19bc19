// SPDX-License-Identifier: GPL-2.0-only

//! Two machines and the cable between them.

use anyhow::Result;
use dtloop_tests::{Link, Vm, patience};

#[test]
fn machines_reach_each_other_until_the_cable_is_cut() -> Result<()> {
    let link = Link::new("source", "target")?;
    let [source, mut target] =
        Vm::start_all(["source", "target"].map(|name| Vm::builder(name).link(&link)))?;
    source.wait_sh(patience(20), "ping -c1 -W1 target")?;
    target.wait_sh(patience(20), &format!("ping -c1 -W1 {}", source.address()?))?;

    source.set_link(false)?;
    assert!(!target.try_sh("ping -c2 -W1 source")?.ok());
    source.set_link(true)?;
    target.wait_sh(patience(20), "ping -c1 -W1 source")?;

    target.power_cut()?;
    assert!(!source.try_sh("ping -c2 -W1 target")?.ok());
    target.power_on()?;
    source.wait_sh(patience(20), "ping -c1 -W1 target")
}
