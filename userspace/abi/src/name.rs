// SPDX-License-Identifier: GPL-2.0-only

//! Names of sets and labels of volumes, as the module accepts them.

use std::fmt;
use std::str::FromStr;

use crate::raw::NAME_BYTES;
use crate::{Error, Result};

/// Longest name in bytes: the field less its terminating zero.
const NAME_LENGTH_MAX: usize = NAME_BYTES - 1;

/// A set's name or a volume's label: 0..=63 bytes of `[A-Za-z0-9_.-]`, zero-filled.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name([u8; NAME_BYTES]);

impl Name {
    /// No name: what a device without a label carries.
    pub const EMPTY: Self = Self([0; NAME_BYTES]);

    /// Checks a name that must not be empty.
    pub fn new(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Err(Error::bad_name(text, "it is empty"));
        }
        Self::new_or_empty(text)
    }

    /// Checks a name that may be empty.
    pub fn new_or_empty(text: &str) -> Result<Self> {
        if text.len() > NAME_LENGTH_MAX {
            return Err(Error::bad_name(text, "it is longer than 63 bytes"));
        }
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        if !text.bytes().all(legal) {
            return Err(Error::bad_name(
                text,
                "only letters, digits, '_', '.' and '-' are allowed",
            ));
        }
        let mut bytes = [0; NAME_BYTES];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(Self(bytes))
    }

    /// The field of an ABI structure.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; NAME_BYTES] {
        self.0
    }

    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        bytes_to_str(&self.0)
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::new(text)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

/// The text of a zero-terminated field. What is not UTF-8 (the module lets none in) reads as "?".
#[must_use]
pub fn bytes_to_str(bytes: &[u8]) -> &str {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    std::str::from_utf8(&bytes[..end]).unwrap_or("?")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_zero_filled() {
        let name = Name::new("db-1.x_Y").unwrap();
        assert_eq!(&name.to_bytes()[..9], b"db-1.x_Y\0");
        assert!(name.to_bytes()[8..].iter().all(|&b| b == 0));
        assert_eq!(name.to_string(), "db-1.x_Y");
    }

    #[test]
    fn bad_names_are_refused() {
        for text in ["", "a b", "a/b", "ä", "x\0", &"x".repeat(64)] {
            assert!(Name::new(text).is_err(), "{text:?}");
        }
        assert!(Name::new(&"x".repeat(63)).is_ok());
        assert_eq!(Name::new_or_empty("").unwrap(), Name::EMPTY);
    }
}
