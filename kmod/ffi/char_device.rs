// SPDX-License-Identifier: GPL-2.0-only

//! A family of character devices with `mmap`, `read`, `poll` and `ioctl`.
//!
//! `kernel::miscdevice` has no `poll` and no state for one of many devices.
//!
//! C header: `include/linux/fs.h`

use super::{module_ref::this_module, shim};
use core::{
    marker::PhantomData,
    ptr::{null_mut, NonNull},
};
use kernel::{
    bindings,
    error::{from_err_ptr, from_result},
    ffi::{c_int, c_long, c_uint, c_ulong},
    fs::File,
    iov::IovIterDest,
    mm::virt::VmaNew,
    page::PAGE_SIZE,
    prelude::*,
    sync::{poll::PollTable, Arc},
};

/// `poll` events.
pub(crate) mod events {
    /// There is something to read.
    pub(crate) const READABLE: u32 = kernel::bindings::POLLIN | kernel::bindings::POLLRDNORM;
    /// The device is in trouble.
    pub(crate) const ERROR: u32 = kernel::bindings::POLLERR;
}

/// One open file of a character device.
pub(crate) trait CharFile: Send + Sync + Sized + 'static {
    /// Opens the device `minor`.
    fn open(minor: u32) -> Result<Arc<Self>>;

    /// The file was closed, by all processes and mappings.
    fn release(&self);

    /// Reads; `wait` unless the file is non-blocking.
    fn read(&self, wait: bool, to: &mut IovIterDest<'_>) -> Result<usize>;

    /// Registers with `table` and gives the [`events`].
    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32;

    /// Maps from a byte of the device on.
    fn mmap(&self, vma: &VmaNew, offset_bytes: u64) -> Result;

    /// Commands.
    fn ioctl(&self, cmd: u32, arg: usize) -> Result<isize>;
}

/// A range of character devices, `name` and a number each.
///
/// # Invariants
///
/// `major` is registered with the operations of `F`; `class` is valid.
pub(crate) struct CharDevices<F: CharFile> {
    name: &'static CStr,
    major: u32,
    count: u32,
    class: NonNull<bindings::class>,
    file: PhantomData<fn(F)>,
}

// SAFETY: Registration and nodes are managed by the driver core under its own locks.
unsafe impl<F: CharFile> Send for CharDevices<F> {}
// SAFETY: As above.
unsafe impl<F: CharFile> Sync for CharDevices<F> {}

impl<F: CharFile> CharDevices<F> {
    const OPERATIONS: bindings::file_operations = {
        // SAFETY: All members are pointers, integers or optional functions, which may be zero.
        let zero: bindings::file_operations = unsafe { core::mem::zeroed() };
        bindings::file_operations {
            owner: this_module(),
            open: Some(Self::open),
            release: Some(Self::release),
            read_iter: Some(Self::read_iter),
            poll: Some(Self::poll),
            mmap: Some(Self::mmap),
            unlocked_ioctl: Some(Self::ioctl),
            compat_ioctl: Some(Self::ioctl),
            ..zero
        }
    };

    /// Registers `count` devices.
    pub(crate) fn register(name: &'static CStr, count: u32) -> Result<Self> {
        // SAFETY: Static name and operations.
        let class = from_err_ptr(unsafe { bindings::class_create(name.as_char_ptr()) })?;
        // SAFETY: As above.
        let major = unsafe {
            bindings::__register_chrdev(0, 0, count, name.as_char_ptr(), &Self::OPERATIONS)
        };
        let registered = u32::try_from(major).ok().zip(NonNull::new(class));
        match registered {
            // INVARIANT: Both calls succeeded.
            Some((major, class)) if major > 0 => Ok(Self {
                name,
                major,
                count,
                class,
                file: PhantomData,
            }),
            _ => {
                // SAFETY: Created above and not used.
                unsafe { bindings::class_destroy(class) };
                Err(Error::from_errno(major.min(-1)))
            }
        }
    }

    /// Makes the node of device `minor`; it goes with the returned object.
    pub(crate) fn add_node(&self, minor: u32) -> Result<Node> {
        // SAFETY: The class is valid; the format takes one string and one number.
        let device = unsafe {
            let number = shim::dtloop_mkdev(self.major, minor);
            bindings::device_create(
                self.class.as_ptr(),
                null_mut(),
                number,
                null_mut(),
                c"%s%u".as_char_ptr(),
                self.name.as_char_ptr(),
                minor,
            )
        };
        from_err_ptr(device)?;
        Ok(Node {
            class: self.class,
            major: self.major,
            minor,
        })
    }

