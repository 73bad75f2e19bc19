// SPDX-License-Identifier: GPL-2.0-only

//! The dirty map against a vector of flags.

use std::sync::{atomic::AtomicU64, Barrier};

use proptest::{collection::vec, prelude::*};

use crate::dirty::{shift_for, words_for, DirtyMap, Next};

type Map = DirtyMap<Vec<AtomicU64>>;

fn map(sectors: u64, shift: u32) -> Map {
    let words = (0..words_for(sectors, shift))
        .map(|_| AtomicU64::new(0))
        .collect();
    DirtyMap::new(words, sectors, shift).expect("the size is sane")
}

/// One flag per block.
struct Model {
    sectors: u64,
    block: u64,
    dirty: Vec<bool>,
}

impl Model {
    fn new(sectors: u64, shift: u32) -> Self {
        let block = 1 << shift;
        let blocks = usize::try_from(sectors.div_ceil(block)).expect("small");
        Self {
            sectors,
            block,
            dirty: vec![false; blocks],
        }
    }

    fn of(map: &Map) -> Self {
        let mut model = Self::new(map.sectors(), map.shift());
        for (start, sectors) in extents(map, u64::MAX, 1) {
            model.mark(start, sectors);
        }
        model
    }

    /// Start and end of each block, in sectors.
    fn blocks(&mut self) -> impl Iterator<Item = (u64, u64, &mut bool)> {
        let (block, sectors) = (self.block, self.sectors);
        (0..)
            .map(move |n| n * block)
            .zip(&mut self.dirty)
            .map(move |(start, dirty)| (start, sectors.min(start + block), dirty))
    }

    fn mark(&mut self, start: u64, sectors: u64) -> u64 {
        let end = start + sectors;
        self.blocks()
            .filter(|(s, e, _)| start.max(*s) < end.min(*e))
            .map(|(_, _, dirty)| u64::from(!std::mem::replace(dirty, true)))
            .sum()
    }

    fn clear(&mut self, start: u64, sectors: u64) -> u64 {
        let end = start + sectors;
        self.blocks()
            .filter(|(s, e, _)| start <= *s && *e <= end)
            .map(|(_, _, dirty)| u64::from(std::mem::take(dirty)))
            .sum()
    }

    fn count(&self) -> u64 {
        self.dirty.iter().map(|dirty| u64::from(*dirty)).sum()
    }
}

/// All extents, found in small steps.
fn extents(map: &Map, max_sectors: u64, max_words: usize) -> Vec<(u64, u64)> {
    let (mut from, mut found) = (0, Vec::new());
    loop {
        match map.next(from, max_sectors, max_words) {
            Next::Found { start, sectors } => {
                assert!(start >= from && sectors > 0 && start + sectors <= map.sectors());
                assert_eq!(start % (1 << map.shift()), 0);
                assert!(sectors <= max_sectors.max(1 << map.shift()));
                found.push((start, sectors));
                from = start + sectors;
            }
            Next::ContinueAt(sector) => {
                assert!(sector > from);
                from = sector;
            }
            Next::Nothing => return found,
        }
    }
}

fn flags_of(extents: &[(u64, u64)], model: &Model) -> Vec<bool> {
    let mut flags = Model {
        sectors: model.sectors,
        block: model.block,
        dirty: vec![false; model.dirty.len()],
    };
    for (start, sectors) in extents {
        assert_eq!(
            flags.mark(*start, *sectors),
            sectors.div_ceil(model.block),
            "an extent twice"
        );
    }
    flags.dirty
}

#[derive(Clone, Debug)]
enum Step {
    Mark(u64, u64),
    Clear(u64, u64),
}

fn steps(sectors: u64) -> impl Strategy<Value = Vec<Step>> {
    let range = || (0..sectors + 20, prop_oneof![0..30_u64, 0..=sectors + 30]);
    vec(
        prop_oneof![
            range().prop_map(|(start, sectors)| Step::Mark(start, sectors)),
            range().prop_map(|(start, sectors)| Step::Clear(start, sectors)),
        ],
        0..40,
    )
}

fn device() -> impl Strategy<Value = (u64, u32, Vec<Step>)> {
    (1..3000_u64, 0..8_u32)
        .prop_flat_map(|(sectors, shift)| (Just(sectors), Just(shift), steps(sectors)))
}

fn apply(map: &Map, steps: &[Step]) {
    for step in steps {
        match *step {
            Step::Mark(start, sectors) => map.mark(start, sectors),
            Step::Clear(start, sectors) => map.clear_covered(start, sectors),
        };
    }
}

