// SPDX-License-Identifier: GPL-2.0-only

//! A volume: an image file or a block device, opened for this process alone.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use dtloop_core::binding::Refusal;
use dtloop_core::identity::{Pending, VolumeIdentity, examine};
use dtloop_disk::{Disk, DiskFile};
use dtloop_proto::Code;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};

use crate::config::VolumeConfig;
use crate::guard::Guard;

/// An open volume.
pub struct Volume {
    name: String,
    path: PathBuf,
    file: Arc<dyn DiskFile>,
    bytes: u64,
    dirty: AtomicBool,
    guard: Guard,
}

impl fmt::Debug for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Volume({}, {} bytes)", self.name, self.bytes)
    }
}

/// The file or device, locked as long as it is open.
struct Locked(Flock<File>);

impl DiskFile for Locked {
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        DiskFile::read_at(&*self.0, data, offset)
    }

    fn write_at(&self, pieces: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        DiskFile::write_at(&*self.0, pieces, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.0.set_bytes(bytes)
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        DiskFile::allocate(&*self.0, offset, bytes)
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.0.zero(offset, bytes)
    }
}

fn refuse(code: Code, name: &str, path: &Path, what: &str) -> Refusal {
    Refusal::new(
        code,
        format!("Volume \"{name}\" ({}) {what}", path.display()),
    )
}

/// An image that a stock loop device has open is mounted, or about to be.
fn loop_device_over(path: &Path) -> Option<String> {
    let wanted = std::fs::metadata(path).ok()?;
    for entry in std::fs::read_dir("/sys/block").ok()?.flatten() {
        let Ok(backing) = std::fs::read_to_string(entry.path().join("loop/backing_file")) else {
            continue;
        };
        let found = std::fs::metadata(backing.trim_end());
        if found.is_ok_and(|found| found.dev() == wanted.dev() && found.ino() == wanted.ino()) {
            return Some(entry.file_name().to_string_lossy().into_owned());
        }
    }
    None
}

