// SPDX-License-Identifier: GPL-2.0-only

//! A schedule: what applications, operators and misfortune do, drawn from a seed; in the end everything works again, and
//! the copy must become identical by itself.

use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::Duration;

use corosensei::stack::DefaultStack;
use dtloop_abi::raw;
use dtloop_agent::config::Compression;
use dtloop_api::{Connection, DeviceState, Failure, Rung};
use dtloop_core::mirror::JobKind;
use dtloop_disk::SimDisk;
use dtloop_target::config::ResyncPolicy;

use crate::kernel::Kernel;
use crate::random::Random;
use crate::source::{Ask, Source};
use crate::target::{Crash, Target};
use crate::world::{Machine, Weather, World, enter};

/// The copy is identical this soon after everything works again.
const PATIENCE: Duration = Duration::from_secs(240);

const EIO: i32 = 5;

/// What a schedule was made of, for the report.
#[derive(Clone, Copy, Debug, Default)]
pub struct Figures {
    pub turns: u64,
    pub simulated: Duration,
    pub crashes: u64,
    pub inspections: u64,
}

struct Run {
    world: std::rc::Rc<World>,
    random: Random,
    source: Source,
    target: Target,
    sizes: Vec<u64>,
    descs: u32,
    counter: u64,
    /// The first mirror has begun.
    begun: bool,
    /// What the agent says to a request for it.
    answer: Option<Receiver<Result<u64, Failure>>>,
    figures: Figures,
    /// The copy was whole once, and nobody has given that up.
    is_whole: bool,
    keeps: bool,
    /// What the target's disk was at some time.
    backup: Option<SimDisk>,
    /// The target was put back to that.
    restored: bool,
    /// Highest record that the agent gave back, by what the target or the queue had.
    released: ([u8; 16], u64),
}

/// Runs the schedule of a seed.
///
/// # Errors
///
/// What is wrong.
pub fn run(seed: u64, traces: bool, stacks: &mut Vec<DefaultStack>) -> Result<Figures, String> {
    in_world(seed, traces, stacks, Run::all)
}

/// An outage of a day, which ring, queue and dirty map bear one after the other.
///
/// # Errors
///
/// What is wrong.
pub fn outage(seed: u64, traces: bool, stacks: &mut Vec<DefaultStack>) -> Result<Figures, String> {
    in_world(seed, traces, stacks, Run::outage)
}

fn in_world(
    seed: u64,
    traces: bool,
    stacks: &mut Vec<DefaultStack>,
    schedule: fn(&mut Run) -> Result<(), String>,
) -> Result<Figures, String> {
    let world = World::new(seed, traces, std::mem::take(stacks));
    enter(Some(std::rc::Rc::clone(&world)));
    let mut run = Run::new(seed, traces, std::rc::Rc::clone(&world));
    let result = schedule(&mut run);
    world.end(Machine::Source, true);
    world.end(Machine::Target, true);
    let figures = Figures {
        turns: world.turns(),
        simulated: world.time(),
        ..run.figures
    };
    drop(run);
    *stacks = world.take_stacks();
    enter(None);
    result.map(|()| figures)
}

impl Run {
    fn new(seed: u64, traces: bool, world: std::rc::Rc<World>) -> Self {
        let mut random = Random::new(seed ^ 0x5eed);
        let sizes: Vec<u64> = match random.below(4) {
            0 => vec![300, 64],
            1 => vec![136],
            2 => vec![40, 40],
            _ => vec![300],
        };
        let descs = if random.one_in(2) { 16 } else { 64 };
        let tracks = !random.one_in(4);
        let kernel = Kernel::new(&mut random, &sizes, tracks, descs);
        if traces {
            kernel.keep_all();
        }
        let queue = (!random.one_in(3)).then_some((3 + random.below(3)) * (1280 << 10));
        let compression = if random.one_in(4) {
            Compression::Lz4
        } else {
            Compression::Off
        };
        let source = Source::new(random.draw(), kernel, queue, random.one_in(3), compression);
        let resync = if random.one_in(4) {
            ResyncPolicy::InPlace
        } else {
            ResyncPolicy::Staged
        };
        let target = Target::new(random.draw(), &sizes, resync);
        Self {
            world,
            random,
            source,
            target,
            sizes,
            descs,
            counter: 0,
            begun: false,
            answer: None,
            figures: Figures::default(),
            is_whole: false,
            keeps: resync == ResyncPolicy::Staged,
            backup: None,
            restored: false,
            released: ([0; 16], 0),
        }
    }

