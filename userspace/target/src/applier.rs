// SPDX-License-Identifier: GPL-2.0-only

//! The applier of a set: one thread that owns the volumes and what is known of the set.
//!
//! It replays the journal first, then takes buffers from the session in their order. A checkpoint
//! makes the volumes durable, then the state that says so, and then the journal before it is free.
//! A crash at any moment leaves a state from which the replay overwrites whatever came later.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::{Duration, Instant};

use dtloop_core::apply::{Action, action};
use dtloop_core::binding::{Refusal, check_label};
use dtloop_core::chain::{self, Link};
use dtloop_core::identity::{NothingPending, Pending, SAMPLE_BYTES};
use dtloop_core::journal::SEGMENT_HEADER_BYTES;
use dtloop_core::set::{Admission, SetState};
use dtloop_proto::message::{
    DeviceOffer, Hello, Marker, Mismatch, Notice, Past, Proof, Verified, VolumeReport, Volumes,
};
use dtloop_proto::{Code, Decoded, Frame, Message, RecordBody, RecordKind, Uuid};
use serde::{Deserialize, Serialize};

use crate::catalog::Catalog;
use crate::findings::{Findings, unix_ms};
use crate::journal::{Horizon, Position, Replay};
use crate::outlet::Outlet;
use crate::volume::Volume;
use dtloop_store::{self as state_file, StateFileError};

/// Longest time between a change of a volume and the checkpoint behind it.
const CHECKPOINT_AFTER: Duration = Duration::from_secs(5);

/// Pause before a failed write to a volume is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Longest wait before the applier looks whether a checkpoint is due or asked for.
const TICK: Duration = Duration::from_millis(200);

/// In the directory of a set: an operator decided that the next source is followed, whatever its past.
pub const ACCEPT_FILE: &str = "accept";

/// What the journal changes of a volume.
struct Changes<'a>(&'a [(u64, u64)]);

impl Pending for Changes<'_> {
    fn is_any(&self) -> bool {
        !self.0.is_empty()
    }

    fn touches(&self, offset: u64) -> bool {
        let mut ranges = self.0.iter();
        ranges.any(|(start, end)| *start < offset + SAMPLE_BYTES && offset < *end)
    }
}

/// What is made durable at a checkpoint.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// The set.
    pub state: SetState,
    /// The journal is to be replayed from here.
    pub checkpoint: Position,
}

/// A frame of a batch.
#[derive(Clone, Copy, Debug)]
pub enum Item {
    /// A record.
    Record {
        /// Its number.
        seq: u64,
        /// Its form.
        kind: RecordKind,
        /// Its body.
        body: RecordBody,
        /// Where its payload is in the buffer.
        payload: (usize, usize),
    },
    /// A marker.
    Marker {
        /// Its position.
        position: u64,
        /// What it says.
        marker: Marker,
    },
}

/// A buffer full of frames that are durable in the journal.
#[derive(Debug, Default)]
pub struct Batch {
    /// The bytes received.
    pub buffer: Vec<u8>,
    /// The frames in it.
    pub items: Vec<Item>,
    /// The place behind it in the journal.
    pub end: Position,
    /// Bytes of the frames.
    pub bytes: u64,
}

/// What the session gets when a source may ship.
#[derive(Clone, Debug)]
pub struct Entered {
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
    /// What they were worth until now.
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
        durable_seq: u64,
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
}

impl Flags {
    fn must_end(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.abandon.load(Ordering::Relaxed)
    }
}

/// See the module documentation.
pub struct Applier {
    dir: PathBuf,
    state: SetState,
    checkpoint: Position,
    applied: Position,
    /// Segment of the first batch applied since the checkpoint.
    first_segment: Option<u64>,
    volumes: HashMap<u32, Volume>,
    catalog: Arc<Catalog>,
    outlet: Arc<Outlet>,
    horizon: Arc<Horizon>,
    flags: Arc<Flags>,
    dirty_since: Option<Instant>,
    bytes_since: u64,
    checkpoint_bytes: u64,
    scratch: Vec<u8>,
    mismatches: Vec<Mismatch>,
    compared: Option<u64>,
    findings: Findings,
    replaying: bool,
    complained: bool,
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
}

