// SPDX-License-Identifier: GPL-2.0-only

//! What makes a copy one that people trust: both sides prove what was applied, writes past the module are noticed,
//! verifications come by themselves, and who is who is checked.

#![expect(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{Agent, Faults, Lab, random};
use dtloop_api::{DeviceState, MirrorKind, Outcome, Request, SetStatus, VerifyEvent, VerifyResult};
use dtloop_target::applier::Saved;

const SECTORS: u64 = 8192;

fn mirror(agent: &mut Agent) {
    let request = Request::MirrorStart {
        set: "db".into(),
        devices: vec![],
        kind: MirrorKind::Full,
        follow: true,
    };
    agent.request(&request).unwrap();
    agent.wait_in_sync();
}

fn verify(agent: &mut Agent, repair: bool) -> VerifyResult {
    let request = Request::Verify {
        set: "db".into(),
        devices: vec![],
        repair,
        follow: true,
    };
    match agent.request(&request) {
        Ok(Outcome::Verify(mut results)) => results.remove(0),
        other => panic!("{other:?}"),
    }
}

fn log(agent: &mut Agent) -> Vec<dtloop_api::VerifyEntry> {
    let request = Request::VerifyLog {
        set: "db".into(),
        most: 1000,
    };
    match agent.request(&request) {
        Ok(Outcome::VerifyLog(entries)) => entries,
        other => panic!("{other:?}"),
    }
}

fn is_proven_to_the_end(status: &SetStatus) -> bool {
    status
        .proven
        .is_some_and(|proven| proven.seq + 1 == status.next_seq)
}

fn has_alarm(status: &SetStatus) -> bool {
    let device = status.devices.first();
    device.is_some_and(|device| matches!(device.state, DeviceState::VerifyNeeded { .. }))
}

#[test]
fn both_sides_prove_the_same_sequence_through_kills_of_both() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    agent.wait_for(is_proven_to_the_end);
    for round in 0..8 {
        let writer = lab.write_in_background(150);
        match round % 3 {
            0 => {
                agent.target.take().unwrap().kill();
                agent.target = Some(lab.start_target());
            }
            1 => {
                let target = agent.target.take();
                agent.stop();
                agent = lab.start_agent_with(target);
            }
            _ => {
                let target = agent.target.take().unwrap();
                agent.stop();
                target.kill();
                agent = lab.start_agent_with(Some(lab.start_target()));
            }
        }
        writer.join().unwrap();
        agent.wait_in_sync();
        agent.wait_for(is_proven_to_the_end);
        let proven = agent.status().proven.unwrap();
        assert_eq!(proven.since_seq, 0, "the chain was broken in round {round}");
    }
    lab.assert_identical();
    agent.stop();
}

/// Records wait in the disk queue, the queue runs full, what comes next is staged: the records are one sequence all the
/// same, whoever is killed meanwhile.
#[test]
fn the_chain_goes_on_through_disk_queue_staging_and_kills() {
    let lab = Lab::new(4 * SECTORS).with_queue(12 << 20);
    let target = lab.start_target();
    let faults = Faults::new(target.address, 3);
    let mut agent = lab.start_agent_to(faults.address);
    agent.target = Some(target);
    mirror(&mut agent);
    for round in 0..2 {
        faults.hold();
        lab.write_when_there_is_room(round, 8 << 20);
        assert!(round > 0 || lab.gaps() == 0);
        if round == 1 {
            lab.fill_with(round);
            lab.fill_with(round + 1);
            assert!(lab.gaps() > 0);
        }
        faults.heal();
        faults.cut_often();
        for restart in 0..6 {
            let before = agent.status().next_seq;
            let writer = lab.write_in_background(30);
            agent.wait_for(|status| status.next_seq > before);
            let target = agent.target.take();
            agent.stop();
            agent = lab.start_agent_to(faults.address);
            agent.target = target;
            if restart % 2 == 1 {
                agent.target.take().unwrap().kill();
                agent.target = Some(lab.start_target());
            }
            writer.join().unwrap();
        }
        faults.heal();
        agent.wait_in_sync();
        agent.wait_for(is_proven_to_the_end);
        let proven = agent.status().proven.unwrap();
        assert_eq!(proven.since_seq, 0, "the chain was broken in round {round}");
        lab.assert_identical();
    }
    assert!(lab.saved().state.stages > 0, "nothing was staged");
    agent.stop();
}

