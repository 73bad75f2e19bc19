// SPDX-License-Identifier: GPL-2.0-only

//! Writes stamped sectors, and proves that an image shows a legal prefix of what was written.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, Parser};
use dtloop_tools::direct::{Aligned, open_read, open_write, size};
use dtloop_tools::stamp::{SECTOR, Shown, Stamp, Write, check};
use dtloop_tools::stamp_plan::{Plan, Shape};
use dtloop_tools::stop;
use nix::libc;
use serde_json::json;

/// Most writes that are predicted: a damaged stamp must not have this go on for ever.
const WRITES_MAX: u64 = 10_000_000;

#[derive(Debug, Parser)]
enum Command {
    /// Write until a signal comes, or as much as is asked for
    Write(WriteArgs),
    /// Check an image
    Check(CheckArgs),
}

#[derive(Args, Debug)]
struct WriteArgs {
    /// The block devices; one log for all of them
    #[arg(required = true)]
    devices: Vec<PathBuf>,
    /// Where to write the log in the end; of the device number K, to LOG.K
    #[arg(long)]
    log: Option<PathBuf>,
    #[command(flatten)]
    shape: Shape,
    /// Run of the writer, from 1; earlier stamps count as the beginning
    #[arg(long, default_value_t = 1)]
    generation: u32,
    /// Writes in all; 0: no end
    #[arg(long, default_value_t = 0)]
    writes: u64,
    #[arg(long)]
    seconds: Option<u64>,
    /// Most writes a second, of all threads together; 0: as many as go
    #[arg(long, default_value_t = 0)]
    per_second: u64,
    /// Goes on after errors
    #[arg(long)]
    tolerate: bool,
}

#[derive(Args, Debug)]
struct CheckArgs {
    /// The images of all the devices that the log is of, in its order
    #[arg(required = true)]
    images: Vec<PathBuf>,
    #[arg(long, required_unless_present = "predict")]
    log: Option<PathBuf>,
    /// Without a log, which a power cut takes along: what one thread with these options has written
    #[arg(long, conflicts_with_all = ["log", "complete"])]
    predict: bool,
    #[command(flatten)]
    shape: Shape,
    #[arg(long, default_value_t = 1)]
    generation: u32,
    /// Everything that ended has to be there
    #[arg(long)]
    complete: bool,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Write(args) => write(&args),
        Command::Check(args) => check_image(&args),
    }
}

/// What the threads share.
struct Shared<'a> {
    args: &'a WriteArgs,
    tick: AtomicU64,
    next: AtomicU64,
    sectors: Vec<u64>,
    block: u64,
    begin: Instant,
}

impl Shared<'_> {
    fn tick(&self) -> u64 {
        self.tick.fetch_add(1, Ordering::SeqCst)
    }

    fn goes_on(&self, write: u64) -> bool {
        let over = self.args.writes != 0 && write > self.args.writes;
        let limit = self.args.seconds.map(Duration::from_secs);
        !over && !stop::requested() && limit.is_none_or(|limit| self.begin.elapsed() < limit)
    }

    /// Waits until it is this write's turn.
    fn pace(&self, write: u64) {
        if let Some(due) = (write * 1_000_000).checked_div(self.args.per_second) {
            thread::sleep(Duration::from_micros(due).saturating_sub(self.begin.elapsed()));
        }
    }
}

/// What a thread did on each device.
struct Log {
    writes: Vec<Vec<Write>>,
    errors: u64,
    flushes: u64,
    /// The longest write or flush.
    slowest: Duration,
}

fn write(args: &WriteArgs) -> Result<()> {
    stop::listen()?;
    let mut sectors = Vec::new();
    let mut block = SECTOR as u64;
    for device in &args.devices {
        sectors.push(size(&mut open_read(device)?)? / SECTOR as u64);
        block = block.max(block_bytes(device)?);
    }
    let shared = Shared {
        args,
        tick: AtomicU64::new(1),
        next: AtomicU64::new(1),
        sectors,
        block: block / SECTOR as u64,
        begin: Instant::now(),
    };
    let logs = thread::scope(|scope| {
        let writers: Vec<_> = (0..args.shape.threads)
            .map(|index| {
                scope.spawn({
                    let shared = &shared;
                    move || writer(shared, index)
                })
            })
            .collect();
        writers
            .into_iter()
            .map(|writer| writer.join().map_err(|_| anyhow!("a writer panicked"))?)
            .collect::<Result<Vec<Log>>>()
    })?;
    if let Some(log) = &args.log {
        write_log(log, args.devices.len(), &logs)?;
    }
    let total = |count: fn(&Log) -> u64| logs.iter().map(count).sum::<u64>();
    println!(
        "{}",
        json!({
            "writes": total(|log| log.writes.iter().map(|writes| writes.len() as u64).sum()),
            "errors": total(|log| log.errors),
            "flushes": total(|log| log.flushes),
            "slowest_ms": logs.iter().map(|log| log.slowest.as_millis()).max(),
        })
    );
    Ok(())
}

fn write_log(log: &Path, devices: usize, logs: &[Log]) -> Result<()> {
    for index in 0..devices {
        let mut file = std::io::BufWriter::new(File::create(format!("{}.{index}", log.display()))?);
        for write in logs
            .iter()
            .filter_map(|log| log.writes.get(index))
            .flatten()
        {
            writeln!(file, "{write}")?;
        }
        file.flush()?;
    }
    Ok(())
}

fn block_bytes(device: &Path) -> Result<u64> {
    let name = device
        .file_name()
        .context("no name")?
        .to_string_lossy()
        .into_owned();
    let text = fs::read_to_string(format!("/sys/class/block/{name}/queue/logical_block_size"));
    Ok(text
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(SECTOR as u64))
}

