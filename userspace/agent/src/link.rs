// SPDX-License-Identifier: GPL-2.0-only

//! The connection of a set to its target: bytes in, bytes out, without ever being stuck in one direction; inside TLS, or as
//! they are on loopback.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, ToSocketAddrs};
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use dtloop_proto::{Decoded, FrameError, Header, Message, decode};
use dtloop_runtime::TcpStream;
use dtloop_trust::tls::{self, Expect, REPLICATE};
use dtloop_trust::vault::VaultError;
use dtloop_trust::{Pin, Tunnel, TunnelError, Vault};

use crate::config::{TransportKind, is_loopback};

/// Longest time to connect to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest time until both sides have shown their keys.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The target must take something, or say something when asked, within this time.
pub const SILENCE_MAX: Duration = Duration::from_secs(15);

/// Most bytes that wait to be read out of [`Link::next_message`]: what a target says is small.
const INBOX_BYTES_MAX: usize = 4 << 20;

/// Most messages that wait while something is being sent: what a target says is about that and settles little of it.
const STASH_MAX: usize = 64 << 10;

/// How often whoever waits for the target looks for something else to do.
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
    /// It ended without the target's farewell.
    #[error("the connection was cut")]
    Cut,
    /// Plaintext was asked for, but not on this machine.
    #[error(
        "plaintext is for loopback addresses only, and {0} is none; leave out transport = \"plaintext\" and pair (dtloop pair)"
    )]
    Open(SocketAddr),
    /// There is no pin for this target.
    #[error(
        "this machine is not paired with {0}: run \"dttarget invite\" there, then \"dtloop pair {0} CODE\" here"
    )]
    NotPaired(String),
    /// The target's key is not the one of the pairing.
    #[error(
        "{0} has another key than when it was paired: it was set up anew, or somebody is in between; nothing was sent. If it was set up anew, pair again: \"dttarget invite\" there, then \"dtloop pair {0} CODE\" here"
    )]
    WrongKey(String),
    /// The target does not take our key.
    #[error(
        "{0} does not know this machine's key: it was revoked there, or the target lost its state; to pair again, run \"dttarget invite\" there, then \"dtloop pair {0} CODE\" here"
    )]
    NotKnown(String),
    /// TLS, otherwise.
    #[error("{0}")]
    Tunnel(TunnelError),
    /// What is kept of keys.
    #[error("{0}")]
    Vault(#[from] VaultError),
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

impl LinkError {
    /// Whether it stays so until somebody does something.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::Open(_) | Self::NotPaired(_) | Self::WrongKey(_) | Self::NotKnown(_)
        )
    }
}

/// What is done while the target is waited for: it reads nothing when one of its disks fails or is full, and says nothing
/// while it replays its journal.
pub trait Watcher {
    /// A message came; it is still to be taken by [`Link::next_message`].
    fn heard(&mut self, message: &Message);

    /// Called now and then. False: to wait no longer.
    fn goes_on(&mut self) -> bool;
}

/// Has nothing else to do.
#[derive(Clone, Copy, Debug)]
pub struct Nobody;

impl Watcher for Nobody {
    fn heard(&mut self, _: &Message) {}

    fn goes_on(&mut self) -> bool {
        true
    }
}

/// See the module documentation.
pub struct Link {
    stream: TcpStream,
    target: String,
    /// None in plaintext.
    tunnel: Option<Tunnel>,
    chunk: Box<[u8]>,
    inbox: Vec<u8>,
    read: usize,
    /// Messages that came while something was being sent.
    stash: VecDeque<(Header, Message)>,
    /// When something was last received.
    pub heard: Instant,
    /// How long the socket took nothing while something was to be sent; whoever looks at it takes it.
    pub blocked: Duration,
}

impl Link {
    /// Connects. With TLS, both sides have shown their keys when this returns, and the target's is the one of the pairing.
    ///
    /// # Errors
    ///
    /// Why it could not.
    pub fn connect(
        target: &str,
        transport: TransportKind,
        vault: &Vault,
        watcher: &mut dyn Watcher,
    ) -> Result<Self, LinkError> {
        let tunnel = match transport {
            TransportKind::Plaintext => None,
            TransportKind::Tls => Some(Self::tunnel(target, vault)?),
        };
        Self::open(target, tunnel, watcher)
    }

    /// As [`Link::connect`], with a tunnel that is begun already.
    pub(crate) fn open(
        target: &str,
        tunnel: Option<Tunnel>,
        watcher: &mut dyn Watcher,
    ) -> Result<Self, LinkError> {
        let stream = Self::dial(target, tunnel.is_none())?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        limit_unsent(&stream)?;
        let mut link = Self {
            stream,
            target: target.to_owned(),
            tunnel,
            chunk: vec![0; READ_BYTES].into_boxed_slice(),
            inbox: vec![],
            read: 0,
            stash: VecDeque::new(),
            heard: dtloop_runtime::now(),
            blocked: Duration::ZERO,
        };
        link.shake(watcher)?;
        Ok(link)
    }

