// SPDX-License-Identifier: GPL-2.0-only

//! The options of an entry: `key=value` and flags with commas between them, each at most once.

use std::fmt;
use std::path::PathBuf;

use dtloop_abi::{Name, raw};

use crate::attach::{Intent, Policy};
use crate::crypt::{Encryption, KeySource, Mode};
use crate::size;

/// How the device of an entry is attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// First byte used of the block device.
    pub offset: u64,
    /// Most bytes used of it; None: all up to its end.
    pub size_limit: Option<u64>,
    /// The replication set; None: `default`.
    pub set: Option<Name>,
    /// Name of the volume on the target.
    pub volume: Option<Name>,
    /// Writes are refused.
    pub read_only: bool,
    /// The loop device is scanned for partitions.
    pub partscan: bool,
    /// The signature of swap or LVM does not matter.
    pub allow_signature: bool,
    /// Not attached when the machine starts.
    pub no_auto: bool,
    /// Ring of the set, in bytes.
    pub ring_size: Option<u64>,
    /// Policy of the set.
    pub policy: Option<Policy>,
    /// Policy throttle: level at which it begins, in percent.
    pub throttle_start: Option<u32>,
    /// Policy throttle: level at which it ends, in percent.
    pub throttle_stop: Option<u32>,
    /// Policy throttle: largest delay of a write, in milliseconds.
    pub throttle_delay: Option<u32>,
    /// The set's intent file.
    pub intent: Option<Intent>,
    /// Region of a new intent file, in bytes.
    pub region_size: Option<u32>,
    /// Regions that may stay marked.
    pub hot_regions: Option<u32>,
    /// What is on the disk is encrypted.
    pub encryption: Option<Encryption>,
}

/// An option that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadOption {
    /// Byte of the field at which it begins.
    pub at: usize,
    /// What is wrong, and what to do.
    pub reason: String,
}

/// The option that each of the set's own belongs to, for messages.
const KNOWN: &str = "offset=, sizelimit=, set=, volume=, ro, partscan, noauto, allow-signature, ring=, policy=, throttle-start=, \
    throttle-stop=, throttle-delay=, intent=, region=, hot-regions=, encryption=, key=, cipher=, keysize=, hash=";

/// What the encryption options say, each by itself.
#[derive(Default)]
struct Crypt {
    mode: Option<(usize, Mode)>,
    key: Option<(usize, KeySource)>,
    cipher: Option<(usize, String)>,
    key_bits: Option<(usize, u32)>,
    hash: Option<(usize, String)>,
}

impl Options {
    /// Reads the field.
    ///
    /// # Errors
    ///
    /// All that is wrong with it.
    pub fn parse(field: &str) -> Result<Self, Vec<BadOption>> {
        let mut options = Self::default();
        let mut crypt = Crypt::default();
        let (mut bad, mut seen, mut at) = (Vec::new(), Vec::new(), 0);
        // A dash or `defaults` stands for nothing, as in fstab.
        let field_is_empty = matches!(field, "-" | "defaults");
        for text in field.split(',').filter(|_| !field_is_empty) {
            let key = text.split('=').next().unwrap_or(text);
            let result = if seen.contains(&key) {
                Err(format!("{key} is given twice"))
            } else {
                seen.push(key);
                options.take(at, text, &mut crypt)
            };
            if let Err(reason) = result {
                bad.push(BadOption { at, reason });
            }
            at += text.len() + 1;
        }
        match crypt.whole() {
            Ok(encryption) => options.encryption = encryption,
            Err(error) => bad.push(error),
        }
        bad.extend(options.throttle_without_policy(field));
        if bad.is_empty() {
            Ok(options)
        } else {
            Err(bad)
        }
    }

