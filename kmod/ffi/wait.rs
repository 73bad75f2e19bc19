// SPDX-License-Identifier: GPL-2.0-only

//! Waiting for a condition with a state and a time-out of our own choice.
//!
//! `kernel::sync::CondVar` waits either uninterruptibly without a time-out, which the hung-task
//! detector reports, or interruptibly, which a block driver can not: a pending signal must not
//! fail a write.
//!
//! C header: `include/linux/wait.h`

use super::shim;
use kernel::{
    bindings,
    prelude::*,
    str::CStr,
    sync::LockClassKey,
    types::Opaque, //
};

/// How a task sleeps.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sleep {
    /// Nothing but the condition or the time-out ends the wait.
    Uninterruptible,
    /// So does a fatal signal.
    Killable,
}

/// How a wait ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Woken<T> {
    /// The condition gave a value.
    Ready(T),
    /// Time ran out.
    TimedOut,
    /// The task is being killed.
    Killed,
}

/// A `struct wait_queue_head`.
///
/// # Invariants
///
/// `head` is initialised and pinned.
#[pin_data]
pub(crate) struct WaitQueue {
    #[pin]
    head: Opaque<bindings::wait_queue_head>,
}

// SAFETY: A wait queue head has its own lock; every function used on it may run anywhere.
unsafe impl Send for WaitQueue {}
// SAFETY: As above.
unsafe impl Sync for WaitQueue {}

impl WaitQueue {
    /// Initialises a wait queue; `key` is its lockdep class.
    pub(crate) fn new(name: &'static CStr, key: Pin<&'static LockClassKey>) -> impl PinInit<Self> {
        pin_init!(Self {
            // SAFETY: `slot` is valid for writes and stays pinned; `name` and `key` are static.
            head <- Opaque::ffi_init(|slot| unsafe {
                bindings::__init_waitqueue_head(slot, name.as_char_ptr(), key.as_ptr())
            }),
        })
    }

    /// Wakes everybody. May be called from any context.
    #[inline]
    pub(crate) fn wake_all(&self) {
        // SAFETY: By the type invariant the head is valid. The full barrier of `wq_has_sleeper`
        // orders the caller's change of the condition before the look at the queue.
        unsafe {
            if shim::dtloop_waitqueue_active(self.head.get()) {
                bindings::__wake_up(
                    self.head.get(),
                    bindings::TASK_NORMAL,
                    0,
                    core::ptr::null_mut(),
                );
            }
        }
    }

    /// Sleeps until `condition` gives a value, for at most `timeout_ms` milliseconds.
    ///
    /// `condition` runs with the task state already set and must not sleep; it may take spinlocks.
    /// Must not be called from atomic context.
    pub(crate) fn wait<T>(
        &self,
        sleep: Sleep,
        timeout_ms: u32,
        mut condition: impl FnMut() -> Option<T>,
    ) -> Woken<T> {
        let state = match sleep {
            Sleep::Uninterruptible => bindings::TASK_UNINTERRUPTIBLE,
            Sleep::Killable => bindings::TASK_KILLABLE,
        };
        // SAFETY: A constant.
        let hz = unsafe { u64::from(shim::dtloop_hz) };
        // A tick at the least; the product of two 32-bit numbers fits.
        let ticks = (u64::from(timeout_ms) * hz).div_ceil(1000).max(1);
        let mut left = kernel::ffi::c_long::try_from(ticks).unwrap_or(kernel::ffi::c_long::MAX);
        let entry = Opaque::<bindings::wait_queue_entry>::uninit();
        // SAFETY: The entry lives on this stack until `finish_wait` has taken it off the queue; it
        // is not moved in between.
        unsafe { bindings::init_wait_entry(entry.get(), 0) };
        let woken = loop {
            // SAFETY: Head and entry are valid; the entry was initialised.
            unsafe {
                bindings::prepare_to_wait(self.head.get(), entry.get(), state as i32);
            }
            if let Some(value) = condition() {
                break Woken::Ready(value);
            }
            if sleep == Sleep::Killable && super::time::fatal_signal_pending() {
                break Woken::Killed;
            }
            if left == 0 {
                break Woken::TimedOut;
            }
            // SAFETY: We are in task context, by the contract of this function.
            left = unsafe { bindings::schedule_timeout(left) };
        };
        // SAFETY: As for `prepare_to_wait`.
        unsafe { bindings::finish_wait(self.head.get(), entry.get()) };
        woken
    }
}
