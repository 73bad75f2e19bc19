// SPDX-License-Identifier: GPL-2.0-only

use std::path::Path;

use dtloop_disk::SimDisk;

use super::*;
use crate::code::{PairingCode, Token};
use crate::key::Identity;
use crate::tls::{Expect, Known, source_config};

#[derive(Debug)]
struct Only(Vec<Pin>);

impl Known for Only {
    fn knows(&self, pin: &Pin) -> bool {
        self.0.contains(pin)
    }
}

fn identity(seed: u64) -> Identity {
    Identity::load_or_make(&SimDisk::new(seed), Path::new("/key")).unwrap()
}

/// Both ends, and what is on its way between them.
struct Pair {
    source: Tunnel,
    target: Option<Tunnel>,
    door: Door,
    tls: TargetTls,
    /// To the target, to the source.
    wires: [Vec<u8>; 2],
}

impl Pair {
    fn new(config: Arc<ClientConfig>, target: &Identity, known: Vec<Pin>) -> Self {
        Self {
            source: Tunnel::source(config).unwrap(),
            target: None,
            door: Door::default(),
            tls: TargetTls::new(target, Arc::new(Only(known))).unwrap(),
            wires: [vec![], vec![]],
        }
    }

    fn connected() -> Self {
        let (source, target) = (identity(1), identity(2));
        let config = source_config(&source, Expect::Pinned(target.pin()), REPLICATE).unwrap();
        let mut pair = Self::new(config, &target, vec![source.pin()]);
        pair.shake().unwrap();
        assert_eq!(pair.source.peer(), Some(target.pin()));
        assert_eq!(pair.target.as_ref().unwrap().peer(), Some(source.pin()));
        pair
    }

    fn flush(tunnel: &mut Tunnel, wire: &mut Vec<u8>) {
        while tunnel.wants_write() {
            tunnel.write_to(wire).unwrap();
        }
    }

    /// Moves everything once in both directions.
    fn step(&mut self) -> Result<(), TunnelError> {
        Self::flush(&mut self.source, &mut self.wires[0]);
        let wire = std::mem::take(&mut self.wires[0]);
        let mut plain = [0; 100];
        let mut taken = 0;
        if self.target.is_none() {
            match self.door.knock(&wire, &self.tls) {
                Ok((used, tunnel)) => (taken, self.target) = (used, tunnel),
                Err(refused) => {
                    self.source.open(&refused.alert, &mut plain)?;
                    return Err(refused.error);
                }
            }
        }
        if let Some(target) = &mut self.target {
            let result = target.open(&wire[taken..], &mut plain);
            Self::flush(target, &mut self.wires[1]);
            let wire = std::mem::take(&mut self.wires[1]);
            let heard = self.source.open(&wire, &mut plain);
            result?;
            heard?;
        }
        Ok(())
    }

    fn shake(&mut self) -> Result<(), TunnelError> {
        for _ in 0..4 {
            self.step()?;
        }
        assert!(!self.source.is_handshaking());
        assert!(!self.target.as_ref().unwrap().is_handshaking());
        Ok(())
    }

    fn ship(&mut self, data: &[u8]) -> Result<Vec<u8>, TunnelError> {
        let target = self.target.as_mut().unwrap();
        let (mut sealed, mut plain) = (0, vec![]);
        while sealed < data.len() {
            sealed += self.source.seal(&[IoSlice::new(&data[sealed..])])?;
            let mut wire = vec![];
            Self::flush(&mut self.source, &mut wire);
            let (mut at, mut buffer) = (0, vec![0; 5000]);
            loop {
                let opened = target.open(&wire[at..], &mut buffer)?;
                plain.extend_from_slice(&buffer[..opened.given]);
                at += opened.taken;
                if opened == Opened::default() {
                    break;
                }
            }
            assert_eq!(at, wire.len());
        }
        Ok(plain)
    }
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..bytes).map(|_| next()).collect()
}

#[test]
fn what_goes_in_comes_out() {
    let mut pair = Pair::connected();
    assert!(pair.source.replicates() && pair.target.as_ref().unwrap().replicates());
    for bytes in [1, 100, 16 << 10, (16 << 10) + 1, 3 << 20] {
        let data = noise(bytes);
        assert!(pair.ship(&data).unwrap() == data, "{bytes}");
        // New keys in the middle change nothing.
        pair.source.renew_keys().unwrap();
    }
    let target = pair.target.as_mut().unwrap();
    assert!(!target.is_closed());
    pair.source.close();
    pair.step().unwrap();
    assert!(pair.target.unwrap().is_closed());
}

#[test]
fn pieces_keep_their_order() {
    let mut pair = Pair::connected();
    let data = noise(300_000);
    let mut pieces: Vec<IoSlice<'_>> = data.chunks(997).map(IoSlice::new).collect();
    let mut pieces = &mut pieces[..];
    let mut plain = vec![0; data.len()];
    let mut given = 0;
    while !pieces.is_empty() {
        let sealed = pair.source.seal(pieces).unwrap();
        IoSlice::advance_slices(&mut pieces, sealed);
        let mut wire = vec![];
        Pair::flush(&mut pair.source, &mut wire);
        let opened = pair
            .target
            .as_mut()
            .unwrap()
            .open(&wire, &mut plain[given..])
            .unwrap();
        assert_eq!(opened.taken, wire.len());
        given += opened.given;
    }
    assert!(plain == data);
}

