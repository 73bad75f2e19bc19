// SPDX-License-Identifier: GPL-2.0-only

use super::*;
use dtloop_disk::SimDisk;
use proptest::prelude::*;
use std::sync::Arc;

const OWNER: Uuid = Uuid([1; 16]);
const DIR: &str = "/journal";
/// As in Linux.
const EIO: i32 = 5;

fn options() -> Options {
    Options {
        bytes: 256 << 10,
        segment_bytes: 64 << 10,
        min_free: 0,
        owner: OWNER,
        salt: 7,
    }
}

fn info(first_seq: u64) -> BatchInfo {
    BatchInfo {
        frames: 1,
        digest: 0,
        first_seq,
        next_seq: first_seq + 1,
    }
}

fn open_with(disk: &SimDisk, options: Options, from: Position, end: Position) -> Journal {
    Journal::open(Arc::new(disk.clone()), Path::new(DIR), options, from, end).unwrap()
}

fn open(disk: &SimDisk) -> Journal {
    let start = Position::default();
    open_with(disk, options(), start, start)
}

fn reader(disk: &SimDisk, from: Position) -> Reader {
    Reader::new(Arc::new(disk.clone()), Path::new(DIR), OWNER, from)
}

fn sequence(disk: &SimDisk, from: Position) -> Vec<u64> {
    let mut reader = reader(disk, from);
    std::iter::from_fn(|| reader.next_batch().unwrap())
        .map(|batch| batch.header.first_seq)
        .collect()
}

fn append(journal: &mut Journal, seq: u64, bytes: usize) -> Result<Position, AppendError> {
    let place = journal.append(&[&vec![fill(seq); bytes]], info(seq), Uuid::NONE)?;
    journal.sync()?;
    Ok(place)
}

fn fill(seq: u64) -> u8 {
    u8::try_from(seq % 251).unwrap() + 1
}

#[test]
fn batches_come_back_in_order_across_segments() {
    let disk = SimDisk::new(1);
    let mut journal = open(&disk);
    let places: Vec<_> = (1..=9)
        .map(|seq| append(&mut journal, seq, 18_000).unwrap())
        .collect();
    assert_eq!(places[8].segment, 3);
    assert_eq!(
        sequence(&disk, Position::default()),
        (1..=9).collect::<Vec<_>>()
    );
    assert_eq!(sequence(&disk, places[4]), (6..=9).collect::<Vec<_>>());
    // A reader follows what is appended behind it.
    let mut reader = reader(&disk, places[8]);
    assert!(reader.next_batch().unwrap().is_none());
    for seq in 10..=14 {
        let place = append(&mut journal, seq, 9000).unwrap();
        let batch = reader.next_batch().unwrap().unwrap();
        assert_eq!((batch.header.first_seq, batch.end), (seq, place));
        assert_eq!(reader.position(), place);
    }
}

#[test]
fn files_used_again_show_nothing_of_their_past() {
    let disk = SimDisk::new(1);
    let mut journal = open(&disk);
    let mut place = Position::default();
    for seq in 1..=40 {
        place = append(&mut journal, seq, 18_000).unwrap();
        journal.release(place);
    }
    assert!(disk.list(Path::new(DIR)).unwrap().len() <= 3);
    assert!(sequence(&disk, place).is_empty());
    let mut journal = open_with(&disk, options(), place, place);
    let behind = append(&mut journal, 41, 100).unwrap();
    assert!(behind > place);
    assert_eq!(sequence(&disk, place), [41]);
    let small = Options {
        bytes: 128 << 10,
        ..options()
    };
    open_with(&disk, small, behind, behind);
    assert!(disk.list(Path::new(DIR)).unwrap().len() <= 2);
}

#[test]
fn a_full_journal_says_what_it_waits_for() {
    let disk = SimDisk::new(1);
    let mut journal = open(&disk);
    let mut seq = 0;
    while journal.waits_for().is_none() || append(&mut journal, seq, 18_000).is_ok() {
        if journal.waits_for().is_none() {
            append(&mut journal, seq, 18_000).unwrap();
        }
        seq += 1;
    }
    let error = append(&mut journal, seq, 18_000).unwrap_err();
    assert!(matches!(error, AppendError::Full { .. }), "{error}");
    let (segment, offset) = (journal.waits_for().unwrap() + 1, 4096);
    journal.release(Position { segment, offset });
    assert!(append(&mut journal, seq, 18_000).is_ok());
}