impl Applier {
    /// Loads what is known of the set in that directory, or begins with nothing.
    ///
    /// # Errors
    ///
    /// If the state cannot be read.
    #[expect(
        clippy::too_many_arguments,
        reason = "called once, each is a part of its own"
    )]
    pub fn load(
        dir: &Path,
        source_id: Uuid,
        set: &str,
        catalog: Arc<Catalog>,
        outlet: Arc<Outlet>,
        horizon: Arc<Horizon>,
        flags: Arc<Flags>,
        checkpoint_bytes: u64,
    ) -> Result<Self, OpenError> {
        let fresh = || Saved {
            state: SetState::new(source_id, set),
            checkpoint: Position::default(),
        };
        let saved: Saved = state_file::load(&dir.join("state"))?.unwrap_or_else(fresh);
        Ok(Self {
            dir: dir.to_owned(),
            state: saved.state,
            checkpoint: saved.checkpoint,
            applied: saved.checkpoint,
            first_segment: None,
            volumes: HashMap::new(),
            catalog,
            outlet,
            horizon,
            flags,
            dirty_since: None,
            bytes_since: 0,
            checkpoint_bytes,
            scratch: vec![],
            mismatches: vec![],
            compared: None,
            findings: Findings::new(dir.join("verify.log")),
            replaying: false,
            complained: false,
        })
    }

    /// Opens the volumes that the set had, replays the journal and makes the result durable.
    /// Returns the number of the next record.
    ///
    /// # Errors
    ///
    /// If journal or state cannot be read or written.
    pub fn replay(&mut self) -> Result<u64, OpenError> {
        self.open_volumes();
        self.replaying = true;
        let mut replay = Replay::new(
            &self.dir.join("journal"),
            self.state.source_id,
            self.checkpoint,
        )?;
        let (mut batches, from) = (0_u64, self.state.applied_seq);
        while let Some(replayed) = replay.next_batch()? {
            if replayed.header.first_seq != self.state.applied_seq + 1 {
                break;
            }
            let mut batch = Batch {
                buffer: replayed.frames,
                end: replayed.end,
                ..Batch::default()
            };
            if !parse_batch(
                &mut batch,
                replayed.header.digest,
                self.state.applied_seq + 1,
            ) {
                tracing::warn!(
                    "The journal of set \"{}\" ends in a torn batch behind record {}; nothing in it was \
                     acknowledged.",
                    self.state.set,
                    self.state.applied_seq
                );
                break;
            }
            self.apply(&batch);
            if self.is_ending() {
                return Err(io::Error::from(io::ErrorKind::Interrupted).into());
            }
            batches += 1;
        }
        self.replaying = false;
        if batches > 0 {
            tracing::info!(
                "Set \"{}\": {batches} batches of the journal were applied again, records {} to {}.",
                self.state.set,
                from + 1,
                self.state.applied_seq
            );
        }
        self.checkpoint()?;
        Ok(self.state.applied_seq + 1)
    }

    fn open_volumes(&mut self) {
        let mut survey = None;
        let bound: Vec<(String, u32)> = self
            .state
            .volumes
            .iter()
            .filter(|(_, volume)| volume.device != 0 && volume.refused.is_none())
            .map(|(label, volume)| (label.clone(), volume.device))
            .collect();
        for (label, device) in bound {
            let known = self
                .state
                .volumes
                .get(&label)
                .and_then(|volume| volume.identity.clone());
            let opened = self.catalog.open(&label).and_then(|mut volume| {
                if volume.examine(known.as_ref(), &NothingPending).is_err() {
                    // What the journal changes again may have been changed before the crash.
                    let survey = survey.get_or_insert_with(|| self.survey());
                    let changes = Changes(survey.get(&device).map_or(&[], Vec::as_slice));
                    volume.examine(known.as_ref(), &changes)?;
                }
                Ok(volume)
            });
            match opened {
                Ok(volume) => {
                    self.volumes.insert(device, volume);
                }
                Err(refusal) => {
                    tracing::error!("{refusal}.");
                    self.refuse(&label, device, &refusal);
                }
            }
        }
    }

    /// Records of the device pass the volume by until it is bound again.
    fn refuse(&mut self, label: &str, device: u32, refusal: &Refusal) {
        let sectors = self.state.volumes.get(label).map(|volume| volume.sectors);
        self.state
            .bind(label, device, sectors.unwrap_or(0), Some(refusal));
    }

    /// The ranges that the journal changes behind the checkpoint, by device.
    fn survey(&self) -> HashMap<u32, Vec<(u64, u64)>> {
        let mut ranges = HashMap::<u32, Vec<(u64, u64)>>::new();
        let dir = self.dir.join("journal");
        // A journal that cannot be read ends the replay as well, with the reason.
        let Ok(mut replay) = Replay::new(&dir, self.state.source_id, self.checkpoint) else {
            return ranges;
        };
        let mut next_seq = self.state.applied_seq + 1;
        while let Ok(Some(replayed)) = replay.next_batch() {
            let (first_seq, digest) = (replayed.header.first_seq, replayed.header.digest);
            let mut batch = Batch {
                buffer: replayed.frames,
                ..Batch::default()
            };
            if first_seq != next_seq || !parse_batch(&mut batch, digest, first_seq) {
                break;
            }
            next_seq = replayed.header.next_seq;
            for item in &batch.items {
                if let Item::Record {
                    kind,
                    body,
                    payload: (start, end),
                    ..
                } = item
                {
                    match action(*kind, body, &batch.buffer[*start..*end]) {
                        Action::Write { offset, data } => {
                            let range = (offset, offset + data.len() as u64);
                            ranges.entry(body.device).or_default().push(range);
                        }
                        Action::Zero { offset, bytes } => {
                            let range = (offset, offset + bytes);
                            ranges.entry(body.device).or_default().push(range);
                        }
                        Action::Compare { .. } | Action::Nothing => {}
                    }
                }
            }
        }
        ranges
    }

    /// Looks whether somebody else writes to the volumes, between what this program writes.
    fn watch_volumes(&mut self) {
        let disturbed = self.volumes.values_mut().filter_map(|volume| {
            let is_disturbed = volume.is_disturbed();
            is_disturbed.then(|| volume.name().to_owned())
        });
        let disturbed: Vec<String> = disturbed.collect();
        for label in disturbed {
            let text = format!(
                "Volume \"{label}\" of set \"{}\" was written to by something else than the target; the copy may differ. \
                 Find who does it, then run dtloop verify --repair on the source",
                self.state.set
            );
            let known = self
                .state
                .volumes
                .get(&label)
                .is_some_and(|volume| volume.alarm.is_some());
            if !known {
                tracing::error!("{text}.");
            }
            self.state
                .raise_alarm(&label, Code::VOLUME_CHANGED, unix_ms(), text);
            self.dirty_since.get_or_insert_with(Instant::now);
            self.tell_alarms();
        }
    }

    fn tell_alarms(&self) {
        for alarm in self.state.alarms() {
            self.outlet.send(&Message::Alarm(alarm));
        }
    }

    /// The stream of the set.
    #[must_use]
    pub fn stream_uuid(&self) -> Uuid {
        self.state.stream_uuid
    }

    /// Works until it is stopped.
    ///
    /// # Errors
    ///
    /// If the state cannot be written.
    pub fn run(
        mut self,
        commands: &Receiver<Command>,
        buffers: &Sender<Batch>,
    ) -> Result<(), OpenError> {
        let mut next = None;
        loop {
            let command = match next.take() {
                Some(command) => Ok(command),
                None => commands.recv_timeout(TICK),
            };
            if self.flags.abandon.load(Ordering::Relaxed) {
                return Ok(());
            }
            match command {
                Ok(Command::Batch(mut batch)) => {
                    self.apply(&batch);
                    batch.items.clear();
                    // The session may have ended; then nobody needs the buffer.
                    let _ = buffers.send(batch);
                    next = match commands.try_recv() {
                        Ok(command) => Some(command),
                        Err(TryRecvError::Empty | TryRecvError::Disconnected) => {
                            self.outlet.send_ack();
                            None
                        }
                    };
                }
                Ok(Command::Enter {
                    hello,
                    durable_seq,
                    reply,
                }) => {
                    // Volumes may be closed now: what was written to them must be durable, and what is
                    // written again later must find them as they are.
                    self.checkpoint()?;
                    let entered = self.enter(&hello, durable_seq);
                    self.checkpoint()?;
                    let _ = reply.send(entered);
                }
                Ok(Command::Bind(offer)) => {
                    self.checkpoint()?;
                    let offers = std::slice::from_ref(&offer);
                    // What is applied is durable, and nothing else came before this.
                    let past = self.state.past(offers, self.state.applied_seq);
                    self.bind(&offer, offers);
                    self.checkpoint()?;
                    self.outlet.send(&Message::Past(self.trusted(past)));
                    self.report_volumes();
                }
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => {
                    if !self.flags.abandon.load(Ordering::Relaxed) {
                        self.checkpoint()?;
                    }
                    return Ok(());
                }
                Ok(Command::Welcomed) => self.tell_alarms(),
                Err(RecvTimeoutError::Timeout) => self.watch_volumes(),
            }
            self.checkpoint_if_due()?;
        }
    }

    fn checkpoint_if_due(&mut self) -> Result<(), OpenError> {
        let late = self
            .dirty_since
            .is_some_and(|since| since.elapsed() >= CHECKPOINT_AFTER);
        let much = self.bytes_since >= self.checkpoint_bytes;
        if late || much || (self.dirty_since.is_some() && self.horizon.is_wanted()) {
            self.checkpoint()?;
            self.outlet.send_ack();
        }
        Ok(())
    }

    /// Makes the volumes durable, then the state, and frees the journal before it.
    fn checkpoint(&mut self) -> Result<(), OpenError> {
        self.watch_volumes();
        while let Some((name, error)) = self.sync_volumes() {
            // When it is time to end, the old checkpoint stays, and the journal behind it.
            if !self.bears(&format!("Volume \"{name}\" cannot be used"), &error) {
                return Ok(());
            }
            self.write_again()?;
        }
        if self.is_ending() {
            return Ok(());
        }
        for volume in self.volumes.values_mut() {
            if let Some(state) = self.state.volumes.get_mut(volume.name()) {
                state.identity = Some(volume.identity());
            }
        }
        let saved = Saved {
            state: self.state.clone(),
            checkpoint: self.applied,
        };
        while let Err(error) = state_file::store(&self.dir.join("state"), &saved) {
            let StateFileError::Io { path, source } = error else {
                return Err(error.into());
            };
            let what = format!("State file {} cannot be written", path.display());
            if !self.bears(&what, &source) {
                return Ok(());
            }
        }
        self.relent();
        self.checkpoint = self.applied;
        self.first_segment = None;
        self.horizon.advance(self.applied);
        self.dirty_since = None;
        self.bytes_since = 0;
        let seq = self.state.applied_seq;
        self.outlet.update(|ack| {
            ack.applied_seq = seq;
            ack.checkpoint_seq = seq;
            ack.journal_bytes = 0;
        });
        Ok(())
    }

    /// Makes all volumes durable; gives the first that fails.
    fn sync_volumes(&mut self) -> Option<(String, io::Error)> {
        self.volumes.values_mut().find_map(|volume| {
            let error = volume.sync().err()?;
            Some((volume.name().to_owned(), error))
        })
    }

    /// Writes all records since the checkpoint again.
    ///
    /// A page that could not be written is reported by one fdatasync and counts as clean from then on: the next one
    /// succeeds, and the page is lost when it leaves the cache. So a failed fdatasync takes back everything since
    /// the last one that succeeded, and the journal has all of it: it is freed only behind a checkpoint. The volume goes
    /// through the states it had since then once more, as in the replay after a crash.
    fn write_again(&mut self) -> Result<(), OpenError> {
        let Some(segment) = self.first_segment else {
            return Ok(());
        };
        // From there on all segments are in use; before it there may be files that wait to be used again.
        let mut at = if segment == self.checkpoint.segment {
            self.checkpoint
        } else {
            Position {
                segment,
                offset: SEGMENT_HEADER_BYTES as u64,
            }
        };
        let mut replay = Replay::new(&self.dir.join("journal"), self.state.source_id, at)?;
        while at < self.applied && !self.is_ending() {
            let gone = || io::Error::other("what was applied since the checkpoint is not in it");
            let replayed = replay.next_batch()?.ok_or_else(gone)?;
            let mut batch = Batch {
                buffer: replayed.frames,
                ..Batch::default()
            };
            let first_seq = replayed.header.first_seq;
            if !parse_batch(&mut batch, replayed.header.digest, first_seq) {
                return Err(gone().into());
            }
            for item in &batch.items {
                if let Item::Record {
                    kind,
                    body,
                    payload: (start, end),
                    ..
                } = item
                {
                    let action = action(*kind, body, &batch.buffer[*start..*end]);
                    // What passed the volume by then does so now.
                    if self.fits(body.device, &action) {
                        self.change_volume(body, &action);
                    }
                }
            }
            at = replayed.end;
        }
        Ok(())
    }

    fn is_ending(&self) -> bool {
        self.complained && self.flags.must_end()
    }

    fn enter(&mut self, hello: &Hello, durable_seq: u64) -> Result<Entered, Refusal> {
        let known_stream = self.state.stream_uuid;
        let past = self.state.past(&hello.devices, durable_seq);
        let admission = self.admit(hello, durable_seq)?;
        self.state.enter(hello, admission);
        if admission != Admission::Resume {
            self.volumes.clear();
        }
        for offer in &hello.devices {
            self.bind(offer, &hello.devices);
        }
        let lost = self
            .state
            .lost
            .map_or((0, 0), |lost| (lost.from, lost.last));
        Ok(Entered {
            admission,
            known_stream,
            lost,
            link: self.state.chain.map(|chain| chain.link),
            volumes: self.reports(),
            past: self.trusted(past),
        })
    }

    /// Admits the source, or follows what an operator decided with `dttarget accept`.
    fn admit(&mut self, hello: &Hello, durable_seq: u64) -> Result<Admission, Refusal> {
        let refusal = match self.state.admit(hello, durable_seq) {
            Ok(admission) => return Ok(admission),
            Err(refusal) => refusal,
        };
        let can_decide = [Code::OLDER_GENERATION, Code::UNRELATED].contains(&refusal.code);
        if !can_decide || std::fs::remove_file(self.dir.join(ACCEPT_FILE)).is_err() {
            return Err(refusal);
        }
        tracing::warn!(
            "Set \"{}\": followed as an operator decided, although: {refusal}.",
            self.state.set
        );
        self.state.accept(hello, durable_seq)
    }

    /// A volume that is refused now is worth nothing, whatever it was.
    fn trusted(&self, mut past: Past) -> Past {
        let bound = |device: &u32| self.volumes.contains_key(device);
        past.mirrored.retain(bound);
        past
    }

    fn bind(&mut self, offer: &DeviceOffer, all: &[DeviceOffer]) {
        let open = self.volumes.remove(&offer.device);
        // A device that came back under its name has a new id; its volume is still open.
        let former = self
            .state
            .volumes
            .get(&offer.label)
            .map(|volume| volume.device);
        let open = open.or_else(|| former.and_then(|device| self.volumes.remove(&device)));
        let result = check_label(offer, all).and_then(|()| {
            self.catalog
                .bind(self.state.source_id, &self.state.set, offer, open)
        });
        let known = self
            .state
            .volumes
            .get(&offer.label)
            .and_then(|volume| volume.identity.clone());
        let result = result.and_then(|mut volume| {
            volume.examine(known.as_ref(), &NothingPending)?;
            Ok(volume)
        });
        match result {
            Ok(volume) => {
                self.state
                    .bind(&offer.label, offer.device, offer.sectors, None);
                self.volumes.insert(offer.device, volume);
            }
            Err(refusal) => {
                tracing::error!(
                    "Device {} of set \"{}\": {refusal}.",
                    offer.device,
                    self.state.set
                );
                let label = if offer.label.is_empty() {
                    format!("device-{}", offer.device)
                } else {
                    offer.label.clone()
                };
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
        self.outlet.send(&Message::Volumes(Volumes {
            volumes: self.reports(),
        }));
    }

    fn apply(&mut self, batch: &Batch) {
        self.watch_volumes();
        self.apply_items(batch);
        for volume in self.volumes.values_mut() {
            volume.settle();
        }
    }

    fn apply_items(&mut self, batch: &Batch) {
        for item in &batch.items {
            if self.flags.abandon.load(Ordering::Relaxed) {
                return;
            }
            match *item {
                Item::Record {
                    seq,
                    kind,
                    body,
                    payload: (start, end),
                } => {
                    self.apply_record(seq, kind, &body, &batch.buffer[start..end]);
                    if self.is_ending() {
                        return;
                    }
                    let content = &batch.buffer[start..end];
                    self.state.chain(kind, &body, content);
                    self.state.on_record(seq, &body);
                }
                Item::Marker {
                    position,
                    marker: Marker::Prove { link },
                } => self.prove(position, link),
                Item::Marker { position, marker } => {
                    self.state.on_marker(position, marker);
                    tracing::info!(
                        "Set \"{}\", position {position}: {marker:?}.",
                        self.state.set
                    );
                }
            }
        }
        self.applied = batch.end;
        self.first_segment.get_or_insert(batch.end.segment);
        self.bytes_since += batch.bytes;
        self.dirty_since.get_or_insert_with(Instant::now);
        let (seq, journal_bytes) = (self.state.applied_seq, self.bytes_since);
        self.outlet.update(|ack| {
            ack.applied_seq = seq;
            ack.journal_bytes = journal_bytes;
        });
        self.report_compared();
    }

    /// Says what the chain is where the source asks; what was asked before a crash is asked again.
    fn prove(&mut self, position: u64, source: Link) {
        let Some(chain) = self.state.chain.filter(|chain| chain.seq + 1 == position) else {
            return;
        };
        if self.replaying {
            return;
        }
        if chain.link != source {
            tracing::error!(
                "Set \"{}\": up to record {} something else was applied than the source sent: the hash chain is {} here \
                 and {} there; its volumes must be verified.",
                self.state.set,
                chain.seq,
                chain::text(&chain.link),
                chain::text(&source)
            );
        }
        self.outlet.send(&Message::Proof(Proof {
            seq: chain.seq,
            source,
            target: chain.link,
        }));
    }

    fn apply_record(&mut self, seq: u64, kind: RecordKind, body: &RecordBody, payload: &[u8]) {
        let action = action(kind, body, payload);
        if action == Action::Nothing {
            return;
        }
        if !self.fits(body.device, &action) {
            if kind == RecordKind::Hash {
                self.note_compared(seq, body, payload, [0; 32]);
            }
            self.state.on_passed_by(body.device);
            return;
        }
        match action {
            Action::Write { .. } | Action::Zero { .. } => self.change_volume(body, &action),
            // After a crash the volume may be ahead of this position: the source asks again.
            Action::Compare { .. } if self.replaying => {}
            Action::Compare {
                offset,
                bytes,
                hash,
            } => {
                let bytes = usize::try_from(bytes).unwrap_or(0);
                let mut found = [0; 32];
                self.until_it_works(body.device, |volume, scratch| {
                    scratch.resize(bytes, 0);
                    volume.read(offset, scratch)?;
                    found = *blake3::hash(scratch).as_bytes();
                    Ok(())
                });
                self.note_compared(seq, body, hash, found);
            }
            Action::Nothing => {}
        }
    }

    /// Whether the device has a volume that is large enough.
    fn fits(&self, device: u32, action: &Action<'_>) -> bool {
        let volume = self.volumes.get(&device);
        volume.is_some_and(|volume| action.end() <= volume.bytes())
    }

    /// What a record does to the content of its volume.
    fn change_volume(&mut self, body: &RecordBody, action: &Action<'_>) {
        match *action {
            Action::Write { offset, data } => {
                self.until_it_works(body.device, |volume, _| volume.write(offset, data));
            }
            Action::Zero { offset, bytes } => {
                self.until_it_works(body.device, |volume, _| volume.zero(offset, bytes));
            }
            Action::Compare { .. } | Action::Nothing => {}
        }
    }

    fn note_compared(&mut self, seq: u64, body: &RecordBody, source: &[u8], hash: [u8; 32]) {
        self.compared = Some(seq);
        let (device, start_sector, sectors) = (body.device, body.start_sector, body.sectors);
        let found = Mismatch {
            seq,
            device,
            start_sector,
            sectors,
            hash,
        };
        let label = self.state.label_of(device).unwrap_or_default();
        self.findings.on_compared(label, &found, source);
        if source != hash {
            self.mismatches.push(found);
        }
    }

    fn report_compared(&mut self) {
        self.findings.write(&self.state.set);
        let Some(last) = self.compared.take() else {
            return;
        };
        let mut mismatches = std::mem::take(&mut self.mismatches);
        while !mismatches.is_empty() {
            let rest = mismatches.split_off(mismatches.len().min(dtloop_proto::limits::RANGES_MAX));
            let through_seq = if rest.is_empty() {
                last
            } else {
                mismatches.last().map_or(last, |m| m.seq)
            };
            self.outlet.send(&Message::Verified(Verified {
                through_seq,
                mismatches,
            }));
            mismatches = rest;
        }
        self.outlet.send(&Message::Verified(Verified {
            through_seq: last,
            mismatches: vec![],
        }));
    }

    /// Repeats an operation on a volume until it succeeds: a record is never left out. The source
    /// is told, and held back by the journal that fills.
    fn until_it_works(
        &mut self,
        device: u32,
        mut run: impl FnMut(&mut Volume, &mut Vec<u8>) -> io::Result<()>,
    ) {
        let mut failed = false;
        while let Some(volume) = self.volumes.get_mut(&device) {
            let Err(error) = run(volume, &mut self.scratch) else {
                break;
            };
            failed = true;
            let what = format!("Volume \"{}\" cannot be used", volume.name());
            if !self.bears(&what, &error) {
                return;
            }
        }
        if failed {
            self.relent();
        }
    }

    /// Tells, once, what fails, and lets some time pass before it is tried again. False when there is no time left, as
    /// the program ends.
    fn bears(&mut self, what: &str, error: &io::Error) -> bool {
        if !std::mem::replace(&mut self.complained, true) {
            let code = match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Code::VOLUME_FULL,
                _ => Code::VOLUME_IO,
            };
            let text = format!("{what}: {error}; it is tried again every second, nothing is lost");
            tracing::error!("{text}.");
            self.outlet.trouble(Notice { code, text });
        }
        if self.flags.must_end() {
            return false;
        }
        std::thread::sleep(RETRY_AFTER);
        true
    }

    /// Tells that it works again, if it was told that something does not.
    fn relent(&mut self) {
        if std::mem::replace(&mut self.complained, false) {
            let text = "All volumes can be used again".to_owned();
            tracing::info!("{text}.");
            let code = Code::OK;
            self.outlet.relief(Notice { code, text });
        }
    }
}

