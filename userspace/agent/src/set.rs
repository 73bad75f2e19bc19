// SPDX-License-Identifier: GPL-2.0-only

//! The thread of a set: finds its stream, keeps its connection, moves its records.
//!
//! ```text
//!   no stream --> disconnected --> shipping --cut--> disconnected ...
//!       ^             |                |
//!       +-------------+----------------+  the stream cannot be used any more
//! ```
//!
//! One thread does all of it, so nothing here is locked: records, acknowledgements, requests of
//! `dtloop` and the reads of mirrors are taken in turn.

mod durable;
mod jobs;
mod meanwhile;
mod origin;
mod proof;
mod queueing;
mod recovery;
mod requests;
mod shared;
mod shipping;
mod staging;
mod status;
mod verify;
mod watch;

use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtloop_abi::{CaptureStream, raw};
use dtloop_api::{Connection, Rates, Totals};
use dtloop_canary::Canary;
use dtloop_core::ladder::Ladder;
use dtloop_core::mirror::{DeviceJob, JobKind, JobState, Planner};
use dtloop_core::replica::{Need, SetMemory};
use dtloop_core::resync::Resync;
use dtloop_core::source::{Resumed, SessionError, SourceSession};
use dtloop_disk::{Disk, RealDisk};
use dtloop_proto::message::{
    DeviceOffer, Hello, Marker, Past, Refuse, Staging, StagingPhase, VolumeReport, VolumeSync,
    Welcome,
};
use dtloop_proto::{Message, Uuid};
use dtloop_trust::Vault;

use queueing::LostRange;
use shared::lock;
pub use shared::{Command, SetShared};

use crate::config::SetConfig;
use crate::link::{Link, LinkError};
use crate::shaper::Shaper;
use crate::ship::{Outbox, ShipError};
use crate::snapshot::{JobView, recovery};
use crate::spooler::{self, QueueHandle};
use crate::streams::Streams;

/// Longest time for the target's answer to the hello: it may be replaying its journal.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(30);

/// A ping is sent when nothing else was received for this long.
const PING_AFTER: Duration = Duration::from_secs(5);

/// How often a stream that is not there is looked for.
const STREAM_RETRY: Duration = Duration::from_millis(500);

/// First pause before a connection is tried again; it doubles.
const RETRY_MIN: Duration = Duration::from_millis(50);

/// While records come, the thread sleeps until this many more have come or [`BUSY_WAIT`] is over.
const WAKE_AHEAD: u64 = 64;

/// Longest wait for a device that was announced in the stream.
const DEVICE_WAIT: Duration = Duration::from_secs(2);

/// See [`WAKE_AHEAD`].
const BUSY_WAIT: Duration = Duration::from_millis(1);

/// Longest sleep of an idle set; publishing and pings need no finer clock.
const IDLE_WAIT: Duration = Duration::from_secs(1);

/// Sleep when a mirror waits for room in the ring.
const JOB_WAIT: Duration = Duration::from_millis(5);

/// How often the state is published when nobody waits for it.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);

/// How often the place of a mirror is made durable.
const PERSIST_EVERY: Duration = Duration::from_secs(1);

/// Rates are averages of at least this time, in milliseconds.
const RATES_EVERY_MS: u64 = 2000;

/// How often a device is offered again whose volume the target could not use.
const OFFER_EVERY: Duration = Duration::from_secs(10);

/// Pause of a resync after the source could not read its device.
const RESYNC_RETRY: Duration = Duration::from_secs(1);

/// Why a job ended that an operator stopped.
const STOPPED: &str = "An operator stopped it";
/// How often the kernel is told what the target has, for its intent map.
const INTENT_EVERY: Duration = Duration::from_secs(1);

