// SPDX-License-Identifier: GPL-2.0-only

//! What is wrong with the entries on this machine. Runs before each use of them.

use std::path::Path;

use dtloop_abi::raw;

use super::fstab;
use super::text::{Lines, Placed};
use super::{Entry, Finding, Severity};
use crate::attach::LoopNumber;
use crate::gather::Gatherer;
use crate::preflight::{Refusal, Wish, judge};
use crate::system::{BlockDevice, DevNumber, System};
use crate::{Manager, crypt, loop_path, plain};

/// An entry, and what there is of it on this machine.
#[derive(Clone, Debug)]
pub struct Seen {
    /// It.
    pub placed: Placed,
    /// The block device that it names.
    pub device: Result<BlockDevice, String>,
    /// The loop number that it is attached to.
    pub attached: Option<u32>,
}

impl Seen {
    fn entry(&self) -> &Entry {
        &self.placed.entry
    }

    /// First byte and the one behind the last that it uses of its device.
    fn window(&self) -> (u64, u64) {
        let options = &self.entry().options;
        let end = options
            .size_limit
            .map_or(u64::MAX, |limit| options.offset.saturating_add(limit));
        (options.offset, end)
    }
}

/// Finds the devices of entries.
#[must_use]
pub fn look(system: &System, entries: &[Placed], attached: &[raw::DeviceStatus]) -> Vec<Seen> {
    let look = |placed: &Placed| {
        let device = find(system, &placed.entry, attached);
        let number = device
            .as_ref()
            .ok()
            .and_then(|device| attached_to(&placed.entry, device, attached));
        Seen {
            placed: placed.clone(),
            device,
            attached: number,
        }
    };
    entries.iter().map(look).collect()
}

/// The block device that an entry names. A name that udev gives by content may mean the loop device, which shows the same
/// content: the entry is about the one behind it.
fn find(
    system: &System,
    entry: &Entry,
    attached: &[raw::DeviceStatus],
) -> Result<BlockDevice, String> {
    let path = entry.device.path();
    let shown = path.display();
    let dev = match System::dev_number(&path) {
        Ok(Some(dev)) => dev,
        Ok(None) => return Err(format!("{shown} is not a block device")),
        Err(error) => return Err(format!("{shown}: {}", plain(&error))),
    };
    let ours = attached
        .iter()
        .find(|d| DevNumber::from_raw(d.loop_dev) == dev);
    let dev = ours.map_or(dev, |ours| DevNumber::from_raw(ours.backing_dev));
    let name = system
        .name_of(dev)
        .ok_or_else(|| format!("{shown}: no driver serves it"))?;
    let name = below_crypt(system, entry, &name);
    system
        .block(&name)
        .ok_or_else(|| format!("{shown}: it has just gone"))
}

/// Of an encrypted entry, the name of its content may mean the plain text: the disk is what is under it.
fn below_crypt(system: &System, entry: &Entry, name: &str) -> String {
    match system.mapped_name(name) {
        Some(mapped) if mapped == crypt::mapped_name(entry) => system
            .slaves(name)
            .into_iter()
            .next()
            .unwrap_or_else(|| name.to_owned()),
        _ => name.to_owned(),
    }
}

fn attached_to(entry: &Entry, device: &BlockDevice, attached: &[raw::DeviceStatus]) -> Option<u32> {
    let dev = match entry.options.encryption {
        None => device.number?,
        Some(_) => System::dev_number(Path::new(&crypt::mapped_path(entry))).ok()??,
    };
    let is = |d: &&raw::DeviceStatus| {
        DevNumber::from_raw(d.backing_dev) == dev && d.offset_bytes == entry.options.offset
    };
    attached.iter().find(is).map(raw::DeviceStatus::loop_number)
}

/// All that is to be said about the file, in the order of its lines.
#[must_use]
pub fn check(manager: &Manager, lines: &Lines, attached: &[raw::DeviceStatus]) -> Vec<Finding> {
    let (entries, mut findings) = lines.entries();
    let system = &manager.system;
    let seen = look(system, &entries, attached);
    let fstab = fstab::read(system);
    let gatherer = Gatherer::new(system, attached);
    for (nth, one) in seen.iter().enumerate() {
        findings.extend(clashes(one, &seen[..nth]));
        findings.extend(judged(&gatherer, one));
        findings.extend(number_taken(one, attached, system));
        findings.extend(in_fstab(one, &fstab, attached));
        findings.extend(unstable(system, one));
        findings.extend(crypt::findings(system, &one.placed));
    }
    findings.sort_by_key(|finding| (finding.line, finding.column));
    findings
}

/// With the entries above.
fn clashes(one: &Seen, above: &[Seen]) -> Vec<Finding> {
    let error = |field: usize, message: String| one.placed.finding(field, Severity::Error, message);
    let mut findings = Vec::new();
    for other in above {
        let line = other.placed.line;
        let (mine, theirs) = (one.entry(), other.entry());
        let same = match (&one.device, &other.device) {
            (Ok(mine), Ok(theirs)) => mine.name == theirs.name,
            _ => mine.device == theirs.device,
        };
        let ((from, to), (other_from, other_to)) = (one.window(), other.window());
        if same && from < other_to && other_from < to {
            let message = format!(
                "{} is in line {line} already; remove one of both",
                mine.device
            );
            findings.push(error(0, message));
        }
        if let (LoopNumber::Pinned(number), true) = (mine.number, mine.number == theirs.number) {
            let message = format!(
                "{} is taken by line {line}; choose another",
                loop_path(number)
            );
            findings.push(error(1, message));
        }
        findings.extend(disagree(mine, theirs).map(|option| {
            let set = mine.options.set_name();
            error(2, format!("line {line} gives set {set} another {option}; they must be the same, or in one line only"))
        }));
    }
    findings
}

