// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop status`: what the module says together with what the agent says.

use std::time::Duration;

use dtloop_abi::{Found, raw};
use dtloop_api::{
    ClientError, Connection, DeviceState, DeviceStatus, Ladder, QueueStatus, Rung, SetStatus,
    VerifyResult,
};
use dtloop_manage::preflight::Refusals;
use dtloop_manage::system::DevNumber;
use dtloop_manage::{Manager, loop_path, size};
use serde_json::{Map, Value, json};

use super::resize::policy_name;
use super::{Context, intent};
use crate::args::Status;
use crate::exit::Code;
use crate::{clock, output};

pub(crate) fn run(context: &Context<'_>, args: &Status) -> anyhow::Result<Code> {
    let picture = Picture::take(context, args.set.as_ref().map(dtloop_abi::Name::as_str))?;
    if context.global.json {
        output::json(&picture.to_json())?;
    } else {
        output::text(&picture.to_text())?;
    }
    if !args.check {
        return Ok(Code::Done);
    }
    for problem in picture.problems() {
        output::note(&problem);
    }
    Ok(picture.check())
}

/// Everything, once.
#[derive(Default)]
struct Picture {
    sets: Vec<Set>,
    /// The agent's version, or why it says nothing.
    agent: Option<Result<String, String>>,
    /// How a check ends if it says nothing.
    agent_code: Option<Code>,
    /// Why the module says nothing.
    module: Option<String>,
}

/// One set, seen from both sides.
#[derive(Default)]
struct Set {
    name: String,
    stream: Option<raw::StreamStatus>,
    intent: Option<raw::IntentStatus>,
    agent: Option<SetStatus>,
    devices: Vec<Device>,
}

struct Device {
    number: u32,
    kernel: Option<raw::DeviceStatus>,
    agent: Option<DeviceStatus>,
}

impl Picture {
    fn take(context: &Context<'_>, only: Option<&str>) -> anyhow::Result<Self> {
        let mut picture = Self::default();
        // The agent first: so the module's newer figures are never behind what the target has.
        let status = context.agent().and_then(|mut agent| agent.status(only));
        match context.control() {
            Ok(control) => {
                let streams = control.streams().collect::<Result<Vec<_>, _>>()?;
                let devices = Manager::attached(&control)?;
                picture.add_kernel(&streams, &devices);
                for set in &mut picture.sets {
                    let id = set.stream.as_ref().map(|stream| stream.stream_id);
                    // The set may just have gone.
                    set.intent = id.and_then(|id| control.intent_status(id).ok());
                }
            }
            // Both sides are of use alone. Without either there is nothing to show.
            Err(error) if status.is_ok() => picture.module = Some(error.to_string()),
            Err(error) => return Err(error.into()),
        }
        picture.agent = Some(match status {
            Ok(status) => {
                picture.add_agent(status.sets);
                Ok(status.agent_version)
            }
            // The set may be one that only the module knows.
            Err(ClientError::Failed(failure))
                if failure.code == dtloop_api::FailureCode::UnknownSet =>
            {
                Err(failure.message)
            }
            Err(error) => {
                picture.agent_code = Some(Code::of_agent(&error));
                Err(error.to_string())
            }
        });
        if let Some(only) = only {
            picture.sets.retain(|set| set.name == only);
            if picture.sets.is_empty() {
                let reason = "there is no such set; dtloop status lists them";
                return Err(Refusals::one(format!("set {only}"), reason).into());
            }
        }
        Ok(picture)
    }

    fn add_kernel(&mut self, streams: &[raw::StreamStatus], devices: &[raw::DeviceStatus]) {
        for stream in streams {
            let mine = devices.iter().filter(|d| d.stream_id == stream.stream_id);
            let devices = mine.map(|device| Device {
                number: device.loop_number(),
                kernel: Some(*device),
                agent: None,
            });
            self.sets.push(Set {
                name: stream.name().to_owned(),
                stream: Some(*stream),
                devices: devices.collect(),
                ..Set::default()
            });
        }
    }

