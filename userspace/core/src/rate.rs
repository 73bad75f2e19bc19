// SPDX-License-Identifier: GPL-2.0-only

//! A rate limit as people write it, and the token bucket that keeps it.
//!
//! The bucket works with debt: something may be sent while its balance is positive, and all of it is charged then, so
//! nothing is ever cut in two. Over any time `t` at most `rate * t + depth + one batch` is sent. Its only clock is a
//! monotonic one that is passed in: a wall clock that is set neither stalls nor floods it.

use std::fmt;
use std::num::NonZeroU64;
use std::str::FromStr;
use std::time::Duration;

/// A rate in bytes per second, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Limit(Option<NonZeroU64>);

/// The lowest limit in bytes per second: below it a connection is rather cut than slow.
pub const LIMIT_MIN: u64 = 1024;

const KIBI: u64 = 1024;
/// A thousandth of a Mbit in bytes.
const KBIT: u64 = 125;

const UNITS: [(&str, u64); 7] = [
    ("GiB/s", KIBI * KIBI * KIBI),
    ("MiB/s", KIBI * KIBI),
    ("KiB/s", KIBI),
    ("Gbit/s", KBIT * 1_000_000),
    ("Mbit/s", KBIT * 1000),
    ("kbit/s", KBIT),
    ("B/s", 1),
];

impl Limit {
    /// No limit.
    pub const UNLIMITED: Self = Self(None);

    /// That many bytes per second; none if it is 0.
    #[must_use]
    pub fn bytes_per_s(rate: u64) -> Self {
        Self(NonZeroU64::new(rate))
    }

    /// The rate in bytes per second; `None`: there is no limit.
    #[must_use]
    pub fn rate(self) -> Option<u64> {
        self.0.map(NonZeroU64::get)
    }
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text == "unlimited" {
            return Ok(Self::UNLIMITED);
        }
        let refused = || {
            format!(
                "\"{text}\" is no rate; write for example 20MiB/s, 500KiB/s, 10Mbit/s or unlimited"
            )
        };
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .ok_or_else(refused)?;
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| refused())?;
        let unit = UNITS
            .iter()
            .find(|(name, _)| *name == unit.trim())
            .ok_or_else(refused)?;
        match number.checked_mul(unit.1) {
            Some(rate) if rate >= LIMIT_MIN => Ok(Self::bytes_per_s(rate)),
            Some(_) => Err(format!(
                "\"{text}\" is below the lowest limit, 1KiB/s; to send nothing at all, stop dtagent"
            )),
            None => Err(refused()),
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(rate) = self.rate() else {
            return f.write_str("unlimited");
        };
        let exact = |(_, bytes): &&(&str, u64)| rate % bytes == 0;
        let (name, bytes) = UNITS.iter().find(exact).unwrap_or(&("B/s", 1));
        write!(f, "{} {name}", rate / bytes)
    }
}

/// Nanoseconds of a second: a balance is kept in billionths of a byte, so that no time is too short to count.
const NS: i128 = 1_000_000_000;

/// Saved up while nothing is sent: a tenth of a second's bytes, so that a burst is short.
const DEPTH_PARTS: u64 = 10;

/// A batch takes about a twentieth of a second, within these bounds: below, headers and system calls would cost too
/// much and little would be gained by compression; above, it is the largest batch anyway.
const BATCH_PARTS: u64 = 20;
const BATCH_BYTES: (u64, u64) = (64 << 10, 1 << 20);

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Bucket {
    limit: Limit,
    /// In billionths of a byte; negative: debt.
    balance: i128,
    at: Duration,
}

impl Bucket {
    /// A bucket with that limit, full, at that time.
    #[must_use]
    pub fn new(limit: Limit, now: Duration) -> Self {
        let mut bucket = Self {
            limit,
            balance: 0,
            at: now,
        };
        bucket.balance = bucket.depth();
        bucket
    }

    /// The limit.
    #[must_use]
    pub fn limit(&self) -> Limit {
        self.limit
    }

    fn depth(&self) -> i128 {
        let rate = self.limit.rate().unwrap_or(0);
        i128::from((rate / DEPTH_PARTS).max(1)) * NS
    }

