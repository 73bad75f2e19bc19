// SPDX-License-Identifier: GPL-2.0-only

//! What the machine says about its block devices. Reads only.

mod identity;
mod mounts;
mod signature;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

pub use mounts::Uses;
pub(crate) use mounts::unescape;
pub use signature::{PROBE_BYTES, Signature, probe};

/// Number of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevNumber {
    /// Of the driver.
    pub major: u64,
    /// Of the device.
    pub minor: u64,
}

impl DevNumber {
    /// From `st_rdev` or a number that the module reports.
    pub const fn from_raw(raw: u64) -> Self {
        Self {
            major: major(raw),
            minor: minor(raw),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

impl fmt::Display for DevNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// The machine, or for tests a directory that looks like one.
#[derive(Clone, Debug)]
pub struct System {
    root: PathBuf,
}

impl Default for System {
    fn default() -> Self {
        Self::new()
    }
}

/// A block device as sysfs shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockDevice {
    /// The kernel's name.
    pub name: String,
    /// Its number.
    pub number: Option<DevNumber>,
    /// Its size.
    pub size_bytes: u64,
    /// Logical block size.
    pub block_bytes: u64,
    /// It takes no writes.
    pub read_only: bool,
    /// It is written in zones.
    pub zoned: bool,
    /// The disk that it is a partition of.
    pub disk: Option<String>,
    /// Its partitions.
    pub partitions: Vec<String>,
    /// What is built upon it, as people know it.
    pub holders: Vec<String>,
    /// For a bound stock loop device: its file.
    pub backing_file: Option<String>,
}

impl BlockDevice {
    /// The device's path.
    pub fn path(&self) -> String {
        node(&self.name)
    }

    /// The number N of loopN.
    pub fn loop_number(&self) -> Option<u32> {
        self.name.strip_prefix("loop")?.parse().ok()
    }
}

/// The path of a device that the kernel calls so: `cciss!c0d0` is `/dev/cciss/c0d0`.
pub fn node(name: &str) -> String {
    format!("/dev/{}", name.replace('!', "/"))
}

fn trimmed(path: &Path) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.trim_end().to_owned())
}

fn number(path: &Path) -> Option<u64> {
    trimmed(path)?.parse().ok()
}

/// Names in a directory, sorted; none if it does not exist.
fn names(path: &Path) -> Vec<String> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

impl System {
    /// This machine.
    #[must_use]
    pub fn new() -> Self {
        Self { root: "/".into() }
    }

    #[cfg(test)]
    pub(crate) fn at(root: &Path) -> Self {
        Self { root: root.into() }
    }

