// SPDX-License-Identifier: GPL-2.0-only

//! A bio that came from above, and what kinds of bios there are.
//!
//! C header: `include/linux/bio.h`

use super::{
    block_device::BackingDevice,
    pages::{self, Pages},
    shim, //
};
use core::{
    ptr::{null_mut, NonNull},
    sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering},
};
use kernel::{bindings, prelude::*};

/// What a bio asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Read,
    Write,
    Discard,
    SecureErase,
    WriteZeroes,
    /// Zone management and the like, which this driver does not offer.
    Other,
}

/// `bi_opf`: the operation and its flags.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct OpFlags(pub(super) u32);

const OP_BITS: u32 = 8;

const fn flag(bit: u32) -> u32 {
    1 << bit
}

const FUA: u32 = flag(bindings::req_flag_bits___REQ_FUA);
const PREFLUSH: u32 = flag(bindings::req_flag_bits___REQ_PREFLUSH);
const NOWAIT: u32 = flag(bindings::req_flag_bits___REQ_NOWAIT);
const POLLED: u32 = flag(bindings::req_flag_bits___REQ_POLLED);
const NOUNMAP: u32 = flag(bindings::req_flag_bits___REQ_NOUNMAP);
const ALLOC_CACHE: u32 = flag(bindings::req_flag_bits___REQ_ALLOC_CACHE);

impl OpFlags {
    /// A plain read, as SYNC makes it: in the background of what applications do.
    pub(crate) const BACKGROUND_READ: Self =
        Self(bindings::req_op_REQ_OP_READ | flag(bindings::req_flag_bits___REQ_BACKGROUND));

    /// The operation.
    #[inline]
    pub(crate) fn operation(self) -> Operation {
        match self.0 & ((1 << OP_BITS) - 1) {
            bindings::req_op_REQ_OP_READ => Operation::Read,
            bindings::req_op_REQ_OP_WRITE => Operation::Write,
            bindings::req_op_REQ_OP_DISCARD => Operation::Discard,
            bindings::req_op_REQ_OP_SECURE_ERASE => Operation::SecureErase,
            bindings::req_op_REQ_OP_WRITE_ZEROES => Operation::WriteZeroes,
            _ => Operation::Other,
        }
    }

    /// Force unit access.
    #[inline]
    pub(crate) fn fua(self) -> bool {
        self.0 & FUA != 0
    }

    /// A flush comes first.
    #[inline]
    pub(crate) fn preflush(self) -> bool {
        self.0 & PREFLUSH != 0
    }

    /// The submitter wants `EAGAIN` rather than to wait.
    #[inline]
    pub(crate) fn nowait(self) -> bool {
        self.0 & NOWAIT != 0
    }

    /// Write-zeroes that must not deallocate.
    #[inline]
    pub(crate) fn nounmap(self) -> bool {
        self.0 & NOUNMAP != 0
    }

    /// The flags for the lower bio of a captured change.
    ///
    /// NOWAIT goes: once a change is in the stream it must not bounce. POLLED and ALLOC_CACHE
    /// speak of the upper bio's own allocation and completion. All others (priority, sync, meta,
    /// idle, atomic, FUA, preflush) stay.
    #[inline]
    pub(crate) fn for_lower(self) -> Self {
        Self(self.0 & !(NOWAIT | POLLED | ALLOC_CACHE))
    }

    /// The same with another operation.
    #[inline]
    pub(crate) fn as_write_zeroes(self) -> Self {
        Self((self.0 & !((1 << OP_BITS) - 1)) | bindings::req_op_REQ_OP_WRITE_ZEROES)
    }
}

/// `blk_status_t`: how a bio ended.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Status(pub(super) bindings::blk_status_t);

impl Status {
    /// Success.
    pub(crate) const OK: Self = Self(bindings::BLK_STS_OK as bindings::blk_status_t);

    /// Whether the bio succeeded.
    #[inline]
    pub(crate) fn is_ok(self) -> bool {
        self == Self::OK
    }

