// SPDX-License-Identifier: GPL-2.0-only

//! What the source has to do with the target's staging: it announces how much will be sent again, and carries an
//! operator's choice.

use dtloop_abi::CaptureStream;
use dtloop_api::StagingStatus;
use dtloop_core::mirror::JobKind;
use dtloop_proto::Message;
use dtloop_proto::message::{HandshakeOption, Marker, OPTION_IN_PLACE, StagingPhase};

use super::{End, Session, Worker};

impl Worker {
    /// Announces what a resync will send at least and at most: the dirty blocks as of now.
    pub(super) fn plan_resync(
        &self,
        stream: &dyn CaptureStream,
        session: &mut Session,
    ) -> Result<(), End> {
        let is_mirrored = |id: u32| {
            let mut memory = self.memory.devices.values();
            memory.any(|memory| memory.device == id && memory.mirrored)
        };
        for device in stream.devices()? {
            let bytes = device.dirty_blocks * u64::from(device.dirty_block_bytes);
            if bytes > 0 && is_mirrored(device.device_id) {
                Self::plan(session, device.device_id, bytes, bytes)?;
            }
        }
        Ok(())
    }

    /// Announces what a mirror will send. How much differs nobody knows before it was compared.
    pub(super) fn plan_mirror(&self, session: &mut Session, device: u32) -> Result<(), End> {
        let Some(planner) = &self.planner else {
            return Ok(());
        };
        let state = planner.state();
        let item = state.devices.iter().find(|item| item.device == device);
        let bytes = item.map_or(0, |item| {
            item.sectors
                .saturating_mul(dtloop_proto::limits::SECTOR_BYTES)
        });
        let least = if state.kind == JobKind::Full {
            bytes
        } else {
            0
        };
        Self::plan(session, device, least, bytes)
    }

    fn plan(session: &mut Session, device: u32, least: u64, most: u64) -> Result<(), End> {
        let marker = Message::Marker(Marker::Plan {
            device,
            least_bytes: least,
            most_bytes: most,
        });
        let position = session.core.next_to_send();
        session.outbox.message(session.id, position, &marker)?;
        Ok(())
    }

    /// The target reads nothing while it waits for room, so the choice goes with a new hello. A target that has nothing to
    /// give up lets it be.
    pub(super) fn choose_in_place(&mut self) -> u64 {
        self.in_place = true;
        0
    }

    pub(super) fn hello_options(&self) -> Vec<HandshakeOption> {
        let in_place = HandshakeOption {
            key: OPTION_IN_PLACE,
            value: vec![],
        };
        self.in_place.then_some(in_place).into_iter().collect()
    }

    pub(super) fn staging_status(&self) -> Option<StagingStatus> {
        let phase = match self.staging.phase {
            StagingPhase::Direct => return None,
            StagingPhase::Staged => "staged",
            StagingPhase::Publishing => "publishing",
        };
        Some(StagingStatus {
            phase: phase.to_owned(),
            staged_bytes: self.staging.staged_bytes,
            consistent_seq: self.staging.consistent_seq,
            consistent_unix_ms: self.staging.consistent_time_ns / 1_000_000,
        })
    }
}
