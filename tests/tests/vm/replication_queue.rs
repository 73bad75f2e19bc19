// SPDX-License-Identifier: GPL-2.0-only

//! The disk queue: it bridges an outage that is longer than the ring without losing the order; and when it cannot, the
//! application does not notice.

use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dtloop_tests::{Job, patience, wait_until};
use serde_json::Value;

use crate::replication_rig::{DEV, Rig};

/// Longest time that a write of the application may take: without the module it would be as long on such a machine.
const STALL_MAX: Duration = Duration::from_secs(5);

/// A small ring, and a queue on a file system of its own, on a device-mapper device `queue` over a RAM disk.
fn with_queue(queue_mib: u64, more: &str) -> Result<Rig> {
    let rig = Rig::alone(48)?;
    let blocks = queue_mib * 1024;
    rig.source().sh(format!(
        "modprobe brd rd_nr=1 rd_size={blocks} && modprobe dm-mod
         dmsetup create queue --table \"0 $(blockdev --getsz /dev/ram0) linear /dev/ram0 0\"; dtguest settle
         mkfs.ext4 -q /dev/mapper/queue && mkdir -p /queue && mount /dev/mapper/queue /queue"
    ))?;
    configure(
        &rig,
        &format!("dir = \"/queue/dt\"\nmin_free = 0\nsegment_size = \"4MiB\"\n{more}"),
    )?;
    rig.begin("--ring-size 4M")?;
    Ok(rig)
}

fn configure(rig: &Rig, queue: &str) -> Result<()> {
    let config = rig.source().get("/etc/DT/dtloop.toml")?;
    let config = String::from_utf8(config)? + "[set.queue]\n" + queue;
    rig.source().put("/etc/DT/dtloop.toml", config.as_bytes())
}

/// Writes at random that fail the story if one of them fails or takes too long.
struct Load(Job);

impl Load {
    fn begin(rig: &Rig) -> Result<Self> {
        let job = rig.source().spawn(format!(
            "exec fio --name=load --filename={DEV} --ioengine=libaio --direct=1 --rw=randwrite --bssplit=4k/40:20k/30:64k/30 \
             --blockalign=4k --iodepth=8 --fsync=40 --time_based --runtime=900 --rate_iops=80 --output-format=json"
        ))?;
        Ok(Self(job))
    }

    fn end(mut self, story: &str) -> Result<()> {
        if !self.0.is_running() {
            bail!("the load ended by itself: {}", self.0.wait(Duration::ZERO)?);
        }
        self.0.kill(2)?;
        let output = self.0.wait(patience(30))?;
        let text = output.text();
        let json = text.find('{').context("fio printed no figures")?;
        let figures: Value = serde_json::from_str(&text[json..])?;
        let job = &figures["jobs"][0];
        ensure!(job["error"] == 0, "the application got an error: {job}");
        let longest = job["write"]["lat_ns"]["max"]
            .as_u64()
            .context("no latency")?;
        let longest = Duration::from_nanos(longest);
        eprintln!(
            "{story}: {} writes, the longest took {longest:?}",
            job["write"]["total_ios"]
        );
        ensure!(longest < STALL_MAX * 2, "a write took {longest:?}");
        Ok(())
    }
}

fn wait_set(rig: &Rig, what: &str, is: impl Fn(&Value) -> bool) -> Result<()> {
    let mut last = Value::Null;
    let outcome = wait_until(what, patience(60), || {
        last = rig.set()?;
        Ok(is(&last))
    });
    if outcome.is_err() {
        bail!("not {what}: {last}\n{}", rig.agent_log()?);
    }
    outcome
}

fn queued_bytes(set: &Value) -> u64 {
    set["queue"]["bytes"].as_u64().unwrap_or(0)
}