    /// The positive errno.
    pub(crate) fn errno(self) -> u8 {
        // SAFETY: A look-up in a table that checks its index.
        let errno = unsafe { bindings::blk_status_to_errno(self.0) };
        u8::try_from(errno.unsigned_abs()).unwrap_or(u8::MAX)
    }
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        // SAFETY: A look-up in a table.
        Self(unsafe { bindings::errno_to_blk_status(error.to_errno()) })
    }
}

/// A bio from above that has to be ended or passed on.
///
/// Dropping it ends it with `EIO`, so that no path can forget one.
///
/// # Invariants
///
/// A valid bio that this driver was given through `submit_bio` and has not ended.
pub(crate) struct UpperBio(NonNull<bindings::bio>);

// SAFETY: Whoever owns a bio may end it from any task or interrupt.
unsafe impl Send for UpperBio {}

impl UpperBio {
    /// # Safety
    ///
    /// `bio` is valid and the block layer has handed its ownership to the caller.
    #[inline]
    pub(super) unsafe fn from_raw(bio: NonNull<bindings::bio>) -> Self {
        // INVARIANT: By the contract of this function.
        Self(bio)
    }

    #[inline]
    pub(super) fn as_ptr(&self) -> *mut bindings::bio {
        self.0.as_ptr()
    }

    #[inline]
    fn into_raw(self) -> *mut bindings::bio {
        let bio = self.0.as_ptr();
        core::mem::forget(self);
        bio
    }

    /// Operation and flags.
    #[inline]
    pub(crate) fn op_flags(&self) -> OpFlags {
        // SAFETY: By the type invariant; so for all field accesses below.
        OpFlags(unsafe { (*self.as_ptr()).bi_opf })
    }

    /// First sector on the loop device.
    #[inline]
    pub(crate) fn start_sector(&self) -> u64 {
        // SAFETY: By the type invariant. The structure may be packed: copied, not borrowed.
        unsafe { (*self.as_ptr()).bi_iter.bi_sector }
    }

    /// Length in bytes.
    #[inline]
    pub(crate) fn bytes(&self) -> u32 {
        // SAFETY: By the type invariant.
        unsafe { (*self.as_ptr()).bi_iter.bi_size }
    }

    /// Ends the bio. May be called from any context.
    #[inline]
    pub(crate) fn end(self, status: Status) {
        let bio = self.into_raw();
        // SAFETY: By the type invariant; ownership ends here.
        unsafe {
            if !status.is_ok() {
                (*bio).bi_status = status.0;
            }
            bindings::bio_endio(bio);
        }
    }

    /// Sends the bio on to the backing device, `offset` sectors further; its end is the backing
    /// device's business. Counts it as a read of the loop device.
    ///
    /// Must not be called from atomic context.
    #[inline]
    pub(crate) fn pass_read(self, backing: &BackingDevice, offset: u64) {
        let bio = self.into_raw();
        // SAFETY: By the type invariant the bio is ours to submit; the backing device is open. The
        // upper block device is open while a bio for it is under way.
        unsafe { shim::dtloop_bio_pass_read(bio, backing.as_ptr(), offset) }
    }

    /// Cuts the bio after `sectors` sectors (fewer than it has): gives the first part; the rest is
    /// submitted anew and comes back through `submit_bio`. `None` when the bio can not be cut and
    /// was ended.
    ///
    /// Must not be called from atomic context.
    pub(crate) fn split(self, sectors: u32) -> Option<Self> {
        let bio = self.into_raw();
        // SAFETY: By the type invariant; the bio set belongs to the disk that the bio is for, which
        // exists while a bio for it is under way.
        let first = unsafe {
            let set = &raw mut (*(*(*bio).bi_bdev).bd_disk).bio_split;
            bindings::bio_submit_split_bioset(bio, sectors, set)
        };
        // INVARIANT: The caller of `bio_submit_split_bioset` owns the first part.
        NonNull::new(first).map(Self)
    }

