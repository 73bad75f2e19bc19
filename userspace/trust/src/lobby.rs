// SPDX-License-Identifier: GPL-2.0-only

//! Strangers at the door: connections whose peer has not yet shown that it is known. Each costs a thread and some memory, so
//! there are few of them, they have little time, and a new one may always come in: the oldest of the address that has most
//! has to go for it, so that a flood pushes out itself. Those who have made no sense yet go before those who have begun to
//! speak TLS: noise is cheap, and must not push out a source that shares its address.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

/// Most strangers at one time.
pub const STRANGERS_MAX: usize = 64;

/// Most of them from one address, or from one network of 64 bits with IPv6: nobody has less.
pub const STRANGERS_PER_ADDRESS_MAX: usize = 32;

/// Longest time until a peer has shown who it is and said hello.
pub const STRANGER_TIME_MAX: Duration = Duration::from_secs(10);

/// What of an address tells one person from another.
#[must_use]
pub fn origin(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
    }
}

struct Stranger {
    id: u64,
    origin: IpAddr,
    since: Duration,
    /// It has begun to speak the protocol.
    makes_sense: bool,
}

/// See the module documentation. Times are since any fixed moment.
#[derive(Default)]
pub struct Lobby {
    /// Oldest first.
    strangers: VecDeque<Stranger>,
}

impl Lobby {
    /// Somebody came. Whoever has to go for it, if anybody.
    pub fn enter(&mut self, id: u64, address: IpAddr, now: Duration) -> Option<u64> {
        let origin = origin(address);
        let gives_way = if self.count(origin) >= STRANGERS_PER_ADDRESS_MAX {
            Some(origin)
        } else if self.strangers.len() >= STRANGERS_MAX {
            self.busiest()
        } else {
            None
        };
        let is_its = |stranger: &Stranger| Some(stranger.origin) == gives_way;
        let is_noise = |stranger: &Stranger| is_its(stranger) && !stranger.makes_sense;
        let noise = self.strangers.iter().position(is_noise);
        let evicted = noise.or_else(|| self.strangers.iter().position(is_its));
        let evicted = evicted.and_then(|index| self.strangers.remove(index));
        self.strangers.push_back(Stranger {
            id,
            origin,
            since: now,
            makes_sense: false,
        });
        evicted.map(|stranger| stranger.id)
    }

    /// It has begun to speak the protocol.
    pub fn makes_sense(&mut self, id: u64) {
        let found = self.strangers.iter_mut().find(|stranger| stranger.id == id);
        if let Some(stranger) = found {
            stranger.makes_sense = true;
        }
    }

    fn count(&self, origin: IpAddr) -> usize {
        let its = |stranger: &&Stranger| stranger.origin == origin;
        self.strangers.iter().filter(its).count()
    }

    /// Where most come from.
    fn busiest(&self) -> Option<IpAddr> {
        let origins = self.strangers.iter().map(|stranger| stranger.origin);
        // Of several, the one whose first has waited longest.
        origins.rev().max_by_key(|origin| self.count(*origin))
    }

    /// It is no stranger any more, or has gone.
    pub fn leave(&mut self, id: u64) {
        self.strangers.retain(|stranger| stranger.id != id);
    }

    /// Those whose time is over; they are no longer counted.
    pub fn overdue(&mut self, now: Duration) -> Vec<u64> {
        let mut overdue = vec![];
        while let Some(oldest) = self.strangers.front() {
            if now.saturating_sub(oldest.since) < STRANGER_TIME_MAX {
                break;
            }
            overdue.extend(self.strangers.pop_front().map(|stranger| stranger.id));
        }
        overdue
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn one_address_cannot_fill_the_lobby() {
        let mut lobby = Lobby::default();
        assert_eq!(lobby.enter(100, v4(2), at(0)), None);
        for id in 0..32 {
            assert_eq!(lobby.enter(id, v4(1), at(0)), None);
        }
        // From now on it pushes out its own.
        for id in 32..90 {
            assert_eq!(lobby.enter(id, v4(1), at(0)), Some(id - 32));
        }
        assert_eq!(lobby.strangers.len(), 33);
    }

    #[test]
    fn noise_does_not_push_out_who_makes_sense() {
        let mut lobby = Lobby::default();
        lobby.enter(1000, v4(1), at(0));
        lobby.makes_sense(1000);
        for id in 0..500 {
            assert_ne!(lobby.enter(id, v4(1), at(1)), Some(1000));
        }
        // Where all make sense, the oldest goes all the same.
        for id in 500..532 {
            lobby.enter(id, v4(1), at(2));
            lobby.makes_sense(id);
        }
        assert_eq!(lobby.enter(600, v4(1), at(3)), Some(500));
    }

    #[test]
    fn a_newcomer_comes_in_even_when_many_addresses_fill_it() {
        let mut lobby = Lobby::default();
        for id in 0..64 {
            let last = u8::try_from(id).unwrap();
            assert_eq!(lobby.enter(id, v4(last), at(id)), None);
        }
        assert_eq!(lobby.enter(64, v4(200), at(64)), Some(0));
        lobby.leave(1);
        assert_eq!(lobby.enter(65, v4(201), at(64)), None);
        // Who has two goes before those who have one, even if these came first.
        assert_eq!(lobby.enter(66, v4(63), at(65)), Some(2));
        assert_eq!(lobby.enter(67, v4(202), at(65)), Some(63));
    }

    #[test]
    fn strangers_have_little_time() {
        let mut lobby = Lobby::default();
        lobby.enter(1, v4(1), at(0));
        lobby.enter(2, v4(1), at(5));
        assert!(lobby.overdue(at(9)).is_empty());
        assert_eq!(lobby.overdue(at(10)), [1]);
        lobby.leave(2);
        assert!(lobby.overdue(at(100)).is_empty());
    }

    #[test]
    fn an_ipv6_network_is_one_origin() {
        let address = |text: &str| origin(text.parse().unwrap());
        assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:1"));
        assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
        assert_eq!(address("::ffff:192.0.2.1"), v4(1));
    }
}
