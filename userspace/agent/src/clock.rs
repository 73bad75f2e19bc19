// SPDX-License-Identifier: GPL-2.0-only

//! The wall clock, as people of this machine read it.

use dtloop_core::timetable::Now;
use jiff::Timestamp;
use jiff::tz::TimeZone;

use crate::snapshot::unix_ms;

fn timestamp(unix_ms: u64) -> Timestamp {
    let ms = i64::try_from(unix_ms).unwrap_or(i64::MAX);
    Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX)
}

/// A time in milliseconds since 1970 as local date and time, to the second.
#[must_use]
pub fn text(unix_ms: u64) -> String {
    let local = TimeZone::system().to_datetime(timestamp(unix_ms));
    local.strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// Now.
#[must_use]
pub fn now() -> Now {
    let unix_ms = unix_ms();
    let offset = TimeZone::system().to_offset(timestamp(unix_ms));
    Now {
        unix_ms,
        offset_s: offset.seconds(),
    }
}