/// Whether a rung was reached, for a reason with this word in it.
fn was(rig: &Rig, rung: &str, word: &str) -> Result<()> {
    let ladder = rig.set()?["ladder"].clone();
    let steps = ladder["history"].as_array().context("no history")?;
    let found = steps.iter().any(|step| {
        step["to"] == rung
            && step["reason"]
                .as_str()
                .is_some_and(|reason| reason.contains(word))
    });
    ensure!(found, "it was never {rung} because of \"{word}\": {ladder}");
    Ok(())
}

/// The order was kept: nothing was tracked, nothing was mirrored again.
fn in_order(rig: &Rig, syncs: u64) -> Result<()> {
    ensure!(
        rig.counter("tracked")? == 0,
        "changes went to the dirty map: {}",
        rig.agent_log()?
    );
    ensure!(
        rig.counter("syncs")? == syncs,
        "it was mirrored again: {}",
        rig.agent_log()?
    );
    Ok(())
}

fn end(rig: Rig) -> Result<()> {
    rig.stop_agent()?;
    rig.source()
        .sh("umount /queue; dmsetup remove queue; rmmod brd || true")?;
    rig.start_agent()?;
    rig.finish()
}

#[test]
fn an_outage_longer_than_the_ring_is_bridged_in_order() -> Result<()> {
    let rig = with_queue(160, "")?;
    let syncs = rig.counter("syncs")?;
    let load = Load::begin(&rig)?;
    rig.stop_target()?;
    wait_set(&rig, "three rings in the queue", |set| {
        queued_bytes(set) > 12 << 20
    })?;
    let text = rig.expect("status", 0)?;
    ensure!(
        text.contains("  queue ") && text.contains("  ladder   spooling"),
        "{text}"
    );
    ensure!(!text.contains("order lost"), "{text}");
    rig.start_target()?;
    rig.wait()?;
    load.end("bridged")?;
    rig.same()?;
    in_order(&rig, syncs)?;
    was(&rig, "spooling", "the target is away")?;
    wait_set(&rig, "on the ring again", |set| {
        set["ladder"]["rung"] == "ring"
    })?;
    end(rig)
}

#[test]
fn an_agent_killed_while_it_spools_goes_on_with_its_queue() -> Result<()> {
    let rig = with_queue(160, "")?;
    let syncs = rig.counter("syncs")?;
    let load = Load::begin(&rig)?;
    rig.stop_target()?;
    for round in 1..=4 {
        wait_set(&rig, "more in the queue", |set| {
            queued_bytes(set) > round * (3 << 20)
        })?;
        rig.kill_agent()?;
        rig.start_agent()?;
    }
    // And while the queue is sent.
    rig.start_target()?;
    for round in 1..=3 {
        sleep(Duration::from_millis(300 * round));
        rig.kill_agent()?;
        rig.start_agent()?;
    }
    rig.wait()?;
    load.end("killed")?;
    rig.same()?;
    in_order(&rig, syncs)?;
    end(rig)
}

#[test]
fn a_full_queue_disk_means_the_dirty_map() -> Result<()> {
    let rig = with_queue(20, "")?;
    let load = Load::begin(&rig)?;
    rig.stop_target()?;
    wait_set(&rig, "tracking", |set| set["ladder"]["rung"] == "tracking")?;
    ensure!(rig.set()?["queue"]["state"] == "full", "{}", rig.set()?);
    rig.start_target()?;
    rig.wait_state("in-sync")?;
    rig.wait()?;
    load.end("full")?;
    rig.same()?;
    was(&rig, "tracking", "full")?;
    wait_set(&rig, "usable again", |set| {
        set["queue"]["state"] == "usable"
    })?;
    end(rig)
}

