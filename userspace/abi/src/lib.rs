// SPDX-License-Identifier: GPL-2.0-only

//! Safe access to the DTLOOP kernel module.
//!
//! - [`raw`] is the binary interface itself, the same file that the module is built from.
//! - [`Control`] is `/dev/dtloop-control`: streams and devices come, change and go.
//! - [`Stream`] is `/dev/dtloop-stream<ID>`: the one consumer of a capture stream, with its
//!   [`Ring`]. [`CaptureStream`] is what an agent needs of it, so that an agent can be tested
//!   against the model in [`testing`] (feature `testing`).
//!
//! # Records stay readable while they are held
//!
//! The ring is memory that the kernel overwrites once a record has been released. Records are
//! therefore read through a [`Hold`]: as long as it lives, nothing from its first record on is
//! released, whatever [`Ring::release`] was asked for meanwhile, so a payload slice borrowed from
//! it can never change under its reader.
//!
//! ```no_run
//! use dtloop_abi::{CaptureStream, Stream};
//!
//! # fn main() -> dtloop_abi::Result<()> {
//! let stream = Stream::open(1)?;
//! let ring = stream.ring();
//! let mut next = ring.released();
//! loop {
//!     let hold = ring.hold(next)?;
//!     for record in hold.iter() {
//!         let record = record?;
//!         println!("{} {}", record.desc.seq, record.payload.len());
//!     }
//!     next = hold.end();
//!     drop(hold);
//!     ring.release(next)?;
//!     if ring.space_wanted() {
//!         stream.kick()?;
//!     }
//!     if ring.arm_wake(next) {
//!         stream.poll(None)?;
//!     }
//! }
//! # }
//! ```
//!
//! [`LoopControl`] is the stock loop driver's control device, for the tools that make room beside
//! it.
//!
//! [`serve_block_io`] is for a consumer for which writers may have to wait.
//!
//! [`limit_unsent`] is no matter of the module, but of TCP: it is here because a library that offers it is not in use.
//!
//! Apart from the mapping and the system calls in this crate, DTLOOP's userspace has no unsafe
//! code.

mod control;
mod disk;
mod error;
mod ffi;
mod intent;
mod loop_control;
mod name;
#[expect(
    clippy::cast_possible_truncation,
    reason = "the size in an ioctl number is asserted to fit"
)]
#[path = "../../../kmod/abi.rs"]
pub mod raw;
mod ring;
mod serve;
mod socket;
mod stream;
#[cfg(feature = "testing")]
pub mod testing;

pub use control::{
    AttachRequest, Attached, Backing, CONTROL_PATH, Control, StreamRequest, Throttle,
};
pub use disk::BackingBlocks;
pub use error::{Error, Operation, Result};
pub use intent::{Found, IntentRequest};
pub use loop_control::{LOOP_CONTROL_PATH, LoopControl};
pub use name::{Name, bytes_to_str};
pub use ring::{Geometry, Hold, Record, Ring};
pub use serve::serve_block_io;
pub use socket::limit_unsent;
pub use stream::{CaptureStream, Extent, Stream, SyncRequest, stream_path};
