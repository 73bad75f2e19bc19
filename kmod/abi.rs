// SPDX-License-Identifier: GPL-2.0-only

//! The binary interface between `dtloop.ko` and userspace.
//!
//! This one file is compiled into the module and, through `#[path]`, into the userspace crate
//! `dtloop-abi`. It uses `core` only. Every structure is `#[repr(C)]`, has no implicit padding,
//! is made of fixed-width little-endian integers (DTLOOP runs on little-endian machines only) and
//! carries reserved fields that must be zero. Sizes are asserted at compile time; the literal
//! ioctl numbers are asserted in the tests of `dtloop-abi`.
//!
//! Two kinds of device files exist:
//!
//! - `/dev/dtloop-control` (one): creates streams, attaches and detaches devices, reports status.
//! - `/dev/dtloop-stream<ID>` (one per capture stream): the ring, for one consumer at a time.
//!
//! # The ring as the consumer maps it
//!
//! ```text
//! mmap offset                      length                access       content
//! MMAP_CONSUMER   = 0              PAGE_BYTES            read+write   ConsumerPage
//! MMAP_RING       = PAGE_BYTES     ring_bytes            read only    ProducerPage (one page),
//!                                                                     descriptors, payload
//! ```
//!
//! Inside the ring mapping: the [`ProducerPage`] at 0, the descriptor array at `desc_offset`
//! (`desc_count` entries of [`DESC_BYTES`]), the payload area at `payload_offset`
//! (`payload_bytes` long). All of these are reported by [`StreamStatus`]. `desc_count` and
//! `payload_bytes` are powers of two. The descriptor of sequence number `s` is entry
//! `s & (desc_count - 1)`; the payload at position `p` starts at byte `p & (payload_bytes - 1)`
//! of the payload area and never wraps: a payload is contiguous.
//!
//! # The consumer's protocol
//!
//! 1. Load `ProducerPage::committed` with acquire ordering. Every record with a sequence number
//!    below it is complete and its descriptor and payload do not change until it is released.
//! 2. Process the records in order.
//! 3. Store `ConsumerPage::released = s` with release ordering: records below `s` may be
//!    overwritten. `released` never moves backwards and never passes `committed`; the kernel
//!    ignores a value that does, counts it, and stops the stream from being drained further
//!    (`StreamStatus::bad_releases`).
//! 4. After a release, a full fence, then load `ProducerPage::space_wanted`; if it is not zero, call
//!    [`IOC_KICK`]: a writer waits for room, or a GAP record waits to be written.
//! 5. To sleep: store `ConsumerPage::wake_seq = s`, a full fence, load `committed` again, and if
//!    it is still not above `s`, `poll()` the file. `POLLIN` is reported when the record `s` is
//!    complete. A consumer that tolerates some delay chooses `s` a batch ahead and a time-out.
//!
//! A consumer that has not mapped the ring uses `read()` and `poll()` only: `read` gives whole
//! records, a [`Desc`] and its payload each, as many as fit (`EMSGSIZE` if not even one does), and
//! releases what earlier reads gave.

#![allow(dead_code)]

/// Version of this interface. A module and a tool with different major numbers refuse to talk.
pub const ABI_VERSION: u32 = 1;

/// The page size that layouts below are built on.
pub const PAGE_BYTES: usize = 4096;

/// The unit of `start_sector` and `sectors`, in bytes, as everywhere in the block layer.
pub const SECTOR_BYTES: u64 = 512;

/// Size of a [`Desc`] in bytes.
pub const DESC_BYTES: usize = 64;

/// Length of a stream (set) name, in bytes, with its terminating zero.
pub const NAME_BYTES: usize = 64;

/// Largest payload of one record, in bytes; larger bios are split. 1 MiB is `BIO_MAX_VECS` pages,
/// the most that one lower bio can carry from scattered pages.
pub const RECORD_BYTES_MAX: u32 = 1 << 20;

/// Smallest payload area of a ring, in bytes: four of the largest records.
pub const RING_BYTES_MIN: u64 = 4 << 20;

/// Largest payload area of a ring, in bytes.
pub const RING_BYTES_MAX: u64 = 4 << 30;

/// Payload area when the caller asks for 0, in bytes.
pub const RING_BYTES_DEFAULT: u64 = 64 << 20;

/// Most streams at one time.
pub const STREAMS_MAX: u32 = 256;

/// Highest loop number that can be asked for.
pub const LOOP_NUMBER_MAX: i32 = 1_048_575;

/// mmap offset of the consumer page.
pub const MMAP_CONSUMER: u64 = 0;

/// mmap offset of the ring (producer page, descriptors, payload).
pub const MMAP_RING: u64 = PAGE_BYTES as u64;

