// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop mirror`, `verify` and `wait`: what the agent is asked to do.

use std::process::exit;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use dtloop_api::{
    ClientError, MirrorKind, MirrorResult, Outcome, Reply, Request, VerifyResult, WaitResult,
};
use dtloop_manage::attach::loop_number;
use dtloop_manage::size;
use dtloop_manage::{Manager, find_device, loop_path};

use super::Context;
use super::progress::Display;
use super::verify_log;
use crate::args::{Mirror, Resync, Selection, Verify, Wait};
use crate::exit::Code;
use crate::output;

pub(crate) fn mirror(context: &Context<'_>, args: &Mirror) -> anyhow::Result<Code> {
    let (request, done) = match args {
        Mirror::Start {
            selection,
            full: _,
            difference,
            background,
        } => {
            let (set, devices) = select(context, selection)?;
            let kind = if *difference {
                MirrorKind::Difference
            } else {
                MirrorKind::Full
            };
            let request = Request::MirrorStart {
                set,
                devices,
                kind,
                follow: !background,
            };
            (request, "mirror started")
        }
        Mirror::Resume {
            selection,
            background,
        } => {
            let (set, devices) = select(context, selection)?;
            let follow = !background;
            let request = Request::MirrorResume {
                set,
                devices,
                follow,
            };
            (request, "mirror goes on")
        }
        Mirror::Pause { selection } => {
            let (set, devices) = select(context, selection)?;
            (Request::MirrorPause { set, devices }, "mirror paused")
        }
        Mirror::Stop { selection } => {
            let (set, devices) = select(context, selection)?;
            (Request::MirrorStop { set, devices }, "mirror stopped")
        }
    };
    let goes_on = "the mirror goes on. dtloop status shows it, dtloop mirror stop ends it.";
    let outcome = ask(context, &request, goes_on)?;
    report(context, &outcome, done)
}

pub(crate) fn verify(context: &Context<'_>, args: &Verify) -> anyhow::Result<Code> {
    if args.log {
        return verify_log::run(context, &args.selection.set.to_string(), args.most);
    }
    let (set, devices) = select(context, &args.selection)?;
    let request = Request::Verify {
        set,
        devices,
        repair: args.repair,
        follow: !args.background,
    };
    let goes_on = "the verification goes on. dtloop status shows its result.";
    let outcome = ask(context, &request, goes_on)?;
    report(context, &outcome, "verification started")
}

pub(crate) fn resync(context: &Context<'_>, args: &Resync) -> anyhow::Result<Code> {
    let request = Request::ResyncInPlace {
        set: args.set.to_string(),
    };
    let outcome = ask(context, &request, "nothing was changed.")?;
    report(context, &outcome, "the target goes on in its volumes")
}

pub(crate) fn wait(context: &Context<'_>, args: &Wait) -> anyhow::Result<Code> {
    let timeout_ms = args.timeout.map(|timeout| {
        // No limit worth the name is beyond 584 million years.
        u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)
    });
    let request = Request::Wait {
        set: args.set.to_string(),
        timeout_ms,
    };
    let outcome = ask(context, &request, "nothing was changed.")?;
    report(context, &outcome, "done")
}

/// The set's name and the loop numbers of the devices that were named.
fn select(context: &Context<'_>, selection: &Selection) -> anyhow::Result<(String, Vec<u32>)> {
    let by_number = |text: &String| loop_number(text);
    let numbers: Option<Vec<u32>> = selection.devices.iter().map(by_number).collect();
    let numbers = match numbers {
        Some(numbers) => numbers,
        None => {
            let devices = Manager::attached(&context.control()?)?;
            let find = |text: &String| find_device(&context.manager.system, &devices, text);
            let found = selection.devices.iter().map(find);
            let number = |device: Result<dtloop_abi::raw::DeviceStatus, _>| {
                device.map(|device| device.loop_number())
            };
            found.map(number).collect::<Result<_, _>>()?
        }
    };
    Ok((selection.set.to_string(), numbers))
}

