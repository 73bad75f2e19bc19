// SPDX-License-Identifier: GPL-2.0-only

//! A large area of kernel memory made of equal pieces of physically contiguous pages.
//!
//! The pieces are as large as the allocator gives (up to [`ORDER_MAX`]), so that a payload spans few
//! of them: one segment of a bio each. They are split into single pages, so that userspace can map
//! them one by one and keep a page alive after the area is gone.
//!
//! C header: `include/linux/gfp.h`

use super::shim;
use crate::abi;
use core::{
    ffi::c_void,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};
use kernel::{
    bindings,
    mm::virt::VmaNew,
    page::PAGE_SIZE,
    prelude::*, //
};

/// Largest piece: 2 MiB.
const ORDER_MAX: u32 = 9;

/// Smallest piece of an area that is larger than one: 32 KiB, the largest order for which the
/// allocator still makes an effort (`PAGE_ALLOC_COSTLY_ORDER`).
const ORDER_MIN: u32 = 3;

/// An area may take at most this part of what the system could give without swapping: one half.
const AVAILABLE_SHARE: usize = 2;

// A bio takes at most `BIO_MAX_VECS` segments: the largest record must fit one, wherever it begins.
const _: () = assert!(
    (abi::RECORD_BYTES_MAX as usize >> ORDER_MIN) / PAGE_SIZE + 2
        <= bindings::BIO_MAX_VECS as usize
);

/// An area of memory.
///
/// # Invariants
///
/// Each of `pieces` is the address, in the direct map, of `1 << order` pages that this object owns
/// one reference of each; together they are `bytes` bytes, zeroed when they were allocated.
pub(crate) struct Pages {
    pieces: KVVec<NonNull<c_void>>,
    order: u32,
    bytes: usize,
}

// SAFETY: The memory belongs to the object; access is by raw copies and atomics whose callers
// argue exclusion.
unsafe impl Send for Pages {}
// SAFETY: As above.
unsafe impl Sync for Pages {}

impl Pages {
    /// Allocates `bytes` bytes, rounded up to whole pieces, all zero. `ENOMEM` when there is not
    /// twice as much memory to be had: nobody is killed for it.
    ///
    /// Must not be called from atomic context.
    pub(crate) fn new(bytes: usize) -> Result<Self> {
        let pages = bytes.div_ceil(PAGE_SIZE).max(1);
        // Who takes the last page before he fails has others killed for want of one.
        // SAFETY: Reads the kernel's own statistics.
        if pages > unsafe { shim::dtloop_available_pages() } / AVAILABLE_SHARE {
            return Err(ENOMEM);
        }
        let mut order = ORDER_MAX.min(pages.ilog2());
        loop {
            match Self::with_order(pages, order) {
                Ok(area) => return Ok(area),
                Err(e) if order <= ORDER_MIN => return Err(e),
                // Memory is fragmented: smaller pieces may do, at the cost of more segments.
                Err(_) => order = order.saturating_sub(3).max(ORDER_MIN),
            }
        }
    }

    fn with_order(pages: usize, order: u32) -> Result<Self> {
        let count = pages.div_ceil(1 << order);
        let mut area = Self {
            pieces: KVVec::with_capacity(count, GFP_KERNEL)?,
            order,
            bytes: (count << order) * PAGE_SIZE,
        };
        // An operator may ask for more than there is. That is an error to be read: no warning in the
        // log, and no out-of-memory killing for the sake of a ring. For the large orders the
        // allocator does not kill anyway; for the smallest one it has to be told.
        let mut flags = bindings::GFP_KERNEL | bindings::__GFP_ZERO | bindings::__GFP_NOWARN;
        if order <= ORDER_MIN {
            // SAFETY: A constant.
            flags |= unsafe { shim::dtloop_gfp_retry_mayfail };
        }
        for _ in 0..count {
            // SAFETY: A plain page allocation in sleepable context. Not from highmem, so what it
            // gives is an address in the direct map.
            let address = unsafe { bindings::get_free_pages_noprof(flags, order) };
            let Some(address) = NonNull::new(address as *mut c_void) else {
                return Err(ENOMEM);
            };
            if order > 0 {
                // SAFETY: Just allocated with this order, without `__GFP_COMP`.
                unsafe { bindings::split_page(shim::dtloop_virt_to_page(address.as_ptr()), order) };
            }
            // INVARIANT: The capacity was reserved above.
            area.pieces.push(address, GFP_KERNEL)?;
        }
        Ok(area)
    }

    /// Length in bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Logarithm of the size of a piece in bytes.
    #[inline]
    pub(super) fn piece_shift(&self) -> u32 {
        PAGE_SIZE.ilog2().wrapping_add(self.order)
    }

    /// The addresses of the pieces.
    #[inline]
    pub(super) fn pieces(&self) -> *const *mut c_void {
        self.pieces.as_ptr().cast()
    }

    /// Most segments that a range of `bytes` can be made of.
    #[inline]
    pub(crate) fn segments(&self, bytes: u32) -> u16 {
        // A range that does not begin with a piece touches one more.
        let pieces = bytes.wrapping_shr(self.piece_shift()).wrapping_add(2);
        u16::try_from(pieces).unwrap_or(u16::MAX)
    }

    /// Address of byte `offset`, and how many bytes follow in its piece; `None` beyond the end.
    ///
    /// The arithmetic wraps instead of checking: a shift is at most 21, and it is in the way of every
    /// change.
    #[inline]
    fn at(&self, offset: usize) -> Option<(*mut u8, usize)> {
        let shift = self.piece_shift();
        let size = 1_usize.wrapping_shl(shift);
        let inside = offset & size.wrapping_sub(1);
        let piece = self.pieces.get(offset.wrapping_shr(shift))?;
        // SAFETY: `inside` is smaller than the piece.
        let address = unsafe { piece.as_ptr().cast::<u8>().add(inside) };
        Some((address, size.wrapping_sub(inside)))
    }