/// `ProducerPage::magic`: "DTLOOPR1" in ASCII, little-endian.
pub const RING_MAGIC: u64 = u64::from_le_bytes(*b"DTLOOPR1");

/// The first sequence number of a stream. 0 is never used.
pub const SEQ_FIRST: u64 = 1;

/// `Desc::device` of a record that belongs to no single device.
pub const DEVICE_NONE: u32 = 0;

// ---------------------------------------------------------------------------------------------
// Records
// ---------------------------------------------------------------------------------------------

/// Data written; `payload_bytes == sectors * 512`.
pub const OP_WRITE: u8 = 1;
/// Range reads as zeroes from here on. No payload.
pub const OP_WRITE_ZEROES: u8 = 2;
/// Range discarded. With [`F_ZEROES`] it reads as zeroes on the source from here on; without it
/// its content is unspecified and the range is in the dirty map until it is synced.
pub const OP_DISCARD: u8 = 3;
/// Range securely erased; its content is unspecified and the range is in the dirty map.
pub const OP_SECURE_ERASE: u8 = 4;
/// A flush of the device. `sectors == 0`. Closes an epoch when it completes.
pub const OP_FLUSH: u8 = 5;
/// The content of a range, read at this position of the stream on request of [`IOC_SYNC`].
/// `aux` is the request's cookie.
pub const OP_SYNC: u8 = 6;
/// Changes were made that are not in the stream; they are in the dirty maps. `aux` is their
/// number, `start_sector` their total length in sectors, `device` the device if it was only one,
/// else [`DEVICE_NONE`]. Order is lost from the record before this one until every dirty map of
/// the stream is clean again.
pub const OP_GAP: u8 = 7;
/// A device joined the stream. `aux` is its size in sectors.
pub const OP_ATTACH: u8 = 8;
/// A device left the stream. `aux` is the number of dirty blocks its map still held.
pub const OP_DETACH: u8 = 9;
/// A device changed its size. `aux` is the new size in sectors, `start_sector` the old one.
pub const OP_RESIZE: u8 = 10;

/// Descriptor state: the change is on its way to the backing device.
pub const STATE_RESERVED: u8 = 1;
/// Descriptor state: the change is complete and the record is valid.
pub const STATE_COMMITTED: u8 = 2;
/// Descriptor state: the backing device failed the change. Its range is in the dirty map (for
/// SYNC: its dirty bits are kept) and the record's payload must not be applied.
pub const STATE_FAILED: u8 = 3;

/// Record flag: the write was made with force unit access.
pub const F_FUA: u16 = 1 << 0;
/// Record flag: the write was preceded by a flush.
pub const F_PREFLUSH: u16 = 1 << 1;
/// Record flag: write-zeroes that must not deallocate.
pub const F_NOUNMAP: u16 = 1 << 2;
/// Record flag: the discarded range reads as zeroes on the source.
pub const F_ZEROES: u16 = 1 << 3;
/// Record flag of SYNC: every dirty block wholly inside the range was cleared by it.
pub const F_CLEARED: u16 = 1 << 4;
/// Record flag of GAP: devices joined, left or changed size unrecorded; read the status anew.
pub const F_DEVICES: u16 = 1 << 5;
/// Shift of the positive errno (1..=255) that a FAILED record carries in its flags.
pub const F_ERRNO_SHIFT: u16 = 8;

/// One record of the stream.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Desc {
    /// Sequence number, from [`SEQ_FIRST`], without holes.
    pub seq: u64,
    /// Epoch: raised by every completed flush or FUA write. Records of one epoch that do not
    /// overlap may be applied in any order.
    pub epoch: u64,
    /// First sector on the loop device (the offset into the backing device is not included).
    pub start_sector: u64,
    /// Position of the payload; see the module documentation. 0 without payload.
    pub payload_pos: u64,
    /// Time of the reservation: nanoseconds of CLOCK_REALTIME, of the timer tick's precision.
    pub time_ns: u64,
    /// Length in sectors.
    pub sectors: u32,
    /// Payload in bytes.
    pub payload_bytes: u32,
    /// Device id ([`DeviceStatus::device_id`]), unique for the life of the stream.
    pub device: u32,
    /// `F_*`, and the errno of a failure.
    pub flags: u16,
    /// `OP_*`.
    pub op: u8,
    /// `STATE_*`.
    pub state: u8,
    /// By operation; see the `OP_*` constants.
    pub aux: u64,
}
const _: () = assert!(size_of::<Desc>() == DESC_BYTES);