    /// Where a path of the machine is.
    #[must_use]
    pub fn path(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// True when the stock loop driver is there. Asked of sysfs, because opening
    /// `/dev/loop-control` would load it.
    pub fn has_stock_loop(&self) -> bool {
        self.path("/sys/class/misc/loop-control").exists()
    }

    /// Names of all block devices.
    pub fn block_names(&self) -> Vec<String> {
        names(&self.path("/sys/class/block"))
    }

    /// A block device by the kernel's name.
    pub fn block(&self, name: &str) -> Option<BlockDevice> {
        let dir = fs::canonicalize(self.path("/sys/class/block").join(name)).ok()?;
        let partition = dir.join("partition").exists();
        let disk_dir = if partition { dir.parent()? } else { &dir };
        let disk = partition
            .then(|| disk_dir.file_name()?.to_str().map(str::to_owned))
            .flatten();
        let is_partition = |child: &String| dir.join(child).join("partition").exists();
        let holders = names(&dir.join("holders"));
        Some(BlockDevice {
            name: name.to_owned(),
            number: trimmed(&dir.join("dev")).and_then(|dev| DevNumber::parse(&dev)),
            size_bytes: number(&dir.join("size")).unwrap_or(0).saturating_mul(512),
            block_bytes: number(&disk_dir.join("queue/logical_block_size")).unwrap_or(512),
            read_only: number(&dir.join("ro")) == Some(1),
            zoned: trimmed(&disk_dir.join("queue/zoned")).is_some_and(|z| z != "none"),
            disk,
            partitions: names(&dir).into_iter().filter(is_partition).collect(),
            holders: holders.iter().map(|name| self.holder(name)).collect(),
            backing_file: trimmed(&dir.join("loop/backing_file")),
        })
    }

    /// How people know a device that is built upon another.
    fn holder(&self, name: &str) -> String {
        let dir = self.path("/sys/class/block").join(name);
        let Some(mapped) = trimmed(&dir.join("dm/name")) else {
            return node(name);
        };
        let by = trimmed(&dir.join("dm/uuid")).unwrap_or_default();
        if by.starts_with("LVM-") {
            format!("the LVM volume {mapped}")
        } else {
            format!("/dev/mapper/{mapped}")
        }
    }

    /// The name of a device-mapper device below `/dev/mapper`.
    #[must_use]
    pub fn mapped_name(&self, name: &str) -> Option<String> {
        trimmed(&self.path("/sys/class/block").join(name).join("dm/name"))
    }

    /// What a device is built upon, by the kernel's names.
    #[must_use]
    pub fn slaves(&self, name: &str) -> Vec<String> {
        names(&self.path("/sys/class/block").join(name).join("slaves"))
    }

    /// The kernel's name of a device number.
    pub fn name_of(&self, dev: DevNumber) -> Option<String> {
        let link = self.path("/sys/dev/block").join(dev.to_string());
        let dir = fs::canonicalize(link).ok()?;
        Some(dir.file_name()?.to_str()?.to_owned())
    }

    /// The number of the block device at a path.
    pub fn dev_number(path: &Path) -> io::Result<Option<DevNumber>> {
        let meta = fs::metadata(path)?;
        let block = meta.file_type().is_block_device();
        Ok(block.then(|| DevNumber::from_raw(meta.rdev())))
    }

    /// What is mounted and swapped to.
    pub fn uses(&self) -> Uses {
        let read = |path| fs::read_to_string(self.path(path)).unwrap_or_default();
        let dev_of = |path: &str| Self::dev_number(Path::new(path)).ok().flatten();
        Uses::parse(&read("/proc/self/mountinfo"), &read("/proc/swaps"), dev_of)
    }

    /// Programs that have one of these devices open, as "name (pid)". What may not be looked at
    /// is left out.
    pub fn openers(&self, paths: &[String]) -> Vec<String> {
        let mut found = BTreeMap::new();
        for pid in names(&self.path("/proc")) {
            // This program itself may have been started with the device open.
            let other = |pid: &u32| *pid != std::process::id();
            let Some(number) = pid.parse().ok().filter(other) else {
                continue;
            };
            let dir = self.path("/proc").join(&pid);
            let opens = fs::read_dir(dir.join("fd")).into_iter().flatten().flatten();
            let ours = |entry: fs::DirEntry| {
                let target = fs::read_link(entry.path()).ok();
                target.is_some_and(|t| paths.iter().any(|path| t.as_os_str() == path.as_str()))
            };
            if opens.into_iter().any(ours) {
                let name = trimmed(&dir.join("comm")).unwrap_or_default();
                found.insert(number, format!("{name} ({pid})"));
            }
        }
        found.into_values().collect()
    }

    /// Programs that use something below a mount point, as "name (pid)". What may not be looked at is left out.
    #[must_use]
    pub fn users_of_mount(&self, place: &str) -> Vec<String> {
        let mut found = BTreeMap::new();
        let is_below = |link: PathBuf| fs::read_link(link).is_ok_and(|to| to.starts_with(place));
        for pid in names(&self.path("/proc")) {
            let Ok(number) = pid.parse::<u32>() else {
                continue;
            };
            let dir = self.path("/proc").join(&pid);
            let opens = fs::read_dir(dir.join("fd")).into_iter().flatten().flatten();
            let mut links = ["cwd", "root", "exe"]
                .map(|link| dir.join(link))
                .into_iter()
                .chain(opens.map(|entry| entry.path()));
            if links.any(is_below) {
                let name = trimmed(&dir.join("comm")).unwrap_or_default();
                found.insert(number, format!("{name} ({pid})"));
            }
        }
        found.into_values().collect()
    }

    /// The loop devices that the stock driver may have: all but `ours`. With true for bound ones.
    pub fn stock_loops(&self, ours: &[u32]) -> BTreeMap<u32, bool> {
        let mut loops = BTreeMap::new();
        for name in self.block_names() {
            let number = name.strip_prefix("loop").and_then(|n| n.parse().ok());
            if let Some(number) = number.filter(|number| !ours.contains(number)) {
                let bound = self
                    .path("/sys/class/block")
                    .join(&name)
                    .join("loop/backing_file")
                    .exists();
                loops.insert(number, bound);
            }
        }
        loops
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Makes files from "path: content" lines, and links from "path -> target" lines.
    pub(crate) fn machine(lines: &str) -> (tempfile::TempDir, System) {
        let dir = tempfile::tempdir().expect("a directory");
        for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let write = |path: &str| {
                let path = dir.path().join(path);
                fs::create_dir_all(path.parent().expect("a parent")).expect("a directory");
                path
            };
            if let Some((path, target)) = line.split_once(" -> ") {
                std::os::unix::fs::symlink(target, write(path)).expect("a link");
            } else if let Some((path, content)) = line.split_once(": ") {
                fs::write(write(path), format!("{content}\n")).expect("a file");
            }
        }
        let system = System::at(dir.path());
        (dir, system)
    }

    const DISK: &str = "
        sys/devices/vdb/dev: 254:16
        sys/devices/vdb/size: 2048
        sys/devices/vdb/ro: 0
        sys/devices/vdb/queue/logical_block_size: 4096
        sys/devices/vdb/queue/zoned: none
        sys/devices/vdb/vdb1/partition: 1
        sys/devices/vdb/vdb1/dev: 254:17
        sys/devices/vdb/vdb1/size: 1024
        sys/devices/vdb/vdb1/holders/dm-0: x
        sys/devices/dm-0/dm/name: vg-data
        sys/devices/dm-0/dm/uuid: LVM-abc
        sys/class/block/vdb -> ../../devices/vdb
        sys/class/block/vdb1 -> ../../devices/vdb/vdb1
        sys/class/block/dm-0 -> ../../devices/dm-0
        sys/dev/block/254:16 -> ../../devices/vdb
        ";

    #[test]
    fn a_disk_and_its_partition_are_read() {
        let (_dir, system) = machine(DISK);
        let disk = system.block("vdb").unwrap();
        assert_eq!(disk.size_bytes, 1 << 20);
        assert_eq!(disk.block_bytes, 4096);
        assert_eq!(disk.partitions, ["vdb1"]);
        assert_eq!(disk.disk, None);
        let partition = system.block("vdb1").unwrap();
        assert_eq!(partition.block_bytes, 4096, "of the disk");
        assert_eq!(partition.disk.as_deref(), Some("vdb"));
        assert_eq!(partition.holders, ["the LVM volume vg-data"]);
        let dev = DevNumber {
            major: 254,
            minor: 16,
        };
        assert_eq!(disk.number, Some(dev));
        assert_eq!(system.name_of(dev).as_deref(), Some("vdb"));
        assert_eq!(system.block("vdz"), None);
    }

    #[test]
    fn stock_loop_devices_are_told_from_ours() {
        let (_dir, system) = machine(
            "sys/class/block/loop0/size: 0
             sys/class/block/loop1/loop/backing_file: /dev/vdb
             sys/class/block/loop2/loop/backing_file: /srv/image
             sys/class/block/loop2p1/size: 0
             sys/class/misc/loop-control/dev: 10:237",
        );
        let stock = system.stock_loops(&[1]);
        assert_eq!(stock, BTreeMap::from([(0, false), (2, true)]));
        assert!(system.has_stock_loop());
    }

    #[test]
    fn openers_are_named() {
        let (_dir, system) = machine(
            "proc/41/comm: postgres
             proc/41/fd/3 -> /dev/loop1
             proc/42/comm: sh
             proc/42/fd/3 -> /dev/loop10
             proc/self/comm: x",
        );
        assert_eq!(system.openers(&["/dev/loop1".into()]), ["postgres (41)"]);
    }
}
