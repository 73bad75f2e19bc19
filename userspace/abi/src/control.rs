// SPDX-License-Identifier: GPL-2.0-only

//! The control device.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::libc::O_CLOEXEC;

use crate::ffi::{self, Ioctl, ioctls};
use crate::{Error, Name, Operation, Result, bytes_to_str, raw};

/// Where the module's control device is.
pub const CONTROL_PATH: &str = "/dev/dtloop-control";

/// The open control device of a module whose interface version fits.
#[derive(Debug)]
pub struct Control {
    file: File,
    features: raw::Features,
}

/// What [`Control::create_stream`] asks for.
#[derive(Clone, Copy, Debug)]
pub struct StreamRequest {
    /// The set's name.
    pub name: Name,
    /// Payload area in bytes; 0: [`raw::RING_BYTES_DEFAULT`].
    pub payload_bytes: u64,
    /// Descriptors; 0: one for every 4096 bytes of payload.
    pub desc_count: u32,
    /// `raw::POLICY_*`.
    pub policy: u32,
}

/// Levels of [`raw::POLICY_THROTTLE`]; 0: the module's default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Throttle {
    /// Changes are delayed when this part of the ring is in use, in percent.
    pub start_percent: u32,
    /// And no longer when less than this is, in percent; below the start.
    pub stop_percent: u32,
    /// Delay of a change when the ring is full, in milliseconds; less in proportion.
    pub delay_ms: u32,
}

/// How [`Control::attach`] is told the backing device.
#[derive(Clone, Copy, Debug)]
pub enum Backing<'a> {
    /// An open descriptor of it: what was checked is what is attached.
    Fd(BorrowedFd<'a>),
    /// Its device number, as in `st_rdev`.
    Number(u64),
}

/// What [`Control::attach`] asks for.
#[derive(Clone, Copy, Debug)]
pub struct AttachRequest<'a> {
    /// The backing device.
    pub backing: Backing<'a>,
    /// First byte used.
    pub offset_bytes: u64,
    /// Most bytes used; 0: up to the end.
    pub limit_bytes: u64,
    /// The loop number; `None`: the module chooses.
    pub number: Option<u32>,
    /// The stream that captures it.
    pub stream_id: u32,
    /// Name of the volume, or [`Name::EMPTY`].
    pub label: Name,
    /// Which disk it is, however it is found; zero: not known.
    pub identity: [u8; 16],
    /// Refuse writes.
    pub read_only: bool,
    /// Scan the loop device for partitions.
    pub partscan: bool,
}

/// What became of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The loop number.
    pub number: u32,
    /// The device's id in its stream.
    pub device_id: u32,
}

/// Opens one of the module's device files.
pub(crate) fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(O_CLOEXEC)
        .open(path)
        .map_err(
            |error| match error.raw_os_error().map_or(Errno::EIO, Errno::from_raw) {
                Errno::EACCES | Errno::EPERM => Error::NoPermission {
                    path: path.to_owned(),
                },
                errno => Error::Open {
                    path: path.to_owned(),
                    errno,
                },
            },
        )
}

pub(crate) fn call<T>(
    fd: BorrowedFd<'_>,
    operation: Operation,
    ioctl: &Ioctl<T>,
    argument: &mut T,
) -> Result<()> {
    ffi::call(fd, ioctl, argument).map_err(|errno| Error::Refused { operation, errno })
}

fn number_to_raw(number: u32) -> Result<i32> {
    i32::try_from(number)
        .ok()
        .filter(|&n| n <= raw::LOOP_NUMBER_MAX)
        .ok_or(Error::BadNumber { number })
}

impl Control {
    /// Opens [`CONTROL_PATH`].
    pub fn open() -> Result<Self> {
        Self::open_path(Path::new(CONTROL_PATH))
    }

    /// Opens the control device at another place and checks the interface version.
    pub fn open_path(path: &Path) -> Result<Self> {
        let file = open(path).map_err(|error| match error {
            // ENXIO: a node that outlived the module.
            Error::Open {
                errno: Errno::ENOENT | Errno::ENXIO | Errno::ENODEV,
                ..
            } => Error::NoModule,
            other => other,
        })?;
        let mut features = raw::Features::default();
        call(
            file.as_fd(),
            Operation::Features,
            &ioctls::GET_FEATURES,
            &mut features,
        )
        .map_err(|error| match error {
            Error::Refused {
                errno: Errno::ENOTTY | Errno::EINVAL,
                ..
            } => Error::NotOurs {
                path: path.to_owned(),
            },
            other => other,
        })?;
        check_version(features.abi_version)?;
        Ok(Self { file, features })
    }

