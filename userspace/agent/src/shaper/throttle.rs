// SPDX-License-Identifier: GPL-2.0-only

//! The bandwidth limit of a set: schedule and override, kept by a token bucket.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dtloop_api::{Bandwidth, BandwidthChange, Failure, FailureCode, LimitSource};
use dtloop_core::rate::{Bucket, Limit};
use dtloop_core::schedule::{
    Current, Ends, Governor, LocalClock, LocalMinute, Schedule, Source, parse_time,
};
use dtloop_disk::Disk;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

/// How often the wall clock is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Local time of this machine, as `/etc/localtime` or `TZ` say.
struct SystemClock(TimeZone);

impl SystemClock {
    fn new() -> Self {
        // It is kept for minutes by the library, and looked for again then.
        Self(TimeZone::system())
    }
}

impl LocalClock for SystemClock {
    fn at(&self, unix_s: i64) -> LocalMinute {
        let moment = jiff::Timestamp::from_second(unix_s).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
        let shown = self.0.to_datetime(moment);
        LocalMinute {
            day: shown.weekday().to_monday_zero_offset().unsigned_abs(),
            minute: u16::from(shown.hour().unsigned_abs()) * 60
                + u16::from(shown.minute().unsigned_abs()),
        }
    }
}

fn unix_s() -> i64 {
    let since = dtloop_runtime::unix_time();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

/// An override that holds over a restart.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    /// Bytes per second; none: unlimited.
    rate: Option<u64>,
    /// Until when, in seconds since 1970.
    until: Option<i64>,
}

/// See the module documentation.
pub(super) struct Throttle {
    set: String,
    disk: Arc<dyn Disk>,
    path: PathBuf,
    governor: Governor,
    bucket: Bucket,
    current: Current,
    looked: Option<Duration>,
    kept: bool,
    waiting: bool,
}

impl Throttle {
    pub(super) fn new(disk: Arc<dyn Disk>, set: &str, schedule: Schedule, path: PathBuf) -> Self {
        let mut throttle = Self {
            set: set.to_owned(),
            disk,
            path,
            governor: Governor::new(schedule),
            bucket: Bucket::new(Limit::UNLIMITED, Duration::ZERO),
            current: Current {
                limit: Limit::UNLIMITED,
                source: Source::Config,
                next: None,
            },
            looked: None,
            kept: false,
            waiting: false,
        };
        throttle.load();
        throttle.tick(Duration::ZERO);
        throttle
    }

    fn load(&mut self) {
        match dtloop_store::load_on::<Kept>(&*self.disk, &self.path) {
            Ok(Some(kept)) => {
                let limit = kept.rate.map_or(Limit::UNLIMITED, Limit::bytes_per_s);
                let ends = kept.until.map_or(Ends::Never, Ends::At);
                self.governor.set_override(Some((limit, ends)));
                self.kept = true;
            }
            Ok(None) => {}
            // A limit is no reason not to replicate.
            Err(error) => tracing::error!(
                "Set \"{}\": {:#}. Configuration and schedule count.",
                self.set,
                anyhow::Error::from(error)
            ),
        }
    }

    pub(super) fn tick(&mut self, now: Duration) {
        let due = self
            .looked
            .is_none_or(|at| now.saturating_sub(at) >= LOOK_EVERY);
        if due {
            self.look(now);
        }
    }

    fn look(&mut self, now: Duration) {
        self.looked = Some(now);
        let before = self.bucket.limit();
        self.current = self.governor.current(now, unix_s(), &SystemClock::new());
        if self.current.limit != before {
            self.bucket.set_limit(self.current.limit, now);
            tracing::info!(
                "Set \"{}\": the bandwidth limit is {} now.",
                self.set,
                self.current.limit
            );
        }
        if self.kept && self.governor.manual().is_none() {
            self.forget();
        }
    }

    fn forget(&mut self) {
        self.kept = false;
        if let Err(error) = self.disk.remove(&self.path) {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::error!("Cannot remove {}: {error}.", self.path.display());
            }
        }
    }

    pub(super) fn room(&mut self, now: Duration) -> usize {
        self.waiting = !self.bucket.is_ready(now);
        if self.waiting {
            0
        } else {
            self.bucket.batch_bytes()
        }
    }

    pub(super) fn blocked_for(&mut self, now: Duration) -> Option<Duration> {
        Some(self.bucket.ready_in(now)).filter(|time| !time.is_zero())
    }

    pub(super) fn on_sent(&mut self, bytes: usize, now: Duration) {
        self.bucket.spend(bytes as u64, now);
    }

    pub(super) fn change(
        &mut self,
        change: &BandwidthChange,
        now: Duration,
    ) -> Result<(), Failure> {
        let bad = |reason: String| {
            let message = format!("Set \"{}\": {reason}.", self.set);
            Failure::new(FailureCode::BadRequest, message)
        };
        match change {
            BandwidthChange::Schedule => {
                self.governor.set_override(None);
                self.forget();
            }
            BandwidthChange::Limit { limit, until, keep } => {
                let limit: Limit = limit.parse().map_err(bad)?;
                let until = until
                    .as_deref()
                    .map(Until::parse)
                    .transpose()
                    .map_err(bad)?;
                let (ends, at) = match until {
                    None => (Ends::Never, None),
                    Some(Until::Time(time)) => {
                        let wall = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
                        (Ends::After(now + time), Some(unix_s().saturating_add(wall)))
                    }
                    Some(Until::At(at)) => (Ends::At(at), Some(at)),
                };
                if *keep {
                    let kept = Kept {
                        rate: limit.rate(),
                        until: at,
                    };
                    dtloop_store::store_on(&*self.disk, &self.path, &kept).map_err(|error| {
                        let message = format!("{:#}.", anyhow::Error::from(error));
                        Failure::new(FailureCode::Internal, message)
                    })?;
                } else {
                    self.forget();
                }
                self.kept = *keep;
                self.governor.set_override(Some((limit, ends)));
            }
        }
        self.look(now);
        Ok(())
    }

    pub(super) fn report(&mut self, now: Duration) -> Bandwidth {
        self.tick(now);
        let (source, entry) = match &self.current.source {
            Source::Config => (LimitSource::Config, None),
            Source::Entry(text) => (LimitSource::Schedule, Some(text.clone())),
            Source::Override => (LimitSource::Override, None),
        };
        Bandwidth {
            limit_bytes_per_s: self.current.limit.rate(),
            limit: self.current.limit.to_string(),
            source,
            entry,
            kept: self.kept,
            changes_in_s: self.current.next.map(|(left, _)| left),
            next_limit: self.current.next.map(|(_, limit)| limit.to_string()),
            waiting: self.waiting,
        }
    }
}

