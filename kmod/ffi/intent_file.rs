// SPDX-License-Identifier: GPL-2.0-only

//! A file of which the kernel writes the blocks itself, as it does with a swap file.
//!
//! Where the blocks lie is asked once. After that a write needs no file system, no page cache and no memory: one bio,
//! made beforehand, goes to the disk under the file system. So it can be made for a change that others wait for to free
//! memory. As for a swap file the inode is marked, and nobody may write, truncate, move or remove it meanwhile.
//!
//! C headers: `include/linux/fs.h`, `include/linux/bio.h`

use super::{gendisk, pages::Pages, shim};
use core::ptr::NonNull;
use kernel::{
    bindings,
    error::to_result,
    fs::file::LocalFile,
    prelude::*,
    types::Opaque, //
};

/// Unit of reading and writing in bytes.
pub(crate) const BLOCK_BYTES: usize = 4096;

/// Sectors of a block.
const BLOCK_SECTORS: u64 = BLOCK_BYTES as u64 / 512;

/// Most blocks of one bio.
const RUN_MAX: usize = 16;

/// Smallest and largest file in bytes.
const BYTES_MIN: u64 = 64 << 10;
const BYTES_MAX: u64 = 64 << 20;

/// The one bio of a file and its segments.
#[pin_data]
struct Carrier {
    #[pin]
    bio: Opaque<bindings::bio>,
    #[pin]
    segments: Opaque<[bindings::bio_vec; RUN_MAX + 1]>,
}

/// An open file that the kernel writes itself.
///
/// # Invariants
///
/// `file` is a reference to an open regular file, whose inode this object has claimed. `device` is the block device that
/// its file system lives on, valid as long as the file is open. `blocks` are the first sectors, on `device`, of the
/// file's blocks.
pub(crate) struct IntentFile {
    file: NonNull<bindings::file>,
    device: NonNull<bindings::block_device>,
    blocks: KVVec<u64>,
    carrier: Pin<KBox<Carrier>>,
}

// SAFETY: A file reference may be held and given up by any task; writes take `&mut self`.
unsafe impl Send for IntentFile {}

