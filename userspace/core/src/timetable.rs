// SPDX-License-Identifier: GPL-2.0-only

//! When a verification is due. No clock inside: the time is passed in.
//!
//! A plan is an interval, or weekdays with a time of day; a window of the day may bound when it works. What was due
//! during an outage is due after it, once.
//!
//! # When the clock is set
//!
//! Every moment that is remembered is one at which something was done, so none lies in the future. If one does, the clock
//! was set back, and the moment counts as "now": the next run comes at most one interval late, and never is more than one
//! run owed, however often the clock is moved. A clock that shows a time before this program was written (a dead battery
//! at boot) is not listened to.

use serde::{Deserialize, Serialize};

/// 2025-01-01 in milliseconds since 1970.
const PLAUSIBLE_MS: u64 = 1_735_689_600_000;

/// Pause after a run that did not come to its end.
const RETRY_MS: u64 = 3_600_000;

const MINUTES_PER_DAY: i64 = 1440;

/// A moment of the wall clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds since 1970 UTC.
    pub unix_ms: u64,
    /// Offset of local time, in seconds east of UTC.
    pub offset_s: i32,
}

impl Now {
    /// Minutes since 1970 in local time.
    fn local_minutes(self) -> i64 {
        let seconds = i64::try_from(self.unix_ms / 1000).unwrap_or(i64::MAX / 2);
        (seconds + i64::from(self.offset_s)).div_euclid(60)
    }

    fn minute_of_day(self) -> u16 {
        u16::try_from(self.local_minutes().rem_euclid(MINUTES_PER_DAY)).unwrap_or(0)
    }
}

/// How often.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum When {
    /// So long after the last one began.
    Every {
        /// Milliseconds.
        ms: u64,
    },
    /// On these days at this time.
    Days {
        /// Monday first.
        days: [bool; 7],
        /// Minute of the day.
        minute: u16,
    },
}

/// A plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// How often.
    pub when: When,
    /// Works only from this minute of the day until that one; may reach over midnight.
    pub window: Option<(u16, u16)>,
}

/// What survives a restart.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Beginning of the last run that came to its end, or when the plan was first seen; milliseconds since 1970.
    pub reference_ms: u64,
    /// The last day and time served, in minutes of local time since 1970.
    pub slot: i64,
    /// Beginning of the run under way, or 0.
    pub began_ms: u64,
    /// When the last run ended early, or 0.
    pub failed_ms: u64,
}

impl Plan {
    /// The last day and time of the plan that has come.
    fn slot(days: [bool; 7], minute: u16, now: Now) -> i64 {
        let local = now.local_minutes();
        let today = local.div_euclid(MINUTES_PER_DAY);
        // 1970-01-01 was a Thursday.
        let on = |day: i64| usize::try_from((day + 3).rem_euclid(7)).is_ok_and(|at| days[at]);
        let slots = (0..=7).map(|back| today - back).filter(|day| on(*day));
        let mut slots = slots.map(|day| day * MINUTES_PER_DAY + i64::from(minute));
        slots.find(|slot| *slot <= local).unwrap_or(i64::MIN)
    }

    /// Whether a run is due. Corrects what is remembered if the clock was set back.
    pub fn is_due(&self, memory: &mut Memory, now: Now) -> bool {
        if now.unix_ms < PLAUSIBLE_MS {
            return false;
        }
        let new = memory.reference_ms == 0;
        if new || memory.reference_ms > now.unix_ms {
            memory.reference_ms = now.unix_ms;
        }
        if memory.failed_ms > now.unix_ms {
            memory.failed_ms = now.unix_ms;
        }
        let is_time = match self.when {
            When::Every { ms } => now.unix_ms - memory.reference_ms >= ms,
            When::Days { days, minute } => {
                let slot = Self::slot(days, minute, now);
                if new || memory.slot > now.local_minutes() {
                    memory.slot = slot;
                }
                slot > memory.slot
            }
        };
        let rested = memory.failed_ms == 0 || now.unix_ms - memory.failed_ms >= RETRY_MS;
        is_time && rested && self.is_open(now)
    }

    /// Whether it may work at this time of day.
    #[must_use]
    pub fn is_open(&self, now: Now) -> bool {
        let minute = now.minute_of_day();
        match self.window {
            None => true,
            Some((from, to)) if from <= to => (from..to).contains(&minute),
            Some((from, to)) => minute >= from || minute < to,
        }
    }

