// SPDX-License-Identifier: GPL-2.0-only

//! After a crash of the source: only the regions that the intent map names are compared, if that is enough, and the
//! reason is said if it is not.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::Cell;

use common::{Agent, Lab, random};
use dtloop_abi::testing::REGION_SECTORS;
use dtloop_abi::{Extent, raw};
use dtloop_api::{FailureCode, MirrorKind, Recovery, Request, SetStatus};
use dtloop_core::identity::sample_offsets;
use dtloop_core::mirror::JobKind;
use dtloop_core::replica::SetMemory;

const SECTORS: u64 = 8192;

/// The stream of a new [`Lab`].
const FIRST: [u8; 16] = *b"fake stream uuid";

fn region(number: u64) -> Extent {
    Extent {
        start_sector: number * REGION_SECTORS,
        sectors: REGION_SECTORS,
    }
}

fn intent(version: u64, acked: u64) -> raw::IntentStatus {
    let mut status = raw::IntentStatus {
        flags: raw::INTENT_ON,
        found: raw::FOUND_KNOWN,
        region_bytes: u32::try_from(REGION_SECTORS * 512).unwrap(),
        version: version + 1,
        found_version: version,
        ..Default::default()
    };
    let current = raw::IntentBase {
        stream_uuid: *b"another stream!!",
        acked: 0,
    };
    let first = raw::IntentBase {
        stream_uuid: FIRST,
        acked,
    };
    (status.bases[0], status.bases[1]) = (first, current);
    status
}

/// A set that was in sync when its source crashed. The agent told version 7 of the intent file.
fn crashed() -> Lab {
    crashed_when(|_| true)
}

/// The same, once the agent remembers what pleases.
fn crashed_when(known: impl Fn(&SetMemory) -> bool) -> Lab {
    crashed_after(|_| (), known)
}

/// The same, after something was done while it was in sync.
fn crashed_after(deed: impl Fn(&Lab), known: impl Fn(&SetMemory) -> bool) -> Lab {
    let mut lab = Lab::new(SECTORS);
    lab.fill();
    let before = raw::IntentStatus {
        version: 7,
        found: raw::FOUND_NEW,
        ..intent(7, 0)
    };
    lab.stream.set_intent(&before);
    let mut agent = lab.start_agent(lab.start_target());
    let request = Request::MirrorStart {
        set: "db".into(),
        devices: vec![],
        kind: MirrorKind::Full,
        follow: true,
    };
    agent.request(&request).unwrap();
    agent.wait_in_sync();
    deed(&lab);
    agent.wait_for(|_| known(&lab.agent_memory()));
    agent.wait_in_sync();
    agent.stop();
    lab.renew_stream();
    lab
}

/// The agent knows what the disk's blocks hold.
fn knows_blocks(memory: &SetMemory) -> bool {
    let device = memory.devices.get("vol");
    device.is_some_and(|device| device.origin.missing(SECTORS * 512).is_empty())
}

/// Changes the device in a region as a write does that never left the source.
fn lose(lab: &Lab, number: u64) {
    let mut content = lab.stream.content(lab.device);
    let at = usize::try_from(number * REGION_SECTORS * 512).unwrap();
    content[at + 700..at + 800].copy_from_slice(&random(number, 100));
    lab.stream.set_content(lab.device, &content);
}

fn recovery(status: &SetStatus) -> Option<Recovery> {
    status.devices.first()?.last_recovery.clone()
}

fn finish(lab: &Lab, agent: &mut Agent) -> Option<Recovery> {
    agent.wait_in_sync();
    lab.assert_identical();
    assert_eq!(lab.stream.suspects(lab.device), 0);
    recovery(&agent.status())
}

#[test]
fn only_marked_regions_are_compared_and_only_what_differs_is_sent() {
    let lab = crashed();
    lab.stream.set_intent(&intent(7, 1));
    lab.stream
        .mark_regions(lab.device, &[region(4), region(5), region(20)]);
    lose(&lab, 5);
    let mut agent = lab.start_agent(lab.start_target());
    let cost = finish(&lab, &mut agent).unwrap();
    assert!(cost.complete, "{cost:?}");
    assert_eq!(cost.regions, 3);
    assert_eq!(cost.compared_bytes, 3 * REGION_SECTORS * 512);
    assert_eq!(
        (cost.differing_blocks, cost.sent_bytes),
        (1, REGION_SECTORS * 512)
    );
    agent.stop();
}

#[test]
fn a_clean_end_costs_nothing() {
    let lab = crashed();
    lab.stream.set_intent(&intent(7, 1));
    lab.stream.mark_regions(lab.device, &[]);
    let mut agent = lab.start_agent(lab.start_target());
    let cost = finish(&lab, &mut agent).unwrap();
    assert_eq!((cost.regions, cost.compared_bytes), (0, 0));
    agent.stop();
}

