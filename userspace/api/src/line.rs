// SPDX-License-Identifier: GPL-2.0-only

//! One JSON value a line, with a limit on its length.

use std::io::{self, BufRead, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Why a line could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LineError {
    /// The connection failed.
    #[error("The connection failed: {0}.")]
    Io(#[from] io::Error),
    /// The line is longer than allowed.
    #[error("A line is longer than {limit} bytes.")]
    TooLong {
        /// The limit.
        limit: usize,
    },
    /// The connection ended within a line.
    #[error("The connection ended in the middle of a line.")]
    Truncated,
    /// The line is not what was expected.
    #[error("A line cannot be read: {0}.")]
    Malformed(#[from] serde_json::Error),
}

/// Reads a line; `None` at the end of the connection.
pub fn read_line<T: DeserializeOwned>(
    reader: &mut impl BufRead,
    limit: usize,
) -> Result<Option<T>, LineError> {
    let mut line = Vec::new();
    reader.take(limit as u64).read_until(b'\n', &mut line)?;
    match line.last() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(serde_json::from_slice(&line)?)),
        Some(_) if line.len() >= limit => Err(LineError::TooLong { limit }),
        Some(_) => Err(LineError::Truncated),
    }
}

/// Writes a line and flushes it.
pub fn write_line(
    writer: &mut impl Write,
    value: &impl Serialize,
    limit: usize,
) -> Result<(), LineError> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    if line.len() > limit {
        return Err(LineError::TooLong { limit });
    }
    writer.write_all(&line)?;
    writer.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Option<u32>, LineError> {
        read_line(&mut text.as_bytes(), 8)
    }

    #[test]
    fn lines_are_read_one_at_a_time() {
        let mut input = &b"1\n2\n"[..];
        let mut next = || read_line::<u32>(&mut input, 8).unwrap();
        assert_eq!([next(), next(), next()], [Some(1), Some(2), None]);
    }

    #[test]
    fn bad_lines_are_told_apart() {
        assert!(matches!(read("12"), Err(LineError::Truncated)));
        assert!(matches!(read("x\n"), Err(LineError::Malformed(_))));
        assert!(matches!(
            read("123456789\n"),
            Err(LineError::TooLong { limit: 8 })
        ));
        assert_eq!(read("1234567\n").unwrap(), Some(1_234_567));
    }

    #[test]
    fn a_line_beyond_the_limit_is_not_written() {
        let mut out = Vec::new();
        assert!(write_line(&mut out, &"a long text", 8).is_err());
        assert!(out.is_empty());
        write_line(&mut out, &"a\nb", 8).unwrap();
        assert_eq!(out, b"\"a\\nb\"\n", "a line break inside is escaped");
    }
}
