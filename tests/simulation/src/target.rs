// SPDX-License-Identifier: GPL-2.0-only

//! The target: the program's own server, set and session, on a disk of the simulation.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use dtloop_core::set::{Phase, SetState};
use dtloop_core::size::Size;
use dtloop_disk::{Disk, SimDisk};
use dtloop_proto::Uuid;
use dtloop_runtime::TcpListener;
use dtloop_target::applier::{Applier, Parts, Pause, Saved, Settings};
use dtloop_target::catalog::Catalog;
use dtloop_target::clock::RealClock;
use dtloop_target::config::{
    Config, JournalConfig, ResyncPolicy, StagingConfig, TransportKind, VolumeConfig,
};
use dtloop_target::replica::set_dir;
use dtloop_target::server::{self, Shared};

use crate::disk::SharedDisk;
use crate::history::Digest;
use crate::kernel::Kernel;
use crate::random::Random;
use crate::world::{Machine, World};

/// The set's name.
pub const SET: &str = "db";

const STATE: &str = "/target";

/// Where the target listens.
pub const ADDRESS: &str = "127.0.0.1:7788";

/// The source's identity.
pub const SOURCE: Uuid = Uuid([7; 16]);

pub struct Target {
    pub disk: SimDisk,
    config: Config,
    sessions: u64,
    shared: Option<Arc<Shared>>,
}

fn volume_path(label: &str) -> PathBuf {
    Path::new("/volumes").join(label)
}

impl Target {
    pub fn new(seed: u64, sizes: &[u64], resync: ResyncPolicy) -> Self {
        let volume = |(number, sectors): (usize, &u64)| {
            let name = format!("vol{number}");
            VolumeConfig {
                path: volume_path(&name),
                name,
                size: Some(Size(sectors * 512)),
                resync,
            }
        };
        let config = Config {
            listen: ADDRESS.into(),
            transport: TransportKind::Plaintext,
            state_dir: STATE.into(),
            journal: JournalConfig {
                size: Size(1536 << 10),
                segment_size: Size(512 << 10),
            },
            staging: StagingConfig {
                dir: None,
                max: None,
                min_free: Size(0),
            },
            apply_threads: 1,
            volumes: sizes.iter().enumerate().map(volume).collect(),
        };
        Self {
            disk: SimDisk::new(seed),
            config,
            sessions: 1,
            shared: None,
        }
    }

    fn catalog(&self, disk: Arc<dyn Disk>) -> Catalog {
        Catalog::on(disk, Path::new(STATE), self.config.volumes.clone())
    }

    /// Starts the program.
    pub fn start(&mut self, world: &World) {
        let disk: Arc<dyn Disk> = Arc::new(SharedDisk(self.disk.clone()));
        let catalog = self.catalog(Arc::clone(&disk));
        self.sessions += 1000;
        let (config, sessions) = (self.config.clone(), self.sessions);
        let shared = Shared::new(disk, catalog, config, Uuid([9; 16]), None, sessions);
        let shared = Arc::new(shared);
        self.shared = Some(Arc::clone(&shared));
        let known = self.is_known();
        world.start(
            Machine::Target,
            "main",
            Box::new(move || {
                let listener = TcpListener::bind(ADDRESS).expect("an address");
                if known {
                    server::open_set(&shared, SOURCE, SET.into()).expect("a thread");
                }
                server::accept(&shared, listener).expect("a thread");
            }),
        );
    }

    fn dir() -> PathBuf {
        set_dir(Path::new(STATE), SOURCE, SET)
    }

    fn is_known(&self) -> bool {
        let fork = self.disk.fork(1);
        fork.open(&Self::dir().join("state"), false).is_ok()
    }

    pub fn is_running(&self) -> bool {
        self.shared.is_some()
    }

    /// Ends the program where it is; with `power`, the disk loses what was not synced.
    pub fn end(&mut self, world: &World, power: bool) {
        world.end(Machine::Target, power);
        self.shared = None;
        if power {
            self.disk.crash();
        } else {
            self.disk.restart();
        }
    }

    /// What a volume holds now.
    pub fn volume(&self, label: &str) -> Option<Vec<u8>> {
        read_volume(&self.disk.fork(1), label)
    }

