// SPDX-License-Identifier: GPL-2.0-only

//! Which bandwidth limit counts when: a base limit and entries of a week, in local time.
//!
//! - An entry holds on its days from a time of day until another one. One that ends before it begins reaches over
//!   midnight into the next day; its days are those on which it begins.
//! - **The first entry that holds counts**, as in the rules of a packet filter: exceptions stand before what they are an
//!   exception of. Where none holds, the base limit counts.
//! - What counts is what a clock on the wall shows. In the hour that a time zone leaves out in spring, nothing holds for
//!   its sake; in the hour that it has twice in autumn, an entry holds twice.
//!
//! The time zone is behind [`LocalClock`]; no clock is read here.

use std::time::Duration;

use crate::rate::Limit;

const MINUTES_PER_DAY: u16 = 1440;
const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

/// How far ahead a change is looked for: a week, and a day for what a time zone does.
const HORIZON_MINUTES: i64 = 8 * 1440;

/// What a clock on the wall shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LocalMinute {
    /// Day of the week, 0 is Monday.
    pub day: u8,
    /// Minute of the day, below 1440.
    pub minute: u16,
}

/// Local time of this machine.
pub trait LocalClock {
    /// What it shows at a moment, in seconds since 1970 UTC.
    fn at(&self, unix_s: i64) -> LocalMinute;
}

impl<F: Fn(i64) -> LocalMinute> LocalClock for F {
    fn at(&self, unix_s: i64) -> LocalMinute {
        self(unix_s)
    }
}

/// A limit for some hours of some days.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    days: [bool; 7],
    from: u16,
    to: u16,
    limit: Limit,
    text: String,
}

fn day_number(text: &str) -> Result<usize, String> {
    DAYS.iter()
        .position(|day| *day == text)
        .ok_or_else(|| format!("\"{text}\" is no day; days are mon, tue, wed, thu, fri, sat, sun"))
}

/// Reads `mon-fri`, `sat,sun`, `fri-mon` or `daily`.
fn parse_days(text: &str) -> Result<[bool; 7], String> {
    if text.trim() == "daily" {
        return Ok([true; 7]);
    }
    let mut days = [false; 7];
    for part in text.split(',').map(str::trim) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (mut day, last) = (day_number(first.trim())?, day_number(last.trim())?);
        loop {
            days[day] = true;
            if day == last {
                break;
            }
            day = (day + 1) % 7;
        }
    }
    Ok(days)
}

/// Reads a time of day, `08:00` to `24:00`.
///
/// # Errors
///
/// If it is none.
pub fn parse_time(text: &str) -> Result<u16, String> {
    let refused = || format!("\"{text}\" is no time of day; write for example 08:00 or 22:30");
    let number = |text: &str| -> Option<u16> {
        let plain = text.len() == 2 && text.bytes().all(|b| b.is_ascii_digit());
        plain.then(|| text.parse().ok()).flatten()
    };
    let (hours, minutes) = text.trim().split_once(':').ok_or_else(refused)?;
    match (number(hours), number(minutes)) {
        (Some(24), Some(0)) => Ok(MINUTES_PER_DAY),
        (Some(hours @ 0..=23), Some(minutes @ 0..=59)) => Ok(hours * 60 + minutes),
        _ => Err(refused()),
    }
}

impl Entry {
    /// Reads an entry.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn new(days: &str, from: &str, to: &str, limit: &str) -> Result<Self, String> {
        let (begin, end) = (parse_time(from)?, parse_time(to)?);
        if begin == MINUTES_PER_DAY {
            return Err(
                "from = \"24:00\" is the end of a day; write 00:00 of the next one".to_owned(),
            );
        }
        if begin == end {
            return Err(format!(
                "from and to are both \"{from}\"; for a whole day write from = \"00:00\", to = \"24:00\""
            ));
        }
        Ok(Self {
            days: parse_days(days)?,
            from: begin,
            to: end,
            limit: limit.parse()?,
            text: format!("{} {}-{}", days.trim(), from.trim(), to.trim()),
        })
    }

    /// Whether it holds at that minute.
    #[must_use]
    pub fn holds(&self, at: LocalMinute) -> bool {
        let today = usize::from(at.day % 7);
        let yesterday = (today + 6) % 7;
        if self.from < self.to {
            self.days[today] && (self.from..self.to).contains(&at.minute)
        } else {
            (self.days[today] && at.minute >= self.from)
                || (self.days[yesterday] && at.minute < self.to)
        }
    }

    /// The entry as it was written.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// See the module documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schedule {
    /// Where no entry holds.
    pub base: Limit,
    /// In their order.
    pub entries: Vec<Entry>,
}

impl Schedule {
    /// The limit at a minute, and the index of the entry that it comes from.
    #[must_use]
    pub fn at(&self, minute: LocalMinute) -> (Limit, Option<usize>) {
        let holds = self.entries.iter().position(|entry| entry.holds(minute));
        holds.map_or((self.base, None), |index| {
            (self.entries[index].limit, Some(index))
        })
    }

