// SPDX-License-Identifier: GPL-2.0-only

//! Sends again what was changed outside of the stream (dirty resync), and says from which
//! position on the target is a prefix of the source's writes again.
//!
//! A pass reads the stream's next sequence number `p`, waits until every record below it has been
//! seen and every SYNC record it asked for before has come, and then looks through the dirty maps:
//!
//! - An extent is found: it is read into the stream with its bits cleared; then a new pass.
//! - None is found: the order is whole at `p`. A change outside of the stream that began before
//!   `p` has left a dirty bit, and only this pass's own SYNCs could have cleared it, which have
//!   come before `p`. One that began later is announced by a record at `p` or behind, at which
//!   the order is lost again.
//!
//! ```text
//!   Idle --loss, start--> Begin --position p--> Drain --all below p seen, nothing outstanding--> Scan
//!    ^                      ^                                                                     |
//!    |                      +--------------- something was dirty, or a loss was seen -------------+
//!    +------------------------------- Declare: order whole at p ----------------------------------+
//! ```

use std::collections::BTreeSet;

use dtloop_canary::Canary;

use crate::mirror::{Request, SECTORS_PER_CHUNK};

/// Most sectors that are asked for and have not come yet: 4 MiB, an eighth of the share of the
/// default ring that SYNC may use.
pub const WINDOW_SECTORS: u64 = 8192;

/// Longest extent of one request: 512 KiB.
const EXTENT_SECTORS: u64 = 4 * SECTORS_PER_CHUNK;

/// The cookie of all requests of a resync; a mirror's are never 0 in the upper bits.
pub const COOKIE: u64 = crate::mirror::MODE_DATA as u64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Idle,
    Begin,
    Drain {
        at: u64,
    },
    Scan {
        at: u64,
        index: usize,
        from: u64,
        found: bool,
        extent: Option<(u64, u64)>,
    },
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until something is lost.
    Idle,
    /// Nothing until records come or the ring has room.
    Wait,
    /// Report the stream's next sequence number with [`Resync::on_position`].
    Position,
    /// Look for a dirty extent and report it with [`Resync::on_found`].
    Find {
        /// Device id.
        device: u32,
        /// Where to begin.
        from: u64,
        /// Longest extent of interest in sectors.
        sectors_max: u64,
    },
    /// Have a range read and report how much was taken with [`Resync::on_taken`].
    Sync(Request),
    /// Tell the target that the order is whole at this position, then [`Resync::on_declared`].
    Declare {
        /// The position.
        at: u64,
    },
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub struct Resync {
    state: State,
    devices: Vec<u32>,
    /// Requests whose records have not come, by device, first sector and length.
    outstanding: BTreeSet<(u32, u64, u64)>,
    again: bool,
    failed: bool,
    /// Sectors read in all.
    pub sectors: u64,
}

impl Resync {
    /// Begins with a pass over the devices.
    #[must_use]
    pub fn new(devices: Vec<u32>) -> Self {
        Self {
            state: State::Begin,
            devices,
            outstanding: BTreeSet::new(),
            again: false,
            failed: false,
            sectors: 0,
        }
    }

    /// Other devices: a pass begins over them.
    pub fn set_devices(&mut self, devices: Vec<u32>) {
        self.outstanding
            .retain(|(device, ..)| devices.contains(device));
        self.devices = devices;
        self.state = State::Begin;
    }

    /// Something was lost at a record that was just seen.
    pub fn on_loss(&mut self) {
        if self.state == State::Idle {
            self.state = State::Begin;
        } else {
            self.again = true;
        }
    }