    /// What would be there if the power failed now: checks that the copy is what the set's state says.
    ///
    /// # Errors
    ///
    /// What is wrong.
    pub fn inspect(
        &self,
        kernel: &Kernel,
        random: &mut Random,
        crash: Crash,
    ) -> Result<Found, String> {
        let disk = self.disk.fork(random.draw());
        match crash {
            Crash::Kill => disk.restart(),
            Crash::Power => disk.crash(),
            Crash::Unlucky => disk.crash_hard(),
        }
        let state_path = Self::dir().join("state");
        let saved: Option<Saved> =
            dtloop_store::load_on(&disk, &state_path).map_err(|error| format!("{error:?}"))?;
        let Some(saved) = saved else {
            return Ok(Found::default());
        };
        check_staged(&disk, kernel, &saved.state, "as it lies there")?;
        let parts = Parts {
            disk: Arc::new(disk.clone()),
            clock: Arc::new(RealClock::default()),
            catalog: Arc::new(self.catalog(Arc::new(disk.clone()))),
            outlet: Arc::default(),
            horizon: Arc::default(),
            flags: Arc::default(),
        };
        let settings = Settings {
            checkpoint_bytes: self.config.journal.size.0 / 4,
            staging: self.config.staging.clone(),
            threads: 1,
        };
        let loaded = Applier::load(parts, settings, &Self::dir(), SOURCE, SET);
        let mut applier = loaded.map_err(|error| format!("the set cannot be loaded: {error:?}"))?;
        finish(|| applier.replay())
            .map_err(|pause| format!("the journal cannot be replayed: {pause}"))?;
        check_staged(&disk, kernel, applier.state(), "after the replay")?;
        let state = applier.state().clone();
        let keeps = |label: &String| {
            let stage = state.stage.as_ref();
            let staged = stage.is_some_and(|stage| stage.labels.contains(label));
            let wanted = state.wanted.as_ref();
            staged || wanted.is_some_and(|wanted| wanted.labels.contains(label))
        };
        let mut labels = state.volumes.keys();
        let found = Found {
            stream: state.stream_uuid.0,
            applied: state.applied_seq,
            is_whole: labels.all(|label| state.is_whole(label) || keeps(label)),
            is_refused: state
                .volumes
                .values()
                .any(|volume| volume.refused.is_some()),
        };
        if state
            .stage
            .as_ref()
            .is_some_and(|stage| stage.phase == Phase::Staged)
        {
            return Ok(found);
        }
        finish(|| applier.settle().map(drop))
            .map_err(|pause| format!("it cannot be settled: {pause}"))?;
        for (number, (label, _)) in state.volumes.iter().enumerate() {
            if !state.in_sync(label) {
                continue;
            }
            let wanted = kernel.at(state.stream_uuid.0, state.applied_seq, number);
            let Some(wanted) = wanted else { continue };
            let volume = read_volume(&disk, label).ok_or("a volume in sync is not there")?;
            if Digest::of(&volume).sum() != wanted {
                return Err(format!(
                    "\"{label}\" is in sync at record {} and is not what the device held then{}",
                    state.applied_seq,
                    kernel.explain(state.stream_uuid.0, state.applied_seq, number, &volume)
                ));
            }
        }
        Ok(found)
    }
}

/// How the program ends.
#[derive(Clone, Copy, Debug)]
pub enum Crash {
    /// It is killed.
    Kill,
    /// The machine loses its power: what was not durable survives or not.
    Power,
    /// Nothing of it survives.
    Unlucky,
}

/// What the target has after a crash.
#[derive(Clone, Copy, Debug, Default)]
pub struct Found {
    pub stream: [u8; 16],
    pub applied: u64,
    /// Each volume is, or keeps, what its device was at one moment.
    pub is_whole: bool,
    /// A volume is not used at present.
    pub is_refused: bool,
}

fn read_volume(disk: &SimDisk, label: &str) -> Option<Vec<u8>> {
    let file = disk.open(&volume_path(label), false).ok()?;
    let mut content = vec![0; file.bytes().ok()? as usize];
    file.read_at(&mut content, 0).ok()?;
    Some(content)
}

/// Volumes that are staged hold their last consistent state.
fn check_staged(
    disk: &SimDisk,
    kernel: &Kernel,
    state: &SetState,
    when: &str,
) -> Result<(), String> {
    let Some(stage) = state
        .stage
        .as_ref()
        .filter(|stage| stage.phase == Phase::Staged)
    else {
        return Ok(());
    };
    for (number, label) in state.volumes.keys().enumerate() {
        if !stage.labels.contains(label) {
            continue;
        }
        let (stream, seq) = (stage.since.stream_uuid.0, stage.since.seq);
        let Some(wanted) = kernel.at(stream, seq, number) else {
            continue;
        };
        let volume = read_volume(disk, label).ok_or("a staged volume is not there")?;
        if Digest::of(&volume).sum() != wanted {
            return Err(format!(
                "{when}: \"{label}\" is staged since record {seq} and is not what the device held then{}",
                kernel.explain(stream, seq, number, &volume)
            ));
        }
    }
    Ok(())
}

fn finish(mut call: impl FnMut() -> Result<(), Pause>) -> Result<(), String> {
    loop {
        match call() {
            Ok(()) => return Ok(()),
            Err(Pause::Again) => {}
            Err(pause) => return Err(format!("{pause:?}")),
        }
    }
}