fn writer(shared: &Shared<'_>, thread: u32) -> Result<Log> {
    let args = shared.args;
    let open = |flags| {
        args.devices
            .iter()
            .map(|device| open_write(device, flags))
            .collect::<Result<Vec<_>>>()
    };
    let (plain, durable) = (open(0)?, open(libc::O_DSYNC)?);
    let mut plan = Plan::new(&args.shape, &shared.sectors, shared.block, thread);
    let mut buffer = Aligned::new(args.shape.most.max(4096), 4096);
    let mut log = Log {
        writes: vec![Vec::new(); args.devices.len()],
        errors: 0,
        flushes: 0,
        slowest: Duration::ZERO,
    };
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        shared.pace(number);
        if !shared.goes_on(number) {
            return Ok(log);
        }
        let next = plan.next()?;
        let bytes = usize::try_from(next.sectors)? * SECTOR;
        for (sector, chunk) in (next.start..).zip(buffer[..bytes].chunks_exact_mut(SECTOR)) {
            Stamp {
                sector,
                write: number,
                generation: args.generation,
                thread,
            }
            .fill(chunk);
        }
        let files = if next.fua { &durable } else { &plain };
        let (begin, began) = (Instant::now(), shared.tick());
        let outcome = files[next.device].write_all_at(&buffer[..bytes], next.start * SECTOR as u64);
        let ended = if outcome.is_ok() {
            shared.tick()
        } else {
            u64::MAX
        };
        log.writes[next.device].push(Write {
            write: number,
            start: next.start,
            sectors: next.sectors,
            began,
            ended,
        });
        log.slowest = log.slowest.max(begin.elapsed());
        if next.flush && outcome.is_ok() {
            let begin = Instant::now();
            log.errors += u64::from(plain[next.device].sync_data().is_err());
            log.flushes += 1;
            log.slowest = log.slowest.max(begin.elapsed());
        }
        if let Err(error) = outcome {
            log.errors += 1;
            if !args.tolerate {
                return Err(error).with_context(|| {
                    format!(
                        "write {number} of {} sectors at {}",
                        next.sectors, next.start
                    )
                });
            }
        }
    }
}

fn check_image(args: &CheckArgs) -> Result<()> {
    let mut shown = Vec::new();
    // One device behind the other, as if they were one.
    let mut bases = Vec::new();
    for image in &args.images {
        bases.push(shown.len() as u64);
        read_image(image, shown.len() as u64, args.generation, &mut shown)?;
    }
    let log = match &args.log {
        Some(log) => read_log(log, &bases)?,
        None => predict(args, &bases, &shown)?,
    };
    let at_least = if args.complete { u64::MAX } else { 0 };
    match check(shown.into_iter(), 0, &log, args.generation, at_least) {
        Ok(prefix) => {
            println!(
                "{}",
                json!({
                    "writes": prefix.writes, "visible": prefix.visible, "tick": prefix.tick, "logged": log.len(),
                })
            );
            Ok(())
        }
        Err(violations) => {
            for violation in violations.iter().take(10) {
                println!("{violation:?}");
            }
            bail!("not a legal prefix: {} violations", violations.len())
        }
    }
}

fn read_log(log: &Path, bases: &[u64]) -> Result<Vec<Write>> {
    let mut writes = Vec::new();
    for (index, base) in bases.iter().enumerate() {
        let path = format!("{}.{index}", log.display());
        let text = fs::read_to_string(&path).with_context(|| format!("no log {path}"))?;
        for line in text.lines() {
            let write = Write::parse(line).with_context(|| format!("no write: {line}"))?;
            writes.push(Write {
                start: write.start + base,
                ..write
            });
        }
    }
    Ok(writes)
}

/// What a single thread wrote, up to the latest write that is shown. Each began when the one before it had ended.
fn predict(args: &CheckArgs, bases: &[u64], shown: &[Shown]) -> Result<Vec<Write>> {
    ensure!(
        args.shape.threads == 1,
        "only what a single thread writes can be predicted"
    );
    let ends = bases.iter().skip(1).copied().chain([shown.len() as u64]);
    let sectors: Vec<u64> = bases
        .iter()
        .zip(ends)
        .map(|(base, end)| end - base)
        .collect();
    let latest = shown.iter().filter_map(|shown| match shown {
        Shown::Stamped(stamp) => Some(stamp.write),
        _ => None,
    });
    let mut plan = Plan::new(&args.shape, &sectors, 1, 0);
    let mut writes = Vec::new();
    for write in 1..=latest.max().unwrap_or(0).min(WRITES_MAX) {
        let next = plan.next()?;
        writes.push(Write {
            write,
            start: next.start + bases[next.device],
            sectors: next.sectors,
            began: 2 * write - 1,
            ended: 2 * write,
        });
    }
    Ok(writes)
}

fn read_image(image: &Path, base: u64, generation: u32, shown: &mut Vec<Shown>) -> Result<()> {
    let mut file = open_read(image)?;
    let bytes = size(&mut file)?;
    let mut buffer = Aligned::new(1 << 20, 4096);
    let mut at = 0;
    while at < bytes {
        let count = usize::try_from((bytes - at).min(buffer.len() as u64))?;
        file.read_exact_at(&mut buffer[..count], at)?;
        shown.extend(buffer[..count].chunks_exact(SECTOR).map(|sector| {
            match Shown::read(sector, generation) {
                Shown::Stamped(stamp) => Shown::Stamped(Stamp {
                    sector: stamp.sector + base,
                    ..stamp
                }),
                other => other,
            }
        }));
        at += count as u64;
    }
    Ok(())
}
