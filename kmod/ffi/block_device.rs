// SPDX-License-Identifier: GPL-2.0-only

//! The backing block device, open and held exclusively.
//!
//! C header: `include/linux/blkdev.h`

use super::{gendisk::Quiesced, shim};
use core::{
    ffi::c_void,
    ptr::NonNull,
    sync::atomic::{AtomicPtr, Ordering},
};
use kernel::{
    bindings,
    error::from_err_ptr,
    fs::file::LocalFile,
    prelude::*,
    sync::Arc, //
};

/// What the holder of a block device is told.
pub(crate) trait Holder: Send + Sync {
    /// The device is gone. May sleep.
    fn backing_dead(&self);
}

/// Device number in the encoding that userspace sees.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct DevNumber(pub(crate) u64);

impl DevNumber {
    /// The device number of the block device that is open as `fd` in the current task: `EBADF`
    /// without such a file, `ENOTBLK` if it is something else.
    pub(crate) fn from_fd(fd: i32) -> Result<Self> {
        let file = LocalFile::fget(u32::try_from(fd).map_err(|_| EBADF)?)?;
        // SAFETY: The file is valid while `file` lives.
        match unsafe { shim::dtloop_file_block_dev(file.as_ptr()) } {
            0 => Err(ENOTBLK),
            dev => Ok(Self(dev)),
        }
    }
}

/// An open block device that nobody else can claim.
///
/// # Invariants
///
/// `file`, unless null, is the open file of `bdev`, which is valid while the file is open. It gets
/// null only when no I/O is under way and none can come ([`Quiesced`]), or at drop.
pub(crate) struct BackingDevice {
    file: AtomicPtr<bindings::file>,
    bdev: NonNull<bindings::block_device>,
}

// SAFETY: An open block device may be used from any task.
unsafe impl Send for BackingDevice {}
// SAFETY: As above.
unsafe impl Sync for BackingDevice {}

struct HolderOps<H>(core::marker::PhantomData<H>);

impl<H: Holder> HolderOps<H> {
    const OPS: bindings::blk_holder_ops = bindings::blk_holder_ops {
        mark_dead: Some(Self::mark_dead),
        sync: None,
        freeze: None,
        thaw: None,
    };

    /// # Safety
    ///
    /// Called by the block layer with `bd_holder_lock` held, for a device that `open` claimed.
    unsafe extern "C" fn mark_dead(bdev: *mut bindings::block_device, _surprise: bool) {
        // SAFETY: The holder is the `H` that `open` was given, alive until the file is closed. The
        // callee has to give the lock back.
        unsafe {
            let holder = (*bdev).bd_holder.cast::<H>();
            (*holder).backing_dead();
            bindings::mutex_unlock(&raw mut (*bdev).bd_holder_lock);
        }
    }
}

impl BackingDevice {
    /// Opens a block device for `holder`, exclusively.
    ///
    /// `ENXIO` no such device, `EBUSY` somebody else holds it, `EROFS` or `EACCES` if it can not be
    /// written. `holder` must stay alive until the device is closed.
    ///
    /// # Safety
    ///
    /// `holder` points to an `H` that outlives the returned object.
    unsafe fn open_raw<H: Holder>(dev: DevNumber, write: bool, holder: *const H) -> Result<Self> {
        // SAFETY: Constants; then a call with a valid device number and static operations.
        let file = unsafe {
            let mode = if write {
                shim::dtloop_open_read | shim::dtloop_open_write
            } else {
                shim::dtloop_open_read
            };
            from_err_ptr(bindings::bdev_file_open_by_dev(
                shim::dtloop_decode_dev(dev.0),
                mode,
                holder.cast_mut().cast::<c_void>(),
                &HolderOps::<H>::OPS,
            ))?
        };
        // SAFETY: `file` was just opened; `file_bdev` of an open block device is valid.
        let bdev = unsafe { bindings::file_bdev(file) };
        // INVARIANT: As established by the calls above.
        Ok(Self {
            file: AtomicPtr::new(file),
            bdev: NonNull::new(bdev).ok_or(ENXIO)?,
        })
    }

