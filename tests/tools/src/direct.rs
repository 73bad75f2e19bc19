// SPDX-License-Identifier: GPL-2.0-only

//! Direct I/O: aligned buffers, and files opened past the page cache.

use std::fs::{File, OpenOptions};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result};
use nix::libc;

/// Memory for direct I/O: starts at a multiple of the alignment.
#[derive(Debug)]
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// Zeroed memory at a multiple of `align`.
    pub fn new(length: usize, align: usize) -> Self {
        let bytes = vec![0; length + align];
        // Where the allocation begins does not change any more: the vector never grows.
        let start = bytes.as_ptr().align_offset(align);
        Self {
            bytes,
            start,
            length,
        }
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// Whether a path is a block device.
pub fn is_block_device(path: &Path) -> Result<bool> {
    let metadata = path
        .metadata()
        .with_context(|| format!("no {}", path.display()))?;
    Ok(metadata.file_type().is_block_device())
}

/// Opens for reading; a block device past the page cache, which may hold what it was before.
pub fn open_read(path: &Path) -> Result<File> {
    let flags = if is_block_device(path)? {
        libc::O_DIRECT
    } else {
        0
    };
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(flags);
    options
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Opens a block device for direct reads and writes, with more flags.
pub fn open_write(path: &Path, flags: i32) -> Result<File> {
    let mut options = OpenOptions::new();
    options
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT | flags);
    options
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Size of a file or a block device in bytes.
pub fn size(file: &mut File) -> Result<u64> {
    use std::io::{Seek, SeekFrom};
    let end = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    Ok(end)
}
