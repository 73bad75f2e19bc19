// SPDX-License-Identifier: GPL-2.0-only

//! The control socket: requests of `dtloop`, answered line by line. See `dtloop-api`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use dtloop_api::{
    Failure, FailureCode, LineError, MirrorKind, Outcome, Progress, REPLY_BYTES_MAX,
    REQUEST_BYTES_MAX, Reply, Request, Status, WaitProgress, WaitResult, read_line, write_line,
};
use dtloop_core::mirror::{DeviceJob, JobKind};
use dtloop_disk::RealDisk;
use dtloop_store::log::Log;

use crate::set::{Command, SetShared};
use crate::snapshot::{Snapshot, ms, unix_ms};

/// How often progress is reported.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);

/// Longest time a set's thread takes for an answer: it may be connecting.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// How often a socket is tried that somebody listens on.
const LISTEN_RETRY: Duration = Duration::from_millis(20);

/// The sets of this agent.
pub struct Sets {
    /// By name.
    pub sets: BTreeMap<String, Arc<SetShared>>,
    /// When the agent was started, in milliseconds since 1970.
    pub started_unix_ms: u64,
}

/// Opens the socket, for root only.
///
/// # Errors
///
/// If it cannot be made, or another agent listens on it.
pub fn listen(path: &Path) -> Result<UnixListener> {
    // The state directory of one that was killed may be free a moment before its socket is.
    let began = Instant::now();
    while UnixStream::connect(path).is_ok() {
        if began.elapsed() >= dtloop_store::DYING {
            bail!(
                "Another dtagent listens on {}; stop that first",
                path.display()
            );
        }
        std::thread::sleep(LISTEN_RETRY);
    }
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    }
    // A former agent may have left it behind.
    let _ = fs::remove_file(path);
    let listener =
        UnixListener::bind(path).with_context(|| format!("Cannot listen on {}", path.display()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the socket for ever.
pub fn serve(listener: &UnixListener, sets: &Arc<Sets>) {
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        let sets = Arc::clone(sets);
        let served = std::thread::Builder::new()
            .name("control".into())
            .spawn(move || converse(&sets, &stream));
        if let Err(error) = served {
            tracing::error!("A request could not be served: {error}.");
        }
    }
}

/// Where answers go.
struct Answer<'a> {
    out: &'a UnixStream,
}

impl Answer<'_> {
    fn send(&mut self, reply: &Reply) -> Result<(), LineError> {
        write_line(&mut self.out, reply, REPLY_BYTES_MAX)
    }
}

fn converse(sets: &Sets, stream: &UnixStream) {
    let Ok(input) = stream.try_clone() else {
        return;
    };
    let mut input = BufReader::new(input);
    let mut answer = Answer { out: stream };
    loop {
        let request = match read_line::<Request>(&mut input, REQUEST_BYTES_MAX) {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(error) => {
                let failure = Failure::new(FailureCode::BadRequest, error.to_string());
                // Nobody can be told if the client is gone.
                let _ = answer.send(&Reply::Failed(failure));
                return;
            }
        };
        let last = match carry_out(sets, request, &mut answer) {
            Ok(Ok(outcome)) => Reply::Done(outcome),
            Ok(Err(failure)) => Reply::Failed(failure),
            Err(_) => return,
        };
        if answer.send(&last).is_err() {
            return;
        }
    }
}

type Done = Result<Result<Outcome, Failure>, LineError>;

