// SPDX-License-Identifier: GPL-2.0-only

//! A consumer of a capture stream without a network: applies the records to replicas on this machine.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser};
use dtloop_abi::{CaptureStream, Control, Stream, SyncRequest, raw, stream_path};
use dtloop_tools::drain::{Progress, Sink, Which, parse_apply, parse_desc};
use dtloop_tools::stop;
use nix::libc;
use serde_json::json;

#[derive(Debug, Parser)]
enum Command {
    /// Drain through the mapped ring
    Run(Run),
    /// Drain through read(2)
    Read(ReadArgs),
}

#[derive(Args, Clone, Debug)]
struct Common {
    /// The replication set
    #[arg(long)]
    set: String,
    /// Replica of a device: LOOP=PATH, or id:DEVICE=PATH
    #[arg(long, value_parser = parse_apply)]
    apply: Vec<(Which, PathBuf)>,
    /// Ends when everything is drained, and mirrors and resyncs are done
    #[arg(long)]
    until_drained: bool,
    /// Ends after this many records
    #[arg(long)]
    stop_after: Option<u64>,
    /// Keeps in this file how far it is; a successor with the same file notices lost and repeated records
    #[arg(long)]
    progress: Option<PathBuf>,
}

#[derive(Args, Debug)]
struct Run {
    #[command(flatten)]
    common: Common,
    /// Looks at descriptors only: the cheapest consumer there is
    #[arg(long)]
    discard: bool,
    /// Never releases anything
    #[arg(long)]
    hold: bool,
    /// Waits this long after each record
    #[arg(long, default_value_t = 0)]
    slow_us: u64,
    /// Records between two releases
    #[arg(long, default_value_t = 256)]
    batch: u64,
    /// How long a record may wait before it is looked at
    #[arg(long, default_value_t = 1)]
    poll_ms: u64,
    /// Reads this device (by loop number) into the stream
    #[arg(long)]
    mirror: Vec<u32>,
    /// First sector and length to mirror: START:SECTORS
    #[arg(long)]
    range: Option<String>,
    /// Reads what is dirty into the stream, until nothing is
    #[arg(long)]
    resync: bool,
    /// Largest SYNC record in bytes
    #[arg(long, default_value_t = 64 << 10)]
    chunk: u32,
    /// Leaves one record out and stops some records later: a state that never was
    #[arg(long, value_name = "SEED")]
    break_order: Option<u64>,
}

#[derive(Args, Debug)]
struct ReadArgs {
    #[command(flatten)]
    common: Common,
    /// Buffer in bytes
    #[arg(long, default_value_t = 4 << 20)]
    buffer: usize,
}

fn main() -> Result<()> {
    let command = Command::parse();
    stop::listen()?;
    match command {
        Command::Run(run) => drain(&run),
        Command::Read(read) => drain_by_read(&read),
    }
}

fn stream_id(set: &str) -> Result<u32> {
    let status = Control::open()?.stream_by_name(set)?;
    Ok(status.with_context(|| format!("no set {set}"))?.stream_id)
}

fn drain(run: &Run) -> Result<()> {
    let stream = Stream::open(stream_id(&run.common.set)?)?;
    let mut consumer = Consumer::new(run, &stream)?;
    let begin = Instant::now();
    let outcome = consumer.run();
    let mut report = consumer.sink.report();
    report["seconds"] = json!(begin.elapsed().as_secs_f64());
    report["waits"] = json!(consumer.waits);
    report["synced_sectors"] = json!(consumer.syncs.taken);
    println!("{report}");
    outcome
}

struct Consumer<'a> {
    run: &'a Run,
    stream: &'a Stream,
    sink: Sink,
    progress: Option<Progress>,
    syncs: Syncs,
    waits: u64,
    /// What was next at the last wait.
    waited_at: u64,
}

impl<'a> Consumer<'a> {
    fn new(run: &'a Run, stream: &'a Stream) -> Result<Self> {
        let first = stream.ring().released();
        let progress = run
            .common
            .progress
            .as_deref()
            .map(|path| Progress::open(path, first))
            .transpose()?;
        let mut sink = Sink::new(run.common.apply.clone(), first, run.break_order);
        let devices = stream.devices()?;
        sink.learn(&devices)?;
        let syncs = Syncs::new(run, &devices)?;
        Ok(Self {
            run,
            stream,
            sink,
            progress,
            syncs,
            waits: 0,
            waited_at: 0,
        })
    }

