// SPDX-License-Identifier: GPL-2.0-only

//! Writes stamped sectors, and proves that an image shows a legal prefix of what was written.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Parser};
use dtloop_tools::direct::{Aligned, open_read, open_write, size};
use dtloop_tools::random::Random;
use dtloop_tools::stamp::{SECTOR, Shown, Stamp, Write, check};
use dtloop_tools::stop;
use nix::libc;
use serde_json::json;

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
    log: PathBuf,
    #[arg(long, default_value_t = 4)]
    threads: u32,
    /// Run of the writer, from 1; earlier stamps count as the beginning
    #[arg(long, default_value_t = 1)]
    generation: u32,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Writes in all; 0: no end
    #[arg(long, default_value_t = 0)]
    writes: u64,
    #[arg(long)]
    seconds: Option<u64>,
    /// Largest write in bytes
    #[arg(long, default_value_t = 64 << 10)]
    most: usize,
    /// Every thread writes where it likes, not only in its own part
    #[arg(long)]
    overlap: bool,
    /// Of a thousand writes, so many are followed by a flush
    #[arg(long, default_value_t = 30)]
    flush: u64,
    /// Of a thousand writes, so many are with forced unit access
    #[arg(long, default_value_t = 30)]
    fua: u64,
    /// Goes on after errors
    #[arg(long)]
    tolerate: bool,
}

#[derive(Args, Debug)]
struct CheckArgs {
    /// The images of all the devices that the log is of, in its order
    #[arg(required = true)]
    images: Vec<PathBuf>,
    #[arg(long)]
    log: PathBuf,
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
    until: Option<Instant>,
}

impl Shared<'_> {
    fn tick(&self) -> u64 {
        self.tick.fetch_add(1, Ordering::SeqCst)
    }

    fn goes_on(&self, write: u64) -> bool {
        let over = self.args.writes != 0 && write > self.args.writes;
        !over && !stop::requested() && self.until.is_none_or(|until| Instant::now() < until)
    }
}

/// What a thread did on each device.
struct Log {
    writes: Vec<Vec<Write>>,
    errors: u64,
    flushes: u64,
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
        until: args
            .seconds
            .map(|seconds| Instant::now() + Duration::from_secs(seconds)),
    };
    let logs = thread::scope(|scope| {
        let writers: Vec<_> = (0..args.threads)
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
    for index in 0..args.devices.len() {
        let mut file =
            std::io::BufWriter::new(File::create(format!("{}.{index}", args.log.display()))?);
        for write in logs
            .iter()
            .flat_map(|log| log.writes.iter().skip(index).take(1).flatten())
        {
            writeln!(file, "{write}")?;
        }
        file.flush()?;
    }
    let total = |count: fn(&Log) -> u64| logs.iter().map(count).sum::<u64>();
    println!(
        "{}",
        json!({
            "writes": total(|log| log.writes.iter().map(|writes| writes.len() as u64).sum()),
            "errors": total(|log| log.errors),
            "flushes": total(|log| log.flushes),
        })
    );
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
    let mut random = Random::new(args.seed.wrapping_mul(1000) + u64::from(thread));
    let mut buffer = Aligned::new(args.most.max(4096), 4096);
    let mut log = Log {
        writes: vec![Vec::new(); args.devices.len()],
        errors: 0,
        flushes: 0,
    };
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        if !shared.goes_on(number) {
            return Ok(log);
        }
        let device = usize::try_from(random.below(args.devices.len() as u64))?;
        let (start, sectors) = place(shared, thread, device, &mut random);
        let bytes = usize::try_from(sectors)? * SECTOR;
        for (sector, chunk) in (start..).zip(buffer[..bytes].chunks_exact_mut(SECTOR)) {
            Stamp {
                sector,
                write: number,
                generation: args.generation,
                thread,
            }
            .fill(chunk);
        }
        let fua = random.below(1000) < args.fua;
        let file = if fua {
            &durable[device]
        } else {
            &plain[device]
        };
        let began = shared.tick();
        let outcome = file.write_all_at(&buffer[..bytes], start * SECTOR as u64);
        let ended = if outcome.is_ok() {
            shared.tick()
        } else {
            u64::MAX
        };
        log.writes[device].push(Write {
            write: number,
            start,
            sectors,
            began,
            ended,
        });
        if random.below(1000) < args.flush && outcome.is_ok() {
            log.errors += u64::from(plain[device].sync_data().is_err());
            log.flushes += 1;
        }
        if let Err(error) = outcome {
            log.errors += 1;
            if !args.tolerate {
                return Err(error)
                    .context(format!("write {number} of {sectors} sectors at {start}"));
            }
        }
    }
}

/// Where the next write goes: small ones mostly, in whole blocks.
fn place(shared: &Shared<'_>, thread: u32, device: usize, random: &mut Random) -> (u64, u64) {
    let block = shared.block;
    let most = (shared.args.most as u64 / SECTOR as u64 / block).max(1);
    let log = random.below(u64::from(most.ilog2()) + 1);
    let blocks = (1 + random.below(1 << log)).min(most);
    let all = shared.sectors[device] / block;
    let (from, count) = if shared.args.overlap {
        (0, all)
    } else {
        let part = all / u64::from(shared.args.threads);
        (part * u64::from(thread), part)
    };
    let start = from + random.below(count - blocks.min(count - 1));
    (start * block, blocks * block)
}

fn check_image(args: &CheckArgs) -> Result<()> {
    let mut log = Vec::new();
    let mut shown = Vec::new();
    for (index, image) in args.images.iter().enumerate() {
        // One device behind the other, as if they were one.
        let base = shown.len() as u64;
        let path = format!("{}.{index}", args.log.display());
        let text = fs::read_to_string(&path).with_context(|| format!("no log {path}"))?;
        for line in text.lines() {
            let write = Write::parse(line).with_context(|| format!("no write: {line}"))?;
            log.push(Write {
                start: write.start + base,
                ..write
            });
        }
        read_image(image, base, args.generation, &mut shown)?;
    }
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