    fn add_agent(&mut self, sets: Vec<SetStatus>) {
        for set in sets {
            let at = self.sets.iter().position(|s| s.name == set.name);
            let at = at.unwrap_or_else(|| {
                self.sets.push(Set {
                    name: set.name.clone(),
                    ..Set::default()
                });
                self.sets.len() - 1
            });
            self.sets[at].add_agent(set);
        }
        self.sets.sort_by(|a, b| a.name.cmp(&b.name));
    }

    /// What keeps the copies from being what they should be, as far as this machine knows.
    fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.module.iter().cloned().collect();
        if let Some(Err(error)) = &self.agent {
            problems.push(error.clone());
        }
        problems.extend(self.sets.iter().flat_map(Set::problems));
        problems
    }

    fn check(&self) -> Code {
        if self.problems().is_empty() {
            return Code::Done;
        }
        let module = self.module.as_ref().map(|_| Code::NoModule);
        self.agent_code.or(module).unwrap_or(Code::Differs)
    }

    fn all_in_sync(&self) -> bool {
        let mut devices = self.sets.iter().flat_map(|set| &set.devices);
        devices.all(|device| {
            let state = device.agent.as_ref().map(|agent| &agent.state);
            state.is_some_and(DeviceState::is_consistent)
        })
    }
}

impl Set {
    fn problems(&self) -> Vec<String> {
        let mut problems = vec![];
        if let Some(agent) = &self.agent {
            if !matches!(agent.connection, Connection::Connected { .. }) {
                problems.push(format!("set {}: target {}", self.name, target(agent)));
            }
        }
        for device in &self.devices {
            let agent = device.agent.as_ref();
            if !agent.is_some_and(|agent| agent.state.is_consistent()) {
                problems.push(format!("loop{}: {}", device.number, device.state()));
            }
        }
        problems
    }

    fn add_agent(&mut self, set: SetStatus) {
        for device in &set.devices {
            let known = self.devices.iter_mut().find(|d| d.number == device.number);
            if let Some(known) = known {
                known.agent = Some(device.clone());
            } else {
                self.devices.push(Device {
                    number: device.number,
                    kernel: None,
                    agent: Some(device.clone()),
                });
            }
        }
        self.devices.sort_by_key(|device| device.number);
        self.agent = Some(set);
    }
}

// ---------------------------------------------------------------------------------------------
// For programs
// ---------------------------------------------------------------------------------------------

/// Puts fields of a structure into a JSON object. The structure is taken apart without `..`, so
/// that a new field cannot be forgotten here.
macro_rules! fields {
    ($type:ident { $($field:ident),* ; $($other:ident),* } = $value:expr) => {{
        let raw::$type { $($field,)* $($other: _,)* } = $value;
        let mut object = Map::new();
        $(object.insert(stringify!($field).into(), json!($field));)*
        object
    }};
}

fn stream_json(stream: &raw::StreamStatus) -> Value {
    let mut object = fields!(StreamStatus {
        stream_id, flags, desc_count, payload_bytes, ring_bytes, next_seq, committed, released,
        epoch, used_bytes, sync_bytes, sync_bytes_max, gaps, gap_changes, gap_sectors, room_waits,
        room_wait_ns, room_wait_ns_max, wakeups, bad_releases, devices, throttle_start, throttle_stop,
        throttle_delay_ms, throttles, throttle_ns, throttle_ns_max;
        name, stream_uuid, policy, desc_offset, payload_offset, reserved
    } = stream);
    object.insert("policy".into(), policy_name(stream.policy).into());
    let uuid = format!("{:032x}", u128::from_be_bytes(stream.stream_uuid));
    object.insert("stream_uuid".into(), uuid.into());
    for (name, flag) in STREAM_FLAGS {
        object.insert(name.into(), stream.has(flag).into());
    }
    object.into()
}

const STREAM_FLAGS: [(&str, u32); 4] = [
    ("consumer", raw::STREAM_CONSUMER),
    ("gap", raw::STREAM_GAP),
    ("bad_consumer", raw::STREAM_BAD_CONSUMER),
    ("throttling", raw::STREAM_THROTTLING),
];

