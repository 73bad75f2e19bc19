// SPDX-License-Identifier: GPL-2.0-only

//! Lower bios, each with room for the driver's own state in front of it.
//!
//! One allocation a change: the bio, its first segments and the state `T` come from one mempool.
//! It guarantees progress when memory is short as long as nobody waits for a bio of a set while he
//! holds what a bio of the same set waits for.
//!
//! C header: `include/linux/bio.h`

use super::{
    bio::{OpFlags, Status, UpperBio},
    block_device::BackingDevice,
    pages::Pages,
    shim, //
};
use core::{marker::PhantomData, ptr::NonNull};
use kernel::{
    bindings,
    prelude::*,
    types::Opaque, //
};

/// Bios that are there for progress when memory is short.
const POOL: u32 = 64;

/// With `nowait` the allocation neither sleeps nor complains; else it may do anything but I/O.
#[inline]
fn gfp(nowait: bool) -> bindings::gfp_t {
    if nowait {
        bindings::GFP_NOWAIT
    } else {
        // SAFETY: A constant.
        unsafe { shim::dtloop_gfp_noio }
    }
}

/// State that travels with a lower bio.
pub(crate) trait LowerState: Sized + Send {
    /// Called once when the bio has ended, maybe in interrupt context.
    fn ended(self, status: Status);
}

/// A `struct bio_set` whose bios carry a `T`.
///
/// # Invariants
///
/// `set` is initialised, pinned, and its front pad holds a `T`.
#[pin_data(PinnedDrop)]
pub(crate) struct BioSet<T: LowerState> {
    #[pin]
    set: Opaque<bindings::bio_set>,
    state: PhantomData<fn(T) -> T>,
}

// SAFETY: A bio set has its own locks.
unsafe impl<T: LowerState> Send for BioSet<T> {}
// SAFETY: As above.
unsafe impl<T: LowerState> Sync for BioSet<T> {}

impl<T: LowerState> BioSet<T> {
    /// Room for a `T` in front of each bio; keeps the bio aligned to eight bytes.
    const FRONT_PAD: u32 = {
        assert!(align_of::<T>() <= 8);
        (size_of::<T>() as u32).next_multiple_of(8)
    };

    /// Initialises a set.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            set <- Opaque::try_ffi_init(|slot: *mut bindings::bio_set| {
                // SAFETY: `slot` is valid for writes and stays pinned; `bioset_init` wants it zeroed.
                kernel::error::to_result(unsafe {
                    core::ptr::write_bytes(slot, 0, 1);
                    bindings::bioset_init(
                        slot,
                        POOL,
                        Self::FRONT_PAD,
                        shim::dtloop_bioset_need_bvecs as i32,
                    )
                })
            }),
            state: PhantomData,
        })
    }

    /// Allocates an empty bio with room for `segments` segments. When memory is short it sleeps until
    /// another bio of the set ends; with `nowait` it does not sleep and gives `EAGAIN`. It gets its
    /// device by [`LowerBio::inherit`] or [`LowerBio::bind`]: with the allocation it would be charged
    /// to the current task's cgroup, which is the wrong one for what a kernel thread writes back,
    /// and be charged anew then.
    #[inline]
    pub(crate) fn alloc(
        &self,
        op_flags: OpFlags,
        segments: u16,
        nowait: bool,
    ) -> Result<LowerBio<T>> {
        // SAFETY: The set is valid by the type invariant; the device may be null.
        let bio = unsafe {
            bindings::bio_alloc_bioset(
                core::ptr::null_mut(),
                segments,
                op_flags.0,
                gfp(nowait),
                self.set.get(),
            )
        };
        LowerBio::new(bio)
    }

    /// Allocates a bio that shares the data of `upper`, for a change that is not captured; `nowait` as
    /// for [`BioSet::alloc`].
    pub(crate) fn clone_of(
        &self,
        backing: &BackingDevice,
        upper: &UpperBio,
        nowait: bool,
    ) -> Result<LowerBio<T>> {
        // SAFETY: As for `alloc`; `upper` is valid and outlives the clone as it is ended by the
        // clone's end only.
        let bio = unsafe {
            bindings::bio_alloc_clone(
                backing.as_ptr(),
                upper.as_ptr(),
                gfp(nowait),
                self.set.get(),
            )
        };
        LowerBio::new(bio)
    }
}

#[pinned_drop]
impl<T: LowerState> PinnedDrop for BioSet<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariant; all bios have ended, as each one's state keeps the owner
        // of the set alive.
        unsafe { bindings::bioset_exit(self.set.get()) }
    }
}

/// A bio to the backing device that was not submitted yet.
///
/// # Invariants
///
/// A valid bio from a `BioSet<T>`, owned by this object, its front pad not initialised.
pub(crate) struct LowerBio<T: LowerState> {
    bio: NonNull<bindings::bio>,
    state: PhantomData<T>,
}

