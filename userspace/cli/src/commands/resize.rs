// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop resize` and `dtloop set`: changing what is there.

use anyhow::Context as _;
use dtloop_abi::Throttle;
use dtloop_abi::raw::{self, SECTOR_BYTES};
use dtloop_manage::attach;
use dtloop_manage::detach::users;
use dtloop_manage::preflight::Refusals;
use dtloop_manage::size;
use dtloop_manage::{Manager, find_device, loop_path, patient};
use serde_json::json;

use super::Context;
use crate::args::{Policy, Resize, Set};
use crate::exit::{Code, Usage};
use crate::output;

pub(crate) fn run(context: &Context<'_>, args: &Resize) -> anyhow::Result<Code> {
    let control = context.control()?;
    let (device, sectors) = context.manager.change(&control, || {
        let device = find_device(
            &context.manager.system,
            &Manager::attached(&control)?,
            &args.device,
        )?;
        let number = device.loop_number();
        let sectors = patient(
            || control.resize(number, args.size_limit.unwrap_or(0)),
            || users(&context.manager.system, number).is_passing(),
        )
        .with_context(|| format!("{} was not resized", loop_path(number)))?;
        Ok((device, sectors))
    })?;
    let (path, bytes) = (loop_path(device.loop_number()), sectors * SECTOR_BYTES);
    if context.global.json {
        output::json(&json!({
            "loop": path,
            "size_bytes": bytes,
            "size_bytes_before": device.size_bytes(),
        }))?;
    } else {
        output::line(&format!(
            "{path}: {}, was {}",
            size::bytes(bytes),
            size::bytes(device.size_bytes())
        ))?;
    }
    Ok(Code::Done)
}

pub(crate) fn set(context: &Context<'_>, args: &Set) -> anyhow::Result<Code> {
    let control = context.control()?;
    let stream = control.stream_by_name(args.set.as_str())?.ok_or_else(|| {
        Refusals::one(
            format!("set {}", args.set),
            "there is no such set; dtloop status lists them",
        )
    })?;
    let name = args.set.as_str();
    if args.remove {
        control
            .destroy_stream(stream.stream_id, args.discard_records)
            .with_context(|| format!("set {name} was not removed"))?;
        report(
            context,
            &json!({ "set": name, "removed": true }),
            "removed",
            name,
        )?;
    }
    if let Some(policy) = args.policy {
        let levels = [args.throttle_start, args.throttle_stop, args.throttle_delay];
        if policy != Policy::Throttle && levels.iter().any(Option::is_some) {
            let reason = "levels and delay belong to --policy throttle";
            return Err(Usage(reason.to_owned()).into());
        }
        let [start_percent, stop_percent, delay_ms] = levels.map(|level| level.unwrap_or(0));
        let throttle = Throttle {
            start_percent,
            stop_percent,
            delay_ms,
        };
        control
            .set_policy(
                stream.stream_id,
                attach::Policy::from(policy).to_raw(),
                throttle,
            )
            .with_context(|| format!("set {name} was not changed"))?;
        let policy = policy_name(attach::Policy::from(policy).to_raw());
        let value = json!({ "set": name, "policy": policy });
        report(context, &value, &format!("policy {policy}"), name)?;
    }
    Ok(Code::Done)
}

fn report(
    context: &Context<'_>,
    json: &serde_json::Value,
    text: &str,
    set: &str,
) -> anyhow::Result<()> {
    if context.global.json {
        output::json(json)
    } else {
        output::line(&format!("set {set}: {text}"))
    }
}

/// A policy as it is written.
pub(crate) const fn policy_name(policy: u32) -> &'static str {
    match policy {
        raw::POLICY_TRACK => "track",
        raw::POLICY_BLOCK => "block",
        raw::POLICY_THROTTLE => "throttle",
        _ => "unknown",
    }
}
