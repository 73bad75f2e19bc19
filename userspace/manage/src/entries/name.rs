// SPDX-License-Identifier: GPL-2.0-only

//! How a device is named in the file, and which one that is today.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use crate::system::{DevNumber, System};

/// How a device can be named but by a path: the word before `=`, and where udev keeps the links.
const TAGS: [(&str, &str); 5] = [
    ("UUID", "by-uuid"),
    ("LABEL", "by-label"),
    ("PARTUUID", "by-partuuid"),
    ("PARTLABEL", "by-partlabel"),
    ("ID", "by-id"),
];

/// Links in the order in which they are preferred as a name that stays: what belongs to the disk or the partition before
/// what belongs to its content.
const STABLE: [&str; 3] = ["by-id", "by-partuuid", "by-uuid"];

/// Kinds of links in `by-id`, best first: what the standards make unique in the world, then what a vendor does, then names.
const BY_ID: [&str; 9] = [
    "wwn-",
    "nvme-eui.",
    "dm-uuid-",
    "md-uuid-",
    "nvme-",
    "scsi-",
    "ata-",
    "virtio-",
    "",
];

/// The name of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceName {
    /// A path below `/dev`.
    Path(PathBuf),
    /// A property of the device or of what is on it.
    Tag {
        /// Which: `UUID` and the like.
        tag: &'static str,
        /// Its value.
        value: String,
    },
}

impl DeviceName {
    /// Reads a name.
    ///
    /// # Errors
    ///
    /// What is wrong with it, and what to do.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some((word, value)) = text.split_once('=').filter(|_| !text.starts_with('/')) {
            let known = TAGS.iter().find(|(tag, _)| *tag == word);
            let Some((tag, _)) = known else {
                return Err(format!(
                    "{word}= is no way to name a device; there are UUID=, LABEL=, PARTUUID=, PARTLABEL= and ID= (a name below \
                     /dev/disk/by-id)"
                ));
            };
            // fstab has them with quotes too.
            let value = value.trim_matches('"');
            if value.is_empty() {
                return Err(format!("a value is missing behind {tag}="));
            }
            return Ok(Self::Tag {
                tag,
                value: value.to_owned(),
            });
        }
        if text.starts_with("/dev/") && text.len() > 5 {
            if Path::new(text)
                .components()
                .any(|part| part.as_os_str() == "..")
            {
                return Err(format!("{text}: write the path without \"..\""));
            }
            return Ok(Self::Path(text.into()));
        }
        Err(format!(
            "{text:?} is no block device: give a whole path such as /dev/disk/by-id/..., or UUID=..., LABEL=... or PARTUUID=..."
        ))
    }

    /// The path by which it is found today.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Tag { tag, value } => {
                let dir = TAGS
                    .iter()
                    .find(|(name, _)| name == tag)
                    .map_or("", |tag| tag.1);
                Path::new("/dev/disk").join(dir).join(encode(value))
            }
        }
    }

    /// A name that stays the same over a reboot, if this one may not, with the reason.
    #[must_use]
    pub fn better(&self, system: &System) -> Option<(String, &'static str)> {
        let Self::Path(path) = self else { return None };
        let name = path.strip_prefix("/dev").ok()?.to_str()?;
        let reason = changeable(name)?;
        let dev = System::dev_number(&system.path(path.to_str()?)).ok()??;
        Some((stable(system, dev)?, reason))
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Tag { tag, value } => write!(f, "{tag}={value}"),
        }
    }
}

/// Why a name below `/dev` may mean another device after a reboot.
fn changeable(name: &str) -> Option<&'static str> {
    let after = |prefix: &str| {
        name.strip_prefix(prefix)
            .and_then(|rest| rest.chars().next())
    };
    let letter = |prefix: &str| after(prefix).is_some_and(|c| c.is_ascii_lowercase());
    let digit = |prefix: &str| after(prefix).is_some_and(|c| c.is_ascii_digit());
    if ["sd", "vd", "hd", "xvd"]
        .iter()
        .any(|prefix| letter(prefix))
        || ["nvme", "mmcblk", "nbd", "sr", "rbd", "pmem"]
            .iter()
            .any(|prefix| digit(prefix))
    {
        return Some("disks get such names in the order in which they are found");
    }
    if digit("dm-") || digit("md") {
        return Some("it is numbered in the order in which it is set up");
    }
    digit("loop").then_some("another file may be behind it next time")
}

/// The best of udev's links to a device that stay the same over a reboot.
#[must_use]
pub fn stable(system: &System, dev: DevNumber) -> Option<String> {
    STABLE.iter().find_map(|dir| {
        let dir = format!("/dev/disk/{dir}");
        let links = links_to(system, &dir, dev);
        let rank = |name: &str| BY_ID.iter().position(|kind| name.starts_with(kind));
        let best = links
            .into_iter()
            .min_by_key(|name| (rank(name), name.clone()))?;
        Some(format!("{dir}/{best}"))
    })
}

fn links_to(system: &System, dir: &str, dev: DevNumber) -> Vec<String> {
    let entries = fs::read_dir(system.path(dir))
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter(|entry| System::dev_number(&entry.path()).ok().flatten() == Some(dev))
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// As udev writes a value in the name of a link: what may not be in one as `\x20`.
fn encode(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "#+-.:=@_".contains(c) || !c.is_ascii();
    let mut encoded = String::new();
    for c in value.chars() {
        if plain(c) {
            encoded.push(c);
        } else {
            encoded += &format!("\\x{:02x}", u32::from(c));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_found() {
        let path = |text: &str| DeviceName::parse(text).unwrap().path();
        assert_eq!(path("/dev/vdb"), Path::new("/dev/vdb"));
        assert_eq!(path("UUID=ab-1"), Path::new("/dev/disk/by-uuid/ab-1"));
        assert_eq!(
            path("LABEL=\"my disk/1\""),
            Path::new("/dev/disk/by-label/my\\x20disk\\x2f1")
        );
        assert_eq!(path("ID=wwn-0x1"), Path::new("/dev/disk/by-id/wwn-0x1"));
        for text in [
            "vdb",
            "/srv/image",
            "/dev/",
            "UUID=",
            "SERIAL=1",
            "",
            "/dev/../etc",
        ] {
            assert!(DeviceName::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_that_move_are_known() {
        for name in [
            "sda",
            "vdb1",
            "nvme0n1p2",
            "dm-3",
            "md0",
            "loop7",
            "xvda",
            "mmcblk0p1",
        ] {
            assert!(changeable(name).is_some(), "{name}");
        }
        for name in [
            "mapper/data",
            "vg/lv",
            "disk/by-id/wwn-0x1",
            "disk/by-path/pci-0",
            "drbd0",
            "md/data",
        ] {
            assert!(changeable(name).is_none(), "{name}");
        }
    }
}
