// SPDX-License-Identifier: GPL-2.0-only

//! The hash chain over the records: both sides prove that they went through the same sequence.
//!
//! ```text
//! link(base) = H("DTLCHAIN" | stream uuid | base)
//! link(n)    = H(link(n - 1) | n | form | body | content)
//! ```
//!
//! `H` is XXH3-128, `body` the 48 bytes of the wire, and `form` with `content` what both sides know of the payload: 1 and
//! the `H` of the content if it travels or is all zero, 2 and the blake3 of the content for a record that travels as its
//! hash, 0 and nothing without a payload. So it does not matter whether zeroes travel as such, and a record that is sent
//! again after a restart of the agent gives the same link.
//!
//! The source computes it over what it takes from its ring, the target over what it **applied**: a record that was left
//! out, applied twice, out of order, or with another content on the way from the ring to the volume changes every link
//! behind it. The hash is made against faults, not against people (the connection is for that, see `PROTOCOL.md`): 128
//! bits, and cheap enough to be always on. Its cost is in `ARCHITECTURE.md`.

use std::collections::VecDeque;

use dtloop_proto::record::RECORD_BYTES;
use dtloop_proto::{RecordBody, RecordKind, Uuid};
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

/// One link: 128 bits.
pub type Link = [u8; dtloop_proto::limits::LINK_BYTES];

const TITLE: &[u8; 8] = b"DTLCHAIN";

/// Content of records that travel as zeroes. Takes no memory before it is read.
static ZEROES: [u8; dtloop_proto::limits::PAYLOAD_BYTES_MAX] =
    [0; dtloop_proto::limits::PAYLOAD_BYTES_MAX];

fn put(bytes: &mut [u8], at: &mut usize, value: &[u8]) {
    bytes[*at..*at + value.len()].copy_from_slice(value);
    *at += value.len();
}

/// The chain up to a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chain {
    /// The last record in it.
    pub seq: u64,
    /// Its link.
    #[serde(with = "link_text")]
    pub link: Link,
}

impl Chain {
    /// A chain that begins behind record `base` of a stream.
    #[must_use]
    pub fn begin(stream_uuid: Uuid, base: u64) -> Self {
        let (mut bytes, mut at) = ([0; 32], 0);
        put(&mut bytes, &mut at, TITLE);
        put(&mut bytes, &mut at, &stream_uuid.0);
        put(&mut bytes, &mut at, &base.to_le_bytes());
        Self {
            seq: base,
            link: xxh3_128(&bytes).to_le_bytes(),
        }
    }

    /// Adds the next record. `payload` is what travels: the content, nothing, or its hash.
    ///
    /// A record whose form and payload do not fit cannot get here: both are checked where it is decoded.
    pub fn add(&mut self, kind: RecordKind, body: &RecordBody, payload: &[u8]) {
        self.seq += 1;
        let (mut bytes, mut at) = ([0; 16 + 8 + 8 + RECORD_BYTES + 32], 0);
        put(&mut bytes, &mut at, &self.link);
        put(&mut bytes, &mut at, &self.seq.to_le_bytes());
        let content = match kind {
            RecordKind::Hash => None,
            RecordKind::Zeroes => {
                let length = usize::try_from(body.range_bytes()).unwrap_or(usize::MAX);
                Some(&ZEROES[..length.min(ZEROES.len())])
            }
            RecordKind::Data => Some(payload),
        };
        let form: u64 = match content {
            None => 2,
            Some([]) => 0,
            Some(_) => 1,
        };
        put(&mut bytes, &mut at, &form.to_le_bytes());
        put(&mut bytes, &mut at, &body.pack());
        match content {
            None => put(&mut bytes, &mut at, &payload[..payload.len().min(32)]),
            Some([]) => {}
            Some(content) => put(&mut bytes, &mut at, &xxh3_128(content).to_le_bytes()),
        }
        self.link = xxh3_128(&bytes[..at]).to_le_bytes();
    }
}

/// The source's side: links of the records that the target has not acknowledged yet are kept, because a new
/// connection may go on behind any of them. That is at most what is in flight, 16 bytes a record.
#[derive(Clone, Debug, Default)]
pub struct SourceChain {
    /// The record before the first of `links`, and its link.
    acked: Option<Chain>,
    links: VecDeque<Link>,
    /// The chain is unbroken since this record.
    since: u64,
}

impl SourceChain {
    /// Goes on with what a former agent left; `None`: nothing is known.
    #[must_use]
    pub fn new(kept: Option<Kept>) -> Self {
        Self {
            acked: kept.map(|kept| kept.chain),
            links: VecDeque::new(),
            since: kept.map_or(0, |kept| kept.since),
        }
    }

    /// Begins anew at this point.
    pub fn begin(&mut self, chain: Chain) {
        self.acked = Some(chain);
        self.links.clear();
        self.since = chain.seq;
    }

