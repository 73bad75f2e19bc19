// SPDX-License-Identifier: GPL-2.0-only

//! Declarations of `shim.c`, for the wrappers in this directory only.

use core::ffi::{c_int, c_uint, c_void};
use kernel::bindings;

#[allow(
    improper_ctypes,
    reason = "empty structures inside, by configuration; only pointers to them are passed"
)]
extern "C" {
    pub(super) static dtloop_feat_write_cache: u32;
    pub(super) static dtloop_feat_fua: u32;
    pub(super) static dtloop_feat_nowait: u32;
    pub(super) static dtloop_feat_io_stat: u32;
    pub(super) static dtloop_feat_atomic_writes: u32;
    pub(super) static dtloop_open_read: u32;
    pub(super) static dtloop_open_write: u32;
    pub(super) static dtloop_bioset_need_bvecs: u32;
    pub(super) static dtloop_gd_suppress_part_scan: u32;
    pub(super) static dtloop_gfp_noio: u32;
    pub(super) static dtloop_gfp_retry_mayfail: u32;
    pub(super) static dtloop_hz: u32;

    pub(super) fn dtloop_bio_set_dev(bio: *mut bindings::bio, bdev: *mut bindings::block_device);
    pub(super) fn dtloop_bio_copy_out(
        bio: *mut bindings::bio,
        pieces: *const *mut c_void,
        shift: c_uint,
        pos: u64,
    );
    pub(super) fn dtloop_bio_pass_read(
        bio: *mut bindings::bio,
        bdev: *mut bindings::block_device,
        offset: u64,
    );
    pub(super) fn dtloop_bdev_reads(bdev: *mut bindings::block_device) -> u64;
    pub(super) fn dtloop_bdev_read_sectors(bdev: *mut bindings::block_device) -> u64;
    pub(super) fn dtloop_bdev_written_sectors(bdev: *mut bindings::block_device) -> u64;
    pub(super) fn dtloop_bdev_sectors(bdev: *mut bindings::block_device) -> u64;
    pub(super) fn dtloop_bdev_block_bytes(bdev: *mut bindings::block_device) -> u32;
    pub(super) fn dtloop_bdev_read_only(bdev: *mut bindings::block_device) -> bool;
    pub(super) fn dtloop_bdev_is_zoned(bdev: *mut bindings::block_device) -> bool;
    pub(super) fn dtloop_bdev_unmap_zeroes_sectors(bdev: *mut bindings::block_device) -> u32;
    pub(super) fn dtloop_file_block_dev(file: *mut bindings::file) -> u64;
    pub(super) fn dtloop_decode_dev(dev: u64) -> bindings::dev_t;
    pub(super) fn dtloop_encode_dev(dev: bindings::dev_t) -> u64;
    pub(super) fn dtloop_disk_openers(disk: *mut bindings::gendisk) -> c_uint;
    pub(super) fn dtloop_dev_to_disk(dev: *mut bindings::device) -> *mut bindings::gendisk;
    pub(super) fn dtloop_real_ns() -> u64;
    pub(super) fn dtloop_monotonic_ns() -> u64;
    pub(super) fn dtloop_fatal_signal() -> bool;
    pub(super) fn dtloop_waitqueue_active(head: *mut bindings::wait_queue_head) -> bool;
    pub(super) fn dtloop_iminor(inode: *mut bindings::inode) -> c_uint;
    pub(super) fn dtloop_bdev_name(
        bdev: *mut bindings::block_device,
        name: *mut u8,
        bytes: usize,
    ) -> c_int;
    pub(super) fn dtloop_virt_to_page(address: *const c_void) -> *mut bindings::page;
    pub(super) fn dtloop_available_pages() -> usize;
    pub(super) fn dtloop_mkdev(major: c_uint, minor: c_uint) -> bindings::dev_t;
    pub(super) fn dtloop_file_writable(file: *mut bindings::file) -> bool;
    pub(super) fn dtloop_file_device(file: *mut bindings::file) -> *mut bindings::block_device;
    pub(super) fn dtloop_file_bytes(file: *mut bindings::file) -> u64;
    pub(super) fn dtloop_file_block_bytes(file: *mut bindings::file) -> u32;
    pub(super) fn dtloop_file_bmap(file: *mut bindings::file, block: *mut u64) -> c_int;
    pub(super) fn dtloop_file_claim(file: *mut bindings::file) -> c_int;
    pub(super) fn dtloop_file_unclaim(file: *mut bindings::file);
    pub(super) fn dtloop_file_get(file: *mut bindings::file);
    pub(super) fn dtloop_crc32(data: *const u8, bytes: usize) -> u32;
}
