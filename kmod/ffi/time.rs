// SPDX-License-Identifier: GPL-2.0-only

//! Clocks and small questions about the current task.
//!
//! C header: `include/linux/timekeeping.h`

use super::shim;

/// CLOCK_REALTIME in nanoseconds, of the timer tick's precision: it costs two loads, where the
/// precise clock reads a hardware counter.
#[inline]
pub(crate) fn real_ns() -> u64 {
    // SAFETY: Reads the time; may be called from any context.
    unsafe { shim::dtloop_real_ns() }
}

/// CLOCK_MONOTONIC in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    // SAFETY: Reads the time; may be called from any context.
    unsafe { shim::dtloop_monotonic_ns() }
}

/// Whether the current task is being killed.
pub(crate) fn fatal_signal_pending() -> bool {
    // SAFETY: Looks at `current` only.
    unsafe { shim::dtloop_fatal_signal() }
}

/// Fills `bytes` from the kernel's random number generator.
pub(crate) fn random_bytes(bytes: &mut [u8]) {
    // SAFETY: The slice is valid for writes of its length.
    unsafe { kernel::bindings::get_random_bytes(bytes.as_mut_ptr().cast(), bytes.len()) }
}
