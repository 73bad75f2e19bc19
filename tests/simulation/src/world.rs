// SPDX-License-Identifier: GPL-2.0-only

//! The world: a clock, two machines with their threads, and the network between them. All that happens follows from a seed.
//!
//! A thread is a coroutine. It has its turn until it waits, and also, at random, at each operation on a disk or a socket; then
//! another one is drawn from those that can go on. Time goes on a little with every turn, and when nobody can, to the next
//! moment that somebody waits for. A machine is switched off between two turns: its threads never have another one.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Shutdown, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};

use crate::random::Random;

/// A machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    Source,
    Target,
}

/// Room of one direction of a connection, both buffers and what is on its way.
const PIPE_BYTES: usize = 48 << 10;

const STACK_BYTES: usize = 512 << 10;

/// A turn takes some microseconds.
const TURN: Duration = Duration::from_micros(5);

type Turns = Coroutine<(), (), (), DefaultStack>;

struct Thread {
    number: u64,
    machine: Machine,
    name: String,
    turns: Option<Turns>,
    until: Option<Duration>,
    /// What had happened when it parked.
    seen: u64,
}

/// See [`World::catch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trap {
    Off,
    Set,
    Sprung,
}

/// One direction of a connection.
#[derive(Default)]
struct Pipe {
    /// When each piece is there, and the piece.
    pieces: VecDeque<(Duration, Vec<u8>)>,
    bytes: usize,
    /// When its end is there; whoever writes has said so.
    ended: Option<Duration>,
    /// Nobody reads any more.
    deaf: bool,
    /// Nothing gets through any more, and nobody is told.
    dead: bool,
}

struct Connection {
    /// From the source to the target, and back.
    pipes: [Pipe; 2],
    /// Each end: whether it is open, and whether it was reset.
    open: [bool; 2],
    reset: [bool; 2],
    accepted: bool,
}

/// What the network does.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// Nothing gets through.
    pub cut: bool,
    /// Shortest and longest time of a piece on its way.
    pub latency: (Duration, Duration),
}

struct Inner {
    now: Duration,
    random: Random,
    happened: u64,
    threads: Vec<Thread>,
    next_thread: u64,
    listener: bool,
    connections: Vec<Connection>,
    weather: Weather,
    /// Of source and target: what is added to the time for their wall clocks.
    wall: [Duration; 2],
    turns: u64,
}

pub struct World {
    inner: RefCell<Inner>,
    /// Whose turn it is: its number, machine and way back.
    current: Cell<Option<(u64, Machine)>>,
    /// The target is to be caught behind its next rename.
    trap: Cell<Trap>,
    /// Threads of a machine are being ended.
    ending: Cell<Option<Machine>>,
    stacks: RefCell<Vec<DefaultStack>>,
    traces: bool,
}

fn would_block() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

/// Which end of which connection.
fn parts(end: u64) -> (usize, usize) {
    ((end / 2) as usize, (end % 2) as usize)
}

impl World {
    pub fn new(seed: u64, traces: bool, stacks: Vec<DefaultStack>) -> Rc<Self> {
        let mut random = Random::new(seed);
        let year = 56 * 365 * 86_400;
        let wall = [0, 1].map(|_| Duration::from_secs(year + random.below(1000)));
        let inner = Inner {
            now: Duration::from_secs(1),
            random,
            happened: 0,
            threads: vec![],
            next_thread: 1,
            listener: false,
            connections: vec![],
            weather: Weather {
                cut: false,
                latency: (Duration::from_micros(100), Duration::from_millis(2)),
            },
            wall,
            turns: 0,
        };
        Rc::new(Self {
            inner: RefCell::new(inner),
            current: Cell::new(None),
            trap: Cell::new(Trap::Off),
            ending: Cell::new(None),
            stacks: RefCell::new(stacks),
            traces,
        })
    }

    pub fn take_stacks(&self) -> Vec<DefaultStack> {
        self.stacks.take()
    }

    pub fn time(&self) -> Duration {
        self.inner.borrow().now
    }

    pub fn turns(&self) -> u64 {
        self.inner.borrow().turns
    }

    pub fn trace(&self, text: impl FnOnce() -> String) {
        if self.traces {
            println!("{:>14.6} {}", self.time().as_secs_f64(), text());
        }
    }

