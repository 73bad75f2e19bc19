// SPDX-License-Identifier: GPL-2.0-only

//! A copy of a device, kept by applying records to it.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};
use dtloop_abi::raw;
use nix::fcntl::{FallocateFlags, fallocate};

const ZEROES: &[u8] = &[0; 1 << 18];

/// A file or block device that follows a device.
#[derive(Debug)]
pub struct Replica(File);

impl Replica {
    /// Opens it; a file is made if there is none.
    pub fn open(path: &Path) -> Result<Self> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(!path.exists())
            .truncate(false);
        Ok(Self(options.open(path).with_context(|| {
            format!("cannot open {}", path.display())
        })?))
    }

    /// Makes a file at least this large. A block device is what it is.
    pub fn reach(&self, bytes: u64) -> Result<()> {
        let metadata = self.0.metadata()?;
        if metadata.is_file() && metadata.len() < bytes {
            self.0.set_len(bytes)?;
        }
        Ok(())
    }

    /// Does what a record says. Failed records, and discards without a defined content, change nothing.
    pub fn apply(&self, desc: &raw::Desc, payload: &[u8]) -> Result<()> {
        if desc.state == raw::STATE_FAILED {
            return Ok(());
        }
        let at = desc.start_sector * raw::SECTOR_BYTES;
        match desc.op {
            raw::OP_WRITE | raw::OP_SYNC => self.0.write_all_at(payload, at).context("replica"),
            raw::OP_WRITE_ZEROES => self.zero(at, u64::from(desc.sectors) * raw::SECTOR_BYTES),
            raw::OP_DISCARD if desc.has(raw::F_ZEROES) => {
                self.zero(at, u64::from(desc.sectors) * raw::SECTOR_BYTES)
            }
            raw::OP_ATTACH | raw::OP_RESIZE => self.reach(desc.aux * raw::SECTOR_BYTES),
            _ => Ok(()),
        }
    }

    fn zero(&self, at: u64, bytes: u64) -> Result<()> {
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let done = fallocate(&self.0, punch, i64::try_from(at)?, i64::try_from(bytes)?);
        if done.is_ok() {
            return Ok(());
        }
        let mut left = bytes;
        while left > 0 {
            let count = left.min(ZEROES.len() as u64);
            self.0
                .write_all_at(&ZEROES[..usize::try_from(count)?], at + bytes - left)
                .context("replica")?;
            left -= count;
        }
        Ok(())
    }

    /// Makes durable what was applied.
    pub fn sync(&self) -> Result<()> {
        Ok(self.0.sync_data()?)
    }
}
