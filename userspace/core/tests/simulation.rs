// SPDX-License-Identifier: GPL-2.0-only

//! The state machines of both sides against each other, with a device in memory between them and
//! a schedule of writes, cuts, duplicates and restarts. Whenever the target says that it is in
//! sync, its volume is the device as it was at that record; in the end it says so.

#![expect(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test with small numbers"
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use dtloop_core::apply::{Action, action};
use dtloop_core::mirror::{
    DeviceJob, Event, JobKind, JobState, Planner, Request, SECTORS_PER_CHUNK, is_hash_cookie,
};
use dtloop_core::resync::{self, Resync, Step};
use dtloop_core::sequence::{Arrival, Sequencer};
use dtloop_core::set::{Admission, SetState, Sync};
use dtloop_core::source::SourceSession;
use dtloop_proto::message::{Ack, Hello, Marker, Welcome};
use dtloop_proto::record::STATE_COMMITTED;
use dtloop_proto::{Op, RecordBody, RecordKind, Uuid};
use proptest::prelude::*;

const SECTORS: u64 = 6 * SECTORS_PER_CHUNK;
const STREAM: Uuid = Uuid([1; 16]);

/// One byte stands for each sector.
type Content = Vec<u8>;

/// A record in the ring with its payload.
#[derive(Clone, Debug)]
struct Record {
    body: RecordBody,
    payload: Content,
}

#[derive(Clone, Debug)]
enum OnWire {
    Record(u64, Record),
    Marker(u64, Marker),
}

#[derive(Default)]
struct Source {
    device: Content,
    /// The device as it was before each record.
    history: BTreeMap<u64, Content>,
    dirty: BTreeSet<u64>,
    ring: BTreeMap<u64, Record>,
    next_seq: u64,
    released: u64,
    /// Changes were made that no record tells of yet.
    gap: bool,
}

impl Source {
    fn push(&mut self, op: Op, start_sector: u64, payload: &[u8], aux: u64) {
        let body = RecordBody {
            epoch: 0,
            start_sector,
            time_ns: 0,
            aux,
            sectors: payload.len() as u32,
            device: 1,
            flags: 0,
            op,
            state: STATE_COMMITTED,
        };
        let payload = payload.to_vec();
        self.ring.insert(self.next_seq, Record { body, payload });
        self.next_seq += 1;
        self.history.insert(self.next_seq, self.device.clone());
    }

    fn write(&mut self, start: u64, fill: u8, sectors: u64, has_room: bool) {
        self.device[start as usize..(start + sectors) as usize].fill(fill);
        if has_room && !self.gap {
            self.push(Op::Write, start, &vec![fill; sectors as usize], 0);
        } else {
            self.gap = true;
            self.dirty
                .extend((start..start + sectors).map(|sector| sector / 8));
        }
    }

    fn write_gap(&mut self) {
        if std::mem::take(&mut self.gap) {
            self.push(Op::Gap, 0, &[], 1);
        }
    }

    fn sync(&mut self, request: &Request) -> u64 {
        if self.gap {
            return 0;
        }
        let (mut at, end) = (request.start, request.start + request.sectors);
        while at < end {
            let next = ((at / SECTORS_PER_CHUNK + 1) * SECTORS_PER_CHUNK).min(end);
            let payload = self.device[at as usize..next as usize].to_vec();
            if request.clear {
                self.dirty
                    .retain(|block| !(at.div_ceil(8)..next / 8).contains(block));
            }
            self.push(Op::Sync, at, &payload, request.cookie);
            at = next;
        }
        request.sectors
    }
}

/// What survives a crash of the target, and what does not.
struct Target {
    saved: SetState,
    journal: Vec<OnWire>,
    state: SetState,
    volume: Content,
    sequence: Sequencer,
    verified: Vec<(u64, bool)>,
}

impl Target {
    fn new() -> Self {
        let mut state = SetState::new(Uuid([9; 16]), "db");
        state.generation = 1;
        state.stream_uuid = STREAM;
        state.bind("vol", 1, SECTORS, None);
        Self {
            saved: state.clone(),
            journal: vec![],
            state,
            volume: vec![0; SECTORS as usize],
            sequence: Sequencer::new(1),
            verified: vec![],
        }
    }

