// SPDX-License-Identifier: GPL-2.0-only

//! File systems are whole on both sides.

use anyhow::Result;
use dtloop_tests::patience;

use crate::replication_rig::{DEV, IMAGE, Rig};

#[test]
fn ext4_is_whole_on_both_sides() -> Result<()> {
    file_system(64, "mkfs.ext4 -q", "e2fsck -fn")
}

#[test]
fn xfs_is_whole_on_both_sides() -> Result<()> {
    file_system(320, "mkfs.xfs -q", "xfs_repair -n -f")
}

fn file_system(mib: u64, make: &str, check: &str) -> Result<()> {
    let rig = Rig::alone(mib)?;
    let vm = rig.source();
    rig.start_target()?;
    rig.attach("")?;
    rig.start_agent()?;
    vm.sh(format!("{make} {DEV} && mount {DEV} /mnt"))?;
    let work = vm.spawn(
        "for round in $(seq 4); do
             mkdir /mnt/$round; cp -a /etc /mnt/$round/; sync -f /mnt
             find /mnt/$round -name '*.conf' -delete; [ $round -lt 3 ] || rm -r /mnt/$((round - 2))
         done; head -c 3000000 /dev/urandom >/mnt/big; sync -f /mnt; fstrim /mnt || true",
    )?;
    rig.mirror("--full")?;
    work.finish(patience(90))?;
    vm.sh("umount /mnt")?;
    rig.same()?;
    for path in [DEV, IMAGE] {
        vm.sh_within(patience(40), format!("{check} {path}"))?;
    }
    // Also the copy of one that is in use is whole, once its journal is replayed.
    vm.sh(format!(
        "mount {DEV} /mnt; cp -a /etc /mnt/again; sync -f /mnt"
    ))?;
    rig.wait()?;
    vm.sh_within(
        patience(40),
        format!(
            "modprobe loop; mkdir -p /srv/copy; cp --sparse=always {IMAGE} /srv/copy.img
             mount -o loop,nouuid /srv/copy.img /srv/copy 2>/dev/null || mount -o loop /srv/copy.img /srv/copy
             diff -r --no-dereference /etc /srv/copy/again; umount /srv/copy; {check} /srv/copy.img; umount /mnt"
        ),
    )?;
    rig.same()?;
    rig.finish()
}
