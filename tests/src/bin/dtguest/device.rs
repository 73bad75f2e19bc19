// SPDX-License-Identifier: GPL-2.0-only

//! Finds disks by their serial.

use std::fs;
use std::path::Path;

/// Device node of the disk with this serial.
pub(crate) fn find(serial: &str) -> Option<String> {
    let mut disks = fs::read_dir("/sys/block").ok()?.flatten();
    let disk = disks.find(|disk| has_serial(&disk.path(), serial))?;
    Some(format!("/dev/{}", disk.file_name().to_str()?))
}

/// virtio-blk says its serial itself; a SCSI disk has it in the vital product data page 0x80, after four bytes.
fn has_serial(disk: &Path, serial: &str) -> bool {
    let virtio =
        fs::read(disk.join("serial")).is_ok_and(|found| found.trim_ascii() == serial.as_bytes());
    let scsi = || {
        fs::read(disk.join("device/vpd_pg80")).is_ok_and(|page| {
            page.get(4..)
                .is_some_and(|found| found.trim_ascii() == serial.as_bytes())
        })
    };
    virtio || scsi()
}
