// SPDX-License-Identifier: GPL-2.0-only

//! What a source knows: which key each target has.

use serde::{Deserialize, Serialize};

use crate::key::Pin;

/// A target that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Target {
    /// Address and port, as in the configuration of a set.
    pub address: String,
    /// Its key.
    pub pin: Pin,
    /// The name under which it knows this source.
    pub known_as: String,
    /// When it was paired, in seconds since 1970.
    pub paired_unix_s: u64,
}

/// See the module documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Targets {
    targets: Vec<Target>,
    /// See [`Targets::changes`].
    #[serde(default)]
    changes: u64,
}

/// An address as it is compared: names of hosts have no case.
#[must_use]
pub fn normal(address: &str) -> String {
    address.trim().to_ascii_lowercase()
}

impl Targets {
    /// All of them, by address.
    #[must_use]
    pub fn all(&self) -> &[Target] {
        &self.targets
    }

    /// How often something was changed here: who was refused with an older number may be let in now, even if nothing looks
    /// different, as when a target had forgotten this source and is paired again.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// The target at an address.
    #[must_use]
    pub fn at(&self, address: &str) -> Option<&Target> {
        let wanted = normal(address);
        self.targets.iter().find(|target| target.address == wanted)
    }

    /// Notes a target, in place of a former one at its address.
    pub fn insert(&mut self, mut target: Target) {
        target.address = normal(&target.address);
        self.remove(&target.address);
        self.changes += 1;
        self.targets.push(target);
        self.targets.sort_by(|a, b| a.address.cmp(&b.address));
    }

    /// Forgets the target at an address.
    pub fn remove(&mut self, address: &str) -> Option<Target> {
        let wanted = normal(address);
        let index = self
            .targets
            .iter()
            .position(|target| target.address == wanted)?;
        self.changes += 1;
        Some(self.targets.remove(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_found_by_the_address_it_was_paired_at() {
        let target = |address: &str, seed: u8| Target {
            address: address.into(),
            pin: Pin::of(&[seed]),
            known_as: "a".into(),
            paired_unix_s: 1,
        };
        let mut targets = Targets::default();
        targets.insert(target("B.example:7788", 1));
        targets.insert(target("a.example:7788", 2));
        assert_eq!(targets.at("b.EXAMPLE:7788").unwrap().pin, Pin::of(&[1]));
        assert!(targets.at("b.example:7789").is_none());
        // The last pairing counts.
        targets.insert(target("b.example:7788", 3));
        assert_eq!(targets.at("b.example:7788").unwrap().pin, Pin::of(&[3]));
        assert_eq!(targets.all().len(), 2);
        // Each is a change, also one that leaves everything as it was.
        let before = targets.changes();
        targets.insert(target("b.example:7788", 3));
        assert!(targets.changes() > before);
        let before = targets.changes();
        assert!(targets.remove("B.example:7788").is_some());
        assert!(targets.changes() > before);
        assert!(targets.remove("b.example:7788").is_none());
    }
}
