// SPDX-License-Identifier: GPL-2.0-only

//! Where keys, ledger and known targets are kept: the directory `trust` in the state directory of a side.
//!
//! A running daemon and the commands beside it change the same files. Each change is: take the lock, read, decide, replace
//! the file, let the lock go. Who only reads needs no lock, as files are replaced as a whole. Nothing is remembered
//! between two looks, so a running daemon acts on what a command has written a moment ago.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dtloop_disk::{Disk, RealDisk};
use dtloop_store::{StateFileError, load_on, store_on};
use nix::fcntl::{Flock, FlockArg};

use crate::key::{Identity, KeyError};
use crate::ledger::Ledger;
use crate::targets::Targets;

/// Why the vault could not be used.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// A file in it.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// The key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// Directory or lock.
    #[error("Cannot use {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// See the module documentation.
pub struct Vault {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// Whether other processes may be there.
    shared: bool,
    gate: Mutex<()>,
}

/// Held during a change.
struct Entered<'a> {
    _thread: MutexGuard<'a, ()>,
    _process: Option<Flock<std::fs::File>>,
}

impl Vault {
    /// The vault in a state directory. Nothing is made before something is written.
    #[must_use]
    pub fn new(state_dir: &Path) -> Self {
        Self {
            shared: true,
            ..Self::on(Arc::new(RealDisk), state_dir)
        }
    }

