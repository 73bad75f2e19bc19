// SPDX-License-Identifier: GPL-2.0-only

//! The commands about sources: invite, peers, revoke. They work beside a running target, which sees what they write.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use dtloop_target::config::{Config, TransportKind};
use dtloop_target::server::make_private;
use dtloop_target::trust::now_unix_s;
use dtloop_trust::code::Token;
use dtloop_trust::{PairingCode, Vault};
use serde::Serialize;

/// Does as the owner of the state directory would, so that a target that runs as a user of its own can read what root's
/// commands write.
pub(crate) fn act_as_owner(state_dir: &Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;

    use nix::unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid};
    let Ok(metadata) = std::fs::metadata(state_dir) else {
        return Ok(());
    };
    if !geteuid().is_root() || metadata.uid() == 0 {
        return Ok(());
    }
    let group = Gid::from_raw(metadata.gid());
    let become_it = || {
        setgroups(&[group])?;
        setgid(group)?;
        setuid(Uid::from_raw(metadata.uid()))
    };
    become_it().with_context(|| {
        format!(
            "Cannot act as the owner of {} (user {})",
            state_dir.display(),
            metadata.uid()
        )
    })
}

fn vault(config: &Config) -> Result<Vault> {
    ensure!(
        config.transport == TransportKind::Tls,
        "The configuration says transport = \"plaintext\", which knows no keys; leave that out first"
    );
    let dir = &config.state_dir;
    make_private(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    act_as_owner(dir)?;
    Ok(Vault::new(&config.state_dir))
}

/// A lifetime: `90s`, `15m`, `2h` or `1d`; in seconds.
pub(crate) fn parse_lifetime(text: &str) -> Result<u64, String> {
    let refused = || format!("\"{text}\" is no time; write for example 90s, 15m, 2h or 1d");
    let unit = text.chars().last().ok_or_else(refused)?;
    let seconds: u64 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86400,
        _ => return Err(refused()),
    };
    let number = &text[..text.len() - unit.len_utf8()];
    let number: u64 = number.parse().map_err(|_| refused())?;
    number.checked_mul(seconds).ok_or_else(refused)
}

#[derive(Serialize)]
struct Invited<'a> {
    code: String,
    expires_unix_s: u64,
    name: Option<&'a str>,
}

pub(crate) fn invite(
    config: &Config,
    name: Option<&str>,
    lifetime_s: u64,
    json: bool,
) -> Result<()> {
    let vault = vault(config)?;
    let identity = vault.identity()?;
    let token = Token::draw()?;
    let now = now_unix_s();
    vault.change_ledger(|ledger| ledger.invite(now, &token, name, lifetime_s))??;
    let code = PairingCode::new(&identity.pin(), token).to_string();
    let mut out = std::io::stdout().lock();
    if json {
        let invited = Invited {
            code,
            expires_unix_s: now + lifetime_s,
            name,
        };
        serde_json::to_writer_pretty(&mut out, &invited)?;
        writeln!(out)?;
        return Ok(());
    }
    let port = config
        .listen
        .rsplit_once(':')
        .map_or("7788", |(_, port)| port);
    let host = nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| "TARGET".into());
    writeln!(out, "{code}")?;
    drop(out);
    eprintln!(
        "It lets one source in, once, within {lifetime_s} s. On the source, as root:\n    dtloop pair {host}:{port} {code}"
    );
    Ok(())
}

pub(crate) fn withdraw(config: &Config) -> Result<()> {
    let withdrawn = vault(config)?.change_ledger(|ledger| ledger.withdraw(now_unix_s()))?;
    println!("{withdrawn} invitations are withdrawn.");
    Ok(())
}

#[derive(Serialize)]
struct Shown<'a> {
    name: &'a str,
    key: String,
    source_id: Option<&'a str>,
    paired_unix_s: u64,
}

#[derive(Serialize)]
struct ShownAll<'a> {
    key: String,
    peers: Vec<Shown<'a>>,
    /// When each open invitation ends.
    invitations: Vec<u64>,
}

pub(crate) fn list(config: &Config, json: bool) -> Result<()> {
    let vault = vault(config)?;
    let (identity, ledger) = (vault.identity()?, vault.ledger()?);
    let invitations = ledger.open_invitations(now_unix_s());
    let mut out = std::io::stdout().lock();
    if json {
        let peers = ledger.peers().iter().map(|peer| Shown {
            name: &peer.name,
            key: peer.pin.to_string(),
            source_id: peer.source_id.as_deref(),
            paired_unix_s: peer.paired_unix_s,
        });
        let all = ShownAll {
            key: identity.pin().to_string(),
            peers: peers.collect(),
            invitations,
        };
        serde_json::to_writer_pretty(&mut out, &all)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{:<24} {:<36}  KEY", "SOURCE", "ID")?;
    for peer in ledger.peers() {
        let id = peer.source_id.as_deref().unwrap_or("-");
        writeln!(out, "{:<24} {id:<36}  {}", peer.name, peer.pin)?;
    }
    if !invitations.is_empty() {
        writeln!(out, "{} invitations are open.", invitations.len())?;
    }
    Ok(())
}

pub(crate) fn revoke(config: &Config, name: &str) -> Result<()> {
    let vault = vault(config)?;
    let Some(peer) = vault.change_ledger(|ledger| ledger.revoke(name))? else {
        bail!("No source named \"{name}\" is paired; \"dttarget peers\" lists them")
    };
    println!(
        "Source \"{name}\" is revoked: its key {} is not let in any more. Its volumes stay as they are.",
        peer.pin
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lifetimes_have_units() {
        assert_eq!(parse_lifetime("90s"), Ok(90));
        assert_eq!(parse_lifetime("15m"), Ok(900));
        assert_eq!(parse_lifetime("1d"), Ok(86400));
        for wrong in [
            "",
            "5",
            "m",
            "-1m",
            "1y",
            "1.5h",
            "99999999999999999d",
            "5\u{b5}",
        ] {
            assert!(parse_lifetime(wrong).is_err(), "{wrong}");
        }
    }
}
