// SPDX-License-Identifier: GPL-2.0-only

//! The files that the daemons keep, behind one small interface, so that a test can put a disk beneath them that
//! forgets what was not made durable, tears what was being written, is full, or fails.
//!
//! | | |
//! |---|---|
//! | [`Disk`], [`DiskFile`] | what journal, disk queue, staging area and state files need of a file system |
//! | [`RealDisk`] | the file system of this machine |
//! | [`SimDisk`] | one in memory, with power cuts and faults, for tests |
//!
//! # What is durable
//!
//! The content of a file: what was written before a [`DiskFile::sync`] that succeeded. A name: what was made, renamed or
//! removed in a directory before a [`Disk::sync_dir`] of it that succeeded. Anything later may be there after a power cut,
//! in part, or not at all. After a `sync` that **failed** nothing is known of what was written since the last one that
//! succeeded, and the next one may succeed without it: the kernel takes pages that it could not write for clean.

#![forbid(unsafe_code)]

mod real;
mod sim;

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

pub use real::RealDisk;
pub use sim::SimDisk;

/// Space of a file system, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Space {
    /// In all.
    pub total: u64,
    /// Free for this process.
    pub free: u64,
}

/// An open file. All offsets and lengths are in bytes.
pub trait DiskFile: Send + Sync {
    /// Fills `data` from `offset`.
    ///
    /// # Errors
    ///
    /// Those of the file system; `UnexpectedEof` if the file is shorter.
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all pieces, one after the other, at `offset`. On an error any part of them may have been written.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn write_at(&self, pieces: &mut [IoSlice<'_>], offset: u64) -> io::Result<()>;

    /// Makes everything written to the file durable, its length included.
    ///
    /// # Errors
    ///
    /// Those of the file system; see the crate documentation for what an error means.
    fn sync(&self) -> io::Result<()>;

    /// Length.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn bytes(&self) -> io::Result<u64>;

    /// Sets the length; what is new reads as zeroes.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn set_bytes(&self, bytes: u64) -> io::Result<()>;

    /// Takes the space of a range now, so that writes there do not fail for want of it. A file system that can not do
    /// this is no error: space is taken as it is written then.
    ///
    /// # Errors
    ///
    /// If there is not enough space.
    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Makes a range read as zeroes and gives its space back where that can be had.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()>;
}

/// Files by path.
pub trait Disk: Send + Sync {
    /// Opens a file to read and write, on a read-only file system to read; `create`: makes an empty one if there is none.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>>;

    /// Gives a file another name; a file that had it is gone.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Names in a directory, sorted.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn list(&self, dir: &Path) -> io::Result<Vec<String>>;

    /// Makes a directory and those above it. They are durable when this returns.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn make_dir(&self, dir: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Space of the file system that a directory is on.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    fn space(&self, dir: &Path) -> io::Result<Space>;
}
