// SPDX-License-Identifier: GPL-2.0-only

//! How frames travel: inside TLS, or as they are on loopback.
//!
//! A connection is read by its session's thread and written by that and the applier's thread. With TLS both use one tunnel:
//! it is locked for the time of encrypting or decrypting, never while somebody waits for the network. Whoever writes holds
//! a second lock until its bytes are on their way, so that records leave in the order in which they were sealed.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use dtloop_runtime::{TcpStream, read_socket, write_socket};
use dtloop_trust::tls::TargetTls;
use dtloop_trust::tunnel::{Door, Opened};
use dtloop_trust::{Pin, Tunnel, TunnelError};

/// Ciphertext read at once from somebody who is not known yet, in bytes.
const STRANGER_READ_BYTES: usize = 16 << 10;

/// And from a source that is known.
const READ_BYTES: usize = 256 << 10;

/// Most bytes that are read and thrown away from somebody who was refused, so that the reason reaches it: a connection
/// that is closed with bytes unread is reset, and what was said last is lost with it.
const LINGER_BYTES_MAX: usize = 64 << 10;

/// Longest wait for them.
const LINGER_TIME_MAX: Duration = Duration::from_secs(1);

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum AcceptError {
    /// The network.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// TLS.
    #[error("{0}")]
    Tls(#[from] TunnelError),
    /// It left, or had no time left, before it had shown who it is.
    #[error("it left before it had shown who it is")]
    Left,
}

/// What the handles of a connection share.
#[derive(Debug)]
struct Secure {
    tunnel: Mutex<Tunnel>,
    writing: Mutex<()>,
    peer: Pin,
    pairs: bool,
}

/// Ciphertext that was read and not decrypted: bytes `start..end`.
#[derive(Debug, Default)]
struct Inbox {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    secure: Option<Arc<Secure>>,
    /// Only in the handle that reads.
    inbox: Inbox,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: TunnelError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Inbox {
    fn new(bytes: usize) -> Self {
        Self {
            bytes: vec![0; bytes],
            start: 0,
            end: 0,
        }
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Reads more, once what was there is taken. 0: nothing more comes.
    fn fill(&mut self, stream: &TcpStream, waits: bool) -> io::Result<usize> {
        debug_assert_eq!(self.start, self.end);
        self.start = 0;
        self.end = 0;
        self.end = read_socket(stream, &mut self.bytes, waits)?;
        Ok(self.end)
    }

    fn grow(&mut self, bytes: usize) {
        let rest = self.rest().to_vec();
        let end = rest.len();
        self.bytes = rest;
        self.bytes.resize(bytes.max(end), 0);
        (self.start, self.end) = (0, end);
    }
}

fn cut() -> io::Error {
    let what = "it was cut, without a farewell";
    io::Error::new(io::ErrorKind::UnexpectedEof, what)
}

fn take_wire(tunnel: &mut Tunnel) -> Vec<u8> {
    let mut wire = vec![];
    while tunnel.wants_write() && tunnel.write_to(&mut wire).is_ok() {}
    wire
}

/// Says something to somebody who is being turned away, without waiting for it.
fn farewell(stream: &TcpStream, wire: &[u8]) {
    if !wire.is_empty() {
        // It may have left already, which is as good.
        let _ = write_socket(stream, wire);
    }
}

/// Ends a connection whose peer was told why.
fn linger(stream: &TcpStream) {
    // If any of this fails, the connection has ended already.
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(LINGER_TIME_MAX));
    let mut buffer = [0; 4096];
    let mut left = LINGER_BYTES_MAX;
    while let Ok(bytes @ 1..) = read_socket(stream, &mut buffer, true) {
        left = left.saturating_sub(bytes);
        if left == 0 {
            break;
        }
    }
}

/// Waits until the source has said what it wants.
fn open_door(
    stream: &TcpStream,
    inbox: &mut Inbox,
    tls: &TargetTls,
) -> Result<Tunnel, AcceptError> {
    let mut door = Door::default();
    loop {
        if inbox.fill(stream, true)? == 0 {
            return Err(AcceptError::Left);
        }
        let knocked = door.knock(inbox.rest(), tls).map_err(|refused| {
            farewell(stream, &refused.alert);
            refused.error
        })?;
        inbox.start += knocked.0;
        if let Some(tunnel) = knocked.1 {
            return Ok(tunnel);
        }
    }
}

/// Waits until both sides have shown their keys.
fn shake(
    stream: &TcpStream,
    inbox: &mut Inbox,
    tls: &TargetTls,
    makes_sense: &dyn Fn(),
) -> Result<Tunnel, AcceptError> {
    let mut tunnel = open_door(stream, inbox, tls)?;
    makes_sense();
    loop {
        let opened = tunnel.open(inbox.rest(), &mut []);
        let wire = take_wire(&mut tunnel);
        match opened {
            Ok(opened) => {
                inbox.start += opened.taken;
                (&mut &*stream).write_all(&wire)?;
            }
            Err(error) => {
                farewell(stream, &wire);
                return Err(error.into());
            }
        }
        if !tunnel.is_handshaking() {
            return Ok(tunnel);
        }
        if inbox.fill(stream, true)? == 0 {
            return Err(AcceptError::Left);
        }
    }
}

impl Connection {
    /// Takes over an accepted connection; without `tls`, as it is. The caller bounds the time that this takes, and is told
    /// when the peer has begun to speak TLS.
    ///
    /// # Errors
    ///
    /// Why there is none. The peer was told.
    pub fn accept(
        stream: TcpStream,
        tls: Option<&TargetTls>,
        makes_sense: &dyn Fn(),
    ) -> Result<Self, AcceptError> {
        stream.set_nodelay(true)?;
        let Some(tls) = tls else {
            return Ok(Self {
                stream,
                secure: None,
                inbox: Inbox::default(),
            });
        };
        let mut inbox = Inbox::new(STRANGER_READ_BYTES);
        let tunnel = match shake(&stream, &mut inbox, tls, makes_sense) {
            Ok(tunnel) => tunnel,
            Err(error) => {
                if matches!(error, AcceptError::Tls(_)) {
                    linger(&stream);
                }
                return Err(error);
            }
        };
        let peer = tunnel.peer().ok_or(AcceptError::Left)?;
        let secure = Secure {
            pairs: tunnel.pairs(),
            tunnel: Mutex::new(tunnel),
            writing: Mutex::new(()),
            peer,
        };
        Ok(Self {
            stream,
            secure: Some(Arc::new(secure)),
            inbox,
        })
    }

    /// Another handle of the same connection, to write and to end it.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            stream: self.stream.try_clone()?,
            secure: self.secure.clone(),
            inbox: Inbox::default(),
        })
    }

    /// The other end.
    ///
    /// # Errors
    ///
    /// If the connection has ended.
    pub fn peer(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    /// The key of the other end; none without TLS.
    #[must_use]
    pub fn pin(&self) -> Option<Pin> {
        self.secure.as_ref().map(|secure| secure.peer)
    }

    /// Whether it is a pairing.
    #[must_use]
    pub fn pairs(&self) -> bool {
        self.secure.as_ref().is_some_and(|secure| secure.pairs)
    }

    /// Longest time that a read and a write may take.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn set_timeouts(&self, read: Duration, write: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(read))?;
        self.stream.set_write_timeout(Some(write))
    }

    /// From now on much may come at once.
    pub fn expect_much(&mut self) {
        if self.secure.is_some() {
            self.inbox.grow(READ_BYTES);
        }
    }

    /// Ends the connection; who reads or writes it comes back.
    pub fn shutdown(&self) {
        self.say_end();
        // It may have ended already, which is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
    }

    /// Ends a connection whose peer was told why, so that it hears that.
    pub fn dismiss(&self) {
        self.say_end();
        linger(&self.stream);
    }

    fn say_end(&self) {
        let Some(secure) = &self.secure else { return };
        // Somebody who is in the middle of writing may be stuck there; then the end is a cut.
        let writing = match secure.writing.try_lock() {
            Ok(writing) => writing,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let wire = {
            let mut tunnel = lock(&secure.tunnel);
            tunnel.close();
            take_wire(&mut tunnel)
        };
        farewell(&self.stream, &wire);
        drop(writing);
    }
}

