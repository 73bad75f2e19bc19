// SPDX-License-Identifier: GPL-2.0-only

//! Attaching a block device to a loop device.

use std::fmt;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::Context as _;
use dtloop_abi::{AttachRequest, Attached, Backing, Control, Name, StreamRequest, raw};
use nix::errno::Errno;

use crate::gather::Gatherer;
use crate::preflight::{Refusals, Wish, judge};
use crate::stock::{self, Borrowed};
use crate::system::{DevNumber, System};
use crate::{Manager, intent, loop_path, plain, size};

/// What happens to a write when a set's ring is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It goes on; the blocks are remembered and sent later.
    Track,
    /// It waits for the agent.
    Block,
    /// It is slowed down as the ring fills, and tracked when that is full nevertheless.
    Throttle,
}

impl Policy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Track, Self::Block, Self::Throttle];

    /// As the module knows it.
    #[must_use]
    pub const fn to_raw(self) -> u32 {
        match self {
            Self::Track => raw::POLICY_TRACK,
            Self::Block => raw::POLICY_BLOCK,
            Self::Throttle => raw::POLICY_THROTTLE,
        }
    }

    /// As it is written.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Track => "track",
            Self::Block => "block",
            Self::Throttle => "throttle",
        }
    }
}

impl FromStr for Policy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|policy| policy.name() == text);
        found.ok_or_else(|| "a policy is track, block or throttle".to_owned())
    }
}

/// The loop device asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoopNumber {
    /// The first free one from 100 up.
    #[default]
    Auto,
    /// This one or none.
    Pinned(u32),
}

impl FromStr for LoopNumber {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let number = loop_number(text).ok_or("give a number, /dev/loopN or auto")?;
        if i64::from(number) > i64::from(raw::LOOP_NUMBER_MAX) {
            return Err(format!("the highest number is {}", raw::LOOP_NUMBER_MAX));
        }
        Ok(Self::Pinned(number))
    }
}

impl fmt::Display for LoopNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Pinned(number) => f.write_str(&loop_path(*number)),
        }
    }
}

/// The number in `7`, `loop7` or `/dev/loop7`.
#[must_use]
pub fn loop_number(text: &str) -> Option<u32> {
    let digits = text.strip_prefix("/dev/").unwrap_or(text);
    let digits = match digits.strip_prefix("loop") {
        Some(digits) => digits,
        None if digits.len() == text.len() => digits,
        None => return None,
    };
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten()
}

/// Where the intent file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Intent {
    /// Nowhere: changes are not tracked across a crash.
    Off,
    /// There.
    File(PathBuf),
}

/// What is to be attached, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// The block device.
    pub device: PathBuf,
    /// The loop device.
    pub number: LoopNumber,
    /// The replication set; made when it does not exist.
    pub set: Name,
    /// First byte used of the block device.
    pub offset: u64,
    /// Most bytes used of it; None: all up to its end.
    pub size_limit: Option<u64>,
    /// Writes are refused.
    pub read_only: bool,
    /// The loop device is scanned for partitions.
    pub partscan: bool,
    /// Ring of a set that is made, in bytes.
    pub ring_size: Option<u64>,
    /// Policy of a set that is made.
    pub policy: Option<Policy>,
    /// Name of the volume on the target.
    pub volume: Option<Name>,
    /// The set's intent file.
    pub intent: Option<Intent>,
    /// Region of a new intent file, in bytes.
    pub region_size: Option<u32>,
    /// Regions that may stay marked.
    pub hot_regions: Option<u32>,
    /// The signature of swap or LVM does not matter.
    pub allow_signature: bool,
}

impl Wanted {
    /// That device in the default set, with nothing special.
    #[must_use]
    pub fn new(device: PathBuf, set: Name) -> Self {
        Self {
            device,
            number: LoopNumber::Auto,
            set,
            offset: 0,
            size_limit: None,
            read_only: false,
            partscan: false,
            ring_size: None,
            policy: None,
            volume: None,
            intent: None,
            region_size: None,
            hot_regions: None,
            allow_signature: false,
        }
    }
}

/// A device that has been attached.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// As the module told it.
    pub attached: Attached,
    /// The set's stream.
    pub stream_id: u32,
    /// The set has been made.
    pub set_created: bool,
}

/// Attaches a device, for which no other change of devices is made meanwhile.
///
/// # Errors
///
/// [`Refusals`] when something speaks against it, else those of the module; nothing has changed then.
pub fn attach(manager: &Manager, control: &Control, wanted: &Wanted) -> anyhow::Result<Done> {
    let dev = block_device(wanted)?;
    manager.change(control, || attach_locked(manager, control, wanted, dev))
}

fn attach_locked(
    manager: &Manager,
    control: &Control,
    wanted: &Wanted,
    dev: DevNumber,
) -> anyhow::Result<Done> {
    let devices = Manager::attached(control)?;
    check_device(manager, wanted, dev, &devices)?;
    check_number(wanted, &devices)?;
    let stream = Stream::find_or_create(control, wanted)?;
    let result = intent::provide(manager, control, wanted, stream.id, stream.created)
        .and_then(|_| register(manager, wanted, dev, control, stream.id));
    match result {
        Ok(attached) => Ok(Done {
            attached,
            stream_id: stream.id,
            set_created: stream.created,
        }),
        Err(error) => {
            stream.undo(manager, control);
            Err(error)
        }
    }
}

