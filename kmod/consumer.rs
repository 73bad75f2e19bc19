// SPDX-License-Identifier: GPL-2.0-only

//! `/dev/dtloop-stream<ID>`: the consumer's side of a stream. `abi.rs` describes the protocol.

use crate::{
    abi,
    device::Device,
    ffi::{
        char_device::{events, CharFile},
        global::with_registry,
    },
    registry::Registry,
    stream::Stream,
    sync,
};
use core::sync::atomic::{AtomicBool, Ordering};
use kernel::{
    fs::File,
    iov::IovIterDest,
    mm::virt::VmaNew,
    new_mutex,
    prelude::*,
    sync::{poll::PollTable, Arc, Mutex},
    transmute::{AsBytes, FromBytes},
    uaccess::{UserPtr, UserSlice},
};

/// An open stream. There is one at a time.
#[pin_data]
pub(crate) struct Consumer {
    stream: Arc<Stream>,
    /// What `read` returns next. A read releases what earlier reads returned.
    #[pin]
    next: Mutex<u64>,
    /// The ring was mapped: the consumer says itself what it waits for.
    mapped: AtomicBool,
}

impl CharFile for Consumer {
    fn open(minor: u32) -> Result<Arc<Self>> {
        let stream = with_registry(|registry| {
            let stream = registry.stream(minor).ok_or(ENXIO)?;
            // Under the registry's lock, so that the stream is not destroyed meanwhile.
            let next = stream.open_consumer()?;
            Ok::<_, Error>((stream.clone(), next))
        });
        let (stream, next) = stream?;
        let opened = stream.clone();
        Arc::pin_init(
            pin_init!(Self {
                stream,
                next <- new_mutex!(next, "dtloop_consumer"),
                mapped: AtomicBool::new(false),
            }),
            GFP_KERNEL,
        )
        .inspect_err(|_| opened.close_consumer())
    }

    fn release(&self) {
        self.stream.close_consumer();
    }

