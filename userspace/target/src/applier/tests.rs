// SPDX-License-Identifier: GPL-2.0-only

//! A journal, an applier and volumes on a simulated disk, step by step.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use dtloop_core::set::Phase;
use dtloop_disk::{Disk, SimDisk};
use dtloop_journal::{BatchInfo, Journal, Options};
use dtloop_proto::header::HEADER_BYTES;
use dtloop_proto::message::Marker;
use dtloop_proto::record::{F_ZEROES, STATE_COMMITTED};
use dtloop_proto::{Op, RecordBody, RecordKind, frame};
use nix::errno::Errno;

use super::*;
use crate::clock::ManualClock;
use crate::config::{ResyncPolicy, Size, VolumeConfig};

const SOURCE: Uuid = Uuid([1; 16]);
const SECTOR: usize = 512;
/// The last block is half a one.
const SECTORS: u64 = 68;

/// What is sent.
#[derive(Clone, Debug)]
enum Event {
    /// Device, first sector, sectors, fill.
    Write(u32, u64, u64, u8),
    /// The same, all zero, without a payload.
    Zero(u32, u64, u64),
    /// Changes passed the stream by: the order is lost.
    Gap,
    Mark(Marker),
}

use Event::{Gap, Mark, Write, Zero};

type Content = Vec<Vec<u8>>;

/// The devices as the target should hold them.
fn after(content: &Content, event: &Event) -> Content {
    let mut content = content.clone();
    let (device, start, sectors, fill) = match *event {
        Write(device, start, sectors, fill) => (device, start, sectors, fill),
        Zero(device, start, sectors) => (device, start, sectors, 0),
        Gap | Mark(_) => return content,
    };
    let from = usize::try_from(start).unwrap() * SECTOR;
    let to = from + usize::try_from(sectors).unwrap() * SECTOR;
    content[device as usize - 1][from..to].fill(fill);
    content
}

fn encode(event: &Event, seq: u64, epoch: u64) -> Vec<u8> {
    let mut bytes = vec![];
    let body = RecordBody {
        epoch,
        start_sector: 0,
        time_ns: seq * 1000,
        aux: 0,
        sectors: 0,
        device: 1,
        flags: 0,
        op: Op::Write,
        state: STATE_COMMITTED,
    };
    let (body, payload) = match *event {
        Mark(marker) => {
            frame::encode_message(&mut bytes, 9, seq, &Message::Marker(marker)).unwrap();
            return bytes;
        }
        Write(device, start_sector, sectors, fill) => {
            let sectors = u32::try_from(sectors).unwrap();
            let payload = vec![fill; sectors as usize * SECTOR];
            let body = RecordBody {
                start_sector,
                sectors,
                device,
                ..body
            };
            (body, payload)
        }
        Zero(device, start_sector, sectors) => {
            let body = RecordBody {
                start_sector,
                sectors: u32::try_from(sectors).unwrap(),
                device,
                op: Op::Discard,
                flags: F_ZEROES,
                ..body
            };
            (body, vec![])
        }
        Gap => {
            let body = RecordBody {
                op: Op::Gap,
                aux: 1,
                ..body
            };
            (body, vec![])
        }
    };
    frame::encode_record(&mut bytes, 9, seq, RecordKind::Data, &body, &payload).unwrap();
    bytes.extend(payload);
    bytes
}

/// A target without threads: a session that journals, an applier that applies.
struct Target {
    disk: SimDisk,
    parts: Parts,
    settings: Settings,
    journal: Option<Journal>,
    applier: Option<Applier>,
    next_seq: u64,
}

fn dir() -> PathBuf {
    "/state/sets/db".into()
}

fn volume(name: &str) -> VolumeConfig {
    VolumeConfig {
        name: name.into(),
        path: format!("/volumes/{name}").into(),
        size: Some(Size(SECTORS * SECTOR as u64)),
        resync: ResyncPolicy::Staged,
    }
}

fn options() -> Options {
    Options {
        bytes: 8 << 20,
        segment_bytes: 256 << 10,
        min_free: 0,
        owner: SOURCE,
        salt: 3,
    }
}

