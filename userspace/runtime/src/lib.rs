// SPDX-License-Identifier: GPL-2.0-only

//! What the daemons use of the system where they wait: the time, threads, locks that are held for long, channels, sockets.
//!
//! In the programs all of it is the standard library, and this crate only another name for it. With the feature `simulation`
//! the same names belong to a world ([`World`]) that `tests/simulation` makes: its time goes on when everybody waits, its
//! threads take turns at the places where they wait, its network loses what a schedule says, and a machine of it can be
//! switched off at any of these places. So the simulation runs the agent and the target as they are, and not a model of them.
//!
//! # The rule
//!
//! Nothing in `dtloop-agent` and `dtloop-target` that the simulation runs may wait, or read a clock, but through here: in a
//! simulation it would wait for ever, or see another time. What only the programs run (`main.rs`, the control socket) may use
//! the standard library. A lock that is not held while its holder waits needs nothing of this.

#![forbid(unsafe_code)]

#[cfg(not(feature = "simulation"))]
mod real;
#[cfg(feature = "simulation")]
mod simulated;

#[cfg(not(feature = "simulation"))]
pub use real::*;
#[cfg(feature = "simulation")]
pub use simulated::*;
