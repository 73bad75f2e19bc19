// SPDX-License-Identifier: GPL-2.0-only

//! How fast mirror and resync may read while the device is in use.
//!
//! SYNC reads and live changes share one ordered stream, so every byte of a SYNC that waits in it delays the live changes
//! behind it. A mirror at full speed keeps megabytes there; over a slow link that is seconds of lag. So the pace follows
//! the age of the oldest live change that is not durable on the target:
//!
//! ```text
//!   no live change for a while                     -> full speed (or the configured maximum)
//!   live changes, lag beyond base + LAG_HIGH       -> half as fast, every tick, down to the floor
//!   live changes, lag below base + LAG_LOW         -> a twentieth of the throughput faster, every tick
//! ```
//!
//! The base is the round trip, measured at the beginning of a session, before anything waits: what distance costs is
//! nobody's fault. It is not learnt from the lag itself, which would take a queue that never empties for distance.
//!
//! The floor is a tenth of what is acknowledged, at least [`FLOOR_MIN`]: a resync always ends. What may be in flight is
//! bounded by time as well: half a second of the pace, a second of the throughput at full speed. So slowing down takes
//! effect at once, and the first live change after a pause does not wait for megabytes.

use std::time::Duration;

use crate::rate::{Bucket, Limit};

/// Lag of live changes beyond which mirror and resync slow down.
pub const LAG_HIGH: Duration = Duration::from_millis(250);

/// Lag below which they speed up.
pub const LAG_LOW: Duration = Duration::from_millis(100);

/// Bytes per second that are always read.
pub const FLOOR_MIN: u64 = 64 << 10;

/// No live change for this time: the device is idle.
const IDLE_AFTER: Duration = Duration::from_secs(2);

/// How often the pace is looked at.
const TICK: Duration = Duration::from_millis(100);

/// What may be in flight, as time.
const FLIGHT: Duration = Duration::from_millis(500);

/// The same at full speed: what a live change finds before it when it comes.
const FLIGHT_FULL: Duration = Duration::from_secs(1);

/// What may always be in flight at full speed; from there it doubles with what comes back.
const FLIGHT_MIN: u64 = 256 << 10;

/// What may always be in flight, and the smallest request: one chunk.
const CHUNK: u64 = crate::mirror::CHUNK_BYTES as u64;

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Pace {
    max: Limit,
    bucket: Bucket,
    /// Bytes per second; `None`: full speed.
    rate: Option<u64>,
    live_at: Option<Duration>,
    ticked: Duration,
    /// The longest that a live change took since the last tick.
    worst: Duration,
    base: Duration,
    /// Acknowledged since the last tick, and the smoothed throughput in bytes per second.
    acked: u64,
    throughput: u64,
}

impl Pace {
    /// A pace with a configured maximum.
    #[must_use]
    pub fn new(max: Limit, now: Duration) -> Self {
        Self {
            max,
            bucket: Bucket::new(max, now),
            rate: None,
            live_at: None,
            ticked: now,
            worst: Duration::ZERO,
            base: Duration::ZERO,
            acked: 0,
            throughput: 0,
        }
    }

    /// A live change was sent.
    pub fn on_live(&mut self, now: Duration) {
        self.live_at = Some(now);
    }

    /// The target acknowledged that many bytes, of whatever.
    pub fn on_durable(&mut self, bytes: u64) {
        self.acked = self.acked.saturating_add(bytes);
    }

    /// A live change became durable on the target, so long after it was made.
    pub fn on_live_durable(&mut self, took: Duration) {
        self.worst = self.worst.max(took);
    }

    /// The round trip of the session that begins.
    pub fn set_base(&mut self, base: Duration) {
        self.base = base;
    }

    /// Whether live changes make it slower than it could be.
    #[must_use]
    pub fn yields(&self) -> bool {
        self.rate.is_some()
    }

    /// Bytes per second; `None`: as fast as it goes.
    #[must_use]
    pub fn rate(&self) -> Option<u64> {
        self.bucket.limit().rate()
    }

    /// The configured maximum.
    #[must_use]
    pub fn max(&self) -> Limit {
        self.max
    }

    /// The rate below which it does not fall.
    #[must_use]
    pub fn floor(&self) -> u64 {
        (self.throughput / 10).max(FLOOR_MIN)
    }