/// Written by the kernel, read by the consumer. Fields that change sit on cache lines of their own.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ProducerPage {
    /// [`RING_MAGIC`].
    pub magic: u64,
    /// [`ABI_VERSION`].
    pub abi_version: u32,
    /// The stream's id.
    pub stream_id: u32,
    /// Random; drawn when the stream is created. A resumed agent that finds another one knows
    /// that sequence numbers started anew.
    pub stream_uuid: [u8; 16],
    /// Must be zero.
    pub reserved0: [u64; 4],
    /// Every record below this sequence number has been reserved (not necessarily completed).
    pub next_seq: u64,
    /// Every record below this sequence number is complete.
    pub committed: u64,
    /// Current epoch.
    pub epoch: u64,
    /// Not zero while somebody waits for room; see the consumer's protocol.
    pub space_wanted: u64,
    /// Must be zero.
    pub reserved1: [u64; 4],
    /// Must be zero.
    pub reserved2: [u64; 496],
}
const _: () = assert!(size_of::<ProducerPage>() == PAGE_BYTES);
const _: () = assert!(core::mem::offset_of!(ProducerPage, next_seq) == 64);

/// Written by the consumer, read by the kernel, which trusts nothing in it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct ConsumerPage {
    /// Records below this sequence number may be overwritten.
    pub released: u64,
    /// Must be zero.
    pub reserved0: [u64; 7],
    /// Wake the consumer when this record is complete; 0: never.
    pub wake_seq: u64,
    /// Must be zero.
    pub reserved1: [u64; 503],
}
const _: () = assert!(size_of::<ConsumerPage>() == PAGE_BYTES);
const _: () = assert!(core::mem::offset_of!(ConsumerPage, wake_seq) == 64);

// ---------------------------------------------------------------------------------------------
// ioctls of /dev/dtloop-control
// ---------------------------------------------------------------------------------------------

/// Feature bit: `POLICY_TRACK` and the dirty map.
pub const FEATURE_TRACK: u64 = 1 << 0;
/// Feature bit: `POLICY_BLOCK`.
pub const FEATURE_BLOCK: u64 = 1 << 1;
/// Feature bit: SYNC reads.
pub const FEATURE_SYNC: u64 = 1 << 2;
/// Feature bit: the write-intent map.
pub const FEATURE_INTENT: u64 = 1 << 3;
/// Feature bit: `POLICY_THROTTLE`.
pub const FEATURE_THROTTLE: u64 = 1 << 4;

/// Full-ring policy: mark the range dirty and let the write through.
pub const POLICY_TRACK: u32 = 0;
/// Full-ring policy: wait for room.
pub const POLICY_BLOCK: u32 = 1;
/// Full-ring policy: slow changes down as the ring fills, and when it is full nevertheless, track.
pub const POLICY_THROTTLE: u32 = 2;

/// [`POLICY_THROTTLE`] begins to delay when this part of the ring is in use, in percent, if the caller asks for 0.
pub const THROTTLE_START_DEFAULT: u32 = 50;
/// And ends when less than this is, in percent.
pub const THROTTLE_STOP_DEFAULT: u32 = 25;
/// Delay of a change when the ring is full, in milliseconds; less in proportion.
pub const THROTTLE_DELAY_MS_DEFAULT: u32 = 50;
/// Largest delay that can be asked for, in milliseconds.
pub const THROTTLE_DELAY_MS_MAX: u32 = 10_000;

/// What the module is; no privilege beyond opening the file.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    /// Out: [`ABI_VERSION`].
    pub abi_version: u32,
    /// Must be zero.
    pub reserved0: u32,
    /// Out: `FEATURE_*`.
    pub features: u64,
    /// Out: largest payload of one record in bytes.
    pub record_bytes_max: u32,
    /// Out: first number that `auto` hands out.
    pub auto_first: i32,
    /// Must be zero.
    pub reserved: [u64; 5],
}
const _: () = assert!(size_of::<Features>() == 64);

/// Create a stream. `EEXIST` when the name is taken, `EINVAL` for a bad size, policy or name.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StreamCreate {
    /// In: the set's name: 1..=63 bytes of `[A-Za-z0-9_.-]`, zero-terminated and zero-filled.
    pub name: [u8; NAME_BYTES],
    /// In: payload area in bytes: 0 for the default, else a power of two within
    /// [`RING_BYTES_MIN`]..=[`RING_BYTES_MAX`].
    pub payload_bytes: u64,
    /// In: number of descriptors: 0 for `payload_bytes / 4096`, else a power of two within
    /// 256..=1048576.
    pub desc_count: u32,
    /// In: `POLICY_*`.
    pub policy: u32,
    /// Out: the stream's id; its file is `/dev/dtloop-stream<ID>`.
    pub stream_id: u32,
    /// Must be zero.
    pub reserved0: u32,
    /// Must be zero.
    pub reserved: [u64; 5],
}
const _: () = assert!(size_of::<StreamCreate>() == 128);

