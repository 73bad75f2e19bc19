// SPDX-License-Identifier: GPL-2.0-only

//! The command line of `dttarget`.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

fn dttarget(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dttarget"));
    command
        .arg("--config")
        .arg(dir.join("dttarget.toml"))
        .arg("--state-dir")
        .arg(dir.join("state"));
    command.args(arguments).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn volumes_are_made_listed_and_refused_twice() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.img");
    let path = path.to_str().unwrap();
    let create = ["volume", "create", "a", "--path", path, "--size", "1MiB"];

    let output = dttarget(dir.path(), &create);
    assert!(!output.status.success());
    assert!(
        text(&output.stderr).contains("does not exist; write it"),
        "{}",
        text(&output.stderr)
    );

    std::fs::write(
        dir.path().join("dttarget.toml"),
        "# kept\ntransport = \"plaintext\"\n",
    )
    .unwrap();
    assert!(dttarget(dir.path(), &create).status.success());
    assert_eq!(std::fs::metadata(path).unwrap().len(), 1 << 20);
    let config = std::fs::read_to_string(dir.path().join("dttarget.toml")).unwrap();
    assert!(config.starts_with("# kept\n"));

    let output = dttarget(dir.path(), &create);
    assert!(!output.status.success());
    assert_eq!(
        std::fs::read_to_string(dir.path().join("dttarget.toml")).unwrap(),
        config
    );

    let output = dttarget(dir.path(), &["volume", "list", "--json"]);
    let rows: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&rows[0]["name"], &rows[0]["state"]),
        (&"a".into(), &"unbound".into())
    );
    assert_eq!(rows[0]["in_sync"], serde_json::Value::Bool(false));
    assert!(dttarget(dir.path(), &["check-config"]).status.success());

    let output = dttarget(dir.path(), &["volume", "status", "b"]);
    assert!(!output.status.success() && text(&output.stderr).contains("\"b\""));
    assert!(
        !dttarget(dir.path(), &["volume", "unbind", "a"])
            .status
            .success(),
        "it belongs to nobody"
    );
}

#[test]
fn bad_configurations_end_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    let output = dttarget(dir.path(), &["serve"]);
    assert!(!output.status.success() && text(&output.stderr).contains("Cannot read"));
    for (config, words) in [
        ("transport = \"telnet\"\n", "transport"),
        (
            "listen = \"0.0.0.0:0\"\ntransport = \"plaintext\"\n",
            "loopback",
        ),
    ] {
        std::fs::write(dir.path().join("dttarget.toml"), config).unwrap();
        for command in ["serve", "check-config"] {
            let output = dttarget(dir.path(), &[command]);
            let error = text(&output.stderr);
            assert!(!output.status.success() && error.contains(words), "{error}");
        }
    }
    // What is given on the command line is held to the same.
    let config = "listen = \"127.0.0.1:0\"\ntransport = \"plaintext\"\n";
    std::fs::write(dir.path().join("dttarget.toml"), config).unwrap();
    let output = dttarget(dir.path(), &["serve", "--listen", "0.0.0.0:0"]);
    assert!(!output.status.success() && text(&output.stderr).contains("loopback"));
    let output = dttarget(dir.path(), &["invite"]);
    assert!(!output.status.success() && text(&output.stderr).contains("knows no keys"));
}

#[test]
fn invitations_are_printed_counted_and_refused_with_a_reason() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("dttarget.toml"), "").unwrap();
    let output = dttarget(dir.path(), &["invite", "--name", "alpha", "--json"]);
    let invited: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let code: dtloop_trust::PairingCode = invited["code"].as_str().unwrap().parse().unwrap();
    let peers = || -> serde_json::Value {
        let output = dttarget(dir.path(), &["peers", "--json"]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let key: dtloop_trust::Pin = peers()["key"].as_str().unwrap().parse().unwrap();
    assert!(key.begins_with(&code.prefix), "the code is of another key");
    let output = dttarget(dir.path(), &["invite"]);
    assert!(output.status.success() && text(&output.stderr).contains("dtloop pair"));
    assert_eq!(peers()["invitations"].as_array().unwrap().len(), 2);
    for (arguments, words) in [
        (&["invite", "--name", "a b"][..], "a b"),
        (&["invite", "--expires", "8d"], "7 days"),
        (&["invite", "--expires", "soon"], "soon"),
        (&["revoke", "nobody"], "dttarget peers"),
    ] {
        let output = dttarget(dir.path(), arguments);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(
            text(&output.stderr).contains(words),
            "{}",
            text(&output.stderr)
        );
    }
    assert!(text(&dttarget(dir.path(), &["invite", "--withdraw"]).stdout).starts_with('2'));
    assert!(peers()["invitations"].as_array().unwrap().is_empty());
}

#[test]
fn a_command_that_comes_while_a_killed_target_dies_waits_for_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(
        dir.path().join("dttarget.toml"),
        "transport = \"plaintext\"\n",
    )
    .unwrap();
    std::fs::create_dir(dir.path().join("state")).unwrap();
    let dying = dtloop_store::hold(&dir.path().join("state"), Duration::ZERO).unwrap();
    let output = std::thread::scope(|scope| {
        let started = scope.spawn(|| dttarget(dir.path(), &["volume", "unbind", "a"]));
        std::thread::sleep(Duration::from_millis(300));
        drop(dying);
        started.join().unwrap()
    });
    let said = text(&output.stderr);
    assert!(said.contains("belongs to nobody"), "{said}");
}