    /// Calls `f` with each contiguous part of a range: its page, offset in the page and length.
    pub(super) fn for_each_segment(
        &self,
        mut offset: usize,
        bytes: usize,
        mut f: impl FnMut(*mut bindings::page, u32, u32),
    ) {
        let mut left = bytes;
        while left > 0 {
            let Some((address, room)) = self.at(offset) else {
                return;
            };
            let part = room.min(left);
            // SAFETY: The address lies in the direct map, by the type invariant.
            let page = unsafe { shim::dtloop_virt_to_page(address.cast()) };
            let in_page = address.addr() & (PAGE_SIZE - 1);
            f(page, in_page as u32, part as u32);
            offset = offset.wrapping_add(part);
            left = left.wrapping_sub(part);
        }
    }

    /// Stores a value of `T` at `offset`, which must be a multiple of its alignment; the value must
    /// not cross a piece. Out of bounds nothing happens.
    ///
    /// The reader finds it complete after an acquire of something stored with release later.
    #[inline]
    pub(crate) fn write<T: Copy>(&self, offset: usize, value: T) {
        if let Some((address, room)) = self.at(offset) {
            if room >= size_of::<T>() && address.addr() % align_of::<T>() == 0 {
                // SAFETY: In bounds and aligned. Volatile, as userspace may look at the page; the
                // object is never borrowed as a Rust reference to this memory.
                unsafe { address.cast::<T>().write_volatile(value) }
            }
        }
    }

    /// Loads a value of `T`; see [`Pages::write`]. `None` out of bounds.
    #[inline]
    pub(crate) fn read<T: Copy + kernel::transmute::FromBytes>(&self, offset: usize) -> Option<T> {
        let (address, room) = self.at(offset)?;
        if room < size_of::<T>() || address.addr() % align_of::<T>() != 0 {
            return None;
        }
        // SAFETY: In bounds and aligned, and any bytes are a `T`.
        Some(unsafe { address.cast::<T>().read_volatile() })
    }

    /// The 64-bit word at `offset`, shared with userspace; `None` if out of bounds or unaligned.
    #[inline]
    pub(crate) fn atomic(&self, offset: usize) -> Option<&AtomicU64> {
        let (address, _room) = self.at(offset)?;
        if address.addr() % 8 != 0 {
            return None;
        }
        // SAFETY: In bounds, as pieces are multiples of eight bytes, and aligned; it lives as long
        // as `self`. Userspace and this module access it atomically only.
        Some(unsafe { AtomicU64::from_ptr(address.cast()) })
    }

    /// Calls `f` with each contiguous part of a range as bytes.
    ///
    /// The caller sees to it that nothing in the kernel writes to the range meanwhile.
    pub(crate) fn for_each_slice(
        &self,
        mut offset: usize,
        bytes: usize,
        mut f: impl FnMut(&[u8]) -> Result,
    ) -> Result {
        let mut left = bytes;
        while left > 0 {
            let (address, room) = self.at(offset).ok_or(ERANGE)?;
            let part = room.min(left);
            // SAFETY: In bounds and initialised (zeroed at allocation). Userspace maps these pages
            // read-only, and by the contract of this function the kernel does not write to them.
            f(unsafe { core::slice::from_raw_parts(address, part) })?;
            offset = offset.wrapping_add(part);
            left = left.wrapping_sub(part);
        }
        Ok(())
    }

    /// Maps the range from `first` on, `bytes` long, into `vma` at `at` bytes from its start.
    ///
    /// All multiples of a page.
    pub(crate) fn map(&self, vma: &VmaNew, at: usize, first: usize, bytes: usize) -> Result {
        if at
            .checked_add(bytes)
            .is_none_or(|end| end > vma.end() - vma.start())
        {
            return Err(EINVAL);
        }
        for offset in (0..bytes).step_by(PAGE_SIZE) {
            let (address, _room) = self.at(first + offset).ok_or(EINVAL)?;
            // SAFETY: The address lies in the direct map; the page has a reference of its own as
            // the piece was split; the target address lies in the vma, as checked above.
            kernel::error::to_result(unsafe {
                bindings::vm_insert_page(
                    vma.as_ptr(),
                    vma.start() + at + offset,
                    shim::dtloop_virt_to_page(address.cast()),
                )
            })?;
        }
        Ok(())
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        for piece in self.pieces.iter() {
            for index in 0..1_usize.wrapping_shl(self.order) {
                // SAFETY: By the type invariant each page of the piece is ours.
                unsafe {
                    let address = piece
                        .as_ptr()
                        .cast::<u8>()
                        .add(index.wrapping_mul(PAGE_SIZE));
                    bindings::__free_pages(shim::dtloop_virt_to_page(address.cast()), 0);
                }
            }
        }
    }
}

/// A full memory barrier between an atomic store and a later load.
#[inline]
pub(crate) fn full_fence() {
    core::sync::atomic::fence(Ordering::SeqCst);
}

/// Copies the data of `bio`, `bytes` long, to `offset` of `pages`.
///
/// # Safety
///
/// `bio` is valid and carries data; the range lies inside `pages` and nobody else accesses it.
#[inline]
pub(super) unsafe fn copy_bio(pages: &Pages, offset: usize, bio: *mut bindings::bio) {
    // SAFETY: By the contract of this function.
    unsafe {
        shim::dtloop_bio_copy_out(bio, pages.pieces(), pages.piece_shift(), offset as u64);
    }
}
