// SPDX-License-Identifier: GPL-2.0-only

//! A disk in memory that forgets, tears, fills up and fails, all of it drawn from a seed.
//!
//! A file has two contents: what programs see, and what is durable. Between them stand the sectors written since the
//! last sync. [`SimDisk::crash`] decides for each of them alone whether it made it: so a write is torn at any
//! sector, and a later write may be there without an earlier one. Names behave the same way, change by
//! change and in order, as in a journaling file system.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;

use crate::{Disk, DiskFile, Space};

/// What a disk writes as a whole.
const SECTOR: usize = 512;

/// Size of a new disk in bytes.
const BYTES: u64 = 1 << 40;

/// What is held and copied together; a page that was never written is not there.
const PAGE: usize = 4096;

type Page = [u8; PAGE];

/// Sectors of a page, a bit for each.
type Sectors = u8;

/// What is durable of a page.
#[derive(Clone)]
struct Kept {
    page: Option<Arc<Page>>,
    /// The sectors of which that is so; of the others what is seen is durable, and the same.
    sectors: Sectors,
    /// Those of them that the next sync is to write.
    dirty: Sectors,
}

impl Kept {
    /// What is seen of these sectors is durable now.
    fn forget(&mut self, sectors: Sectors, seen: Option<&Page>) {
        self.sectors &= !sectors;
        self.dirty &= !sectors;
        if self.sectors == 0 {
            return;
        }
        let page = Arc::make_mut(self.page.get_or_insert_with(|| Arc::new([0; PAGE])));
        for range in ranges(sectors) {
            match seen {
                Some(seen) => page[range.clone()].copy_from_slice(&seen[range]),
                None => page[range].fill(0),
            }
        }
    }
}

/// Where these sectors are in their page.
fn ranges(sectors: Sectors) -> impl Iterator<Item = Range<usize>> {
    let is_in = move |sector: &usize| sectors & (1 << sector) != 0;
    (0..PAGE / SECTOR)
        .filter(is_in)
        .map(|sector| sector * SECTOR..(sector + 1) * SECTOR)
}

#[derive(Clone, Default)]
struct Content {
    /// What programs see. Pages are shared with other disks until one of them writes.
    pages: Vec<Option<Arc<Page>>>,
    bytes: usize,
    /// What is durable of the pages in which that is something else, perhaps.
    durable: BTreeMap<usize, Kept>,
    durable_bytes: usize,
}

impl Content {
    /// What is beyond the end is zero.
    fn read(&self, mut at: usize, mut data: &mut [u8]) {
        while !data.is_empty() {
            let (page, from) = (at / PAGE, at % PAGE);
            let bytes = data.len().min(PAGE - from);
            let (piece, rest) = data.split_at_mut(bytes);
            match self.pages.get(page) {
                Some(Some(page)) => piece.copy_from_slice(&page[from..from + bytes]),
                _ => piece.fill(0),
            }
            (at, data) = (at + bytes, rest);
        }
    }

    fn put(&mut self, mut at: usize, mut data: &[u8]) {
        while !data.is_empty() {
            let (page, from) = (at / PAGE, at % PAGE);
            let bytes = data.len().min(PAGE - from);
            if self.pages.len() <= page {
                self.pages.resize(page + 1, None);
            }
            let page = self.pages[page].get_or_insert_with(|| Arc::new([0; PAGE]));
            Arc::make_mut(page)[from..from + bytes].copy_from_slice(&data[..bytes]);
            (at, data) = (at + bytes, &data[bytes..]);
        }
    }

    /// The sectors of that range are about to change.
    fn keep(&mut self, offset: usize, bytes: usize) {
        if bytes == 0 {
            return;
        }
        for sector in offset / SECTOR..=(offset + bytes - 1) / SECTOR {
            let page = sector * SECTOR / PAGE;
            let kept = self.durable.entry(page).or_insert_with(|| Kept {
                page: self.pages.get(page).cloned().flatten(),
                sectors: 0,
                dirty: 0,
            });
            let bit = 1 << (sector % (PAGE / SECTOR));
            kept.sectors |= bit;
            kept.dirty |= bit;
        }
    }

