// SPDX-License-Identifier: GPL-2.0-only

//! A journal: batches of frames, appended to segment files, made durable, read back in order, released from the
//! front. The target journals with it what it receives, the agent queues with it what it cannot ship.
//!
//! ```text
//!   released                            durable      end
//!      |                                   |          |
//!  [ segment 4 ]  [ segment 5 ]  [ segment 6          |    ]   spare files
//!         ^ used again as 7         Journal::sync ^   ^ Journal::append
//! ```
//!
//! - **Nothing is taken for a batch that was not appended as one**, whatever a crash leaves: see [`layout`].
//! - **After an error the journal ends at [`Journal::durable`]**: what was appended since the last [`Journal::sync`] that
//!   succeeded counts as not written, and is cut off before anything else is written in its place. Until the next call that
//!   succeeds a crash may still bring it back.
//! - **It never waits.** A journal at its size says [`AppendError::Full`]; the caller decides what to do until it
//!   has released something.
//!
//! Reading needs no `Journal`: a [`Reader`] goes over the files from any place on, also beside the `Journal` that
//! appends to them, up to the place that it gave out last.

#![forbid(unsafe_code)]

pub mod layout;
mod reader;
mod writer;

use std::io;
use std::path::{Path, PathBuf};

use dtloop_disk::Disk;
use dtloop_proto::Uuid;
use serde::{Deserialize, Serialize};

pub use reader::{Batch, Reader};
pub use writer::Journal;

/// A place in the journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// Segment number; 0: before the first.
    pub segment: u64,
    /// Offset in the segment in bytes.
    pub offset: u64,
}

/// How a journal is kept.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Most bytes it takes; at least two segments are.
    pub bytes: u64,
    /// Bytes of a segment file. A batch must fit: header blocks, frames and padding.
    pub segment_bytes: u64,
    /// The file system keeps at least so many bytes free; segments that exist are used again all the same.
    pub min_free: u64,
    /// Whose it is. Files of another owner are not read.
    pub owner: Uuid,
    /// A number that nobody can guess, drawn for this opening; see [`layout`].
    pub salt: u64,
}

/// What belongs to a batch besides its frames.
#[derive(Clone, Copy, Debug)]
pub struct BatchInfo {
    /// Number of frames.
    pub frames: u32,
    /// CRC-32 of their headers, one after the other.
    pub digest: u32,
    /// Record expected before.
    pub first_seq: u64,
    /// Record expected behind.
    pub next_seq: u64,
}

/// Why nothing was appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The file system. What was appended since the last sync is gone as well.
    #[error("Journal {} cannot be written", dir.display())]
    Io {
        /// Where.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// All segments are in use; nothing has changed.
    #[error("Journal {} is full: {bytes} bytes are in use", dir.display())]
    Full {
        /// Where.
        dir: PathBuf,
        /// Bytes of all its segments.
        bytes: u64,
    },
    /// Another segment would leave too little space for others; nothing has changed.
    #[error("Journal {} cannot grow: {free} bytes are free, {min_free} of them are to stay so", dir.display())]
    Space {
        /// Where.
        dir: PathBuf,
        /// Bytes that are free.
        free: u64,
        /// Bytes that are to stay free.
        min_free: u64,
    },
}

fn segment_path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("{number:016}.seg"))
}

/// Numbers of the segment files in a directory, ascending.
fn segment_numbers(disk: &dyn Disk, dir: &Path) -> io::Result<Vec<u64>> {
    let number = |name: &String| name.strip_suffix(".seg")?.parse::<u64>().ok();
    let names = match disk.list(dir) {
        Ok(names) => names,
        // A journal that was never opened.
        Err(error) if error.kind() == io::ErrorKind::NotFound => vec![],
        Err(error) => return Err(error),
    };
    let mut numbers: Vec<u64> = names.iter().filter_map(number).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

#[cfg(test)]
mod tests;
