// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop detach`

use dtloop_abi::raw;
use dtloop_manage::detach::{Left, detach};
use dtloop_manage::system::DevNumber;
use dtloop_manage::{loop_path, size};
use serde_json::json;

use super::Context;
use crate::args::{Detach, DetachAll};
use crate::exit::Code;
use crate::output;

pub(crate) fn run(context: &Context<'_>, args: &Detach) -> anyhow::Result<Code> {
    let Some(device) = &args.device else {
        return super::fleet::detach_all(context, &DetachAll { no_unmount: true }, false);
    };
    let control = context.control()?;
    let (device, left) = detach(
        &context.manager,
        &control,
        device,
        args.force,
        args.discard_records,
    )?;
    report(context, &device, left)?;
    Ok(Code::Done)
}

fn report(context: &Context<'_>, device: &raw::DeviceStatus, left: Left) -> anyhow::Result<()> {
    let path = loop_path(device.loop_number());
    if context.global.json {
        let (records, bytes) = match left {
            Left::Records { records, bytes } => (records, bytes),
            _ => (0, 0),
        };
        return output::json(&json!({
            "loop": path,
            "backing": device.backing_name(),
            "backing_number": DevNumber::from_raw(device.backing_dev).to_string(),
            "set_removed": left == Left::Nothing,
            "agent_has_set": left == Left::Agent,
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
            output::count(records, "record"),
            size::bytes(bytes)
        )),
    }
}