    /// A run begins.
    pub fn on_begin(memory: &mut Memory, now: Now) {
        memory.began_ms = now.unix_ms;
    }

    /// It came to its end, or an operator ended it: either way this run is not owed any more.
    pub fn on_done(&self, memory: &mut Memory, now: Now) {
        // A run that takes longer than the interval is not followed by another one at once.
        let began = memory.began_ms.min(now.unix_ms);
        memory.reference_ms = match self.when {
            When::Every { ms } if now.unix_ms - began < ms && began > 0 => began,
            _ => now.unix_ms,
        };
        if let When::Days { days, minute } = self.when {
            memory.slot = Self::slot(days, minute, now);
        }
        memory.began_ms = 0;
        memory.failed_ms = 0;
    }

    /// It ended before its time.
    pub fn on_failed(memory: &mut Memory, now: Now) {
        memory.began_ms = 0;
        memory.failed_ms = now.unix_ms;
    }
}

/// Holds a job to a rate. The monotonic time is passed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pace {
    bytes_per_s: u64,
    credit: u64,
    at_ms: Option<u64>,
}

impl Pace {
    /// At most so many bytes a second.
    #[must_use]
    pub fn new(bytes_per_s: u64) -> Self {
        Self {
            bytes_per_s,
            credit: 0,
            at_ms: None,
        }
    }

    /// Whether something may be asked for at this monotonic time. One request may go beyond the credit, which is then
    /// owed; unused credit is kept for a quarter of a second.
    pub fn allows(&mut self, now_ms: u64, owed: u64) -> bool {
        let elapsed = now_ms.saturating_sub(self.at_ms.unwrap_or(now_ms));
        let gained = self.bytes_per_s.saturating_mul(elapsed) / 1000;
        // Fractions of a byte are not lost: time that gained nothing is counted later.
        if gained > 0 || self.at_ms.is_none() {
            self.at_ms = Some(now_ms);
            let most = owed.saturating_add(self.bytes_per_s / 4 + 1);
            self.credit = self.credit.saturating_add(gained).min(most);
        }
        self.credit >= owed
    }

