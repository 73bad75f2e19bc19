// SPDX-License-Identifier: GPL-2.0-only

//! What speaks against attaching a device. Everything is found out first, then judged; the module
//! judges once more, but cannot explain as much.

use std::fmt;

use crate::size;
use crate::system::{BlockDevice, Signature};

/// What is known about a device.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// As sysfs shows it.
    pub device: BlockDevice,
    /// Mount points of the device itself.
    pub mounts: Vec<String>,
    /// It is swapped to.
    pub swap: bool,
    /// It is attached as this loop device.
    pub attached: Option<u32>,
    /// It is one of our loop devices.
    pub is_ours: bool,
    /// Its disk is attached as this loop device.
    pub disk_attached: Option<u32>,
    /// Partitions in use, with how.
    pub partitions: Vec<(String, String)>,
    /// What it carries.
    pub signatures: Vec<Signature>,
    /// The kernel says that somebody holds it.
    pub held: bool,
    /// Why it cannot be read.
    pub unreadable: Option<String>,
}

/// How it is to be attached.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wish {
    /// First byte used.
    pub offset: u64,
    /// Most bytes used.
    pub size_limit: Option<u64>,
    /// Writes are refused.
    pub read_only: bool,
    /// The signature of swap or LVM does not matter.
    pub allow_signature: bool,
}

/// Something that speaks against it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// To this loop number, already.
    Attached(u32),
    /// Its disk is, to this loop number.
    DiskAttached(String, u32),
    /// It is a loop device of ours.
    Ours,
    /// It has no size.
    Empty,
    /// It is written in zones.
    Zoned,
    /// On these places.
    Mounted(Vec<String>),
    /// It is swapped to.
    Swap,
    /// It looks like swap.
    SwapSignature,
    /// It looks like a physical volume of LVM.
    LvmSignature,
    /// These are built upon it.
    Holders(Vec<String>),
    /// This partition is in use, in this way.
    PartitionInUse(String, String),
    /// Somebody has it exclusively.
    Held,
    /// For this reason.
    Unreadable(String),
    /// It takes no writes.
    ReadOnly,
    /// This figure is no multiple of that many bytes.
    Unaligned(&'static str, u64),
    /// It ends here.
    OffsetBeyond(u64),
    /// It has so many bytes behind the offset.
    LimitBeyond(u64),
}

/// All that speaks against attaching a device; nothing was changed.
#[derive(Debug, thiserror::Error)]
pub struct Refusals {
    /// What was to be changed.
    pub what: String,
    /// Why it was not.
    pub reasons: Vec<String>,
}

impl Refusals {
    /// A single reason.
    #[must_use]
    pub fn one(what: impl Into<String>, reason: impl fmt::Display) -> Self {
        Self {
            what: what.into(),
            reasons: vec![reason.to_string()],
        }
    }
}

impl fmt::Display for Refusals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.reasons.join("; "))
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Attached(number) => write!(f, "it is attached to /dev/loop{number} already"),
            Self::DiskAttached(disk, number) => {
                write!(f, "its disk {disk} is attached to /dev/loop{number}")
            }
            Self::Ours => f.write_str("it is a loop device of DTLOOP itself"),
            Self::Empty => f.write_str("it has no size (no medium, or not set up)"),
            Self::Zoned => f.write_str("zoned devices are not supported"),
            Self::Mounted(places) => {
                write!(
                    f,
                    "it is mounted on {}; unmount it first",
                    places.join(", ")
                )
            }
            Self::Swap => f.write_str("it is used as swap; run swapoff first"),
            Self::SwapSignature => f.write_str(
                "it carries a swap signature; if it was made through the loop device, \
                 give --allow-signature",
            ),
            Self::LvmSignature => f.write_str(
                "it is an LVM physical volume; if it was made through the loop device, \
                 give --allow-signature",
            ),
            Self::Holders(holders) => write!(f, "it is in use by {}", holders.join(", ")),
            Self::PartitionInUse(partition, how) => {
                write!(f, "its partition {partition} is in use: {how}")
            }
            Self::Held => f.write_str("the kernel says that it is in use"),
            Self::Unreadable(why) => write!(f, "it cannot be read: {why}"),
            Self::ReadOnly => f.write_str("it is read-only; give --read-only"),
            Self::Unaligned(what, block) => {
                write!(
                    f,
                    "the {what} is not a multiple of its block size, {block} bytes"
                )
            }
            Self::OffsetBeyond(bytes) => write!(
                f,
                "the offset lies beyond its end ({bytes} bytes, {})",
                size::bytes(*bytes)
            ),
            Self::LimitBeyond(bytes) => write!(
                f,
                "the size limit reaches beyond its end ({bytes} bytes after the offset, {})",
                size::bytes(*bytes)
            ),
        }
    }
}

/// Judges. The first reason is the most telling one.
#[must_use]
pub fn judge(facts: &Facts, wish: &Wish) -> Vec<Refusal> {
    let mut refusals = users(facts);
    let device = &facts.device;
    if !wish.allow_signature && refusals.is_empty() {
        if facts.signatures.contains(&Signature::Swap) {
            refusals.push(Refusal::SwapSignature);
        }
        if facts.signatures.contains(&Signature::LvmPhysicalVolume) {
            refusals.push(Refusal::LvmSignature);
        }
    }
    if refusals.is_empty() && facts.held {
        refusals.push(Refusal::Held);
    }
    if let (true, Some(why)) = (refusals.is_empty(), &facts.unreadable) {
        refusals.push(Refusal::Unreadable(why.clone()));
    }
    if device.zoned {
        refusals.push(Refusal::Zoned);
    }
    if device.read_only && !wish.read_only {
        refusals.push(Refusal::ReadOnly);
    }
    if device.size_bytes == 0 {
        refusals.push(Refusal::Empty);
    } else {
        refusals.extend(window(device, wish));
    }
    refusals
}

