// SPDX-License-Identifier: GPL-2.0-only

//! Detaching a loop device.

use dtloop_abi::{CaptureStream, Control, Stream, raw};
use nix::errno::Errno;

use crate::preflight::Refusals;
use crate::stock::Borrowed;
use crate::system::{System, node};
use crate::{Manager, find_device, loop_path, patient};

/// Detaches a device that is meant by a loop number, a loop device or the block device behind it; gives what it was and what became of its set.
///
/// `force`: although it is in use, whose users get I/O errors. `discard_records`: with the last device of a set, records that the agent has not
/// taken are thrown away.
///
/// # Errors
///
/// [`Refusals`] when it is in use or not one of ours, else those of the module; nothing has changed then.
pub fn detach(
    manager: &Manager,
    control: &Control,
    device: &str,
    force: bool,
    discard_records: bool,
) -> anyhow::Result<(raw::DeviceStatus, Left)> {
    manager.change(control, || {
        detach_locked(manager, control, device, force, discard_records)
    })
}

fn detach_locked(
    manager: &Manager,
    control: &Control,
    device: &str,
    force: bool,
    discard_records: bool,
) -> anyhow::Result<(raw::DeviceStatus, Left)> {
    let device = find_device(&manager.system, &Manager::attached(control)?, device)?;
    let number = device.loop_number();
    let detached = patient(
        || control.detach(number, force),
        || users(&manager.system, number).is_passing(),
    );
    if let Err(error) = detached {
        if error.is(Errno::EBUSY) {
            return Err(users(&manager.system, number).refuse(&device).into());
        }
        let context = format!("{} was not detached", loop_path(number));
        return Err(anyhow::Error::from(error).context(context));
    }
    let borrowed = Borrowed::new(&manager.run_dir);
    if let Err(error) = borrowed.give_back(&manager.system, number) {
        manager.note(&format!("stock loop{number} was not put back: {error:#}"));
    }
    let left = clean_up(control, device.stream_id, discard_records)?;
    Ok((device, left))
}

/// Who has a device open.
#[derive(Debug, Default)]
pub struct Users {
    /// Mounts, swap, what is built upon it.
    lasting: Vec<String>,
    programs: Vec<String>,
}

impl Users {
    /// True when nobody is seen but udev, which looks at a device after each event and lets go.
    pub fn is_passing(&self) -> bool {
        let passing = |program: &String| program.contains("udev");
        self.lasting.is_empty() && self.programs.iter().all(passing)
    }

    fn refuse(self, device: &raw::DeviceStatus) -> Refusals {
        let mut reasons = self.lasting;
        if !self.programs.is_empty() {
            reasons.push(format!("open by {}", self.programs.join(", ")));
        }
        if reasons.is_empty() {
            let plural = if device.openers == 1 { "" } else { "s" };
            reasons.push(format!("it is open {} time{plural}", device.openers));
        }
        Refusals {
            what: format!("{} is in use", loop_path(device.loop_number())),
            reasons,
        }
    }
}

/// Who uses a loop device.
#[must_use]
pub fn users(system: &System, number: u32) -> Users {
    let mut users = Users::default();
    let uses = system.uses();
    let mut paths = vec![loop_path(number)];
    let disk = system.block(&format!("loop{number}"));
    let partitions = disk.iter().flat_map(|disk| disk.partitions.iter());
    for name in disk.iter().map(|disk| &disk.name).chain(partitions) {
        let path = node(name);
        let block = system.block(name).unwrap_or_default();
        if let Some(dev) = block.number {
            let places = uses.mounts(dev).iter();
            users
                .lasting
                .extend(places.map(|place| format!("{path} is mounted on {place}")));
            if uses.is_swap(dev) {
                users.lasting.push(format!("{path} is used as swap"));
            }
        }
        let holders = block.holders.iter();
        users
            .lasting
            .extend(holders.map(|holder| format!("{path} is in use by {holder}")));
        paths.push(path);
    }
    users.programs = system.openers(&paths);
    users
}

/// What became of the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// Other devices use it.
    Devices(u32),
    /// It is gone.
    Nothing,
    /// The agent has it open and closes it when it has everything.
    Agent,
    /// Records wait for an agent.
    Records {
        /// So many.
        records: u64,
        /// Bytes of the ring that they use.
        bytes: u64,
    },
}

/// Destroys the set's stream when nothing needs it any more.
fn clean_up(control: &Control, stream_id: u32, discard: bool) -> anyhow::Result<Left> {
    let found = control.stream_from(stream_id)?;
    let Some(status) = found.filter(|status| status.stream_id == stream_id) else {
        return Ok(Left::Nothing);
    };
    if status.devices > 0 {
        return Ok(Left::Devices(status.devices));
    }
    let discard = discard || !holds_changes(&status);
    match control.destroy_stream(stream_id, discard) {
        Ok(()) => Ok(Left::Nothing),
        Err(error) if error.is(Errno::ENOENT) => Ok(Left::Nothing),
        Err(error) if error.is(Errno::EBUSY) => Ok(Left::Agent),
        Err(error) if error.is(Errno::ENOTEMPTY) => Ok(Left::Records {
            records: status.next_seq.saturating_sub(status.released),
            bytes: status.used_bytes,
        }),
        Err(error) => Err(error.into()),
    }
}

/// True unless the stream is known to hold only records that change no byte: devices that came and
/// went, and flushes. Without this, a device that was attached and detached again with no agent
/// around would leave its set behind.
fn holds_changes(status: &raw::StreamStatus) -> bool {
    if status.used_bytes > 0 || status.has(raw::STREAM_CONSUMER) {
        return true;
    }
    let Ok(stream) = Stream::open(status.stream_id) else {
        return true;
    };
    let Ok(hold) = stream.ring().hold(status.released) else {
        return true;
    };
    let harmless = |op| {
        matches!(
            op,
            raw::OP_ATTACH | raw::OP_DETACH | raw::OP_RESIZE | raw::OP_FLUSH
        )
    };
    let all_harmless = hold
        .iter()
        .all(|record| record.is_ok_and(|record| harmless(record.desc.op)));
    hold.end() < status.next_seq || !all_harmless
}