impl Target {
    fn new(disk: &SimDisk) -> Self {
        let shared: Arc<dyn Disk> = Arc::new(disk.clone());
        let volumes = vec![volume("a"), volume("b")];
        let parts = Parts {
            catalog: Arc::new(Catalog::on(
                Arc::clone(&shared),
                Path::new("/state"),
                volumes,
            )),
            disk: shared,
            clock: Arc::new(ManualClock::default()),
            outlet: Arc::default(),
            horizon: Arc::default(),
            flags: Arc::default(),
        };
        let settings = Settings {
            checkpoint_bytes: 1 << 30,
            staging: StagingConfig {
                min_free: Size(0),
                ..StagingConfig::default()
            },
            threads: 1,
        };
        Self {
            disk: disk.clone(),
            parts,
            settings,
            journal: None,
            applier: None,
            next_seq: 1,
        }
    }

    /// Makes a set with two devices, in the state file.
    fn prepare(&self) {
        for dir in ["/state/volumes", "/volumes"] {
            self.disk.make_dir(Path::new(dir)).unwrap();
        }
        let mut state = SetState::new(SOURCE, "db");
        for (device, label) in [(1, "a"), (2, "b")] {
            state.bind(label, device, SECTORS, None);
        }
        let saved = Saved {
            state,
            checkpoint: Position::default(),
            overlays: BTreeMap::new(),
        };
        for name in ["a", "b"] {
            self.parts.catalog.open(name).unwrap().sync().unwrap();
        }
        state_file::store_on(&*self.parts.disk, &dir().join("state"), &saved).unwrap();
    }

    /// Starts: loads, replays, opens the journal.
    fn start(&mut self) -> Result<(), Pause> {
        (self.journal, self.applier) = (None, None);
        let (parts, settings) = (self.parts.clone(), self.settings.clone());
        let fatal = Pause::Fatal;
        let mut applier = Applier::load(parts, settings, &dir(), SOURCE, "db").map_err(fatal)?;
        applier.replay()?;
        let (disk, end) = (Arc::clone(&self.parts.disk), applier.applied());
        let journal = Journal::open(disk, &dir().join("journal"), options(), end, end)
            .map_err(|error| Pause::Fatal(error.into()))?;
        self.next_seq = applier.state().applied_seq + 1;
        self.journal = Some(journal);
        self.applier = Some(applier);
        Ok(())
    }

    fn applier(&mut self) -> &mut Applier {
        self.applier.as_mut().unwrap()
    }

    /// Journals events as one batch. Not durable if it fails.
    fn receive(&mut self, events: &[Event], epoch: u64) -> Result<Batch, ()> {
        let (mut frames, mut digest) = (vec![], crc32fast::Hasher::new());
        let first_seq = self.next_seq;
        let mut seq = first_seq;
        for event in events {
            let bytes = encode(event, seq, epoch);
            digest.update(&bytes[..HEADER_BYTES]);
            frames.extend(bytes);
            seq += u64::from(!matches!(event, Mark(_)));
        }
        let info = BatchInfo {
            frames: u32::try_from(events.len()).unwrap(),
            digest: digest.finalize(),
            first_seq,
            next_seq: seq,
        };
        let journal = self.journal.as_mut().unwrap();
        let end = journal.append(&[&frames], info, Uuid::NONE).map_err(drop)?;
        journal.sync().map_err(drop)?;
        self.next_seq = seq;
        let header = dtloop_journal::layout::BatchHeader {
            segment: end.segment,
            offset: 0,
            bytes: 0,
            frames: info.frames,
            digest: info.digest,
            first_seq,
            next_seq: seq,
            salt: 0,
        };
        let read = dtloop_journal::Batch {
            header,
            frames,
            end,
        };
        Ok(Batch::parse(read, first_seq).unwrap())
    }

    fn apply(&mut self, batch: &Batch) -> Result<(), Pause> {
        loop {
            match self.applier().apply(batch) {
                Err(Pause::Again) => {}
                done => return done,
            }
        }
    }

    fn send(&mut self, events: &[Event]) -> Result<(), Pause> {
        let batch = self.receive(events, 0).unwrap();
        self.apply(&batch)
    }

    /// What a thread does beside: a checkpoint if one is due, some of the drain.
    fn idle(&mut self) -> Result<(), Pause> {
        if self.applier().is_checkpoint_due() {
            self.applier().checkpoint()?;
        }
        self.applier().drain()?;
        Ok(())
    }

    fn settle(&mut self) -> Result<(), Pause> {
        while self.applier().drain()? {}
        self.applier().checkpoint()?;
        while self.applier().drain()? {}
        self.applier().checkpoint()
    }

    fn read_file(&self, name: &str) -> Vec<u8> {
        let path = format!("/volumes/{name}");
        let file = self.disk.open(Path::new(&path), false).unwrap();
        let mut data = vec![0; usize::try_from(SECTORS).unwrap() * SECTOR];
        file.read_at(&mut data, 0).unwrap();
        data
    }

