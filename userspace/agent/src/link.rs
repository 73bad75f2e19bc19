// SPDX-License-Identifier: GPL-2.0-only

//! The connection of a set to its target: bytes in, bytes out, without ever being stuck in one
//! direction. The place that will learn TLS.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtloop_proto::{Decoded, FrameError, Header, Message, decode};
use nix::poll::{PollFd, PollFlags, PollTimeout};

use crate::config::TransportKind;

/// Longest time to connect to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// The target must take something, or say something when asked, within this time.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);

/// Most bytes that wait to be read out of [`Link::next_message`]: what a target says is small.
const INBOX_BYTES_MAX: usize = 4 << 20;

/// Most messages that wait while something is being sent: what a target says is about that and settles little of it.
const STASH_MAX: usize = 64 << 10;

/// How often a send that waits looks for something more urgent.
const WATCH_EVERY: Duration = Duration::from_millis(250);

/// Bytes read at once.
const READ_BYTES: usize = 16 << 10;

/// Most bytes that wait in the socket: enough to keep a fast link busy between two batches, little enough to see soon
/// that a link is slow.
const UNSENT_BYTES_MAX: u32 = 512 << 10;

/// Why a connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// It failed.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The target closed it.
    #[error("the target closed the connection")]
    Closed,
    /// The target is silent.
    #[error("the target has not answered for {} s", SILENCE_MAX.as_secs())]
    Silent,
    /// The target sent what is no frame.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// The target sends more than it should.
    #[error("the target sends more than it should")]
    Flood,
}

/// Who is told what happens while a send waits for the target, which reads nothing when one of its disks fails or is full.
pub trait Watcher: Send + Sync {
    /// A message came; it is still to be taken by [`Link::next_message`].
    fn heard(&self, message: &Message);

    /// Whether to wait no longer.
    fn must_end(&self) -> bool;
}

/// See the module documentation.
pub struct Link {
    stream: TcpStream,
    chunk: Box<[u8]>,
    inbox: Vec<u8>,
    read: usize,
    /// Messages that came while something was being sent.
    stash: VecDeque<(Header, Message)>,
    watcher: Arc<dyn Watcher>,
    /// When something was last received.
    pub heard: Instant,
    /// How long the socket took nothing while something was to be sent; whoever looks at it takes it.
    pub blocked: Duration,
}

impl Link {
    /// Connects.
    ///
    /// # Errors
    ///
    /// Why it could not.
    pub fn connect(
        target: &str,
        transport: TransportKind,
        watcher: Arc<dyn Watcher>,
    ) -> io::Result<Self> {
        let mut last = io::Error::new(
            io::ErrorKind::NotFound,
            "the name of the target has no address",
        );
        for address in target.to_socket_addrs()? {
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => {
                    let TransportKind::Plaintext = transport;
                    stream.set_nodelay(true)?;
                    stream.set_nonblocking(true)?;
                    dtloop_abi::limit_unsent(stream.as_fd(), UNSENT_BYTES_MAX)?;
                    let chunk = vec![0; READ_BYTES].into_boxed_slice();
                    return Ok(Self {
                        stream,
                        chunk,
                        inbox: vec![],
                        read: 0,
                        stash: VecDeque::new(),
                        watcher,
                        heard: Instant::now(),
                        blocked: Duration::ZERO,
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Waits until the target can be read, or written if asked, or another file can be read.
    ///
    /// # Errors
    ///
    /// Those of poll.
    pub fn wait(
        &self,
        write: bool,
        others: &[BorrowedFd<'_>],
        timeout: Duration,
    ) -> io::Result<()> {
        let mut events = PollFlags::POLLIN;
        events.set(PollFlags::POLLOUT, write);
        let mut fds = Vec::with_capacity(others.len() + 1);
        fds.push(PollFd::new(self.stream.as_fd(), events));
        fds.extend(others.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)));
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match nix::poll::poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Writes everything, reading what comes meanwhile.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more.
    pub fn send(&mut self, mut pieces: &mut [IoSlice<'_>]) -> Result<(), LinkError> {
        self.send_within(&mut pieces, None)
    }

    /// Writes everything, or what can be written in this time; `pieces` is what is left.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more.
    pub fn send_within(
        &mut self,
        pieces: &mut &mut [IoSlice<'_>],
        patience: Option<Duration>,
    ) -> Result<(), LinkError> {
        let begin = Instant::now();
        let mut moved = begin;
        while !pieces.is_empty() {
            match self.stream.write_vectored(pieces) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(written) => {
                    IoSlice::advance_slices(pieces, written);
                    moved = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = patience.map(|patience| patience.saturating_sub(begin.elapsed()));
                    if left.is_some_and(|left| left.is_zero()) {
                        return Ok(());
                    }
                    if moved.elapsed() > SILENCE_MAX && self.heard.elapsed() > SILENCE_MAX {
                        return Err(LinkError::Silent);
                    }
                    let begin = Instant::now();
                    self.wait(
                        true,
                        &[],
                        left.map_or(WATCH_EVERY, |left| left.min(WATCH_EVERY)),
                    )?;
                    self.blocked += begin.elapsed();
                    self.receive()?;
                    self.stash_messages()?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn stash_messages(&mut self) -> Result<(), LinkError> {
        while let Some((header, message)) = self.decode_message()? {
            self.watcher.heard(&message);
            self.stash.push_back((header, message));
        }
        if self.stash.len() > STASH_MAX {
            return Err(LinkError::Flood);
        }
        if self.watcher.must_end() {
            let text = "something more urgent than what was being sent came up";
            return Err(io::Error::new(io::ErrorKind::Interrupted, text).into());
        }
        Ok(())
    }

    /// Takes in what has come, without waiting.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more.
    pub fn receive(&mut self) -> Result<(), LinkError> {
        loop {
            if self.read > 0 {
                self.inbox.drain(..self.read);
                self.read = 0;
            }
            if self.inbox.len() > INBOX_BYTES_MAX {
                return Err(LinkError::Flood);
            }
            match self.stream.read(&mut self.chunk) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(bytes) => {
                    self.inbox.extend_from_slice(&self.chunk[..bytes]);
                    self.heard = Instant::now();
                    if bytes < READ_BYTES {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The next message out of what was taken in.
    ///
    /// # Errors
    ///
    /// If it is none.
    pub fn next_message(&mut self) -> Result<Option<(Header, Message)>, LinkError> {
        match self.stash.pop_front() {
            Some(message) => Ok(Some(message)),
            None => self.decode_message(),
        }
    }

    fn decode_message(&mut self) -> Result<Option<(Header, Message)>, LinkError> {
        match decode(&self.inbox[self.read..])? {
            Decoded::Incomplete { .. } => Ok(None),
            Decoded::Complete {
                header,
                frame: dtloop_proto::Frame::Message(message),
                bytes,
            } => {
                self.read += bytes;
                Ok(Some((header, message)))
            }
            Decoded::Complete { .. } => Err(LinkError::Flood),
        }
    }

    /// Waits for the next message.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more.
    pub fn expect_message(&mut self, timeout: Duration) -> Result<(Header, Message), LinkError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(message) = self.next_message()? {
                return Ok(message);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(LinkError::Silent);
            }
            self.wait(false, &[], left)?;
            if let Err(end) = self.receive() {
                // A refusal may have come just before the end.
                return self.next_message()?.ok_or(end);
            }
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
