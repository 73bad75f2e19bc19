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
//! There is no queue but the ring: a record stays there until the target holds it durably, so a
//! killed agent and a cut connection lose nothing. `set` holds the thread of a set, `link` its
//! connection, `control` the socket for `dtloop`. What decides is in `dtloop-core`.

#![forbid(unsafe_code)]

pub mod clock;
pub mod config;
pub mod control;
pub mod link;
pub mod machine;
pub mod set;
pub mod ship;
pub mod snapshot;
pub mod streams;

/// Name and version as told to the peer.
#[must_use]
pub fn software() -> String {
    concat!("dtagent ", env!("CARGO_PKG_VERSION")).to_owned()
}
pub mod verify_config;
