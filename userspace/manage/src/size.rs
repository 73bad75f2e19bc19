// SPDX-License-Identifier: GPL-2.0-only

//! Sizes and durations as people write and read them.

use std::time::Duration;

const UNITS: [(char, u32); 5] = [('K', 10), ('M', 20), ('G', 30), ('T', 40), ('P', 50)];

/// Reads a number of bytes with an optional binary suffix: `4096`, `64K`, `64KiB`, `1G`.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    if number.is_empty() {
        return Err("a size is a number of bytes, with K, M, G or T if you like: 64M".into());
    }
    let number: u64 = number.parse().map_err(|_| too_large())?;
    let shift = shift_of(suffix)
        .ok_or_else(|| format!("the unit {suffix:?} is unknown; use K, M, G or T (binary)"))?;
    number.checked_mul(1 << shift).ok_or_else(too_large)
}

fn too_large() -> String {
    "the size is too large".into()
}

fn shift_of(suffix: &str) -> Option<u32> {
    let mut chars = suffix.chars();
    let Some(unit) = chars.next().map(|c| c.to_ascii_uppercase()) else {
        return Some(0);
    };
    let rest = chars.as_str();
    if unit == 'B' && rest.is_empty() {
        return Some(0);
    }
    // "KB" is refused: some mean 1000 by it.
    let known = rest.is_empty() || rest.eq_ignore_ascii_case("ib");
    let shift = UNITS.iter().find(|(letter, _)| *letter == unit)?.1;
    known.then_some(shift)
}

/// Reads a duration: `90`, `90s`, `5m`, `1h`, `500ms`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| "a time is a number of seconds, or 500ms, 90s, 5m, 1h".to_owned())?;
    let factor_ms = match unit {
        "ms" => 1,
        "" | "s" => 1000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(format!("the unit {unit:?} is unknown; use ms, s, m or h")),
    };
    let ms = number.checked_mul(factor_ms);
    ms.map(Duration::from_millis)
        .ok_or_else(|| "the time is too long".into())
}

/// A number of bytes for people: exact when it is short, else three figures.
pub fn bytes(value: u64) -> String {
    let Some((letter, shift)) = UNITS.iter().rev().find(|(_, shift)| value >> shift > 0) else {
        return format!("{value} B");
    };
    let whole = value >> shift;
    let rest = value & ((1 << shift) - 1);
    if rest == 0 {
        return format!("{whole} {letter}iB");
    }
    // The fraction in hundredths; u128 so that no size overflows.
    let hundredths = (u128::from(rest) * 100) >> shift;
    match whole {
        100.. => format!("{whole} {letter}iB"),
        10.. => format!("{whole}.{} {letter}iB", hundredths / 10),
        _ => format!("{whole}.{hundredths:02} {letter}iB"),
    }
}

/// A duration for people, in its two largest units.
pub fn duration(value: Duration) -> String {
    let seconds = value.as_secs();
    let (d, h, m, s) = (
        seconds / 86_400,
        seconds / 3600 % 24,
        seconds / 60 % 60,
        seconds % 60,
    );
    match (d, h, m) {
        (1.., _, _) => format!("{d}d {h}h"),
        (0, 1.., _) => format!("{h}h {m}m"),
        (0, 0, 1..) => format!("{m}m {s}s"),
        _ if seconds >= 10 => format!("{seconds}s"),
        _ if seconds >= 1 => format!("{}.{}s", seconds, value.subsec_millis() / 100),
        _ => format!("{}ms", value.as_millis()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        let good = [
            ("0", 0),
            ("4096", 4096),
            ("1b", 1),
            ("64K", 65_536),
            ("64k", 65_536),
            ("64KiB", 65_536),
            ("1M", 1 << 20),
            (" 2G ", 2 << 30),
            ("3T", 3 << 40),
        ];
        for (text, bytes) in good {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
        for text in [
            "",
            "K",
            "-1",
            "1.5G",
            "1 G",
            "1KB",
            "1X",
            "0x10",
            "99999999999T",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.50 KiB"),
            (10 * 1024 + 512, "10.5 KiB"),
            ((1 << 30) - 1, "1023 MiB"),
            (1 << 30, "1 GiB"),
            (5 << 40, "5 TiB"),
            (u64::MAX, "16383 PiB"),
        ];
        for (value, text) in cases {
            assert_eq!(bytes(value), text);
        }
    }

    #[test]
    fn whole_sizes_survive_a_round_trip() {
        for shift in 0..60 {
            let text = bytes(1 << shift).replace(' ', "");
            assert_eq!(parse(&text), Ok(1 << shift), "{text}");
        }
    }

    #[test]
    fn durations_are_read_and_shown() {
        let cases = [
            ("500ms", 500, "500ms"),
            ("90", 90_000, "1m 30s"),
            ("9s", 9_000, "9.0s"),
            ("59s", 59_000, "59s"),
            ("5m", 300_000, "5m 0s"),
            ("25h", 90_000_000, "1d 1h"),
        ];
        for (text, ms, shown) in cases {
            let parsed = parse_duration(text).unwrap();
            assert_eq!(parsed, Duration::from_millis(ms), "{text}");
            assert_eq!(duration(parsed), shown);
        }
        for text in ["", "s", "-1", "1d", "1.5s"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