/// Destroy even though records were not released yet: they are thrown away.
pub const DESTROY_DISCARD: u32 = 1 << 0;

/// Destroy a stream. `EBUSY` while devices are attached or a consumer has it open, `ENOTEMPTY`
/// while unreleased records are in the ring and [`DESTROY_DISCARD`] is not given.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamDestroy {
    /// In.
    pub stream_id: u32,
    /// In: `DESTROY_*`.
    pub flags: u32,
    /// Must be zero.
    pub reserved: [u64; 7],
}
const _: () = assert!(size_of::<StreamDestroy>() == 64);

/// Change a stream's full-ring policy. `EINVAL` for one that does not exist, or levels out of order.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamSet {
    /// In.
    pub stream_id: u32,
    /// In: `POLICY_*`.
    pub policy: u32,
    /// In: for [`POLICY_THROTTLE`], in percent, 1..=100; 0: the default.
    pub throttle_start: u32,
    /// In: in percent, below the start; 0: the default, or half of a start that is not above it.
    pub throttle_stop: u32,
    /// In: in milliseconds, up to [`THROTTLE_DELAY_MS_MAX`]; 0: the default.
    pub throttle_delay_ms: u32,
    /// Must be zero.
    pub reserved0: u32,
    /// Must be zero.
    pub reserved: [u64; 5],
}
const _: () = assert!(size_of::<StreamSet>() == 64);

/// Status flag of a stream: a consumer has it open.
pub const STREAM_CONSUMER: u32 = 1 << 0;
/// Status flag of a stream: changes are going to the dirty maps for want of room.
pub const STREAM_GAP: u32 = 1 << 1;
/// Status flag of a stream: the consumer wrote a bad `released`; it must reopen.
pub const STREAM_BAD_CONSUMER: u32 = 1 << 2;
/// Status flag of a stream: changes are being delayed.
pub const STREAM_THROTTLING: u32 = 1 << 3;

/// Everything about a stream. `ENOENT` when there is none (no more).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct StreamStatus {
    /// In: the lowest id of interest; the stream with that id or the next higher one is reported.
    /// Out: its id.
    pub stream_id: u32,
    /// Out: `STREAM_*`.
    pub flags: u32,
    /// Out.
    pub name: [u8; NAME_BYTES],
    /// Out: see [`ProducerPage::stream_uuid`].
    pub stream_uuid: [u8; 16],
    /// Out: `POLICY_*`.
    pub policy: u32,
    /// Out: number of descriptors.
    pub desc_count: u32,
    /// Out: payload area in bytes.
    pub payload_bytes: u64,
    /// Out: offset of the descriptors in the ring mapping, in bytes.
    pub desc_offset: u64,
    /// Out: offset of the payload area in the ring mapping, in bytes.
    pub payload_offset: u64,
    /// Out: length of the ring mapping in bytes.
    pub ring_bytes: u64,
    /// Out: next sequence number.
    pub next_seq: u64,
    /// Out: every record below is complete.
    pub committed: u64,
    /// Out: every record below was released.
    pub released: u64,
    /// Out: current epoch.
    pub epoch: u64,
    /// Out: payload bytes in use, padding included.
    pub used_bytes: u64,
    /// Out: of these, bytes of SYNC records.
    pub sync_bytes: u64,
    /// Out: most payload bytes that SYNC records may use.
    pub sync_bytes_max: u64,
    /// Out: GAP records written.
    pub gaps: u64,
    /// Out: changes that went to a dirty map for want of room.
    pub gap_changes: u64,
    /// Out: their length in sectors.
    pub gap_sectors: u64,
    /// Out: writers that had to wait for room (`POLICY_BLOCK`).
    pub room_waits: u64,
    /// Out: nanoseconds they waited in all.
    pub room_wait_ns: u64,
    /// Out: the longest of these waits in nanoseconds.
    pub room_wait_ns_max: u64,
    /// Out: times the consumer was woken.
    pub wakeups: u64,
    /// Out: `released` values that were refused.
    pub bad_releases: u64,
    /// Out: devices attached.
    pub devices: u32,
    /// Out: see [`StreamSet`].
    pub throttle_start: u32,
    /// Out: see [`StreamSet`].
    pub throttle_stop: u32,
    /// Out: see [`StreamSet`].
    pub throttle_delay_ms: u32,
    /// Out: changes that were delayed (`POLICY_THROTTLE`).
    pub throttles: u64,
    /// Out: nanoseconds they were delayed in all.
    pub throttle_ns: u64,
    /// Out: the longest of these delays in nanoseconds.
    pub throttle_ns_max: u64,
    /// Must be zero.
    pub reserved: [u64; 4],
}
const _: () = assert!(size_of::<StreamStatus>() == 320);

