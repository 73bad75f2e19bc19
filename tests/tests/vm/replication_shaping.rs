// SPDX-License-Identifier: GPL-2.0-only

//! A line of one megabit, by the network and by a limit: what is written is not slowed down, and arrives.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use dtloop_tests::{note, patience, wait_until};

use crate::replication_rig::{DEV, Rig};

/// Writes some MiB of text to the device and returns how long the longest write took, in milliseconds.
fn write_text(rig: &Rig, at_mib: u64, mib: u64) -> Result<u64> {
    rig.source().sh(format!(
        "head -c {mib}M >/tmp/text < <(seq -f 'INSERT INTO accounts VALUES (%.0f, 99, now());' {at_mib}000000 99999999)"
    ))?;
    // A write at a time, each timed.
    let longest = rig.source().sh_within(
        patience(120),
        format!(
            "for step in $(seq 0 {last}); do
                 begin=$(date +%s%N)
                 dd if=/tmp/text of={DEV} bs=128K count=1 skip=$step seek=$((step + {first})) oflag=direct conv=notrunc status=none
                 echo $((($(date +%s%N) - begin) / 1000000))
             done | sort -n | tail -n 1",
            last = mib * 8 - 1,
            first = at_mib * 8,
        ),
    )?;
    longest.parse().with_context(|| longest.clone())
}

struct Sent {
    raw: u64,
    wire: u64,
}

fn sent(rig: &Rig) -> Result<Sent> {
    let compression = rig.set()?["shaping"]["compression"].clone();
    let figure = |name: &str| {
        let value = &compression[name];
        value.as_u64().with_context(|| format!("{name} is {value}"))
    };
    Ok(Sent {
        raw: figure("raw_bytes")?,
        wire: figure("wire_bytes")?,
    })
}

/// Writes and waits until it is there; gives raw bytes, bytes on the wire, and says how long it took.
fn load(rig: &Rig, what: &str, at_mib: u64, mib: u64) -> Result<Sent> {
    let before = sent(rig)?;
    let begin = Instant::now();
    let longest = write_text(rig, at_mib, mib)?;
    let written = begin.elapsed();
    let mut lag = 0;
    wait_until("the target to have it", patience(120), || {
        let set = rig.set()?;
        lag = lag.max(set["lag_ms"].as_u64().unwrap_or(0));
        Ok(set["applied_seq"] == set["next_seq"])
    })?;
    let after = sent(rig)?;
    let (raw, wire) = (after.raw - before.raw, after.wire - before.wire);
    note(format!(
        "{what}: {mib} MiB written in {written:.1?}, longest write {longest} ms, on the target after {:.1?}, \
         largest lag {lag} ms, {raw} bytes sent as {wire}",
        begin.elapsed()
    ));
    // A write of 128 KiB would take a second if it waited for the line.
    ensure!(longest < 900, "a write took {longest} ms");
    Ok(Sent { raw, wire })
}

#[test]
fn a_link_of_one_megabit_is_caught_up_with() -> Result<()> {
    let rig = Rig::pair(32)?;
    rig.begin("")?;
    rig.source().sh(
        "modprobe sch_tbf; tc qdisc add dev eth0 root tbf rate 1mbit burst 16kb latency 300ms",
    )?;
    let Sent { raw, wire } = load(&rig, "line of 1 Mbit/s", 0, 4)?;
    ensure!(wire < raw * 7 / 10, "{raw} bytes were sent as {wire}");
    rig.source().sh("tc qdisc del dev eth0 root")?;
    rig.same()?;

    let limit = rig.expect("bandwidth default --limit 1Mbit/s --until 1h", 0)?;
    ensure!(
        limit.contains("1 Mbit/s by dtloop bandwidth, unlimited in"),
        "{limit}"
    );
    let begin = Instant::now();
    let Sent { raw, wire } = load(&rig, "limit of 1 Mbit/s", 8, 4)?;
    ensure!(wire < raw * 7 / 10, "{raw} bytes were sent as {wire}");
    // What is on the wire took its time: 125000 bytes a second, but for a first batch.
    let least = wire.saturating_sub(1 << 20) / 125_000;
    ensure!(begin.elapsed().as_secs() >= least, "the limit was not kept");
    let status = rig.expect("status", 0)?;
    ensure!(
        status.contains("  limit    1 Mbit/s by dtloop bandwidth"),
        "{status}"
    );
    rig.expect("bandwidth default --schedule", 0)?;
    rig.expect("bandwidth default --limit fast", 2)?;
    rig.same()?;
    rig.finish()
}