    /// The volumes as anybody sees them.
    fn plain(&self) -> Content {
        vec![self.read_file("a"), self.read_file("b")]
    }

    /// What the target holds, overlays included.
    fn held(&mut self) -> Content {
        [1, 2]
            .map(|device| {
                let mut data = vec![0; usize::try_from(SECTORS).unwrap() * SECTOR];
                self.applier().read(device, 0, &mut data).unwrap();
                data
            })
            .to_vec()
    }

    fn phase(&mut self) -> Option<Phase> {
        self.applier().state().stage.as_ref().map(|s| s.phase)
    }
}

fn begin(device: u32) -> Event {
    Mark(Marker::MirrorBegin { device })
}

fn end(device: u32) -> Event {
    Mark(Marker::MirrorEnd { device })
}

/// Devices mirrored, a gap, a resync beside live writes, published, lost again while it drains, mirrored again.
fn script() -> Vec<Vec<Event>> {
    let restored = || Mark(Marker::OrderRestored);
    vec![
        vec![begin(1), Write(1, 0, 32, 1), Write(1, 32, 36, 2), end(1)],
        vec![begin(2), Write(2, 0, 68, 3), end(2), Write(1, 5, 3, 4)],
        vec![Write(1, 8, 8, 5), Write(2, 60, 8, 6), Zero(1, 30, 20)],
        // The last consistent state is the one behind the first record of this batch.
        vec![
            Write(2, 1, 1, 7),
            Gap,
            Write(1, 3, 7, 8),
            Write(2, 0, 16, 9),
        ],
        vec![
            Zero(1, 10, 40),
            Write(1, 20, 2, 10),
            Zero(2, 64, 4),
            Write(2, 66, 2, 11),
        ],
        vec![Write(2, 67, 1, 12), Zero(2, 8, 8), Gap, Write(1, 0, 1, 13)],
        vec![Write(1, 62, 6, 14), restored(), Write(1, 24, 8, 15)],
        vec![Write(2, 3, 10, 16), Zero(1, 1, 2), Write(1, 66, 1, 17)],
        vec![Write(2, 0, 1, 18), Gap, Write(2, 1, 40, 19)],
        vec![
            Write(1, 16, 16, 20),
            restored(),
            begin(2),
            Write(2, 0, 32, 21),
        ],
        vec![
            Write(1, 17, 1, 22),
            Write(2, 32, 36, 23),
            end(2),
            Write(2, 2, 2, 24),
        ],
        vec![Write(1, 1, 1, 25), Write(2, 40, 8, 26)],
    ]
}

/// What the target should hold before each event, and behind the last.
fn histories(script: &[Vec<Event>]) -> Vec<Content> {
    let mut content = vec![vec![0; usize::try_from(SECTORS).unwrap() * SECTOR]; 2];
    let mut histories = vec![content.clone()];
    for event in script.iter().flatten() {
        content = after(&content, event);
        if !matches!(event, Mark(_)) {
            histories.push(content.clone());
        }
    }
    histories
}

/// Plays the script from the batch that begins with the next record on. Stops where the disk does.
fn play(target: &mut Target, script: &[Vec<Event>]) -> Result<(), ()> {
    let mut first = 1;
    for events in script {
        let records = events
            .iter()
            .filter(|event| !matches!(event, Mark(_)))
            .count() as u64;
        if first == target.next_seq {
            let batch = target.receive(events, first)?;
            target.apply(&batch).map_err(drop)?;
            target.idle().map_err(drop)?;
        }
        first += records;
    }
    target.settle().map_err(drop)
}

/// The state that the volumes must have as they are, if it is known: while staged, the last consistent one.
fn check_plain(target: &mut Target, histories: &[Content]) {
    let stage = target.applier().state().stage.clone();
    let Some(stage) = stage.filter(|stage| stage.phase == Phase::Staged) else {
        return;
    };
    let plain = target.plain();
    let since = usize::try_from(stage.since.seq).unwrap();
    for (label, index) in [("a", 0), ("b", 1)] {
        if stage.labels.contains(label) {
            assert!(
                plain[index] == histories[since][index],
                "volume {label} is not record {since}"
            );
        }
    }
}

