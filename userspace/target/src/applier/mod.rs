// SPDX-License-Identifier: GPL-2.0-only

//! The applier of a set: it owns the volumes, their overlays, and what is known of the set.
//!
//! It replays the journal first, then takes buffers from the session in their order. A checkpoint
//! makes the volumes durable, then the state that says so, and then the journal before it is free.
//! A crash at any moment leaves a state from which the replay overwrites whatever came later.
//!
//! Nothing in here waits, has a thread of its own (but for the length of a call, [`parallel`]) or knows the time but by its
//! [`Clock`]: a call that cannot be finished says why ([`Pause`]) and is made again. [`thread`] makes them in the program,
//! a simulation makes them itself.
//!
//! # The last consistent state stays available
//!
//! When something breaks the order or the worth of a volume that was consistent, [`SetState`] wants a stage. Before
//! anything more is applied, the volumes are made durable as they are, and the state file says that the set is *staged*:
//! from then on nothing writes to the staged volumes, and changes go to their overlays. When the set is consistent
//! again, one write of the state file makes it *publishing*: overlay over volume is the truth, all volumes of the set
//! at once. The overlays are then drained into the volumes, beside new changes, and at the end removed.
//!
//! | | staged | publishing |
//! |---|---|---|
//! | a change | into the overlay; a block written in part is copied up | blocks it covers in part are folded into the volume; then into the volume |
//! | a crash | replay into the overlay | replay into the volume, and the drain goes on |
//! | the volume without this program | the last consistent state | needs `dttarget volume settle` |
//! | the order is lost again | it was lost | the drain is finished first, then a new stage begins |

mod apply;
mod batch;
mod checkpoint;
mod parallel;
mod stage;
pub mod thread;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use dtloop_canary::Canary;
use dtloop_core::binding::{Refusal, check_label};
use dtloop_core::chain::Link;
use dtloop_core::parallel::Schedule;
use dtloop_core::set::{Admission, SetState};
use dtloop_disk::Disk;
use dtloop_journal::{Position, Reader};
use dtloop_proto::message::{
    DeviceOffer, Hello, Mismatch, Past, StagingPhase, VolumeReport, Volumes,
};
use dtloop_proto::{Code, Message, Uuid};
use serde::{Deserialize, Serialize};

use crate::catalog::Catalog;
use crate::clock::Clock;
use crate::config::StagingConfig;
use crate::findings::Findings;
use crate::journal::Horizon;
use crate::outlet::Outlet;
use crate::overlay::{Overlay, Space};
use crate::volume::Volume;
use dtloop_store::{self as state_file, StateFileError};

pub use batch::{Batch, Item};
pub use stage::moments_of;
pub use watch::ACCEPT_FILE;

/// What is made durable at a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// The set.
    pub state: SetState,
    /// The journal is to be replayed from here.
    pub checkpoint: Position,
    /// The batch that the log of each overlay has at least.
    #[serde(default)]
    pub overlays: BTreeMap<String, u64>,
}

/// The last record that is in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Durable {
    /// Of which stream.
    pub stream_uuid: Uuid,
    /// Its number.
    pub seq: u64,
}

/// What the session gets when a source may ship.
#[derive(Clone, Debug)]
pub struct Entered {
    /// The record that is expected next.
    pub next_seq: u64,
    /// How it was received.
    pub admission: Admission,
    /// The stream that was known before.
    pub known_stream: Uuid,
    /// Whether and where the order is lost.
    pub lost: (u64, u64),
    /// The link of the hash chain behind the last record.
    pub link: Option<Link>,
    /// The volumes.
    pub volumes: Vec<VolumeReport>,
    /// Where changes go.
    pub staging: StagingPhase,
    /// What the volumes were worth until now.
    pub past: Past,
}

/// What the applier is asked to do, in order.
pub enum Command {
    /// Apply.
    Batch(Batch),
    /// Receive a source.
    Enter {
        /// What it said.
        hello: Box<Hello>,
        /// Last durable record.
        durable: Durable,
        /// Where the answer goes.
        reply: Sender<Result<Entered, Refusal>>,
    },
    /// Bind a device.
    Bind(DeviceOffer),
    /// The source was welcomed; from now on it can be told something.
    Welcomed,
    /// Checkpoint and end.
    Stop,
}

