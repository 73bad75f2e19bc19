// SPDX-License-Identifier: GPL-2.0-only

//! A workqueue of our own, so that leaving the module can wait for the work it queued.
//!
//! C header: `include/linux/workqueue.h`

use core::sync::atomic::{AtomicPtr, Ordering};
use kernel::{bindings, prelude::*, workqueue::Queue};

static QUEUE: AtomicPtr<bindings::workqueue_struct> = AtomicPtr::new(core::ptr::null_mut());

/// The module's workqueue; while it lives, [`queue`] gives it.
pub(crate) struct WorkQueue(());

impl WorkQueue {
    /// Creates the queue. At most one exists: the module's init calls this once.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: A static format without arguments.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(
                c"dtloop".as_char_ptr(),
                bindings::wq_flags_WQ_UNBOUND,
                0,
            )
        };
        if queue.is_null() {
            return Err(ENOMEM);
        }
        QUEUE.store(queue, Ordering::Release);
        Ok(Self(()))
    }
}

impl Drop for WorkQueue {
    fn drop(&mut self) {
        let queue = QUEUE.swap(core::ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: Made by `new`. The module is going, so nobody queues any more; this waits for
        // what was queued.
        unsafe { bindings::destroy_workqueue(queue) }
    }
}

/// The module's workqueue, `None` before init and after exit.
pub(crate) fn queue() -> Option<&'static Queue> {
    let queue = QUEUE.load(Ordering::Acquire);
    if queue.is_null() {
        return None;
    }
    // SAFETY: It lives as long as the module; nothing that calls this outlives the module, as each
    // caller belongs to an object that holds a `ModuleRef`.
    Some(unsafe { Queue::from_raw(queue) })
}
