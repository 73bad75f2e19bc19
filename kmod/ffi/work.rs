// SPDX-License-Identifier: GPL-2.0-only

//! Workqueues of our own, so that leaving the module can wait for the work it queued.
//!
//! C header: `include/linux/workqueue.h`

use core::sync::atomic::{AtomicPtr, Ordering};
use kernel::{bindings, prelude::*, str::CStr, workqueue::Queue};

/// A pointer to a workqueue, null before init and after exit.
type Slot = AtomicPtr<bindings::workqueue_struct>;

static GENERAL: Slot = AtomicPtr::new(core::ptr::null_mut());
static IO: Slot = AtomicPtr::new(core::ptr::null_mut());

/// One of the module's workqueues.
struct Owned(&'static Slot);

impl Owned {
    fn new(slot: &'static Slot, name: &'static CStr, flags: u32) -> Result<Self> {
        // SAFETY: A static format without arguments.
        let queue = unsafe { bindings::alloc_workqueue_noprof(name.as_char_ptr(), flags, 0) };
        if queue.is_null() {
            return Err(ENOMEM);
        }
        slot.store(queue, Ordering::Release);
        Ok(Self(slot))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let queue = self.0.swap(core::ptr::null_mut(), Ordering::AcqRel);
        // SAFETY: Made by `new`. The module is going, so nobody queues any more; this waits for
        // what was queued.
        unsafe { bindings::destroy_workqueue(queue) }
    }
}

/// The module's workqueues; while they live, [`queue`] and [`io_queue`] give them.
pub(crate) struct WorkQueues {
    _general: Owned,
    _io: Owned,
}

impl WorkQueues {
    /// Creates the queues. At most one of this exists: the module's init calls this once.
    pub(crate) fn new() -> Result<Self> {
        let unbound = bindings::wq_flags_WQ_UNBOUND;
        let reclaim = bindings::wq_flags_WQ_MEM_RECLAIM;
        Ok(Self {
            _general: Owned::new(&GENERAL, c"dtloop", unbound)?,
            _io: Owned::new(
                &IO,
                c"dtloop_io",
                unbound | reclaim | bindings::wq_flags_WQ_HIGHPRI,
            )?,
        })
    }
}

/// For work that may take its time.
pub(crate) fn queue() -> Option<&'static Queue> {
    get(&GENERAL)
}

/// For work that a change waits for: it has a thread of its own even when there is no memory for one.
pub(crate) fn io_queue() -> Option<&'static Queue> {
    get(&IO)
}

fn get(slot: &Slot) -> Option<&'static Queue> {
    let queue = slot.load(Ordering::Acquire);
    if queue.is_null() {
        return None;
    }
    // SAFETY: It lives as long as the module; nothing that calls this outlives the module, as each
    // caller belongs to an object that holds a `ModuleRef`.
    Some(unsafe { Queue::from_raw(queue) })
}
