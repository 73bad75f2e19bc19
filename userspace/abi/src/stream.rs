// SPDX-License-Identifier: GPL-2.0-only

//! A capture stream's own device file.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::control::{self, ascending, device_from};
use crate::disk::{BackingBlocks, DirectDisk};
use crate::ffi::{self, Ioctl, ioctls};
use crate::{Error, Operation, Result, Ring, raw};

/// Where a stream's device file is.
#[must_use]
pub fn stream_path(stream_id: u32) -> PathBuf {
    PathBuf::from(format!("/dev/dtloop-stream{stream_id}"))
}

/// What [`CaptureStream::sync`] asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncRequest {
    /// The device's id.
    pub device_id: u32,
    /// First sector, a multiple of the device's block size.
    pub start_sector: u64,
    /// Length in sectors, a multiple of the device's block size.
    pub sectors: u64,
    /// Largest payload of one record: a power of two within 4096..=1 MiB.
    pub chunk_bytes: u32,
    /// Comes back in `Desc::aux` of the records.
    pub cookie: u64,
    /// Clear the dirty bits of blocks wholly inside the range.
    pub clear: bool,
}

/// A run of dirty blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First sector.
    pub start_sector: u64,
    /// Length in sectors.
    pub sectors: u64,
}

/// What an agent needs of a capture stream. Implemented by [`Stream`] and, for tests, by
/// `testing::FakeStream`.
pub trait CaptureStream: Send + std::marker::Sync {
    /// Everything about the stream.
    fn status(&self) -> Result<raw::StreamStatus>;

    /// The devices that it captures.
    fn devices(&self) -> Result<Vec<raw::DeviceStatus>>;

    /// Has a range read into the stream; returns how many sectors were taken. 0: the share of
    /// the ring for such reads is in use; try again after a release.
    fn sync(&self, request: &SyncRequest) -> Result<u64>;

    /// The first run of dirty blocks at or after a sector, not longer than `sectors_max`.
    fn dirty_next(
        &self,
        device_id: u32,
        start_sector: u64,
        sectors_max: u64,
    ) -> Result<Option<Extent>>;

    /// Marks a range dirty: the agent gives up records of it.
    fn dirty_set(&self, device_id: u32, extent: Extent) -> Result<()>;

    /// Says that records were released while somebody waits for room.
    fn kick(&self) -> Result<()>;

    /// Everything about the intent map.
    fn intent_status(&self) -> Result<raw::IntentStatus>;

    /// Says that the target and the disks behind the devices have every record below `acked` durably, so that marks which
    /// are no longer needed may go.
    /// `None`: there is no intent map, or its file is being written just now.
    fn intent_clear(&self, acked: u64) -> Result<Option<raw::IntentClear>>;

    /// The first run of regions that have to be compared, at or after a sector.
    fn suspect_next(&self, device_id: u32, start_sector: u64) -> Result<Option<Extent>>;

    /// Says that the regions wholly inside a range were compared, and that the target has what the source has
    /// wherever they differed.
    fn suspect_clear(&self, device_id: u32, extent: Extent) -> Result<()>;

    /// Says that every marked region which the range touches has to be compared, as records are lost. False: there is no
    /// intent map.
    fn suspect_set(&self, device_id: u32, extent: Extent) -> Result<bool>;

    /// What is on the disk behind a device. `None`: it cannot be read.
    fn backing(&self, device: &raw::DeviceStatus) -> Option<Box<dyn BackingBlocks>> {
        let _ = device;
        None
    }

    /// Waits until the record given to [`Ring::arm_wake`] is complete: true. `None` waits without
    /// a limit. Ends early, with false, on a signal.
    fn poll(&self, timeout: Option<Duration>) -> Result<bool>;

    /// A file that is readable when the record given to [`Ring::arm_wake`] is complete, for a
    /// consumer that waits for other things as well. To be asked for anew before every wait.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// The ring.
    fn ring(&self) -> &Ring;
}

/// An open capture stream; this process is its one consumer.
#[derive(Debug)]
pub struct Stream {
    file: File,
    ring: Ring,
}

impl Stream {
    /// Opens a stream by its id and maps its ring.
    pub fn open(stream_id: u32) -> Result<Self> {
        Self::open_path(&stream_path(stream_id))
    }

    /// Opens a stream by its device file.
    pub fn open_path(path: &Path) -> Result<Self> {
        let file = control::open(path).map_err(|error| match error {
            Error::Open {
                errno: errno @ (Errno::EBUSY | Errno::ENOENT | Errno::ENXIO | Errno::ENODEV),
                ..
            } => Error::Refused {
                operation: Operation::StreamOpen,
                errno: if errno == Errno::EBUSY {
                    errno
                } else {
                    Errno::ENOENT
                },
            },
            other => other,
        })?;
        let status = status(file.as_fd()).map_err(|error| match error {
            error if error.is(Errno::ENOTTY) => Error::NotOurs {
                path: path.to_owned(),
            },
            other => other,
        })?;
        let ring = Ring::map(&file, &status)?;
        Ok(Self { file, ring })
    }

