// SPDX-License-Identifier: GPL-2.0-only

//! Consumes records: checks that they are what the interface promises, and applies them to replicas.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use dtloop_abi::raw;
use serde_json::json;

use crate::random::Random;
use crate::replica::Replica;

/// Flags that a record may carry.
const FLAGS: u16 =
    raw::F_FUA | raw::F_PREFLUSH | raw::F_NOUNMAP | raw::F_ZEROES | raw::F_CLEARED | raw::F_DEVICES;

/// What is known about a device of the stream.
#[derive(Debug, Default)]
struct Device {
    sectors: Option<u64>,
    replica: Option<Replica>,
}

/// Which device a replica is of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// By loop number.
    Loop(u32),
    /// By its id in the stream.
    Id(u32),
}

/// `N=PATH` or `id:N=PATH`.
pub fn parse_apply(text: &str) -> Result<(Which, PathBuf), String> {
    let (which, path) = text.split_once('=').ok_or("not LOOP=PATH")?;
    let number = |text: &str| text.parse().map_err(|_| format!("not a number: {text}"));
    let which = match which.strip_prefix("id:") {
        Some(id) => Which::Id(number(id)?),
        None => Which::Loop(number(which)?),
    };
    Ok((which, PathBuf::from(path)))
}

/// A file that outlives a killed consumer: how far records were applied, and what it is sure to have released.
#[derive(Debug)]
pub struct Progress {
    file: File,
}

impl Progress {
    /// Opens it, and checks that a stream that begins at `first` neither skips nor repeats: what the stream has given
    /// up was applied, and what was given up before does not come again.
    pub fn open(path: &Path, first: u64) -> Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options
            .open(path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        let mut words = [0; 16];
        if file.read_exact_at(&mut words, 0).is_ok() {
            let (applied, released) = words.split_at(8);
            let word = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or(0);
            let (applied, released) = (word(applied), word(released));
            ensure!(
                first <= applied,
                "records {applied}..{first} are lost: released, but not applied"
            );
            ensure!(
                first >= released,
                "records {first}..{released} come again although they were released"
            );
        }
        Ok(Self { file })
    }

    /// To be called before a release.
    pub fn applied(&self, next: u64) -> Result<()> {
        Ok(self.file.write_all_at(&next.to_le_bytes(), 0)?)
    }

    /// To be called after it.
    pub fn released(&self, next: u64) -> Result<()> {
        Ok(self.file.write_all_at(&next.to_le_bytes(), 8)?)
    }
}

/// Breaks the order on purpose: a checker that does not see it is no checker.
#[derive(Debug)]
struct Breaker {
    random: Random,
    kept_back: Option<(raw::Desc, Vec<u8>)>,
    /// Ranges applied since.
    later: Vec<(u32, u64, u64)>,
}

/// Records that are applied after the one kept back, before the consumer stops.
const BROKEN_BY: usize = 120;

impl Breaker {
    /// Takes a record out of its turn, or lets it be applied.
    fn take(&mut self, desc: &raw::Desc, payload: &[u8]) -> bool {
        let write = desc.op == raw::OP_WRITE && desc.state == raw::STATE_COMMITTED;
        if self.kept_back.is_some() {
            self.later.push((
                desc.device,
                desc.start_sector,
                desc.start_sector + u64::from(desc.sectors),
            ));
            return false;
        }
        if !write || self.random.below(40) != 0 {
            return false;
        }
        self.kept_back = Some((*desc, payload.to_vec()));
        self.later.clear();
        true
    }

    /// Whether the state now is one that never was: the record is missing, later ones are there, and none hides it.
    /// A record that was hidden is given back, to be forgotten.
    fn is_broken(&mut self) -> bool {
        let Some((desc, _)) = &self.kept_back else {
            return false;
        };
        if self.later.len() < BROKEN_BY {
            return false;
        }
        let end = desc.start_sector + u64::from(desc.sectors);
        let hidden = self.later.iter().any(|&(device, from, to)| {
            device == desc.device && from < end && desc.start_sector < to
        });
        if hidden {
            self.kept_back = None;
        }
        !hidden
    }
}

