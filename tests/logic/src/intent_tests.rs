// SPDX-License-Identifier: GPL-2.0-only

//! The write-intent map and its file against a plain model of a device, a target and a disk that may lose its
//! power at any moment.
//!
//! What must hold whenever it does: every region in which source and target may differ is marked on the disk.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*};

use crate::intent::{
    chunks_for, regions_for, Cell, Chunk, IntentMap, CHUNK_BYTES, CHUNK_REGIONS, CHUNK_WORDS,
    SHIFT_MIN,
};
use crate::intent_layout::{
    parse, Base, Content, DeviceSector, Head, MarksSector, Sector, BASES_MAX, MARKS_AT,
};

type Map = IntentMap<Vec<Cell>, Vec<Chunk>>;

const REGION: u64 = 1 << SHIFT_MIN;

fn map(sectors: u64) -> Map {
    let chunks = chunks_for(sectors, SHIFT_MIN);
    let cells = vec![Cell::default(); chunks * CHUNK_WORDS];
    IntentMap::new(cells, vec![Chunk::default(); chunks], sectors, SHIFT_MIN).expect("sane")
}

fn bits_of(marks: &BTreeSet<u64>, chunk: usize) -> [u8; CHUNK_BYTES] {
    let mut bits = [0; CHUNK_BYTES];
    for region in marks {
        if region / CHUNK_REGIONS == chunk as u64 {
            let bit = region % CHUNK_REGIONS;
            bits[(bit / 8) as usize] |= 1 << (bit % 8);
        }
    }
    bits
}

fn regions_in(bits: &[u8], chunk: usize) -> BTreeSet<u64> {
    (0..CHUNK_REGIONS)
        .filter(|bit| bits[(bit / 8) as usize] & (1 << (bit % 8)) != 0)
        .map(|bit| chunk as u64 * CHUNK_REGIONS + bit)
        .collect()
}

/// A device with its map, its stream and the disk of the intent file.
struct World {
    map: Map,
    sectors: u64,
    /// Marks on disk by chunk; `flight`: what is being written.
    disk: BTreeMap<usize, BTreeSet<u64>>,
    flight: BTreeMap<usize, BTreeSet<u64>>,
    /// Changes in the stream: number and regions. The target has those below `acked`.
    records: Vec<(u64, BTreeSet<u64>)>,
    next_seq: u64,
    acked: u64,
    /// Regions with changes that are in no record.
    dirty: BTreeSet<u64>,
    /// Regions that a former life left marked, in which both sides differ.
    differ: BTreeSet<u64>,
    round_end: Option<u64>,
    /// Changes that wait for marks: start, sectors, whether they will find room in the ring.
    waiting: Vec<(u64, u64, bool)>,
}

impl World {
    fn new(sectors: u64) -> Self {
        Self {
            map: map(sectors),
            sectors,
            disk: BTreeMap::new(),
            flight: BTreeMap::new(),
            records: vec![],
            next_seq: 1,
            acked: 1,
            dirty: BTreeSet::new(),
            differ: BTreeSet::new(),
            round_end: None,
            waiting: vec![],
        }
    }

    fn regions(&self, start: u64, sectors: u64) -> BTreeSet<u64> {
        (start / REGION..=(start + sectors - 1) / REGION).collect()
    }

    fn record(&mut self, regions: BTreeSet<u64>) {
        self.records.push((self.next_seq, regions));
        self.next_seq += 1;
    }

    /// A change; `tracked`: without room in the ring.
    fn change(&mut self, start: u64, sectors: u64, tracked: bool) {
        if self.map.touch(start, sectors) || self.map.mark(start, sectors, true) {
            self.go_ahead(start, sectors, tracked);
        } else {
            self.waiting.push((start, sectors, tracked));
        }
    }

    fn go_ahead(&mut self, start: u64, sectors: u64, tracked: bool) {
        assert!(self.map.touch(start, sectors), "it was safe just now");
        let regions = self.regions(start, sectors);
        if tracked {
            self.dirty.extend(regions);
        } else {
            self.record(regions);
        }
    }

    /// Changes whose regions are safe by now go ahead.
    fn wake(&mut self) {
        for (start, sectors, tracked) in std::mem::take(&mut self.waiting) {
            // It asks again: a mark that it found may have been taken away meanwhile.
            if self.map.mark(start, sectors, false) {
                self.go_ahead(start, sectors, tracked);
            } else {
                self.waiting.push((start, sectors, tracked));
            }
        }
    }

    /// A SYNC read of a whole region clears it, and goes into the stream.
    fn sync(&mut self, region: u64) {
        if self.dirty.remove(&region) {
            self.map.note(region * REGION, 1);
            self.record([region].into());
        }
    }

