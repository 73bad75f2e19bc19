// SPDX-License-Identifier: GPL-2.0-only

//! How fast a set sends: its bandwidth limit, its compression, and the pace of mirror and resync.
//!
//! What decides is in `dtloop-core` (`schedule`, `rate`, `adaptive`, `pace`); here are the clocks, the codecs and the
//! figures. Records are held up by the limit, nothing else is: acknowledgements, pings and what is said about devices go
//! at once and are charged. Nobody who writes waits for it: records stay where they are, and the ring, the queue and the
//! dirty map take over as if the link were slow.

mod compressor;
mod throttle;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtloop_abi::Hold;
use dtloop_api::{BandwidthChange, Failure, Shaping};
use dtloop_core::pace::Pace;
use dtloop_disk::Disk;
use dtloop_proto::message::HandshakeOption;

use crate::config::SetConfig;
use crate::ship::{Outbox, ShipError};
use crate::snapshot::unix_ms;
use compressor::Compressor;
use throttle::Throttle;

/// Longest time between two looks at lag and schedule.
pub const TICK: Duration = Duration::from_millis(100);

/// Records on their way to the target.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flight {
    /// The last of them.
    pub last: u64,
    /// Their payload in bytes.
    pub bytes: u64,
    /// When the first live change among them was made, in nanoseconds since 1970.
    pub live_ns: Option<u64>,
}

/// See the module documentation.
pub struct Shaper {
    origin: Instant,
    throttle: Throttle,
    compressor: Compressor,
    /// Of mirrors and verifications.
    pub mirror: Pace,
    /// Of resyncs.
    pub resync: Pace,
    flights: VecDeque<Flight>,
    ticked: Duration,
    /// The first ping of the session has not been answered.
    measures: bool,
}

/// The age of something that was made so many nanoseconds after 1970; zero if the clock was set back since.
fn age(made_ns: u64) -> Duration {
    Duration::from_nanos(unix_ms().saturating_mul(1_000_000).saturating_sub(made_ns))
}

impl Shaper {
    /// For a set; a limit that an operator wanted to be kept is in `state_dir`.
    #[must_use]
    pub fn new(disk: &Arc<dyn Disk>, config: &SetConfig, state_dir: &Path) -> Self {
        let now = Duration::ZERO;
        let path = state_dir.join(format!("{}.bandwidth", config.name));
        Self {
            origin: dtloop_runtime::now(),
            throttle: Throttle::new(
                Arc::clone(disk),
                &config.name,
                config.bandwidth.0.clone(),
                path,
            ),
            compressor: Compressor::new(config.compression),
            mirror: Pace::new(config.mirror_rate.0, now),
            resync: Pace::new(config.resync_rate.0, now),
            flights: VecDeque::new(),
            ticked: now,
            measures: false,
        }
    }

    /// Time since the set began, by the monotonic clock.
    #[must_use]
    pub fn now(&self) -> Duration {
        dtloop_runtime::elapsed(self.origin)
    }

    /// A session begins: nothing is on its way, and its first ping is sent now.
    pub fn begin_session(&mut self, options: &[HandshakeOption]) {
        self.flights.clear();
        self.compressor.begin_session(options);
        self.measures = true;
    }

    /// A pong came, so long after the ping.
    pub fn on_pong(&mut self, round_trip: Duration) {
        if std::mem::take(&mut self.measures) {
            self.mirror.set_base(round_trip);
            self.resync.set_base(round_trip);
        }
    }

    /// Looks at the clocks; `next_ns` says when the next record to be sent was made.
    pub fn tick(&mut self, next_ns: impl FnOnce() -> Option<u64>) {
        let now = self.now();
        self.throttle.tick(now);
        if now.saturating_sub(self.ticked) < TICK {
            return;
        }
        self.ticked = now;
        let flying = self.flights.iter().find_map(|flight| flight.live_ns);
        let lag = flying.or_else(next_ns).map_or(Duration::ZERO, age);
        self.mirror.tick(lag, now);
        self.resync.tick(lag, now);
    }

    /// How many bytes of records may be sent at once now; 0: none, because of the limit.
    pub fn room(&mut self) -> usize {
        let room = self.throttle.room(self.now());
        room.min(self.compressor.batch_bytes())
    }

    /// How long no record may be sent.
    pub fn blocked_for(&mut self) -> Option<Duration> {
        self.throttle.blocked_for(self.now())
    }

    /// Compresses what waits, if that is of use.
    ///
    /// # Errors
    ///
    /// If a payload cannot be read from the ring.
    pub fn pack(
        &mut self,
        outbox: &mut Outbox,
        session: u64,
        hold: Option<&Hold>,
    ) -> Result<(), ShipError> {
        self.compressor.pack(outbox, session, hold)
    }

    /// Something was sent: its bytes on the wire, and how long the socket was waited for.
    pub fn on_sent(&mut self, wire: usize, blocked: Duration, flight: Option<Flight>) {
        self.throttle.on_sent(wire, self.now());
        self.compressor.on_sent(wire, blocked);
        let Some(flight) = flight else { return };
        if flight.live_ns.is_some() {
            let now = self.now();
            self.mirror.on_live(now);
            self.resync.on_live(now);
        }
        self.flights.push_back(flight);
    }

    /// The set's thread slept, because of the limit or because there was nothing to do.
    pub fn on_slept(&mut self, time: Duration, because_of_limit: bool) {
        self.compressor.on_slept(time, because_of_limit);
    }

    /// Records up to this one are durable on the target.
    pub fn on_durable(&mut self, durable: u64) {
        while let Some(flight) = self.flights.front().filter(|flight| flight.last <= durable) {
            for pace in [&mut self.mirror, &mut self.resync] {
                pace.on_durable(flight.bytes);
                if let Some(made) = flight.live_ns {
                    pace.on_live_durable(age(made));
                }
            }
            self.flights.pop_front();
        }
    }

    /// Shows the limit, or changes it.
    ///
    /// # Errors
    ///
    /// What is wrong with the change.
    pub fn bandwidth(
        &mut self,
        change: Option<&BandwidthChange>,
    ) -> Result<dtloop_api::Bandwidth, Failure> {
        let now = self.now();
        if let Some(change) = change {
            self.throttle.change(change, now)?;
        }
        Ok(self.throttle.report(now))
    }

    /// For `status`.
    pub fn report(&mut self) -> Shaping {
        let pace = |pace: &Pace| dtloop_api::Pace {
            bytes_per_s: pace.rate(),
            max_bytes_per_s: pace.max().rate(),
            yields: pace.yields(),
        };
        Shaping {
            bandwidth: self.throttle.report(self.now()),
            compression: self.compressor.report(),
            mirror: pace(&self.mirror),
            resync: pace(&self.resync),
        }
    }
}
