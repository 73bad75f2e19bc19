// SPDX-License-Identifier: GPL-2.0-only

//! What makes a copy one that people trust, on the real module and daemons.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use dtloop_tests::{note, patience, wait_until};
use serde_json::Value;

use crate::replication_rig::{IMAGE, Rig};

fn reason(rig: &Rig) -> Result<String> {
    let reason = rig.device()?["agent"]["reason"].clone();
    Ok(reason.as_str().unwrap_or_default().to_owned())
}

/// Until that is said about the device.
fn wait_reason(rig: &Rig, part: &str) -> Result<()> {
    let mut last = String::new();
    let said = wait_until(part, patience(40), || {
        last = reason(rig)?;
        Ok(last.contains(part))
    });
    if said.is_err() {
        bail!(
            "it says not \"{part}\" but \"{last}\": {}\n{}",
            rig.status()?,
            rig.logs()?
        );
    }
    said
}

/// Until the last record is proven; gives the record since which the chain is unbroken.
fn wait_proven(rig: &Rig) -> Result<u64> {
    let mut since = None;
    wait_until("a proof of everything", patience(40), || {
        let set = rig.set()?;
        since = set["proven"]["since_seq"].as_u64();
        let next = set["next_seq"].as_u64();
        Ok(set["proven"]["seq"].as_u64().map(|seq| seq + 1) == next)
    })?;
    since.context("there is no proof")
}

#[test]
fn a_write_past_the_module_is_an_alarm_within_seconds() -> Result<()> {
    let rig = Rig::mirrored(32, "")?;
    rig.write(0, 32)?;
    rig.wait()?;
    let began = Instant::now();
    let disk = &rig.disk;
    rig.source().sh(format!(
        "dd if=/dev/urandom of={disk} bs=4k seek=3000 count=2 oflag=direct conv=notrunc status=none"
    ))?;
    rig.wait_state("verify-needed")?;
    note(format!("the alarm came after {:?}", began.elapsed()));
    let text = reason(&rig)?;
    ensure!(text.contains("bypassed: 8192 bytes"), "{text}");
    rig.expect("status --check", 3)?;
    rig.expect("wait", 7)?;
    // It outlives the agent, and what nobody has repaired stays one.
    rig.kill_agent()?;
    rig.start_agent()?;
    rig.wait_state("verify-needed")?;
    let result = rig.verify("", 3)?;
    ensure!(result["differing_bytes"] == 128 << 10, "{result}");
    rig.wait_state("verify-needed")?;
    let said = rig.agent_log()?;
    let (lines, named) = (
        said.matches("is bypassed").count(),
        said.contains(disk.as_str()),
    );
    ensure!(lines == 1 && named, "{said}");

    let load = rig.load(30)?;
    let result = rig.verify("--repair", 0)?;
    ensure!(result["repaired_bytes"] == 128 << 10, "{result}");
    rig.end_load(load)?;
    rig.same()?;
    let log = rig.expect("verify --log", 0)?;
    for word in [
        "differs at byte",
        "source",
        "target",
        "repaired",
        "equal again",
    ] {
        ensure!(log.contains(word), "no {word}: {log}");
    }
    let status = rig.expect("status", 0)?;
    ensure!(
        status.contains("in sync") && !status.contains("bypassed"),
        "{status}"
    );
    ensure!(
        status.contains("were repaired") && status.contains("proven"),
        "{status}"
    );
    rig.finish()
}

/// While the module is not there nothing is captured; what is left of such a write is the disk's own count since boot.
#[test]
fn a_write_before_the_attach_is_noticed_by_the_count_of_the_disk() -> Result<()> {
    let mut rig = Rig::pair(32)?;
    rig.begin("")?;
    rig.write(0, 8)?;
    rig.wait()?;
    let disk = rig.disk.clone();
    rig.source().sh("sync")?;
    rig.source_mut().power_cut()?;
    rig.source_mut().power_on()?;
    rig.source().sh(format!(
        "dd if=/dev/urandom of={disk} bs=4k seek=2000 count=1 oflag=direct conv=notrunc status=none"
    ))?;
    rig.attach("")?;
    rig.start_agent()?;
    let noticed = wait_until("the log", patience(5), || {
        Ok(rig.agent_log()?.contains("between boot and its attach"))
    });
    if noticed.is_err() {
        let count = rig.source().sh(format!(
            "cat /proc/sys/kernel/random/boot_id /sys/class/block/{}/stat /var/lib/dtloop/agent/default.set",
            disk.trim_start_matches("/dev/")
        ))?;
        bail!("{count}\n{}\n{}", rig.status()?, rig.agent_log()?);
    }
    // Compared as a whole in any case, by whoever asks for it first.
    wait_until("a state", patience(60), || {
        Ok(["verify-needed", "in-sync"].contains(&rig.state()?.as_str()))
    })?;
    if rig.state()? == "verify-needed" {
        rig.verify("--repair", 0)?;
    }
    rig.same()?;
    rig.finish()
}

