// SPDX-License-Identifier: GPL-2.0-only

//! Test machines for DTLOOP: boots a kernel in QEMU, runs commands in it, cuts its power, its disks and its network, and
//! fails the story when the kernel complained. How to write a story: `tests/README.md`.

mod channel;
mod console;
mod disk;
mod link;
mod permits;
mod qemu;
mod qmp;
mod story;
mod vm;
mod wait;
pub mod wire;

pub use channel::{Job, Output};
pub use console::Problem;
pub use disk::{Bus, Cache, Disk};
pub use link::Link;
pub use qemu::Kernel;
pub use story::{full_run, note, run_dir};
pub use vm::{Builder, Vm};
pub use wait::{patience, wait_until};