    /// What the module can do.
    #[must_use]
    pub const fn features(&self) -> &raw::Features {
        &self.features
    }

    pub(crate) fn call<T>(
        &self,
        operation: Operation,
        ioctl: &Ioctl<T>,
        argument: &mut T,
    ) -> Result<()> {
        call(self.file.as_fd(), operation, ioctl, argument)
    }

    /// Creates a stream; returns its id.
    pub fn create_stream(&self, request: &StreamRequest) -> Result<u32> {
        let mut argument = raw::StreamCreate {
            name: request.name.to_bytes(),
            payload_bytes: request.payload_bytes,
            desc_count: request.desc_count,
            policy: request.policy,
            stream_id: 0,
            reserved0: 0,
            reserved: [0; 5],
        };
        self.call(
            Operation::StreamCreate,
            &ioctls::STREAM_CREATE,
            &mut argument,
        )?;
        Ok(argument.stream_id)
    }

    /// Destroys a stream without devices; with `discard` even though records wait for an agent.
    pub fn destroy_stream(&self, stream_id: u32, discard: bool) -> Result<()> {
        let mut argument = raw::StreamDestroy {
            stream_id,
            flags: if discard { raw::DESTROY_DISCARD } else { 0 },
            ..Default::default()
        };
        self.call(
            Operation::StreamDestroy,
            &ioctls::STREAM_DESTROY,
            &mut argument,
        )
    }

    /// Changes what happens when a stream's ring is full.
    pub fn set_policy(&self, stream_id: u32, policy: u32, throttle: Throttle) -> Result<()> {
        let mut argument = raw::StreamSet {
            stream_id,
            policy,
            throttle_start: throttle.start_percent,
            throttle_stop: throttle.stop_percent,
            throttle_delay_ms: throttle.delay_ms,
            ..Default::default()
        };
        self.call(Operation::StreamSet, &ioctls::STREAM_SET, &mut argument)
    }

    /// Attaches a block device.
    pub fn attach(&self, request: &AttachRequest<'_>) -> Result<Attached> {
        let mut argument = request.to_raw()?;
        self.call(Operation::Attach, &ioctls::ATTACH, &mut argument)?;
        Ok(Attached {
            number: argument.number.unsigned_abs(),
            device_id: argument.device_id,
        })
    }

    /// Detaches a device; with `force` although it is open.
    pub fn detach(&self, number: u32, force: bool) -> Result<()> {
        let mut argument = raw::Detach {
            number: number_to_raw(number)?,
            flags: if force { raw::DETACH_FORCE } else { 0 },
            ..Default::default()
        };
        self.call(Operation::Detach, &ioctls::DETACH, &mut argument)
    }

    /// Follows the size of the backing device; returns the new size in sectors.
    pub fn resize(&self, number: u32, limit_bytes: u64) -> Result<u64> {
        let mut argument = raw::Resize {
            number: number_to_raw(number)?,
            limit_bytes,
            ..Default::default()
        };
        self.call(Operation::Resize, &ioctls::RESIZE, &mut argument)?;
        Ok(argument.sectors)
    }