#[test]
fn free_space_is_kept_and_too_large_a_batch_refused() {
    let disk = SimDisk::new(1);
    disk.set_capacity(200 << 10);
    let options = Options {
        min_free: 100 << 10,
        ..options()
    };
    let start = Position::default();
    let mut journal = open_with(&disk, options, start, start);
    assert!(append(&mut journal, 1, 60_000).is_ok());
    let error = append(&mut journal, 2, 60_000).unwrap_err();
    assert!(matches!(error, AppendError::Space { .. }), "{error}");
    let error = append(&mut journal, 2, 70_000).unwrap_err();
    assert!(matches!(error, AppendError::Io { .. }), "{error}");
    disk.set_capacity(1 << 20);
    assert!(append(&mut journal, 2, 60_000).is_ok());
}

#[test]
fn a_full_disk_is_told_and_goes_on_when_there_is_space() {
    let disk = SimDisk::new(1);
    disk.set_capacity(80 << 10);
    let mut journal = open(&disk);
    append(&mut journal, 1, 50_000).unwrap();
    for _ in 0..3 {
        let error = append(&mut journal, 2, 50_000).unwrap_err();
        assert!(matches!(error, AppendError::Io { .. }), "{error}");
    }
    disk.set_capacity(1 << 20);
    append(&mut journal, 2, 50_000).unwrap();
    assert_eq!(sequence(&disk, Position::default()), [1, 2]);
    assert_eq!(disk.list(Path::new(DIR)).unwrap().len(), 2);
}

/// The file of a segment that could not be begun is used for it later, and for no other one.
#[test]
fn a_segment_that_was_begun_in_vain_is_not_taken_for_a_spare_one() {
    let disk = SimDisk::new(1);
    let mut journal = open(&disk);
    append(&mut journal, 1, 60_000).unwrap();
    let place = append(&mut journal, 2, 60_000).unwrap();
    disk.fail(1, 1, 5);
    assert!(append(&mut journal, 3, 60_000).is_err());
    journal.release(place);
    for seq in 3..=5 {
        append(&mut journal, seq, 60_000).unwrap();
    }
    assert_eq!(sequence(&disk, place), [3, 4, 5]);
}

#[derive(Clone, Debug)]
enum Step {
    Append(usize),
    Sync,
    Release,
    Fail(u64, u64),
    Restart,
    Crash,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (1..40_000_usize).prop_map(Step::Append),
        4 => Just(Step::Sync),
        2 => Just(Step::Release),
        1 => (0..6_u64, 1..4_u64).prop_map(|(after, times)| Step::Fail(after, times)),
        1 => Just(Step::Restart),
        1 => Just(Step::Crash),
    ];
    prop::collection::vec(step, 1..60)
}

/// A journal, and what must be in it.
struct Model {
    disk: SimDisk,
    journal: Option<Journal>,
    released: Position,
    next_seq: u64,
    /// Batches between `released` and the end: number, bytes, place behind it.
    batches: Vec<(u64, usize, Position)>,
    durable: usize,
    /// Number and bytes of those that count as not written, and may come back all the same.
    ghosts: Vec<(u64, usize)>,
}

impl Model {
    fn append(&mut self, bytes: usize) {
        let (seq, journal) = (self.next_seq, self.journal.as_mut().unwrap());
        match journal.append(&[&vec![fill(seq); bytes]], info(seq), Uuid::NONE) {
            Ok(place) => {
                self.batches.push((seq, bytes, place));
                self.next_seq += 1;
                self.ghosts.clear();
            }
            Err(AppendError::Io { .. }) => {
                self.fall_back();
                self.ghosts.push((seq, bytes));
            }
            Err(_) => {}
        }
    }

