// SPDX-License-Identifier: GPL-2.0-only

//! The asking side.

use std::io::{self, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use crate::line::{LineError, read_line, write_line};
use crate::types::{Failure, Outcome, Progress, Reply, Request, Status};
use crate::{REPLY_BYTES_MAX, REQUEST_BYTES_MAX, SOCKET_PATH};

/// What can go wrong between a client and the agent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// Nobody listens.
    #[error(
        "The agent does not run: nobody listens on {}. Start dtagent.",
        path.display()
    )]
    NoAgent {
        /// The socket.
        path: PathBuf,
    },
    /// The socket is for root only.
    #[error("No permission to open {}. Run as root.", path.display())]
    NoPermission {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be opened.
    #[error("Cannot connect to {}: {error}.", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The connection failed on the way.
    #[error("The agent cannot be understood. {0}")]
    Line(#[from] LineError),
    /// The agent went away.
    #[error("The agent ended the connection before its answer was complete. Look at its log.")]
    Closed,
    /// The agent answered with something else than was asked for.
    #[error("The agent answered something else than was asked for. Install matching versions.")]
    Unexpected,
    /// The agent did not do it.
    #[error(transparent)]
    Failed(#[from] Failure),
}

/// A connection to the agent.
#[derive(Debug)]
pub struct Client {
    reader: BufReader<UnixStream>,
}

impl Client {
    /// Connects to [`SOCKET_PATH`].
    pub fn connect() -> Result<Self, ClientError> {
        Self::connect_path(Path::new(SOCKET_PATH))
    }

    /// Connects to an agent that listens elsewhere.
    pub fn connect_path(path: &Path) -> Result<Self, ClientError> {
        let path_owned = || path.to_owned();
        match UnixStream::connect(path) {
            Ok(stream) => Ok(Self::from_stream(stream)),
            Err(error) => Err(match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    ClientError::NoAgent { path: path_owned() }
                }
                io::ErrorKind::PermissionDenied => ClientError::NoPermission { path: path_owned() },
                _ => ClientError::Connect {
                    path: path_owned(),
                    error,
                },
            }),
        }
    }

    /// Uses a connection that exists.
    #[must_use]
    pub fn from_stream(stream: UnixStream) -> Self {
        Self {
            reader: BufReader::new(stream),
        }
    }

    /// Sends a request; the answer is read by iterating.
    pub fn request(&mut self, request: &Request) -> Result<Answer<'_>, ClientError> {
        write_line(self.reader.get_mut(), request, REQUEST_BYTES_MAX)?;
        Ok(Answer { client: self })
    }

    /// Asks for the status of one set or of all.
    pub fn status(&mut self, set: Option<&str>) -> Result<Status, ClientError> {
        let set = set.map(str::to_owned);
        match self.request(&Request::Status { set })?.finish(|_| ())? {
            Outcome::Status(status) => Ok(status),
            _ => Err(ClientError::Unexpected),
        }
    }
}

/// An answer on its way.
#[derive(Debug)]
pub struct Answer<'a> {
    client: &'a mut Client,
}

impl Answer<'_> {
    /// Reads one line.
    pub fn next_reply(&mut self) -> Result<Reply, ClientError> {
        read_line(&mut self.client.reader, REPLY_BYTES_MAX)?.ok_or(ClientError::Closed)
    }

    /// Reads to the end, showing progress on the way.
    pub fn finish(mut self, mut progress: impl FnMut(&Progress)) -> Result<Outcome, ClientError> {
        loop {
            match self.next_reply()? {
                Reply::Progress(report) => progress(&report),
                Reply::Done(outcome) => return Ok(outcome),
                Reply::Failed(failure) => return Err(failure.into()),
            }
        }
    }
}
