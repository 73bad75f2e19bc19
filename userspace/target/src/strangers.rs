// SPDX-License-Identifier: GPL-2.0-only

//! Connections whose peer has not yet shown that it is known. What decides about them is `dtloop_trust::lobby`; this holds
//! their sockets and the clock.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use dtloop_runtime::TcpStream;
use dtloop_trust::lobby::Lobby;

/// Most complaints about strangers in [`COMPLAINTS_EVERY`]; the rest is only counted.
const COMPLAINTS_MAX: u32 = 20;

/// See [`COMPLAINTS_MAX`].
const COMPLAINTS_EVERY: Duration = Duration::from_secs(60);

struct Inner {
    lobby: Lobby,
    sockets: HashMap<u64, TcpStream>,
    next: u64,
    complaints: Complaints,
}

/// See the module documentation.
pub struct Strangers {
    began: Instant,
    inner: Mutex<Inner>,
}

/// Held as long as a peer is a stranger.
pub struct Ticket {
    strangers: Arc<Strangers>,
    id: u64,
}

impl Ticket {
    /// It has begun to speak the protocol: those who have not go before it.
    pub fn makes_sense(&self) {
        self.strangers.inner().lobby.makes_sense(self.id);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut inner = self.strangers.inner();
        inner.lobby.leave(self.id);
        inner.sockets.remove(&self.id);
    }
}

impl Default for Strangers {
    fn default() -> Self {
        Self {
            began: dtloop_runtime::now(),
            inner: Mutex::new(Inner {
                lobby: Lobby::default(),
                sockets: HashMap::new(),
                next: 0,
                complaints: Complaints::default(),
            }),
        }
    }
}

impl Strangers {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Somebody came. If there are too many, the one who has waited longest goes.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn enter(self: &Arc<Self>, stream: &TcpStream, peer: SocketAddr) -> io::Result<Ticket> {
        let socket = stream.try_clone()?;
        let now = dtloop_runtime::elapsed(self.began);
        let mut inner = self.inner();
        let id = inner.next;
        inner.next += 1;
        let evicted = inner.lobby.enter(id, peer.ip(), now);
        inner.sockets.insert(id, socket);
        evicted.into_iter().for_each(|id| inner.send_away(id));
        Ok(Ticket {
            strangers: Arc::clone(self),
            id,
        })
    }

    /// Sends those away whose time is over.
    pub fn sweep(&self) {
        let now = dtloop_runtime::elapsed(self.began);
        let mut inner = self.inner();
        for id in inner.lobby.overdue(now) {
            inner.send_away(id);
        }
    }

    /// Logs why a stranger was turned away, as [`Strangers::complain`].
    pub fn log(&self, peer: SocketAddr, what: &dyn std::fmt::Display) {
        self.complain(&format!("{peer} was turned away: {what}."));
    }

    /// Logs something about a stranger, unless too much was said about others already.
    pub fn complain(&self, text: &str) {
        let said = self.inner().complaints.enter(dtloop_runtime::now());
        match said {
            Said::Nothing => {}
            Said::This => tracing::warn!("{text}"),
            Said::AfterMore(more) => {
                tracing::warn!("{text} There were {more} more like this before.");
            }
        }
    }
}

impl Inner {
    /// Its thread comes back from whatever it waits for, and ends.
    fn send_away(&mut self, id: u64) {
        if let Some(socket) = self.sockets.remove(&id) {
            // It may have ended already, which is as good.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

/// How much was said.
#[derive(Debug, Default)]
struct Complaints {
    since: Option<Instant>,
    said: u32,
    silent: u64,
}

/// What to say.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Nothing,
    This,
    AfterMore(u64),
}

impl Complaints {
    fn enter(&mut self, now: Instant) -> Said {
        if self
            .since
            .is_none_or(|since| now.saturating_duration_since(since) >= COMPLAINTS_EVERY)
        {
            self.since = Some(now);
            self.said = 0;
        }
        if self.said == COMPLAINTS_MAX {
            self.silent += 1;
            return Said::Nothing;
        }
        self.said += 1;
        match std::mem::take(&mut self.silent) {
            0 => Said::This,
            more => Said::AfterMore(more),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn complaints_are_bounded_and_counted() {
        let begin = dtloop_runtime::now();
        let mut complaints = Complaints::default();
        for _ in 0..COMPLAINTS_MAX {
            assert_eq!(complaints.enter(begin), Said::This);
        }
        for _ in 0..500 {
            assert_eq!(complaints.enter(begin), Said::Nothing);
        }
        let later = begin + COMPLAINTS_EVERY;
        assert_eq!(complaints.enter(later), Said::AfterMore(500));
        assert_eq!(complaints.enter(later), Said::This);
    }
}
