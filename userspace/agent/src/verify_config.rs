// SPDX-License-Identifier: GPL-2.0-only

//! `[set.verify]`: when a set is verified by itself.
//!
//! ```toml
//! [set.verify]
//! every = "1week"          # or: days = ["sun"], time = "02:00"
//! from = "22:00"           # works only in these hours
//! to = "06:00"
//! rate = "50MiB"           # a second
//! repair = false
//! ```

use dtloop_core::timetable::{Plan, When};
use serde::Deserialize;

const HOUR_MS: u64 = 3_600_000;

/// When a set is verified by itself, and how.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Written")]
pub struct VerifyConfig {
    /// When.
    pub plan: Plan,
    /// Most bytes that are read and compared in a second.
    pub bytes_per_s: Option<u64>,
    /// Whether what differs is sent again.
    pub repair: bool,
    /// The plan in words.
    pub text: String,
}

/// As it is written.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    every: Option<String>,
    days: Option<Vec<String>>,
    time: Option<String>,
    from: Option<String>,
    to: Option<String>,
    rate: Option<String>,
    #[serde(default)]
    repair: bool,
}

/// A number and its unit.
fn split(text: &str) -> Option<(u64, &str)> {
    let text = text.trim();
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    Some((text[..end].parse().ok()?, text[end..].trim()))
}

fn interval_ms(text: &str) -> Result<u64, String> {
    let wrong = || format!("every = \"{text}\" is not of the form 12h, 1day or 1week");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let hours = match unit {
        "h" | "hour" | "hours" => 1,
        "d" | "day" | "days" => 24,
        "w" | "week" | "weeks" => 7 * 24,
        _ => return Err(wrong()),
    };
    let ms = number.checked_mul(hours * HOUR_MS).filter(|ms| *ms > 0);
    ms.ok_or_else(wrong)
}

fn minute(text: &str) -> Result<u16, String> {
    let wrong = || format!("\"{text}\" is no time of day of the form 02:30");
    let (hours, minutes) = text.split_once(':').ok_or_else(wrong)?;
    let part = |text: &str, below: u16| {
        let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        let value = text
            .parse::<u16>()
            .ok()
            .filter(|value| digits && *value < below);
        value.ok_or_else(wrong)
    };
    Ok(part(hours, 24)? * 60 + part(minutes, 60)?)
}

fn weekdays(names: &[String]) -> Result<[bool; 7], String> {
    const NAMES: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
    let mut days = [false; 7];
    for name in names {
        let at = NAMES.iter().position(|known| known == name);
        let at = at.ok_or_else(|| format!("\"{name}\" is none of {}", NAMES.join(", ")))?;
        days[at] = true;
    }
    if days == [false; 7] {
        return Err("days names no day".to_owned());
    }
    Ok(days)
}

fn rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("rate = \"{text}\" is not of the form 500KiB, 50MiB or 1GiB (a second)");
    let (number, unit) = split(text).ok_or_else(wrong)?;
    let shift = match unit.strip_suffix("/s").unwrap_or(unit) {
        "" | "B" => 0,
        "K" | "KiB" => 10,
        "M" | "MiB" => 20,
        "G" | "GiB" => 30,
        _ => return Err(wrong()),
    };
    let bytes = number.checked_mul(1 << shift).filter(|bytes| *bytes > 0);
    bytes.ok_or_else(wrong)
}

impl TryFrom<Written> for VerifyConfig {
    type Error = String;

    fn try_from(written: Written) -> Result<Self, String> {
        let (when, mut text) = match (&written.every, &written.days, &written.time) {
            (Some(every), None, None) => {
                let ms = interval_ms(every)?;
                (When::Every { ms }, format!("every {every}"))
            }
            (None, Some(days), Some(time)) => {
                let when = When::Days {
                    days: weekdays(days)?,
                    minute: minute(time)?,
                };
                (when, format!("{} at {time}", days.join(", ")))
            }
            _ => return Err("verify needs either every, or days and time".to_owned()),
        };
        let window = match (&written.from, &written.to) {
            (None, None) => None,
            (Some(from), Some(to)) if from != to => {
                text += &format!(", between {from} and {to}");
                Some((minute(from)?, minute(to)?))
            }
            _ => return Err("verify needs both from and to, and they must differ".to_owned()),
        };
        let bytes_per_s = written.rate.as_deref().map(rate).transpose()?;
        if let Some(rate) = &written.rate {
            text += &format!(", at most {} a second", rate.trim_end_matches("/s"));
        }
        if written.repair {
            text += ", with repair";
        }
        Ok(Self {
            plan: Plan { when, window },
            bytes_per_s,
            repair: written.repair,
            text,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<VerifyConfig, String> {
        toml::from_str(text).map_err(|error| error.to_string())
    }

    #[test]
    fn plans_are_understood() {
        let config = parse(
            "every = \"1week\"\nfrom = \"22:00\"\nto = \"06:00\"\nrate = \"50MiB/s\"\nrepair = true\n",
        )
        .unwrap();
        assert_eq!(
            config.plan.when,
            When::Every {
                ms: 7 * 24 * HOUR_MS
            }
        );
        assert_eq!(config.plan.window, Some((1320, 360)));
        assert_eq!((config.bytes_per_s, config.repair), (Some(50 << 20), true));
        assert_eq!(
            config.text,
            "every 1week, between 22:00 and 06:00, at most 50MiB a second, with repair"
        );
        let config = parse("days = [\"sat\", \"sun\"]\ntime = \"02:30\"\n").unwrap();
        let days = [false, false, false, false, false, true, true];
        assert_eq!(config.plan.when, When::Days { days, minute: 150 });
        assert!(!config.repair);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, named) in [
            ("", "either every"),
            ("every = \"1week\"\ntime = \"02:00\"", "either every"),
            ("every = \"soon\"", "soon"),
            ("every = \"0h\"", "0h"),
            ("every = \"99999999999999999999h\"", "9999"),
            ("days = [\"Sunday\"]\ntime = \"02:00\"", "Sunday"),
            ("days = []\ntime = \"02:00\"", "no day"),
            ("days = [\"sun\"]\ntime = \"24:00\"", "24:00"),
            ("every = \"1day\"\nfrom = \"22:00\"", "both from and to"),
            ("every = \"1day\"\nrate = \"fast\"", "fast"),
            ("every = \"1day\"\nsometimes = true", "sometimes"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }
}
