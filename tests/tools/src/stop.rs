// SPDX-License-Identifier: GPL-2.0-only

//! SIGTERM and SIGINT as a flag that loops look at.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

static STOP: AtomicBool = AtomicBool::new(false);

/// Takes the two signals from now on. To be called before other threads are made.
pub fn listen() -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block().context("cannot block signals")?;
    thread::spawn(move || {
        if signals.wait().is_ok() {
            STOP.store(true, Ordering::Relaxed);
        }
    });
    Ok(())
}

/// Whether one of them came.
pub fn requested() -> bool {
    STOP.load(Ordering::Relaxed)
}
