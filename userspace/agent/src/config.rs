// SPDX-License-Identifier: GPL-2.0-only

//! `/etc/DT/dtloop.toml`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::verify_config::VerifyConfig;

/// Where the configuration is.
pub const CONFIG_PATH: &str = "/etc/DT/dtloop.toml";

/// Where state is kept.
pub const STATE_DIR: &str = "/var/lib/dtloop/agent";

/// How frames travel. Plaintext has to be asked for by name; TLS comes later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportKind {
    /// As they are. For trusted networks only.
    Plaintext,
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
    pub transport: TransportKind,
    /// Longest pause before the next attempt to connect, in milliseconds.
    #[serde(default = "default_retry_ms_max")]
    pub retry_ms_max: u64,
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

fn default_chain() -> bool {
    true
}

fn default_state_dir() -> PathBuf {
    STATE_DIR.into()
}

fn default_socket() -> PathBuf {
    dtloop_api::SOCKET_PATH.into()
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
            ensure!(
                set.retry_ms_max >= 10,
                "retry_ms_max of set \"{}\" is below 10",
                set.name
            );
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
            "[[set]]\nname = \"default\"\ntarget = \"10.0.2.2:7788\"\ntransport = \"plaintext\"\n";
        let config = Config::parse(text).unwrap();
        assert_eq!(config.sets[0].retry_max(), Duration::from_secs(2));
        assert_eq!(config.socket, Path::new("/run/dtloop/agent.sock"));
    }

    #[test]
    fn mistakes_are_named() {
        let refused = |text: &str| format!("{:#}", Config::parse(text).unwrap_err());
        assert!(refused("[[set]]\nname = \"a\"\ntarget = \"h:1\"\n").contains("transport"));
        let set = "[[set]]\nname = \"a\"\ntarget = \"h:1\"\ntransport = \"plaintext\"\n";
        assert!(refused(&(set.to_owned() + set)).contains("Two sets"));
        assert!(refused(&set.replace("h:1", "h")).contains("host:port"));
        assert!(refused(&set.replace("\"a\"", "\"a/b\"")).contains("a/b"));
    }
}
