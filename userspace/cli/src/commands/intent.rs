// SPDX-License-Identifier: GPL-2.0-only

//! How the intent map of a set is shown.

use dtloop_abi::{Found, raw};
use dtloop_manage::size;
use serde_json::{Value, json};

use crate::output;

/// The intent map for people, in one line.
pub(crate) fn text(status: &raw::IntentStatus) -> String {
    if status.has(raw::INTENT_FAILED) {
        return "FAILED: the intent file cannot be written; after a crash whole devices are compared. Detach and attach \
                with another --intent"
            .to_owned();
    }
    if !status.has(raw::INTENT_ON) {
        return "off: after a crash whole devices are compared".to_owned();
    }
    let mut text = format!(
        "{} of {} marked",
        output::count(status.marked, "region"),
        size::bytes(status.region_bytes.into())
    );
    if status.suspect > 0 {
        text += &format!(", {} to be compared", status.suspect);
    }
    match hit_rate(status) {
        Some(rate) => text + &format!(", hit rate {rate:.2} %"),
        None => text,
    }
}

/// Changes that found their regions marked, in percent.
fn hit_rate(status: &raw::IntentStatus) -> Option<f64> {
    let all = status.hits + status.misses;
    (all > 0).then(|| status.hits as f64 * 100.0 / all as f64)
}

/// The intent map for programs.
pub(crate) fn json(status: &raw::IntentStatus) -> Value {
    let state = match () {
        () if status.has(raw::INTENT_FAILED) => "failed",
        () if status.has(raw::INTENT_ON) => "on",
        () => "off",
    };
    json!({
        "state": state,
        "found": Found::from_raw(status.found).to_string(),
        "region_bytes": status.region_bytes,
        "hot_regions_max": status.hot_max,
        "idle_ms": status.idle_ms,
        "life": status.life,
        "version": status.version,
        "file_bytes": status.file_bytes,
        "regions_marked": status.marked,
        "regions_suspect": status.suspect,
        "hits": status.hits,
        "misses": status.misses,
        "hit_rate_percent": hit_rate(status),
        "wait_ns": status.wait_ns,
        "wait_ns_max": status.wait_ns_max,
        "writes": status.writes,
        "rounds": status.rounds,
        "cleared": status.cleared,
    })
}