#[test]
fn outgoing_ciphertext_is_bounded() {
    let mut pair = Pair::connected();
    let data = vec![0; 8 << 20];
    let mut sealed = 0;
    loop {
        match pair.source.seal(&[IoSlice::new(&data)]).unwrap() {
            0 => break,
            bytes => sealed += bytes,
        }
    }
    assert!(
        sealed <= OUTGOING_BYTES_MAX && sealed > OUTGOING_BYTES_MAX / 2,
        "{sealed}"
    );
}

#[test]
fn a_source_that_is_not_known_ends_in_the_handshake() {
    let (source, target) = (identity(1), identity(2));
    let config = source_config(&source, Expect::Pinned(target.pin()), REPLICATE).unwrap();
    let mut pair = Pair::new(config, &target, vec![identity(3).pin()]);
    let error = (0..4).find_map(|_| pair.step().err());
    assert_eq!(error, Some(TunnelError::WrongKey), "the target's view");
    assert_eq!(pair.target.unwrap().peer(), None);
    // And the source was told.
    let mut plain = [0; 10];
    assert_eq!(
        pair.source.open(&[0], &mut plain),
        Err(TunnelError::NotKnown)
    );
}

#[test]
fn a_target_with_another_key_is_not_told_anything() {
    let (source, target, other) = (identity(1), identity(2), identity(3));
    let coded =
        |identity: &Identity| PairingCode::new(&identity.pin(), Token(*b"0123456789")).prefix;
    for (expect, protocol) in [
        (Expect::Pinned(other.pin()), REPLICATE),
        (Expect::Coded(coded(&other)), PAIR),
    ] {
        let config = source_config(&source, expect, protocol).unwrap();
        let mut pair = Pair::new(config, &target, vec![source.pin()]);
        pair.source.seal(&[IoSlice::new(b"secret")]).unwrap();
        let error = (0..4).find_map(|_| pair.step().err());
        assert_eq!(error, Some(TunnelError::WrongKey));
        assert_eq!(pair.source.peer(), None);
        assert_eq!(pair.target.unwrap().peer(), None);
    }
    let config = source_config(&source, Expect::Coded(coded(&target)), PAIR).unwrap();
    let mut pair = Pair::new(config, &target, vec![]);
    pair.shake().unwrap();
    assert!(pair.target.unwrap().pairs(), "a pairing needs no known key");
}

#[test]
fn a_stranger_cannot_pass_a_pairing_off_as_replication() {
    let (source, target) = (identity(1), identity(2));
    let mut config = source_config(&source, Expect::Pinned(target.pin()), PAIR).unwrap();
    Arc::make_mut(&mut config).alpn_protocols = vec![PAIR.to_vec(), REPLICATE.to_vec()];
    let mut pair = Pair::new(config, &target, vec![]);
    let error = (0..4).find_map(|_| pair.step().err());
    assert_eq!(error, Some(TunnelError::WrongKey));
    // Without any protocol it is no better.
    let mut config = source_config(&source, Expect::Pinned(target.pin()), PAIR).unwrap();
    Arc::make_mut(&mut config).alpn_protocols = vec![];
    let mut pair = Pair::new(config, &target, vec![]);
    assert!((0..4).find_map(|_| pair.step().err()).is_some());
}

#[test]
fn every_flipped_bit_ends_the_connection() {
    let data = noise(40);
    let mut probe = Pair::connected();
    probe.source.seal(&[IoSlice::new(&data)]).unwrap();
    let mut wire = vec![];
    Pair::flush(&mut probe.source, &mut wire);
    for at in 0..wire.len() {
        let mut pair = Pair::connected();
        pair.source.seal(&[IoSlice::new(&data)]).unwrap();
        let mut wire = vec![];
        Pair::flush(&mut pair.source, &mut wire);
        wire[at] ^= 1 << (at % 8);
        // A longer record waits for its rest, which is there.
        wire.resize(wire.len() + (64 << 10), 0);
        let mut plain = [0; 100];
        let opened = pair.target.as_mut().unwrap().open(&wire, &mut plain);
        // The two bytes of the version in a record's header carry nothing in TLS 1.3.
        let harmless = (1..3).contains(&at);
        assert!(
            opened.is_err() || harmless && plain[..40] == data[..],
            "byte {at}: {opened:?}"
        );
    }
}

#[test]
fn noise_is_refused_without_a_panic() {
    let target = identity(2);
    let tls = TargetTls::new(&target, Arc::new(Only(vec![]))).unwrap();
    for seed in 0..200 {
        let noise = &noise(3000)[seed..];
        let refused = Door::default().knock(noise, &tls).unwrap_err();
        assert!(!matches!(refused.error, TunnelError::WrongKey));
    }
    let config = source_config(&identity(1), Expect::Pinned(target.pin()), REPLICATE).unwrap();
    let mut source = Tunnel::source(config).unwrap();
    let refused = source.open(b"HTTP/1.0 400 Bad Request\r\n\r\n", &mut [0; 10]);
    assert_eq!(refused, Err(TunnelError::NotTls));
    // A plaintext source at this door.
    let refused = Door::default().knock(b"DTLP0123456789", &tls).unwrap_err();
    assert_eq!(refused.error, TunnelError::NotTls);
}