/// What only the cache of the source's disk has is lost with its power, although the target has it.
#[test]
fn marks_go_only_of_what_the_source_has_durably() {
    let lab = crashed();
    lab.stream.set_intent(&intent(7, 1));
    lab.stream.mark_regions(lab.device, &[]);
    lab.stream.fail_flushes(true);
    let mut agent = lab.start_agent(lab.start_target());
    finish(&lab, &mut agent).unwrap();
    lab.fill_some(3);
    agent.wait_for(|status| status.applied_seq == status.next_seq);
    assert_eq!(lab.stream.cleared(), 0);
    // The model itself sees to it that no more is cleared than was flushed.
    lab.stream.fail_flushes(false);
    agent.wait_for(|status| lab.stream.cleared() == status.next_seq);
    agent.stop();
}

#[test]
fn writes_go_on_during_a_recovery() {
    let lab = crashed();
    lab.stream.set_intent(&intent(7, 1));
    let all: Vec<Extent> = (0..SECTORS / REGION_SECTORS).map(region).collect();
    lab.stream.mark_regions(lab.device, &all);
    for number in [0, 17, 63] {
        lose(&lab, number);
    }
    let writer = lab.write_in_background(500);
    let mut agent = lab.start_agent(lab.start_target());
    writer.join().unwrap();
    let cost = finish(&lab, &mut agent).unwrap();
    assert_eq!(cost.regions, 64);
    agent.stop();
}

#[test]
fn a_recovery_that_was_cut_off_by_a_crash_is_taken_up() {
    let mut lab = crashed();
    lab.stream.set_intent(&intent(7, 1));
    lab.stream.mark_regions(lab.device, &[region(4), region(9)]);
    lose(&lab, 4);
    lose(&lab, 9);
    // The agent is gone before it has done anything, and the machine crashes again.
    let agent = lab.start_agent(lab.start_target());
    agent.wait_for(|status| status.sent_seq > 0);
    agent.stop();
    let mut again = intent(8, 1);
    again.bases[2] = raw::IntentBase {
        stream_uuid: *b"a third stream!!",
        acked: 0,
    };
    lab.renew_stream_as(*b"a third stream!!");
    lab.stream.set_intent(&again);
    lab.stream.mark_regions(lab.device, &[region(4), region(9)]);
    let mut agent = lab.start_agent(lab.start_target());
    let cost = finish(&lab, &mut agent).unwrap();
    assert_eq!(cost.regions, 2, "no full pass: {cost:?}");
    agent.stop();
}

#[test]
fn doubtful_marks_lead_to_a_comparison_of_everything_with_the_reason() {
    type Spoil = fn(&mut raw::IntentStatus);
    let cases: [(&str, Spoil); 6] = [
        ("older copy (version 6", |status| status.found_version = 6),
        ("does not go back", |status| {
            status.bases[0].stream_uuid[0] ^= 1;
        }),
        ("has lost records", |status| status.bases[0].acked = 1 << 40),
        ("could not be written", |status| {
            status.flags = raw::INTENT_FAILED;
        }),
        ("damaged", |status| status.found = raw::FOUND_DAMAGED),
        ("has no intent map", |status| {
            *status = raw::IntentStatus::default();
        }),
    ];
    for (reason, spoil) in cases {
        let lab = crashed();
        let mut status = intent(7, 1);
        spoil(&mut status);
        lab.stream.set_intent(&status);
        // The marks lack what differs.
        lab.stream.mark_regions(lab.device, &[region(1)]);
        lose(&lab, 40);
        let target = lab.start_target();
        let mut agent = lab.start_agent(target);
        assert_eq!(finish(&lab, &mut agent), None, "{reason}");
        agent.stop();
        let job = lab.last_job();
        assert_eq!(job.kind, JobKind::Difference);
        assert!(job.reason.contains(reason), "{reason}: {}", job.reason);
    }
}