#[test]
fn the_script_goes_through_every_phase() {
    let disk = SimDisk::new(1);
    let mut target = Target::new(&disk);
    target.prepare();
    target.start().unwrap();
    let (script, histories) = (script(), histories(&script()));
    let mut phases = vec![];
    for events in &script {
        target.send(events).unwrap();
        phases.push(target.phase());
        check_plain(&mut target, &histories);
        let held = target.held();
        let seq = usize::try_from(target.applier().state().applied_seq).unwrap();
        assert!(held == histories[seq], "record {seq}");
        target.idle().unwrap();
        check_plain(&mut target, &histories);
        phases.push(target.phase());
    }
    assert!(phases.contains(&Some(Phase::Staged)) && phases.contains(&Some(Phase::Publishing)));
    assert_eq!(target.applier().state().stages, 2, "{phases:?}");
    target.settle().unwrap();
    assert_eq!(target.phase(), None);
    assert!(target.plain() == *histories.last().unwrap());
    assert!(target.applier().state().in_sync("a") && target.applier().state().in_sync("b"));
    let left = disk.list(&dir().join("staging")).unwrap();
    assert!(left.is_empty(), "{left:?}");
}

/// The power fails at that operation of the disk; afterwards the target goes on to the end of the script. Gives how many
/// operations there were.
fn crash_at(operation: u64, seed: u64, kill: bool) -> Option<u64> {
    let disk = SimDisk::new(seed);
    let mut target = Target::new(&disk);
    target.prepare();
    target.start().unwrap();
    let (script, histories) = (script(), histories(&script()));
    let begun = disk.operations();
    disk.fail(operation, u64::MAX, 5);
    let played = play(&mut target, &script);
    let acknowledged = target.next_seq;
    let operations = disk.operations() - begun;
    if kill {
        disk.restart();
    } else {
        disk.crash();
    }
    // The volumes as somebody finds them who does not run this program. What was last said to be staged is there.
    let saved: Saved = state_file::load_on(&disk, &dir().join("state"))
        .unwrap()
        .unwrap();
    if let Some(stage) = saved
        .state
        .stage
        .filter(|stage| stage.phase == Phase::Staged)
    {
        let (plain, since) = (target.plain(), usize::try_from(stage.since.seq).unwrap());
        for (label, index) in [("a", 0), ("b", 1)] {
            let kept = !stage.labels.contains(label) || plain[index] == histories[since][index];
            assert!(
                kept,
                "operation {operation}: volume {label} is not record {since}"
            );
        }
    }
    target.parts.horizon = Arc::default();
    target.start().unwrap();
    let refused = refusals(&mut target);
    assert!(refused.is_empty(), "operation {operation}: {refused:?}");
    let seq = target.next_seq - 1;
    assert!(
        seq + 1 >= acknowledged,
        "operation {operation}: what was acknowledged is lost"
    );
    let held = target.held();
    assert!(
        held == histories[usize::try_from(seq).unwrap()],
        "operation {operation}: not record {seq}"
    );
    check_plain(&mut target, &histories);
    play(&mut target, &script).unwrap();
    assert!(
        target.plain() == *histories.last().unwrap(),
        "operation {operation}: the end"
    );
    assert_eq!(target.phase(), None);
    played.is_err().then_some(operations)
}

#[test]
fn a_power_cut_at_every_operation_leaves_a_legal_state() {
    let mut operation = 0;
    while crash_at(operation, operation * 7 + 1, false).is_some() {
        operation += 1;
    }
    assert!(operation > 100, "{operation}");
}

#[test]
fn a_kill_at_every_operation_leaves_a_legal_state() {
    let mut operation = 0;
    while crash_at(operation, operation * 11 + 5, true).is_some() {
        operation += 1;
    }
}

