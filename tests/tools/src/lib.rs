// SPDX-License-Identifier: GPL-2.0-only

//! What the stories run inside a test machine.
//!
//! - `dtctl`: the control device without comfort, and callers that break the rules.
//! - `dtdrain`: a consumer of a capture stream that applies the records to replicas.
//! - `dtstamp`: writes stamped sectors, and proves that an image shows a legal prefix of what was written.
//! - `dtwritelog`: logs of the device-mapper target `log-writes`, replayed and compared.
//! - `dtscribble`: odd I/O: buffers that change in flight, strange shapes, overlaps.

pub mod compare;
pub mod detach;
pub mod direct;
pub mod drain;
pub mod hostile;
pub mod intent_file;
pub mod random;
pub mod replica;
pub mod stamp;
pub mod stamp_plan;
pub mod starve;
pub mod stop;
pub mod write_history;
pub mod write_log;
