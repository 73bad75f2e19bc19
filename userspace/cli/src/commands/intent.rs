// SPDX-License-Identifier: GPL-2.0-only

//! The intent file of a set: made, checked, given to the module.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use dtloop_abi::{Control, Found, IntentRequest, raw};
use serde_json::{Value, json};

use super::{Context, attached};
use crate::args::{Attach, Intent};
use crate::preflight::Refusals;
use crate::{output, size};

/// Where intent files are unless somebody says otherwise.
const INTENT_DIR: &str = "/var/lib/dtloop/intent";

/// Length of a new intent file: marks of 29 TiB in the default region, 460 GiB in the smallest.
const FILE_BYTES: usize = 1 << 20;

/// Gives a stream its intent file. `created`: the stream has just been made.
pub(crate) fn provide(
    context: &Context<'_>,
    control: &Control,
    args: &Attach,
    stream_id: u32,
    created: bool,
) -> anyhow::Result<Option<Found>> {
    let asked = args.intent.is_some() || args.region_size.is_some() || args.hot_regions.is_some();
    let status = control.intent_status(stream_id)?;
    let has_one = status.found != raw::FOUND_NONE;
    if has_one || (!created && !asked) {
        if asked && has_one {
            let reason = "it has its intent file already; detach all its devices to change that";
            return Err(Refusals::one(format!("set {}", args.set), reason).into());
        }
        return Ok(None);
    }
    let default = Path::new(INTENT_DIR).join(args.set.as_str());
    let path = match &args.intent {
        Some(Intent::Off) => {
            forget(&default)?;
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
    refuse_own_devices(context, control, &path)?;
    let request = IntentRequest {
        stream_id,
        file: file.as_fd(),
        region_bytes: args.region_size.unwrap_or(0),
        hot_max: args.hot_regions.unwrap_or(0),
        idle_ms: 0,
        source: context.system.machine(),
        format: false,
    };
    let found = control.set_intent(&request).with_context(|| {
        format!(
            "intent file {} was not taken (--intent chooses another place, --intent off goes without)",
            path.display()
        )
    })?;
    if !matches!(found, Found::New | Found::Known) {
        output::note(&format!(
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
fn forget(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Ok(()) => {
            output::note(&format!(
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
fn refuse_own_devices(context: &Context<'_>, control: &Control, path: &Path) -> anyhow::Result<()> {
    let Some(under) = context.system.device_of_file(path) else {
        return Ok(());
    };
    let ours: Vec<String> = attached(control)?
        .iter()
        .map(|device| format!("loop{}", device.loop_number()))
        .collect();
    match context.system.built_on(&under, &ours) {
        Some(device) => {
            let reason = format!(
                "it lies on /dev/{device}, for whose changes it would have to be written; choose another disk"
            );
            Err(Refusals::one(format!("intent file {}", path.display()), reason).into())
        }
        None => Ok(()),
    }
}

/// The intent map for people, in one line.
pub(crate) fn text(status: &raw::IntentStatus) -> String {
    if status.has(raw::INTENT_FAILED) {
        return "FAILED: the intent file cannot be written; after a crash whole devices are compared. Detach and attach \
                with another --intent"
            .to_owned();
    }
    if !status.has(raw::INTENT_ON) {
        return "off: after a crash whole devices are compared".to_owned();
    }
    let mut text = format!(
        "{} of {} marked",
        output::count(status.marked, "region"),
        size::bytes(status.region_bytes.into())
    );
    if status.suspect > 0 {
        text += &format!(", {} to be compared", status.suspect);
    }
    match hit_rate(status) {
        Some(rate) => text + &format!(", hit rate {rate:.2} %"),
        None => text,
    }
}

/// Changes that found their regions marked, in percent.
fn hit_rate(status: &raw::IntentStatus) -> Option<f64> {
    let all = status.hits + status.misses;
    (all > 0).then(|| status.hits as f64 * 100.0 / all as f64)
}

/// The intent map for programs.
pub(crate) fn json(status: &raw::IntentStatus) -> Value {
    let state = match () {
        () if status.has(raw::INTENT_FAILED) => "failed",
        () if status.has(raw::INTENT_ON) => "on",
        () => "off",
    };
    json!({
        "state": state,
        "found": Found::from_raw(status.found).to_string(),
        "region_bytes": status.region_bytes,
        "hot_regions_max": status.hot_max,
        "idle_ms": status.idle_ms,
        "life": status.life,
        "version": status.version,
        "file_bytes": status.file_bytes,
        "regions_marked": status.marked,
        "regions_suspect": status.suspect,
        "hits": status.hits,
        "misses": status.misses,
        "hit_rate_percent": hit_rate(status),
        "wait_ns": status.wait_ns,
        "wait_ns_max": status.wait_ns_max,
        "writes": status.writes,
        "rounds": status.rounds,
        "cleared": status.cleared,
    })
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
        forget(&path).unwrap();
        forget(&path).unwrap();
        assert!(!path.exists());
    }
}