    /// One on another disk, for this process alone.
    #[must_use]
    pub fn on(disk: Arc<dyn Disk>, state_dir: &Path) -> Self {
        Self {
            disk,
            dir: state_dir.join("trust"),
            shared: false,
            gate: Mutex::new(()),
        }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file of the target's ledger.
    #[must_use]
    pub fn ledger_path(&self) -> PathBuf {
        self.dir.join("ledger")
    }

    fn targets_path(&self) -> PathBuf {
        self.dir.join("targets")
    }

    fn enter(&self) -> Result<Entered<'_>, VaultError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| VaultError::Io { path, source }
        };
        let thread = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        self.disk.make_dir(&self.dir).map_err(failed(&self.dir))?;
        let mut process = None;
        if self.shared {
            let path = self.dir.join("lock");
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(false).mode(0o600);
            let file = options.open(&path).map_err(failed(&path))?;
            let locked = Flock::lock(file, FlockArg::LockExclusive);
            process = Some(locked.map_err(|(_, errno)| failed(&path)(errno.into()))?);
        }
        Ok(Entered {
            _thread: thread,
            _process: process,
        })
    }

    /// The own key, made at the first use.
    ///
    /// # Errors
    ///
    /// If it cannot be read or made.
    pub fn identity(&self) -> Result<Identity, VaultError> {
        let _entered = self.enter()?;
        Ok(Identity::load_or_make(&*self.disk, &self.dir.join("key"))?)
    }

    /// The ledger as it is now.
    ///
    /// # Errors
    ///
    /// If it cannot be read or is damaged. Then nobody is known.
    pub fn ledger(&self) -> Result<Ledger, VaultError> {
        Ok(load_on(&*self.disk, &self.ledger_path())?.unwrap_or_default())
    }

    /// Changes the ledger; what changed is durable when this returns. Nothing is written if nothing changed.
    ///
    /// # Errors
    ///
    /// Those of the files. Then it is not known whether the change is there, and the caller must not act on it.
    pub fn change_ledger<T>(&self, change: impl FnOnce(&mut Ledger) -> T) -> Result<T, VaultError> {
        let _entered = self.enter()?;
        let before = self.ledger()?;
        let mut after = before.clone();
        let result = change(&mut after);
        if after != before {
            store_on(&*self.disk, &self.ledger_path(), &after)?;
        }
        Ok(result)
    }

    /// The known targets as they are now.
    ///
    /// # Errors
    ///
    /// If they cannot be read or are damaged. Then none is known.
    pub fn targets(&self) -> Result<Targets, VaultError> {
        Ok(load_on(&*self.disk, &self.targets_path())?.unwrap_or_default())
    }

    /// Changes the known targets, as [`Vault::change_ledger`].
    ///
    /// # Errors
    ///
    /// Those of the files.
    pub fn change_targets<T>(
        &self,
        change: impl FnOnce(&mut Targets) -> T,
    ) -> Result<T, VaultError> {
        let _entered = self.enter()?;
        let before = self.targets()?;
        let mut after = before.clone();
        let result = change(&mut after);
        if after != before {
            store_on(&*self.disk, &self.targets_path(), &after)?;
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    use dtloop_disk::SimDisk;

    use crate::code::Token;
    use crate::key::Pin;

    const NOW: u64 = 1_800_000_000;

    fn token() -> Token {
        Token(*b"0123456789")
    }

    #[test]
    fn only_the_owner_reads_it() {
        let dir = tempfile::tempdir().unwrap();
        let vault = Vault::new(dir.path());
        let pin = vault.identity().unwrap().pin();
        assert_eq!(Vault::new(dir.path()).identity().unwrap().pin(), pin);
        vault
            .change_ledger(|ledger| ledger.invite(NOW, &token(), None, 60))
            .unwrap()
            .unwrap();
        for name in ["key", "ledger", "lock"] {
            let mode = std::fs::metadata(vault.dir().join(name))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        let text = std::fs::read_to_string(vault.ledger_path()).unwrap();
        assert!(
            !text.contains("0123456789") && !text.contains("30313233"),
            "the token is in it: {text}"
        );
    }

    #[test]
    fn two_processes_cannot_both_use_a_token() {
        let dir = tempfile::tempdir().unwrap();
        Vault::new(dir.path())
            .change_ledger(|ledger| ledger.invite(NOW, &token(), None, 60))
            .unwrap()
            .unwrap();
        let racers: Vec<_> = (0..8_u8)
            .map(|seed| {
                // Each its own vault, as a process has.
                let vault = Vault::new(dir.path());
                std::thread::spawn(move || {
                    let pair = |ledger: &mut Ledger| {
                        ledger.pair(NOW, &token(), Pin::of(&[seed]), &format!("s{seed}"))
                    };
                    vault.change_ledger(pair).unwrap().outcome.is_ok()
                })
            })
            .collect();
        let won = racers
            .into_iter()
            .filter(|_| true)
            .map(|racer| racer.join().unwrap());
        assert_eq!(won.filter(|won| *won).count(), 1);
        assert_eq!(Vault::new(dir.path()).ledger().unwrap().peers().len(), 1);
    }

    /// Power is cut, or an operation fails, at every operation of a pairing. Whatever was told to the source is there
    /// afterwards, the token is never good for two, and the same source can always come to its end.
    #[test]
    fn a_crash_at_any_write_neither_loses_a_pairing_nor_doubles_one() {
        let (first, second) = (Pin::of(b"first"), Pin::of(b"second"));
        for cut in 0..40 {
            let disk = Arc::new(SimDisk::new(cut));
            let vault = Vault::on(Arc::clone(&disk) as Arc<dyn Disk>, Path::new("/state"));
            vault
                .change_ledger(|ledger| ledger.invite(NOW, &token(), None, 900))
                .unwrap()
                .unwrap();
            disk.fail(cut, 1, nix::errno::Errno::EIO as i32);
            let told = vault
                .change_ledger(|ledger| ledger.pair(NOW + 1, &token(), first, "first").outcome)
                .is_ok_and(|outcome| outcome.is_ok());
            disk.heal();
            disk.crash();
            disk.restart();
            let known = vault.ledger().unwrap().peer(&first).is_some();
            assert!(
                known || !told,
                "cut {cut}: the source was told that it is paired, and is not"
            );
            let other = vault
                .change_ledger(|ledger| ledger.pair(NOW + 2, &token(), second, "second").outcome)
                .unwrap();
            assert_eq!(other.is_ok(), !known, "cut {cut}");
            let again = vault
                .change_ledger(|ledger| ledger.pair(NOW + 3, &token(), first, "first").outcome)
                .unwrap();
            assert_eq!(again.is_ok(), known, "cut {cut}");
            assert_eq!(vault.ledger().unwrap().peers().len(), 1, "cut {cut}");
        }
    }

    #[test]
    fn a_damaged_ledger_knows_nobody() {
        let disk = Arc::new(SimDisk::new(3));
        let vault = Vault::on(Arc::clone(&disk) as Arc<dyn Disk>, Path::new("/state"));
        vault
            .change_ledger(|ledger| ledger.invite(NOW, &token(), None, 900))
            .unwrap()
            .unwrap();
        let file = disk.open(&vault.ledger_path(), false).unwrap();
        file.write_at(&mut [std::io::IoSlice::new(b"x")], 40)
            .unwrap();
        assert!(vault.ledger().is_err());
        assert!(
            vault.change_ledger(|ledger| ledger.revoke("a")).is_err(),
            "it was overwritten"
        );
    }
}