/// The number of the block device that was named.
///
/// # Errors
///
/// [`Refusals`] if it is none.
pub fn block_device(wanted: &Wanted) -> anyhow::Result<DevNumber> {
    let path = wanted.device.display().to_string();
    match System::dev_number(&wanted.device) {
        Ok(Some(dev)) => Ok(dev),
        Ok(None) => Err(Refusals::one(path, "it is not a block device").into()),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(anyhow::Error::from(error).context(format!("Cannot look at {path}")))
        }
        Err(error) => Err(Refusals::one(path, plain(&error)).into()),
    }
}

fn check_device(
    manager: &Manager,
    wanted: &Wanted,
    dev: DevNumber,
    devices: &[raw::DeviceStatus],
) -> Result<(), Refusals> {
    let path = wanted.device.display().to_string();
    let device = manager
        .system
        .name_of(dev)
        .and_then(|name| manager.system.block(&name))
        .ok_or_else(|| Refusals::one(&path, "no driver serves it (its node is stale)"))?;
    let facts = Gatherer::new(&manager.system, devices).facts(device);
    let wish = Wish {
        offset: wanted.offset,
        size_limit: wanted.size_limit,
        read_only: wanted.read_only,
        allow_signature: wanted.allow_signature,
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
fn check_number(wanted: &Wanted, devices: &[raw::DeviceStatus]) -> Result<(), Refusals> {
    let LoopNumber::Pinned(number) = wanted.number else {
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
    fn find_or_create(control: &Control, wanted: &Wanted) -> anyhow::Result<Self> {
        if let Some(found) = control.stream_by_name(wanted.set.as_str())? {
            return Ok(Self::existing(&found, wanted)?);
        }
        let request = StreamRequest {
            name: wanted.set,
            payload_bytes: wanted.ring_size.unwrap_or(0),
            desc_count: 0,
            policy: wanted.policy.unwrap_or(Policy::Track).to_raw(),
        };
        match control.create_stream(&request) {
            Ok(id) => Ok(Self { id, created: true }),
            // Somebody else was faster.
            Err(error) if error.is(Errno::EEXIST) => {
                let found = control.stream_by_name(wanted.set.as_str())?.ok_or(error)?;
                Ok(Self::existing(&found, wanted)?)
            }
            Err(error) => {
                let context = format!("set {} was not made", wanted.set);
                Err(anyhow::Error::from(error).context(context))
            }
        }
    }

    /// Refuses options that contradict a set that exists.
    fn existing(found: &raw::StreamStatus, wanted: &Wanted) -> Result<Self, Refusals> {
        let what = || format!("set {}", wanted.set);
        if let Some(bytes) = wanted
            .ring_size
            .filter(|&bytes| bytes != found.payload_bytes)
        {
            let reason = format!(
                "it exists with a ring of {}, not {}; leave --ring-size out, or detach all its \
                 devices first",
                size::bytes(found.payload_bytes),
                size::bytes(bytes)
            );
            return Err(Refusals::one(what(), reason));
        }
        if wanted.policy.is_some_and(|p| p.to_raw() != found.policy) {
            let reason = "it exists with another policy; change it with dtloop set";
            return Err(Refusals::one(what(), reason));
        }
        Ok(Self {
            id: found.stream_id,
            created: false,
        })
    }

    /// Leaves things as they were.
    fn undo(&self, manager: &Manager, control: &Control) {
        if self.created {
            if let Err(error) = control.destroy_stream(self.id, false) {
                manager.note(&format!("the empty set was left behind: {error}"));
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

fn register(
    manager: &Manager,
    wanted: &Wanted,
    dev: DevNumber,
    control: &Control,
    stream_id: u32,
) -> anyhow::Result<Attached> {
    let path = wanted.device.display().to_string();
    // Read-only is enough: the module opens the device itself, and a writer that closes it again
    // would have udev look at it.
    let file = File::open(&wanted.device).with_context(|| format!("Cannot open {path}"))?;
    if DevNumber::from_raw(file.metadata()?.rdev()) != dev {
        return Err(Refusals::one(path, "it was replaced by another device just now").into());
    }
    let number = match wanted.number {
        LoopNumber::Auto => free_number(&manager.system, control),
        LoopNumber::Pinned(number) => number,
    };
    let auto_first = u32::try_from(control.features().auto_first).unwrap_or(0);
    stock::load_first(&manager.system, number, auto_first);
    let borrowed = Borrowed::new(&manager.run_dir);
    borrowed.take(&manager.system, number)?;
    let request = AttachRequest {
        backing: Backing::Fd(file.as_fd()),
        offset_bytes: wanted.offset,
        limit_bytes: wanted.size_limit.unwrap_or(0),
        number: Some(number),
        stream_id,
        label: wanted.volume.unwrap_or(Name::EMPTY),
        identity: manager.system.name_of(dev).map_or([0; 16], |name| {
            manager.system.identity(&name, wanted.offset)
        }),
        read_only: wanted.read_only,
        partscan: wanted.partscan,
    };
    control.attach(&request).map_err(|error| {
        if let Err(error) = borrowed.give_back(&manager.system, number) {
            manager.note(&format!("stock loop{number} was not put back: {error:#}"));
        }
        anyhow::Error::from(error).context(format!("{path} was not attached"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loop_numbers_are_read() {
        for text in ["7", "loop7", "/dev/loop7"] {
            assert_eq!(text.parse(), Ok(LoopNumber::Pinned(7)), "{text}");
        }
        assert_eq!("auto".parse(), Ok(LoopNumber::Auto));
        for text in [
            "", "-1", "/dev/7", "/dev/sda", "loop", "loop7p1", "1048576", "+7",
        ] {
            assert!(text.parse::<LoopNumber>().is_err(), "{text}");
        }
        assert_eq!(LoopNumber::Pinned(7).to_string(), "/dev/loop7");
    }
}