    fn settle(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.at);
        self.at = self.at.max(now);
        if let Some(rate) = self.limit.rate() {
            // At most 2^64 bytes a second for 2^94 ns: below 2^158 could not be held, but the time is cut.
            let ns = i128::try_from(elapsed.as_nanos().min(u128::from(u64::MAX))).unwrap_or(0);
            let gained = ns.saturating_mul(i128::from(rate));
            self.balance = self.balance.saturating_add(gained).min(self.depth());
        }
    }

    /// Another limit from now on. Debt stays, and is paid at the new rate; without a limit it is forgotten.
    pub fn set_limit(&mut self, limit: Limit, now: Duration) {
        self.settle(now);
        let had_none = self.limit == Limit::UNLIMITED;
        self.limit = limit;
        if had_none || limit == Limit::UNLIMITED {
            self.balance = self.depth();
        }
        self.balance = self.balance.min(self.depth());
    }

    /// Whether something may be sent.
    pub fn is_ready(&mut self, now: Duration) -> bool {
        self.settle(now);
        self.limit == Limit::UNLIMITED || self.balance > 0
    }

    /// How long until something may be sent.
    pub fn ready_in(&mut self, now: Duration) -> Duration {
        if self.is_ready(now) {
            return Duration::ZERO;
        }
        let rate = i128::from(self.limit.rate().unwrap_or(u64::MAX));
        let ns = (1 - self.balance).div_ceil_positive(rate);
        Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
    }

    /// Something was sent, whether or not the bucket was ready: acknowledgements and pings are not held up.
    pub fn spend(&mut self, bytes: u64, now: Duration) {
        self.settle(now);
        if self.limit != Limit::UNLIMITED {
            self.balance = self.balance.saturating_sub(i128::from(bytes) * NS);
        }
    }

    /// How large a batch should be, in bytes.
    #[must_use]
    pub fn batch_bytes(&self) -> usize {
        let rate = self.limit.rate().unwrap_or(u64::MAX);
        let bytes = (rate / BATCH_PARTS).clamp(BATCH_BYTES.0, BATCH_BYTES.1);
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }
}

trait DivCeil {
    fn div_ceil_positive(self, by: Self) -> Self;
}

