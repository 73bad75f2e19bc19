// SPDX-License-Identifier: GPL-2.0-only

//! Runs what the harness asks for.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use dtloop_tests::wire::{self, MAX_PAYLOAD, Message, PORT};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// How long output may come after the script's own end: a daemon that it left keeps its pipes open.
const LATE_OUTPUT: Duration = Duration::from_millis(300);

/// The way to the harness; a frame at a time.
#[derive(Clone)]
struct Sink(Arc<Mutex<File>>);

impl Sink {
    fn send(&self, job: u32, message: &Message) {
        let mut port = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = wire::send(&mut *port, job, message) {
            crate::boot::log(&format!("cannot send to the harness: {error}"));
        }
    }
}

/// A script that runs.
struct Running {
    group: Pid,
    input: Option<Sender<Vec<u8>>>,
}

/// The scripts that run, by job.
type Jobs = Arc<Mutex<HashMap<u32, Running>>>;

fn lock(jobs: &Jobs) -> MutexGuard<'_, HashMap<u32, Running>> {
    jobs.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Serves until the port breaks.
pub(crate) fn serve() -> Result<()> {
    let path = port()?;
    let mut input = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {path}"))?;
    let sink = Sink(Arc::new(Mutex::new(input.try_clone()?)));
    sink.send(
        0,
        &Message::Hello(
            fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
        ),
    );
    let jobs = Jobs::default();
    loop {
        match wire::receive(&mut input) {
            Ok((job, message)) => handle(job, message, &jobs, &sink),
            // Nobody is connected.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                thread::sleep(Duration::from_millis(100));
            }
            Err(error) => return Err(error).context("the harness's port"),
        }
    }
}

/// Device node of the port with our name.
fn port() -> Result<String> {
    for entry in fs::read_dir("/sys/class/virtio-ports")
        .context("no virtio ports")?
        .flatten()
    {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == PORT {
            return Ok(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    anyhow::bail!("no virtio port named {PORT}")
}

fn handle(job: u32, message: Message, jobs: &Jobs, sink: &Sink) {
    match message {
        Message::Exec(script) => {
            if let Err(error) = start(job, &script, jobs, sink) {
                sink.send(job, &Message::Stderr(format!("{error:#}\n").into_bytes()));
                sink.send(job, &Message::Exit(127));
            }
        }
        Message::Stdin(bytes) => {
            if let Some(input) = lock(jobs).get(&job).and_then(|job| job.input.as_ref()) {
                // A script that reads no more has ended, or will tell.
                let _ = input.send(bytes);
            }
        }
        Message::StdinEnd => {
            if let Some(job) = lock(jobs).get_mut(&job) {
                job.input = None;
            }
        }
        Message::Kill(signal) => {
            if let (Some(job), Ok(signal)) = (lock(jobs).get(&job), Signal::try_from(signal)) {
                // It may have ended already.
                let _ = killpg(job.group, signal);
            }
        }
        _ => {}
    }
}

fn start(job: u32, script: &str, jobs: &Jobs, sink: &Sink) -> Result<()> {
    let mut child = Command::new("/bin/bash")
        .args(["-euo", "pipefail", "-c", script])
        .env_clear()
        .envs([
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("TERM", "dumb"),
            ("USER", "root"),
        ])
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("RUST_BACKTRACE", "1")
        .current_dir("/root")
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot run bash")?;
    let group = Pid::from_raw(i32::try_from(child.id())?);
    let stdin = child.stdin.take().context("no stdin")?;
    let (input, chunks) = mpsc::channel();
    thread::spawn(move || feed(stdin, &chunks));
    let (done, readers_done) = mpsc::channel();
    let stdout = child.stdout.take().context("no stdout")?;
    let stderr = child.stderr.take().context("no stderr")?;
    forward(stdout, job, Message::Stdout, sink.clone(), done.clone());
    forward(stderr, job, Message::Stderr, sink.clone(), done);
    let input = Some(input);
    lock(jobs).insert(job, Running { group, input });
    let (jobs, sink) = (Arc::clone(jobs), sink.clone());
    thread::spawn(move || {
        let exit = finish(child, &readers_done);
        // With it goes the way to its input, which would stay open otherwise.
        lock(&jobs).remove(&job);
        sink.send(job, &exit);
    });
    Ok(())
}

fn feed(mut stdin: impl Write, chunks: &Receiver<Vec<u8>>) {
    for chunk in chunks {
        if stdin.write_all(&chunk).is_err() {
            return;
        }
    }
}

fn forward(
    mut from: impl Read + Send + 'static,
    job: u32,
    wrap: fn(Vec<u8>) -> Message,
    sink: Sink,
    done: Sender<()>,
) {
    thread::spawn(move || {
        let mut buffer = vec![0; MAX_PAYLOAD];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            sink.send(job, &wrap(buffer[..count].to_vec()));
        }
        // The other side may have stopped waiting.
        let _ = done.send(());
    });
}

/// Waits for a script's end and its output.
fn finish(mut child: Child, readers_done: &Receiver<()>) -> Message {
    let status = child.wait();
    for _ in 0..2 {
        if readers_done.recv_timeout(LATE_OUTPUT).is_err() {
            break;
        }
    }
    Message::Exit(status.map_or(-1, code))
}

fn code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
