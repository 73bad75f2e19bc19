// SPDX-License-Identifier: GPL-2.0-only

//! Who may talk to whom, over loopback: the real agent and the real target, and peers that are neither.

#![expect(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{Agent, Faults, Lab, Target, free_port};
use dtloop_agent::config::TransportKind;
use dtloop_agent::link::{Link, LinkError, Nobody};
use dtloop_agent::pairing::{PairError, pair};
use dtloop_api::{Connection, MirrorKind, Outcome, Request};
use dtloop_proto::message::Pair;
use dtloop_proto::{Decoded, Frame, Message, frame};
use dtloop_target::transport::Connection as TargetConnection;
use dtloop_target::trust::now_unix_s;
use dtloop_trust::code::Token;
use dtloop_trust::tls::{Expect, Known, PAIR, REPLICATE, TargetTls, source_config};
use dtloop_trust::{PairingCode, Pin, Tunnel, Vault};

const SECTORS: u64 = 2048;

fn mirror() -> Request {
    Request::MirrorStart {
        set: "db".into(),
        devices: vec![],
        kind: MirrorKind::Full,
        follow: true,
    }
}

fn wait_refused(agent: &Agent, words: &str) {
    agent.wait_for(|status| {
        matches!(&status.connection, Connection::Refused { reason } if reason.contains(words))
    });
}

/// What a target has made for sources.
fn sets_of(lab: &Lab) -> usize {
    std::fs::read_dir(lab.target_dir().join("sets"))
        .unwrap()
        .count()
}

fn target_vault(lab: &Lab) -> Vault {
    Vault::new(&lab.target_dir())
}

/// What `dttarget invite` does.
fn invite(lab: &Lab, name: Option<&str>, lifetime_s: u64) -> PairingCode {
    let vault = target_vault(lab);
    let token = Token::draw().unwrap();
    let pin = vault.identity().unwrap().pin();
    vault
        .change_ledger(|ledger| ledger.invite(now_unix_s(), &token, name, lifetime_s))
        .unwrap()
        .unwrap();
    PairingCode::new(&pin, token)
}

/// The state of another machine.
fn machine() -> (tempfile::TempDir, Vault) {
    let dir = tempfile::tempdir().unwrap();
    let vault = Vault::new(dir.path());
    (dir, vault)
}

#[test]
fn paired_peers_replicate() {
    let lab = Lab::secure(SECTORS);
    lab.fill();
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror()).unwrap();
    let writer = lab.write_in_background(200);
    writer.join().unwrap();
    agent.wait_in_sync();
    lab.assert_identical();
    // After a restart of either side the same keys are there.
    agent.target.take().unwrap().kill();
    agent.target = Some(lab.start_target());
    lab.fill_some(1);
    agent.wait_in_sync();
    agent.stop();
    let target = lab.start_target();
    let mut agent = lab.start_agent_as_it_is(target.address);
    lab.fill_some(2);
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn a_pairing_lets_a_waiting_agent_in_without_a_restart_of_either_side() {
    let lab = Lab::secure(SECTORS);
    let target = lab.start_target();
    let address = target.address.to_string();
    let mut agent = lab.start_agent_as_it_is(target.address);
    wait_refused(&agent, "dtloop pair");
    assert_eq!(sets_of(&lab), 0);

    let code = invite(&lab, None, 900);
    let source = Vault::new(&lab.agent_dir());
    assert_eq!(pair(&source, &address, &code, "alpha").unwrap(), "alpha");
    agent.target = Some(target);
    agent.wait_for(|status| matches!(status.connection, Connection::Connected { .. }));
    agent.request(&mirror()).unwrap();
    agent.wait_in_sync();
    lab.assert_identical();
    let ledger = target_vault(&lab).ledger().unwrap();
    assert!(ledger.peers()[0].source_id.is_some());

    // The same code again on the same machine says the same, on another one it is used up.
    assert_eq!(pair(&source, &address, &code, "other").unwrap(), "alpha");
    let (_dir, other) = machine();
    let error = pair(&other, &address, &code, "beta").unwrap_err();
    assert!(
        matches!(&error, PairError::Refused(text) if text.contains("used or expired")),
        "{error}"
    );
    assert!(other.targets().unwrap().all().is_empty());
    agent.stop();
}

