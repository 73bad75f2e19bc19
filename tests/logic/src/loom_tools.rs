// SPDX-License-Identifier: GPL-2.0-only

//! How models are run under loom.

use std::{env, process::Command};

/// How often a thread may be interrupted where it need not stop, unless `LOOM_MAX_PREEMPTIONS` says
/// otherwise. What is wrong in protocols like these shows with one or two; one more takes five times as long.
const PREEMPTIONS: usize = 2;

/// Set to the name of the canary that a child process is to run.
const CHILD: &str = "DTLOOP_LOGIC_CANARY";

/// Runs `model` in every interleaving, up to [`PREEMPTIONS`].
pub(crate) fn explore(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(PREEMPTIONS);
    builder.check(model);
}

/// Some interleaving of `model` must fail with `complaint`: a model that lacks a step shows that the
/// step is needed, and that the tests would notice. See [`canary`].
///
/// In a process of its own, as loom, when it has found something, may fail once more while it takes its
/// threads down, and that aborts.
pub(crate) fn must_fail(test: &str, complaint: &str, model: impl Fn() + Sync + Send + 'static) {
    let test = test.split_once("::").map_or(test, |(_crate, test)| test);
    if env::var_os(CHILD).is_some_and(|name| name == test) {
        explore(model);
        return;
    }
    let child = Command::new(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, test)
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr);
    assert!(!child.status.success(), "the broken variant passed");
    assert!(said.contains(complaint), "not '{complaint}', but:\n{said}");
}

/// A test that passes when the model fails with a message that contains the complaint.
macro_rules! canary {
    ($name:ident, $complaint:expr, $model:expr) => {
        #[test]
        fn $name() {
            let test = concat!(module_path!(), "::", stringify!($name));
            $crate::loom_tools::must_fail(test, $complaint, || $model);
        }
    };
}
pub(crate) use canary;

/// Complaint of a model in which a thread sleeps for ever.
pub(crate) const ASLEEP: &str = "deadlock; threads =";

/// Complaint of a model in which memory is touched by two at a time.
pub(crate) const RACE: &str = "Causality violation";