/// Flags that other threads set.
#[derive(Debug, Default)]
pub struct Flags {
    /// End soon; do not wait for a volume that fails.
    pub stop: AtomicBool,
    /// End at once, as if killed.
    pub abandon: AtomicBool,
    /// An operator gives up the last consistent state.
    pub in_place: AtomicBool,
}

impl Flags {
    fn must_end(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.abandon.load(Ordering::Relaxed)
    }
}

/// Why it cannot go on just now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Complaint {
    /// For programs.
    pub code: Code,
    /// For people.
    pub text: String,
}

/// Why a call is not finished. It is to be made again.
#[derive(Debug)]
pub enum Pause {
    /// There is more of it to do; somebody may look for something more urgent in between.
    Again,
    /// Something has to change first. Nothing is lost meanwhile.
    Blocked(Complaint),
    /// It never will be.
    Fatal(OpenError),
}

/// Why a set cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its state.
    #[error(transparent)]
    State(#[from] StateFileError),
    /// Its journal.
    #[error("Cannot read the journal of the set")]
    Journal(#[from] io::Error),
    /// A disk that it needs fails.
    #[error("{}", .0.text)]
    Blocked(Complaint),
    /// Its staging area.
    #[error(
        "Cannot read the staging area {} of the set; if it is lost, run \"dttarget volume settle --discard-staged\" \
         and let the source mirror again", dir.display()
    )]
    Staging {
        /// Where it is.
        dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What an applier works with.
#[derive(Clone)]
pub struct Parts {
    /// The disk that state, journal and staging area are on.
    pub disk: Arc<dyn Disk>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// The volumes.
    pub catalog: Arc<Catalog>,
    /// The way to the source.
    pub outlet: Arc<Outlet>,
    /// How far the volumes are, for the journal.
    pub horizon: Arc<Horizon>,
    /// What other threads want.
    pub flags: Arc<Flags>,
}

/// How an applier works.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A checkpoint is made after so many bytes.
    pub checkpoint_bytes: u64,
    /// The staging area.
    pub staging: StagingConfig,
    /// Threads that write and compare at the same time.
    pub threads: usize,
}

/// See the module documentation.
pub struct Applier {
    parts: Parts,
    settings: Settings,
    dir: PathBuf,
    state: SetState,
    /// What the state file has.
    saved: Saved,
    /// The place behind the last batch that is applied as a whole.
    applied: Position,
    volumes: HashMap<u32, Volume>,
    /// By volume; those of the stage.
    overlays: BTreeMap<String, Overlay>,
    space: Space,
    /// Bytes that are announced for each device: at least, at most.
    plans: HashMap<u32, (u64, u64)>,
    /// Items of the batch that are applied.
    cursor: usize,
    /// Records of the batch, from the cursor on, that are being applied at the same time.
    row: Option<(Schedule, HashMap<usize, [u8; 32]>)>,
    /// Something could not be made durable: everything since the checkpoint must be written again.
    redo: bool,
    /// The volumes are slow enough for more than one thread.
    slow: bool,
    dirty_since: Option<Duration>,
    bytes_since: u64,
    scratch: Vec<u8>,
    mismatches: Vec<Mismatch>,
    compared: Option<u64>,
    findings: Findings,
    replaying: bool,
    told_staging: Duration,
    /// A stream that was taken up without its source being told, and what it will be told of the time before.
    taken_up: Option<(Uuid, Past)>,
    /// What is replayed is durable.
    hardened: bool,
}

