// SPDX-License-Identifier: GPL-2.0-only

//! The module's control device without comfort.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};
use dtloop_abi::{
    AttachRequest, Backing, CaptureStream, Control, Extent, Found, IntentRequest, LoopControl,
    Name, Stream, StreamRequest, Throttle, raw,
};
use dtloop_tools::compare::compare;
use dtloop_tools::detach::detach;
use dtloop_tools::{hostile, starve, stop};
use nix::sys::stat::fstat;
use serde_json::{Value, json};

#[derive(Debug, Parser)]
enum Command {
    /// Create a set's stream; prints its id
    Create(Create),
    /// Destroy a set's stream
    Destroy {
        set: String,
        #[arg(long)]
        discard: bool,
    },
    /// Set the full-ring policy
    Policy {
        set: String,
        policy: String,
        #[arg(long, default_value_t = 0)]
        start: u32,
        #[arg(long, default_value_t = 0)]
        stop: u32,
        #[arg(long, default_value_t = 0)]
        delay: u32,
    },
    /// Attach a block device; prints the loop number
    Attach(Attach),
    /// Detach a loop device
    Detach {
        number: u32,
        #[arg(long, conflicts_with = "patient")]
        force: bool,
        /// Waits for who has it open in passing, as udev does
        #[arg(long)]
        patient: bool,
    },
    /// Follow the size of the backing device; prints the new size in bytes
    Resize {
        number: u32,
        #[arg(long, default_value_t = 0)]
        limit: u64,
    },
    /// Everything as JSON: streams by name, devices by number
    Status,
    /// One number of the status: of a device (its loop number) or a set (its name)
    Get { what: String, field: String },
    /// Open a set's stream and keep it open until a signal comes
    Hold { set: String },
    /// Mark a range of a device dirty, as a consumer
    Dirty {
        set: String,
        number: u32,
        start: u64,
        sectors: u64,
    },
    /// Give a set its intent file; prints what was found in it
    Intent {
        set: String,
        file: PathBuf,
        #[arg(long, default_value_t = 0)]
        region: u32,
        #[arg(long, default_value_t = 0)]
        hot: u32,
        #[arg(long, default_value_t = 0)]
        idle_ms: u32,
        /// One byte of the source's id
        #[arg(long, default_value_t = 1)]
        source: u8,
        #[arg(long)]
        format: bool,
    },
    /// Say as a consumer that the target has everything, and have marks cleared
    Clear { set: String },
    /// As a consumer: regions of a device that have to be compared, one "start sectors" a line; with --settle they are
    /// settled
    Suspects {
        set: String,
        number: u32,
        #[arg(long)]
        settle: bool,
        /// Fail unless they hold all of this device that is not zero
        #[arg(long)]
        cover: Option<PathBuf>,
    },
    /// Compare two devices or files; fails when they differ
    Same {
        a: PathBuf,
        b: PathBuf,
        /// Where in A to begin
        #[arg(long, default_value_t = 0)]
        offset: u64,
        /// How much; 0: all of A
        #[arg(long, default_value_t = 0)]
        bytes: u64,
    },
    /// Ask for what must be refused; fails when anything is not
    Hostile { set: String, device: PathBuf },
    /// Let one allocation after the other fail in every call that makes something (debug kernel)
    Starve { set: String, device: PathBuf },
    /// The same for loading the module from this file
    StarveLoad { module: PathBuf },
    /// Make (or remove) an unbound stock loop device
    Stock {
        number: u32,
        #[arg(long)]
        remove: bool,
    },
    /// Attach and detach a device many times
    Cycle {
        set: String,
        device: PathBuf,
        times: u32,
        #[arg(long, default_value_t = 200)]
        number: u32,
    },
}

#[derive(Args, Debug)]
struct Create {
    set: String,
    #[arg(long, default_value_t = 0)]
    ring: u64,
    #[arg(long, default_value_t = 0)]
    descs: u32,
    #[arg(long, default_value = "track")]
    policy: String,
}

