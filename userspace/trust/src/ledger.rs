// SPDX-License-Identifier: GPL-2.0-only

//! What a target knows: its sources, its open invitations, and every decision about them. No clock: times are given, in
//! seconds since 1970.
//!
//! An invitation and the sources are kept in one file, so that the use of a token and the source that comes of it are one
//! durable write: there is no moment at which a token is used and nobody paired, or somebody paired and the token still
//! good for another.
//!
//! ```text
//!            invite                 right token                     its time is over
//!  nothing ----------> open ------------------------> used by K ----------------------> forgotten
//!                        |  \  wrong token, WRONG_MAX times
//!                        |   +----------------------------------------------------> forgotten
//!                        +------------------ its time is over ---------------------> forgotten
//! ```
//!
//! A used invitation is remembered until its time is over, so that the same source, and no other, can ask again when the
//! answer was lost on the way.

use dtloop_proto::Uuid;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

use crate::code::Token;
use crate::key::{Pin, sha256};

/// Most invitations at one time: each is a door that is ajar.
pub const INVITATIONS_MAX: usize = 16;

/// Most sources: far above what one target serves.
pub const PEERS_MAX: usize = 1024;

/// Wrong tokens after which an invitation is void. A person who types a code wrong is told so by its check characters before
/// anything is sent, so these are no mistakes.
pub const WRONG_MAX: u32 = 5;

/// Longest life of an invitation, in seconds.
pub const LIFETIME_S_MAX: u64 = 7 * 24 * 3600;

/// A clock that goes back by no more than this makes no new invitation look as if it came from the future.
const CLOCK_SLACK_S: u64 = 60;

/// A source that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its name, for people.
    pub name: String,
    /// Its key.
    pub pin: Pin,
    /// The source that uses this key, in its textual form; none before its first session.
    pub source_id: Option<String>,
    /// When it was paired.
    pub paired_unix_s: u64,
}

/// An invitation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Invitation {
    /// Which one a token is about.
    id: u32,
    /// SHA-256 of the token: the file alone opens nothing.
    token: Pin,
    /// The name the source gets; none: the one it proposes.
    name: Option<String>,
    made_unix_s: u64,
    expires_unix_s: u64,
    /// Wrong tokens so far.
    wrong: u32,
    /// Who has used it.
    used_by: Option<Pin>,
}

impl Invitation {
    fn is_current(&self, now_s: u64) -> bool {
        now_s < self.expires_unix_s && now_s + CLOCK_SLACK_S >= self.made_unix_s
    }
}

/// Why no invitation is made.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InviteError {
    /// The name has not the form of names.
    #[error("The name \"{0}\" is not 1 to 63 characters of A-Z a-z 0-9 _ . -")]
    Name(String),
    /// It belongs to a source.
    #[error("A source named \"{0}\" is paired already; revoke it first, or choose another name")]
    Taken(String),
    /// The lifetime makes no sense.
    #[error("An invitation is good for 1 s to 7 days, not for {0} s")]
    Lifetime(u64),
    /// There are many already.
    #[error("{INVITATIONS_MAX} invitations are open; wait until one expires, or withdraw them")]
    Many,
    /// An open invitation has the same number, which happens once in many thousand times.
    #[error("The invitation could not be numbered; try again")]
    Number,
}

/// Why a pairing is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PairError {
    /// For whoever has no right token, this and nothing else, whatever the cause.
    #[error(
        "The target does not take this code: it is wrong, used or expired; run \"dttarget invite\" there for a new one"
    )]
    Code,
    /// The token was right, but the name is another's. The invitation stays open.
    #[error(
        "The target knows another source named \"{0}\"; run \"dttarget revoke {0}\" there if it is gone, or invite with another --name"
    )]
    Taken(String),
    /// The token was right, but the target knows very many sources.
    #[error("The target knows {PEERS_MAX} sources; revoke some there")]
    Full,
}

/// Why a source is refused although its key is known.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BindError {
    /// The key was revoked meanwhile.
    #[error("This source is not paired with the target")]
    Unknown,
    /// Another key speaks for that source.
    #[error(
        "Source {source_id} belongs to the key of \"{owner}\", and this is the key of \"{name}\"; if \"{name}\" is the same machine with a new key, run \"dttarget revoke {owner}\" on the target"
    )]
    Foreign {
        /// As said in the hello.
        source_id: String,
        /// Whose it is.
        owner: String,
        /// Who asked.
        name: String,
    },
    /// This key speaks for another source.
    #[error(
        "The key of \"{name}\" belongs to source {bound}, and it says it is source {source_id}: its state was lost or comes from another machine; restore it, or run \"dttarget revoke {name}\" on the target and pair again"
    )]
    Another {
        /// Who asked.
        name: String,
        /// What it was.
        bound: String,
        /// What it says now.
        source_id: String,
    },
}

