// SPDX-License-Identifier: GPL-2.0-only

//! The disk queue of a set: a journal (`dtloop-journal`) of the frames that the target will get, with session 0; the
//! session's number is put in when they are sent. What is in it, and what may be released, `core::spool` knows.
//!
//! ```text
//!   <dir>/<set>/0000000000000007.seg      segments of this source and stream
//!   <dir>/<set>/0000000000000003.seg.old  of an older stream: set aside, removed when room is needed
//! ```
//!
//! A queue belongs to one source and one stream: sequence numbers mean nothing elsewhere. One of another source is not
//! touched. One of an older stream is set aside: whatever of it the target does not have is found by comparing, as
//! after every new stream.

mod reader;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtloop_core::ladder::QueueHealth;
use dtloop_core::spool::{Batch, Spool};
use dtloop_disk::Disk;
use dtloop_journal::layout::{SEGMENT_HEADER_BYTES, SegmentError};
use dtloop_journal::{
    AppendError, BatchInfo, Glimpse, Journal, Options, Position, Reader, Segment, survey,
};
use dtloop_proto::Uuid;
use dtloop_proto::header::HEADER_BYTES;

pub use reader::{QueueReader, Stored, stored};

use crate::config::QueueConfig;

/// Ending of segments that are set aside.
const OLD: &str = ".old";

/// Emptied segment files that are kept to be used again; the space of others is given back.
const SPARE: usize = 1;

/// Whose a queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The source.
    pub source_id: Uuid,
    /// Its stream.
    pub stream_uuid: Uuid,
}

/// Space of a queue, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Taken by segments in use.
    pub used: u64,
    /// Free on its file system.
    pub free: u64,
}

/// Where a queue is kept, and how.
#[derive(Clone)]
pub struct Home {
    /// Its disk.
    pub disk: Arc<dyn Disk>,
    /// The set's own directory.
    pub dir: PathBuf,
    /// As configured.
    pub config: QueueConfig,
    /// Whose it is.
    pub owner: Owner,
}

/// The queue, to be written to.
pub struct Queue {
    home: Home,
    /// None: not opened for writing yet, or emptied.
    journal: Option<Journal>,
    /// Where the journal begins and ends when it is opened.
    from: Position,
    end: Position,
    /// What was freed last.
    freed: Option<Option<Position>>,
}

fn failing(error: &io::Error, what: &str) -> QueueHealth {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            QueueHealth::Full("its file system has no space left".to_owned())
        }
        _ => QueueHealth::Failing(format!("it cannot be {what}: {error}")),
    }
}

fn refused(error: &AppendError) -> QueueHealth {
    match error {
        AppendError::Io { source, .. } => failing(source, "written"),
        AppendError::Full { bytes, .. } => QueueHealth::Full(format!(
            "it has reached its size, {bytes} bytes; queue.size sets it"
        )),
        AppendError::Space { min_free, .. } => QueueHealth::Full(format!(
            "another segment would leave less than {min_free} bytes free; queue.min_free keeps them"
        )),
    }
}

fn wants_space(error: &AppendError) -> bool {
    match error {
        AppendError::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
        AppendError::Full { .. } => false,
        AppendError::Space { .. } => true,
    }
}

/// A number that nobody can guess.
fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

impl Queue {
    /// Looks at what is there; `seen` is told of every batch. `released`: the ring holds this record and those behind
    /// it, so they do not count here. `tolerant`: what cannot be read is a hole, and no reason to refuse all of it.
    ///
    /// # Errors
    ///
    /// Why the queue cannot be used; nothing has been changed then.
    pub fn find(
        home: Home,
        released: u64,
        tolerant: bool,
        mut seen: impl FnMut(),
    ) -> Result<(Self, Spool<Position>), QueueHealth> {
        let unreadable = |error: io::Error| failing(&error, "read");
        home.disk
            .make_dir(&home.dir)
            .map_err(|error| failing(&error, "made"))?;
        let segments = survey(&*home.disk, &home.dir).map_err(unreadable)?;
        home.check(&segments)?;
        let kept = home.set_aside(segments);
        let kept = kept.map_err(|error| failing(&error, "written"))?;
        let scanned = home.scan(&kept, tolerant, &mut seen).map_err(unreadable)?;
        let Scanned {
            batches: found,
            ends,
        } = scanned;
        let cut = found.iter().filter(|batch| batch.next > released).count();
        let spool = Spool::restore(found, released);
        if cut > 0 {
            tracing::info!(
                "Queue {}: its end, which was being written, is cut off; the ring holds those records.",
                home.dir.display()
            );
        }
        let from = spool
            .oldest()
            .map_or(Position::default(), |batch| batch.place);
        let newest = spool.newest().map(|batch| batch.place);
        let end = ends.iter().find(|(at, _)| Some(*at) == newest);
        let end = end.map_or(Position::default(), |(_, end)| *end);
        let queue = Self {
            home,
            journal: None,
            from,
            end,
            freed: None,
        };
        Ok((queue, spool))
    }