#[test]
fn a_chain_that_differs_is_an_alarm_until_everything_was_verified() {
    let lab = Lab::new(SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    agent.wait_for(is_proven_to_the_end);
    agent.target.take().unwrap().stop();
    // The target applied something else: what a fault of its memory or program would leave.
    let mut saved = lab.saved();
    saved.state.chain.as_mut().unwrap().link[3] ^= 1;
    store(&lab, &saved);
    lab.fill_some(1);
    agent.target = Some(lab.start_target());
    agent.wait_for(has_alarm);
    let status = agent.status();
    assert!(
        status.devices[0].reason.contains("hash chain"),
        "{}",
        status.devices[0].reason
    );
    let wait = Request::Wait {
        set: "db".into(),
        timeout_ms: Some(1000),
    };
    agent.request(&wait).unwrap_err();
    // It outlives the agent.
    let target = agent.target.take();
    agent.stop();
    let mut agent = lab.start_agent_with(target);
    agent.wait_for(has_alarm);
    assert!(verify(&mut agent, false).is_identical());
    agent.wait_in_sync();
    lab.fill_some(2);
    agent.wait_in_sync();
    agent.wait_for(is_proven_to_the_end);
    assert!(agent.status().proven.unwrap().since_seq > 0);
    lab.assert_identical();
    agent.stop();
}

fn store(lab: &Lab, saved: &Saved) {
    dtloop_store::store(&lab.saved_dir().join("state"), saved).unwrap();
}

#[test]
fn a_bypassed_device_is_an_alarm_until_it_was_verified() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    lab.stream.bypass(lab.device, 1000, &random(4, 4096));
    agent.wait_for(has_alarm);
    let alarm = agent.status().devices[0].alarm.clone().unwrap();
    assert!(
        alarm.text.contains("bypassed: 4096 bytes"),
        "{}",
        alarm.text
    );
    // A verification that finds the blocks and repairs nothing ends no alarm.
    let found = verify(&mut agent, false);
    assert_eq!(found.differing_bytes, 128 << 10);
    agent.wait_for(has_alarm);
    // It outlives the agent.
    let target = agent.target.take();
    agent.stop();
    let mut agent = lab.start_agent_with(target);
    agent.wait_for(has_alarm);
    assert_eq!(agent.status().devices[0].alarm, Some(alarm));
    let found = verify(&mut agent, true);
    assert!(found.is_identical() && found.repaired_bytes == 128 << 10);
    agent.wait_in_sync();
    lab.assert_identical();
    // The module still counts the old write, which is no news.
    let target = agent.target.take();
    agent.stop();
    let mut agent = lab.start_agent_with(target);
    agent.wait_in_sync();
    agent.stop();
}