    fn take(&mut self, at: usize, text: &str, crypt: &mut Crypt) -> Result<(), String> {
        let Some((key, value)) = text.split_once('=') else {
            return self.take_flag(text);
        };
        match key {
            "offset" => self.offset = size::parse(value)?,
            "sizelimit" => match size::parse(value)? {
                0 => {
                    return Err("a sizelimit of 0 leaves nothing; leave it out for no limit".into());
                }
                bytes => self.size_limit = Some(bytes),
            },
            "set" => self.set = Some(name(value)?),
            "volume" => self.volume = Some(name(value)?),
            "ring" => self.ring_size = Some(ring_bytes(value)?),
            "policy" => self.policy = Some(value.parse()?),
            "throttle-start" => self.throttle_start = Some(number(value, 1..=100)?),
            "throttle-stop" => self.throttle_stop = Some(number(value, 1..=99)?),
            "throttle-delay" => {
                self.throttle_delay = Some(number(value, 1..=raw::THROTTLE_DELAY_MS_MAX)?);
            }
            "intent" if value == "off" => self.intent = Some(Intent::Off),
            "intent" if value.starts_with('/') => {
                self.intent = Some(Intent::File(PathBuf::from(value)));
            }
            "intent" => return Err("intent is off, or the whole path of a file".into()),
            "region" => self.region_size = Some(region_bytes(value)?),
            "hot-regions" => self.hot_regions = Some(number(value, 1..=u32::MAX)?),
            "encryption" if value == "none" => {}
            "encryption" => crypt.mode = Some((at, value.parse()?)),
            "key" => crypt.key = Some((at, value.parse()?)),
            "cipher" => crypt.cipher = Some((at, crate::crypt::word(value)?)),
            "keysize" => crypt.key_bits = Some((at, crate::crypt::key_bits(value)?)),
            "hash" => crypt.hash = Some((at, crate::crypt::word(value)?)),
            "ro" | "partscan" | "noauto" | "allow-signature" => {
                return Err(format!("{key} takes no value"));
            }
            _ => return Err(unknown(key)),
        }
        Ok(())
    }

    fn take_flag(&mut self, flag: &str) -> Result<(), String> {
        match flag {
            "ro" => self.read_only = true,
            "partscan" => self.partscan = true,
            "noauto" => self.no_auto = true,
            "allow-signature" => self.allow_signature = true,
            "" => return Err("there is nothing between two commas".into()),
            _ if KNOWN.contains(&format!("{flag}=,")) => {
                return Err(format!("{flag} needs a value: {flag}=..."));
            }
            _ => return Err(unknown(flag)),
        }
        Ok(())
    }

    fn throttle_without_policy(&self, field: &str) -> Option<BadOption> {
        let levels = [self.throttle_start, self.throttle_stop, self.throttle_delay];
        let alone = levels.iter().any(Option::is_some) && self.policy != Some(Policy::Throttle);
        let crossed = matches!((self.throttle_start, self.throttle_stop), (Some(start), Some(stop)) if stop >= start);
        let reason = match (alone, crossed) {
            (true, _) => "levels and delay belong to policy=throttle",
            (_, true) => "throttle-stop must be below throttle-start",
            _ => return None,
        };
        Some(BadOption {
            at: field.find("throttle-").unwrap_or(0),
            reason: reason.to_owned(),
        })
    }

    /// The set.
    #[must_use]
    pub fn set_name(&self) -> Name {
        self.set
            .unwrap_or_else(|| Name::new("default").unwrap_or(Name::EMPTY))
    }
}