    fn journal(&mut self) -> Result<&mut Journal, QueueHealth> {
        if self.journal.is_none() {
            // There is something to be given back from now on, even if the target takes it before anybody looks.
            self.freed = None;
            let config = &self.home.config;
            let options = Options {
                bytes: config.size.0,
                segment_bytes: config.segment_size.0,
                min_free: config.min_free.0,
                owner: self.home.owner.source_id,
                salt: random().map_err(|error| failing(&error, "written"))?,
            };
            let disk = Arc::clone(&self.home.disk);
            let opened = Journal::open(disk, &self.home.dir, options, self.from, self.end);
            self.journal = Some(opened.map_err(|error| failing(&error, "written"))?);
        }
        self.journal
            .as_mut()
            .ok_or_else(|| QueueHealth::Failing("it is not open".to_owned()))
    }

    /// Writes frames as one batch behind the others; `time_ns` is when the first record was made. They are not
    /// durable yet.
    ///
    /// # Errors
    ///
    /// Why they could not be written. [`QueueHealth::Full`] for want of a segment leaves what was written before as it
    /// is; after any other error nothing is known of what was written since the last sync.
    pub fn append(
        &mut self,
        frames: &[&[u8]],
        info: BatchInfo,
        time_ns: u64,
    ) -> Result<Batch<Position>, Trouble> {
        let stream = self.home.owner.stream_uuid;
        let home = self.home.clone();
        let journal = self.journal().map_err(Trouble::lost)?;
        let mut appended = journal.append(frames, info, stream);
        while appended.as_ref().is_err_and(wants_space) && home.remove_old() {
            appended = journal.append(frames, info, stream);
        }
        let end = appended.map_err(|error| Trouble {
            keeps: !matches!(error, AppendError::Io { .. }),
            health: refused(&error),
        })?;
        let payload: usize = frames.iter().map(|frames| frames.len()).sum();
        let bytes = dtloop_journal::layout::batch_bytes(payload as u64);
        let place = Position {
            offset: end.offset - bytes,
            ..end
        };
        Ok(Batch {
            first: info.first_seq,
            next: info.next_seq,
            bytes,
            time_ns,
            place,
        })
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    ///
    /// Why not; nothing is known then of what was written since the last time.
    pub fn sync(&mut self) -> Result<(), QueueHealth> {
        match &mut self.journal {
            Some(journal) => journal.sync().map_err(|error| refused(&error)),
            None => Ok(()),
        }
    }

    /// Only what begins at `oldest` or behind is needed; nothing at all if there is none.
    ///
    /// # Errors
    ///
    /// Why the space could not be given back.
    pub fn free(&mut self, oldest: Option<Position>) -> Result<(), QueueHealth> {
        if self.freed == Some(oldest) {
            return Ok(());
        }
        let freed = match (oldest, &mut self.journal) {
            (Some(oldest), Some(journal)) => {
                journal.release(oldest);
                journal.trim(SPARE)
            }
            (Some(oldest), None) => {
                self.from = oldest;
                Ok(())
            }
            (None, _) => {
                self.journal = None;
                (self.from, self.end) = (Position::default(), Position::default());
                self.home.clear()
            }
        };
        freed.map_err(|error| failing(&error, "written"))?;
        self.freed = Some(oldest);
        Ok(())
    }

    /// Whether there is room for one more segment.
    ///
    /// # Errors
    ///
    /// Why not.
    pub fn probe(&mut self) -> Result<(), QueueHealth> {
        let config = self.home.config.clone();
        let journal = self.journal()?;
        if journal.waits_for().is_some() {
            let (dir, bytes) = (PathBuf::new(), journal.bytes());
            return Err(refused(&AppendError::Full { dir, bytes }));
        }
        let (free, min_free) = (self.usage()?.free, config.min_free.0);
        if free < min_free.saturating_add(config.segment_size.0) {
            let dir = PathBuf::new();
            return Err(refused(&AppendError::Space {
                dir,
                free,
                min_free,
            }));
        }
        Ok(())
    }

    /// What it takes.
    ///
    /// # Errors
    ///
    /// Why that is not known.
    pub fn usage(&self) -> Result<Usage, QueueHealth> {
        let space = self.home.disk.space(&self.home.dir);
        let space = space.map_err(|error| failing(&error, "read"))?;
        Ok(Usage {
            used: self.journal.as_ref().map_or(0, Journal::bytes),
            free: space.free,
        })
    }
}

/// Why a batch was not written.
#[derive(Debug)]
pub struct Trouble {
    /// The state of the queue.
    pub health: QueueHealth,
    /// What was written before is as it was.
    pub keeps: bool,
}

impl Trouble {
    /// Nothing was tried.
    #[must_use]
    pub fn refused(health: QueueHealth) -> Self {
        Self {
            health,
            keeps: true,
        }
    }

