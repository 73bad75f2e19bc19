// SPDX-License-Identifier: GPL-2.0-only

//! The disk queue on a disk that loses power, fails, is full, or rots, at every single operation. Whatever was released
//! from the ring is read back, byte for byte, or is known not to be readable; never is it something else.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test with small numbers"
)]

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtloop_agent::config::{QueueConfig, SyncMode};
use dtloop_agent::queue::{Home, Owner, Queue, QueueReader, stored};
use dtloop_core::ladder::QueueHealth;
use dtloop_core::size::Size;
use dtloop_core::spool::{Place, Spool};
use dtloop_disk::{Disk, DiskFile, SimDisk};
use dtloop_journal::{BatchInfo, Position};
use dtloop_proto::record::{RecordBody, STATE_COMMITTED};
use dtloop_proto::{Op, RecordKind, Uuid, frame};
use nix::errno::Errno;

const SOURCE: Uuid = Uuid([1; 16]);
const STREAM: Uuid = Uuid([2; 16]);
const SEGMENT: u64 = 64 << 10;

fn home(disk: &SimDisk, source_id: Uuid, stream_uuid: Uuid) -> Home {
    Home {
        disk: Arc::new(disk.clone()),
        dir: PathBuf::from("/queue/db"),
        config: QueueConfig {
            dir: "/queue".into(),
            size: Size(8 * SEGMENT),
            min_free: Size(0),
            segment_size: Size(SEGMENT),
            start_at: 50,
            sync: SyncMode::Group,
        },
        owner: Owner {
            source_id,
            stream_uuid,
        },
    }
}

/// The record of that number: its content says which it is.
fn record(seq: u64) -> Vec<u8> {
    let sectors = 1 + seq % 9;
    let body = RecordBody {
        epoch: 0,
        start_sector: seq,
        time_ns: seq * 1000,
        aux: 0,
        sectors: sectors as u32,
        device: 1,
        flags: 0,
        op: Op::Write,
        state: STATE_COMMITTED,
    };
    let payload: Vec<u8> = (0..sectors * 512).map(|at| (seq * 31 + at) as u8).collect();
    let mut bytes = vec![];
    frame::encode_record(&mut bytes, 0, seq, RecordKind::Data, &body, &payload).unwrap();
    bytes.extend_from_slice(&payload);
    bytes
}

/// What survives the agent: the kernel's ring from `released` on, and what the target has.
struct World {
    disk: SimDisk,
    released: u64,
    acked: u64,
}

/// An agent that has found its queue.
struct Life {
    queue: Queue,
    spool: Spool<Position>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self {
            disk: SimDisk::new(seed),
            released: 1,
            acked: 1,
        }
    }

    fn begin(&self) -> Result<Life, QueueHealth> {
        let (queue, spool) = Queue::find(
            home(&self.disk, SOURCE, STREAM),
            self.released,
            false,
            || (),
        )?;
        Ok(Life { queue, spool })
    }

    /// Writes batches, syncs, releases, and lets the target acknowledge, as far as it goes.
    fn work(&mut self, life: &mut Life, turns: u64) -> Result<(), QueueHealth> {
        for turn in 0..turns {
            let first = life.spool.append_at(self.released);
            let next = first + 1 + turn % 4;
            let frames: Vec<u8> = (first..next).flat_map(record).collect();
            let info = BatchInfo {
                frames: (next - first) as u32,
                digest: digest(&frames),
                first_seq: first,
                next_seq: next,
            };
            match life.queue.append(&[&frames], info, first * 1000) {
                Ok(batch) => life.spool.on_written(batch),
                Err(trouble) => {
                    if !trouble.keeps {
                        life.spool.on_failed();
                    }
                    return Err(trouble.health);
                }
            }
            if turn % 3 == 2 {
                if let Err(health) = life.queue.sync() {
                    life.spool.on_failed();
                    return Err(health);
                }
                life.spool.on_synced();
                self.released = life.spool.releasable(self.released);
            }
            if turn % 11 == 10 {
                self.acked = self.acked.max(self.released.saturating_sub(20));
                life.spool.on_ack(self.acked - 1);
                life.queue
                    .free(life.spool.oldest().map(|batch| batch.place))?;
            }
        }
        Ok(())
    }

    /// Everything that is only in the queue comes back; gives how much that was.
    fn check(&self, life: &Life) -> u64 {
        let mut reader = QueueReader::new(home(&self.disk, SOURCE, STREAM));
        let mut seq = self.acked;
        while seq < self.released {
            let Place::Queue(batch) = life.spool.place(seq, self.released) else {
                panic!("record {seq} of {}..{} is gone", self.acked, self.released);
            };
            let frames = reader.read(&batch).unwrap();
            let mut rest = &frames[..];
            while !rest.is_empty() {
                let (found, bytes) = stored(rest).unwrap();
                if found.seq >= seq && found.seq < batch.next {
                    assert_eq!(found.seq, seq);
                    assert_eq!(found.frame, record(seq), "record {seq}");
                    seq += 1;
                }
                rest = &rest[bytes..];
            }
        }
        self.released - self.acked
    }
}

