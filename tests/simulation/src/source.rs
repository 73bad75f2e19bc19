// SPDX-License-Identifier: GPL-2.0-only

//! The source: the model of its kernel, and the program's own worker of a set on a disk of the simulation.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use dtloop_abi::CaptureStream;
use dtloop_agent::config::{Compression, QueueConfig, SetConfig, SyncMode, TransportKind};
use dtloop_agent::set::{Command, SetShared, Worker};
use dtloop_agent::snapshot::Snapshot;
use dtloop_agent::streams::Streams;
use dtloop_api::Failure;
use dtloop_core::mirror::JobKind;
use dtloop_core::size::Size;
use dtloop_disk::SimDisk;

use crate::disk::SharedDisk;
use crate::kernel::Kernel;
use crate::target::{ADDRESS, SET, SOURCE};
use crate::world::{Machine, World};

/// Where the agent keeps state, and what lives no longer than a boot.
const STATE: &str = "/agent";
const RUN: &str = "/run";

pub struct Source {
    pub kernel: Kernel,
    /// The agent's state.
    pub disk: SimDisk,
    /// The disk queue.
    pub queue_disk: SimDisk,
    config: SetConfig,
    shared: Option<Arc<SetShared>>,
}

struct OneStream(Kernel);

impl Streams for OneStream {
    fn open(&self, _: &str) -> Result<Arc<dyn CaptureStream>, String> {
        Ok(self.0.open())
    }
}

fn queue_config(bytes: u64, each: bool) -> QueueConfig {
    QueueConfig {
        dir: PathBuf::from("/queue"),
        size: Size(bytes),
        min_free: Size(0),
        segment_size: Size(1280 << 10),
        start_at: 50,
        sync: if each {
            SyncMode::Each
        } else {
            SyncMode::Group
        },
    }
}

impl Source {
    pub fn new(
        seed: u64,
        kernel: Kernel,
        queue: Option<u64>,
        each: bool,
        compression: Compression,
    ) -> Self {
        let queue = queue.map(|bytes| queue_config(bytes, each));
        let config = SetConfig {
            name: SET.into(),
            target: ADDRESS.into(),
            transport: TransportKind::Plaintext,
            retry_ms_max: 2000,
            bandwidth: Default::default(),
            compression,
            mirror_rate: Default::default(),
            resync_rate: Default::default(),
            queue,
            chain: true,
            verify: None,
        };
        Self {
            kernel,
            disk: SimDisk::new(seed),
            queue_disk: SimDisk::new(seed ^ 0xabcd),
            config,
            shared: None,
        }
    }

    /// Gives the agent a disk queue of that size, from its next start on.
    pub fn give_queue(&mut self, bytes: u64) {
        self.config.queue = Some(queue_config(bytes, false));
    }

    pub fn has_queue(&self) -> bool {
        self.config.queue.is_some()
    }

    pub fn is_running(&self) -> bool {
        self.shared.is_some()
    }

    /// Starts the agent.
    pub fn start(&mut self, world: &World) {
        let shared = Arc::new(SetShared::new(&self.config).expect("an event file"));
        self.shared = Some(Arc::clone(&shared));
        let (config, kernel) = (self.config.clone(), self.kernel.clone());
        let disk = Arc::new(SharedDisk(self.disk.clone()));
        let queue_disk = Arc::new(SharedDisk(self.queue_disk.clone()));
        world.start(
            Machine::Source,
            "set",
            Box::new(move || {
                let streams = Arc::new(OneStream(kernel));
                let worker = Worker::on(disk, config, Path::new(STATE), SOURCE, streams, shared);
                match worker {
                    Ok(worker) => worker
                        .with_run_dir(Path::new(RUN))
                        .with_queue_disk(queue_disk)
                        .run(),
                    Err(error) => panic!("the agent does not start: {error}"),
                }
            }),
        );
    }

    /// Ends the agent where it is.
    pub fn kill(&mut self, world: &World) {
        world.end(Machine::Source, false);
        self.shared = None;
        self.disk.restart();
        self.queue_disk.restart();
    }

    /// The machine loses its power.
    pub fn lose_power(&mut self, world: &World) {
        world.end(Machine::Source, true);
        self.shared = None;
        self.disk.crash();
        self.queue_disk.crash();
    }

    /// Asks the agent to end by itself.
    pub fn stop(&self, world: &World) {
        if let Some(shared) = &self.shared {
            shared.stop();
            world.happen();
        }
    }

    pub fn snapshot(&self) -> Option<Snapshot> {
        self.shared.as_ref().map(|shared| shared.snapshot())
    }

    /// What an operator asks for; the answer comes when the agent takes it up.
    pub fn ask(&self, world: &World, ask: Ask) -> Option<Receiver<Result<u64, Failure>>> {
        let shared = self.shared.as_ref()?;
        let (reply, answer) = channel();
        let command = match ask {
            Ask::Start(kind) => Command::Start {
                devices: vec![],
                kind,
                reply,
            },
            Ask::Pause(paused) => Command::Pause { paused, reply },
            Ask::Stop => Command::Stop { reply },
            Ask::InPlace => Command::InPlace { reply },
        };
        shared.command(command);
        world.happen();
        Some(answer)
    }
}

/// What an operator may ask for.
#[derive(Clone, Copy, Debug)]
pub enum Ask {
    Start(JobKind),
    Pause(bool),
    Stop,
    InPlace,
}