impl Crypt {
    fn whole(self) -> Result<Option<Encryption>, BadOption> {
        let Some((at, mode)) = self.mode else {
            let alone = [
                self.key.map(|(at, _)| at),
                self.cipher.map(|(at, _)| at),
                self.key_bits.map(|(at, _)| at),
                self.hash.map(|(at, _)| at),
            ];
            return match alone.into_iter().flatten().min() {
                None => Ok(None),
                Some(at) => Err(BadOption {
                    at,
                    reason: "it belongs to encryption=luks2 or encryption=plain".into(),
                }),
            };
        };
        let luks_only = [
            self.cipher.as_ref().map(|(at, _)| *at),
            self.key_bits.map(|(at, _)| at),
            self.hash.as_ref().map(|(at, _)| *at),
        ];
        if let (Mode::Luks2, Some(at)) = (mode, luks_only.into_iter().flatten().min()) {
            let reason = "with encryption=luks2 the disk's own header says that; leave it out";
            return Err(BadOption {
                at,
                reason: reason.into(),
            });
        }
        if mode == Mode::Plain && self.cipher.is_none() {
            let reason = "encryption=plain has no header on the disk: name the cipher, for example cipher=aes-xts-plain64";
            return Err(BadOption {
                at,
                reason: reason.into(),
            });
        }
        Ok(Some(Encryption {
            mode,
            key: self.key.map_or(KeySource::Prompt, |(_, key)| key),
            cipher: self.cipher.map(|(_, cipher)| cipher),
            key_bits: self.key_bits.map(|(_, bits)| bits),
            hash: self.hash.map(|(_, hash)| hash),
        }))
    }
}

fn unknown(key: &str) -> String {
    format!("the option {key:?} is unknown; there are {KNOWN}")
}

fn name(text: &str) -> Result<Name, String> {
    Name::new(text).map_err(|error| error.to_string())
}

fn number(text: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32, String> {
    let value = text.parse().ok().filter(|value| range.contains(value));
    value.ok_or_else(|| {
        let (least, most) = (range.start(), range.end());
        format!("{text:?} is no whole number from {least} to {most}")
    })
}

/// Reads the size of a ring.
///
/// # Errors
///
/// If it is none that a ring can have.
pub fn ring_bytes(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    let range = raw::RING_BYTES_MIN..=raw::RING_BYTES_MAX;
    if bytes.is_power_of_two() && range.contains(&bytes) {
        return Ok(bytes);
    }
    Err(format!(
        "it must be a power of two from {} to {}",
        size::bytes(raw::RING_BYTES_MIN),
        size::bytes(raw::RING_BYTES_MAX)
    ))
}

/// Reads the size of a region of an intent file.
///
/// # Errors
///
/// If it is none that a region can have.
pub fn region_bytes(text: &str) -> Result<u32, String> {
    let bytes = size::parse(text)?;
    let legal = u64::from(raw::REGION_BYTES_MIN)..=u64::from(raw::REGION_BYTES_MAX);
    if !bytes.is_power_of_two() || !legal.contains(&bytes) {
        return Err("it is no power of two from 64K to 1G".to_owned());
    }
    u32::try_from(bytes).map_err(|error| error.to_string())
}

impl fmt::Display for Options {
    /// As the field; empty if there is nothing to say.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts: Vec<String> = Vec::new();
        let mut add = |key: &str, value: Option<String>| {
            parts.extend(value.map(|value| format!("{key}={value}")));
        };
        add("offset", (self.offset > 0).then(|| exact(self.offset)));
        add("sizelimit", self.size_limit.map(exact));
        add("set", self.set.map(|name| name.to_string()));
        add("volume", self.volume.map(|name| name.to_string()));
        add("ring", self.ring_size.map(exact));
        add("policy", self.policy.map(|policy| policy.name().to_owned()));
        add("throttle-start", self.throttle_start.map(|n| n.to_string()));
        add("throttle-stop", self.throttle_stop.map(|n| n.to_string()));
        add("throttle-delay", self.throttle_delay.map(|n| n.to_string()));
        add(
            "intent",
            self.intent.as_ref().map(|intent| match intent {
                Intent::Off => "off".to_owned(),
                Intent::File(path) => path.display().to_string(),
            }),
        );
        add("region", self.region_size.map(|bytes| exact(bytes.into())));
        add("hot-regions", self.hot_regions.map(|n| n.to_string()));
        if let Some(encryption) = &self.encryption {
            add("encryption", Some(encryption.mode.name().to_owned()));
            let key = (encryption.key != KeySource::Prompt).then(|| encryption.key.to_string());
            add("key", key);
            add("cipher", encryption.cipher.clone());
            add("keysize", encryption.key_bits.map(|n| n.to_string()));
            add("hash", encryption.hash.clone());
        }
        for (flag, is_set) in [
            ("ro", self.read_only),
            ("partscan", self.partscan),
            ("noauto", self.no_auto),
            ("allow-signature", self.allow_signature),
        ] {
            parts.extend(is_set.then(|| flag.to_owned()));
        }
        f.write_str(&super::text::escape(&parts.join(",")))
    }
}