    /// Copies the data to `offset` of `pages`.
    ///
    /// The range must have been reserved for this bio: nobody else accesses it. Out of bounds
    /// nothing is copied and `ERANGE` returned.
    #[inline]
    pub(crate) fn copy_to(&self, pages: &Pages, offset: usize) -> Result {
        let end = offset.checked_add(self.bytes() as usize).ok_or(ERANGE)?;
        if end > pages.bytes() {
            return Err(ERANGE);
        }
        // SAFETY: The bio is valid by the type invariant and the range is in bounds.
        unsafe { pages::copy_bio(pages, offset, self.as_ptr()) };
        Ok(())
    }

    /// Begins to account the bio to its block device; gives what [`UpperBio::end_accounted`] needs.
    #[inline]
    pub(crate) fn account(&self) -> Accounting {
        // SAFETY: By the type invariant.
        Accounting(unsafe { bindings::bio_start_io_acct(self.as_ptr()) })
    }

    /// Ends the accounting and the bio.
    #[inline]
    pub(crate) fn end_accounted(self, started: Accounting, status: Status) {
        let bio = self.as_ptr();
        // SAFETY: By the type invariant; the bio was not remapped, so its device is the one that
        // `account` used.
        unsafe { bindings::bio_end_io_acct_remapped(bio, started.0, (*bio).bi_bdev) };
        self.end(status);
    }
}

impl Drop for UpperBio {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; ownership ends here.
        unsafe {
            (*self.as_ptr()).bi_status = Status::from(EIO).0;
            bindings::bio_endio(self.as_ptr());
        }
    }
}

/// When the accounting of a bio began, in jiffies.
#[derive(Clone, Copy)]
pub(crate) struct Accounting(kernel::ffi::c_ulong);

/// The place of an upper bio whose data was copied, until its change has ended or is given up: the
/// end of the lower bio and a forced detach both take it, and one of them gets it.
pub(crate) struct Parking {
    bio: AtomicPtr<bindings::bio>,
    started: AtomicU64,
    device: AtomicU32,
}

impl Parking {
    /// A free place.
    pub(crate) const fn new() -> Self {
        Self {
            bio: AtomicPtr::new(null_mut()),
            started: AtomicU64::new(0),
            device: AtomicU32::new(0),
        }
    }

    /// Puts a bio for `device` here. The place is free: it belongs to a slot of the gate, which the
    /// caller holds.
    #[inline]
    pub(crate) fn park(&self, device: u32, bio: UpperBio, started: Accounting) {
        self.device.store(device, Ordering::Relaxed);
        self.started.store(started.0 as u64, Ordering::Relaxed);
        // Release: whoever takes the bio sees the two.
        let earlier = self.bio.swap(bio.into_raw(), Ordering::AcqRel);
        if let Some(earlier) = NonNull::new(earlier) {
            // Never: but a bio must not be forgotten.
            // SAFETY: It was parked here, so it was owned.
            drop(unsafe { UpperBio::from_raw(earlier) });
        }
    }

    /// Takes the bio that is here.
    #[inline]
    pub(crate) fn take(&self) -> Option<(UpperBio, Accounting)> {
        let bio = NonNull::new(self.bio.swap(null_mut(), Ordering::AcqRel))?;
        let started = Accounting(self.started.load(Ordering::Relaxed) as kernel::ffi::c_ulong);
        // SAFETY: `park` put it here with its ownership, and the swap gives it to us alone.
        Some((unsafe { UpperBio::from_raw(bio) }, started))
    }

    /// Takes the bio if it is for `device`. The caller sees to it that the slot does not change
    /// hands meanwhile.
    pub(crate) fn take_if(&self, device: u32) -> Option<(UpperBio, Accounting)> {
        let here = !self.bio.load(Ordering::Acquire).is_null()
            && self.device.load(Ordering::Relaxed) == device;
        if here {
            self.take()
        } else {
            None
        }
    }
}
