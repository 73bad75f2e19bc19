// SPDX-License-Identifier: GPL-2.0-only

//! The own key, and the pins of others.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;

use dtloop_disk::Disk;
use dtloop_store::{StateFileError, load_on, store_on};
use ring::digest::{SHA256, digest};
use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;

/// Bytes of a pin.
pub const PIN_BYTES: usize = 32;

/// What is kept of a key: its algorithm, so that a later version can have another one.
const ALGORITHM: &str = "ed25519";

/// What identifies a peer: the SHA-256 of its public key in its standard form (SubjectPublicKeyInfo).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Pin([u8; PIN_BYTES]);

impl Pin {
    /// The pin of a public key.
    #[must_use]
    pub fn of(public_key: &[u8]) -> Self {
        Self(sha256(public_key))
    }

    /// Its first bytes.
    #[must_use]
    pub fn prefix<const N: usize>(&self) -> [u8; N] {
        const { assert!(N <= PIN_BYTES) };
        let mut prefix = [0; N];
        prefix.copy_from_slice(&self.0[..N]);
        prefix
    }

    /// Whether it begins with these bytes. The time taken does not depend on where they differ.
    #[must_use]
    pub fn begins_with(&self, prefix: &[u8]) -> bool {
        prefix.len() <= PIN_BYTES && self.0[..prefix.len()].ct_eq(prefix).into()
    }
}

/// The SHA-256 of some bytes.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; PIN_BYTES] {
    let mut hash = [0; PIN_BYTES];
    hash.copy_from_slice(digest(&SHA256, bytes).as_ref());
    hash
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    let digit = |nibble: u8| char::from_digit(nibble.into(), 16).unwrap_or('0');
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(digit).collect()
}

pub(crate) fn unhex(text: &str) -> Option<Vec<u8>> {
    let nibbles: Option<Vec<u8>> = text
        .chars()
        .map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok()))
        .collect();
    let nibbles = nibbles.filter(|nibbles| nibbles.len() % 2 == 0)?;
    Some(
        nibbles
            .chunks(2)
            .map(|pair| (pair[0] << 4) | pair[1])
            .collect(),
    )
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({self})")
    }
}

impl FromStr for Pin {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        unhex(text)
            .and_then(|bytes| bytes.try_into().ok())
            .map(Self)
            .ok_or_else(|| format!("\"{text}\" is no hash of a key"))
    }
}

impl TryFrom<String> for Pin {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Pin> for String {
    fn from(pin: Pin) -> Self {
        pin.to_string()
    }
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Its file.
    #[error(transparent)]
    File(#[from] StateFileError),
    /// What is in it.
    #[error("{path} holds no usable key: {reason}; restore it, or remove it and pair again")]
    Unusable {
        /// Which.
        path: String,
        /// Why.
        reason: String,
    },
    /// A new one cannot be made.
    #[error("No key can be made: the system gives no random bytes")]
    Random,
}

#[derive(Serialize, Deserialize)]
struct SavedKey {
    algorithm: String,
    /// Private key, PKCS #8, in hexadecimal digits.
    pkcs8: String,
}

/// The own key of a side.
#[derive(Clone, Debug)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    pin: Pin,
}

impl Identity {
    /// The key kept in a file, made if there is none. The caller sees to it that nobody else does this at the same time.
    ///
    /// # Errors
    ///
    /// If the file cannot be read or written, or holds no key. A damaged one is never replaced: peers know the old one.
    pub fn load_or_make(disk: &dyn Disk, path: &Path) -> Result<Self, KeyError> {
        let unusable = |reason: String| KeyError::Unusable {
            path: path.display().to_string(),
            reason,
        };
        if let Some(saved) = load_on::<SavedKey>(disk, path)? {
            if saved.algorithm != ALGORITHM {
                return Err(unusable(format!(
                    "its algorithm \"{}\" is unknown",
                    saved.algorithm
                )));
            }
            let pkcs8 = unhex(&saved.pkcs8).ok_or_else(|| unusable("it is no number".into()))?;
            return Self::from_pkcs8(&pkcs8).map_err(unusable);
        }
        let made = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new());
        let pkcs8 = made.map_err(|_| KeyError::Random)?;
        let identity = Self::from_pkcs8(pkcs8.as_ref()).map_err(unusable)?;
        let saved = SavedKey {
            algorithm: ALGORITHM.to_owned(),
            pkcs8: hex(pkcs8.as_ref()),
        };
        store_on(disk, path, &saved)?;
        Ok(identity)
    }

    fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, String> {
        let private = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(pkcs8.to_vec()));
        let key = rustls::crypto::ring::sign::any_eddsa_type(match &private {
            PrivateKeyDer::Pkcs8(key) => key,
            _ => return Err("it is of another form".into()),
        })
        .map_err(|error| error.to_string())?;
        let public = key.public_key().ok_or("it has no public part")?.to_vec();
        let pin = Pin::of(&public);
        let key = CertifiedKey::new(vec![CertificateDer::from(public)], key);
        Ok(Self {
            key: Arc::new(key),
            pin,
        })
    }

    /// What others know it by.
    #[must_use]
    pub fn pin(&self) -> Pin {
        self.pin
    }

    pub(crate) fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtloop_disk::SimDisk;

    #[test]
    fn a_key_is_made_once() {
        let disk = SimDisk::new(1);
        let path = Path::new("/key");
        let first = Identity::load_or_make(&disk, path).unwrap();
        let again = Identity::load_or_make(&disk, path).unwrap();
        assert_eq!(first.pin(), again.pin());
        assert_eq!(first.pin().to_string().parse(), Ok(first.pin()));
        disk.crash();
        disk.restart();
        let after = Identity::load_or_make(&disk, path).unwrap();
        assert_eq!(first.pin(), after.pin(), "it was not durable");
    }

    #[test]
    fn a_damaged_key_is_not_replaced() {
        let disk = SimDisk::new(1);
        let path = Path::new("/key");
        for saved in [
            ("rsa", "00"),
            ("ed25519", "0"),
            ("ed25519", "zz"),
            ("ed25519", "00"),
        ] {
            let saved = SavedKey {
                algorithm: saved.0.into(),
                pkcs8: saved.1.into(),
            };
            store_on(&disk, path, &saved).unwrap();
            let error = Identity::load_or_make(&disk, path).unwrap_err();
            assert!(matches!(error, KeyError::Unusable { .. }), "{error}");
        }
    }

    #[test]
    fn pins_are_hashes_in_digits() {
        let pin = Pin::of(b"abc");
        // The test vector of the standard, FIPS 180-2.
        let text = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(pin.to_string(), text);
        assert!(pin.begins_with(&[0xba, 0x78]) && pin.begins_with(&[]));
        assert!(!pin.begins_with(&[0xba, 0x79]) && !pin.begins_with(&[0; 40]));
        for wrong in ["", "ba", &text[1..], &text.replace('b', "g")] {
            assert!(wrong.parse::<Pin>().is_err(), "{wrong}");
        }
    }
}