#[test]
fn a_queue_disk_that_fails_writes_means_the_dirty_map() -> Result<()> {
    let rig = with_queue(160, "sync = \"each\"\n")?;
    rig.source().allow("queue");
    rig.source().allow("dm-");
    rig.source().allow("EXT4-fs");
    let load = Load::begin(&rig)?;
    rig.stop_target()?;
    wait_set(&rig, "a ring in the queue", |set| {
        queued_bytes(set) > 4 << 20
    })?;
    rig.source().sh(
        "modprobe dm-flakey
         dmsetup load queue --table \"0 $(blockdev --getsz /dev/ram0) flakey /dev/ram0 0 0 1 1 error_writes\"
         dmsetup suspend --noflush --nolockfs queue; dmsetup resume queue",
    )?;
    wait_set(&rig, "tracking", |set| set["ladder"]["rung"] == "tracking")?;
    ensure!(rig.set()?["queue"]["state"] == "failing", "{}", rig.set()?);
    // What the queue holds can still be read.
    rig.start_target()?;
    rig.wait_state("in-sync")?;
    rig.wait()?;
    load.end("failing")?;
    rig.same()?;
    was(&rig, "tracking", "failing")?;
    ensure!(
        !rig.agent_log()?.contains("cannot be read back"),
        "{}",
        rig.agent_log()?
    );
    end(rig)
}

#[test]
fn a_read_only_queue_means_the_dirty_map_until_it_is_writable() -> Result<()> {
    let rig = with_queue(160, "")?;
    // A file that is open to be written keeps it from becoming read-only, so the agent must have none just then.
    rig.wait()?;
    rig.stop_agent()?;
    rig.source().sh("mount -o remount,ro /queue")?;
    rig.start_agent()?;
    let load = Load::begin(&rig)?;
    rig.stop_target()?;
    wait_set(&rig, "tracking", |set| set["ladder"]["rung"] == "tracking")?;
    let queue = rig.set()?["queue"].clone();
    ensure!(
        queue["state"] == "failing" && queue["reason"].to_string().contains("Read-only"),
        "{queue}"
    );
    rig.start_target()?;
    rig.wait_state("in-sync")?;
    rig.wait()?;
    rig.source().sh("mount -o remount,rw /queue")?;
    let (syncs, tracked) = (rig.counter("syncs")?, rig.counter("tracked")?);
    rig.stop_target()?;
    wait_set(&rig, "a ring in the queue", |set| {
        queued_bytes(set) > 4 << 20
    })?;
    rig.start_target()?;
    rig.wait()?;
    load.end("read-only")?;
    rig.same()?;
    ensure!(
        (rig.counter("syncs")?, rig.counter("tracked")?) == (syncs, tracked),
        "it did not spool again"
    );
    end(rig)
}

#[test]
fn a_queue_on_a_device_of_the_set_is_refused() -> Result<()> {
    let rig = Rig::alone(48)?;
    configure(
        &rig,
        "dir = \"/mnt/queue\"\nmin_free = 0\nsegment_size = \"4MiB\"\n",
    )?;
    rig.begin("--ring-size 4M")?;
    rig.source().sh(format!(
        "mkfs.ext4 -q {DEV} && mount {DEV} /mnt && mkdir /mnt/queue"
    ))?;
    rig.stop_agent()?;
    rig.start_agent()?;
    wait_set(&rig, "refused", |set| set["queue"]["state"] == "refused")?;
    let queue = rig.set()?["queue"].clone();
    ensure!(
        queue["reason"].to_string().contains("lies on loop101"),
        "{queue}"
    );
    // The set goes on without one.
    rig.stop_target()?;
    rig.source()
        .sh("dd if=/dev/urandom of=/mnt/big bs=1M count=12 conv=fsync status=none")?;
    // The ring is only full for a moment: then it has a last bit of room, and nobody writes any more.
    wait_until("tracking", patience(60), || {
        Ok(was(&rig, "tracking", "refused").is_ok())
    })?;
    rig.source()
        .sh("[ -z \"$(find /mnt/queue -name '*.seg')\" ]; umount /mnt")?;
    rig.start_target()?;
    rig.wait_state("in-sync")?;
    rig.same()?;
    rig.finish()
}
