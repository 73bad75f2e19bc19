// SPDX-License-Identifier: GPL-2.0-only

//! How frames travel: the one place that will learn TLS.
//!
//! A connection is read by its session's thread and written by that and the applier's thread.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use crate::config::TransportKind;

/// A connection.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
}

impl Connection {
    /// Takes over an accepted connection.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn accept(kind: TransportKind, stream: TcpStream) -> io::Result<Self> {
        match kind {
            TransportKind::Plaintext => {
                stream.set_nodelay(true)?;
                Ok(Self { stream })
            }
        }
    }

    /// Another handle of the same connection.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            stream: self.stream.try_clone()?,
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

    /// Longest time that a read and a write may take.
    ///
    /// # Errors
    ///
    /// Those of the socket.
    pub fn set_timeouts(&self, read: Duration, write: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(read))?;
        self.stream.set_write_timeout(Some(write))
    }

    /// Ends the connection; who reads or writes it comes back.
    pub fn shutdown(&self) {
        // It may have ended already, which is as good.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Read for Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Connection {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}
