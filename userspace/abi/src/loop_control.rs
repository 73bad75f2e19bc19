// SPDX-License-Identifier: GPL-2.0-only

//! The stock loop driver's control device: room is made for our loop numbers, and put back.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::libc;

use crate::{Error, Operation, Result, control};

/// Where the stock driver's control device is.
pub const LOOP_CONTROL_PATH: &str = "/dev/loop-control";

// include/uapi/linux/loop.h
const LOOP_CTL_ADD: u32 = 0x4c80;
const LOOP_CTL_REMOVE: u32 = 0x4c81;

/// The stock loop driver's open control device. Opening it loads the stock module, so look first
/// whether that is wanted.
#[derive(Debug)]
pub struct LoopControl(File);

impl LoopControl {
    /// Opens [`LOOP_CONTROL_PATH`].
    pub fn open() -> Result<Self> {
        control::open(Path::new(LOOP_CONTROL_PATH)).map(Self)
    }

    fn call(&self, operation: Operation, request: u32, number: u32) -> Result<()> {
        let number = libc::c_int::try_from(number).map_err(|_| Error::BadNumber { number })?;
        // SAFETY: The file is open for as long as it is borrowed; both ioctls take an integer.
        let result = unsafe { libc::ioctl(self.0.as_fd().as_raw_fd(), request.into(), number) };
        Errno::result(result)
            .map(drop)
            .map_err(|errno| Error::Refused { operation, errno })
    }

    /// Makes an unbound stock device of this number.
    pub fn add(&self, number: u32) -> Result<()> {
        self.call(Operation::StockAdd, LOOP_CTL_ADD, number)
    }

    /// Removes an unbound stock device.
    pub fn remove(&self, number: u32) -> Result<()> {
        self.call(Operation::StockRemove, LOOP_CTL_REMOVE, number)
    }
}
