// SPDX-License-Identifier: GPL-2.0-only

//! What is no protocol, or not of this source, changes nothing and is answered with a reason.

#![expect(clippy::unwrap_used, reason = "a test")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use common::{Lab, Target};
use dtloop_proto::frame::{encode_message, encode_record};
use dtloop_proto::message::{DeviceOffer, Hello};
use dtloop_proto::record::STATE_COMMITTED;
use dtloop_proto::{Code, Decoded, Frame, Message, Op, RecordBody, RecordKind, Uuid, decode};

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        software: "test".into(),
        source_id: Uuid([7; 16]),
        set: "db".into(),
        stream_uuid: Uuid([8; 16]),
        generation: 1,
        first_seq: 1,
        next_seq: 100,
        devices: vec![DeviceOffer {
            device: 1,
            label: "vol".into(),
            sectors: 64,
            block_bytes: 512,
        }],
        options: vec![],
    }
}

struct Peer {
    stream: TcpStream,
    inbox: Vec<u8>,
    session: u64,
}

impl Peer {
    fn connect(target: &Target) -> Self {
        let stream = TcpStream::connect(target.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(30)))
            .unwrap();
        Self {
            stream,
            inbox: vec![],
            session: 0,
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        // The target may have closed already, which is what many of these tests are about.
        let _ = self.stream.write_all(bytes);
    }

    fn say(&mut self, message: &Message) {
        let mut bytes = vec![];
        encode_message(&mut bytes, self.session, 0, message).unwrap();
        self.send(&bytes);
    }

    /// The next message; `None` at the end of the connection.
    fn hear(&mut self) -> Option<Message> {
        loop {
            if let Ok(Decoded::Complete {
                frame: Frame::Message(message),
                bytes,
                ..
            }) = decode(&self.inbox)
            {
                self.inbox.drain(..bytes);
                return Some(message);
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) | Err(_) => return None,
                Ok(bytes) => self.inbox.extend_from_slice(&chunk[..bytes]),
            }
        }
    }

    fn enter(target: &Target) -> Self {
        let mut peer = Self::connect(target);
        peer.say(&Message::Hello(hello()));
        match peer.hear() {
            Some(Message::Welcome(welcome)) => peer.session = welcome.session,
            other => panic!("{other:?}"),
        }
        assert!(matches!(peer.hear(), Some(Message::Past(_))));
        peer
    }

    fn record(&self, seq: u64) -> Vec<u8> {
        let body = RecordBody {
            epoch: 0,
            start_sector: 0,
            time_ns: 0,
            aux: 0,
            sectors: 1,
            device: 1,
            flags: 0,
            op: Op::Write,
            state: STATE_COMMITTED,
        };
        let mut bytes = vec![];
        encode_record(
            &mut bytes,
            self.session,
            seq,
            RecordKind::Data,
            &body,
            &[9; 512],
        )
        .unwrap();
        bytes.extend_from_slice(&[9; 512]);
        bytes
    }

    /// How the target ends the connection.
    fn farewell(&mut self) -> Option<Code> {
        loop {
            match self.hear()? {
                Message::Refuse(refuse) | Message::Bye(refuse) => return Some(refuse.code),
                _ => {}
            }
        }
    }
}

#[test]
fn what_is_no_protocol_is_refused_with_its_reason() {
    let lab = Lab::new(64);
    let target = lab.start_target();
    let mut good = vec![];
    encode_message(&mut good, 0, 0, &Message::Hello(hello())).unwrap();

    let mut peer = Peer::connect(&target);
    peer.send(b"GET / HTTP/1.1\r\nHost: target.example\r\nAccept: */*\r\n\r\n");
    assert_eq!(peer.farewell(), Some(Code::MALFORMED));

    let mut peer = Peer::connect(&target);
    peer.say(&Message::Hello(Hello {
        version_min: 2,
        version_max: 9,
        ..hello()
    }));
    assert_eq!(peer.farewell(), Some(Code::VERSION));

    let mut peer = Peer::connect(&target);
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    peer.send(&damaged);
    assert_eq!(peer.farewell(), Some(Code::MALFORMED));

    let mut peer = Peer::connect(&target);
    let early = peer.record(1);
    peer.send(&early);
    assert_eq!(peer.farewell(), Some(Code::MALFORMED));

    let mut peer = Peer::connect(&target);
    peer.send(&good[..good.len() / 2]);
    drop(peer);
    assert!(
        !lab.target_dir()
            .join("sets")
            .read_dir()
            .unwrap()
            .any(|_| true),
        "nothing was kept"
    );
    assert!(
        !lab.target_dir()
            .join("volumes")
            .read_dir()
            .unwrap()
            .any(|_| true)
    );
}

#[test]
fn damage_and_holes_within_a_session_end_it_and_apply_nothing() {
    let lab = Lab::new(64);
    let target = lab.start_target();

    let mut peer = Peer::enter(&target);
    let mut damaged = peer.record(1);
    damaged[200] ^= 1;
    peer.send(&damaged);
    assert_eq!(peer.farewell(), Some(Code::MALFORMED));

    let mut peer = Peer::enter(&target);
    let ahead = peer.record(2);
    peer.send(&ahead);
    assert_eq!(peer.farewell(), Some(Code::SEQUENCE_HOLE));

    let mut peer = Peer::enter(&target);
    peer.session += 1;
    let foreign = peer.record(1);
    peer.send(&foreign);
    assert_eq!(peer.farewell(), Some(Code::MALFORMED));

    let mut peer = Peer::enter(&target);
    let record = peer.record(1);
    peer.send(&[&record[..], &record[..]].concat());
    loop {
        match peer.hear().unwrap() {
            Message::Ack(ack) if ack.applied_seq == 1 => break,
            Message::Ack(ack) => assert_eq!(ack.durable_seq, 1, "the duplicate is skipped"),
            other => panic!("{other:?}"),
        }
    }
    target.stop();
    assert_eq!(lab.saved().state.applied_seq, 1);
}

#[test]
fn an_older_state_of_the_source_is_refused() {
    let lab = Lab::new(64);
    let target = lab.start_target();
    drop(Peer::enter(&target));
    for (generation, stream) in [(0, 8), (1, 9)] {
        let mut peer = Peer::connect(&target);
        peer.say(&Message::Hello(Hello {
            generation,
            stream_uuid: Uuid([stream; 16]),
            ..hello()
        }));
        assert_eq!(peer.farewell(), Some(Code::OLDER_GENERATION));
    }
}

#[test]
fn a_newer_connection_ends_the_older_one() {
    let lab = Lab::new(64);
    let target = lab.start_target();
    let mut older = Peer::enter(&target);
    let mut newer = Peer::enter(&target);
    while older.hear().is_some() {}
    let record = newer.record(1);
    newer.send(&record);
    assert!(matches!(newer.hear(), Some(Message::Ack(ack)) if ack.durable_seq == 1));
}