#[derive(Args, Debug)]
struct Attach {
    device: PathBuf,
    #[arg(long)]
    set: String,
    #[arg(long)]
    number: Option<u32>,
    #[arg(long, default_value_t = 0)]
    offset: u64,
    #[arg(long, default_value_t = 0)]
    limit: u64,
    /// One byte of the disk's identity
    #[arg(long, default_value_t = 0)]
    identity: u8,
    #[arg(long)]
    ro: bool,
    #[arg(long)]
    partscan: bool,
    #[arg(long, default_value = "")]
    label: String,
    /// Name the device by its number, not by an open file
    #[arg(long)]
    by_number: bool,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Create(create) => {
            let request = StreamRequest {
                name: Name::new(&create.set)?,
                payload_bytes: create.ring,
                desc_count: create.descs,
                policy: policy(&create.policy)?,
            };
            println!("{}", Control::open()?.create_stream(&request)?);
        }
        Command::Destroy { set, discard } => {
            let control = Control::open()?;
            control.destroy_stream(stream(&control, &set)?, discard)?;
        }
        Command::Policy {
            set,
            policy: name,
            start,
            stop,
            delay,
        } => {
            let control = Control::open()?;
            let throttle = Throttle {
                start_percent: start,
                stop_percent: stop,
                delay_ms: delay,
            };
            control.set_policy(stream(&control, &set)?, policy(&name)?, throttle)?;
        }
        Command::Attach(request) => println!("{}", attach(&request)?),
        Command::Detach {
            number,
            patient: true,
            ..
        } => detach(&Control::open()?, number)?,
        Command::Detach { number, force, .. } => Control::open()?.detach(number, force)?,
        Command::Resize { number, limit } => {
            println!(
                "{}",
                Control::open()?.resize(number, limit)? * raw::SECTOR_BYTES
            );
        }
        Command::Status => println!("{:#}", status()?),
        Command::Get { what, field } => get(&what, &field)?,
        Command::Hold { set } => {
            stop::listen()?;
            let _stream = Stream::open(stream(&Control::open()?, &set)?)?;
            println!("held");
            while !stop::requested() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        Command::Dirty {
            set,
            number,
            start,
            sectors,
        } => {
            let (stream, device) = consumer(&set, number)?;
            let extent = Extent {
                start_sector: start,
                sectors,
            };
            stream.dirty_set(device.device_id, extent)?;
        }
        Command::Intent {
            set,
            file,
            region,
            hot,
            idle_ms,
            source,
            format,
        } => {
            let control = Control::open()?;
            let file = File::options().read(true).write(true).open(file)?;
            let found = control.set_intent(&IntentRequest {
                stream_id: stream(&control, &set)?,
                file: file.as_fd(),
                region_bytes: region,
                hot_max: hot,
                idle_ms,
                source: [source; 16],
                format,
            })?;
            println!("{found:?}");
        }
        Command::Clear { set } => {
            let stream = Stream::open(stream(&Control::open()?, &set)?)?;
            let ring = stream.ring();
            let acked = ring.committed();
            ring.release(acked)?;
            // While its file is being written, one comes again.
            let cleared = std::iter::repeat_with(|| stream.intent_clear(acked)).take(1000);
            let mut cleared = cleared.filter_map(Result::transpose);
            println!("{}", cleared.next().context("no intent map")??.marked);
        }
        Command::Suspects {
            set,
            number,
            settle,
            cover,
        } => {
            let (stream, device) = consumer(&set, number)?;
            let (mut from, mut extents) = (0, vec![]);
            while let Some(extent) = stream.suspect_next(device.device_id, from)? {
                println!("{} {}", extent.start_sector, extent.sectors);
                from = extent.start_sector + extent.sectors;
                if settle {
                    stream.suspect_clear(device.device_id, extent)?;
                }
                extents.push(extent);
            }
            if let Some(path) = cover {
                println!("{} sectors are not zero", cover_all(&path, &extents)?);
            }
        }
        Command::Same {
            a,
            b,
            offset,
            bytes,
        } => {
            let found = compare(&a, offset, &b, bytes)?;
            if found.sectors > 0 {
                bail!(
                    "{} sectors of {} bytes differ: {:?}",
                    found.sectors,
                    found.bytes,
                    found.runs
                );
            }
            println!("{} bytes identical", found.bytes);
        }
        Command::Hostile { set, device } => hostile::run(&set, &device)?,
        Command::Starve { set, device } => starve::run(&set, &device)?,
        Command::StarveLoad { module } => starve::load(&module)?,
        Command::Stock { number, remove } => {
            let control = LoopControl::open()?;
            if remove {
                control.remove(number)?;
            } else {
                control.add(number)?;
            }
        }
        Command::Cycle {
            set,
            device,
            times,
            number,
        } => cycle(&set, &device, times, number)?,
    }
    Ok(())
}