    /// The chain up to that record, if it is known.
    #[must_use]
    pub fn at(&self, seq: u64) -> Option<Chain> {
        let acked = self.acked?;
        let index = usize::try_from(seq.checked_sub(acked.seq)?).ok()?;
        let link = match index {
            0 => acked.link,
            index => *self.links.get(index - 1)?,
        };
        Some(Chain { seq, link })
    }

    /// The last record in it.
    #[must_use]
    pub fn last(&self) -> Option<Chain> {
        self.at(self.acked?.seq + self.links.len() as u64)
    }

    /// Adds the record behind the last one. One that is in it already changes nothing.
    pub fn add(&mut self, seq: u64, kind: RecordKind, body: &RecordBody, payload: &[u8]) {
        if let Some(mut chain) = self.last().filter(|last| last.seq + 1 == seq) {
            chain.add(kind, body, payload);
            self.links.push_back(chain.link);
        }
    }

    /// A connection goes on behind this record: what was sent beyond it is sent again, and added again.
    pub fn resume(&mut self, seq: u64) {
        if let Some(acked) = self.acked.filter(|acked| acked.seq <= seq) {
            let keep = usize::try_from(seq - acked.seq).unwrap_or(usize::MAX);
            self.links.truncate(keep);
        }
    }

    /// Records up to this one will not be sent again. True: there is something new to be kept.
    pub fn on_ack(&mut self, seq: u64) -> bool {
        let Some(chain) = self.at(seq) else {
            return false;
        };
        let done = self.acked.map_or(0, |acked| seq - acked.seq);
        self.links
            .drain(..usize::try_from(done).unwrap_or(0).min(self.links.len()));
        self.acked = Some(chain);
        done > 0
    }

    /// What the next agent needs.
    #[must_use]
    pub fn kept(&self) -> Option<Kept> {
        let chain = self.acked?;
        let since = self.since;
        Some(Kept { chain, since })
    }

    /// The record since which the chain is unbroken.
    #[must_use]
    pub fn since(&self) -> u64 {
        self.since
    }
}

/// What an agent leaves to the next one: the chain up to the last acknowledged record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// See above.
    pub chain: Chain,
    /// The chain is unbroken since this record.
    pub since: u64,
}

/// Size of a packed [`Kept`].
pub const KEPT_BYTES: usize = 64;

const KEPT_MAGIC: &[u8; 8] = b"DTLCHN01";

impl Kept {
    /// The bytes of it. It is written before every release, so it is small and of fixed size.
    #[must_use]
    pub fn pack(&self, stream_uuid: Uuid) -> [u8; KEPT_BYTES] {
        let (mut bytes, mut at) = ([0; KEPT_BYTES], 0);
        put(&mut bytes, &mut at, KEPT_MAGIC);
        put(&mut bytes, &mut at, &stream_uuid.0);
        put(&mut bytes, &mut at, &self.since.to_le_bytes());
        put(&mut bytes, &mut at, &self.chain.seq.to_le_bytes());
        put(&mut bytes, &mut at, &self.chain.link);
        let crc = crc32fast::hash(&bytes[..at]);
        put(&mut bytes, &mut at, &crc.to_le_bytes());
        bytes
    }

    /// Reads it; `None` if it is damaged, or of another stream.
    #[must_use]
    pub fn parse(bytes: &[u8; KEPT_BYTES], stream_uuid: Uuid) -> Option<Self> {
        let u64_at = |at: usize| {
            let mut value = [0; 8];
            value.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(value)
        };
        let crc = u32::from_le_bytes([bytes[56], bytes[57], bytes[58], bytes[59]]);
        let sound = bytes[..8] == *KEPT_MAGIC
            && bytes[8..24] == stream_uuid.0
            && crc == crc32fast::hash(&bytes[..56]);
        let mut link = Link::default();
        link.copy_from_slice(&bytes[40..56]);
        let chain = Chain {
            seq: u64_at(32),
            link,
        };
        sound.then(|| Self {
            chain,
            since: u64_at(24),
        })
    }
}

/// Reads and writes a link as hexadecimal digits.
pub mod link_text {
    use dtloop_proto::Uuid;
    use serde::{Deserializer, Serializer};

    use super::Link;

    /// For `#[serde(with)]`.
    ///
    /// # Errors
    ///
    /// Those of the serializer.
    pub fn serialize<S: Serializer>(link: &Link, serializer: S) -> Result<S::Ok, S::Error> {
        crate::uuid_text::serialize(&Uuid(*link), serializer)
    }

    /// For `#[serde(with)]`.
    ///
    /// # Errors
    ///
    /// If the text is no link.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Link, D::Error> {
        Ok(crate::uuid_text::deserialize(deserializer)?.0)
    }
}

