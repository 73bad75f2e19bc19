// SPDX-License-Identifier: GPL-2.0-only

//! What is typed to pair two machines, and the files in which they remember each other.

use dtloop_core::chain::{KEPT_BYTES, Kept};
use dtloop_proto::Uuid;
use dtloop_trust::PairingCode;
use dtloop_trust::key::Pin;
use dtloop_trust::ledger::Ledger;
use dtloop_trust::targets::Targets;

const STREAM: Uuid = Uuid([3; 16]);

/// A code, a key's pin, both ledgers, and the kept link of the hash chain, with its checksum made right.
pub(crate) fn trust(data: &[u8]) {
    kept(data);
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(code) = text.parse::<PairingCode>() {
        assert_eq!(code.to_string().parse::<PairingCode>(), Ok(code));
    }
    if let Ok(pin) = text.parse::<Pin>() {
        assert_eq!(pin.to_string().parse::<Pin>().ok(), Some(pin));
    }
    if let Ok(ledger) = serde_json::from_str::<Ledger>(text) {
        let json = serde_json::to_string(&ledger).unwrap();
        let again = serde_json::from_str::<Ledger>(&json).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), json);
    }
    if let Ok(targets) = serde_json::from_str::<Targets>(text) {
        let json = serde_json::to_string(&targets).unwrap();
        let again = serde_json::from_str::<Targets>(&json).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), json);
    }
}

fn kept(data: &[u8]) {
    let mut bytes = [0; KEPT_BYTES];
    let length = data.len().min(KEPT_BYTES);
    bytes[..length].copy_from_slice(&data[..length]);
    if let Some(kept) = Kept::parse(&bytes, STREAM) {
        assert_eq!(Kept::parse(&kept.pack(STREAM), STREAM), Some(kept));
    }
    let crc = crc32fast::hash(&bytes[..56]);
    bytes[56..60].copy_from_slice(&crc.to_le_bytes());
    if let Some(kept) = Kept::parse(&bytes, STREAM) {
        assert_eq!(kept.pack(STREAM), {
            bytes[60..].fill(0);
            bytes
        });
    }
}

const LEDGER: &str = r#"{"peers":[],"invitations":[]}"#;

pub(crate) fn trust_seeds() -> Vec<(String, Vec<u8>)> {
    let chain = dtloop_core::chain::Chain::begin(STREAM, 7);
    let kept = Kept { chain, since: 7 };
    let pin = Pin::of(b"a key");
    vec![
        (
            "code".into(),
            b"60RK4C-SM6MV3-EE1SC5-H66S35-85146H-258S3M-GJAAC8".to_vec(),
        ),
        ("pin".into(), pin.to_string().into_bytes()),
        ("ledger".into(), LEDGER.into()),
        ("chain".into(), kept.pack(STREAM).to_vec()),
    ]
}