/// Attach flag: `backing_fd` is an open file descriptor of the block device. Without it
/// `backing_dev` is its device number.
pub const ATTACH_FD: u32 = 1 << 0;
/// Attach flag: the loop device is read-only.
pub const ATTACH_READ_ONLY: u32 = 1 << 1;
/// Attach flag: scan the loop device for partitions.
pub const ATTACH_PARTSCAN: u32 = 1 << 2;

/// `Attach::number`: the lowest free number from the module parameter `auto_first` up.
pub const NUMBER_AUTO: i32 = -1;

/// Attach a block device to `/dev/loop<N>`.
///
/// Errors: `ENOTBLK` not a block device; `EBUSY` backing device in use (mounted, swap, held by
/// LVM, md or another attach); `EEXIST` the loop number exists; `EINVAL` offset or size limit not
/// a multiple of the logical block size; `ERANGE` they lie beyond the end; `ENOENT` no such
/// stream; `EROFS` backing device is read-only and [`ATTACH_READ_ONLY`] is not given;
/// `EOPNOTSUPP` zoned device.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Attach {
    /// In: open file descriptor, with [`ATTACH_FD`].
    pub backing_fd: i32,
    /// In: `ATTACH_*`.
    pub flags: u32,
    /// In: device number, in the kernel's encoding for userspace (`st_rdev`, 64 bits).
    pub backing_dev: u64,
    /// In: first byte used of the backing device.
    pub offset_bytes: u64,
    /// In: most bytes used; 0: up to the end.
    pub limit_bytes: u64,
    /// In: loop number or [`NUMBER_AUTO`]. Out: the loop number.
    pub number: i32,
    /// In: the stream.
    pub stream_id: u32,
    /// Out: device id, unique for the life of the stream.
    pub device_id: u32,
    /// Must be zero.
    pub reserved0: u32,
    /// In: label that travels with the status (the name of the volume on the target): 0..=63
    /// bytes of `[A-Za-z0-9_.-]`, zero-terminated and zero-filled.
    pub label: [u8; NAME_BYTES],
    /// In: which disk it is, however it is found; the intent file remembers it. Zero: not known.
    pub identity: [u8; 16],
    /// Must be zero.
    pub reserved: [u64; 2],
}
const _: () = assert!(size_of::<Attach>() == 144);

/// Detach although it is open: outstanding changes end with `EIO` at once.
pub const DETACH_FORCE: u32 = 1 << 0;

/// Detach a device. `EBUSY` while it is open, `ENXIO` when there is no such device.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Detach {
    /// In: loop number.
    pub number: i32,
    /// In: `DETACH_*`.
    pub flags: u32,
    /// Must be zero.
    pub reserved: [u64; 7],
}
const _: () = assert!(size_of::<Detach>() == 64);

/// Follow the size of the backing device. Shrinking a device that is open is `EBUSY`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Resize {
    /// In: loop number.
    pub number: i32,
    /// Must be zero.
    pub flags: u32,
    /// In: new size limit in bytes; 0: up to the end of the backing device.
    pub limit_bytes: u64,
    /// Out: new size in sectors.
    pub sectors: u64,
    /// Must be zero.
    pub reserved: [u64; 5],
}
const _: () = assert!(size_of::<Resize>() == 64);

/// Status flag of a device: read-only.
pub const DEVICE_READ_ONLY: u32 = 1 << 0;
/// Status flag of a device: partitions are scanned.
pub const DEVICE_PARTSCAN: u32 = 1 << 1;
/// Status flag of a device: the backing device vanished (hot unplug).
pub const DEVICE_DEAD: u32 = 1 << 2;
/// Status flag of a device: something other than this module wrote to the backing device.
pub const DEVICE_BYPASSED: u32 = 1 << 3;
/// Status flag of a device: it is being detached.
pub const DEVICE_DETACHING: u32 = 1 << 4;
/// Status flag of a device: a discard of it reads as zeroes.
pub const DEVICE_DISCARD_ZEROES: u32 = 1 << 5;

