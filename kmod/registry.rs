// SPDX-License-Identifier: GPL-2.0-only

//! What exists: streams by id, devices by loop number.
//!
//! One mutex guards the tables; it is held for look-ups and changes of them and never while a disk
//! is added or deleted, as both run code of others. Lock order: registry mutex, then a disk's
//! `open_mutex`, then a stream's spinlock.

use crate::{
    abi,
    consumer::Consumer,
    device::Device,
    ffi::{
        char_device::{CharDevices, Node},
        gendisk::{disk_exists, Disk},
        global::with_registry,
    },
    stream::Stream,
};
use kernel::{alloc::kvec::PushError, prelude::*, sync::Arc};

/// A stream and its node in `/dev`, which goes first.
pub(crate) struct StreamEntry {
    _node: Node,
    pub(crate) stream: Arc<Stream>,
}

/// A device and its disk.
pub(crate) struct DeviceEntry {
    pub(crate) disk: Disk<Device>,
    pub(crate) device: Arc<Device>,
}

/// The tables.
pub(crate) struct Registry {
    nodes: Option<CharDevices<Consumer>>,
    streams: KVec<StreamEntry>,
    devices: KVec<DeviceEntry>,
    /// Loop numbers of disks that are being added or deleted right now.
    busy: KVec<u32>,
    auto_first: i32,
}

/// The tables are in use, for as long as this exists.
pub(crate) struct InUse(());

impl Drop for InUse {
    fn drop(&mut self) {
        // The registry is a static, which nobody drops: the memory of its tables goes here, too,
        // although they are empty, as every stream and every device holds a reference to the module.
        let tables = with_registry(|registry| core::mem::replace(registry, Registry::new()));
        drop(tables);
    }
}

/// Makes room for the character devices; part of the module's init.
pub(crate) fn start(auto_first: i32) -> Result<InUse> {
    if !(0..=abi::LOOP_NUMBER_MAX).contains(&auto_first) {
        pr_err!(
            "auto_first={auto_first} is outside 0..={}\n",
            abi::LOOP_NUMBER_MAX
        );
        return Err(EINVAL);
    }
    let nodes = CharDevices::register(c"dtloop-stream", abi::STREAMS_MAX)?;
    with_registry(|registry| {
        registry.nodes = Some(nodes);
        registry.auto_first = auto_first;
    });
    Ok(InUse(()))
}

impl Registry {
    /// Empty tables.
    pub(crate) const fn new() -> Self {
        Self {
            nodes: None,
            streams: KVec::new(),
            devices: KVec::new(),
            busy: KVec::new(),
            auto_first: 0,
        }
    }

    /// First number that `auto` hands out.
    pub(crate) fn auto_first(&self) -> i32 {
        self.auto_first
    }

    // -----------------------------------------------------------------------------------------
    // Streams
    // -----------------------------------------------------------------------------------------

    /// The lowest id that no stream has.
    pub(crate) fn free_stream_id(&self) -> Result<u32> {
        (0..abi::STREAMS_MAX)
            .find(|id| self.stream(*id).is_none())
            .ok_or(ENOSPC)
    }

    /// Adds a stream and makes its node. `EEXIST` if the name or the id is taken.
    pub(crate) fn add_stream(&mut self, stream: Arc<Stream>) -> Result {
        let taken = |entry: &StreamEntry| {
            entry.stream.name() == stream.name() || entry.stream.id() == stream.id()
        };
        if self.streams.iter().any(taken) {
            return Err(EEXIST);
        }
        let nodes = self.nodes.as_ref().ok_or(ENODEV)?;
        self.streams.reserve(1, GFP_KERNEL)?;
        let node = nodes.add_node(stream.id())?;
        self.streams.push(
            StreamEntry {
                _node: node,
                stream,
            },
            GFP_KERNEL,
        )?;
        Ok(())
    }

    /// The stream `id`.
    pub(crate) fn stream(&self, id: u32) -> Option<&Arc<Stream>> {
        self.streams
            .iter()
            .map(|entry| &entry.stream)
            .find(|stream| stream.id() == id)
    }

    /// The stream with the lowest id from `id` up.
    pub(crate) fn next_stream(&self, id: u32) -> Option<&Arc<Stream>> {
        self.streams
            .iter()
            .map(|entry| &entry.stream)
            .filter(|stream| stream.id() >= id)
            .min_by_key(|stream| stream.id())
    }