    fn all(&mut self) -> Result<(), String> {
        self.source.start(&self.world);
        self.target.start(&self.world);
        for _ in 0..self.random.below(6) {
            self.change();
        }
        self.pass(Duration::from_millis(300));
        if !self.random.one_in(6) {
            self.begin();
        }
        let steps = match self.random.below(4) {
            0 => 8 + self.random.below(20),
            _ => 2 + self.random.below(8),
        };
        for _ in 0..steps {
            self.step()?;
        }
        self.mend();
        self.converge()
    }

    fn outage(&mut self) -> Result<(), String> {
        self.source.give_queue(3 * (1280 << 10));
        self.source.start(&self.world);
        self.target.start(&self.world);
        self.pass(Duration::from_secs(1));
        self.begin();
        self.pass(Duration::from_secs(5));
        self.converge()?;
        self.world.set_weather(Weather {
            cut: true,
            ..self.world.weather()
        });
        self.world.reset_connections();
        for hour in 0..24 {
            for _ in 0..50 {
                self.change();
                self.pass(Duration::from_millis(40));
            }
            self.pass(Duration::from_secs(3600));
            if hour == 12 {
                self.kill_agent();
                self.source.start(&self.world);
            }
            self.inspect(true)?;
        }
        let rung = |run: &Self| {
            run.source
                .snapshot()
                .map(|snapshot| snapshot.status.ladder.rung)
        };
        if rung(self) != Some(Rung::Tracking) {
            return Err(format!(
                "a day does not fill ring and queue: {:?}",
                rung(self)
            ));
        }
        self.mend();
        self.converge()?;
        self.pass(Duration::from_secs(10));
        let history = self
            .source
            .snapshot()
            .map(|snapshot| snapshot.status.ladder.history);
        let history: Vec<Rung> = history
            .unwrap_or_default()
            .iter()
            .map(|step| step.to)
            .collect();
        if rung(self) != Some(Rung::Ring) || !history.contains(&Rung::Tracking) {
            return Err(format!("the ladder does not lead back: {history:?}"));
        }
        Ok(())
    }

    fn say(&self, text: impl FnOnce() -> String) {
        self.world.trace(text);
    }

    fn pass(&mut self, time: Duration) {
        self.world.run_until(self.world.time() + time);
        self.note_released();
    }

    fn note_released(&mut self) {
        let (stream, released) = (self.source.kernel.uuid(), self.source.kernel.released());
        if self.released.0 != stream {
            self.released = (stream, 0);
        }
        self.released.1 = self.released.1.max(released);
        match self.answer.as_ref().map(Receiver::try_recv) {
            None | Some(Err(TryRecvError::Empty)) => {}
            Some(answer) => {
                self.say(|| format!("agent: answers {answer:?}"));
                self.begun |= matches!(answer, Ok(Ok(_)));
                self.answer = None;
            }
        }
    }

    /// Some turns, without much time.
    fn turns(&mut self, count: u64) {
        let limit = self.world.time() + Duration::from_secs(2);
        for _ in 0..count {
            if !self.world.turn(limit) {
                break;
            }
        }
        self.note_released();
    }

    fn begin(&mut self) {
        let kind = if self.random.one_in(2) {
            JobKind::Full
        } else {
            JobKind::Difference
        };
        self.say(|| format!("operator: mirror, {kind:?}"));
        self.answer = self.source.ask(&self.world, Ask::Start(kind));
    }