    fn write(&mut self, offset: usize, data: &[u8]) {
        self.keep(offset, data.len());
        self.put(offset, data);
        self.bytes = self.bytes.max(offset + data.len());
    }

    fn resize(&mut self, bytes: usize) {
        if bytes < self.bytes {
            self.keep(bytes, self.bytes - bytes);
            let end = self.pages.len() * PAGE;
            if bytes < end {
                self.put(bytes, &vec![0; end - bytes]);
            }
        }
        self.bytes = bytes;
    }

    fn sync(&mut self) {
        self.settle(|_, kept| kept.dirty);
        self.durable_bytes = self.bytes;
    }

    /// Of each page, the sectors that `written` tells are durable now, and none is dirty any more.
    fn settle(&mut self, mut written: impl FnMut(usize, &Kept) -> Sectors) {
        let pages = &self.pages;
        self.durable.retain(|page, kept| {
            let written = written(*page, kept);
            kept.forget(written, pages.get(*page).and_then(Option::as_deref));
            kept.dirty = 0;
            kept.sectors != 0
        });
    }

    /// The kernel takes what it could not write for clean: seen until it leaves memory, and never durable.
    fn fail_sync(&mut self, mut survives: impl FnMut() -> bool) {
        let (bytes, mut reached) = (self.bytes, self.durable_bytes);
        self.settle(|page, kept| {
            let mut written = 0;
            for range in ranges(kept.dirty) {
                if survives() {
                    written |= 1 << (range.start / SECTOR);
                    if page * PAGE + range.start < bytes {
                        reached = reached.max((page * PAGE + range.end).min(bytes));
                    }
                }
            }
            written
        });
        self.durable_bytes = reached;
    }

    /// Each sector that is not durable becomes so, or what it was before comes back.
    fn crash(&mut self, mut survives: impl FnMut() -> bool) {
        let (bytes, before) = (self.bytes, self.durable_bytes);
        let mut reached = before;
        for (number, kept) in std::mem::take(&mut self.durable) {
            let from = number * PAGE;
            for range in ranges(kept.sectors) {
                let is_cut_off = from + range.start >= bytes;
                let is_dirty = kept.dirty & (1 << (range.start / SECTOR)) != 0;
                if is_cut_off || !is_dirty || !survives() {
                    match &kept.page {
                        Some(page) => self.put(from + range.start, &page[range]),
                        None => self.put(from + range.start, &[0; SECTOR]),
                    }
                } else {
                    reached = reached.max((from + range.end).min(bytes));
                }
            }
        }
        // A length that was not made durable is one or the other.
        if bytes != before && survives() {
            reached = bytes;
        }
        let end = self.pages.len() * PAGE;
        if reached < end {
            self.put(reached, &vec![0; end - reached]);
        }
        (self.bytes, self.durable_bytes) = (reached, reached);
    }
}

#[derive(Clone)]
enum NameChange {
    Made(PathBuf, usize),
    Renamed(PathBuf, PathBuf),
    Removed(PathBuf),
}

impl NameChange {
    fn dir(&self) -> &Path {
        let (Self::Made(path, _) | Self::Renamed(_, path) | Self::Removed(path)) = self;
        path.parent().unwrap_or(Path::new("/"))
    }

    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Made(path, file) => {
                names.insert(path.clone(), *file);
            }
            Self::Renamed(from, to) => {
                if let Some(file) = names.remove(from) {
                    names.insert(to.clone(), file);
                }
            }
            Self::Removed(path) => {
                names.remove(path);
            }
        }
    }
}

#[derive(Clone, Default)]
struct State {
    files: Vec<Content>,
    seen: BTreeMap<PathBuf, usize>,
    durable: BTreeMap<PathBuf, usize>,
    /// Changes of names since they were made durable, oldest first.
    changes: Vec<NameChange>,
    dirs: BTreeSet<PathBuf>,
    capacity: u64,
    random: u64,
    /// Operations until one fails, and how often then.
    fail_after: Option<(u64, u64, i32)>,
    /// Raised by every crash: handles from before it are dead.
    life: u64,
    operations: u64,
}

