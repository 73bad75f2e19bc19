// SPDX-License-Identifier: GPL-2.0-only

//! Finding out all about a device before it is attached.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use dtloop_abi::raw;
use nix::libc;

use super::plain;
use crate::preflight::Facts;
use crate::system::{BlockDevice, DevNumber, PROBE_BYTES, System, Uses, probe};

/// Looks at devices one after the other; what is the same for all is read once.
pub struct Gatherer<'a> {
    system: &'a System,
    uses: Uses,
    attached: &'a [raw::DeviceStatus],
}

impl<'a> Gatherer<'a> {
    /// For this machine, with these devices of the module.
    #[must_use]
    pub fn new(system: &'a System, attached: &'a [raw::DeviceStatus]) -> Self {
        Self {
            system,
            uses: system.uses(),
            attached,
        }
    }

    fn attached_as(&self, dev: Option<DevNumber>) -> Option<u32> {
        let backing = |d: &&raw::DeviceStatus| Some(DevNumber::from_raw(d.backing_dev)) == dev;
        self.attached
            .iter()
            .find(backing)
            .map(raw::DeviceStatus::loop_number)
    }

    /// Everything but what has to be read from the device itself.
    fn outside(&self, device: BlockDevice) -> Facts {
        let dev = device.number;
        let loop_of = |name: &str| self.system.block(name).and_then(|d| d.number);
        let disk_attached = device.disk.as_deref().map(loop_of);
        let mine = |d: &raw::DeviceStatus| Some(DevNumber::from_raw(d.loop_dev)) == dev;
        let partitions = device.partitions.iter();
        Facts {
            mounts: dev.map_or(Vec::new(), |dev| self.uses.mounts(dev).to_vec()),
            swap: dev.is_some_and(|dev| self.uses.is_swap(dev)),
            attached: self.attached_as(dev),
            is_ours: self.attached.iter().any(mine),
            disk_attached: disk_attached.and_then(|disk| self.attached_as(disk)),
            partitions: partitions
                .filter_map(|name| Some((name.clone(), self.partition_use(name)?)))
                .collect(),
            signatures: Vec::new(),
            held: false,
            unreadable: None,
            device,
        }
    }

    /// How a partition is used, if it is.
    fn partition_use(&self, name: &str) -> Option<String> {
        let partition = self.system.block(name)?;
        let dev = partition.number?;
        let mounts = self.uses.mounts(dev);
        if !mounts.is_empty() {
            return Some(format!("mounted on {}", mounts.join(", ")));
        }
        if self.uses.is_swap(dev) {
            return Some("swap".into());
        }
        if let Some(number) = self.attached_as(Some(dev)) {
            return Some(format!("attached to /dev/loop{number}"));
        }
        let holders = partition.holders.join(", ");
        (!holders.is_empty()).then_some(holders)
    }

    /// Everything about a device.
    pub fn facts(&self, device: BlockDevice) -> Facts {
        let path = device.path();
        let mut facts = self.outside(device);
        if facts.device.size_bytes == 0 {
            return facts;
        }
        let path = Path::new(&path);
        let looked = signatures(path).and_then(|found| Ok((found, is_held(path)?)));
        match looked {
            Ok((signatures, held)) => (facts.signatures, facts.held) = (signatures, held),
            Err(error) => facts.unreadable = Some(plain(&error)),
        }
        facts
    }
}

fn signatures(path: &Path) -> io::Result<Vec<crate::system::Signature>> {
    let mut head = Vec::with_capacity(PROBE_BYTES);
    let file = File::open(path)?;
    file.take(PROBE_BYTES as u64).read_to_end(&mut head)?;
    Ok(probe(&head))
}

/// Asks the kernel by opening the device exclusively, which has no effect once it is closed again.
fn is_held(path: &Path) -> io::Result<bool> {
    let exclusive = File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(path);
    match exclusive {
        Ok(_) => Ok(false),
        Err(error) if error.kind() == ErrorKind::ResourceBusy => Ok(true),
        Err(error) => Err(error),
    }
}
