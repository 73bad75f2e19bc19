// SPDX-License-Identifier: GPL-2.0-only

//! Coming and going, and what must be refused.

use anyhow::Result;
use dtloop_tests::{Kernel, full_run, patience};

use crate::module_rig::{LOOP, Rig};

/// Memory that the kernel has given out, in KiB, with what could be given back gone.
const USED: &str = "sync; echo 3 >/proc/sys/vm/drop_caches; sleep 0.5; awk '/^SUnreclaim|^VmallocUsed|^Percpu|^KernelStack/ { n += $2 } \
                    END { print n }' /proc/meminfo; grep -c dtloop /proc/vmallocinfo || true";

#[test]
fn attach_and_load_cycles_leak_nothing() -> Result<()> {
    let rig = Rig::start("cycles", 8)?;
    let node = rig.vm.device("source")?;
    let debug = rig.vm.kernel() == Kernel::Debug;
    let (attaches, loads) = match (debug, full_run()) {
        (false, _) => (1000, 100),
        (true, true) => (150, 20),
        (true, false) => (15, 4),
    };
    rig.attach("")?;
    let busy = rig.vm.try_sh("rmmod dtloop")?;
    assert!(!busy.ok() && busy.complaint().contains("in use"), "{busy}");
    rig.detach()?;
    let attach = |times: u32| {
        format!(
            "dtctl cycle set {node} {times}; dtdrain run --set set --discard --until-drained >/dev/null; dtguest settle"
        )
    };
    let load = |times: u32| {
        format!(
            "dtctl destroy set --discard; for i in $(seq {times}); do rmmod dtloop; modprobe dtloop; \
             dtctl create set >/dev/null; dtctl destroy set; done; dtctl create set >/dev/null"
        )
    };
    let used = || -> Result<(i64, i64)> {
        let text = rig.vm.sh(USED)?;
        let mut numbers = text.lines().map(|line| line.trim().parse::<i64>());
        let mut next = || numbers.next().transpose().map(Option::unwrap_or_default);
        Ok((next()?, next()?))
    };
    // The first rounds fill caches.
    rig.vm.sh_within(patience(120), attach(attaches / 5))?;
    rig.vm.sh_within(patience(120), load(2))?;
    let before = used()?;
    rig.vm.sh_within(patience(400), attach(attaches))?;
    let between = used()?;
    rig.vm.sh_within(patience(400), load(loads))?;
    let after = used()?;
    assert_eq!(
        (before.1, between.1),
        (between.1, after.1),
        "areas of the module in vmallocinfo"
    );
    // Less than what every cycle would leave if it left a page.
    let most = i64::from(attaches.min(loads * 8)) * 4;
    assert!(
        between.0 - before.0 < most.max(1500),
        "attaching: {before:?} -> {between:?} KiB"
    );
    assert!(
        after.0 - between.0 < most.max(1500),
        "loading: {between:?} -> {after:?} KiB"
    );
    rig.finish()
}

#[test]
fn what_breaks_the_rules_is_refused() -> Result<()> {
    let rig = Rig::start("hostile", 8)?;
    let node = rig.vm.device("source")?;
    rig.vm
        .sh_within(patience(60), format!("dtctl hostile set {node}"))?;
    rig.attach("")?;
    assert_eq!(rig.count(LOOP, "openers")?, 0);
    rig.vm.sh("modinfo dtloop | grep -q '^parm:.*auto_first'")?;
    rig.detach()?;
    rig.finish()
}
