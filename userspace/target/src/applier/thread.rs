// SPDX-License-Identifier: GPL-2.0-only

//! The thread of an applier: takes commands in their order, waits where something fails, drains when it is idle.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use std::time::Duration;

use dtloop_core::binding::Refusal;

use super::{Applier, Batch, Command, Complaint, OpenError, Pause};
use crate::outlet::Part;

/// Pause before something that failed is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Longest wait before the applier looks whether a checkpoint is due or asked for.
const TICK: Duration = Duration::from_millis(200);

/// While it waits for a disk, the source hears that it lives. Longer than its time to a ping, so that it pings as well
/// and is heard itself.
const ALIVE_EVERY: Duration = Duration::from_secs(7);

struct Thread<'a> {
    applier: Applier,
    commands: &'a Receiver<Command>,
    buffers: &'a Sender<Batch>,
    /// Commands taken from the channel, oldest first.
    queue: VecDeque<Command>,
    complained: Option<Complaint>,
    alive_told: Duration,
}

/// Whether to go on.
#[derive(PartialEq, Eq)]
enum Go {
    On,
    End,
}

/// Works until it is stopped.
///
/// # Errors
///
/// If the set can no longer be applied.
pub fn run(
    applier: Applier,
    commands: &Receiver<Command>,
    buffers: &Sender<Batch>,
) -> Result<(), OpenError> {
    let mut thread = Thread {
        applier,
        commands,
        buffers,
        queue: VecDeque::new(),
        complained: None,
        alive_told: Duration::ZERO,
    };
    while !thread.is_abandoned() {
        let turned = thread.turn();
        match turned {
            Ok(Go::On) => {}
            Ok(Go::End) => return Ok(()),
            Err(Pause::Again) => {}
            Err(Pause::Blocked(complaint)) => {
                if thread.bear(complaint) == Go::End {
                    return Ok(());
                }
            }
            Err(Pause::Fatal(error)) => return Err(error),
        }
    }
    Ok(())
}

impl Thread<'_> {
    fn is_abandoned(&self) -> bool {
        self.applier.parts.flags.abandon.load(Ordering::Relaxed)
    }

    /// One command, a checkpoint if it is due, some of the drain.
    fn turn(&mut self) -> Result<Go, Pause> {
        if self.queue.is_empty() && !self.fetch()? {
            return Ok(Go::End);
        }
        if self.is_abandoned() {
            return Ok(Go::End);
        }
        if let Some(command) = self.queue.pop_front() {
            match self.carry_out(command) {
                Ok(Go::On) => {}
                other => return other,
            }
        }
        if self.applier.is_checkpoint_due() {
            self.applier.checkpoint()?;
            self.applier.parts.outlet.send_ack();
        }
        self.applier.drain()?;
        self.applier.tell_staging_if_due();
        self.relent();
        Ok(Go::On)
    }

    /// Waits for a command, unless there is something to be drained. False: there will be none any more.
    fn fetch(&mut self) -> Result<bool, Pause> {
        let wait = if self.applier.drain()? {
            Duration::ZERO
        } else {
            TICK
        };
        match dtloop_runtime::receive_timeout(self.commands, wait) {
            Ok(command) => self.queue.push_back(command),
            Err(RecvTimeoutError::Timeout) => self.applier.watch_volumes(),
            Err(RecvTimeoutError::Disconnected) => self.queue.push_back(Command::Stop),
        }
        Ok(true)
    }

    fn carry_out(&mut self, command: Command) -> Result<Go, Pause> {
        match command {
            Command::Batch(mut batch) => {
                let began = self.applier.parts.clock.now();
                if let Err(pause) = self.applier.apply(&batch) {
                    self.queue.push_front(Command::Batch(batch));
                    return Err(pause);
                }
                self.applier.note_speed(&batch, began);
                batch.items.clear();
                // The session may have ended; then nobody needs the buffer.
                let _ = dtloop_runtime::post(self.buffers, batch);
                self.look_ahead();
            }
            Command::Enter {
                hello,
                durable,
                reply,
            } => match self.applier.enter(&hello, durable) {
                Ok(entered) => {
                    let _ = dtloop_runtime::post(&reply, entered);
                }
                Err(Pause::Blocked(complaint)) => {
                    let _ = dtloop_runtime::post(&reply, Err(refusal(&complaint)));
                    return Err(Pause::Blocked(complaint));
                }
                Err(pause) => {
                    self.queue.push_front(Command::Enter {
                        hello,
                        durable,
                        reply,
                    });
                    return Err(pause);
                }
            },
            Command::Bind(offer) => {
                if let Err(pause) = self.applier.bind(&offer) {
                    self.queue.push_front(Command::Bind(offer));
                    return Err(pause);
                }
            }
            Command::Welcomed => self.applier.tell_alarms(),
            Command::Stop => return self.stop(),
        }
        Ok(Go::On)
    }

    fn look_ahead(&mut self) {
        match self.commands.try_recv() {
            Ok(command) => self.queue.push_back(command),
            Err(TryRecvError::Empty | TryRecvError::Disconnected) => {
                self.applier.parts.outlet.send_ack();
            }
        }
    }

    fn stop(&mut self) -> Result<Go, Pause> {
        loop {
            match self.applier.checkpoint() {
                Ok(()) => return Ok(Go::End),
                Err(Pause::Again) => {}
                // The old checkpoint stays, and the journal behind it.
                Err(Pause::Blocked(_)) => return Ok(Go::End),
                Err(fatal) => return Err(fatal),
            }
        }
    }

    /// Tells, once, what fails, and lets some time pass before it is tried again.
    fn bear(&mut self, complaint: Complaint) -> Go {
        let parts = &self.applier.parts;
        if self.complained.as_ref().map(|known| known.code) != Some(complaint.code) {
            tracing::error!("{}.", complaint.text);
            let (code, text) = (complaint.code, complaint.text.clone());
            parts.outlet.complain(Part::Applier, code, text);
        }
        let until = parts.clock.now() + RETRY_AFTER;
        while parts.clock.now() < until && !parts.flags.in_place.load(Ordering::Relaxed) {
            if parts.flags.must_end() {
                return Go::End;
            }
            dtloop_runtime::sleep(TICK / 4);
        }
        if parts.clock.now().saturating_sub(self.alive_told) >= ALIVE_EVERY {
            self.alive_told = parts.clock.now();
            parts.outlet.send_ack();
        }
        self.turn_away(&complaint);
        self.complained = Some(complaint);
        Go::On
    }

    /// A source that comes meanwhile is told the reason at once.
    fn turn_away(&mut self, complaint: &Complaint) {
        while let Ok(command) = self.commands.try_recv() {
            self.queue.push_back(command);
        }
        self.queue.retain(|command| {
            if let Command::Enter { reply, .. } = command {
                let _ = dtloop_runtime::post(reply, Err(refusal(complaint)));
                return false;
            }
            true
        });
    }

    /// Tells that it works again, if it was told that something does not.
    fn relent(&mut self) {
        if self.complained.take().is_some() {
            let text = "All volumes can be used again";
            tracing::info!("{text}.");
            self.applier.parts.outlet.relent(Part::Applier, text);
        }
    }
}

fn refusal(complaint: &Complaint) -> Refusal {
    Refusal::new(complaint.code, complaint.text.clone())
}
