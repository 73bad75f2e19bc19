// SPDX-License-Identifier: GPL-2.0-only

//! `dtloop pair`, `dtloop peers` and `dtloop unpair`: which targets this machine trusts. They work without the agent; a
//! running one sees what they write at its next connection.

use std::path::Path;

use anyhow::{Context as _, bail};
use dtloop_agent::config::{CONFIG_PATH, Config, STATE_DIR};
use dtloop_agent::pairing::{self, PairError};
use dtloop_manage::preflight::Refusals;
use dtloop_trust::{PairingCode, Vault};
use serde::Serialize;

use super::Context;
use crate::args::{Pair, Peers, TrustFiles, Unpair};
use crate::exit::{Code, Usage};
use crate::output;

impl TrustFiles {
    /// The agent's state directory, as the agent would find it.
    fn vault(&self) -> anyhow::Result<Vault> {
        if let Some(dir) = &self.state_dir {
            return Ok(Vault::new(dir));
        }
        let path = self.config.as_deref();
        let exists = Path::new(CONFIG_PATH).exists();
        let config = match path {
            Some(path) => Some(Config::load(path)?),
            None if exists => Some(Config::load(Path::new(CONFIG_PATH))?),
            None => None,
        };
        let dir = config.map_or_else(|| STATE_DIR.into(), |config| config.state_dir);
        Ok(Vault::new(&dir))
    }
}

#[derive(Serialize)]
struct Paired<'a> {
    target: &'a str,
    known_as: &'a str,
}

/// Pairs.
pub(crate) fn pair(context: &Context<'_>, args: &Pair) -> anyhow::Result<Code> {
    let code: PairingCode = args
        .code
        .join("")
        .parse()
        .map_err(|error| Usage(format!("{error}. Nothing was sent")))?;
    let vault = args.files.vault()?;
    let host = nix::unistd::gethostname().context("This machine has no name")?;
    let name = match &args.name {
        Some(name) => name.as_str().to_owned(),
        None => pairing::proposed_name(&host.to_string_lossy()),
    };
    let known_as = match pairing::pair(&vault, &args.target, &code, &name) {
        Ok(known_as) => known_as,
        Err(error @ (PairError::Refused(_) | PairError::WrongTarget(_))) => {
            return Err(Refusals::one(&args.target, error.to_string()).into());
        }
        Err(error) => return Err(error.into()),
    };
    if context.global.json {
        output::json(&Paired {
            target: &args.target,
            known_as: &known_as,
        })?;
    } else {
        output::line(&format!(
            "paired with {}, which knows this machine as \"{known_as}\"",
            args.target
        ))?;
    }
    Ok(Code::Done)
}

/// Lists.
pub(crate) fn list(context: &Context<'_>, args: &Peers) -> anyhow::Result<Code> {
    let vault = args.files.vault()?;
    let targets = vault.targets()?;
    if context.global.json {
        output::json(&targets)?;
        return Ok(Code::Done);
    }
    if targets.all().is_empty() {
        output::line("no target is paired; \"dtloop pair\" does that")?;
    }
    for target in targets.all() {
        output::line(&format!(
            "{}  as \"{}\"  key {}",
            target.address, target.known_as, target.pin
        ))?;
    }
    Ok(Code::Done)
}

/// Forgets.
pub(crate) fn unpair(_context: &Context<'_>, args: &Unpair) -> anyhow::Result<Code> {
    let removed = args
        .files
        .vault()?
        .change_targets(|targets| targets.remove(&args.target))?;
    let Some(target) = removed else {
        bail!(
            "No target is paired at {}; \"dtloop peers\" lists them",
            args.target
        )
    };
    output::line(&format!(
        "{} is not trusted any more from the next connection on; \"dttarget revoke {}\" there does the same for this machine",
        target.address, target.known_as
    ))?;
    Ok(Code::Done)
}
