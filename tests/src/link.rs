// SPDX-License-Identifier: GPL-2.0-only

//! A network cable between two test machines.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

/// A cable between two machines, named after them. Both get an address and know each other by name. Nothing of it is
/// visible to the host but a socket file.
#[derive(Clone, Debug)]
pub struct Link {
    ends: [String; 2],
    dir: Arc<TempDir>,
}

/// What one machine needs to know about its end.
#[derive(Clone, Debug)]
pub(crate) struct End {
    pub(crate) socket: PathBuf,
    pub(crate) listens: bool,
    pub(crate) mac: String,
}

impl Link {
    /// A cable between the machines that will be built under these names.
    pub fn new(one: &str, other: &str) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix("dtlink-")
            .tempdir()
            .context("no place for a socket")?;
        Ok(Self {
            ends: [one.to_owned(), other.to_owned()],
            dir: Arc::new(dir),
        })
    }

    /// Address of the machine `name` on this cable.
    pub fn address(&self, name: &str) -> Result<String> {
        Ok(format!("10.77.0.{}", self.position(name)? + 1))
    }

    /// Lines for /etc/hosts, in the form that `dtguest` takes: address:name,address:name.
    pub(crate) fn hosts(&self) -> String {
        format!("10.77.0.1:{},10.77.0.2:{}", self.ends[0], self.ends[1])
    }

    pub(crate) fn end(&self, name: &str) -> Result<End> {
        let position = self.position(name)?;
        Ok(End {
            socket: self.dir.path().join("cable"),
            listens: position == 0,
            mac: format!("52:54:00:77:00:{:02x}", position + 1),
        })
    }

    fn position(&self, name: &str) -> Result<usize> {
        match self.ends.iter().position(|end| end == name) {
            Some(position) => Ok(position),
            None => bail!(
                "the cable joins {} and {}, not {name}",
                self.ends[0],
                self.ends[1]
            ),
        }
    }
}
