// SPDX-License-Identifier: GPL-2.0-only

//! The story that is being played: its name, its directory, its remarks.

use std::io::Write;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Instant;

static BEGIN: OnceLock<Instant> = OnceLock::new();

/// Name of the running story. The test runner names its threads by the test.
pub(crate) fn name() -> String {
    std::thread::current()
        .name()
        .unwrap_or("story")
        .replace("::", ".")
}

/// Seconds since the run began.
pub(crate) fn elapsed() -> f64 {
    BEGIN.get_or_init(Instant::now).elapsed().as_secs_f64()
}

/// Prints a remark with the time since the run began; not captured by the test runner.
pub fn note(text: impl AsRef<str>) {
    let elapsed = elapsed();
    // A remark that cannot be printed is no reason to fail.
    let _ = writeln!(
        std::io::stderr(),
        "[{elapsed:6.1}] {}: {}",
        name(),
        text.as_ref()
    );
}

/// Where the running story keeps its logs, consoles and disks.
pub fn run_dir() -> PathBuf {
    let base = std::env::var_os("DTLOOP_RUN_DIR")
        .map_or_else(|| std::env::temp_dir().join("dtloop-runs"), PathBuf::from);
    base.join(name())
}

/// Whether the long form of the stories is wanted (`DTLOOP_FULL=1`).
pub fn full_run() -> bool {
    std::env::var_os("DTLOOP_FULL").is_some_and(|value| value == "1")
}