/// Everything about a device. `ENXIO` when there is none (no more).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct DeviceStatus {
    /// In: the lowest loop number of interest; that device or the next higher one is reported.
    /// Out: its number.
    pub number: i32,
    /// Out: `DEVICE_*`.
    pub flags: u32,
    /// Out.
    pub stream_id: u32,
    /// Out.
    pub device_id: u32,
    /// Out: device number of the backing device, as in [`Attach::backing_dev`].
    pub backing_dev: u64,
    /// Out: device number of the loop device.
    pub loop_dev: u64,
    /// Out: the backing device's name, `/dev/` included.
    pub backing_name: [u8; NAME_BYTES],
    /// Out.
    pub label: [u8; NAME_BYTES],
    /// Out.
    pub offset_bytes: u64,
    /// Out: as given at attach.
    pub limit_bytes: u64,
    /// Out: size in sectors.
    pub sectors: u64,
    /// Out: logical block size in bytes.
    pub block_bytes: u32,
    /// Out: bytes that one bit of the dirty map stands for.
    pub dirty_block_bytes: u32,
    /// Out: dirty blocks.
    pub dirty_blocks: u64,
    /// Out: openers of the loop device.
    pub openers: u32,
    /// Out: changes in flight to the backing device.
    pub in_flight: u32,
    /// Out: reads passed on.
    pub reads: u64,
    /// Out: and their sectors.
    pub read_sectors: u64,
    /// Out: writes captured.
    pub writes: u64,
    /// Out: and their sectors.
    pub write_sectors: u64,
    /// Out: flushes captured.
    pub flushes: u64,
    /// Out: discards, write-zeroes and secure erases captured.
    pub discards: u64,
    /// Out: and their sectors.
    pub discard_sectors: u64,
    /// Out: SYNC reads.
    pub syncs: u64,
    /// Out: and their sectors.
    pub sync_sectors: u64,
    /// Out: changes that went to the dirty map instead of the stream.
    pub tracked: u64,
    /// Out: and their sectors.
    pub tracked_sectors: u64,
    /// Out: changes that the backing device failed.
    pub failed: u64,
    /// Out: changes that had to wait for an overlapping one.
    pub gate_waits: u64,
    /// Out: REQ_NOWAIT changes that were sent back because they would have waited.
    pub nowait_retries: u64,
    /// Out: sectors that the backing device says were written since attach and this module did
    /// not write.
    pub bypass_sectors: u64,
    /// Out: `FOUND_*`: what the intent file knew of the device when it was attached.
    pub intent_found: u32,
    /// Must be zero.
    pub reserved0: u32,
    /// Out: regions marked in the intent file.
    pub regions_marked: u64,
    /// Out: regions marked since an earlier life of the file, which have to be compared.
    pub regions_suspect: u64,
    /// Must be zero.
    pub reserved: [u64; 5],
}
const _: () = assert!(size_of::<DeviceStatus>() == 392);

// ---------------------------------------------------------------------------------------------
// The write-intent map
// ---------------------------------------------------------------------------------------------

/// Region of the intent map when the caller asks for 0, in bytes.
pub const REGION_BYTES_DEFAULT: u32 = 4 << 20;

/// Smallest and largest region in bytes.
pub const REGION_BYTES_MIN: u32 = 64 << 10;
/// See [`REGION_BYTES_MIN`].
pub const REGION_BYTES_MAX: u32 = 1 << 30;

/// Hot regions when the caller asks for 0: 4 GiB of the default region.
pub const HOT_REGIONS_DEFAULT: u32 = 1024;

/// How long a region stays marked at least after its last change when the caller asks for 0, in milliseconds.
pub const INTENT_IDLE_MS_DEFAULT: u32 = 30_000;

/// Most streams that the marks of one file cover.
pub const INTENT_BASES: usize = 8;

/// Intent flag: begin the file anew, whatever it holds.
pub const INTENT_FORMAT: u32 = 1 << 0;

/// What was found: there is no intent file.
pub const FOUND_NONE: u32 = 0;
/// What was found: nothing; the file, or the device in it, is new.
pub const FOUND_NEW: u32 = 1;
/// What was found: marks that were kept without a gap.
pub const FOUND_KNOWN: u32 = 2;
/// What was found: the file says that it is not to be relied on, as it once could not be written.
pub const FOUND_VOID: u32 = 3;
/// What was found: the file of another source or set.
pub const FOUND_FOREIGN: u32 = 4;
/// What was found: a format that this module does not know.
pub const FOUND_FORMAT: u32 = 5;
/// What was found: damage.
pub const FOUND_DAMAGED: u32 = 6;
/// What was found: the device, with another identity: another disk under its name.
pub const FOUND_REPLACED: u32 = 7;
/// What was found: the device, with another size.
pub const FOUND_RESIZED: u32 = 8;

