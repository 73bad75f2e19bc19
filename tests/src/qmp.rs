// SPDX-License-Identifier: GPL-2.0-only

//! QEMU's control socket.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// A connection to QEMU's control socket.
#[derive(Debug)]
pub(crate) struct Qmp {
    input: BufReader<UnixStream>,
    output: UnixStream,
    events: Vec<Value>,
    line: String,
}

impl Qmp {
    /// Takes over a fresh connection: reads the greeting and leaves the negotiation behind.
    pub(crate) fn new(socket: UnixStream) -> Result<Self> {
        let output = socket.try_clone()?;
        let mut qmp = Self {
            input: BufReader::new(socket),
            output,
            events: Vec::new(),
            line: String::new(),
        };
        qmp.next(Duration::from_secs(30))?
            .context("no greeting from QEMU")?;
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Executes a command and returns what it returned.
    pub(crate) fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.output
            .write_all(format!("{request}\n").as_bytes())
            .context("QEMU is gone")?;
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let Some(mut answer) = self.next(deadline.saturating_duration_since(Instant::now()))?
            else {
                bail!("QEMU does not answer {command}");
            };
            if let Some(error) = answer.get("error") {
                bail!("QEMU refused {command}: {error}");
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            self.events.push(answer);
        }
    }

    /// Waits for an event of this name about device `device`.
    pub(crate) fn wait_event(&mut self, name: &str, device: &str, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let wanted =
                |event: &Value| event["event"] == name && event["data"]["device"] == device;
            if let Some(index) = self.events.iter().position(wanted) {
                self.events.remove(index);
                return Ok(());
            }
            match self.next(deadline.saturating_duration_since(Instant::now()))? {
                Some(event) => self.events.push(event),
                None => bail!("no {name} for {device} within {limit:?}"),
            }
        }
    }

    /// Next message, or nothing within `limit`.
    fn next(&mut self, limit: Duration) -> Result<Option<Value>> {
        self.input
            .get_ref()
            .set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
        // What came of a line before a time-out stays in `line`.
        match self.input.read_line(&mut self.line) {
            Ok(0) => bail!("QEMU closed its control socket"),
            Ok(_) if self.line.ends_with('\n') => {}
            Ok(_) => return Ok(None),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                return Ok(None);
            }
            Err(error) => return Err(error).context("QEMU's control socket"),
        }
        let message = serde_json::from_str(&self.line).context("QEMU says what is not JSON")?;
        self.line.clear();
        Ok(Some(message))
    }
}