    /// The target's key; none in plaintext.
    #[must_use]
    pub fn peer(&self) -> Option<Pin> {
        self.tunnel.as_ref().and_then(Tunnel::peer)
    }

    fn dial(target: &str, plaintext: bool) -> Result<TcpStream, LinkError> {
        let mut last = io::Error::new(
            io::ErrorKind::NotFound,
            "the name of the target has no address",
        );
        for address in target.to_socket_addrs()? {
            if plaintext && !is_loopback(&address) {
                return Err(LinkError::Open(address));
            }
            match TcpStream::connect_timeout(&address, CONNECT_TIMEOUT) {
                Ok(stream) => return Ok(stream),
                Err(error) => last = error,
            }
        }
        Err(last.into())
    }

    /// Pins and key are read anew for each connection: a pairing is seen without a restart.
    fn tunnel(target: &str, vault: &Vault) -> Result<Tunnel, LinkError> {
        let targets = vault.targets()?;
        let Some(known) = targets.at(target) else {
            return Err(LinkError::NotPaired(target.to_owned()));
        };
        let config = tls::source_config(&vault.identity()?, Expect::Pinned(known.pin), REPLICATE);
        let config = config.map_err(|error| LinkError::Tunnel(error.into()))?;
        Tunnel::source(config).map_err(LinkError::Tunnel)
    }

