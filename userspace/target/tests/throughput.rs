// SPDX-License-Identifier: GPL-2.0-only

//! How fast bytes go from a source's link to a target's connection, over loopback, in plaintext and through TLS. Run by hand:
//!
//! ```text
//! cargo test --release -p dtloop-target --test throughput -- --ignored --nocapture
//! ```

#![expect(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{IoSlice, Read};
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Instant;

use dtloop_agent::config::TransportKind;
use dtloop_agent::link::{Link, Nobody};
use dtloop_target::transport::Connection;
use dtloop_trust::tls::{Known, TargetTls};
use dtloop_trust::{Pin, Vault};

/// Bytes sent, in all.
const TOTAL: usize = 1 << 30;

/// Header and body of a record.
const HEAD: usize = 96;

#[derive(Debug)]
struct Everybody;

impl Known for Everybody {
    fn knows(&self, _: &Pin) -> bool {
        true
    }
}

/// MB per second, with batches as the agent makes them: 1 MiB, or 500 records.
fn rate(transport: TransportKind, payload: usize) -> f64 {
    let (source, target) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (source, target) = (Vault::new(source.path()), Vault::new(target.path()));
    let identity = target.identity().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let known = dtloop_trust::targets::Target {
        address: address.clone(),
        pin: identity.pin(),
        known_as: "a".into(),
        paired_unix_s: 0,
    };
    source
        .change_targets(|targets| targets.insert(known))
        .unwrap();
    let reading = std::thread::spawn(move || {
        let tls = TargetTls::new(&identity, Arc::new(Everybody)).unwrap();
        let tls = (transport == TransportKind::Tls).then_some(&tls);
        let mut connection = Connection::accept(listener.accept().unwrap().0, tls, &|| ()).unwrap();
        connection.expect_much();
        let (mut buffer, mut read) = (vec![0; 2 << 20], 0);
        loop {
            match connection.read(&mut buffer).unwrap() {
                0 => break,
                bytes => read += bytes,
            }
        }
        read
    });
    let mut link = Link::connect(&address, transport, &source, &mut Nobody).unwrap();
    let (head, body) = (vec![1; HEAD], vec![2; payload]);
    let records = ((1 << 20) / (payload + HEAD)).clamp(1, 500);
    let begin = Instant::now();
    let mut sent = 0;
    while sent < TOTAL {
        let mut pieces = Vec::with_capacity(records * 2);
        for _ in 0..records {
            pieces.extend([IoSlice::new(&head), IoSlice::new(&body)]);
        }
        link.send(&mut pieces, &mut Nobody).unwrap();
        sent += records * (payload + HEAD);
    }
    drop(link);
    let read = reading.join().unwrap();
    assert_eq!(read, sent);
    read as f64 / 1e6 / begin.elapsed().as_secs_f64()
}

#[test]
#[ignore = "a measurement"]
fn plaintext_and_tls() {
    for payload in [512, 4096, 16 << 10, 128 << 10, 1 << 20] {
        let best = |transport| (0..3).map(|_| rate(transport, payload)).fold(0.0, f64::max);
        let (plain, tls) = (best(TransportKind::Plaintext), best(TransportKind::Tls));
        println!(
            "records of {payload:>7} bytes: plaintext {plain:>6.0} MB/s, TLS {tls:>6.0} MB/s, ratio {:.2}",
            tls / plain
        );
    }
}
