// SPDX-License-Identifier: GPL-2.0-only

//! A bio-based disk named `loop<N>`, with what `losetup` expects of a loop device.
//!
//! `kernel::block::mq` is for request-based drivers and carries neither data nor ioctls.
//!
//! C header: `include/linux/blkdev.h`

use super::{bio::UpperBio, block_device::BackingDevice, module_ref::this_module, shim};
use core::{
    marker::PhantomData,
    ptr::{null, null_mut, NonNull},
};
use kernel::{
    bindings,
    error::{from_err_ptr, from_result, to_result},
    ffi::{c_char, c_int, c_uint, c_ulong},
    prelude::*,
    sync::{Arc, ArcBorrow},
    transmute::AsBytes,
    uaccess::{UserPtr, UserSlice},
};

/// What a loop device says of itself to `losetup`.
pub(crate) struct LoopInfo {
    /// Loop number.
    pub(crate) number: u32,
    /// First byte of the backing device.
    pub(crate) offset_bytes: u64,
    /// Most bytes of the backing device, 0 for all.
    pub(crate) limit_bytes: u64,
    /// Device number of the backing device.
    pub(crate) backing_dev: u64,
    /// Path of the backing device, zero-terminated.
    pub(crate) backing_name: [u8; 64],
    /// Nobody may write.
    pub(crate) read_only: bool,
    /// Partitions are scanned.
    pub(crate) partscan: bool,
}

/// What a driver does for its disk.
pub(crate) trait DiskOperations: Send + Sync + Sized + 'static {
    /// A bio arrived. Task context; what is submitted here waits until this returns.
    fn submit(this: ArcBorrow<'_, Self>, bio: UpperBio);

    /// Whether the disk may be opened. Called with the disk's `open_mutex` held.
    fn may_open(&self) -> bool;

    /// Forbids (or allows again) opening. Called with the disk's `open_mutex` held.
    fn set_closing(&self, closing: bool);

    /// For `losetup -l`.
    fn loop_info(&self) -> LoopInfo;

    /// `losetup -d`: the disk is open once, by the caller.
    fn clear_fd(&self) -> Result;

    /// `losetup -c`: follow the size of the backing device.
    fn set_capacity(&self) -> Result;
}

/// How a disk is to be.
pub(crate) struct DiskOptions<'a> {
    /// Loop number.
    pub(crate) number: u32,
    /// Size in sectors.
    pub(crate) sectors: u64,
    /// First sector on the backing device, for the alignment.
    pub(crate) backing_start: u64,
    /// The backing device, whose limits are stacked.
    pub(crate) backing: &'a BackingDevice,
    /// Largest write in sectors; larger ones are cut by the driver.
    pub(crate) write_sectors_max: u32,
    /// Nobody may write.
    pub(crate) read_only: bool,
    /// Scan for partitions.
    pub(crate) partscan: bool,
}

/// Whether a block device belongs to a disk of this module.
///
/// # Safety
///
/// `bdev` is valid.
pub(super) unsafe fn is_ours(bdev: *mut bindings::block_device) -> bool {
    // SAFETY: A block device has a disk, and a disk has operations.
    unsafe { (*(*(*bdev).bd_disk).fops).owner == this_module() }
}

/// Proof that a disk was deleted while nobody had it open: no I/O is under way or can come.
pub(crate) struct Quiesced(());

/// A disk that was added to the system; dropping it deletes it.
///
/// # Invariants
///
/// `disk` was added with `T`'s operations; its private data is an `Arc<T>` that is given back in
/// `free_disk`, when the last opener is gone.
pub(crate) struct Disk<T: DiskOperations> {
    disk: NonNull<bindings::gendisk>,
    /// The backing device names it as its holder.
    linked: bool,
    operations: PhantomData<T>,
}

// SAFETY: A gendisk may be used from any task.
unsafe impl<T: DiskOperations> Send for Disk<T> {}
// SAFETY: As above.
unsafe impl<T: DiskOperations> Sync for Disk<T> {}

impl<T: DiskOperations> Disk<T> {
    const TABLE: bindings::block_device_operations = {
        // SAFETY: All members are pointers or optional functions, which may be zero.
        let zero: bindings::block_device_operations = unsafe { core::mem::zeroed() };
        bindings::block_device_operations {
            submit_bio: Some(Self::submit_bio),
            open: Some(Self::open),
            ioctl: Some(Self::ioctl),
            compat_ioctl: Some(Self::ioctl),
            free_disk: Some(Self::free_disk),
            owner: this_module(),
            ..zero
        }
    };