    /// Whether everything is known to have been sent.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.state == State::Idle
    }

    /// Whether a SYNC failed since the last call: the source's device cannot be read. The next
    /// pass should wait a while.
    pub fn take_failed(&mut self) -> bool {
        std::mem::take(&mut self.failed)
    }

    /// Sectors that were asked for and have not come yet.
    #[must_use]
    pub fn outstanding_sectors(&self) -> u64 {
        self.outstanding.iter().map(|(.., sectors)| sectors).sum()
    }

    /// What to do next; `seen` says that every record below it has been seen.
    pub fn step(&mut self, seen: u64) -> Step {
        if let State::Drain { at } = self.state {
            let waits = seen < at || !self.outstanding.is_empty();
            if waits && !dtloop_canary::bites(Canary::RestoredTooSoon) {
                return Step::Wait;
            }
            self.state = State::Scan {
                at,
                index: 0,
                from: 0,
                found: false,
                extent: None,
            };
        }
        match self.state {
            State::Idle => Step::Idle,
            State::Begin | State::Drain { .. } => {
                self.again = false;
                Step::Position
            }
            State::Scan {
                extent: Some((start, sectors)),
                index,
                ..
            } => {
                if self.outstanding_sectors() >= WINDOW_SECTORS {
                    return Step::Wait;
                }
                let device = self.devices[index];
                Step::Sync(Request {
                    device,
                    start,
                    sectors,
                    clear: true,
                    cookie: COOKIE,
                })
            }
            State::Scan {
                at,
                index,
                from,
                found,
                extent: None,
            } => match self.devices.get(index) {
                Some(&device) => Step::Find {
                    device,
                    from,
                    sectors_max: EXTENT_SECTORS,
                },
                None if found || self.again => {
                    self.state = State::Begin;
                    self.again = false;
                    Step::Position
                }
                None => Step::Declare { at },
            },
        }
    }

    /// The stream's next sequence number.
    pub fn on_position(&mut self, next_seq: u64) {
        if self.state == State::Begin {
            self.state = State::Drain { at: next_seq };
        }
    }

    /// The dirty extent asked for, if there is one.
    pub fn on_found(&mut self, result: Option<(u64, u64)>) {
        if let State::Scan {
            index,
            from,
            found,
            extent,
            ..
        } = &mut self.state
        {
            *extent = result;
            match result {
                Some(_) => *found = true,
                None => {
                    *index += 1;
                    *from = 0;
                }
            }
        }
    }

    /// How many sectors of the last request were taken.
    pub fn on_taken(&mut self, taken: u64) {
        let State::Scan {
            index,
            from,
            extent,
            ..
        } = &mut self.state
        else {
            return;
        };
        let Some((start, sectors)) = *extent else {
            return;
        };
        let device = self.devices[*index];
        let mut at = start;
        while at < start + taken {
            let end = ((at / SECTORS_PER_CHUNK + 1) * SECTORS_PER_CHUNK).min(start + taken);
            self.outstanding.insert((device, at, end - at));
            at = end;
        }
        self.sectors += taken;
        *from = start + taken;
        *extent = (taken < sectors).then_some((start + taken, sectors - taken));
    }

    /// A SYNC record with this module's cookie was seen.
    pub fn on_record(&mut self, device: u32, start: u64, sectors: u64, failed: bool) {
        self.failed |= failed;
        let end = start + sectors;
        let before = self
            .outstanding
            .range(..(device, start + 1, 0))
            .next_back()
            .copied();
        let Some(entry @ (_, from, length)) =
            before.filter(|(d, from, length)| *d == device && from + length > start)
        else {
            return;
        };
        // The kernel may cut finer than asked.
        self.outstanding.remove(&entry);
        if from < start {
            self.outstanding.insert((device, from, start - from));
        }
        if end < from + length {
            self.outstanding.insert((device, end, from + length - end));
        }
    }

    /// The target has been told.
    pub fn on_declared(&mut self) {
        self.state = if std::mem::take(&mut self.again) {
            State::Begin
        } else {
            State::Idle
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clean_set_is_declared_at_once() {
        let mut resync = Resync::new(vec![1, 2]);
        assert_eq!(resync.step(5), Step::Position);
        resync.on_position(9);
        assert_eq!(
            resync.step(8),
            Step::Wait,
            "records below the position are not seen yet"
        );
        for device in [1, 2] {
            assert!(matches!(resync.step(9), Step::Find { device: d, .. } if d == device));
            resync.on_found(None);
        }
        assert_eq!(resync.step(9), Step::Declare { at: 9 });
        resync.on_declared();
        assert_eq!(resync.step(9), Step::Idle);
    }

    #[test]
    fn a_dirty_set_is_declared_only_after_a_clean_pass() {
        let mut resync = Resync::new(vec![1]);
        resync.step(1);
        resync.on_position(1);
        resync.step(1);
        resync.on_found(Some((0, 16)));
        assert!(matches!(
            resync.step(1),
            Step::Sync(Request {
                start: 0,
                sectors: 16,
                clear: true,
                ..
            })
        ));
        resync.on_taken(8);
        assert!(matches!(
            resync.step(1),
            Step::Sync(Request {
                start: 8,
                sectors: 8,
                ..
            })
        ));
        resync.on_taken(8);
        assert!(matches!(resync.step(1), Step::Find { from: 16, .. }));
        resync.on_found(None);
        assert_eq!(resync.step(1), Step::Position);
        resync.on_position(3);
        assert_eq!(resync.step(3), Step::Wait, "its own records have not come");
        resync.on_record(1, 0, 8, false);
        resync.on_record(1, 8, 8, false);
        assert!(matches!(resync.step(3), Step::Find { .. }));
        resync.on_loss();
        resync.on_found(None);
        assert_eq!(resync.step(3), Step::Position, "a loss was seen meanwhile");
    }
}