    fn lost(health: QueueHealth) -> Self {
        Self {
            health,
            keeps: false,
        }
    }
}

/// What was found on disk.
#[derive(Default)]
struct Scanned {
    batches: Vec<Batch<Position>>,
    /// Where each begins and ends.
    ends: Vec<(Position, Position)>,
}

impl Scanned {
    fn add(&mut self, glimpse: &Glimpse) {
        let header = glimpse.header;
        if header.first_seq < header.next_seq {
            self.batches.push(Batch {
                first: header.first_seq,
                next: header.next_seq,
                bytes: glimpse.end.offset - glimpse.at.offset,
                time_ns: time_of(&glimpse.beginning),
                place: glimpse.at,
            });
            self.ends.push((glimpse.at, glimpse.end));
        }
    }
}

/// When the record was made whose header and body these are; 0: not known.
fn time_of(beginning: &[u8]) -> u64 {
    let body = beginning.get(HEADER_BYTES..).unwrap_or_default();
    let time = body.get(16..24).and_then(|bytes| bytes.try_into().ok());
    time.map_or(0, u64::from_le_bytes)
}

impl Home {
    fn reader(&self, from: Position) -> Reader {
        Reader::new(
            Arc::clone(&self.disk),
            &self.dir,
            self.owner.source_id,
            from,
        )
    }

    /// All batches, and where each ends. With `tolerant`, a segment that cannot be read ends there.
    fn scan(
        &self,
        numbers: &[u64],
        tolerant: bool,
        seen: &mut impl FnMut(),
    ) -> io::Result<Scanned> {
        let mut scanned = Scanned::default();
        for &segment in numbers {
            let offset = SEGMENT_HEADER_BYTES as u64;
            let mut reader = self.reader(Position { segment, offset });
            loop {
                match reader.next_glimpse() {
                    Ok(Some(glimpse)) if glimpse.at.segment == segment => scanned.add(&glimpse),
                    Ok(_) => break,
                    Err(error) if tolerant => {
                        let dir = self.dir.display();
                        tracing::error!("Queue {dir}: segment {segment} cannot be read: {error}.");
                        break;
                    }
                    Err(error) => return Err(error),
                }
                seen();
            }
        }
        Ok(scanned)
    }

    /// Refuses what is somebody else's.
    fn check(&self, segments: &[Segment]) -> Result<(), QueueHealth> {
        for segment in segments {
            let path = segment.path.display();
            match &segment.header {
                Ok(header) if header.owner != self.owner.source_id => {
                    return Err(QueueHealth::Refused(format!(
                        "{path} belongs to source {}; name another directory, or remove it",
                        header.owner
                    )));
                }
                Err(error @ SegmentError::Version(_)) => {
                    return Err(QueueHealth::Refused(format!("{path}: {error}")));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts the segments of an older stream aside; gives the numbers of the others.
    fn set_aside(&self, segments: Vec<Segment>) -> io::Result<Vec<u64>> {
        let is_old = |segment: &Segment| {
            let stream = segment.header.as_ref().map(|header| header.stream_uuid);
            stream.is_ok_and(|stream| stream != self.owner.stream_uuid)
        };
        let (old, kept): (Vec<_>, Vec<_>) = segments.into_iter().partition(is_old);
        if let Some(Ok(header)) = old.first().map(|segment| &segment.header) {
            tracing::warn!(
                "Queue {}: {} segments of stream {} are set aside: the stream began anew. What the target lacks of it \
                 is found by comparing.",
                self.dir.display(),
                old.len(),
                header.stream_uuid
            );
            // Of one stream at most: a machine that is booted again and again must not fill its disk.
            while self.remove_old() {}
            for segment in &old {
                let mut name = segment.path.clone().into_os_string();
                name.push(OLD);
                self.disk.rename(&segment.path, Path::new(&name))?;
            }
            self.disk.sync_dir(&self.dir)?;
        }
        Ok(kept.iter().map(|segment| segment.number).collect())
    }

    /// Removes the oldest segment that was set aside. False: there is none.
    fn remove_old(&self) -> bool {
        let names = self.disk.list(&self.dir).unwrap_or_default();
        let old = names.iter().find(|name| name.ends_with(OLD));
        old.is_some_and(|name| self.disk.remove(&self.dir.join(name)).is_ok())
    }

    /// Removes all segments.
    fn clear(&self) -> io::Result<()> {
        for segment in survey(&*self.disk, &self.dir)? {
            self.disk.remove(&segment.path)?;
        }
        Ok(())
    }
}