    /// Waits until both sides have shown their keys.
    fn shake(&mut self, watcher: &mut dyn Watcher) -> Result<(), LinkError> {
        let deadline = dtloop_runtime::now() + HANDSHAKE_TIMEOUT;
        loop {
            // The last of it is ours to say.
            let write = match self.write_some(&mut [].as_mut_slice()) {
                Ok(flushed) => !flushed,
                Err(LinkError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => true,
                Err(error) => return Err(error),
            };
            let handshaking = self.tunnel.as_ref().is_some_and(Tunnel::is_handshaking);
            if !handshaking && !write {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(dtloop_runtime::now());
            if left.is_zero() {
                return Err(LinkError::Silent);
            }
            self.wait(write, &[], left.min(WATCH_EVERY))?;
            self.receive()?;
            go_on(watcher)?;
        }
    }

    fn failed(&self, error: TunnelError) -> LinkError {
        match error {
            TunnelError::WrongKey => LinkError::WrongKey(self.target.clone()),
            TunnelError::NotKnown => LinkError::NotKnown(self.target.clone()),
            error => LinkError::Tunnel(error),
        }
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
        let unsent = self.tunnel.as_ref().is_some_and(Tunnel::wants_write);
        dtloop_runtime::wait_socket(&self.stream, write || unsent, others, timeout)
    }

    /// Writes everything, reading what comes meanwhile.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more.
    pub fn send(
        &mut self,
        mut pieces: &mut [IoSlice<'_>],
        watcher: &mut dyn Watcher,
    ) -> Result<(), LinkError> {
        self.send_within(&mut pieces, None, watcher)
    }

    /// Writes everything, or what can be written in this time; `pieces` is what is left. What is encrypted already when the
    /// time is over follows with the next write, read or wait.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more.
    pub fn send_within(
        &mut self,
        pieces: &mut &mut [IoSlice<'_>],
        patience: Option<Duration>,
        watcher: &mut dyn Watcher,
    ) -> Result<(), LinkError> {
        let begin = dtloop_runtime::now();
        let mut moved = begin;
        loop {
            match self.write_some(pieces) {
                Ok(true) => return Ok(()),
                Ok(false) => moved = dtloop_runtime::now(),
                Err(LinkError::Io(error)) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = patience
                        .map(|patience| patience.saturating_sub(dtloop_runtime::elapsed(begin)));
                    if left.is_some_and(|left| left.is_zero()) {
                        return Ok(());
                    }
                    if dtloop_runtime::elapsed(moved) > SILENCE_MAX
                        && dtloop_runtime::elapsed(self.heard) > SILENCE_MAX
                    {
                        return Err(LinkError::Silent);
                    }
                    let begin = dtloop_runtime::now();
                    self.wait(
                        true,
                        &[],
                        left.map_or(WATCH_EVERY, |left| left.min(WATCH_EVERY)),
                    )?;
                    self.blocked += dtloop_runtime::elapsed(begin);
                    self.receive()?;
                    self.stash_messages(watcher)?;
                    go_on(watcher)?;
                }
                Err(LinkError::Io(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// One write. True: everything is on its way.
    fn write_some(&mut self, pieces: &mut &mut [IoSlice<'_>]) -> Result<bool, LinkError> {
        IoSlice::advance_slices(pieces, 0);
        let Some(tunnel) = &mut self.tunnel else {
            if !pieces.is_empty() {
                match self.stream.write_vectored(pieces)? {
                    0 => return Err(LinkError::Closed),
                    written => IoSlice::advance_slices(pieces, written),
                }
            }
            return Ok(pieces.is_empty());
        };
        if !pieces.is_empty() {
            match tunnel.seal(pieces) {
                Ok(sealed) => IoSlice::advance_slices(pieces, sealed),
                Err(error) => return Err(self.failed(error)),
            }
        }
        if tunnel.wants_write() && tunnel.write_to(&mut &self.stream)? == 0 {
            return Err(LinkError::Closed);
        }
        Ok(pieces.is_empty() && !tunnel.wants_write())
    }

    /// Writes what is encrypted already, as far as it goes without waiting.
    fn flush(&mut self) -> Result<(), LinkError> {
        if !self.tunnel.as_ref().is_some_and(Tunnel::wants_write) {
            return Ok(());
        }
        match self.write_some(&mut [].as_mut_slice()) {
            Ok(_) => Ok(()),
            Err(LinkError::Io(error))
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn stash_messages(&mut self, watcher: &mut dyn Watcher) -> Result<(), LinkError> {
        while let Some((header, message)) = self.decode_message()? {
            watcher.heard(&message);
            self.stash.push_back((header, message));
        }
        if self.stash.len() > STASH_MAX {
            return Err(LinkError::Flood);
        }
        Ok(())
    }

    /// Takes in what has come, without waiting.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more.
    pub fn receive(&mut self) -> Result<(), LinkError> {
        self.flush()?;
        loop {
            if self.read > 0 {
                self.inbox.drain(..self.read);
                self.read = 0;
            }
            if self.inbox.len() > INBOX_BYTES_MAX {
                return Err(LinkError::Flood);
            }
            match self.stream.read(&mut self.chunk) {
                Ok(0) => return Err(self.ended()),
                Ok(bytes) => {
                    self.heard = dtloop_runtime::now();
                    self.take_in(bytes)?;
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

    /// What an end of the connection means.
    fn ended(&self) -> LinkError {
        match &self.tunnel {
            Some(tunnel) if !tunnel.is_closed() => LinkError::Cut,
            _ => LinkError::Closed,
        }
    }

    /// Takes in what was read into the chunk.
    fn take_in(&mut self, bytes: usize) -> Result<(), LinkError> {
        let Some(tunnel) = &mut self.tunnel else {
            self.inbox.extend_from_slice(&self.chunk[..bytes]);
            return Ok(());
        };
        let mut taken = 0;
        loop {
            let have = self.inbox.len();
            // A record never gives more than was read for it and what of it was read before.
            self.inbox.resize(have + 2 * READ_BYTES, 0);
            let opened = tunnel.open(&self.chunk[taken..bytes], &mut self.inbox[have..]);
            let given = opened.as_ref().map_or(0, |opened| opened.given);
            self.inbox.truncate(have + given);
            match opened {
                Ok(opened) => taken += opened.taken,
                Err(error) => {
                    // The target is told what was wrong with it, if it still listens.
                    let _ = tunnel.write_to(&mut &self.stream);
                    return Err(self.failed(error));
                }
            }
            if given == 0 {
                return Ok(());
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
    pub fn expect_message(
        &mut self,
        timeout: Duration,
        watcher: &mut dyn Watcher,
    ) -> Result<(Header, Message), LinkError> {
        let deadline = dtloop_runtime::now() + timeout;
        loop {
            if let Some(message) = self.next_message()? {
                return Ok(message);
            }
            let left = deadline.saturating_duration_since(dtloop_runtime::now());
            if left.is_zero() {
                return Err(LinkError::Silent);
            }
            self.wait(false, &[], left.min(WATCH_EVERY))?;
            if let Err(end) = self.receive() {
                // A refusal may have come just before the end.
                return self.next_message()?.ok_or(end);
            }
            go_on(watcher)?;
        }
    }
}

#[cfg(not(feature = "simulation"))]
fn limit_unsent(stream: &TcpStream) -> io::Result<()> {
    use std::os::fd::AsFd;
    Ok(dtloop_abi::limit_unsent(stream.as_fd(), UNSENT_BYTES_MAX)?)
}

/// The network of a simulation has its own bounds.
#[cfg(feature = "simulation")]
fn limit_unsent(_: &TcpStream) -> io::Result<()> {
    let _ = UNSENT_BYTES_MAX;
    Ok(())
}

fn go_on(watcher: &mut dyn Watcher) -> Result<(), LinkError> {
    if watcher.goes_on() {
        return Ok(());
    }
    let text = "something more urgent came up";
    Err(io::Error::new(io::ErrorKind::Interrupted, text).into())
}

impl Drop for Link {
    fn drop(&mut self) {
        if let Some(tunnel) = &mut self.tunnel {
            tunnel.close();
            // As far as it goes without waiting.
            let _ = tunnel.write_to(&mut &self.stream);
        }
        // It may have ended already.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}
