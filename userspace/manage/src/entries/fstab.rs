// SPDX-License-Identifier: GPL-2.0-only

//! What `/etc/fstab` does with the devices of the entries.

use std::fs;

use super::name::DeviceName;
use super::text::unescape;
use crate::system::{DevNumber, System};

/// A line about a block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Line {
    /// From 1 up.
    pub(super) line: usize,
    /// The device, as it is written.
    pub(super) spec: String,
    /// Where it is mounted; `none` for swap.
    pub(super) dir: String,
    /// Which device that is today.
    pub(super) dev: Option<DevNumber>,
}

/// Reads it; without a file there are no lines.
pub(super) fn read(system: &System) -> Vec<Line> {
    let text = fs::read(system.path("/etc/fstab")).unwrap_or_default();
    parse(&String::from_utf8_lossy(&text), |name| {
        let path = name.path();
        System::dev_number(&system.path(path.to_str()?)).ok()?
    })
}

fn parse(text: &str, dev_of: impl Fn(&DeviceName) -> Option<DevNumber>) -> Vec<Line> {
    let mut found = Vec::new();
    for (nth, line) in text.lines().enumerate() {
        let mut fields = line.split_ascii_whitespace().map(unescape);
        let (Some(spec), Some(dir)) = (fields.next(), fields.next()) else {
            continue;
        };
        if spec.starts_with('#') {
            continue;
        }
        // What is no block device, `tmpfs` or `server:/path`, is of no interest.
        let Ok(name) = DeviceName::parse(&spec) else {
            continue;
        };
        found.push(Line {
            line: nth + 1,
            dev: dev_of(&name),
            spec,
            dir,
        });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_about_block_devices_are_found() {
        let text = "\
# <device> <dir>
/dev/vdb /srv/my\\040data ext4 defaults 0 2
UUID=\"1-2\" none swap sw 0 0
tmpfs /tmp tmpfs defaults
server:/x /mnt nfs
/dev/vdc
";
        let dev = DevNumber {
            major: 254,
            minor: 16,
        };
        let lines = parse(text, |name| (name.to_string() == "/dev/vdb").then_some(dev));
        let told: Vec<_> = lines
            .iter()
            .map(|line| (line.line, line.dir.as_str(), line.dev))
            .collect();
        assert_eq!(told, [(2, "/srv/my data", Some(dev)), (3, "none", None)]);
    }
}