impl IntentFile {
    /// Takes the file that is open as `fd` in the current task.
    ///
    /// `EBADF` no such file, or not open for writing; `EINVAL` not a regular file of [`BYTES_MIN`] to [`BYTES_MAX`] bytes
    /// in whole blocks; `EOPNOTSUPP` its file system does not tell where the blocks lie, or they have holes; `ETXTBSY` in use
    /// as a swap file or by another set; `EDEADLK` it lives on a device of this driver.
    ///
    /// Must not be called from atomic context.
    pub(crate) fn open(fd: i32) -> Result<Self> {
        let local = LocalFile::fget(u32::try_from(fd).map_err(|_| EBADF)?)?;
        let file = NonNull::new(local.as_ptr()).ok_or(EBADF)?;
        // SAFETY: The file is valid while `local` lives.
        let device = unsafe {
            if !shim::dtloop_file_writable(file.as_ptr()) {
                return Err(EBADF);
            }
            // What was written to it so far has its place on disk then.
            to_result(bindings::vfs_fsync(file.as_ptr(), 0))?;
            shim::dtloop_file_device(file.as_ptr())
        };
        let device = NonNull::new(device).ok_or(EOPNOTSUPP)?;
        // SAFETY: The device is valid while its file system has an open file.
        if unsafe { gendisk::is_ours(device.as_ptr()) } {
            return Err(EDEADLK);
        }
        let carrier = KBox::pin_init(
            pin_init!(Carrier {
                bio <- Opaque::uninit(),
                segments <- Opaque::uninit(),
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: As above. The claim is given back at drop, or below.
        to_result(unsafe { shim::dtloop_file_claim(file.as_ptr()) })?;
        // SAFETY: The file is valid; the reference goes with the claim.
        unsafe { shim::dtloop_file_get(file.as_ptr()) };
        // INVARIANT: Claimed and referenced just now; the blocks follow.
        let mut this = Self {
            file,
            device,
            blocks: KVVec::new(),
            carrier,
        };
        this.map_blocks()?;
        Ok(this)
    }

    /// Asks the file system where the blocks lie.
    fn map_blocks(&mut self) -> Result {
        // SAFETY: By the type invariant; so for all calls below.
        let (bytes, unit) = unsafe {
            (
                shim::dtloop_file_bytes(self.file.as_ptr()),
                u64::from(shim::dtloop_file_block_bytes(self.file.as_ptr())),
            )
        };
        if !(BYTES_MIN..=BYTES_MAX).contains(&bytes) || bytes % BLOCK_BYTES as u64 != 0 {
            return Err(EINVAL);
        }
        if unit == 0 || unit > BLOCK_BYTES as u64 {
            return Err(EOPNOTSUPP);
        }
        let parts = BLOCK_BYTES as u64 / unit;
        for block in 0..bytes / BLOCK_BYTES as u64 {
            let first = self.lookup(block * parts)?;
            for part in 1..parts {
                if self.lookup(block * parts + part)? != first + part {
                    return Err(EOPNOTSUPP);
                }
            }
            self.blocks.push(first * (unit / 512), GFP_KERNEL)?;
        }
        Ok(())
    }

    /// The block on disk, in the file system's unit, of a block of the file.
    fn lookup(&self, block: u64) -> Result<u64> {
        let mut place = block;
        // SAFETY: By the type invariant.
        to_result(unsafe { shim::dtloop_file_bmap(self.file.as_ptr(), &mut place) })
            .map_err(|_| EOPNOTSUPP)?;
        // 0: a hole, or space that was never written.
        if place == 0 {
            return Err(EOPNOTSUPP);
        }
        Ok(place)
    }

    /// Length in blocks.
    pub(crate) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Reads the whole file into `pages`, which is as long.
    pub(crate) fn read_all(&mut self, pages: &Pages) -> Result {
        self.transfer(bindings::req_op_REQ_OP_READ, pages, 0, self.blocks.len())
    }

    /// Writes `count` blocks from `first` on from the same place of `pages`; they are durable when this returns.
    ///
    /// Must not be called from atomic context. Waits for no memory.
    pub(crate) fn write(&mut self, pages: &Pages, first: usize, count: usize) -> Result {
        let flags = bindings::req_flag_bits___REQ_FUA;
        let flags = (1 << flags)
            | (1 << bindings::req_flag_bits___REQ_SYNC)
            | (1 << bindings::req_flag_bits___REQ_META);
        self.transfer(bindings::req_op_REQ_OP_WRITE | flags, pages, first, count)
    }

    fn transfer(&mut self, op_flags: u32, pages: &Pages, first: usize, count: usize) -> Result {
        let end = first.saturating_add(count).min(self.blocks.len());
        let mut at = first;
        while at < end {
            let run = self.run(at, end);
            self.one_bio(op_flags, pages, at, run)?;
            at = at.saturating_add(run);
        }
        Ok(())
    }

    /// How many blocks from `at` on lie side by side on disk.
    fn run(&self, at: usize, end: usize) -> usize {
        let place = |block: usize| self.blocks.get(block).copied().unwrap_or(0);
        let first = place(at);
        let mut run = 1;
        while run < RUN_MAX
            && at + run < end
            && place(at + run) == first + run as u64 * BLOCK_SECTORS
        {
            run += 1;
        }
        run
    }

    fn one_bio(&mut self, op_flags: u32, pages: &Pages, first: usize, count: usize) -> Result {
        let sector = self.blocks.get(first).copied().ok_or(ERANGE)?;
        let bio = self.carrier.bio.get();
        let bytes = count * BLOCK_BYTES;
        // SAFETY: The bio and its segments are pinned and used by nobody else, as this takes `&mut self`; the
        // device is valid by the type invariant.
        unsafe {
            let segments = self.carrier.segments.get().cast::<bindings::bio_vec>();
            bindings::bio_init(
                bio,
                self.device.as_ptr(),
                segments,
                RUN_MAX as u16 + 1,
                op_flags,
            );
            (*bio).bi_iter.bi_sector = sector;
        }
        let mut added = 0;
        pages.for_each_segment(first * BLOCK_BYTES, bytes, |page, in_page, part| {
            // SAFETY: The bio was initialised; the page stays until the bio has ended, as `pages` is borrowed.
            added += unsafe { bindings::bio_add_page(bio, page, part, in_page) };
        });
        let result = if added as usize == bytes {
            // SAFETY: A bio with device, place and data.
            to_result(unsafe { bindings::submit_bio_wait(bio) })
        } else {
            Err(EIO)
        };
        // SAFETY: The bio has ended, or was not submitted.
        unsafe { bindings::bio_uninit(bio) };
        result
    }
}

impl Drop for IntentFile {
    fn drop(&mut self) {
        // SAFETY: By the type invariant claim and reference are ours.
        unsafe {
            shim::dtloop_file_unclaim(self.file.as_ptr());
            bindings::fput(self.file.as_ptr());
        }
    }
}

/// CRC-32 (IEEE) of `bytes`.
pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    // SAFETY: The slice is valid for its length.
    unsafe { shim::dtloop_crc32(bytes.as_ptr(), bytes.len()) }
}