    /// The stream with this id or the next higher one.
    pub fn stream_from(&self, stream_id: u32) -> Result<Option<raw::StreamStatus>> {
        let mut argument = raw::StreamStatus::query(stream_id);
        match self.call(
            Operation::StreamStatus,
            &ioctls::STREAM_STATUS,
            &mut argument,
        ) {
            Ok(()) => Ok(Some(argument)),
            Err(error) if error.is(Errno::ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All streams, by rising id.
    pub fn streams(&self) -> impl Iterator<Item = Result<raw::StreamStatus>> {
        ascending(|id| self.stream_from(id), |status| status.stream_id)
    }

    /// The stream of a set.
    pub fn stream_by_name(&self, name: &str) -> Result<Option<raw::StreamStatus>> {
        for stream in self.streams() {
            let stream = stream?;
            if stream.name() == name {
                return Ok(Some(stream));
            }
        }
        Ok(None)
    }

    /// The device with this loop number or the next higher one.
    pub fn device_from(&self, number: u32) -> Result<Option<raw::DeviceStatus>> {
        device_from(self.file.as_fd(), number)
    }

    /// All devices, by rising loop number.
    pub fn devices(&self) -> impl Iterator<Item = Result<raw::DeviceStatus>> {
        ascending(|n| self.device_from(n), raw::DeviceStatus::loop_number)
    }
}

pub(crate) fn device_from(fd: BorrowedFd<'_>, number: u32) -> Result<Option<raw::DeviceStatus>> {
    let Ok(number) = number_to_raw(number) else {
        return Ok(None);
    };
    let mut argument = raw::DeviceStatus::query(number);
    match call(
        fd,
        Operation::DeviceStatus,
        &ioctls::DEVICE_STATUS,
        &mut argument,
    ) {
        Ok(()) => Ok(Some(argument)),
        Err(error) if error.is(Errno::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Walks what is looked up by "this or the next higher number". Ends after the first error, and
/// also if the module should answer with a lower number than asked for.
pub(crate) fn ascending<T>(
    lookup: impl Fn(u32) -> Result<Option<T>>,
    number: impl Fn(&T) -> u32,
) -> impl Iterator<Item = Result<T>> {
    let mut next = Some(0);
    std::iter::from_fn(move || {
        let from = next.take()?;
        match lookup(from) {
            Ok(Some(item)) if number(&item) >= from => {
                next = number(&item).checked_add(1);
                Some(Ok(item))
            }
            Ok(_) => None,
            Err(error) => Some(Err(error)),
        }
    })
}

const fn check_version(module: u32) -> Result<()> {
    if module == raw::ABI_VERSION {
        Ok(())
    } else {
        Err(Error::Version { module })
    }
}

impl AttachRequest<'_> {
    fn to_raw(self) -> Result<raw::Attach> {
        let mut flags = 0;
        let (mut backing_fd, mut backing_dev) = (0, 0);
        match self.backing {
            Backing::Fd(fd) => {
                flags |= raw::ATTACH_FD;
                backing_fd = fd.as_raw_fd();
            }
            Backing::Number(number) => backing_dev = number,
        }
        if self.read_only {
            flags |= raw::ATTACH_READ_ONLY;
        }
        if self.partscan {
            flags |= raw::ATTACH_PARTSCAN;
        }
        Ok(raw::Attach {
            backing_fd,
            flags,
            backing_dev,
            offset_bytes: self.offset_bytes,
            limit_bytes: self.limit_bytes,
            number: self.number.map_or(Ok(raw::NUMBER_AUTO), number_to_raw)?,
            stream_id: self.stream_id,
            device_id: 0,
            reserved0: 0,
            label: self.label.to_bytes(),
            identity: self.identity,
            reserved: [0; 2],
        })
    }
}

impl raw::StreamStatus {
    /// The argument that asks for this stream or the next higher one.
    #[must_use]
    pub const fn query(stream_id: u32) -> Self {
        Self {
            stream_id,
            flags: 0,
            name: [0; raw::NAME_BYTES],
            stream_uuid: [0; 16],
            policy: 0,
            desc_count: 0,
            payload_bytes: 0,
            desc_offset: 0,
            payload_offset: 0,
            ring_bytes: 0,
            next_seq: 0,
            committed: 0,
            released: 0,
            epoch: 0,
            used_bytes: 0,
            sync_bytes: 0,
            sync_bytes_max: 0,
            gaps: 0,
            gap_changes: 0,
            gap_sectors: 0,
            room_waits: 0,
            room_wait_ns: 0,
            room_wait_ns_max: 0,
            wakeups: 0,
            bad_releases: 0,
            devices: 0,
            throttle_start: 0,
            throttle_stop: 0,
            throttle_delay_ms: 0,
            throttles: 0,
            throttle_ns: 0,
            throttle_ns_max: 0,
            reserved: [0; 4],
        }
    }

    /// The set's name.
    #[must_use]
    pub fn name(&self) -> &str {
        bytes_to_str(&self.name)
    }

    /// True when a `raw::STREAM_*` flag is set.
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

impl raw::DeviceStatus {
    /// The argument that asks for this loop device or the next higher one.
    #[must_use]
    pub const fn query(number: i32) -> Self {
        Self {
            number,
            flags: 0,
            stream_id: 0,
            device_id: 0,
            backing_dev: 0,
            loop_dev: 0,
            backing_name: [0; raw::NAME_BYTES],
            label: [0; raw::NAME_BYTES],
            offset_bytes: 0,
            limit_bytes: 0,
            sectors: 0,
            block_bytes: 0,
            dirty_block_bytes: 0,
            dirty_blocks: 0,
            openers: 0,
            in_flight: 0,
            reads: 0,
            read_sectors: 0,
            writes: 0,
            write_sectors: 0,
            flushes: 0,
            discards: 0,
            discard_sectors: 0,
            syncs: 0,
            sync_sectors: 0,
            tracked: 0,
            tracked_sectors: 0,
            failed: 0,
            gate_waits: 0,
            nowait_retries: 0,
            bypass_sectors: 0,
            intent_found: 0,
            reserved0: 0,
            regions_marked: 0,
            regions_suspect: 0,
            reserved: [0; 5],
        }
    }

    /// The loop number.
    #[must_use]
    pub const fn loop_number(&self) -> u32 {
        self.number.unsigned_abs()
    }

    /// The backing device's path.
    #[must_use]
    pub fn backing_name(&self) -> &str {
        bytes_to_str(&self.backing_name)
    }

    /// The volume's label; empty without one.
    #[must_use]
    pub fn label(&self) -> &str {
        bytes_to_str(&self.label)
    }

    /// Size in bytes.
    #[must_use]
    pub const fn size_bytes(&self) -> u64 {
        self.sectors.saturating_mul(raw::SECTOR_BYTES)
    }

    /// True when a `raw::DEVICE_*` flag is set.
    #[must_use]
    pub const fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

impl raw::Desc {
    /// The errno of a failed change.
    #[must_use]
    pub const fn failure(&self) -> Option<u16> {
        if self.state == raw::STATE_FAILED {
            Some(self.flags >> raw::F_ERRNO_SHIFT)
        } else {
            None
        }
    }

    /// True when an `raw::F_*` flag is set.
    #[must_use]
    pub const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_control_device_says_to_load_the_module() {
        let error = Control::open_path(Path::new("/nonexistent/dtloop-control")).unwrap_err();
        assert!(matches!(error, Error::NoModule));
        assert!(error.to_string().contains("modprobe dtloop"));
    }

    #[test]
    fn a_foreign_file_is_not_taken_for_the_module() {
        let error = Control::open_path(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, Error::NotOurs { .. }), "{error}");
    }

    #[test]
    fn another_interface_version_is_refused() {
        assert!(check_version(raw::ABI_VERSION).is_ok());
        let error = check_version(raw::ABI_VERSION + 1).unwrap_err();
        assert!(error.to_string().contains("version 2"), "{error}");
    }

    #[test]
    fn walking_ends_even_if_numbers_do_not_rise() {
        let rising = ascending(
            |from| Ok([3, 5, 9].into_iter().find(|&n| n >= from)),
            |&n| n,
        );
        assert_eq!(rising.map(Result::unwrap).collect::<Vec<_>>(), [3, 5, 9]);
        let stuck = ascending(|_| Ok(Some(4)), |&n| n);
        assert_eq!(stuck.map(Result::unwrap).collect::<Vec<_>>(), [4]);
    }

    #[test]
    fn an_attach_request_becomes_the_right_structure() {
        let request = AttachRequest {
            backing: Backing::Number(0x0803),
            offset_bytes: 4096,
            limit_bytes: 1 << 20,
            number: None,
            stream_id: 7,
            label: Name::new("vol").unwrap(),
            identity: [9; 16],
            read_only: true,
            partscan: true,
        };
        let raw = request.to_raw().unwrap();
        assert_eq!(raw.number, raw::NUMBER_AUTO);
        assert_eq!(raw.flags, raw::ATTACH_READ_ONLY | raw::ATTACH_PARTSCAN);
        assert_eq!(raw.backing_dev, 0x0803);
        assert_eq!(&raw.label[..4], b"vol\0");
        assert_eq!(raw.identity, [9; 16]);
        let too_high = AttachRequest {
            number: Some(1 << 20),
            ..request
        };
        assert!(matches!(too_high.to_raw(), Err(Error::BadNumber { .. })));
    }

    #[test]
    fn failures_carry_their_errno() {
        let mut desc = raw::Desc {
            state: raw::STATE_FAILED,
            flags: raw::F_FUA | (5 << raw::F_ERRNO_SHIFT),
            ..Default::default()
        };
        assert_eq!(desc.failure(), Some(5));
        desc.state = raw::STATE_COMMITTED;
        assert_eq!(desc.failure(), None);
        assert!(desc.has(raw::F_FUA));
    }
}
