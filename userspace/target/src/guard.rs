// SPDX-License-Identifier: GPL-2.0-only

//! What identifies an open volume, and who writes to it. The judgement is `dtloop_core::identity`.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::UNIX_EPOCH;

use dtloop_core::identity::{
    Mark, SAMPLE_BYTES, SAMPLE_LENGTH, Sample, VolumeIdentity, sample_offsets,
};
use dtloop_disk::DiskFile;
use nix::sys::stat::{major, minor};
use nix::sys::statfs::fstatfs;

/// A block that is looked at.
#[derive(Debug)]
struct Spot {
    offset: u64,
    /// What it held at the last look.
    sample: Option<Sample>,
    /// This program changed it since.
    changed: AtomicBool,
}

/// File systems whose times are another machine's, or come later than the write: NFS, SMB, SMB 2, CIFS, FUSE, Ceph, 9P.
const FOREIGN_TIMES: [i64; 7] = [
    0x6969,
    0x517b,
    0xfe53_4d42,
    0xff53_4d42,
    0x6573_5546,
    0x00c3_6400,
    0x0102_1997,
];

/// What the system knows of a file or disk.
#[derive(Debug)]
struct Probe {
    file: File,
    is_device: bool,
    /// The time of the last change says who wrote.
    has_time: bool,
    sysfs: PathBuf,
}

/// Watches over one open volume.
#[derive(Debug)]
pub(crate) struct Guard {
    /// Nothing is to be asked of a simulated volume.
    probe: Option<Probe>,
    id: String,
    spots: Vec<Spot>,
    /// This program wrote since it last looked at the mark.
    wrote: AtomicBool,
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

impl Probe {
    fn mark(&self) -> Option<Mark> {
        if !self.is_device {
            let metadata = self.file.metadata().ok().filter(|_| self.has_time)?;
            let seconds = u64::try_from(metadata.mtime()).ok()?;
            let nanos = u64::try_from(metadata.mtime_nsec()).ok()?;
            let at_ns = seconds.saturating_mul(1_000_000_000).saturating_add(nanos);
            return Some(Mark::Written { at_ns });
        }
        let stat = read_word(&self.sysfs.join("stat"))?;
        Some(Mark::Count {
            sectors: stat.split_whitespace().nth(6)?.parse().ok()?,
        })
    }
}

impl Guard {
    /// Takes a look at a volume that was just opened, before it is enlarged to that size.
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
        let system = fstatfs(file).map(|system| system.filesystem_type().0);
        let probe = Probe {
            has_time: system.is_ok_and(|system| !FOREIGN_TIMES.contains(&system)),
            file: file.try_clone()?,
            is_device,
            sysfs,
        };
        Ok(Self {
            id,
            seen: probe.mark(),
            probe: Some(probe),
            ..Self::simulated(bytes)
        })
    }

    /// For a volume of which nothing but its content is known.
    pub(crate) fn simulated(bytes: u64) -> Self {
        let spot = |offset| Spot {
            offset,
            sample: None,
            changed: AtomicBool::new(true),
        };
        Self {
            probe: None,
            id: String::new(),
            spots: sample_offsets(bytes).into_iter().map(spot).collect(),
            wrote: AtomicBool::new(false),
            seen: None,
            is_examined: false,
        }
    }

    fn mark(&self) -> Option<Mark> {
        self.probe.as_ref()?.mark()
    }

    /// This program is about to change a range.
    pub(crate) fn on_change(&self, offset: u64, bytes: u64) {
        self.wrote.store(true, Ordering::Relaxed);
        let first = self
            .spots
            .partition_point(|spot| spot.offset + SAMPLE_BYTES <= offset);
        let end = offset.saturating_add(bytes);
        let touched = self.spots[first..].iter();
        for spot in touched.take_while(|spot| spot.offset < end) {
            spot.changed.store(true, Ordering::Relaxed);
        }
    }

    /// What is found of a volume that was known like this, before anything is written to it.
    pub(crate) fn found(
        &self,
        file: &dyn DiskFile,
        bytes: u64,
        saved: &VolumeIdentity,
    ) -> VolumeIdentity {
        let sample = |saved: &Sample| {
            let mut block = [0; SAMPLE_LENGTH];
            file.read_at(&mut block, saved.offset).ok()?;
            Some(Sample::of(saved.offset, &block))
        };
        VolumeIdentity {
            id: self.id.clone(),
            bytes,
            samples: saved.samples.iter().filter_map(sample).collect(),
            mark: self.seen.clone(),
        }
    }

    /// The volume as it is now. Only blocks that were changed since are read.
    pub(crate) fn identity(&mut self, file: &dyn DiskFile, bytes: u64) -> VolumeIdentity {
        let mut block = [0; SAMPLE_LENGTH];
        for spot in &mut self.spots {
            if *spot.changed.get_mut() {
                // What cannot be read says nothing.
                let read = file.read_at(&mut block, spot.offset).ok();
                spot.sample = read.map(|()| Sample::of(spot.offset, &block));
                *spot.changed.get_mut() = read.is_none();
            }
        }
        self.on_written();
        VolumeIdentity {
            id: self.id.clone(),
            bytes,
            samples: self.spots.iter().filter_map(|spot| spot.sample).collect(),
            mark: self.seen.clone(),
        }
    }

    /// Whether somebody else wrote to a file since this program last did. Not for disks: what is written to them goes
    /// through the page cache and is counted at another time. If this program wrote and has not said so
    /// ([`Guard::on_written`]), nobody knows.
    pub(crate) fn is_disturbed(&mut self) -> bool {
        if !self.is_file() {
            return false;
        }
        let now = self.mark();
        let own = std::mem::take(self.wrote.get_mut());
        let disturbed = !own && now.is_some() && self.seen.is_some() && now != self.seen;
        self.seen = now;
        disturbed
    }

    /// This program has written, and stops for now.
    pub(crate) fn on_written(&mut self) {
        *self.wrote.get_mut() = false;
        self.seen = self.mark();
    }

    /// The same, if it did and it is worth a look.
    pub(crate) fn settle(&mut self) {
        if self.is_file() && *self.wrote.get_mut() {
            self.on_written();
        }
    }

    fn is_file(&self) -> bool {
        self.probe.as_ref().is_some_and(|probe| !probe.is_device)
    }
}
