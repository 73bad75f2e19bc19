// SPDX-License-Identifier: GPL-2.0-only

//! The journal of a set, as its session uses it: appended to and synced at once, and waiting for the volumes when it is
//! full. Files and layout: `dtloop_journal`.
//!
//! Segments whose records are all durable in the volumes are used again under a new number; a
//! journal that has reached its size waits for that, and meanwhile nothing is read from the
//! source. Sealed segments with an index, kept for recovery to any point in time, will be taken
//! out of this circulation.

use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use dtloop_disk::Disk;
use dtloop_journal::{AppendError, BatchInfo, Options, Position};
use dtloop_proto::Uuid;

/// Why nothing could be appended.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The journal.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The program ends while it waited for room.
    #[error("The program ends")]
    Stopped,
}

/// How far the volumes are, shared with the applier.
#[derive(Debug, Default)]
pub struct Horizon {
    inner: Mutex<HorizonState>,
    moved: Condvar,
}

#[derive(Debug, Default)]
struct HorizonState {
    checkpoint: Position,
    wanted: bool,
    stopped: bool,
}

impl Horizon {
    fn lock(&self) -> MutexGuard<'_, HorizonState> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything before this place is durable in the volumes.
    pub fn advance(&self, checkpoint: Position) {
        let mut state = self.lock();
        state.checkpoint = checkpoint;
        state.wanted = false;
        dtloop_runtime::notify_all(&self.moved);
    }

    /// Whether the journal waits for a checkpoint.
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        self.lock().wanted
    }

    /// Nobody shall wait any longer.
    pub fn stop(&self) {
        self.lock().stopped = true;
        dtloop_runtime::notify_all(&self.moved);
    }

    /// The next checkpoint should come soon: it makes room.
    fn want(&self) {
        self.lock().wanted = true;
    }

    fn checkpoint(&self) -> Position {
        self.lock().checkpoint
    }

    fn wait_beyond(&self, segment: u64) -> Result<Position, JournalError> {
        let mut state = self.lock();
        while state.checkpoint.segment <= segment {
            if state.stopped {
                return Err(JournalError::Stopped);
            }
            state.wanted = true;
            state = dtloop_runtime::wait(&self.moved, &self.inner, state);
        }
        Ok(state.checkpoint)
    }
}

/// See the module documentation.
pub struct Journal {
    inner: dtloop_journal::Journal,
    horizon: Arc<Horizon>,
}

impl Journal {
    /// Opens a journal whose content has all been replayed, up to the horizon.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        options: Options,
        horizon: Arc<Horizon>,
    ) -> io::Result<Self> {
        let end = horizon.checkpoint();
        let inner = dtloop_journal::Journal::open(disk, dir, options, end, end)?;
        Ok(Self { inner, horizon })
    }

    /// Appends frames as one batch and makes it durable. Returns the place behind it.
    ///
    /// # Errors
    ///
    /// Those of the file system; the batch counts as not written then.
    pub fn append(
        &mut self,
        frames: &[&[u8]],
        info: BatchInfo,
        stream_uuid: Uuid,
    ) -> Result<Position, JournalError> {
        self.inner.release(self.horizon.checkpoint());
        let place = loop {
            match self.inner.append(frames, info, stream_uuid) {
                Err(AppendError::Full { dir, .. }) => {
                    let dir = dir.display();
                    tracing::info!("Journal {dir} is full; it waits for the volumes.");
                    let oldest = self.inner.waits_for().unwrap_or(0);
                    self.inner.release(self.horizon.wait_beyond(oldest)?);
                }
                Err(error) => {
                    // Segments to be used again take no new space.
                    self.horizon.want();
                    return Err(error.into());
                }
                Ok(place) => break place,
            }
        };
        self.inner.sync()?;
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtloop_disk::SimDisk;

    #[test]
    fn a_full_journal_waits_for_the_volumes() {
        let options = Options {
            bytes: 256 << 10,
            segment_bytes: 64 << 10,
            min_free: 0,
            owner: Uuid([1; 16]),
            salt: 1,
        };
        let info = |first_seq| BatchInfo {
            frames: 1,
            digest: 0,
            first_seq,
            next_seq: first_seq + 1,
        };
        let horizon = Arc::<Horizon>::default();
        let (disk, dir) = (Arc::new(SimDisk::new(1)), Path::new("/journal"));
        let mut journal = Journal::open(disk, dir, options, Arc::clone(&horizon)).unwrap();
        let other = Arc::clone(&horizon);
        let waiter = std::thread::spawn(move || {
            for seq in 1..=13 {
                journal.append(&[&[7; 18000]], info(seq), Uuid::NONE)?;
            }
            Ok::<_, JournalError>(journal)
        });
        while !other.is_wanted() {
            std::thread::yield_now();
        }
        horizon.advance(Position {
            segment: 3,
            offset: 4096,
        });
        let mut journal = waiter.join().unwrap().unwrap();
        horizon.stop();
        let mut append = || journal.append(&[&[7; 60000]], info(14), Uuid::NONE);
        assert!(append().is_ok(), "segment 2 was free as well");
        assert!(matches!(append(), Err(JournalError::Stopped)));
    }
}