#[test]
fn codes_that_are_wrong_say_so_and_change_nothing() {
    let lab = Lab::secure(SECTORS);
    let target = lab.start_target();
    let address = target.address.to_string();
    let (_dir, source) = machine();
    let code = invite(&lab, Some("given"), 900);
    let refused = |code: &PairingCode| {
        let error = pair(&source, &address, code, "alpha").unwrap_err();
        assert!(source.targets().unwrap().all().is_empty());
        error
    };
    // A code of another target: the token is not even sent.
    let mut elsewhere = code;
    elsewhere.prefix[14] ^= 1;
    assert!(matches!(refused(&elsewhere), PairError::WrongTarget(_)));
    // Guesses: after some of them the invitation is void.
    let mut guess = code;
    for try_ in 1..=5 {
        guess.token.0[9] = code.token.0[9] ^ try_;
        assert!(matches!(refused(&guess), PairError::Refused(_)));
    }
    assert!(matches!(refused(&code), PairError::Refused(_)));
    // One whose time is over.
    let code = invite(&lab, None, 1);
    let made = now_unix_s();
    while now_unix_s() <= made + 1 {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(matches!(refused(&code), PairError::Refused(text) if text.contains("expired")));
    // The name in the invitation is the one that counts, and an invitation survives a restart of the target.
    let code = invite(&lab, Some("given"), 900);
    target.kill();
    let _target = lab.start_target();
    assert_eq!(pair(&source, &address, &code, "alpha").unwrap(), "given");
}

#[test]
fn of_sources_that_race_for_a_code_one_wins() {
    let lab = Lab::secure(SECTORS);
    let target = lab.start_target();
    let address = target.address.to_string();
    let code = invite(&lab, None, 900);
    let racers: Vec<_> = (0..5)
        .map(|index| {
            let address = address.clone();
            std::thread::spawn(move || {
                let (_dir, source) = machine();
                pair(&source, &address, &code, &format!("racer-{index}")).is_ok()
            })
        })
        .collect();
    let won = racers
        .into_iter()
        .map(|racer| usize::from(racer.join().unwrap()));
    assert_eq!(won.sum::<usize>(), 1);
    assert_eq!(target_vault(&lab).ledger().unwrap().peers().len(), 1);
}

#[test]
fn an_unpaired_source_ends_in_the_handshake() {
    let lab = Lab::secure(SECTORS);
    let target = lab.start_target();
    // It knows the target's key, the target does not know its own.
    lab.trust_target(
        &target.address.to_string(),
        target_vault(&lab).identity().unwrap().pin(),
    );
    let agent = lab.start_agent_as_it_is(target.address);
    wait_refused(&agent, "does not know this machine");
    assert_eq!(sets_of(&lab), 0);
    agent.stop();
}

#[test]
fn a_target_with_another_key_gets_nothing() {
    let lab = Lab::secure(SECTORS);
    let target = lab.start_target();
    lab.pair_at(&target.address.to_string());
    lab.trust_target(&target.address.to_string(), Pin::of(b"another"));
    let agent = lab.start_agent_as_it_is(target.address);
    wait_refused(&agent, "another key");
    assert_eq!(sets_of(&lab), 0);
    agent.stop();
}

#[test]
fn plaintext_and_tls_do_not_meet() {
    // A source in plaintext at a target with TLS.
    let mut lab = Lab::secure(SECTORS);
    let target = lab.start_target();
    lab.tls = false;
    let agent = lab.start_agent_as_it_is(target.address);
    agent.wait_for(|status| {
        matches!(&status.connection, Connection::Connecting { reason, .. } if reason.contains("closed the connection"))
    });
    agent.stop();
    target.stop();
    // And the other way round.
    let target = lab.start_target();
    lab.tls = true;
    lab.pair_at(&target.address.to_string());
    let agent = lab.start_agent_as_it_is(target.address);
    agent.wait_for(|status| {
        matches!(&status.connection, Connection::Connecting { reason, .. } if reason.contains("does not speak TLS"))
    });
    agent.stop();
    // Plaintext to anywhere else is not even begun.
    let (_dir, vault) = machine();
    let link = Link::connect(
        "192.0.2.1:7788",
        TransportKind::Plaintext,
        &vault,
        &mut Nobody,
    );
    assert!(matches!(link, Err(LinkError::Open(_))));
}

#[test]
fn tls_1_2_is_refused() {
    let lab = Lab::secure(SECTORS);
    let target = lab.start_target();
    let mut stream = TcpStream::connect(target.address).unwrap();
    stream.write_all(&client_hello_of_tls_1_2()).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    let mut answer = vec![];
    stream.read_to_end(&mut answer).unwrap();
    // An alert, fatal, protocol_version.
    assert_eq!(
        (answer[0], &answer[5..]),
        (21, &[2, 70][..]),
        "{answer:02x?}"
    );
}

/// What a client says that knows nothing newer.
fn client_hello_of_tls_1_2() -> Vec<u8> {
    // signature_algorithms: ecdsa_secp256r1_sha256, rsa_pkcs1_sha256; supported_groups: x25519.
    let extensions = [
        &[0, 13, 0, 6, 0, 4, 4, 3, 4, 1][..],
        &[0, 10, 0, 4, 0, 2, 0, 29],
        &[0, 11, 0, 2, 1, 0],
    ]
    .concat();
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.push(0);
    // TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 and the one with RSA; no compression.
    body.extend([0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    body.extend(extensions);
    let length = u16::try_from(body.len()).unwrap();
    let mut record = vec![22, 3, 1];
    record.extend((length + 4).to_be_bytes());
    record.extend([1, 0]);
    record.extend(length.to_be_bytes());
    record.extend(body);
    record
}

#[test]
fn a_revocation_cuts_a_live_connection() {
    // Nothing here waits for the next attempt.
    let mut lab = Lab::secure(SECTORS);
    lab.retry_ms_max = 600_000;
    let target = lab.start_target();
    let mut agent = lab.start_agent_to(target.address);
    agent.request(&mirror()).unwrap();
    lab.fill_some(1);
    agent.wait_in_sync();
    // Another process, as the command is one.
    target_vault(&lab)
        .change_ledger(|ledger| ledger.revoke("alpha"))
        .unwrap()
        .unwrap();
    wait_refused(&agent, "does not know this machine");
    // What is written now does not arrive.
    let before = std::fs::read(lab.saved_dir().join("state")).unwrap();
    lab.fill_some(2);
    wait_refused(&agent, "does not know this machine");
    drop(before);
    // Paired again, it goes on.
    let code = invite(&lab, None, 900);
    let source = Vault::new(&lab.agent_dir());
    pair(&source, &target.address.to_string(), &code, "alpha").unwrap();
    // Whoever asks from now on is not told of the refusal.
    let wait = Request::Wait {
        set: "db".into(),
        timeout_ms: Some(60_000),
    };
    agent.request(&wait).unwrap();
    lab.assert_identical();
    agent.target = Some(target);
    agent.stop();
}

#[test]
fn a_source_belongs_to_its_key() {
    let lab = Lab::secure(SECTORS);
    let mut agent = lab.start_agent(lab.start_target());
    agent.request(&mirror()).unwrap();
    agent.wait_in_sync();
    let target = agent.target.take().unwrap();
    agent.stop();
    // Another machine that was paired in its own right says that it is this source.
    let address = target.address.to_string();
    let first = lab.agent_dir().join("trust");
    std::fs::rename(&first, lab.agent_dir().join("first")).unwrap();
    let source = Vault::new(&lab.agent_dir());
    pair(&source, &address, &invite(&lab, None, 900), "beta").unwrap();
    let agent = lab.start_agent_as_it_is(target.address);
    wait_refused(&agent, "belongs to the key of \"alpha\"");
    // The machine was given up, and this one is to go on in its place.
    target_vault(&lab)
        .change_ledger(|ledger| ledger.revoke("alpha"))
        .unwrap()
        .unwrap();
    lab.fill_some(3);
    let mut agent = agent;
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

#[test]
fn bits_flipped_and_connections_cut_on_the_way_lose_nothing() {
    let lab = Lab::secure(SECTORS * 4);
    lab.fill();
    let target = lab.start_target();
    let faults = Faults::new(target.address, 5);
    let mut agent = lab.start_agent_to(faults.address);
    agent.target = Some(target);
    agent.request(&mirror()).unwrap();
    faults.flip_often();
    let mut round = 0;
    let deadline = Instant::now() + Duration::from_secs(120);
    while faults.cuts() < 12 {
        assert!(Instant::now() < deadline, "only {} faults", faults.cuts());
        if faults.cuts() > 6 {
            faults.cut_often();
        }
        lab.fill_some(round);
        round += 1;
        std::thread::sleep(Duration::from_millis(5));
    }
    faults.heal();
    agent.wait_in_sync();
    lab.assert_identical();
    let verify = Request::Verify {
        set: "db".into(),
        devices: vec![],
        repair: false,
        follow: true,
    };
    let Ok(Outcome::Verify(found)) = agent.request(&verify) else {
        panic!("verify failed");
    };
    assert!(found[0].is_identical());
    agent.stop();
}

#[derive(Debug)]
struct Everybody;

impl Known for Everybody {
    fn knows(&self, _: &Pin) -> bool {
        true
    }
}

/// A connection that the target's side has accepted, and the source's end of it.
fn accepted() -> (TargetConnection, TcpStream, Tunnel) {
    let ((_a, source), (_b, target)) = (machine(), machine());
    let (source, target) = (source.identity().unwrap(), target.identity().unwrap());
    let tls = TargetTls::new(&target, Arc::new(Everybody)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    let accepting =
        std::thread::spawn(move || TargetConnection::accept(accepted, Some(&tls), &|| ()).unwrap());
    let config = source_config(&source, Expect::Pinned(target.pin()), REPLICATE).unwrap();
    let mut tunnel = Tunnel::source(config).unwrap();
    shake(&mut tunnel, &mut stream);
    (accepting.join().unwrap(), stream, tunnel)
}

fn flush(tunnel: &mut Tunnel, stream: &mut TcpStream) {
    while tunnel.wants_write() {
        tunnel.write_to(stream).unwrap();
    }
}

fn shake(tunnel: &mut Tunnel, stream: &mut TcpStream) {
    let mut buffer = [0; 4096];
    while tunnel.is_handshaking() {
        flush(tunnel, stream);
        let bytes = stream.read(&mut buffer).unwrap();
        assert!(bytes > 0, "it was ended");
        tunnel.open(&buffer[..bytes], &mut []).unwrap();
    }
    flush(tunnel, stream);
}

#[test]
fn an_end_without_a_farewell_is_a_cut() {
    for says_farewell in [true, false] {
        let (mut target, mut stream, mut tunnel) = accepted();
        tunnel.seal(&[IoSlice::new(b"some bytes")]).unwrap();
        flush(&mut tunnel, &mut stream);
        if says_farewell {
            tunnel.close();
            flush(&mut tunnel, &mut stream);
        }
        stream.shutdown(Shutdown::Write).unwrap();
        let mut buffer = [0; 100];
        assert_eq!(target.read(&mut buffer).unwrap(), 10);
        let end = target.read(&mut buffer).map_err(|error| error.kind());
        let expected = if says_farewell {
            Ok(0)
        } else {
            Err(std::io::ErrorKind::UnexpectedEof)
        };
        assert_eq!(end, expected);
    }
}

#[test]
fn the_agent_tells_a_cut_from_a_farewell() {
    for says_farewell in [true, false] {
        let ((_a, source), (_b, target)) = (machine(), machine());
        let identity = target.identity().unwrap();
        let tls = TargetTls::new(&identity, Arc::new(Everybody)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serving = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let other = stream.try_clone().unwrap();
            let connection = TargetConnection::accept(stream, Some(&tls), &|| ()).unwrap();
            if says_farewell {
                connection.dismiss();
            }
            other.shutdown(Shutdown::Both).ok();
        });
        let known = dtloop_trust::targets::Target {
            address: address.to_string(),
            pin: identity.pin(),
            known_as: "a".into(),
            paired_unix_s: 0,
        };
        source
            .change_targets(|targets| targets.insert(known))
            .unwrap();
        let mut link = Link::connect(
            &address.to_string(),
            TransportKind::Tls,
            &source,
            &mut Nobody,
        )
        .unwrap();
        let end = link
            .expect_message(Duration::from_secs(30), &mut Nobody)
            .unwrap_err();
        assert!(
            matches!(
                (says_farewell, &end),
                (true, LinkError::Closed) | (false, LinkError::Cut)
            ),
            "{end}"
        );
        drop(link);
        serving.join().unwrap();
    }
}

/// Sends bytes to a target and gives what came back until it closed.
fn answer_to(target: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(target).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    stream.write_all(bytes).ok();
    let mut answer = vec![];
    stream.read_to_end(&mut answer).ok();
    answer
}

#[test]
fn strangers_learn_nothing_and_do_not_stop_others() {
    let lab = Lab::secure(SECTORS);
    let target = lab.start_target();
    // Many that connect and say nothing, or half a greeting.
    let mut idle: Vec<TcpStream> = (0..60)
        .map(|index| {
            let mut stream = TcpStream::connect(target.address).unwrap();
            if index % 2 == 0 {
                stream.write_all(&client_hello_of_tls_1_2()[..20]).unwrap();
            }
            stream
        })
        .collect();
    let mut agent = lab.start_agent_to(target.address);
    agent.request(&mirror()).unwrap();
    agent.wait_in_sync();
    // All but those that one address may have had to go at once, the others when their time was over.
    for stream in &mut idle {
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        assert_eq!(stream.read(&mut [0; 10]).unwrap_or(0), 0);
    }
    // Noise is answered by nothing but an alert.
    for noise in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[0; 5000], &[0x16; 100_000]] {
        assert!(answer_to(target.address, noise).len() <= 7);
    }
    // A stranger that may speak, as pairs do, is told nothing and can do nothing.
    let (_dir, vault) = machine();
    let identity = vault.identity().unwrap();
    let pin = target_vault(&lab).identity().unwrap().pin();
    let config = source_config(&identity, Expect::Pinned(pin), PAIR).unwrap();
    let says = |message: &Message| {
        let mut tunnel = Tunnel::source(Arc::clone(&config)).unwrap();
        let mut stream = TcpStream::connect(target.address).unwrap();
        shake(&mut tunnel, &mut stream);
        let mut bytes = vec![];
        frame::encode_message(&mut bytes, 0, 0, message).unwrap();
        tunnel.seal(&[IoSlice::new(&bytes)]).unwrap();
        flush(&mut tunnel, &mut stream);
        let (mut wire, mut plain) = (vec![], vec![0; 10_000]);
        stream.read_to_end(&mut wire).unwrap();
        let opened = tunnel.open(&wire, &mut plain).unwrap();
        let Ok(Decoded::Complete {
            frame: Frame::Message(Message::Refuse(refuse)),
            ..
        }) = dtloop_proto::decode(&plain[..opened.given])
        else {
            panic!("no refusal");
        };
        refuse.text
    };
    let pair = Pair {
        software: "x".into(),
        name: "alpha".into(),
        token: [0; 10],
        options: vec![],
    };
    for text in [
        says(&Message::Pair(pair)),
        says(&Message::Ping(1)),
        says(&hello()),
    ] {
        assert!(!text.contains("vol") && !text.contains("alpha"), "{text}");
    }
    assert_eq!(target_vault(&lab).ledger().unwrap().peers().len(), 1);
    lab.fill_some(9);
    agent.wait_in_sync();
    lab.assert_identical();
    agent.stop();
}

fn hello() -> Message {
    Message::Hello(dtloop_proto::message::Hello {
        version_min: 1,
        version_max: 1,
        software: "x".into(),
        source_id: dtloop_proto::Uuid([1; 16]),
        set: "db".into(),
        stream_uuid: dtloop_proto::Uuid([2; 16]),
        generation: 1,
        first_seq: 1,
        next_seq: 1,
        devices: vec![],
        options: vec![],
    })
}

#[test]
fn the_real_program_invites_lists_and_revokes_while_it_serves() {
    let lab = Lab::secure(SECTORS);
    let port = free_port();
    let program = Target::program(&lab, port);
    let config = lab.target_dir().parent().unwrap().join("dttarget.toml");
    let dttarget = |arguments: &[&str]| -> String {
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_dttarget"))
            .arg("--config")
            .arg(Path::new(&config))
            .args(arguments)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    };
    let code: PairingCode = dttarget(&["invite", "--expires", "2m"])
        .trim()
        .parse()
        .unwrap();
    let address = format!("127.0.0.1:{port}");
    let source = Vault::new(&lab.agent_dir());
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match pair(&source, &address, &code, "alpha") {
            Ok(_) => break,
            // It may still be starting.
            Err(error @ PairError::Link { .. }) => {
                assert!(Instant::now() < deadline, "{error}");
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => panic!("{error}"),
        }
    }
    let mut agent = lab.start_agent_as_it_is(address.parse().unwrap());
    agent.request(&mirror()).unwrap();
    lab.fill();
    agent.wait_in_sync();
    let peers: serde_json::Value = serde_json::from_str(&dttarget(&["peers", "--json"])).unwrap();
    let pin = source.identity().unwrap().pin().to_string();
    assert_eq!(peers["peers"][0]["name"], "alpha");
    assert_eq!(peers["peers"][0]["key"], pin.as_str());
    assert!(dttarget(&["peers"]).contains("alpha"));
    let other: PairingCode = dttarget(&["invite"]).trim().parse().unwrap();
    assert!(dttarget(&["invite", "--withdraw"]).starts_with('1'));
    let (_dir, stranger) = machine();
    assert!(pair(&stranger, &address, &other, "beta").is_err());
    dttarget(&["revoke", "alpha"]);
    wait_refused(&agent, "does not know this machine");
    lab.assert_identical();
    agent.stop();
    program.terminate();
}
