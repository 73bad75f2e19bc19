// SPDX-License-Identifier: GPL-2.0-only

//! Who is who: clones, restored states, and volumes that are not what they were. Nothing is written to what is in doubt.

#![expect(clippy::unwrap_used, reason = "a test")]

mod common;

use std::fs;

use common::{Agent, Lab, Target, copy_dir, random};
use dtloop_api::{Connection, MirrorKind, Request, SetStatus};

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

fn reason(agent: &Agent) -> String {
    agent.wait_state("error");
    agent.status().devices[0].reason.clone()
}

fn is_alarmed(status: &SetStatus) -> bool {
    let device = status.devices.first();
    device.is_some_and(|device| device.state.label() == "verify needed")
}

/// A mirrored set, its target stopped.
fn at_rest(lab: &Lab) -> Agent {
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    agent.target.take().unwrap().stop();
    agent
}

fn accept_volume(lab: &Lab) {
    let mut saved = lab.saved();
    saved.state.accept_volume("vol");
    dtloop_store::store(&lab.saved_dir().join("state"), &saved).unwrap();
}

#[test]
fn a_swapped_volume_is_not_written_to() {
    let lab = Lab::new(SECTORS);
    let mut agent = at_rest(&lab);
    let (image, aside) = (lab.image(), lab.image().with_extension("aside"));
    fs::rename(&image, &aside).unwrap();
    let stranger = random(5, 4 << 20);
    fs::write(&image, &stranger).unwrap();
    agent.target = Some(lab.start_target());
    lab.fill_some(1);
    let text = reason(&agent);
    assert!(text.contains("another file or disk than before"), "{text}");
    assert!(text.contains("dttarget volume accept vol"), "{text}");
    agent.target.take().unwrap().stop();
    assert_eq!(fs::read(&image).unwrap(), stranger);
    // The right one is back: it is compared, as records have passed it by.
    fs::rename(&aside, &image).unwrap();
    agent.target = Some(lab.start_target());
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_volume_that_was_changed_while_the_target_was_down_waits_for_a_decision() {
    // Where a sample is, and where only the time of the last change tells.
    for offset in [0, 3_000_000] {
        let lab = Lab::new(SECTORS);
        let mut agent = at_rest(&lab);
        let newer = random(6, 4096);
        lab.damage_image(offset, &newer);
        agent.target = Some(lab.start_target());
        let text = reason(&agent);
        assert!(text.contains("changed by something else"), "{text}");
        lab.fill_some(1);
        agent.target.take().unwrap().stop();
        let at = usize::try_from(offset).unwrap();
        assert_eq!(fs::read(lab.image()).unwrap()[at..at + 4096], newer);
        // It is still so after another start, and over when somebody has decided.
        agent.target = Some(lab.start_target());
        agent.wait_state("error");
        agent.target.take().unwrap().stop();
        accept_volume(&lab);
        agent.target = Some(lab.start_target());
        agent.wait_in_sync();
        lab.assert_identical();
        agent.stop();
    }
}

#[test]
fn what_the_target_wrote_before_it_was_killed_is_its_own() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    for round in 0..4 {
        // Over all samples, and over none.
        if round % 2 == 0 {
            lab.fill_with(round + 2);
        } else {
            lab.fill_some(round);
        }
        agent.wait_in_sync();
        agent.target.take().unwrap().kill();
        agent.target = Some(lab.start_target());
        agent.wait_in_sync();
        assert_eq!(agent.status().devices[0].alarm, None);
    }
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_volume_that_is_written_to_under_the_target_is_an_alarm() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    mirror(&mut agent);
    lab.damage_image(700_000, &random(7, 512));
    agent.wait_for(is_alarmed);
    // It outlives the target, and is told to another agent.
    agent.target.take().unwrap().stop();
    agent.stop();
    let mut agent = lab.start_agent(lab.start_target());
    agent.wait_for(is_alarmed);
    let repair = Request::Verify {
        set: "db".into(),
        devices: vec![],
        repair: true,
        follow: true,
    };
    agent.request(&repair).unwrap();
    agent.wait_in_sync();
    lab.assert_identical();
    // And over, for both.
    agent.target.take().unwrap().stop();
    assert!(lab.saved().state.in_sync("vol"));
    agent.target = Some(lab.start_target());
    agent.wait_in_sync();
    agent.stop();
}

#[test]
fn a_cloned_source_is_refused_however_far_it_has_come() {
    let mut lab = Lab::new(SECTORS);
    let mut agent = at_rest(&lab);
    let target = lab.start_target();
    let address = target.address;
    agent.target = Some(target);
    agent.wait_in_sync();
    agent.stop();
    let mut clone = lab.clone_source(*b"stream of clone0");
    // The original goes on.
    lab.renew_stream();
    let mut agent = lab.start_agent_with(Some(lab.start_target()));
    agent.wait_in_sync();
    // The clone has had more streams than it.
    for stream in [
        *b"stream of clone1",
        *b"stream of clone2",
        *b"stream of clone3",
    ] {
        clone.renew_stream_as(stream);
        let other = clone.start_agent_to(address);
        let text = reason(&other);
        assert!(
            text.contains("restored, or it was cloned") || text.contains("clone of the source"),
            "{text}"
        );
        assert!(text.contains("dttarget accept db"), "{text}");
        other.stop();
    }
    lab.fill_some(3);
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_restored_source_is_followed_when_somebody_decides() {
    let mut lab = Lab::new(SECTORS);
    let agent = at_rest(&lab);
    agent.stop();
    let backup = lab.agent_dir().with_extension("backup");
    copy_dir(&lab.agent_dir(), &backup);
    for stream in [*b"second stream uu", *b"third stream uui"] {
        lab.renew_stream_as(stream);
        let mut agent = lab.start_agent(lab.start_target());
        agent.wait_in_sync();
        let target: Target = agent.target.take().unwrap();
        agent.stop();
        target.stop();
    }
    copy_dir(&backup, &lab.agent_dir());
    lab.renew_stream_as(*b"stream after it!");
    lab.fill_some(9);
    let mut agent = lab.start_agent(lab.start_target());
    let text = reason(&agent);
    assert!(
        text.contains("older state of the source was restored"),
        "{text}"
    );
    assert!(matches!(
        agent.status().connection,
        Connection::Refused { .. }
    ));
    fs::write(
        lab.saved_dir().join(dtloop_target::applier::ACCEPT_FILE),
        [],
    )
    .unwrap();
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}