/// What the records add up to.
#[derive(Debug, Default)]
struct Counts {
    records: u64,
    payload_bytes: u64,
    failed: u64,
    epochs: u64,
    by_operation: BTreeMap<&'static str, u64>,
    gap_changes: u64,
}

/// Takes the records of a stream in order.
#[derive(Debug)]
pub struct Sink {
    wanted: Vec<(Which, PathBuf)>,
    devices: BTreeMap<u32, Device>,
    first: u64,
    next: u64,
    epoch: u64,
    counts: Counts,
    breaker: Option<Breaker>,
}

impl Sink {
    /// A sink for a stream whose first record is `first`.
    pub fn new(wanted: Vec<(Which, PathBuf)>, first: u64, break_order: Option<u64>) -> Self {
        let breaker = break_order.map(|seed| Breaker {
            random: Random::new(seed),
            kept_back: None,
            later: Vec::new(),
        });
        Self {
            wanted,
            devices: BTreeMap::new(),
            first,
            next: first,
            epoch: 0,
            counts: Counts::default(),
            breaker,
        }
    }

    /// The record that has to come next.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// Records taken.
    pub fn records(&self) -> u64 {
        self.counts.records
    }

    /// Whether the order is broken as wanted, and it is time to stop.
    pub fn is_broken(&mut self) -> bool {
        self.breaker.as_mut().is_some_and(Breaker::is_broken)
    }

    /// Tells which devices there are.
    pub fn learn(&mut self, devices: &[raw::DeviceStatus]) -> Result<()> {
        for status in devices {
            let known = self.devices.entry(status.device_id).or_default();
            known.sectors.get_or_insert(status.sectors);
            let wanted = |which: &Which| *which == Which::Loop(status.loop_number());
            if let (None, Some((_, path))) = (
                &known.replica,
                self.wanted.iter().find(|(which, _)| wanted(which)),
            ) {
                let replica = Replica::open(path)?;
                replica.reach(status.sectors * raw::SECTOR_BYTES)?;
                known.replica = Some(replica);
            }
        }
        Ok(())
    }

    /// Whether a record may be of a device that a replica is wanted of, and nobody has told about.
    pub fn is_stranger(&self, desc: &raw::Desc) -> bool {
        let replicas = self
            .devices
            .values()
            .filter(|device| device.replica.is_some())
            .count();
        replicas < self.wanted.len()
            && desc.device != raw::DEVICE_NONE
            && self
                .devices
                .get(&desc.device)
                .is_none_or(|device| device.replica.is_none())
    }

    /// Takes a record without a look at more than its number.
    pub fn count(&mut self, desc: &raw::Desc) -> Result<()> {
        ensure!(
            desc.seq == self.next,
            "record {} comes where {} is due",
            desc.seq,
            self.next
        );
        self.next += 1;
        self.counts.records += 1;
        Ok(())
    }

    /// Takes the next record.
    pub fn take(&mut self, desc: &raw::Desc, payload: &[u8]) -> Result<()> {
        self.check(desc).with_context(|| format!("{desc:?}"))?;
        self.count(desc)?;
        self.add_up(desc);
        if let Some(breaker) = &mut self.breaker {
            if breaker.take(desc, payload) {
                return Ok(());
            }
        }
        let device = self.devices.entry(desc.device).or_default();
        if matches!(desc.op, raw::OP_ATTACH | raw::OP_RESIZE) {
            device.sectors = Some(desc.aux);
            if let (None, Some((_, path))) = (
                &device.replica,
                self.wanted
                    .iter()
                    .find(|(which, _)| *which == Which::Id(desc.device)),
            ) {
                device.replica = Some(Replica::open(path)?);
            }
        }
        match &device.replica {
            Some(replica) => replica
                .apply(desc, payload)
                .with_context(|| format!("{desc:?}")),
            None => Ok(()),
        }
    }