fn policy(name: &str) -> Result<u32> {
    match name {
        "track" => Ok(raw::POLICY_TRACK),
        "block" => Ok(raw::POLICY_BLOCK),
        "throttle" => Ok(raw::POLICY_THROTTLE),
        _ => bail!("no policy {name}"),
    }
}

fn stream(control: &Control, set: &str) -> Result<u32> {
    Ok(control
        .stream_by_name(set)?
        .with_context(|| format!("no set {set}"))?
        .stream_id)
}

/// The stream of a set, with this program as its consumer, and one of its devices.
fn consumer(set: &str, number: u32) -> Result<(Stream, raw::DeviceStatus)> {
    let stream = Stream::open(stream(&Control::open()?, set)?)?;
    let devices = stream.devices()?;
    let device = devices.iter().find(|device| device.loop_number() == number);
    let device = *device.context("no such device")?;
    Ok((stream, device))
}

/// Fails unless the extents hold all sectors of a device that are not zero; gives their number.
fn cover_all(path: &std::path::Path, extents: &[Extent]) -> Result<u64> {
    let (mut file, mut data, mut at, mut found) = (File::open(path)?, [0; 65536], 0, 0);
    loop {
        let bytes = file.read(&mut data)?;
        if bytes == 0 {
            return Ok(found);
        }
        for sector in data[..bytes].chunks(512) {
            if sector.iter().any(|byte| *byte != 0) {
                found += 1;
                let inside = |extent: &Extent| {
                    (extent.start_sector..extent.start_sector + extent.sectors).contains(&at)
                };
                if !extents.iter().any(inside) {
                    bail!("sector {at} is not zero and in no region that is to be compared");
                }
            }
            at += 1;
        }
    }
}

fn attach(request: &Attach) -> Result<u32> {
    let control = Control::open()?;
    let file = File::open(&request.device)?;
    let backing = if request.by_number {
        Backing::Number(fstat(&file)?.st_rdev)
    } else {
        Backing::Fd(file.as_fd())
    };
    let attached = control.attach(&AttachRequest {
        backing,
        offset_bytes: request.offset,
        limit_bytes: request.limit,
        number: request.number,
        stream_id: stream(&control, &request.set)?,
        label: Name::new_or_empty(&request.label)?,
        identity: [request.identity; 16],
        read_only: request.ro,
        partscan: request.partscan,
    })?;
    Ok(attached.number)
}

fn cycle(set: &str, device: &std::path::Path, times: u32, number: u32) -> Result<()> {
    let control = Control::open()?;
    let file = File::open(device)?;
    let stream_id = stream(&control, set)?;
    for _ in 0..times {
        let request = AttachRequest {
            backing: Backing::Fd(file.as_fd()),
            offset_bytes: 0,
            limit_bytes: 0,
            number: Some(number),
            stream_id,
            label: Name::EMPTY,
            identity: [0; 16],
            read_only: false,
            partscan: false,
        };
        control.attach(&request)?;
        detach(&control, number)?;
    }
    Ok(())
}

