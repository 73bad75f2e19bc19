// SPDX-License-Identifier: GPL-2.0-only

//! Whether batches are compressed, and how: measured, never assumed.
//!
//! ```text
//!            the link was the bottleneck, samples promise a gain
//!   Plain ------------------------------------------------------> Trial
//!    ^ ^                                                           | measured: faster
//!    | +--------- not faster ------------------------------------- + ---------> Packing
//!    |                                                                           |  |
//!    +--- the data no longer shrinks, demand fell, or plain was as fast ---------+  | now and then
//!    |                                                                              v
//!    +--------------------------- as fast ------------------------------------- Recheck --> Packing
//! ```
//!
//! # Why it is never slower than without compression
//!
//! - Compression is only considered while the link is the bottleneck: while the sender waits for the socket or for its
//!   bandwidth limit. Else there is nothing to gain.
//! - **Sample.** A piece of a batch is compressed and thrown away, which tells ratio `r` and speed `C` of a method. With
//!   the link's measured rate `B`, a byte costs `1/B` plain and at most `1/C + 1/(r*B)` packed, as if nothing overlapped. Only
//!   a gain of a tenth leads to a trial.
//! - **Trial.** Batches are packed for a window, and the *raw* bytes per second are compared with those of the plain
//!   windows before. That covers what the samples cannot see, such as a target whose disk is the bottleneck.
//! - **What all of that may cost is bounded by an account.** Time spent on samples, on batches that did not shrink,
//!   and lost in trials and rechecks that were the slower ones is written down; nothing is tried while the account is above
//!   a hundredth of the busy time, plus [`FREE`]. So the loss stays near 1 %, whatever data and link do.
//!
//! Times come from the caller. Idle time does not count.

use std::time::Duration;

/// What may be spent before anything was gained.
pub const FREE: Duration = Duration::from_millis(20);

/// Part of the busy time that may be lost.
const LOSS_PARTS: u32 = 100;

/// A window lasts this long at least, and has so many batches unless these few take five times as long; the first batch after a change pays for the one before
/// it and is left out.
const WINDOW: Duration = Duration::from_millis(100);
const WINDOW_BATCHES: u32 = 4;

/// The link is the bottleneck if the sender waited for a quarter of a window.
const PRESSED_PARTS: u32 = 4;

/// A recheck that has not filled the socket after so many batches: the link is no bottleneck any more.
const RECHECK_BATCHES: u32 = 64;

/// Pauses after data that did not shrink, or a gain that was none.
const HOLD_MIN: Duration = Duration::from_millis(250);
const HOLD_MAX: Duration = Duration::from_secs(32);

/// Between two looks whether plain would be as fast by now.
const RECHECK_EVERY: Duration = Duration::from_secs(10);

/// What a sample says is believed for so much busy time.
const SAMPLE_KEPT: Duration = Duration::from_secs(10);

/// What is known of a method.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Measured {
    /// Raw bytes by packed bytes.
    ratio: f64,
    /// Raw bytes per second of compressing.
    speed: f64,
    /// Busy time at which that was measured.
    at: Duration,
}

impl Measured {
    /// Seconds for a raw byte, with nothing overlapping.
    fn cost(&self, link: f64) -> f64 {
        1.0 / self.speed + 1.0 / (self.ratio * link)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Plain,
    Trial(usize),
    Packing(usize),
    Recheck(usize),
}

/// What to do with the next batch. A method is an index into the caller's list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Send it as it is.
    Plain,
    /// The same, and compress a piece of it for [`Adaptive::on_sample`].
    Sample(usize),
    /// Pack it.
    Pack(usize),
}

/// Why batches are packed or not, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The link takes everything at once.
    LinkIsFast,
    /// What is sent does not get smaller.
    DataDoesNotShrink,
    /// The processor is no faster than the link.
    NoGain,
    /// It is being found out.
    Measuring,
    /// Packed data arrives faster.
    Faster,
}

