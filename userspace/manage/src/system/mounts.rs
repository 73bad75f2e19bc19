// SPDX-License-Identifier: GPL-2.0-only

//! What is mounted and swapped to.

use std::collections::BTreeMap;

use super::DevNumber;

/// Devices in use by mounts and swap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    mounts: BTreeMap<DevNumber, Vec<String>>,
    swaps: Vec<DevNumber>,
}

impl Uses {
    /// Reads `/proc/self/mountinfo` and `/proc/swaps`; `dev_of` looks paths up.
    pub fn parse(mountinfo: &str, swaps: &str, dev_of: impl Fn(&str) -> Option<DevNumber>) -> Self {
        let mut uses = Self::default();
        for line in mountinfo.lines() {
            let Some(mount) = Mount::parse(line) else {
                continue;
            };
            uses.add(mount.dev, &mount.at);
            // btrfs and some others mount under a number of their own: look at the source too.
            if let Some(dev) = mount.source.starts_with('/').then(|| dev_of(&mount.source)) {
                if let Some(dev) = dev.filter(|&dev| dev != mount.dev) {
                    uses.add(dev, &mount.at);
                }
            }
        }
        let paths = swaps
            .lines()
            .skip(1)
            .filter_map(|line| line.split_whitespace().next());
        uses.swaps = paths.filter_map(|path| dev_of(&unescape(path))).collect();
        uses
    }

    fn add(&mut self, dev: DevNumber, at: &str) {
        let places = self.mounts.entry(dev).or_default();
        if !places.iter().any(|place| place == at) {
            places.push(at.to_owned());
        }
    }

    /// Where a device is mounted.
    pub fn mounts(&self, dev: DevNumber) -> &[String] {
        self.mounts.get(&dev).map_or(&[], Vec::as_slice)
    }

    /// True when it is swapped to.
    pub fn is_swap(&self, dev: DevNumber) -> bool {
        self.swaps.contains(&dev)
    }
}

struct Mount {
    dev: DevNumber,
    at: String,
    source: String,
}

impl Mount {
    /// Reads a line: id, parent, major:minor, root, mount point, options, optional fields, "-",
    /// type, source, options.
    fn parse(line: &str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(2);
        let dev = DevNumber::parse(left.next()?)?;
        let at = unescape(left.nth(1)?);
        let source = unescape(right.split(' ').nth(1)?);
        Some(Self { dev, at, source })
    }
}

/// Undoes the kernel's `\040` for blanks and the like.
pub(crate) fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let octal = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        bytes.push(octal.unwrap_or(first));
        rest = if octal.is_some() { &tail[3..] } else { tail };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn dev(major: u64, minor: u64) -> DevNumber {
        DevNumber { major, minor }
    }

    #[test]
    fn mounts_and_swaps_are_found() {
        let mountinfo = "\
21 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 21 254:16 / /srv/my\\040data rw - xfs /dev/vdb rw
31 21 254:16 /sub /mnt rw shared:5 master:2 - xfs /dev/vdb rw
32 21 0:44 / /pool rw - btrfs /dev/vdc rw
33 21 0:5 / /proc rw - proc proc rw
nonsense
";
        let swaps = "Filename Type Size Used Priority\n/dev/vdd partition 1 0 -2\n";
        let dev_of = |path: &str| match path {
            "/dev/vdb" => Some(dev(254, 16)),
            "/dev/vdc" => Some(dev(254, 32)),
            "/dev/vdd" => Some(dev(254, 48)),
            _ => None,
        };
        let uses = Uses::parse(mountinfo, swaps, dev_of);
        assert_eq!(uses.mounts(dev(254, 16)), ["/srv/my data", "/mnt"]);
        assert_eq!(uses.mounts(dev(254, 32)), ["/pool"]);
        assert_eq!(uses.mounts(dev(254, 48)), [""; 0]);
        assert!(uses.is_swap(dev(254, 48)));
        assert!(!uses.is_swap(dev(254, 16)));
    }

    #[test]
    fn escapes_are_undone() {
        assert_eq!(unescape(r"a\040b\134c\x"), r"a b\c\x");
        assert_eq!(unescape(r"end\04"), r"end\04");
    }
}