fn get(what: &str, field: &str) -> Result<()> {
    let status = status()?;
    let object = status["devices"]
        .get(what)
        .or_else(|| status["sets"].get(what));
    let mut value = object;
    for part in field.split('.') {
        value = value
            .with_context(|| format!("no device or set {what}"))?
            .get(part);
    }
    match value.with_context(|| format!("no field {field}"))? {
        Value::String(text) => println!("{text}"),
        other => println!("{other}"),
    }
    Ok(())
}

fn status() -> Result<Value> {
    let control = Control::open()?;
    let mut sets = json!({});
    for stream in control.streams() {
        let stream = stream?;
        let intent = control.intent_status(stream.stream_id)?;
        sets[stream.name()] = stream_json(&stream);
        sets[stream.name()]["intent"] = intent_json(&intent);
    }
    let mut devices = json!({});
    for device in control.devices() {
        let device = device?;
        devices[device.loop_number().to_string()] = device_json(&device);
    }
    Ok(json!({ "sets": sets, "devices": devices }))
}

macro_rules! fields {
    ($status:ident: $($field:ident),* $(,)?) => {
        {
            let mut value = json!({});
            $(value[stringify!($field)] = json!($status.$field);)*
            value
        }
    };
}

fn stream_json(status: &raw::StreamStatus) -> Value {
    let mut value = fields!(status: stream_id, policy, desc_count, payload_bytes, ring_bytes, next_seq, committed,
        released, epoch, used_bytes, sync_bytes, sync_bytes_max, gaps, gap_changes, gap_sectors, room_waits,
        room_wait_ns, room_wait_ns_max, wakeups, bad_releases, devices, throttles, throttle_ns, throttle_ns_max);
    for (name, flag) in [
        ("consumer", raw::STREAM_CONSUMER),
        ("gap", raw::STREAM_GAP),
        ("bad_consumer", raw::STREAM_BAD_CONSUMER),
        ("throttling", raw::STREAM_THROTTLING),
    ] {
        value[name] = json!(status.has(flag));
    }
    value
}

fn intent_json(status: &raw::IntentStatus) -> Value {
    let mut value = fields!(status: region_bytes, hot_max, idle_ms, life, version, found_version, file_bytes, marked,
        suspect, hits, misses, wait_ns, wait_ns_max, writes, rounds, cleared);
    value["found"] = json!(format!("{:?}", Found::from_raw(status.found)));
    value["on"] = json!(status.has(raw::INTENT_ON));
    value["failed"] = json!(status.has(raw::INTENT_FAILED));
    let bases = status
        .bases
        .iter()
        .filter(|base| base.stream_uuid != [0; 16]);
    value["bases"] = json!(bases.count());
    value
}

fn device_json(status: &raw::DeviceStatus) -> Value {
    let mut value = fields!(status: stream_id, device_id, backing_dev, loop_dev, offset_bytes, limit_bytes, sectors,
        block_bytes, dirty_block_bytes, dirty_blocks, openers, in_flight, reads, read_sectors, writes, write_sectors,
        flushes, discards, discard_sectors, syncs, sync_sectors, tracked, tracked_sectors, failed, gate_waits,
        nowait_retries, bypass_sectors, regions_marked, regions_suspect);
    value["intent_found"] = json!(format!("{:?}", Found::from_raw(status.intent_found)));
    value["backing_name"] = json!(status.backing_name());
    value["label"] = json!(status.label());
    for (name, flag) in [
        ("read_only", raw::DEVICE_READ_ONLY),
        ("partscan", raw::DEVICE_PARTSCAN),
        ("dead", raw::DEVICE_DEAD),
        ("bypassed", raw::DEVICE_BYPASSED),
        ("detaching", raw::DEVICE_DETACHING),
        ("discard_zeroes", raw::DEVICE_DISCARD_ZEROES),
    ] {
        value[name] = json!(status.has(flag));
    }
    value
}
