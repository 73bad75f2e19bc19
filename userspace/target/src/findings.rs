// SPDX-License-Identifier: GPL-2.0-only

//! The target's own log of what comparisons found, `<set>/verify.log`: the data of both sides at the same position, so
//! that both can be asked later which of them was the damaged one.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use dtloop_disk::Disk;
use dtloop_proto::limits::SECTOR_BYTES;
use dtloop_proto::message::Mismatch;
use dtloop_store::log::{LOG_BYTES_MAX, Log};
use serde::Serialize;

/// Ranges that differed and are remembered until they are equal.
const RANGES_MAX: usize = 4096;

/// A line of the log, in the words of the log of the source.
#[derive(Debug, Serialize)]
struct Entry {
    unix_ms: u64,
    job: u64,
    event: &'static str,
    label: String,
    start: u64,
    bytes: u64,
    seq: u64,
    source: String,
    target: Option<String>,
}

/// See the module documentation.
pub(crate) struct Findings {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    log: Option<Log>,
    entries: Vec<Entry>,
    differing: BTreeSet<(u32, u64, u32)>,
}

fn hex(hash: &[u8]) -> String {
    use std::fmt::Write;
    hash.iter().fold(String::new(), |mut text, byte| {
        // Writing to a text does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl Findings {
    pub(crate) fn new(disk: Arc<dyn Disk>, path: PathBuf) -> Self {
        Self {
            disk,
            path,
            log: None,
            entries: vec![],
            differing: BTreeSet::new(),
        }
    }

    /// A range was compared with the source's hash.
    pub(crate) fn on_compared(
        &mut self,
        unix_ms: u64,
        label: &str,
        found: &Mismatch,
        source: &[u8],
    ) {
        let range = (found.device, found.start_sector, found.sectors);
        let equal = source == found.hash;
        let event = match (equal, self.differing.contains(&range)) {
            (true, false) => return,
            (true, true) => "confirmed",
            (false, _) => "differs",
        };
        if equal {
            self.differing.remove(&range);
        } else if self.differing.len() < RANGES_MAX {
            self.differing.insert(range);
        }
        self.entries.push(Entry {
            unix_ms,
            job: 0,
            event,
            label: label.to_owned(),
            start: found.start_sector.saturating_mul(SECTOR_BYTES),
            bytes: u64::from(found.sectors) * SECTOR_BYTES,
            seq: found.seq,
            source: hex(source),
            target: (found.hash != [0; 32]).then(|| hex(&found.hash)),
        });
    }

    /// Writes what was found. A log that cannot be written stops nothing: the source is told as well.
    pub(crate) fn write(&mut self, set: &str) {
        let entries = std::mem::take(&mut self.entries);
        if entries.is_empty() {
            return;
        }
        let log = match self.log.take() {
            Some(log) => Ok(log),
            None => Log::open(Arc::clone(&self.disk), &self.path, LOG_BYTES_MAX),
        };
        match log.and_then(|mut log| log.write(&entries).map(|()| log)) {
            Ok(log) => self.log = Some(log),
            Err(error) => tracing::error!(
                "Set \"{set}\": the log of verifications {} cannot be written: {error}.",
                self.path.display()
            ),
        }
    }
}
