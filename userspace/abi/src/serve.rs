// SPDX-License-Identifier: GPL-2.0-only

//! What a process needs for which writers to a block device wait.

use nix::libc;
use nix::sys::mman::{MlockAllFlags, mlockall};

use crate::ffi;

/// Makes this process fit to be waited for by writers (policy `block`, a ring that is full).
///
/// When memory is short, the kernel makes some free by writing to block devices. If one of them is a device
/// that this process serves, and writers there wait for it, the two would wait for each other for ever. So
/// nothing that this process asks the kernel for leads to such writes any more, and what it has
/// touched of its own memory stays in memory.
///
/// To be called before any other thread is made: threads inherit it.
///
/// # Errors
///
/// `EPERM` without CAP_SYS_RESOURCE, `ENOMEM` when the limit on locked memory is too low. The process works all the
/// same then, as long as memory is not short.
pub fn serve_block_io() -> nix::Result<()> {
    let pages = MlockAllFlags::MCL_CURRENT
        | MlockAllFlags::MCL_FUTURE
        | MlockAllFlags::from_bits_retain(libc::MCL_ONFAULT);
    mlockall(pages)?;
    ffi::become_io_flusher()
}
