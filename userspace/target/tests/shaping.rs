// SPDX-License-Identifier: GPL-2.0-only

//! Bandwidth limit, compression and the pace of a resync, with the real agent and the real target over loopback.

#![expect(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{Agent, Faults, Lab, random};
use dtloop_agent::config::Compression;
use dtloop_api::{Bandwidth, BandwidthChange, LimitSource, MirrorKind, Outcome, Request, Shaping};

const SECTORS: u64 = 8192;

/// Text-like bytes: they shrink to about a third.
fn text(seed: u64, bytes: usize) -> Vec<u8> {
    let words = random(seed, bytes / 4 + 1);
    let words = words.iter().flat_map(|byte| {
        const WORDS: [&[u8; 8]; 8] = [
            b"INSERT I",
            b"NTO acco",
            b"unts VAL",
            b"UES (123",
            b"UPDATE b",
            b"ranches ",
            b"SET bala",
            b"nce = 99",
        ];
        let word = WORDS[usize::from(byte % 8)];
        word.iter().copied().chain([*byte])
    });
    words.take(bytes).collect()
}

fn write_text(lab: &Lab, seed: u64, rounds: u64) {
    for round in 0..rounds {
        for sector in (0..SECTORS).step_by(64) {
            let payload = text(seed + round * SECTORS + sector, 64 * 512);
            lab.await_room(payload.len() as u64);
            lab.write(sector, &payload);
        }
    }
}

fn mirror(agent: &mut Agent) {
    let request = Request::MirrorStart {
        set: "db".into(),
        devices: vec![],
        kind: MirrorKind::Full,
        follow: true,
    };
    agent.request(&request).unwrap();
}

fn shaping(agent: &Agent) -> Shaping {
    agent.status().shaping
}

fn bandwidth(agent: &mut Agent, change: Option<BandwidthChange>) -> Bandwidth {
    let request = Request::Bandwidth {
        set: "db".into(),
        change,
    };
    match agent.request(&request) {
        Ok(Outcome::Bandwidth(bandwidth)) => bandwidth,
        other => panic!("{other:?}"),
    }
}

fn limit(limit: &str) -> Option<BandwidthChange> {
    Some(BandwidthChange::Limit {
        limit: limit.into(),
        until: None,
        keep: false,
    })
}

/// A network that carries so many bytes per second towards the target.
struct Slow {
    address: SocketAddr,
    carried: Arc<AtomicU64>,
}

impl Slow {
    fn new(target: SocketAddr, rate: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let carried = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&carried);
        std::thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                // Little waits inside, as in a real router.
                nix::sys::socket::setsockopt(&client, nix::sys::socket::sockopt::RcvBuf, &16384)
                    .unwrap();
                let Ok(server) = TcpStream::connect(target) else {
                    continue;
                };
                let (mut back_from, mut back_to) =
                    (server.try_clone().unwrap(), client.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut back_from, &mut back_to);
                    let _ = back_to.shutdown(Shutdown::Both);
                });
                let count = Arc::clone(&count);
                std::thread::spawn(move || carry(client, server, rate, &count));
            }
        });
        Self { address, carried }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, rate: u64, carried: &AtomicU64) {
    let begin = Instant::now();
    let mut buffer = vec![0; 16384];
    let mut moved = 0;
    while let Ok(bytes @ 1..) = from.read(&mut buffer) {
        moved += bytes as u64;
        carried.fetch_add(bytes as u64, Ordering::Relaxed);
        // It is the link: it takes its time.
        let due = Duration::from_secs_f64(moved as f64 / rate as f64);
        std::thread::sleep(due.saturating_sub(begin.elapsed()));
        if to.write_all(&buffer[..bytes]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn compressed_changes_arrive_as_they_were() {
    for compression in [Compression::Zstd, Compression::Lz4] {
        let mut lab = Lab::new(SECTORS);
        lab.compression = compression;
        let mut agent = lab.start_agent(lab.start_target());
        mirror(&mut agent);
        write_text(&lab, 1, 3);
        lab.fill();
        lab.write(400, &[0; 4096]);
        lab.stream.write_zeroes(lab.device, 16, 64);
        agent.wait_in_sync();
        lab.assert_identical();
        let shaping = shaping(&agent).compression;
        assert!(
            shaping.wire_bytes < shaping.raw_bytes * 7 / 10,
            "{shaping:?}"
        );
        assert_eq!(shaping.configured, compression.name());
        agent.stop();
    }
}

#[test]
fn compressed_changes_survive_cuts_and_killed_targets() {
    let mut lab = Lab::new(SECTORS);
    lab.compression = Compression::Zstd;
    let target = lab.start_target();
    let faults = Faults::new(target.address, 11);
    let mut agent = lab.start_agent_to(faults.address);
    agent.target = Some(target);
    mirror(&mut agent);
    faults.cut_often();
    write_text(&lab, 5, 2);
    let deadline = Instant::now() + Duration::from_secs(60);
    for round in 0.. {
        lab.fill_some(round);
        if faults.cuts() > 8 {
            break;
        }
        assert!(Instant::now() < deadline, "only {} cuts", faults.cuts());
        std::thread::yield_now();
    }
    agent.target.take().unwrap().kill();
    // Nobody makes room now: what does not fit becomes dirty.
    for sector in (0..SECTORS).step_by(64) {
        lab.write(sector, &text(9 + sector, 64 * 512));
    }
    agent.target = Some(lab.start_target());
    faults.heal();
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_slow_link_is_compressed_for_when_the_data_shrinks() {
    let lab = Lab::new(SECTORS);
    // Made before, so that the link is the bottleneck also on a machine that is busy.
    let payloads: Vec<_> = (0..320).map(|step| text(step, 64 * 512)).collect();
    let target = lab.start_target();
    let slow = Slow::new(target.address, 768 << 10);
    let mut agent = lab.start_agent_to(slow.address);
    agent.target = Some(target);
    mirror(&mut agent);
    agent.wait_in_sync();
    let before = shaping(&agent).compression;
    let carried = slow.carried.load(Ordering::Relaxed);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for (step, payload) in payloads.iter().enumerate() {
                lab.await_room(payload.len() as u64);
                lab.write(step as u64 * 64 % SECTORS, payload);
            }
        });
        agent.wait_for(|status| status.shaping.compression.current != "off");
    });
    agent.wait_in_sync();
    let after = shaping(&agent).compression;
    let raw = after.raw_bytes - before.raw_bytes;
    let wire = slow.carried.load(Ordering::Relaxed) - carried;
    assert!(wire < raw * 8 / 10, "{wire} of {raw}, {after:?}");
    lab.assert_identical();
    agent.stop();
}