const DEVICE_FLAGS: [(&str, u32); 6] = [
    ("read_only", raw::DEVICE_READ_ONLY),
    ("partscan", raw::DEVICE_PARTSCAN),
    ("dead", raw::DEVICE_DEAD),
    ("bypassed", raw::DEVICE_BYPASSED),
    ("detaching", raw::DEVICE_DETACHING),
    ("discard_zeroes", raw::DEVICE_DISCARD_ZEROES),
];

fn device_json(device: &raw::DeviceStatus) -> Value {
    let mut object = fields!(DeviceStatus {
        number, flags, stream_id, device_id, offset_bytes, limit_bytes, sectors, block_bytes,
        dirty_block_bytes, dirty_blocks, openers, in_flight, reads, read_sectors, writes,
        write_sectors, flushes, discards, discard_sectors, syncs, sync_sectors, tracked,
        tracked_sectors, failed, gate_waits, nowait_retries, bypass_sectors, regions_marked,
        regions_suspect;
        backing_dev, loop_dev, backing_name, label, intent_found, reserved0, reserved
    } = device);
    let found = Found::from_raw(device.intent_found).to_string();
    object.insert("intent_found".into(), found.into());
    let dev = |raw| DevNumber::from_raw(raw).to_string();
    object.insert("backing".into(), device.backing_name().into());
    object.insert("backing_dev".into(), dev(device.backing_dev).into());
    object.insert("loop_dev".into(), dev(device.loop_dev).into());
    object.insert("label".into(), device.label().into());
    object.insert("size_bytes".into(), device.size_bytes().into());
    for (name, flag) in DEVICE_FLAGS {
        object.insert(name.into(), device.has(flag).into());
    }
    object.into()
}

impl Picture {
    fn to_json(&self) -> Value {
        let sets = self.sets.iter().map(|set| {
            let devices = set.devices.iter().map(|device| {
                json!({
                    "number": device.number,
                    "loop": loop_path(device.number),
                    "kernel": device.kernel.as_ref().map(device_json),
                    "agent": device.agent,
                })
            });
            // The devices are listed once, below.
            let agent = set.agent.as_ref().map(|agent| {
                let mut agent = json!(agent);
                if let Some(object) = agent.as_object_mut() {
                    object.remove("devices");
                }
                agent
            });
            json!({
                "name": set.name,
                "kernel": set.stream.as_ref().map(stream_json),
                "intent": set.intent.as_ref().map(intent::json),
                "agent": agent,
                "devices": devices.collect::<Vec<_>>(),
            })
        });
        let agent = self.agent.as_ref();
        json!({
            "module_error": self.module,
            "agent_version": agent.and_then(|agent| agent.as_ref().ok()),
            "agent_error": agent.and_then(|agent| agent.as_ref().err()),
            "in_sync": self.all_in_sync(),
            "problems": self.problems(),
            "sets": sets.collect::<Vec<_>>(),
        })
    }
}

// ---------------------------------------------------------------------------------------------
// For people
// ---------------------------------------------------------------------------------------------

impl Picture {
    fn to_text(&self) -> String {
        let mut text = String::new();
        if let Some(error) = &self.module {
            text += &format!("module: {error}\n");
        }
        if let Some(Err(error)) = &self.agent {
            text += &format!("agent: {error} Only the module's figures are shown.\n");
        }
        if self.sets.is_empty() {
            text += "No device is attached.\n";
        }
        for set in &self.sets {
            if !text.is_empty() {
                text.push('\n');
            }
            text += &set.to_text();
        }
        text
    }
}

