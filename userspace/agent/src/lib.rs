// SPDX-License-Identifier: GPL-2.0-only

//! `dtagent`: drains the capture streams of this machine and ships them to their targets.
//!
//! ```text
//!  kernel                     one thread a set                            target
//!  ring (mmap) --records--> header and body of each into a scratch  ---> one writev a batch,
//!   ^                       buffer, payload straight from the ring        payload from the ring
//!   +------- released <----- acknowledged: durable on the target    <---
//! ```
//!
//! A record stays in the ring until the target or the set's disk queue (`queue`, filled by `spooler`) holds it durably, so
//! a killed agent and a cut connection lose nothing. `set` holds the thread of a set, `link` its
//! connection, `pairing` how that comes to be trusted, `control` the socket for `dtloop`. What decides is in `dtloop-core`.

#![forbid(unsafe_code)]

pub mod clock;
pub mod config;
pub mod control;
pub mod link;
pub mod machine;
pub mod pairing;
pub mod queue;
pub mod set;
pub mod shaper;
pub mod ship;
pub mod site;
pub mod snapshot;
pub mod spooler;
pub mod streams;

/// Name and version as told to the peer.
#[must_use]
pub fn software() -> String {
    concat!("dtagent ", env!("CARGO_PKG_VERSION")).to_owned()
}
pub mod verify_config;
