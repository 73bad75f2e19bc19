// SPDX-License-Identifier: GPL-2.0-only

//! What the stories run inside a test machine.
//!
//! - `dtctl`: the control device without comfort, and callers that break the rules.
//! - `dtdrain`: a consumer of a capture stream that applies the records to replicas.
//! - `dtstamp`: writes stamped sectors, and proves that an image shows a legal prefix of what was written.
//! - `dtscribble`: odd I/O: buffers that change in flight, strange shapes, overlaps.

pub mod compare;
pub mod detach;
pub mod direct;
pub mod drain;
pub mod hostile;
pub mod random;
pub mod replica;
pub mod stamp;
pub mod starve;
pub mod stop;
