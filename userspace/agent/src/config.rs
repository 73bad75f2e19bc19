// SPDX-License-Identifier: GPL-2.0-only

//! `/etc/DT/dtloop.toml`.

mod shaping;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use dtloop_core::size::Size;
use serde::Deserialize;
pub use shaping::{Bandwidth, Compression, RateMax};

use crate::verify_config::VerifyConfig;

/// Where the configuration is.
pub const CONFIG_PATH: &str = "/etc/DT/dtloop.toml";

/// Where state is kept.
pub const STATE_DIR: &str = "/var/lib/dtloop/agent";

/// How frames travel. Plaintext has to be asked for by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// TLS 1.3 with a paired target.
    #[default]
    Tls,
    /// As they are, to anybody. To loopback addresses only.
    Plaintext,
}

/// When the queue of a set is made durable. Records leave the ring only then, in either mode.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SyncMode {
    /// Some MiB at once.
    #[default]
    Group,
    /// Every batch before the next one is written: at most 1 MiB is ever on its way.
    Each,
}

/// The disk queue of a set, `[set.queue]`: where records go when the target is away for longer than the ring lasts.
/// There is none unless a directory is named: no default could know which disk has room and is none of the set's.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueConfig {
    /// Where; each set gets a directory of its name in it. On no device of the set.
    pub dir: PathBuf,
    /// Most bytes it takes.
    #[serde(default = "default_queue_size")]
    pub size: Size,
    /// The file system keeps at least so many bytes free.
    #[serde(default = "default_min_free")]
    pub min_free: Size,
    /// Bytes of one segment file.
    #[serde(default = "default_segment_size")]
    pub segment_size: Size,
    /// Ring fill in percent at which records begin to go into the queue.
    #[serde(default = "default_start_at")]
    pub start_at: u8,
    /// See [`SyncMode`].
    #[serde(default)]
    pub sync: SyncMode,
}

impl QueueConfig {
    fn check(&self) -> Result<()> {
        ensure!(
            self.dir.is_absolute(),
            "queue.dir \"{}\" is not an absolute path",
            self.dir.display()
        );
        // A batch is at most 1 MiB of payload, some records more, and their headers.
        ensure!(
            self.segment_size.0 >= 4 << 20 && self.segment_size.0 % 4096 == 0,
            "queue.segment_size must be at least 4MiB and a multiple of 4096"
        );
        ensure!(
            self.size.0 / self.segment_size.0 >= 2,
            "queue.size must hold at least two segments"
        );
        ensure!(
            (1..=90).contains(&self.start_at),
            "queue.start_at must be within 1 to 90 percent"
        );
        Ok(())
    }
}

/// A replication set.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetConfig {
    /// Its name; that of its capture stream.
    pub name: String,
    /// Address and port of the target.
    pub target: String,
    /// How frames travel.
    #[serde(default)]
    pub transport: TransportKind,
    /// Longest pause before the next attempt to connect, in milliseconds.
    #[serde(default = "default_retry_ms_max")]
    pub retry_ms_max: u64,
    /// Most bytes per second on the wire, by the hour.
    #[serde(default)]
    pub bandwidth: Bandwidth,
    /// Whether what is sent is compressed.
    #[serde(default)]
    pub compression: Compression,
    /// Most bytes per second that a mirror or a verification reads.
    #[serde(default)]
    pub mirror_rate: RateMax,
    /// Most bytes per second that a resync reads.
    #[serde(default)]
    pub resync_rate: RateMax,
    /// Its disk queue, if it has one.
    #[serde(default)]
    pub queue: Option<QueueConfig>,
    /// Both sides compute the hash chain over the records.
    #[serde(default = "default_chain")]
    pub chain: bool,
    /// When the set is verified by itself.
    #[serde(default)]
    pub verify: Option<VerifyConfig>,
}

impl SetConfig {
    /// Longest pause before the next attempt to connect.
    #[must_use]
    pub fn retry_max(&self) -> Duration {
        Duration::from_millis(self.retry_ms_max)
    }
}

/// See the module documentation.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Where state is kept.
    #[serde(default = "default_state_dir")]
    pub state_dir: PathBuf,
    /// The control socket.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Sets.
    #[serde(default, rename = "set")]
    pub sets: Vec<SetConfig>,
}

fn default_retry_ms_max() -> u64 {
    2000
}

