// SPDX-License-Identifier: GPL-2.0-only

//! The command line of `dttarget`.

#![forbid(unsafe_code)]

mod peers;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use dtloop_core::set::{Consistent, Phase};
use dtloop_store as state_file;
use dtloop_target::applier::{ACCEPT_FILE, Saved};
use dtloop_target::catalog::Catalog;
use dtloop_target::config::{CONFIG_PATH, Config, ResyncPolicy, Size, VolumeConfig};
use dtloop_target::confine::confine;
use dtloop_target::replica::set_dir;
use dtloop_target::server::{Door, lock_state_dir};
use dtloop_target::settle;
use dtloop_target::volume::Volume;
use nix::sys::signal::{SigSet, Signal};
use serde::Serialize;

// What is made for the simulation is in no program.
const _: () = assert!(!dtloop_canary::HATCHED && !cfg!(feature = "simulation"));

/// Keeps copies of the block devices of other machines.
#[derive(Parser)]
#[command(name = "dttarget", version)]
struct Cli {
    /// Configuration file.
    #[arg(long, global = true, default_value = CONFIG_PATH)]
    config: PathBuf,
    /// Directory for state and journals, instead of the configured one.
    #[arg(long, global = true)]
    state_dir: Option<PathBuf>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Receive changes until SIGTERM.
    Serve {
        /// Address and port to listen on, instead of the configured one.
        #[arg(long)]
        listen: Option<String>,
    },
    /// Volumes: the copies.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Let a source in: print a code for "dtloop pair" there.
    ///
    /// The code is good for one source and for a short time. It goes by a way that you trust, for whoever has it first is let in. It
    /// also tells the source which target it must find, so that nobody in between can pose as this one. A running
    /// dttarget needs no restart.
    Invite {
        /// Name for the source; without it, the source's host name.
        #[arg(long)]
        name: Option<String>,
        /// How long the code is good: 90s, 15m, 2h or 1d, at most 7d.
        #[arg(long, value_name = "TIME", default_value = "15m", value_parser = peers::parse_lifetime)]
        expires: u64,
        /// Make all open invitations void instead.
        #[arg(long, conflicts_with_all = ["name", "expires"])]
        withdraw: bool,
        /// For programs.
        #[arg(long, conflicts_with = "withdraw")]
        json: bool,
    },
    /// List the sources that are let in.
    Peers {
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Let a source in no more. A connection that it has is ended at once; its volumes stay as they are.
    Revoke {
        /// Name of the source, as "dttarget peers" shows it.
        name: String,
    },
    /// Follow the next source of this set, although the target knows a newer or another past of it. Its volumes are
    /// overwritten where they differ.
    Accept {
        /// Name of the set.
        set: String,
        /// Identifier of the source, if several have a set of that name.
        #[arg(long)]
        source: Option<String>,
    },
    /// Read the configuration and say what is wrong with it.
    CheckConfig,
}

#[derive(Subcommand)]
enum VolumeCommand {
    /// Make an image file, or take a block device, and enter it in the configuration.
    Create {
        /// Name of the volume.
        name: String,
        /// Image file or block device.
        #[arg(long)]
        path: PathBuf,
        /// Size of the image file, for example 2GiB.
        #[arg(long)]
        size: Option<Size>,
    },
    /// List the volumes and whom they belong to.
    List {
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Say what the volumes are worth, as of the last checkpoint.
    Status {
        /// One volume only.
        name: Option<String>,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Bring the last consistent state of a set into its volumes, to use them here: after the loss of the source, for
    /// example. The source may not overwrite them until they are unbound. Stop dttarget first.
    Settle {
        /// Name of one of the volumes.
        name: String,
        /// Read neither the staging area nor the journal; for a staging area that is lost.
        #[arg(long)]
        discard_staged: bool,
        /// For programs.
        #[arg(long)]
        json: bool,
    },
    /// Take a volume that was changed or replaced, to be overwritten where it differs. Stop dttarget first.
    Accept {
        /// Name of the volume.
        name: String,
    },
    /// End the ownership of a volume, so that another source can have it. Stop dttarget first.
    Unbind {
        /// Name of the volume.
        name: String,
    },
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
            eprintln!("dttarget: {error:#}.");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    if let Command::Volume(VolumeCommand::Create { name, path, size }) = &cli.command {
        return create(&cli.config, name, path, *size);
    }
    let mut config = Config::load(&cli.config)?;
    if let Some(dir) = &cli.state_dir {
        config.state_dir.clone_from(dir);
    }
    match &cli.command {
        Command::Serve { listen } => {
            if let Some(listen) = listen {
                config.listen.clone_from(listen);
            }
            serve(&config, &cli.config)
        }
        Command::Invite { withdraw: true, .. } => peers::withdraw(&config),
        Command::Invite {
            name,
            expires,
            json,
            ..
        } => peers::invite(&config, name.as_deref(), *expires, *json),
        Command::Peers { json } => peers::list(&config, *json),
        Command::Revoke { name } => peers::revoke(&config, name),
        Command::CheckConfig => {
            println!(
                "{} is usable: {} volumes.",
                cli.config.display(),
                config.volumes.len()
            );
            Ok(())
        }
        Command::Volume(VolumeCommand::Create { .. }) => Ok(()),
        Command::Volume(
            VolumeCommand::List { json } | VolumeCommand::Status { name: None, json },
        ) => show(&config, None, *json),
        Command::Volume(VolumeCommand::Status { name, json }) => {
            show(&config, name.as_deref(), *json)
        }
        Command::Volume(VolumeCommand::Settle {
            name,
            discard_staged,
            json,
        }) => settle(&config, name, *discard_staged, *json),
        Command::Volume(VolumeCommand::Unbind { name }) => unbind(&config, name),
        Command::Volume(VolumeCommand::Accept { name }) => accept_volume(&config, name),
        Command::Accept { set, source } => accept(&config, set, source.as_deref()),
    }
}

fn serve(config: &Config, config_path: &Path) -> Result<()> {
    // Blocked before any thread exists, so that only the wait below receives them.
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT]);
    signals.thread_block()?;
    let door = Door::open(config.clone())?;
    // Before there are other threads, and after all that needs more.
    confine(config, config_path)?;
    let server = door.serve()?;
    let signal = signals.wait()?;
    tracing::info!("{signal}: the volumes are made durable, then dttarget ends.");
    server.stop(false);
    Ok(())
}

fn create(config_path: &Path, name: &str, path: &Path, size: Option<Size>) -> Result<()> {
    let path = std::path::absolute(path)?;
    let text = match std::fs::read_to_string(config_path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!(
                "{} does not exist; write it with at least: listen = \"0.0.0.0:7788\"",
                config_path.display()
            )
        }
        Err(error) => {
            return Err(error).with_context(|| format!("Cannot read {}", config_path.display()));
        }
    };
    let mut entry = format!(
        "\n[[volume]]\nname = {name:?}\npath = {:?}\n",
        path.display().to_string()
    );
    if let Some(size) = size {
        ensure!(size.0 % 512 == 0, "The size is not a multiple of 512");
        entry += &format!("size = {}\n", size.0);
    }
    let text = if text.is_empty() || text.ends_with('\n') {
        text + &entry
    } else {
        text + "\n" + &entry
    };
    Config::parse(&text)?;
    let volume = Volume::open(&VolumeConfig {
        name: name.to_owned(),
        path: path.clone(),
        size,
        resync: ResyncPolicy::Staged,
    })?;
    let temporary = config_path.with_extension("toml.new");
    let write = || -> std::io::Result<()> {
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, config_path)
    };
    write().with_context(|| format!("Cannot write {}", config_path.display()))?;
    println!(
        "Volume \"{name}\" is {} with {} bytes. Restart dttarget to use it.",
        path.display(),
        volume.bytes()
    );
    Ok(())
}

