// SPDX-License-Identifier: GPL-2.0-only

//! Where a disk queue lies. On a device of its own set it must not: what is written to the queue would be captured,
//! queued, captured again, and the queue would stand and fall with what it is there for.
//!
//! ```text
//!   queue directory --> file system --> device --> partition of / built from / file on --> ... --> a device of the set?
//! ```

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use dtloop_abi::raw;

/// Devices looked at before a stack is given up as unknown; real ones are a few deep.
const DEVICES_MAX: usize = 1000;

/// Number of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Number {
    major: u64,
    minor: u64,
}

impl Number {
    /// From a device number as `stat` gives it.
    #[must_use]
    pub fn from_raw(dev: u64) -> Self {
        Self {
            major: nix::sys::stat::major(dev),
            minor: nix::sys::stat::minor(dev),
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

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A device of the set, and what people call it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taken {
    /// Its number.
    pub number: Number,
    /// For people: "loop1", "/dev/vdb (behind loop1)".
    pub name: String,
}

impl Taken {
    /// The loop devices of a set and what is behind them.
    #[must_use]
    pub fn of(devices: &[raw::DeviceStatus]) -> Vec<Self> {
        let both = devices.iter().flat_map(|device| {
            let name = format!("loop{}", device.loop_number());
            let behind = format!("{} (behind {name})", device.backing_name());
            [(device.loop_dev, name), (device.backing_dev, behind)]
        });
        let known = both.filter(|(dev, _)| *dev != 0);
        known
            .map(|(dev, name)| Self {
                number: Number::from_raw(dev),
                name,
            })
            .collect()
    }
}

/// What a place is worth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// A queue may be there.
    Good,
    /// It may, but what is below it is not known; the reason is a warning.
    Doubtful(String),
    /// It must not.
    Refused(String),
}

/// The parts of this machine that tell.
#[derive(Clone, Debug)]
pub struct System {
    sys: PathBuf,
    mountinfo: PathBuf,
}

impl Default for System {
    fn default() -> Self {
        Self {
            sys: "/sys".into(),
            mountinfo: "/proc/self/mountinfo".into(),
        }
    }
}

struct Mount {
    source: String,
    kind: String,
}

impl System {
    /// Judges a directory, or where it will be.
    #[must_use]
    pub fn judge(&self, dir: &Path, taken: &[Taken]) -> Verdict {
        if cfg!(feature = "simulation") {
            // Its disks are none of this machine's.
            return Verdict::Good;
        }
        let there = |dir: &Path| {
            fs::metadata(dir)
                .ok()
                .map(|found| (dir.to_owned(), found.dev()))
        };
        match dir.ancestors().find_map(there) {
            Some((there, dev)) => self.judge_device(&there, Number::from_raw(dev), taken),
            None => doubtful(dir, None),
        }
    }

    fn judge_device(&self, dir: &Path, number: Number, taken: &[Taken]) -> Verdict {
        let number = if number.major != 0 {
            number
        } else {
            // A file system with a number of its own, such as btrfs.
            let mount = self.mount_of(dir);
            let source = mount.as_ref().and_then(|mount| device_of(&mount.source));
            match source {
                Some(number) => number,
                None => return doubtful(dir, mount.as_ref()),
            }
        };
        let below = self.below(number);
        let hit = taken.iter().find(|device| below.contains(&device.number));
        // The whole disk of which the set has a partition.
        let above = || {
            taken
                .iter()
                .find(|device| self.below(device.number).contains(&number))
        };
        match hit.or_else(above) {
            Some(device) => Verdict::Refused(format!(
                "queue directory {} lies on {}, a device of the set; name a directory on another disk",
                dir.display(),
                device.name
            )),
            None => Verdict::Good,
        }
    }

    /// The device and everything it is made of.
    fn below(&self, number: Number) -> BTreeSet<Number> {
        let (mut found, mut rest) = (BTreeSet::new(), vec![number]);
        while let Some(number) = rest.pop() {
            if found.len() < DEVICES_MAX && found.insert(number) {
                rest.extend(self.parts(number));
            }
        }
        found
    }

    /// What a device is directly made of.
    fn parts(&self, number: Number) -> Vec<Number> {
        let link = self.sys.join("dev/block").join(number.to_string());
        let Ok(dir) = fs::canonicalize(link) else {
            return vec![];
        };
        let number_in =
            |dir: &Path| Number::parse(&fs::read_to_string(dir.join("dev")).unwrap_or_default());
        let mut parts = vec![];
        if dir.join("partition").exists() {
            parts.extend(dir.parent().and_then(number_in));
        }
        for slave in fs::read_dir(dir.join("slaves")).into_iter().flatten() {
            parts.extend(slave.ok().and_then(|slave| number_in(&slave.path())));
        }
        // A stock loop device is a file on some file system, or another device.
        if let Ok(path) = fs::read_to_string(dir.join("loop/backing_file")) {
            if let Ok(file) = fs::metadata(path.trim_end()) {
                let dev = if file.rdev() != 0 {
                    file.rdev()
                } else {
                    file.dev()
                };
                parts.push(Number::from_raw(dev));
            }
        }
        parts
    }

    fn mount_of(&self, dir: &Path) -> Option<Mount> {
        let dir = fs::canonicalize(dir).ok()?;
        let text = fs::read_to_string(&self.mountinfo).ok()?;
        let mut best: Option<(usize, Mount)> = None;
        for line in text.lines() {
            let Some((at, mount)) = parse_mount(line) else {
                continue;
            };
            // Of two mounts at one place the later one is seen.
            if dir.starts_with(&at) && best.as_ref().is_none_or(|(length, _)| at.len() >= *length) {
                best = Some((at.len(), mount));
            }
        }
        best.map(|(_, mount)| mount)
    }
}

/// Reads a line of mountinfo: id, parent, device, root, mount point, options, ..., "-", type, source.
fn parse_mount(line: &str) -> Option<(String, Mount)> {
    let (left, right) = line.split_once(" - ")?;
    let mut right = right.split(' ');
    let (kind, source) = (right.next()?.to_owned(), right.next()?.to_owned());
    let at = left.split(' ').nth(4)?.replace("\\040", " ");
    Some((at, Mount { source, kind }))
}

fn device_of(source: &str) -> Option<Number> {
    let dev = fs::metadata(source).ok()?.rdev();
    (source.starts_with('/') && dev != 0).then(|| Number::from_raw(dev))
}

fn doubtful(dir: &Path, mount: Option<&Mount>) -> Verdict {
    let kind = mount.map_or("unknown", |mount| mount.kind.as_str());
    let dir = dir.display();
    Verdict::Doubtful(match kind {
        "tmpfs" | "ramfs" => format!(
            "queue directory {dir} is in memory ({kind}): it takes memory instead of disk and ends with the machine"
        ),
        _ => format!(
            "queue directory {dir} is on a file system ({kind}) whose disk is not known; make sure that it is none \
             of the set's devices"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A machine: vdb with partition vdb1; dm-0 made of vdb1 and vdc; md0 made of dm-0; vdd alone; loop7 over a file.
    fn machine() -> (tempfile::TempDir, System) {
        let root = tempfile::tempdir().unwrap();
        let sys = root.path().join("sys");
        fs::create_dir_all(sys.join("dev/block")).unwrap();
        let device = |path: &str, number: &str, slaves: &[&str]| {
            let dir = sys.join("devices").join(path);
            fs::create_dir_all(dir.join("slaves")).unwrap();
            fs::write(dir.join("dev"), format!("{number}\n")).unwrap();
            symlink(&dir, sys.join("dev/block").join(number)).unwrap();
            for slave in slaves {
                let name = slave.rsplit('/').next().unwrap();
                symlink(
                    sys.join("devices").join(slave),
                    dir.join("slaves").join(name),
                )
                .unwrap();
            }
            dir
        };
        device("vdb", "254:16", &[]);
        fs::write(device("vdb/vdb1", "254:17", &[]).join("partition"), "1\n").unwrap();
        fs::write(device("vdb/vdb2", "254:18", &[]).join("partition"), "2\n").unwrap();
        device("vdc", "254:32", &[]);
        device("dm-0", "252:0", &["vdb/vdb1", "vdc"]);
        device("md0", "9:0", &["dm-0"]);
        device("vdd", "254:48", &[]);
        let mountinfo = root.path().join("mountinfo");
        let lines = format!(
            "21 1 254:1 / / rw - ext4 /dev/vda1 rw\n22 21 0:40 / {} rw shared:1 - tmpfs tmpfs rw\n",
            root.path().display()
        );
        fs::write(&mountinfo, lines).unwrap();
        (root, System { sys, mountinfo })
    }

    fn number(major: u64, minor: u64) -> Number {
        Number { major, minor }
    }

    fn taken(number: Number, name: &str) -> Vec<Taken> {
        vec![Taken {
            number,
            name: name.into(),
        }]
    }

    #[test]
    fn every_way_onto_a_device_of_the_set_is_found() {
        let (root, system) = machine();
        let judge = |queue, set, name| system.judge_device(root.path(), queue, &taken(set, name));
        let (vdb, vdb1, vdb2) = (number(254, 16), number(254, 17), number(254, 18));
        let (vdc, dm, md) = (number(254, 32), number(252, 0), number(9, 0));
        for (queue, set) in [
            (vdb, vdb),
            (vdb1, vdb),
            (dm, vdb),
            (md, vdc),
            (md, vdb1),
            (md, dm),
            (vdb, vdb1),
        ] {
            let verdict = judge(queue, set, "loop1");
            let Verdict::Refused(reason) = verdict else {
                panic!("{queue} on {set}: {verdict:?}");
            };
            assert!(reason.contains("lies on loop1"), "{reason}");
        }
        for (queue, set) in [
            (number(254, 48), vdb),
            (vdb2, vdb1),
            (vdc, vdb),
            (vdd(), md),
        ] {
            assert_eq!(
                judge(queue, set, "loop1"),
                Verdict::Good,
                "{queue} on {set}"
            );
        }
    }

    fn vdd() -> Number {
        number(254, 48)
    }

    #[test]
    fn what_is_below_a_stock_loop_device_is_found() {
        let (root, system) = machine();
        let file = root.path().join("image");
        fs::write(&file, "x").unwrap();
        let dir = system.sys.join("devices/loop7");
        fs::create_dir_all(dir.join("loop")).unwrap();
        fs::write(
            dir.join("loop/backing_file"),
            format!("{}\n", file.display()),
        )
        .unwrap();
        symlink(&dir, system.sys.join("dev/block/7:7")).unwrap();
        let home = Number::from_raw(fs::metadata(&file).unwrap().dev());
        let verdict = system.judge_device(root.path(), number(7, 7), &taken(home, "loop1"));
        assert!(matches!(verdict, Verdict::Refused(_)), "{verdict:?}");
    }

    #[test]
    fn memory_and_the_unknown_are_warned_of() {
        let (root, system) = machine();
        let dir = root.path().join("queue");
        fs::create_dir(&dir).unwrap();
        let verdict = system.judge_device(&dir, number(0, 40), &taken(vdd(), "loop1"));
        assert!(
            matches!(&verdict, Verdict::Doubtful(reason) if reason.contains("in memory")),
            "{verdict:?}"
        );
        let mounts = fs::read_to_string(&system.mountinfo).unwrap();
        fs::write(&system.mountinfo, mounts.replace("tmpfs", "overlay")).unwrap();
        let verdict = system.judge_device(&dir, number(0, 40), &taken(vdd(), "loop1"));
        assert!(
            matches!(&verdict, Verdict::Doubtful(reason) if reason.contains("not known")),
            "{verdict:?}"
        );
    }

    #[test]
    fn the_real_machine_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let verdict = System::default().judge(dir.path(), &taken(number(1, 200), "loop1"));
        assert!(!matches!(verdict, Verdict::Refused(_)), "{verdict:?}");
    }
}
