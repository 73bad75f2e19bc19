// SPDX-License-Identifier: GPL-2.0-only

//! What is said about bandwidth, compression and the pace of mirror and resync.

use serde::{Deserialize, Serialize};

/// A change of a set's bandwidth limit at run time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "kebab-case")]
pub enum BandwidthChange {
    /// This limit counts, whatever configuration and schedule say.
    Limit {
        /// As in the configuration: `5MiB/s`, `10Mbit/s`, `unlimited`.
        limit: String,
        /// Until when: a length of time (`90s`, `30m`, `2h`, `1d`) or the next such time of day (`18:00`); none: until
        /// it is taken back or the agent is restarted.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        until: Option<String>,
        /// Also over a restart of the agent.
        #[serde(default)]
        keep: bool,
    },
    /// Configuration and schedule count again.
    Schedule,
}

/// Where a limit comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LimitSource {
    /// The configuration's `limit`, or that it has none.
    #[default]
    Config,
    /// An entry of the schedule.
    Schedule,
    /// `dtloop bandwidth`.
    Override,
    /// One that this program does not know.
    #[serde(other)]
    Other,
}

/// The bandwidth limit of a set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// Bytes per second; none: unlimited.
    pub limit_bytes_per_s: Option<u64>,
    /// The same for people: `5 MiB/s`.
    pub limit: String,
    /// Where it comes from.
    pub source: LimitSource,
    /// The entry of the schedule, as it was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
    /// An override that holds over a restart of the agent.
    #[serde(default)]
    pub kept: bool,
    /// Seconds until another limit counts; none: not within a week.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changes_in_s: Option<u64>,
    /// The limit then, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_limit: Option<String>,
    /// Records wait because of it just now.
    #[serde(default)]
    pub waiting: bool,
}

/// Compression of what is sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compression {
    /// As configured: adaptive, zstd, lz4 or off.
    pub configured: String,
    /// What is done just now: `zstd-1`, `lz4`, or `off`.
    pub current: String,
    /// Why, for people.
    #[serde(default)]
    pub reason: String,
    /// Bytes of records and messages before compression, since the agent began.
    pub raw_bytes: u64,
    /// Bytes on the wire for them.
    pub wire_bytes: u64,
    /// Processor time spent on it in milliseconds, samples included.
    #[serde(default)]
    pub spent_ms: u64,
}

/// How fast a mirror or a resync may read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pace {
    /// Bytes per second just now; none: as fast as it goes.
    pub bytes_per_s: Option<u64>,
    /// The configured maximum; none: `auto`.
    pub max_bytes_per_s: Option<u64>,
    /// It is slowed down for live changes.
    #[serde(default)]
    pub yields: bool,
}

/// All of it, for one set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shaping {
    /// The limit.
    pub bandwidth: Bandwidth,
    /// Compression.
    pub compression: Compression,
    /// Mirrors and verifications.
    pub mirror: Pace,
    /// Resyncs.
    pub resync: Pace,
}
