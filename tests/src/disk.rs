// SPDX-License-Identifier: GPL-2.0-only

//! Disks of a test machine.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// What the host does with the disk's data: QEMU's cache modes. All present a volatile write cache to the guest, except
/// [`Cache::Writethrough`]. Cutting the machine's power loses nothing that the machine's disk had completed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Flushes are accepted and ignored by the host: the fastest.
    Unsafe,
    /// Flushes reach the host's disk.
    Writeback,
    /// No volatile write cache in the guest.
    Writethrough,
    /// Past the host's page cache.
    None,
}

impl Cache {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Unsafe => "unsafe",
            Self::Writeback => "writeback",
            Self::Writethrough => "writethrough",
            Self::None => "none",
        }
    }
}

/// How a disk is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bus {
    /// virtio-blk behind its own PCI port, so that it can be unplugged.
    Virtio,
    /// virtio-scsi disk: has FUA. The debug kernel takes 20 s to look through the bus.
    Scsi,
}

/// One more disk of a machine: a sparse raw file. It is found in the guest by its serial ([`crate::Vm::device`]).
#[derive(Clone, Debug)]
pub struct Disk {
    pub(crate) serial: String,
    pub(crate) bytes: u64,
    pub(crate) cache: Cache,
    pub(crate) bus: Bus,
    pub(crate) block_bytes: u32,
    pub(crate) file: Option<PathBuf>,
}

impl Disk {
    /// A disk of `mib` MiB with this serial (at most 20 letters, unique in its machine).
    pub fn new(serial: &str, mib: u64) -> Self {
        Self {
            serial: serial.to_owned(),
            bytes: mib << 20,
            cache: Cache::Unsafe,
            bus: Bus::Virtio,
            block_bytes: 512,
            file: None,
        }
    }

    /// Sets the cache mode; [`Cache::Unsafe`] otherwise.
    pub fn cache(mut self, cache: Cache) -> Self {
        self.cache = cache;
        self
    }

    /// Sets how it is attached; [`Bus::Virtio`] otherwise.
    pub fn bus(mut self, bus: Bus) -> Self {
        self.bus = bus;
        self
    }

    /// Sets the logical and physical block size; 512 otherwise.
    pub fn block_bytes(mut self, bytes: u32) -> Self {
        self.block_bytes = bytes;
        self
    }

    /// Uses this file of the host, which stays, instead of a new one that goes with the machine.
    pub fn file(mut self, file: impl Into<PathBuf>) -> Self {
        self.file = Some(file.into());
        self
    }

    /// Makes sure that there is a file of the disk's size, and returns where.
    pub(crate) fn realise(&self, dir: &Path) -> Result<PathBuf> {
        let path = self
            .file
            .clone()
            .unwrap_or_else(|| dir.join(format!("{}.raw", self.serial)));
        let file: File = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot make disk {}", path.display()))?;
        if file.metadata()?.len() < self.bytes {
            file.set_len(self.bytes)?;
        }
        Ok(path)
    }
}
