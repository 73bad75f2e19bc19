// SPDX-License-Identifier: GPL-2.0-only

//! The module's one global: the registry of streams and devices behind a mutex.

use crate::registry::Registry;
use kernel::{prelude::*, sync::global_lock};

global_lock! {
    // SAFETY: `init` is the first thing that the module does.
    unsafe(uninit) static REGISTRY: Mutex<Registry> = Registry::new();
}

/// Makes the lock usable.
///
/// To be called once, from the module's init, before anything else.
pub(crate) fn init() {
    // SAFETY: The module's init calls this once.
    unsafe { REGISTRY.init() }
}

/// Runs `f` with the registry locked. Must not be called from atomic context.
pub(crate) fn with_registry<T>(f: impl FnOnce(&mut Registry) -> T) -> T {
    f(&mut REGISTRY.lock())
}
