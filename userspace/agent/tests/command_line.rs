// SPDX-License-Identifier: GPL-2.0-only

//! The command line of `dtagent`.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread::{scope, sleep};
use std::time::Duration;

/// How long one that was killed takes to be gone; the next one is started at once.
const DEATH: Duration = Duration::from_millis(300);

fn dtagent(dir: &Path, arguments: &[&str]) -> Output {
    let config = dir.join("dtloop.toml");
    std::fs::write(&config, "").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dtagent"));
    command.arg("--config").arg(config);
    command.arg("--state-dir").arg(dir.join("state"));
    command.args(arguments).output().unwrap()
}

#[test]
fn an_agent_that_is_started_while_a_killed_one_dies_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("state")).unwrap();
    let dying = dtloop_store::hold(&dir.path().join("state"), Duration::ZERO).unwrap();
    let output = scope(|scope| {
        let started = scope.spawn(|| dtagent(dir.path(), &["identity", "show"]));
        sleep(DEATH);
        drop(dying);
        started.join().unwrap()
    });
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn an_agent_that_lives_is_not_disturbed() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("state")).unwrap();
    let _alive = dtloop_store::hold(&dir.path().join("state"), Duration::ZERO).unwrap();
    let output = dtagent(dir.path(), &["identity", "show"]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        !output.status.success() && said.contains("in use by another dtagent"),
        "{said}"
    );
}

#[test]
fn the_socket_of_a_killed_agent_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let dying = UnixListener::bind(&path).unwrap();
    scope(|scope| {
        let started = scope.spawn(|| dtloop_agent::control::listen(&path));
        sleep(DEATH);
        drop(dying);
        started.join().unwrap().unwrap();
    });
}
