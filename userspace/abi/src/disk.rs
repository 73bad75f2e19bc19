// SPDX-License-Identifier: GPL-2.0-only

//! The disk behind a loop device: reading what is on it past every cache, and flushing its own.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use nix::fcntl::OFlag;

use crate::raw;

/// Alignment of memory and offsets of direct reads: that of any disk.
const ALIGNMENT: usize = 4096;

/// Blocks of the disk behind a loop device. Everything may wait as long as the disk does.
pub trait BackingBlocks: Send {
    /// Reads at an offset of the loop device. Offset and length must be multiples of 4 KiB.
    ///
    /// # Errors
    ///
    /// Those of the disk.
    fn read(&self, offset: u64, block: &mut [u8]) -> io::Result<()>;

    /// Makes durable what was written before: has the disk empty its volatile cache.
    ///
    /// # Errors
    ///
    /// Those of the disk.
    fn settle(&self) -> io::Result<()>;
}

/// The blocks of a disk.
pub(crate) struct DirectDisk {
    file: File,
    base: u64,
}

impl DirectDisk {
    pub(crate) fn open(device: &raw::DeviceStatus) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .custom_flags((OFlag::O_DIRECT | OFlag::O_NONBLOCK).bits());
        let file = options.open(device.backing_name())?;
        if file.metadata()?.rdev() != device.backing_dev {
            return Err(io::Error::other("another device has its name now"));
        }
        Ok(Self {
            file,
            base: device.offset_bytes,
        })
    }
}

impl BackingBlocks for DirectDisk {
    fn read(&self, offset: u64, block: &mut [u8]) -> io::Result<()> {
        let mut buffer = vec![0_u8; block.len() + ALIGNMENT];
        let from = buffer.as_ptr().align_offset(ALIGNMENT);
        let aligned = buffer
            .get_mut(from..from + block.len())
            .ok_or(io::ErrorKind::OutOfMemory)?;
        self.file.read_exact_at(aligned, self.base + offset)?;
        block.copy_from_slice(aligned);
        Ok(())
    }

    fn settle(&self) -> io::Result<()> {
        // Of a block device, and also of one that is open for reading only, this flushes the disk's own cache.
        self.file.sync_data()
    }
}
