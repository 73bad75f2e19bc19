// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop attach`

use dtloop_manage::attach::{Done, Wanted, attach};
use dtloop_manage::loop_path;
use serde_json::json;

use super::Context;
use crate::args::{Attach, AttachAll};
use crate::exit::Code;
use crate::output;

pub(crate) fn run(context: &Context<'_>, args: &Attach) -> anyhow::Result<Code> {
    if args.all {
        return super::fleet::attach_all(context, &AttachAll::now());
    }
    let wanted = args.wanted();
    // What is no block device is told also where there is no module.
    dtloop_manage::attach::block_device(&wanted)?;
    let control = context.control()?;
    let done = attach(&context.manager, &control, &wanted)?;
    report(context, &wanted, &done)?;
    Ok(Code::Done)
}

fn report(context: &Context<'_>, wanted: &Wanted, done: &Done) -> anyhow::Result<()> {
    let path = loop_path(done.attached.number);
    if !context.global.json {
        return output::line(&path);
    }
    output::json(&json!({
        "loop": path,
        "number": done.attached.number,
        "device_id": done.attached.device_id,
        "backing": wanted.device,
        "set": wanted.set.as_str(),
        "set_created": done.set_created,
        "stream_id": done.stream_id,
    }))
}
