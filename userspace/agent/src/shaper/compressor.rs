// SPDX-License-Identifier: GPL-2.0-only

//! Compresses batches, and keeps account of what that costs and gains.

use std::time::{Duration, Instant};

use dtloop_abi::Hold;
use dtloop_core::adaptive::{Adaptive, Batch, Plan, Reason};
use dtloop_pack::{Method, Packer};
use dtloop_proto::message::HandshakeOption;
use dtloop_proto::packed::OPTION_CODECS;
use dtloop_proto::{Codec, Packed};

use crate::config::Compression;
use crate::ship::{Outbox, PAYLOAD_BYTES_MAX, ShipError};

/// What adaptive compression chooses from, the fastest first.
const METHODS: [Method; 4] = [
    Method::Lz4,
    Method::Zstd(1),
    Method::Zstd(3),
    Method::Zstd(9),
];

/// The level of `compression = "zstd"`: where its authors put the middle.
const ZSTD_LEVEL: i32 = 3;

/// A shorter batch is not worth a frame of its own.
const RAW_BYTES_MIN: usize = 1024;

/// Compressed and thrown away to learn what a method does to the data of the moment.
const SAMPLE_BYTES: usize = 64 << 10;

/// A batch is about a tenth of a second of the link, so that decisions come soon on a slow one.
const BATCHES_PER_S: u64 = 10;

/// The smallest batch: below, a compressor has too little to look back at.
const BATCH_BYTES_MIN: usize = 64 << 10;

/// The size of a batch until the link is known: a megabyte could be a minute of a slow one.
const BATCH_BYTES_FIRST: usize = 256 << 10;

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Compressor {
    configured: Compression,
    methods: Vec<Method>,
    adaptive: Adaptive,
    packer: Packer,
    raw: Vec<u8>,
    /// The method of the last batch that was worth one.
    current: Option<Method>,
    raw_bytes: u64,
    wire_bytes: u64,
    spent: Duration,
    /// When the batch before this one was sent, later by what was idle since.
    mark: Instant,
    batch: Batch,
    /// The batch that waits has its place in the account of adaptive compression.
    counts: bool,
}

impl Compressor {
    pub(super) fn new(configured: Compression) -> Self {
        Self {
            configured,
            methods: vec![],
            adaptive: Adaptive::new(0),
            packer: Packer::default(),
            raw: vec![],
            current: None,
            raw_bytes: 0,
            wire_bytes: 0,
            spent: Duration::ZERO,
            mark: dtloop_runtime::now(),
            batch: Batch::default(),
            counts: false,
        }
    }

    /// What the target unpacks; nothing is packed for one that does not say.
    pub(super) fn begin_session(&mut self, options: &[HandshakeOption]) {
        let codecs = options.iter().find(|option| option.key == OPTION_CODECS);
        let codecs = codecs.map_or(&[][..], |option| &option.value);
        let wanted: &[Method] = match self.configured {
            Compression::Adaptive => &METHODS,
            Compression::Zstd => &[Method::Zstd(ZSTD_LEVEL)],
            Compression::Lz4 => &[Method::Lz4],
            Compression::Off => &[],
        };
        let known = |method: &&Method| {
            let codec: Codec = method.codec();
            codecs.contains(&(codec as u8))
        };
        let methods: Vec<Method> = wanted.iter().filter(known).copied().collect();
        if methods != self.methods {
            self.adaptive = Adaptive::new(methods.len());
            self.methods = methods;
        }
        self.mark = dtloop_runtime::now();
        self.batch = Batch::default();
    }

    /// How large a batch should be.
    pub(super) fn batch_bytes(&self) -> usize {
        let Some(rate) = self.adaptive.raw_rate() else {
            let measures =
                self.configured == Compression::Adaptive && !self.adaptive.has_measured();
            return if measures {
                BATCH_BYTES_FIRST
            } else {
                PAYLOAD_BYTES_MAX
            };
        };
        let bytes = usize::try_from(rate / BATCHES_PER_S).unwrap_or(PAYLOAD_BYTES_MAX);
        bytes.clamp(BATCH_BYTES_MIN, PAYLOAD_BYTES_MAX)
    }

