// SPDX-License-Identifier: GPL-2.0-only

//! What the set's thread does for requests of `dtloop`.

use dtloop_abi::{CaptureStream, raw};
use dtloop_api::{Connection, Failure, FailureCode};
use dtloop_core::mirror::{DeviceJob, JobKind};
use dtloop_proto::Code;

use super::{Command, PUBLISH_EVERY, Worker, lock};

impl Worker {
    pub(super) fn take_commands(&mut self, stream: Option<&dyn CaptureStream>) {
        loop {
            let Some(command) = lock(&self.shared.commands).pop_front() else {
                return;
            };
            self.notice_pairing();
            // Who asked may have gone.
            match command {
                Command::Start {
                    devices,
                    kind,
                    reply,
                } => drop(reply.send(self.start(stream, &devices, kind))),
                Command::Pause { paused, reply } => drop(reply.send(self.pause(paused))),
                Command::Stop { reply } => drop(reply.send(self.stop_job())),
                Command::Bandwidth { change, reply } => {
                    drop(reply.send(self.shaper.bandwidth(change.as_ref())));
                }
                Command::InPlace { reply } => drop(reply.send(Ok(self.choose_in_place()))),
                Command::Wait { reply } => drop(reply.send(self.wait_for(stream))),
            }
            self.published = dtloop_runtime::now() - PUBLISH_EVERY;
        }
    }

    pub(super) fn no_stream(&self) -> Failure {
        let reason = match &self.connection {
            Connection::Idle { reason } => reason.clone(),
            _ => "its stream is being opened".to_owned(),
        };
        Failure::new(
            FailureCode::UnknownDevice,
            format!("Set \"{}\" has no stream: {reason}.", self.config.name),
        )
    }

    pub(super) fn start(
        &mut self,
        stream: Option<&dyn CaptureStream>,
        numbers: &[u32],
        kind: JobKind,
    ) -> Result<u64, Failure> {
        let stream = stream.ok_or_else(|| self.no_stream())?;
        self.suspend_scheduled();
        if let Some(planner) = &self.planner {
            let message = format!(
                "Job {} is under way on set \"{}\"; wait for it, or stop it with dtloop mirror stop.",
                planner.state().id,
                self.config.name
            );
            return Err(Failure::new(FailureCode::Busy, message));
        }
        self.devices = stream
            .devices()
            .map_err(|error| Failure::new(FailureCode::Internal, error.to_string()))?;
        if let Some(number) = numbers
            .iter()
            .find(|number| !self.devices.iter().any(|d| d.loop_number() == **number))
        {
            let message = format!(
                "Set \"{}\" has no device loop{number}; dtloop status lists them.",
                self.config.name
            );
            return Err(Failure::new(FailureCode::UnknownDevice, message));
        }
        let wanted = |device: &&raw::DeviceStatus| {
            numbers.is_empty() || numbers.contains(&device.loop_number())
        };
        let chosen: Vec<_> = self.devices.iter().filter(wanted).collect();
        if chosen.is_empty() {
            let message = format!("No device is attached to set \"{}\".", self.config.name);
            return Err(Failure::new(FailureCode::UnknownDevice, message));
        }
        for device in &chosen {
            let refused = self
                .reports
                .iter()
                .find(|r| r.device == device.device_id && r.code != Code::OK);
            if let Some(report) = refused {
                return Err(Failure::new(
                    FailureCode::TargetRefused,
                    format!("{}.", report.text),
                ));
            }
        }
        if let Connection::Refused { reason } = &self.connection {
            return Err(Failure::new(
                FailureCode::TargetRefused,
                format!("{reason}."),
            ));
        }
        let item = |device: &&raw::DeviceStatus| {
            DeviceJob::new(device.device_id, device.label(), device.sectors)
        };
        let devices: Vec<DeviceJob> = chosen.iter().map(item).collect();
        if kind.is_mirror() {
            devices
                .iter()
                .for_each(|item| self.memory.decide(item.device));
        }
        Ok(self.start_job(stream, kind, devices, "an operator asked for it".to_owned()))
    }

    pub(super) fn nothing_to_do(&self) -> Failure {
        let message = format!("Nothing is under way on set \"{}\".", self.config.name);
        Failure::new(FailureCode::NothingToDo, message)
    }

    pub(super) fn pause(&mut self, paused: bool) -> Result<u64, Failure> {
        let Some(planner) = &mut self.planner else {
            return Err(self.nothing_to_do());
        };
        planner.pause(paused);
        let id = planner.state().id;
        self.persist(true);
        Ok(id)
    }

    pub(super) fn stop_job(&mut self) -> Result<u64, Failure> {
        let Some(planner) = &mut self.planner else {
            return Err(self.nothing_to_do());
        };
        planner.fail(super::STOPPED);
        let (id, is_mirror) = (planner.state().id, planner.state().kind.is_mirror());
        let items = planner.state().devices.clone();
        for item in items.iter().filter(|item| is_mirror && !item.ended) {
            // From here on the operator decides, not the agent.
            if let Some(memory) = self.memory.devices.get_mut(&item.label) {
                memory.mirrored = memory.mirrored && !item.begun;
                memory.mirrored_once = memory.mirrored;
                memory.wanted = false;
            }
        }
        self.persist(true);
        Ok(id)
    }

    pub(super) fn wait_for(&mut self, stream: Option<&dyn CaptureStream>) -> Result<u64, Failure> {
        let stream = stream.ok_or_else(|| self.no_stream())?;
        let seq = stream.ring().next_seq();
        if stream
            .devices()
            .is_ok_and(|devices| devices.iter().any(|device| device.dirty_blocks > 0))
        {
            self.resync.on_loss();
        }
        Ok(seq)
    }
}
