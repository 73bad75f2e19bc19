// SPDX-License-Identifier: GPL-2.0-only

//! `/etc/DT/dttarget.toml`.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
pub use dtloop_core::size::Size;
use serde::Deserialize;

/// Where the configuration is.
pub const CONFIG_PATH: &str = "/etc/DT/dttarget.toml";

/// Where state is kept.
pub const STATE_DIR: &str = "/var/lib/dtloop/target";

/// Where the target listens when nothing else is said.
pub const LISTEN: &str = "127.0.0.1:7788";

/// How frames travel. Plaintext has to be asked for by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// TLS 1.3 with paired sources.
    #[default]
    Tls,
    /// As they are, from anybody. On loopback addresses only.
    Plaintext,
}

/// A volume: an image file or a block device.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// Its name; devices with this label are replicated to it.
    pub name: String,
    /// Image file or block device.
    pub path: PathBuf,
    /// For an image file: it is made, or made larger, to have this size.
    pub size: Option<Size>,
    /// Where changes go while the set is not consistent.
    #[serde(default)]
    pub resync: ResyncPolicy,
}

/// Where changes of a volume go during a mirror or a resync.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ResyncPolicy {
    /// To the staging area: the volume keeps its last consistent state until there is a newer one.
    #[default]
    Staged,
    /// Into the volume, which is of no use until the set is consistent again. Needs no space.
    InPlace,
}

/// The staging area: what is changed while a set is not consistent is kept there, beside the volumes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StagingConfig {
    /// Where it is; without it, beside the journal of the set.
    pub dir: Option<PathBuf>,
    /// Most bytes that it takes for one set; without it, as many as there are.
    pub max: Option<Size>,
    /// So many bytes of its file system stay free.
    pub min_free: Size,
}

impl Default for StagingConfig {
    fn default() -> Self {
        Self {
            dir: None,
            max: None,
            min_free: Size(64 << 20),
        }
    }
}

/// The journal of each set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JournalConfig {
    /// Most bytes a set's journal takes. When it is full, nothing is read from the source.
    pub size: Size,
    /// Bytes of one segment file.
    pub segment_size: Size,
}

impl Default for JournalConfig {
    fn default() -> Self {
        Self {
            size: Size(1 << 30),
            segment_size: Size(64 << 20),
        }
    }
}

/// See the module documentation.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Address and port to listen on.
    #[serde(default = "default_listen")]
    pub listen: String,
    /// How frames travel.
    #[serde(default)]
    pub transport: TransportKind,
    /// Where state and journals are kept.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// The journals.
    #[serde(default)]
    pub journal: JournalConfig,
    /// The staging areas.
    #[serde(default)]
    pub staging: StagingConfig,
    /// Threads of a set that write and compare at the same time, where that helps: on a slow volume. 1 to 64.
    #[serde(default = "default_apply_threads")]
    pub apply_threads: usize,
    /// Volumes.
    #[serde(default, rename = "volume")]
    pub volumes: Vec<VolumeConfig>,
}

fn default_apply_threads() -> usize {
    let processors = std::thread::available_parallelism();
    processors.map_or(1, std::num::NonZero::get).min(4)
}

fn default_listen() -> String {
    LISTEN.to_owned()
}

fn default_state_dir() -> PathBuf {
    STATE_DIR.into()
}

