// SPDX-License-Identifier: GPL-2.0-only

//! The hash chain of the set: what goes into it, and what the target says to it. See `dtloop_core::chain`.
//!
//! The link behind the last acknowledged record is kept in a file, written before the record is released, so that the next
//! agent, which begins at a record that was not released, can go on with it. The file lives as long as the module's
//! ring: in memory, and it is never made durable. After a boot the stream, and with it the chain, is a new one.

use std::io::IoSlice;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dtloop_abi::{CaptureStream, Hold};
use dtloop_core::alarm::Cause;
use dtloop_core::chain::{self, Chain, KEPT_BYTES, Kept, Link, SourceChain};
use dtloop_core::replica::Proven;
use dtloop_core::source::Resumed;
use dtloop_disk::{Disk, DiskFile};
use dtloop_proto::message::{self, HandshakeOption, Marker, Proof, Welcome};
use dtloop_proto::{Message, RecordBody, RecordKind, Uuid};

use super::{End, Session, Worker};
use crate::ship::{Form, body_of};
use crate::snapshot::unix_ms;

/// How often the target is asked to prove what it applied, while there is something new.
const PROVE_EVERY: Duration = Duration::from_secs(1);

/// The set's chain, and how it is kept.
pub(super) struct ChainKeeper {
    pub(super) chain: SourceChain,
    disk: Arc<dyn Disk>,
    path: PathBuf,
    file: Option<Arc<dyn DiskFile>>,
    complained: bool,
    /// What the target was asked about and has not answered.
    asked: Option<(u64, Link)>,
    asked_at: Instant,
    answered: u64,
}

impl ChainKeeper {
    pub(super) fn new(disk: Arc<dyn Disk>, path: PathBuf) -> Self {
        Self {
            chain: SourceChain::default(),
            disk,
            path,
            file: None,
            complained: false,
            asked: None,
            asked_at: dtloop_runtime::now(),
            answered: 0,
        }
    }

    /// Keeps the file elsewhere.
    pub(super) fn move_to(&mut self, dir: &Path) {
        if let Some(name) = self.path.file_name() {
            self.path = dir.join(name);
        }
    }

    /// Takes up what the agent before left of this stream.
    pub(super) fn load(&mut self, stream_uuid: Uuid) {
        self.file = self.disk.open(&self.path, true).ok();
        let mut bytes = [0; KEPT_BYTES];
        let read = self.file.as_ref().map(|file| file.read_at(&mut bytes, 0));
        let kept = match read {
            Some(Ok(())) => Kept::parse(&bytes, stream_uuid),
            _ => None,
        };
        self.chain = SourceChain::new(kept);
    }

    /// Records up to this one will not be sent again. Before they are released.
    pub(super) fn keep(&mut self, stream_uuid: Uuid, acked: u64) {
        if !self.chain.on_ack(acked) {
            return;
        }
        let (Some(file), Some(kept)) = (&self.file, self.chain.kept()) else {
            return;
        };
        let packed = kept.pack(stream_uuid);
        let result = file.write_at(&mut [IoSlice::new(&packed)], 0);
        if let (Err(error), false) = (&result, self.complained) {
            tracing::warn!(
                "{} cannot be written: {error}; the hash chain begins anew with the next dtagent.",
                self.path.display()
            );
        }
        self.complained = result.is_err();
    }

    pub(super) fn forget(&mut self) {
        self.chain = SourceChain::default();
        self.asked = None;
        if let Some(file) = &self.file {
            // A chain that cannot be forgotten differs again, and is noticed again.
            let _ = file.set_bytes(0);
        }
    }
}

impl Worker {
    /// Keeps what only the next agent of this boot needs in that directory, instead of the one for state.
    #[must_use]
    pub fn with_run_dir(mut self, dir: &Path) -> Self {
        self.chain.move_to(dir);
        self
    }

    /// What of the past and of the chain is told to the target. To be durable before it is told.
    pub(super) fn past_options(&mut self) -> Vec<HandshakeOption> {
        if self.memory.offer_stream() {
            self.persist(true);
        }
        let lineage = self.memory.lineage.iter().flat_map(|uuid| uuid.0).collect();
        let mut options = vec![HandshakeOption {
            key: message::OPTION_LINEAGE,
            value: lineage,
        }];
        if !self.config.chain {
            options.push(HandshakeOption {
                key: message::OPTION_UNCHAINED,
                value: vec![],
            });
        }
        options
    }

    /// A record goes to the target, with this content.
    pub(super) fn on_content(
        &mut self,
        seq: u64,
        kind: RecordKind,
        body: &RecordBody,
        content: &[u8],
    ) {
        self.chain.chain.add(seq, kind, body, content);
        self.note_hash(seq, kind, content);
        self.trace_block(kind, body, content);
    }