#[test]
fn data_that_does_not_shrink_costs_a_sample_now_and_then() {
    let lab = Lab::new(SECTORS);
    let target = lab.start_target();
    let slow = Slow::new(target.address, 4 << 20);
    let mut agent = lab.start_agent_to(slow.address);
    agent.target = Some(target);
    mirror(&mut agent);
    let begin = Instant::now();
    for round in 0..3 {
        for sector in (0..SECTORS).step_by(64) {
            lab.await_room(64 * 512);
            lab.write(sector, &random((round << 32) | (sector + 77), 64 * 512));
        }
    }
    agent.wait_in_sync();
    let took = begin.elapsed();
    let compression = shaping(&agent).compression;
    assert!(
        compression.wire_bytes >= compression.raw_bytes,
        "{compression:?}"
    );
    // A machine that is busy makes samples long; the account bounds their number all the same.
    assert!(
        Duration::from_millis(compression.spent_ms) < took / 20 + Duration::from_millis(200),
        "{compression:?} in {took:?}"
    );
    agent.stop();
}

#[test]
fn a_limit_holds_at_once_and_holds_up_nobody_who_writes() {
    let mut lab = Lab::new(SECTORS);
    lab.compression = Compression::Off;
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    assert_eq!(bandwidth(&mut agent, None).limit, "unlimited");
    let set = bandwidth(&mut agent, limit("1MiB/s"));
    assert_eq!(
        (set.limit_bytes_per_s, set.source),
        (Some(1 << 20), LimitSource::Override)
    );
    let before = agent.status().totals.sent_bytes;
    let begin = Instant::now();
    for step in 0..96 {
        lab.write(step * 64, &random(step + 5, 64 * 512));
    }
    let written = begin.elapsed();
    agent.wait_for(|status| status.shaping.bandwidth.waiting);
    // Other things go on meanwhile.
    assert!(agent.status().totals.sent_bytes < before + (3 << 20));
    agent.wait_in_sync();
    let took = begin.elapsed();
    let sent = agent.status().totals.sent_bytes - before;
    assert!(sent >= 3 << 20, "{sent}");
    let least = Duration::from_secs_f64((sent - (3 << 19)) as f64 / f64::from(1 << 20));
    assert!(took >= least, "{sent} bytes in {took:?}");
    assert!(written < took / 2, "writers took {written:?} of {took:?}");
    lab.assert_identical();
    // Lifted in the middle of a debt: no waiting for it.
    bandwidth(&mut agent, limit("1KiB/s"));
    for step in 0..32 {
        lab.write(step * 64, &random(step + 500, 64 * 512));
    }
    agent.wait_for(|status| status.shaping.bandwidth.waiting);
    let config = bandwidth(&mut agent, Some(BandwidthChange::Schedule));
    assert_eq!(
        (config.source, config.limit_bytes_per_s),
        (LimitSource::Config, None)
    );
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_bad_limit_is_refused_with_its_reason() {
    let lab = Lab::new(SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    let request = Request::Bandwidth {
        set: "db".into(),
        change: limit("5MB/s"),
    };
    let failure = agent.request(&request).unwrap_err();
    assert!(failure.message.contains("20MiB/s"), "{failure}");
    agent.stop();
}

#[test]
fn a_resync_over_a_slow_link_yields_to_live_changes_and_ends() {
    let mut lab = Lab::new(SECTORS * 4);
    lab.compression = Compression::Off;
    let target = lab.start_target();
    let slow = Slow::new(target.address, 8 << 20);
    let mut agent = lab.start_agent_to(slow.address);
    agent.target = Some(target);
    mirror(&mut agent);
    agent.wait_in_sync();
    // More than the ring holds while the target is away: the rest is in the dirty map.
    agent.target.take().unwrap().kill();
    lab.fill_with(3);
    assert!(lab.is_dirty());
    agent.target = Some(lab.start_target());
    // Live changes while the resync works: it slows down, and yet comes to its end under them.
    let mut yielded = false;
    let deadline = Instant::now() + Duration::from_secs(100);
    for step in 0_u64.. {
        lab.await_room(16 * 512);
        lab.write(step * 31 % (SECTORS * 4 - 64), &random(step, 16 * 512));
        let status = agent.status();
        yielded |= status.shaping.resync.yields;
        if !lab.is_dirty() && step > 50 {
            break;
        }
        assert!(Instant::now() < deadline, "{status:#?}");
    }
    agent.wait_in_sync();
    lab.assert_identical();
    assert!(yielded, "it never slowed down");
    agent.stop();
}
