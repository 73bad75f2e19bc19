// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop attach`

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use anyhow::Context as _;
use dtloop_abi::{AttachRequest, Attached, Backing, Control, Name, StreamRequest, raw};
use nix::errno::Errno;
use serde_json::json;

use super::{Context, attached, gather::Gatherer, intent, loop_path, plain};
use crate::args::{Attach, LoopNumber, Policy};
use crate::exit::Code;
use crate::preflight::{Refusals, Wish, judge};
use crate::stock::Borrowed;
use crate::system::{DevNumber, System};
use crate::{output, size};

pub(crate) fn run(context: &Context<'_>, args: &Attach) -> anyhow::Result<Code> {
    let dev = block_device(args)?;
    let control = context.control()?;
    let (stream, attached) = context.change(&control, || {
        let devices = attached(&control)?;
        check_device(context, args, dev, &devices)?;
        check_number(args, &devices)?;
        let stream = Stream::find_or_create(&control, args)?;
        let result = intent::provide(context, &control, args, stream.id, stream.created)
            .and_then(|_| attach(context, args, dev, &control, stream.id));
        match result {
            Ok(attached) => Ok((stream, attached)),
            Err(error) => {
                stream.undo(&control);
                Err(error)
            }
        }
    })?;
    report(context, args, &stream, attached)?;
    Ok(Code::Done)
}

/// The number of the block device that was named.
fn block_device(args: &Attach) -> anyhow::Result<DevNumber> {
    let path = args.device.display().to_string();
    match System::dev_number(&args.device) {
        Ok(Some(dev)) => Ok(dev),
        Ok(None) => Err(Refusals::one(path, "it is not a block device").into()),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(anyhow::Error::from(error).context(format!("Cannot look at {path}")))
        }
        Err(error) => Err(Refusals::one(path, plain(&error)).into()),
    }
}

fn check_device(
    context: &Context<'_>,
    args: &Attach,
    dev: DevNumber,
    devices: &[raw::DeviceStatus],
) -> Result<(), Refusals> {
    let path = args.device.display().to_string();
    let device = context
        .system
        .name_of(dev)
        .and_then(|name| context.system.block(&name))
        .ok_or_else(|| Refusals::one(&path, "no driver serves it (its node is stale)"))?;
    let facts = Gatherer::new(&context.system, devices).facts(device);
    let wish = Wish {
        offset: args.offset,
        size_limit: args.size_limit,
        read_only: args.read_only,
        allow_signature: args.allow_signature,
    };
    let refusals = judge(&facts, &wish);
    if refusals.is_empty() {
        return Ok(());
    }
    let reasons = refusals.iter().map(ToString::to_string).collect();
    Err(Refusals {
        what: path,
        reasons,
    })
}

/// Refuses a loop number that is one of ours already.
fn check_number(args: &Attach, devices: &[raw::DeviceStatus]) -> Result<(), Refusals> {
    let LoopNumber::Pinned(number) = args.number else {
        return Ok(());
    };
    match devices.iter().find(|d| d.loop_number() == number) {
        None => Ok(()),
        Some(device) => Err(Refusals::one(
            loop_path(number),
            format!(
                "{} is attached to it already; choose another",
                device.backing_name()
            ),
        )),
    }
}

/// The stream of the set.
struct Stream {
    id: u32,
    created: bool,
}

impl Stream {
    fn find_or_create(control: &Control, args: &Attach) -> anyhow::Result<Self> {
        if let Some(found) = control.stream_by_name(args.set.as_str())? {
            return Ok(Self::existing(&found, args)?);
        }
        let request = StreamRequest {
            name: args.set,
            payload_bytes: args.ring_size.unwrap_or(0),
            desc_count: 0,
            policy: args.policy.unwrap_or(Policy::Track).to_raw(),
        };
        match control.create_stream(&request) {
            Ok(id) => Ok(Self { id, created: true }),
            // Somebody else was faster.
            Err(error) if error.is(Errno::EEXIST) => {
                let found = control.stream_by_name(args.set.as_str())?.ok_or(error)?;
                Ok(Self::existing(&found, args)?)
            }
            Err(error) => {
                let context = format!("set {} was not made", args.set);
                Err(anyhow::Error::from(error).context(context))
            }
        }
    }