/// One operation after the other fails, a few times; nothing is lost, and it goes on by itself.
#[test]
fn a_failing_disk_holds_everything_back_and_loses_nothing() {
    let (script, histories) = (script(), histories(&script()));
    let mut operation = 0;
    loop {
        let disk = SimDisk::new(operation + 3);
        let mut target = Target::new(&disk);
        target.prepare();
        target.start().unwrap();
        disk.fail(operation, 1 + operation % 3, 5);
        let begun = disk.operations();
        let mut blocked = 0;
        for events in &script {
            let batch = loop {
                match target.receive(events, 0) {
                    Ok(batch) => break batch,
                    Err(()) => blocked += 1,
                }
            };
            let mut again = |result: Result<(), Pause>| match result {
                Ok(()) => false,
                Err(Pause::Blocked(_)) => {
                    blocked += 1;
                    true
                }
                Err(pause) => panic!("operation {operation}: {pause:?}"),
            };
            while again(target.apply(&batch)) {}
            let seq = usize::try_from(target.applier().state().applied_seq).unwrap();
            while again(target.idle()) {}
            if !disk.is_failing() {
                assert!(
                    target.held() == histories[seq],
                    "operation {operation}: record {seq}"
                );
            }
            check_plain_unless_failing(&mut target, &histories, &disk);
        }
        let reached = disk.operations() - begun > operation;
        while target.settle().is_err() {
            blocked += 1;
        }
        assert!(!reached || blocked > 0 || target.phase().is_none());
        // What is durable, not what is in memory.
        disk.crash();
        target.parts.horizon = Arc::default();
        target.start().unwrap();
        assert!(
            target.plain() == *histories.last().unwrap(),
            "operation {operation}: the end"
        );
        if !reached {
            break;
        }
        operation += 1;
    }
    assert!(operation > 100, "{operation}");
}

fn check_plain_unless_failing(target: &mut Target, histories: &[Content], disk: &SimDisk) {
    if !disk.is_failing() {
        check_plain(target, histories);
    }
}

fn complaint_of(result: Result<(), Pause>) -> Complaint {
    match result {
        Err(Pause::Blocked(complaint)) => complaint,
        other => panic!("{other:?}"),
    }
}

/// Volumes that are not taken, and why.
fn refusals(target: &mut Target) -> Vec<(String, u16)> {
    let volumes = target.applier().state().volumes.iter();
    let code = |volume: &dtloop_core::set::VolumeState| Some(volume.refused.as_ref()?.0);
    volumes
        .filter_map(|(label, volume)| Some((label.clone(), code(volume)?)))
        .collect()
}

/// Somebody writes to a volume while the target is not there.
fn disturb(target: &Target, name: &str, offset: u64) {
    let path = format!("/volumes/{name}");
    let file = target.disk.open(Path::new(&path), false).unwrap();
    let mut pieces = [std::io::IoSlice::new(b"newer")];
    file.write_at(&mut pieces, offset).unwrap();
    file.sync().unwrap();
}

/// Direct, staged and published volumes alike are known again, and known as another one when somebody has written to
/// them: but where the journal says that it may have been the target itself.
#[test]
fn a_volume_that_was_changed_while_nobody_looked_is_not_taken() {
    let changed = |name: &str| vec![(name.to_owned(), Code::VOLUME_CHANGED.0)];
    let direct = || mirrored(&SimDisk::new(1), u64::MAX);
    let staged = || {
        let mut target = direct();
        target.send(&[Gap, Write(1, 0, 8, 9)]).unwrap();
        assert_eq!(target.phase(), Some(Phase::Staged));
        target.applier().checkpoint().unwrap();
        target
    };
    for make in [&direct as &dyn Fn() -> Target, &staged] {
        let mut target = make();
        target.start().unwrap();
        assert_eq!(refusals(&mut target), []);
        let mut target = make();
        disturb(&target, "a", 8192);
        target.start().unwrap();
        assert_eq!(refusals(&mut target), changed("a"));
        let held = target.plain();
        target
            .send(&[Write(1, 16, 1, 7), Write(2, 0, 1, 8)])
            .unwrap();
        target.settle().unwrap();
        assert!(target.plain()[0] == held[0], "it is not written to");
    }
    // What is behind the checkpoint may have been applied.
    let mut target = direct();
    target.send(&[Write(2, 16, 8, 7)]).unwrap();
    disturb(&target, "b", 8192);
    target.start().unwrap();
    assert_eq!(refusals(&mut target), []);
    let mut target = direct();
    target.send(&[Write(2, 16, 8, 7)]).unwrap();
    disturb(&target, "b", 4096);
    target.start().unwrap();
    assert_eq!(refusals(&mut target), changed("b"));
}

