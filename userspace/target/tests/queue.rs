// SPDX-License-Identifier: GPL-2.0-only

//! The disk queue: the real agent over a stream in memory, the real target over loopback, an outage that is longer than
//! the ring, and queues that are full, fail, rot, or are not ours. In the end the image is the device, byte for byte;
//! and where the queue was there to bridge the outage, not one change went to the dirty map.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Agent, Faults, Lab, SyncFails, random};
use dtloop_abi::CaptureStream;
use dtloop_api::{Connection, FailureCode, MirrorKind, Outcome, Request, Rung};
use dtloop_disk::SimDisk;
use nix::errno::Errno;

const SECTORS: u64 = 8192;
const MIB: u64 = 1 << 20;

fn full_mirror(agent: &mut Agent) {
    let request = Request::MirrorStart {
        set: "db".into(),
        devices: vec![],
        kind: MirrorKind::Full,
        follow: true,
    };
    let Ok(Outcome::Mirror(results)) = agent.request(&request) else {
        panic!("the mirror failed");
    };
    assert!(results[0].complete);
    agent.wait_in_sync();
}

/// A lab that is mirrored, and whose target has gone.
fn outage(lab: &Lab) -> Agent {
    let mut agent = lab.start_agent(lab.start_target());
    full_mirror(&mut agent);
    agent.target.take().unwrap().stop();
    agent.wait_for(|status| !matches!(status.connection, Connection::Connected { .. }));
    agent
}

fn rungs(agent: &Agent) -> Vec<Rung> {
    let ladder = agent.status().ladder;
    ladder.history.iter().map(|step| step.to).collect()
}

/// The record at which the volume was mirrored last, as the target remembers it.
fn mirrored_at(lab: &Lab) -> u64 {
    lab.saved().state.volumes["vol"].sync_seq
}

/// The target is back, and everything arrives.
fn catch_up(lab: &Lab, agent: &mut Agent) {
    agent.target = Some(lab.start_target());
    agent.wait_in_sync();
    lab.assert_identical();
    agent.wait_for(|status| status.ladder.rung == Rung::Ring);
}

fn segments(lab: &Lab) -> Vec<PathBuf> {
    let files = std::fs::read_dir(lab.queue_dir()).unwrap();
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|ending| ending == "seg"));
    paths.sort();
    paths
}

