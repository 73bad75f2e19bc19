// SPDX-License-Identifier: GPL-2.0-only

//! Bugs that the simulation must find, each at the place where somebody might make it. A simulation that finds none of them
//! proves nothing.
//!
//! Without the feature `hatch`, [`bites`] is the constant `false`, and nothing of any bug is in a program; with it, a program
//! does not compile ([`HATCHED`]).

#![forbid(unsafe_code)]

#[cfg(feature = "hatch")]
use std::cell::Cell;

/// Whether bugs can be let out at all.
pub const HATCHED: bool = cfg!(feature = "hatch");

/// A bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Canary {
    /// The target acknowledges a batch before its journal is durable.
    AckedBeforeSync,
    /// The target's checkpoint says more than the volumes hold durably.
    CheckpointBeforeSync,
    /// The journal is replayed into the volume while the set is staged.
    StagedReplayedInPlace,
    /// What is staged is published before it is whole.
    PublishedTooSoon,
    /// The agent releases what it has sent.
    ReleasedWhenSent,
    /// A gap in the stream does not lose the order.
    GapsIgnored,
    /// The order is declared whole again while blocks are dirty.
    RestoredTooSoon,
    /// The agent takes the marks of the intent file for enough when they are not.
    MarksTrusted,
    /// Regions are settled that were not compared.
    SettledTooSoon,
    /// The agent has the kernel's marks go while the source's own disk has the change in its cache.
    MarksGoUnflushed,
    /// The journal is replayed as it is in memory, where a killed program had put it.
    ReplayedUnsynced,
    /// A target that could not finish taking up a stream goes on with the number of the one before.
    HalfTakenUp,
    /// What misses the stream behind a mirror under way is sent after the copy is declared whole.
    MirrorLeftOutOfResync,
}

impl Canary {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::ReplayedUnsynced,
        Self::HalfTakenUp,
        Self::AckedBeforeSync,
        Self::CheckpointBeforeSync,
        Self::StagedReplayedInPlace,
        Self::PublishedTooSoon,
        Self::ReleasedWhenSent,
        Self::GapsIgnored,
        Self::RestoredTooSoon,
        Self::MarksTrusted,
        Self::SettledTooSoon,
        Self::MarksGoUnflushed,
        Self::MirrorLeftOutOfResync,
    ];
}

#[cfg(feature = "hatch")]
thread_local! {
    static OUT: Cell<Option<Canary>> = const { Cell::new(None) };
}

/// Lets one out on this thread, or none.
#[cfg(feature = "hatch")]
pub fn let_out(canary: Option<Canary>) {
    OUT.with(|out| out.set(canary));
}

/// Whether this one is out.
#[cfg(feature = "hatch")]
#[must_use]
pub fn bites(canary: Canary) -> bool {
    OUT.with(Cell::get) == Some(canary)
}

/// None is.
#[cfg(not(feature = "hatch"))]
#[must_use]
#[inline]
pub const fn bites(_: Canary) -> bool {
    false
}