    /// Makes a disk and adds it; from here on it can be opened.
    ///
    /// `EEXIST` when a disk of that name exists. Must not be called from atomic context.
    pub(crate) fn add(operations: Arc<T>, options: &DiskOptions<'_>) -> Result<Self> {
        let mut limits = Self::limits(options);
        // SAFETY: `limits` is valid; the lock class is static.
        let disk = from_err_ptr(unsafe {
            bindings::__blk_alloc_disk(
                &raw mut limits,
                bindings::NUMA_NO_NODE,
                kernel::static_lock_class!().as_ptr(),
            )
        })?;
        let data = Arc::into_raw(operations);
        // SAFETY: `disk` is valid and not yet visible to anybody.
        let result = unsafe {
            (*disk).fops = &Self::TABLE;
            (*disk).private_data = data.cast_mut().cast();
            Self::set_name(disk, options.number);
            if !options.partscan {
                bindings::set_bit(
                    shim::dtloop_gd_suppress_part_scan as c_ulong,
                    &raw mut (*disk).state,
                );
            }
            bindings::set_disk_ro(disk, options.read_only);
            bindings::set_capacity(disk, options.sectors);
            to_result(bindings::device_add_disk(
                null_mut(),
                disk,
                LoopAttributes::<T>::GROUPS.0.as_ptr().cast_mut(),
            ))
        };
        if let Err(e) = result {
            // SAFETY: Not added, so `free_disk` will not run and the data is still ours.
            unsafe {
                bindings::put_disk(disk);
                drop(Arc::from_raw(data));
            }
            return Err(e);
        }
        // SAFETY: Both devices are valid. Only symbolic links for lsblk: a device without them works.
        let link = unsafe { bindings::bd_link_disk_holder(options.backing.as_ptr(), disk) };
        // INVARIANT: Just added, with these operations and data.
        Ok(Self {
            disk: NonNull::new(disk).ok_or(ENOMEM)?,
            linked: link == 0,
            operations: PhantomData,
        })
    }

    /// The backing device's limits as ours.
    ///
    /// Write cache and FUA are always on: flushes then reach us and mark the epochs even when the
    /// backing device has no volatile cache. Sizes and segments are unlimited but for writes, as
    /// the lower device splits what it gets by its own limits, and a write's payload is ours.
    fn limits(options: &DiskOptions<'_>) -> bindings::queue_limits {
        let mut limits: bindings::queue_limits = pin_init::zeroed();
        // SAFETY: `limits` and the backing device are valid; the constants are plain data.
        unsafe {
            bindings::blk_set_stacking_limits(&raw mut limits);
            limits.features = shim::dtloop_feat_write_cache
                | shim::dtloop_feat_fua
                | shim::dtloop_feat_nowait
                | shim::dtloop_feat_io_stat
                | shim::dtloop_feat_atomic_writes;
            bindings::queue_limits_stack_bdev(
                &raw mut limits,
                options.backing.as_ptr(),
                options.backing_start,
                c"dtloop".as_char_ptr(),
            );
        }
        limits.max_segments = u16::MAX;
        limits.max_segment_size = u32::MAX;
        limits.virt_boundary_mask = 0;
        limits.seg_boundary_mask = c_ulong::MAX;
        limits.chunk_sectors = 0;
        limits.max_dev_sectors = 0;
        limits.max_hw_sectors = options.write_sectors_max;
        limits.atomic_write_hw_max = limits
            .atomic_write_hw_max
            .min(options.write_sectors_max.saturating_mul(512));
        limits
    }

    /// # Safety
    ///
    /// `disk` is valid and not yet added.
    unsafe fn set_name(disk: *mut bindings::gendisk, number: u32) {
        // SAFETY: By the contract; "loop", ten digits at most and a zero fit into 32 bytes.
        let name = unsafe { &mut (*disk).disk_name };
        for (to, from) in name
            .iter_mut()
            .zip(node_path(number).iter().skip(DEV.len()))
        {
            *to = *from as c_char;
        }
    }

    /// Openers of the disk and its partitions.
    pub(crate) fn openers(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { shim::dtloop_disk_openers(self.disk.as_ptr()) }
    }

    /// Reads passed on, and their sectors, as the disk's own statistics have them.
    pub(crate) fn reads(&self) -> (u64, u64) {
        // SAFETY: By the type invariant.
        unsafe {
            let bdev = (*self.disk.as_ptr()).part0;
            (
                shim::dtloop_bdev_reads(bdev),
                shim::dtloop_bdev_read_sectors(bdev),
            )
        }
    }

