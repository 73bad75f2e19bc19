// SPDX-License-Identifier: GPL-2.0-only

//! The program as a person or a script meets it, on a machine without the module.
//!
//! What every command must do alike is checked for all of them from one table.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::thread;

/// Every command with the least that it takes.
const COMMANDS: [&[&str]; 20] = [
    &["devices"],
    &["attach", "/dev/null"],
    &["detach", "1"],
    &["config", "add", "/dev/null"],
    &["config", "remove", "1"],
    &["config", "list"],
    &["config", "check"],
    &["config", "edit"],
    &["status"],
    &["resize", "1"],
    &["set", "db", "--policy", "track"],
    &["mirror", "start"],
    &["mirror", "pause"],
    &["mirror", "resume"],
    &["mirror", "stop"],
    &["verify"],
    &["wait"],
    &["pair", "target:7788", "CODE"],
    &["peers"],
    &["unpair", "target:7788"],
];

struct Ran {
    code: i32,
    out: String,
    err: String,
}

fn ran(output: &Output) -> Ran {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
    Ran {
        code: output.status.code().expect("an exit code"),
        out: text(&output.stdout),
        err: text(&output.stderr),
    }
}

/// A place where neither module nor agent is, whatever the machine has.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn run<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Ran {
        self.run_program(env!("CARGO_BIN_EXE_dtloop"), args)
    }

    /// With that editor.
    fn edit(&self, editor: &str) -> Ran {
        let output = self
            .command(env!("CARGO_BIN_EXE_dtloop"))
            .args(["config", "edit"])
            .env("VISUAL", editor)
            .output()
            .expect("the program");
        ran(&output)
    }

    fn run_program<S: AsRef<std::ffi::OsStr>>(&self, program: &str, args: &[S]) -> Ran {
        let output = self.command(program).args(args).output();
        ran(&output.expect("the program"))
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("DTLOOP_SOCKET", self.path("agent.sock"))
            .env("DTLOOP_CONTROL", self.path("dtloop-control"))
            .env("DTLOOP_RUN", self.path("run"))
            .env("DTLOOP_ENTRIES", self.path("devices"))
            .env("DTLOOP_NUMBERS", self.path("numbers"))
            .stdin(std::process::Stdio::null());
        command
    }

    /// An agent that answers one request with these lines; returns the request.
    fn agent(&self, answer: &'static str) -> thread::JoinHandle<String> {
        let listener = UnixListener::bind(self.path("agent.sock")).expect("a socket");
        thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            let mut reader = BufReader::new(stream);
            let mut line = String::new();
            reader.read_line(&mut line).expect("a request");
            reader
                .get_mut()
                .write_all(answer.as_bytes())
                .expect("a client that listens");
            line
        })
    }
}

#[test]
fn every_command_has_help() {
    let place = Place::new();
    for command in COMMANDS {
        for flag in ["--help", "-h"] {
            let mut args = command.to_vec();
            args.push(flag);
            let ran = place.run(&args);
            assert_eq!(ran.code, 0, "{args:?}");
            assert!(ran.out.contains("Usage: dtloop "), "{}", ran.out);
            assert!(ran.err.is_empty(), "{}", ran.err);
        }
    }
}

#[test]
fn every_command_refuses_an_unknown_option() {
    let place = Place::new();
    for command in COMMANDS {
        let mut args = command.to_vec();
        args.push("--no-such-option");
        let ran = place.run(&args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.err);
        assert!(ran.err.contains("--no-such-option"), "{}", ran.err);
    }
}

