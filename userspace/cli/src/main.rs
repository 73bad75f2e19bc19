// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop`: the command line of DTLOOP, for people and scripts.
//!
//! - `args`: what can be typed.
//! - `commands`: one file for each command: what is done, in order.
//! - `system`: what the machine says about its block devices; reads only.
//! - `preflight`: what speaks against attaching a device; pure.
//! - `stock`: living beside the stock loop driver.
//! - `output`, `size`, `rate`: how things are shown.
//! - `exit`: exit codes.

mod args;
mod clock;
mod commands;
mod exit;
mod output;
mod preflight;
mod rate;
mod size;
mod stock;
mod system;

use std::process::ExitCode;

use clap::Parser;

use crate::args::Cli;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match commands::run(&cli) {
        Ok(code) => code.into(),
        Err(error) => {
            output::error(&error);
            exit::Code::of(&error).into()
        }
    }
}