    /// Device number in userspace's encoding.
    pub(crate) fn number(&self) -> u64 {
        // SAFETY: By the type invariant.
        unsafe {
            let disk = self.disk.as_ptr();
            shim::dtloop_encode_dev(shim::dtloop_mkdev(
                (*disk).major as c_uint,
                (*disk).first_minor as c_uint,
            ))
        }
    }

    /// Forbids new openers if there are at most `allowed`: `EBUSY` otherwise.
    pub(crate) fn claim(&self, allowed: u32) -> Result {
        // SAFETY: By the type invariant; the mutex orders this with openers.
        unsafe {
            let mutex = &raw mut (*self.disk.as_ptr()).open_mutex;
            bindings::mutex_lock(mutex);
            let data = Self::data(self.disk.as_ptr());
            let result =
                if shim::dtloop_disk_openers(self.disk.as_ptr()) > allowed || !data.may_open() {
                    Err(EBUSY)
                } else {
                    data.set_closing(true);
                    Ok(())
                };
            bindings::mutex_unlock(mutex);
            result
        }
    }

    /// Fails all I/O from now on and tells the file system on the disk.
    pub(crate) fn mark_dead(&self) {
        // SAFETY: By the type invariant.
        unsafe { bindings::blk_mark_disk_dead(self.disk.as_ptr()) }
    }

    /// Changes the size; a uevent tells.
    pub(crate) fn set_sectors(&self, sectors: u64) {
        // SAFETY: By the type invariant.
        unsafe { bindings::set_capacity_and_notify(self.disk.as_ptr(), sectors) };
    }

    /// Deletes the disk after [`Disk::claim`]; the proof comes if nobody has it open.
    pub(crate) fn delete(self, backing: &BackingDevice) -> Option<Quiesced> {
        if self.linked && backing.is_open() {
            // SAFETY: Linked in `add`; both are valid.
            unsafe {
                bindings::bd_unlink_disk_holder(backing.as_ptr(), self.disk.as_ptr());
            }
        }
        // SAFETY: By the type invariant, and once: `self` is consumed. No task can open the disk
        // any more after `del_gendisk`, so no openers then means no I/O: an opener keeps the device
        // open until its I/O has ended.
        let openers = unsafe {
            bindings::del_gendisk(self.disk.as_ptr());
            shim::dtloop_disk_openers(self.disk.as_ptr())
        };
        drop(self);
        (openers == 0).then_some(Quiesced(()))
    }

    /// # Safety
    ///
    /// `disk` has an `Arc<T>` as its private data.
    #[inline]
    unsafe fn data<'a>(disk: *mut bindings::gendisk) -> &'a T {
        // SAFETY: By the contract; the disk holds it until `free_disk`.
        unsafe { &*(*disk).private_data.cast::<T>() }
    }

    /// # Safety
    ///
    /// Called by the block layer with a bio for a disk of this driver.
    unsafe extern "C" fn submit_bio(bio: *mut bindings::bio) {
        // SAFETY: The bio is valid and now ours; its disk is one of ours and stays while the bio is
        // being submitted (the queue's usage counter).
        unsafe {
            let data = (*(*(*bio).bi_bdev).bd_disk).private_data.cast::<T>();
            if let Some(bio) = NonNull::new(bio) {
                T::submit(ArcBorrow::from_raw(data), UpperBio::from_raw(bio));
            }
        }
    }

    /// # Safety
    ///
    /// Called by the block layer with `open_mutex` held.
    unsafe extern "C" fn open(disk: *mut bindings::gendisk, _mode: bindings::blk_mode_t) -> c_int {
        // SAFETY: A disk of ours.
        if unsafe { Self::data(disk) }.may_open() {
            0
        } else {
            ENXIO.to_errno()
        }
    }