    /// After an error, the journal ends at its last durable batch.
    fn fall_back(&mut self) {
        let durable = self.journal.as_ref().unwrap().durable();
        let kept = self.batches.iter().filter(|batch| batch.2 <= durable);
        // A segment that was left was synced for it.
        let kept = kept.count();
        assert!(kept >= self.durable);
        let next = self
            .batches
            .get(kept)
            .map_or(self.next_seq, |batch| batch.0);
        let ghosts = self.batches.drain(kept..);
        self.ghosts.extend(ghosts.map(|batch| (batch.0, batch.1)));
        self.durable = kept;
        self.next_seq = next;
    }

    fn sync(&mut self) {
        match self.journal.as_mut().unwrap().sync() {
            Ok(()) => {
                self.durable = self.batches.len();
                self.ghosts.clear();
            }
            Err(_) => self.fall_back(),
        }
    }

    fn release(&mut self) {
        let Some((_, _, place)) = self.batches.get(self.durable / 2) else {
            return;
        };
        if self.durable == 0 {
            return;
        }
        self.released = *place;
        self.journal.as_mut().unwrap().release(*place);
        self.batches.drain(..=self.durable / 2);
        self.durable -= self.durable / 2 + 1;
    }

    /// Reads everything back and goes on behind it.
    fn reopen(&mut self) {
        self.journal = None;
        let mut reader = reader(&self.disk, self.released);
        let (mut end, mut found) = (self.released, 0);
        let first = self.batches.first().map_or(self.next_seq, |batch| batch.0);
        while let Some(batch) = reader.next_batch().unwrap() {
            let seq = batch.header.first_seq;
            let whole = batch.frames.iter().all(|byte| *byte == fill(seq));
            if seq != first + found || !whole {
                break;
            }
            let found_now = (seq, batch.frames.len());
            match self.batches.get(usize::try_from(found).unwrap()) {
                Some((seq, bytes, place)) => {
                    assert_eq!((found_now, batch.end), ((*seq, *bytes), *place));
                }
                None => {
                    assert!(self.ghosts.contains(&found_now), "{found_now:?}");
                    self.batches.push((seq, found_now.1, batch.end));
                }
            }
            end = batch.end;
            found += 1;
        }
        let found = usize::try_from(found).unwrap();
        assert!(found >= self.durable, "{found} of {} durable", self.durable);
        self.batches.truncate(found);
        self.ghosts.clear();
        self.durable = found;
        self.next_seq = first + found as u64;
        self.journal = Some(open_with(&self.disk, options(), self.released, end));
    }
}

proptest! {
    #[test]
    fn what_was_durable_comes_back_and_nothing_else_ever(seed: u64, steps in steps()) {
        let disk = SimDisk::new(seed);
        let mut model = Model {
            journal: Some(open(&disk)),
            disk,
            released: Position::default(),
            next_seq: 1,
            batches: vec![],
            durable: 0,
            ghosts: vec![],
        };
        for step in steps {
            match step {
                Step::Append(bytes) => model.append(bytes),
                Step::Sync => model.sync(),
                Step::Release => model.release(),
                Step::Fail(after, times) => model.disk.fail(after, times, 5),
                Step::Restart => {
                    model.disk.restart();
                    model.reopen();
                }
                Step::Crash => {
                    model.disk.crash();
                    model.reopen();
                }
            }
        }
        model.disk.restart();
        model.reopen();
    }
}

proptest! {
    /// A program is killed before it has synced, or after that has failed, and its successor reads what memory has.
    #[test]
    fn what_was_hardened_survives_a_power_cut(seed: u64, fails: bool) {
        let disk = SimDisk::new(seed);
        let mut journal = open(&disk);
        for seq in 1..=3 {
            append(&mut journal, seq, 18_000).unwrap();
        }
        for seq in 4..=6 {
            journal.append(&[&[fill(seq); 18_000]], info(seq), Uuid::NONE).unwrap();
        }
        if fails {
            disk.fail(0, 1, EIO);
            prop_assert!(journal.sync().is_err());
        }
        disk.restart();
        let read = sequence(&disk, Position::default());
        reader(&disk, Position::default()).harden().unwrap();
        disk.crash();
        let survived = sequence(&disk, Position::default());
        prop_assert_eq!(read, survived);
        let mut reader = reader(&disk, Position::default());
        while let Some(batch) = reader.next_batch().unwrap() {
            let expected = fill(batch.header.first_seq);
            prop_assert!(batch.frames.iter().all(|byte| *byte == expected));
        }
    }
}
