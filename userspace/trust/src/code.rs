// SPDX-License-Identifier: GPL-2.0-only

//! The pairing code: what a person carries from the target to the source.
//!
//! | characters | bits | |
//! |---|---|---|
//! | 24 | 120 | first bits of the target's pin: the source talks to this key or to nobody |
//! | 16 | 80 | one-time token: 20 bits that name the invitation, 60 that nobody can guess |
//! | 2 | | check characters: a typing error is told apart from a wrong code |
//!
//! The alphabet is that of Crockford: digits and capital letters without I, L, O and U. Small letters are taken, `I` and `L`
//! for 1, `O` for 0; hyphens and blanks do not count. It is shown in seven groups of six.

use std::fmt;
use std::str::FromStr;

use dtloop_proto::limits::TOKEN_BYTES;
use ring::rand::{SecureRandom, SystemRandom};

use crate::key::{KeyError, Pin};

/// Bytes of the pin that are in a code.
pub const PREFIX_BYTES: usize = 15;

const DATA_BYTES: usize = PREFIX_BYTES + TOKEN_BYTES;
const DATA_CHARACTERS: usize = DATA_BYTES * 8 / 5;
const CHECK_CHARACTERS: usize = 2;

/// Characters of a code, without hyphens.
pub const CHARACTERS: usize = DATA_CHARACTERS + CHECK_CHARACTERS;

const GROUP: usize = 6;
const ALPHABET: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

/// A prime below 32 * 32: one wrong character and two swapped ones always change the remainder.
const CHECK_MODULUS: u32 = 1021;

/// The secret part of a code: good for one pairing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; TOKEN_BYTES]);

impl Token {
    /// A new one.
    ///
    /// # Errors
    ///
    /// If the system gives no random bytes.
    pub fn draw() -> Result<Self, KeyError> {
        let mut bytes = [0; TOKEN_BYTES];
        let filled = SystemRandom::new().fill(&mut bytes);
        filled.map_err(|_| KeyError::Random)?;
        Ok(Self(bytes))
    }

    /// Which invitation it is about; no secret.
    #[must_use]
    pub fn invitation(&self) -> u32 {
        u32::from_be_bytes([0, self.0[0], self.0[1], self.0[2]]) >> 4
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({:05x}…)", self.invitation())
    }
}

/// See the module documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PairingCode {
    /// First bytes of the target's pin.
    pub prefix: [u8; PREFIX_BYTES],
    /// The secret.
    pub token: Token,
}

/// Why a text is no code. A code that is one but opens nothing is another matter.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodeError {
    /// Characters are missing, or there are too many.
    #[error("The code has {0} characters; a complete one has {CHARACTERS}")]
    Length(usize),
    /// A character that is in no code.
    #[error("\"{0}\" is in no code: it has digits and letters without U")]
    Character(char),
    /// The check characters do not fit.
    #[error("The code is mistyped: its last two characters do not fit the others")]
    Check,
}

impl PairingCode {
    /// The code of a target for a token.
    #[must_use]
    pub fn new(target: &Pin, token: Token) -> Self {
        Self {
            prefix: target.prefix(),
            token,
        }
    }
}

fn remainder(digits: &[u8]) -> u32 {
    digits.iter().fold(0, |sum, digit| {
        (sum * 32 + u32::from(*digit)) % CHECK_MODULUS
    })
}

/// Five bits a digit, most significant first.
fn digits_of(bytes: &[u8; DATA_BYTES]) -> Vec<u8> {
    let bit = |at: usize| (bytes[at / 8] >> (7 - at % 8)) & 1;
    (0..DATA_CHARACTERS)
        .map(|digit| (0..5).fold(0, |value, step| (value << 1) | bit(digit * 5 + step)))
        .collect()
}

fn bytes_of(digits: &[u8]) -> [u8; DATA_BYTES] {
    let bit = |at: usize| (digits[at / 5] >> (4 - at % 5)) & 1;
    let mut bytes = [0; DATA_BYTES];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = (0..8).fold(0, |value, step| (value << 1) | bit(index * 8 + step));
    }
    bytes
}

fn digit_of(character: char) -> Result<u8, CodeError> {
    let wanted = match character.to_ascii_uppercase() {
        'I' | 'L' => '1',
        'O' => '0',
        other => other,
    };
    let found = ALPHABET
        .iter()
        .position(|known| char::from(*known) == wanted);
    found
        .and_then(|index| u8::try_from(index).ok())
        .ok_or(CodeError::Character(character))
}