    fn change(&mut self) {
        let device = self.random.below(self.sizes.len() as u64) as usize;
        let size = self.sizes[device];
        let most = if self.random.one_in(8) { 64 } else { 12 };
        let sectors = 1 + self.random.below(most);
        // Half of them in one place: they overlap.
        let span = if self.random.one_in(2) {
            size.min(40)
        } else {
            size
        };
        let start = self
            .random
            .below(span.saturating_sub(sectors) + 1)
            .min(size - sectors.min(size));
        let sectors = sectors.min(size - start);
        self.counter += 1;
        let late = self.random.one_in(6);
        match self.random.below(12) {
            0..2 => {
                self.say(|| format!("flush vol{device}"));
                self.source
                    .kernel
                    .change(device, raw::OP_FLUSH, 0, 0, &[], false);
            }
            2 => {
                self.say(|| format!("zero vol{device} {start}+{sectors}"));
                self.source
                    .kernel
                    .change(device, raw::OP_WRITE_ZEROES, start, sectors, &[], late);
            }
            _ => {
                let counter = self.counter;
                self.say(|| format!("write vol{device} {start}+{sectors}, number {counter}"));
                let payload = counter.to_le_bytes().repeat(sectors as usize * 64);
                self.source
                    .kernel
                    .change(device, raw::OP_WRITE, start, sectors, &payload, late);
            }
        }
        self.world.happen();
    }

    fn step(&mut self) -> Result<(), String> {
        match self.random.below(100) {
            0..34 => {
                let count = if self.random.one_in(12) {
                    80
                } else {
                    1 + self.random.below(6)
                };
                for _ in 0..count {
                    self.change();
                    if self.random.one_in(3) {
                        let turns = self.random.below(12);
                        self.turns(turns);
                    }
                }
            }
            34..52 => {
                let ms = match self.random.below(8) {
                    0 => 4000 + self.random.below(30_000),
                    1..4 => 200 + self.random.below(2000),
                    _ => self.random.below(60),
                };
                self.pass(Duration::from_millis(ms));
            }
            52..64 => {
                let turns = self.random.below(120);
                self.turns(turns);
            }
            64..68 => self.kill_agent(),
            68..71 => self.power_cut_source()?,
            71..74 => self.kill_target(false)?,
            74..77 => self.kill_target(true)?,
            77..79 => self.crash_twice()?,
            79..86 => self.network(),
            86..90 => self.inspect(true)?,
            90..92 => self.disks(),
            92..95 => self.back_up()?,
            95 => self.operate(),
            96 => {
                self.say(|| "changes that were under way end".to_owned());
                self.source.kernel.finish_open(&mut self.random);
                self.world.happen();
            }
            97 => {
                let machine = if self.random.one_in(2) {
                    Machine::Source
                } else {
                    Machine::Target
                };
                let (ahead, by) = (self.random.one_in(2), 1 + self.random.below(100_000));
                self.say(|| format!("{machine:?}: the clock is set, {by} s, ahead: {ahead}"));
                self.world
                    .set_clock(machine, ahead, Duration::from_secs(by));
            }
            98 => {
                if !self.source.is_running() {
                    return Ok(());
                }
                self.say(|| "agent: is asked to end".to_owned());
                self.source.stop(&self.world);
                self.pass(Duration::from_millis(500));
                self.source.kill(&self.world);
            }
            _ => {
                self.say(|| "source: the module is loaded anew".to_owned());
                self.source.kill(&self.world);
                self.source.kernel.finish_open(&mut self.random);
                self.source.kernel.reload(&mut self.random, self.descs);
            }
        }
        // What is down does not stay so for ever.
        if !self.source.is_running() && self.random.one_in(2) {
            self.say(|| "agent: starts".to_owned());
            self.source.start(&self.world);
        }
        if !self.target.is_running() && self.random.one_in(2) {
            self.say(|| "target: starts".to_owned());
            self.target.start(&self.world);
        }
        if !self.begun && self.random.one_in(8) {
            self.begin();
        }
        Ok(())
    }

    fn kill_agent(&mut self) {
        self.say(|| "agent: killed".to_owned());
        self.figures.crashes += 1;
        self.source.kill(&self.world);
        self.note_released();
    }

