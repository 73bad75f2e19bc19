// SPDX-License-Identifier: GPL-2.0-only

//! Continuity of the record sequence on the target. A missing record is never passed over.

/// What to do with a record that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It is the one expected.
    Next,
    /// It was received before; skip it.
    Duplicate,
}

/// Records are missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Records {expected} to {last} are missing: {found} arrived next", last = found - 1)]
pub struct Hole {
    /// The first one missing.
    pub expected: u64,
    /// The one that arrived.
    pub found: u64,
}

/// Watches the sequence numbers of one stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sequencer {
    next: u64,
}

impl Sequencer {
    /// Expects `next`.
    #[must_use]
    pub fn new(next: u64) -> Self {
        Self { next }
    }

    /// The number expected next.
    #[must_use]
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Takes note of a record.
    ///
    /// # Errors
    ///
    /// [`Hole`] if records are missing before it; nothing changes then.
    pub fn arrive(&mut self, seq: u64) -> Result<Arrival, Hole> {
        if seq > self.next {
            return Err(Hole {
                expected: self.next,
                found: seq,
            });
        }
        if seq < self.next {
            return Ok(Arrival::Duplicate);
        }
        self.next += 1;
        Ok(Arrival::Next)
    }

    /// Takes note of a marker: its position cannot lie ahead.
    ///
    /// # Errors
    ///
    /// [`Hole`] if records are missing before it.
    pub fn marker(&self, position: u64) -> Result<(), Hole> {
        if position > self.next {
            return Err(Hole {
                expected: self.next,
                found: position,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_record_names_the_hole() {
        let mut sequence = Sequencer::new(5);
        assert_eq!(sequence.arrive(5), Ok(Arrival::Next));
        assert_eq!(sequence.arrive(5), Ok(Arrival::Duplicate));
        let hole = sequence.arrive(9).unwrap_err();
        assert_eq!(
            hole,
            Hole {
                expected: 6,
                found: 9
            }
        );
        assert_eq!(
            hole.to_string(),
            "Records 6 to 8 are missing: 9 arrived next"
        );
        assert_eq!(
            sequence.arrive(6),
            Ok(Arrival::Next),
            "a hole changes nothing"
        );
        assert_eq!(sequence.marker(7), Ok(()));
        assert!(sequence.marker(8).is_err());
    }
}
