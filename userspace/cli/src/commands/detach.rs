// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop detach`

use dtloop_abi::{CaptureStream, Control, Stream, raw};
use nix::errno::Errno;
use serde_json::json;

use super::{Context, attached, find_device, loop_path, patient};
use crate::args::Detach;
use crate::exit::Code;
use crate::preflight::Refusals;
use crate::stock::Borrowed;
use crate::system::{DevNumber, System, node};
use crate::{output, size};

pub(crate) fn run(context: &Context<'_>, args: &Detach) -> anyhow::Result<Code> {
    let control = context.control()?;
    let (device, left) = context.change(&control, || detach(context, args, &control))?;
    report(context, &device, &left)?;
    Ok(Code::Done)
}

fn detach(
    context: &Context<'_>,
    args: &Detach,
    control: &Control,
) -> anyhow::Result<(raw::DeviceStatus, Left)> {
    let device = find_device(&context.system, &attached(control)?, &args.device)?;
    let number = device.loop_number();
    let detached = patient(
        || control.detach(number, args.force),
        || users(&context.system, number).is_passing(),
    );
    if let Err(error) = detached {
        if error.is(Errno::EBUSY) {
            return Err(users(&context.system, number).refuse(&device).into());
        }
        let context = format!("{} was not detached", loop_path(number));
        return Err(anyhow::Error::from(error).context(context));
    }
    let borrowed = Borrowed::new(&context.global.run_dir);
    if let Err(error) = borrowed.give_back(&context.system, number) {
        output::note(&format!("stock loop{number} was not put back: {error:#}"));
    }
    let left = clean_up(control, device.stream_id, args.discard_records)?;
    Ok((device, left))
}

/// Who has a device open.
#[derive(Debug, Default)]
pub(super) struct Users {
    /// Mounts, swap, what is built upon it.
    lasting: Vec<String>,
    programs: Vec<String>,
}

impl Users {
    /// True when nobody is seen but udev, which looks at a device after each event and lets go.
    pub(super) fn is_passing(&self) -> bool {
        let passing = |program: &String| program.contains("udev");
        self.lasting.is_empty() && self.programs.iter().all(passing)
    }

    fn refuse(self, device: &raw::DeviceStatus) -> Refusals {
        let mut reasons = self.lasting;
        if !self.programs.is_empty() {
            reasons.push(format!("open by {}", self.programs.join(", ")));
        }
        if reasons.is_empty() {
            reasons.push(format!(
                "it is open {}",
                output::count(device.openers.into(), "time")
            ));
        }
        Refusals {
            what: format!("{} is in use", loop_path(device.loop_number())),
            reasons,
        }
    }
}

pub(super) fn users(system: &System, number: u32) -> Users {
    let mut users = Users::default();
    let uses = system.uses();
    let mut paths = vec![loop_path(number)];
    let disk = system.block(&format!("loop{number}"));
    let partitions = disk.iter().flat_map(|disk| disk.partitions.iter());
    for name in disk.iter().map(|disk| &disk.name).chain(partitions) {
        let path = node(name);
        let block = system.block(name).unwrap_or_default();
        if let Some(dev) = block.number {
            let places = uses.mounts(dev).iter();
            users
                .lasting
                .extend(places.map(|place| format!("{path} is mounted on {place}")));
            if uses.is_swap(dev) {
                users.lasting.push(format!("{path} is used as swap"));
            }
        }
        let holders = block.holders.iter();
        users
            .lasting
            .extend(holders.map(|holder| format!("{path} is in use by {holder}")));
        paths.push(path);
    }
    users.programs = system.openers(&paths);
    users
}

/// What became of the set.
#[derive(Debug, PartialEq, Eq)]
enum Left {
    /// Other devices use it.
    Devices(u32),
    /// It is gone.
    Nothing,
    /// The agent has it open and closes it when it has everything.
    Agent,
    /// Records wait for an agent.
    Records { records: u64, bytes: u64 },
}

/// Destroys the set's stream when nothing needs it any more.
fn clean_up(control: &Control, stream_id: u32, discard: bool) -> anyhow::Result<Left> {
    let found = control.stream_from(stream_id)?;
    let Some(status) = found.filter(|status| status.stream_id == stream_id) else {
        return Ok(Left::Nothing);
    };
    if status.devices > 0 {
        return Ok(Left::Devices(status.devices));
    }
    let discard = discard || !holds_changes(&status);
    match control.destroy_stream(stream_id, discard) {
        Ok(()) => Ok(Left::Nothing),
        Err(error) if error.is(Errno::ENOENT) => Ok(Left::Nothing),
        Err(error) if error.is(Errno::EBUSY) => Ok(Left::Agent),
        Err(error) if error.is(Errno::ENOTEMPTY) => Ok(Left::Records {
            records: status.next_seq.saturating_sub(status.released),
            bytes: status.used_bytes,
        }),
        Err(error) => Err(error.into()),
    }
}

/// True unless the stream is known to hold only records that change no byte: devices that came and
/// went, and flushes. Without this, a device that was attached and detached again with no agent
/// around would leave its set behind.
fn holds_changes(status: &raw::StreamStatus) -> bool {
    if status.used_bytes > 0 || status.has(raw::STREAM_CONSUMER) {
        return true;
    }
    let Ok(stream) = Stream::open(status.stream_id) else {
        return true;
    };
    let Ok(hold) = stream.ring().hold(status.released) else {
        return true;
    };
    let harmless = |op| {
        matches!(
            op,
            raw::OP_ATTACH | raw::OP_DETACH | raw::OP_RESIZE | raw::OP_FLUSH
        )
    };
    let all_harmless = hold
        .iter()
        .all(|record| record.is_ok_and(|record| harmless(record.desc.op)));
    hold.end() < status.next_seq || !all_harmless
}

fn report(context: &Context<'_>, device: &raw::DeviceStatus, left: &Left) -> anyhow::Result<()> {
    let path = loop_path(device.loop_number());
    if context.global.json {
        let (records, bytes) = match left {
            Left::Records { records, bytes } => (*records, *bytes),
            _ => (0, 0),
        };
        return output::json(&json!({
            "loop": path,
            "backing": device.backing_name(),
            "backing_number": DevNumber::from_raw(device.backing_dev).to_string(),
            "set_removed": *left == Left::Nothing,
            "agent_has_set": *left == Left::Agent,
            "records_waiting": records,
            "bytes_waiting": bytes,
        }));
    }
    output::line(&format!("{path} detached from {}", device.backing_name()))?;
    match left {
        Left::Devices(_) | Left::Nothing => Ok(()),
        Left::Agent => output::line("The agent ships what is left of the set."),
        Left::Records { records, bytes } => output::line(&format!(
            "{} ({}) wait for the agent; the set stays until it has them. \
             dtloop set NAME --remove --discard-records throws them away.",
            output::count(*records, "record"),
            size::bytes(*bytes)
        )),
    }
}
