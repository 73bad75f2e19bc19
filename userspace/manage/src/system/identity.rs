// SPDX-License-Identifier: GPL-2.0-only

//! Which disk a block device is, whatever its name is today.

use std::path::Path;

use super::{System, trimmed};

/// What identifies a disk, in sysfs below its directory; the first that is there.
const MARKS: [&str; 8] = [
    "dm/uuid",
    "md/uuid",
    "wwid",
    "device/wwid",
    "nguid",
    "serial",
    "device/serial",
    "device/cid",
];

impl System {
    /// A fingerprint of the disk (and the partition) that a block device is, and of where on it the data begins. All
    /// zero: the disk does not tell who it is.
    pub fn identity(&self, name: &str, offset_bytes: u64) -> [u8; 16] {
        let Some(device) = self.block(name) else {
            return [0; 16];
        };
        let disk = device.disk.as_deref().unwrap_or(name);
        let dir = self.path("/sys/class/block").join(disk);
        let read = |mark: &str| trimmed(&dir.join(mark)).filter(|text| !text.trim().is_empty());
        let Some(mark) = MARKS.iter().find_map(|mark| read(mark)) else {
            return [0; 16];
        };
        let start = trimmed(&self.path("/sys/class/block").join(name).join("start"));
        let text = format!(
            "{}\n{}\n{offset_bytes}",
            mark.trim(),
            start.unwrap_or_default()
        );
        let mut identity = [0; 16];
        identity.copy_from_slice(&blake3::hash(text.as_bytes()).as_bytes()[..16]);
        identity
    }

    /// Which machine this is, from its machine-id; all zero if it has none.
    pub fn machine(&self) -> [u8; 16] {
        let id = trimmed(&self.path("/etc/machine-id")).unwrap_or_default();
        let parse = |at: usize| u8::from_str_radix(id.get(at..at + 2)?, 16).ok();
        let mut machine = [0; 16];
        for (nth, byte) in machine.iter_mut().enumerate() {
            *byte = parse(nth * 2).unwrap_or(0);
        }
        machine
    }

    /// The first of `wanted` that the device with this name is, is a partition of, or is built upon.
    pub fn built_on<'a>(&self, name: &str, wanted: &'a [String]) -> Option<&'a str> {
        let mut waiting = vec![name.to_owned()];
        let mut seen = vec![];
        while let Some(name) = waiting.pop() {
            if seen.contains(&name) {
                continue;
            }
            if let Some(found) = wanted.iter().find(|wanted| **wanted == name) {
                return Some(found);
            }
            let dir = self.path("/sys/class/block").join(&name);
            waiting.extend(super::names(&dir.join("slaves")));
            waiting.extend(self.block(&name).and_then(|device| device.disk));
            // A stock loop device over a file.
            let file = trimmed(&dir.join("loop/backing_file"));
            waiting.extend(file.and_then(|file| self.device_of_file(Path::new(&file))));
            seen.push(name);
        }
        None
    }

    /// The block device that the file system of a file lies on.
    pub fn device_of_file(&self, path: &Path) -> Option<String> {
        use std::os::unix::fs::MetadataExt;
        let dev = std::fs::metadata(path).ok()?.dev();
        self.name_of(super::DevNumber::from_raw(dev))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::machine;

    const MACHINE: &str = "
        etc/machine-id: 000102030405060708090a0b0c0d0eff
        sys/devices/vdb/size: 8
        sys/devices/vdb/serial: data
        sys/devices/vdb/vdb1/partition: 1
        sys/devices/vdb/vdb1/start: 2048
        sys/devices/vdc/size: 8
        sys/devices/dm-0/dm/uuid: LVM-abc
        sys/devices/dm-0/slaves/vdb1: x
        sys/class/block/vdb -> ../../devices/vdb
        sys/class/block/vdb1 -> ../../devices/vdb/vdb1
        sys/class/block/vdc -> ../../devices/vdc
        sys/class/block/dm-0 -> ../../devices/dm-0
        ";

    #[test]
    fn disks_partitions_and_offsets_differ() {
        let (_dir, system) = machine(MACHINE);
        let all = [
            system.identity("vdb", 0),
            system.identity("vdb", 512),
            system.identity("vdb1", 0),
            system.identity("dm-0", 0),
        ];
        for (nth, one) in all.iter().enumerate() {
            assert_ne!(*one, [0; 16]);
            assert!(all[..nth].iter().all(|other| other != one), "{nth}");
        }
        assert_eq!(system.identity("vdb", 0), all[0]);
        assert_eq!(
            system.identity("vdc", 0),
            [0; 16],
            "it does not say who it is"
        );
        assert_eq!(system.machine()[14..], [0x0e, 0xff]);
    }

    #[test]
    fn what_a_device_is_built_on_is_found() {
        let (_dir, system) = machine(MACHINE);
        let wanted = ["vdb".to_owned()];
        for name in ["vdb", "vdb1", "dm-0"] {
            assert_eq!(system.built_on(name, &wanted), Some("vdb"), "{name}");
        }
        assert_eq!(system.built_on("vdc", &wanted), None);
    }
}