#[test]
fn a_verification_keeps_the_states_of_both_sides_in_its_log() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    let damage = random(9, 700);
    lab.damage_image(300 * 512, &damage);
    agent.wait_for(has_alarm);
    let writer = lab.write_in_background(100);
    let result = verify(&mut agent, true);
    writer.join().unwrap();
    assert_eq!(result.extents.len(), 1);
    let extent = result.extents[0];
    assert_eq!((extent.start, extent.bytes), (128 << 10, 128 << 10));
    assert!(extent.first_seq >= result.from_seq && extent.last_seq < result.to_seq);
    let entries = log(&mut agent);
    let events: Vec<_> = entries.iter().map(|entry| entry.event).collect();
    use VerifyEvent::{Begins, Confirmed, Differs, Identical, Repaired};
    assert_eq!(events, [Begins, Differs, Repaired, Confirmed, Identical]);
    let (differs, confirmed) = (&entries[1], &entries[3]);
    assert_eq!((differs.start, differs.seq), (128 << 10, extent.first_seq));
    assert!(differs.source.is_some() && differs.target.is_some());
    assert_ne!(differs.source, differs.target);
    assert!(confirmed.source.is_some() && confirmed.source == confirmed.target);
    assert!(differs.seq < entries[2].seq && entries[2].seq < confirmed.seq);
    // The target has the same two lines in its own log.
    let own: Vec<dtloop_api::VerifyEntry> = dtloop_store::log::Log::read(
        &dtloop_disk::RealDisk,
        &lab.saved_dir().join("verify.log"),
        10,
    )
    .unwrap();
    let states = |entry: &dtloop_api::VerifyEntry| {
        (
            entry.event,
            entry.seq,
            entry.source.clone(),
            entry.target.clone(),
        )
    };
    assert_eq!(
        own.iter().map(states).collect::<Vec<_>>(),
        [states(differs), states(confirmed)]
    );
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn changes_outside_of_the_stream_are_no_differences() {
    let lab = Lab::new(4 * SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    for round in 0..6 {
        // Far more than the ring holds, so that much of it is only in the dirty map while the verification goes on.
        let writer = {
            let lab = &lab;
            std::thread::scope(|scope| {
                let writer = scope.spawn(move || lab.fill_with(round + 1));
                let result = verify(&mut agent, false);
                writer.join().unwrap();
                result
            })
        };
        assert!(writer.is_identical(), "round {round}: {writer:?}");
    }
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_verification_comes_when_it_is_due_and_goes_on_after_a_restart() {
    let mut lab = Lab::new(8 * SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    lab.damage_image(5 << 20, &random(9, 512));
    let target = agent.target.take();
    agent.stop();
    lab.verify =
        Some(toml::from_str("every = \"1week\"\nrate = \"16MiB\"\nrepair = true\n").unwrap());
    // The last one was two weeks ago.
    let mut memory = lab.agent_memory();
    memory.timetable.reference_ms = 1_767_225_600_000;
    lab.store_agent_memory(&memory);
    let mut agent = lab.start_agent_with(target);
    let place = |status: &SetStatus| {
        status
            .devices
            .first()
            .and_then(|device| device.state.pass())
            .map_or(0, |pass| pass.done_bytes)
    };
    agent.wait_for(|status| place(status) > 1 << 20);
    assert!(agent.status().verify_schedule.unwrap().under_way);
    // A mirror and a scheduled verification never go on together: the verification makes way and keeps its place.
    let target = agent.target.take();
    agent.stop();
    let before = lab.agent_memory();
    let (job, done) = (
        before.job.as_ref().unwrap(),
        before.job.as_ref().unwrap().progress().0,
    );
    assert!(before.scheduled && done > 0, "{before:?}");
    let id = job.id;
    let mut agent = lab.start_agent_with(target);
    agent.wait_for(|status| {
        status
            .devices
            .first()
            .and_then(|device| device.last_verify.as_ref())
            .is_some_and(VerifyResult::is_identical)
    });
    let result = agent.status().devices[0].last_verify.clone().unwrap();
    assert_eq!(result.repaired_bytes, 128 << 10);
    let after = lab.agent_memory();
    assert_eq!(
        after.job.as_ref().map(|job| job.id),
        Some(id),
        "it began anew"
    );
    assert!(!after.scheduled && after.timetable.reference_ms > 1_767_225_600_000);
    let entries = log(&mut agent);
    assert_eq!(
        entries
            .iter()
            .filter(|entry| entry.event == VerifyEvent::Begins)
            .count(),
        1
    );
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_scheduled_verification_makes_way_for_a_mirror() {
    let mut lab = Lab::new(8 * SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    let target = agent.target.take();
    agent.stop();
    lab.verify = Some(toml::from_str("every = \"1week\"\nrate = \"4MiB\"\n").unwrap());
    let mut memory = lab.agent_memory();
    memory.timetable.reference_ms = 1_767_225_600_000;
    lab.store_agent_memory(&memory);
    let mut agent = lab.start_agent_with(target);
    agent.wait_for(|status| {
        status
            .devices
            .first()
            .and_then(|device| device.state.pass())
            .is_some_and(|pass| pass.done_bytes > 0)
    });
    mirror(&mut agent);
    let schedule = agent.status().verify_schedule.unwrap();
    assert!(schedule.suspended && !schedule.under_way, "{schedule:?}");
    agent.stop();
}