impl<T: LowerState> LowerBio<T> {
    /// `EAGAIN` for null: there was no memory, and the caller would not wait. An allocation that may
    /// wait does not fail, as it takes from the mempool in the end.
    #[inline]
    fn new(bio: *mut bindings::bio) -> Result<Self> {
        // INVARIANT: Just allocated from a `BioSet<T>`.
        Ok(Self {
            bio: NonNull::new(bio).ok_or(EAGAIN)?,
            state: PhantomData,
        })
    }

    /// First sector on the backing device.
    #[inline]
    pub(crate) fn set_start_sector(&mut self, sector: u64) {
        // SAFETY: By the type invariant.
        unsafe { (*self.bio.as_ptr()).bi_iter.bi_sector = sector }
    }

    /// Operation and flags.
    #[inline]
    pub(crate) fn set_op_flags(&mut self, op_flags: OpFlags) {
        // SAFETY: By the type invariant.
        unsafe { (*self.bio.as_ptr()).bi_opf = op_flags.0 }
    }

    /// Length of a bio without data, in bytes.
    #[inline]
    pub(crate) fn set_bytes(&mut self, bytes: u32) {
        // SAFETY: By the type invariant.
        unsafe { (*self.bio.as_ptr()).bi_iter.bi_size = bytes }
    }

    /// Adds a range of `pages` as data. The bio was allocated with [`Pages::segments`] segments, so
    /// it has the room; `EIO` if not: a bio that lacks data must not be submitted.
    #[inline]
    pub(crate) fn add_pages(&mut self, pages: &Pages, offset: usize, bytes: u32) -> Result {
        let mut added = 0;
        pages.for_each_segment(offset, bytes as usize, |page, in_page, part| {
            // SAFETY: The bio is valid; the page belongs to `pages`, which the state keeps alive.
            let one = unsafe { bindings::bio_add_page(self.bio.as_ptr(), page, part, in_page) };
            added = one.wrapping_add(added);
        });
        if u32::try_from(added) == Ok(bytes) {
            Ok(())
        } else {
            Err(EIO)
        }
    }

    /// Sets the device, and takes over from `upper` what the block layer wants to know about its
    /// origin: cgroup, priority and lifetime hints.
    #[inline]
    pub(crate) fn inherit(&mut self, backing: &BackingDevice, upper: &UpperBio) {
        let (from, to) = (upper.as_ptr(), self.bio.as_ptr());
        // SAFETY: Both bios are valid; the device is open. A fresh bio has no flags and no cgroup.
        unsafe {
            (*to).bi_bdev = backing.as_ptr();
            (*to).bi_ioprio = (*from).bi_ioprio;
            (*to).bi_write_hint = (*from).bi_write_hint;
            bindings::bio_clone_blkg_association(to, from);
        }
    }

    /// Sets the device of a bio that the current task itself asks for.
    pub(crate) fn bind(&mut self, backing: &BackingDevice) {
        // SAFETY: The bio is valid, the device is open.
        unsafe { shim::dtloop_bio_set_dev(self.bio.as_ptr(), backing.as_ptr()) }
    }

    /// Submits the bio; `state` gets its end.
    ///
    /// Must not be called from atomic context.
    #[inline]
    pub(crate) fn submit(self, state: T) {
        let bio = self.bio.as_ptr();
        core::mem::forget(self);
        // SAFETY: The front pad in front of the bio holds a `T` and is not initialised; the bio is
        // ours to submit.
        unsafe {
            Self::pad(bio).write(state);
            (*bio).bi_end_io = Some(Self::end_io);
            bindings::submit_bio_noacct(bio);
        }
    }

    /// # Safety
    ///
    /// `bio` came from a `BioSet<T>`.
    #[inline]
    unsafe fn pad(bio: *mut bindings::bio) -> *mut T {
        // SAFETY: The set was initialised with this front pad.
        unsafe {
            bio.cast::<u8>()
                .sub(BioSet::<T>::FRONT_PAD as usize)
                .cast::<T>()
        }
    }

    /// # Safety
    ///
    /// Called by the block layer, once, at the end of a bio that `submit` submitted.
    unsafe extern "C" fn end_io(bio: *mut bindings::bio) {
        // SAFETY: `submit` initialised the pad; it is read once. The bio's reference is ours to put,
        // before the state goes, which keeps the set alive.
        let (state, status) = unsafe {
            let state = Self::pad(bio).read();
            let status = Status((*bio).bi_status);
            bindings::bio_put(bio);
            (state, status)
        };
        state.ended(status);
    }
}

impl<T: LowerState> Drop for LowerBio<T> {
    fn drop(&mut self) {
        // SAFETY: By the type invariant; never submitted, so this is the only reference.
        unsafe { bindings::bio_put(self.bio.as_ptr()) }
    }
}
