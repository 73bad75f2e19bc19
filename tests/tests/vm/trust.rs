// SPDX-License-Identifier: GPL-2.0-only

//! Two machines that have never met, as a person joins them and parts them again; and a target that is nobody special.

use anyhow::{Result, ensure};
use dtloop_tests::{Disk, Link, Vm, patience, wait_until};

use crate::replication_rig::{DEV, IMAGE, Rig, TARGET};

/// Waits until the agent says that the target refuses, in these words.
fn wait_refused(rig: &Rig, words: &str) -> Result<()> {
    wait_until(words, patience(30), || {
        Ok(rig.set()?["connection"].to_string().contains(words))
    })
}

/// Runs a command on the source that must end with this code and say these words.
fn refuses(rig: &Rig, arguments: &str, code: i32, words: &str) -> Result<()> {
    let said = rig.expect(arguments, code)?;
    ensure!(said.contains(words), "dtloop {arguments}: {said}");
    Ok(())
}

#[test]
fn machines_are_paired_by_a_code_and_parted_by_a_word() -> Result<()> {
    let rig = Rig::pair(16)?;
    rig.start_target_by(TARGET)?;
    rig.attach("")?;
    rig.start_agent()?;
    wait_refused(&rig, "dtloop pair target:7788")?;
    rig.expect("mirror start --full", 7)?;

    // Mistakes of a person.
    let code = rig.target().sh("dttarget invite --name alpha")?;
    let other = if code.starts_with('0') { "1" } else { "0" };
    let mistyped = format!("{other}{}", &code[1..]);
    refuses(&rig, &format!("pair target:7788 {mistyped}"), 2, "mistyped")?;
    refuses(
        &rig,
        &format!("pair target:7788 {}", &code[2..]),
        2,
        "40 characters",
    )?;
    refuses(&rig, &format!("pair target {code}"), 2, "host:port")?;
    refuses(
        &rig,
        &format!("pair target:9 {code}"),
        1,
        "cannot be reached",
    )?;
    // A code of another target, which is this one after it has lost its key.
    rig.target().sh("cp -a /var/lib/dtloop/target/trust /root/trust; mkdir /root/other; cp /etc/DT/dttarget.toml /root")?;
    let foreign = rig.target().sh("dttarget --state-dir /root/other invite")?;
    refuses(
        &rig,
        &format!("pair target:7788 {foreign}"),
        7,
        "not the target that made this code",
    )?;
    rig.expect("peers", 0)?;

    // Small letters and blanks are no mistake. The agent, which runs, needs no restart.
    let dictated = code.to_lowercase().replace('-', " ");
    refuses(
        &rig,
        &format!("pair target:7788 {dictated}"),
        0,
        "\"alpha\"",
    )?;
    refuses(&rig, "peers", 0, "target:7788")?;
    wait_until("the agent is let in", patience(30), || {
        Ok(rig.set()?["connection"].to_string().contains("connected"))
    })?;
    rig.mirror("--full")?;
    rig.write(2, 4)?;
    rig.same()?;
    // Nobody else can use the code.
    rig.source().sh("mkdir -p /root/stranger")?;
    let again = format!("pair target:7788 {code} --state-dir /root/stranger");
    refuses(&rig, &again, 7, "used or expired")?;

    // Away with it, while it is connected.
    rig.target()
        .sh("dttarget peers | grep alpha; dttarget revoke alpha")?;
    wait_refused(&rig, "does not know this machine")?;
    rig.write(8, 1)?;
    rig.expect("wait --timeout 2s", 7)?;
    // And back again; what was written meanwhile follows.
    let code = rig.target().sh("dttarget invite")?;
    rig.expect(&format!("pair target:7788 {code}"), 0)?;
    rig.same()?;
    rig.expect("unpair target:7788", 0)?;
    rig.stop_agent()?;
    rig.start_agent()?;
    wait_refused(&rig, "dtloop pair")?;
    rig.finish()
}

/// The user that the target runs as.
const USER: &str = "1990";

#[test]
fn the_target_is_a_user_of_its_own_that_opens_only_its_volumes() -> Result<()> {
    let link = Link::new("source", "target")?;
    let [source, target] = Vm::start_all([
        Vm::builder("source")
            .link(&link)
            .disk(Disk::new("disk", 16))
            .disk(Disk::new("second", 16)),
        Vm::builder("target")
            .link(&link)
            .disk(Disk::new("copy", 16)),
    ])?;
    source.wait_sh(patience(20), "ping -c1 -W1 target")?;
    let node = target.device("copy")?;
    let rig = Rig::with(source, Some(target), 16)?;
    rig.configure_target(&format!(
        "[[volume]]\nname = \"vol\"\npath = \"{node}\"\n
         [[volume]]\nname = \"image\"\npath = \"/srv/image\"\nsize = \"16MiB\"\n
         [[volume]]\nname = \"late\"\npath = \"/srv/late\"\n"
    ))?;
    rig.target().sh(format!(
        "install -d -o {USER} -g {USER} -m 700 /var/lib/dtloop/target /srv; chown {USER} {node}; ln -sfn {node} {IMAGE}"
    ))?;
    let target = format!(
        "setpriv --reuid {USER} --regid {USER} --clear-groups --inh-caps=-all --bounding-set=-all {TARGET}"
    );
    rig.start_target_by(&target)?;
    // What root's commands write, the target can read.
    let code = rig.target().sh("dttarget invite")?;
    rig.expect(&format!("pair target:7788 {code}"), 0)?;
    rig.target().sh(format!(
        "grep -q 'can be opened from now on' /var/log/dttarget.log
         grep -q 'NoNewPrivs:.*1' /proc/$(cat /run/dttarget.pid)/status
         test -z \"$(find /var/lib/dtloop/target ! -user {USER})\"
         install -o {USER} -m 600 /dev/null /srv/late; truncate -s 16M /srv/late"
    ))?;
    rig.attach("")?;
    rig.attach_other("second", 102, "--volume image")?;
    rig.start_agent()?;
    rig.mirror("--full")?;
    rig.write(1, 8)?;
    rig.same()?;
    rig.source().sh(
        "dd if=/dev/urandom of=/dev/loop102 bs=1M count=16 oflag=direct conv=fsync status=none",
    )?;
    rig.wait()?;
    let hash = |vm: &Vm, path: &str| vm.sh(format!("sha256sum <{path}"));
    ensure!(hash(rig.source(), "/dev/loop102")? == hash(rig.target(), "/srv/image")?);
    // A file that is its own, and in its configuration, but was not there when it confined itself.
    rig.source().sh("dtloop detach 102")?;
    rig.attach_other("second", 102, "--volume late")?;
    wait_until("the late volume is refused", patience(30), || {
        Ok(rig.status()?.to_string().contains("restart dttarget"))
    })?;
    rig.stop_target()?;
    rig.start_target_by(&target)?;
    wait_until("the late volume is taken", patience(30), || {
        Ok(!rig.status()?.to_string().contains("restart dttarget"))
    })?;
    ensure!(DEV.ends_with("101"));
    rig.source().sh("dtloop detach 102")?;
    rig.finish()
}