    /// Opens a block device exclusively in the name of `holder`, which the caller stores beside the
    /// result and keeps: see [`Held`].
    pub(crate) fn open<H: Holder>(dev: DevNumber, write: bool, holder: Arc<H>) -> Result<Held<H>> {
        // SAFETY: `Held` keeps `holder` alive longer than the device: fields drop in order.
        let device = unsafe { Self::open_raw(dev, write, &raw const *holder)? };
        Ok(Held {
            device,
            _holder: holder,
        })
    }

    #[inline]
    pub(super) fn as_ptr(&self) -> *mut bindings::block_device {
        self.bdev.as_ptr()
    }

    /// Whether the device is still open.
    pub(crate) fn is_open(&self) -> bool {
        !self.file.load(Ordering::Acquire).is_null()
    }

    /// Closes the device early; afterwards only [`BackingDevice::is_open`] makes sense.
    pub(crate) fn close(&self, _proof: Quiesced) {
        self.close_raw();
    }

    fn close_raw(&self) {
        let file = self.file.swap(core::ptr::null_mut(), Ordering::AcqRel);
        if !file.is_null() {
            // SAFETY: The open file of the invariant; nobody uses it any more.
            unsafe { bindings::bdev_fput(file) }
        }
    }

    fn if_open<T>(&self, value: impl FnOnce(*mut bindings::block_device) -> T) -> Option<T> {
        self.is_open().then(|| value(self.as_ptr()))
    }

    /// Size in sectors.
    pub(crate) fn sectors(&self) -> u64 {
        // SAFETY: Open, so valid; and so below.
        self.if_open(|bdev| unsafe { shim::dtloop_bdev_sectors(bdev) })
            .unwrap_or(0)
    }

    /// Logical block size in bytes.
    pub(crate) fn block_bytes(&self) -> u32 {
        // SAFETY: See `sectors`.
        self.if_open(|bdev| unsafe { shim::dtloop_bdev_block_bytes(bdev) })
            .unwrap_or(512)
    }

    /// Whether it can not be written.
    pub(crate) fn read_only(&self) -> bool {
        // SAFETY: See `sectors`.
        self.if_open(|bdev| unsafe { shim::dtloop_bdev_read_only(bdev) })
            .unwrap_or(true)
    }

    /// Whether it has zones.
    pub(crate) fn is_zoned(&self) -> bool {
        // SAFETY: See `sectors`.
        self.if_open(|bdev| unsafe { shim::dtloop_bdev_is_zoned(bdev) })
            .unwrap_or(false)
    }

    /// Whether write-zeroes deallocates, so that a discard can be made one.
    pub(crate) fn unmaps_by_write_zeroes(&self) -> bool {
        // SAFETY: See `sectors`.
        self.if_open(|bdev| unsafe { shim::dtloop_bdev_unmap_zeroes_sectors(bdev) != 0 })
            .unwrap_or(false)
    }

    /// Sectors written since the device came up, as its own statistics count them.
    pub(crate) fn written_sectors(&self) -> u64 {
        // SAFETY: See `sectors`.
        self.if_open(|bdev| unsafe { shim::dtloop_bdev_written_sectors(bdev) })
            .unwrap_or(0)
    }

    /// Device number.
    pub(crate) fn number(&self) -> DevNumber {
        DevNumber(
            // SAFETY: See `sectors`.
            self.if_open(|bdev| unsafe { shim::dtloop_encode_dev((*bdev).bd_dev) })
                .unwrap_or(0),
        )
    }

    /// Writes the name, `/dev/` included and zero-terminated, into `name`.
    pub(crate) fn name(&self, name: &mut [u8]) {
        self.if_open(|bdev| {
            // SAFETY: See `sectors`; the buffer is valid for its length.
            unsafe { shim::dtloop_bdev_name(bdev, name.as_mut_ptr(), name.len()) };
        });
    }
}

impl Drop for BackingDevice {
    fn drop(&mut self) {
        self.close_raw();
    }
}

/// A [`BackingDevice`] and the holder in whose name it is open.
pub(crate) struct Held<H: Holder> {
    // Dropped first.
    device: BackingDevice,
    _holder: Arc<H>,
}

impl<H: Holder> core::ops::Deref for Held<H> {
    type Target = BackingDevice;

    #[inline]
    fn deref(&self) -> &BackingDevice {
        &self.device
    }
}