fn carry_out(sets: &Sets, request: Request, answer: &mut Answer<'_>) -> Done {
    let find = |name: &str| {
        sets.sets.get(name).ok_or_else(|| {
            let message = format!("There is no set \"{name}\" in the configuration of dtagent.");
            Failure::new(FailureCode::UnknownSet, message)
        })
    };
    macro_rules! set {
        ($name:expr) => {
            match find(&$name) {
                Ok(set) => set,
                Err(failure) => return Ok(Err(failure)),
            }
        };
    }
    match request {
        Request::Status { set } => Ok(status(sets, set.as_deref())),
        Request::MirrorStart {
            set,
            devices,
            kind,
            follow,
        } => {
            let kind = match kind {
                MirrorKind::Full => JobKind::Full,
                MirrorKind::Difference => JobKind::Difference,
            };
            let set = set!(set);
            start(set, devices, kind, follow, answer)
        }
        Request::Verify {
            set,
            devices,
            repair,
            follow,
        } => {
            let set = set!(set);
            start(set, devices, JobKind::Verify { repair }, follow, answer)
        }
        Request::MirrorPause { set, .. } => {
            let result = ask(set!(set), |reply| Command::Pause {
                paused: true,
                reply,
            });
            Ok(result.map(|_| Outcome::Ok))
        }
        Request::MirrorResume { set, follow, .. } => {
            let set = set!(set);
            match ask(set, |reply| Command::Pause {
                paused: false,
                reply,
            }) {
                Ok(id) => follow_job(set, id, follow, answer),
                Err(failure) => Ok(Err(failure)),
            }
        }
        Request::MirrorStop { set, .. } => {
            let result = ask(set!(set), |reply| Command::Stop { reply });
            Ok(result.map(|_| Outcome::Ok))
        }
        Request::Bandwidth { set, change } => {
            let bandwidth = ask(set!(set), |reply| Command::Bandwidth { change, reply });
            Ok(bandwidth.map(Outcome::Bandwidth))
        }
        Request::ResyncInPlace { set } => {
            let result = ask(set!(set), |reply| Command::InPlace { reply });
            Ok(result.map(|_| Outcome::Ok))
        }
        Request::VerifyLog { set, most } => Ok(verify_log(set!(set), most)),
        Request::Wait { set, timeout_ms } => wait(set!(set), timeout_ms, answer),
    }
}

fn status(sets: &Sets, name: Option<&str>) -> Result<Outcome, Failure> {
    if let Some(name) = name.filter(|name| !sets.sets.contains_key(*name)) {
        let message = format!("There is no set \"{name}\" in the configuration of dtagent.");
        return Err(Failure::new(FailureCode::UnknownSet, message));
    }
    let chosen = sets
        .sets
        .iter()
        .filter(|(set, _)| name.is_none_or(|name| name == *set));
    Ok(Outcome::Status(Status {
        api_version: dtloop_api::API_VERSION,
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started_unix_ms: sets.started_unix_ms,
        sets: chosen
            .map(|(_, shared)| shared.next_snapshot(PROGRESS_EVERY).status)
            .collect(),
    }))
}

/// Most differing extents in one answer.
const EXTENTS_IN_ANSWER: usize = 20_000;

/// Most lines of the log in one answer: about half of what an answer may have.
const LOG_LINES_MAX: usize = 4000;

fn verify_log(set: &SetShared, most: usize) -> Result<Outcome, Failure> {
    let read = |path: &Path| Log::read(&RealDisk, path, most.min(LOG_LINES_MAX));
    let entries = set.verify_log().map_or(Ok(vec![]), read);
    let failed = |error| {
        let message = format!("The log of verifications cannot be read: {error}.");
        Failure::new(FailureCode::Internal, message)
    };
    entries.map(Outcome::VerifyLog).map_err(failed)
}

fn ask<T>(
    set: &SetShared,
    command: impl FnOnce(std::sync::mpsc::Sender<Result<T, Failure>>) -> Command,
) -> Result<T, Failure> {
    let (reply, answer): (_, Receiver<Result<T, Failure>>) = channel();
    set.command(command(reply));
    answer.recv_timeout(ANSWER_TIMEOUT).unwrap_or_else(|_| {
        let message = "The set's thread does not answer; look at the log of dtagent.";
        Err(Failure::new(FailureCode::Internal, message))
    })
}

fn start(
    set: &SetShared,
    devices: Vec<u32>,
    kind: JobKind,
    follow: bool,
    answer: &mut Answer<'_>,
) -> Done {
    match ask(set, |reply| Command::Start {
        devices,
        kind,
        reply,
    }) {
        Ok(id) => follow_job(set, id, follow, answer),
        Err(failure) => Ok(Err(failure)),
    }
}

fn stalled(snapshot: &Snapshot) -> Option<String> {
    use dtloop_api::Connection;
    match &snapshot.status.connection {
        Connection::Connected { .. } => None,
        Connection::Connecting { reason, .. } => {
            Some(format!("the target is not connected: {reason}"))
        }
        Connection::Refused { reason } | Connection::Idle { reason } => Some(reason.clone()),
    }
}