/// A link as people see it.
#[must_use]
pub fn text(link: &Link) -> String {
    Uuid(*link).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use dtloop_proto::Op;
    use dtloop_proto::record::{STATE_COMMITTED, STATE_FAILED};
    use proptest::prelude::*;

    const STREAM: Uuid = Uuid([7; 16]);

    fn body(op: Op, sectors: u32) -> RecordBody {
        RecordBody {
            epoch: 1,
            start_sector: 64,
            time_ns: 5,
            aux: 0,
            sectors,
            device: 1,
            flags: 0,
            op,
            state: STATE_COMMITTED,
        }
    }

    fn of(records: &[(RecordKind, RecordBody, Vec<u8>)]) -> Chain {
        let mut chain = Chain::begin(STREAM, 10);
        for (kind, body, payload) in records {
            chain.add(*kind, body, payload);
        }
        chain
    }

    fn write(fill: u8) -> (RecordKind, RecordBody, Vec<u8>) {
        (RecordKind::Data, body(Op::Write, 1), vec![fill; 512])
    }

    #[test]
    fn the_construction_is_fixed() {
        let begin = Chain::begin(STREAM, 10);
        let one = of(&[write(1)]);
        let hash = (RecordKind::Hash, body(Op::Sync, 1), vec![3; 32]);
        let three = of(&[
            write(1),
            (RecordKind::Data, body(Op::Flush, 0), vec![]),
            hash,
        ]);
        assert_eq!([begin.seq, one.seq, three.seq], [10, 11, 13]);
        let links = [begin, one, three].map(|chain| text(&chain.link));
        assert_eq!(
            links,
            [
                "61d7183815f014acb6b8a04b2ab6852e",
                "486d74bdd76352c925f2f17726cb665b",
                "0cd8586075a58bdc85b58670bf50e70e"
            ]
        );
    }

    #[test]
    fn every_difference_changes_the_link() {
        let good = of(&[write(1), write(2)]);
        assert_ne!(good.link, of(&[write(2), write(1)]).link, "order");
        assert_ne!(good.link, of(&[write(1), write(3)]).link, "content");
        assert_ne!(good.link, of(&[write(1), write(2), write(2)]).link, "twice");
        assert_ne!(good.link, of(&[write(2)]).link, "left out");
        assert_ne!(good.link, Chain::begin(Uuid([8; 16]), 12).link, "stream");
        let base = body(Op::Write, 1);
        for changed in [
            RecordBody { epoch: 2, ..base },
            RecordBody {
                start_sector: 65,
                ..base
            },
            RecordBody { time_ns: 6, ..base },
            RecordBody { aux: 1, ..base },
            RecordBody { device: 2, ..base },
            RecordBody { flags: 1, ..base },
            RecordBody {
                op: Op::Sync,
                ..base
            },
            RecordBody {
                state: STATE_FAILED,
                ..base
            },
        ] {
            let other = of(&[write(1), (RecordKind::Data, changed, vec![2; 512])]);
            assert_ne!(good.link, other.link, "{changed:?}");
        }
    }

    #[test]
    fn zeroes_are_the_same_in_either_form() {
        let sync = body(Op::Sync, 16);
        let long = of(&[(RecordKind::Data, sync, vec![0; 8192])]);
        assert_eq!(long, of(&[(RecordKind::Zeroes, sync, vec![])]));
    }

    #[test]
    fn what_is_kept_is_checked() {
        let kept = Kept {
            chain: of(&[write(1)]),
            since: 10,
        };
        let bytes = kept.pack(STREAM);
        assert_eq!(Kept::parse(&bytes, STREAM), Some(kept));
        assert_eq!(Kept::parse(&bytes, Uuid([8; 16])), None);
        for at in 0..60 {
            let mut bytes = bytes;
            bytes[at] ^= 1;
            assert_eq!(Kept::parse(&bytes, STREAM), None, "byte {at}");
        }
    }

    proptest! {
        /// Whatever is acknowledged, cut, sent again and restarted: where the source knows a link, it is that of a target
        /// that applied every record once.
        #[test]
        fn the_source_agrees_with_who_applied_everything_once(steps in prop::collection::vec((0..5_u8, 0..8_u64), 1..80)) {
            let record = |seq: u64| write(u8::try_from(seq % 251).unwrap_or(0));
            let truth = |seq: u64| of(&(11..=seq).map(record).collect::<Vec<_>>());
            let mut source = SourceChain::default();
            source.begin(Chain::begin(STREAM, 10));
            let (mut sent, mut acked) = (10, 10);
            for (step, amount) in steps {
                match step {
                    0 | 1 => for _ in 0..amount {
                        sent += 1;
                        let (kind, body, payload) = record(sent);
                        source.add(sent, kind, &body, &payload);
                    },
                    2 => {
                        acked = (acked + amount).min(sent);
                        source.on_ack(acked);
                    }
                    3 => {
                        sent = (acked + amount).min(sent);
                        source.resume(sent);
                    }
                    _ => {
                        // A new agent, which sends again what was not acknowledged.
                        source = SourceChain::new(source.kept());
                        sent = acked;
                    }
                }
                prop_assert_eq!(source.last(), Some(truth(sent)));
                prop_assert_eq!(source.at(acked), Some(truth(acked)));
                prop_assert_eq!(source.at(sent + 1), None);
                prop_assert_eq!(source.since(), 10);
            }
        }
    }
}
