// SPDX-License-Identifier: GPL-2.0-only

//! The lines as they look on the socket, and the client against a scripted agent.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use dtloop_api::*;

/// Asserts that a value has this JSON and comes back from it.
fn golden<T>(value: &T, json: &str)
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    assert_eq!(serde_json::to_string(value).expect("JSON"), json);
    assert_eq!(&serde_json::from_str::<T>(json).expect("a value"), value);
}

#[test]
fn requests_have_their_golden_lines() {
    golden(&Request::Status { set: None }, r#"{"request":"status"}"#);
    let start = Request::MirrorStart {
        set: "db".into(),
        devices: vec![1, 2],
        kind: MirrorKind::Difference,
        follow: true,
    };
    golden(
        &start,
        r#"{"request":"mirror-start","set":"db","devices":[1,2],"kind":"difference","follow":true}"#,
    );
    let wait = Request::Wait {
        set: "db".into(),
        timeout_ms: Some(5),
    };
    golden(&wait, r#"{"request":"wait","set":"db","timeout_ms":5}"#);
}

#[test]
fn bandwidth_has_its_golden_lines() {
    let change = Some(BandwidthChange::Limit {
        limit: "5MiB/s".into(),
        until: Some("18:00".into()),
        keep: false,
    });
    golden(
        &Request::Bandwidth {
            set: "db".into(),
            change,
        },
        r#"{"request":"bandwidth","set":"db","change":{"change":"limit","limit":"5MiB/s","until":"18:00","keep":false}}"#,
    );
    golden(
        &Reply::Done(Outcome::Bandwidth(Bandwidth {
            limit_bytes_per_s: None,
            limit: "unlimited".into(),
            ..Bandwidth::default()
        })),
        r#"{"reply":"done","bandwidth":{"limit_bytes_per_s":null,"limit":"unlimited","source":"config","kept":false,"waiting":false}}"#,
    );
}

#[test]
fn what_may_be_left_out_may_be_left_out() {
    let verify: Request = serde_json::from_str(r#"{"request":"verify","set":"db"}"#).unwrap();
    assert_eq!(
        verify,
        Request::Verify {
            set: "db".into(),
            devices: vec![],
            repair: false,
            follow: false
        }
    );
    assert!(serde_json::from_str::<Request>(r#"{"request":"format-disk"}"#).is_err());
}

#[test]
fn replies_have_their_golden_lines() {
    golden(&Reply::Done(Outcome::Ok), r#"{"reply":"done","ok":null}"#);
    let done = Reply::Done(Outcome::Wait(WaitResult {
        seq: 812,
        elapsed_ms: 41,
    }));
    golden(
        &done,
        r#"{"reply":"done","wait":{"seq":812,"elapsed_ms":41}}"#,
    );
    golden(
        &Reply::Done(Outcome::Started(vec![1])),
        r#"{"reply":"done","started":[1]}"#,
    );
    let failed = Reply::Failed(Failure::new(FailureCode::UnknownSet, "No set x."));
    golden(
        &failed,
        r#"{"reply":"failed","code":"unknown-set","message":"No set x."}"#,
    );
    let progress = Reply::Progress(Progress {
        set: "db".into(),
        wait: Some(WaitProgress {
            seq: 9,
            applied_seq: 3,
        }),
        ..Progress::default()
    });
    golden(
        &progress,
        r#"{"reply":"progress","set":"db","wait":{"seq":9,"applied_seq":3}}"#,
    );
}

#[test]
fn device_states_have_their_golden_form() {
    golden(
        &DeviceState::OrderLost { from: 3, to: 9 },
        r#"{"state":"order-lost","from":3,"to":9}"#,
    );
    golden(&DeviceState::InSync, r#"{"state":"in-sync"}"#);
    let paused = DeviceState::Mirroring {
        kind: MirrorKind::Full,
        pass: Pass {
            paused: true,
            ..Pass::default()
        },
    };
    assert_eq!(paused.label(), "mirror paused");
    assert!(!paused.is_consistent());
}

#[test]
fn the_ladder_has_its_golden_form() {
    let ladder = Ladder {
        rung: Rung::Spooling,
        since_unix_ms: 7,
        reason: "R".into(),
        history: vec![LadderStep {
            at_unix_ms: 7,
            from: Rung::Ring,
            to: Rung::Spooling,
            reason: "R".into(),
        }],
    };
    golden(
        &ladder,
        r#"{"rung":"spooling","since_unix_ms":7,"reason":"R","history":[{"at_unix_ms":7,"from":"ring","to":"spooling","reason":"R"}]}"#,
    );
    let newer: Rung = serde_json::from_str(r#""cloud""#).unwrap();
    assert_eq!(newer, Rung::Other);
}

#[test]
fn unknown_codes_and_fields_of_a_newer_agent_are_taken() {
    let line = r#"{"reply":"failed","code":"on-fire","message":"M.","more":1}"#;
    let Reply::Failed(failure) = serde_json::from_str(line).unwrap() else {
        panic!("not a failure");
    };
    assert_eq!(failure.code, FailureCode::Other);
}

/// A client whose agent answers the first line with this text and hangs up.
fn scripted(answer: &'static str) -> Client {
    let (client, agent) = UnixStream::pair().expect("a socket pair");
    thread::spawn(move || {
        let mut line = String::new();
        let mut reader = BufReader::new(agent);
        reader.read_line(&mut line).expect("a request");
        reader
            .get_mut()
            .write_all(answer.as_bytes())
            .expect("an answer");
    });
    Client::from_stream(client)
}

#[test]
fn progress_is_shown_until_the_end() {
    let mut client = scripted(concat!(
        r#"{"reply":"progress","set":"a"}"#,
        "\n",
        r#"{"reply":"progress","set":"b"}"#,
        "\n",
        r#"{"reply":"done","ok":null}"#,
        "\n"
    ));
    let request = Request::MirrorPause {
        set: "a".into(),
        devices: vec![],
    };
    let mut seen = vec![];
    let answer = client.request(&request).unwrap();
    let outcome = answer.finish(|p| seen.push(p.set.clone())).unwrap();
    assert_eq!((outcome, seen), (Outcome::Ok, vec!["a".into(), "b".into()]));
}

#[test]
fn bad_answers_are_told_apart() {
    let failed = "{\"reply\":\"failed\",\"code\":\"busy\",\"message\":\"Busy.\"}\n";
    assert!(matches!(
        scripted(failed).status(None),
        Err(ClientError::Failed(f)) if f.code == FailureCode::Busy
    ));
    assert!(matches!(
        scripted("").status(None),
        Err(ClientError::Closed)
    ));
    assert!(matches!(
        scripted("{\"reply\":").status(None),
        Err(ClientError::Line(LineError::Truncated))
    ));
    assert!(matches!(
        scripted("{\"reply\":\"done\",\"ok\":null}\n").status(None),
        Err(ClientError::Unexpected)
    ));
}

#[test]
fn a_missing_agent_is_named_as_such() {
    let error = Client::connect_path(Path::new("/nonexistent/agent.sock")).unwrap_err();
    assert!(error.to_string().contains("Start dtagent"), "{error}");
}