    /// # Safety
    ///
    /// Called by the block layer for an open disk.
    unsafe extern "C" fn ioctl(
        bdev: *mut bindings::block_device,
        _mode: bindings::blk_mode_t,
        cmd: c_uint,
        arg: c_ulong,
    ) -> c_int {
        // SAFETY: A disk of ours, open while this runs.
        let data = unsafe { Self::data((*bdev).bd_disk) };
        from_result(|| {
            if cmd == LOOP_CLR_FD {
                // What the page cache holds goes first, before any lock: its writes may have to wait
                // for the consumer.
                // SAFETY: An open block device.
                to_result(unsafe { bindings::sync_blockdev((*(*bdev).bd_disk).part0) })?;
            }
            loop_ioctl(data, cmd, arg)?;
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// Called by the block layer when the last reference to an added disk goes.
    unsafe extern "C" fn free_disk(disk: *mut bindings::gendisk) {
        // SAFETY: The reference that `add` put there.
        drop(unsafe { Arc::from_raw((*disk).private_data.cast::<T>()) });
    }
}

impl<T: DiskOperations> Drop for Disk<T> {
    fn drop(&mut self) {
        // SAFETY: The reference of `__blk_alloc_disk`. The only way to drop an added disk is
        // `delete`: the registry never drops one otherwise.
        unsafe { bindings::put_disk(self.disk.as_ptr()) }
    }
}

// -------------------------------------------------------------------------------------------------
// The ioctls of a loop device: include/uapi/linux/loop.h
// -------------------------------------------------------------------------------------------------

const LOOP_CLR_FD: c_uint = 0x4c01;
const LOOP_GET_STATUS64: c_uint = 0x4c05;
const LOOP_SET_CAPACITY: c_uint = 0x4c07;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_PARTSCAN: u32 = 8;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// `struct loop_info64`.
#[repr(C)]
struct LoopInfo64 {
    lo_device: u64,
    lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    lo_flags: u32,
    lo_file_name: [u8; 64],
    lo_crypt_name: [u8; 64],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}
const _: () = assert!(size_of::<LoopInfo64>() == 232);

// SAFETY: `#[repr(C)]`, integers only, no padding: the size is the sum of the fields.
unsafe impl AsBytes for LoopInfo64 {}

fn loop_ioctl<T: DiskOperations>(data: &T, cmd: c_uint, arg: c_ulong) -> Result {
    match cmd {
        LOOP_GET_STATUS64 => {
            let info = data.loop_info();
            let mut flags = LO_FLAGS_DIRECT_IO;
            if info.read_only {
                flags |= LO_FLAGS_READ_ONLY;
            }
            if info.partscan {
                flags |= LO_FLAGS_PARTSCAN;
            }
            let answer = LoopInfo64 {
                lo_device: 0,
                lo_inode: 0,
                lo_rdevice: info.backing_dev,
                lo_offset: info.offset_bytes,
                lo_sizelimit: info.limit_bytes,
                lo_number: info.number,
                lo_encrypt_type: 0,
                lo_encrypt_key_size: 0,
                lo_flags: flags,
                lo_file_name: info.backing_name,
                lo_crypt_name: [0; 64],
                lo_encrypt_key: [0; 32],
                lo_init: [0; 2],
            };
            UserSlice::new(UserPtr::from_addr(arg), size_of::<LoopInfo64>())
                .writer()
                .write(&answer)
        }
        LOOP_CLR_FD => {
            require_admin()?;
            data.clear_fd()
        }
        LOOP_SET_CAPACITY => {
            require_admin()?;
            data.set_capacity()
        }
        _ => Err(ENOTTY),
    }
}

const DEV: &[u8] = b"/dev/";

/// `/dev/loop<number>`, zero-terminated.
fn node_path(number: u32) -> [u8; 32] {
    let mut path = [0; 32];
    let mut divisor = 1_000_000_000;
    let digits = core::iter::from_fn(move || {
        let digit = number.checked_div(divisor)? % 10;
        divisor /= 10;
        Some(b'0' + digit as u8)
    });
    // Leading zeroes go, but for the last digit.
    let leading = 9 - number.checked_ilog10().unwrap_or(0) as usize;
    let text = Iterator::chain(DEV.iter().copied(), b"loop".iter().copied());
    let text = Iterator::chain(text, digits.skip(leading));
    for (to, from) in path.iter_mut().zip(text) {
        *to = from;
    }
    path
}

/// Whether there is a node `/dev/loop<number>` of a block device, as the current task sees it.
///
/// For numbers that are not ours: the stock driver's. Between this question and the addition of our disk that
/// driver may still come first; the addition then fails with `EEXIST`, with a stack dump in the log.
pub(crate) fn disk_exists(number: u32) -> bool {
    let path = node_path(number);
    let mut dev = 0;
    // SAFETY: A zero-terminated path, and a valid place for the answer.
    unsafe { bindings::lookup_bdev(path.as_ptr().cast(), &raw mut dev) == 0 }
}

/// `EPERM` unless the task may administer the system.
pub(crate) fn require_admin() -> Result {
    // SAFETY: Looks at the current task's credentials.
    if unsafe { bindings::capable(bindings::CAP_SYS_ADMIN as c_int) } {
        Ok(())
    } else {
        Err(EPERM)
    }
}

// -------------------------------------------------------------------------------------------------
// The sysfs group `loop/`, which util-linux reads
// -------------------------------------------------------------------------------------------------

struct LoopAttributes<T: DiskOperations>(PhantomData<T>);

/// A static that holds pointers to other statics.
struct Table<const N: usize, P>([*const P; N]);

// SAFETY: Never written, and what it points to is not either.
unsafe impl<const N: usize, P> Sync for Table<N, P> {}

type Show = unsafe extern "C" fn(
    *mut bindings::device,
    *mut bindings::device_attribute,
    *mut c_char,
) -> isize;

impl<T: DiskOperations> LoopAttributes<T> {
    const GROUPS: &'static Table<2, bindings::attribute_group> =
        &Table([&raw const *Self::GROUP, null()]);

    const GROUP: &'static bindings::attribute_group = &{
        // SAFETY: Pointers and optional functions may be zero.
        let mut group: bindings::attribute_group = unsafe { core::mem::zeroed() };
        group.name = c"loop".to_bytes_with_nul().as_ptr();
        group.__bindgen_anon_2.attrs = Self::LIST.0.as_ptr().cast_mut().cast();
        group
    };

    const LIST: &'static Table<7, bindings::device_attribute> = &Table([
        &raw const *Self::BACKING_FILE,
        &raw const *Self::OFFSET,
        &raw const *Self::SIZELIMIT,
        &raw const *Self::AUTOCLEAR,
        &raw const *Self::PARTSCAN,
        &raw const *Self::DIO,
        null(),
    ]);

