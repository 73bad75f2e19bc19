// SPDX-License-Identifier: GPL-2.0-only

//! A random 128-bit name for a source, a target or a stream.

use std::fmt;
use std::str::FromStr;

use bincode::{Decode, Encode};

/// 16 random bytes. All zero means "none".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Encode, Decode)]
pub struct Uuid(pub [u8; 16]);

impl Uuid {
    /// No name yet.
    pub const NONE: Self = Self([0; 16]);

    /// Whether this is [`Uuid::NONE`].
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }

    /// The first eight hexadecimal digits: enough to tell a handful apart in a message.
    #[must_use]
    pub fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// A text is not 32 hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("An identifier is 32 hexadecimal digits")]
pub struct ParseUuidError;

impl FromStr for Uuid {
    type Err = ParseUuidError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(ParseUuidError);
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| ParseUuidError)?;
        Ok(Self(number.to_be_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        let uuid = Uuid([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 254, 255]);
        assert_eq!(uuid.to_string(), "000102030405060708090a0b0c0dfeff");
        assert_eq!(uuid.to_string().parse(), Ok(uuid));
        assert_eq!(
            "+00102030405060708090a0b0c0dfeff".parse::<Uuid>(),
            Err(ParseUuidError)
        );
    }
}
