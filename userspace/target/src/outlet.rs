// SPDX-License-Identifier: GPL-2.0-only

//! What is told to the source of a set, by whichever thread knows it.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use dtloop_proto::message::Ack;
use dtloop_proto::{Message, frame};

use crate::transport::Connection;

#[derive(Default)]
struct Inner {
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
        // A panic cannot leave it half changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
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
        self.inner().connection = Some((connection, session));
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