    const BACKING_FILE: &'static bindings::device_attribute =
        &Self::attribute(c"backing_file", Self::backing_file);
    const OFFSET: &'static bindings::device_attribute = &Self::attribute(c"offset", Self::offset);
    const SIZELIMIT: &'static bindings::device_attribute =
        &Self::attribute(c"sizelimit", Self::sizelimit);
    const AUTOCLEAR: &'static bindings::device_attribute =
        &Self::attribute(c"autoclear", Self::autoclear);
    const PARTSCAN: &'static bindings::device_attribute =
        &Self::attribute(c"partscan", Self::partscan);
    const DIO: &'static bindings::device_attribute = &Self::attribute(c"dio", Self::dio);

    const fn attribute(name: &'static CStr, show: Show) -> bindings::device_attribute {
        // SAFETY: Pointers and optional functions may be zero.
        let mut attribute: bindings::device_attribute = unsafe { core::mem::zeroed() };
        attribute.attr.name = name.to_bytes_with_nul().as_ptr();
        attribute.attr.mode = 0o444;
        attribute.__bindgen_anon_1.show = Some(show);
        attribute
    }

    /// # Safety
    ///
    /// `dev` is the device of a disk of ours and `buf` a page, as sysfs gives them.
    unsafe fn show_number(
        dev: *mut bindings::device,
        buf: *mut c_char,
        value: impl FnOnce(&LoopInfo) -> u64,
    ) -> isize {
        // SAFETY: By the contract.
        unsafe {
            let info = Disk::<T>::data(shim::dtloop_dev_to_disk(dev)).loop_info();
            bindings::sysfs_emit(buf, c"%llu\n".as_char_ptr(), value(&info)) as isize
        }
    }

    /// # Safety
    ///
    /// As for `show_number`; called by sysfs.
    unsafe extern "C" fn backing_file(
        dev: *mut bindings::device,
        _attribute: *mut bindings::device_attribute,
        buf: *mut c_char,
    ) -> isize {
        // SAFETY: By the contract; the name is zero-terminated.
        unsafe {
            let info = Disk::<T>::data(shim::dtloop_dev_to_disk(dev)).loop_info();
            bindings::sysfs_emit(buf, c"%s\n".as_char_ptr(), info.backing_name.as_ptr()) as isize
        }
    }
}

macro_rules! show_number {
    ($($name:ident = $value:expr;)*) => {
        impl<T: DiskOperations> LoopAttributes<T> {$(
            /// # Safety
            ///
            /// As for `show_number`; called by sysfs.
            unsafe extern "C" fn $name(
                dev: *mut bindings::device,
                _attribute: *mut bindings::device_attribute,
                buf: *mut c_char,
            ) -> isize {
                // SAFETY: By the contract.
                unsafe { Self::show_number(dev, buf, $value) }
            }
        )*}
    };
}

show_number! {
    offset = |info| info.offset_bytes;
    sizelimit = |info| info.limit_bytes;
    autoclear = |_| 0;
    partscan = |info| u64::from(info.partscan);
    dio = |_| 1;
}