#[test]
fn both_sides_prove_the_same_sequence_through_kills() -> Result<()> {
    let rig = Rig::mirrored(32, "")?;
    let load = rig.load(60)?;
    for round in 0..4 {
        let before = rig.set()?["next_seq"].as_u64();
        wait_until("records", patience(40), || {
            Ok(rig.set()?["next_seq"].as_u64() > before.map(|seq| seq + 20))
        })?;
        if round != 1 {
            rig.kill_agent()?;
        }
        if round != 0 {
            rig.kill_target()?;
            rig.start_target()?;
        }
        if round != 1 {
            rig.start_agent()?;
        }
    }
    rig.end_load(load)?;
    rig.wait()?;
    let since = wait_proven(&rig)?;
    ensure!(
        since == 0,
        "the chain was broken, it is unbroken since {since}: {}",
        rig.agent_log()?
    );
    rig.same()?;
    rig.finish()
}

#[test]
fn a_verification_comes_by_itself_whatever_the_clock_does() -> Result<()> {
    let rig = Rig::mirrored(32, "")?;
    rig.write(0, 32)?;
    rig.wait()?;
    rig.stop_agent()?;
    rig.source()
        .sh("printf '[set.verify]\\nevery = \"24h\"\\nrate = \"8MiB\"\\n' >>/etc/DT/dtloop.toml")?;
    rig.start_agent()?;
    let begun = || -> Result<usize> {
        let log = rig.ask("verify --log", 0).or_else(|_| {
            let text = rig.expect("verify --log --json", 0)?;
            Ok::<_, anyhow::Error>(serde_json::from_str(&text)?)
        })?;
        let entries = log.as_array().context("no log")?;
        Ok(entries
            .iter()
            .filter(|entry| entry["event"] == "begins")
            .count())
    };
    wait_until("the plan to be known", patience(40), || {
        Ok(rig.set()?["verify_schedule"]["last_unix_ms"].as_u64() > Some(0))
    })?;
    ensure!(begun()? == 0, "it was not due");
    rig.source().sh("date -s '+25 hours'")?;
    wait_until("a verification", patience(40), || {
        Ok(rig.set()?["verify_schedule"]["under_way"] == true)
    })?;
    // It goes on at its place.
    rig.kill_agent()?;
    rig.start_agent()?;
    wait_until("its end", patience(60), || {
        let device = rig.device()?["agent"].clone();
        Ok(device["last_verify"]["complete"] == true)
    })?;
    let result = rig.device()?["agent"]["last_verify"].clone();
    ensure!(
        result["differing_bytes"] == 0 && result["compared_bytes"] == 32 << 20,
        "{result}"
    );
    ensure!(begun()? == 1, "{}", rig.agent_log()?);
    // Back by two days, and ahead again to where it was: nothing is owed.
    rig.source().sh("date -s '-48 hours'")?;
    rig.write(1, 1)?;
    wait_proven(&rig)?;
    rig.source().sh("date -s '+12 hours'")?;
    rig.write(1, 1)?;
    wait_proven(&rig)?;
    ensure!(begun()? == 1, "{}", rig.agent_log()?);
    // Another day by the clock that there is now.
    rig.source().sh("date -s '+24 hours'")?;
    wait_until("the next one", patience(60), || Ok(begun()? == 2))?;
    rig.same()?;
    rig.finish()
}

#[test]
fn a_swapped_target_disk_is_not_written_to() -> Result<()> {
    let rig = Rig::alone_with_copy_disk(32)?;
    let node = rig.target().device("copy")?;
    rig.target().sh(format!(
        "rm {IMAGE}; dmsetup remove copy; ln -s {node} {IMAGE}"
    ))?;
    rig.begin("")?;
    rig.stop_target()?;
    // Another disk, of the same size, is found under the name.
    rig.target().sh(format!(
        "modprobe loop; truncate -s 32M /srv/other; disk=$(losetup -f --show /srv/other)
         dmsetup create other -u OTHER-DISK --table \"0 65536 linear $disk 0\"
         dtguest settle; ln -sfn /dev/mapper/other {IMAGE}"
    ))?;
    rig.write(0, 4)?;
    rig.start_target()?;
    wait_reason(&rig, "another file or disk than before")?;
    rig.stop_target()?;
    rig.target()
        .sh("cmp -n $((32 << 20)) /dev/mapper/other /dev/zero")?;
    // The right one again, but somebody has written to it meanwhile.
    rig.target().sh(format!(
        "ln -sfn {node} {IMAGE}; printf newer | dd of={node} bs=4096 seek=5 conv=notrunc,fsync status=none"
    ))?;
    rig.start_target()?;
    wait_reason(&rig, "changed by something else")?;
    rig.stop_target()?;
    rig.target().sh("dttarget volume accept vol")?;
    rig.start_target()?;
    rig.wait_state("in-sync")?;
    rig.same()?;
    rig.target().sh(
        "disk=$(losetup -j /srv/other | cut -d: -f1); dmsetup remove other; losetup -d $disk",
    )?;
    rig.finish()
}