    fn receive(&mut self, item: OnWire, source: &Source) {
        match &item {
            OnWire::Record(seq, _) => {
                if self.sequence.arrive(*seq).unwrap() == Arrival::Duplicate {
                    return;
                }
            }
            OnWire::Marker(position, _) => self.sequence.marker(*position).unwrap(),
        }
        self.apply(&item, false);
        self.journal.push(item);
        self.check(source);
    }

    fn apply(&mut self, item: &OnWire, replaying: bool) {
        let (seq, record) = match item {
            OnWire::Marker(position, marker) => return self.state.on_marker(*position, *marker),
            OnWire::Record(seq, record) => (*seq, record),
        };
        let is_hash = record.body.op == Op::Sync && is_hash_cookie(record.body.aux);
        let kind = if is_hash {
            RecordKind::Hash
        } else {
            RecordKind::Data
        };
        let start = record.body.start_sector as usize;
        let range = start..start + record.payload.len();
        match action(kind, &record.body, &record.payload) {
            Action::Write { data, .. } => self.volume[range].copy_from_slice(data),
            Action::Compare { hash, .. } if !replaying => {
                self.verified.push((seq, self.volume[range] == *hash));
            }
            _ => {}
        }
        self.state.on_record(seq, &record.body);
    }

    /// The guarantee: in sync means equal, at this very record.
    fn check(&self, source: &Source) {
        if self.state.in_sync("vol") {
            let seq = self.state.applied_seq + 1;
            let equal = source.history.get(&seq) == Some(&self.volume);
            assert!(
                equal,
                "the volume is not the device as it was at record {seq}"
            );
        }
    }

    fn checkpoint(&mut self) {
        self.saved = self.state.clone();
        self.journal.clear();
    }

    /// The state goes back to the checkpoint; the volume keeps what was written behind it.
    fn crash(&mut self) {
        self.state = self.saved.clone();
        self.verified.clear();
        for item in self.journal.clone() {
            self.apply(&item, true);
        }
        assert_eq!(
            self.state.applied_seq + 1,
            self.sequence.next(),
            "what is durable comes back"
        );
    }
}

struct Agent {
    session: Option<SourceSession>,
    wire: VecDeque<OnWire>,
    planner: Option<Planner>,
    resync: Resync,
}

fn hello(source: &Source) -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        software: String::new(),
        source_id: Uuid([9; 16]),
        set: "db".into(),
        stream_uuid: STREAM,
        generation: 1,
        first_seq: source.released,
        next_seq: source.next_seq,
        devices: vec![],
        options: vec![],
    }
}

fn welcome(durable_seq: u64) -> Welcome {
    Welcome {
        version: 1,
        software: String::new(),
        target_id: Uuid([3; 16]),
        session: 1,
        known_stream: STREAM,
        durable_seq,
        applied_seq: durable_seq,
        lost_from: 0,
        lost_last: 0,
        volumes: vec![],
        options: vec![],
    }
}

impl Agent {
    fn new(job: Option<JobState>) -> Self {
        Self {
            session: None,
            wire: VecDeque::new(),
            planner: job.map(Planner::new),
            resync: Resync::new(vec![1]),
        }
    }

    fn connect(&mut self, source: &Source, target: &Target) {
        let durable_seq = target.sequence.next() - 1;
        let admission = target.state.admit(&hello(source), durable_seq);
        assert_eq!(admission, Ok(Admission::Resume));
        let welcome = welcome(durable_seq);
        let begun = SourceSession::begin(&welcome, STREAM, source.released, source.next_seq);
        self.session = Some(begun.unwrap().0);
        // What the target may not have got is begun or said again, as the agent does.
        let sync = target.state.volumes["vol"].sync;
        match &self.planner {
            Some(planner) if planner.state().devices[0].begun && sync != Sync::Mirroring => {
                let mut job = planner.state().clone();
                job.devices = vec![DeviceJob::new(1, "vol", SECTORS)];
                self.planner = Some(Planner::new(job));
            }
            None if sync == Sync::Mirroring => self.mark(Marker::MirrorEnd { device: 1 }),
            _ => {}
        }
        self.resync.on_loss();
    }

