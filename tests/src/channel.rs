// SPDX-License-Identifier: GPL-2.0-only

//! Running commands in a machine, through `dtguest`.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::story;
use crate::wire::{self, MAX_PAYLOAD, Message};

/// Number of the job that is the guest's own greeting.
const HELLO_JOB: u32 = 0;

/// How a script ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// Exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// What it printed.
    pub stdout: Vec<u8>,
    /// What it complained.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Whether the script ended with 0.
    pub fn ok(&self) -> bool {
        self.code == 0
    }

    /// What it printed, as text, without the blanks around it.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }

    /// What it complained, as text, without the blanks around it.
    pub fn complaint(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim().to_owned()
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit code {}", self.code)?;
        for (name, bytes) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            let text = String::from_utf8_lossy(bytes);
            if !text.trim().is_empty() {
                write!(f, "\n---- {name}:\n{}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// A job that has not ended.
#[derive(Debug)]
struct Waiting {
    to: Sender<Message>,
    script: String,
    begin: Instant,
}

type Jobs = Arc<Mutex<HashMap<u32, Waiting>>>;

/// The connection to a machine's `dtguest`.
#[derive(Debug)]
pub(crate) struct Channel {
    socket: Arc<Mutex<UnixStream>>,
    jobs: Jobs,
    next_job: AtomicU32,
    hello: Receiver<Message>,
}

impl Channel {
    /// Takes over the socket; `log` is told of every script that ends.
    pub(crate) fn new(socket: UnixStream, log: File) -> Result<Self> {
        let input = socket.try_clone()?;
        let (to, hello) = mpsc::channel();
        let channel = Self {
            socket: Arc::new(Mutex::new(socket)),
            jobs: Jobs::default(),
            next_job: AtomicU32::new(HELLO_JOB + 1),
            hello,
        };
        channel.expect(HELLO_JOB, "boot", to);
        let jobs = Arc::clone(&channel.jobs);
        thread::spawn(move || distribute(input, &jobs, log));
        Ok(channel)
    }

    /// Notes who waits for what the guest says of a job.
    fn expect(&self, id: u32, script: &str, to: Sender<Message>) {
        let waiting = Waiting {
            to,
            script: script.to_owned(),
            begin: Instant::now(),
        };
        lock(&self.jobs).insert(id, waiting);
    }

    /// Waits for the guest's greeting; returns its kernel release.
    pub(crate) fn wait_hello(&self, limit: Duration) -> Result<String> {
        match self.hello.recv_timeout(limit) {
            Ok(Message::Hello(release)) => Ok(release),
            Ok(other) => bail!("the guest greets with {other:?}"),
            Err(RecvTimeoutError::Timeout) => bail!("the guest is not up after {limit:?}"),
            Err(RecvTimeoutError::Disconnected) => bail!("the machine went down while it booted"),
        }
    }

    /// Starts a script.
    pub(crate) fn start(&self, script: &str) -> Result<Job> {
        let id = self.next_job.fetch_add(1, Ordering::Relaxed);
        let (to, messages) = mpsc::channel();
        self.expect(id, script, to);
        let job = Job {
            id,
            script: script.to_owned(),
            socket: Arc::clone(&self.socket),
            messages,
            stdout: Vec::new(),
            stderr: Vec::new(),
            exit: None,
            begin: Instant::now(),
        };
        job.send(&Message::Exec(script.to_owned()))?;
        Ok(job)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        // Ends the thread that reads. A socket that is closed already is as good.
        let _ = lock(&self.socket).shutdown(Shutdown::Both);
    }
}

/// Hands each message to its job, until the machine goes.
fn distribute(mut input: UnixStream, jobs: &Jobs, mut log: File) {
    while let Ok((id, message)) = wire::receive(&mut input) {
        let ended = match message {
            Message::Exit(code) => Some(code),
            _ => None,
        };
        let mut jobs = lock(jobs);
        let Some(job) = jobs.get(&id) else { continue };
        // A job that nobody waits for any more may still have something to say.
        let _ = job.to.send(message);
        if let Some(code) = ended {
            // For whoever wants to know what a story did, and what took so long. Without it the story is as good.
            let (now, took) = (story::elapsed(), job.begin.elapsed().as_secs_f64());
            let _ = writeln!(
                log,
                "[{:6.1}] {took:.2} s, exit code {code}: {}",
                now - took,
                job.script
            );
            jobs.remove(&id);
        }
    }
    // Whoever still waits learns that nothing more will come.
    lock(jobs).clear();
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A script that runs in a machine.
#[derive(Debug)]
pub struct Job {
    id: u32,
    script: String,
    socket: Arc<Mutex<UnixStream>>,
    messages: Receiver<Message>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    exit: Option<i32>,
    begin: Instant,
}

impl Job {
    /// Waits for the script's end. When `limit` is over, the script is killed and this fails.
    pub fn wait(mut self, limit: Duration) -> Result<Output> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(code) = self.exit {
                return Ok(self.output(code));
            }
            match self
                .messages
                .recv_timeout(deadline.saturating_duration_since(Instant::now()))
            {
                Ok(message) => self.exit = self.take(message),
                Err(RecvTimeoutError::Timeout) => {
                    self.kill(9)?;
                    let output = self.output(-1);
                    bail!(
                        "not done after {:.0} s: {}\n{output}",
                        self.begin.elapsed().as_secs_f64(),
                        self.script
                    );
                }
                Err(RecvTimeoutError::Disconnected) => {
                    let output = self.output(-1);
                    bail!("the machine went down during: {}\n{output}", self.script);
                }
            }
        }
    }

    /// Waits as [`Job::wait`] does, and fails when the script failed. Returns what it printed.
    pub fn finish(self, limit: Duration) -> Result<String> {
        let script = self.script.clone();
        let output = self.wait(limit)?;
        if !output.ok() {
            bail!("failed in the guest: {script}\n{output}");
        }
        Ok(output.text())
    }

    /// Whether the script still runs.
    pub fn is_running(&mut self) -> bool {
        while let Ok(message) = self.messages.try_recv() {
            self.exit = self.take(message).or(self.exit);
        }
        self.exit.is_none()
    }

    /// What the script has printed so far.
    pub fn printed(&mut self) -> String {
        self.is_running();
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Sends a signal to the script and all that it started.
    pub fn kill(&self, signal: i32) -> Result<()> {
        self.send(&Message::Kill(signal))
    }

    /// Gives the script input.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        bytes
            .chunks(MAX_PAYLOAD)
            .try_for_each(|chunk| self.send(&Message::Stdin(chunk.to_vec())))
    }

    /// Ends the script's input.
    pub fn end_input(&self) -> Result<()> {
        self.send(&Message::StdinEnd)
    }

    fn send(&self, message: &Message) -> Result<()> {
        wire::send(&mut *lock(&self.socket), self.id, message).context("the machine is down")
    }

    /// Keeps what a message brings; the exit code, if it is the last.
    fn take(&mut self, message: Message) -> Option<i32> {
        match message {
            Message::Stdout(bytes) => self.stdout.extend(bytes),
            Message::Stderr(bytes) => self.stderr.extend(bytes),
            Message::Exit(code) => return Some(code),
            _ => {}
        }
        None
    }

    fn output(&mut self, code: i32) -> Output {
        Output {
            code,
            stdout: std::mem::take(&mut self.stdout),
            stderr: std::mem::take(&mut self.stderr),
        }
    }
}
