// SPDX-License-Identifier: GPL-2.0-only

//! What a record does to its volume.
//!
//! Records are applied in the order of the stream, each at once (window 0), or several of an epoch at the same time
//! ([`crate::schedule`]). Later, the volume can trail the journal by a window, which belongs between the journal and this
//! function.
//!
//! Applying a record twice gives the same volume, which is what makes replay after a crash right:
//! every range that a record touches is overwritten by all later records of the replay as well.

use dtloop_proto::record::F_ZEROES;
use dtloop_proto::{Op, RecordBody, RecordKind};

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action<'a> {
    /// Write the bytes at the offset.
    Write {
        /// Offset in bytes.
        offset: u64,
        /// The bytes.
        data: &'a [u8],
    },
    /// Make the range read as zeroes.
    Zero {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
    },
    /// Compare the range's hash.
    Compare {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        bytes: u64,
        /// What the source has.
        hash: &'a [u8],
    },
    /// The volume does not change.
    Nothing,
}

impl Action<'_> {
    /// End of the range in bytes; 0 for [`Action::Nothing`].
    #[must_use]
    pub fn end(&self) -> u64 {
        match self {
            Self::Write { offset, data } => offset + data.len() as u64,
            Self::Zero { offset, bytes } | Self::Compare { offset, bytes, .. } => offset + bytes,
            Self::Nothing => 0,
        }
    }
}

/// The effect of a record. The record has been checked by `RecordBody::check`.
#[must_use]
pub fn action<'a>(kind: RecordKind, body: &RecordBody, payload: &'a [u8]) -> Action<'a> {
    let offset = body
        .start_sector
        .saturating_mul(dtloop_proto::limits::SECTOR_BYTES);
    let bytes = body.range_bytes();
    if !body.is_committed() {
        return Action::Nothing;
    }
    match (kind, body.op) {
        (RecordKind::Hash, _) => Action::Compare {
            offset,
            bytes,
            hash: payload,
        },
        (RecordKind::Zeroes, _) | (_, Op::WriteZeroes) => Action::Zero { offset, bytes },
        (_, Op::Discard) if body.flags & F_ZEROES != 0 => Action::Zero { offset, bytes },
        (_, Op::Write | Op::Sync) => Action::Write {
            offset,
            data: payload,
        },
        // Its content is unspecified and in the source's dirty map: a SYNC will follow.
        (_, Op::Discard | Op::SecureErase) => Action::Nothing,
        // Durability is given by the journal; the volume is flushed at checkpoints.
        (_, Op::Flush) => Action::Nothing,
        (_, Op::Gap | Op::Attach | Op::Detach | Op::Resize) => Action::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtloop_proto::record::{STATE_COMMITTED, STATE_FAILED};

    fn body(op: Op) -> RecordBody {
        RecordBody {
            epoch: 0,
            start_sector: 8,
            time_ns: 0,
            aux: 0,
            sectors: 1,
            device: 1,
            flags: 0,
            op,
            state: STATE_COMMITTED,
        }
    }

    #[test]
    fn every_operation_has_its_effect() {
        let data = [1; 512];
        let of = |body: &RecordBody, payload| action(RecordKind::Data, body, payload);
        let write = Action::Write {
            offset: 4096,
            data: &data,
        };
        let zero = Action::Zero {
            offset: 4096,
            bytes: 512,
        };
        assert_eq!(of(&body(Op::Write), &data), write);
        assert_eq!(of(&body(Op::Sync), &data), write);
        assert_eq!(of(&body(Op::WriteZeroes), &[]), zero);
        assert_eq!(
            of(
                &RecordBody {
                    flags: F_ZEROES,
                    ..body(Op::Discard)
                },
                &[]
            ),
            zero
        );
        assert_eq!(action(RecordKind::Zeroes, &body(Op::Sync), &[]), zero);
        for op in [
            Op::Discard,
            Op::SecureErase,
            Op::Flush,
            Op::Gap,
            Op::Attach,
            Op::Detach,
            Op::Resize,
        ] {
            assert_eq!(of(&body(op), &[]), Action::Nothing, "{op:?}");
        }
        let failed = RecordBody {
            state: STATE_FAILED,
            ..body(Op::Write)
        };
        assert_eq!(of(&failed, &[]), Action::Nothing);
        assert_eq!(write.end(), 4608);
    }
}
