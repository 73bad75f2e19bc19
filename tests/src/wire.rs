// SPDX-License-Identifier: GPL-2.0-only

//! What the harness and `dtguest` say to each other over a virtio-serial port.
//!
//! A frame is a length (u32, of what follows it), a kind (u8), the number of the job it belongs to (u32), and the
//! payload; integers are little-endian.

use std::io::{self, Read, Write};

/// Name of the virtio-serial port.
pub const PORT: &str = "dtguest";

/// Largest payload; longer data is cut into several frames.
pub const MAX_PAYLOAD: usize = 32 * 1024;

const HEAD: usize = 5;

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// To the guest: run this script with bash.
    Exec(String),
    /// To the guest: input of the script.
    Stdin(Vec<u8>),
    /// To the guest: the input is complete.
    StdinEnd,
    /// To the guest: send this signal to the script and all it started.
    Kill(i32),
    /// From the guest: it is up and runs this kernel release.
    Hello(String),
    /// From the guest: output of the script.
    Stdout(Vec<u8>),
    /// From the guest: error output of the script.
    Stderr(Vec<u8>),
    /// From the guest: the script ended with this code, or 128 + the signal that ended it.
    Exit(i32),
}

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Self::Exec(_) => 1,
            Self::Stdin(_) => 2,
            Self::StdinEnd => 3,
            Self::Kill(_) => 4,
            Self::Hello(_) => 16,
            Self::Stdout(_) => 17,
            Self::Stderr(_) => 18,
            Self::Exit(_) => 19,
        }
    }

    fn payload(&self) -> Vec<u8> {
        match self {
            Self::Exec(text) | Self::Hello(text) => text.clone().into_bytes(),
            Self::Stdin(bytes) | Self::Stdout(bytes) | Self::Stderr(bytes) => bytes.clone(),
            Self::StdinEnd => Vec::new(),
            Self::Kill(number) | Self::Exit(number) => number.to_le_bytes().to_vec(),
        }
    }

    fn decode(kind: u8, payload: Vec<u8>) -> io::Result<Self> {
        Ok(match kind {
            1 => Self::Exec(text(payload)?),
            2 => Self::Stdin(payload),
            3 => Self::StdinEnd,
            4 => Self::Kill(number(&payload)?),
            16 => Self::Hello(text(payload)?),
            17 => Self::Stdout(payload),
            18 => Self::Stderr(payload),
            19 => Self::Exit(number(&payload)?),
            _ => return Err(bad(format!("unknown kind of frame {kind}"))),
        })
    }
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|_| bad("a text that is not UTF-8"))
}

fn number(bytes: &[u8]) -> io::Result<i32> {
    Ok(i32::from_le_bytes(
        bytes
            .try_into()
            .map_err(|_| bad("a number that is not 4 bytes"))?,
    ))
}

/// Sends one message of job `job`.
pub fn send(out: &mut impl Write, job: u32, message: &Message) -> io::Result<()> {
    let payload = message.payload();
    let length =
        u32::try_from(payload.len() + HEAD).map_err(|_| bad("a frame that is too long"))?;
    let mut frame = Vec::with_capacity(4 + HEAD + payload.len());
    frame.extend_from_slice(&length.to_le_bytes());
    frame.push(message.kind());
    frame.extend_from_slice(&job.to_le_bytes());
    frame.extend_from_slice(&payload);
    out.write_all(&frame)?;
    out.flush()
}

/// Receives one message and the number of its job.
pub fn receive(input: &mut impl Read) -> io::Result<(u32, Message)> {
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_le_bytes(length) as usize;
    if !(HEAD..=HEAD + 16 * MAX_PAYLOAD).contains(&length) {
        return Err(bad(format!("a frame of {length} bytes")));
    }
    let mut frame = vec![0; length];
    input.read_exact(&mut frame)?;
    let payload = frame.split_off(HEAD);
    let job = u32::from_le_bytes([frame[1], frame[2], frame[3], frame[4]]);
    Ok((job, Message::decode(frame[0], payload)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_survive_the_wire() {
        let messages = [
            Message::Exec("true".into()),
            Message::Stdin(vec![0, 255]),
            Message::StdinEnd,
            Message::Kill(9),
            Message::Hello("7.0".into()),
            Message::Stdout(vec![1; MAX_PAYLOAD]),
            Message::Stderr(Vec::new()),
            Message::Exit(-1),
        ];
        let mut bytes = Vec::new();
        for (job, message) in (0..).zip(&messages) {
            send(&mut bytes, job, message).unwrap();
        }
        let mut input = bytes.as_slice();
        for (job, message) in (0..).zip(messages) {
            assert_eq!(receive(&mut input).unwrap(), (job, message));
        }
        assert!(input.is_empty());
    }

    #[test]
    fn absurd_lengths_and_kinds_are_refused() {
        assert!(receive(&mut [4, 0, 0, 0].as_slice()).is_err());
        assert!(receive(&mut [255, 255, 255, 255].as_slice()).is_err());
        assert!(receive(&mut [5, 0, 0, 0, 99, 0, 0, 0, 0].as_slice()).is_err());
    }
}