/// Give a stream its intent file: an ordinary file, written to its end beforehand, on a file system that lies on one
/// block device and tells where a file's blocks are (ext4 and XFS do). The kernel writes those blocks itself; until the stream
/// is destroyed nobody else can write, truncate, move or remove the file.
///
/// A usable file of this set goes on: each device that is attached finds its marks by its label. Any other one begins
/// anew. A device that is attached already has all its regions marked. `EBUSY` the stream has one; `ETXTBSY` the file is in
/// use; `EDEADLK` it lies on a loop device of this module; `EOPNOTSUPP` the file system does not tell, or the file has
/// holes; `EINVAL` a size out of range (64 KiB to 64 MiB, whole blocks of 4096); `ENOSPC` it is too small for the devices;
/// `EAGAIN` a device is being attached right now.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct StreamIntent {
    /// In.
    pub stream_id: u32,
    /// In: `INTENT_*`.
    pub flags: u32,
    /// In: the file, open for reading and writing.
    pub fd: i32,
    /// In: region in bytes, a power of two; 0: the default. A file that goes on keeps its own.
    pub region_bytes: u32,
    /// In: marks are cleared early when more regions than this are marked; 0: the default.
    pub hot_max: u32,
    /// In: how long a region stays marked at least after its last change; 0: the default.
    pub idle_ms: u32,
    /// In: who the source is.
    pub source: [u8; 16],
    /// Out: `FOUND_*`.
    pub found: u32,
    /// Must be zero.
    pub reserved0: u32,
    /// Must be zero.
    pub reserved: [u64; 10],
}
const _: () = assert!(size_of::<StreamIntent>() == 128);

/// Flag of an intent map: changes wait until their regions are marked.
pub const INTENT_ON: u32 = 1 << 0;
/// Flag of an intent map: the file could not be written, or not in time; changes no longer wait, and the marks are
/// not to be relied on.
pub const INTENT_FAILED: u32 = 1 << 1;

/// A stream whose changes the marks cover.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IntentBase {
    /// The stream; zero: none.
    pub stream_uuid: [u8; 16],
    /// Marks were taken away by what the target had of it: everything below this record.
    pub acked: u64,
}
const _: () = assert!(size_of::<IntentBase>() == 24);

/// Everything about the intent map of a stream. `ENOENT` when there is no such stream.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IntentStatus {
    /// In. The stream's own file ignores it.
    pub stream_id: u32,
    /// Out: [`INTENT_ON`], [`INTENT_FAILED`].
    pub flags: u32,
    /// Out: `FOUND_*` of the file.
    pub found: u32,
    /// Out: region in bytes.
    pub region_bytes: u32,
    /// Out: see [`StreamIntent`].
    pub hot_max: u32,
    /// Out: see [`StreamIntent`].
    pub idle_ms: u32,
    /// Out: streams that have used the file.
    pub life: u32,
    /// Must be zero.
    pub reserved0: u32,
    /// Out: rises with every write of the file.
    pub version: u64,
    /// Out: the version at which the file was found.
    pub found_version: u64,
    /// Out: length of the file in bytes.
    pub file_bytes: u64,
    /// Out: regions marked.
    pub marked: u64,
    /// Out: of these, regions that have to be compared.
    pub suspect: u64,
    /// Out: changes that found their regions marked.
    pub hits: u64,
    /// Out: changes that had to wait for a mark.
    pub misses: u64,
    /// Out: nanoseconds they waited in all.
    pub wait_ns: u64,
    /// Out: the longest of these waits in nanoseconds.
    pub wait_ns_max: u64,
    /// Out: writes of the file.
    pub writes: u64,
    /// Out: rounds of clearing.
    pub rounds: u64,
    /// Out: marks cleared.
    pub cleared: u64,
    /// Out: streams that the marks cover, this one included.
    pub bases: [IntentBase; INTENT_BASES],
    /// Must be zero.
    pub reserved: [u64; 4],
}
const _: () = assert!(size_of::<IntentStatus>() == 352);

// ---------------------------------------------------------------------------------------------
// ioctls of /dev/dtloop-stream<ID>
// ---------------------------------------------------------------------------------------------

/// Say what the target has: marks of the intent map that are no longer needed may go. To be called once a second or
/// so. `ENOENT` without an intent map, `EINVAL` beyond what is complete.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct IntentClear {
    /// In: the target has every record below this durably, and so have the disks behind the devices, past their caches: the
    /// module does not flush them. What a disk loses with its power is found by its mark only.
    pub acked: u64,
    /// Out: version of the file that is on disk.
    pub version: u64,
    /// Out: regions marked.
    pub marked: u64,
    /// Must be zero.
    pub reserved: [u64; 5],
}
const _: () = assert!(size_of::<IntentClear>() == 64);

/// SYNC flag: clear the dirty bits of blocks that lie wholly inside the range.
pub const SYNC_CLEAR: u32 = 1 << 0;