/// A volume as it is shown.
#[derive(Serialize)]
struct Shown {
    name: String,
    path: PathBuf,
    source_id: Option<String>,
    set: Option<String>,
    state: &'static str,
    reason: Option<String>,
    in_sync: bool,
    applied_seq: Option<u64>,
    order_lost_from: Option<u64>,
    order_lost_to: Option<u64>,
    /// `staged`, `publishing`, or nothing.
    staging: Option<&'static str>,
    /// The last consistent state, once the present one is none.
    consistent_at_seq: Option<u64>,
    consistent_at_time: Option<String>,
}

fn shown(config: &Config, catalog: &Catalog, volume: &VolumeConfig) -> Result<Shown> {
    let mut shown = Shown {
        name: volume.name.clone(),
        path: volume.path.clone(),
        source_id: None,
        set: None,
        state: "unbound",
        reason: None,
        in_sync: false,
        applied_seq: None,
        order_lost_from: None,
        order_lost_to: None,
        staging: None,
        consistent_at_seq: None,
        consistent_at_time: None,
    };
    let Some(owner) = catalog.owner(&volume.name)? else {
        return Ok(shown);
    };
    shown.source_id = Some(owner.source_id.to_string());
    shown.set = Some(owner.set.clone());
    shown.state = "bound";
    let path = set_dir(&config.state_dir, owner.source_id, &owner.set).join("state");
    let Some(saved) = state_file::load::<Saved>(&path)? else {
        return Ok(shown);
    };
    let state = saved.state;
    shown.applied_seq = Some(state.applied_seq);
    if let Some(item) = state.volumes.get(&volume.name) {
        use dtloop_core::set::Sync;
        shown.in_sync = state.in_sync(&volume.name);
        let alarm = item.alarm.as_ref().map(|alarm| &alarm.text);
        let reason = item.refused.as_ref().map(|(_, text)| text).or(alarm);
        shown.reason = reason.cloned();
        let phase = state.phase_of(&volume.name);
        let staged = state
            .stage
            .as_ref()
            .filter(|_| phase == Some(Phase::Staged));
        let consistent = staged.map(|stage| stage.since).or(item.consistent);
        shown.consistent_at_seq = consistent.map(|moment| moment.seq);
        shown.consistent_at_time = consistent.map(|moment| settle::utc(moment.time_ns));
        shown.staging = phase.map(|phase| match phase {
            Phase::Staged => "staged",
            Phase::Publishing => "publishing",
        });
        shown.state = match item.sync {
            _ if item.refused.is_some() => "refused",
            Sync::Unmirrored => "unmirrored",
            Sync::Mirroring => "mirror in progress",
            Sync::Mirrored if item.alarm.is_some() => "verify needed",
            Sync::Mirrored if state.lost.is_some() => "order lost",
            Sync::Mirrored => "in sync",
        };
        if item.sync == Sync::Mirrored {
            shown.order_lost_from = state.lost.map(|lost| lost.from);
            shown.order_lost_to = state.lost.map(|lost| lost.last);
        }
    }
    Ok(shown)
}