    /// When another entry counts, and the limit then; `None` if that is not within a week.
    #[must_use]
    pub fn next_change(&self, unix_s: i64, clock: &impl LocalClock) -> Option<(i64, Limit)> {
        if self.entries.is_empty() {
            return None;
        }
        let now = self.at(clock.at(unix_s));
        let first = unix_s.div_euclid(60) + 1;
        (first..first + HORIZON_MINUTES)
            .map(|minute| minute * 60)
            .map(|at| (at, self.at(clock.at(at))))
            .find(|(_, then)| *then != now)
            .map(|(at, (limit, _))| (at, limit))
    }

    /// The first moment after `unix_s` at which the clock shows that time of day.
    #[must_use]
    pub fn next_time(minute: u16, unix_s: i64, clock: &impl LocalClock) -> Option<i64> {
        let first = unix_s.div_euclid(60) + 1;
        let shows = |at: &i64| clock.at(*at).minute == minute % MINUTES_PER_DAY;
        (first..first + HORIZON_MINUTES)
            .map(|minute| minute * 60)
            .find(shows)
    }
}

/// Where a limit comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The configuration; it may be "none".
    Config,
    /// This entry of the schedule.
    Entry(String),
    /// An operator.
    Override,
}

/// Until when an override counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ends {
    /// Until it is taken back.
    Never,
    /// At this monotonic time: what was given as a length of time is not moved by a clock that is set.
    After(Duration),
    /// At this moment of the wall clock, in seconds since 1970.
    At(i64),
}

/// The limit that counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Current {
    /// It.
    pub limit: Limit,
    /// Where it comes from.
    pub source: Source,
    /// When another one counts, in seconds from now, and which.
    pub next: Option<(u64, Limit)>,
}

/// How long an answer about the next change is kept: a time zone may be changed meanwhile.
const NEXT_KEPT_S: i64 = 600;

/// Schedule and override together.
#[derive(Clone, Debug, Default)]
pub struct Governor {
    schedule: Schedule,
    manual: Option<(Limit, Ends)>,
    found: Option<Found>,
}

/// What a look for the next change found.
#[derive(Clone, Copy, Debug)]
struct Found {
    /// When it was looked for.
    asked: i64,
    /// What counted then.
    entry: Option<usize>,
    /// When something else counts, and which limit.
    change: Option<(i64, Limit)>,
}

impl Governor {
    /// Follows that schedule.
    #[must_use]
    pub fn new(schedule: Schedule) -> Self {
        Self {
            schedule,
            ..Self::default()
        }
    }

    /// An operator's limit, or none: the schedule counts again.
    pub fn set_override(&mut self, manual: Option<(Limit, Ends)>) {
        self.manual = manual;
    }

    /// The operator's limit.
    #[must_use]
    pub fn manual(&self) -> Option<(Limit, Ends)> {
        self.manual
    }

    /// The limit that counts at this monotonic time and this moment of the wall clock.
    pub fn current(&mut self, now: Duration, unix_s: i64, clock: &impl LocalClock) -> Current {
        let is_over = match self.manual {
            Some((_, Ends::After(end))) => now >= end,
            Some((_, Ends::At(end))) => unix_s >= end,
            _ => false,
        };
        if is_over {
            self.manual = None;
        }
        let (limit, entry) = self.schedule.at(clock.at(unix_s));
        let Some((manual, ends)) = self.manual else {
            return Current {
                limit,
                source: entry.map_or(Source::Config, |index| {
                    Source::Entry(self.schedule.entries[index].text().to_owned())
                }),
                next: self.cached_change(unix_s, entry, clock),
            };
        };
        let left = match ends {
            Ends::Never => None,
            Ends::After(end) => Some(end.saturating_sub(now).as_secs().max(1)),
            Ends::At(end) => u64::try_from(end.saturating_sub(unix_s)).ok(),
        };
        let then = |left: u64| {
            let at = unix_s.saturating_add(i64::try_from(left).unwrap_or(i64::MAX));
            (left, self.schedule.at(clock.at(at)).0)
        };
        Current {
            limit: manual,
            source: Source::Override,
            next: left.map(then),
        }
    }

    fn cached_change(
        &mut self,
        unix_s: i64,
        entry: Option<usize>,
        clock: &impl LocalClock,
    ) -> Option<(u64, Limit)> {
        let is_fresh = |found: &Found| {
            let passed = found.change.is_some_and(|(at, _)| unix_s >= at);
            let kept = found.asked..found.asked.saturating_add(NEXT_KEPT_S);
            found.entry == entry && !passed && kept.contains(&unix_s)
        };
        let found = self.found.filter(is_fresh).unwrap_or_else(|| Found {
            asked: unix_s,
            entry,
            change: self.schedule.next_change(unix_s, clock),
        });
        self.found = Some(found);
        let change = found.change;
        change.map(|(at, limit)| (u64::try_from(at - unix_s).unwrap_or(0), limit))
    }
}