/// xorshift64*, G. Marsaglia and S. Vigna.
fn draw(random: &mut u64) -> u64 {
    *random ^= *random >> 12;
    *random ^= *random << 25;
    *random ^= *random >> 27;
    random.wrapping_mul(0x2545_f491_4f6c_dd1d)
}

impl State {
    fn draw(&mut self) -> u64 {
        draw(&mut self.random)
    }

    fn used(&self) -> u64 {
        let bytes = |file: &usize| self.files[*file].bytes as u64;
        self.seen.values().map(bytes).sum()
    }

    /// Counts an operation and fails it if its time has come.
    fn operation(&mut self) -> io::Result<()> {
        self.operations += 1;
        if let Some((after, times, errno)) = self.fail_after {
            if after > 0 {
                self.fail_after = Some((after - 1, times, errno));
            } else {
                self.fail_after = (times > 1).then_some((0, times - 1, errno));
                return Err(io::Error::from_raw_os_error(errno));
            }
        }
        Ok(())
    }
}

/// See the module documentation. Clones are the same disk.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

struct SimFile {
    state: Arc<Mutex<State>>,
    file: usize,
    life: u64,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn index(value: u64) -> io::Result<usize> {
    usize::try_from(value).map_err(|_| Errno::EFBIG.into())
}

impl SimDisk {
    /// An empty disk whose faults come from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        let state = State {
            capacity: BYTES,
            // The generator's state is never zero.
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            ..State::default()
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    /// Another disk that holds the same, with faults from `seed`: to see what a crash would leave here.
    #[must_use]
    pub fn fork(&self, seed: u64) -> Self {
        let state = State {
            random: Self::new(seed).draw(),
            fail_after: None,
            capacity: BYTES,
            ..lock(&self.state).clone()
        };
        Self {
            state: Arc::new(Mutex::new(state)),
        }
    }

    fn draw(&self) -> u64 {
        lock(&self.state).draw() | 1
    }

    /// The power fails: of what was not made durable, each sector and each change of a name survives or not. Open
    /// files are of no more use.
    pub fn crash(&self) {
        self.lose_power(true);
    }

    /// The same, and of what was not made durable nothing survives.
    pub fn crash_hard(&self) {
        self.lose_power(false);
    }

    fn lose_power(&self, lucky: bool) {
        let mut state = lock(&self.state);
        state.life += 1;
        state.fail_after = None;
        let State { files, random, .. } = &mut *state;
        for file in files {
            file.crash(|| lucky && draw(random) % 2 == 0);
        }
        let survive = index(state.draw()).unwrap_or(0) % (state.changes.len() + 1);
        let survive = if lucky { survive } else { 0 };
        let changes = std::mem::take(&mut state.changes);
        for change in &changes[..survive] {
            change.apply(&mut state.durable);
        }
        state.seen = state.durable.clone();
    }

    /// The process ends, and the machine goes on: everything written is there. Open files are of no more use.
    pub fn restart(&self) {
        let mut state = lock(&self.state);
        state.life += 1;
        state.fail_after = None;
    }

    /// After `operations` more that succeed, `times` fail with `errno`.
    pub fn fail(&self, operations: u64, times: u64, errno: i32) {
        lock(&self.state).fail_after = (times > 0).then_some((operations, times, errno));
    }

    /// Whether an operation is still going to fail.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        lock(&self.state).fail_after.is_some()
    }

    /// Nothing fails any more.
    pub fn heal(&self) {
        lock(&self.state).fail_after = None;
    }

    /// Sets the size in bytes; less than what is used means full.
    pub fn set_capacity(&self, bytes: u64) {
        lock(&self.state).capacity = bytes;
    }

    /// Operations so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        lock(&self.state).operations
    }
}

impl SimFile {
    fn with<T>(&self, run: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = lock(&self.state);
        if state.life != self.life {
            return Err(Errno::EIO.into());
        }
        run(&mut state)
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|state| {
            state.operation()?;
            let content = &state.files[self.file];
            let from = index(offset)?;
            let end = from.checked_add(data.len());
            if end.is_none_or(|end| end > content.bytes) {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            content.read(from, data);
            Ok(())
        })
    }