impl Secure {
    /// Decrypts what was read.
    fn open(
        &self,
        inbox: &mut Inbox,
        plain: &mut [u8],
    ) -> Result<(Opened, bool), (TunnelError, Vec<u8>)> {
        let mut tunnel = lock(&self.tunnel);
        match tunnel.open(inbox.rest(), plain) {
            Ok(opened) => {
                inbox.start += opened.taken;
                Ok((opened, tunnel.is_closed()))
            }
            Err(error) => Err((error, take_wire(&mut tunnel))),
        }
    }

    /// Waits for the first bytes, then takes whatever else is there.
    fn read(&self, stream: &TcpStream, inbox: &mut Inbox, buffer: &mut [u8]) -> io::Result<usize> {
        let mut given = 0;
        loop {
            let opened = self.open(inbox, &mut buffer[given..]);
            let (opened, closed) = opened.map_err(|(error, alert)| {
                farewell(stream, &alert);
                failed(error)
            })?;
            given += opened.given;
            if given == buffer.len() || closed {
                return Ok(given);
            }
            match inbox.fill(stream, given == 0) {
                // Without a farewell in TLS nobody knows whether this is all: it is no end but a cut.
                Ok(0) if given == 0 => return Err(cut()),
                Ok(0) => return Ok(given),
                Ok(_) => {}
                // Nothing more is there, or the next read meets the same error.
                Err(_) if given > 0 => return Ok(given),
                Err(error) => return Err(error),
            }
        }
    }

    fn write(&self, mut stream: &TcpStream, buffer: &[u8]) -> io::Result<usize> {
        let _writing = lock(&self.writing);
        let (sealed, wire) = {
            let mut tunnel = lock(&self.tunnel);
            let sealed = tunnel.seal(&[IoSlice::new(buffer)]).map_err(failed)?;
            (sealed, take_wire(&mut tunnel))
        };
        stream.write_all(&wire)?;
        Ok(sealed)
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &self.secure {
            Some(secure) => secure.read(&self.stream, &mut self.inbox, buffer),
            None => self.stream.read(buffer),
        }
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match &self.secure {
            Some(secure) => secure.write(&self.stream, buffer),
            None => self.stream.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