impl Volume {
    /// Opens a volume, making or enlarging an image as configured.
    ///
    /// # Errors
    ///
    /// The refusal to be told to the source.
    pub fn open(config: &VolumeConfig) -> Result<Self, Refusal> {
        let (name, path) = (&config.name, &config.path);
        let io = |error: io::Error| {
            refuse(
                Code::VOLUME_IO,
                name,
                path,
                &format!("cannot be opened: {error}"),
            )
        };
        let kind = std::fs::metadata(path).map(|metadata| metadata.file_type());
        let is_device = match &kind {
            Ok(kind) if kind.is_block_device() => true,
            Ok(kind) if kind.is_file() => false,
            Ok(_) => {
                return Err(refuse(
                    Code::VOLUME_IO,
                    name,
                    path,
                    "is neither a file nor a block device",
                ));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound && config.size.is_some() => false,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(refuse(
                    Code::VOLUME_NOT_FOUND,
                    name,
                    path,
                    "does not exist; run \"dttarget volume create\" or give it a size",
                ));
            }
            Err(_) => false,
        };
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        if is_device {
            options.custom_flags(OFlag::O_EXCL.bits());
        } else if let Some(device) = loop_device_over(path) {
            let what = format!("is in use as /dev/{device}; unmount and detach that first");
            return Err(refuse(Code::VOLUME_BUSY, name, path, &what));
        } else {
            // It becomes the copy of somebody's disk.
            options.create(config.size.is_some()).mode(0o600);
        }
        let file = options.open(path).map_err(|error| {
            match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
                Errno::EBUSY => refuse(
                    Code::VOLUME_BUSY,
                    name,
                    path,
                    "is mounted or in use otherwise; free it first",
                ),
                Errno::EACCES if crate::confine::is_confined() => refuse(
                    Code::VOLUME_IO,
                    name,
                    path,
                    "cannot be opened: permission denied; let the user that runs dttarget open it, and restart dttarget if it was replaced or has appeared since the start",
                ),
                _ => io(error),
            }
        })?;
        let file =
            Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    Errno::EWOULDBLOCK => refuse(
                        Code::VOLUME_BUSY,
                        name,
                        path,
                        "is in use by another process",
                    ),
                    errno => io(errno.into()),
                },
            )?;
        let mut bytes = (&*file).seek(SeekFrom::End(0)).map_err(io)?;
        let larger = config.size.filter(|size| !is_device && bytes < size.0);
        let guard = Guard::new(&file, larger.map_or(bytes, |size| size.0)).map_err(io)?;
        if let Some(size) = larger {
            file.set_len(size.0).map_err(io)?;
            bytes = size.0;
        }
        Ok(Self::new(config, Arc::new(Locked(file)), bytes, guard))
    }

    /// Opens a volume on a disk of which nobody else knows, as a simulation does.
    ///
    /// # Errors
    ///
    /// The refusal to be told to the source.
    pub fn open_on(disk: &dyn Disk, config: &VolumeConfig) -> Result<Self, Refusal> {
        let (name, path) = (&config.name, &config.path);
        let failed = |error: io::Error| {
            let what = format!("cannot be opened: {error}");
            refuse(Code::VOLUME_IO, name, path, &what)
        };
        let file = disk.open(path, config.size.is_some()).map_err(failed)?;
        let mut bytes = file.bytes().map_err(failed)?;
        if let Some(size) = config.size.filter(|size| bytes < size.0) {
            file.set_bytes(size.0).map_err(failed)?;
            let dir = path.parent().unwrap_or(Path::new("/"));
            disk.sync_dir(dir).map_err(failed)?;
            bytes = size.0;
        }
        Ok(Self::new(config, file, bytes, Guard::simulated(bytes)))
    }

    fn new(config: &VolumeConfig, file: Arc<dyn DiskFile>, bytes: u64, guard: Guard) -> Self {
        Self {
            name: config.name.clone(),
            path: config.path.clone(),
            file,
            bytes,
            // A new length is not durable, and what a former process wrote may not be.
            dirty: AtomicBool::new(true),
            guard,
        }
    }

    /// Whether it is the volume that is known, as it was left. To be asked before it is written to; it looks once.
    ///
    /// # Errors
    ///
    /// The refusal to be told to the source.
    pub fn examine(
        &mut self,
        known: Option<&VolumeIdentity>,
        pending: &dyn Pending,
    ) -> Result<(), Refusal> {
        if self.guard.is_examined {
            return Ok(());
        }
        if let Some(known) = known {
            let found = self.guard.found(&*self.file, self.bytes, known);
            let place = self.path.display().to_string();
            examine(known, &found, pending, &self.name, &place)?;
        }
        self.guard.is_examined = true;
        // It may have been enlarged just now.
        self.guard.on_written();
        Ok(())
    }

    /// What it is known by from here on. Meant for moments at which it is durable.
    pub fn identity(&mut self) -> VolumeIdentity {
        self.guard.identity(&*self.file, self.bytes)
    }

    /// Whether somebody else wrote to it since this program last did, as far as that can be told.
    pub fn is_disturbed(&mut self) -> bool {
        self.guard.is_disturbed()
    }

    /// This program stops writing for now.
    pub fn settle(&mut self) {
        self.guard.settle();
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes at an offset.
    ///
    /// # Errors
    ///
    /// Those of the file or device.
    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.dirty.store(true, Ordering::Relaxed);
        self.guard.on_change(offset, data.len() as u64);
        self.file.write_at(&mut [IoSlice::new(data)], offset)
    }

    /// Makes a range read as zeroes, without taking space where that can be had.
    ///
    /// # Errors
    ///
    /// Those of the file or device.
    pub fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        self.dirty.store(true, Ordering::Relaxed);
        self.guard.on_change(offset, bytes);
        self.file.zero(offset, bytes)
    }

    /// Reads at an offset.
    ///
    /// # Errors
    ///
    /// Those of the file or device.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.file.read_at(data, offset)
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    ///
    /// Those of the file or device.
    pub fn sync(&self) -> io::Result<()> {
        if self.dirty.swap(false, Ordering::Relaxed) {
            self.file
                .sync()
                .inspect_err(|_| self.dirty.store(true, Ordering::Relaxed))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{ResyncPolicy, Size};

    fn config(path: &Path, size: Option<u64>) -> VolumeConfig {
        VolumeConfig {
            name: "v".into(),
            path: path.to_owned(),
            size: size.map(Size),
            resync: ResyncPolicy::Staged,
        }
    }

    #[test]
    fn images_are_made_and_grow_but_never_shrink() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.img");
        assert_eq!(
            Volume::open(&config(&path, None)).unwrap_err().code,
            Code::VOLUME_NOT_FOUND
        );
        let open = |size| Volume::open(&config(&path, size)).unwrap().bytes();
        assert_eq!(open(Some(8192)), 8192);
        assert_eq!(open(Some(16384)), 16384);
        assert_eq!(open(Some(4096)), 16384);
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.img");
        let first = Volume::open(&config(&path, Some(4096))).unwrap();
        assert_eq!(
            Volume::open(&config(&path, None)).unwrap_err().code,
            Code::VOLUME_BUSY
        );
        drop(first);
        assert!(Volume::open(&config(&path, None)).is_ok());
        assert_eq!(
            Volume::open(&config(dir.path(), None)).unwrap_err().code,
            Code::VOLUME_IO
        );
    }

    #[test]
    fn zeroes_are_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(&config(&dir.path().join("v.img"), Some(1 << 20))).unwrap();
        volume.write(0, &[7; 8192]).unwrap();
        volume.zero(512, 4096).unwrap();
        volume.sync().unwrap();
        let mut data = [1; 8192];
        volume.read(0, &mut data).unwrap();
        assert!(data[512..4608].iter().all(|byte| *byte == 0));
        assert!(
            data[..512]
                .iter()
                .chain(&data[4608..])
                .all(|byte| *byte == 7)
        );
    }
}