/// A volume whose disk appears only after the journal was replayed is still the one that it was.
#[test]
fn a_volume_that_missed_the_replay_is_taken_back() {
    let mut target = mirrored(&SimDisk::new(1), u64::MAX);
    target
        .send(&[Write(1, 16, 8, 7), Write(1, 40, 8, 8)])
        .unwrap();
    let paths = ["/volumes/a", "/volumes/elsewhere"].map(Path::new);
    target.disk.rename(paths[0], paths[1]).unwrap();
    // Without a size an image is not made anew.
    let here = |name: &str, size| VolumeConfig {
        size,
        ..volume(name)
    };
    let disk: Arc<dyn Disk> = Arc::new(target.disk.clone());
    let size = volume("b").size;
    let volumes = vec![here("a", None), here("b", size)];
    let catalog = Catalog::on(disk, Path::new("/state"), volumes);
    target.parts.catalog = Arc::new(catalog);
    target.start().unwrap();
    target.settle().unwrap();
    target.disk.rename(paths[1], paths[0]).unwrap();
    let offer = DeviceOffer {
        device: 1,
        label: "a".into(),
        sectors: SECTORS,
        block_bytes: 512,
    };
    target.applier().bind(&offer).unwrap();
    assert_eq!(refusals(&mut target), []);
    assert!(!target.applier().state().in_sync("a"), "records passed it");
}

/// A target whose two volumes are in sync.
fn mirrored(disk: &SimDisk, max: u64) -> Target {
    let mut target = Target::new(disk);
    target.settings.staging.max = Some(Size(max));
    target.prepare();
    target.start().unwrap();
    for events in &script()[..3] {
        target.send(events).unwrap();
    }
    target.settle().unwrap();
    target
}

#[test]
fn what_is_planned_waits_for_space_or_for_the_operator() {
    let disk = SimDisk::new(1);
    let mut target = mirrored(&disk, 8192);
    let kept = target.plain();
    let plan = |least_bytes| {
        Mark(Marker::Plan {
            device: 1,
            least_bytes,
            most_bytes: 1 << 20,
        })
    };
    target.send(&[Gap, plan(8192), Write(1, 0, 8, 50)]).unwrap();
    let batch = target
        .receive(&[plan(8193), Write(1, 8, 8, 51)], 0)
        .unwrap();
    for _ in 0..3 {
        let complaint = complaint_of(target.apply(&batch));
        assert_eq!(complaint.code, Code::STAGING);
        assert!(complaint.text.contains("8193") && complaint.text.contains("--in-place --set db"));
    }
    assert!(target.plain() == kept);
    // Given up: everything goes into the volumes, once.
    target.parts.flags.in_place.store(true, Ordering::Relaxed);
    target.apply(&batch).unwrap();
    target.settle().unwrap();
    assert!(target.plain()[0][..8192] == [[50; 4096], [51; 4096]].concat());
    target.send(&[Gap, Write(1, 0, 8, 52)]).unwrap();
    assert_eq!(target.plain()[0][0], 52);
    target.send(&[Mark(Marker::OrderRestored)]).unwrap();
    target.settle().unwrap();
    let kept = target.plain();
    target.send(&[Gap, Write(1, 0, 8, 53)]).unwrap();
    assert!(target.plain() == kept, "the next time it is staged again");
    assert_eq!(target.phase(), Some(Phase::Staged));
}

#[test]
fn space_that_runs_out_on_the_way_holds_the_source_back() {
    let disk = SimDisk::new(1);
    let mut target = mirrored(&disk, 8192);
    let kept = target.plain();
    target
        .send(&[Gap, Write(1, 0, 16, 50), Zero(2, 0, 64)])
        .unwrap();
    let batch = target
        .receive(&[Write(1, 1, 2, 51), Write(1, 16, 1, 52)], 0)
        .unwrap();
    let complaint = complaint_of(target.apply(&batch));
    assert!(
        complaint.text.contains("no space left for staging"),
        "{}",
        complaint.text
    );
    assert!(target.plain() == kept);
    // Killed while it waits, and with more space: nothing is lost.
    disk.crash();
    target.settings.staging.max = Some(Size(12288));
    target.parts.horizon = Arc::default();
    target.start().unwrap();
    assert!(target.plain() == kept);
    let held = target.held();
    assert_eq!(
        [held[0][0], held[0][512], held[0][16 * 512], held[1][0]],
        [50, 51, 52, 0]
    );
    assert_eq!(
        target.applier().staged_bytes(),
        12288,
        "zeroes take no space"
    );
    target.send(&[Mark(Marker::OrderRestored)]).unwrap();
    target.settle().unwrap();
    assert!(target.plain() == held);
}