    fn plan(&mut self) -> Plan {
        match self.configured {
            _ if self.methods.is_empty() => Plan::Plain,
            Compression::Adaptive => self.adaptive.plan(),
            _ => Plan::Pack(0),
        }
    }

    /// Packs what waits, if it is to be packed and gets smaller by it. Messages that the target must act on before it
    /// has the records behind them do not go into a run, so a batch with one goes as it is.
    pub(super) fn pack(
        &mut self,
        outbox: &mut Outbox,
        session: u64,
        hold: Option<&Hold>,
    ) -> Result<(), ShipError> {
        let bytes = outbox.bytes();
        self.counts = bytes >= RAW_BYTES_MIN && !outbox.has_control();
        self.batch.raw += bytes as u64;
        self.raw_bytes += bytes as u64;
        if !self.counts {
            return Ok(());
        }
        let begin = dtloop_runtime::now();
        self.current = None;
        match self.plan() {
            Plan::Plain => return Ok(()),
            Plan::Sample(method) => {
                outbox.gather(hold, SAMPLE_BYTES, &mut self.raw)?;
                let begin = dtloop_runtime::now();
                let packed = self
                    .packer
                    .pack(self.methods[method], &self.raw, usize::MAX);
                let packed = packed.map_or(self.raw.len(), <[u8]>::len);
                let took = dtloop_runtime::elapsed(begin);
                self.adaptive
                    .on_sample(method, self.raw.len(), packed, took);
            }
            Plan::Pack(method) => {
                let method = self.methods[method];
                self.current = Some(method);
                outbox.gather(hold, usize::MAX, &mut self.raw)?;
                let limit = self.raw.len().min(PAYLOAD_BYTES_MAX);
                let packed = self
                    .packer
                    .pack(method, &self.raw, limit)
                    .map(|payload| Packed {
                        codec: method.codec(),
                        raw_bytes: self.raw.len(),
                        payload,
                    });
                // What is beyond a limit of the wire goes as it is.
                if let Some(packed) = packed {
                    outbox.set_packed(session, &packed);
                }
                self.batch.packing += dtloop_runtime::elapsed(begin);
            }
        }
        self.spent += dtloop_runtime::elapsed(begin);
        Ok(())
    }

    pub(super) fn on_sent(&mut self, wire: usize, blocked: Duration) {
        self.wire_bytes += wire as u64;
        self.batch.wire += wire as u64;
        self.batch.pressed += blocked;
        if !std::mem::take(&mut self.counts) {
            return;
        }
        self.batch.busy = dtloop_runtime::elapsed(self.mark);
        self.mark = dtloop_runtime::now();
        let batch = std::mem::take(&mut self.batch);
        if self.configured == Compression::Adaptive {
            self.adaptive.on_batch(&batch);
        }
    }

    pub(super) fn on_slept(&mut self, time: Duration, because_of_limit: bool) {
        if because_of_limit {
            self.batch.pressed += time;
        } else {
            self.mark += time;
            self.adaptive.on_idle(time);
        }
    }

    pub(super) fn report(&self) -> dtloop_api::Compression {
        let reason = match self.configured {
            Compression::Off => "by the configuration",
            _ if self.methods.is_empty() => "the target does not unpack it",
            Compression::Adaptive => self.adaptive.reason().text(),
            _ => "by the configuration",
        };
        let packs =
            self.configured != Compression::Adaptive || self.adaptive.reason() == Reason::Faster;
        let current = self.current.filter(|_| packs && !self.methods.is_empty());
        dtloop_api::Compression {
            configured: self.configured.name().to_owned(),
            current: current.map_or_else(|| "off".to_owned(), |method| method.to_string()),
            reason: reason.to_owned(),
            raw_bytes: self.raw_bytes,
            wire_bytes: self.wire_bytes,
            spent_ms: u64::try_from(self.spent.as_millis()).unwrap_or(u64::MAX),
        }
    }
}
