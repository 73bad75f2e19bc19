// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop config`: the entries of `/etc/DT/dtloop_devices`.

use std::ffi::OsString;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, bail};
use dtloop_manage::entries::check::check;
use dtloop_manage::entries::text::Lines;
use dtloop_manage::entries::{self, Entry, Finding, Severity, file};
use serde_json::json;

use super::Context;
use super::fleet::{attached, list};
use crate::args::{Config, ConfigAdd};
use crate::exit::Code;
use crate::output;

pub(crate) fn run(context: &Context<'_>, args: &Config) -> anyhow::Result<Code> {
    match args {
        Config::Add(args) => add(context, args),
        Config::Remove { which } => remove(context, which),
        Config::List => list(context),
        Config::Check => check_all(context),
        Config::Edit => edit(context),
    }
}

fn add(context: &Context<'_>, args: &ConfigAdd) -> anyhow::Result<Code> {
    let better = args.device.better(&context.manager.system);
    let device = match better.filter(|_| args.stable) {
        Some((name, _)) => entries::name::DeviceName::parse(&name).map_err(anyhow::Error::msg)?,
        None => args.device.clone(),
    };
    let entry = Entry {
        device,
        number: args.number,
        options: args.options.clone(),
    };
    let path = &context.global.entries;
    let found = entries::add(
        &context.manager,
        path,
        &entry,
        &attached(context)?,
        args.force,
    )?;
    for finding in &found {
        output::note(&finding.message);
    }
    if context.global.json {
        output::json(&json!({ "added": entry.to_string(), "findings": found }))?;
    } else {
        output::line(&format!("added to {}: {entry}", path.display()))?;
        output::line("dtloop attach --all attaches it, and so does dtmount start")?;
    }
    Ok(Code::Done)
}

fn remove(context: &Context<'_>, which: &str) -> anyhow::Result<Code> {
    let path = &context.global.entries;
    let removed = entries::remove(&context.manager, path, which)?;
    if context.global.json {
        output::json(&json!({ "line": removed.line, "removed": removed.entry.to_string() }))?;
    } else {
        output::line(&format!(
            "removed from {}: {}",
            path.display(),
            removed.entry
        ))?;
    }
    Ok(Code::Done)
}

fn check_all(context: &Context<'_>) -> anyhow::Result<Code> {
    let lines = file::read(&context.global.entries)?;
    let found = check(&context.manager, &lines, &attached(context)?);
    let is_good = show(context, &lines, &found)?;
    Ok(if is_good { Code::Done } else { Code::Refused })
}

/// Shows what was found; true if nothing is wrong.
fn show(context: &Context<'_>, lines: &Lines, found: &[Finding]) -> anyhow::Result<bool> {
    let errors = found
        .iter()
        .filter(|finding| finding.severity == Severity::Error)
        .count();
    if context.global.json {
        output::json(&json!({ "path": context.global.entries, "findings": found }))?;
        return Ok(errors == 0);
    }
    for finding in found {
        output::line(&format!("{}:{finding}", context.global.entries.display()))?;
    }
    let count = lines.entries().0.len() as u64;
    if errors == 0 {
        output::line(&format!(
            "{} can be used",
            output::count(count, if count == 1 { "entry" } else { "entrie" })
        ))?;
    }
    Ok(errors == 0)
}

/// As `visudo` does it: a copy is edited, and taken when it is good or when that is insisted on.
fn edit(context: &Context<'_>) -> anyhow::Result<Code> {
    let path = &context.global.entries;
    let before = file::read(path)?;
    let mut copy = tempfile::Builder::new()
        .prefix("dtloop_devices.")
        .tempfile()
        .context("Cannot make a file to edit")?;
    copy.write_all(&before.bytes())?;
    copy.flush()?;
    loop {
        run_editor(copy.path())?;
        let lines = file::read(copy.path())?;
        if lines == before {
            output::line("nothing was changed")?;
            return Ok(Code::Done);
        }
        let found = check(&context.manager, &lines, &attached(context)?);
        if !show(context, &lines, &found)? {
            match ask()? {
                Answer::Again => continue,
                Answer::Quit => {
                    output::line(&format!("{} is as it was", path.display()))?;
                    return Ok(Code::Refused);
                }
                Answer::Take => {}
            }
        }
        file::change(path, |now| {
            if *now != before {
                bail!(
                    "{} was changed by somebody else meanwhile; edit it again",
                    path.display()
                );
            }
            *now = lines;
            Ok(())
        })?;
        output::line(&format!(
            "{} is changed; dtloop attach --all attaches what is new",
            path.display()
        ))?;
        return Ok(Code::Done);
    }
}

fn run_editor(path: &Path) -> anyhow::Result<()> {
    let named = ["VISUAL", "EDITOR"].into_iter().find_map(std::env::var_os);
    let editor = named.unwrap_or_else(|| OsString::from("editor"));
    // May have arguments, as everywhere: a shell takes it apart.
    let mut script = editor;
    script.push(" \"$1\"");
    let status = Command::new("sh")
        .arg("-c")
        .arg(&script)
        .arg("editor")
        .arg(path)
        .status()
        .context("Cannot run the editor; set EDITOR")?;
    if !status.success() {
        bail!("the editor failed; nothing was changed. EDITOR says which one is run");
    }
    Ok(())
}

enum Answer {
    Again,
    Take,
    Quit,
}

fn ask() -> anyhow::Result<Answer> {
    if !io::stdin().is_terminal() {
        return Ok(Answer::Quit);
    }
    loop {
        output::text(
            "Edit again (e), take it nevertheless (t), or leave the file as it was (q)? ",
        )?;
        let mut answer = String::new();
        if io::stdin().lock().read_line(&mut answer)? == 0 {
            return Ok(Answer::Quit);
        }
        match answer.trim() {
            "e" => return Ok(Answer::Again),
            "t" => return Ok(Answer::Take),
            "q" => return Ok(Answer::Quit),
            _ => {}
        }
    }
}