    fn add_up(&mut self, desc: &raw::Desc) {
        let counts = &mut self.counts;
        counts.payload_bytes += u64::from(desc.payload_bytes);
        counts.failed += u64::from(desc.state == raw::STATE_FAILED);
        counts.epochs += u64::from(desc.epoch > self.epoch);
        self.epoch = desc.epoch;
        *counts
            .by_operation
            .entry(operation_name(desc.op))
            .or_default() += 1;
        if desc.op == raw::OP_GAP {
            counts.gap_changes += desc.aux;
        }
    }

    /// Everything that the interface promises about a record.
    fn check(&self, desc: &raw::Desc) -> Result<()> {
        ensure!(desc.seq == self.next, "comes where {} is due", self.next);
        ensure!(
            desc.epoch >= self.epoch,
            "epoch goes back from {}",
            self.epoch
        );
        let errno = desc.flags >> raw::F_ERRNO_SHIFT;
        let flags = desc.flags & ((1 << raw::F_ERRNO_SHIFT) - 1);
        ensure!(flags & !FLAGS == 0, "unknown flags");
        match desc.state {
            raw::STATE_COMMITTED => ensure!(errno == 0, "an errno without a failure"),
            raw::STATE_FAILED => ensure!(errno != 0, "a failure without an errno"),
            _ => bail!("not complete"),
        }
        let bytes = u64::from(desc.sectors) * raw::SECTOR_BYTES;
        let (payload, range) = match desc.op {
            raw::OP_WRITE | raw::OP_SYNC => (bytes, true),
            raw::OP_WRITE_ZEROES | raw::OP_DISCARD | raw::OP_SECURE_ERASE => (0, true),
            raw::OP_FLUSH | raw::OP_GAP | raw::OP_ATTACH | raw::OP_DETACH | raw::OP_RESIZE => {
                (0, false)
            }
            _ => bail!("unknown operation"),
        };
        ensure!(
            u64::from(desc.payload_bytes) == payload,
            "payload is not {payload} bytes"
        );
        ensure!(
            desc.payload_bytes <= raw::RECORD_BYTES_MAX,
            "payload too large"
        );
        ensure!(
            desc.payload_pos % raw::SECTOR_BYTES == 0,
            "payload not aligned"
        );
        ensure!(
            (desc.sectors != 0) == range,
            "length does not fit the operation"
        );
        ensure!(desc.time_ns != 0 || desc.op == raw::OP_GAP, "no time");
        if range {
            ensure!(desc.device != raw::DEVICE_NONE, "no device");
            if let Some(sectors) = self
                .devices
                .get(&desc.device)
                .and_then(|device| device.sectors)
            {
                ensure!(
                    desc.start_sector + u64::from(desc.sectors) <= sectors,
                    "beyond sector {sectors}"
                );
            }
        }
        Ok(())
    }

    /// Makes the replicas durable.
    pub fn sync(&self) -> Result<()> {
        self.devices
            .values()
            .filter_map(|device| device.replica.as_ref())
            .try_for_each(Replica::sync)
    }

    /// What was taken.
    pub fn report(&self) -> serde_json::Value {
        let counts = &self.counts;
        json!({
            "first": self.first,
            "next": self.next,
            "records": counts.records,
            "payload_bytes": counts.payload_bytes,
            "failed": counts.failed,
            "epochs": counts.epochs,
            "gap_changes": counts.gap_changes,
            "by_operation": counts.by_operation,
        })
    }
}

/// Name of an operation in reports.
pub fn operation_name(op: u8) -> &'static str {
    match op {
        raw::OP_WRITE => "write",
        raw::OP_WRITE_ZEROES => "write_zeroes",
        raw::OP_DISCARD => "discard",
        raw::OP_SECURE_ERASE => "secure_erase",
        raw::OP_FLUSH => "flush",
        raw::OP_SYNC => "sync",
        raw::OP_GAP => "gap",
        raw::OP_ATTACH => "attach",
        raw::OP_DETACH => "detach",
        raw::OP_RESIZE => "resize",
        _ => "unknown",
    }
}

