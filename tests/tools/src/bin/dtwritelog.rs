// SPDX-License-Identifier: GPL-2.0-only

//! Reads logs of the device-mapper target `log-writes`: replays them, and compares those of a source and its copy.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser};
use dtloop_tools::write_history::{History, Image, SECTOR};
use dtloop_tools::write_log::{Entry, WriteLog};
use serde_json::json;

#[derive(Debug, Parser)]
enum Command {
    /// Write what the device was after so many entries to a file
    Replay {
        log: PathBuf,
        #[arg(long)]
        image: PathBuf,
        /// Size of the device in bytes
        #[arg(long)]
        bytes: u64,
        /// Number of entries
        #[arg(long)]
        through: u64,
    },
    /// Prove that the copy is a state that a crash could have left of the source, at every flush of the copy
    Compare(Compare),
}

#[derive(Args, Debug)]
struct Compare {
    #[arg(long)]
    source: PathBuf,
    #[arg(long)]
    target: PathBuf,
    /// From this mark of the copy on: before it was complete it is no state
    #[arg(long)]
    from_mark: String,
    /// Leaves a write of the copy out, so many entries behind the mark: the canary
    #[arg(long)]
    leave_out: Option<u64>,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Replay {
            log,
            image,
            bytes,
            through,
        } => replay(&log, &image, bytes, through),
        Command::Compare(args) => compare(&args),
    }
}

fn replay(log: &Path, image: &Path, bytes: u64, through: u64) -> Result<()> {
    let mut log = WriteLog::open(log)?;
    let file = File::create(image).with_context(|| format!("cannot make {}", image.display()))?;
    file.set_len(bytes)?;
    for _ in 0..through {
        let (entry, data) = log.next_entry()?.context("the log is shorter")?;
        refuse_discard(&entry)?;
        ensure!(
            entry.start + entry.bytes <= bytes,
            "{entry:?} is behind the device's end"
        );
        file.write_all_at(data, entry.start)?;
    }
    Ok(())
}

/// What a discarded range shows is not in a log.
fn refuse_discard(entry: &Entry) -> Result<()> {
    ensure!(!entry.discard, "the log has a discard: {entry:?}");
    Ok(())
}

fn compare(args: &Compare) -> Result<()> {
    let mut history = History::default();
    let mut log = WriteLog::open(&args.source)?;
    while let Some((entry, data)) = log.next_entry()? {
        refuse_discard(&entry)?;
        if entry.flush {
            history.flush();
        }
        if !data.is_empty() {
            history.write(entry.start / SECTOR as u64, data);
        }
    }
    let mut log = WriteLog::open(&args.target)?;
    let (mut image, mut number) = (Image::default(), 0);
    let (mut marked_at, mut reached) = (None, 0);
    let mut flushes = Vec::new();
    while let Some((entry, data)) = log.next_entry()? {
        number += 1;
        refuse_discard(&entry)?;
        let marked = entry.mark.as_ref() == Some(&args.from_mark);
        if marked {
            marked_at = Some(number);
        }
        if marked || (entry.flush && marked_at.is_some()) {
            match history.legal_at(&image) {
                Ok(legal) if *legal.end() >= reached => {
                    reached = (*legal.start()).max(reached);
                    flushes.push(
                        json!({ "entries": number, "from": legal.start(), "to": legal.end() }),
                    );
                }
                Ok(legal) => bail!(
                    "at entry {number} the copy is back at flush {} of the source; it was at {reached}",
                    legal.end()
                ),
                Err(why) => bail!("not a legal prefix at entry {number}: {why}"),
            }
        }
        let behind = marked_at.map(|at| number - at);
        if !data.is_empty() && (args.leave_out.is_none() || behind != args.leave_out) {
            image.write(entry.start / SECTOR as u64, data);
        }
    }
    ensure!(
        marked_at.is_some(),
        "the copy has no mark {}",
        args.from_mark
    );
    println!(
        "{}",
        json!({ "source_flushes": history.flushes(), "target_flushes": flushes })
    );
    Ok(())
}