impl fmt::Display for PairingCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = [0; DATA_BYTES];
        bytes[..PREFIX_BYTES].copy_from_slice(&self.prefix);
        bytes[PREFIX_BYTES..].copy_from_slice(&self.token.0);
        let mut digits = digits_of(&bytes);
        let check = remainder(&digits);
        digits.extend([check / 32, check % 32].map(|digit| u8::try_from(digit).unwrap_or(0)));
        for (index, digit) in digits.iter().enumerate() {
            if index > 0 && index % GROUP == 0 {
                f.write_str("-")?;
            }
            write!(f, "{}", char::from(ALPHABET[usize::from(*digit)]))?;
        }
        Ok(())
    }
}

impl FromStr for PairingCode {
    type Err = CodeError;

    fn from_str(text: &str) -> Result<Self, CodeError> {
        let counted = |c: &char| !c.is_whitespace() && *c != '-';
        let digits: Vec<u8> = text
            .chars()
            .filter(counted)
            .map(digit_of)
            .collect::<Result<_, _>>()?;
        if digits.len() != CHARACTERS {
            return Err(CodeError::Length(digits.len()));
        }
        let (data, check) = digits.split_at(DATA_CHARACTERS);
        if remainder(data) != u32::from(check[0]) * 32 + u32::from(check[1]) {
            return Err(CodeError::Check);
        }
        let bytes = bytes_of(data);
        let (mut prefix, mut token) = ([0; PREFIX_BYTES], [0; TOKEN_BYTES]);
        prefix.copy_from_slice(&bytes[..PREFIX_BYTES]);
        token.copy_from_slice(&bytes[PREFIX_BYTES..]);
        Ok(Self {
            prefix,
            token: Token(token),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn code() -> impl Strategy<Value = PairingCode> {
        (any::<[u8; PREFIX_BYTES]>(), any::<[u8; TOKEN_BYTES]>()).prop_map(|(prefix, token)| {
            PairingCode {
                prefix,
                token: Token(token),
            }
        })
    }

    #[test]
    fn the_form_is_fixed() {
        let code = PairingCode {
            prefix: *b"0123456789abcde",
            token: Token(*b"ABCDEFGHIJ"),
        };
        let text = "60RK4C-SM6MV3-EE1SC5-H66S35-85146H-258S3M-GJAAC8";
        assert_eq!(code.to_string(), text);
        assert_eq!(text.parse(), Ok(code));
        assert_eq!(code.token.invitation(), 0x41424);
        assert!(!format!("{code:?}").contains("67"), "the secret is shown");
    }

    #[test]
    fn people_may_write_it_their_way() {
        let code = PairingCode {
            prefix: [0; PREFIX_BYTES],
            token: Token([0x08, 0x42, 0x10, 0x84, 0x21, 0x08, 0x42, 0x10, 0x84, 0x21]),
        };
        let text = code.to_string();
        let sloppy = text
            .to_lowercase()
            .replace('-', " ")
            .replace('1', "l")
            .replace('0', "o");
        assert_eq!(sloppy.parse(), Ok(code));
        assert_eq!("".parse::<PairingCode>(), Err(CodeError::Length(0)));
        assert_eq!(text[1..].parse::<PairingCode>(), Err(CodeError::Length(41)));
        assert_eq!(
            (text + "u").parse::<PairingCode>(),
            Err(CodeError::Character('u'))
        );
    }

    proptest! {
        #[test]
        fn codes_round_trip(code in code()) {
            prop_assert_eq!(code.to_string().parse(), Ok(code));
        }

        #[test]
        fn one_wrong_character_and_two_swapped_ones_are_noticed(code in code(), at in 0..CHARACTERS, to in 0_usize..32) {
            let text: Vec<char> = code.to_string().chars().filter(|c| *c != '-').collect();
            let mut wrong = text.clone();
            wrong[at] = char::from(ALPHABET[to]);
            if wrong != text {
                let wrong: String = wrong.iter().collect();
                prop_assert_eq!(wrong.parse::<PairingCode>(), Err(CodeError::Check));
            }
            let mut swapped = text.clone();
            swapped.swap(at, (at + 1) % CHARACTERS);
            if at + 1 < CHARACTERS && swapped != text {
                let swapped: String = swapped.iter().collect();
                prop_assert_eq!(swapped.parse::<PairingCode>(), Err(CodeError::Check));
            }
        }

        #[test]
        fn garbage_is_refused(text in "\\PC{0,80}") {
            // Two characters of check: one text in a thousand of the right form would be taken.
            if let Ok(code) = text.parse::<PairingCode>() {
                prop_assert_eq!(code.to_string().len(), CHARACTERS + 6);
            }
        }
    }
}
