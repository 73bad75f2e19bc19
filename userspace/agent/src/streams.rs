// SPDX-License-Identifier: GPL-2.0-only

//! Where capture streams come from: the kernel module, or a test.

use std::sync::Arc;

use dtloop_abi::{CaptureStream, Control, Stream};

/// Finds and opens capture streams.
pub trait Streams: Send + Sync {
    /// The stream of a set; an error is the reason for which there is none just now.
    ///
    /// # Errors
    ///
    /// A sentence for people.
    fn open(&self, set: &str) -> Result<Arc<dyn CaptureStream>, String>;
}

/// The streams of the kernel module.
#[derive(Debug, Default)]
pub struct KernelStreams;

impl Streams for KernelStreams {
    fn open(&self, set: &str) -> Result<Arc<dyn CaptureStream>, String> {
        let control = Control::open().map_err(|error| error.to_string())?;
        let status = control
            .stream_by_name(set)
            .map_err(|error| error.to_string())?
            .ok_or_else(|| {
                format!("no device is attached to set \"{set}\"; attach one with dtloop attach")
            })?;
        let stream = Stream::open(status.stream_id).map_err(|error| error.to_string())?;
        Ok(Arc::new(stream))
    }
}
