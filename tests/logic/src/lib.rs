// SPDX-License-Identifier: GPL-2.0-only

//! Tests of the kernel module's pure logic: `kmod/gate.rs`, `kmod/ring.rs`, `kmod/dirty.rs`, `kmod/intent.rs`
//! and `kmod/intent_layout.rs`, the very files that the kernel compiles, compiled once more for the host.
//!
//! - `*_tests` compare each with a model that is slow and plain, on random input (proptest). A failure prints
//!   the shortest input it could find; `PROPTEST_CASES=100000` looks longer.
//! - `*_loom` put the gate and the ring between threads, and try every interleaving and every value that a
//!   load may see (loom). Each protocol is run with one step left out or misplaced as well: such a *canary*
//!   must fail, which shows that the step is needed and that the tests would notice.
//!
//! There is no unsafe code in the files under test, so miri has little to find there, and it is not run: it
//! comes with the nightly toolchain only, while DTLOOP builds with Debian's stable one.

#![cfg(test)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "the numbers of tests are small, and the kernel's files are held to the kernel's lints"
)]

/// The interface that the ring takes its constants from.
#[path = "../../../kmod/abi.rs"]
pub mod abi;
#[path = "../../../kmod/dirty.rs"]
mod dirty;
#[path = "../../../kmod/gate.rs"]
#[allow(
    clippy::needless_pass_by_value,
    reason = "a ticket that is given up is taken away from its owner"
)]
mod gate;
#[path = "../../../kmod/intent.rs"]
mod intent;
#[path = "../../../kmod/intent_layout.rs"]
mod intent_layout;
#[path = "../../../kmod/ring.rs"]
mod ring;

mod loom_tools;

mod dirty_tests;
mod gate_loom;
mod gate_tests;
mod intent_tests;
mod ring_loom;
mod ring_tests;
