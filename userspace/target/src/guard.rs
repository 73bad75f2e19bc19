// SPDX-License-Identifier: GPL-2.0-only

//! What identifies an open volume, and who writes to it. The judgement is `dtloop_core::identity`.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use dtloop_core::identity::{
    Mark, SAMPLE_BYTES, SAMPLE_LENGTH, Sample, VolumeIdentity, sample_offsets,
};
use nix::sys::stat::{major, minor};

/// Watches over one open volume.
#[derive(Debug)]
pub(crate) struct Guard {
    is_device: bool,
    id: String,
    sysfs: PathBuf,
    offsets: Vec<u64>,
    samples: Vec<Option<Sample>>,
    /// The mark after this program's own last change.
    seen: Option<Mark>,
    /// It was compared with what is known of the volume.
    pub(crate) is_examined: bool,
}

fn read_word(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// What names the disk below `sysfs`, across boots.
fn disk_id(sysfs: &Path) -> Option<String> {
    if let Some(uuid) = read_word(&sysfs.join("dm/uuid")) {
        return Some(format!("device-mapper {uuid}"));
    }
    let names = ["wwid", "device/wwid", "serial", "device/serial"];
    let named = names.iter().find_map(|name| {
        let word = read_word(&sysfs.join(name))?;
        Some(format!("disk {word}"))
    });
    let named =
        named.or_else(|| read_word(&sysfs.join("md/uuid")).map(|uuid| format!("md {uuid}")));
    let partition = read_word(&sysfs.join("partition"));
    match (named, partition) {
        // The link leads into the directory of the disk.
        (None, Some(number)) => {
            let disk = fs::canonicalize(sysfs).ok()?;
            Some(format!("{}, partition {number}", disk_id(disk.parent()?)?))
        }
        (named, _) => named,
    }
}

fn file_id(metadata: &Metadata) -> String {
    let born = metadata
        .created()
        .ok()
        .and_then(|born| born.duration_since(UNIX_EPOCH).ok());
    let born = born.map(|born| format!(" made at {}.{:09}", born.as_secs(), born.subsec_nanos()));
    format!(
        "file with inode {}{}",
        metadata.ino(),
        born.unwrap_or_default()
    )
}

impl Guard {
    /// Takes a look at a volume that was just opened.
    pub(crate) fn new(file: &File, bytes: u64) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let is_device = metadata.file_type().is_block_device();
        let number = metadata.rdev();
        let sysfs = PathBuf::from(format!(
            "/sys/dev/block/{}:{}",
            major(number),
            minor(number)
        ));
        let id = if is_device {
            disk_id(&sysfs).unwrap_or_default()
        } else {
            file_id(&metadata)
        };
        let offsets = sample_offsets(bytes);
        let mut guard = Self {
            is_device,
            id,
            sysfs,
            samples: vec![None; offsets.len()],
            offsets,
            seen: None,
            is_examined: false,
        };
        guard.seen = guard.mark(file);
        Ok(guard)
    }

    fn mark(&self, file: &File) -> Option<Mark> {
        if !self.is_device {
            let metadata = file.metadata().ok()?;
            let seconds = u64::try_from(metadata.mtime()).ok()?;
            let nanos = u64::try_from(metadata.mtime_nsec()).ok()?;
            let at_ns = seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
            return Some(Mark::Written { at_ns });
        }
        let stat = read_word(&self.sysfs.join("stat"))?;
        Some(Mark::Count {
            boot_id: read_word(Path::new("/proc/sys/kernel/random/boot_id"))?,
            sectors: stat.split_whitespace().nth(6)?.parse().ok()?,
        })
    }

    /// This program changes a range.
    pub(crate) fn on_change(&mut self, offset: u64, bytes: u64) {
        let first = self
            .offsets
            .partition_point(|at| at + SAMPLE_BYTES <= offset);
        let touched = self.offsets[first..]
            .iter()
            .take_while(|at| **at < offset + bytes);
        for sample in &mut self.samples[first..first + touched.count()] {
            *sample = None;
        }
    }

    /// What is found of a volume that was known like this, before anything is written to it.
    pub(crate) fn found(&self, file: &File, bytes: u64, saved: &VolumeIdentity) -> VolumeIdentity {
        let sample = |saved: &Sample| {
            let mut block = [0; SAMPLE_LENGTH];
            file.read_exact_at(&mut block, saved.offset).ok()?;
            Some(Sample::of(saved.offset, &block))
        };
        VolumeIdentity {
            id: self.id.clone(),
            bytes,
            samples: saved.samples.iter().filter_map(sample).collect(),
            mark: self.seen.clone(),
        }
    }

    /// The volume as it is now. Only samples that were changed since are read.
    pub(crate) fn identity(&mut self, file: &File, bytes: u64) -> VolumeIdentity {
        let mut block = [0; SAMPLE_LENGTH];
        for (offset, sample) in self.offsets.iter().zip(&mut self.samples) {
            // What cannot be read says nothing.
            if sample.is_none() && file.read_exact_at(&mut block, *offset).is_ok() {
                *sample = Some(Sample::of(*offset, &block));
            }
        }
        self.seen = self.mark(file);
        VolumeIdentity {
            id: self.id.clone(),
            bytes,
            samples: self.samples.iter().flatten().copied().collect(),
            mark: self.seen.clone(),
        }
    }

    /// Whether somebody else wrote to a file since this program last did. Not for disks: what is written to them goes
    /// through the page cache and is counted at another time.
    pub(crate) fn is_disturbed(&mut self, file: &File) -> bool {
        if self.is_device {
            return false;
        }
        let now = self.mark(file);
        let disturbed = now.is_some() && self.seen.is_some() && now != self.seen;
        self.seen = now;
        disturbed
    }

    /// This program has just written.
    pub(crate) fn on_written(&mut self, file: &File) {
        if !self.is_device {
            self.seen = self.mark(file);
        }
    }
}