/// Space is given back when the last one has closed the file; and as long as one is open that was removed, its file system
/// can become neither read-only nor go.
fn assert_given_back(lab: &Lab) {
    let is_open = || {
        let files = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
        let mut paths = files.filter_map(|file| std::fs::read_link(file.path()).ok());
        paths.find(|path| path.starts_with(lab.queue_dir()))
    };
    let begin = Instant::now();
    while let Some(path) = is_open() {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{} is still open",
            path.display()
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn an_outage_longer_than_the_ring_loses_no_order() {
    let lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let mut agent = outage(&lab);
    lab.write_when_there_is_room(1, 24 * MIB);
    let status = agent.status();
    let queue = status.queue.unwrap();
    assert_eq!(status.ladder.rung, Rung::Spooling);
    assert!(status.ladder.reason.contains("the target is away"));
    assert!(queue.bytes > 16 * MIB && queue.records > 500, "{queue:?}");
    assert_eq!(queue.state, "usable");
    assert!(queue.oldest_ms.is_some());
    agent.wait_for(|status| {
        let queue = status.queue.as_ref();
        queue.is_some_and(|queue| queue.disk_bytes >= queue.bytes)
    });
    assert!(status.backlog_records > queue.records);
    catch_up(&lab, &mut agent);
    assert_eq!(lab.gaps(), 0);
    let rungs = rungs(&agent);
    assert_eq!(
        (rungs.first(), rungs.last()),
        (Some(&Rung::Spooling), Some(&Rung::Ring))
    );
    let queue = agent.status().queue.unwrap();
    assert_eq!((queue.records, queue.bytes), (0, 0));
    agent.wait_for(|status| {
        status
            .queue
            .as_ref()
            .is_some_and(|queue| queue.disk_bytes == 0)
    });
    assert!(segments(&lab).is_empty());
    assert_given_back(&lab);
    agent.stop();
}

#[test]
fn records_made_while_the_queue_is_sent_come_behind_it() {
    let lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let mut agent = outage(&lab);
    lab.write_when_there_is_room(1, 12 * MIB);
    agent.target = Some(lab.start_target());
    lab.write_when_there_is_room(2, 24 * MIB);
    agent.wait_in_sync();
    lab.assert_identical();
    assert_eq!(lab.gaps(), 0);
    agent.stop();
}

/// A connection that is there and takes nothing: the ring must not be held for it.
#[test]
fn a_stuck_connection_does_not_keep_the_ring_full() {
    let lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let target = lab.start_target();
    let faults = Faults::new(target.address, 1);
    let mut agent = lab.start_agent_to(faults.address);
    agent.target = Some(target);
    full_mirror(&mut agent);
    faults.hold();
    lab.write_when_there_is_room(3, 24 * MIB);
    // More than the sockets take; and not because the connection was given up.
    assert_eq!(faults.accepted(), 1);
    faults.heal();
    agent.wait_in_sync();
    lab.assert_identical();
    assert_eq!(lab.gaps(), 0);
    agent.stop();
}

/// Whoever asks gets an answer, and a true one, while a batch waits for a connection that takes nothing.
#[test]
fn requests_are_answered_while_a_connection_is_stuck() {
    let lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let target = lab.start_target();
    let faults = Faults::new(target.address, 1);
    let mut agent = lab.start_agent_to(faults.address);
    agent.target = Some(target);
    full_mirror(&mut agent);
    faults.hold();
    lab.write_when_there_is_room(3, 24 * MIB);
    let begin = Instant::now();
    let wait = Request::Wait {
        set: "db".into(),
        timeout_ms: Some(100),
    };
    let answer = agent.request(&wait);
    assert!(
        matches!(&answer, Err(failure) if failure.code == FailureCode::TimedOut),
        "{answer:?}"
    );
    // Far from the time after which the connection would be given up.
    assert!(begin.elapsed() < Duration::from_secs(10));
    lab.fill_some(4);
    let made = lab.stream.status().unwrap().next_seq;
    agent.wait_for(|status| status.next_seq >= made);
    let stop = Request::MirrorStop {
        set: "db".into(),
        devices: vec![],
    };
    let answer = agent.request(&stop);
    assert!(
        matches!(&answer, Err(failure) if failure.code == FailureCode::NothingToDo),
        "{answer:?}"
    );
    assert_eq!(faults.accepted(), 1, "the connection was given up");
    faults.heal();
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_stuck_connection_does_not_keep_the_agent_from_ending() {
    let lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let target = lab.start_target();
    let faults = Faults::new(target.address, 1);
    let mut agent = lab.start_agent_to(faults.address);
    agent.target = Some(target);
    full_mirror(&mut agent);
    faults.hold();
    lab.write_when_there_is_room(3, 24 * MIB);
    let begin = Instant::now();
    agent.stop();
    assert!(begin.elapsed() < Duration::from_secs(10));
    faults.heal();
}

#[test]
fn an_agent_restarted_again_and_again_goes_on_with_its_queue() {
    let lab = Lab::new(SECTORS).with_queue(128 * MIB);
    let mut agent = outage(&lab);
    let mirrored = mirrored_at(&lab);
    let address = lab.free_address();
    for round in 0..8 {
        lab.write_when_there_is_room(10 + round, 3 * MIB);
        agent.wait_for(|_| lab.ring_percent() < 50);
        let writer = lab.write_in_background(200);
        agent.stop();
        agent = lab.start_agent_to(address);
        writer.join().unwrap();
    }
    agent.target = Some(lab.start_target());
    agent.wait_for(|status| matches!(status.connection, Connection::Connected { .. }));
    agent.target.take().unwrap().kill();
    catch_up(&lab, &mut agent);
    assert_eq!(lab.gaps(), 0);
    assert_not_mirrored_since(&lab, &mut agent, mirrored);
    agent.stop();
}

#[test]
fn a_full_queue_means_the_dirty_map_and_back() {
    let lab = Lab::new(SECTORS).with_queue(8 * MIB);
    let mut agent = outage(&lab);
    // More than ring and queue together.
    for round in 0..6 {
        lab.fill_with(round);
    }
    agent.wait_for(|status| status.ladder.rung == Rung::Tracking);
    assert!(lab.gaps() > 0 && lab.is_dirty());
    agent.wait_for(|status| {
        status
            .queue
            .as_ref()
            .is_some_and(|queue| queue.state == "full")
    });
    let status = agent.status();
    assert!(status.queue.unwrap().reason.contains("queue.size"));
    catch_up(&lab, &mut agent);
    assert!(!lab.is_dirty());
    agent.wait_for(|status| {
        status
            .queue
            .as_ref()
            .is_some_and(|queue| queue.state == "usable")
    });
    let steps = agent.status().ladder.history;
    assert!(
        steps
            .iter()
            .any(|step| step.to == Rung::Tracking && step.reason.contains("queue")),
        "{steps:?}"
    );
    agent.stop();
}

/// Nothing was lost on the way from ring to queue to target: the volume did not have to be compared.
fn assert_not_mirrored_since(lab: &Lab, agent: &mut Agent, before: u64) {
    agent.target.take().unwrap().stop();
    assert_eq!(mirrored_at(lab), before, "it was mirrored again");
}

/// The one sync that stands between the ring and its release fails, and everything else works.
#[test]
fn what_could_not_be_synced_stays_in_the_ring() {
    let mut lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let disk = SyncFails::default();
    lab.queue_disk = Some(Arc::new(disk.clone()));
    let mut agent = outage(&lab);
    let mirrored = mirrored_at(&lab);
    disk.fail(2);
    lab.write_when_there_is_room(1, 8 * MIB);
    assert_eq!(disk.left(), 0, "no sync failed");
    catch_up(&lab, &mut agent);
    assert_eq!(lab.gaps(), 0);
    assert_not_mirrored_since(&lab, &mut agent, mirrored);
    agent.stop();
}

/// Writes and syncs of the queue fail for a while, at many different moments.
#[test]
fn a_failing_queue_disk_loses_nothing() {
    for (after, times) in [
        (0, u64::MAX),
        (1, 3),
        (2, 1),
        (3, 2),
        (5, 1),
        (8, 4),
        (13, 1),
        (21, 30),
    ] {
        let mut lab = Lab::new(SECTORS).with_queue(64 * MIB);
        let disk = SimDisk::new(after);
        lab.queue_disk = Some(Arc::new(disk.clone()));
        let mut agent = outage(&lab);
        let mirrored = mirrored_at(&lab);
        disk.fail(after, times, Errno::EIO as i32);
        for round in 0..3 {
            lab.fill_with(round);
        }
        if times == u64::MAX {
            agent.wait_for(|status| status.ladder.rung == Rung::Tracking);
            let status = agent.status();
            assert!(
                status.ladder.reason.contains("failing"),
                "{:?}",
                status.ladder
            );
            assert_eq!(status.queue.unwrap().state, "failing");
        }
        disk.heal();
        catch_up(&lab, &mut agent);
        assert!(!lab.is_dirty());
        assert_not_mirrored_since(&lab, &mut agent, mirrored);
        agent.stop();
    }
}

#[test]
fn a_full_queue_disk_is_no_more_than_a_full_queue() {
    let mut lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let disk = SimDisk::new(3);
    disk.set_capacity(9 * MIB);
    lab.queue_disk = Some(Arc::new(disk));
    let mut agent = outage(&lab);
    for round in 0..6 {
        lab.fill_with(round);
    }
    agent.wait_for(|status| status.ladder.rung == Rung::Tracking);
    agent.wait_for(|status| {
        status
            .queue
            .as_ref()
            .is_some_and(|queue| queue.state == "full")
    });
    catch_up(&lab, &mut agent);
    agent.stop();
}

/// What cannot be read back is a hole: the target names it, and the devices are compared.
#[test]
fn a_rotten_queue_is_a_hole_that_is_named() {
    let lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let mut agent = outage(&lab);
    lab.write_when_there_is_room(1, 20 * MIB);
    let paths = segments(&lab);
    assert!(paths.len() >= 3, "{paths:?}");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&paths[1])
        .unwrap();
    file.write_all_at(&random(7, 2_000_000), MIB + 777).unwrap();
    let syncs = lab.stream.status().unwrap().next_seq;
    agent.target = Some(lab.start_target());
    agent.wait_for(|status| {
        status.devices[0]
            .reason
            .contains("cannot be read back from the disk queue")
    });
    agent.wait_in_sync();
    lab.assert_identical();
    assert!(
        lab.stream.status().unwrap().next_seq > syncs,
        "it was compared"
    );
    assert_eq!(lab.gaps(), 0);
    agent.stop();
}

#[test]
fn the_queue_of_an_older_stream_is_set_aside() {
    let mut lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let agent = outage(&lab);
    lab.write_when_there_is_room(1, 12 * MIB);
    agent.stop();
    lab.renew_stream();
    let mut agent = lab.start_agent_to(lab.free_address());
    agent.wait_for(|_| segments(&lab).is_empty());
    lab.write_when_there_is_room(2, 12 * MIB);
    catch_up(&lab, &mut agent);
    agent.stop();
    let names = std::fs::read_dir(lab.queue_dir()).unwrap();
    assert!(
        names.count() > 1,
        "the old segments are there until their room is needed"
    );
}

#[test]
fn the_queue_of_another_source_is_not_touched() {
    let lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let agent = outage(&lab);
    lab.write_when_there_is_room(1, 8 * MIB);
    agent.stop();
    let mut other = Lab::new(SECTORS);
    other.queue.clone_from(&lab.queue);
    let before = segments(&lab);
    let mut agent = outage(&other);
    agent.wait_for(|status| {
        status
            .queue
            .as_ref()
            .is_some_and(|queue| queue.state == "refused")
    });
    let queue = agent.status().queue.unwrap();
    assert!(queue.reason.contains("belongs to source"), "{queue:?}");
    for round in 0..3 {
        other.fill_with(round);
    }
    agent.wait_for(|status| status.ladder.rung == Rung::Tracking);
    catch_up(&other, &mut agent);
    agent.stop();
    assert_eq!(segments(&lab), before);
}

#[test]
fn a_mirror_waits_until_the_queue_is_empty() {
    let lab = Lab::new(SECTORS).with_queue(64 * MIB);
    let mut agent = outage(&lab);
    lab.write_when_there_is_room(1, 16 * MIB);
    let request = Request::Verify {
        set: "db".into(),
        devices: vec![],
        repair: false,
        follow: false,
    };
    agent.request(&request).unwrap();
    agent.target = Some(lab.start_target());
    let (mut looks, mut emptied, mut verified) = (0, false, false);
    while !verified {
        // Before the status: what was not sent then was not sent now.
        let asked = lab.stream.status().unwrap().sync_bytes > 0;
        let status = agent.next_status();
        let unsent = status.sent_seq > 0 && status.sent_seq < status.released_seq;
        // Later, what verify reads may go through the queue itself.
        emptied |= looks > 0 && !unsent;
        assert!(
            emptied || !unsent || !asked,
            "it was asked for while the queue is sent: {status:#?}"
        );
        looks += u32::from(unsent);
        let verify = status.devices[0].last_verify.as_ref();
        verified = verify.is_some_and(|verify| verify.complete && verify.is_identical());
    }
    assert!(looks > 0, "it was never seen while the queue is sent");
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

/// Without a queue the ladder says so as well.
#[test]
fn without_a_queue_the_ladder_has_two_rungs() {
    let lab = Lab::new(SECTORS);
    let mut agent = outage(&lab);
    for round in 0..3 {
        lab.fill_with(round);
    }
    agent.wait_for(|status| status.ladder.rung == Rung::Tracking);
    let ladder = agent.status().ladder;
    assert!(
        ladder.reason.contains("no disk queue is configured"),
        "{ladder:?}"
    );
    catch_up(&lab, &mut agent);
    agent.stop();
}