/// What came of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pairing {
    /// The answer.
    pub outcome: Result<String, PairError>,
    /// The ledger has changed and must be durable before the answer is given.
    pub changed: bool,
    /// An invitation became void by this.
    pub voided: bool,
}

/// See the module documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    peers: Vec<Peer>,
    invitations: Vec<Invitation>,
}

impl Ledger {
    /// The sources, in the order in which they were paired.
    #[must_use]
    pub fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// The source with this key.
    #[must_use]
    pub fn peer(&self, pin: &Pin) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.pin == *pin)
    }

    /// When each open invitation ends, in seconds since 1970.
    #[must_use]
    pub fn open_invitations(&self, now_s: u64) -> Vec<u64> {
        let open = self
            .invitations
            .iter()
            .filter(|item| item.used_by.is_none() && item.is_current(now_s));
        open.map(|item| item.expires_unix_s).collect()
    }

    /// Withdraws all open invitations; how many there were.
    pub fn withdraw(&mut self, now_s: u64) -> usize {
        let open = self.open_invitations(now_s).len();
        self.invitations.clear();
        open
    }

    fn tidy(&mut self, now_s: u64) {
        self.invitations.retain(|item| item.is_current(now_s));
    }

    /// Opens an invitation for whoever brings the token within `lifetime_s` seconds.
    ///
    /// # Errors
    ///
    /// Why it cannot be.
    pub fn invite(
        &mut self,
        now_s: u64,
        token: &Token,
        name: Option<&str>,
        lifetime_s: u64,
    ) -> Result<(), InviteError> {
        self.tidy(now_s);
        if let Some(name) = name {
            if !dtloop_proto::message::is_name(name) {
                return Err(InviteError::Name(name.to_owned()));
            }
            if self.peers.iter().any(|peer| peer.name == name) {
                return Err(InviteError::Taken(name.to_owned()));
            }
        }
        if !(1..=LIFETIME_S_MAX).contains(&lifetime_s) {
            return Err(InviteError::Lifetime(lifetime_s));
        }
        if self.open_invitations(now_s).len() >= INVITATIONS_MAX {
            return Err(InviteError::Many);
        }
        let id = token.invitation();
        if self.invitations.iter().any(|item| item.id == id) {
            return Err(InviteError::Number);
        }
        self.invitations.push(Invitation {
            id,
            token: Pin::of(&token.0),
            name: name.map(str::to_owned),
            made_unix_s: now_s,
            expires_unix_s: now_s + lifetime_s,
            wrong: 0,
            used_by: None,
        });
        Ok(())
    }

    /// Somebody with the key `pin` brings a token, and proposes a name for itself.
    pub fn pair(&mut self, now_s: u64, token: &Token, pin: Pin, proposed: &str) -> Pairing {
        let refused = |error, changed, voided| Pairing {
            outcome: Err(error),
            changed,
            voided,
        };
        let id = token.invitation();
        let found = self
            .invitations
            .iter()
            .position(|item| item.id == id && item.is_current(now_s));
        let Some(index) = found else {
            return refused(PairError::Code, false, false);
        };
        let invitation = &mut self.invitations[index];
        let right: bool = invitation
            .token
            .prefix::<32>()
            .ct_eq(&sha256(&token.0))
            .into();
        if !right {
            invitation.wrong += 1;
            let voided = invitation.wrong >= WRONG_MAX;
            if voided {
                self.invitations.remove(index);
            }
            return refused(PairError::Code, true, voided);
        }
        match invitation.used_by {
            Some(user) if user == pin => {
                // The answer was lost. If it was revoked since, it stays revoked.
                let peer = self.peers.iter().find(|peer| peer.pin == pin);
                return Pairing {
                    outcome: peer.map(|peer| peer.name.clone()).ok_or(PairError::Code),
                    changed: false,
                    voided: false,
                };
            }
            Some(_) => return refused(PairError::Code, false, false),
            None => {}
        }
        let name = invitation.name.as_deref().unwrap_or(proposed).to_owned();
        let is_taken = |peer: &Peer| peer.name == name && peer.pin != pin;
        if self.peers.iter().any(is_taken) {
            return refused(PairError::Taken(name), false, false);
        }
        match self.peers.iter().position(|peer| peer.pin == pin) {
            Some(known) => self.peers[known].name.clone_from(&name),
            None if self.peers.len() >= PEERS_MAX => {
                return refused(PairError::Full, false, false);
            }
            None => self.peers.push(Peer {
                name: name.clone(),
                pin,
                source_id: None,
                paired_unix_s: now_s,
            }),
        }
        self.invitations[index].used_by = Some(pin);
        Pairing {
            outcome: Ok(name),
            changed: true,
            voided: false,
        }
    }

    /// The source with the key `pin` says who it is. One key speaks for one source, and one source has one key; the first
    /// time decides. True: the ledger has changed and must be durable before the source is served.
    ///
    /// # Errors
    ///
    /// Why it is refused.
    pub fn bind(&mut self, pin: &Pin, source_id: Uuid) -> Result<bool, BindError> {
        let source_id = source_id.to_string();
        let peer = self.peer(pin).ok_or(BindError::Unknown)?.clone();
        match &peer.source_id {
            Some(bound) if *bound == source_id => return Ok(false),
            Some(bound) => {
                return Err(BindError::Another {
                    name: peer.name,
                    bound: bound.clone(),
                    source_id,
                });
            }
            None => {}
        }
        let owner = self
            .peers
            .iter()
            .find(|other| other.source_id.as_deref() == Some(&source_id));
        if let Some(owner) = owner {
            return Err(BindError::Foreign {
                source_id,
                owner: owner.name.clone(),
                name: peer.name,
            });
        }
        for peer in self.peers.iter_mut().filter(|peer| peer.pin == *pin) {
            peer.source_id = Some(source_id.clone());
        }
        Ok(true)
    }

    /// Forgets a source, and that it used an invitation.
    pub fn revoke(&mut self, name: &str) -> Option<Peer> {
        let index = self.peers.iter().position(|peer| peer.name == name)?;
        Some(self.peers.remove(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_800_000_000;

    fn pin(seed: u8) -> Pin {
        Pin::of(&[seed])
    }

    fn token(seed: u8) -> Token {
        Token([seed, 0, 0, 0, 0, 0, 0, 0, 0, seed])
    }

    /// The same invitation, another secret.
    fn guess(seed: u8, guess: u8) -> Token {
        let mut token = token(seed);
        token.0[9] ^= guess;
        token
    }

    fn invited(seed: u8) -> Ledger {
        let mut ledger = Ledger::default();
        ledger.invite(NOW, &token(seed), None, 900).unwrap();
        ledger
    }

    #[test]
    fn a_token_is_good_once() {
        let mut ledger = invited(1);
        let paired = ledger.pair(NOW + 1, &token(1), pin(1), "alpha");
        assert_eq!((paired.outcome, paired.changed), (Ok("alpha".into()), true));
        assert_eq!(ledger.peer(&pin(1)).unwrap().name, "alpha");
        // Another with the same token is refused, the same one gets its answer again.
        let before = ledger.clone();
        assert_eq!(
            ledger.pair(NOW + 2, &token(1), pin(2), "beta").outcome,
            Err(PairError::Code)
        );
        let again = ledger.pair(NOW + 2, &token(1), pin(1), "gamma");
        assert_eq!((again.outcome, again.changed), (Ok("alpha".into()), false));
        assert_eq!(ledger, before);
        assert!(ledger.peer(&pin(2)).is_none());
    }

    #[test]
    fn of_two_racing_sources_one_wins() {
        for order in [[1, 2], [2, 1]] {
            let mut ledger = invited(1);
            let outcomes = order.map(|source| {
                ledger
                    .pair(NOW, &token(1), pin(source), "x")
                    .outcome
                    .is_ok()
            });
            assert_eq!(outcomes, [true, false]);
            assert_eq!(ledger.peers().len(), 1);
        }
    }

    #[test]
    fn a_token_expires() {
        let mut ledger = invited(1);
        assert_eq!(ledger.open_invitations(NOW + 899), [NOW + 900]);
        assert_eq!(
            ledger.pair(NOW + 900, &token(1), pin(1), "a").outcome,
            Err(PairError::Code)
        );
        // Nor is it good again when the clock is set back behind its making.
        assert_eq!(
            ledger.pair(NOW - 61, &token(1), pin(1), "a").outcome,
            Err(PairError::Code)
        );
        assert!(ledger.open_invitations(NOW + 900).is_empty());
        assert!(
            ledger
                .clone()
                .pair(NOW - 60, &token(1), pin(1), "a")
                .outcome
                .is_ok()
        );
        assert!(
            ledger
                .pair(NOW + 899, &token(1), pin(1), "a")
                .outcome
                .is_ok()
        );
    }

    #[test]
    fn a_used_token_is_no_use_after_its_time_nor_after_a_revocation() {
        let mut ledger = invited(1);
        ledger.pair(NOW, &token(1), pin(1), "a").outcome.unwrap();
        assert_eq!(ledger.revoke("a").unwrap().pin, pin(1));
        assert_eq!(
            ledger.pair(NOW + 1, &token(1), pin(1), "a").outcome,
            Err(PairError::Code)
        );
        assert!(ledger.revoke("a").is_none());
        assert!(ledger.peers().is_empty());
    }

    #[test]
    fn wrong_tokens_make_an_invitation_void() {
        let mut ledger = invited(1);
        ledger.invite(NOW, &token(2), None, 900).unwrap();
        for wrong in 1..=5 {
            let pairing = ledger.pair(NOW, &guess(1, wrong), pin(9), "x");
            assert_eq!(pairing.outcome, Err(PairError::Code));
            assert_eq!((pairing.changed, pairing.voided), (true, wrong == 5));
        }
        assert_eq!(
            ledger.pair(NOW, &token(1), pin(1), "a").outcome,
            Err(PairError::Code)
        );
        // The other invitation is not hurt, and a token of none costs no write.
        assert!(!ledger.pair(NOW, &token(7), pin(9), "x").changed);
        assert!(ledger.pair(NOW, &token(2), pin(1), "a").outcome.is_ok());
    }

    #[test]
    fn names_are_unique_and_a_taken_one_does_not_use_the_token_up() {
        let mut ledger = invited(1);
        ledger.pair(NOW, &token(1), pin(1), "a").outcome.unwrap();
        assert_eq!(
            ledger.invite(NOW, &token(2), Some("a"), 60),
            Err(InviteError::Taken("a".into()))
        );
        ledger.invite(NOW, &token(2), None, 60).unwrap();
        let pairing = ledger.pair(NOW, &token(2), pin(2), "a");
        assert_eq!(
            (pairing.outcome, pairing.changed),
            (Err(PairError::Taken("a".into())), false)
        );
        assert_eq!(
            ledger.pair(NOW, &token(2), pin(2), "b").outcome,
            Ok("b".into())
        );
        // The name of the invitation goes before the one proposed, and a known key gets a new name.
        ledger.invite(NOW, &token(3), Some("c"), 60).unwrap();
        assert_eq!(
            ledger.pair(NOW, &token(3), pin(2), "d").outcome,
            Ok("c".into())
        );
        assert_eq!(ledger.peers().len(), 2);
    }

    #[test]
    fn invitations_have_limits() {
        let mut ledger = Ledger::default();
        assert!(matches!(
            ledger.invite(NOW, &token(1), Some("a b"), 60),
            Err(InviteError::Name(_))
        ));
        for lifetime in [0, LIFETIME_S_MAX + 1] {
            assert_eq!(
                ledger.invite(NOW, &token(1), None, lifetime),
                Err(InviteError::Lifetime(lifetime))
            );
        }
        for seed in 0..16 {
            ledger.invite(NOW, &token(seed), None, 60).unwrap();
        }
        assert_eq!(
            ledger.invite(NOW, &token(16), None, 60),
            Err(InviteError::Many)
        );
        // Those whose time is over do not count.
        ledger.invite(NOW + 60, &token(16), None, 60).unwrap();
        assert_eq!(
            ledger.invite(NOW + 60, &guess(16, 1), None, 60),
            Err(InviteError::Number)
        );
        assert_eq!(ledger.withdraw(NOW + 60), 1);
        assert_eq!(
            ledger.pair(NOW + 60, &token(16), pin(1), "a").outcome,
            Err(PairError::Code)
        );
    }

    #[test]
    fn one_key_speaks_for_one_source() {
        let mut ledger = invited(1);
        ledger.invite(NOW, &token(2), None, 900).unwrap();
        ledger.pair(NOW, &token(1), pin(1), "a").outcome.unwrap();
        ledger.pair(NOW, &token(2), pin(2), "b").outcome.unwrap();
        let (first, second) = (Uuid([1; 16]), Uuid([2; 16]));
        assert_eq!(ledger.bind(&pin(1), first), Ok(true));
        assert_eq!(ledger.bind(&pin(1), first), Ok(false));
        assert!(
            matches!(ledger.bind(&pin(2), first), Err(BindError::Foreign { owner, .. }) if owner == "a")
        );
        assert!(matches!(
            ledger.bind(&pin(1), second),
            Err(BindError::Another { .. })
        ));
        assert_eq!(ledger.bind(&pin(3), second), Err(BindError::Unknown));
        // A machine with a new key takes its sets along once the old key is revoked.
        ledger.revoke("a").unwrap();
        assert_eq!(ledger.bind(&pin(2), first), Ok(true));
    }
}
