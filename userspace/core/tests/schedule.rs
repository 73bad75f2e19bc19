// SPDX-License-Identifier: GPL-2.0-only

//! The schedule of the bandwidth limit against a table of the week's minutes, in time zones that change their clocks.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use dtloop_core::rate::Limit;
use dtloop_core::schedule::{Ends, Entry, Governor, LocalClock, LocalMinute, Schedule, Source};
use jiff::Timestamp;
use jiff::tz::TimeZone;
use proptest::prelude::*;

/// Europe, New York, and one whose clocks go back at midnight (as Cuba's), into the day before.
const ZONES: [&str; 4] = [
    "UTC0",
    "CET-1CEST,M3.5.0,M10.5.0/3",
    "EST5EDT,M3.2.0,M11.1.0",
    "CST5CDT,M3.2.0/0,M11.1.0/1",
];

/// Weeks of 2027 in which these zones change their clocks, and one in which none does; Mondays, midnight UTC.
const WEEKS: [i64; 5] = [
    1_799_020_800, // 4 January
    1_804_464_000, // 8 March
    1_806_278_400, // 29 March less a week
    1_824_422_400, // 25 October
    1_825_632_000, // 8 November less a week
];

struct Zone(TimeZone);

impl Zone {
    fn new(posix: &str) -> Self {
        Self(TimeZone::posix(posix).unwrap())
    }
}

impl LocalClock for Zone {
    fn at(&self, unix_s: i64) -> LocalMinute {
        let civil = self.0.to_datetime(Timestamp::from_second(unix_s).unwrap());
        LocalMinute {
            day: civil.weekday().to_monday_zero_offset().unsigned_abs(),
            minute: u16::try_from(i32::from(civil.hour()) * 60 + i32::from(civil.minute()))
                .unwrap(),
        }
    }
}

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];

#[derive(Clone, Debug)]
struct Spec {
    days: Vec<usize>,
    from: u16,
    to: u16,
}

impl Spec {
    fn entry(&self, index: usize) -> Entry {
        let days: Vec<&str> = self.days.iter().map(|day| DAYS[*day]).collect();
        let time = |minute: u16| format!("{:02}:{:02}", minute / 60, minute % 60);
        let limit = format!("{}KiB/s", index + 1);
        Entry::new(&days.join(","), &time(self.from), &time(self.to), &limit).unwrap()
    }
}

fn specs() -> impl Strategy<Value = Vec<Spec>> {
    let spec = (
        proptest::sample::subsequence((0..7).collect::<Vec<usize>>(), 1..=7),
        // Coarse, so that they meet; and the hours in which clocks change.
        (0_u16..96).prop_map(|quarter| quarter * 15),
        (1_u16..=96).prop_map(|quarter| quarter * 15),
    )
        .prop_filter("no time at all", |(_, from, to)| from != to)
        .prop_map(|(days, from, to)| Spec { days, from, to });
    proptest::collection::vec(spec, 0..5)
}

/// The limit of every minute of a week, by painting: the last entry first, so that the first one is on top.
fn painted(specs: &[Spec]) -> Vec<Option<usize>> {
    let mut week = vec![None; 7 * 1440];
    for (index, spec) in specs.iter().enumerate().rev() {
        for day in &spec.days {
            let begin = day * 1440 + usize::from(spec.from);
            let minutes = (1440 + usize::from(spec.to) - usize::from(spec.from)) % 1440;
            let minutes = if minutes == 0 { 1440 } else { minutes };
            for minute in begin..begin + minutes {
                week[minute % (7 * 1440)] = Some(index);
            }
        }
    }
    week
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn every_minute_of_a_week_has_the_limit_of_the_table(
        specs in specs(), zone in 0..ZONES.len(), week in 0..WEEKS.len(),
    ) {
        let entries = specs.iter().enumerate().map(|(index, spec)| spec.entry(index)).collect();
        let schedule = Schedule { base: Limit::UNLIMITED, entries };
        let (zone, table) = (Zone::new(ZONES[zone]), painted(&specs));
        let found: Vec<_> = (0..8 * 1440).map(|minute| {
            let shown = zone.at(WEEKS[week] + minute * 60);
            let expected = table[usize::from(shown.day) * 1440 + usize::from(shown.minute)];
            let (limit, entry) = schedule.at(shown);
            let rate = expected.map(|index| (index as u64 + 1) * 1024);
            assert_eq!((limit.rate(), entry), (rate, expected), "{shown:?}");
            entry
        }).collect();
        // The next change is where the table changes, from any second of any minute.
        for minute in (0..1440 * 7).step_by(61) {
            let at = WEEKS[week] + minute as i64 * 60 + 17;
            let change = found[minute..].iter().position(|entry| *entry != found[minute]);
            let said = schedule.next_change(at, &zone).map(|(at, _)| (at - WEEKS[week]) / 60);
            if let Some(change) = change {
                prop_assert_eq!(said, Some((minute + change) as i64));
            }
        }
    }
}

fn schedule() -> Schedule {
    Schedule {
        base: "20MiB/s".parse().unwrap(),
        entries: vec![
            Entry::new("mon-fri", "08:00", "18:00", "5MiB/s").unwrap(),
            Entry::new("sat", "22:00", "06:00", "unlimited").unwrap(),
        ],
    }
}

