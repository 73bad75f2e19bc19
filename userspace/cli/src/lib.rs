// SPDX-License-Identifier: GPL-2.0-only

//! The command lines of DTLOOP for people and scripts, `dtloop` and `dtmount`.
//!
//! - `args`: what can be typed.
//! - `commands`: one file for each command: what is done, in order.
//! - `output`, `rate`: how things are shown.
//! - `exit`: exit codes.
//!
//! What is done to the devices of this machine is in `dtloop_manage`.

mod args;
mod clock;
mod commands;
mod dtmount;
mod exit;
mod output;
mod rate;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;

pub use dtmount::dtmount;

/// Runs `dtloop`.
#[must_use]
pub fn dtloop() -> ExitCode {
    let cli = Cli::parse();
    finish(commands::run(&cli))
}

/// Tells of an error, and gives the exit code.
fn finish(result: anyhow::Result<exit::Code>) -> ExitCode {
    match result {
        Ok(code) => code.into(),
        Err(error) => {
            output::error(&error);
            exit::Code::of(&error).into()
        }
    }
}