    fn mark(&mut self, marker: Marker) {
        let position = self.session.unwrap().next_to_send();
        self.wire.push_back(OnWire::Marker(position, marker));
    }

    fn cut(&mut self) {
        self.session = None;
        self.wire.clear();
        if let Some(planner) = &mut self.planner {
            planner.on_disconnect();
        }
    }

    fn send(&mut self, source: &Source, most: u64) {
        let Some(session) = &mut self.session else {
            return;
        };
        let first = session.next_to_send();
        let end = (first + most).min(source.next_seq);
        for seq in first..end {
            let record = &source.ring[&seq];
            self.wire.push_back(OnWire::Record(seq, record.clone()));
            let body = &record.body;
            if body.op == Op::Sync {
                let (start, sectors) = (body.start_sector, u64::from(body.sectors));
                if body.aux == resync::COOKIE {
                    self.resync.on_record(1, start, sectors, false);
                } else if let Some(planner) = &mut self.planner {
                    planner.on_record(seq, 1, start, sectors, body.aux, false);
                }
            } else if body.loses_order() {
                self.resync.on_loss();
            }
        }
        session.on_sent(end.max(first));
    }

    fn acknowledge(&mut self, source: &mut Source, target: &mut Target) {
        let Some(session) = &mut self.session else {
            return;
        };
        let durable_seq = target.sequence.next() - 1;
        let ack = Ack {
            durable_seq,
            applied_seq: durable_seq,
            ..Ack::default()
        };
        session.on_ack(&ack).unwrap();
        source.released = session.releasable();
        source.ring = source.ring.split_off(&source.released);
        let verified = std::mem::take(&mut target.verified);
        let Some(planner) = &mut self.planner else {
            return;
        };
        planner.on_durable(durable_seq);
        if let Some((through, _)) = verified.last() {
            let differing = verified.iter().filter(|(_, equal)| !equal);
            let differing: Vec<u64> = differing.map(|(seq, _)| *seq).collect();
            planner.on_verified(*through, &differing);
        }
    }