impl Config {
    /// Reads and checks a configuration file.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("Cannot read {}", path.display()))?;
        Self::parse(&text)
            .with_context(|| format!("Configuration {} is not usable", path.display()))
    }

    /// Reads and checks a configuration.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        let config: Self = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        for (index, volume) in self.volumes.iter().enumerate() {
            ensure!(
                dtloop_proto::message::is_name(&volume.name),
                "Volume name \"{}\" is not 1 to 63 characters of A-Z a-z 0-9 _ . -",
                volume.name
            );
            ensure!(
                volume.path.is_absolute(),
                "The path of volume \"{}\" is not absolute",
                volume.name
            );
            for other in &self.volumes[..index] {
                ensure!(
                    other.name != volume.name,
                    "Two volumes are named \"{}\"",
                    volume.name
                );
                if other.path == volume.path {
                    bail!(
                        "Volumes \"{}\" and \"{}\" have the same path",
                        other.name,
                        volume.name
                    );
                }
            }
        }
        let dir = self.staging.dir.as_deref();
        ensure!(
            dir.is_none_or(Path::is_absolute),
            "staging.dir is not absolute"
        );
        ensure!(
            (1..=64).contains(&self.apply_threads),
            "apply_threads must be 1 to 64"
        );
        if self.transport == TransportKind::Plaintext {
            // A name is checked when it is resolved, which is when the target starts.
            let address = self.listen.parse::<SocketAddr>();
            ensure!(
                address.is_err()
                    || address.is_ok_and(|address| address.ip().to_canonical().is_loopback()),
                "Plaintext is for loopback addresses only, and listen = \"{}\" is none; leave out transport = \
                 \"plaintext\" and pair the sources (dttarget invite), or listen on 127.0.0.1",
                self.listen
            );
        }
        let segment = self.journal.segment_size.0;
        ensure!(
            segment >= 8 << 20 && segment % dtloop_journal::layout::BLOCK_BYTES == 0,
            "journal.segment_size must be at least 8MiB and a multiple of 4096"
        );
        ensure!(
            self.journal.size.0 / segment >= 2,
            "journal.size must hold at least two segments"
        );
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_understood() {
        let config = Config::parse(
            "listen = \"0.0.0.0:7788\"\n[journal]\nsize = \"256MiB\"\n\
             segment_size = \"16MiB\"\n[[volume]]\nname = \"db\"\npath = \"/srv/db.img\"\nsize = \"2GiB\"\n",
        )
        .unwrap();
        assert_eq!(config.volumes[0].size, Some(Size(2 << 30)));
        assert_eq!(config.journal.segment_size, Size(16 << 20));
        assert_eq!(config.state_dir, Path::new(STATE_DIR));
    }

    #[test]
    fn plaintext_must_be_asked_for_by_name_and_stays_on_this_machine() {
        let transport = |text: &str| Config::parse(text).map(|config| config.transport);
        assert_eq!(transport("").unwrap(), TransportKind::Tls);
        assert_eq!(
            transport("transport = \"tls\"").unwrap(),
            TransportKind::Tls
        );
        assert!(transport("transport = \"\"").is_err());
        for loopback in [
            "127.0.0.1:1",
            "127.3.0.1:1",
            "[::1]:1",
            "[::ffff:127.0.0.1]:1",
        ] {
            let text = format!("listen = \"{loopback}\"\ntransport = \"plaintext\"");
            assert_eq!(
                transport(&text).unwrap(),
                TransportKind::Plaintext,
                "{loopback}"
            );
        }
        for open in ["0.0.0.0:1", "192.0.2.1:1", "[::]:1", "[::ffff:192.0.2.1]:1"] {
            let text = format!("listen = \"{open}\"\ntransport = \"plaintext\"");
            let error = format!("{:#}", transport(&text).unwrap_err());
            assert!(error.contains("loopback"), "{open}: {error}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        let refused = |text: &str| format!("{:#}", Config::parse(text).unwrap_err());
        let volume =
            |name: &str, path: &str| format!("[[volume]]\nname = \"{name}\"\npath = \"{path}\"\n");
        let head = "transport = \"plaintext\"\n";
        assert!(refused(&(head.to_owned() + &volume("a/b", "/x"))).contains("a/b"));
        assert!(refused(&(head.to_owned() + &volume("a", "x"))).contains("absolute"));
        assert!(
            refused(&(head.to_owned() + &volume("a", "/x") + &volume("a", "/y")))
                .contains("Two volumes")
        );
        assert!(
            refused(&(head.to_owned() + &volume("a", "/x") + &volume("b", "/x")))
                .contains("same path")
        );
        assert!(refused("transport = \"plaintext\"\nspeed = 3\n").contains("speed"));
    }
}
