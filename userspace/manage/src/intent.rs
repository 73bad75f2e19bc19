// SPDX-License-Identifier: GPL-2.0-only

//! The intent file of a set: made, checked, given to the module.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use crate::Manager;
use crate::attach::{Intent, Wanted};
use crate::preflight::Refusals;
use anyhow::Context as _;
use dtloop_abi::{Control, Found, IntentRequest, raw};

/// Where intent files are unless somebody says otherwise.
const INTENT_DIR: &str = "/var/lib/dtloop/intent";

/// Length of a new intent file: marks of 29 TiB in the default region, 460 GiB in the smallest.
const FILE_BYTES: usize = 1 << 20;

/// Gives a stream its intent file. `created`: the stream has just been made.
pub(crate) fn provide(
    manager: &Manager,
    control: &Control,
    wanted: &Wanted,
    stream_id: u32,
    created: bool,
) -> anyhow::Result<Option<Found>> {
    let asked =
        wanted.intent.is_some() || wanted.region_size.is_some() || wanted.hot_regions.is_some();
    let status = control.intent_status(stream_id)?;
    let has_one = status.found != raw::FOUND_NONE;
    if has_one || (!created && !asked) {
        if asked && has_one {
            let reason = "it has its intent file already; detach all its devices to change that";
            return Err(Refusals::one(format!("set {}", wanted.set), reason).into());
        }
        return Ok(None);
    }
    let default = Path::new(INTENT_DIR).join(wanted.set.as_str());
    let path = match &wanted.intent {
        Some(Intent::Off) => {
            forget(manager, &default)?;
            return Ok(None);
        }
        Some(Intent::File(path)) => path.clone(),
        None => default,
    };
    let file = open(&path).with_context(|| {
        format!(
            "Cannot use intent file {}; choose another with --intent, or --intent off",
            path.display()
        )
    })?;
    refuse_own_devices(manager, control, &path)?;
    let request = IntentRequest {
        stream_id,
        file: file.as_fd(),
        region_bytes: wanted.region_size.unwrap_or(0),
        hot_max: wanted.hot_regions.unwrap_or(0),
        idle_ms: 0,
        source: manager.system.machine(),
        format: false,
    };
    let found = control.set_intent(&request).with_context(|| {
        format!(
            "intent file {} was not taken (--intent chooses another place, --intent off goes without)",
            path.display()
        )
    })?;
    if !matches!(found, Found::New | Found::Known) {
        manager.note(&format!(
            "{}: {found}; it was begun anew, and devices that were mirrored before are compared as a whole",
            path.display()
        ));
    }
    Ok(Some(found))
}

/// Opens a file, and makes it if there is none: written to its end, as the kernel needs to know where its blocks are.
fn open(path: &Path) -> io::Result<File> {
    match File::options().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(path),
        other => other,
    }
}

fn make(path: &Path) -> io::Result<File> {
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .map_or_else(|| PathBuf::from("."), Path::to_owned);
    fs::create_dir_all(&dir)?;
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)?;
    let written = file
        .write_all(&vec![0; FILE_BYTES])
        .and_then(|()| file.sync_all())
        .and_then(|()| File::open(&dir)?.sync_all());
    if let Err(error) = written {
        // Half a file helps nobody.
        let _ = fs::remove_file(path);
        return Err(error);
    }
    Ok(file)
}

/// Changes from now on are not tracked: an intent file from earlier would lack them.
fn forget(manager: &Manager, path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {
            manager.note(&format!(
                "{} is removed, as its marks would no longer be complete",
                path.display()
            ));
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(anyhow::Error::from(error).context(format!(
            "Cannot remove {}, whose marks would no longer be complete",
            path.display()
        ))),
    }
}

/// A change of a device can not wait for a file that lies on it. The module sees only the device right under the file
/// system; here it is seen what that is built on.
fn refuse_own_devices(manager: &Manager, control: &Control, path: &Path) -> anyhow::Result<()> {
    let Some(under) = manager.system.device_of_file(path) else {
        return Ok(());
    };
    let ours: Vec<String> = Manager::attached(control)?
        .iter()
        .map(|device| format!("loop{}", device.loop_number()))
        .collect();
    match manager.system.built_on(&under, &ours) {
        Some(device) => {
            let reason = format!(
                "it lies on /dev/{device}, for whose changes it would have to be written; choose another disk"
            );
            Err(Refusals::one(format!("intent file {}", path.display()), reason).into())
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_has_no_holes_and_an_old_one_stays() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/set");
        let file = open(&path).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), FILE_BYTES as u64);
        assert!(meta.blocks() * 512 >= FILE_BYTES as u64);
        fs::write(&path, "kept").unwrap();
        open(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"kept");
        let manager = Manager {
            system: crate::system::System::new(),
            control: PathBuf::new(),
            run_dir: PathBuf::new(),
            notes: |_| (),
        };
        forget(&manager, &path).unwrap();
        forget(&manager, &path).unwrap();
        assert!(!path.exists());
    }
}
