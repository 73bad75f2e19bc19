// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop bandwidth`, and what `dtloop status` says about how fast a set sends.

use std::time::Duration;

use dtloop_api::{
    Bandwidth, BandwidthChange, ClientError, Compression, LimitSource, Outcome, Pace, Request,
    Shaping,
};
use dtloop_manage::size;

use super::Context;
use crate::args;
use crate::exit::Code;
use crate::output;

pub(crate) fn run(context: &Context<'_>, args: &args::Bandwidth) -> anyhow::Result<Code> {
    let change = match &args.limit {
        Some(limit) => Some(BandwidthChange::Limit {
            limit: limit.clone(),
            until: args.until.clone(),
            keep: args.keep,
        }),
        None => args.schedule.then_some(BandwidthChange::Schedule),
    };
    let request = Request::Bandwidth {
        set: args.set.to_string(),
        change,
    };
    match context.agent()?.request(&request)?.finish(|_| ())? {
        Outcome::Bandwidth(bandwidth) if context.global.json => output::json(&bandwidth)?,
        Outcome::Bandwidth(bandwidth) => {
            output::text(&format!("set {}: {}\n", args.set, limit(&bandwidth)))?;
        }
        _ => return Err(ClientError::Unexpected.into()),
    }
    Ok(Code::Done)
}

/// `5 MiB/s by the schedule (mon-fri 08:00-18:00), 20 MiB/s in 2h 10m`.
fn limit(bandwidth: &Bandwidth) -> String {
    let source = match (bandwidth.source, &bandwidth.entry) {
        (LimitSource::Schedule, Some(entry)) => format!("by the schedule ({entry})"),
        (LimitSource::Schedule, None) => "by the schedule".into(),
        (LimitSource::Override, _) if bandwidth.kept => {
            "by dtloop bandwidth, kept over a restart".into()
        }
        (LimitSource::Override, _) => "by dtloop bandwidth".into(),
        _ => "by the configuration".into(),
    };
    let mut text = format!("{} {source}", bandwidth.limit);
    if let (Some(seconds), Some(next)) = (bandwidth.changes_in_s, &bandwidth.next_limit) {
        let time = size::duration(Duration::from_secs(seconds));
        text += &format!(", {next} in {time}");
    }
    if bandwidth.waiting {
        text += "; records wait for it";
    }
    text
}

/// `zstd-1, 3.1 : 1 (the link is the bottleneck)`.
fn packing(compression: &Compression) -> String {
    let mut text = compression.current.clone();
    // In tenths; nothing sent is no ratio.
    let tenths = (u128::from(compression.raw_bytes) * 10)
        .checked_div(compression.wire_bytes.into())
        .unwrap_or(10);
    text += &format!(", {}.{} : 1 so far", tenths / 10, tenths % 10);
    if !compression.reason.is_empty() {
        text += &format!(" ({})", compression.reason);
    }
    text
}

fn pace(what: &str, pace: &Pace) -> Option<String> {
    let rate = pace
        .bytes_per_s
        .filter(|_| pace.yields || pace.max_bytes_per_s.is_some())?;
    let why = if pace.yields {
        "live changes come first"
    } else {
        "by the configuration"
    };
    Some(format!("{what} at most {}/s ({why})", size::bytes(rate)))
}

/// Lines of `dtloop status`: what is not as if there were nothing to say.
pub(crate) fn status(shaping: &Shaping) -> String {
    let Shaping {
        bandwidth,
        compression,
        mirror,
        resync,
    } = shaping;
    let mut text = String::new();
    let is_plain = bandwidth.limit_bytes_per_s.is_none()
        && bandwidth.source == LimitSource::Config
        && bandwidth.changes_in_s.is_none();
    if !is_plain {
        text += &format!("  limit    {}\n", limit(bandwidth));
    }
    // A twentieth less on the wire is worth a line.
    let shrunk = compression.wire_bytes < compression.raw_bytes / 20 * 19;
    if shrunk || !matches!(compression.current.as_str(), "" | "off") {
        text += &format!("  packing  {}\n", packing(compression));
    }
    let paces = [pace("mirror", mirror), pace("resync", resync)];
    let paces: Vec<String> = paces.into_iter().flatten().collect();
    if !paces.is_empty() {
        text += &format!("  pace     {}\n", paces.join(", "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_said_of_defaults() {
        assert_eq!(status(&Shaping::default()), "");
    }

    #[test]
    fn limits_are_shown_with_source_and_end() {
        let shaping = Shaping {
            bandwidth: Bandwidth {
                limit_bytes_per_s: Some(5 << 20),
                limit: "5 MiB/s".into(),
                source: LimitSource::Schedule,
                entry: Some("mon-fri 08:00-18:00".into()),
                changes_in_s: Some(7800),
                next_limit: Some("20 MiB/s".into()),
                ..Bandwidth::default()
            },
            compression: Compression {
                current: "zstd-1".into(),
                reason: "the link is the bottleneck".into(),
                raw_bytes: 3100,
                wire_bytes: 1000,
                ..Compression::default()
            },
            mirror: Pace {
                bytes_per_s: Some(10 << 20),
                max_bytes_per_s: Some(10 << 20),
                yields: false,
            },
            resync: Pace {
                bytes_per_s: Some(1 << 20),
                max_bytes_per_s: None,
                yields: true,
            },
        };
        let expected = "  limit    5 MiB/s by the schedule (mon-fri 08:00-18:00), 20 MiB/s in 2h 10m\n  \
             packing  zstd-1, 3.1 : 1 so far (the link is the bottleneck)\n  \
             pace     mirror at most 10 MiB/s (by the configuration), resync at most 1 MiB/s (live changes come first)\n";
        assert_eq!(status(&shaping), expected);
    }

    #[test]
    fn overrides_are_named_as_such() {
        let mut bandwidth = Bandwidth {
            limit: "unlimited".into(),
            source: LimitSource::Override,
            ..Bandwidth::default()
        };
        assert_eq!(limit(&bandwidth), "unlimited by dtloop bandwidth");
        (bandwidth.kept, bandwidth.waiting) = (true, true);
        let expected = "unlimited by dtloop bandwidth, kept over a restart; records wait for it";
        assert_eq!(limit(&bandwidth), expected);
    }
}