    /// Looks at the lag of live changes: the age of the oldest one that is not durable; zero if there is none.
    pub fn tick(&mut self, lag: Duration, now: Duration) {
        let elapsed = now.saturating_sub(self.ticked);
        if elapsed < TICK {
            return;
        }
        self.ticked = now;
        let lag = lag.max(std::mem::take(&mut self.worst));
        let base = self.base;
        let ms = u64::try_from(elapsed.as_millis())
            .unwrap_or(u64::MAX)
            .max(1);
        let measured = std::mem::take(&mut self.acked).saturating_mul(1000) / ms;
        // Acknowledgements come in lumps: an eighth a tick, so about a second.
        self.throughput = (self.throughput * 7).saturating_add(measured) / 8;
        let live = self
            .live_at
            .is_some_and(|at| now.saturating_sub(at) < IDLE_AFTER);
        self.rate = match (live, self.rate) {
            (false, _) => None,
            // From full speed straight to half of what goes through, most of which is its own.
            (true, None) if lag > base + LAG_HIGH => Some(self.throughput / 2),
            (true, None) => None,
            (true, Some(rate)) if lag > base + LAG_HIGH => Some(rate / 2),
            (true, Some(rate)) if lag < base + LAG_LOW => {
                Some(rate + self.throughput / 20 + CHUNK / 8)
            }
            (true, rate) => rate,
        };
        let floor = self.floor();
        // More than goes through would only fill the queue later.
        let most = self.throughput.max(floor);
        self.rate = self.rate.map(|rate| rate.clamp(floor, most));
        let limit = match (self.rate, self.max.rate()) {
            (Some(rate), Some(max)) => Limit::bytes_per_s(rate.min(max)),
            (Some(rate), None) => Limit::bytes_per_s(rate),
            (None, _) => self.max,
        };
        if limit != self.bucket.limit() {
            self.bucket.set_limit(limit, now);
        }
    }

    /// How many bytes may be asked for now, with that many in flight; 0: none.
    pub fn allowance(&mut self, in_flight: u64, now: Duration) -> u64 {
        if !self.bucket.is_ready(now) {
            return 0;
        }
        let over = |rate: u64, time: Duration| {
            rate.saturating_mul(u64::try_from(time.as_millis()).unwrap_or(0)) / 1000
        };
        let window = match self.rate {
            Some(rate) => over(rate, FLIGHT).max(CHUNK),
            None => over(self.throughput, FLIGHT_FULL).max(FLIGHT_MIN),
        };
        match window.saturating_sub(in_flight) {
            0 => 0,
            left => (left / CHUNK * CHUNK).max(CHUNK),
        }
    }

