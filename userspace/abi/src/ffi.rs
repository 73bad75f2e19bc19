// SPDX-License-Identifier: GPL-2.0-only

//! `ioctl` calls and access to memory that the kernel writes. With the model in `testing.rs` the
//! only unsafe code of DTLOOP's userspace.

use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use memmap2::MmapRaw;
use nix::errno::Errno;
use nix::libc;

use crate::raw;

/// An ioctl number together with the type of its argument.
///
/// # Invariants
///
/// Instances exist only in [`ioctls`]. A file that understands the number reads and writes exactly
/// one `T` behind the argument, and every bit pattern is a valid `T`.
pub(crate) struct Ioctl<T> {
    number: u32,
    argument: PhantomData<T>,
}

/// The ioctls of the module.
pub(crate) mod ioctls {
    use super::{Ioctl, PhantomData, raw};

    macro_rules! ioctls {
        ($($name:ident: $number:ident $argument:ty;)*) => {
            $(
                // INVARIANT: The number's size field is the size of the argument, which is made of
                // integers only.
                pub(crate) const $name: Ioctl<$argument> =
                    Ioctl { number: raw::$number, argument: PhantomData };
            )*
        };
    }

    ioctls! {
        GET_FEATURES: IOC_GET_FEATURES raw::Features;
        STREAM_CREATE: IOC_STREAM_CREATE raw::StreamCreate;
        STREAM_DESTROY: IOC_STREAM_DESTROY raw::StreamDestroy;
        STREAM_SET: IOC_STREAM_SET raw::StreamSet;
        STREAM_STATUS: IOC_STREAM_STATUS raw::StreamStatus;
        ATTACH: IOC_ATTACH raw::Attach;
        DETACH: IOC_DETACH raw::Detach;
        RESIZE: IOC_RESIZE raw::Resize;
        DEVICE_STATUS: IOC_DEVICE_STATUS raw::DeviceStatus;
        SYNC: IOC_SYNC raw::Sync;
        DIRTY_NEXT: IOC_DIRTY_NEXT raw::Dirty;
        DIRTY_SET: IOC_DIRTY_SET raw::Dirty;
        STREAM_INTENT: IOC_STREAM_INTENT raw::StreamIntent;
        INTENT_STATUS: IOC_INTENT_STATUS raw::IntentStatus;
        INTENT_CLEAR: IOC_INTENT_CLEAR raw::IntentClear;
        SUSPECT_NEXT: IOC_SUSPECT_NEXT raw::Dirty;
        SUSPECT_CLEAR: IOC_SUSPECT_CLEAR raw::Dirty;
        SUSPECT_SET: IOC_SUSPECT_SET raw::Dirty;
    }
}

/// Calls an ioctl that reads and writes its argument. `EINTR` is tried again.
pub(crate) fn call<T>(fd: BorrowedFd<'_>, ioctl: &Ioctl<T>, argument: &mut T) -> nix::Result<()> {
    loop {
        // SAFETY: `fd` is open for as long as it is borrowed. By the invariant of `Ioctl` the
        // kernel reads and writes at most one `T` behind the pointer, which is an exclusive
        // reference to one, and whatever it writes is a valid `T`. A file of somebody else answers
        // ENOTTY: 0xdd with these sizes is used by nobody else.
        let result =
            unsafe { libc::ioctl(fd.as_raw_fd(), ioctl.number.into(), &raw mut *argument) };
        match Errno::result(result) {
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

/// Calls [`raw::IOC_KICK`], which has no argument.
pub(crate) fn kick(fd: BorrowedFd<'_>) -> nix::Result<()> {
    // SAFETY: `fd` is open for as long as it is borrowed; the ioctl has no argument.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), raw::IOC_KICK.into(), 0) };
    Errno::result(result).map(drop)
}

/// `include/uapi/linux/prctl.h`
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Tells the kernel that this thread, and those it makes from now on, serve block I/O: no memory that they ask for may
/// be made free by writing to a block device. Needs CAP_SYS_RESOURCE.
pub(crate) fn become_io_flusher() -> nix::Result<()> {
    // SAFETY: Sets flags of the calling thread; no argument is a pointer.
    let result = unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    Errno::result(result).map(drop)
}

/// Memory shared with the kernel. Accessed through the methods below only, which check every
/// offset against the length; nothing hands out a reference except [`Shared::slice`].
pub(crate) struct Shared(MmapRaw);

impl Shared {
    pub(crate) const fn new(map: MmapRaw) -> Self {
        Self(map)
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// A pointer to `bytes` bytes at `offset`, which is aligned to `align`.
    fn at(&self, offset: usize, bytes: usize, align: usize) -> *mut u8 {
        let end = offset.checked_add(bytes);
        assert!(
            end.is_some_and(|end| end <= self.len()) && offset % align == 0,
            "offset {offset} outside of a mapping of {} bytes",
            self.len()
        );
        // The offset is within the allocation, so this does not leave it.
        self.0.as_mut_ptr().wrapping_add(offset)
    }

    /// Loads a word that the other side stores with release ordering.
    pub(crate) fn load(&self, offset: usize) -> u64 {
        let pointer = self.at(offset, size_of::<u64>(), align_of::<u64>()).cast();
        // SAFETY: `at` has checked that the word is inside the mapping, which lives as long as
        // `self`, and aligned, since mappings are page-aligned. Both sides access it atomically
        // only. A relaxed load is allowed on memory mapped read-only.
        let value = unsafe { AtomicU64::from_ptr(pointer) }.load(Ordering::Relaxed);
        // Acquire: by fence, as only relaxed loads are sure not to write to read-only memory.
        fence(Ordering::Acquire);
        value
    }

    /// Stores a word with release ordering. The mapping must be writable.
    pub(crate) fn store(&self, offset: usize, value: u64) {
        let pointer = self.at(offset, size_of::<u64>(), align_of::<u64>()).cast();
        // SAFETY: as in `load`; the callers store only to mappings that they made writable.
        unsafe { AtomicU64::from_ptr(pointer) }.store(value, Ordering::Release);
    }

    /// Copies a descriptor.
    ///
    /// # Safety
    ///
    /// Nobody may write to the descriptor meanwhile.
    pub(crate) unsafe fn desc(&self, offset: usize) -> raw::Desc {
        let pointer = self.at(offset, size_of::<raw::Desc>(), align_of::<raw::Desc>());
        // SAFETY: `at` has checked bounds and alignment, every bit pattern is a valid `Desc`, and
        // the caller promises that nobody writes to it.
        unsafe { pointer.cast::<raw::Desc>().read() }
    }

    /// Borrows `bytes` bytes.
    ///
    /// # Safety
    ///
    /// Nobody may write to them for the lifetime `'a`, for which `self` must be borrowed.
    pub(crate) unsafe fn slice(&self, offset: usize, bytes: usize) -> &[u8] {
        let pointer = self.at(offset, bytes, 1);
        // SAFETY: `at` has checked the bounds; the mapping lives as long as `self`; the caller
        // promises that nobody writes to it.
        unsafe { std::slice::from_raw_parts(pointer, bytes) }
    }

    /// Copies bytes in.
    ///
    /// # Safety
    ///
    /// The mapping must be writable and nobody may read or write the range meanwhile.
    #[cfg(feature = "testing")]
    pub(crate) unsafe fn fill(&self, offset: usize, bytes: &[u8]) {
        let pointer = self.at(offset, bytes.len(), 1);
        // SAFETY: `at` has checked the bounds; the source cannot be part of the mapping, to which
        // no slice exists that the caller could have got for this range.
        unsafe { pointer.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}
