// SPDX-License-Identifier: GPL-2.0-only

//! Safe wrappers around what the `kernel` crate does not cover yet.
//!
//! The only home of `unsafe`, of `kernel::bindings` and of C in this module. Each file wraps one C
//! type in the manner of `rust/kernel`; the rest of the module is safe Rust.

pub(crate) mod bio;
pub(crate) mod bio_set;
pub(crate) mod block_device;
pub(crate) mod char_device;
pub(crate) mod gendisk;
pub(crate) mod global;
pub(crate) mod intent_file;
pub(crate) mod module_ref;
pub(crate) mod pages;
mod shim;
pub(crate) mod time;
pub(crate) mod user_bytes;
pub(crate) mod wait;
pub(crate) mod work;
