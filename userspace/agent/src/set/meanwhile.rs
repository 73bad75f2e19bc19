// SPDX-License-Identifier: GPL-2.0-only

//! What the set's thread does while it waits for its target in the middle of a batch or a handshake: it answers `dtloop`
//! and tells what it knows, as ever. A target that reads nothing holds records back, and nobody who asks.

use dtloop_abi::CaptureStream;
use dtloop_proto::Message;

use super::Worker;
use super::status::View;
use crate::link::Watcher;

/// See the module documentation. What requests change here are plans; nothing of a session that is under way.
pub(super) struct Meanwhile<'a> {
    worker: &'a mut Worker,
    stream: &'a dyn CaptureStream,
    session: Option<View>,
    /// What the hello under way says, or said.
    in_place: bool,
}

impl Worker {
    pub(super) fn meanwhile<'a>(
        &'a mut self,
        stream: &'a dyn CaptureStream,
        session: Option<View>,
    ) -> Meanwhile<'a> {
        Meanwhile {
            in_place: self.in_place,
            worker: self,
            stream,
            session,
        }
    }
}

impl Watcher for Meanwhile<'_> {
    fn heard(&mut self, message: &Message) {
        // That the target holds the set back, and why: the one who is to make room learns it only from here.
        if let Message::Notice(notice) = message {
            self.worker.on_notice(notice);
        }
    }

    fn goes_on(&mut self) -> bool {
        self.worker.take_commands(Some(self.stream));
        if self.worker.is_publication_due() {
            self.worker.publish(Some(self.stream), self.session);
        }
        // That choice goes with a new hello.
        !self.worker.shared.is_stopping() && self.worker.in_place == self.in_place
    }
}
