// SPDX-License-Identifier: GPL-2.0-only

//! Waiting for conditions, with deadlines. Stories never just sleep.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// A deadline for something that takes `seconds` on an idle machine of the usual kind. Several emulated machines share
/// few processors, so it is stretched; `DTLOOP_PATIENCE` (a factor) stretches it more.
pub fn patience(seconds: u64) -> Duration {
    let factor = std::env::var("DTLOOP_PATIENCE")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(1.0);
    Duration::from_secs(seconds).mul_f64(3.0 * factor)
}

/// Waits until `condition` holds; fails after `limit`, naming `what`. An error of `condition` ends the wait.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let begin = Instant::now();
    let mut pause = Duration::from_millis(20);
    while !condition()? {
        if begin.elapsed() > limit {
            bail!(
                "waited {:.0} s in vain for: {what}",
                begin.elapsed().as_secs_f64()
            );
        }
        sleep(pause);
        pause = (pause * 3 / 2).min(Duration::from_millis(500));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_with_its_condition_or_its_deadline() {
        let mut count = 0;
        let limit = Duration::from_secs(20);
        wait_until("three", limit, || {
            count += 1;
            Ok(count == 3)
        })
        .unwrap();
        let error = wait_until("never", Duration::ZERO, || Ok(false)).unwrap_err();
        assert!(error.to_string().contains("never"));
    }
}
