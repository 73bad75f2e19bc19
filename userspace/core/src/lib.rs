// SPDX-License-Identifier: GPL-2.0-only

//! The state machines of source and target, without clock, socket, file or thread.
//!
//! Everything that decides lives here and is driven by calls: what to send next, what may be
//! released, which range to read, whether a record is the next one, what a volume is worth. The
//! programs `dtagent` and `dttarget` only move bytes between these and the world, so a test can
//! do it too, with cuts, duplicates and restarts at every step.
//!
//! | side | module | decides |
//! |---|---|---|
//! | source | [`source`] | where a session resumes, what is acknowledged and may be released |
//! | source | [`mirror`] | which range to read next for mirror and verify; keeps its place |
//! | source | [`resync`] | when every change that was not in the stream has been sent again |
//! | source | [`coverage`] | whether comparing the marked regions is enough after a crash |
//! | source | [`ladder`] | when records go from the ring into the disk queue; what people see of it |
//! | source | [`spool`] | which records are in the ring, in the queue, or missing |
//! | source | [`replica`] | what the source remembers of a set, and what must be mirrored |
//! | source | [`schedule`], [`rate`] | how many bytes may be sent when |
//! | source | [`adaptive`] | whether batches are compressed, and how |
//! | source | [`pace`] | how far mirror and resync yield to live changes |
//! | source | [`alarm`], [`outside`] | when a copy must be verified, and when a difference is one |
//! | source | [`origin`] | whether the disk behind a device is still the one that the copy was made of |
//! | source | [`timetable`] | when a verification is due |
//! | both | [`chain`] | the hash chain over the records |
//! | target | [`sequence`] | whether a record is the next one, a duplicate, or a hole before it |
//! | target | [`set`] | what the volumes of a set are worth; admission of a source |
//! | target | [`apply`] | what a record does to a volume |
//! | target | [`binding`] | whom a volume belongs to |
//! | target | [`identity`] | whether a volume is the one that was left, as it was left |
//! | target | [`overlay`] | which blocks of a volume are staged, and how that is written down |
//! | target | [`parallel`] | which records may be applied at the same time |

#![forbid(unsafe_code)]

pub mod adaptive;
pub mod alarm;
pub mod apply;
pub mod binding;
pub mod chain;
pub mod coverage;
pub mod identity;
pub mod ladder;
pub mod mirror;
pub mod origin;
pub mod outside;
pub mod overlay;
pub mod pace;
pub mod parallel;
pub mod rate;
pub mod replica;
pub mod resync;
pub mod schedule;
pub mod sequence;
pub mod set;
pub mod size;
pub mod source;
pub mod spool;
pub mod timetable;

/// Reads and writes a [`Uuid`](dtloop_proto::Uuid) as text in the state files.
pub mod uuid_text {
    use dtloop_proto::Uuid;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    /// For `#[serde(with)]`.
    ///
    /// # Errors
    ///
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(uuid: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(uuid)
    }

    /// For `#[serde(with)]`.
    ///
    /// # Errors
    ///
    /// If the text is no identifier.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Uuid, D::Error> {
        String::deserialize(deserializer)?
            .parse()
            .map_err(D::Error::custom)
    }
}
