// SPDX-License-Identifier: GPL-2.0-only

//! What can go wrong between a tool and the module, by meaning.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::raw;

/// Result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Something the module was asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// Report what it can do.
    Features,
    /// Create a stream.
    StreamCreate,
    /// Destroy a stream.
    StreamDestroy,
    /// Change a stream's policy.
    StreamSet,
    /// Report a stream's status.
    StreamStatus,
    /// Attach a device.
    Attach,
    /// Detach a device.
    Detach,
    /// Follow the size of the backing device.
    Resize,
    /// Report a device's status.
    DeviceStatus,
    /// Open a stream as its consumer.
    StreamOpen,
    /// Map a stream's ring.
    StreamMap,
    /// Wait for records.
    Poll,
    /// Read a range into the stream.
    Sync,
    /// Find dirty blocks.
    DirtyNext,
    /// Mark blocks dirty.
    DirtySet,
    /// Announce room in the ring.
    Kick,
    /// Give a stream its intent file.
    StreamIntent,
    /// Report the intent map.
    IntentStatus,
    /// Clear marks of the intent map.
    IntentClear,
    /// Find regions to be compared.
    SuspectNext,
    /// Settle regions that were compared.
    SuspectClear,
    /// Have marked regions compared.
    SuspectSet,
    /// Make an unbound stock loop device.
    StockAdd,
    /// Remove an unbound stock loop device.
    StockRemove,
}

impl Operation {
    /// Every operation, for tables and their tests.
    pub const ALL: [Self; 24] = [
        Self::Features,
        Self::StreamCreate,
        Self::StreamDestroy,
        Self::StreamSet,
        Self::StreamStatus,
        Self::Attach,
        Self::Detach,
        Self::Resize,
        Self::DeviceStatus,
        Self::StreamOpen,
        Self::StreamMap,
        Self::Poll,
        Self::Sync,
        Self::DirtyNext,
        Self::DirtySet,
        Self::Kick,
        Self::StreamIntent,
        Self::IntentStatus,
        Self::IntentClear,
        Self::SuspectNext,
        Self::SuspectClear,
        Self::SuspectSet,
        Self::StockAdd,
        Self::StockRemove,
    ];

