// SPDX-License-Identifier: GPL-2.0-only

//! What is told to the source of a set, by whichever thread knows it.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Mutex, MutexGuard};

use dtloop_proto::message::{Ack, Notice, bounded_text};
use dtloop_proto::{Code, Message, frame};

use crate::transport::Connection;

/// Who may be held up by a disk, each for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// The session, which writes the journal.
    Journal,
    /// The applier, which writes volumes, staging area and state.
    Applier,
}

/// What holds the set up: one part may go on while another does not, and then the source is told what is left.
#[derive(Debug, Default)]
struct Complaints(BTreeMap<Part, Notice>);

impl Complaints {
    fn raise(&mut self, part: Part, code: Code, text: String) -> Notice {
        let text = bounded_text(text);
        let notice = Notice { code, text };
        self.0.insert(part, notice.clone());
        notice
    }

    /// What is to be told, if anything is.
    fn settle(&mut self, part: Part, text: &str) -> Option<Notice> {
        self.0.remove(&part)?;
        let well = || Notice {
            code: Code::OK,
            text: bounded_text(text.to_owned()),
        };
        Some(self.left().unwrap_or_else(well))
    }

    fn left(&self) -> Option<Notice> {
        self.0.values().next().cloned()
    }
}

#[derive(Default)]
struct Inner {
    complaints: Complaints,
    connection: Option<(Connection, u64)>,
    ack: Ack,
    buffer: Vec<u8>,
}

/// The way to the source, if it is connected, and how far the set is.
#[derive(Default)]
pub struct Outlet {
    inner: Mutex<Inner>,
}

impl Outlet {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // It is held while something is written to the connection.
        dtloop_runtime::lock(&self.inner)
    }

    /// Changes how far the set is.
    pub fn update(&self, change: impl FnOnce(&mut Ack)) {
        change(&mut self.inner().ack);
    }

    /// How far the set is.
    #[must_use]
    pub fn ack(&self) -> Ack {
        self.inner().ack
    }

    /// The source is connected.
    pub fn connect(&self, connection: Connection, session: u64) {
        let mut inner = self.inner();
        inner.connection = Some((connection, session));
        if let Some(notice) = inner.complaints.left() {
            inner.send(&Message::Notice(notice));
        }
    }

    /// It no longer is.
    pub fn disconnect(&self) {
        self.inner().connection = None;
    }

    /// Tells how far the set is.
    pub fn send_ack(&self) {
        let mut inner = self.inner();
        let ack = Message::Ack(inner.ack);
        inner.send(&ack);
    }

    /// A part of the set is held up. A source that comes later is told, too.
    pub fn complain(&self, part: Part, code: Code, text: String) {
        let mut inner = self.inner();
        let notice = inner.complaints.raise(part, code, text);
        inner.send(&Message::Notice(notice));
    }

    /// It no longer is; `text` says so, unless another part still is.
    pub fn relent(&self, part: Part, text: &str) {
        let mut inner = self.inner();
        if let Some(notice) = inner.complaints.settle(part, text) {
            inner.send(&Message::Notice(notice));
        }
    }

    /// Tells something else. Without a connection it is not told; what matters is in the welcome.
    pub fn send(&self, message: &Message) {
        self.inner().send(message);
    }
}

impl Inner {
    fn send(&mut self, message: &Message) {
        let Some((connection, session)) = &mut self.connection else {
            return;
        };
        self.buffer.clear();
        let sent = match frame::encode_message(&mut self.buffer, *session, 0, message) {
            Ok(()) => connection.write_all(&self.buffer).is_ok(),
            Err(error) => {
                tracing::error!("A message could not be encoded: {error}.");
                false
            }
        };
        if !sent {
            // The session's thread notices and ends.
            connection.shutdown();
            self.connection = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_until_it_is_gone_whatever_else_goes_on() {
        let mut complaints = Complaints::default();
        assert_eq!(complaints.settle(Part::Journal, "well"), None);
        complaints.raise(Part::Journal, Code::JOURNAL_IO, "journal".into());
        complaints.raise(Part::Applier, Code::VOLUME_IO, "volume".into());
        let told = complaints.settle(Part::Applier, "well").unwrap();
        assert_eq!((told.code, &*told.text), (Code::JOURNAL_IO, "journal"));
        assert_eq!(complaints.left(), Some(told));
        let told = complaints.settle(Part::Journal, "well").unwrap();
        assert_eq!((told.code, &*told.text), (Code::OK, "well"));
        assert_eq!(complaints.left(), None);
    }
}