impl Reason {
    /// The reason in a few words.
    #[must_use]
    pub fn text(self) -> &'static str {
        match self {
            Self::LinkIsFast => "the link is not the bottleneck",
            Self::DataDoesNotShrink => "the data does not get smaller",
            Self::NoGain => "compressing would take longer than sending",
            Self::Measuring => "being measured",
            Self::Faster => "the link is the bottleneck",
        }
    }
}

/// A batch that was sent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Batch {
    /// Its bytes before compression.
    pub raw: u64,
    /// Its bytes on the wire.
    pub wire: u64,
    /// Time since the batch before it, idle time left out.
    pub busy: Duration,
    /// Part of it in which the socket or the limit was waited for.
    pub pressed: Duration,
    /// Part of it in which it was compressed.
    pub packing: Duration,
}

#[derive(Clone, Copy, Debug, Default)]
struct Window {
    batches: u32,
    sum: Batch,
    /// Waiting for data since the window began.
    idle: Duration,
}

impl Window {
    fn add(&mut self, batch: &Batch) {
        self.batches += 1;
        if self.batches == 1 {
            return;
        }
        self.sum.raw += batch.raw;
        self.sum.wire += batch.wire;
        self.sum.busy += batch.busy;
        self.sum.pressed += batch.pressed;
        self.sum.packing += batch.packing;
    }

    fn is_full(&self) -> bool {
        let busy = self.sum.busy;
        busy >= WINDOW && (self.batches > WINDOW_BATCHES || busy >= 5 * WINDOW)
    }

    fn rate(&self) -> f64 {
        self.sum.raw as f64 / self.sum.busy.as_secs_f64().max(1e-9)
    }

    fn is_pressed(&self) -> bool {
        self.sum.pressed * PRESSED_PARTS >= self.sum.busy
    }
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Adaptive {
    state: State,
    reason: Reason,
    methods: Vec<Option<Measured>>,
    window: Window,
    busy: Duration,
    lost: Duration,
    /// Raw bytes per second of plain windows in which the link was the bottleneck.
    plain_rate: Option<f64>,
    packed_rate: f64,
    pressed: bool,
    /// The next method to sample in this round.
    round: Option<usize>,
    hold: Duration,
    hold_until: Duration,
    recheck_at: Duration,
    misses: u32,
    /// The socket was full since a recheck began.
    filled: bool,
    measured: bool,
    /// Raw bytes per second of the batch for which the socket was first waited for, until a window says it better.
    hint: Option<f64>,
}

impl Adaptive {
    /// For a list of so many methods, the fastest first.
    #[must_use]
    pub fn new(methods: usize) -> Self {
        Self {
            state: State::Plain,
            reason: Reason::LinkIsFast,
            methods: vec![None; methods],
            window: Window::default(),
            busy: Duration::ZERO,
            lost: Duration::ZERO,
            plain_rate: None,
            packed_rate: 0.0,
            pressed: false,
            round: None,
            hold: HOLD_MIN,
            hold_until: Duration::ZERO,
            recheck_at: Duration::ZERO,
            misses: 0,
            filled: false,
            measured: false,
            hint: None,
        }
    }

    /// Why it does what it does.
    #[must_use]
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// Busy time so far, and how much of it was lost to finding out.
    #[must_use]
    pub fn account(&self) -> (Duration, Duration) {
        (self.busy, self.lost)
    }

    /// Whether it is known by now if the link is the bottleneck. Until then, batches had better be short.
    #[must_use]
    pub fn has_measured(&self) -> bool {
        self.measured
    }

