// SPDX-License-Identifier: GPL-2.0-only

//! `dtmount`: attaches and detaches the entries of `/etc/DT/dtloop_devices`; run by `dtmount.service`.

use std::process::ExitCode;

use clap::Parser;

use crate::args::{AttachAll, DetachAll, Global};
use crate::commands::{Context, fleet};
use crate::exit::{self, Code};

/// Attach and detach the devices of /etc/DT/dtloop_devices
///
/// dtmount.service runs it when the machine starts and stops. dtloop attach --all and
/// dtloop detach --all do the same.
#[derive(Debug, Parser)]
#[command(name = "dtmount", version, after_help = exit::HELP, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Attach all entries that are not attached
    Start(AttachAll),
    /// Unmount what is mounted of them, and detach all entries
    Stop(DetachAll),
    /// Show the entries and what each is attached to
    Status,
}

/// Runs `dtmount`.
#[must_use]
pub fn dtmount() -> ExitCode {
    let cli = Cli::parse();
    crate::finish(run(&cli))
}

fn run(cli: &Cli) -> anyhow::Result<Code> {
    let context = Context::new(&cli.global);
    match &cli.action {
        Action::Start(args) => fleet::attach_all(&context, args),
        Action::Stop(args) => fleet::detach_all(&context, args, true),
        Action::Status => fleet::list(&context),
    }
}