impl Applier {
    /// Loads what is known of the set in that directory, or begins with nothing.
    ///
    /// # Errors
    ///
    /// If state or staging area cannot be read.
    pub fn load(
        parts: Parts,
        settings: Settings,
        dir: &Path,
        source_id: Uuid,
        set: &str,
    ) -> Result<Self, OpenError> {
        let disk = Arc::clone(&parts.disk);
        let fresh = || Saved {
            state: SetState::new(source_id, set),
            checkpoint: Position::default(),
            overlays: BTreeMap::new(),
        };
        let path = dir.join("state");
        let found: Option<Saved> = state_file::load_on(&*disk, &path)?;
        if let Some(saved) = &found {
            // It may be in memory only, where a program that was killed had just put it: after a power cut there would be
            // the one before it, and what is done on its word, be it that an overlay is removed, would stay.
            state_file::store_on(&*disk, &path, saved)?;
        }
        let saved = found.unwrap_or_else(fresh);
        let staging = &settings.staging;
        let area = staging.dir.as_ref().map_or_else(
            || dir.join("staging"),
            |dir| dir.join(format!("{set}.{source_id}")),
        );
        let max = staging.max.map_or(u64::MAX, |max| max.0);
        let space = Space::new(Arc::clone(&disk), area, max, staging.min_free.0);
        let mut applier = Self {
            parts,
            settings,
            dir: dir.to_owned(),
            state: saved.state.clone(),
            applied: saved.checkpoint,
            saved,
            volumes: HashMap::new(),
            overlays: BTreeMap::new(),
            space,
            plans: HashMap::new(),
            cursor: 0,
            row: None,
            redo: false,
            slow: false,
            dirty_since: None,
            bytes_since: 0,
            scratch: vec![],
            mismatches: vec![],
            compared: None,
            findings: Findings::new(disk, dir.join("verify.log")),
            replaying: false,
            told_staging: Duration::ZERO,
            taken_up: None,
            hardened: false,
        };
        applier.open_overlays()?;
        Ok(applier)
    }

