// SPDX-License-Identifier: GPL-2.0-only

//! Where the changes of a set wait for the target, and when they go elsewhere: the ladder.
//!
//! ```text
//!              ring fills beyond the start level        ring full, and the queue is
//!              (target away or too slow)                full, failing, refused or absent
//!      Ring ------------------------------> Spooling -----------------------------> Tracking
//!       ^                                     |  ^                                      |
//!       | queue is empty     target is back,  |  | as from Ring                         |
//!       |                    ring is calm     v  |                                      |
//!       +---------------------------------- Draining                                    |
//!       ^                                     ^                                         |
//!       +-------------------------------------+-- the ring has had room for a while ----+
//! ```
//!
//! A step down is taken at once; a step up only after what asked for the lower rung has not shown for [`CALM_MS`], so
//! that a target about as fast as the application does not make the set climb up and down with every batch.
//!
//! The rung is what people see. Order does not hang on it: records are sent by their number, wherever they are kept
//! (`core::spool`), and the kernel marks blocks by itself when the ring is full. What the ladder decides is when
//! records are moved from the ring into the queue, see [`Ladder::spools`].

use std::collections::VecDeque;

/// How long the reason for a rung must be gone before the set leaves it upwards, in milliseconds.
pub const CALM_MS: u64 = 3000;

/// Steps that are remembered.
pub const HISTORY: usize = 32;

/// A rung, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Rung {
    /// Records wait in the kernel's ring and are sent from there.
    Ring,
    /// The queue holds records; they are sent before those in the ring.
    Draining,
    /// Records are moved from the ring into the queue.
    Spooling,
    /// The kernel marks blocks: their order is lost, and they are sent again later.
    Tracking,
}

impl Rung {
    /// In one word, for people and programs.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Draining => "draining",
            Self::Spooling => "spooling",
            Self::Tracking => "tracking",
        }
    }
}

/// Whether records can be put into the queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum QueueHealth {
    /// None is configured.
    #[default]
    Absent,
    /// They can.
    Usable,
    /// It has reached its size, or its file system has too little space.
    Full(String),
    /// Its disk fails; it is tried again.
    Failing(String),
    /// It lies where it must not, or belongs to somebody else.
    Refused(String),
}

impl QueueHealth {
    /// In one word, for people and programs.
    #[must_use]
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Usable => "usable",
            Self::Full(_) => "full",
            Self::Failing(_) => "failing",
            Self::Refused(_) => "refused",
        }
    }

    /// Why it is not usable; empty if it is.
    #[must_use]
    pub fn reason(&self) -> &str {
        match self {
            Self::Absent => "no disk queue is configured",
            Self::Usable => "",
            Self::Full(reason) | Self::Failing(reason) | Self::Refused(reason) => reason,
        }
    }
}

/// A point in time, on two clocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moment {
    /// Milliseconds on a clock that is never set.
    pub steady_ms: u64,
    /// Milliseconds since 1970, for people.
    pub unix_ms: u64,
}

/// What is seen of a set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// How full the ring is, by payload or by descriptors, whichever is more. Percent.
    pub ring_percent: u8,
    /// The kernel marks blocks instead of making records.
    pub gap: bool,
    /// Changes for which it has done so, since the stream began.
    pub marked: u64,
    /// The target takes records.
    pub connected: bool,
    /// Records in the queue that the target has not acknowledged.
    pub queued: u64,
    /// State of the queue.
    pub health: QueueHealth,
}

/// A change of the rung.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// When.
    pub at: Moment,
    /// Rung before.
    pub from: Rung,
    /// Rung from now on.
    pub to: Rung,
    /// Why.
    pub reason: String,
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Ladder {
    /// Ring fill at which records go into the queue, in percent.
    start_percent: u8,
    rung: Rung,
    since: Moment,
    reason: String,
    fills: bool,
    /// [`Seen::marked`] at the last look.
    marked: Option<u64>,
    /// Since when a better rung would do, on the steady clock.
    calm_since: Option<u64>,
    history: VecDeque<Step>,
}

impl Ladder {
    /// Begins on the uppermost rung.
    #[must_use]
    pub fn new(start_percent: u8, now: Moment) -> Self {
        Self {
            start_percent,
            rung: Rung::Ring,
            since: now,
            reason: "dtagent has started".to_owned(),
            fills: false,
            marked: None,
            calm_since: None,
            history: VecDeque::new(),
        }
    }

    /// The rung.
    #[must_use]
    pub fn rung(&self) -> Rung {
        self.rung
    }

    /// When the rung was entered.
    #[must_use]
    pub fn since(&self) -> Moment {
        self.since
    }