    fn begin_writes(&mut self) {
        let mut from = 0;
        let mut bits = [0; CHUNK_BYTES];
        while let Some(chunk) = self.map.begin_write(from, &mut bits) {
            self.flight.insert(chunk, regions_in(&bits, chunk));
            from = chunk + 1;
        }
    }

    fn finish_writes(&mut self) {
        for (chunk, marks) in std::mem::take(&mut self.flight) {
            self.disk.insert(chunk, marks);
            self.map.written(chunk, true);
        }
    }

    /// The writes fail: each sector is old or new.
    fn fail_writes(&mut self, kept: u64) {
        for (chunk, marks) in std::mem::take(&mut self.flight) {
            if (kept >> (chunk % 64)) & 1 != 0 {
                self.disk.insert(chunk, marks);
            }
            self.map.written(chunk, false);
        }
    }

    fn write_all(&mut self) {
        self.begin_writes();
        self.finish_writes();
    }

    fn round(&mut self) {
        let acked = self.acked;
        match self.round_end {
            Some(end) if acked >= end => {
                let dirty = self.dirty.clone();
                let mut at = Some(0);
                while let Some(from) = at {
                    at = self
                        .map
                        .clear_step(from, 3, acked, |start, _| dirty.contains(&(start / REGION)));
                }
            }
            Some(_) => return,
            None => {}
        }
        self.round_end = Some(self.next_seq);
    }

    /// Regions in which both sides may differ.
    fn exposed(&self) -> BTreeSet<u64> {
        let unacked = self.records.iter().filter(|(seq, _)| *seq >= self.acked);
        let mut exposed: BTreeSet<u64> = unacked.flat_map(|(_, regions)| regions.clone()).collect();
        exposed.extend(&self.dirty);
        exposed.extend(&self.differ);
        exposed
    }

    /// What a power cut leaves on the disk: each sector in flight old or new.
    fn after_cut(&self, kept: u64) -> BTreeMap<usize, BTreeSet<u64>> {
        let mut disk = self.disk.clone();
        for (chunk, marks) in &self.flight {
            if (kept >> (chunk % 64)) & 1 != 0 {
                disk.insert(*chunk, marks.clone());
            }
        }
        disk
    }

    fn check(&self, kept: u64) {
        let marked: BTreeSet<u64> = self.after_cut(kept).into_values().flatten().collect();
        let missing: Vec<_> = self.exposed().difference(&marked).copied().collect();
        assert!(
            missing.is_empty(),
            "regions {missing:?} differ and are not marked"
        );
    }

    /// The power fails and comes back.
    fn cut(&mut self, kept: u64) {
        let (disk, differ) = (self.after_cut(kept), self.exposed());
        *self = Self::new(self.sectors);
        for (chunk, marks) in &disk {
            self.map.inherit(*chunk, &bits_of(marks, *chunk));
        }
        (self.disk, self.differ) = (disk, differ);
        let mut suspects = BTreeSet::new();
        let mut from = 0;
        while let Ok((start, sectors)) = self.map.next_suspect(from, usize::MAX) {
            suspects.extend(self.regions(start, sectors));
            from = start + sectors;
        }
        assert!(
            self.differ.is_subset(&suspects),
            "all that differs is compared"
        );
        assert_eq!(self.map.suspects(), suspects.len() as u64);
        assert_eq!(self.map.marked(), suspects.len() as u64);
    }

