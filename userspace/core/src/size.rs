// SPDX-License-Identifier: GPL-2.0-only

//! Sizes in configuration files.

use serde::Deserialize;

/// A number of bytes: a number, or a text such as `"64MiB"`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "SizeText")]
pub struct Size(pub u64);

#[derive(Deserialize)]
#[serde(untagged)]
enum SizeText {
    Number(u64),
    Text(String),
}

impl TryFrom<SizeText> for Size {
    type Error = String;

    fn try_from(text: SizeText) -> Result<Self, String> {
        match text {
            SizeText::Number(number) => Ok(Self(number)),
            SizeText::Text(text) => text.parse(),
        }
    }
}

impl std::str::FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refused = || format!("\"{text}\" is no size; write for example 4096, 64MiB or 2GiB");
        let digits = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        let shift = match text[digits..].trim() {
            "" | "B" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(refused()),
        };
        let number: u64 = text[..digits].parse().map_err(|_| refused())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(refused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!("64MiB".parse(), Ok(Size(64 << 20)));
        assert_eq!("3".parse(), Ok(Size(3)));
        assert!("64MB".parse::<Size>().is_err());
        assert!("-1".parse::<Size>().is_err());
        assert!("99999999999TiB".parse::<Size>().is_err());
    }
}