    /// Why it was entered.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// The last [`HISTORY`] steps, oldest first.
    pub fn history(&self) -> impl Iterator<Item = &Step> {
        self.history.iter()
    }

    /// Whether records are to be moved from the ring into the queue, if it can be used: from the start level on, down
    /// to half of it.
    #[must_use]
    pub fn spools(&self) -> bool {
        self.fills
    }

    /// Looks at the set; a step that was taken is returned, once.
    pub fn observe(&mut self, now: Moment, seen: &Seen) -> Option<&Step> {
        let level = if self.fills {
            self.start_percent / 2
        } else {
            self.start_percent
        };
        self.fills = seen.ring_percent >= level.max(1);
        // It may have begun and ended since the last look: the order is lost all the same.
        let before = self.marked.replace(seen.marked);
        let gap = seen.gap || before.is_some_and(|before| before < seen.marked);
        let wanted = self.wanted(seen, gap);
        if wanted >= self.rung {
            self.calm_since = None;
        }
        if wanted == self.rung {
            return None;
        }
        if wanted < self.rung {
            let since = *self.calm_since.get_or_insert(now.steady_ms);
            // An empty queue is no longer drained, however short it was.
            let emptied = self.rung == Rung::Draining;
            if !emptied && now.steady_ms.saturating_sub(since) < CALM_MS {
                return None;
            }
        }
        self.enter(now, wanted, self.why(wanted, seen));
        self.history.back()
    }

    fn wanted(&self, seen: &Seen, gap: bool) -> Rung {
        if gap {
            Rung::Tracking
        } else if self.fills_queue(seen) || (seen.queued > 0 && !seen.connected) {
            Rung::Spooling
        } else if seen.queued > 0 {
            Rung::Draining
        } else {
            Rung::Ring
        }
    }

    fn fills_queue(&self, seen: &Seen) -> bool {
        self.fills && seen.health == QueueHealth::Usable
    }

    fn enter(&mut self, now: Moment, to: Rung, reason: String) {
        let step = Step {
            at: now,
            from: self.rung,
            to,
            reason: reason.clone(),
        };
        if self.history.len() == HISTORY {
            self.history.pop_front();
        }
        self.history.push_back(step);
        self.rung = to;
        self.since = now;
        self.reason = reason;
        self.calm_since = None;
    }