    /// A region was compared, and sent if it differed: by a record that the target has.
    fn settle(&mut self, region: u64) {
        self.differ.remove(&region);
        self.map.settle(region * REGION, REGION);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Change {
        start: u64,
        sectors: u64,
        tracked: bool,
    },
    Sync(u64),
    Begin,
    Finish,
    Fail(u64),
    Ack(u64),
    Round,
    Settle(u64),
    Cut(u64),
}

const SECTORS: u64 = (CHUNK_REGIONS + 130) * REGION - 9;

fn step() -> impl Strategy<Value = Step> {
    // Few regions, at the edges of words and chunks, so that steps meet.
    let region = prop_oneof![0..4_u64, 62..66_u64, CHUNK_REGIONS - 2..CHUNK_REGIONS + 2];
    let start = (region.clone(), 0..REGION).prop_map(|(region, inside)| region * REGION + inside);
    prop_oneof![
        6 => (start, 1..3 * REGION, any::<bool>())
            .prop_map(|(start, sectors, tracked)| Step::Change { start, sectors, tracked }),
        2 => region.clone().prop_map(Step::Sync),
        3 => Just(Step::Begin),
        3 => Just(Step::Finish),
        1 => any::<u64>().prop_map(Step::Fail),
        3 => (0..6_u64).prop_map(Step::Ack),
        4 => Just(Step::Round),
        2 => region.prop_map(Step::Settle),
        1 => any::<u64>().prop_map(Step::Cut),
    ]
}

proptest! {
    #[test]
    fn whatever_differs_is_marked_on_disk(steps in vec(step(), 1..120), kept: u64) {
        let mut world = World::new(SECTORS);
        for step in steps {
            match step {
                Step::Change { start, sectors, tracked } => world.change(start, sectors, tracked),
                Step::Sync(region) => world.sync(region),
                Step::Begin => {
                    world.finish_writes();
                    world.begin_writes();
                }
                Step::Finish => world.finish_writes(),
                Step::Fail(kept) => world.fail_writes(kept),
                Step::Ack(more) => world.acked = (world.acked + more).min(world.next_seq),
                Step::Round => world.round(),
                Step::Settle(region) => world.settle(region),
                Step::Cut(kept) => world.cut(kept),
            }
            world.wake();
            world.check(kept);
            world.check(0);
            world.check(u64::MAX);
        }
        world.finish_writes();
        world.wake();
        world.write_all();
        world.wake();
        prop_assert!(world.waiting.is_empty(), "a mark that is wanted is written");
    }
}

#[test]
fn marks_go_when_the_target_has_everything_and_the_region_rests() {
    let mut world = World::new(SECTORS);
    world.change(0, 8, false);
    world.change(5 * REGION, 8, true);
    world.write_all();
    world.wake();
    assert_eq!(world.map.marked(), 2);
    world.round();
    world.acked = world.next_seq;
    world.round();
    assert_eq!(world.map.marked(), 2, "touched since the last round");
    world.round();
    assert_eq!(world.map.marked(), 1, "the dirty one stays");
    world.sync(5);
    world.round();
    world.acked = world.next_seq;
    world.round();
    world.round();
    assert_eq!(world.map.marked(), 0);
    world.write_all();
    assert!(world.disk.values().all(BTreeSet::is_empty));
}

#[test]
fn one_write_serves_all_who_wait() {
    let mut map = map(SECTORS);
    assert!(!map.mark(0, 8, true) && !map.mark(9 * REGION, 8, true));
    let mut bits = [0; CHUNK_BYTES];
    assert_eq!(map.begin_write(0, &mut bits), Some(0));
    assert_eq!(regions_in(&bits, 0), [0, 9].into());
    assert!(!map.mark(20 * REGION, 8, true), "too late for this write");
    map.written(0, true);
    assert!(map.is_safe(0, 8) && map.is_safe(9 * REGION, 8) && !map.is_safe(20 * REGION, 8));
    assert_eq!(map.begin_write(0, &mut bits), Some(0));
    map.written(0, true);
    assert!(map.touch(20 * REGION, 8));
    assert_eq!(map.begin_write(0, &mut bits), None);
    assert_eq!(map.misses(), 3);
}

#[test]
fn a_mark_that_is_still_in_the_file_costs_no_write() {
    let mut world = World::new(SECTORS);
    world.change(0, 8, false);
    world.write_all();
    world.wake();
    world.acked = world.next_seq;
    world.round();
    world.round();
    world.round();
    assert_eq!(world.map.marked(), 0);
    assert!(world.map.mark(0, 8, true));
    assert_eq!(world.map.marked(), 1);
}

#[test]
fn a_map_that_comes_late_marks_everything() {
    let mut map = map(SECTORS);
    map.set_place(1, 77);
    map.mark_all();
    assert_eq!((map.chunks(), map.place(0), map.place(1)), (2, 0, 77));
    assert_eq!(map.marked(), regions_for(SECTORS, SHIFT_MIN));
    let mut bits = [0; CHUNK_BYTES];
    for chunk in 0..2 {
        assert_eq!(map.begin_write(chunk, &mut bits), Some(chunk));
        map.written(chunk, true);
    }
    assert!(map.touch(0, SECTORS));
    let mut at = Some(0);
    while let Some(from) = at {
        at = map.clear_step(from, 4, 5, |_, _| false);
    }
    assert_eq!(
        (map.marked(), map.acked()),
        (regions_for(SECTORS, SHIFT_MIN), 0)
    );
    while map.clear_step(0, usize::MAX / 2, 5, |_, _| false).is_some() {}
    assert_eq!((map.marked(), map.acked()), (0, 5));
}

#[test]
fn a_device_that_grows_keeps_its_marks() {
    let small = 10 * REGION;
    let mut old = map(small);
    let mut bits = [0; CHUNK_BYTES];
    assert!(!old.mark(0, small, true));
    old.begin_write(0, &mut bits);
    old.written(0, true);
    let mut new = map(SECTORS);
    new.take_over(&old);
    assert!(new.touch(0, small) && !new.touch(small, 8));
    assert_eq!(new.marked(), 10);
    let mut shrunk = map(3 * REGION);
    shrunk.take_over(&old);
    assert_eq!(shrunk.marked(), 3);
}

#[test]
fn marks_beyond_the_end_are_not_taken_over() {
    let mut map = map(10 * REGION);
    map.inherit(0, &[0xff; CHUNK_BYTES]);
    assert_eq!((map.marked(), map.suspects()), (10, 10));
    assert_eq!(map.next_suspect(3, 100), Ok((0, 10 * REGION)));
    map.settle(0, 2 * REGION - 1);
    assert_eq!(map.next_suspect(0, 100), Ok((REGION, 9 * REGION)));
    map.settle(0, 10 * REGION);
    assert_eq!(map.next_suspect(0, 100), Err(None));
    map.suspect(0, 1);
    assert_eq!(map.suspects(), 1, "what is marked can become suspect again");
}

#[test]
fn a_run_that_the_last_look_finds_is_told_whole() {
    let mut map = map(SECTORS);
    let mut bits = [0; CHUNK_BYTES];
    bits[16..19].fill(0xff);
    map.inherit(0, &bits);
    // The third look finds its beginning.
    assert_eq!(map.next_suspect(0, 3), Err(Some(128 * REGION)));
    assert_eq!(
        map.next_suspect(128 * REGION, 3),
        Ok((128 * REGION, 24 * REGION))
    );
    // Nothing lies behind the end, although the last region is not a whole one.
    map.inherit(1, &[0xff; CHUNK_BYTES]);
    let (start, sectors) = map.next_suspect(SECTORS - REGION, 9).unwrap();
    assert_eq!(start + sectors, SECTORS);
    assert_eq!(map.next_suspect(SECTORS, 9), Err(None));
}

// ---------------------------------------------------------------------------------------------
// The file
// ---------------------------------------------------------------------------------------------

const FILE: [u8; 16] = [7; 16];

fn head() -> Head {
    Head {
        version: 9,
        file: FILE,
        shift: 13,
        life: 0,
        void: false,
        source: [1; 16],
        set: [b'a'; 64],
        bases: [Base::default(); BASES_MAX],
    }
}

#[test]
fn what_is_written_is_read() {
    let mut head = head();
    head.enter([3; 16]);
    head.enter([4; 16]);
    assert_eq!(
        parse(&head.format(crc32fast::hash), None, crc32fast::hash),
        Content::Head(head)
    );
    let device = DeviceSector {
        slot: 3,
        sectors: 1 << 40,
        identity: [5; 16],
        label: [b'v'; 64],
    };
    let sector = device.format(1, FILE, crc32fast::hash);
    assert_eq!(
        parse(&sector, Some(FILE), crc32fast::hash),
        Content::Device(device)
    );
    assert_eq!(
        parse(&sector, Some([8; 16]), crc32fast::hash),
        Content::Free
    );
    let marks = MarksSector {
        slot: 3,
        index: 77,
        life: 2,
        acked: 1 << 50,
    };
    let sector = marks.format(1, FILE, &[0xa5; CHUNK_BYTES], crc32fast::hash);
    assert_eq!(
        parse(&sector, Some(FILE), crc32fast::hash),
        Content::Marks(marks)
    );
    assert_eq!(sector[MARKS_AT..], [0xa5; CHUNK_BYTES]);
    assert_eq!(regions_for(1 << 40, 13), 1 << 27);
}

#[test]
fn every_damaged_byte_is_noticed() {
    let sector = head().format(crc32fast::hash);
    for at in 0..sector.len() {
        let mut damaged: Sector = sector;
        damaged[at] ^= 0x10;
        let content = parse(&damaged, None, crc32fast::hash);
        let expected = if at < 4 {
            Content::Free
        } else {
            Content::Damaged
        };
        assert_eq!(content, expected, "byte {at}");
    }
}

#[test]
fn the_head_remembers_the_last_streams_until_marks_are_taken_away() {
    let mut head = head();
    assert!(!head.covers_any());
    for stream in 1..=BASES_MAX as u8 + 2 {
        head.enter([stream; 16]);
    }
    assert_eq!(
        head.bases[0].stream, [3; 16],
        "the oldest ones are forgotten"
    );
    assert_eq!(
        head.bases[BASES_MAX - 1],
        Base {
            stream: [10; 16],
            life: 10
        }
    );
    assert!(!head.is_current_only());
    head.keep_current();
    assert!(head.is_current_only() && head.covers_any());
    assert_eq!(
        head.bases[0],
        Base {
            stream: [10; 16],
            life: 10
        }
    );
}
