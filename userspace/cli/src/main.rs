// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    dtloop_cli::dtloop()
}