/// Asks the agent and shows progress. Ctrl-C ends the watching only, and says so.
fn ask(context: &Context<'_>, request: &Request, goes_on: &'static str) -> anyhow::Result<Outcome> {
    let mut agent = context.agent()?;
    let mut display = Display::new();
    let bars = display.bars();
    ctrlc::set_handler(move || {
        if let Some(bars) = &bars {
            // Nothing to do when the terminal is gone.
            let _ = bars.clear();
        }
        output::note(&format!("interrupted; {goes_on}"));
        exit(Code::Interrupted.number().into());
    })
    .context("Cannot watch for Ctrl-C")?;

    let mut answer = agent.request(request)?;
    let result = loop {
        let reply = answer.next_reply()?;
        if context.global.json {
            output::line(&serde_json::to_string(&reply)?)?;
        }
        match reply {
            Reply::Progress(progress) if !context.global.json => {
                display.show(&progress, Instant::now());
            }
            Reply::Progress(_) => {}
            Reply::Done(outcome) => break Ok(outcome),
            Reply::Failed(failure) => break Err(ClientError::Failed(failure).into()),
        }
    };
    display.clear();
    result
}

fn report(context: &Context<'_>, outcome: &Outcome, done: &str) -> anyhow::Result<Code> {
    let (text, code) = judge(outcome, done)?;
    // With --json the answer has been written as it came.
    if !context.global.json {
        output::text(&text)?;
    }
    Ok(code)
}

/// What is said of an outcome, and the exit code.
fn judge(outcome: &Outcome, done: &str) -> Result<(String, Code), ClientError> {
    let both = |lines: Vec<(String, Code)>| {
        let worst = [Code::Failed, Code::Differs]
            .into_iter()
            .find(|code| lines.iter().any(|(_, found)| found == code));
        let text: String = lines.into_iter().map(|(line, _)| line).collect();
        (text, worst.unwrap_or(Code::Done))
    };
    Ok(match outcome {
        Outcome::Ok => (format!("{done}\n"), Code::Done),
        Outcome::Started(numbers) => {
            let names: Vec<String> = numbers.iter().map(|n| loop_path(*n)).collect();
            (format!("{done}: {}\n", names.join(", ")), Code::Done)
        }
        Outcome::Mirror(results) => both(results.iter().map(mirrored).collect()),
        Outcome::Verify(results) => both(results.iter().map(verified).collect()),
        Outcome::Wait(result) => (waited(result), Code::Done),
        Outcome::Status(_) | Outcome::Bandwidth(_) | Outcome::VerifyLog(_) => {
            return Err(ClientError::Unexpected);
        }
    })
}

fn name(number: u32, label: &str) -> String {
    match label {
        "" => format!("loop{number}"),
        label => format!("loop{number} ({label})"),
    }
}

fn reason(reason: Option<&String>) -> &str {
    reason.map_or("no reason given", String::as_str)
}

fn mirrored(result: &MirrorResult) -> (String, Code) {
    let name = name(result.number, &result.label);
    if !result.complete {
        let why = reason(result.reason.as_ref());
        return (format!("{name}: not mirrored: {why}\n"), Code::Failed);
    }
    let pass = &result.pass;
    let line = format!(
        "{name}: in sync, {} looked at, {} sent, in {}\n",
        size::bytes(pass.total_bytes),
        size::bytes(pass.sent_bytes),
        size::duration(Duration::from_millis(pass.elapsed_ms))
    );
    (line, Code::Done)
}

fn verified(result: &VerifyResult) -> (String, Code) {
    let name = name(result.number, &result.label);
    let differing = size::bytes(result.differing_bytes);
    if !result.complete {
        let why = reason(result.reason.as_ref());
        let mut text = format!("{name}: not verified: {why}\n");
        if result.differing_bytes > 0 {
            text += &format!("{name}: {differing} differed until then\n");
        }
        return (text + &ranges(result), Code::Failed);
    }
    let compared = format!(
        "{} compared in {}",
        size::bytes(result.compared_bytes),
        size::duration(Duration::from_millis(result.elapsed_ms))
    );
    let (found, code) = match result {
        result if result.differing_bytes == 0 => ("identical".to_owned(), Code::Done),
        result if result.is_identical() => (
            format!("{differing} differed and were repaired"),
            Code::Done,
        ),
        result if result.repaired_bytes > 0 => {
            let repaired = size::bytes(result.repaired_bytes);
            let found = format!("{differing} differed, {repaired} of them were repaired");
            (found, Code::Differs)
        }
        _ => (format!("{differing} differ"), Code::Differs),
    };
    (
        format!("{name}: {found}, {compared}\n") + &ranges(result),
        code,
    )
}

