// SPDX-License-Identifier: GPL-2.0-only

//! The overlay of a volume: blocks that are kept beside it, in a sparse file of the volume's shape, and the log that says
//! which. What is durable when, and why a crash at any moment does no harm: `dtloop_core::overlay`.
//!
//! | file | what |
//! |---|---|
//! | `<volume>.<stage>.data` | the blocks, each at its own offset |
//! | `<volume>.<stage>.map` | the log |

use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtloop_core::overlay::{BLOCK_BYTES, BlockMap, Place, log_header, read_log};
use dtloop_disk::{Disk, DiskFile};

use crate::volume::Volume;

/// Longest piece that is copied at once.
const COPY_BYTES: u64 = 1 << 20;

/// A log is written anew when it is longer than this and twice what it has to say.
const LOG_SLACK: u64 = 1 << 20;

/// Space is asked for in pieces of this size, as asking costs time.
const SPACE_PIECE: u64 = 16 << 20;

/// Which side of an overlay failed.
#[derive(Debug)]
pub enum Failure {
    /// The volume.
    Volume(io::Error),
    /// The staging area.
    Staging(io::Error),
}

use Failure::{Staging, Volume as Under};

/// The space that staging may take.
pub struct Space {
    disk: Arc<dyn Disk>,
    /// The staging area.
    pub dir: PathBuf,
    /// Most bytes of the set.
    pub max: u64,
    /// Bytes of the file system that stay free.
    pub min_free: u64,
    /// Bytes that may be taken before it is asked again.
    granted: u64,
}

impl Space {
    /// Space in that directory.
    #[must_use]
    pub fn new(disk: Arc<dyn Disk>, dir: PathBuf, max: u64, min_free: u64) -> Self {
        Self {
            disk,
            dir,
            max,
            min_free,
            granted: 0,
        }
    }

    /// Bytes that could be staged in addition to `used`.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn available(&self, used: u64) -> io::Result<u64> {
        let free = self.disk.space(&self.dir)?.free;
        let free = free.saturating_sub(self.min_free);
        Ok(free.min(self.max.saturating_sub(used)))
    }

    /// Takes bytes.
    fn take(&mut self, used: u64, bytes: u64) -> io::Result<()> {
        if used.saturating_add(bytes) > self.max || self.granted < bytes {
            let available = self.available(used)?;
            if available < bytes {
                let text = format!(
                    "no space left for staging: {used} bytes are staged in {}, {available} more may be ({} at most, and {} of the file \
                     system stay free)",
                    self.dir.display(),
                    if self.max == u64::MAX {
                        "no limit".to_owned()
                    } else {
                        self.max.to_string()
                    },
                    self.min_free
                );
                return Err(io::Error::new(io::ErrorKind::StorageFull, text));
            }
            self.granted = available.min(SPACE_PIECE).max(bytes);
        }
        self.granted -= bytes;
        Ok(())
    }
}

/// See the module documentation.
pub struct Overlay {
    disk: Arc<dyn Disk>,
    stem: PathBuf,
    stage: u64,
    data: Arc<dyn DiskFile>,
    log: Arc<dyn DiskFile>,
    map: BlockMap,
    dirty: bool,
    /// Number of the last batch of the log.
    last: u64,
    log_end: u64,
    /// Nobody knows what of the log is durable; it is written anew.
    log_spoilt: bool,
}

fn file(stem: &Path, what: &str) -> PathBuf {
    let mut path = stem.as_os_str().to_owned();
    path.push(what);
    path.into()
}

/// Where the files of an overlay are, without their ends.
fn stem(dir: &Path, label: &str, stage: u64) -> PathBuf {
    dir.join(format!("{label}.{stage}"))
}