fn digest(frames: &[u8]) -> u32 {
    let (mut rest, mut digest) = (frames, crc32fast::Hasher::new());
    while !rest.is_empty() {
        let (_, bytes) = stored(rest).unwrap();
        digest.update(&rest[..48]);
        rest = &rest[bytes..];
    }
    digest.finalize()
}

#[test]
fn a_power_cut_at_any_operation_loses_nothing_that_was_released() {
    let mut checked = 0;
    for at in 0..200 {
        let mut world = World::new(at);
        world.disk.fail(at, u64::MAX, Errno::EIO as i32);
        let worked = world.begin().and_then(|mut life| world.work(&mut life, 60));
        let ended = worked.is_err();
        world.disk.crash();
        let mut life = world.begin().unwrap();
        checked += world.check(&life);
        world.work(&mut life, 30).unwrap();
        checked += world.check(&life);
        world.disk.restart();
        checked += world.check(&world.begin().unwrap());
        assert!(ended || at > 100, "operation {at} was never done");
    }
    assert!(checked > 5000, "{checked}");
}

/// The target may take what was queued before anybody looks what can be given back.
#[test]
fn what_was_taken_at_once_is_given_back() {
    let mut world = World::new(1);
    let mut life = world.begin().unwrap();
    life.queue.free(None).unwrap();
    world.work(&mut life, 9).unwrap();
    assert!(life.queue.usage().unwrap().used > 0);
    life.spool.on_ack(world.released - 1);
    assert!(life.spool.oldest().is_none());
    life.queue.free(None).unwrap();
    assert_eq!(life.queue.usage().unwrap().used, 0);
    let files = world.disk.list(Path::new("/queue/db")).unwrap();
    assert!(files.is_empty(), "{files:?}");
}

#[test]
fn an_agent_killed_at_any_operation_goes_on() {
    for at in 0..200 {
        let mut world = World::new(at);
        world.disk.fail(at, u64::MAX, Errno::EIO as i32);
        // How it ends is of no interest: the process is gone.
        let _ = world.begin().and_then(|mut life| world.work(&mut life, 60));
        world.disk.restart();
        let mut life = world.begin().unwrap();
        world.check(&life);
        world.work(&mut life, 30).unwrap();
        world.check(&life);
    }
}

/// One write or sync fails, or some do, and the agent goes on. Then the power fails.
#[test]
fn after_a_failed_operation_nothing_is_taken_for_written() {
    for times in [1, 3] {
        for at in 0..50 {
            let mut world = World::new(at * 7 + times);
            let mut life = world.begin().unwrap();
            world.work(&mut life, 10).unwrap();
            world.disk.fail(at, times, Errno::EIO as i32);
            for _ in 0..4 {
                // It is tried again and again.
                let _ = world.work(&mut life, 12);
            }
            world.disk.heal();
            world.check(&life);
            world.disk.crash();
            let life = world.begin().unwrap();
            world.check(&life);
        }
    }
}

#[test]
fn a_full_queue_says_so_and_goes_on_when_there_is_room() {
    let mut world = World::new(5);
    let mut life = world.begin().unwrap();
    let health = loop {
        // Nothing is acknowledged in so few turns.
        if let Err(health) = world.work(&mut life, 9) {
            break health;
        }
    };
    assert!(matches!(&health, QueueHealth::Full(reason) if reason.contains("queue.size")));
    assert!(life.queue.probe().is_err());
    life.queue.sync().unwrap();
    life.spool.on_synced();
    world.released = life.spool.releasable(world.released);
    world.check(&life);
    world.acked = world.released - 5;
    life.spool.on_ack(world.acked - 1);
    life.queue
        .free(life.spool.oldest().map(|batch| batch.place))
        .unwrap();
    life.queue.probe().unwrap();
    world.work(&mut life, 9).unwrap();
    world.check(&life);
}

#[test]
fn a_full_or_read_only_file_system_is_told_apart() {
    for (errno, full) in [
        (Errno::ENOSPC, true),
        (Errno::EDQUOT, true),
        (Errno::EROFS, false),
        (Errno::EIO, false),
    ] {
        let mut world = World::new(1);
        let mut life = world.begin().unwrap();
        world.disk.fail(0, u64::MAX, errno as i32);
        let health = world.work(&mut life, 60).unwrap_err();
        assert_eq!(
            matches!(health, QueueHealth::Full(_)),
            full,
            "{errno}: {health:?}"
        );
        assert!(!health.reason().is_empty());
    }
}

