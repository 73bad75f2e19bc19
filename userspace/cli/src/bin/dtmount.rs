// SPDX-License-Identifier: GPL-2.0-only

//! `dtmount`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    dtloop_cli::dtmount()
}