impl DivCeil for i128 {
    /// For numbers that are not negative.
    fn div_ceil_positive(self, by: Self) -> Self {
        self / by + Self::from(self % by != 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ns(ns: u64) -> Duration {
        Duration::from_nanos(ns)
    }

    #[test]
    fn limits_are_read_and_shown() {
        let good = [
            ("unlimited", None, "unlimited"),
            ("20MiB/s", Some(20 << 20), "20 MiB/s"),
            (" 5 MiB/s ", Some(5 << 20), "5 MiB/s"),
            ("1KiB/s", Some(1024), "1 KiB/s"),
            ("10Mbit/s", Some(1_250_000), "10 Mbit/s"),
            ("800 kbit/s", Some(100_000), "800 kbit/s"),
            ("1Gbit/s", Some(125_000_000), "1 Gbit/s"),
            ("4096B/s", Some(4096), "4 KiB/s"),
            ("1031B/s", Some(1031), "1031 B/s"),
        ];
        for (text, rate, shown) in good {
            let limit: Limit = text.parse().unwrap();
            assert_eq!(limit.rate(), rate, "{text}");
            assert_eq!(limit.to_string(), shown);
            assert_eq!(shown.parse(), Ok(limit));
        }
        for text in [
            "",
            "0",
            "5",
            "5MB/s",
            "-1MiB/s",
            "MiB/s",
            "1.5MiB/s",
            "5MiB",
            "99999999999GiB/s",
            "18446744073709551616B/s",
            "Unlimited",
        ] {
            let error = text.parse::<Limit>().unwrap_err();
            assert!(error.contains("20MiB/s"), "{text}: {error}");
        }
        for text in ["0MiB/s", "1023B/s", "8kbit/s"] {
            let error = text.parse::<Limit>().unwrap_err();
            assert!(error.contains("lowest"), "{text}: {error}");
        }
    }

    #[test]
    fn a_debt_is_paid_before_anything_else_is_sent() {
        let mut bucket = Bucket::new(Limit::bytes_per_s(1000), ns(0));
        assert!(bucket.is_ready(ns(0)));
        bucket.spend(100 + 2000, ns(0));
        let wait = bucket.ready_in(ns(1_000_000_000));
        assert!(
            wait > Duration::from_millis(999) && wait <= Duration::from_millis(1001),
            "{wait:?}"
        );
        assert!(!bucket.is_ready(ns(1_999_999_999)));
        assert!(bucket.is_ready(ns(1_000_000_000) + wait));
    }

    #[test]
    fn a_limit_is_lifted_and_set_at_once() {
        let mut bucket = Bucket::new(Limit::bytes_per_s(1024), ns(0));
        bucket.spend(1 << 30, ns(0));
        assert!(!bucket.is_ready(Duration::from_secs(60)));
        bucket.set_limit(Limit::UNLIMITED, Duration::from_secs(60));
        assert!(bucket.is_ready(Duration::from_secs(60)));
        bucket.spend(u64::MAX, Duration::from_secs(60));
        bucket.set_limit(Limit::bytes_per_s(1024), Duration::from_secs(61));
        assert!(
            bucket.is_ready(Duration::from_secs(61)),
            "what was sent without a limit is no debt"
        );
        bucket.spend(1 << 20, Duration::from_secs(61));
        bucket.set_limit(Limit::bytes_per_s(1 << 30), Duration::from_secs(61));
        assert!(bucket.ready_in(Duration::from_secs(61)) <= Duration::from_millis(1));
    }

    #[test]
    fn extremes_neither_panic_nor_stall() {
        for rate in [1, u64::MAX] {
            let mut bucket = Bucket::new(Limit::bytes_per_s(rate), Duration::MAX);
            bucket.spend(u64::MAX, Duration::ZERO);
            bucket.settle(Duration::MAX);
            let _ = bucket.ready_in(Duration::MAX);
            bucket.spend(u64::MAX, Duration::MAX);
            bucket.set_limit(Limit::bytes_per_s(1), Duration::MAX);
            let _ = bucket.ready_in(Duration::MAX);
        }
    }

    proptest! {
        /// Neither more than the limit allows in any window, nor less than it by more than a batch.
        #[test]
        fn the_limit_is_kept_and_reached(
            rate in 1024_u64..200_000_000,
            steps in proptest::collection::vec((0_u64..50_000_000, 1_u64..1 << 20), 1..300),
        ) {
            let mut bucket = Bucket::new(Limit::bytes_per_s(rate), ns(0));
            let (mut now, mut sent) = (Duration::ZERO, vec![]);
            for (pause, bytes) in steps {
                now += ns(pause);
                if !bucket.is_ready(now) {
                    let wait = bucket.ready_in(now);
                    prop_assert!(!wait.is_zero());
                    now += wait;
                    prop_assert!(bucket.is_ready(now), "it is ready when it says so");
                }
                bucket.spend(bytes, now);
                sent.push((now, bytes));
            }
            let allowed = |time: Duration| time.as_secs_f64() * rate as f64;
            for (index, (from, _)) in sent.iter().enumerate().step_by(7) {
                let mut bytes = 0.0;
                for (until, batch) in &sent[index..] {
                    let before = allowed(*until - *from) + rate as f64 / 10.0 + (1 << 20) as f64 + 1.0;
                    bytes += *batch as f64;
                    prop_assert!(bytes <= before + 1.0, "{bytes} in {:?}", *until - *from);
                }
            }
        }

        /// Who always has something to send gets the whole rate.
        #[test]
        fn a_saturated_bucket_gives_its_rate(rate in 1024_u64..200_000_000, batch in 1_u64..1 << 20) {
            let mut bucket = Bucket::new(Limit::bytes_per_s(rate), ns(0));
            let (mut now, mut sent) = (Duration::ZERO, 0_u64);
            for _ in 0..200 {
                now += bucket.ready_in(now);
                bucket.spend(batch, now);
                sent += batch;
            }
            now += bucket.ready_in(now);
            let expected = now.as_secs_f64() * rate as f64;
            prop_assert!(sent as f64 >= expected - 2.0, "{sent} of {expected}");
        }
    }
}