    pub fn set_weather(&self, weather: Weather) {
        self.inner.borrow_mut().weather = weather;
        self.happen();
    }

    pub fn weather(&self) -> Weather {
        self.inner.borrow().weather
    }

    /// Sets the wall clock of a machine.
    pub fn set_clock(&self, machine: Machine, ahead: bool, by: Duration) {
        let wall = &mut self.inner.borrow_mut().wall[machine as usize];
        *wall = if ahead { *wall + by } else { *wall - by };
    }

    pub fn happen(&self) {
        self.inner.borrow_mut().happened += 1;
    }

    pub fn start(&self, machine: Machine, name: &str, run: Box<dyn FnOnce()>) -> u64 {
        let stack = self.stacks.borrow_mut().pop();
        let stack = stack.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("memory"));
        let turns = Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
            WAY_BACK.with(|way| way.set(yielder));
            run();
        });
        let mut inner = self.inner.borrow_mut();
        let number = inner.next_thread;
        inner.next_thread += 1;
        let seen = inner.happened.wrapping_sub(1);
        inner.threads.push(Thread {
            number,
            machine,
            name: name.to_owned(),
            turns: Some(turns),
            until: None,
            seen,
        });
        number
    }

    /// Ends all threads of a machine where they are. With `power` its connections are silent from now on; else the system,
    /// which goes on, closes them.
    pub fn end(&self, machine: Machine, power: bool) {
        let side = machine as usize;
        {
            let mut inner = self.inner.borrow_mut();
            if machine == Machine::Target {
                inner.listener = false;
            }
            let now = inner.now;
            for connection in &mut inner.connections {
                if power {
                    connection.pipes[side].dead = true;
                    // What was on its way before may still come.
                    connection.pipes[1 - side].deaf = true;
                    connection.pipes[1 - side].dead = true;
                } else if !connection.accepted && machine == Machine::Target {
                    connection.pipes[side].ended.get_or_insert(now);
                }
            }
        }
        self.ending.set(Some(machine));
        let is_ours = |thread: &Thread| thread.machine == machine;
        loop {
            let mut thread = {
                let mut inner = self.inner.borrow_mut();
                match inner.threads.iter().position(is_ours) {
                    Some(at) => inner.threads.swap_remove(at),
                    None => break,
                }
            };
            if let Some(mut turns) = thread.turns.take() {
                if turns.started() {
                    turns.force_unwind();
                    self.stacks.borrow_mut().push(turns.into_stack());
                }
            }
        }
        self.ending.set(None);
        self.happen();
    }

    /// One turn of somebody, or time to the next moment, which is not beyond `limit`. False: that is reached.
    pub fn turn(&self, limit: Duration) -> bool {
        let chosen = {
            let mut inner = self.inner.borrow_mut();
            let inner = &mut *inner;
            if inner.now >= limit {
                return false;
            }
            let (now, happened) = (inner.now, inner.happened);
            let goes_on = |thread: &Thread| {
                thread.seen != happened || thread.until.is_some_and(|until| until <= now)
            };
            let ready = inner
                .threads
                .iter()
                .filter(|thread| goes_on(thread))
                .count();
            if ready == 0 {
                let wakes = inner.threads.iter().filter_map(|thread| thread.until);
                let arrivals = inner.connections.iter().flat_map(|connection| {
                    connection
                        .pipes
                        .iter()
                        .filter(|pipe| !pipe.dead)
                        .flat_map(|pipe| {
                            let first = pipe.pieces.front().map(|(at, _)| *at);
                            [first, pipe.ended].into_iter().flatten()
                        })
                });
                let wakes = wakes.min();
                let arrives = arrivals.filter(|at| *at > now).min();
                let next = wakes.into_iter().chain(arrives).min();
                let next = next.unwrap_or(limit).min(limit);
                inner.now = next.max(now);
                if arrives == Some(next) {
                    inner.happened += 1;
                }
                return true;
            }
            let drawn = inner.random.below(ready as u64) as usize;
            let mut places = (0..inner.threads.len()).filter(|at| goes_on(&inner.threads[*at]));
            let at = places.nth(drawn).expect("one of them");
            inner.now += TURN * (1 + inner.random.below(8) as u32);
            inner.turns += 1;
            let thread = &mut inner.threads[at];
            thread.seen = happened;
            thread.until = None;
            (thread.number, thread.machine, thread.turns.take())
        };
        let (number, machine, turns) = chosen;
        let Some(mut turns) = turns else { return true };
        self.current.set(Some((number, machine)));
        let result = turns.resume(());
        self.current.set(None);
        let mut inner = self.inner.borrow_mut();
        let at = inner
            .threads
            .iter()
            .position(|thread| thread.number == number);
        let at = at.expect("nobody ends a thread that has its turn");
        match result {
            CoroutineResult::Yield(()) => inner.threads[at].turns = Some(turns),
            CoroutineResult::Return(()) => {
                let thread = inner.threads.swap_remove(at);
                inner.happened += 1;
                drop(inner);
                self.trace(|| format!("{:?}: thread \"{}\" ends", thread.machine, thread.name));
                self.stacks.borrow_mut().push(turns.into_stack());
            }
        }
        true
    }

    /// Turns, so many at most, until the target has just renamed a file and not done more.
    pub fn catch(&self, turns: u64) {
        self.trap.set(Trap::Set);
        let limit = self.time() + Duration::from_secs(2);
        for _ in 0..turns {
            if !self.turn(limit) || self.trap.get() == Trap::Sprung {
                break;
            }
        }
        self.trap.set(Trap::Off);
    }

    /// A file was renamed.
    fn spring(&self) {
        if self.trap.get() == Trap::Set && self.current_machine() == Some(Machine::Target) {
            self.trap.set(Trap::Sprung);
            self.give_back(Some(self.time() + Duration::from_millis(1)), true);
        }
    }

    /// Turns until that time.
    pub fn run_until(&self, limit: Duration) {
        while self.turn(limit) {}
    }

    fn give_back(&self, until: Option<Duration>, sees_all: bool) {
        let Some((number, _)) = self.current.get() else {
            // The schedule itself waits for nothing.
            return;
        };
        {
            let mut inner = self.inner.borrow_mut();
            let happened = inner.happened;
            let at = inner
                .threads
                .iter()
                .position(|thread| thread.number == number);
            if let Some(thread) = at.and_then(|at| inner.threads.get_mut(at)) {
                thread.until = until;
                thread.seen = if sees_all {
                    happened
                } else {
                    happened.wrapping_sub(1)
                };
            }
        }
        let way = WAY_BACK.with(Cell::get);
        let current = self.current.get();
        // SAFETY: `WAY_BACK` was set by the coroutine that runs now, at its beginning and after each turn below; its
        // yielder lives as long as it.
        unsafe { (*way).suspend(()) };
        WAY_BACK.with(|back| back.set(way));
        self.current.set(current);
    }

    /// Another thread may have a turn here.
    pub fn preempt(&self) {
        if self.ending.get().is_some() || self.current.get().is_none() {
            return;
        }
        let drawn = self.inner.borrow_mut().random.below(100);
        match drawn {
            0..20 => self.give_back(None, false),
            20..24 => {
                let until = {
                    let mut inner = self.inner.borrow_mut();
                    inner.now + Duration::from_micros(50 + inner.random.below(3000))
                };
                // Nothing wakes it before.
                while self.time() < until && self.ending.get().is_none() {
                    self.give_back(Some(until), true);
                }
            }
            _ => {}
        }
    }

    pub fn current_machine(&self) -> Option<Machine> {
        self.current.get().map(|(_, machine)| machine)
    }

    /// Resets what is between the machines: each side learns of it at a time of its own, or of what it does next.
    pub fn reset_connections(&self) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        for connection in &mut inner.connections {
            for side in 0..2 {
                let pipe = &mut connection.pipes[side];
                // A part of what was on its way arrives.
                let kept = inner.random.below(pipe.pieces.len() as u64 + 1) as usize;
                pipe.pieces.truncate(kept);
                if kept > 0 && inner.random.below(2) == 0 {
                    let last = &mut pipe.pieces[kept - 1].1;
                    let bytes = inner.random.below(last.len() as u64 + 1) as usize;
                    last.truncate(bytes);
                }
                pipe.dead = inner.random.below(3) == 0;
                let later = Duration::from_micros(inner.random.below(20_000_000));
                pipe.ended = Some(inner.now + later);
            }
        }
        inner.happened += 1;
    }

    /// Whoever waits for what never comes learns that its connection has ended.
    pub fn end_silent_connections(&self) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        for connection in &mut inner.connections {
            let ends = |pipe: &Pipe| pipe.dead || pipe.ended.is_some();
            if connection.pipes.iter().any(ends) {
                for pipe in &mut connection.pipes {
                    pipe.pieces.clear();
                    pipe.dead = false;
                    pipe.ended = Some(inner.now);
                }
            }
        }
        inner.happened += 1;
    }

    fn draw_latency(inner: &mut Inner) -> Duration {
        let (least, most) = inner.weather.latency;
        let span = (most - least).as_micros() as u64 + 1;
        least + Duration::from_micros(inner.random.below(span))
    }
}

