// SPDX-License-Identifier: GPL-2.0-only

//! The commands, and what they share.

mod attach;
mod config;
mod detach;
mod devices;
pub(crate) mod fleet;
mod intent;
mod jobs;
mod peers;
mod progress;
mod resize;
mod shaping;
mod status;
mod verify_log;

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::CommandFactory;
use dtloop_abi::Control;
use dtloop_api::Client;
use dtloop_manage::Manager;
use dtloop_manage::system::System;

use crate::args::{Cli, Command, Global};
use crate::exit::Code;
use crate::output;

/// Runs what was typed.
pub(crate) fn run(cli: &Cli) -> anyhow::Result<Code> {
    let context = Context::new(&cli.global);
    match &cli.command {
        Command::Devices(args) => devices::run(&context, args),
        Command::Attach(args) => attach::run(&context, args),
        Command::Detach(args) => detach::run(&context, args),
        Command::Config(args) => config::run(&context, args),
        Command::Status(args) => status::run(&context, args),
        Command::Resize(args) => resize::run(&context, args),
        Command::Set(args) => resize::set(&context, args),
        Command::Mirror(args) => jobs::mirror(&context, args),
        Command::Verify(args) => jobs::verify(&context, args),
        Command::Resync(args) => jobs::resync(&context, args),
        Command::Wait(args) => jobs::wait(&context, args),
        Command::Bandwidth(args) => shaping::run(&context, args),
        Command::Pair(args) => peers::pair(&context, args),
        Command::Peers(args) => peers::list(&context, args),
        Command::Unpair(args) => peers::unpair(&context, args),
        Command::Spare => context.manager.spare().map(|()| Code::Done),
        Command::Man { dir } => man(dir),
    }
}

/// What every command works with.
pub(crate) struct Context<'a> {
    pub(crate) manager: Manager,
    pub(crate) global: &'a Global,
}

impl<'a> Context<'a> {
    pub(crate) fn new(global: &'a Global) -> Self {
        Self {
            manager: Manager {
                system: System::new(),
                control: global.control.clone(),
                run_dir: global.run_dir.clone(),
                notes: output::note,
            },
            global,
        }
    }

    /// The module.
    pub(crate) fn control(&self) -> dtloop_abi::Result<Control> {
        self.manager.control()
    }

    /// The agent.
    pub(crate) fn agent(&self) -> Result<Client, dtloop_api::ClientError> {
        Client::connect_path(&self.global.socket)
    }
}

fn man(dir: &PathBuf) -> anyhow::Result<Code> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    clap_mangen::generate_to(Cli::command(), dir)
        .with_context(|| format!("Cannot write to {}", dir.display()))?;
    Ok(Code::Done)
}
