// SPDX-License-Identifier: GPL-2.0-only

//! The parts of a set's configuration that are about how fast it sends.

use dtloop_core::rate::Limit;
use dtloop_core::schedule::{Entry, Schedule};
use serde::Deserialize;

/// `compression`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// When it makes what is sent arrive sooner.
    #[default]
    Adaptive,
    /// Always, by zstd.
    Zstd,
    /// Always, by lz4.
    Lz4,
    /// Never.
    Off,
}

impl Compression {
    /// As in the configuration.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Adaptive => "adaptive",
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
            Self::Off => "off",
        }
    }
}

/// `[set.bandwidth]`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "RawBandwidth")]
pub struct Bandwidth(pub Schedule);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawBandwidth {
    limit: Option<String>,
    #[serde(default)]
    schedule: Vec<RawEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawEntry {
    days: String,
    from: String,
    to: String,
    limit: String,
}

impl TryFrom<RawBandwidth> for Bandwidth {
    type Error = String;

    fn try_from(raw: RawBandwidth) -> Result<Self, String> {
        let base = raw.limit.map_or(Ok(Limit::UNLIMITED), |text| text.parse());
        let entry = |(index, raw): (usize, &RawEntry)| {
            Entry::new(&raw.days, &raw.from, &raw.to, &raw.limit)
                .map_err(|error| format!("entry {} of the bandwidth schedule: {error}", index + 1))
        };
        Ok(Self(Schedule {
            base: base.map_err(|error| format!("the bandwidth limit: {error}"))?,
            entries: raw
                .schedule
                .iter()
                .enumerate()
                .map(entry)
                .collect::<Result<_, _>>()?,
        }))
    }
}

/// `mirror_rate` and `resync_rate`: the most that is read, or `auto`. In both cases live changes come first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct RateMax(pub Limit);

impl TryFrom<String> for RateMax {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        if text.trim() == "auto" {
            return Ok(Self::default());
        }
        text.parse().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;

    const SET: &str = "[[set]]\nname = \"a\"\ntarget = \"h:1\"\ntransport = \"plaintext\"\n";

    #[test]
    fn shaping_has_defaults_that_change_nothing() {
        let config = Config::parse(SET).unwrap();
        let set = &config.sets[0];
        assert_eq!(set.compression, super::Compression::Adaptive);
        assert_eq!(set.bandwidth, super::Bandwidth::default());
        assert_eq!((set.mirror_rate, set.resync_rate), Default::default());
    }

    #[test]
    fn the_example_of_the_manual_is_understood() {
        let text = format!(
            "{SET}compression = \"zstd\"\nmirror_rate = \"50MiB/s\"\nresync_rate = \"auto\"\n\
             [set.bandwidth]\nlimit = \"20MiB/s\"\nschedule = [\n  \
             {{ days = \"mon-fri\", from = \"08:00\", to = \"18:00\", limit = \"5MiB/s\" }},\n]\n"
        );
        let config = Config::parse(&text).unwrap();
        let schedule = &config.sets[0].bandwidth.0;
        assert_eq!(schedule.base.rate(), Some(20 << 20));
        assert_eq!(schedule.entries[0].text(), "mon-fri 08:00-18:00");
        assert_eq!(config.sets[0].mirror_rate.0.rate(), Some(50 << 20));
    }

    #[test]
    fn mistakes_are_named() {
        let refused =
            |more: &str| format!("{:#}", Config::parse(&format!("{SET}{more}")).unwrap_err());
        let schedule =
            |entries: &str| refused(&format!("[set.bandwidth]\nschedule = [{entries}]\n"));
        let good = "{ days = \"mon\", from = \"08:00\", to = \"09:00\", limit = \"1MiB/s\" }";
        let bad = good.replace("09:00", "08:00");
        let error = schedule(&format!("{good}, {bad}"));
        assert!(
            error.contains("entry 2") && error.contains("whole day"),
            "{error}"
        );
        assert!(refused("[set.bandwidth]\nlimit = \"fast\"\n").contains("is no rate"));
        assert!(refused("[set.bandwidth]\nlimits = \"1MiB/s\"\n").contains("limits"));
        assert!(refused("compression = \"gzip\"\n").contains("gzip"));
        assert!(refused("mirror_rate = \"fast\"\n").contains("is no rate"));
    }
}