/// An option of the set that both give, and not the same.
fn disagree(mine: &Entry, theirs: &Entry) -> Option<&'static str> {
    let (mine, theirs) = (&mine.options, &theirs.options);
    if mine.set_name() != theirs.set_name() {
        return None;
    }
    fn differ<T: PartialEq>(mine: Option<&T>, theirs: Option<&T>) -> bool {
        mine.zip(theirs)
            .is_some_and(|(mine, theirs)| mine != theirs)
    }
    let options = [
        (
            "ring",
            differ(mine.ring_size.as_ref(), theirs.ring_size.as_ref()),
        ),
        (
            "policy",
            differ(mine.policy.as_ref(), theirs.policy.as_ref()),
        ),
        (
            "throttle-start",
            differ(mine.throttle_start.as_ref(), theirs.throttle_start.as_ref()),
        ),
        (
            "throttle-stop",
            differ(mine.throttle_stop.as_ref(), theirs.throttle_stop.as_ref()),
        ),
        (
            "throttle-delay",
            differ(mine.throttle_delay.as_ref(), theirs.throttle_delay.as_ref()),
        ),
        (
            "intent",
            differ(mine.intent.as_ref(), theirs.intent.as_ref()),
        ),
        (
            "region",
            differ(mine.region_size.as_ref(), theirs.region_size.as_ref()),
        ),
        (
            "hot-regions",
            differ(mine.hot_regions.as_ref(), theirs.hot_regions.as_ref()),
        ),
    ];
    options
        .into_iter()
        .find(|(_, differ)| *differ)
        .map(|(option, _)| option)
}

/// The same that `dtloop attach` would say.
fn judged(gatherer: &Gatherer<'_>, one: &Seen) -> Vec<Finding> {
    let error = |message: String| one.placed.finding(0, Severity::Error, message);
    let device = match &one.device {
        Err(reason) => {
            let message = format!("{reason}; connect the disk, or remove the line");
            return vec![error(message)];
        }
        Ok(device) => device,
    };
    if one.attached.is_some() {
        return Vec::new();
    }
    let options = &one.entry().options;
    let wish = Wish {
        offset: options.offset,
        size_limit: options.size_limit,
        read_only: options.read_only,
        allow_signature: options.allow_signature,
    };
    let own_mapping = |refusal: &Refusal| {
        options.encryption.is_some() && matches!(refusal, Refusal::Held | Refusal::Holders(_))
    };
    judge(&gatherer.facts(device.clone()), &wish)
        .into_iter()
        .filter(|refusal| !own_mapping(refusal))
        .map(|refusal| error(format!("{}: {}", one.entry().device, for_entry(&refusal))))
        .collect()
}

/// Says options as they are written in the file.
fn for_entry(refusal: &Refusal) -> String {
    refusal
        .to_string()
        .replace("--allow-signature", "the option allow-signature")
        .replace("--read-only", "the option ro")
}

/// The number is another device's.
fn number_taken(one: &Seen, attached: &[raw::DeviceStatus], system: &System) -> Option<Finding> {
    let LoopNumber::Pinned(number) = one.entry().number else {
        return None;
    };
    let path = loop_path(number);
    if one.attached == Some(number) {
        return None;
    }
    let message = match attached.iter().find(|d| d.loop_number() == number) {
        Some(other) => format!(
            "{path} is attached to {}; choose another",
            other.backing_name()
        ),
        None => match system
            .block(&format!("loop{number}"))
            .and_then(|d| d.backing_file)
        {
            Some(file) => format!(
                "{path} is taken by the stock loop driver for {file}; choose another, or free it with losetup -d {path}"
            ),
            None => {
                let now = one.attached?;
                let message = format!(
                    "it is attached to {} now, and to {path} from the next attach on",
                    loop_path(now)
                );
                return Some(one.placed.finding(1, Severity::Warning, message));
            }
        },
    };
    Some(one.placed.finding(1, Severity::Error, message))
}

/// What fstab mounts would be mounted past the module.
fn in_fstab(one: &Seen, fstab: &[fstab::Line], attached: &[raw::DeviceStatus]) -> Vec<Finding> {
    let Ok(device) = &one.device else {
        return Vec::new();
    };
    let own_loop = |dev: DevNumber| {
        let ours = |d: &&raw::DeviceStatus| DevNumber::from_raw(d.loop_dev) == dev;
        attached
            .iter()
            .find(ours)
            .map(raw::DeviceStatus::loop_number)
            == one.attached
            && one.attached.is_some()
    };
    let number = match (one.attached, one.entry().number) {
        (Some(number), _) | (None, LoopNumber::Pinned(number)) => loop_path(number),
        (None, LoopNumber::Auto) => "the loop device (pin its number first)".to_owned(),
    };
    let mut findings = Vec::new();
    for line in fstab {
        let Some(dev) = line.dev else { continue };
        // A label or UUID is on both; while the machine starts, only the native device is there.
        let is_native = Some(dev) == device.number;
        let by_content = own_loop(dev) && !line.spec.starts_with("/dev/loop");
        if !is_native && !by_content {
            continue;
        }
        let message = format!(
            "/etc/fstab line {} uses {} for {} past the loop device, so that changes would be missed; put {number} there",
            line.line, line.spec, line.dir
        );
        findings.push(one.placed.finding(0, Severity::Error, message));
    }
    findings
}

fn unstable(system: &System, one: &Seen) -> Option<Finding> {
    let (name, reason) = one.entry().device.better(system)?;
    let device = &one.entry().device;
    let message = format!(
        "{device} may be another disk after a reboot ({reason}); its name that stays is {name}"
    );
    Some(one.placed.finding(0, Severity::Warning, message))
}
