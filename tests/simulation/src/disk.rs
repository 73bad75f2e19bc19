// SPDX-License-Identifier: GPL-2.0-only

//! A machine's disk: other threads, and the end of the machine, may come between any two of its operations.

use std::io::{self, IoSlice};
use std::path::Path;
use std::sync::Arc;

use dtloop_disk::{Disk, DiskFile, SimDisk, Space};

/// See the module documentation.
pub struct SharedDisk(pub SimDisk);

struct SharedFile(Arc<dyn DiskFile>);

fn preempt() {
    crate::world::preempt_current();
}

impl DiskFile for SharedFile {
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(data, offset)
    }

    fn write_at(&self, pieces: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        preempt();
        let written = self.0.write_at(pieces, offset);
        preempt();
        written
    }

    fn sync(&self) -> io::Result<()> {
        preempt();
        let synced = self.0.sync();
        preempt();
        synced
    }

    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        preempt();
        self.0.set_bytes(bytes)
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        preempt();
        self.0.allocate(offset, bytes)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        preempt();
        self.0.zero(offset, bytes)
    }
}

impl Disk for SharedDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        preempt();
        Ok(Arc::new(SharedFile(self.0.open(path, create)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        preempt();
        let renamed = self.0.rename(from, to);
        // What has another name now has it durably only after the directory was synced.
        crate::world::spring();
        renamed
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        preempt();
        self.0.remove(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        self.0.list(dir)
    }

    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        preempt();
        self.0.make_dir(dir)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        preempt();
        self.0.sync_dir(dir)
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        self.0.space(path)
    }
}
