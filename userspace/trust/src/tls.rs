// SPDX-License-Identifier: GPL-2.0-only

//! What both sides ask of TLS.
//!
//! - 1.3 only, no session tickets, no resumption, no early data: every connection shows both keys anew, so a revoked one is
//!   out at its next connection, and nothing can be replayed.
//! - Raw public keys (RFC 7250), Ed25519. A key is taken for its [`Pin`]; that the peer has the private part of it is shown by
//!   its signature over the handshake, which rustls checks.
//! - Two protocols by ALPN. [`REPLICATE`]: the source must be known, or the handshake ends with `access_denied`. [`PAIR`]: any
//!   key is taken, as it is the one to be made known; nothing but a pairing can come of it.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, ring as provider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, ClientHello, NoServerSessionStorage};
use rustls::version::TLS13;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error,
    PeerMisbehaved, ServerConfig, SignatureScheme,
};

use crate::code::PREFIX_BYTES;
use crate::key::{Identity, Pin};

/// ALPN of a replicating connection.
pub const REPLICATE: &[u8] = b"dtloop/1";

/// ALPN of a pairing.
pub const PAIR: &[u8] = b"dtloop-pair/1";

/// What a source demands of the target's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// It is this one.
    Pinned(Pin),
    /// Its pin begins so, as the pairing code says.
    Coded([u8; PREFIX_BYTES]),
}

/// Who is known to a target. Asked at every handshake.
pub trait Known: Send + Sync + std::fmt::Debug {
    /// Whether a source with this key may come in.
    fn knows(&self, pin: &Pin) -> bool;
}

/// Whom a verifier lets in.
#[derive(Debug)]
enum Whom {
    Target(Expect),
    Known(Arc<dyn Known>),
    Anybody,
}

impl Whom {
    fn admit(&self, key: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<(), Error> {
        let pin = Pin::of(key);
        let admitted = more.is_empty()
            && match self {
                Self::Target(Expect::Pinned(wanted)) => pin.begins_with(&wanted.prefix::<32>()),
                Self::Target(Expect::Coded(wanted)) => pin.begins_with(wanted),
                Self::Known(known) => known.knows(&pin),
                Self::Anybody => true,
            };
        if admitted {
            Ok(())
        } else {
            Err(CertificateError::ApplicationVerificationFailure.into())
        }
    }
}

/// One verifier for both directions.
#[derive(Debug)]
struct Verifier {
    whom: Whom,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(whom: Whom, provider: &Arc<CryptoProvider>) -> Arc<Self> {
        Arc::new(Self {
            whom,
            provider: Arc::clone(provider),
        })
    }

    fn signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature_with_raw_key(message, &key, signed, algorithms)
    }
}

/// TLS 1.2 is not compiled in.
fn no_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.whom
            .admit(end_entity, intermediates)
            .map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.whom
            .admit(end_entity, intermediates)
            .map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

/// The source's side of one connection.
///
/// # Errors
///
/// A fault of the program: the parameters do not go together.
pub fn source_config(
    identity: &Identity,
    expect: Expect,
    protocol: &[u8],
) -> Result<Arc<ClientConfig>, Error> {
    let provider = Arc::new(provider::default_provider());
    let verifier = Verifier::new(Whom::Target(expect), &provider);
    let resolver = AlwaysResolvesClientRawPublicKeys::new(identity.certified_key());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_cert_resolver(Arc::new(resolver));
    config.alpn_protocols = vec![protocol.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// The target's side of all connections.
#[derive(Debug)]
pub struct TargetTls {
    replicate: Arc<ServerConfig>,
    pair: Arc<ServerConfig>,
}

impl TargetTls {
    /// For this key; `known` is asked at every handshake.
    ///
    /// # Errors
    ///
    /// A fault of the program: the parameters do not go together.
    pub fn new(identity: &Identity, known: Arc<dyn Known>) -> Result<Self, Error> {
        let provider = Arc::new(provider::default_provider());
        let config = |whom, protocol: &[u8]| {
            let resolver = AlwaysResolvesServerRawPublicKeys::new(identity.certified_key());
            let mut config = ServerConfig::builder_with_provider(Arc::clone(&provider))
                .with_protocol_versions(&[&TLS13])?
                .with_client_cert_verifier(Verifier::new(whom, &provider))
                .with_cert_resolver(Arc::new(resolver));
            config.alpn_protocols = vec![protocol.to_vec()];
            config.send_tls13_tickets = 0;
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.max_early_data_size = 0;
            Ok::<_, Error>(Arc::new(config))
        };
        Ok(Self {
            replicate: config(Whom::Known(known), REPLICATE)?,
            pair: config(Whom::Anybody, PAIR)?,
        })
    }

    /// The configuration for whoever says this. Without a protocol that is known here, the handshake ends.
    pub(crate) fn choose(&self, hello: &ClientHello<'_>) -> Arc<ServerConfig> {
        let pairs = hello
            .alpn()
            .is_some_and(|mut offered| offered.all(|protocol| protocol == PAIR));
        Arc::clone(if pairs { &self.pair } else { &self.replicate })
    }
}