/// Requests to the kernel for mirror and resync between two looks at the ring.
const REQUESTS_PER_TURN: usize = 8;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("{0}")]
    Link(#[from] LinkError),
    #[error("{0}")]
    Session(#[from] SessionError),
    #[error("the target refuses: {}", .0.text)]
    Refused(Refuse),
    #[error("{0}")]
    Stream(String),
    #[error("it goes on behind records that are lost")]
    Lost,
    #[error("an operator lets the target give up its last consistent state, which it is told now")]
    InPlace,
    #[error("dtagent ends")]
    Stopping,
}

impl From<ShipError> for End {
    fn from(error: ShipError) -> Self {
        match error {
            ShipError::Link(error) => Self::Link(error),
            other => Self::Stream(other.to_string()),
        }
    }
}

impl From<dtloop_abi::Error> for End {
    fn from(error: dtloop_abi::Error) -> Self {
        Self::Stream(error.to_string())
    }
}

impl From<dtloop_proto::FrameError> for End {
    fn from(error: dtloop_proto::FrameError) -> Self {
        Self::Link(error.into())
    }
}

/// A session that the target has welcomed.
struct Session {
    id: u64,
    link: Link,
    core: SourceSession,
    outbox: Outbox,
    since: Instant,
    pinged: Instant,
    /// Batches that are not applied, oldest first.
    batches: VecDeque<Sent>,
}

/// Figures at the time the rates were last computed.
#[derive(Clone, Copy)]
struct Measured {
    at: Instant,
    next_seq: u64,
    payload: u64,
    sent: u64,
    applied: u64,
}

/// A batch that was sent.
#[derive(Default)]
struct Sent {
    /// Its last record.
    last: u64,
    /// When its first record was made.
    time_ns: u64,
    /// Its payload.
    bytes: u64,
    /// When its first live change was made.
    live_ns: Option<u64>,
}

/// The thread's own.
pub struct Worker {
    config: SetConfig,
    shared: Arc<SetShared>,
    streams: Arc<dyn Streams>,
    source_id: Uuid,
    vault: Arc<Vault>,
    /// What this machine was paired with when a connection was last tried.
    tried_with: Option<u64>,
    path: PathBuf,
    memory: SetMemory,
    persisted: SetMemory,
    persisted_at: Instant,
    planner: Option<Planner>,
    job: Option<JobView>,
    resync: Resync,
    resync_after: Option<Instant>,
    /// See [`OFFER_EVERY`].
    offered_at: Option<Instant>,
    devices: Vec<raw::DeviceStatus>,
    reports: Vec<VolumeReport>,
    /// What the target said last about the time before.
    past: Past,
    /// Sectors of a region of the intent map.
    region_sectors: u64,
    /// How far the regions of a device are settled.
    settled: Option<(u32, u64)>,
    intents_tended: Instant,
    flushes: durable::Flushes,
    /// Version of the intent file that the target was told.
    intent_told: u64,
    last_verify: Vec<dtloop_api::VerifyResult>,
    chain: proof::ChainKeeper,
    /// The chain begins anew with a new connection, which is to be made.
    renew_chain: bool,
    verifier: verify::Verifier,
    origins: origin::Origins,
    last_recovery: Vec<dtloop_api::Recovery>,
    lost: Option<(u64, u64)>,
    /// What makes the copy whole was sent below this record: until the target has applied it, the copy is not.
    whole_at: u64,
    notice: Option<String>,
    /// Where the target puts changes.
    staging: Staging,
    /// An operator lets the target give up its last consistent state; it is to be told.
    in_place: bool,
    connection: Connection,
    totals: Totals,
    rates: Rates,
    applied_bytes: u64,
    measured: Measured,
    published: Instant,
    shaper: Shaper,
    /// What the set keeps is there.
    disk: Arc<dyn Disk>,
    queue_disk: Arc<dyn Disk>,
    queue: Option<QueueHandle>,
    /// Where records wait; the queue's thread has it while there is one.
    ladder: Ladder,
    began: Instant,
    /// Records that could not be read back from the queue, until the target knows of the hole.
    hole: Option<LostRange>,
}

impl Worker {
    /// Loads what is known of the set.
    ///
    /// # Errors
    ///
    /// If its state file cannot be read.
    pub fn new(
        config: SetConfig,
        state_dir: &std::path::Path,
        source_id: Uuid,
        streams: Arc<dyn Streams>,
        shared: Arc<SetShared>,
    ) -> Result<Self, dtloop_store::StateFileError> {
        Self::on(
            Arc::new(RealDisk),
            config,
            state_dir,
            source_id,
            streams,
            shared,
        )
    }

    /// As [`Worker::new`], with everything that the set keeps on that disk.
    ///
    /// # Errors
    ///
    /// If its state file cannot be read.
    pub fn on(
        disk: Arc<dyn Disk>,
        config: SetConfig,
        state_dir: &std::path::Path,
        source_id: Uuid,
        streams: Arc<dyn Streams>,
        shared: Arc<SetShared>,
    ) -> Result<Self, dtloop_store::StateFileError> {
        let path = state_dir.join(format!("{}.set", config.name));
        let memory: SetMemory = dtloop_store::load_on(&*disk, &path)?.unwrap_or_default();
        let last_verify =
            dtloop_store::load_on(&*disk, &path.with_extension("verified"))?.unwrap_or_default();
        let log_path = path.with_extension("verify.log");
        shared.set_verify_log(&log_path);
        let last_recovery = memory
            .job
            .iter()
            .filter(|job| job.kind == JobKind::Recover && job.is_over())
            .flat_map(|job| job.devices.iter().map(|item| recovery(job, item)))
            .collect();
        let now = dtloop_runtime::now();
        let reason = "dtagent has just started".to_owned();
        let start_at = config.queue.as_ref().map_or(100, |queue| queue.start_at);
        Ok(Self {
            shaper: Shaper::new(&disk, &config, state_dir),
            queue: None,
            ladder: Ladder::new(start_at, spooler::now(now)),
            began: now,
            hole: None,
            config,
            shared,
            streams,
            source_id,
            vault: Arc::new(Vault::new(state_dir)),
            tried_with: None,
            chain: proof::ChainKeeper::new(Arc::clone(&disk), path.with_extension("chain")),
            renew_chain: false,
            verifier: verify::Verifier::new(Arc::clone(&disk), log_path),
            origins: origin::Origins::new(now),
            path,
            // What was read may be in memory only, where an agent that was killed had just put it: it is written again before
            // anybody hears of it.
            persisted: SetMemory::default(),
            memory,
            persisted_at: now,
            planner: None,
            job: None,
            resync: Resync::new(vec![]),
            resync_after: None,
            offered_at: None,
            devices: vec![],
            reports: vec![],
            last_verify,
            past: Past::default(),
            region_sectors: 0,
            settled: None,
            intents_tended: now,
            flushes: durable::Flushes::new(now),
            intent_told: 0,
            last_recovery,
            lost: None,
            whole_at: 0,
            notice: None,
            staging: Staging::default(),
            in_place: false,
            connection: Connection::Connecting {
                reason,
                retry_ms: 0,
            },
            totals: Totals::default(),
            rates: Rates::default(),
            applied_bytes: 0,
            measured: Measured {
                at: now,
                next_seq: 0,
                payload: 0,
                sent: 0,
                applied: 0,
            },
            published: now,
            queue_disk: Arc::clone(&disk),
            disk,
        })
    }

    /// Keeps the disk queue there.
    #[must_use]
    pub fn with_queue_disk(mut self, disk: Arc<dyn Disk>) -> Self {
        self.queue_disk = disk;
        self
    }

    /// Works until it is stopped.
    pub fn run(mut self) {
        let mut said = String::new();
        while !self.shared.is_stopping() {
            match self.streams.open(&self.config.name) {
                Ok(stream) => {
                    said.clear();
                    let end = self.serve(&stream);
                    self.stop_queue();
                    self.drop_planner();
                    if !matches!(end, End::Stopping) {
                        tracing::error!(
                            "Set \"{}\": {end}. The stream is opened anew.",
                            self.config.name
                        );
                        self.rest(None, STREAM_RETRY);
                    }
                }
                Err(reason) => {
                    if said != reason {
                        tracing::warn!("Set \"{}\": {reason}.", self.config.name);
                        said.clone_from(&reason);
                    }
                    self.connection = Connection::Idle { reason };
                    self.rest(None, STREAM_RETRY);
                }
            }
        }
        self.persist(true);
    }

    fn drop_planner(&mut self) {
        if let Some(planner) = self.planner.take() {
            self.memory.job = Some(planner.state().clone());
        }
        self.persist(true);
    }

    /// Waits without a session, answering requests; not longer than until a refusal may no longer be one. True: that is so.
    fn rest(&mut self, stream: Option<&dyn CaptureStream>, time: Duration) -> bool {
        let until = dtloop_runtime::now() + time;
        let refused = matches!(self.connection, Connection::Refused { .. });
        loop {
            self.take_commands(stream);
            if let Some(stream) = stream {
                self.note_intents(stream);
            }
            // Behind the requests: what is published next is what those wait for who have just asked.
            self.notice_pairing();
            if refused && !matches!(self.connection, Connection::Refused { .. }) {
                return true;
            }
            self.publish(stream, None);
            let left = until.saturating_duration_since(dtloop_runtime::now());
            if left.is_zero() || self.shared.is_stopping() {
                return false;
            }
            if let Connection::Connecting { retry_ms, .. } = &mut self.connection {
                *retry_ms = crate::snapshot::ms(left);
            }
            self.wait_for_wake(left.min(PUBLISH_EVERY));
        }
    }

    /// Whatever this machine was refused for before it was paired is no answer to anybody any more.
    fn notice_pairing(&mut self) {
        let refused = matches!(self.connection, Connection::Refused { .. });
        if refused && self.pairings() != self.tried_with {
            let reason = "this machine was paired a moment ago".to_owned();
            self.connection = Connection::Connecting {
                reason,
                retry_ms: 0,
            };
        }
    }

    /// None: not known.
    fn pairings(&self) -> Option<u64> {
        let targets = self.vault.targets().ok();
        targets.map(|targets| targets.changes())
    }

    fn wait_for_wake(&self, timeout: Duration) {
        // Whatever ends the wait, what is to be done is looked for.
        let _ = dtloop_runtime::wait_readable(&[self.shared.wake.as_fd()], timeout);
        let _ = self.shared.wake.read();
    }

    fn persist(&mut self, now: bool) {
        if let Some(planner) = &self.planner {
            if self.memory.job.as_ref() != Some(planner.state()) {
                self.memory.job = Some(planner.state().clone());
            }
        }
        // A mirror that has come to rest is not waited for: its place must be found again.
        let rests = |planner: &Planner| planner.state().paused && planner.in_flight() == 0;
        let now = now || self.planner.as_ref().is_some_and(rests);
        if self.memory == self.persisted
            || (!now && dtloop_runtime::elapsed(self.persisted_at) < PERSIST_EVERY)
        {
            return;
        }
        match dtloop_store::store_on(&*self.disk, &self.path, &self.memory) {
            Ok(()) => self.persisted = self.memory.clone(),
            Err(error) => tracing::error!(
                "Set \"{}\": {:#}.",
                self.config.name,
                anyhow::Error::from(error)
            ),
        }
        self.persisted_at = dtloop_runtime::now();
    }

    fn offers(&self) -> Vec<DeviceOffer> {
        let offer = |device: &raw::DeviceStatus| DeviceOffer {
            device: device.device_id,
            label: device.label().to_owned(),
            sectors: device.sectors,
            block_bytes: device.block_bytes,
        };
        self.devices.iter().map(offer).collect()
    }

    fn refresh_devices(&mut self, stream: &dyn CaptureStream) -> Result<(), End> {
        self.devices = stream.devices()?;
        let devices = self.devices.clone();
        let mut joined = vec![];
        for (offer, device) in self.offers().iter().zip(&devices) {
            if self.memory.enter_device(offer) {
                joined.push(*device);
            }
        }
        self.check_origins(stream, &joined)?;
        self.watch(&devices);
        self.set_resync_devices();
        Ok(())
    }

    /// Only devices whose mirror is complete or under way: another one is read as a whole anyway. While a mirror is under
    /// way, what misses the stream may be where it has been already: the order must not be declared whole without that, or
    /// the copy would seem whole with the end of the mirror.
    fn set_resync_devices(&mut self) {
        let mirrors = |id: u32| {
            let planner = self.planner.as_ref();
            let planner = planner.filter(|planner| planner.state().kind.is_mirror());
            planner.is_some_and(|planner| {
                let mut items = planner.state().devices.iter();
                items.any(|item| item.device == id && item.begun)
            }) && !dtloop_canary::bites(Canary::MirrorLeftOutOfResync)
        };
        let mirrored = self
            .memory
            .devices
            .values()
            .filter(|memory| memory.mirrored || mirrors(memory.device))
            .map(|memory| memory.device);
        let present =
            mirrored.filter(|id| self.devices.iter().any(|device| device.device_id == *id));
        let present = present.collect();
        self.resync.set_devices(present);
    }

    fn serve(&mut self, stream: &Arc<dyn CaptureStream>) -> End {
        if let Err(end) = self.enter_stream(stream.as_ref()) {
            return end;
        }
        self.start_queue(stream);
        let stream = stream.as_ref();
        let mut pause = RETRY_MIN;
        let mut said = String::new();
        while !self.shared.is_stopping() {
            let connected = self.connect(stream);
            let end = match connected {
                Ok(session) => {
                    let (before, begin) = (stream.ring().released(), dtloop_runtime::now());
                    let end = self.ship(stream, session);
                    // A target that welcomes and then takes nothing (its journal is full) is no better than none.
                    let went_on = stream.ring().released() > before;
                    if went_on || dtloop_runtime::elapsed(begin) > self.config.retry_max() {
                        pause = RETRY_MIN;
                        said.clear();
                    }
                    end
                }
                Err(end) => end,
            };
            if let Some(planner) = &mut self.planner {
                planner.on_disconnect();
            }
            self.resync.on_loss();
            match end {
                End::Stream(_) | End::Stopping => return end,
                End::Refused(ref refuse) if !refuse.code.is_passing() => {
                    self.connection = Connection::Refused {
                        reason: refuse.text.clone(),
                    };
                    pause = self.config.retry_max() * 5;
                }
                End::Link(ref error) if error.is_refusal() => {
                    self.connection = Connection::Refused {
                        reason: error.to_string(),
                    };
                    // Until somebody pairs, which is noticed at once.
                    pause = self.config.retry_max();
                }
                _ => {
                    self.connection = Connection::Connecting {
                        reason: end.to_string(),
                        retry_ms: 0,
                    }
                }
            }
            let text = end.to_string();
            if said != text {
                tracing::warn!(
                    "Set \"{}\", target {}: {text}. It is tried again.",
                    self.config.name,
                    self.config.target
                );
                said = text;
            }
            self.persist(false);
            let is_paired = self.rest(Some(stream), pause);
            pause = (pause * 2).min(self.config.retry_max());
            if is_paired {
                pause = RETRY_MIN;
            }
        }
        End::Stopping
    }

    fn enter_stream(&mut self, stream: &dyn CaptureStream) -> Result<(), End> {
        let uuid = Uuid(stream.status()?.stream_uuid);
        if self.memory.enter_stream(uuid) {
            tracing::info!(
                "Set \"{}\": stream {uuid} is new; devices that were mirrored before are compared again.",
                self.config.name
            );
        } else {
            self.forget_origins();
        }
        self.chain.load(uuid);
        self.refresh_devices(stream)?;
        self.watch_intents(stream)?;
        self.settled = None;
        self.forget_flushes();
        self.whole_at = 0;
        let job = self.memory.job.clone().filter(|job| !job.is_over());
        self.job = job
            .as_ref()
            .map(|job| JobView::new(job.clone(), stream.ring().next_seq()));
        self.planner = job.map(Planner::new);
        self.persist(true);
        Ok(())
    }

    fn connect(&mut self, stream: &dyn CaptureStream) -> Result<Session, End> {
        self.refresh_devices(stream)?;
        self.await_queue()?;
        if self.devices.is_empty() && self.is_all_shipped(stream) {
            let reason = "no device is attached to the set".to_owned();
            self.connection = Connection::Idle { reason };
            return Err(End::Link(LinkError::Io(std::io::Error::other(
                "no device is attached to the set",
            ))));
        }
        let reason = match &self.connection {
            Connection::Connecting { reason, .. } => reason.clone(),
            _ => "it is being made".to_owned(),
        };
        self.connection = Connection::Connecting {
            reason,
            retry_ms: 0,
        };
        let (target, transport) = (self.config.target.clone(), self.config.transport);
        let vault = Arc::clone(&self.vault);
        self.tried_with = self.pairings();
        let mut link = Link::connect(
            &target,
            transport,
            &vault,
            &mut self.meanwhile(stream, None),
        )?;
        let (first_seq, next_seq) = (self.first_seq(stream), stream.ring().next_seq());
        let mut options = self.past_options();
        options.extend(self.hello_options());
        let hello = Hello {
            version_min: dtloop_proto::VERSION_MIN,
            version_max: dtloop_proto::VERSION_MAX,
            software: crate::software(),
            source_id: self.source_id,
            set: self.config.name.clone(),
            stream_uuid: self.memory.stream_uuid,
            generation: self.memory.generation,
            first_seq,
            next_seq,
            devices: self.offers(),
            options,
        };
        let mut outbox = Outbox::default();
        outbox.message(0, 0, &Message::Hello(hello))?;
        let meanwhile = &mut self.meanwhile(stream, None);
        outbox.send(&mut link, None, None, meanwhile)?;
        let welcome = match link.expect_message(WELCOME_TIMEOUT, meanwhile)? {
            (_, Message::Welcome(welcome)) => welcome,
            (_, Message::Refuse(refuse)) => return Err(End::Refused(refuse)),
            _ => return Err(End::Link(LinkError::Flood)),
        };
        let Message::Past(past) = link.expect_message(WELCOME_TIMEOUT, meanwhile)?.1 else {
            return Err(End::Link(LinkError::Flood));
        };
        let (core, resumed) =
            SourceSession::begin(&welcome, self.memory.stream_uuid, first_seq, next_seq)?;
        let now = dtloop_runtime::now();
        let id = welcome.session;
        let mut session = Session {
            id,
            link,
            core,
            outbox,
            since: now,
            pinged: now,
            batches: VecDeque::new(),
        };
        let next = session.core.next_to_send();
        self.begin_comparing(next);
        self.resume_chain(stream, &welcome, resumed, next - 1)?;
        self.past = past;
        self.shaper.begin_session(&welcome.options);
        // Before anything can queue up: its answer tells how far the target is away.
        session
            .outbox
            .message(id, 0, &Message::Ping(session.core.next_to_send()))?;
        let meanwhile = &mut self.meanwhile(stream, None);
        session
            .outbox
            .send(&mut session.link, None, None, meanwhile)?;
        self.reconcile(stream, &mut session, welcome, resumed)?;
        self.totals.connections += 1;
        tracing::info!(
            "Set \"{}\" is connected to {}; it goes on at record {}.",
            self.config.name,
            self.config.target,
            session.core.next_to_send()
        );
        Ok(session)
    }

    /// Brings what both sides know of the volumes together.
    fn reconcile(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        welcome: Welcome,
        resumed: Resumed,
    ) -> Result<(), End> {
        self.staging = Staging {
            phase: StagingPhase::of(&welcome.options),
            ..Staging::default()
        };
        self.reports = welcome.volumes;
        self.lost = (welcome.lost_from != 0).then_some((welcome.lost_from, welcome.lost_last));
        self.notice = None;
        self.in_place = false;
        let broken = match resumed {
            Resumed::Continues => None,
            Resumed::NewStream if welcome.known_stream.is_none() => {
                Some("the target knows nothing of the set".to_owned())
            }
            Resumed::NewStream => Some("the stream began anew".to_owned()),
            Resumed::Hole { from, to } => Some(self.explain_hole(from, to)),
        };
        let position = session.core.next_to_send();
        let held = self.held();
        if broken.is_some() {
            for device in self.devices.iter().map(|device| device.device_id) {
                self.memory.set_mirrored(device, false);
            }
        }
        for report in &mut self.reports {
            let job = self
                .planner
                .as_ref()
                .filter(|planner| planner.state().kind.is_mirror());
            let busy = job.is_some_and(|planner| {
                planner
                    .state()
                    .devices
                    .iter()
                    .any(|item| item.device == report.device && item.begun && !item.ended)
            });
            let mirrored = self
                .memory
                .devices
                .values()
                .any(|item| item.device == report.device && item.mirrored);
            if mirrored && !busy && report.sync == VolumeSync::Mirroring {
                // The target did not get to know how its mirror ended.
                let marker = Marker::MirrorEnd {
                    device: report.device,
                };
                session
                    .outbox
                    .message(session.id, position, &Message::Marker(marker))?;
                report.sync = VolumeSync::Mirrored;
            }
        }
        self.restart_lost_mirrors(broken.is_some());
        self.evaluate(stream, session, broken.as_deref(), &held)?;
        let version = stream.intent_status()?.version;
        self.tell_version(session, version)?;
        self.set_resync_devices();
        self.persist(true);
        Ok(())
    }

    /// A mirror whose beginning the target does not remember begins again.
    fn restart_lost_mirrors(&mut self, broken: bool) {
        let Some(planner) = self.planner.take() else {
            return;
        };
        let mut state = planner.state().clone();
        let mut restarted = false;
        if state.kind.is_mirror() {
            for item in state
                .devices
                .iter_mut()
                .filter(|item| item.begun && (broken || !item.ended))
            {
                let report = self
                    .reports
                    .iter()
                    .find(|report| report.device == item.device);
                if broken || report.is_none_or(|report| report.sync != VolumeSync::Mirroring) {
                    *item = DeviceJob::new(item.device, &item.label, item.sectors);
                    restarted = true;
                }
            }
        }
        self.planner = Some(if restarted {
            Planner::new(state)
        } else {
            planner
        });
    }

    /// Starts what must be mirrored and may be without asking: by the marks of the intent map where they are enough, else as
    /// a whole. `held`: devices whose mirror held in this stream until now.
    fn evaluate(
        &mut self,
        stream: &dyn CaptureStream,
        session: &mut Session,
        broken: Option<&str>,
        held: &[u32],
    ) -> Result<(), End> {
        self.doubt_replaced();
        let needs = self.needs(broken);
        if needs.is_empty() {
            return Ok(());
        }
        let past = std::mem::take(&mut self.past);
        let candidates: Vec<u32> = needs.iter().map(|need| need.device).collect();
        let (covered, doubt) = self.cover(stream, session, &past, held, &candidates)?;
        if let Some(need) = needs.iter().find(|need| covered.contains(&need.device)) {
            let reason = need.reason.clone();
            self.set_resync_devices();
            if self.planner.is_none() {
                self.start_recovery(stream, &covered, &reason);
            }
        }
        let is_left = |need: &Need| need.automatic && !covered.contains(&need.device);
        let left: Vec<Need> = needs.into_iter().filter(is_left).collect();
        self.mirror_needed(stream, &left, doubt);
        Ok(())
    }

    /// What must be mirrored, given what both sides say.
    fn needs(&mut self, broken: Option<&str>) -> Vec<Need> {
        if let Some(planner) = &self.planner {
            self.memory.job = Some(planner.state().clone());
        }
        self.memory.needs(&self.offers(), &self.reports, broken)
    }

    fn mirror_needed(&mut self, stream: &dyn CaptureStream, needs: &[Need], doubt: Option<String>) {
        let Some(first) = needs.first() else { return };
        let busy = |planner: &Planner| {
            planner.state().kind.is_mirror() || planner.state().kind == JobKind::Recover
        };
        if self.planner.as_ref().is_some_and(busy) {
            // Looked at again when the job under way is over.
            return;
        }
        let mut reason = first.reason.clone();
        if let Some(doubt) = doubt {
            reason = format!("{reason}, and {doubt}");
        }
        let labels: Vec<_> = needs
            .iter()
            .map(|need| format!("\"{}\"", need.label))
            .collect();
        tracing::warn!(
            "Set \"{}\": {} is compared and mirrored because {reason}.",
            self.config.name,
            labels.join(", ")
        );
        let devices = needs
            .iter()
            .map(|need| DeviceJob::new(need.device, &need.label, need.sectors))
            .collect();
        self.start_job(stream, JobKind::Difference, devices, reason);
    }

    fn start_job(
        &mut self,
        stream: &dyn CaptureStream,
        kind: JobKind,
        devices: Vec<DeviceJob>,
        reason: String,
    ) -> u64 {
        self.suspend_scheduled();
        let id = self.memory.next_job_id();
        let state = JobState {
            id,
            kind,
            reason,
            devices,
            paused: false,
            failed: None,
        };
        self.memory.scheduled = false;
        self.log_begin(&state);
        self.job = Some(JobView::new(state.clone(), stream.ring().next_seq()));
        self.memory.job = Some(state.clone());
        self.planner = Some(Planner::new(state));
        self.persist(true);
        id
    }
}