#[test]
fn a_cloned_source_is_told_so_on_both_sides() -> Result<()> {
    const STATE: &str = "/var/lib/dtloop/agent";
    let rig = Rig::alone(32)?;
    let source = rig.source();
    source.sh("echo 11112222333344445555666677778888 >/etc/machine-id")?;
    rig.begin("")?;
    let renew = || -> Result<()> {
        source.sh("dtguest settle; dtloop detach 101; dtloop set default --remove --discard-records || true; rmmod dtloop")?;
        rig.attach("")
    };
    rig.stop_agent()?;
    source.sh(format!("cp -a {STATE} /root/clone"))?;
    // The original goes on.
    renew()?;
    rig.start_agent()?;
    rig.wait_state("in-sync")?;
    rig.stop_agent()?;
    source.sh(format!(
        "mv {STATE} /root/original; cp -a /root/clone {STATE}"
    ))?;
    renew()?;

    // On a machine that differs, the clone does not even start.
    source.sh("echo 88887777666655554444333322221111 >/etc/machine-id")?;
    let refused = source.try_sh("dtagent")?;
    ensure!(
        !refused.ok() && refused.complaint().contains("dtagent identity renew"),
        "{refused}"
    );
    // On one that does not, the target knows.
    source.sh("echo 11112222333344445555666677778888 >/etc/machine-id")?;
    rig.start_agent()?;
    wait_reason(&rig, "clone")?;
    rig.stop_agent()?;
    // As a source of its own it cannot have the volume of the original.
    source.sh("echo 88887777666655554444333322221111 >/etc/machine-id; dtagent identity renew")?;
    rig.start_agent()?;
    wait_reason(&rig, "belongs to set")?;
    rig.stop_agent()?;

    source.sh(format!(
        "rm -r {STATE}; mv /root/original {STATE}; echo 11112222333344445555666677778888 >/etc/machine-id"
    ))?;
    rig.start_agent()?;
    rig.wait_state("in-sync")?;
    rig.same()?;
    rig.finish()
}

/// How many blocks of the device the agent knows, by its state file.
fn known_blocks(rig: &Rig) -> Result<usize> {
    // Behind its title it is JSON.
    let text = rig
        .source()
        .sh("tail -n +2 /var/lib/dtloop/agent/default.set")?;
    let state: Value = serde_json::from_str(&text).context("the state file")?;
    let samples = state["devices"]["vol"]["origin"]["samples"].as_array();
    Ok(samples.map_or(0, Vec::len))
}

/// Marks and records say what a crash may have left. A disk that holds something else all the same is not what it was.
#[test]
fn a_restored_source_disk_waits_for_an_operator() -> Result<()> {
    let rig = Rig::mirrored(32, "")?;
    let (source, disk) = (rig.source(), &rig.disk);
    rig.write(0, 32)?;
    rig.wait()?;
    source.sh(format!(
        "dd if={disk} of=/root/older bs=1M iflag=direct status=none"
    ))?;
    rig.write(0, 32)?;
    rig.wait()?;
    let flushes = || -> Result<u64> {
        let counts = source.sh(format!(
            "cat /sys/class/block/{}/stat",
            disk.trim_start_matches("/dev/")
        ))?;
        let count = counts.split_whitespace().nth(15);
        Ok(count.context("a count of flushes")?.parse()?)
    };
    let flushed = flushes()?;
    // In the file there may still be what was known before the last writes; what is there after an orderly end is true.
    rig.stop_agent()?;
    rig.start_agent()?;
    // As long as a region is marked, nothing that it holds is a surprise: marks go when nobody has written for a while.
    wait_until("the blocks to be known and unmarked", patience(60), || {
        let marked = rig.status()?["sets"][0]["intent"]["regions_marked"].as_u64();
        Ok(marked == Some(0) && known_blocks(&rig)? >= 12)
    })?;
    ensure!(
        flushes()? > flushed,
        "marks went of what the disk may have had in its cache only"
    );
    rig.stop_agent()?;
    source.sh(format!(
        "dtguest settle; dtloop detach 101; dtloop set default --remove --discard-records || true; rmmod dtloop
         sha256sum <{IMAGE} >/root/copy
         dd if=/root/older of={disk} bs=1M oflag=direct conv=notrunc status=none"
    ))?;
    rig.attach("")?;
    rig.start_agent()?;
    wait_reason(&rig, "is not as it was")?;
    ensure!(rig.state()? == "mirror-needed", "{}", rig.status()?);
    // What is written now is kept beside the copy.
    rig.write(3, 1)?;
    rig.expect("wait --timeout 10s", 7)?;
    source.sh(format!("sha256sum <{IMAGE} | cmp - /root/copy"))?;
    rig.mirror("")?;
    rig.same()?;
    rig.finish()
}
