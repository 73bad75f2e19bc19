// SPDX-License-Identifier: GPL-2.0-only

//! Lets one allocation after the other fail, in every call that makes something: nothing may be left half-made.
//!
//! The kernel counts a task's allocations down from a number that the task sets for itself
//! (`Documentation/fault-injection/fault-injection.rst`, `fail-nth`), and lets the one fail at which it gets to 0. So for
//! each call the first allocation fails, then only the second one, and so on, until the call needs no more of them.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use dtloop_abi::{
    AttachRequest, Backing, CaptureStream, Control, IntentRequest, Name, Stream, StreamRequest,
    SyncRequest, raw,
};

use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};

use crate::detach::detach;
use crate::intent_file;

/// Loop number of the device that is attached again and again.
const NUMBER: u32 = 222;

/// A call with more allocations than this has a loop in it.
const MOST: u32 = 5000;

/// Where the current task tells the kernel which of its allocations shall fail.
const FAIL_NTH: &str = "/proc/thread-self/fail-nth";

/// Runs `call` with its `nth` allocation failing; also whether there was such an allocation.
///
/// `control` is open already, as opening it would be counted, too.
fn with_failure<T>(control: &File, nth: u32, call: impl FnOnce() -> T) -> Result<(T, bool)> {
    control.write_all_at(nth.to_string().as_bytes(), 0)?;
    let outcome = call();
    let mut left = [0; 16];
    let length = control.read_at(&mut left, 0)?;
    control.write_all_at(b"0", 0)?;
    let failed = left[..length].trim_ascii() == b"0";
    Ok((outcome, failed))
}

/// Repeats `call` until it got by without a failure; `undo` takes back what it made, `unchanged` checks that a call that
/// failed has made nothing. Gives how many allocations it has.
fn starve<T, E: std::fmt::Display>(
    what: &str,
    mut call: impl FnMut() -> Result<T, E>,
    mut undo: impl FnMut(T) -> Result<()>,
    mut unchanged: impl FnMut() -> Result<bool>,
) -> Result<u32> {
    let control = File::options()
        .read(true)
        .write(true)
        .open(FAIL_NTH)
        .with_context(|| format!("{FAIL_NTH}: this kernel injects no faults"))?;
    for nth in 1..MOST {
        let (outcome, failed) = with_failure(&control, nth, &mut call)?;
        let made = match outcome {
            Ok(made) => {
                undo(made).with_context(|| format!("{what}, allocation {nth}"))?;
                true
            }
            // Whatever the error is, it must not come by itself.
            Err(error) => {
                ensure!(failed, "{what} fails without cause: {error}");
                false
            }
        };
        ensure!(
            unchanged()?,
            "{what} has left something behind when allocation {nth} failed"
        );
        if !failed {
            ensure!(made && nth > 1, "{what} allocates nothing");
            return Ok(nth - 1);
        }
    }
    bail!("{what} has more than {MOST} allocations")
}

/// The same for loading the module, which must not be loaded.
pub fn load(module: &Path) -> Result<()> {
    let file = File::open(module)?;
    let absent = || Ok(!Path::new("/sys/module/dtloop").exists());
    let loading = starve(
        "loading the module",
        || finit_module(&file, c"", ModuleInitFlags::empty()),
        |()| Ok(delete_module(c"dtloop", DeleteModuleFlags::O_NONBLOCK)?),
        absent,
    )?;
    println!("allocations: {loading} loading the module");
    Ok(())
}

/// The same for giving a stream its intent file; in the end it has one, which attaching goes by.
fn starve_intent(control: &Control, set: &str) -> Result<u32> {
    let file = intent_file::make("starved-intent", 256 << 10)?;
    let id = || -> Result<u32> {
        let status = control.stream_by_name(set)?;
        Ok(status.context("no such set")?.stream_id)
    };
    let give = |format: bool| {
        let stream_id = id().map_err(|error| error.to_string())?;
        control
            .set_intent(&IntentRequest {
                stream_id,
                file: file.as_fd(),
                format,
                region_bytes: 0,
                hot_max: 0,
                idle_ms: 0,
                source: [7; 16],
            })
            .map_err(|error| error.to_string())
    };
    let status = control.stream_by_name(set)?.context("no such set")?;
    let request = StreamRequest {
        name: Name::new(set)?,
        payload_bytes: status.payload_bytes,
        desc_count: status.desc_count,
        policy: status.policy,
    };
    let count = starve(
        "giving an intent file",
        || give(true),
        |_| {
            // A stream keeps its file for life.
            control.destroy_stream(id()?, true)?;
            control.create_stream(&request)?;
            Ok(())
        },
        || Ok(!control.intent_status(id()?)?.has(raw::INTENT_ON)),
    )?;
    give(true).map_err(anyhow::Error::msg)?;
    Ok(count)
}

/// Lets every allocation of every call fail: for a set without devices and a block device that is not attached.
pub fn run(set: &str, device: &Path) -> Result<()> {
    let control = Control::open()?;
    let stream_id = control
        .stream_by_name(set)?
        .context("no such set")?
        .stream_id;
    let request = StreamRequest {
        name: Name::new("starved")?,
        payload_bytes: 4 << 20,
        desc_count: 0,
        policy: 0,
    };
    let creating = starve(
        "creating a set",
        || control.create_stream(&request),
        |id| Ok(control.destroy_stream(id, false)?),
        || Ok(control.stream_by_name("starved")?.is_none()),
    )?;
    let opening = starve(
        "opening a stream",
        || Stream::open(stream_id),
        |stream| {
            drop(stream);
            Ok(())
        },
        || Ok(control.stream_by_name(set)?.is_some()),
    )?;
    let intent = starve_intent(&control, set)?;
    let file = File::open(device)?;
    let stream_id = control
        .stream_by_name(set)?
        .context("no such set")?
        .stream_id;
    let request = AttachRequest {
        backing: Backing::Fd(file.as_fd()),
        offset_bytes: 0,
        limit_bytes: 0,
        number: Some(NUMBER),
        stream_id,
        label: Name::new("vol")?,
        identity: [7; 16],
        read_only: false,
        partscan: false,
    };
    let nothing = || Ok(control.devices().next().is_none());
    let attaching = starve(
        "attaching",
        || control.attach(&request),
        |_| detach(&control, NUMBER),
        nothing,
    )?;

    let attached = control.attach(&request)?;
    let stream = Stream::open(stream_id)?;
    let sync = SyncRequest {
        device_id: attached.device_id,
        start_sector: 0,
        sectors: 2048,
        chunk_bytes: 64 << 10,
        cookie: 1,
        clear: false,
    };
    let sync = starve(
        "SYNC",
        || stream.sync(&sync),
        |_| {
            stream.ring().release(stream.ring().committed())?;
            stream.kick()?;
            Ok(())
        },
        || Ok(true),
    )?;
    drop(stream);
    let detaching = starve(
        "detaching",
        || control.detach(NUMBER, false),
        |()| {
            control.attach(&request)?;
            Ok(())
        },
        || Ok(control.devices().next().is_some()),
    )?;
    detach(&control, NUMBER)?;
    println!(
        "allocations: {creating} creating a set, {opening} opening it, {intent} its intent file, {attaching} attaching, {sync} \
         SYNC, {detaching} detaching"
    );
    Ok(())
}
