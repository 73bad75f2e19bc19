// SPDX-License-Identifier: GPL-2.0-only

//! When a difference that a comparison found is one.
//!
//! A Hash record holds what the source had at its position, and the target compares when it has applied everything
//! before it: writes in flight are before it on both sides, or behind it on both. What is left are changes that were
//! made **outside** of the stream: after a full ring or a failed write the source has what no record told yet. From
//! the record that says so until the position at which the order is declared whole again, a difference may be nothing but
//! that, so it is compared again later instead of being reported.
//!
//! A GAP record stands before every record that was made after the first change it tells of, because nothing is recorded
//! between the two. So a Hash record that can be concerned has a higher number than the GAP.

/// Where changes outside of the stream are on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outside {
    /// First and last record at which that was told.
    lost: Option<(u64, u64)>,
    restored_at: u64,
}

impl Outside {
    /// Changes outside of the stream are known since that record.
    pub fn on_loss(&mut self, seq: u64) {
        let (from, last) = self.lost.get_or_insert((seq, seq));
        (*from, *last) = ((*from).min(seq), (*last).max(seq));
    }

    /// All that were told of below this position were sent again.
    pub fn on_restored(&mut self, at: u64) {
        self.lost.take_if(|(_, last)| *last < at);
        self.restored_at = self.restored_at.max(at);
    }

    /// Whether a difference found at that record is one.
    #[must_use]
    pub fn is_decisive(&self, seq: u64) -> bool {
        seq >= self.restored_at && self.lost.is_none_or(|(from, _)| seq < from)
    }

    /// Whether there are none on their way.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.lost.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_between_loss_and_restoration_do_not_count() {
        let mut outside = Outside::default();
        assert!(outside.is_decisive(1));
        outside.on_loss(10);
        outside.on_loss(14);
        assert!(outside.is_decisive(9) && !outside.is_decisive(10) && !outside.is_settled());
        outside.on_restored(14);
        assert!(!outside.is_settled(), "the last one is not among them");
        outside.on_restored(20);
        assert!(!outside.is_decisive(19) && outside.is_decisive(20) && outside.is_settled());
    }
}
