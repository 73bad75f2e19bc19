// SPDX-License-Identifier: GPL-2.0-only

//! The volumes of this target, and whom each belongs to.
//!
//! The owner of a volume is kept in `<state_dir>/volumes/<name>`. It is written when a device is
//! bound for the first time and stays until an operator unbinds the volume.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use dtloop_core::binding::{self, Binding, Refusal};
use dtloop_disk::{Disk, RealDisk};
use dtloop_proto::message::DeviceOffer;
use dtloop_proto::{Code, Uuid};

use crate::config::VolumeConfig;
use crate::volume::Volume;
use dtloop_store::{self as state_file, StateFileError};

/// See the module documentation.
pub struct Catalog {
    disk: Arc<dyn Disk>,
    /// Volumes are on that disk as well, and nobody else can have them.
    simulated: bool,
    dir: PathBuf,
    volumes: Vec<VolumeConfig>,
    /// One binding at a time, so that two sources cannot both become the first.
    gate: Mutex<()>,
}

impl Catalog {
    /// A catalog of those volumes.
    #[must_use]
    pub fn new(state_dir: &Path, volumes: Vec<VolumeConfig>) -> Self {
        Self {
            disk: Arc::new(RealDisk),
            simulated: false,
            dir: state_dir.join("volumes"),
            volumes,
            gate: Mutex::new(()),
        }
    }

    /// A catalog whose volumes and owners are on that disk, for a simulation.
    #[must_use]
    pub fn on(disk: Arc<dyn Disk>, state_dir: &Path, volumes: Vec<VolumeConfig>) -> Self {
        Self {
            disk,
            simulated: true,
            ..Self::new(state_dir, volumes)
        }
    }

    /// The configuration of a volume.
    #[must_use]
    pub fn config(&self, name: &str) -> Option<&VolumeConfig> {
        self.volumes.iter().find(|volume| volume.name == name)
    }

    /// All volumes.
    #[must_use]
    pub fn volumes(&self) -> &[VolumeConfig] {
        &self.volumes
    }

    /// The owner of a volume, if it has one.
    ///
    /// # Errors
    ///
    /// If the file cannot be read.
    pub fn owner(&self, name: &str) -> Result<Option<Binding>, StateFileError> {
        state_file::load_on(&*self.disk, &self.dir.join(name))
    }

    /// Ends the ownership of a volume.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    pub fn unbind(&self, name: &str) -> std::io::Result<()> {
        self.disk.remove(&self.dir.join(name))?;
        self.disk.sync_dir(&self.dir)
    }

    /// The volume is used here from now on: its source may not overwrite it until it is unbound.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or written.
    pub fn release(&self, name: &str) -> Result<(), StateFileError> {
        let Some(owner) = self.owner(name)? else {
            return Ok(());
        };
        let released = Binding {
            released: true,
            ..owner
        };
        state_file::store_on(&*self.disk, &self.dir.join(name), &released)
    }

    /// Opens a volume without binding it.
    ///
    /// # Errors
    ///
    /// The refusal to be told to the source.
    pub fn open(&self, name: &str) -> Result<Volume, Refusal> {
        let config = self.config(name).ok_or_else(|| {
            Refusal::new(
                Code::VOLUME_NOT_FOUND,
                format!("The target has no volume \"{name}\"; run \"dttarget volume create {name}\" there"),
            )
        })?;
        if self.simulated {
            return Volume::open_on(&*self.disk, config);
        }
        Volume::open(config)
    }

    /// Opens the volume of a device, or takes the open one, and binds it.
    ///
    /// # Errors
    ///
    /// The refusal to be told to the source.
    pub fn bind(
        &self,
        source_id: Uuid,
        set: &str,
        offer: &DeviceOffer,
        open: Option<Volume>,
    ) -> Result<Volume, Refusal> {
        let _gate = dtloop_runtime::lock(&self.gate);
        let damaged = |error: StateFileError| match error {
            StateFileError::Io { path, source } => {
                let text = format!("Cannot use state file {}: {source}", path.display());
                Refusal::new(Code::VOLUME_IO, text)
            }
            error @ StateFileError::Damaged { .. } => {
                Refusal::new(Code::STATE_DAMAGED, error.to_string())
            }
        };
        let owner = self.owner(&offer.label).map_err(damaged)?;
        // A foreign volume is refused before it is even opened, so that its owner can.
        binding::admit(source_id, set, offer, owner.as_ref(), u64::MAX)?;
        let needed = offer
            .sectors
            .saturating_mul(dtloop_proto::limits::SECTOR_BYTES);
        let volume = match open {
            Some(volume) if volume.bytes() >= needed => volume,
            other => {
                drop(other);
                self.open(&offer.label)?
            }
        };
        let binding = binding::admit(source_id, set, offer, owner.as_ref(), volume.bytes())?;
        if owner.is_none() {
            let path = self.dir.join(&offer.label);
            state_file::store_on(&*self.disk, &path, &binding).map_err(damaged)?;
        }
        Ok(volume)
    }
}