    /// Whether a stream of that name exists.
    pub(crate) fn has_stream_named(&self, name: &[u8; abi::NAME_BYTES]) -> bool {
        self.streams.iter().any(|entry| entry.stream.name() == name)
    }

    /// Takes the stream `id` out of the table, if `may` agrees.
    pub(crate) fn remove_stream(
        &mut self,
        id: u32,
        may: impl FnOnce(&Stream) -> Result,
    ) -> Result<StreamEntry> {
        let at = self
            .streams
            .iter()
            .position(|entry| entry.stream.id() == id)
            .ok_or(ENOENT)?;
        let entry = self.streams.get(at).ok_or(ENOENT)?;
        may(&entry.stream)?;
        self.streams.remove(at).map_err(|_| ENOENT)
    }

    // -----------------------------------------------------------------------------------------
    // Devices
    // -----------------------------------------------------------------------------------------

    /// Sets a loop number aside while its disk is made: the given one (`EEXIST` if it is ours
    /// already) or the lowest free one.
    pub(crate) fn reserve_number(&mut self, wanted: i32) -> Result<u32> {
        let number = if wanted == abi::NUMBER_AUTO {
            let first = u32::try_from(self.auto_first)?;
            let last = u32::try_from(abi::LOOP_NUMBER_MAX)?;
            // Of a disk that is not ours the first free one is asked by name.
            (first..=last)
                .find(|number| !self.has_number(*number) && !disk_exists(*number))
                .ok_or(ENOSPC)?
        } else {
            if !(0..=abi::LOOP_NUMBER_MAX).contains(&wanted) {
                return Err(EINVAL);
            }
            u32::try_from(wanted)?
        };
        // A second disk of one name would leave a stack dump in the log.
        if self.has_number(number) || disk_exists(number) {
            return Err(EEXIST);
        }
        self.busy.push(number, GFP_KERNEL)?;
        Ok(number)
    }

    fn has_number(&self, number: u32) -> bool {
        self.busy.contains(&number) || self.device(number).is_some()
    }

    /// Gives a number back that was set aside.
    pub(crate) fn release_number(&mut self, number: u32) {
        self.busy.retain(|busy| *busy != number);
    }

    /// Adds a device whose number was set aside.
    pub(crate) fn add_device(&mut self, entry: DeviceEntry) -> Result<(), (Error, DeviceEntry)> {
        self.release_number(entry.device.number());
        if self.devices.reserve(1, GFP_KERNEL).is_err() {
            return Err((ENOMEM, entry));
        }
        self.devices
            .push_within_capacity(entry)
            .map_err(|PushError(entry)| (ENOMEM, entry))
    }

    /// The device with loop number `number`.
    pub(crate) fn device(&self, number: u32) -> Option<&DeviceEntry> {
        self.devices
            .iter()
            .find(|entry| entry.device.number() == number)
    }

    /// The device with the lowest number from `number` up that `wanted` accepts.
    pub(crate) fn next_device(
        &self,
        number: u32,
        wanted: impl Fn(&Device) -> bool,
    ) -> Option<&DeviceEntry> {
        self.devices
            .iter()
            .filter(|entry| entry.device.number() >= number && wanted(&entry.device))
            .min_by_key(|entry| entry.device.number())
    }

    /// Adds the devices of a stream to `devices`.
    pub(crate) fn devices_of(&self, stream: &Stream, devices: &mut KVec<Arc<Device>>) -> Result {
        for entry in self.devices.iter() {
            if core::ptr::eq(entry.device.stream(), stream) {
                devices.push(entry.device.clone(), GFP_KERNEL)?;
            }
        }
        Ok(())
    }

    /// Takes a device out of the table if `may` agrees; its number stays set aside until
    /// [`Registry::release_number`].
    pub(crate) fn remove_device(
        &mut self,
        number: u32,
        may: impl FnOnce(&DeviceEntry) -> Result,
    ) -> Result<DeviceEntry> {
        let at = self
            .devices
            .iter()
            .position(|entry| entry.device.number() == number)
            .ok_or(ENXIO)?;
        self.busy.reserve(1, GFP_KERNEL)?;
        may(self.devices.get(at).ok_or(ENXIO)?)?;
        let entry = self.devices.remove(at).map_err(|_| ENXIO)?;
        self.busy.push(number, GFP_KERNEL)?;
        Ok(entry)
    }
}