/// A size that reads back as the same number.
fn exact(bytes: u64) -> String {
    for (letter, shift) in [('T', 40), ('G', 30), ('M', 20), ('K', 10)] {
        if bytes > 0 && bytes % (1 << shift) == 0 {
            return format!("{}{letter}", bytes >> shift);
        }
    }
    bytes.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(field: &str) -> String {
        let bad = Options::parse(field).unwrap_err();
        format!("{}: {}", bad[0].at, bad[0].reason)
    }

    #[test]
    fn options_read_back_as_they_were_written() {
        for field in [
            "",
            "offset=1M,sizelimit=3G,set=db,volume=pg-data,ro,partscan,noauto,allow-signature",
            "ring=128M,policy=throttle,throttle-start=60,throttle-stop=30,throttle-delay=20",
            "intent=/srv/my\\040files/intent,region=64K,hot-regions=7",
            "policy=block,intent=off",
            "offset=4097",
            "encryption=luks2,key=/etc/DT/keys/pg",
            "encryption=luks2,key=credential:pgdata",
            "encryption=plain,cipher=aes-xts-plain64,keysize=512,hash=sha256",
        ] {
            let raw = super::super::text::unescape(field);
            let options = match field {
                "" => Options::default(),
                _ => Options::parse(&raw).unwrap(),
            };
            assert_eq!(options.to_string(), field);
        }
        assert_eq!(Options::parse("-").unwrap(), Options::default());
        assert_eq!(Options::parse("defaults").unwrap(), Options::default());
        assert_eq!(
            Options::parse("encryption=none").unwrap(),
            Options::default()
        );
    }

    #[test]
    fn the_manual_has_every_option() {
        let manual = include_str!("../../man/dtloop_devices.5");
        for option in KNOWN.split(", ") {
            let word = option.trim_end_matches('=');
            let found = manual.lines().any(|line| {
                line.strip_prefix(".BI ")
                    .or(line.strip_prefix(".B "))
                    .is_some_and(|rest| rest.split(['=', ' ']).next() == Some(word))
            });
            assert!(found, "{word}");
        }
    }

    #[test]
    fn what_is_wrong_is_said_at_its_place() {
        assert!(reason("ro,offst=1M").starts_with("3: the option \"offst\" is unknown"));
        assert!(reason("ro,ro").starts_with("3: ro is given twice"));
        assert!(reason("ro,,partscan").contains("between two commas"));
        assert!(reason("offset").contains("needs a value"));
        assert!(reason("ro=1").contains("takes no value"));
        assert!(reason("ring=3M").contains("power of two"));
        assert!(reason("sizelimit=0").contains("leaves nothing"));
        assert!(reason("set=").contains("empty"));
        assert!(reason("set=a/b").starts_with("0: "));
        assert!(reason("hot-regions=0").contains("from 1"));
        assert!(reason("ro,throttle-start=5").starts_with("3: levels"));
        assert!(
            reason("policy=throttle,throttle-start=5,throttle-stop=5").contains("must be below")
        );
        assert!(reason("key=/etc/k").contains("belongs to encryption"));
        assert!(reason("encryption=plain").contains("name the cipher"));
        assert!(reason("encryption=luks2,cipher=aes").starts_with("17: with"));
        for retired in ["XOR", "des", "DES", "twofish"] {
            let told = reason(&format!("encryption={retired}"));
            assert!(told.contains("losetup") && told.contains("luks2"), "{told}");
        }
    }
}
