// SPDX-License-Identifier: GPL-2.0-only

//! The module's control device without comfort.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, Parser};
use dtloop_abi::{
    AttachRequest, Backing, CaptureStream, Control, LoopControl, Name, Stream, StreamRequest, raw,
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
    Policy { set: String, policy: String },
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
        Command::Policy { set, policy: name } => {
            let control = Control::open()?;
            control.set_policy(stream(&control, &set)?, policy(&name)?)?;
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
            let stream = Stream::open(stream(&Control::open()?, &set)?)?;
            let devices = stream.devices()?;
            let device = devices
                .iter()
                .find(|device| device.loop_number() == number)
                .context("no such device")?;
            stream.dirty_set(
                device.device_id,
                dtloop_abi::Extent {
                    start_sector: start,
                    sectors,
                },
            )?;
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
        _ => bail!("no policy {name}"),
    }
}

fn stream(control: &Control, set: &str) -> Result<u32> {
    Ok(control
        .stream_by_name(set)?
        .with_context(|| format!("no set {set}"))?
        .stream_id)
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
    let value = object
        .with_context(|| format!("no device or set {what}"))?
        .get(field);
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
        sets[stream.name()] = stream_json(&stream);
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
        room_wait_ns, room_wait_ns_max, wakeups, bad_releases, devices);
    for (name, flag) in [
        ("consumer", raw::STREAM_CONSUMER),
        ("gap", raw::STREAM_GAP),
        ("bad_consumer", raw::STREAM_BAD_CONSUMER),
    ] {
        value[name] = json!(status.has(flag));
    }
    value
}

fn device_json(status: &raw::DeviceStatus) -> Value {
    let mut value = fields!(status: stream_id, device_id, backing_dev, loop_dev, offset_bytes, limit_bytes, sectors,
        block_bytes, dirty_block_bytes, dirty_blocks, openers, in_flight, reads, read_sectors, writes, write_sectors,
        flushes, discards, discard_sectors, syncs, sync_sectors, tracked, tracked_sectors, failed, gate_waits,
        nowait_retries, bypass_sectors);
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