thread_local! {
    static WAY_BACK: Cell<*const Yielder<(), ()>> = const { Cell::new(std::ptr::null()) };
}

impl dtloop_runtime::World for World {
    fn now(&self) -> Duration {
        self.time()
    }

    fn unix_time(&self) -> Duration {
        let machine = self.current_machine().unwrap_or(Machine::Source);
        let inner = self.inner.borrow();
        inner.now + inner.wall[machine as usize]
    }

    fn park(&self, until: Option<Duration>) {
        if self.ending.get().is_some() {
            return;
        }
        self.give_back(until, true);
    }

    fn stir(&self) {
        self.happen();
    }

    fn spawn(&self, name: &str, run: Box<dyn FnOnce() + Send>) -> u64 {
        let machine = self.current_machine().expect("a thread starts another");
        let number = self.start(machine, name, run);
        self.preempt();
        number
    }

    fn has_ended(&self, thread: u64) -> bool {
        let inner = self.inner.borrow();
        self.ending.get().is_some() || inner.threads.iter().all(|known| known.number != thread)
    }

    fn connect(&self, _: SocketAddr, timeout: Duration) -> io::Result<u64> {
        let until = self.time() + timeout;
        self.preempt();
        let mut inner = self.inner.borrow_mut();
        if inner.weather.cut {
            drop(inner);
            while self.time() < until && self.ending.get().is_none() {
                self.give_back(Some(until), true);
            }
            return Err(io::ErrorKind::TimedOut.into());
        }
        if !inner.listener {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        inner.connections.push(Connection {
            pipes: [Pipe::default(), Pipe::default()],
            open: [true, true],
            reset: [false, false],
            accepted: false,
        });
        inner.happened += 1;
        Ok(inner.connections.len() as u64 * 2 - 2)
    }

    fn listen(&self, _: SocketAddr) -> io::Result<u64> {
        self.inner.borrow_mut().listener = true;
        Ok(u64::MAX)
    }

    fn accept(&self, _: u64) -> io::Result<(u64, SocketAddr)> {
        let mut inner = self.inner.borrow_mut();
        let mut waiting = inner.connections.iter_mut().enumerate();
        // The source may have left already.
        let found =
            waiting.find(|(_, connection)| !connection.accepted && !connection.pipes[0].deaf);
        let (at, connection) = found.ok_or_else(would_block)?;
        connection.accepted = true;
        let port = 1024 + (at % 60000) as u16;
        Ok((at as u64 * 2 + 1, (Ipv4Addr::LOCALHOST, port).into()))
    }

    fn read(&self, end: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.preempt();
        let (at, side) = parts(end);
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let connection = &mut inner.connections[at];
        if connection.reset[side] {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let pipe = &mut connection.pipes[1 - side];
        if inner.weather.cut || pipe.dead {
            return Err(would_block());
        }
        match pipe.pieces.front_mut() {
            Some((there, piece)) if *there <= inner.now => {
                let mut bytes = piece.len().min(buffer.len());
                if inner.random.below(8) == 0 {
                    bytes = 1 + inner.random.below(bytes as u64) as usize;
                }
                let bytes = bytes.min(piece.len());
                buffer[..bytes].copy_from_slice(&piece[..bytes]);
                piece.drain(..bytes);
                if piece.is_empty() {
                    pipe.pieces.pop_front();
                }
                pipe.bytes -= bytes.min(pipe.bytes);
                inner.happened += 1;
                // An empty piece says nothing.
                if bytes == 0 {
                    Err(would_block())
                } else {
                    Ok(bytes)
                }
            }
            Some(_) => Err(would_block()),
            None => match pipe.ended {
                Some(there) if there <= inner.now => Ok(0),
                _ => Err(would_block()),
            },
        }
    }

    fn write(&self, end: u64, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        self.preempt();
        let (at, side) = parts(end);
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let latency = Self::draw_latency(inner);
        let connection = &mut inner.connections[at];
        let pipe = &mut connection.pipes[side];
        if connection.reset[side] || pipe.ended.is_some() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if pipe.deaf && !pipe.dead && !inner.weather.cut {
            // The other side says so.
            connection.reset[side] = true;
            inner.happened += 1;
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        let wanted: usize = pieces.iter().map(|piece| piece.len()).sum();
        let mut bytes = wanted.min(PIPE_BYTES.saturating_sub(pipe.bytes));
        if bytes == 0 && wanted > 0 {
            return Err(would_block());
        }
        if inner.random.below(8) == 0 {
            bytes = inner.random.below(bytes as u64 + 1).max(1) as usize;
        }
        let bytes = bytes.min(wanted);
        let mut piece = Vec::with_capacity(bytes);
        for part in pieces {
            let left = bytes - piece.len();
            piece.extend_from_slice(&part[..part.len().min(left)]);
        }
        let last = pipe
            .pieces
            .back()
            .map_or(Duration::ZERO, |(there, _)| *there);
        let there = (inner.now + latency).max(last);
        pipe.bytes += bytes;
        pipe.pieces.push_back((there, piece));
        inner.happened += 1;
        Ok(bytes)
    }

    fn is_ready(&self, end: u64, write: bool) -> bool {
        let (at, side) = parts(end);
        let inner = self.inner.borrow();
        let Connection { pipes, reset, .. } = &inner.connections[at];
        let (out, back) = (&pipes[side], &pipes[1 - side]);
        let is_there = |at: Option<Duration>| at.is_some_and(|at| at <= inner.now);
        let hears = !inner.weather.cut && !back.dead;
        let first = back.pieces.front().map(|(at, _)| *at);
        let ended = back.ended.filter(|_| back.pieces.is_empty());
        let reads = hears && (is_there(first) || is_there(ended));
        let writes = write && (out.bytes < PIPE_BYTES || out.ended.is_some());
        reset[side] || reads || writes
    }

    fn shutdown(&self, end: u64, _: Shutdown) {
        let (at, side) = parts(end);
        self.trace(|| format!("    end {side} of connection {at} is shut down"));
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let Some(connection) = inner.connections.get_mut(at) else {
            return;
        };
        let last = connection.pipes[side]
            .pieces
            .back()
            .map(|(there, _)| *there);
        let now = inner.now.max(last.unwrap_or_default());
        connection.pipes[side].ended.get_or_insert(now);
        connection.pipes[1 - side].deaf = true;
        connection.open[side] = false;
        inner.happened += 1;
    }

    fn close(&self, end: u64) {
        if end != u64::MAX {
            self.shutdown(end, Shutdown::Both);
        }
    }
}

thread_local! {
    static HERE: RefCell<Option<Rc<World>>> = const { RefCell::new(None) };
}

/// Makes this the world of everything that runs on this thread of the system, or ends it.
pub fn enter(world: Option<Rc<World>>) {
    let shared = world
        .clone()
        .map(|world| world as Rc<dyn dtloop_runtime::World>);
    dtloop_runtime::enter(shared);
    HERE.with(|here| *here.borrow_mut() = world);
}

/// Another thread of the world may have a turn here.
pub fn preempt_current() {
    let world = HERE.with(|here| here.borrow().clone());
    if let Some(world) = world {
        world.preempt();
    }
}

/// A file was renamed.
pub fn spring() {
    let world = HERE.with(|here| here.borrow().clone());
    if let Some(world) = world {
        world.spring();
    }
}

/// The time of the world.
pub fn time() -> Duration {
    let world = HERE.with(|here| here.borrow().clone());
    world.map_or(Duration::ZERO, |world| world.time())
}

/// Tells what happens, in a schedule that is looked at.
pub fn trace(text: impl FnOnce() -> String) {
    let world = HERE.with(|here| here.borrow().clone());
    if let Some(world) = world {
        world.trace(text);
    }
}