fn segments(disk: &SimDisk) -> Vec<String> {
    let mut names = disk.list(Path::new("/queue/db")).unwrap();
    names.retain(|name| name.ends_with(".seg"));
    names
}

fn open(disk: &SimDisk, name: &str) -> Arc<dyn DiskFile> {
    disk.open(&Path::new("/queue/db").join(name), false)
        .unwrap()
}

/// Any flipped byte is found when the batch is read, and what is in front of it comes back whole.
#[test]
fn what_has_rotted_is_known_and_never_sent() {
    let mut world = World::new(9);
    let mut life = world.begin().unwrap();
    world.work(&mut life, 9).unwrap();
    let file = open(&world.disk, &segments(&world.disk)[0]);
    let mut damaged = 0;
    for offset in (4096..12 << 10).step_by(97) {
        let mut byte = [0];
        file.read_at(&mut byte, offset).unwrap();
        file.write_at(&mut [IoSlice::new(&[byte[0] ^ 4])], offset)
            .unwrap();
        let mut reader = QueueReader::new(home(&world.disk, SOURCE, STREAM));
        let mut seq = world.acked;
        while seq < world.released {
            let Place::Queue(batch) = life.spool.place(seq, world.released) else {
                break;
            };
            let frames = reader.read(&batch).unwrap_or_default();
            let mut rest = &frames[..];
            while let Ok((found, bytes)) = stored(rest) {
                assert_eq!(found.frame, record(found.seq), "offset {offset}");
                seq = seq.max(found.seq + 1);
                rest = &rest[bytes..];
            }
            if seq < batch.next {
                damaged += 1;
                break;
            }
        }
        file.write_at(&mut [IoSlice::new(&byte)], offset).unwrap();
    }
    assert!(damaged > 40, "{damaged}");
    // A segment that cannot be read at all is tried again, and then done without.
    for operation in 6..9 {
        let find = |tolerant| {
            world.disk.fail(operation, 1, Errno::EIO as i32);
            let found = Queue::find(
                home(&world.disk, SOURCE, STREAM),
                world.released,
                tolerant,
                || (),
            );
            world.disk.heal();
            found
        };
        assert!(
            matches!(find(false), Err(QueueHealth::Failing(_))),
            "{operation}"
        );
        let (_, spool) = find(true).unwrap_or_else(|health| panic!("{operation}: {health:?}"));
        assert!(matches!(
            spool.place(1, world.released),
            Place::Missing { .. }
        ));
    }
    // After a restart the rotten one is a hole: what is behind it in other segments is still known.
    file.write_at(&mut [IoSlice::new(&[0; 64])], 4096).unwrap();
    let life = world.begin().unwrap();
    assert!(matches!(
        life.spool.place(1, world.released),
        Place::Missing { .. }
    ));
}

#[test]
fn only_its_own_queue_is_used() {
    let mut world = World::new(2);
    let mut life = world.begin().unwrap();
    world.work(&mut life, 30).unwrap();
    let before = segments(&world.disk);
    let find = |source, stream, released| {
        Queue::find(home(&world.disk, source, stream), released, false, || ())
    };
    let Err(QueueHealth::Refused(reason)) = find(Uuid([9; 16]), STREAM, 1) else {
        panic!("another source's queue was used");
    };
    assert!(reason.contains("belongs to source"), "{reason}");
    assert_eq!(segments(&world.disk), before, "nothing was changed");
    // A new stream: the old segments are set aside, and go when their room is needed.
    let Ok((_, spool)) = find(SOURCE, Uuid([3; 16]), 1) else {
        panic!("a new stream cannot begin");
    };
    assert_eq!((spool.records(), segments(&world.disk).len()), (0, 0));
    let names = world.disk.list(Path::new("/queue/db")).unwrap();
    assert_eq!(names.len(), before.len());
}

#[test]
fn an_emptied_queue_gives_its_space_back() {
    let mut world = World::new(4);
    let mut life = world.begin().unwrap();
    world.work(&mut life, 30).unwrap();
    life.queue.sync().unwrap();
    life.spool.on_synced();
    world.released = life.spool.releasable(world.released);
    world.acked = world.released;
    life.spool.on_ack(world.acked - 1);
    life.queue.free(None).unwrap();
    assert!(segments(&world.disk).is_empty());
    world.work(&mut life, 9).unwrap();
    assert!(world.check(&life) > 0);
}