    /// # Safety
    ///
    /// `file` is open and was opened by `open`.
    unsafe fn data<'a>(file: *mut bindings::file) -> &'a F {
        // SAFETY: `open` stored an `Arc<F>` that `release` takes back.
        unsafe { &*(*file).private_data.cast::<F>() }
    }

    /// # Safety
    ///
    /// Called by the VFS; so are all below.
    unsafe extern "C" fn open(inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        from_result(|| {
            // SAFETY: The VFS gives valid pointers; the file is not yet visible to anybody.
            unsafe {
                let data = F::open(shim::dtloop_iminor(inode))?;
                (*file).private_data = Arc::into_raw(data).cast_mut().cast();
                Ok(bindings::nonseekable_open(inode, file))
            }
        })
    }

    /// # Safety
    ///
    /// See `open`.
    unsafe extern "C" fn release(_inode: *mut bindings::inode, file: *mut bindings::file) -> c_int {
        // SAFETY: The reference that `open` stored; the file is going, so nobody uses it.
        let data = unsafe { Arc::from_raw((*file).private_data.cast::<F>()) };
        data.release();
        0
    }

    /// # Safety
    ///
    /// See `open`.
    unsafe extern "C" fn read_iter(
        kiocb: *mut bindings::kiocb,
        iter: *mut bindings::iov_iter,
    ) -> isize {
        from_result(|| {
            // SAFETY: The VFS gives valid pointers; the iterator is a destination in `read_iter`.
            unsafe {
                let file = (*kiocb).ki_filp;
                let wait = (*file).f_flags & bindings::O_NONBLOCK == 0;
                let read = Self::data(file).read(wait, IovIterDest::from_raw(iter))?;
                Ok(isize::try_from(read)?)
            }
        })
    }

    /// # Safety
    ///
    /// See `open`.
    unsafe extern "C" fn poll(
        file: *mut bindings::file,
        table: *mut bindings::poll_table_struct,
    ) -> bindings::__poll_t {
        // SAFETY: The VFS gives valid pointers (the table may be null); `poll` runs without
        // `fdget_pos`, as the file is not seekable.
        unsafe {
            let table = PollTable::from_raw(table);
            Self::data(file).poll(File::from_raw_file(file), &table)
        }
    }

    /// # Safety
    ///
    /// See `open`.
    unsafe extern "C" fn mmap(
        file: *mut bindings::file,
        vma: *mut bindings::vm_area_struct,
    ) -> c_int {
        from_result(|| {
            // SAFETY: The VFS gives a valid file and a vma that is being set up.
            unsafe {
                let offset = ((*vma).vm_pgoff as u64) * PAGE_SIZE as u64;
                Self::data(file).mmap(VmaNew::from_raw(vma), offset)?;
            }
            Ok(0)
        })
    }

    /// # Safety
    ///
    /// See `open`.
    unsafe extern "C" fn ioctl(file: *mut bindings::file, cmd: c_uint, arg: c_ulong) -> c_long {
        from_result(|| {
            // SAFETY: The VFS gives an open file.
            let data = unsafe { Self::data(file) };
            Ok(data.ioctl(cmd, arg)? as c_long)
        })
    }
}

impl<F: CharFile> Drop for CharDevices<F> {
    fn drop(&mut self) {
        // SAFETY: Registered in `register`; the module is going, so no file is open.
        unsafe {
            bindings::__unregister_chrdev(self.major, 0, self.count, self.name.as_char_ptr());
            bindings::class_destroy(self.class.as_ptr());
        }
    }
}

/// The node of one device in `/dev`.
///
/// # Invariants
///
/// Created in `class`, which outlives it.
pub(crate) struct Node {
    class: NonNull<bindings::class>,
    major: u32,
    minor: u32,
}

// SAFETY: The driver core has its own locks.
unsafe impl Send for Node {}
// SAFETY: As above.
unsafe impl Sync for Node {}

impl Drop for Node {
    fn drop(&mut self) {
        // SAFETY: By the type invariant.
        unsafe {
            bindings::device_destroy(
                self.class.as_ptr(),
                shim::dtloop_mkdev(self.major, self.minor),
            );
        }
    }
}
