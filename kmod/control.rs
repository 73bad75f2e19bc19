// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/dtloop-control`: streams and devices come, go and are looked at.

use crate::{
    abi,
    consumer::{device_status, exchange},
    device,
    ffi::{gendisk::require_admin, global::with_registry},
    stream::{IntentWish, Stream},
};
use kernel::{
    fs::File,
    miscdevice::{MiscDevice, MiscDeviceOptions, MiscDeviceRegistration},
    prelude::*,
    sync::Arc,
};

/// How the device is registered.
pub(crate) fn options() -> MiscDeviceOptions {
    MiscDeviceOptions {
        name: c"dtloop-control",
    }
}

/// An open control device; it has no state.
pub(crate) struct ControlFile;

#[vtable]
impl MiscDevice for ControlFile {
    type Ptr = KBox<Self>;

    fn open(_file: &File, _misc: &MiscDeviceRegistration<Self>) -> Result<KBox<Self>> {
        Ok(KBox::new(Self, GFP_KERNEL)?)
    }

    fn ioctl(_control: &Self, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            abi::IOC_GET_FEATURES => exchange(arg, features),
            abi::IOC_STREAM_STATUS => exchange(arg, |request: abi::StreamStatus| {
                with_registry(|registry| {
                    let stream = registry.next_stream(request.stream_id).ok_or(ENOENT)?;
                    Ok(stream.status())
                })
            }),
            abi::IOC_DEVICE_STATUS => exchange(arg, |request: abi::DeviceStatus| {
                device_status(request.number, |_| true)
            }),
            abi::IOC_INTENT_STATUS => exchange(arg, |request: abi::IntentStatus| {
                let stream = find_stream(request.stream_id)?;
                Ok(stream.intent_status())
            }),
            _ => {
                require_admin()?;
                change(cmd, arg)
            }
        }
    }
}

/// The commands that change something.
fn change(cmd: u32, arg: usize) -> Result<isize> {
    match cmd {
        abi::IOC_STREAM_CREATE => exchange(arg, create_stream),
        abi::IOC_STREAM_DESTROY => exchange(arg, destroy_stream),
        abi::IOC_STREAM_SET => exchange(arg, |request: abi::StreamSet| {
            zero(request.reserved)?;
            if request.reserved0 != 0 {
                return Err(EINVAL);
            }
            find_stream(request.stream_id)?.set_policy(&request)?;
            Ok(request)
        }),
        abi::IOC_STREAM_INTENT => exchange(arg, set_intents),
        abi::IOC_ATTACH => exchange(arg, |mut request: abi::Attach| {
            let (number, id) = device::attach(&request)?;
            request.number = i32::try_from(number)?;
            request.device_id = id;
            Ok(request)
        }),
        abi::IOC_DETACH => exchange(arg, |request: abi::Detach| {
            zero(request.reserved)?;
            if request.flags & !abi::DETACH_FORCE != 0 {
                return Err(EINVAL);
            }
            let number = u32::try_from(request.number).map_err(|_| ENXIO)?;
            device::detach(number, request.flags & abi::DETACH_FORCE != 0)?;
            Ok(request)
        }),
        abi::IOC_RESIZE => exchange(arg, |mut request: abi::Resize| {
            zero(request.reserved)?;
            if request.flags != 0 {
                return Err(EINVAL);
            }
            let number = u32::try_from(request.number).map_err(|_| ENXIO)?;
            request.sectors = device::resize(number, request.limit_bytes)?;
            Ok(request)
        }),
        _ => Err(ENOTTY),
    }
}

fn features(request: abi::Features) -> Result<abi::Features> {
    zero(request.reserved)?;
    Ok(abi::Features {
        abi_version: abi::ABI_VERSION,
        reserved0: 0,
        features: abi::FEATURE_TRACK
            | abi::FEATURE_BLOCK
            | abi::FEATURE_SYNC
            | abi::FEATURE_INTENT
            | abi::FEATURE_THROTTLE,
        record_bytes_max: abi::RECORD_BYTES_MAX,
        auto_first: with_registry(|registry| registry.auto_first()),
        reserved: [0; 5],
    })
}

fn create_stream(mut request: abi::StreamCreate) -> Result<abi::StreamCreate> {
    zero(request.reserved)?;
    if request.reserved0 != 0 {
        return Err(EINVAL);
    }
    // The memory is allocated outside the lock; who comes second with an id tries the next one.
    loop {
        let id = with_registry(|registry| {
            if registry.has_stream_named(&request.name) {
                Err(EEXIST)
            } else {
                registry.free_stream_id()
            }
        })?;
        let stream = Stream::new(id, &request)?;
        let added = with_registry(|registry| {
            if registry.stream(id).is_some() {
                return Ok(false);
            }
            registry.add_stream(stream).map(|()| true)
        })?;
        if added {
            request.stream_id = id;
            return Ok(request);
        }
    }
}

fn destroy_stream(request: abi::StreamDestroy) -> Result<abi::StreamDestroy> {
    zero(request.reserved)?;
    if request.flags & !abi::DESTROY_DISCARD != 0 {
        return Err(EINVAL);
    }
    let discard = request.flags & abi::DESTROY_DISCARD != 0;
    let entry = with_registry(|registry| {
        registry.remove_stream(request.stream_id, |stream| stream.check_destroy(discard))
    })?;
    // Outside the lock: the intent file, the node, then maybe a lot of memory.
    entry.stream.close_intents();
    drop(entry);
    Ok(request)
}

fn find_stream(id: u32) -> Result<Arc<Stream>> {
    with_registry(|registry| Ok(registry.stream(id).ok_or(ENOENT)?.clone()))
}

fn set_intents(mut request: abi::StreamIntent) -> Result<abi::StreamIntent> {
    zero(request.reserved)?;
    if request.flags & !abi::INTENT_FORMAT != 0 || request.reserved0 != 0 {
        return Err(EINVAL);
    }
    let stream = find_stream(request.stream_id)?;
    let joined = stream.joined();
    let mut devices = KVec::new();
    with_registry(|registry| registry.devices_of(&stream, &mut devices))?;
    let wish = IntentWish {
        fd: request.fd,
        format: request.flags & abi::INTENT_FORMAT != 0,
        region_bytes: request.region_bytes,
        hot_max: request.hot_max,
        idle_ms: request.idle_ms,
        source: request.source,
    };
    request.found = stream.set_intents(&wish, &devices, joined)?;
    let is_there = with_registry(|registry| {
        let found = registry.stream(request.stream_id);
        found.is_some_and(|found| Arc::ptr_eq(found, &stream))
    });
    if !is_there {
        // It was destroyed meanwhile, and what destroyed it may not have seen the file.
        stream.close_intents();
        return Err(ENOENT);
    }
    Ok(request)
}

/// `EINVAL` unless the reserved fields are zero.
fn zero<const N: usize>(reserved: [u64; N]) -> Result {
    if reserved.iter().all(|word| *word == 0) {
        Ok(())
    } else {
        Err(EINVAL)
    }
}