    fn extent_call(
        &self,
        operation: Operation,
        ioctl: &Ioctl<raw::Dirty>,
        device_id: u32,
        extent: Extent,
    ) -> Result<()> {
        let mut argument = raw::Dirty {
            device_id,
            start_sector: extent.start_sector,
            sectors: extent.sectors,
            ..Default::default()
        };
        control::call(self.as_fd(), operation, ioctl, &mut argument)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn status(fd: BorrowedFd<'_>) -> Result<raw::StreamStatus> {
    let mut argument = raw::StreamStatus::query(0);
    control::call(
        fd,
        Operation::StreamStatus,
        &ioctls::STREAM_STATUS,
        &mut argument,
    )?;
    Ok(argument)
}

impl CaptureStream for Stream {
    fn status(&self) -> Result<raw::StreamStatus> {
        status(self.as_fd())
    }

    fn devices(&self) -> Result<Vec<raw::DeviceStatus>> {
        let lookup = |number| device_from(self.as_fd(), number);
        ascending(lookup, raw::DeviceStatus::loop_number).collect()
    }

    fn sync(&self, request: &SyncRequest) -> Result<u64> {
        let mut argument = raw::Sync {
            device_id: request.device_id,
            flags: if request.clear { raw::SYNC_CLEAR } else { 0 },
            start_sector: request.start_sector,
            sectors: request.sectors,
            chunk_bytes: request.chunk_bytes,
            cookie: request.cookie,
            ..Default::default()
        };
        match control::call(self.as_fd(), Operation::Sync, &ioctls::SYNC, &mut argument) {
            Ok(()) => Ok(argument.sectors),
            Err(error) if error.is(Errno::EAGAIN) => Ok(0),
            Err(error) => Err(error),
        }
    }

    fn dirty_next(
        &self,
        device_id: u32,
        start_sector: u64,
        sectors_max: u64,
    ) -> Result<Option<Extent>> {
        let mut argument = raw::Dirty {
            device_id,
            start_sector,
            sectors: sectors_max,
            ..Default::default()
        };
        match control::call(
            self.as_fd(),
            Operation::DirtyNext,
            &ioctls::DIRTY_NEXT,
            &mut argument,
        ) {
            Ok(()) => Ok(Some(Extent {
                start_sector: argument.start_sector,
                sectors: argument.sectors,
            })),
            Err(error) if error.is(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn dirty_set(&self, device_id: u32, extent: Extent) -> Result<()> {
        self.extent_call(Operation::DirtySet, &ioctls::DIRTY_SET, device_id, extent)
    }

    fn intent_status(&self) -> Result<raw::IntentStatus> {
        let mut argument = raw::IntentStatus::default();
        control::call(
            self.as_fd(),
            Operation::IntentStatus,
            &ioctls::INTENT_STATUS,
            &mut argument,
        )?;
        Ok(argument)
    }

    fn intent_clear(&self, acked: u64) -> Result<Option<raw::IntentClear>> {
        let mut argument = raw::IntentClear {
            acked,
            ..Default::default()
        };
        let result = control::call(
            self.as_fd(),
            Operation::IntentClear,
            &ioctls::INTENT_CLEAR,
            &mut argument,
        );
        match result {
            Ok(()) => Ok(Some(argument)),
            Err(error) if error.is(Errno::ENOENT) || error.is(Errno::EAGAIN) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn suspect_next(&self, device_id: u32, start_sector: u64) -> Result<Option<Extent>> {
        let mut argument = raw::Dirty {
            device_id,
            start_sector,
            ..Default::default()
        };
        let result = control::call(
            self.as_fd(),
            Operation::SuspectNext,
            &ioctls::SUSPECT_NEXT,
            &mut argument,
        );
        match result {
            Ok(()) => Ok(Some(Extent {
                start_sector: argument.start_sector,
                sectors: argument.sectors,
            })),
            Err(error) if error.is(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn suspect_clear(&self, device_id: u32, extent: Extent) -> Result<()> {
        let result = self.extent_call(
            Operation::SuspectClear,
            &ioctls::SUSPECT_CLEAR,
            device_id,
            extent,
        );
        match result {
            // Nothing is suspect without an intent map.
            Err(error) if error.is(Errno::ENOENT) => Ok(()),
            other => other,
        }
    }

    fn suspect_set(&self, device_id: u32, extent: Extent) -> Result<bool> {
        let result = self.extent_call(
            Operation::SuspectSet,
            &ioctls::SUSPECT_SET,
            device_id,
            extent,
        );
        match result {
            Err(error) if error.is(Errno::ENOENT) => Ok(false),
            other => other.map(|()| true),
        }
    }

    fn backing(&self, device: &raw::DeviceStatus) -> Option<Box<dyn BackingBlocks>> {
        let disk = DirectDisk::open(device).ok()?;
        Some(Box::new(disk))
    }

    fn kick(&self) -> Result<()> {
        ffi::kick(self.as_fd()).map_err(|errno| Error::Refused {
            operation: Operation::Kick,
            errno,
        })
    }

    fn poll(&self, timeout: Option<Duration>) -> Result<bool> {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        // One millisecond is added because the time-out is rounded down: a caller that waits for
        // a deadline would otherwise spin through its last millisecond.
        let left = deadline.map_or(PollTimeout::NONE, |deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            let ceiling = if left.is_zero() {
                left
            } else {
                left + Duration::from_millis(1)
            };
            PollTimeout::try_from(ceiling).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        match nix::poll::poll(&mut fds, left) {
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(false),
            Err(errno) => Err(Error::Refused {
                operation: Operation::Poll,
                errno,
            }),
        }
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn ring(&self) -> &Ring {
        &self.ring
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_stream_is_named_as_such() {
        let error = Stream::open_path(Path::new("/nonexistent/dtloop-stream1")).unwrap_err();
        assert!(error.is(Errno::ENOENT));
        assert!(error.to_string().contains("no such stream"), "{error}");
    }

    #[test]
    fn a_foreign_file_is_not_taken_for_a_stream() {
        let error = Stream::open_path(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, Error::NotOurs { .. }), "{error}");
    }
}