/// The state file is that of a checkpoint before the loss: it says that the set is consistent, and that it is staged.
#[test]
fn what_is_chosen_while_the_journal_cannot_be_replayed_for_want_of_space_holds() {
    let disk = SimDisk::new(1);
    let mut target = mirrored(&disk, 8192);
    let batch = target.receive(&[begin(1), Write(1, 0, 16, 50), Write(1, 16, 52, 51)], 0);
    complaint_of(target.apply(&batch.unwrap()));
    disk.restart();
    target.parts.horizon = Arc::default();
    complaint_of(target.start());
    target.parts.flags.in_place.store(true, Ordering::Relaxed);
    target.parts.horizon = Arc::default();
    target.start().unwrap();
    assert!(target.applier().state().in_place);
    target.send(&[end(1)]).unwrap();
    target.settle().unwrap();
    let plain = target.plain();
    assert!(plain[0][..8192].iter().all(|byte| *byte == 50));
    assert!(plain[0][8192..].iter().all(|byte| *byte == 51));
    assert!(!target.applier().state().in_place);
}

#[test]
fn a_staging_area_that_is_gone_can_be_given_up() {
    let disk = SimDisk::new(1);
    let mut target = mirrored(&disk, 1 << 20);
    target.send(&[Gap, Write(1, 0, 16, 50)]).unwrap();
    target.applier().checkpoint().unwrap();
    target.send(&[Write(1, 16, 16, 51)]).unwrap();
    target.parts.flags.in_place.store(true, Ordering::Relaxed);
    disk.fail(0, 1, 5);
    target.applier().checkpoint().unwrap();
    assert_eq!(target.phase(), None);
    assert!(!target.applier().state().in_sync("a"));
    target
        .send(&[begin(1), Write(1, 0, 68, 52), end(1)])
        .unwrap();
    assert!(target.plain()[0].iter().all(|byte| *byte == 52));
}

#[test]
fn several_threads_do_what_one_does() {
    for seed in 0..20_u64 {
        let disk = SimDisk::new(seed + 1);
        let mut target = Target::new(&disk);
        target.settings.threads = 4;
        target.prepare();
        target.start().unwrap();
        target.applier().slow = true;
        let mut expected = target.plain();
        for batch in 0..4 {
            let events: Vec<Event> = (0..60_u64)
                .map(|n| {
                    let at = (n * 37 + seed * 11 + batch) % 60;
                    let device = u32::try_from(n % 2 + 1).unwrap();
                    let fill = u8::try_from((n * 5 + batch) % 250 + 1).unwrap();
                    if n % 9 == 8 {
                        Zero(device, at, 1 + n % 8)
                    } else {
                        Write(device, at, 1 + n % 8, fill)
                    }
                })
                .collect();
            for event in &events {
                expected = after(&expected, event);
            }
            let batch = target.receive(&events, batch).unwrap();
            if seed % 2 == 0 {
                disk.fail(seed, 2, 28);
            }
            let mut tries = 0;
            while let Err(pause) = target.applier().apply(&batch) {
                assert!(matches!(pause, Pause::Blocked(_)), "{pause:?}");
                tries += 1;
                assert!(tries < 9);
            }
            assert!(target.held() == expected, "seed {seed}");
            target.applier().slow = true;
        }
    }
}

#[test]
fn a_torn_tail_is_cut_and_nothing_acknowledged_is_lost() {
    let disk = SimDisk::new(1);
    let mut target = Target::new(&disk);
    target.prepare();
    target.start().unwrap();
    let batches = [1, 2, 3].map(|n| {
        let at = u64::from(n);
        target
            .receive(&[Write(1, at, 1, n), Write(1, at + 10, 1, n)], 0)
            .unwrap()
    });
    let (from, used) = (
        batches[1].end.offset,
        64 + 2 * (HEADER_BYTES as u64 + 48 + 512),
    );
    let segment = dir().join("journal/0000000000000001.seg");
    let state = dir().join("state");
    let fresh: Saved = state_file::load_on(&disk, &state).unwrap().unwrap();
    // All of the batch header and of the first frame's header and body, then samples.
    for at in (0..160).chain((160..used).step_by(23)) {
        let file = disk.open(&segment, false).unwrap();
        let mut byte = [0];
        file.read_at(&mut byte, from + at).unwrap();
        let flipped = [byte[0] ^ 0x40];
        let write = |data: &[u8]| file.write_at(&mut [io::IoSlice::new(data)], from + at);
        write(&flipped).unwrap();
        state_file::store_on(&disk, &state, &fresh).unwrap();
        let (parts, settings) = (target.parts.clone(), target.settings.clone());
        let mut applier = Applier::load(parts, settings, &dir(), SOURCE, "db").unwrap();
        applier.replay().unwrap();
        assert_eq!(applier.state().applied_seq, 4, "byte {at}");
        write(&byte).unwrap();
    }
    state_file::store_on(&disk, &state, &fresh).unwrap();
    target.start().unwrap();
    assert_eq!(target.next_seq, 7);
    assert_eq!(target.held()[0][13 * SECTOR], 3);
}