    fn disk(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.parts.disk)
    }

    /// Reads the journal from the checkpoint on.
    fn reader(&self) -> Reader {
        self.reader_from(self.saved.checkpoint)
    }

    fn reader_from(&self, from: Position) -> Reader {
        let dir = self.dir.join("journal");
        Reader::new(self.disk(), &dir, self.state.source_id, from)
    }

    /// Opens the volumes that the set had.
    pub fn open_volumes(&mut self) {
        let bound: Vec<(String, u32)> = self
            .state
            .volumes
            .iter()
            .filter(|(_, volume)| volume.device != 0 && volume.refused.is_none())
            .filter(|(_, volume)| !self.volumes.contains_key(&volume.device))
            .map(|(label, volume)| (label.clone(), volume.device))
            .collect();
        let mut survey = None;
        for (label, device) in bound {
            let mut volume = match self.parts.catalog.open(&label) {
                Ok(volume) => volume,
                Err(refusal) => {
                    tracing::error!("{refusal}.");
                    continue;
                }
            };
            let examined = self.examine(&label, &mut volume, || {
                let survey = survey.get_or_insert_with(|| self.survey());
                survey.get(&device).cloned().unwrap_or_default()
            });
            match examined {
                Ok(()) => drop(self.volumes.insert(device, volume)),
                Err(refusal) => {
                    tracing::error!("{refusal}.");
                    self.refuse(&label, device, &refusal);
                }
            }
        }
    }

    /// What is known of the set.
    #[must_use]
    pub fn state(&self) -> &SetState {
        &self.state
    }

    /// The place behind the last batch that is applied.
    #[must_use]
    pub fn applied(&self) -> Position {
        self.applied
    }

    /// Receives a source, once everything that it sent before is applied.
    ///
    /// # Errors
    ///
    /// [`Pause`]. The source may be taken up already then, which its session does not know: it speaks of what it received
    /// before, and the next call goes on with what was taken up.
    pub fn enter(
        &mut self,
        hello: &Hello,
        durable: Durable,
    ) -> Result<Result<Entered, Refusal>, Pause> {
        // Volumes may be closed now: what was written to them must be durable, and what is
        // written again later must find them as they are.
        self.checkpoint()?;
        let mut entered = self.take_up(hello, durable);
        if let Ok(entered) = &entered {
            self.taken_up = Some((hello.stream_uuid, entered.past.clone()));
        }
        self.checkpoint()?;
        self.taken_up = None;
        if let Ok(entered) = &mut entered {
            entered.staging = self.staging_phase();
        }
        Ok(entered)
    }

    fn take_up(&mut self, hello: &Hello, durable: Durable) -> Result<Entered, Refusal> {
        let known_stream = self.state.stream_uuid;
        // Of a stream that was taken up and whose source was not told, nothing has been received.
        let durable_seq =
            if durable.stream_uuid == known_stream || dtloop_canary::bites(Canary::HalfTakenUp) {
                durable.seq
            } else {
                self.state.applied_seq
            };
        let taken_up = self.taken_up.take();
        let past = taken_up.filter(|(stream, _)| *stream == hello.stream_uuid);
        let past = match past {
            Some((_, past)) => past,
            None => self.state.past(&hello.devices, durable_seq),
        };
        let admission = self.admit(hello, durable_seq)?;
        self.state.enter(hello, admission);
        if admission != Admission::Resume {
            self.volumes.clear();
            self.plans.clear();
        }
        for offer in &hello.devices {
            self.bind_device(offer, &hello.devices);
        }
        let lost = self
            .state
            .lost
            .map_or((0, 0), |lost| (lost.from, lost.last));
        let next_seq = match admission {
            Admission::Resume => durable_seq + 1,
            Admission::NewStream => hello.first_seq,
            Admission::Hole { to, .. } => to,
        };
        Ok(Entered {
            next_seq,
            admission,
            known_stream,
            lost,
            link: self.state.chain.map(|chain| chain.link),
            volumes: self.reports(),
            staging: self.staging_phase(),
            past: self.trusted(past),
        })
    }

    /// A volume that is refused now is worth nothing, whatever it was.
    fn trusted(&self, mut past: Past) -> Past {
        let bound = |device: &u32| self.volumes.contains_key(device);
        past.mirrored.retain(bound);
        past
    }

    /// Binds a device that joined or changed its size.
    ///
    /// # Errors
    ///
    /// [`Pause`].
    pub fn bind(&mut self, offer: &DeviceOffer) -> Result<(), Pause> {
        self.checkpoint()?;
        let offers = std::slice::from_ref(offer);
        // What is applied is durable, and nothing else came before this.
        let past = self.state.past(offers, self.state.applied_seq);
        self.bind_device(offer, offers);
        self.checkpoint()?;
        let past = Message::Past(self.trusted(past));
        self.parts.outlet.send(&past);
        self.report_volumes();
        Ok(())
    }

    fn bind_device(&mut self, offer: &DeviceOffer, all: &[DeviceOffer]) {
        let open = self.volumes.remove(&offer.device);
        // A device that came back under its name has a new id; its volume is still open.
        let former = self
            .state
            .volumes
            .get(&offer.label)
            .map(|volume| volume.device);
        let open = open.or_else(|| former.and_then(|device| self.volumes.remove(&device)));
        let (source_id, set) = (self.state.source_id, self.state.set.clone());
        let result = check_label(offer, all)
            .and_then(|()| self.parts.catalog.bind(source_id, &set, offer, open))
            .and_then(|mut volume| {
                // Everything is applied, and nothing of it is pending.
                self.examine(&offer.label, &mut volume, Vec::new)?;
                Ok(volume)
            });
        match result {
            Ok(volume) => {
                self.state
                    .bind(&offer.label, offer.device, offer.sectors, None);
                self.volumes.insert(offer.device, volume);
            }
            Err(refusal) => {
                let label = if offer.label.is_empty() {
                    format!("device-{}", offer.device)
                } else {
                    offer.label.clone()
                };
                let known = self.state.volumes.get(&label);
                let known = known.and_then(|volume| volume.refused.as_ref());
                // It is offered again and again while what can pass lasts.
                if known.is_none_or(|(_, text)| *text != refusal.text) {
                    tracing::error!("Device {} of set \"{set}\": {refusal}.", offer.device);
                }
                self.state
                    .bind(&label, offer.device, offer.sectors, Some(&refusal));
            }
        }
    }

    fn reports(&self) -> Vec<VolumeReport> {
        let bytes_of = |label: &str| {
            let mut volumes = self.volumes.values();
            volumes
                .find(|volume| volume.name() == label)
                .map_or(0, Volume::bytes)
        };
        self.state.reports(bytes_of)
    }

    fn report_volumes(&self) {
        self.parts.outlet.send(&Message::Volumes(Volumes {
            volumes: self.reports(),
        }));
    }
}

#[cfg(test)]
mod tests;