/// Read a range into the stream, cut into records of `chunk_bytes`.
///
/// Returns when the reads are under way; each completes as an [`OP_SYNC`] record of its own.
/// Fewer sectors than asked for are taken when the share of the ring that SYNC may use is full;
/// none at all is `EAGAIN`: try again after a release. `ENXIO` no such device, `ERANGE` beyond its end.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Sync {
    /// In: device id.
    pub device_id: u32,
    /// In: `SYNC_*`.
    pub flags: u32,
    /// In: first sector; a multiple of the device's block size.
    pub start_sector: u64,
    /// In: length in sectors, not 0, a multiple of the device's block size. Out: sectors taken.
    pub sectors: u64,
    /// In: largest payload of one record in bytes: a power of two within 4096..=1 MiB.
    /// Records do not cross multiples of it.
    pub chunk_bytes: u32,
    /// Must be zero.
    pub reserved0: u32,
    /// In: comes back in `Desc::aux`.
    pub cookie: u64,
    /// Must be zero.
    pub reserved: [u64; 3],
}
const _: () = assert!(size_of::<Sync>() == 64);

/// Find the next dirty extent. `ENOENT` when there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Dirty {
    /// In: device id.
    pub device_id: u32,
    /// Must be zero.
    pub flags: u32,
    /// In: where to begin. Out: first sector of the extent, a multiple of the dirty block.
    pub start_sector: u64,
    /// In: longest extent of interest, in sectors (for [`IOC_DIRTY_SET`]: the length).
    /// Out: length of the extent, cut at the end of the device.
    pub sectors: u64,
    /// Must be zero.
    pub reserved: [u64; 5],
}
const _: () = assert!(size_of::<Dirty>() == 64);

// ---------------------------------------------------------------------------------------------
// ioctl numbers
// ---------------------------------------------------------------------------------------------

/// ioctl type byte.
pub const IOC_TYPE: u32 = 0xdd;

const fn ioc(dir: u32, nr: u32, bytes: usize) -> u32 {
    // include/uapi/asm-generic/ioctl.h: dir 2 bits, size 14 bits, type 8 bits, number 8 bits.
    assert!(bytes < 1 << 14);
    (dir << 30) | ((bytes as u32) << 16) | (IOC_TYPE << 8) | nr
}

const fn iowr<T>(nr: u32) -> u32 {
    ioc(3, nr, size_of::<T>())
}

/// [`Features`].
pub const IOC_GET_FEATURES: u32 = iowr::<Features>(0);
/// [`StreamCreate`].
pub const IOC_STREAM_CREATE: u32 = iowr::<StreamCreate>(1);
/// [`StreamDestroy`].
pub const IOC_STREAM_DESTROY: u32 = iowr::<StreamDestroy>(2);
/// [`StreamSet`].
pub const IOC_STREAM_SET: u32 = iowr::<StreamSet>(3);
/// [`StreamStatus`]. Also understood by the stream's own file, which ignores `stream_id`.
pub const IOC_STREAM_STATUS: u32 = iowr::<StreamStatus>(4);
/// [`Attach`].
pub const IOC_ATTACH: u32 = iowr::<Attach>(5);
/// [`Detach`].
pub const IOC_DETACH: u32 = iowr::<Detach>(6);
/// [`Resize`].
pub const IOC_RESIZE: u32 = iowr::<Resize>(7);
/// [`DeviceStatus`]. The stream's own file reports its own devices only.
pub const IOC_DEVICE_STATUS: u32 = iowr::<DeviceStatus>(8);

/// [`StreamIntent`].
pub const IOC_STREAM_INTENT: u32 = iowr::<StreamIntent>(9);
/// [`IntentStatus`]. Also understood by the stream's own file.
pub const IOC_INTENT_STATUS: u32 = iowr::<IntentStatus>(10);

/// Stream file: [`Sync`].
pub const IOC_SYNC: u32 = iowr::<Sync>(32);
/// Stream file: [`Dirty`], look up.
pub const IOC_DIRTY_NEXT: u32 = iowr::<Dirty>(33);
/// Stream file: [`Dirty`], mark a range dirty (the consumer gives records up).
pub const IOC_DIRTY_SET: u32 = iowr::<Dirty>(34);
/// Stream file: no argument; `released` has moved and somebody waits for room.
pub const IOC_KICK: u32 = ioc(0, 35, 0);
/// Stream file: [`IntentClear`].
pub const IOC_INTENT_CLEAR: u32 = iowr::<IntentClear>(36);
/// Stream file: [`Dirty`], the next run of regions that have to be compared.
pub const IOC_SUSPECT_NEXT: u32 = iowr::<Dirty>(37);
/// Stream file: [`Dirty`], regions wholly inside the range were compared; where they differed, the target has what the
/// source has.
pub const IOC_SUSPECT_CLEAR: u32 = iowr::<Dirty>(38);
/// Stream file: [`Dirty`], every marked region that the range touches has to be compared: the target lacks records that are
/// gone. `ENOENT` without an intent map.
pub const IOC_SUSPECT_SET: u32 = iowr::<Dirty>(39);
