// SPDX-License-Identifier: GPL-2.0-only

//! The shortest way through the module.

use anyhow::Result;

use crate::module_rig::{LOOP, Rig};

#[test]
fn what_is_written_reaches_the_replica() -> Result<()> {
    let rig = Rig::start("smoke", 16)?;
    rig.attach("")?;
    let dev = format!("/dev/loop{LOOP}");
    assert_eq!(
        rig.vm.sh(format!("blockdev --getsize64 {dev}"))?,
        (16 << 20).to_string()
    );
    rig.vm.sh(format!(
        "dd if=/dev/urandom of={dev} bs=64k count=40 seek=3 oflag=direct status=none"
    ))?;
    rig.vm.sh(format!(
        "dd if=/dev/urandom of={dev} bs=4k count=100 conv=fsync status=none"
    ))?;
    let report = rig.drain_all("")?;
    assert!(
        report["by_operation"]["write"].as_u64() >= Some(41),
        "{report}"
    );
    assert!(
        report["by_operation"]["flush"].as_u64() >= Some(1),
        "{report}"
    );
    assert_eq!(report["by_operation"]["attach"], 1);
    rig.same()?;
    rig.vm.sh(format!("cmp {dev} /tmp/replica"))?;
    rig.detach()?;
    rig.finish()
}
