// SPDX-License-Identifier: GPL-2.0-only

//! All entries of `/etc/DT/dtloop_devices` at once: `dtmount`, `dtloop attach --all`, `dtloop detach --all`, `dtloop config list`.

use dtloop_abi::raw;
use dtloop_manage::detach::Left;
use dtloop_manage::entries::check::{Seen, look};
use dtloop_manage::entries::file;
use dtloop_manage::entries::text::{Lines, Placed};
use dtloop_manage::fleet::{Attached, Detached, Fleet};
use dtloop_manage::{Manager, loop_path, size};
use serde_json::{Value, json};

use super::Context;
use crate::args::{AttachAll, DetachAll};
use crate::exit::Code;
use crate::output;

/// What became of all entries.
#[derive(Debug, Default)]
struct Tally {
    done: usize,
    failed: usize,
    /// For `--json`.
    rows: Vec<Value>,
}

impl Tally {
    /// Notes what became of an entry, and tells it unless all is told in the end.
    fn add(
        &mut self,
        context: &Context<'_>,
        placed: &Placed,
        state: &str,
        text: &str,
    ) -> anyhow::Result<()> {
        self.rows.push(json!({
            "line": placed.line,
            "device": placed.entry.device.to_string(),
            "state": state,
            "message": text,
        }));
        if context.global.json {
            return Ok(());
        }
        output::line(text)
    }

    fn fail(&mut self, context: &Context<'_>, placed: &Placed, reason: &str) {
        self.failed += 1;
        let text = format!("line {}, {}: {reason}", placed.line, placed.entry.device);
        self.rows.push(json!({
            "line": placed.line,
            "device": placed.entry.device.to_string(),
            "state": "failed",
            "message": reason,
        }));
        if !context.global.json {
            output::note(&text);
        }
    }

    /// Lines that could not be read belong to no entry.
    fn unreadable(&mut self, context: &Context<'_>, lines: &Lines) {
        for finding in lines.entries().1 {
            self.failed += 1;
            output::note(&format!("{}:{finding}", context.global.entries.display()));
        }
    }

    fn end(self, context: &Context<'_>, nothing: &str) -> anyhow::Result<Code> {
        if context.global.json {
            output::json(&self.rows)?;
        } else if self.rows.is_empty() && self.failed == 0 {
            output::line(nothing)?;
        }
        Ok(match (self.done, self.failed) {
            (_, 0) => Code::Done,
            (0, _) => Code::Refused,
            _ => Code::Partly,
        })
    }
}

fn nothing(context: &Context<'_>) -> String {
    format!("{} has no entries", context.global.entries.display())
}

fn fleet<'a>(context: &'a Context<'_>, lines: &'a Lines) -> Fleet<'a> {
    Fleet {
        manager: &context.manager,
        lines,
        numbers: context.global.numbers.clone(),
    }
}

/// Attaches all entries that are not attached.
pub(crate) fn attach_all(context: &Context<'_>, args: &AttachAll) -> anyhow::Result<Code> {
    let lines = file::read(&context.global.entries)?;
    let mut tally = Tally::default();
    tally.unreadable(context, &lines);
    // Without entries the module need not be loaded.
    if lines.entries().0.is_empty() {
        return tally.end(context, &nothing(context));
    }
    let control = context.control()?;
    fleet(context, &lines).attach(&control, args.wait, args.noauto, |placed, outcome| {
        let device = &placed.entry.device;
        match outcome {
            Attached::Now { number, before } => {
                tally.done += 1;
                let mut text = format!("{device} attached to {}", loop_path(number));
                if let Some(before) = before {
                    text += &format!("; it had {} before, which is taken now", loop_path(before));
                }
                tally.add(context, placed, "attached", &text)
            }
            Attached::Already(number) => {
                tally.done += 1;
                let text = format!("{device} is attached to {} already", loop_path(number));
                tally.add(context, placed, "already", &text)
            }
            Attached::NotWanted => {
                let text = format!("{device} is not attached by itself (noauto)");
                tally.add(context, placed, "noauto", &text)
            }
            Attached::Missing(reason) => {
                tally.fail(
                    context,
                    placed,
                    &format!("{reason}; connect the disk, then dtloop attach --all"),
                );
                Ok(())
            }
            Attached::Failed(error) => {
                tally.fail(context, placed, &output::chain(&error));
                Ok(())
            }
        }
    })?;
    tally.end(context, &nothing(context))
}

