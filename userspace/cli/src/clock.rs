// SPDX-License-Identifier: GPL-2.0-only

//! Times of the agent, as people of this machine read them.

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// A time in milliseconds since 1970 as local date and time, to the second.
pub(crate) fn text(unix_ms: u64) -> String {
    let ms = i64::try_from(unix_ms).unwrap_or(i64::MAX);
    let time = Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX);
    let local = TimeZone::system().to_datetime(time);
    local.strftime("%Y-%m-%d %H:%M:%S").to_string()
}