#[test]
fn a_settled_set_holds_its_last_consistent_state_and_says_which() {
    let (script, histories) = (script(), histories(&script()));
    for batches in 0..=script.len() {
        let disk = SimDisk::new(1);
        let mut target = Target::new(&disk);
        target.prepare();
        target.start().unwrap();
        for events in &script[..batches] {
            target.send(events).unwrap();
            target.idle().unwrap();
        }
        // Killed, and settled by another process.
        disk.crash();
        target.parts.horizon = Arc::default();
        target.start().unwrap();
        let moments = loop {
            match target.applier().settle() {
                Ok(moments) => break moments,
                Err(Pause::Again) => {}
                Err(pause) => panic!("{pause:?}"),
            }
        };
        disk.crash();
        let plain = target.plain();
        for (index, label) in ["a", "b"].into_iter().enumerate() {
            match moments[label] {
                Some(moment) => {
                    let seq = usize::try_from(moment.seq).unwrap();
                    assert!(
                        plain[index] == histories[seq][index],
                        "{batches} batches, {label}: not record {seq}"
                    );
                    assert_eq!(moment.time_ns, moment.seq * 1000);
                }
                None => assert!(batches <= index, "{batches} batches: {label} has no state"),
            }
        }
        // Nothing is written to them any more.
        let saved: Saved = state_file::load_on(&disk, &dir().join("state"))
            .unwrap()
            .unwrap();
        assert!(
            saved
                .state
                .volumes
                .values()
                .all(|volume| volume.refused.is_some())
        );
        target.parts.horizon = Arc::default();
        target.start().unwrap();
        assert!(target.applier().volumes.is_empty());
    }
}

/// The state cannot be written once the source is taken up; the next attempt is made with what the session knows, which is
/// the stream before.
#[test]
fn a_stream_that_was_taken_up_without_anybody_being_told_is_gone_on_with() {
    let stream = Uuid([5; 16]);
    let hello = Hello {
        version_min: 1,
        version_max: 1,
        software: String::new(),
        source_id: SOURCE,
        set: "db".into(),
        stream_uuid: stream,
        generation: 1,
        first_seq: 1,
        next_seq: 3,
        devices: vec![],
        options: vec![],
    };
    let mut half = 0;
    for after in 0..60 {
        let disk = SimDisk::new(after);
        let mut target = Target::new(&disk);
        target.prepare();
        target.start().unwrap();
        target
            .send(&[Write(1, 1, 3, 7), Write(2, 1, 3, 8), Write(1, 9, 2, 9)])
            .unwrap();
        let durable = Durable {
            stream_uuid: target.applier().state().stream_uuid,
            seq: 3,
        };
        disk.fail(after, 1, Errno::EIO as i32);
        let entered = loop {
            match target.applier().enter(&hello, durable) {
                Ok(entered) => break entered.unwrap(),
                Err(_) => half += u32::from(target.applier().state().stream_uuid == stream),
            }
        };
        assert_eq!((entered.next_seq, entered.past.stream), (1, Uuid::NONE));
        assert_eq!(target.applier().state().applied_seq, 0);
    }
    assert!(half > 3, "{half}");
}

/// A program was killed when it had just put the state there; its successor acts on what memory has.
#[test]
fn a_state_that_is_relied_on_survives_a_power_cut() {
    let disk = SimDisk::new(1);
    let mut target = Target::new(&disk);
    target.prepare();
    let (path, aside) = (dir().join("state"), Path::new("/aside/state"));
    let generation = || -> u64 {
        let saved: Option<Saved> = state_file::load_on(&disk, &path).unwrap();
        saved.unwrap().state.generation
    };
    let mut saved: Saved = state_file::load_on(&disk, &path).unwrap().unwrap();
    saved.state.generation = 7;
    state_file::store_on(&disk, aside, &saved).unwrap();
    disk.rename(aside, &path).unwrap();
    disk.restart();
    target.parts.disk = Arc::new(disk.clone());
    let (parts, settings) = (target.parts.clone(), target.settings.clone());
    let applier = Applier::load(parts, settings, &dir(), SOURCE, "db").unwrap();
    assert_eq!(applier.state().generation, 7);
    disk.crash_hard();
    assert_eq!(generation(), 7);
}