/// `--until`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    Time(Duration),
    At(i64),
}

/// Longest override that is given as a length of time.
const UNTIL_MAX_S: u64 = 366 * 86_400;

impl Until {
    fn parse(text: &str) -> Result<Self, String> {
        if text.contains(':') {
            let minute = parse_time(text)?;
            let at = Schedule::next_time(minute, unix_s(), &SystemClock::new());
            return at
                .map(Self::At)
                .ok_or_else(|| format!("\"{text}\" never comes"));
        }
        let refused = || {
            format!(
                "\"{text}\" is neither a length of time (90s, 30m, 2h, 1d) nor a time of day (18:00)"
            )
        };
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .ok_or_else(refused)?;
        let number: u64 = text[..digits].parse().map_err(|_| refused())?;
        let unit = match &text[digits..] {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 86_400,
            _ => return Err(refused()),
        };
        match number.checked_mul(unit) {
            Some(seconds @ 1..=UNTIL_MAX_S) => Ok(Self::Time(Duration::from_secs(seconds))),
            _ => Err(format!("\"{text}\" is not within a second and a year")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtloop_disk::RealDisk;

    fn throttle(dir: &std::path::Path) -> Throttle {
        let schedule = Schedule {
            base: "20MiB/s".parse().unwrap(),
            entries: vec![],
        };
        Throttle::new(Arc::new(RealDisk), "db", schedule, dir.join("db.bandwidth"))
    }

    fn limit(limit: &str, until: Option<&str>, keep: bool) -> BandwidthChange {
        BandwidthChange::Limit {
            limit: limit.to_owned(),
            until: until.map(str::to_owned),
            keep,
        }
    }

    #[test]
    fn an_override_survives_a_restart_only_when_it_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let second = Duration::from_secs;
        let mut first = throttle(dir.path());
        assert_eq!(first.report(second(0)).limit, "20 MiB/s");
        first
            .change(&limit("1MiB/s", None, false), second(0))
            .unwrap();
        assert_eq!(first.report(second(0)).source, LimitSource::Override);
        assert_eq!(throttle(dir.path()).report(second(0)).limit, "20 MiB/s");
        first
            .change(&limit("2MiB/s", Some("2h"), true), second(0))
            .unwrap();
        let mut next = throttle(dir.path());
        let report = next.report(second(0));
        assert_eq!((report.limit.as_str(), report.kept), ("2 MiB/s", true));
        assert!(
            report
                .changes_in_s
                .is_some_and(|left| (7190..=7200).contains(&left))
        );
        assert_eq!(report.next_limit.as_deref(), Some("20 MiB/s"));
        // One that is not kept takes the place of one that is.
        next.change(&limit("3MiB/s", None, false), second(0))
            .unwrap();
        assert_eq!(throttle(dir.path()).report(second(0)).limit, "20 MiB/s");
        next.change(&limit("2MiB/s", None, true), second(0))
            .unwrap();
        next.change(&BandwidthChange::Schedule, second(0)).unwrap();
        assert_eq!(next.report(second(0)).source, LimitSource::Config);
        assert_eq!(throttle(dir.path()).report(second(0)).limit, "20 MiB/s");
    }

    #[test]
    fn an_override_ends_by_itself() {
        let dir = tempfile::tempdir().unwrap();
        let mut throttle = throttle(dir.path());
        throttle
            .change(&limit("1KiB/s", Some("90s"), false), Duration::ZERO)
            .unwrap();
        throttle.on_sent(1 << 20, Duration::ZERO);
        assert_eq!(throttle.room(Duration::from_secs(89)), 0);
        assert!(throttle.report(Duration::from_secs(89)).waiting);
        throttle.tick(Duration::from_secs(90));
        assert_eq!(throttle.report(Duration::from_secs(90)).limit, "20 MiB/s");
        assert!(throttle.room(Duration::from_secs(91)) > 0);
    }

    #[test]
    fn bad_changes_are_explained_and_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut throttle = throttle(dir.path());
        for (text, until, part) in [
            ("5MB/s", None, "no rate"),
            ("5MiB/s", Some("soon"), "neither a length of time"),
            ("5MiB/s", Some("25:00"), "no time of day"),
            ("5MiB/s", Some("0s"), "not within"),
            ("5MiB/s", Some("99999999999999d"), "not within"),
            ("5MiB/s", Some(""), "neither"),
        ] {
            let error = throttle
                .change(&limit(text, until, true), Duration::ZERO)
                .unwrap_err();
            assert!(error.message.contains(part), "{error}");
        }
        assert_eq!(throttle.report(Duration::ZERO).source, LimitSource::Config);
        assert!(matches!(Until::parse("18:00"), Ok(Until::At(at)) if at > unix_s()));
    }
}