/// The ranges that differed, whether or not they were repaired: where they are tells what may have been at work.
fn ranges(result: &VerifyResult) -> String {
    let mut text = String::new();
    for extent in result.extents.iter().take(EXTENTS_SHOWN) {
        text += &format!(
            "  at byte {}, {} bytes, compared at record {}\n",
            extent.start, extent.bytes, extent.last_seq
        );
    }
    if result.extents.len() > EXTENTS_SHOWN {
        text += &format!(
            "  and {} more ranges; --json lists them, dtloop verify --log shows both sides\n",
            result.extents.len() - EXTENTS_SHOWN
        );
    }
    text
}

/// Differing ranges that are shown: enough to see a pattern, few enough for one screen.
const EXTENTS_SHOWN: usize = 16;

fn waited(result: &WaitResult) -> String {
    format!(
        "the target has every record below {}, after {}\n",
        result.seq,
        size::duration(Duration::from_millis(result.elapsed_ms))
    )
}

#[cfg(test)]
mod tests {
    use dtloop_api::ByteRange;

    use super::*;

    fn result(differing_bytes: u64, repaired_bytes: u64) -> VerifyResult {
        VerifyResult {
            number: 1,
            label: "vol".into(),
            complete: true,
            reason: None,
            compared_bytes: 1 << 30,
            differing_bytes,
            repaired_bytes,
            extents: vec![ByteRange {
                start: 4096,
                bytes: 4096,
                first_seq: 7,
                last_seq: 7,
            }],
            from_seq: 1,
            to_seq: 2,
            finished_unix_ms: 0,
            elapsed_ms: 2000,
        }
    }

    #[test]
    fn differences_have_their_own_exit_code() {
        let code = |results| judge(&Outcome::Verify(results), "").unwrap().1;
        assert_eq!(code(vec![result(0, 0)]), Code::Done);
        assert_eq!(code(vec![result(4096, 4096)]), Code::Done);
        assert_eq!(code(vec![result(0, 0), result(4096, 0)]), Code::Differs);
        let incomplete = VerifyResult {
            complete: false,
            ..result(4096, 0)
        };
        assert_eq!(code(vec![result(4096, 0), incomplete]), Code::Failed);
    }

    #[test]
    fn differences_are_listed() {
        let (text, _) = verified(&result(4096, 0));
        let expected = "\
loop1 (vol): 4 KiB differ, 1 GiB compared in 2.0s
  at byte 4096, 4096 bytes, compared at record 7
";
        assert_eq!(text, expected);
        let (text, _) = verified(&result(4096, 4096));
        assert!(
            text.contains("differed and were repaired") && text.contains("at byte 4096,"),
            "{text}"
        );
        let mut many = result(4096, 0);
        many.extents = vec![many.extents[0]; 1000];
        let (text, _) = verified(&many);
        assert_eq!(text.lines().count(), 18, "{text}");
        assert!(text.contains("and 984 more ranges"), "{text}");
    }

    #[test]
    fn a_mirror_that_ended_early_failed() {
        let result = MirrorResult {
            number: 1,
            label: String::new(),
            complete: false,
            reason: Some("stopped by dtloop mirror stop".into()),
            pass: dtloop_api::Pass::default(),
        };
        let (text, code) = judge(&Outcome::Mirror(vec![result]), "").unwrap();
        assert_eq!(text, "loop1: not mirrored: stopped by dtloop mirror stop\n");
        assert_eq!(code, Code::Failed);
    }
}
