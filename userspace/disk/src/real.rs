// SPDX-License-Identifier: GPL-2.0-only

//! The file system of this machine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;
use nix::sys::uio::pwritev;

use crate::{Disk, DiskFile, Space};

/// Most pieces of one write; the kernel's limit (`UIO_MAXIOV`) is 1024.
const PIECES_MAX: usize = 1000;

/// Longest piece of zeroes written where the file system cannot make a hole.
const ZERO_BYTES: usize = 64 << 10;

/// See [`Disk`].
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

fn signed(value: u64) -> io::Result<i64> {
    i64::try_from(value).map_err(|_| Errno::EFBIG.into())
}

/// The file system has no such operation.
fn is_missing(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS | Errno::ENODEV
    )
}

fn is_read_only(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
    )
}

impl DiskFile for File {
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_exact_at(data, offset)
    }

    fn write_at(&self, mut pieces: &mut [IoSlice<'_>], mut offset: u64) -> io::Result<()> {
        IoSlice::advance_slices(&mut pieces, 0);
        while !pieces.is_empty() {
            let count = pieces.len().min(PIECES_MAX);
            match pwritev(self, &pieces[..count], signed(offset)?) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    offset += written as u64;
                    IoSlice::advance_slices(&mut pieces, written);
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        // fdatasync writes the length as well when it has changed.
        self.sync_data()
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.set_len(bytes)
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match fallocate(
            self,
            FallocateFlags::empty(),
            signed(offset)?,
            signed(bytes)?,
        ) {
            Ok(()) => Ok(()),
            Err(errno) if is_missing(errno) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        for flags in [
            FallocateFlags::FALLOC_FL_PUNCH_HOLE,
            FallocateFlags::FALLOC_FL_ZERO_RANGE,
        ] {
            let flags = flags | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            match fallocate(self, flags, signed(offset)?, signed(bytes)?) {
                Ok(()) => return Ok(()),
                Err(errno) if is_missing(errno) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        let zeroes = [0; ZERO_BYTES];
        let mut at = offset;
        while at < offset + bytes {
            let piece = usize::try_from(offset + bytes - at)
                .unwrap_or(ZERO_BYTES)
                .min(ZERO_BYTES);
            self.write_all_at(&zeroes[..piece], at)?;
            at += piece as u64;
        }
        Ok(())
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut options = OpenOptions::new();
        options
            .read(true)
            .write(true)
            .create(create)
            // What the daemons keep is nobody else's: keys, and the data of other people's disks.
            .mode(0o600)
            .truncate(false);
        match options.open(path) {
            Ok(file) => Ok(Arc::new(file)),
            // What may only be read can be read.
            Err(error) if !create && is_read_only(&error) => Ok(Arc::new(File::open(path)?)),
            Err(error) => Err(error),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut names = vec![];
        for entry in fs::read_dir(dir)? {
            // A name that is no text is none of ours.
            names.extend(entry?.file_name().into_string());
        }
        names.sort_unstable();
        Ok(names)
    }

    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() {
            return Ok(());
        }
        let above = dir.parent().unwrap_or(Path::new("/"));
        self.make_dir(above)?;
        match fs::create_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => self.sync_dir(above),
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn space(&self, dir: &Path) -> io::Result<Space> {
        let figures = statvfs(dir)?;
        let unit = figures.fragment_size();
        Ok(Space {
            total: figures.blocks() * unit,
            free: figures.blocks_available() * unit,
        })
    }
}
