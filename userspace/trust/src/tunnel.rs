// SPDX-License-Identifier: GPL-2.0-only

//! A TLS connection without a socket: bytes in, bytes out.
//!
//! A payload is copied once on its way out, into the record that is encrypted in place, and twice on its way in: rustls
//! decrypts a record in place and hands out a copy, which is copied to where the caller wants it.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use rustls::pki_types::ServerName;
use rustls::server::Acceptor;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, Error,
    InvalidMessage, ServerConnection,
};

use crate::key::Pin;
use crate::tls::{PAIR, REPLICATE, TargetTls};

/// Most ciphertext that waits to be taken away, in bytes: what stays in a processor's cache until it is written. Whoever seals more has
/// to take some away first.
pub const OUTGOING_BYTES_MAX: usize = 256 << 10;

/// Most pieces sealed at a time: rustls walks over all of them for each record.
const PIECES_MAX: usize = 128;

/// Why a connection cannot be used any more.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TunnelError {
    /// The peer has another key than it must have.
    #[error("the peer has another key than the one it was paired with")]
    WrongKey,
    /// The peer does not take our key.
    #[error("the peer does not know the key of this side")]
    NotKnown,
    /// Bytes were changed on their way, or the peer is broken.
    #[error("what came was changed on its way: a record does not decrypt")]
    Tampered,
    /// What came is not TLS.
    #[error("the peer does not speak TLS; look at \"transport\" in its configuration")]
    NotTls,
    /// Versions or parameters that do not go together.
    #[error("the peers cannot agree on TLS: {0}")]
    Disagree(String),
    /// Anything else.
    #[error("TLS failed: {0}")]
    Other(String),
}

impl From<Error> for TunnelError {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
                Self::WrongKey
            }
            Error::AlertReceived(AlertDescription::AccessDenied) => Self::NotKnown,
            Error::AlertReceived(AlertDescription::BadRecordMac) | Error::DecryptError => {
                Self::Tampered
            }
            Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge
                | InvalidMessage::InvalidEmptyPayload,
            ) => Self::NotTls,
            Error::AlertReceived(
                AlertDescription::ProtocolVersion
                | AlertDescription::HandshakeFailure
                | AlertDescription::NoApplicationProtocol
                | AlertDescription::UnsupportedCertificate,
            )
            | Error::PeerIncompatible(_)
            | Error::NoApplicationProtocol => Self::Disagree(error.to_string()),
            error => Self::Other(error.to_string()),
        }
    }
}

/// What came of some ciphertext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Bytes of ciphertext that were taken in.
    pub taken: usize,
    /// Bytes of plaintext that were given out.
    pub given: usize,
}

/// See the module documentation.
#[derive(Debug)]
pub struct Tunnel {
    tls: Connection,
    /// Plaintext that is decrypted and not given out.
    waiting: usize,
    /// The peer has said that nothing more comes.
    closed: bool,
}

impl Tunnel {
    /// The source's end.
    ///
    /// # Errors
    ///
    /// A fault of the program.
    pub fn source(config: Arc<ClientConfig>) -> Result<Self, TunnelError> {
        // Not sent, and not looked at: the key counts.
        let name = ServerName::try_from("dttarget")
            .map_err(|error| TunnelError::Other(error.to_string()))?;
        let tls = ClientConnection::new(config, name)?;
        Ok(Self::new(Connection::Client(tls)))
    }

    fn new(mut tls: Connection) -> Self {
        tls.set_buffer_limit(Some(OUTGOING_BYTES_MAX));
        Self {
            tls,
            waiting: 0,
            closed: false,
        }
    }

    /// Whether the peers have not yet shown each other their keys.
    #[must_use]
    pub fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// Whether the peer has said that it sends no more. An end of the connection without this is a cut.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// The peer's key, once it has shown it.
    #[must_use]
    pub fn peer(&self) -> Option<Pin> {
        let keys = self
            .tls
            .peer_certificates()
            .filter(|_| !self.is_handshaking());
        keys.and_then(|keys| keys.first()).map(|key| Pin::of(key))
    }

    /// Whether this is a pairing.
    #[must_use]
    pub fn pairs(&self) -> bool {
        self.tls.alpn_protocol() == Some(PAIR)
    }

    /// Whether this is a replicating connection.
    #[must_use]
    pub fn replicates(&self) -> bool {
        self.tls.alpn_protocol() == Some(REPLICATE)
    }

