// SPDX-License-Identifier: GPL-2.0-only

//! The real agent over a stream in memory, the real target over loopback, and faults between
//! them. In the end the image is the device, byte for byte.

mod common;

use std::fs::File;
use std::time::Duration;

use common::{Faults, Lab, Target, random};
use dtloop_abi::raw;
use dtloop_abi::testing::Change;
use dtloop_api::{Connection, DeviceState, FailureCode, MirrorKind, Outcome, Request};
use dtloop_core::set::Sync;
use nix::fcntl::{Flock, FlockArg};

const SECTORS: u64 = 8192;

fn mirror(kind: MirrorKind) -> Request {
    Request::MirrorStart {
        set: "db".into(),
        devices: vec![],
        kind,
        follow: true,
    }
}

fn verify(repair: bool) -> Request {
    Request::Verify {
        set: "db".into(),
        devices: vec![],
        repair,
        follow: true,
    }
}

#[test]
fn a_full_mirror_and_live_writes_make_the_copy_identical() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    agent.wait_state("mirror needed");
    assert!(matches!(
        agent.request(&Request::Wait {
            set: "db".into(),
            timeout_ms: Some(2000)
        }),
        Err(failure) if failure.code == FailureCode::TargetRefused
    ));
    let writer = lab.write_in_background(300);
    let Ok(Outcome::Mirror(results)) = agent.request(&mirror(MirrorKind::Full)) else {
        panic!("the mirror failed");
    };
    assert!(results[0].complete);
    writer.join().unwrap();
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn every_operation_arrives() {
    let lab = Lab::new(SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    lab.fill();
    lab.stream.write_zeroes(lab.device, 16, 64);
    lab.stream.change(&Change {
        op: raw::OP_DISCARD,
        device: lab.device,
        flags: raw::F_ZEROES,
        start_sector: 200,
        sectors: 128,
        ..Change::default()
    });
    lab.stream.flush(lab.device);
    lab.write(400, &[0; 4096]);
    lab.write(401, &random(1, 512));
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_failed_write_is_dirty_until_it_was_read_again() {
    let lab = Lab::new(SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    let payload = random(3, 4096);
    let seq = lab.stream.reserve(&Change {
        op: raw::OP_WRITE,
        device: lab.device,
        start_sector: 64,
        sectors: 8,
        payload: &payload,
        ..Change::default()
    });
    lab.stream.complete(seq.unwrap(), Some(5));
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn verify_finds_and_repairs_what_was_changed_behind_our_back() {
    let lab = Lab::new(SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    lab.fill();
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.wait_in_sync();
    lab.damage_image(300 * 512, &random(9, 700));
    let writer = lab.write_in_background(100);
    let Ok(Outcome::Verify(found)) = agent.request(&verify(false)) else {
        panic!("verify failed");
    };
    writer.join().unwrap();
    assert!(found[0].complete && !found[0].is_identical());
    assert_eq!(found[0].differing_bytes, 128 << 10);
    assert_eq!(found[0].extents[0].start, 128 << 10);
    let Ok(Outcome::Verify(found)) = agent.request(&verify(true)) else {
        panic!("verify failed");
    };
    assert!(found[0].is_identical());
    assert_eq!(found[0].repaired_bytes, 128 << 10);
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_full_ring_loses_order_and_gets_it_back() {
    let lab = Lab::new(SECTORS);
    let target = lab.start_target();
    let mut agent = lab.start_agent(target);
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.wait_in_sync();
    let target = agent.target.take().unwrap();
    target.kill();
    // Far more than the ring holds.
    for round in 0..3 {
        lab.fill_with(round + 10);
    }
    assert!(lab.is_dirty());
    agent.target = Some(lab.start_target());
    agent.wait_in_sync();
    lab.assert_identical();
    assert!(!lab.is_dirty());
    agent.stop();
}

#[test]
fn a_mirror_goes_on_where_it_was_after_a_restart_of_the_agent() {
    let lab = Lab::new(8 * SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    agent
        .request(&Request::MirrorStart {
            set: "db".into(),
            devices: vec![],
            kind: MirrorKind::Full,
            follow: false,
        })
        .unwrap();
    agent.wait_for(|status| {
        status.devices[0]
            .state
            .pass()
            .is_some_and(|pass| pass.done_bytes > pass.total_bytes / 8)
            || status.devices[0].state.is_consistent()
    });
    agent
        .request(&Request::MirrorPause {
            set: "db".into(),
            devices: vec![],
        })
        .ok();
    let target = agent.target.take();
    agent.stop();
    let mut agent = lab.start_agent_with(target);
    agent.wait_for(|status| matches!(status.connection, Connection::Connected { .. }));
    let paused = agent.status();
    if let DeviceState::Mirroring { pass, .. } = &paused.devices[0].state {
        assert!(pass.paused && pass.done_bytes > 0, "{pass:?}");
        let resume = Request::MirrorResume {
            set: "db".into(),
            devices: vec![],
            follow: true,
        };
        agent.request(&resume).unwrap();
    }
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_stopped_mirror_waits_for_the_operator() {
    let lab = Lab::new(8 * SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    let set = || "db".to_owned();
    let start = Request::MirrorStart {
        set: set(),
        devices: vec![],
        kind: MirrorKind::Full,
        follow: false,
    };
    agent.request(&start).unwrap();
    if agent
        .request(&Request::MirrorStop {
            set: set(),
            devices: vec![],
        })
        .is_ok()
    {
        agent.wait_for(|status| status.devices[0].state == DeviceState::MirrorNeeded);
        let busy = agent.request(&Request::MirrorStop {
            set: set(),
            devices: vec![],
        });
        assert_eq!(busy.unwrap_err().code, FailureCode::NothingToDo);
    }
    agent.request(&mirror(MirrorKind::Difference)).unwrap();
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_new_stream_leads_to_a_difference_mirror_by_itself() {
    let mut lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.wait_in_sync();
    let target = agent.target.take();
    agent.stop();
    lab.renew_stream();
    lab.fill_with(77);
    let mut agent = lab.start_agent_with(target);
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

/// Nobody has to do anything for it, so it is nothing that `dtloop wait` gives up for.
#[test]
fn what_is_mirrored_by_itself_is_waited_for() {
    let mut lab = Lab::new(SECTORS);
    lab.fill();
    let target = lab.start_target();
    let address = target.address;
    let mut agent = lab.start_agent(target);
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.target.take().unwrap().stop();
    agent.stop();
    lab.renew_stream();
    let mut agent = lab.start_agent_to(address);
    agent.wait_state("mirror needed");
    let wait = |timeout_ms| Request::Wait {
        set: "db".into(),
        timeout_ms: Some(timeout_ms),
    };
    let answer = agent.request(&wait(500));
    assert!(
        matches!(&answer, Err(failure) if failure.code == FailureCode::TimedOut),
        "{answer:?}"
    );
    agent.target = Some(lab.start_target());
    agent.request(&wait(60_000)).unwrap();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_target_that_lost_its_state_is_mirrored_again() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.wait_in_sync();
    agent.target.take().unwrap().kill();
    std::fs::remove_dir_all(lab.target_dir().join("sets")).unwrap();
    lab.damage_image(0, &random(5, 4096));
    lab.fill_some(5);
    agent.target = Some(lab.start_target());
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_second_source_and_a_small_volume_are_refused() {
    let lab = Lab::new(SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.wait_in_sync();
    let address = agent.target.as_ref().unwrap().address;
    let stranger = Lab::new(SECTORS);
    let mut other = stranger.start_agent_to(address);
    other.wait_state("error");
    let reason = other.status().devices[0].reason.clone();
    assert!(reason.contains("belongs to set"), "{reason}");
    assert!(matches!(
        other.request(&mirror(MirrorKind::Full)),
        Err(failure) if failure.code == FailureCode::TargetRefused
    ));
    other.stop();
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();

    let large = Lab::new(SECTORS);
    large.set_image_sectors(SECTORS / 2);
    let agent = large.start_agent(large.start_target());
    agent.wait_state("error");
    let reason = agent.status().devices[0].reason.clone();
    assert!(reason.contains("larger"), "{reason}");
    agent.stop();
}

/// The target's own record of a set never says mirrored while it is not.
#[test]
fn the_target_does_not_claim_what_it_does_not_have() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    agent.wait_state("mirror needed");
    agent.target.take().unwrap().kill();
    assert_ne!(lab.saved().state.volumes["vol"].sync, Sync::Mirrored);
    agent.target = Some(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.wait_in_sync();
    agent.target.take().unwrap().stop();
    assert!(lab.saved().state.in_sync("vol"));
    agent.stop();
}

/// What is on its way to the target is not there yet.
#[test]
fn in_sync_is_not_said_before_the_target_is() {
    let lab = Lab::new(SECTORS);
    let target = lab.start_target();
    let faults = Faults::new(target.address, 1);
    let mut agent = lab.start_agent_to(faults.address);
    agent.target = Some(target);
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.wait_in_sync();
    faults.crawl();
    // Far more than the ring holds.
    for round in 0..3 {
        lab.fill_with(round + 10);
    }
    assert!(lab.is_dirty());
    agent.wait_for(|status| !status.devices[0].state.is_consistent());
    agent.wait_for(|status| status.devices[0].state.is_consistent());
    lab.assert_identical();
    agent.stop();
}

#[test]
fn connections_cut_at_random_bytes_lose_nothing() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let target = lab.start_target();
    let faults = Faults::new(target.address, 1);
    let mut agent = lab.start_agent_to(faults.address);
    agent.target = Some(target);
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    faults.cut_often();
    for round in 0..20 {
        lab.fill_some(round);
        std::thread::sleep(Duration::from_millis(10));
    }
    agent.request(&verify(true)).unwrap();
    faults.heal();
    assert!(faults.cuts() > 3, "only {} cuts", faults.cuts());
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_target_killed_again_and_again_replays_its_journal() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    for round in 0..12 {
        let writer = lab.write_in_background(200);
        std::thread::sleep(Duration::from_millis(20 + round * 7));
        agent.target.take().unwrap().kill();
        writer.join().unwrap();
        agent.target = Some(lab.start_target());
    }
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn an_agent_restarted_again_and_again_loses_nothing() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    for _ in 0..8 {
        let writer = lab.write_in_background(100);
        let target = agent.target.take();
        agent.stop();
        agent = lab.start_agent_with(target);
        writer.join().unwrap();
    }
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn the_real_program_killed_by_signal_nine_loses_nothing() {
    let lab = Lab::new(SECTORS);
    lab.fill();
    let port = common::free_port();
    let mut program = Target::program(&lab, port);
    let mut agent = lab.start_agent_to(([127, 0, 0, 1], port).into());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    for round in 0..6 {
        let writer = lab.write_in_background(200);
        std::thread::sleep(Duration::from_millis(30 + round * 11));
        program.kill_9();
        writer.join().unwrap();
        program = Target::program(&lab, port);
    }
    agent.wait_in_sync();
    lab.assert_identical();
    program.terminate();
    lab.assert_identical();
    assert!(lab.saved().state.in_sync("vol"));
    agent.stop();
}

#[test]
fn a_small_journal_holds_the_source_back_and_goes_round() {
    let mut lab = Lab::new(4 * SECTORS);
    lab.journal_bytes = (16 << 20, 8 << 20);
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    for round in 0..6 {
        lab.fill_with(round);
        agent.wait_in_sync();
    }
    lab.assert_identical();
    let segments = std::fs::read_dir(lab.saved_dir().join("journal"))
        .unwrap()
        .count();
    assert!(segments <= 3, "{segments} segments");
    agent.stop();
}

#[test]
fn a_volume_in_use_is_taken_when_it_is_free() {
    let lab = Lab::new(SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    lab.fill();
    agent.request(&mirror(MirrorKind::Full)).unwrap();
    agent.wait_in_sync();
    let mut target = agent.target.take().unwrap();
    agent.stop();
    target.stop();
    // As a program that mounted it, or a virtual machine, would have it.
    let image = File::open(lab.image()).unwrap();
    let held = Flock::lock(image, FlockArg::LockExclusiveNonblock).unwrap();
    target = lab.start_target();
    let mut agent = lab.start_agent(target);
    agent.wait_state("error");
    lab.write(8, &random(7, 4096));
    drop(held);
    // It is offered again every 10 seconds, without anybody asking.
    agent.wait_in_sync();
    lab.assert_identical();
}
