// SPDX-License-Identifier: GPL-2.0-only

//! The command line of `dtagent`.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use clap::{Parser, Subcommand};
use dtloop_agent::config::{CONFIG_PATH, Config};
use dtloop_agent::control::{self, Sets};
use dtloop_agent::machine::{self, Machine};
use dtloop_agent::set::{SetShared, Worker};
use dtloop_agent::streams::{KernelStreams, Streams};
use dtloop_store::Hold;
use nix::sys::signal::{SigSet, Signal};

// What is made for the simulation is in no program.
const _: () = assert!(!dtloop_canary::HATCHED && !cfg!(feature = "simulation"));

/// Ships the changes of this machine's block devices to their targets.
#[derive(Parser)]
#[command(name = "dtagent", version)]
struct Cli {
    /// Configuration file.
    #[arg(long, global = true, default_value = CONFIG_PATH)]
    config: PathBuf,
    /// Directory for state, instead of the configured one.
    #[arg(long, global = true)]
    state_dir: Option<PathBuf>,
    /// Control socket, instead of the configured one.
    #[arg(long, global = true)]
    socket: Option<PathBuf>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Ship changes until SIGTERM. The default.
    Run,
    /// Read the configuration and say what is wrong with it.
    CheckConfig,
    /// Who this source is, when its disk was moved or copied. Stop dtagent first.
    #[command(subcommand)]
    Identity(Identity),
}

#[derive(Subcommand)]
enum Identity {
    /// Say who it is.
    Show,
    /// The source was moved to this machine: it stays who it is.
    Keep,
    /// This is a copy of a source: it becomes one of its own, and its devices need volumes of their own.
    Renew,
}

fn main() -> ExitCode {
    let terminal = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(terminal);
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    builder.with_env_filter(filter).init();
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("dtagent: {error:#}.");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let mut config = Config::load(&cli.config)?;
    if let Some(dir) = &cli.state_dir {
        config.state_dir.clone_from(dir);
    }
    if let Some(socket) = &cli.socket {
        config.socket.clone_from(socket);
    }
    match &cli.command {
        Some(Command::CheckConfig) => {
            println!(
                "{} is usable: {} sets.",
                cli.config.display(),
                config.sets.len()
            );
            Ok(())
        }
        Some(Command::Identity(command)) => identity(&config.state_dir, command),
        None | Some(Command::Run) => serve(&config),
    }
}

fn identity(dir: &Path, command: &Identity) -> Result<()> {
    let machine = Machine::look(Path::new("/"));
    let _lock = lock(dir)?;
    match command {
        Identity::Show => println!("{}", machine::claim(dir, machine)?),
        Identity::Keep => println!("This machine is source {}.", machine::keep(dir, &machine)?),
        Identity::Renew => println!(
            "This machine is source {} now, and paired with nobody. Attach its devices with names of volumes of their own, and pair it with dtloop pair.",
            machine::renew(dir, &machine)?
        ),
    }
    Ok(())
}

/// One process at a time uses the state.
fn lock(dir: &Path) -> Result<Hold> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    let hold = dtloop_store::hold(dir, dtloop_store::DYING);
    hold.with_context(|| format!("Cannot use {}", dir.display()))?
        .ok_or_else(|| {
            anyhow!(
                "{} is in use by another dtagent; stop that first",
                dir.display()
            )
        })
}

fn serve(config: &Config) -> Result<()> {
    // Blocked before any thread exists, so that only the wait below receives them.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    if let Err(errno) = dtloop_abi::serve_block_io() {
        tracing::warn!(
            "dtagent may have to wait for memory that its own devices hold ({errno}): run it as root, or with \
             CAP_IPC_LOCK and CAP_SYS_RESOURCE, before a set gets the policy block."
        );
    }
    let dir = &config.state_dir;
    let _lock = lock(dir)?;
    let source_id = machine::claim(dir, Machine::look(Path::new("/")))?;
    let listener = control::listen(&config.socket)?;
    let streams: Arc<dyn Streams> = Arc::new(KernelStreams);
    let (mut sets, mut threads) = (BTreeMap::new(), vec![]);
    for set in &config.sets {
        let shared = Arc::new(SetShared::new(set)?);
        let worker = Worker::new(
            set.clone(),
            dir,
            source_id,
            Arc::clone(&streams),
            Arc::clone(&shared),
        )?;
        let worker = match config.socket.parent() {
            Some(run_dir) => worker.with_run_dir(run_dir),
            None => worker,
        };
        let thread = std::thread::Builder::new().name(format!("set {}", set.name));
        threads.push(thread.spawn(move || worker.run())?);
        sets.insert(set.name.clone(), shared);
    }
    tracing::info!("Source {source_id} has {} sets.", sets.len());
    let sets = Arc::new(Sets {
        sets,
        started_unix_ms: control::now_unix_ms(),
    });
    let serving = Arc::clone(&sets);
    std::thread::Builder::new()
        .name("listen".into())
        .spawn(move || control::serve(&listener, &serving))?;
    let signal = signals.wait()?;
    tracing::info!("{signal}: dtagent ends. What was not acknowledged stays in the kernel.");
    for shared in sets.sets.values() {
        shared.stop();
    }
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("The thread of a set ended with a panic.");
        }
    }
    // Somebody else may have removed it.
    let _ = fs::remove_file(&config.socket);
    Ok(())
}