    /// A session goes on behind record `durable`: so does the chain.
    pub(super) fn resume_chain(
        &mut self,
        stream: &dyn CaptureStream,
        welcome: &Welcome,
        resumed: Resumed,
        durable: u64,
    ) -> Result<(), End> {
        self.chain.asked = None;
        self.chain.answered = 0;
        let told = message::option(&welcome.options, message::OPTION_CHAIN);
        let target: Option<Link> = told.and_then(|value| value.try_into().ok());
        let Some(target) = target.filter(|_| self.config.chain) else {
            self.chain.forget();
            return Ok(());
        };
        let told = Chain {
            seq: durable,
            link: target,
        };
        if resumed != Resumed::Continues {
            // Nor must the next agent go on with what was kept.
            self.chain.forget();
            // Both sides begin anew here. What the target says is checked all the same.
            self.chain
                .chain
                .begin(Chain::begin(self.memory.stream_uuid, durable));
        }
        if told == Chain::begin(self.memory.stream_uuid, durable) {
            // It has just begun there, and this is not the first connection since: whoever made that did not live to keep it.
            self.chain.chain.begin(told);
        }
        self.catch_up(stream, durable)?;
        self.chain.chain.resume(durable);
        match self.chain.chain.at(durable) {
            Some(own) if own == told => self.on_equal(durable),
            Some(own) => {
                self.on_different(durable, own.link, target);
                self.chain.chain.begin(told);
            }
            None => self.chain.chain.begin(told),
        }
        Ok(())
    }

    /// Adds what a former agent sent and this one still has: everything that it had not kept the link of was not
    /// released, nor freed in the queue.
    fn catch_up(&mut self, stream: &dyn CaptureStream, durable: u64) -> Result<(), End> {
        while let Some(last) = self.chain.chain.last().filter(|last| last.seq < durable) {
            self.chain_stored(stream, last.seq + 1, durable)?;
            if self.chain.chain.last() == Some(last) {
                break;
            }
        }
        Ok(())
    }

    /// Adds records of the ring.
    pub(super) fn chain_held(&mut self, hold: &Hold, first: u64, last: u64) -> Result<(), End> {
        for seq in first..hold.end().min(last.saturating_add(1)) {
            let record = hold.record(seq)?;
            let body = body_of(&record.desc)?;
            let form = Form::of(&record.desc, &body, record.payload);
            let (kind, content) = form.parts(&body, record.payload);
            self.chain.chain.add(seq, kind, &body, content);
        }
        Ok(())
    }

    /// Asks the target to prove what it applied, if there is something new and nothing asked.
    pub(super) fn prove(&mut self, session: &mut Session) -> Result<(), End> {
        if self.chain.asked.is_some() || dtloop_runtime::elapsed(self.chain.asked_at) < PROVE_EVERY
        {
            return Ok(());
        }
        let position = session.core.next_to_send();
        let last = self.chain.chain.last();
        let Some(last) =
            last.filter(|last| last.seq + 1 == position && last.seq > self.chain.answered)
        else {
            return Ok(());
        };
        let marker = Marker::Prove { link: last.link };
        session
            .outbox
            .message(session.id, position, &Message::Marker(marker))?;
        self.chain.asked = Some((last.seq, last.link));
        self.chain.asked_at = dtloop_runtime::now();
        Ok(())
    }

    /// The target's answer.
    pub(super) fn on_proof(&mut self, proof: &Proof) {
        // An answer to what another session asked is nobody's.
        let Some((seq, link)) = self
            .chain
            .asked
            .filter(|asked| *asked == (proof.seq, proof.source))
        else {
            return;
        };
        self.chain.asked = None;
        self.chain.answered = seq;
        if link == proof.target {
            self.on_equal(seq);
        } else {
            self.on_different(seq, link, proof.target);
            // It begins anew with the next connection.
            self.chain.forget();
        }
    }

    fn on_equal(&mut self, seq: u64) {
        self.memory.proven = Some(Proven {
            seq,
            unix_ms: unix_ms(),
            since_seq: self.chain.chain.since(),
        });
    }

    fn on_different(&mut self, seq: u64, source: Link, target: Link) {
        tracing::error!(
            "Set \"{}\": up to record {seq} the target applied something else than what was sent: the hash chain is {} \
             here and {} there. Verify needed: run dtloop verify --repair --set {}.",
            self.config.name,
            chain::text(&source),
            chain::text(&target),
            self.config.name
        );
        let cause = Cause::ChainDiffers {
            seq,
            source,
            target,
        };
        let devices: Vec<u32> = self
            .memory
            .devices
            .values()
            .map(|memory| memory.device)
            .collect();
        for device in devices {
            self.memory.raise(device, unix_ms(), cause.clone());
        }
        self.persist(true);
    }
}