fn default_queue_size() -> Size {
    Size(4 << 30)
}

fn default_min_free() -> Size {
    Size(1 << 30)
}

fn default_segment_size() -> Size {
    Size(64 << 20)
}

fn default_start_at() -> u8 {
    50
}

fn default_chain() -> bool {
    true
}

fn default_state_dir() -> PathBuf {
    STATE_DIR.into()
}

fn default_socket() -> PathBuf {
    dtloop_api::SOCKET_PATH.into()
}

/// Whether what is sent there stays on this machine.
pub(crate) fn is_loopback(address: &SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
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
        for (index, set) in config.sets.iter().enumerate() {
            ensure!(
                dtloop_proto::message::is_name(&set.name),
                "Set name \"{}\" is not 1 to 63 characters of A-Z a-z 0-9 _ . -",
                set.name
            );
            let port = set
                .target
                .rsplit_once(':')
                .map(|(_, port)| port.parse::<u16>().is_ok());
            ensure!(
                port == Some(true),
                "The target of set \"{}\" is not of the form host:port",
                set.name
            );
            // A name is checked when it is resolved, at each connection.
            let address = set.target.parse::<SocketAddr>();
            ensure!(
                set.transport == TransportKind::Tls
                    || address.is_err()
                    || address.is_ok_and(|address| is_loopback(&address)),
                "Plaintext is for loopback addresses only, and the target of set \"{}\" is none; leave out transport = \
                 \"plaintext\" and pair (dtloop pair)",
                set.name
            );
            ensure!(
                set.retry_ms_max >= 10,
                "retry_ms_max of set \"{}\" is below 10",
                set.name
            );
            if let Some(queue) = &set.queue {
                queue
                    .check()
                    .with_context(|| format!("The queue of set \"{}\"", set.name))?;
            }
            let twice = config.sets[..index]
                .iter()
                .any(|other| other.name == set.name);
            ensure!(!twice, "Two sets are named \"{}\"", set.name);
        }
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_is_understood() {
        let text =
            "[[set]]\nname = \"default\"\ntarget = \"127.0.0.1:7788\"\ntransport = \"plaintext\"\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.sets[0].retry_max(), Duration::from_secs(2));
        assert_eq!(config.socket, Path::new("/run/dtloop/agent.sock"));
    }

    #[test]
    fn a_queue_needs_only_a_directory() {
        let text = "[[set]]\nname = \"a\"\ntarget = \"h:1\"\ntransport = \"plaintext\"\n\
                    [set.queue]\ndir = \"/var/spool/dtloop\"\n\
                    [[set]]\nname = \"b\"\ntarget = \"h:1\"\ntransport = \"plaintext\"\n";
        let config = Config::parse(text).unwrap();
        let queue = config.sets[0].queue.as_ref().unwrap();
        assert_eq!((queue.size, queue.min_free), (Size(4 << 30), Size(1 << 30)));
        assert_eq!((queue.start_at, queue.sync), (50, SyncMode::Group));
        assert_eq!(config.sets[1].queue, None);
    }

    #[test]
    fn mistakes_are_named() {
        let refused = |text: &str| format!("{:#}", Config::parse(text).unwrap_err());
        let tls = Config::parse("[[set]]\nname = \"a\"\ntarget = \"h:1\"\n").unwrap();
        assert_eq!(tls.sets[0].transport, TransportKind::Tls);
        let set = "[[set]]\nname = \"a\"\ntarget = \"h:1\"\ntransport = \"plaintext\"\n";
        assert!(refused(&(set.to_owned() + set)).contains("Two sets"));
        assert!(refused(&set.replace("h:1", "192.0.2.1:1")).contains("loopback"));
        assert!(refused(&set.replace("h:1", "h")).contains("host:port"));
        assert!(refused(&set.replace("\"a\"", "\"a/b\"")).contains("a/b"));
        let queue = |more: &str| refused(&format!("{set}[set.queue]\n{more}"));
        assert!(queue("size = \"1GiB\"\n").contains("dir"));
        assert!(queue("dir = \"q\"\n").contains("absolute"));
        assert!(queue("dir = \"/q\"\nsize = \"64MiB\"\n").contains("two segments"));
        assert!(queue("dir = \"/q\"\nstart_at = 0\n").contains("start_at"));
        assert!(queue("dir = \"/q\"\nsegment_size = 5000\n").contains("segment_size"));
    }
}