    /// Raw bytes per second lately; `None` while the link is not the bottleneck.
    #[must_use]
    pub fn raw_rate(&self) -> Option<u64> {
        let rate = match self.state {
            State::Plain => self.plain_rate.filter(|_| self.pressed).or(self.hint)?,
            _ => self.packed_rate.max(self.plain_rate?),
        };
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a positive estimate; the cast saturates"
        )]
        Some(rate as u64)
    }

    fn may_spend(&self, more: Duration) -> bool {
        self.lost + more <= self.busy / LOSS_PARTS + FREE
    }

    fn enter(&mut self, state: State, reason: Reason) {
        self.state = state;
        self.reason = reason;
        self.window = Window::default();
        self.misses = 0;
        self.filled = false;
    }

    fn back_off(&mut self, reason: Reason) {
        self.enter(State::Plain, reason);
        self.round = None;
        self.hold_until = self.busy + self.hold;
        self.hold = (self.hold * 2).min(HOLD_MAX);
    }

    /// What to do with a batch.
    pub fn plan(&mut self) -> Plan {
        match self.state {
            State::Trial(method) | State::Packing(method) => return Plan::Pack(method),
            State::Recheck(_) => return Plan::Plain,
            State::Plain => {}
        }
        if !self.pressed || self.busy < self.hold_until {
            return Plan::Plain;
        }
        let method = *self.round.get_or_insert(0);
        let is_fresh = |known: &Measured| self.busy < known.at + SAMPLE_KEPT;
        if self.methods[method].as_ref().is_some_and(is_fresh) {
            self.go_on_sampling(method);
            return match self.state {
                State::Trial(method) => Plan::Pack(method),
                _ => Plan::Plain,
            };
        }
        // What it will take is not known; a millisecond is much for the slowest method.
        if self.may_spend(Duration::from_millis(1)) {
            Plan::Sample(method)
        } else {
            Plan::Plain
        }
    }

    /// What came of [`Plan::Sample`].
    pub fn on_sample(&mut self, method: usize, raw: usize, packed: usize, took: Duration) {
        self.lost += took;
        let measured = Measured {
            ratio: raw as f64 / packed.max(1) as f64,
            speed: raw as f64 / took.as_secs_f64().max(1e-9),
            at: self.busy,
        };
        self.methods[method] = Some(measured);
        if self.state == State::Plain {
            self.go_on_sampling(method);
        }
    }

    /// A round samples method after method while they promise more; then the best is tried.
    fn go_on_sampling(&mut self, method: usize) {
        let (Some(known), Some(link)) = (self.methods[method], self.plain_rate) else {
            self.round = None;
            return;
        };
        if known.ratio < 1.05 && method > 0 {
            return self.back_off(Reason::DataDoesNotShrink);
        }
        let costs = |index: usize| self.methods[index].map(|known| known.cost(link));
        let grows = method == 0 || costs(method) < costs(method - 1);
        let next = method + 1;
        // The next method compresses harder, and takes longer: of use while this one is far faster than the link.
        if next < self.methods.len() && (method == 0 || (grows && known.speed > 2.0 * link)) {
            self.round = Some(next);
            return;
        }
        self.round = None;
        let known = (0..=method).filter_map(|index| Some((index, costs(index)?)));
        let best = known.min_by(|(_, a), (_, b)| a.total_cmp(b));
        match best {
            Some((best, cost)) if cost < 0.9 / link => {
                self.enter(State::Trial(best), Reason::Measuring);
            }
            _ => self.back_off(Reason::NoGain),
        }
    }

    /// There was nothing to send for that time.
    pub fn on_idle(&mut self, time: Duration) {
        self.window.idle += time;
        // Less than half of what would go plain: the link is no bottleneck.
        if self.window.idle < WINDOW * 10 || self.state == State::Plain {
            return;
        }
        let wall = (self.window.sum.busy + self.window.idle).as_secs_f64();
        let demand = self.window.sum.raw as f64 / wall;
        if demand < self.plain_rate.unwrap_or(f64::MAX) / 2.0 {
            self.pressed = false;
            self.enter(State::Plain, Reason::LinkIsFast);
        } else {
            self.window.idle = Duration::ZERO;
        }
    }

    /// A batch was sent.
    pub fn on_batch(&mut self, batch: &Batch) {
        self.busy += batch.busy;
        self.window.add(batch);
        match self.state {
            State::Plain => self.on_plain(batch),
            State::Trial(method) | State::Packing(method) => self.on_packed(method, batch),
            State::Recheck(method) => self.on_recheck(method, batch),
        }
    }

    fn on_plain(&mut self, batch: &Batch) {
        if !self.filled && !batch.pressed.is_zero() {
            // A window that began before the socket was full would take the buffer for the link.
            self.filled = true;
            self.measured = true;
            self.hint = Some(batch.raw as f64 / batch.busy.as_secs_f64().max(1e-9));
            self.window = Window::default();
            return;
        }
        if !self.window.is_full() {
            return;
        }
        self.measured = true;
        self.hint = None;
        self.pressed = self.window.is_pressed();
        if self.pressed {
            self.plain_rate = Some(self.window.rate());
        } else {
            self.reason = Reason::LinkIsFast;
            self.round = None;
            self.filled = false;
        }
        self.window = Window::default();
    }

    fn on_packed(&mut self, method: usize, batch: &Batch) {
        if batch.wire * 100 > batch.raw * 97 {
            self.lost += batch.packing;
            self.misses += 1;
            if self.misses >= 2 {
                self.methods[method] = None;
                return self.back_off(Reason::DataDoesNotShrink);
            }
        } else {
            self.misses = 0;
        }
        if !self.window.is_full() {
            return;
        }
        let Some(link) = self.plain_rate else {
            return self.back_off(Reason::NoGain);
        };
        let (sum, rate) = (self.window.sum, self.window.rate());
        let measured = Measured {
            ratio: sum.raw as f64 / (sum.wire.max(1)) as f64,
            speed: sum.raw as f64 / sum.packing.as_secs_f64().max(1e-9),
            at: self.busy,
        };
        self.methods[method] = Some(measured);
        if self.state == State::Trial(method) {
            if rate < link * 1.05 {
                let plain = Duration::from_secs_f64(sum.raw as f64 / link);
                self.lost += sum.busy.saturating_sub(plain);
                return self.back_off(Reason::NoGain);
            }
            self.hold = HOLD_MIN;
            self.recheck_at = self.busy + RECHECK_EVERY;
            self.enter(State::Packing(method), Reason::Faster);
        } else if measured.cost(link) > 0.97 / link && rate < link * 1.05 {
            return self.back_off(Reason::NoGain);
        }
        self.packed_rate = rate;
        self.window = Window::default();
        if self.busy >= self.recheck_at {
            let slower = 1.0 - (link / rate).clamp(0.0, 1.0);
            if self.may_spend(WINDOW.mul_f64(2.0 * slower)) {
                self.enter(State::Recheck(method), Reason::Faster);
            }
        }
    }

    fn on_recheck(&mut self, method: usize, batch: &Batch) {
        // Only what comes when the socket is full says how fast the link is.
        if !self.filled {
            self.filled = !batch.pressed.is_zero();
            if self.window.batches >= RECHECK_BATCHES {
                self.pressed = false;
                self.enter(State::Plain, Reason::LinkIsFast);
            } else if self.filled {
                self.window = Window::default();
            }
            return;
        }
        if !self.window.is_full() {
            return;
        }
        let (sum, link) = (self.window.sum, self.window.rate());
        self.plain_rate = Some(link);
        if link >= self.packed_rate * 0.97 {
            return self.back_off(Reason::NoGain);
        }
        let packed = Duration::from_secs_f64(sum.raw as f64 / self.packed_rate);
        self.lost += sum.busy.saturating_sub(packed);
        self.recheck_at = self.busy + RECHECK_EVERY;
        self.enter(State::Packing(method), Reason::Faster);
    }
}