impl Set {
    fn to_text(&self) -> String {
        let mut text = format!("set {}\n", self.name);
        if let Some(agent) = &self.agent {
            text += &format!("  target   {}\n", target(agent));
            text += &format!(
                "  backlog  {} in {}, lag {}\n",
                size::bytes(agent.backlog_bytes),
                output::count(agent.backlog_records, "record"),
                size::duration(Duration::from_millis(agent.lag_ms))
            );
            text += &format!(
                "  records  next {}, durable on target {}, applied {}\n",
                agent.next_seq, agent.durable_seq, agent.applied_seq
            );
            text += &format!(
                "  rates    {}/s captured, {}/s sent\n",
                size::bytes(agent.rates.captured_bytes_per_s),
                size::bytes(agent.rates.sent_bytes_per_s)
            );
            text += &super::shaping::status(&agent.shaping);
        }
        if let Some(staging) = self.agent.as_ref().and_then(|agent| agent.staging.as_ref()) {
            text += &format!("  staging  {}\n", staged(staging));
        }
        if let Some(stream) = &self.stream {
            text += &format!("  ring     {}\n", ring(stream));
        }
        if let Some(agent) = &self.agent {
            if let Some(queue) = &agent.queue {
                text += &format!("  queue    {}\n", disk_queue(queue));
            }
            if agent.ladder.rung != Rung::Ring {
                text += &format!("  ladder   {}\n", ladder(&agent.ladder));
            }
            text += &trust(agent);
        }
        if let Some(intent) = &self.intent {
            text += &format!("  intent   {}\n", intent::text(intent));
        }
        if self.devices.is_empty() {
            return text + "  no device\n";
        }
        let mut rows = vec![output::row([
            "  DEVICE", "BACKING", "SIZE", "VOLUME", "DIRTY", "STATE",
        ])];
        rows.extend(self.devices.iter().map(Device::row));
        text + &output::table(&rows, &[2, 4])
    }
}

fn staged(staging: &dtloop_api::StagingStatus) -> String {
    let bytes = size::bytes(staging.staged_bytes);
    if staging.phase == "publishing" {
        return format!("publishing, {bytes} to be written into the volumes");
    }
    let now = std::time::SystemTime::now();
    let made = std::time::UNIX_EPOCH + Duration::from_millis(staging.consistent_unix_ms);
    let age = now.duration_since(made).unwrap_or_default();
    format!(
        "staged, {bytes}; the volumes keep record {} of {} ago",
        staging.consistent_seq,
        size::duration(age)
    )
}

fn target(set: &SetStatus) -> String {
    let target = if set.target.is_empty() {
        "none"
    } else {
        &set.target
    };
    match &set.connection {
        Connection::Connected { since_ms } => format!(
            "{target}, connected for {}",
            size::duration(Duration::from_millis(*since_ms))
        ),
        Connection::Connecting { reason, retry_ms } if *retry_ms > 0 => format!(
            "{target}, not connected ({reason}), next try in {}",
            size::duration(Duration::from_millis(*retry_ms))
        ),
        Connection::Connecting { reason, .. } => format!("{target}, connecting ({reason})"),
        Connection::Refused { reason } => format!("{target}, refused: {reason}"),
        Connection::Idle { reason } => format!("{target}, idle: {reason}"),
    }
}

/// What speaks for the copy: the last proof, the last verifications, when the next one comes.
fn trust(set: &SetStatus) -> String {
    let mut text = String::new();
    if let Some(proven) = set.proven {
        text += &format!(
            "  proven   both sides went through the same records up to {}, at {}\n",
            proven.seq,
            clock::text(proven.unix_ms)
        );
    }
    for device in &set.devices {
        if let Some(result) = &device.last_verify {
            text += &format!("  verified {}\n", verified(device.number, result));
        }
    }
    if let Some(schedule) = &set.verify_schedule {
        let state = match schedule {
            schedule if schedule.under_way => ", under way",
            schedule if schedule.suspended => ", interrupted, goes on later",
            _ => "",
        };
        text += &format!("  verify   {}{state}\n", schedule.text);
    }
    text
}

fn verified(number: u32, result: &VerifyResult) -> String {
    let when = clock::text(result.finished_unix_ms);
    let found = match result {
        result if !result.complete => "not to its end".to_owned(),
        result if result.differing_bytes == 0 => "identical".to_owned(),
        result if result.is_identical() => {
            format!(
                "{} differed and were repaired",
                size::bytes(result.differing_bytes)
            )
        }
        result => format!("{} differ", size::bytes(result.differing_bytes)),
    };
    format!("loop{number} {when}: {found}")
}

