// SPDX-License-Identifier: GPL-2.0-only

//! Who this source is, and whether it still is where it was.
//!
//! A source has an identifier, `source-id`, by which the target knows whose copy it keeps. When the disk that holds it is
//! cloned there are two of them, and only one may go on. So what is known of the machine is kept beside it, in
//! `source-machine`. On another machine `dtagent` does not start before somebody has said which of the two this is: the
//! source that has moved, or a copy that is to be a source of its own.
//!
//! A clone that resembles the original in everything is found out by the target: it knows which streams its copy followed,
//! and refuses a source that has not had them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use dtloop_proto::Uuid;
use serde::{Deserialize, Serialize};

const ID_FILE: &str = "source-id";
const MACHINE_FILE: &str = "source-machine";

/// What tells a machine from another one. Nothing of it leaves the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// `/etc/machine-id`: of the installation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// The UUID of the hardware, or of the virtual machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hardware: Option<String>,
}

/// A line of a file that says something.
fn word(root: &Path, path: &str) -> Option<String> {
    let text = fs::read_to_string(root.join(path)).ok()?;
    let text = text.trim().to_ascii_lowercase();
    let says_nothing = |c: char| matches!(c, '0' | '-' | 'f');
    // Some firmware has zeroes or ones for a UUID; a new installation is "uninitialized".
    (!text.chars().all(says_nothing) && text != "uninitialized").then_some(text)
}

impl Machine {
    /// This machine, whose files are below `root`.
    #[must_use]
    pub fn look(root: &Path) -> Self {
        Self {
            machine_id: word(root, "etc/machine-id"),
            hardware: word(root, "sys/class/dmi/id/product_uuid"),
        }
    }

    /// In what this machine differs from a former look; `None`: it may be the same.
    #[must_use]
    pub fn difference(&self, former: &Self) -> Option<String> {
        let differs = |now: &Option<String>, then: &Option<String>| {
            now.as_ref()
                .zip(then.as_ref())
                .is_some_and(|(now, then)| now != then)
        };
        let mut differences = vec![];
        if differs(&self.machine_id, &former.machine_id) {
            differences.push("another machine-id");
        }
        if differs(&self.hardware, &former.hardware) {
            differences.push("another hardware UUID");
        }
        (!differences.is_empty()).then(|| differences.join(" and "))
    }

    /// What is known now, and what was known and can not be seen now.
    fn joined(self, former: Option<Self>) -> Self {
        let former = former.unwrap_or_default();
        Self {
            machine_id: self.machine_id.or(former.machine_id),
            hardware: self.hardware.or(former.hardware),
        }
    }
}

/// The identifier of the source whose state is in `dir`, drawn if it has none yet.
///
/// # Errors
///
/// If the state was made on another machine, or cannot be used.
pub fn claim(dir: &Path, machine: Machine) -> Result<Uuid> {
    let former: Option<Machine> = dtloop_store::load(&dir.join(MACHINE_FILE))?;
    if let Some(difference) = former
        .as_ref()
        .and_then(|former| machine.difference(former))
    {
        let id = dtloop_store::identity(&dir.join(ID_FILE))?;
        bail!(
            "{} says that this is source {id}, but it was written on another machine: this one has {difference}. If the source \
             was moved here and does not run anywhere else, run \"dtagent identity keep\". If this is a copy of it, run \
             \"dtagent identity renew\" to make it a source of its own",
            dir.display()
        );
    }
    let id = dtloop_store::identity(&dir.join(ID_FILE))?;
    let known = machine.joined(former.clone());
    if former.as_ref() != Some(&known) {
        dtloop_store::store(&dir.join(MACHINE_FILE), &known)?;
    }
    Ok(id)
}

/// The source has moved to this machine.
///
/// # Errors
///
/// If the state cannot be written.
pub fn keep(dir: &Path, machine: &Machine) -> Result<Uuid> {
    let id = dtloop_store::identity(&dir.join(ID_FILE))?;
    dtloop_store::store(&dir.join(MACHINE_FILE), machine)?;
    Ok(id)
}

/// This is a copy, which becomes a source of its own: it has no past, no volume of the target is its own, and it is paired
/// with nobody, as a key speaks for one source only.
///
/// # Errors
///
/// If the state cannot be written.
pub fn renew(dir: &Path, machine: &Machine) -> Result<Uuid> {
    let entries = fs::read_dir(dir).with_context(|| format!("Cannot read {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        // What the sets remember is about the other source's copies.
        if path.extension().is_some_and(|extension| extension == "set") {
            fs::rename(&path, path.with_extension("set.former"))
                .with_context(|| format!("Cannot rename {}", path.display()))?;
        }
    }
    let (trust, former) = (
        dir.join("trust"),
        dtloop_store::identity(&dir.join(ID_FILE))?,
    );
    if trust.exists() {
        fs::rename(&trust, dir.join(format!("trust.{former}")))
            .with_context(|| format!("Cannot rename {}", trust.display()))?;
    }
    let id = dtloop_store::random_uuid()?;
    dtloop_store::store(&dir.join(MACHINE_FILE), machine)?;
    // Last: until it is there, the former one is on another machine, which is refused.
    dtloop_store::store(&dir.join(ID_FILE), &id.to_string())?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(id: &str, hardware: &str) -> Machine {
        let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        Machine {
            machine_id: some(id),
            hardware: some(hardware),
        }
    }

    #[test]
    fn a_cloned_source_does_not_start_before_somebody_decides() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let id = claim(dir, machine("a", "b")).unwrap();
        assert_eq!(claim(dir, machine("a", "b")).unwrap(), id);
        fs::write(dir.join("db.set"), "of the other one").unwrap();
        fs::create_dir(dir.join("trust")).unwrap();
        fs::write(dir.join("trust/key"), "of the other one").unwrap();
        for (other, named) in [
            (machine("c", "b"), "machine-id"),
            (machine("a", "c"), "hardware UUID"),
        ] {
            let error = claim(dir, other).unwrap_err().to_string();
            assert!(
                error.contains(named) && error.contains("dtagent identity renew"),
                "{error}"
            );
        }
        assert_eq!(keep(dir, &machine("a", "c")).unwrap(), id);
        assert_eq!(claim(dir, machine("a", "c")).unwrap(), id);
        assert!(dir.join("db.set").exists());
        let own = renew(dir, &machine("c", "b")).unwrap();
        assert_ne!(own, id);
        assert_eq!(claim(dir, machine("c", "b")).unwrap(), own);
        assert!(!dir.join("db.set").exists() && !dir.join("trust/key").exists());
    }

    #[test]
    fn what_is_not_known_is_no_difference() {
        let dir = tempfile::tempdir().unwrap();
        let id = claim(dir.path(), Machine::default()).unwrap();
        assert_eq!(claim(dir.path(), machine("a", "")).unwrap(), id);
        assert_eq!(claim(dir.path(), machine("", "b")).unwrap(), id);
        // Both are known by now.
        claim(dir.path(), machine("c", "")).unwrap_err();
    }

    #[test]
    fn identifiers_that_say_nothing_are_not_listened_to() {
        let root = tempfile::tempdir().unwrap();
        let put = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        put("etc/machine-id", "uninitialized\n");
        put(
            "sys/class/dmi/id/product_uuid",
            "00000000-0000-0000-0000-000000000000\n",
        );
        assert_eq!(Machine::look(root.path()), Machine::default());
        put("etc/machine-id", "2F3c\n");
        assert_eq!(Machine::look(root.path()), machine("2f3c", ""));
    }
}