/// Who uses it.
fn users(facts: &Facts) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    if let Some(number) = facts.attached {
        return vec![Refusal::Attached(number)];
    }
    if facts.is_ours {
        return vec![Refusal::Ours];
    }
    if let (Some(disk), Some(number)) = (&facts.device.disk, facts.disk_attached) {
        refusals.push(Refusal::DiskAttached(disk.clone(), number));
    }
    if !facts.mounts.is_empty() {
        refusals.push(Refusal::Mounted(facts.mounts.clone()));
    }
    if facts.swap {
        refusals.push(Refusal::Swap);
    }
    if !facts.device.holders.is_empty() {
        refusals.push(Refusal::Holders(facts.device.holders.clone()));
    }
    for (partition, how) in &facts.partitions {
        refusals.push(Refusal::PartitionInUse(partition.clone(), how.clone()));
    }
    refusals
}

/// Offset and size limit.
fn window(device: &BlockDevice, wish: &Wish) -> Vec<Refusal> {
    let block = device.block_bytes.max(1);
    let mut refusals = Vec::new();
    if wish.offset % block != 0 {
        refusals.push(Refusal::Unaligned("offset", block));
    }
    if wish.size_limit.is_some_and(|limit| limit % block != 0) {
        refusals.push(Refusal::Unaligned("size limit", block));
    }
    let left = device.size_bytes.saturating_sub(wish.offset);
    if left == 0 {
        refusals.push(Refusal::OffsetBeyond(device.size_bytes));
    } else if wish.size_limit.is_some_and(|limit| limit > left) {
        refusals.push(Refusal::LimitBeyond(left));
    }
    refusals
}

#[cfg(test)]
mod tests {
    use super::*;

    fn free() -> Facts {
        Facts {
            device: BlockDevice {
                name: "vdb".into(),
                size_bytes: 1 << 20,
                block_bytes: 4096,
                ..BlockDevice::default()
            },
            ..Facts::default()
        }
    }

    fn judged(change: impl FnOnce(&mut Facts, &mut Wish)) -> Vec<Refusal> {
        let (mut facts, mut wish) = (free(), Wish::default());
        change(&mut facts, &mut wish);
        judge(&facts, &wish)
    }

    #[test]
    fn a_free_device_is_taken() {
        assert_eq!(judged(|_, _| ()), []);
        assert_eq!(
            judged(|_, wish| {
                wish.offset = 4096;
                wish.size_limit = Some((1 << 20) - 4096);
            }),
            []
        );
    }

    #[test]
    fn users_are_named() {
        let mounted = judged(|facts, _| {
            facts.mounts = vec!["/srv".into()];
            facts.held = true;
        });
        assert_eq!(mounted, [Refusal::Mounted(vec!["/srv".into()])]);
        let unreadable = judged(|facts, _| facts.unreadable = Some("I/O error".into()));
        assert_eq!(unreadable, [Refusal::Unreadable("I/O error".into())]);
        assert!(mounted[0].to_string().contains("/srv"));
        assert_eq!(judged(|facts, _| facts.swap = true), [Refusal::Swap]);
        assert_eq!(judged(|facts, _| facts.held = true), [Refusal::Held]);
        assert_eq!(
            judged(|facts, _| facts.attached = Some(7)),
            [Refusal::Attached(7)]
        );
        assert_eq!(judged(|facts, _| facts.is_ours = true), [Refusal::Ours]);
        let holders = judged(|facts, _| facts.device.holders = vec!["/dev/md0".into()]);
        assert_eq!(holders, [Refusal::Holders(vec!["/dev/md0".into()])]);
        let partition = judged(|facts, _| {
            facts.partitions = vec![("vdb1".into(), "mounted on /".into())];
        });
        assert_eq!(
            partition,
            [Refusal::PartitionInUse(
                "vdb1".into(),
                "mounted on /".into()
            )]
        );
    }

    #[test]
    fn swap_and_lvm_signatures_are_refused_unless_allowed() {
        let both = vec![Signature::Swap, Signature::LvmPhysicalVolume];
        assert_eq!(
            judged(|facts, _| facts.signatures = both.clone()),
            [Refusal::SwapSignature, Refusal::LvmSignature]
        );
        let allowed = judged(|facts, wish| {
            facts.signatures = both.clone();
            wish.allow_signature = true;
        });
        assert_eq!(allowed, []);
        assert_eq!(
            judged(|facts, _| facts.signatures = vec![Signature::Ext]),
            []
        );
    }

    #[test]
    fn the_window_must_fit() {
        let window = |offset, size_limit| {
            judged(|_, wish| {
                wish.offset = offset;
                wish.size_limit = size_limit;
            })
        };
        assert_eq!(window(1 << 20, None), [Refusal::OffsetBeyond(1 << 20)]);
        assert_eq!(window(512, None), [Refusal::Unaligned("offset", 4096)]);
        assert_eq!(
            window(0, Some(512)),
            [Refusal::Unaligned("size limit", 4096)]
        );
        assert_eq!(
            window(4096, Some(1 << 20)),
            [Refusal::LimitBeyond((1 << 20) - 4096)]
        );
        assert_eq!(
            window(!4095, Some(!4095)),
            [Refusal::OffsetBeyond(1 << 20)],
            "no overflow"
        );
    }

    #[test]
    fn a_read_only_device_needs_to_be_asked_for() {
        assert_eq!(
            judged(|facts, _| facts.device.read_only = true),
            [Refusal::ReadOnly]
        );
        let asked = judged(|facts, wish| {
            facts.device.read_only = true;
            wish.read_only = true;
        });
        assert_eq!(asked, []);
    }
}