fn ring(stream: &raw::StreamStatus) -> String {
    let mut text = format!(
        "{} of {} used, {}, policy {}",
        size::bytes(stream.used_bytes),
        size::bytes(stream.payload_bytes),
        output::count(stream.next_seq.saturating_sub(stream.released), "record"),
        policy_name(stream.policy)
    );
    if !stream.has(raw::STREAM_CONSUMER) {
        text += ", no agent takes its records";
    }
    if stream.has(raw::STREAM_GAP) {
        text += ", full: changes go to the dirty map";
    }
    if stream.has(raw::STREAM_BAD_CONSUMER) {
        text += ", stopped: its consumer misbehaved";
    }
    text
}

fn disk_queue(queue: &QueueStatus) -> String {
    let mut text = format!(
        "{} of {} in {}",
        size::bytes(queue.bytes),
        size::bytes(queue.size_bytes),
        output::count(queue.records, "record")
    );
    if let Some(age) = queue.oldest_ms {
        text += &format!(", oldest {}", size::duration(Duration::from_millis(age)));
    }
    if queue.state != "usable" {
        text += &format!(", {}: {}", queue.state, queue.reason);
    }
    text
}

fn ladder(ladder: &Ladder) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let since = Duration::from_millis(ladder.since_unix_ms);
    let since = now.unwrap_or_default().saturating_sub(since);
    format!(
        "{} for {}: {}",
        ladder.rung.label(),
        size::duration(since),
        ladder.reason
    )
}

impl Device {
    fn row(&self) -> Vec<String> {
        let kernel = self.kernel.as_ref();
        let agent = self.agent.as_ref();
        let size = kernel.map(raw::DeviceStatus::size_bytes);
        let size = size.or(agent.map(|agent| agent.size_bytes));
        let label = kernel.map(|kernel| kernel.label().to_owned());
        let label = label.or(agent.map(|agent| agent.label.clone()));
        let dirty = kernel.map(|k| k.dirty_blocks.saturating_mul(k.dirty_block_bytes.into()));
        let dirty = dirty.or(agent.map(|agent| agent.dirty_bytes));
        vec![
            format!("  loop{}", self.number),
            kernel.map_or("-".into(), |kernel| kernel.backing_name().to_owned()),
            size.map_or("-".into(), size::bytes),
            label
                .filter(|label| !label.is_empty())
                .unwrap_or("-".into()),
            dirty.map_or("-".into(), size::bytes),
            self.state(),
        ]
    }

    fn state(&self) -> String {
        let mut parts = Vec::new();
        if let Some(agent) = &self.agent {
            parts.push(agent_state(agent));
        } else if let Some(kernel) = &self.kernel {
            parts.push(
                if kernel.writes + kernel.discards == 0 {
                    "captured, nothing written"
                } else {
                    "captured"
                }
                .into(),
            );
        }
        if let Some(kernel) = &self.kernel {
            let flags = [
                (raw::DEVICE_READ_ONLY, "read-only"),
                (raw::DEVICE_DEAD, "its disk vanished"),
                (raw::DEVICE_BYPASSED, "bypassed: verify needed"),
                (raw::DEVICE_DETACHING, "detaching"),
            ];
            // The module counts for as long as it is attached; the agent knows what was verified since.
            let knows = |flag| flag == raw::DEVICE_BYPASSED && self.agent.is_some();
            let set = flags
                .iter()
                .filter(|(flag, _)| kernel.has(*flag) && !knows(*flag));
            parts.extend(set.map(|(_, text)| (*text).to_owned()));
            if kernel.failed > 0 {
                parts.push(format!("{} failed", output::count(kernel.failed, "change")));
            }
        }
        parts.join(", ")
    }
}

