// SPDX-License-Identifier: GPL-2.0-only

//! Whom this target lets in. Decisions are those of `dtloop_trust::ledger`; this holds the live connections, so that a
//! revocation ends them.
//!
//! The ledger is read anew at each question, since commands change it while the target runs. A connection is entered among the
//! live ones *before* the ledger is asked for the last time: a revocation that comes later than that look changes the
//! file, and the next sweep finds the connection.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use dtloop_core::binding::Refusal;
use dtloop_proto::message::{Pair, Paired};
use dtloop_proto::{Code, Uuid};
use dtloop_trust::code::Token;
use dtloop_trust::ledger::BindError;
use dtloop_trust::tls::{Known, TargetTls};
use dtloop_trust::{Pin, Vault};

use crate::transport::Connection;

/// Seconds since 1970 by the wall clock, which survives a restart.
#[must_use]
pub fn now_unix_s() -> u64 {
    dtloop_runtime::unix_time().as_secs()
}

/// Asks the ledger at every handshake.
struct Asks(Arc<Vault>);

impl std::fmt::Debug for Asks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Asks")
    }
}

impl Known for Asks {
    fn knows(&self, pin: &Pin) -> bool {
        match self.0.ledger() {
            Ok(ledger) => ledger.peer(pin).is_some(),
            Err(error) => {
                tracing::error!("Nobody can be let in: {:#}.", anyhow::Error::from(error));
                false
            }
        }
    }
}

/// What tells one state of the ledger's file from another.
type Stamp = Option<(u64, i64, i64, u64)>;

struct Live {
    pin: Pin,
    connection: Connection,
}

#[derive(Default)]
struct Inner {
    live: HashMap<u64, Live>,
    seen: Stamp,
}

/// See the module documentation.
pub struct Trust {
    vault: Arc<Vault>,
    tls: TargetTls,
    next: AtomicU64,
    inner: Mutex<Inner>,
}

/// A live connection of a known source. When this goes, it is no longer watched.
pub struct Guest<'a> {
    trust: &'a Trust,
    id: u64,
    /// Its name.
    pub name: String,
}

impl Drop for Guest<'_> {
    fn drop(&mut self) {
        self.trust.inner().live.remove(&self.id);
    }
}

fn internal(error: impl std::fmt::Display) -> Refusal {
    tracing::error!("{error}.");
    // Without the cause: whoever asks may be a stranger.
    Refusal::new(
        Code::INTERNAL,
        "The target cannot use its own files; look at the log of dttarget",
    )
}

impl Trust {
    /// Opens what is kept in a state directory; the key of this target is made if there is none.
    ///
    /// # Errors
    ///
    /// If it cannot be used.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let vault = Arc::new(Vault::new(state_dir));
        let identity = vault.identity()?;
        vault.ledger()?;
        let tls = TargetTls::new(&identity, Arc::new(Asks(Arc::clone(&vault))))
            .context("TLS cannot be used")?;
        tracing::info!("The key of this target is {}.", identity.pin());
        Ok(Self {
            vault,
            tls,
            next: AtomicU64::new(0),
            inner: Mutex::default(),
        })
    }

    /// What is asked of TLS.
    #[must_use]
    pub fn tls(&self) -> &TargetTls {
        &self.tls
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A connection whose key was known at its handshake says which source it is. From now on a revocation ends it.
    ///
    /// # Errors
    ///
    /// The refusal to be told to the source.
    pub fn admit(
        &self,
        connection: &Connection,
        pin: Pin,
        source_id: Uuid,
    ) -> Result<Guest<'_>, Refusal> {
        let connection = connection.try_clone().map_err(internal)?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.inner().live.insert(id, Live { pin, connection });
        let mut guest = Guest {
            trust: self,
            id,
            name: String::new(),
        };
        let known = self.vault.ledger().map_err(internal)?;
        let bound = source_id.to_string();
        let peer = known.peer(&pin);
        let bound = peer.is_some_and(|peer| peer.source_id.as_deref() == Some(&bound));
        if !bound {
            // Seldom: the first session of a source, or one that is refused.
            let changed = self
                .vault
                .change_ledger(|ledger| ledger.bind(&pin, source_id))
                .map_err(internal)?;
            let refused = |error: BindError| Refusal::new(Code::FOREIGN_SOURCE, error.to_string());
            let first = changed.map_err(refused)?;
            if first {
                tracing::info!("Source {source_id} belongs to the key {pin} from now on.");
            }
        }
        guest.name = peer.map_or_else(String::new, |peer| peer.name.clone());
        Ok(guest)
    }

    /// Somebody brings a code.
    ///
    /// # Errors
    ///
    /// The refusal to be told to it.
    pub fn pair(&self, pin: Pin, pair: &Pair, target_id: Uuid) -> Result<Paired, Refusal> {
        let token = Token(pair.token);
        let pairing = self
            .vault
            .change_ledger(|ledger| ledger.pair(now_unix_s(), &token, pin, &pair.name))
            .map_err(internal)?;
        if pairing.voided {
            tracing::error!(
                "An invitation was tried with wrong codes again and again; it is void. Make a new one with \"dttarget invite\"."
            );
        }
        let name = pairing
            .outcome
            .map_err(|error| Refusal::new(Code::FOREIGN_SOURCE, error.to_string()))?;
        tracing::info!("Source \"{name}\" is paired; its key is {pin}.");
        Ok(Paired {
            software: crate::software(),
            name,
            target_id,
            options: vec![],
        })
    }

    fn stamp(&self) -> Stamp {
        let metadata = std::fs::metadata(self.vault.ledger_path()).ok()?;
        Some((
            metadata.ino(),
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.len(),
        ))
    }

    /// Looks whether the ledger has changed, and ends the connections of those who are no longer in it.
    pub fn sweep(&self) {
        let stamp = self.stamp();
        let mut inner = self.inner();
        if stamp == inner.seen {
            return;
        }
        let ledger = match self.vault.ledger() {
            Ok(ledger) => ledger,
            Err(error) => {
                tracing::error!(
                    "Revoked sources cannot be told from others: {:#}.",
                    anyhow::Error::from(error)
                );
                inner.seen = stamp;
                return;
            }
        };
        inner.seen = stamp;
        for live in inner.live.values() {
            if ledger.peer(&live.pin).is_none() {
                tracing::warn!("The source with the key {} was revoked.", live.pin);
                live.connection.shutdown();
            }
        }
    }
}