    /// Gives whole records: a [`abi::Desc`] and its payload each, as many as fit.
    fn read(&self, wait: bool, to: &mut IovIterDest<'_>) -> Result<usize> {
        let mut next = self.next.lock();
        self.stream.release(*next);
        if self.stream.kick()? <= *next {
            if !wait {
                return Err(EAGAIN);
            }
            self.stream.wait_committed(*next)?;
        }
        let committed = self.stream.committed();
        let mut done = 0;
        while *next < committed {
            let desc = self.stream.read_desc(*next).ok_or(EIO)?;
            let bytes = desc.payload_bytes as usize;
            if to.len() < abi::DESC_BYTES + bytes {
                break;
            }
            copy_whole(to, desc.as_bytes())?;
            let offset = self.stream.payload_offset(desc.payload_pos);
            self.stream
                .payload()
                .for_each_slice(offset, bytes, |slice| copy_whole(to, slice))?;
            done += abi::DESC_BYTES + bytes;
            *next += 1;
        }
        if done == 0 {
            // The buffer is too small for one record.
            return Err(EMSGSIZE);
        }
        Ok(done)
    }

    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, self.stream.readable());
        if self.stream.kick().is_err() {
            return events::ERROR;
        }
        if !self.mapped.load(Ordering::Relaxed) {
            self.stream.wake_at(*self.next.lock());
        }
        if self.stream.wake_due() {
            events::READABLE
        } else {
            0
        }
    }

    fn mmap(&self, vma: &VmaNew, offset_bytes: u64) -> Result {
        let (consumer_page, head, payload) = self.stream.areas();
        let bytes = vma.end() - vma.start();
        vma.try_clear_mayexec()?;
        vma.set_dontcopy();
        vma.set_dontexpand();
        match offset_bytes {
            abi::MMAP_CONSUMER if bytes == abi::PAGE_BYTES => {
                consumer_page.map(vma, 0, 0, abi::PAGE_BYTES)
            }
            abi::MMAP_RING if bytes == head.bytes() + payload.bytes() => {
                self.mapped.store(true, Ordering::Relaxed);
                // What the module relies on, userspace must not change.
                vma.try_clear_maywrite()?;
                head.map(vma, 0, 0, head.bytes())?;
                payload.map(vma, head.bytes(), 0, payload.bytes())
            }
            _ => Err(EINVAL),
        }
    }

    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            abi::IOC_STREAM_STATUS => {
                exchange(arg, |_: abi::StreamStatus| Ok(self.stream.status()))
            }
            abi::IOC_DEVICE_STATUS => exchange(arg, |status: abi::DeviceStatus| {
                device_status(status.number, |device| {
                    core::ptr::eq(device.stream(), &raw const *self.stream)
                })
            }),
            abi::IOC_SYNC => exchange(arg, |mut request: abi::Sync| {
                let device = self.device(request.device_id)?;
                request.sectors = sync::start(&device, &request)?;
                Ok(request)
            }),
            abi::IOC_DIRTY_NEXT => exchange(arg, |mut request: abi::Dirty| {
                let device = self.device(check_dirty(&request)?)?;
                (request.start_sector, request.sectors) =
                    sync::next_dirty(&device, request.start_sector, request.sectors)?;
                Ok(request)
            }),
            abi::IOC_DIRTY_SET => exchange(arg, |request: abi::Dirty| {
                let id = check_dirty(&request)?;
                // Under the registry's lock, which keeps a resize from replacing the map meanwhile.
                with_registry(|registry| {
                    let device = self.find(registry, id)?;
                    sync::set_dirty(&device, request.start_sector, request.sectors)
                })?;
                Ok(request)
            }),
            abi::IOC_INTENT_STATUS => {
                exchange(arg, |_: abi::IntentStatus| Ok(self.stream.intent_status()))
            }
            abi::IOC_INTENT_CLEAR => exchange(arg, |request: abi::IntentClear| {
                if request.reserved != [0; 5] {
                    return Err(EINVAL);
                }
                self.stream.clear_intents(request)
            }),
            abi::IOC_SUSPECT_NEXT => exchange(arg, |mut request: abi::Dirty| {
                let device = self.device(check_dirty(&request)?)?;
                (request.start_sector, request.sectors) =
                    self.stream.next_suspect(&device, request.start_sector)?;
                Ok(request)
            }),
            abi::IOC_SUSPECT_CLEAR => exchange(arg, |request: abi::Dirty| {
                let device = self.device(check_dirty(&request)?)?;
                self.stream
                    .clear_suspect(&device, request.start_sector, request.sectors)?;
                Ok(request)
            }),
            abi::IOC_SUSPECT_SET => exchange(arg, |request: abi::Dirty| {
                let device = self.device(check_dirty(&request)?)?;
                self.stream
                    .set_suspect(&device, request.start_sector, request.sectors)?;
                Ok(request)
            }),
            abi::IOC_KICK => {
                self.stream.kick()?;
                Ok(0)
            }
            _ => Err(ENOTTY),
        }
    }
}

impl Consumer {
    /// The device `id` of this stream; `ENXIO` if there is none.
    fn device(&self, id: u32) -> Result<Arc<Device>> {
        with_registry(|registry| self.find(registry, id))
    }

    fn find(&self, registry: &Registry, id: u32) -> Result<Arc<Device>> {
        let wanted = |device: &Device| {
            device.id() == id && core::ptr::eq(device.stream(), &raw const *self.stream)
        };
        let entry = registry.next_device(0, wanted).ok_or(ENXIO)?;
        Ok(entry.device.clone())
    }
}

/// Status of the device with the lowest number from `number` up that `wanted` accepts.
pub(crate) fn device_status(
    number: i32,
    wanted: impl Fn(&Device) -> bool,
) -> Result<abi::DeviceStatus> {
    let number = u32::try_from(number).map_err(|_| EINVAL)?;
    with_registry(|registry| {
        let entry = registry.next_device(number, wanted).ok_or(ENXIO)?;
        Ok(entry.device.status(entry))
    })
}

/// Reads a `T` from userspace, and writes what `f` makes of it back.
pub(crate) fn exchange<T: FromBytes + AsBytes>(
    arg: usize,
    f: impl FnOnce(T) -> Result<T>,
) -> Result<isize> {
    let (mut reader, mut writer) =
        UserSlice::new(UserPtr::from_addr(arg), size_of::<T>()).reader_writer();
    writer.write(&f(reader.read()?)?)?;
    Ok(0)
}

fn check_dirty(request: &abi::Dirty) -> Result<u32> {
    if request.flags != 0 || request.reserved != [0; 5] {
        return Err(EINVAL);
    }
    Ok(request.device_id)
}

fn copy_whole(to: &mut IovIterDest<'_>, bytes: &[u8]) -> Result {
    if to.copy_to_iter(bytes) == bytes.len() {
        Ok(())
    } else {
        Err(EFAULT)
    }
}
