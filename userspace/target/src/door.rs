// SPDX-License-Identifier: GPL-2.0-only

//! The door: connections that have not said hello yet.
//!
//! Anybody who reaches the port can open connections and stay silent. So only few wait at a time, and nobody who wants to
//! come in is turned away for them: one more pushes out another one, the oldest of the address that has most of them
//! waiting. A flood thereby pushes out itself. What is logged about visitors is bounded, too.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most connections that wait at a time. A handshake takes milliseconds, so that is many.
const WAITING_MAX: usize = 64;

/// Most complaints about visitors in [`COMPLAINTS_EVERY`]; the rest is only counted.
const COMPLAINTS_MAX: u32 = 20;

/// See [`COMPLAINTS_MAX`].
const COMPLAINTS_EVERY: Duration = Duration::from_secs(60);

/// See the module documentation.
#[derive(Debug, Default)]
pub struct Door {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Oldest first.
    waiting: Vec<Visitor>,
    next: u64,
    complaints: Complaints,
}

#[derive(Debug)]
struct Visitor {
    number: u64,
    address: IpAddr,
    stream: TcpStream,
}

/// A visitor's place at the door, until it has said hello or is gone.
#[derive(Debug)]
pub struct Place {
    door: Arc<Door>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.door.lock();
        inner
            .waiting
            .retain(|visitor| visitor.number != self.number);
    }
}

impl Door {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a visitor in; another one may have to go for it.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn enter(self: &Arc<Self>, stream: &TcpStream) -> io::Result<Place> {
        let address = stream.peer_addr()?.ip();
        let stream = stream.try_clone()?;
        let mut inner = self.lock();
        if inner.waiting.len() >= WAITING_MAX {
            let addresses: Vec<IpAddr> = inner
                .waiting
                .iter()
                .map(|visitor| visitor.address)
                .collect();
            if let Some(index) = gives_way(&addresses) {
                let visitor = inner.waiting.remove(index);
                // Its thread notices. It may have gone already.
                let _ = visitor.stream.shutdown(Shutdown::Both);
            }
        }
        let number = inner.next;
        inner.next += 1;
        inner.waiting.push(Visitor {
            number,
            address,
            stream,
        });
        Ok(Place {
            door: Arc::clone(self),
            number,
        })
    }

    /// Logs something about a visitor, unless too much was said about others already.
    pub fn complain(&self, text: &str) {
        let said = self.lock().complaints.enter(Instant::now());
        match said {
            Said::Nothing => {}
            Said::This => tracing::warn!("{text}"),
            Said::AfterMore(more) => {
                tracing::warn!("{text} There were {more} more like this before.");
            }
        }
    }
}

/// Who goes when one more comes: the oldest of the address that has most.
fn gives_way(waiting: &[IpAddr]) -> Option<usize> {
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    for address in waiting {
        *counts.entry(*address).or_default() += 1;
    }
    let most = counts.values().max()?;
    waiting
        .iter()
        .position(|address| counts.get(address) == Some(most))
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
    fn a_flood_pushes_out_itself() {
        let (good, bad) = (IpAddr::from([192, 0, 2, 1]), IpAddr::from([192, 0, 2, 66]));
        assert_eq!(gives_way(&[]), None);
        assert_eq!(gives_way(&[good, bad, good, bad, bad]), Some(1));
        assert_eq!(gives_way(&[good]), Some(0));
        let mut waiting = vec![good];
        for _ in 0..1000 {
            if waiting.len() >= WAITING_MAX {
                waiting.remove(gives_way(&waiting).unwrap());
            }
            waiting.push(bad);
        }
        assert_eq!(waiting.len(), WAITING_MAX);
        assert_eq!(waiting[0], good);
    }

    #[test]
    fn complaints_are_bounded_and_counted() {
        let begin = Instant::now();
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