    fn run(&mut self) -> Result<()> {
        loop {
            let before = self.sink.next();
            if self.run.discard {
                self.skip_batch()?;
            } else {
                self.take_batch()?;
            }
            self.release()?;
            let asked = self.syncs.ask(self.stream)?;
            if self.is_over()? {
                return self.sink.sync();
            }
            if self.sink.next() == before && !asked {
                self.wait()?;
            }
        }
    }

    /// The least that a consumer can do.
    fn skip_batch(&mut self) -> Result<()> {
        let hold = self.stream.ring().hold(self.sink.next())?;
        for seq in hold.start()..hold.end() {
            self.sink.count(&hold.desc(seq)?)?;
        }
        Ok(())
    }

    fn take_batch(&mut self) -> Result<()> {
        let hold = self.stream.ring().hold(self.sink.next())?;
        let end = hold.end().min(hold.start() + self.run.batch);
        for seq in hold.start()..end {
            let record = hold.record(seq)?;
            let joined = record.desc.op == raw::OP_ATTACH || self.sink.is_stranger(&record.desc);
            if joined {
                self.sink.learn(&self.stream.devices()?)?;
            }
            self.sink.take(&record.desc, record.payload)?;
            self.syncs.came(&record.desc);
            if self.run.slow_us != 0 {
                sleep(Duration::from_micros(self.run.slow_us));
            }
            let last = self
                .run
                .common
                .stop_after
                .is_some_and(|most| self.sink.records() >= most);
            if last || self.sink.is_broken() {
                break;
            }
        }
        Ok(())
    }

    fn release(&mut self) -> Result<()> {
        let next = self.sink.next();
        if let Some(progress) = &self.progress {
            progress.applied(next)?;
        }
        if self.run.hold {
            return Ok(());
        }
        let ring = self.stream.ring();
        ring.release(next)?;
        if ring.space_wanted() {
            self.stream.kick()?;
        }
        if let Some(progress) = &self.progress {
            progress.released(next)?;
        }
        Ok(())
    }

    fn is_over(&mut self) -> Result<bool> {
        let common = &self.run.common;
        if stop::requested()
            || common
                .stop_after
                .is_some_and(|most| self.sink.records() >= most)
            || self.sink.is_broken()
        {
            return Ok(true);
        }
        if !common.until_drained
            || !self.syncs.are_done()
            || self.sink.next() != self.stream.ring().next_seq()
        {
            return Ok(false);
        }
        // Whatever else waits for its place in the stream.
        self.stream.kick()?;
        let status = self.stream.status()?;
        Ok(!status.has(raw::STREAM_GAP)
            && status.next_seq == self.sink.next()
            && self.syncs.are_done())
    }

    /// Sleeps until a batch has come, or a moment has passed. When nothing came for such a moment: until the next record,
    /// so that a quiet stream costs nothing.
    fn wait(&mut self) -> Result<()> {
        self.waits += 1;
        let ring = self.stream.ring();
        let next = self.sink.next();
        let quiet = self.waited_at == next;
        self.waited_at = next;
        let (record, limit) = if quiet {
            (next, Duration::from_millis(self.run.poll_ms.max(100)))
        } else {
            (
                next + self.run.batch / 2,
                Duration::from_millis(self.run.poll_ms),
            )
        };
        if ring.arm_wake(record) {
            self.stream.poll(Some(limit))?;
        }
        ring.disarm_wake();
        Ok(())
    }
}

/// SYNC reads that are to be made.
struct Syncs {
    chunk_bytes: u32,
    /// Device, first sector, end; in order.
    todo: VecDeque<(u32, u64, u64)>,
    /// Devices whose dirty maps are to be emptied.
    resync: Vec<u32>,
    /// Sectors asked for whose records have not come.
    outstanding: u64,
    taken: u64,
    /// The last look at the dirty maps found nothing.
    clean: bool,
}

/// Marks the records as answers to this program.
const COOKIE: u64 = 0xd7d7;

/// Sectors asked for in one call.
const STEP: u64 = 2048;

impl Syncs {
    fn new(run: &Run, devices: &[raw::DeviceStatus]) -> Result<Self> {
        let mut todo = VecDeque::new();
        for number in &run.mirror {
            let found = devices
                .iter()
                .find(|device| device.loop_number() == *number);
            let device = found.with_context(|| format!("loop{number} is not in the set"))?;
            let (start, sectors) = match &run.range {
                Some(range) => parse_range(range)?,
                None => (0, device.sectors),
            };
            todo.push_back((device.device_id, start, start + sectors));
        }
        let resync = if run.resync {
            devices.iter().map(|device| device.device_id).collect()
        } else {
            Vec::new()
        };
        Ok(Self {
            chunk_bytes: run.chunk,
            todo,
            resync,
            outstanding: 0,
            taken: 0,
            clean: false,
        })
    }