    fn why(&self, to: Rung, seen: &Seen) -> String {
        let target = if seen.connected {
            "the target takes records more slowly than they are made"
        } else {
            "the target is away"
        };
        match to {
            Rung::Tracking => {
                let queue = match &seen.health {
                    QueueHealth::Usable => "the disk queue does not keep up".to_owned(),
                    QueueHealth::Absent => seen.health.reason().to_owned(),
                    other => format!("the disk queue is {}: {}", other.label(), other.reason()),
                };
                format!("{target}, the ring is full, and {queue}")
            }
            Rung::Spooling if self.fills_queue(seen) => {
                format!("{target} and the ring is {} % full", seen.ring_percent)
            }
            Rung::Spooling => format!("{target} and the queue holds records"),
            Rung::Draining => format!(
                "the target takes records; {} in the queue go first",
                seen.queued
            ),
            Rung::Ring if self.rung == Rung::Tracking => "the ring has room again".to_owned(),
            Rung::Ring => "the target holds everything that was in the queue".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(steady_ms: u64) -> Moment {
        Moment {
            steady_ms,
            unix_ms: 1_000_000 + steady_ms,
        }
    }

    fn seen(ring_percent: u8, connected: bool, queued: u64) -> Seen {
        Seen {
            ring_percent,
            gap: false,
            marked: 0,
            connected,
            queued,
            health: QueueHealth::Usable,
        }
    }

    #[test]
    fn an_outage_goes_down_and_up_by_itself() {
        let mut ladder = Ladder::new(50, at(0));
        assert_eq!(ladder.observe(at(1), &seen(49, false, 0)), None);
        assert!(!ladder.spools());
        let step = ladder.observe(at(2), &seen(50, false, 0)).unwrap();
        assert_eq!((step.from, step.to), (Rung::Ring, Rung::Spooling));
        assert_eq!(step.reason, "the target is away and the ring is 50 % full");
        ladder.observe(at(3), &seen(25, false, 9));
        assert!(ladder.spools(), "down to half of the start level");
        ladder.observe(at(4), &seen(24, false, 9));
        assert!(!ladder.spools());
        assert_eq!(
            ladder.observe(at(90_000), &seen(24, false, 9)),
            None,
            "the target is still away"
        );
        assert_eq!(ladder.observe(at(90_001), &seen(10, true, 9)), None);
        let step = ladder
            .observe(at(90_001 + CALM_MS), &seen(10, true, 9))
            .unwrap();
        assert_eq!(step.to, Rung::Draining);
        let step = ladder.observe(at(95_000), &seen(10, true, 0)).unwrap();
        assert_eq!(step.to, Rung::Ring);
        assert_eq!(ladder.since(), at(95_000));
        assert_eq!(ladder.history().count(), 3);
    }

    #[test]
    fn every_reason_for_the_dirty_map_is_named() {
        for (health, words) in [
            (QueueHealth::Absent, "no disk queue is configured"),
            (
                QueueHealth::Full("it has reached its size".into()),
                "full: it has",
            ),
            (
                QueueHealth::Failing("I/O error".into()),
                "failing: I/O error",
            ),
            (
                QueueHealth::Refused("it lies on loop1".into()),
                "refused: it lies",
            ),
            (QueueHealth::Usable, "does not keep up"),
        ] {
            let mut ladder = Ladder::new(50, at(0));
            let full = Seen {
                gap: true,
                health,
                ..seen(100, false, 0)
            };
            let step = ladder.observe(at(1), &full).unwrap();
            assert_eq!(step.to, Rung::Tracking);
            assert!(step.reason.contains(words), "{}", step.reason);
        }
    }

    #[test]
    fn a_target_that_is_just_too_slow_does_not_make_it_flap() {
        let mut ladder = Ladder::new(50, at(0));
        for round in 0..1000 {
            let percent = if round % 2 == 0 { 55 } else { 20 };
            ladder.observe(at(round * 100), &seen(percent, true, 100));
        }
        assert_eq!(ladder.history().count(), 1);
        assert_eq!(ladder.rung(), Rung::Spooling);
    }

    #[test]
    fn blocks_that_were_marked_between_two_looks_are_not_hidden() {
        let mut ladder = Ladder::new(50, at(0));
        let marked = |marked| Seen {
            marked,
            health: QueueHealth::Refused("it lies on loop1".into()),
            ..seen(74, false, 0)
        };
        assert_eq!(
            ladder.observe(at(1), &marked(7)),
            None,
            "of an earlier life"
        );
        let step = ladder.observe(at(2), &marked(8)).unwrap();
        assert_eq!(step.to, Rung::Tracking);
        assert!(step.reason.contains("refused"), "{}", step.reason);
        assert_eq!(ladder.observe(at(3), &marked(8)), None);
        assert_eq!(ladder.observe(at(4), &marked(9)), None);
        let step = ladder.observe(at(5 + CALM_MS), &marked(9));
        assert_eq!(step, None, "not calm for long enough");
        let step = ladder.observe(at(5 + 2 * CALM_MS), &marked(9)).unwrap();
        assert_eq!(step.to, Rung::Ring);
        // Another stream begins to count anew.
        assert_eq!(ladder.observe(at(6 + 2 * CALM_MS), &marked(0)), None);
        assert!(ladder.observe(at(7 + 2 * CALM_MS), &marked(1)).is_some());
    }

    #[test]
    fn nobody_says_spooling_while_the_queue_cannot_be_used() {
        let mut ladder = Ladder::new(50, at(0));
        let failing = Seen {
            health: QueueHealth::Failing("x".into()),
            ..seen(99, false, 0)
        };
        assert_eq!(ladder.observe(at(1), &failing), None);
        assert!(ladder.spools(), "it is tried again");
    }

    proptest! {
        /// Steps link up, say why, never repeat a rung, and upward ones are rare.
        #[test]
        fn steps_are_sound(looks in prop::collection::vec((0u8..=100, any::<bool>(), 0u64..3, any::<bool>(), 0u64..2000), 1..300)) {
            let mut ladder = Ladder::new(50, at(0));
            let (mut rung, mut time, mut last_up) = (Rung::Ring, 0, None);
            for (percent, connected, queued, gap, pause) in looks {
                time += pause;
                let look = Seen { gap, ..seen(percent, connected, queued) };
                if let Some(step) = ladder.observe(at(time), &look).cloned() {
                    prop_assert_eq!(step.from, rung);
                    prop_assert_ne!(step.to, rung);
                    prop_assert!(!step.reason.is_empty());
                    if step.to < step.from && step.from != Rung::Draining {
                        if let Some(last) = last_up {
                            prop_assert!(time - last >= CALM_MS);
                        }
                        last_up = Some(time);
                    }
                    rung = step.to;
                }
                prop_assert_eq!(ladder.rung(), rung);
                // The worst is never hidden.
                prop_assert!(!gap || rung == Rung::Tracking);
                prop_assert!(ladder.history().count() <= HISTORY);
            }
        }
    }
}
