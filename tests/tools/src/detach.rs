// SPDX-License-Identifier: GPL-2.0-only

//! Detaching while udev looks at a disk that has just come.

use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use dtloop_abi::Control;
use nix::errno::Errno;

/// How often it is tried, a millisecond apart. udev's visit is over in some of them.
const TRIES: u32 = 10_000;

/// Detaches a device that is opened only in passing.
pub fn detach(control: &Control, number: u32) -> Result<()> {
    let mut tries = 1;
    loop {
        match control.detach(number, false) {
            Err(error) if error.is(Errno::EBUSY) && tries < TRIES => {
                tries += 1;
                sleep(Duration::from_millis(1));
            }
            outcome => return Ok(outcome?),
        }
    }
}