#[test]
fn the_help_lists_the_exit_codes_and_the_version_is_there() {
    let place = Place::new();
    assert!(place.run(&["--help"]).out.contains("Exit codes:"));
    let version = place.run(&["--version"]);
    assert_eq!(
        version.out,
        format!("dtloop {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn without_an_argument_it_says_how() {
    let place = Place::new();
    for args in [
        &[][..],
        &["attach"],
        &["detach"],
        &["mirror"],
        &["set", "db"],
    ] {
        let ran = place.run(args);
        assert_eq!(ran.code, 2, "{args:?}");
        assert!(ran.err.contains("Usage:"), "{args:?}: {}", ran.err);
    }
}

#[test]
fn a_missing_module_is_named_with_the_remedy() {
    let place = Place::new();
    for args in [
        &["detach", "1"][..],
        &["resize", "1"],
        &["set", "db", "--policy", "track"],
        &["status"],
    ] {
        let ran = place.run(args);
        assert_eq!(ran.code, 5, "{args:?}: {}", ran.err);
        assert!(ran.err.contains("modprobe dtloop"), "{}", ran.err);
    }
}

#[test]
fn a_missing_agent_is_named_with_the_remedy() {
    let place = Place::new();
    for args in [
        &["mirror", "start"][..],
        &["mirror", "pause"],
        &["verify", "--repair"],
        &["wait"],
    ] {
        let ran = place.run(args);
        assert_eq!(ran.code, 6, "{args:?}: {}", ran.err);
        assert!(ran.err.contains("Start dtagent"), "{}", ran.err);
    }
}

#[test]
fn attach_refuses_what_is_no_block_device() {
    let place = Place::new();
    let file = place.path("file");
    std::fs::write(&file, [0; 4096]).expect("a file");
    let cases = [
        (Path::new("/nonexistent"), "does not exist"),
        (Path::new("/dev/null"), "not a block device"),
        (&file, "not a block device"),
        (place.0.path(), "not a block device"),
    ];
    for (path, reason) in cases {
        let ran = place.run(&["attach", path.to_str().expect("text")]);
        assert_eq!(ran.code, 7, "{}", ran.err);
        assert!(ran.err.contains(reason), "{}", ran.err);
        assert!(ran.out.is_empty());
    }
    assert!(!place.path("run").exists(), "nothing was changed");
}

#[test]
fn bad_values_are_usage_errors() {
    let place = Place::new();
    for args in [
        &["attach", "/dev/null", "--loop", "x"][..],
        &["attach", "/dev/null", "--loop", "99999999"],
        &["attach", "/dev/null", "--offset", "1.5G"],
        &["attach", "/dev/null", "--ring-size", "5M"],
        &["attach", "/dev/null", "--policy", "perhaps"],
        &["attach", "/dev/null", "--volume", "a b"],
        &["wait", "--timeout", "soon"],
        &["status", "--set", ""],
    ] {
        let ran = place.run(args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.err);
    }
}

#[test]
fn devices_are_listed_without_the_module() {
    let place = Place::new();
    let ran = place.run(&["devices", "--all", "--json"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    let rows: serde_json::Value = serde_json::from_str(&ran.out).expect("JSON");
    for row in rows.as_array().expect("a list") {
        let reasons = row["reasons"].as_array().expect("reasons");
        assert_eq!(row["usable"] == true, reasons.is_empty(), "{row}");
    }
    assert_eq!(place.run(&["devices"]).code, 0);
}

#[test]
fn spare_does_nothing_without_the_module() {
    let ran = Place::new().run(&["spare"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, ""), "{}", ran.err);
}

#[test]
fn manual_pages_are_written() {
    let place = Place::new();
    let dir = place.path("man");
    let ran = place.run(&["man", dir.to_str().expect("text")]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    for page in ["dtloop.1", "dtloop-attach.1", "dtloop-mirror-start.1"] {
        let text = std::fs::read_to_string(dir.join(page)).expect(page);
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
    }
}

#[test]
fn a_difference_has_its_own_exit_code() {
    let place = Place::new();
    let agent = place.agent(concat!(
        r#"{"reply":"progress","set":"db","devices":[{"number":1,"job":"verify","#,
        r#""pass":{"done_bytes":1,"total_bytes":2}}]}"#,
        "\n",
        r#"{"reply":"done","verify":[{"number":1,"complete":true,"compared_bytes":8192,"#,
        r#""differing_bytes":4096,"repaired_bytes":0,"from_seq":1,"to_seq":2}]}"#,
        "\n"
    ));
    let ran = place.run(&["verify", "--set", "db"]);
    assert_eq!(ran.code, 3, "{}", ran.err);
    assert!(ran.out.contains("4 KiB differ"), "{}", ran.out);
    let request = agent.join().expect("a request");
    assert_eq!(
        request,
        "{\"request\":\"verify\",\"set\":\"db\",\"devices\":[],\"repair\":false,\"follow\":true}\n"
    );
}

#[test]
fn a_wait_that_takes_too_long_has_its_own_exit_code() {
    let place = Place::new();
    let agent = place.agent(
        "{\"reply\":\"failed\",\"code\":\"timed-out\",\"message\":\"Not applied within 500ms.\"}\n",
    );
    let ran = place.run(&["wait", "--timeout", "500ms"]);
    assert_eq!(ran.code, 4, "{}", ran.err);
    assert!(ran.err.contains("Not applied within 500ms."), "{}", ran.err);
    let request = agent.join().expect("a request");
    assert!(request.contains("\"timeout_ms\":500"), "{request}");
}

#[test]
fn an_agent_that_dies_in_the_middle_is_a_failure() {
    let place = Place::new();
    let agent = place.agent("{\"reply\":\"progress\",\"set\":\"db\"}\n");
    let ran = place.run(&["mirror", "start", "--difference", "loop1"]);
    assert_eq!(ran.code, 1, "{}", ran.err);
    assert!(ran.err.contains("ended the connection"), "{}", ran.err);
    let request = agent.join().expect("a request");
    assert!(
        request.contains("\"devices\":[1],\"kind\":\"difference\""),
        "{request}"
    );
}

#[test]
fn json_passes_the_agents_lines_on() {
    let place = Place::new();
    let lines = "{\"reply\":\"done\",\"wait\":{\"seq\":9,\"elapsed_ms\":1}}\n";
    let agent = place.agent(lines);
    let ran = place.run(&["wait", "--json"]);
    assert_eq!((ran.code, ran.out.as_str()), (0, lines), "{}", ran.err);
    agent.join().expect("a request");
}

#[test]
fn pairing_says_what_is_wrong_and_changes_nothing() {
    let place = Place::new();
    let state = place.path("state");
    let state = state.to_str().expect("text");
    let ran = |args: &[&str]| place.run(&[args, &["--state-dir", state]].concat());
    // The last character is a wrong one, one is missing, and one cannot be.
    for (code, words) in [
        (
            "60RK4C-SM6MV3-EE1SC5-H66S35-85146H-258S3M-GJAAC9",
            "mistyped",
        ),
        (
            "60RK4C-SM6MV3-EE1SC5-H66S35-85146H-258S3M-GJAAC",
            "41 characters",
        ),
        ("60RK4C-SM6MV3-EE1SC5-H66S35-85146H-258S3M-GJAACU", "\"U\""),
    ] {
        let ran = ran(&["pair", "127.0.0.1:1", code]);
        assert!(ran.code == 2 && ran.err.contains(words), "{}", ran.err);
        assert!(ran.err.contains("Nothing was sent"), "{}", ran.err);
    }
    // A right one, in the form in which it may be dictated, and nobody there.
    let dictated = "6ork4c sm6mv3 eelsc5 h66s35 85146h 258s3m gjaac8";
    let words: Vec<&str> = dictated.split(' ').collect();
    let nobody = ran(&[&["pair", "127.0.0.1:1"][..], &words].concat());
    assert_eq!(nobody.code, 1, "{}", nobody.err);
    assert!(nobody.err.contains("cannot be reached"), "{}", nobody.err);
    let peers = ran(&["peers", "--json"]);
    assert_eq!(peers.code, 0, "{}", peers.err);
    assert!(peers.out.contains("\"targets\": []"), "{}", peers.out);
    let unpair = ran(&["unpair", "127.0.0.1:1"]);
    assert!(
        unpair.code == 1 && unpair.err.contains("dtloop peers"),
        "{}",
        unpair.err
    );
    let missing = place.run(&["peers", "--config", "/nonexistent.toml"]);
    assert!(missing.code != 0 && missing.err.contains("/nonexistent.toml"));
}

fn entries(place: &Place) -> String {
    std::fs::read_to_string(place.path("devices")).unwrap_or_default()
}

#[test]
fn entries_are_added_listed_checked_and_removed() {
    let place = Place::new();
    let add = ["config", "add", "/dev/nosuch", "1", "-o", "set=db,volume=v"];
    let refused = place.run(&add);
    assert_eq!(refused.code, 7, "{}", refused.err);
    assert!(refused.err.contains("does not exist"), "{}", refused.err);
    assert!(!place.path("devices").exists(), "nothing was changed");
    let mut forced = add.to_vec();
    forced.push("--force");
    assert_eq!(place.run(&forced).code, 0);
    assert_eq!(
        entries(&place),
        "/dev/nosuch\t/dev/loop1\tset=db,volume=v\n"
    );
    let list = place.run(&["config", "list", "--json"]);
    let list: serde_json::Value = serde_json::from_str(&list.out).expect("JSON");
    assert_eq!(list["entries"][0]["state"], "missing");
    assert_eq!(list["entries"][0]["set"], "db");
    let check = place.run(&["config", "check"]);
    assert_eq!(check.code, 7);
    assert!(
        check
            .out
            .contains("devices:1:1: /dev/nosuch: it does not exist"),
        "{}",
        check.out
    );
    let again = place.run(&forced);
    assert_eq!(again.code, 0, "insisted on: {}", again.err);
    assert!(again.err.contains("is in line 1 already"), "{}", again.err);
    let unclear = place.run(&["config", "remove", "loop1"]);
    assert_eq!(unclear.code, 7, "{}", unclear.err);
    assert!(unclear.err.contains("lines 1 and 2"), "{}", unclear.err);
    std::fs::write(place.path("devices"), "# mine\n/dev/nosuch 1\n").expect("a file");
    assert_eq!(place.run(&["config", "remove", "/dev/nosuch"]).code, 0);
    assert_eq!(entries(&place), "# mine\n");
    assert_eq!(place.run(&["config", "remove", "/dev/nosuch"]).code, 7);
    assert_eq!(place.run(&["config", "check"]).code, 0);
}

#[test]
fn bad_entries_on_the_command_line_are_usage_errors() {
    let place = Place::new();
    for (args, word) in [
        (&["config", "add", "vdb"][..], "whole path"),
        (&["config", "add", "SERIAL=1"], "UUID="),
        (&["config", "add", "/dev/null", "x"], "/dev/loopN"),
        (
            &["config", "add", "/dev/null", "1", "-o", "ro,ring=3"],
            "power of two",
        ),
        (
            &["config", "add", "/dev/null", "1", "-o", "encryption=des"],
            "luks2",
        ),
        (
            &[
                "config",
                "add",
                "/dev/null",
                "1",
                "-o",
                "encryption=luks2,key=geheim",
            ],
            "never the key",
        ),
        (&["attach"], "<DEVICE>"),
        (&["attach", "/dev/null", "--all"], "--all"),
        (&["attach", "--all", "--set", "db"], "--all"),
        (&["detach", "--all", "--force"], "--all"),
    ] {
        let ran = place.run(args);
        assert_eq!(ran.code, 2, "{args:?}: {}", ran.err);
        assert!(ran.err.contains(word), "{args:?}: {}", ran.err);
    }
    assert!(!place.path("devices").exists());
}

#[test]
fn an_edit_is_taken_whole_and_good_or_not_at_all() {
    let place = Place::new();
    std::fs::write(place.path("devices"), "# mine\n").expect("a file");
    let failed = place.edit("false");
    assert_eq!(failed.code, 1);
    assert!(failed.err.contains("EDITOR"), "{}", failed.err);
    assert!(place.edit("true").out.contains("nothing was changed"));
    let bad = place.edit("echo nonsense >>");
    assert_eq!(bad.code, 7, "{}", bad.err);
    assert!(bad.out.contains("devices:2:1:"), "{}", bad.out);
    assert_eq!(entries(&place), "# mine\n");
    let raced = place.edit(&format!(
        "echo '# theirs' >{}; echo '# more' >>",
        place.path("devices").display()
    ));
    assert_eq!(raced.code, 1, "{}", raced.err);
    assert_eq!(entries(&place), "# theirs\n");
    let good = place.edit("echo '# more' >>");
    assert_eq!(good.code, 0, "{}", good.err);
    assert_eq!(entries(&place), "# theirs\n# more\n");
}

#[test]
fn without_entries_there_is_nothing_to_attach_and_with_them_the_module_is_needed() {
    let place = Place::new();
    let dtmount = env!("CARGO_BIN_EXE_dtmount");
    let ran = place.run_program(dtmount, &["start"]);
    assert_eq!(ran.code, 0, "{}", ran.err);
    assert!(ran.out.contains("has no entries"), "{}", ran.out);
    std::fs::write(place.path("devices"), "/dev/nosuch 1\n").expect("a file");
    for args in [&["start"][..], &["start", "--wait", "1m"]] {
        let ran = place.run_program(dtmount, args);
        assert_eq!(ran.code, 5, "{}", ran.err);
        assert!(ran.err.contains("modprobe dtloop"), "{}", ran.err);
    }
    assert_eq!(place.run(&["attach", "--all"]).code, 5);
    assert_eq!(place.run_program(dtmount, &["stop"]).code, 0);
    assert!(
        place
            .run_program(dtmount, &["status"])
            .out
            .contains("/dev/nosuch")
    );
    assert_eq!(place.run_program(dtmount, &["--help"]).code, 0);
}