/// A descriptor as `read` gives it.
pub fn parse_desc(bytes: &[u8]) -> Option<raw::Desc> {
    let mut words = [0; raw::DESC_BYTES / 8];
    for (index, word) in words.iter_mut().enumerate() {
        *word = u64::from_le_bytes(bytes.get(index * 8..index * 8 + 8)?.try_into().ok()?);
    }
    let low = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or(0);
    let byte = |word: u64, at: u32| u8::try_from((word >> at) & 0xff).unwrap_or(0);
    Some(raw::Desc {
        seq: words[0],
        epoch: words[1],
        start_sector: words[2],
        payload_pos: words[3],
        time_ns: words[4],
        sectors: low(words[5]),
        payload_bytes: low(words[5] >> 32),
        device: low(words[6]),
        flags: u16::try_from((words[6] >> 32) & 0xffff).unwrap_or(0),
        op: byte(words[6], 48),
        state: byte(words[6], 56),
        aux: words[7],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(seq: u64, start_sector: u64) -> raw::Desc {
        raw::Desc {
            seq,
            epoch: 1,
            start_sector,
            time_ns: 1,
            sectors: 1,
            payload_bytes: 512,
            device: 1,
            op: raw::OP_WRITE,
            state: raw::STATE_COMMITTED,
            ..raw::Desc::default()
        }
    }

    #[test]
    fn what_the_interface_forbids_is_noticed() {
        let sink = Sink::new(Vec::new(), 1, None);
        sink.check(&write(1, 0)).unwrap();
        for bad in [
            write(2, 0),
            raw::Desc {
                payload_bytes: 0,
                ..write(1, 0)
            },
            raw::Desc {
                state: raw::STATE_RESERVED,
                ..write(1, 0)
            },
            raw::Desc {
                state: raw::STATE_FAILED,
                ..write(1, 0)
            },
            raw::Desc {
                op: 77,
                ..write(1, 0)
            },
            raw::Desc {
                flags: 1 << 7,
                ..write(1, 0)
            },
            raw::Desc {
                device: 0,
                ..write(1, 0)
            },
        ] {
            assert!(sink.check(&bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn epochs_do_not_go_back() {
        let mut sink = Sink::new(Vec::new(), 1, None);
        sink.take(
            &raw::Desc {
                epoch: 5,
                ..write(1, 0)
            },
            &[0; 512],
        )
        .unwrap();
        assert!(
            sink.take(
                &raw::Desc {
                    epoch: 4,
                    ..write(2, 0)
                },
                &[0; 512]
            )
            .is_err()
        );
    }

    #[test]
    fn descriptors_survive_the_byte_form() {
        let desc = raw::Desc {
            aux: 7,
            flags: 0x0501,
            payload_pos: 1 << 40,
            ..write(9, 1 << 33)
        };
        let words = [
            desc.seq,
            desc.epoch,
            desc.start_sector,
            desc.payload_pos,
            desc.time_ns,
            u64::from(desc.sectors) | (u64::from(desc.payload_bytes) << 32),
            u64::from(desc.device)
                | (u64::from(desc.flags) << 32)
                | (u64::from(desc.op) << 48)
                | (u64::from(desc.state) << 56),
            desc.aux,
        ];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(parse_desc(&bytes), Some(desc));
        assert_eq!(parse_desc(&bytes[..63]), None);
    }

    #[test]
    fn a_progress_file_notices_loss_and_repetition() {
        let path = std::env::temp_dir().join(format!("dtdrain-progress-{}", std::process::id()));
        let progress = Progress::open(&path, 1).unwrap();
        progress.applied(100).unwrap();
        progress.released(90).unwrap();
        assert!(Progress::open(&path, 95).is_ok());
        assert!(Progress::open(&path, 101).is_err());
        assert!(Progress::open(&path, 89).is_err());
        std::fs::remove_file(path).unwrap();
    }
}