    fn are_done(&self) -> bool {
        self.todo.is_empty() && self.outstanding == 0 && (self.resync.is_empty() || self.clean)
    }

    fn came(&mut self, desc: &raw::Desc) {
        if desc.op == raw::OP_SYNC && desc.aux == COOKIE {
            self.outstanding = self.outstanding.saturating_sub(u64::from(desc.sectors));
        }
    }

    /// Asks for more; true when something was taken.
    fn ask(&mut self, stream: &Stream) -> Result<bool> {
        if self.todo.is_empty() && self.outstanding == 0 && !self.resync.is_empty() {
            self.look_for_dirt(stream)?;
        }
        let Some((device_id, start, end)) = self.todo.front_mut() else {
            return Ok(false);
        };
        let request = SyncRequest {
            device_id: *device_id,
            start_sector: *start,
            sectors: (*end - *start).min(STEP),
            chunk_bytes: self.chunk_bytes,
            cookie: COOKIE,
            clear: true,
        };
        let taken = stream
            .sync(&request)
            .with_context(|| format!("{request:?}"))?;
        ensure!(
            taken <= request.sectors,
            "SYNC took {taken} sectors for {request:?}"
        );
        *start += taken;
        self.outstanding += taken;
        self.taken += taken;
        if start == end {
            self.todo.pop_front();
        }
        Ok(taken > 0)
    }

    fn look_for_dirt(&mut self, stream: &Stream) -> Result<()> {
        for &device_id in &self.resync {
            let mut at = 0;
            while let Some(extent) = stream.dirty_next(device_id, at, 1 << 20)? {
                ensure!(
                    extent.start_sector >= at && extent.sectors > 0,
                    "dirty extent {extent:?} from {at}"
                );
                at = extent.start_sector + extent.sectors;
                self.todo.push_back((device_id, extent.start_sector, at));
            }
        }
        self.clean = self.todo.is_empty();
        Ok(())
    }
}

fn parse_range(text: &str) -> Result<(u64, u64)> {
    let (start, sectors) = text.split_once(':').context("not START:SECTORS")?;
    Ok((start.parse()?, sectors.parse()?))
}

fn drain_by_read(args: &ReadArgs) -> Result<()> {
    let common = &args.common;
    let id = stream_id(&common.set)?;
    let control = Control::open()?;
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK);
    let mut file = options.open(stream_path(id))?;
    let status =
        || -> Result<raw::StreamStatus> { control.stream_from(id)?.context("the stream is gone") };
    let devices = || -> Result<Vec<raw::DeviceStatus>> {
        let all = control.devices().collect::<dtloop_abi::Result<Vec<_>>>()?;
        Ok(all
            .into_iter()
            .filter(|device| device.stream_id == id)
            .collect())
    };
    let first = status()?.released;
    let progress = common
        .progress
        .as_deref()
        .map(|path| Progress::open(path, first))
        .transpose()?;
    let mut sink = Sink::new(common.apply.clone(), first, None);
    sink.learn(&devices()?)?;
    let mut buffer = vec![0; args.buffer];
    loop {
        if let Some(progress) = &progress {
            progress.applied(sink.next())?;
        }
        match file.read(&mut buffer) {
            Ok(count) => take_all(&mut sink, &buffer[..count], &devices)?,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                // Nothing to read: what was read before is released.
                let status = status()?;
                let drained = status.next_seq == sink.next() && !status.has(raw::STREAM_GAP);
                if stop::requested() || (common.until_drained && drained) {
                    break;
                }
                sleep(Duration::from_millis(1));
            }
            Err(error) => return Err(error).context("read"),
        }
        if common.stop_after.is_some_and(|most| sink.records() >= most) {
            break;
        }
    }
    sink.sync()?;
    println!("{}", sink.report());
    Ok(())
}

fn take_all(
    sink: &mut Sink,
    mut bytes: &[u8],
    devices: &impl Fn() -> Result<Vec<raw::DeviceStatus>>,
) -> Result<()> {
    while !bytes.is_empty() {
        let Some(desc) = parse_desc(bytes) else {
            bail!("{} bytes are no record", bytes.len())
        };
        let end = raw::DESC_BYTES + desc.payload_bytes as usize;
        ensure!(end <= bytes.len(), "the payload of {desc:?} is cut");
        if desc.op == raw::OP_ATTACH || sink.is_stranger(&desc) {
            sink.learn(&devices()?)?;
        }
        sink.take(&desc, &bytes[raw::DESC_BYTES..end])?;
        bytes = &bytes[end..];
    }
    Ok(())
}