    /// That many bytes were asked for.
    pub fn on_asked(&mut self, bytes: u64, now: Duration) {
        self.bucket.spend(bytes, now);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A stream over a link: live changes and SYNC wait in one queue, and are acknowledged a round trip after they went.
    struct Lab {
        pace: Pace,
        link: u64,
        round_trip: Duration,
        now: Duration,
        /// Bytes that have not gone yet, whether they are live, and when they were made.
        queue: VecDeque<(u64, bool, Duration)>,
        flying: VecDeque<(Duration, u64, bool, Duration)>,
        in_flight: u64,
        synced: u64,
        worst_lag: Duration,
        credit: u64,
    }

    impl Lab {
        fn new(link: u64, max: Limit, round_trip: Duration) -> Self {
            Self {
                pace: {
                    let mut pace = Pace::new(max, Duration::ZERO);
                    pace.set_base(round_trip);
                    pace
                },
                link,
                round_trip,
                now: Duration::ZERO,
                queue: VecDeque::new(),
                flying: VecDeque::new(),
                in_flight: 0,
                synced: 0,
                worst_lag: Duration::ZERO,
                credit: 0,
            }
        }

        /// A millisecond, with that many live bytes; a SYNC may have 8 MiB in flight, as a mirror has.
        fn step(&mut self, live: u64) {
            self.now += Duration::from_millis(1);
            if live > 0 {
                self.queue.push_back((live, true, self.now));
                self.pace.on_live(self.now);
            }
            let oldest = self.queue.iter().map(|(_, live, at)| (*live, *at));
            let oldest = oldest.chain(self.flying.iter().map(|(_, _, live, at)| (*live, *at)));
            let oldest = oldest.filter(|(live, _)| *live).map(|(_, at)| at).min();
            self.pace
                .tick(oldest.map_or(Duration::ZERO, |at| self.now - at), self.now);
            let window = 8 * MIB - self.in_flight.min(8 * MIB);
            let ask = self
                .pace
                .allowance(self.in_flight, self.now)
                .min(window)
                .min(MIB);
            if ask >= CHUNK {
                self.pace.on_asked(ask, self.now);
                self.queue.push_back((ask, false, self.now));
                self.in_flight += ask;
            }
            self.credit = (self.credit + self.link / 1000).min(2 * MIB);
            while let Some((bytes, is_live, made)) = self.queue.front().copied() {
                if self.credit < bytes {
                    break;
                }
                self.credit -= bytes;
                self.queue.pop_front();
                self.flying
                    .push_back((self.now + self.round_trip, bytes, is_live, made));
            }
            while let Some((at, bytes, is_live, made)) = self.flying.front().copied() {
                if at > self.now {
                    break;
                }
                self.flying.pop_front();
                self.pace.on_durable(bytes);
                if is_live {
                    self.worst_lag = self.worst_lag.max(self.now - made);
                    self.pace.on_live_durable(self.now - made);
                } else {
                    self.in_flight -= bytes;
                    self.synced += bytes;
                }
            }
        }

        fn run(&mut self, ms: u64, live: impl Fn(u64) -> u64) {
            for step in 0..ms {
                self.step(live(step));
            }
        }
    }

    #[test]
    fn an_idle_device_is_read_at_full_speed() {
        let mut lab = Lab::new(100 * MIB, Limit::UNLIMITED, Duration::from_millis(1));
        lab.run(10_000, |_| 0);
        assert!(lab.synced > 950 * MIB, "{}", lab.synced / MIB);
        assert!(!lab.pace.yields());
    }

    #[test]
    fn a_configured_maximum_is_kept_and_reached() {
        let mut lab = Lab::new(
            100 * MIB,
            Limit::bytes_per_s(10 * MIB),
            Duration::from_millis(1),
        );
        lab.run(10_000, |_| 0);
        assert!(
            lab.synced <= 103 * MIB && lab.synced > 97 * MIB,
            "{}",
            lab.synced / MIB
        );
    }

    #[test]
    fn live_changes_that_fill_the_link_stay_fresh_and_the_resync_ends() {
        for (link, round_trip_ms) in [
            (2 * MIB, 20),
            (20 * MIB, 1),
            (100 * MIB, 1),
            (10 * MIB, 500),
        ] {
            for percent in [50, 80, 88] {
                let mut lab =
                    Lab::new(link, Limit::UNLIMITED, Duration::from_millis(round_trip_ms));
                let live = link * percent / 100 / 1000;
                // The mirror is at full speed when the load begins.
                lab.run(2000, |_| 0);
                lab.run(5000, |_| live);
                (lab.worst_lag, lab.synced) = (Duration::ZERO, 0);
                lab.run(20_000, |_| live);
                let bound = Duration::from_millis(round_trip_ms * 2 + 900);
                let what = format!("link {} MiB/s, live {percent} %", link / MIB);
                assert!(lab.worst_lag < bound, "{what}: lag {:?}", lab.worst_lag);
                let least = (link / 20).min(FLOOR_MIN) * 20 / 2;
                assert!(lab.synced > least, "{what}: only {} bytes", lab.synced);
                let spare = link * (100 - percent) / 100 * 20;
                assert!(lab.synced > spare / 3, "{what}: {} of {spare}", lab.synced);
                // And when it is over, full speed again.
                lab.run(3000, |_| 0);
                assert!(!lab.pace.yields(), "{what}");
            }
        }
    }

    #[test]
    fn more_live_changes_than_the_link_takes_do_not_stop_a_resync() {
        let mut lab = Lab::new(10 * MIB, Limit::UNLIMITED, Duration::from_millis(1));
        // The ring would be full, and writes go to the dirty map: what is in the stream is what the link takes.
        for step in 0..40_000 {
            let full = lab.queue.len() > 1000;
            lab.step(if full { 0 } else { 11 * MIB / 1000 });
            if step == 10_000 {
                lab.synced = 0;
            }
        }
        assert!(lab.synced > 30 * FLOOR_MIN / 2, "{}", lab.synced);
    }
}