    const fn phrase(self) -> &'static str {
        match self {
            Self::Features => "ask the module for its features",
            Self::StreamCreate => "create the capture stream",
            Self::StreamDestroy => "destroy the capture stream",
            Self::StreamSet => "change the stream's policy",
            Self::StreamStatus => "read the stream's status",
            Self::Attach => "attach the device",
            Self::Detach => "detach the device",
            Self::Resize => "resize the device",
            Self::DeviceStatus => "read the device's status",
            Self::StreamOpen => "open the capture stream",
            Self::StreamMap => "map the stream's ring",
            Self::Poll => "wait for records",
            Self::Sync => "read a range into the stream",
            Self::DirtyNext => "look for dirty blocks",
            Self::DirtySet => "mark blocks dirty",
            Self::Kick => "announce room in the ring",
            Self::StreamIntent => "use the intent file",
            Self::IntentStatus => "read the status of the intent map",
            Self::IntentClear => "clear marks of the intent map",
            Self::SuspectNext => "look for regions to be compared",
            Self::SuspectClear => "settle regions that were compared",
            Self::SuspectSet => "have marked regions compared",
            Self::StockAdd => "make a stock loop device",
            Self::StockRemove => "remove the unbound stock loop device",
        }
    }

    /// What `errno` means for this operation, with what to do about it; `None` when the module
    /// does not use it here.
    #[must_use]
    pub const fn meaning(self, errno: Errno) -> Option<&'static str> {
        match (self, errno) {
            (_, Errno::EPERM | Errno::EACCES) => Some("permission denied; run as root"),
            (_, Errno::ENOTTY) => {
                Some("the module does not know this request; install matching versions")
            }
            (Self::StreamCreate, Errno::ENOMEM) => Some(
                "the ring would take more than half of the available memory; choose a smaller one",
            ),
            (_, Errno::ENOMEM) => Some("the kernel has not enough free memory"),
            (_, Errno::ENODEV) => Some("the device vanished"),
            (Self::StreamCreate, e) => Self::stream_create(e),
            (Self::StreamDestroy, e) => Self::stream_destroy(e),
            (Self::StreamIntent, e) => Self::stream_intent(e),
            (Self::Attach, Errno::ENOSPC) => Some(
                "the intent file is too small for its marks, or the set has as many devices as the module allows (256)",
            ),
            (
                Self::StreamSet | Self::StreamStatus | Self::StreamOpen | Self::IntentStatus,
                Errno::ENOENT,
            ) => Some("there is no such stream; dtloop status lists them"),
            (Self::StreamSet, Errno::EINVAL) => Some(
                "the policy is unknown to the module, or its levels are not 1 to 100 with the stop below the start",
            ),
            (Self::StreamOpen, Errno::EBUSY) => {
                Some("another consumer has it open; is a second agent running?")
            }
            (Self::Attach, e) => Self::attach(e),
            (Self::Detach, Errno::EBUSY) => {
                Some("it is open; unmount it and stop its users, or detach with force")
            }
            (Self::Detach | Self::Resize | Self::DeviceStatus, Errno::ENXIO) => {
                Some("there is no such device; dtloop status lists them")
            }
            (Self::Resize, e) => Self::resize(e),
            (
                Self::Sync
                | Self::DirtyNext
                | Self::DirtySet
                | Self::SuspectNext
                | Self::SuspectClear
                | Self::SuspectSet,
                Errno::ENXIO,
            ) => Some("the stream has no such device"),
            (
                Self::Sync | Self::DirtySet | Self::SuspectClear | Self::SuspectSet,
                Errno::ERANGE,
            ) => Some("the range lies beyond the end of the device"),
            (Self::StockAdd, Errno::EEXIST) => Some("the number is taken"),
            (Self::StockRemove, Errno::EBUSY) => Some("a program has it open"),
            (Self::Sync, Errno::EAGAIN) => Some("the share of the ring for SYNC is in use"),
            _ => None,
        }
    }

    const fn stream_create(errno: Errno) -> Option<&'static str> {
        match errno {
            Errno::EEXIST => Some("a stream of that name exists"),
            Errno::EINVAL => Some("the module refused its name, ring size or policy"),
            Errno::ENOSPC => Some("there are as many streams as the module allows (256)"),
            _ => None,
        }
    }

    const fn stream_destroy(errno: Errno) -> Option<&'static str> {
        match errno {
            Errno::ENOENT => Some("there is no such stream"),
            Errno::EBUSY => Some("devices are attached to it or an agent has it open"),
            Errno::ENOTEMPTY => Some("it holds records that the agent has not released yet"),
            _ => None,
        }
    }

    const fn stream_intent(errno: Errno) -> Option<&'static str> {
        match errno {
            Errno::ENOENT => Some("there is no such stream"),
            Errno::EBUSY => Some("the stream has one already"),
            Errno::ETXTBSY => Some("it is in use by another set, or as a swap file"),
            Errno::EDEADLK => Some(
                "it lies on a loop device of this module, for whose changes it would have to be written; \
                      choose a place on another disk",
            ),
            Errno::EOPNOTSUPP => Some(
                "its file system does not tell where its blocks lie, or the file has holes; choose a place on ext4 or XFS",
            ),
            Errno::EINVAL => Some(
                "it is not 64 KiB to 64 MiB long in whole blocks of 4 KiB, or the region is not a power of two from 64 KiB \
                 to 1 GiB",
            ),
            Errno::ENOSPC => {
                Some("it is too small for the marks of the devices; make a larger one")
            }
            Errno::EBADF => Some("it is no ordinary file that is open for writing"),
            Errno::EIO => Some("its disk fails"),
            Errno::EAGAIN => Some("a device is being attached to the stream right now; try again"),
            _ => None,
        }
    }

    const fn attach(errno: Errno) -> Option<&'static str> {
        match errno {
            Errno::ENOTBLK => Some("it is not a block device"),
            Errno::EBUSY => {
                Some("it is in use: mounted, swap, held by LVM or md, or attached already")
            }
            Errno::EEXIST => Some("the loop number is taken"),
            Errno::EINVAL => {
                Some("offset or size limit is not a multiple of the logical block size")
            }
            Errno::ERANGE => Some("offset or size limit lies beyond the end of the device"),
            Errno::ENOENT => Some("the capture stream is gone"),
            Errno::EROFS => Some("it is read-only; attach it read-only"),
            Errno::EOPNOTSUPP => Some("zoned devices are not supported"),
            Errno::EBADF => Some("the file descriptor is not open"),
            Errno::ENXIO => Some("there is no such block device"),
            _ => None,
        }
    }

    const fn resize(errno: Errno) -> Option<&'static str> {
        match errno {
            Errno::EBUSY => Some("it is open and would shrink; close it first"),
            Errno::EINVAL => Some("the size limit is not a multiple of the logical block size"),
            Errno::ERANGE => Some("the size limit lies beyond the end of the backing device"),
            _ => None,
        }
    }
}

