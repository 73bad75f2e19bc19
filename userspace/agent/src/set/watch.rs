// SPDX-License-Identifier: GPL-2.0-only

//! Alarms of the set's devices: writes past the module, and what the target noticed.

use std::sync::OnceLock;

use dtloop_abi::raw;
use dtloop_api::{AlarmStatus, Pass};
use dtloop_core::alarm::{self, Cause};
use dtloop_core::chain;
use dtloop_core::mirror::DeviceJob;
use dtloop_proto::Message;
use dtloop_proto::message::{Alarm, Marker};

use nix::sys::stat::{major, minor};

use super::{End, Session, Worker};
use crate::clock;
use crate::snapshot::unix_ms;

/// What an alarm says.
fn text(alarm: &alarm::Alarm) -> String {
    let since = clock::text(alarm.since_unix_ms);
    let cause = |cause: &Cause| match cause {
        Cause::Bypassed { sectors } => format!(
            "bypassed: {} bytes were written to the device behind it, past /dev/loop#",
            sectors.saturating_mul(raw::SECTOR_BYTES)
        ),
        Cause::WrittenBefore { sectors } => format!(
            "at least {} bytes were written to the device behind it between boot and attach",
            sectors.saturating_mul(raw::SECTOR_BYTES)
        ),
        Cause::ChainDiffers {
            seq,
            source,
            target,
        } => format!(
            "the target applied something else than what was sent: hash chain {} here, {} there, at record {seq}",
            chain::text(source),
            chain::text(target)
        ),
        Cause::Volume { text, .. } => text.clone(),
    };
    let causes: Vec<String> = alarm.causes.iter().map(cause).collect();
    format!("since {since}: {}", causes.join("; "))
}

/// Identifies the present boot of this machine.
fn boot_id() -> &'static str {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    BOOT_ID.get_or_init(|| {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        text.unwrap_or_default().trim().to_owned()
    })
}

/// A lower bound for the sectors that were written to the backing device since boot, before it was attached. Not more
/// than a bound: the device counts a write when it ends, the module when it begins.
fn written_before(device: &raw::DeviceStatus) -> u64 {
    let (major, minor) = (major(device.backing_dev), minor(device.backing_dev));
    let stat = std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat"));
    let count = |stat: String| stat.split_whitespace().nth(6)?.parse::<u64>().ok();
    let ours = [
        device.write_sectors,
        device.discard_sectors,
        device.tracked_sectors,
        device.bypass_sectors,
    ];
    let ours = ours
        .iter()
        .fold(0_u64, |sum, sectors| sum.saturating_add(*sectors));
    stat.ok().and_then(count).unwrap_or(0).saturating_sub(ours)
}

impl Worker {
    /// Looks at what the module counts. Called with every look at the devices, several times a second.
    pub(super) fn watch(&mut self, devices: &[raw::DeviceStatus]) {
        let mut is_news = false;
        for device in devices {
            self.watch_boot(device);
            self.distrust_bypassed(device);
            let new =
                self.memory
                    .on_bypass_count(device.device_id, device.bypass_sectors, unix_ms());
            is_news |= new;
            if new {
                tracing::error!(
                    "Set \"{}\": loop{} is bypassed: something wrote to {} directly, and the copy may differ. Find who does \
                     it, then run dtloop verify --repair --set {} {}.",
                    self.config.name,
                    device.loop_number(),
                    device.backing_name(),
                    self.config.name,
                    device.loop_number()
                );
            }
        }
        // Known from now on, whatever happens to this process. What is only more of it is kept within a second.
        if is_news {
            self.persist(true);
        }
    }

    /// Writes that were made before the module could see them leave only a count, which begins at 0 with the boot.
    fn watch_boot(&mut self, device: &raw::DeviceStatus) {
        let known = self.memory.devices.get(device.label());
        if known.is_none_or(|memory| memory.boot_id == boot_id()) {
            return;
        }
        let sectors = written_before(device);
        if self
            .memory
            .on_boot(device.device_id, boot_id(), sectors, unix_ms())
        {
            tracing::error!(
                "Set \"{}\": {} was written to between boot and its attach as loop{}, and the copy may differ. Attach it \
                 earlier; run dtloop verify --repair --set {} {}.",
                self.config.name,
                device.backing_name(),
                device.loop_number(),
                self.config.name,
                device.loop_number()
            );
        }
        self.persist(true);
    }

    /// The target noticed something about a volume.
    pub(super) fn on_target_alarm(&mut self, alarm: &Alarm) {
        let cause = Cause::Volume {
            number: alarm.number,
            text: alarm.text.clone(),
        };
        if self.memory.raise(alarm.device, unix_ms(), cause) {
            tracing::error!(
                "Set \"{}\", target {}: {}.",
                self.config.name,
                self.config.target,
                alarm.text
            );
            self.persist(true);
        }
    }

    /// A job is done with a device: an alarm that was there before it began is over if nothing is left.
    pub(super) fn settle_alarm(
        &mut self,
        session: &mut Session,
        item: &DeviceJob,
    ) -> Result<(), End> {
        let Some(alarm) = self.memory.settle_alarm(item) else {
            return Ok(());
        };
        tracing::info!(
            "Set \"{}\", volume \"{}\": the alarm {} is over; everything was compared since.",
            self.config.name,
            item.label,
            text(&alarm)
        );
        let position = session.core.next_to_send();
        if let Some(number) = alarm.volume_number() {
            let device = item.device;
            let marker = Message::Marker(Marker::Cleared { device, number });
            session.outbox.message(session.id, position, &marker)?;
        }
        self.renew_chain |= alarm
            .causes
            .iter()
            .any(|cause| matches!(cause, Cause::ChainDiffers { .. }));
        Ok(())
    }

    /// The alarm of a device as it is shown.
    pub(super) fn alarm_status(&self, device: &raw::DeviceStatus) -> Option<AlarmStatus> {
        let memory = self.memory.devices.get(device.label());
        let memory = memory.filter(|memory| memory.device == device.device_id);
        let alarm = memory?.alarm.as_ref()?;
        Some(AlarmStatus {
            since_unix_ms: alarm.since_unix_ms,
            text: text(alarm),
        })
    }

    /// How far the job is that may end the alarm.
    pub(super) fn verify_pass(&self, device: u32) -> Option<Pass> {
        let job = self.job.as_ref().filter(|_| self.planner.is_some())?;
        let mut items = job.state.devices.iter();
        let item = items.find(|item| item.device == device && !item.ended)?;
        Some(job.pass(item))
    }
}