proptest! {
    #[test]
    fn dirty_map_agrees_with_a_vector_of_flags(
        (sectors, shift, steps) in device(), max_sectors in 1..500_u64, max_words in 0..5_usize,
    ) {
        let map = map(sectors, shift);
        let mut model = Model::new(sectors, shift);
        for step in steps {
            match step {
                Step::Mark(start, sectors) => prop_assert_eq!(map.mark(start, sectors), model.mark(start, sectors)),
                Step::Clear(start, sectors) => prop_assert_eq!(map.clear_covered(start, sectors), model.clear(start, sectors)),
            }
            prop_assert_eq!(map.count(), model.count());
            prop_assert_eq!(&flags_of(&extents(&map, max_sectors, max_words), &model), &model.dirty);
        }
    }

    #[test]
    fn a_range_is_dirty_if_one_of_its_blocks_is((sectors, shift, steps) in device(), start in 0..3000_u64, length in 0..300_u64) {
        let map = map(sectors, shift);
        apply(&map, &steps);
        let (mut model, end) = (Model::of(&map), start + length);
        let expected = model.blocks().any(|(s, e, dirty)| *dirty && start.max(s) < end.min(e));
        prop_assert_eq!(map.any(start, length), expected);
    }

    #[test]
    fn search_starts_with_the_block_that_holds_the_sector((sectors, shift, steps) in device(), from in 0..3000_u64) {
        let map = map(sectors, shift);
        apply(&map, &steps);
        let block = from >> shift << shift;
        let expected = extents(&map, 1, usize::MAX).into_iter().find(|(start, _)| *start >= block);
        let got = match map.next(from, 1, usize::MAX) {
            Next::Found { start, sectors } => Some((start, sectors)),
            Next::Nothing => None,
            Next::ContinueAt(_) => unreachable!("no limit was given"),
        };
        prop_assert_eq!(got, expected.filter(|_| from < sectors));
    }

    #[test]
    fn resize_keeps_every_dirty_block_and_adds_none_elsewhere(
        (sectors, shift, steps) in device(), new_sectors in 1..3000_u64, new_shift in 0..8_u32,
    ) {
        let old = map(sectors, shift);
        apply(&old, &steps);
        let new = map(new_sectors, new_shift);
        new.copy_from(&old);
        let mut expected = Model::new(new_sectors, new_shift);
        for (start, dirty) in (0..).step_by(1 << shift).zip(Model::of(&old).dirty) {
            if dirty {
                expected.mark(start, (sectors - start).min(1 << shift));
            }
        }
        prop_assert_eq!(Model::of(&new).dirty, expected.dirty);
        prop_assert_eq!(new.count(), Model::of(&new).count());
    }
}

proptest! {
    /// Whatever the caller hands in: no panic, no overflow, nothing outside the device.
    #[test]
    fn dirty_map_survives_any_numbers(sectors in 1..3000_u64, shift in 0..8_u32, calls in vec((any::<u64>(), any::<u64>()), 0..10)) {
        let map = map(sectors, shift);
        for (start, length) in calls {
            map.mark(start, length);
            map.clear_covered(length, start);
            map.next(start, length, usize::MAX);
            prop_assert!(map.count() <= sectors.div_ceil(1 << shift));
        }
        map.clear_covered(0, u64::MAX);
        prop_assert_eq!((map.count(), map.next(0, u64::MAX, usize::MAX)), (0, Next::Nothing));
    }
}

#[test]
fn blocks_grow_with_the_device() {
    const TIB: u64 = 1 << 31;
    let table = [
        (1, 3),
        (TIB, 3),
        (TIB + 1, 4),
        (2 * TIB, 4),
        (2 * TIB + 1, 5),
        (8 * TIB, 6),
        (16 * TIB, 7),
        (1000 * TIB, 7),
        (u64::MAX, 7),
    ];
    for (sectors, shift) in table {
        assert_eq!(shift_for(sectors), shift, "{sectors} sectors");
    }
}

#[test]
fn map_takes_at_most_32_mib_for_each_tib() {
    const TIB: u64 = 1 << 31;
    for tib in [1, 2, 3, 4, 5, 8, 15, 16, 17, 100] {
        let bytes = words_for(tib * TIB, shift_for(tib * TIB)) as u64 * 8;
        assert!(bytes <= tib * (32 << 20), "{tib} TiB: {bytes} bytes");
        assert!(tib > 16 || bytes <= 32 << 20, "{tib} TiB: {bytes} bytes");
    }
}

#[test]
fn map_without_enough_words_is_refused() {
    let words = |count: usize| (0..count).map(|_| AtomicU64::new(0)).collect::<Vec<_>>();
    assert!(DirtyMap::new(words(1), 8 * 64, 3).is_some());
    assert!(DirtyMap::new(words(1), 8 * 64 + 1, 3).is_none());
    assert!(DirtyMap::new(words(1), (1 << 63) + 1, 32).is_none());
    assert!(DirtyMap::new(words(1), 8, 33).is_none());
    assert!(DirtyMap::new(words(0), 0, 3).is_some());
}

/// Ranges that do not overlap, as the gate sees to it, but share words of the map.
#[test]
fn neighbours_do_not_lose_each_others_bits() {
    const THREADS: u64 = 4;
    const BLOCKS: u64 = 13;
    let start_together = Barrier::new(THREADS as usize);
    let map = map(THREADS * BLOCKS * 8, 3);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (map, start_together) = (&map, &start_together);
            scope.spawn(move || {
                start_together.wait();
                let (start, sectors) = (thread * BLOCKS * 8, BLOCKS * 8);
                for _ in 0..100_000 {
                    assert_eq!(map.mark(start, sectors), BLOCKS);
                    assert_eq!(map.clear_covered(start + 8, sectors - 16), BLOCKS - 2);
                    assert_eq!(map.mark(start, sectors), BLOCKS - 2);
                    assert_eq!(map.clear_covered(start, sectors), BLOCKS);
                }
                map.mark(start + 8, 1);
            });
        }
    });
    assert_eq!(map.count(), THREADS);
    let expected: Vec<_> = (0..THREADS)
        .map(|thread| (thread * BLOCKS * 8 + 8, 8))
        .collect();
    assert_eq!(extents(&map, u64::MAX, 1), expected);
}