/// What can go wrong. Messages are sentences that say what to do next.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The control device is not there.
    #[error("The dtloop module is not loaded. Run: modprobe dtloop")]
    NoModule,
    /// The module's devices may be opened by root only.
    #[error("No permission to open {}. Run as root.", path.display())]
    NoPermission {
        /// What was to be opened.
        path: PathBuf,
    },
    /// Tool and module come from different releases.
    #[error(
        "The dtloop module speaks interface version {module}, this program version {expected}. \
         Install matching versions and load the module anew.",
        expected = raw::ABI_VERSION
    )]
    Version {
        /// The module's [`raw::ABI_VERSION`].
        module: u32,
    },
    /// The file is not one of the module's.
    #[error("{} is not a device of the dtloop module.", path.display())]
    NotOurs {
        /// What was opened.
        path: PathBuf,
    },
    /// A device file could not be opened.
    #[error("Cannot open {}: {}.", path.display(), errno.desc())]
    Open {
        /// What was to be opened.
        path: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// The module refused an operation.
    #[error("Cannot {}: {}.", operation.phrase(), Reason(*operation, *errno))]
    Refused {
        /// What it was asked for.
        operation: Operation,
        /// Its answer.
        errno: Errno,
    },
    /// A name or label that the module would not take.
    #[error("The name {name:?} cannot be used: {reason}.")]
    BadName {
        /// The name, cut to a sensible length.
        name: String,
        /// Why.
        reason: &'static str,
    },
    /// A loop number out of range.
    #[error(
        "The loop number {number} is out of range: 0 to {}.",
        raw::LOOP_NUMBER_MAX
    )]
    BadNumber {
        /// The number.
        number: u32,
    },
    /// The ring does not look as the interface says.
    #[error("The ring of the stream is damaged: {what}. Reopen the stream.")]
    Corrupt {
        /// What does not fit.
        what: String,
    },
    /// A record outside of what may be read or released.
    #[error("Record {seq} is not within {}..{}.", range.start, range.end)]
    OutOfRange {
        /// The record asked for.
        seq: u64,
        /// What was possible.
        range: Range<u64>,
    },
}

struct Reason(Operation, Errno);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.meaning(self.1) {
            Some(text) => f.write_str(text),
            None => write!(f, "{} ({:?})", self.1.desc(), self.1),
        }
    }
}

impl Error {
    pub(crate) fn bad_name(name: &str, reason: &'static str) -> Self {
        Self::BadName {
            name: name.chars().take(80).collect(),
            reason,
        }
    }

    /// The kernel's error number, where there is one.
    #[must_use]
    pub const fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { errno, .. } | Self::Open { errno, .. } => Some(*errno),
            Self::NoModule => Some(Errno::ENOENT),
            Self::NoPermission { .. } => Some(Errno::EACCES),
            _ => None,
        }
    }

    /// True when the module refused with this error number.
    #[must_use]
    pub fn is(&self, errno: Errno) -> bool {
        self.errno() == Some(errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_errno_has_a_meaning() {
        use Errno::*;
        use Operation::*;
        let documented = [
            (StreamCreate, EEXIST),
            (StreamCreate, EINVAL),
            (StreamDestroy, EBUSY),
            (StreamDestroy, ENOTEMPTY),
            (StreamStatus, ENOENT),
            (Attach, ENOTBLK),
            (Attach, EBUSY),
            (Attach, EEXIST),
            (Attach, EINVAL),
            (Attach, ERANGE),
            (Attach, ENOENT),
            (Attach, EROFS),
            (Attach, EOPNOTSUPP),
            (Detach, EBUSY),
            (Detach, ENXIO),
            (Resize, EBUSY),
            (DeviceStatus, ENXIO),
            (Sync, ENXIO),
            (Sync, ERANGE),
            (Sync, EAGAIN),
            (StreamIntent, EBUSY),
            (StreamIntent, ETXTBSY),
            (StreamIntent, EDEADLK),
            (StreamIntent, EOPNOTSUPP),
            (StreamIntent, EINVAL),
            (StreamIntent, ENOSPC),
            (StreamIntent, EAGAIN),
        ];
        for (operation, errno) in documented {
            assert!(
                operation.meaning(errno).is_some(),
                "{operation:?} {errno:?}"
            );
        }
    }

    #[test]
    fn every_operation_makes_a_sentence_of_every_errno() {
        for operation in Operation::ALL {
            for number in 1..134 {
                let errno = Errno::from_raw(number);
                let text = Error::Refused { operation, errno }.to_string();
                assert!(text.starts_with("Cannot ") && text.ends_with('.'), "{text}");
            }
        }
    }

    #[test]
    fn an_errno_without_a_meaning_is_shown_by_name() {
        let error = Error::Refused {
            operation: Operation::Kick,
            errno: Errno::EIO,
        };
        assert!(error.to_string().contains("EIO"), "{error}");
        assert!(error.is(Errno::EIO));
    }
}