/// A disk that holds something else, without a mark or a record that tells of it, may be older than its copy.
#[test]
fn a_disk_that_was_restored_waits_for_an_operator() {
    let lab = crashed_when(knows_blocks);
    lab.stream.set_intent(&intent(7, 1));
    lab.stream.mark_regions(lab.device, &[region(4)]);
    let copy = std::fs::read(lab.image()).unwrap();
    let older = random(77, usize::try_from(SECTORS * 512).unwrap());
    lab.stream.set_content(lab.device, &older);
    let mut agent = lab.start_agent(lab.start_target());
    agent.wait_state("mirror needed");
    let reason = agent.status().devices[0].reason.clone();
    assert!(reason.contains("is not as it was"), "{reason}");
    assert!(
        reason.contains("dtloop mirror start --set db 1"),
        "{reason}"
    );
    // To wait for it is in vain.
    let set = "db".into();
    let failure = agent
        .request(&Request::Wait {
            set,
            timeout_ms: Some(60_000),
        })
        .unwrap_err();
    assert_eq!(failure.code, FailureCode::TargetRefused, "{failure:?}");
    // What is written goes on, and the copy stays what it was: also after another start.
    for round in 0..2 {
        lab.fill_some(round);
        agent.wait_for(|status| status.applied_seq == status.next_seq);
        assert!(std::fs::read(lab.image()).unwrap() == copy);
        let target = agent.target.take();
        agent.stop();
        agent = lab.start_agent_with(target);
        agent.wait_state("mirror needed");
    }
    let request = Request::MirrorStart {
        set: "db".into(),
        devices: vec![],
        kind: MirrorKind::Difference,
        follow: true,
    };
    agent.request(&request).unwrap();
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

/// An older state is alike nearly everywhere; what tells is that something was written since.
#[test]
fn an_older_state_of_the_same_disk_is_known_by_what_was_written_since() {
    let older = Cell::new(vec![]);
    let samples = sample_offsets(SECTORS * 512);
    let sector = (0..SECTORS)
        .step_by(8)
        .find(|sector| !samples.contains(&(sector * 512)))
        .unwrap();
    let traced = |memory: &SetMemory| {
        let device = memory.devices.get("vol");
        device.is_some_and(|device| device.origin.known().contains(&(sector * 512)))
    };
    let write = |lab: &Lab| {
        older.set(lab.stream.content(lab.device));
        lab.write(sector, &random(99, 4096));
    };
    let lab = crashed_after(write, |memory| knows_blocks(memory) && traced(memory));
    lab.stream.set_intent(&intent(7, 1));
    lab.stream.mark_regions(lab.device, &[]);
    lab.stream.set_content(lab.device, &older.take());
    let agent = lab.start_agent(lab.start_target());
    agent.wait_state("mirror needed");
    let reason = agent.status().devices[0].reason.clone();
    assert!(
        reason.contains(&format!("the first at byte {}", sector * 512)),
        "{reason}"
    );
    agent.stop();
}

#[test]
fn the_right_disk_that_is_back_needs_no_operator() {
    let mut lab = crashed_when(knows_blocks);
    lab.stream.set_intent(&intent(7, 1));
    lab.stream.mark_regions(lab.device, &[]);
    let (right, wrong) = (lab.stream.content(lab.device), random(78, 4 << 20));
    lab.stream.set_content(lab.device, &wrong);
    let agent = lab.start_agent(lab.start_target());
    agent.wait_state("mirror needed");
    lab.write(6000, &random(5, 512));
    agent.wait_for(|status| status.applied_seq == status.next_seq);
    agent.stop();
    lab.renew_stream_as(*b"the third stream");
    lab.stream.set_content(lab.device, &right);
    let mut agent = lab.start_agent(lab.start_target());
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn what_a_crash_may_have_left_is_no_reason_for_doubt() {
    let mut lab = crashed_when(knows_blocks);
    lab.stream.set_intent(&intent(7, 1));
    let offsets = sample_offsets(SECTORS * 512);
    let (lost, written) = offsets.split_at(offsets.len() / 2);
    let mut content = lab.stream.content(lab.device);
    let mut marked = vec![];
    for offset in lost {
        let at = usize::try_from(*offset).unwrap();
        content[at + 5] ^= 1;
        marked.push(region(offset / 512 / REGION_SECTORS));
    }
    lab.stream.set_content(lab.device, &content);
    lab.stream.mark_regions(lab.device, &marked);
    for offset in written {
        lab.write(offset / 512 + 1, &random(*offset, 512));
    }
    let mut agent = lab.start_agent(lab.start_target());
    agent.wait_in_sync();
    lab.assert_identical();
    assert!(recovery(&agent.status()).unwrap().complete);
    agent.stop();
    // The marks have gone, and what they explained is not held against the disk by the next look.
    lab.renew_stream_as(*b"the third stream");
    let mut third = intent(8, 1);
    third.bases[2] = raw::IntentBase {
        stream_uuid: *b"the third stream",
        acked: 0,
    };
    lab.stream.set_intent(&third);
    lab.stream.mark_regions(lab.device, &[]);
    let mut agent = lab.start_agent(lab.start_target());
    agent.wait_in_sync();
    assert!(lab.agent_memory().devices["vol"].doubt.is_none());
    lab.assert_identical();
    agent.stop();
}