/// Detaches all entries that are attached.
pub(crate) fn detach_all(
    context: &Context<'_>,
    args: &DetachAll,
    unmount: bool,
) -> anyhow::Result<Code> {
    let lines = file::read(&context.global.entries)?;
    let mut tally = Tally::default();
    tally.unreadable(context, &lines);
    let control = match context.control() {
        // Nothing is attached then.
        Err(dtloop_abi::Error::NoModule) => {
            return tally.end(context, "the module is not loaded: nothing is attached");
        }
        other => other?,
    };
    let unmount = unmount && !args.no_unmount;
    fleet(context, &lines).detach(&control, unmount, |placed, outcome| {
        let device = &placed.entry.device;
        match outcome {
            Detached::Now {
                number,
                unmounted,
                left,
            } => {
                tally.done += 1;
                for place in &unmounted {
                    tally.add(context, placed, "unmounted", &format!("{place} unmounted"))?;
                }
                let text = format!(
                    "{} detached from {device}{}",
                    loop_path(number),
                    waiting(left)
                );
                tally.add(context, placed, "detached", &text)
            }
            Detached::NotAttached => {
                tally.done += 1;
                tally.add(
                    context,
                    placed,
                    "not attached",
                    &format!("{device} is not attached"),
                )
            }
            Detached::Failed(error) => {
                tally.fail(context, placed, &output::chain(&error));
                Ok(())
            }
        }
    })?;
    tally.end(context, &nothing(context))
}

fn waiting(left: Left) -> String {
    match left {
        Left::Devices(_) | Left::Nothing | Left::Agent => String::new(),
        Left::Records { records, bytes } => format!(
            "; {} ({}) wait for the agent",
            output::count(records, "record"),
            size::bytes(bytes)
        ),
    }
}

/// Shows the entries.
pub(crate) fn list(context: &Context<'_>) -> anyhow::Result<Code> {
    let lines = file::read(&context.global.entries)?;
    let attached = attached(context)?;
    let (entries, findings) = lines.entries();
    let seen = look(&context.manager.system, &entries, &attached);
    if context.global.json {
        output::json(&json!({
            "entries": seen.iter().map(row_json).collect::<Vec<_>>(),
            "unreadable": findings,
        }))?;
    } else if seen.is_empty() && findings.is_empty() {
        output::line(&nothing(context))?;
    } else {
        let mut rows = vec![output::row([
            "LINE", "DEVICE", "LOOP", "SET", "VOLUME", "STATE",
        ])];
        rows.extend(seen.iter().map(row));
        output::text(&output::table(&rows, &[0]))?;
        for finding in &findings {
            output::note(&format!("{}:{finding}", context.global.entries.display()));
        }
    }
    Ok(if findings.is_empty() {
        Code::Done
    } else {
        Code::Refused
    })
}

/// The devices of the module; none without it.
pub(crate) fn attached(context: &Context<'_>) -> anyhow::Result<Vec<raw::DeviceStatus>> {
    match context.control() {
        Ok(control) => Ok(Manager::attached(&control)?),
        Err(dtloop_abi::Error::NoModule | dtloop_abi::Error::NoPermission { .. }) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

fn state(seen: &Seen) -> (&'static str, String) {
    match (seen.attached, &seen.device) {
        (Some(number), _) => ("attached", format!("attached to {}", loop_path(number))),
        (None, Ok(_)) => ("not attached", "not attached".to_owned()),
        (None, Err(reason)) => ("missing", reason.clone()),
    }
}

fn row(seen: &Seen) -> Vec<String> {
    let entry = &seen.placed.entry;
    let name =
        |name: Option<dtloop_abi::Name>| name.map_or_else(String::new, |name| name.to_string());
    vec![
        seen.placed.line.to_string(),
        entry.device.to_string(),
        entry.number.to_string(),
        entry.options.set_name().to_string(),
        name(entry.options.volume),
        state(seen).1,
    ]
}

fn row_json(seen: &Seen) -> Value {
    let entry = &seen.placed.entry;
    let (state, message) = state(seen);
    json!({
        "line": seen.placed.line,
        "device": entry.device.to_string(),
        "path": entry.device.path(),
        "loop": entry.number.to_string(),
        "options": entry.options.to_string(),
        "set": entry.options.set_name().as_str(),
        "volume": entry.options.volume.map(|name| name.to_string()),
        "state": state,
        "message": message,
        "attached_to": seen.attached.map(loop_path),
    })
}
