// SPDX-License-Identifier: GPL-2.0-only

//! What is said on the agent's control socket.
//!
//! The socket is a Unix stream socket, [`SOCKET_PATH`], for root only. A client sends one
//! [`Request`] as one line of JSON. The agent answers with lines of JSON: any number of
//! [`Reply::Progress`], then one last line, [`Reply::Done`] or [`Reply::Failed`]. Then the client
//! may send its next request on the same connection.
//!
//! A client that goes away changes nothing: what it had started goes on. Fields are only ever
//! added, and an older reader ignores those it does not know.
//!
//! ```text
//! -> {"request":"wait","set":"default","timeout_ms":5000}
//! <- {"reply":"progress","set":"default","wait":{"seq":812,"applied_seq":730}}
//! <- {"reply":"done","wait":{"seq":812,"elapsed_ms":41}}
//! ```
//!
//! - `types`: requests and replies; `shaping`: those about bandwidth and compression.
//! - `line`: one JSON value a line, with a limit, for both sides.
//! - `client`: the asking side.

mod client;
mod line;
mod shaping;
mod types;

pub use client::{Answer, Client, ClientError};
pub use line::{LineError, read_line, write_line};
pub use shaping::*;
pub use types::*;

/// Where the agent listens.
pub const SOCKET_PATH: &str = "/run/dtloop/agent.sock";

/// Version of this interface, reported in [`Status`].
pub const API_VERSION: u32 = 1;

/// Longest request line in bytes: a list of all devices of a set takes a few thousand.
pub const REQUEST_BYTES_MAX: usize = 64 * 1024;

/// Longest reply line in bytes. The status of the most streams a module can have (256), each
/// with some ten devices of about 1 KiB, fits.
pub const REPLY_BYTES_MAX: usize = 4 * 1024 * 1024;
