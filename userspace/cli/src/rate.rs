// SPDX-License-Identifier: GPL-2.0-only

//! Rate and time left, from what happened lately.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How far back the rate looks. Long enough to smooth the bursts of a disk cache, short enough to
/// follow a link whose speed changes.
const WINDOW: Duration = Duration::from_secs(15);

/// Before that much time has been seen there is no rate: the first figures are mostly start-up.
const SEEN_MIN: Duration = Duration::from_secs(1);

/// Watches something grow.
#[derive(Debug, Default)]
pub(crate) struct Rate {
    samples: VecDeque<(Instant, u64)>,
}

impl Rate {
    /// Notes how far it is.
    pub(crate) fn note(&mut self, now: Instant, done: u64) {
        if self.samples.back().is_some_and(|&(_, last)| done < last) {
            // It began anew.
            self.samples.clear();
        }
        self.samples.push_back((now, done));
        // One sample older than the window stays, so that the window is always full.
        while self
            .samples
            .get(1)
            .is_some_and(|&(at, _)| now.duration_since(at) >= WINDOW)
        {
            self.samples.pop_front();
        }
    }

    /// Units per second; `None` while that is unknown.
    pub(crate) fn per_second(&self) -> Option<u64> {
        let (&(from, first), &(to, last)) = (self.samples.front()?, self.samples.back()?);
        let seen = to.duration_since(from);
        if seen < SEEN_MIN {
            return None;
        }
        let rate = u128::from(last - first) * 1000 / seen.as_millis().max(1);
        Some(u64::try_from(rate).unwrap_or(u64::MAX))
    }

    /// Time until `left` more units are done; `None` while that is unknown, which includes
    /// standing still.
    pub(crate) fn time_left(&self, left: u64) -> Option<Duration> {
        let per_second = self.per_second()?;
        if left == 0 {
            return Some(Duration::ZERO);
        }
        let ms = (u128::from(left) * 1000).checked_div(per_second.into())?;
        Some(Duration::from_millis(u64::try_from(ms).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(base: Instant, ms: u64) -> Instant {
        base + Duration::from_millis(ms)
    }

    #[test]
    fn nothing_is_claimed_before_there_is_data() {
        let base = Instant::now();
        let mut rate = Rate::default();
        assert_eq!(rate.time_left(10), None);
        rate.note(base, 0);
        rate.note(at(base, 500), 1_000_000);
        assert_eq!(rate.per_second(), None);
        rate.note(at(base, 1000), 2_000_000);
        assert_eq!(rate.per_second(), Some(2_000_000));
        assert_eq!(rate.time_left(4_000_000), Some(Duration::from_secs(2)));
    }

    #[test]
    fn only_the_last_seconds_count() {
        let base = Instant::now();
        let mut rate = Rate::default();
        // 100 a second for a minute, then 10 a second for half a minute.
        for s in 0..60 {
            rate.note(at(base, s * 1000), s * 100);
        }
        for s in 60..90 {
            rate.note(at(base, s * 1000), 6000 + (s - 60) * 10);
        }
        assert_eq!(rate.per_second(), Some(10));
    }

    #[test]
    fn standing_still_has_no_end() {
        let base = Instant::now();
        let mut rate = Rate::default();
        for s in 0..40 {
            rate.note(at(base, s * 1000), 5);
        }
        assert_eq!(rate.per_second(), Some(0));
        assert_eq!(rate.time_left(1), None);
        assert_eq!(rate.time_left(0), Some(Duration::ZERO));
    }

    #[test]
    fn a_new_start_forgets_the_old_rate() {
        let base = Instant::now();
        let mut rate = Rate::default();
        rate.note(base, 0);
        rate.note(at(base, 2000), 500);
        rate.note(at(base, 3000), 0);
        assert_eq!(rate.per_second(), None);
    }
}
