// SPDX-License-Identifier: GPL-2.0-only

//! Reasons for which a copy must be verified although nothing in the stream says so.
//!
//! ```text
//!   (none) --cause--> raised --a verification or mirror that BEGAN after the last cause ends clean--> (none)
//! ```
//!
//! While an alarm stands the device is not called in sync. It is kept with what the agent remembers of the set, so it
//! outlives the agent and the machine.

use serde::{Deserialize, Serialize};

use crate::chain::{Link, link_text};

/// What was noticed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "cause", rename_all = "kebab-case")]
pub enum Cause {
    /// Something else than the module wrote to the backing device while it was attached.
    Bypassed {
        /// So many sectors, in all.
        sectors: u64,
    },
    /// Something wrote to the backing device after the machine was booted and before it was attached.
    WrittenBefore {
        /// At least so many sectors.
        sectors: u64,
    },
    /// The target applied something else than what was sent.
    ChainDiffers {
        /// The record up to which it was compared.
        seq: u64,
        /// The source's link.
        #[serde(with = "link_text")]
        source: Link,
        /// The target's link.
        #[serde(with = "link_text")]
        target: Link,
    },
    /// The target noticed something about its volume.
    Volume {
        /// Number of the target's alarm, to be repeated when it is over.
        number: u64,
        /// What, for people.
        text: String,
    },
}

impl Cause {
    fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// An alarm of a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alarm {
    /// When the first cause was noticed, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// Rises with every cause, so that a verification that began before the last one does not end the alarm.
    pub number: u64,
    /// The causes, one of each kind.
    pub causes: Vec<Cause>,
}

impl Alarm {
    /// The number of the target's alarm among the causes.
    #[must_use]
    pub fn volume_number(&self) -> Option<u64> {
        self.causes.iter().find_map(|cause| match cause {
            Cause::Volume { number, .. } => Some(*number),
            _ => None,
        })
    }
}

/// Raises an alarm, or adds to it. True: nothing of the kind was known, so it is worth a line in the log.
pub fn raise(alarm: &mut Option<Alarm>, unix_ms: u64, cause: Cause) -> bool {
    let alarm = alarm.get_or_insert_with(|| Alarm {
        since_unix_ms: unix_ms,
        number: 0,
        causes: vec![],
    });
    let known = alarm.causes.iter_mut().find(|known| known.is_like(&cause));
    match (known, cause) {
        (None, cause) => {
            alarm.number += 1;
            alarm.causes.push(cause);
            return true;
        }
        (Some(Cause::Bypassed { sectors }), Cause::Bypassed { sectors: more }) => {
            *sectors = sectors.saturating_add(more);
        }
        // Told again with every connection.
        (Some(known), cause) if *known == cause => return false,
        (Some(known), cause) => *known = cause,
    }
    alarm.number += 1;
    false
}

/// A pass over the device that began when the alarm had that number ended clean. Gives the alarm if it is over.
pub fn settle(alarm: &mut Option<Alarm>, number: u64) -> Option<Alarm> {
    alarm.take_if(|alarm| alarm.number == number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_pass_that_began_after_the_last_cause_ends_an_alarm() {
        let mut alarm = None;
        assert!(raise(&mut alarm, 5, Cause::Bypassed { sectors: 8 }));
        let number = alarm.as_ref().unwrap().number;
        assert!(!raise(&mut alarm, 9, Cause::Bypassed { sectors: 1 }));
        assert_eq!(
            settle(&mut alarm, number),
            None,
            "a write came after it began"
        );
        let known = alarm.clone().unwrap();
        assert_eq!(known.causes, [Cause::Bypassed { sectors: 9 }]);
        assert_eq!(known.since_unix_ms, 5);
        assert_eq!(settle(&mut alarm, known.number), Some(known));
        assert_eq!(alarm, None);
    }

    #[test]
    fn what_is_told_again_is_no_new_cause() {
        let mut alarm = None;
        let told = |number| Cause::Volume {
            number,
            text: "changed".into(),
        };
        assert!(raise(&mut alarm, 5, told(1)));
        assert!(!raise(&mut alarm, 6, told(1)));
        assert_eq!(alarm.as_ref().map(|alarm| alarm.number), Some(1));
        raise(&mut alarm, 7, told(2));
        let alarm = alarm.unwrap();
        assert_eq!((alarm.number, alarm.volume_number()), (2, Some(2)));
    }
}
