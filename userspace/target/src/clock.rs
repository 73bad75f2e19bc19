// SPDX-License-Identifier: GPL-2.0-only

//! The time, passed in so that a simulation has its own.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Time that only goes forward.
pub trait Clock: Send + Sync {
    /// Time since some moment in the past.
    fn now(&self) -> Duration;

    /// The wall clock in milliseconds since 1970, for people only.
    fn unix_ms(&self) -> u64 {
        u64::try_from(self.now().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The clock of this machine.
pub struct RealClock(Instant);

impl Default for RealClock {
    fn default() -> Self {
        Self(dtloop_runtime::now())
    }
}

impl Clock for RealClock {
    fn now(&self) -> Duration {
        dtloop_runtime::elapsed(self.0)
    }

    fn unix_ms(&self) -> u64 {
        u64::try_from(dtloop_runtime::unix_time().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A clock that is set by hand. Clones are the same clock.
#[derive(Clone, Default)]
pub struct ManualClock(Arc<AtomicU64>);

impl ManualClock {
    /// Time passes.
    pub fn advance(&self, time: Duration) {
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.0.fetch_add(ms, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::Relaxed))
    }
}