/// Fills in the items of a batch read from the journal. False if it is torn.
fn parse_batch(batch: &mut Batch, digest: u32, first_seq: u64) -> bool {
    let mut found = crc32fast::Hasher::new();
    let mut sequence = dtloop_core::sequence::Sequencer::new(first_seq);
    let mut at = 0;
    while at < batch.buffer.len() {
        let Ok(Decoded::Complete {
            header,
            frame,
            bytes,
        }) = dtloop_proto::decode(&batch.buffer[at..])
        else {
            return false;
        };
        found.update(&batch.buffer[at..at + dtloop_proto::header::HEADER_BYTES]);
        match frame {
            Frame::Record {
                kind,
                body,
                payload,
            } => {
                if sequence.arrive(header.seq) != Ok(dtloop_core::sequence::Arrival::Next) {
                    return false;
                }
                let payload = (at + bytes - payload.len(), at + bytes);
                batch.items.push(Item::Record {
                    seq: header.seq,
                    kind,
                    body,
                    payload,
                });
            }
            Frame::Message(Message::Marker(marker)) => {
                batch.items.push(Item::Marker {
                    position: header.seq,
                    marker,
                });
            }
            Frame::Message(_) => return false,
        }
        at += bytes;
    }
    batch.bytes = batch.buffer.len() as u64;
    found.finalize() == digest
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{JournalConfig, Size, VolumeConfig};
    use crate::journal::{BatchInfo, Journal};
    use dtloop_proto::Op;
    use dtloop_proto::header::HEADER_BYTES;
    use dtloop_proto::record::STATE_COMMITTED;
    use std::os::unix::fs::FileExt;

    const SOURCE: Uuid = Uuid([1; 16]);

    fn frame(seq: u64, fill: u8) -> Vec<u8> {
        let body = RecordBody {
            epoch: 0,
            start_sector: seq,
            time_ns: 0,
            aux: 0,
            sectors: 1,
            device: 1,
            flags: 0,
            op: Op::Write,
            state: STATE_COMMITTED,
        };
        let (mut bytes, payload) = (vec![], [fill; 512]);
        dtloop_proto::frame::encode_record(&mut bytes, 9, seq, RecordKind::Data, &body, &payload)
            .unwrap();
        bytes.extend_from_slice(&payload);
        bytes
    }

    /// A set with one volume, bound, at record 0.
    fn prepare(dir: &Path) -> Arc<Catalog> {
        let path = dir.join("vol.img");
        let volume = VolumeConfig {
            name: "vol".into(),
            path,
            size: Some(Size(64 << 10)),
        };
        let mut state = SetState::new(SOURCE, "db");
        state.bind("vol", 1, 128, None);
        std::fs::create_dir_all(dir.join("journal")).unwrap();
        let saved = Saved {
            state,
            checkpoint: Position::default(),
        };
        state_file::store(&dir.join("state"), &saved).unwrap();
        Arc::new(Catalog::new(dir, vec![volume]))
    }

    fn load(dir: &Path, catalog: &Arc<Catalog>) -> Applier {
        let (outlet, horizon, flags) = (Arc::default(), Arc::default(), Arc::default());
        let catalog = Arc::clone(catalog);
        Applier::load(dir, SOURCE, "db", catalog, outlet, horizon, flags, 1 << 20).unwrap()
    }

    fn replay(dir: &Path, catalog: &Arc<Catalog>) -> u64 {
        load(dir, catalog).replay().unwrap()
    }

    fn open_journal(dir: &Path) -> Journal {
        let config = JournalConfig {
            size: Size(1 << 20),
            segment_size: Size(256 << 10),
        };
        Journal::open(&dir.join("journal"), config, SOURCE, Arc::default()).unwrap()
    }

    /// Appends two records, and gives them as a batch that is to be applied.
    fn append(journal: &mut Journal, first_seq: u64, fills: [u8; 2]) -> Batch {
        let frames = [frame(first_seq, fills[0]), frame(first_seq + 1, fills[1])];
        let mut digest = crc32fast::Hasher::new();
        for frame in &frames {
            digest.update(&frame[..HEADER_BYTES]);
        }
        let digest = digest.finalize();
        let info = BatchInfo {
            frames: 2,
            digest,
            first_seq,
            next_seq: first_seq + 2,
        };
        let end = journal
            .append(&[&frames[0], &frames[1]], info, Uuid::NONE)
            .unwrap();
        let mut batch = Batch {
            buffer: frames.concat(),
            end,
            ..Batch::default()
        };
        assert!(parse_batch(&mut batch, digest, first_seq));
        batch
    }

    #[test]
    fn everything_since_the_checkpoint_can_be_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = prepare(dir.path());
        // What an earlier use of the journal left: valid, and of no concern.
        append(&mut open_journal(dir.path()), 1, [8, 9]);
        let image = || std::fs::read(dir.path().join("vol.img")).unwrap();
        let sectors = || [1, 2, 3, 4].map(|sector: usize| image()[sector * 512]);
        let spoil = || std::fs::write(dir.path().join("vol.img"), [0xee; 64 << 10]).unwrap();

        let mut applier = load(dir.path(), &catalog);
        applier.open_volumes();
        let mut journal = open_journal(dir.path());
        applier.write_again().unwrap();
        for (first_seq, fills) in [(1, [1, 2]), (3, [3, 4])] {
            applier.apply(&append(&mut journal, first_seq, fills));
        }
        spoil();
        applier.write_again().unwrap();
        assert_eq!(sectors(), [1, 2, 3, 4]);

        // Behind a checkpoint, only what came since.
        applier.checkpoint().unwrap();
        applier.apply(&append(&mut journal, 5, [5, 6]));
        spoil();
        applier.write_again().unwrap();
        assert_eq!(sectors(), [0xee; 4]);
        assert_eq!((image()[5 * 512], image()[6 * 512]), (5, 6));

        // What reaches beyond the volume passed it by, and still does.
        for first_seq in (7..128).step_by(2) {
            applier.apply(&append(&mut journal, first_seq, [7, 8]));
        }
        applier.write_again().unwrap();
        assert_eq!((image().len(), image()[127 * 512]), (64 << 10, 7));

        // A journal that does not have it any more is not passed over.
        std::fs::remove_dir_all(dir.path().join("journal")).unwrap();
        assert!(applier.write_again().is_err());
    }

    #[test]
    fn a_torn_tail_is_cut_and_nothing_acknowledged_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = prepare(dir.path());
        let state = std::fs::read(dir.path().join("state")).unwrap();
        let mut journal = open_journal(dir.path());
        let mut last = (Position::default(), Position::default());
        for batch in 0..3 {
            last = (last.1, append(&mut journal, batch * 2 + 1, [1, 2]).end);
        }
        drop(journal);
        let segment = dir.path().join("journal/0000000000000001.seg");
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&segment)
            .unwrap();
        let used = 64 + 2 * (HEADER_BYTES as u64 + 48 + 512);
        // All of the batch header and of the first frame's header and body, then samples.
        let places = (0..160)
            .chain((160..used).step_by(23))
            .map(|at| last.0.offset + at);
        for at in places {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
            std::fs::write(dir.path().join("state"), &state).unwrap();
            assert_eq!(replay(dir.path(), &catalog), 5, "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        std::fs::write(dir.path().join("state"), &state).unwrap();
        assert_eq!(replay(dir.path(), &catalog), 7);
        let image = std::fs::read(dir.path().join("vol.img")).unwrap();
        let expected = |sector: usize| match sector {
            1..=6 => u8::try_from(2 - sector % 2).unwrap(),
            _ => 0,
        };
        assert!(
            image
                .chunks(512)
                .enumerate()
                .all(|(n, data)| data.iter().all(|b| *b == expected(n)))
        );
    }
}
