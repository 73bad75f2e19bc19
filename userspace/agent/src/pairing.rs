// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop pair`: from a code to two sides that know each other's key.
//!
//! ```text
//! source                                              target
//!   | TLS, ALPN dtloop-pair/1                            |
//!   |   its key must begin as the code says ------------>|  takes any key
//!   |<---------------------------------------------------|
//!   | Pair: name, token                                  |
//!   |--------------------------------------------------->|  token right and unused: the key is known, durable
//!   |                             Paired: the name it has|
//!   |<---------------------------------------------------|
//!   | the target's key is pinned, durable                |
//! ```
//!
//! The token is sent to the holder of the right key only. Wherever this is cut, the same code may be used again on the
//! same machine until its time is over.

use std::time::Duration;

use dtloop_proto::message::{Pair, is_name};
use dtloop_proto::{Message, frame};
use dtloop_trust::targets::Target;
use dtloop_trust::tls::{Expect, PAIR, source_config};
use dtloop_trust::vault::VaultError;
use dtloop_trust::{PairingCode, Tunnel, Vault};

use crate::link::{Link, LinkError, Nobody};

/// Longest wait for the target's answer: it writes a file.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);

/// Why there is no pairing. Nothing is changed on this side then.
#[derive(Debug, thiserror::Error)]
pub enum PairError {
    /// The connection.
    #[error("{target} cannot be reached: {source}")]
    Link {
        /// Where.
        target: String,
        /// Why.
        source: LinkError,
    },
    /// Another target than the one that made the code.
    #[error(
        "{0} is not the target that made this code: it has another key. Either the address or the code is of another target, or somebody is in between. The code was not sent"
    )]
    WrongTarget(String),
    /// The target says no.
    #[error("{0}")]
    Refused(String),
    /// The own files.
    #[error(transparent)]
    Vault(#[from] VaultError),
}

/// The name to propose: the host's, as far as it is a name.
#[must_use]
pub fn proposed_name(host: &str) -> String {
    let allowed = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-');
    let name: String = host.chars().filter(allowed).take(63).collect();
    if is_name(&name) {
        name
    } else {
        "source".into()
    }
}

/// Pairs this machine with a target; the name under which that knows it now.
///
/// # Errors
///
/// Why it is not paired.
pub fn pair(
    vault: &Vault,
    target: &str,
    code: &PairingCode,
    name: &str,
) -> Result<String, PairError> {
    let failed = |source: LinkError| match source {
        LinkError::WrongKey(target) => PairError::WrongTarget(target),
        source => PairError::Link {
            target: target.to_owned(),
            source,
        },
    };
    let tls = |error| failed(LinkError::Tunnel(error));
    let config = source_config(&vault.identity()?, Expect::Coded(code.prefix), PAIR);
    let tunnel = Tunnel::source(config.map_err(|error| tls(error.into()))?).map_err(tls)?;
    let mut link = Link::open(target, Some(tunnel), &mut Nobody).map_err(failed)?;
    let ask = Pair {
        software: crate::software(),
        name: name.to_owned(),
        token: code.token.0,
        options: vec![],
    };
    let mut bytes = vec![];
    frame::encode_message(&mut bytes, 0, 0, &Message::Pair(ask))
        .map_err(|error| PairError::Refused(error.to_string()))?;
    link.send(&mut [std::io::IoSlice::new(&bytes)], &mut Nobody)
        .map_err(failed)?;
    let known_as = match link
        .expect_message(ANSWER_TIMEOUT, &mut Nobody)
        .map_err(failed)?
    {
        (_, Message::Paired(paired)) => paired.name,
        (_, Message::Refuse(refuse)) => return Err(PairError::Refused(refuse.text)),
        _ => return Err(failed(LinkError::Flood)),
    };
    let pin = link.peer().ok_or_else(|| failed(LinkError::Closed))?;
    let paired_unix_s = dtloop_runtime::unix_time().as_secs();
    vault.change_targets(|targets| {
        targets.insert(Target {
            address: target.to_owned(),
            pin,
            known_as: known_as.clone(),
            paired_unix_s,
        });
    })?;
    Ok(known_as)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_names_become_names() {
        assert_eq!(proposed_name("db-1.example"), "db-1.example");
        assert_eq!(proposed_name("my host!"), "myhost");
        assert_eq!(proposed_name(".."), "source");
        assert_eq!(proposed_name(&"x".repeat(100)).len(), 63);
    }
}