#[test]
fn the_hour_that_spring_leaves_out_and_autumn_repeats() {
    let zone = Zone::new(ZONES[1]);
    let night = Schedule {
        base: Limit::UNLIMITED,
        entries: vec![Entry::new("sun", "02:30", "03:30", "1MiB/s").unwrap()],
    };
    let minutes = |from: i64| {
        let holds = |minute: &i64| night.at(zone.at(from + minute * 60)).1.is_some();
        (0..1440).filter(holds).count()
    };
    // Sunday, 28 March 2027: 02:00 is 03:00. 31 October 2027: 03:00 is 02:00. A plain Sunday: 4 April.
    assert_eq!(minutes(1_806_192_000), 30);
    assert_eq!(minutes(1_824_940_800), 90);
    assert_eq!(minutes(1_806_796_800), 60);
}

#[test]
fn the_source_of_a_limit_and_its_end_are_known() {
    let zone = Zone::new("CET-1");
    let mut governor = Governor::new(schedule());
    // Monday, 4 January 2027, 09:00 local time.
    let monday = WEEKS[0] + 8 * 3600;
    let current = governor.current(Duration::ZERO, monday, &zone);
    assert_eq!(current.limit.rate(), Some(5 << 20));
    assert_eq!(current.source, Source::Entry("mon-fri 08:00-18:00".into()));
    assert_eq!(current.next, Some((9 * 3600, "20MiB/s".parse().unwrap())));
    // A minute later the answer is a minute less, from what was found before.
    let current = governor.current(Duration::ZERO, monday + 60, &zone);
    assert_eq!(current.next.unwrap().0, 9 * 3600 - 60);
    let current = governor.current(Duration::ZERO, monday + 9 * 3600, &zone);
    assert_eq!(
        (current.source, current.limit.rate()),
        (Source::Config, Some(20 << 20))
    );
    assert_eq!(current.next, Some((14 * 3600, "5MiB/s".parse().unwrap())));
    // Sunday, 03:00: the entry of the day before reaches over midnight.
    let sunday = WEEKS[0] + 6 * 86_400 + 2 * 3600;
    assert_eq!(
        governor.current(Duration::ZERO, sunday, &zone).limit,
        Limit::UNLIMITED
    );
}

#[test]
fn an_override_ends_when_it_was_said_to() {
    let zone = Zone::new("UTC0");
    let mut governor = Governor::new(schedule());
    let monday = WEEKS[0] + 9 * 3600;
    let slow: Limit = "1MiB/s".parse().unwrap();
    let second = Duration::from_secs;
    governor.set_override(Some((slow, Ends::After(second(100)))));
    let current = governor.current(second(40), monday, &zone);
    assert_eq!((current.limit, current.source), (slow, Source::Override));
    assert_eq!(current.next, Some((60, "5MiB/s".parse().unwrap())));
    // A clock that is set does not move a length of time.
    assert_eq!(
        governor.current(second(41), monday + 86_400, &zone).limit,
        slow
    );
    assert_eq!(governor.current(second(42), 0, &zone).limit, slow);
    assert_eq!(
        governor.current(second(100), monday, &zone).limit.rate(),
        Some(5 << 20)
    );
    assert_eq!(governor.manual(), None);
    // A time of day is the wall clock's.
    governor.set_override(Some((Limit::UNLIMITED, Ends::At(monday + 7200))));
    let current = governor.current(second(101), monday, &zone);
    assert_eq!(
        (current.limit, current.next.unwrap().0),
        (Limit::UNLIMITED, 7200)
    );
    assert_eq!(
        governor
            .current(second(102), monday + 7200, &zone)
            .limit
            .rate(),
        Some(5 << 20)
    );
    governor.set_override(Some((slow, Ends::Never)));
    assert_eq!(
        governor
            .current(second(200), i64::MAX / 2, &|_| LocalMinute {
                day: 0,
                minute: 0
            })
            .next,
        None
    );
}

#[test]
fn the_next_time_of_day_is_in_local_time() {
    let zone = Zone::new(ZONES[1]);
    let minute = dtloop_core::schedule::parse_time("18:00").unwrap();
    // 4 January 2027, 17:00:30 UTC is 18:00:30 there: tomorrow.
    let at = Schedule::next_time(minute, WEEKS[0] + 17 * 3600 + 30, &zone).unwrap();
    assert_eq!(at, WEEKS[0] + 17 * 3600 + 86_400);
    let at = Schedule::next_time(minute, WEEKS[0], &zone).unwrap();
    assert_eq!(at, WEEKS[0] + 17 * 3600);
}

#[test]
fn bad_entries_are_explained() {
    let cases = [
        (["mon-fri", "08:00", "08:00", "5MiB/s"], "whole day"),
        (["mon-fry", "08:00", "18:00", "5MiB/s"], "\"fry\" is no day"),
        (["", "08:00", "18:00", "5MiB/s"], "is no day"),
        (
            ["mon", "8:00", "18:00", "5MiB/s"],
            "\"8:00\" is no time of day",
        ),
        (["mon", "08:60", "18:00", "5MiB/s"], "no time of day"),
        (["mon", "24:00", "18:00", "5MiB/s"], "00:00 of the next"),
        (["mon", "08:00", "25:00", "5MiB/s"], "no time of day"),
        (["mon", "08:00", "18:00", "5MB/s"], "no rate"),
    ];
    for ([days, from, to, limit], part) in cases {
        let error = Entry::new(days, from, to, limit).unwrap_err();
        assert!(error.contains(part), "{error}");
    }
    assert!(Entry::new("fri-mon", "00:00", "24:00", "unlimited").is_ok());
    assert!(Entry::new("daily", "22:00", "00:00", "1KiB/s").is_ok());
}