fn agent_state(device: &DeviceStatus) -> String {
    let mut text = device.state.label().to_owned();
    if let DeviceState::OrderLost { from, to } = device.state {
        text += &format!(" from {from} to {to}");
    }
    if let Some(pass) = device.state.pass() {
        let percent = u128::from(pass.done_bytes) * 100 / u128::from(pass.total_bytes.max(1));
        let left = pass.eta_ms.map(Duration::from_millis);
        let left = left.map_or("unknown".into(), size::duration);
        text += &format!(" {percent} %");
        if !pass.paused {
            text += &format!(", time left {left}");
        }
    }
    if !device.reason.is_empty() {
        text += &format!(" ({})", device.reason);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> (raw::StreamStatus, raw::DeviceStatus) {
        let mut stream = raw::StreamStatus::query(1);
        stream.name[..2].copy_from_slice(b"db");
        stream.payload_bytes = 64 << 20;
        stream.used_bytes = 8192;
        (stream.next_seq, stream.released) = (12, 10);
        let mut device = raw::DeviceStatus::query(1);
        device.stream_id = 1;
        device.backing_name[..8].copy_from_slice(b"/dev/vdb");
        device.label[..6].copy_from_slice(b"pgdata");
        device.sectors = 2 << 20;
        device.writes = 3;
        (device.dirty_blocks, device.dirty_block_bytes) = (2, 4096);
        (stream, device)
    }

    fn agent(state: &DeviceState, reason: &str) -> SetStatus {
        let set = json!({
            "name": "db", "target": "10.0.0.2:7788",
            "connection": { "state": "connected", "since_ms": 61_000 },
            "next_seq": 12, "released_seq": 10, "durable_seq": 11, "applied_seq": 9,
            "backlog_bytes": 8192, "backlog_records": 2, "lag_ms": 12,
            "devices": [{
                "device_id": 1, "number": 1, "label": "pgdata", "size_bytes": 1 << 30,
                "state": state, "reason": reason, "dirty_blocks": 2, "dirty_bytes": 8192,
            }],
        });
        serde_json::from_value(set).expect("a set")
    }

    fn picture(agent: Option<SetStatus>) -> Picture {
        let mut picture = Picture::default();
        let (stream, device) = kernel();
        picture.add_kernel(&[stream], &[device]);
        picture.agent = Some(match agent {
            Some(agent) => {
                picture.add_agent(vec![agent]);
                Ok("0.1.0".into())
            }
            None => Err("The agent does not run.".into()),
        });
        picture
    }

    #[test]
    fn without_an_agent_the_modules_figures_are_shown() {
        let picture = picture(None);
        let expected = "\
agent: The agent does not run. Only the module's figures are shown.

set db
  ring     8 KiB of 64 MiB used, 2 records, policy track, no agent takes its records
  DEVICE  BACKING    SIZE  VOLUME  DIRTY  STATE
  loop1   /dev/vdb  1 GiB  pgdata  8 KiB  captured
";
        assert_eq!(picture.to_text(), expected);
        assert!(!picture.all_in_sync());
    }

    #[test]
    fn both_sides_make_one_picture() {
        let picture = picture(Some(agent(&DeviceState::InSync, "")));
        let expected = "\
set db
  target   10.0.0.2:7788, connected for 1m 1s
  backlog  8 KiB in 2 records, lag 12ms
  records  next 12, durable on target 11, applied 9
  rates    0 B/s captured, 0 B/s sent
  ring     8 KiB of 64 MiB used, 2 records, policy track, no agent takes its records
  DEVICE  BACKING    SIZE  VOLUME  DIRTY  STATE
  loop1   /dev/vdb  1 GiB  pgdata  8 KiB  in sync
";
        assert_eq!(picture.to_text(), expected);
        assert!(picture.all_in_sync());
    }

    #[test]
    fn a_check_names_whatever_is_wrong() {
        let check = |agent| {
            let picture = picture(agent);
            (picture.check(), picture.problems().join("; "))
        };
        let well = agent(&DeviceState::InSync, "");
        assert_eq!(check(Some(well.clone())), (Code::Done, String::new()));
        let mut cut = well;
        let reason = "No route to host".to_owned();
        cut.connection = Connection::Connecting {
            reason,
            retry_ms: 0,
        };
        let problem = "set db: target 10.0.0.2:7788, connecting (No route to host)";
        assert_eq!(check(Some(cut)), (Code::Differs, problem.into()));
        let lost = agent(&DeviceState::MirrorNeeded, "it was never mirrored");
        let problem = "loop1: mirror needed (it was never mirrored)";
        assert_eq!(check(Some(lost)), (Code::Differs, problem.into()));
        // Also where nothing is attached.
        let silent = Picture {
            agent: Some(Err("The agent does not run.".into())),
            agent_code: Some(Code::NoAgent),
            ..Picture::default()
        };
        assert_eq!(silent.check(), Code::NoAgent);
        assert_eq!(silent.problems(), ["The agent does not run."]);
    }

    #[test]
    fn the_queue_and_the_ladder_are_shown_when_they_matter() {
        let mut set = agent(&DeviceState::InSync, "");
        assert!(!picture(Some(set.clone())).to_text().contains("queue"));
        let queue = json!({
            "dir": "/q/db", "state": "full", "reason": "it has reached its size", "records": 40, "bytes": 3 << 20,
            "disk_bytes": 4 << 20, "size_bytes": 4 << 20, "free_bytes": 9, "min_free_bytes": 0, "oldest_ms": 61_000,
        });
        set.queue = Some(serde_json::from_value(queue).expect("a queue"));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now_ms = u64::try_from(now.expect("a clock").as_millis()).expect("a time");
        set.ladder = Ladder {
            rung: Rung::Tracking,
            since_unix_ms: now_ms - 120_300,
            reason: "the ring is full".into(),
            history: vec![],
        };
        let text = picture(Some(set)).to_text();
        assert!(
            text.contains(
                "  queue    3 MiB of 4 MiB in 40 records, oldest 1m 1s, full: it has reached its size\n  \
                 ladder   tracking for 2m 0s: the ring is full\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn states_come_with_their_reason() {
        let state = |state, reason| {
            let set = agent(&state, reason);
            agent_state(&set.devices[0])
        };
        assert_eq!(
            state(
                DeviceState::OrderLost { from: 3, to: 9 },
                "the ring was full"
            ),
            "order lost from 3 to 9 (the ring was full)"
        );
        let pass = dtloop_api::Pass {
            done_bytes: 1,
            total_bytes: 3,
            ..Default::default()
        };
        assert_eq!(
            state(DeviceState::Resyncing { pass }, ""),
            "resyncing 33 %, time left unknown"
        );
    }

    #[test]
    fn an_alarm_is_said_once_and_by_who_knows() {
        let mut agent = agent(
            &DeviceState::VerifyNeeded { pass: None },
            "since now: bypassed",
        );
        agent.proven = Some(dtloop_api::ProofStatus {
            seq: 11,
            unix_ms: 0,
            since_seq: 0,
        });
        let mut picture = picture(Some(agent));
        let kernel = picture.sets[0].devices[0].kernel.as_mut().unwrap();
        kernel.flags |= raw::DEVICE_BYPASSED;
        let text = picture.to_text();
        assert_eq!(text.matches("bypassed").count(), 1, "{text}");
        assert!(
            text.contains("verify needed (since now: bypassed)"),
            "{text}"
        );
        assert!(text.contains("same records up to 11"), "{text}");
        assert!(!picture.all_in_sync());
        picture.sets[0].devices[0].agent = None;
        assert!(picture.to_text().contains("bypassed: verify needed"));
    }

    #[test]
    fn json_has_every_counter_of_both_sides() {
        let json = picture(Some(agent(&DeviceState::InSync, ""))).to_json();
        let set = &json["sets"][0];
        assert_eq!(set["kernel"]["next_seq"], 12);
        assert_eq!(set["kernel"]["policy"], "track");
        assert_eq!(set["kernel"]["room_wait_ns_max"], 0);
        assert_eq!(set["agent"]["durable_seq"], 11);
        assert_eq!(set["agent"]["devices"], Value::Null);
        let device = &set["devices"][0];
        assert_eq!(device["kernel"]["backing"], "/dev/vdb");
        assert_eq!(device["kernel"]["bypassed"], false);
        assert_eq!(device["kernel"]["nowait_retries"], 0);
        assert_eq!(device["agent"]["state"]["state"], "in-sync");
        assert_eq!(json["in_sync"], true);
    }
}
