// SPDX-License-Identifier: GPL-2.0-only

//! A reference to this module that keeps it loaded.
//!
//! C header: `include/linux/module.h`

use kernel::{bindings, prelude::*};

/// `THIS_MODULE`.
pub(super) const fn this_module() -> *mut bindings::module {
    kernel::module::this_module::<crate::LocalModule>().as_ptr()
}

/// Keeps the module loaded for as long as it lives: `rmmod` says that it is in use.
pub(crate) struct ModuleRef(());

impl ModuleRef {
    /// Takes a reference; `ENODEV` when the module is on its way out.
    pub(crate) fn try_get() -> Result<Self> {
        // SAFETY: `THIS_MODULE` is valid while code of this module runs.
        if unsafe { bindings::try_module_get(this_module()) } {
            Ok(Self(()))
        } else {
            Err(ENODEV)
        }
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: Pairs with the `try_module_get` that made `self`.
        unsafe { bindings::module_put(this_module()) }
    }
}
