// SPDX-License-Identifier: GPL-2.0-only

//! The source's side of a session: where it resumes, what was acknowledged, what may be released.
//!
//! The ring is the queue: records stay in it until the target holds them durably, so whatever a
//! cut connection lost is sent again from there, beginning at the target's last durable record.

use dtloop_proto::Uuid;
use dtloop_proto::message::{Ack, Welcome};

/// The target said something that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SessionError {
    /// It chose a version that was not offered.
    #[error("The target chose protocol version {0}, which was not offered")]
    Version(u16),
    /// It claims records that were never made.
    #[error("The target claims record {durable}, but only those below {next} were made")]
    Ahead {
        /// What it claims.
        durable: u64,
        /// What was made.
        next: u64,
    },
    /// It acknowledged a record that was not sent.
    #[error("The target acknowledged record {acked}, but only those below {sent} were sent")]
    Unsent {
        /// What it acknowledged.
        acked: u64,
        /// What was sent.
        sent: u64,
    },
    /// It took back an acknowledgement.
    #[error("The target acknowledged record {before} and then only {after}")]
    Backwards {
        /// First.
        before: u64,
        /// Then.
        after: u64,
    },
}

/// How the target received the set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resumed {
    /// It holds everything up to where the session goes on.
    Continues,
    /// It did not know the stream: what its volumes hold has no relation to it.
    NewStream,
    /// Records are missing that the source no longer has.
    Hole {
        /// The first one missing.
        from: u64,
        /// The first one the source has.
        to: u64,
    },
}

/// A session that the target has welcomed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourceSession {
    next_to_send: u64,
    ack: Ack,
}

impl SourceSession {
    /// Begins with the target's welcome to a hello that offered `stream_uuid` and the records
    /// `first_seq..next_seq`.
    ///
    /// # Errors
    ///
    /// If the welcome cannot be.
    pub fn begin(
        welcome: &Welcome,
        stream_uuid: Uuid,
        first_seq: u64,
        next_seq: u64,
    ) -> Result<(Self, Resumed), SessionError> {
        if !(dtloop_proto::VERSION_MIN..=dtloop_proto::VERSION_MAX).contains(&welcome.version) {
            return Err(SessionError::Version(welcome.version));
        }
        let durable = welcome.durable_seq;
        if durable >= next_seq {
            return Err(SessionError::Ahead {
                durable,
                next: next_seq,
            });
        }
        let resumed = if welcome.known_stream != stream_uuid {
            Resumed::NewStream
        } else if durable + 1 < first_seq {
            Resumed::Hole {
                from: durable + 1,
                to: first_seq,
            }
        } else {
            Resumed::Continues
        };
        let durable_seq = durable.max(first_seq - 1);
        let ack = Ack {
            durable_seq,
            applied_seq: welcome.applied_seq.min(durable_seq),
            checkpoint_seq: 0,
            journal_bytes: 0,
        };
        Ok((
            Self {
                next_to_send: durable_seq + 1,
                ack,
            },
            resumed,
        ))
    }

    /// The next record to be sent.
    #[must_use]
    pub fn next_to_send(&self) -> u64 {
        self.next_to_send
    }

    /// Records below this are on their way.
    pub fn on_sent(&mut self, next: u64) {
        debug_assert!(next >= self.next_to_send);
        self.next_to_send = next;
    }

    /// Takes note of an acknowledgement.
    ///
    /// # Errors
    ///
    /// If it cannot be.
    pub fn on_ack(&mut self, ack: &Ack) -> Result<(), SessionError> {
        if ack.durable_seq >= self.next_to_send {
            return Err(SessionError::Unsent {
                acked: ack.durable_seq,
                sent: self.next_to_send,
            });
        }
        if ack.durable_seq < self.ack.durable_seq {
            return Err(SessionError::Backwards {
                before: self.ack.durable_seq,
                after: ack.durable_seq,
            });
        }
        self.ack = *ack;
        Ok(())
    }

    /// Last acknowledgement.
    #[must_use]
    pub fn ack(&self) -> &Ack {
        &self.ack
    }

    /// Records below this are durable on the target and may be overwritten.
    #[must_use]
    pub fn releasable(&self) -> u64 {
        self.ack.durable_seq + 1
    }

    /// Records that were sent and are not acknowledged.
    #[must_use]
    pub fn in_flight(&self) -> u64 {
        self.next_to_send - self.releasable()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: Uuid = Uuid([1; 16]);

    fn welcome(known: Uuid, durable_seq: u64) -> Welcome {
        Welcome {
            version: 1,
            software: String::new(),
            target_id: Uuid([3; 16]),
            session: 1,
            known_stream: known,
            durable_seq,
            applied_seq: durable_seq,
            lost_from: 0,
            lost_last: 0,
            volumes: vec![],
            options: vec![],
        }
    }

    #[test]
    fn resumes_behind_the_last_durable_record() {
        let begin = |known, durable| SourceSession::begin(&welcome(known, durable), STREAM, 5, 20);
        let (session, resumed) = begin(STREAM, 9).unwrap();
        assert_eq!((session.next_to_send(), resumed), (10, Resumed::Continues));
        assert_eq!(session.releasable(), 10);
        let (session, resumed) = begin(Uuid::NONE, 4).unwrap();
        assert_eq!((session.next_to_send(), resumed), (5, Resumed::NewStream));
        let (session, resumed) = begin(STREAM, 2).unwrap();
        assert_eq!(
            (session.next_to_send(), resumed),
            (5, Resumed::Hole { from: 3, to: 5 })
        );
        assert_eq!(
            begin(STREAM, 20).unwrap_err(),
            SessionError::Ahead {
                durable: 20,
                next: 20
            }
        );
    }

    #[test]
    fn impossible_acknowledgements_are_refused() {
        let (mut session, _) = SourceSession::begin(&welcome(STREAM, 4), STREAM, 5, 20).unwrap();
        session.on_sent(8);
        let ack = |durable_seq| Ack {
            durable_seq,
            ..Ack::default()
        };
        assert_eq!(session.on_ack(&ack(7)), Ok(()));
        assert_eq!((session.releasable(), session.in_flight()), (8, 0));
        assert_eq!(
            session.on_ack(&ack(8)),
            Err(SessionError::Unsent { acked: 8, sent: 8 })
        );
        assert_eq!(
            session.on_ack(&ack(6)),
            Err(SessionError::Backwards {
                before: 7,
                after: 6
            })
        );
    }
}
