// SPDX-License-Identifier: GPL-2.0-only

//! Waits until udevd has dealt with everything that has happened.

use std::io::{self, Write};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// What `udevadm settle` says when it lost its own race: it pings udevd over a socket, and says good-bye to it although udevd
/// may have answered and hung up by then. It has not looked at the queue of events yet, so it is asked again.
const HUNG_UP: &str = "Failed to wait for daemon to reply: Broken pipe";

/// How often it is asked. The race is rare: losing it so often in a row is something else.
const ATTEMPTS: u32 = 5;

/// Waits, as `udevadm settle` does.
pub(crate) fn settle(options: &[String]) -> Result<()> {
    settle_by(|| {
        let output = Command::new("udevadm").arg("settle").args(options).output();
        output.context("cannot run udevadm")
    })
}

/// Asks until there is an answer. Only a lost race is asked again: a queue that does not empty, or no udevd, is for the story
/// to know at once.
fn settle_by(mut ask: impl FnMut() -> Result<Output>) -> Result<()> {
    for _ in 1..ATTEMPTS {
        let output = ask()?;
        if output.status.success() || !has_lost_race(&output) {
            return judge(&output);
        }
        eprintln!("dtguest: udevadm settle lost its race with udevd, and is asked again");
    }
    judge(&ask()?)
}

fn has_lost_race(output: &Output) -> bool {
    String::from_utf8_lossy(&output.stderr).contains(HUNG_UP)
}

fn judge(output: &Output) -> Result<()> {
    // Whatever it had to say belongs to the story's output; where that goes to nobody, nobody misses it.
    let _ = io::stderr().write_all(&output.stderr);
    if !output.status.success() {
        bail!("udevadm settle: {}", output.status);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::ExitStatus;

    use super::*;

    fn answer(code: i32, text: &str) -> Output {
        Output {
            status: ExitStatus::from_raw(code << 8),
            stdout: vec![],
            stderr: text.as_bytes().to_vec(),
        }
    }

    /// Settles with these answers; gives how many were wanted.
    fn settled(answers: &[Output]) -> (bool, usize) {
        let mut asked = 0;
        let result = settle_by(|| {
            asked += 1;
            Ok(answers[(asked - 1).min(answers.len() - 1)].clone())
        });
        (result.is_ok(), asked)
    }

    #[test]
    fn a_lost_race_is_run_again_and_nothing_else() {
        let (good, lost) = (answer(0, ""), answer(1, &format!("{HUNG_UP}\n")));
        assert_eq!(settled(std::slice::from_ref(&good)), (true, 1));
        assert_eq!(settled(&[lost.clone(), lost.clone(), good]), (true, 3));
        assert_eq!(settled(&[lost]), (false, 5));
        let timeout = answer(1, "Timed out for waiting the udev queue being empty.\n");
        assert_eq!(settled(&[timeout]), (false, 1));
    }
}