    /// So much of what was owed has been paid for.
    pub fn pay(&mut self, bytes: u64) {
        self.credit = self.credit.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DAY: u64 = 86_400_000;
    const HOUR: u64 = 3_600_000;
    /// Monday, 2026-06-01 00:00 UTC.
    const MONDAY: u64 = 1_780_272_000_000;

    fn at(unix_ms: u64) -> Now {
        Now {
            unix_ms,
            offset_s: 0,
        }
    }

    fn weekly() -> Plan {
        Plan {
            when: When::Every { ms: 7 * DAY },
            window: None,
        }
    }

    fn sundays() -> Plan {
        let mut days = [false; 7];
        days[6] = true;
        Plan {
            when: When::Days { days, minute: 120 },
            window: None,
        }
    }

    /// Looks every hour, runs take an hour; gives when they began.
    fn runs(plan: &Plan, memory: &mut Memory, times: impl IntoIterator<Item = u64>) -> Vec<u64> {
        let mut begun = vec![];
        for now in times {
            if plan.is_due(memory, at(now)) {
                begun.push(now);
                Plan::on_begin(memory, at(now));
                plan.on_done(memory, at(now + 600_000));
            }
        }
        begun
    }

    #[test]
    fn a_week_is_a_week() {
        let hours = (0..22 * 24).map(|hour| MONDAY + hour * HOUR);
        let begun = runs(&weekly(), &mut Memory::default(), hours);
        assert_eq!(begun, [7, 14, 21].map(|days| MONDAY + days * DAY));
    }

    #[test]
    fn sunday_at_two_is_sunday_at_two() {
        let hours = (0..15 * 24).map(|hour| MONDAY + hour * HOUR);
        let begun = runs(&sundays(), &mut Memory::default(), hours);
        assert_eq!(begun, [6, 13].map(|days| MONDAY + days * DAY + 2 * HOUR));
        // In local time, east of Greenwich.
        let local = Now {
            unix_ms: MONDAY + 5 * DAY + 15 * HOUR,
            offset_s: 11 * 3600,
        };
        let mut memory = Memory::default();
        assert!(!sundays().is_due(&mut memory, at(MONDAY)));
        assert!(sundays().is_due(&mut memory, local));
    }

    #[test]
    fn what_was_missed_is_made_good_once() {
        for plan in [weekly(), sundays()] {
            let mut memory = Memory::default();
            assert!(!plan.is_due(&mut memory, at(MONDAY)));
            let hours = (0..24).map(|hour| MONDAY + 30 * DAY + hour * HOUR);
            assert_eq!(runs(&plan, &mut memory, hours).len(), 1);
        }
    }

    #[test]
    fn a_window_may_reach_over_midnight() {
        let plan = Plan {
            window: Some((22 * 60, 4 * 60)),
            ..weekly()
        };
        let open = |hour: u64| plan.is_open(at(MONDAY + hour * HOUR));
        assert_eq!(
            [21, 22, 0, 3, 4].map(open),
            [false, true, true, true, false]
        );
        let mut memory = Memory::default();
        assert!(!plan.is_due(&mut memory, at(MONDAY)));
        assert!(!plan.is_due(&mut memory, at(MONDAY + 8 * DAY + 12 * HOUR)));
        assert!(plan.is_due(&mut memory, at(MONDAY + 8 * DAY + 23 * HOUR)));
    }

    #[test]
    fn a_run_that_failed_is_tried_again_after_an_hour() {
        let mut memory = Memory::default();
        assert!(!weekly().is_due(&mut memory, at(MONDAY)));
        let due = MONDAY + 7 * DAY;
        assert!(weekly().is_due(&mut memory, at(due)));
        Plan::on_begin(&mut memory, at(due));
        Plan::on_failed(&mut memory, at(due));
        assert!(!weekly().is_due(&mut memory, at(due + 1)));
        assert!(weekly().is_due(&mut memory, at(due + HOUR)));
    }

    #[test]
    fn a_clock_at_its_beginning_is_not_listened_to() {
        let mut memory = Memory::default();
        assert!(!weekly().is_due(&mut memory, at(MONDAY)));
        assert!(!weekly().is_due(&mut memory, at(5)));
        assert_eq!(memory.reference_ms, MONDAY);
    }

    proptest! {
        /// However the clock is set: at most one run for each jump, plus those of the time between two jumps, which may have a
        /// Sunday in its first and in its last hours.
        #[test]
        fn setting_the_clock_makes_neither_endless_nor_missing_runs(
            jumps in prop::collection::vec((1..300_u64, -400..400_i64), 0..8), by_days: bool)
        {
            let plan = if by_days { sundays() } else { weekly() };
            let (mut memory, mut now) = (Memory::default(), MONDAY + 5000 * DAY);
            let (mut begun, mut most) = (0, 0);
            for (hours, jump_days) in jumps {
                let times: Vec<u64> = (0..hours).map(|hour| now + hour * HOUR).collect();
                begun += runs(&plan, &mut memory, times).len() as u64;
                most += hours.div_ceil(7 * 24);
                now += hours * HOUR;
                now = now.saturating_add_signed(jump_days * DAY as i64);
                // Set back, the same Sunday may come again.
                most += u64::from(jump_days != 0);
            }
            prop_assert!(begun <= most, "{} runs", begun);
            // And none is missing: two weeks without a jump have at least one.
            let times: Vec<u64> = (0..15 * 24).map(|hour| now + hour * HOUR).collect();
            prop_assert!(!runs(&plan, &mut memory, times).is_empty());
        }

        #[test]
        fn the_rate_is_kept(rate in 1_000..1_000_000_u64, steps in prop::collection::vec(1..50_u64, 100..200)) {
            let mut pace = Pace::new(rate);
            let (mut now, mut moved, mut owed) = (0, 0, 0);
            for step in steps {
                now += step;
                if pace.allows(now, owed) {
                    pace.pay(owed);
                    moved += 4096;
                    owed = 4096;
                }
            }
            prop_assert!(moved <= rate * now / 1000 + rate / 4 + 2 * 4096);
            prop_assert!(moved + 50 * rate / 1000 + 2 * 4096 + rate / 4 >= (rate * now / 1000).min(now * 4096 / 50));
        }
    }
}