/// Removes every file of the staging area that does not belong to one of those volumes in that stage.
///
/// # Errors
///
/// Those of the file system.
pub fn clean(disk: &dyn Disk, dir: &Path, labels: &[&str], stage: u64) -> io::Result<()> {
    let keep: Vec<String> = labels
        .iter()
        .flat_map(|label| ["data", "map"].map(|end| format!("{label}.{stage}.{end}")))
        .collect();
    let names = match disk.list(dir) {
        Ok(names) => names,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let ours = |name: &&String| {
        let ends = [".data", ".map", ".new"];
        ends.iter().any(|end| name.ends_with(end)) && !keep.contains(name)
    };
    for name in names.iter().filter(ours) {
        disk.remove(&dir.join(name))?;
    }
    Ok(())
}

impl Overlay {
    /// Makes an empty overlay.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn create(disk: Arc<dyn Disk>, dir: &Path, label: &str, stage: u64) -> io::Result<Self> {
        let stem = stem(dir, label, stage);
        let data = disk.open(&file(&stem, ".data"), true)?;
        data.set_bytes(0)?;
        data.sync()?;
        let log = disk.open(&file(&stem, ".map"), true)?;
        let header = log_header(stage, 0);
        log.set_bytes(0)?;
        log.write_at(&mut [IoSlice::new(&header)], 0)?;
        log.sync()?;
        disk.sync_dir(dir)?;
        Ok(Self {
            disk,
            stem,
            stage,
            data,
            log,
            map: BlockMap::default(),
            dirty: false,
            last: 0,
            log_end: header.len() as u64,
            log_spoilt: false,
        })
    }

    /// Opens an overlay whose log has at least the batch `last`.
    ///
    /// # Errors
    ///
    /// Those of the file system; `InvalidData` if the log is damaged.
    pub fn open(
        disk: Arc<dyn Disk>,
        dir: &Path,
        label: &str,
        stage: u64,
        last: u64,
    ) -> io::Result<Self> {
        let stem = stem(dir, label, stage);
        let data = disk.open(&file(&stem, ".data"), false)?;
        let path = file(&stem, ".map");
        let log = disk.open(&path, false)?;
        let mut bytes = vec![0; usize::try_from(log.bytes()?).map_err(io::Error::other)?];
        log.read_at(&mut bytes, 0)?;
        let read = read_log(&bytes, stage).filter(|read| read.last >= last);
        let read = read.ok_or_else(|| {
            let text = format!("{} is damaged", path.display());
            io::Error::new(io::ErrorKind::InvalidData, text)
        })?;
        Ok(Self {
            disk,
            stem,
            stage,
            data,
            log,
            map: read.map,
            dirty: true,
            last: read.last,
            log_end: read.end,
            // What was read may be in memory only.
            log_spoilt: true,
        })
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn staged_bytes(&self) -> u64 {
        self.map.data_bytes()
    }

    /// Whether nothing is staged.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Number of the last batch of the log, for the state of the set.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Reads what the target holds: the overlay over the volume.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn read(&self, volume: &Volume, offset: u64, data: &mut [u8]) -> Result<(), Failure> {
        let end = offset + data.len() as u64;
        let mut at = offset;
        while at < end {
            let (place, to) = self.map.run(at / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
            let to = (to * BLOCK_BYTES).min(end);
            let range = index(at - offset)..index(to - offset);
            let piece = &mut data[range];
            match place {
                Place::Under => volume.read(at, piece).map_err(Under)?,
                Place::Data => self.data.read_at(piece, at).map_err(Staging)?,
                Place::Zero => piece.fill(0),
            }
            at = to;
        }
        Ok(())
    }

    /// A block as it is now, with zeroes behind the end of the volume.
    fn block(&self, volume: &Volume, block: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = vec![0; index(BLOCK_BYTES)];
        let start = block * BLOCK_BYTES;
        let length = index(volume.bytes().saturating_sub(start).min(BLOCK_BYTES));
        self.read(volume, start, &mut bytes[..length])?;
        Ok(bytes)
    }

    /// Writes into the overlay. Blocks that are written in part are copied up.
    ///
    /// # Errors
    ///
    /// Those of the file system; `StorageFull` if it may take no more. Nothing is lost then, it can be tried again.
    pub fn stage(
        &mut self,
        volume: &Volume,
        offset: u64,
        data: &[u8],
        used: u64,
        space: &mut Space,
    ) -> Result<(), Failure> {
        let end = offset + data.len() as u64;
        let (first, last) = (offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        let missing = self.map.missing(first, last) * BLOCK_BYTES;
        space.take(used, missing).map_err(Staging)?;
        self.dirty = true;
        let (whole_from, whole_to) = whole_blocks(offset, end);
        let mut edges = vec![];
        if whole_from < whole_to {
            let range =
                index(whole_from * BLOCK_BYTES - offset)..index(whole_to * BLOCK_BYTES - offset);
            self.put(&data[range], whole_from * BLOCK_BYTES)?;
            edges.extend((first < whole_from).then_some(first));
            edges.extend((whole_to < last).then_some(whole_to));
        } else {
            edges.extend(first..last);
        }
        for block in edges {
            let mut bytes = self.block(volume, block)?;
            let start = block * BLOCK_BYTES;
            let (from, to) = (offset.max(start), end.min(start + BLOCK_BYTES));
            bytes[index(from - start)..index(to - start)]
                .copy_from_slice(&data[index(from - offset)..index(to - offset)]);
            self.put(&bytes, start)?;
        }
        self.map.set(first, last, Place::Data);
        Ok(())
    }

    fn put(&self, data: &[u8], offset: u64) -> Result<(), Failure> {
        let mut pieces = [IoSlice::new(data)];
        self.data.write_at(&mut pieces, offset).map_err(Staging)
    }

    /// Makes a range of what the target holds zero.
    ///
    /// # Errors
    ///
    /// As for [`Overlay::stage`].
    pub fn stage_zeroes(
        &mut self,
        volume: &Volume,
        offset: u64,
        bytes: u64,
        used: u64,
        space: &mut Space,
    ) -> Result<(), Failure> {
        let end = offset + bytes;
        let (from, to) = whole_blocks(offset, end);
        if from >= to {
            return self.stage(volume, offset, &vec![0; index(bytes)], used, space);
        }
        for (start, stop) in [(offset, from * BLOCK_BYTES), (to * BLOCK_BYTES, end)] {
            if start < stop {
                self.stage(volume, start, &vec![0; index(stop - start)], used, space)?;
            }
        }
        self.map.set(from, to, Place::Zero);
        Ok(())
    }

    /// While it is being published: before the volume itself is written, the blocks that are written in part are
    /// folded into it. Afterwards, [`Overlay::pass_on`].
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn fold_edges(&mut self, volume: &Volume, offset: u64, bytes: u64) -> Result<(), Failure> {
        let end = offset + bytes;
        let (from, to) = whole_blocks(offset, end);
        let (first, last) = (offset / BLOCK_BYTES, end.div_ceil(BLOCK_BYTES));
        if from >= to {
            return self.fold(volume, first, last);
        }
        self.fold(volume, first, from)?;
        self.fold(volume, to, last)
    }

    /// The range was written to the volume: that is where it is now.
    pub fn pass_on(&mut self, offset: u64, bytes: u64) {
        let (from, to) = whole_blocks(offset, offset + bytes);
        if from < to {
            self.map.set(from, to, Place::Under);
        }
    }

    /// Writes blocks into the volume, where they are from then on.
    fn fold(&mut self, volume: &Volume, from: u64, to: u64) -> Result<(), Failure> {
        let mut at = from;
        while at < to {
            let (place, end) = self.map.run(at, to.min(at + COPY_BYTES / BLOCK_BYTES));
            let start = at * BLOCK_BYTES;
            let bytes = (end * BLOCK_BYTES)
                .min(volume.bytes())
                .saturating_sub(start);
            match place {
                Place::Under => {}
                Place::Zero => volume.zero(start, bytes).map_err(Under)?,
                Place::Data => {
                    let mut data = vec![0; index(bytes)];
                    self.data.read_at(&mut data, start).map_err(Staging)?;
                    volume.write(start, &data).map_err(Under)?;
                }
            }
            if place != Place::Under {
                self.map.set(at, end, Place::Under);
            }
            at = end;
        }
        Ok(())
    }

    /// Writes some of it into the volume. False: there is nothing left.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn drain(&mut self, volume: &Volume) -> Result<bool, Failure> {
        let Some(block) = self.map.next_staged(0) else {
            return Ok(false);
        };
        // Zeroes cost nothing: as many as there are.
        let (place, end) = self.map.run(block, u64::MAX);
        let end = if place == Place::Zero {
            end
        } else {
            end.min(block + COPY_BYTES / BLOCK_BYTES)
        };
        if place == Place::Zero {
            let (start, stop) = (block * BLOCK_BYTES, end.saturating_mul(BLOCK_BYTES));
            let bytes = stop.min(volume.bytes()).saturating_sub(start);
            volume.zero(start, bytes).map_err(Under)?;
            self.map.set(block, end, Place::Under);
        } else {
            self.fold(volume, block, end)?;
        }
        Ok(true)
    }

    /// Makes the overlay durable. When it is published, the volume must have been synced before.
    ///
    /// # Errors
    ///
    /// Those of the file system. Everything since the last time must be done again then, after [`Overlay::reset`].
    pub fn sync(&mut self) -> io::Result<()> {
        if self.dirty {
            self.data.sync()?;
            self.dirty = false;
        }
        let is_long = || self.log_end > LOG_SLACK + 2 * self.map.batch(0, true).len() as u64;
        if self.log_spoilt || (self.log_end > LOG_SLACK && self.map.is_changed() && is_long()) {
            self.rewrite_log()?;
        } else if self.map.is_changed() {
            let batch = self.map.batch(self.last + 1, false);
            self.log_spoilt = true;
            self.log
                .write_at(&mut [IoSlice::new(&batch)], self.log_end)?;
            self.log.sync()?;
            self.log_spoilt = false;
            self.log_end += batch.len() as u64;
            self.last += 1;
        }
        for (from, to) in self.map.on_durable() {
            // Only space is lost if this fails, and only for a while.
            let bytes = (to - from) * BLOCK_BYTES;
            let _ = self.data.zero(from * BLOCK_BYTES, bytes);
        }
        Ok(())
    }

    fn rewrite_log(&mut self) -> io::Result<()> {
        let (path, temporary) = (file(&self.stem, ".map"), file(&self.stem, ".new"));
        let mut bytes = log_header(self.stage, self.last).to_vec();
        bytes.extend(self.map.batch(self.last + 1, true));
        let log = self.disk.open(&temporary, true)?;
        log.set_bytes(0)?;
        log.write_at(&mut [IoSlice::new(&bytes)], 0)?;
        log.sync()?;
        self.disk.rename(&temporary, &path)?;
        self.disk
            .sync_dir(path.parent().unwrap_or(Path::new("/")))?;
        self.log = log;
        self.log_end = bytes.len() as u64;
        self.last += 1;
        self.log_spoilt = false;
        Ok(())
    }

    /// Goes back to what is known to be durable.
    pub fn reset(&mut self) {
        self.map.reset();
        self.dirty = true;
        self.log_spoilt = true;
    }
}

/// The blocks that a range covers as a whole, from and to; from may be larger.
fn whole_blocks(offset: u64, end: u64) -> (u64, u64) {
    (offset.div_ceil(BLOCK_BYTES), end / BLOCK_BYTES)
}

/// A length within a piece of memory.
fn index(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap_or(usize::MAX)
}