    fn power_cut_source(&mut self) -> Result<(), String> {
        self.say(|| "source: power cut".to_owned());
        self.figures.crashes += 1;
        self.note_released();
        let older = self.source.is_running() && self.random.one_in(6);
        if older {
            // Who restores an intent file from a backup takes longer than the agent to notice that there is a newer one.
            self.pass(Duration::from_millis(3500));
            self.note_released();
        }
        self.source.lose_power(&self.world);
        if self
            .source
            .kernel
            .power_cut(&mut self.random, self.descs, older)
        {
            // It cannot tell what the power cut took back from what a restored disk lacks: an operator has to.
            self.begun = false;
        }
        Ok(())
    }

    fn kill_target(&mut self, power: bool) -> Result<(), String> {
        self.say(|| format!("target: killed, power {power}"));
        self.figures.crashes += 1;
        self.note_released();
        // Before, so that what is wrong is seen on the disk as it was.
        self.inspect(power)?;
        self.target.end(&self.world, power);
        Ok(())
    }

    /// A copy of the target's disk or of the intent file is made, or put back: what was acknowledged since is gone.
    fn back_up(&mut self) -> Result<(), String> {
        if let Some(backup) = self.backup.take() {
            self.say(|| "target: is put back to its backup".to_owned());
            self.target.end(&self.world, false);
            self.target.disk = backup;
            (self.restored, self.keeps) = (true, false);
            self.target.start(&self.world);
        } else {
            self.say(|| "target and intent file: a backup is made".to_owned());
            self.source.kernel.copy_intent_file();
            self.backup = Some(self.target.disk.fork(self.random.draw()));
        }
        Ok(())
    }

    /// One is killed, its successor just begins, and the power fails: what the first had not made durable is gone.
    fn crash_twice(&mut self) -> Result<(), String> {
        for _ in 0..1 + self.random.below(8) {
            self.change();
        }
        let turns = self.random.below(60);
        self.turns(turns);
        if self.random.one_in(4) {
            self.kill_agent();
            self.source.start(&self.world);
            let ms = self.random.below(100) * self.random.below(400);
            self.pass(Duration::from_millis(ms));
            return self.power_cut_source();
        }
        if self.random.one_in(2) {
            self.world.catch(400);
        }
        self.kill_target(false)?;
        self.target.start(&self.world);
        let turns = self.random.below(120);
        self.turns(turns);
        self.kill_target(true)?;
        self.target.start(&self.world);
        Ok(())
    }

    fn inspect(&mut self, power: bool) -> Result<(), String> {
        self.figures.inspections += 1;
        let crash = if power { Crash::Power } else { Crash::Kill };
        let found = self
            .target
            .inspect(&self.source.kernel, &mut self.random, crash)?;
        self.say(|| format!("target: would be at record {} after a crash", found.applied));
        if self.is_whole && self.keeps && !found.is_whole && !found.is_refused {
            return Err(format!(
                "the last consistent state is gone, at record {}",
                found.applied
            ));
        }
        // What is seen on the disk may not be durable.
        if !self.is_whole && found.is_whole {
            let (kernel, random) = (&self.source.kernel, &mut self.random);
            let unlucky = self.target.inspect(kernel, random, Crash::Unlucky)?;
            self.is_whole = unlucky.is_whole && unlucky.applied > 0;
        }
        let (stream, released) = self.released;
        if !self.restored
            && !self.source.has_queue()
            && found.stream == stream
            && found.applied + 1 < released
        {
            return Err(format!(
                "records below {released} were given back, and the target has only those up to {}",
                found.applied
            ));
        }
        Ok(())
    }

    fn network(&mut self) {
        let latency = if self.random.one_in(4) {
            (Duration::from_millis(50), Duration::from_millis(900))
        } else {
            (Duration::from_micros(100), Duration::from_millis(2))
        };
        let cut = match self.random.below(4) {
            0 => true,
            1 => false,
            _ => self.world.weather().cut,
        };
        self.say(|| format!("network: cut {cut}, latency {latency:?}"));
        self.world.set_weather(Weather { cut, latency });
        if self.random.one_in(2) {
            self.say(|| "network: connections are reset".to_owned());
            self.world.reset_connections();
        }
    }

