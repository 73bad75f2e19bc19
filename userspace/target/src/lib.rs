// SPDX-License-Identifier: GPL-2.0-only

//! `dttarget`: receives the changes of sources, journals, acknowledges and applies them.
//!
//! ```text
//!             session thread (one a connection)             applier thread (one a set)
//!  socket --> read a buffer full, unpack what is packed,
//!             check every frame,
//!             check the sequence
//!             journal: one write, one fdatasync
//!             acknowledge durable  <----------------------- acknowledge applied, hash results
//!             pass the buffer on  --------------------->    write to the volumes in order, or to overlays
//!                                                           checkpoint: fdatasync the volumes,
//!             use segments again  <-----------------------  make the state durable
//! ```
//!
//! The bytes of a record are copied by the kernel only: from the socket into a buffer, from the
//! buffer into the journal and into the volume. What decides is in `dtloop-core`.

#![forbid(unsafe_code)]

pub mod applier;
pub mod catalog;
pub mod clock;
pub mod config;
pub mod confine;
mod findings;
mod guard;
pub mod journal;
pub mod outlet;
pub mod overlay;
pub mod replica;
pub mod server;
pub mod session;
pub mod settle;
pub mod strangers;
pub mod transport;
pub mod trust;
pub mod unpack;
pub mod volume;

/// Name and version as told to the peer.
#[must_use]
pub fn software() -> String {
    concat!("dttarget ", env!("CARGO_PKG_VERSION")).to_owned()
}