fn shutting_down() -> Failure {
    Failure::new(FailureCode::ShuttingDown, "dtagent ends.")
}

/// Reports on a job until it is over, or only which devices it has.
fn follow_job(set: &SetShared, id: u64, follow: bool, answer: &mut Answer<'_>) -> Done {
    let mut reported = None::<Instant>;
    loop {
        let snapshot = set.next_snapshot(PROGRESS_EVERY);
        if set.is_stopping() {
            return Ok(Err(shutting_down()));
        }
        let Some(job) = snapshot.job.as_ref().filter(|job| job.state.id >= id) else {
            continue;
        };
        if job.state.id > id {
            let message = "Another mirror began on the set; look at dtloop status.";
            return Ok(Err(Failure::new(FailureCode::Busy, message)));
        }
        let number = |device| snapshot.number_of(device);
        if !follow {
            let devices = job
                .state
                .devices
                .iter()
                .map(|item| number(item.device))
                .collect();
            return Ok(Ok(Outcome::Started(devices)));
        }
        if job.finished.is_some() {
            let items = job.state.devices.iter();
            return Ok(Ok(if job.state.kind.is_mirror() {
                Outcome::Mirror(
                    items
                        .map(|item| job.mirror_result(item, number(item.device)))
                        .collect(),
                )
            } else {
                // All of them in one answer; more is in the log.
                let most = EXTENTS_IN_ANSWER / job.state.devices.len().max(1);
                let result = |item: &DeviceJob| {
                    let mut result = job.verify_result(item, number(item.device));
                    result.extents.truncate(most);
                    result
                };
                Outcome::Verify(items.map(result).collect())
            }));
        }
        if reported.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
            reported = Some(Instant::now());
            let devices = job.progress(number);
            let name = snapshot.status.name.clone();
            let progress = Progress {
                set: name,
                devices,
                wait: None,
                stalled: stalled(&snapshot),
            };
            answer.send(&Reply::Progress(progress))?;
        }
    }
}

fn wait(set: &SetShared, timeout_ms: Option<u64>, answer: &mut Answer<'_>) -> Done {
    let began = Instant::now();
    let seq = match ask(set, |reply| Command::Wait { reply }) {
        Ok(seq) => seq,
        Err(failure) => return Ok(Err(failure)),
    };
    let mut reported = None::<Instant>;
    loop {
        // What was published before the thread looked for changes outside of the stream does not know of them.
        let fresh = set.fresh_snapshot(Duration::from_millis(100));
        if set.is_stopping() {
            return Ok(Err(shutting_down()));
        }
        let is_fresh = fresh.is_some();
        let snapshot = fresh.unwrap_or_else(|| set.snapshot());
        let applied_seq = snapshot.status.applied_seq;
        if is_fresh && snapshot.settled && applied_seq >= seq {
            return Ok(Ok(Outcome::Wait(WaitResult {
                seq,
                elapsed_ms: ms(began.elapsed()),
            })));
        }
        if let Some(reason) = snapshot.hopeless.as_ref().filter(|_| is_fresh) {
            let message = format!("The target cannot get everything: {reason}.");
            return Ok(Err(Failure::new(FailureCode::TargetRefused, message)));
        }
        if timeout_ms.is_some_and(|timeout| ms(began.elapsed()) >= timeout) {
            let message = format!(
                "The time given is over; the target has applied everything below record {applied_seq} of {seq}."
            );
            return Ok(Err(Failure::new(FailureCode::TimedOut, message)));
        }
        if reported.is_none_or(|at| at.elapsed() >= PROGRESS_EVERY) {
            reported = Some(Instant::now());
            let wait = Some(WaitProgress { seq, applied_seq });
            let name = snapshot.status.name.clone();
            let progress = Progress {
                set: name,
                devices: vec![],
                wait,
                stalled: stalled(&snapshot),
            };
            answer.send(&Reply::Progress(progress))?;
        }
        answer.out.flush()?;
    }
}

/// When the agent was started, for [`Sets`].
#[must_use]
pub fn now_unix_ms() -> u64 {
    unix_ms()
}
