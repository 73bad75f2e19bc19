// SPDX-License-Identifier: GPL-2.0-only

//! Permission to copy the structures of `abi.rs` to and from userspace as bytes.

use crate::abi;
use kernel::transmute::{AsBytes, FromBytes};

macro_rules! plain_bytes {
    ($($name:ident),* $(,)?) => {$(
        // SAFETY: `#[repr(C)]`, made of integers only, so any bytes are a value.
        unsafe impl FromBytes for abi::$name {}
        // SAFETY: No padding: `abi.rs` asserts that the size is the sum of the fields. No interior
        // mutability.
        unsafe impl AsBytes for abi::$name {}
    )*};
}

plain_bytes!(
    Attach,
    Desc,
    Detach,
    DeviceStatus,
    Dirty,
    Features,
    IntentClear,
    IntentStatus,
    Resize,
    StreamCreate,
    StreamDestroy,
    StreamIntent,
    StreamSet,
    StreamStatus,
    Sync,
);