fn show(config: &Config, name: Option<&str>, json: bool) -> Result<()> {
    let catalog = Catalog::new(&config.state_dir, config.volumes.clone());
    let chosen = catalog
        .volumes()
        .iter()
        .filter(|volume| name.is_none_or(|name| volume.name == name));
    let rows = chosen
        .map(|volume| shown(config, &catalog, volume))
        .collect::<Result<Vec<_>>>()?;
    if let Some(name) = name.filter(|_| rows.is_empty()) {
        bail!("There is no volume \"{name}\" in the configuration");
    }
    let mut out = std::io::stdout().lock();
    if json {
        serde_json::to_writer_pretty(&mut out, &rows)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(
        out,
        "{:<20} {:<18} {:<16} {:>12}  PATH",
        "VOLUME", "STATE", "SET", "APPLIED"
    )?;
    for row in rows {
        let applied = row
            .applied_seq
            .map_or_else(|| "-".to_owned(), |seq| seq.to_string());
        let set = row.set.as_deref().unwrap_or("-");
        writeln!(
            out,
            "{:<20} {:<18} {set:<16} {applied:>12}  {}",
            row.name,
            row.state,
            row.path.display()
        )?;
        if let Some(reason) = row.reason {
            writeln!(out, "    {reason}")?;
        }
        match (row.staging, row.consistent_at_seq, row.consistent_at_time) {
            (Some("staged"), Some(seq), Some(time)) => {
                writeln!(
                    out,
                    "    staged: keeps its state of record {seq}, made {time}"
                )?;
            }
            (Some("publishing"), ..) => writeln!(
                out,
                "    publishing: run \"dttarget volume settle {}\" to use it without dttarget serve",
                row.name
            )?,
            _ => {}
        }
        if let (Some(from), Some(to)) = (row.order_lost_from, row.order_lost_to) {
            writeln!(out, "    order lost from record {from} to {to}")?;
        }
    }
    Ok(())
}

fn settle(config: &Config, name: &str, discard_staged: bool, json: bool) -> Result<()> {
    peers::act_as_owner(&config.state_dir)?;
    let settled = settle::settle(config, name, discard_staged)?;
    let mut out = std::io::stdout().lock();
    if json {
        let volume = |(name, moment): (&String, &Option<Consistent>)| {
            serde_json::json!({
                "name": name,
                "seq": moment.map(|moment| moment.seq),
                "stream": moment.map(|moment| moment.stream_uuid.to_string()),
                "time": moment.map(|moment| settle::utc(moment.time_ns)),
            })
        };
        let report = serde_json::json!({
            "set": settled.set,
            "left_out": settled.left_out,
            "volumes": settled.volumes.iter().map(volume).collect::<Vec<_>>(),
        });
        writeln!(out, "{report}")?;
        return Ok(());
    }
    for (name, moment) in &settled.volumes {
        match moment {
            Some(moment) => writeln!(
                out,
                "Volume \"{name}\" holds the source's state at record {}, made {}.",
                moment.seq,
                settle::utc(moment.time_ns)
            )?,
            None => writeln!(
                out,
                "Volume \"{name}\" holds no state of the source: a mirror or resync into it was not complete."
            )?,
        }
    }
    if settled.left_out {
        writeln!(
            out,
            "Later changes were received, but not all of them; they are left out."
        )?;
    }
    writeln!(
        out,
        "The volumes can be used. The source may not overwrite them until they are unbound."
    )?;
    Ok(())
}

/// Leaves word for the set, whether dttarget runs or not.
fn accept(config: &Config, set: &str, source: Option<&str>) -> Result<()> {
    peers::act_as_owner(&config.state_dir)?;
    let sets = config.state_dir.join("sets");
    let mut found = vec![];
    for entry in
        std::fs::read_dir(&sets).with_context(|| format!("Cannot read {}", sets.display()))?
    {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        // Names of sets may have dots, identifiers have none.
        if let Some((name, id)) = name.rsplit_once('.') {
            if name == set && source.is_none_or(|source| id.starts_with(source)) {
                found.push((id.to_owned(), entry.path()));
            }
        }
    }
    let (id, dir) = match &found[..] {
        [] => bail!("No source has a set \"{set}\" here"),
        [one] => one,
        _ => bail!(
            "{} sources have a set \"{set}\"; name one with --source",
            found.len()
        ),
    };
    std::fs::write(dir.join(ACCEPT_FILE), [])?;
    state_file::sync_dir(dir)?;
    println!(
        "The next source {id} with a set \"{set}\" is followed, whatever its past. What differs is overwritten."
    );
    Ok(())
}

fn accept_volume(config: &Config, name: &str) -> Result<()> {
    peers::act_as_owner(&config.state_dir)?;
    let _lock = lock_state_dir(&config.state_dir)?;
    let catalog = Catalog::new(&config.state_dir, config.volumes.clone());
    let Some(owner) = catalog.owner(name)? else {
        bail!("Volume \"{name}\" belongs to nobody, so there is nothing to accept")
    };
    if owner.released {
        bail!(
            "Volume \"{name}\" is settled, and used here; to let a source have it, run \"dttarget volume unbind {name}\""
        )
    }
    let path = set_dir(&config.state_dir, owner.source_id, &owner.set).join("state");
    let Some(mut saved) = state_file::load::<Saved>(&path)? else {
        bail!("Nothing is known of volume \"{name}\"")
    };
    saved.state.accept_volume(name);
    state_file::store(&path, &saved)?;
    println!(
        "Volume \"{name}\" is taken as it is now. The source compares it when it connects, and overwrites what differs."
    );
    Ok(())
}

fn unbind(config: &Config, name: &str) -> Result<()> {
    peers::act_as_owner(&config.state_dir)?;
    let _lock = lock_state_dir(&config.state_dir)?;
    let catalog = Catalog::new(&config.state_dir, config.volumes.clone());
    let Some(owner) = catalog.owner(name)? else {
        bail!("Volume \"{name}\" belongs to nobody")
    };
    // What is known of the set must no longer speak of the volume either.
    let path = set_dir(&config.state_dir, owner.source_id, &owner.set).join("state");
    if let Some(mut saved) = state_file::load::<Saved>(&path)? {
        saved.state.remove(name);
        state_file::store(&path, &saved)?;
    }
    catalog
        .unbind(name)
        .with_context(|| format!("Cannot unbind volume \"{name}\""))?;
    println!(
        "Volume \"{name}\" no longer belongs to set \"{}\" of source {}.",
        owner.set, owner.source_id
    );
    Ok(())
}