    fn drive(&mut self, source: &mut Source) {
        let Some(session) = self.session else { return };
        while let Some(event) = self.planner.as_mut().and_then(Planner::next_event) {
            match event {
                Event::DeviceBegins { .. } => self.mark(Marker::MirrorBegin { device: 1 }),
                Event::DeviceDone { .. } => {
                    self.mark(Marker::MirrorEnd { device: 1 });
                    self.resync.on_loss();
                }
                Event::Over => self.planner = None,
            }
        }
        if let Some(planner) = &mut self.planner {
            if let Some(request) = planner.next_request() {
                let taken = source.sync(&request);
                planner.on_taken(&request, taken);
            }
        }
        for _ in 0..3 {
            match self.resync.step(session.next_to_send()) {
                Step::Idle | Step::Wait => return,
                Step::Position => self.resync.on_position(source.next_seq),
                Step::Find { from, .. } => {
                    let block = source.dirty.range(from.div_ceil(8)..).next();
                    self.resync.on_found(block.map(|block| (block * 8, 8)));
                }
                Step::Sync(request) => {
                    let taken = source.sync(&request);
                    self.resync.on_taken(taken);
                }
                Step::Declare { at } => {
                    self.wire
                        .push_back(OnWire::Marker(at, Marker::OrderRestored));
                    self.resync.on_declared();
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Deed {
    Write {
        start: u64,
        fill: u8,
        sectors: u64,
        has_room: bool,
    },
    Gap,
    Send(u64),
    Deliver(usize),
    Acknowledge,
    Drive,
    Cut,
    Connect,
    RestartAgent,
    Checkpoint,
    CrashTarget,
}

fn deed() -> impl Strategy<Value = Deed> {
    let write = (
        0..SECTORS - 16,
        1..255_u8,
        1..16_u64,
        prop::bool::weighted(0.9),
    );
    let write = write.prop_map(|(start, fill, sectors, has_room)| Deed::Write {
        start,
        fill,
        sectors,
        has_room,
    });
    prop_oneof![
        6 => write,
        1 => Just(Deed::Gap),
        6 => (1..8_u64).prop_map(Deed::Send),
        6 => (1..8_usize).prop_map(Deed::Deliver),
        4 => Just(Deed::Acknowledge),
        6 => Just(Deed::Drive),
        1 => Just(Deed::Cut),
        2 => Just(Deed::Connect),
        1 => Just(Deed::RestartAgent),
        1 => Just(Deed::Checkpoint),
        1 => Just(Deed::CrashTarget),
    ]
}

struct World {
    source: Source,
    target: Target,
    agent: Agent,
}

impl World {
    fn new(kind: JobKind) -> Self {
        let device = vec![7; SECTORS as usize];
        let history = BTreeMap::from([(1, device.clone())]);
        let source = Source {
            device,
            history,
            next_seq: 1,
            released: 1,
            ..Source::default()
        };
        let job = JobState {
            id: 1,
            kind,
            reason: String::new(),
            devices: vec![DeviceJob::new(1, "vol", SECTORS)],
            paused: false,
            failed: None,
        };
        Self {
            source,
            target: Target::new(),
            agent: Agent::new(Some(job)),
        }
    }

    fn deliver(&mut self, most: usize) {
        for _ in 0..most {
            let Some(item) = self.agent.wire.pop_front() else {
                return;
            };
            self.target.receive(item, &self.source);
        }
    }

    fn run(&mut self, deed: &Deed) {
        let (source, target, agent) = (&mut self.source, &mut self.target, &mut self.agent);
        match *deed {
            Deed::Write {
                start,
                fill,
                sectors,
                has_room,
            } => source.write(start, fill, sectors, has_room),
            Deed::Gap => source.write_gap(),
            Deed::Send(most) => agent.send(source, most),
            Deed::Deliver(most) => self.deliver(most),
            Deed::Acknowledge => agent.acknowledge(source, target),
            Deed::Drive => agent.drive(source),
            Deed::Cut => agent.cut(),
            Deed::Connect => {
                agent.cut();
                agent.connect(source, target);
            }
            Deed::RestartAgent => {
                *agent = Agent::new(
                    agent
                        .planner
                        .as_ref()
                        .map(|planner| planner.state().clone()),
                );
            }
            Deed::Checkpoint => target.checkpoint(),
            Deed::CrashTarget => {
                agent.cut();
                target.crash();
            }
        }
    }

    fn is_settled(&self) -> bool {
        let agent = &self.agent;
        let idle = agent.planner.is_none() && agent.resync.is_idle() && agent.wire.is_empty();
        idle && self.target.sequence.next() == self.source.next_seq
    }

    fn settle(&mut self) {
        self.run(&Deed::Connect);
        for _ in 0..2000 {
            for deed in [
                Deed::Gap,
                Deed::Drive,
                Deed::Send(50),
                Deed::Deliver(100),
                Deed::Acknowledge,
            ] {
                self.run(&deed);
            }
            if self.is_settled() {
                return;
            }
        }
        panic!("it does not come to an end");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn whatever_happens_in_sync_means_equal(
        full: bool,
        deeds in prop::collection::vec(deed(), 0..250),
    ) {
        let mut world = World::new(if full { JobKind::Full } else { JobKind::Difference });
        for deed in &deeds {
            world.run(deed);
        }
        world.settle();
        prop_assert!(world.target.state.in_sync("vol"), "{:?}", world.target.state);
        prop_assert_eq!(&world.target.volume, &world.source.device);
    }
}

/// The check must be able to fail: a change that is neither in a record nor in the dirty map.
#[test]
#[should_panic(expected = "is not the device as it was")]
fn a_change_that_is_lost_is_noticed_by_the_check() {
    let mut world = World::new(JobKind::Full);
    world.settle();
    world.source.device[5] = 99;
    world.run(&Deed::Write {
        start: 100,
        fill: 1,
        sectors: 8,
        has_room: true,
    });
    world.settle();
}