    fn disks(&mut self) {
        let (after, times) = (self.random.below(20), 1 + self.random.below(6));
        match self.random.below(4) {
            0 => {
                self.say(|| format!("queue: fails {times} times, after {after}"));
                self.source.queue_disk.fail(after, times, EIO);
            }
            1 => {
                self.say(|| "queue: is full".to_owned());
                self.source.queue_disk.set_capacity(0);
            }
            2 => {
                self.say(|| format!("target's disk: fails {times} times, after {after}"));
                self.target.disk.fail(after, times, EIO);
            }
            _ => {
                self.say(|| "target's disk: is full".to_owned());
                self.target.disk.set_capacity(0);
            }
        }
    }

    fn operate(&mut self) {
        let ask = match self.random.below(6) {
            0 => Ask::Start(JobKind::Full),
            1 => Ask::Start(JobKind::Difference),
            2 => Ask::Start(JobKind::Verify { repair: true }),
            3 => Ask::Pause(true),
            4 => Ask::Stop,
            _ => Ask::InPlace,
        };
        self.say(|| format!("operator: {ask:?}"));
        // Whoever stops a mirror begins it again.
        self.keeps &= !matches!(ask, Ask::InPlace);
        if matches!(ask, Ask::Stop) {
            (self.begun, self.answer) = (false, None);
        }
        let answer = self.source.ask(&self.world, ask);
        if matches!(ask, Ask::Start(JobKind::Full | JobKind::Difference)) {
            self.answer = answer;
        }
    }

    /// Everything works again.
    fn mend(&mut self) {
        self.say(|| "everything works again".to_owned());
        self.world.set_weather(Weather {
            cut: false,
            latency: (Duration::from_micros(100), Duration::from_millis(2)),
        });
        self.world.end_silent_connections();
        self.source.kernel.finish_open(&mut self.random);
        for disk in [
            &self.source.disk,
            &self.source.queue_disk,
            &self.target.disk,
        ] {
            disk.heal();
            disk.set_capacity(1 << 40);
        }
        if !self.source.is_running() {
            self.source.start(&self.world);
        }
        if !self.target.is_running() {
            self.target.start(&self.world);
        }
        let _ = self.source.ask(&self.world, Ask::Pause(false));
        self.pass(Duration::from_secs(1));
    }

    fn converge(&mut self) -> Result<(), String> {
        let limit = self.world.time() + PATIENCE;
        loop {
            self.pass(Duration::from_millis(500));
            let snapshot = self.source.snapshot().ok_or("the agent is gone")?;
            if snapshot.settled && self.is_quiet() {
                break;
            }
            if self.world.time() > limit {
                let devices: Vec<_> = snapshot
                    .status
                    .devices
                    .iter()
                    .map(|device| (&device.label, &device.state, &device.reason))
                    .collect();
                return Err(format!(
                    "it does not become in sync again: {:?}, {devices:?}, job {:?}",
                    snapshot.status.connection,
                    snapshot.job.map(|job| job.state)
                ));
            }
            let stuck = snapshot
                .status
                .devices
                .iter()
                .any(|device| matches!(device.state, DeviceState::MirrorNeeded));
            let connected = matches!(snapshot.status.connection, Connection::Connected { .. });
            if stuck && connected && !self.begun && self.answer.is_none() {
                self.begin();
            }
        }
        for device in 0..self.sizes.len() {
            let label = format!("vol{device}");
            let volume = self
                .target
                .volume(&label)
                .ok_or_else(|| format!("{label} is not there"))?;
            let content = self.source.kernel.content(device);
            let differs = volume
                .chunks(512)
                .zip(content.chunks(512))
                .position(|(a, b)| a != b);
            if let Some(sector) = differs {
                return Err(format!(
                    "\"{label}\" is in sync, and differs at sector {sector}"
                ));
            }
        }
        self.inspect(true)
    }

    /// Nothing of the target's staging area is left, so the volumes themselves hold the copy.
    fn is_quiet(&self) -> bool {
        let snapshot = self.source.snapshot();
        snapshot.is_some_and(|snapshot| {
            snapshot.status.staging.is_none()
                && snapshot.status.backlog_records == 0
                && snapshot.status.applied_seq == snapshot.status.next_seq
        })
    }
}
