// SPDX-License-Identifier: GPL-2.0-only

//! Who may talk to whom. No sockets, no threads, no clock.
//!
//! Each side has one long-lived key. There is no authority and no certificate: a peer is trusted if the hash of its public
//! key, its [`Pin`], is written down here, and for no other reason. Keys travel as raw public keys (RFC 7250), so nothing
//! of a peer is parsed but its key, and nothing expires with a wrong clock.
//!
//! | | |
//! |---|---|
//! | [`key`] | the own key, and pins of others |
//! | [`code`] | the pairing code that a person carries from the target to the source |
//! | [`ledger`] | target: known sources, open invitations, and every decision about them |
//! | [`targets`] | source: known targets |
//! | [`vault`] | where those are kept: one change at a time, durable, all or nothing |
//! | [`tls`] | what both sides ask of TLS: 1.3 only, pins, signatures checked by rustls |
//! | [`tunnel`] | a TLS connection: bytes in, bytes out |
//! | [`lobby`] | how many strangers may wait at the door, and for how long |
//!
//! All cryptography is that of rustls and ring.

#![forbid(unsafe_code)]

pub mod code;
pub mod key;
pub mod ledger;
pub mod lobby;
pub mod targets;
pub mod tls;
pub mod tunnel;
pub mod vault;

pub use code::PairingCode;
pub use key::{Identity, Pin};
pub use ledger::Ledger;
pub use targets::Targets;
pub use tunnel::{Tunnel, TunnelError};
pub use vault::Vault;