    fn write_at(&self, pieces: &mut [IoSlice<'_>], offset: u64) -> io::Result<()> {
        self.with(|state| {
            let mut at = index(offset)?;
            let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
            let grows = (at + bytes).saturating_sub(state.files[self.file].bytes) as u64;
            let failed = if state.used() + grows > state.capacity {
                Err(Errno::ENOSPC.into())
            } else {
                state.operation()
            };
            // A write that fails may have been made in part.
            let mut left = match &failed {
                Ok(()) => bytes,
                Err(_) if grows > 0 => 0,
                Err(_) => index(state.draw()).unwrap_or(0) % (bytes + 1),
            };
            let content = &mut state.files[self.file];
            for piece in pieces.iter() {
                let piece = &piece[..piece.len().min(left)];
                if !piece.is_empty() {
                    content.write(at, piece);
                }
                at += piece.len();
                left -= piece.len();
            }
            failed
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|state| {
            if let Err(error) = state.operation() {
                let State { files, random, .. } = state;
                files[self.file].fail_sync(|| draw(random) % 2 == 0);
                return Err(error);
            }
            state.files[self.file].sync();
            Ok(())
        })
    }

    fn bytes(&self) -> io::Result<u64> {
        self.with(|state| Ok(state.files[self.file].bytes as u64))
    }

    fn set_bytes(&self, bytes: u64) -> io::Result<()> {
        self.with(|state| {
            state.operation()?;
            let grows = bytes.saturating_sub(state.files[self.file].bytes as u64);
            if state.used() + grows > state.capacity {
                return Err(Errno::ENOSPC.into());
            }
            state.files[self.file].resize(index(bytes)?);
            Ok(())
        })
    }

    fn allocate(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let have = self.bytes()?;
        if offset + bytes > have {
            self.set_bytes(offset + bytes)?;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let zeroes = vec![0; index(bytes)?];
        self.write_at(&mut [IoSlice::new(&zeroes)], offset)
    }
}

impl Disk for SimDisk {
    fn open(&self, path: &Path, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = lock(&self.state);
        state.operation()?;
        let file = match state.seen.get(path) {
            Some(file) => *file,
            None if create => {
                let file = state.files.len();
                state.files.push(Content::default());
                let change = NameChange::Made(path.to_owned(), file);
                change.apply(&mut state.seen);
                state.changes.push(change);
                file
            }
            None => return Err(io::ErrorKind::NotFound.into()),
        };
        Ok(Arc::new(SimFile {
            state: Arc::clone(&self.state),
            file,
            life: state.life,
        }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.operation()?;
        if !state.seen.contains_key(from) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let change = NameChange::Renamed(from.to_owned(), to.to_owned());
        change.apply(&mut state.seen);
        state.changes.push(change);
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.operation()?;
        if !state.seen.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let change = NameChange::Removed(path.to_owned());
        change.apply(&mut state.seen);
        state.changes.push(change);
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let mut state = lock(&self.state);
        state.operation()?;
        let inside = state.seen.keys().filter(|path| path.parent() == Some(dir));
        let name = |path: &PathBuf| Some(path.file_name()?.to_str()?.to_owned());
        Ok(inside.filter_map(name).collect())
    }

    fn make_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.operation()?;
        state.dirs.insert(dir.to_owned());
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        state.operation()?;
        let changes = std::mem::take(&mut state.changes);
        for change in changes {
            if change.dir() == dir {
                change.apply(&mut state.durable);
            } else {
                state.changes.push(change);
            }
        }
        Ok(())
    }

    fn space(&self, _: &Path) -> io::Result<Space> {
        let state = lock(&self.state);
        Ok(Space {
            total: state.capacity,
            free: state.capacity.saturating_sub(state.used()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(disk: &SimDisk, path: &str) -> io::Result<Vec<u8>> {
        let file = disk.open(Path::new(path), false)?;
        let mut data = vec![0; index(file.bytes()?)?];
        file.read_at(&mut data, 0)?;
        Ok(data)
    }

    fn write(file: &dyn DiskFile, data: &[u8], offset: u64) -> io::Result<()> {
        file.write_at(&mut [IoSlice::new(data)], offset)
    }

    proptest! {
        #[test]
        fn what_was_made_durable_survives_and_the_rest_is_old_or_new(seed: u64) {
            let disk = SimDisk::new(seed);
            let file = disk.open(Path::new("/d/f"), true).unwrap();
            write(&*file, &[1; 4096], 0).unwrap();
            file.sync().unwrap();
            disk.sync_dir(Path::new("/d")).unwrap();
            write(&*file, &[2; 2048], 1024).unwrap();
            disk.crash();
            prop_assert!(file.bytes().is_err(), "a handle does not survive");
            let data = read(&disk, "/d/f").unwrap();
            prop_assert_eq!(data.len(), 4096);
            for (number, sector) in data.chunks(SECTOR).enumerate() {
                let old = sector.iter().all(|byte| *byte == 1);
                let new = (2..6).contains(&number) && sector.iter().all(|byte| *byte == 2);
                prop_assert!(old || new, "sector {}", number);
            }
        }

        #[test]
        fn a_rename_is_whole(seed: u64) {
            let disk = SimDisk::new(seed);
            for (path, data) in [("/d/a", [1; 8]), ("/d/b", [2; 8])] {
                let file = disk.open(Path::new(path), true).unwrap();
                write(&*file, &data, 0).unwrap();
                file.sync().unwrap();
            }
            disk.sync_dir(Path::new("/d")).unwrap();
            disk.rename(Path::new("/d/b"), Path::new("/d/a")).unwrap();
            disk.crash();
            let data = read(&disk, "/d/a").unwrap();
            prop_assert_eq!(data == [2; 8], read(&disk, "/d/b").is_err());
            prop_assert!(data == [1; 8] || data == [2; 8]);
        }
    }

    #[test]
    fn every_fate_of_a_sector_is_drawn() {
        let fate = |seed| {
            let disk = SimDisk::new(seed);
            let file = disk.open(Path::new("/d/f"), true).unwrap();
            write(&*file, &[0; 1024], 0).unwrap();
            file.sync().unwrap();
            disk.sync_dir(Path::new("/d")).unwrap();
            write(&*file, &[1; 1024], 0).unwrap();
            disk.crash();
            let data = read(&disk, "/d/f").unwrap();
            (data[0], data[512])
        };
        let fates: BTreeSet<_> = (0..64).map(fate).collect();
        assert_eq!(fates.len(), 4);
    }

    #[test]
    fn a_failed_sync_forgets_and_the_next_one_succeeds_without() {
        let lost = (0..64).any(|seed| {
            let disk = SimDisk::new(seed);
            let file = disk.open(Path::new("/d/f"), true).unwrap();
            file.set_bytes(512).unwrap();
            file.sync().unwrap();
            disk.sync_dir(Path::new("/d")).unwrap();
            write(&*file, &[1; 512], 0).unwrap();
            disk.fail(0, 1, Errno::EIO as i32);
            assert!(file.sync().is_err());
            assert!(file.sync().is_ok());
            disk.crash();
            read(&disk, "/d/f").unwrap() == [0; 512]
        });
        assert!(lost);
    }

    #[test]
    fn a_full_disk_and_injected_errors_are_told() {
        let disk = SimDisk::new(1);
        let file = disk.open(Path::new("/d/f"), true).unwrap();
        disk.set_capacity(1000);
        assert!(write(&*file, &[1; 1000], 0).is_ok());
        let error = write(&*file, &[1; 8], 1000).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(write(&*file, &[2; 8], 0).is_ok(), "space it already has");
        assert_eq!(disk.space(Path::new("/d")).unwrap().free, 0);
        disk.fail(1, 2, Errno::EIO as i32);
        assert!(file.sync().is_ok() && file.sync().is_err() && file.sync().is_err());
        assert!(file.sync().is_ok());
    }
}