    /// Refuses options that contradict a set that exists.
    fn existing(found: &raw::StreamStatus, args: &Attach) -> Result<Self, Refusals> {
        let what = || format!("set {}", args.set);
        if let Some(bytes) = args.ring_size.filter(|&bytes| bytes != found.payload_bytes) {
            let reason = format!(
                "it exists with a ring of {}, not {}; leave --ring-size out, or detach all its \
                 devices first",
                size::bytes(found.payload_bytes),
                size::bytes(bytes)
            );
            return Err(Refusals::one(what(), reason));
        }
        if args.policy.is_some_and(|p| p.to_raw() != found.policy) {
            let reason = "it exists with another policy; change it with dtloop set";
            return Err(Refusals::one(what(), reason));
        }
        Ok(Self {
            id: found.stream_id,
            created: false,
        })
    }

    /// Leaves things as they were.
    fn undo(&self, control: &Control) {
        if self.created {
            if let Err(error) = control.destroy_stream(self.id, false) {
                output::note(&format!("the empty set was left behind: {error}"));
            }
        }
    }
}

/// The number for `auto`. The module would choose one that is free in its own table; if the stock
/// driver has a device of that number, only registering the disk fails, with a stack dump in the
/// kernel's log.
fn free_number(system: &System, control: &Control) -> u32 {
    let first = u32::try_from(control.features().auto_first).unwrap_or(0);
    let loops = system.stock_loops(&[]);
    (first..)
        .find(|number| !loops.contains_key(number))
        .unwrap_or(first)
}

fn attach(
    context: &Context<'_>,
    args: &Attach,
    dev: DevNumber,
    control: &Control,
    stream_id: u32,
) -> anyhow::Result<Attached> {
    let path = args.device.display().to_string();
    // Read-only is enough: the module opens the device itself, and a writer that closes it again
    // would have udev look at it.
    let file = File::open(&args.device).with_context(|| format!("Cannot open {path}"))?;
    if DevNumber::from_raw(file.metadata()?.rdev()) != dev {
        return Err(Refusals::one(path, "it was replaced by another device just now").into());
    }
    let number = match args.number {
        LoopNumber::Auto => free_number(&context.system, control),
        LoopNumber::Pinned(number) => number,
    };
    let borrowed = Borrowed::new(&context.global.run_dir);
    borrowed.take(&context.system, number)?;
    let request = AttachRequest {
        backing: Backing::Fd(file.as_fd()),
        offset_bytes: args.offset,
        limit_bytes: args.size_limit.unwrap_or(0),
        number: Some(number),
        stream_id,
        label: args.volume.unwrap_or(Name::EMPTY),
        identity: context
            .system
            .name_of(dev)
            .map_or([0; 16], |name| context.system.identity(&name, args.offset)),
        read_only: args.read_only,
        partscan: args.partscan,
    };
    control.attach(&request).map_err(|error| {
        if let Err(error) = borrowed.give_back(&context.system, number) {
            output::note(&format!("stock loop{number} was not put back: {error:#}"));
        }
        anyhow::Error::from(error).context(format!("{path} was not attached"))
    })
}

fn report(
    context: &Context<'_>,
    args: &Attach,
    stream: &Stream,
    attached: Attached,
) -> anyhow::Result<()> {
    let path = loop_path(attached.number);
    if !context.global.json {
        return output::line(&path);
    }
    output::json(&json!({
        "loop": path,
        "number": attached.number,
        "device_id": attached.device_id,
        "backing": args.device,
        "set": args.set.as_str(),
        "set_created": stream.created,
        "stream_id": stream.id,
    }))
}