    /// Takes ciphertext in and gives plaintext out, until either side has no more.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more. There may be an alert to be taken away.
    pub fn open(&mut self, wire: &[u8], plain: &mut [u8]) -> Result<Opened, TunnelError> {
        let mut done = Opened::default();
        loop {
            if self.waiting > 0 && done.given < plain.len() {
                let given = self
                    .tls
                    .reader()
                    .read(&mut plain[done.given..])
                    .map_err(|error| TunnelError::Other(error.to_string()))?;
                self.waiting = self.waiting.saturating_sub(given);
                done.given += given;
            }
            if self.waiting > 0 || done.taken == wire.len() || self.closed {
                return Ok(done);
            }
            let mut rest = &wire[done.taken..];
            let taken = self.tls.read_tls(&mut rest);
            match taken {
                Ok(0) => return Err(TunnelError::Other("a record is too long".into())),
                Ok(taken) => done.taken += taken,
                Err(error) => return Err(TunnelError::Other(error.to_string())),
            }
            let state = self.tls.process_new_packets()?;
            self.waiting = state.plaintext_bytes_to_read();
            self.closed = state.peer_has_closed();
        }
    }

    /// Encrypts some of the pieces, as much as there is room for; how many bytes.
    ///
    /// # Errors
    ///
    /// Why the connection cannot be used any more.
    pub fn seal(&mut self, pieces: &[IoSlice<'_>]) -> Result<usize, TunnelError> {
        let pieces = &pieces[..pieces.len().min(PIECES_MAX)];
        self.tls
            .writer()
            .write_vectored(pieces)
            .map_err(|error| TunnelError::Other(error.to_string()))
    }

    /// Whether there is ciphertext to be taken away.
    #[must_use]
    pub fn wants_write(&self) -> bool {
        self.tls.wants_write()
    }

    /// Writes some of the ciphertext that is to be taken away, in one write.
    ///
    /// # Errors
    ///
    /// Those of the writer.
    pub fn write_to(&mut self, to: &mut dyn Write) -> io::Result<usize> {
        self.tls.write_tls(to)
    }

    /// Says to the peer that nothing more comes; it is to be taken away.
    pub fn close(&mut self) {
        self.tls.send_close_notify();
    }

    /// Begins to use new keys for what is sent. rustls does this by itself long before the old ones are worn out.
    ///
    /// # Errors
    ///
    /// During the handshake.
    pub fn renew_keys(&mut self) -> Result<(), TunnelError> {
        Ok(self.tls.refresh_traffic_keys()?)
    }
}

/// The target's end before the source has said what it wants.
#[derive(Default)]
pub struct Door {
    acceptor: Acceptor,
}

/// What a connection does not go on from, and what is still to be said to the peer.
#[derive(Debug)]
pub struct Refused {
    /// Why.
    pub error: TunnelError,
    /// To be sent before the connection is closed.
    pub alert: Vec<u8>,
}

impl Refused {
    fn new(error: Error, mut alert: rustls::server::AcceptedAlert) -> Self {
        let mut bytes = vec![];
        // Into memory, which takes everything.
        let _ = alert.write_all(&mut bytes);
        Self {
            error: error.into(),
            alert: bytes,
        }
    }
}

impl Door {
    /// Takes ciphertext in. Once the source has said what it wants there is a tunnel; how much of the ciphertext was taken.
    ///
    /// # Errors
    ///
    /// Why it does not go on.
    pub fn knock(
        &mut self,
        wire: &[u8],
        tls: &TargetTls,
    ) -> Result<(usize, Option<Tunnel>), Refused> {
        let mut taken = 0;
        let other = |error: String| Refused {
            error: TunnelError::Other(error),
            alert: vec![],
        };
        while taken < wire.len() {
            let mut rest = &wire[taken..];
            match self.acceptor.read_tls(&mut rest) {
                Ok(0) => return Err(other("a record is too long".into())),
                Ok(bytes) => taken += bytes,
                Err(error) => return Err(other(error.to_string())),
            }
            let accepted = self
                .acceptor
                .accept()
                .map_err(|(error, alert)| Refused::new(error, alert))?;
            if let Some(accepted) = accepted {
                let config = tls.choose(&accepted.client_hello());
                let tls: ServerConnection = accepted
                    .into_connection(config)
                    .map_err(|(error, alert)| Refused::new(error, alert))?;
                return Ok((taken, Some(Tunnel::new(Connection::Server(tls)))));
            }
        }
        Ok((taken, None))
    }
}

#[cfg(test)]
mod tests;
