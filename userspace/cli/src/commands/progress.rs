// SPDX-License-Identifier: GPL-2.0-only

//! Showing how far a mirror, a verification or a wait is: bars on a terminal, else now and then a
//! line.

use std::collections::BTreeMap;
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use dtloop_api::{DeviceProgress, Job, Progress, WaitProgress};
use dtloop_manage::size;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::output;
use crate::rate::Rate;

/// Without a terminal, a line for each device that often: a mirror of an hour makes 120 lines.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// What is shown of the progress.
pub(crate) struct Display {
    bars: Option<MultiProgress>,
    tracks: BTreeMap<u32, Track>,
    wait: Option<Track>,
    stalled: Option<String>,
}

struct Track {
    rate: Rate,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
}

impl Display {
    /// Bars if the error output is a terminal; the results go to the standard output.
    pub(crate) fn new() -> Self {
        let bars = || MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
        Self {
            bars: stderr().is_terminal().then(bars),
            tracks: BTreeMap::new(),
            wait: None,
            stalled: None,
        }
    }

    /// What has to be cleared before something else is written.
    pub(crate) fn bars(&self) -> Option<MultiProgress> {
        self.bars.clone()
    }

    /// Shows a report.
    pub(crate) fn show(&mut self, progress: &Progress, now: Instant) {
        if self.stalled != progress.stalled {
            self.stalled.clone_from(&progress.stalled);
            let text = progress.stalled.as_deref().unwrap_or("it goes on");
            match &self.bars {
                // Nothing to do when the terminal is gone.
                Some(bars) => drop(bars.println(format!("dtloop: {text}"))),
                None => output::note(text),
            }
        }
        let bars = self.bars.clone();
        for device in &progress.devices {
            let track = self
                .tracks
                .entry(device.number)
                .or_insert_with(|| Track::new(bars.as_ref()));
            track.device(device, now);
        }
        if let Some(wait) = &progress.wait {
            let track = self.wait.get_or_insert_with(|| Track::new(bars.as_ref()));
            track.wait(wait, now);
        }
    }

    /// Takes the bars away.
    pub(crate) fn clear(&self) {
        if let Some(bars) = &self.bars {
            // Nothing to do when the terminal is gone.
            let _ = bars.clear();
        }
    }
}

impl Track {
    fn new(bars: Option<&MultiProgress>) -> Self {
        let bar = bars.map(|bars| {
            // The template is fixed and sound; the default style serves as well.
            let style = ProgressStyle::with_template("{prefix} [{bar:30}] {percent:>3} % {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bars.add(ProgressBar::new(0).with_style(style.progress_chars("=> ")))
        });
        Self {
            rate: Rate::default(),
            bar,
            last_line: None,
        }
    }

    fn device(&mut self, device: &DeviceProgress, now: Instant) {
        let pass = &device.pass;
        if pass.paused {
            // What happened before the pause says nothing about what follows.
            self.rate = Rate::default();
        }
        self.rate.note(now, pass.done_bytes);
        let name = format!("loop{} {}", device.number, job(device.job));
        let text = device_text(device, &self.rate);
        self.draw(&name, pass.done_bytes, pass.total_bytes, &text, now);
    }

    fn wait(&mut self, wait: &WaitProgress, now: Instant) {
        self.rate.note(now, wait.applied_seq);
        let left = wait.seq.saturating_sub(wait.applied_seq);
        let text = format!(
            "{}, {}",
            output::count(left, "record"),
            time_left(&self.rate, left)
        );
        self.draw("waiting", wait.applied_seq, wait.seq, &text, now);
    }

    fn draw(&mut self, name: &str, done: u64, total: u64, text: &str, now: Instant) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_prefix(name.to_owned());
            bar.set_message(text.to_owned());
            return;
        }
        let due = self
            .last_line
            .is_none_or(|last| now.duration_since(last) >= LINE_EVERY);
        if due {
            self.last_line = Some(now);
            let percent = u128::from(done) * 100 / u128::from(total.max(1));
            output::note(&format!("{name}: {percent} %, {text}"));
        }
    }
}

const fn job(job: Job) -> &'static str {
    match job {
        Job::FullMirror => "full mirror",
        Job::DifferenceMirror => "difference mirror",
        Job::Resync => "resync",
        Job::Recovery => "recovery",
        Job::Verify => "verify",
    }
}

fn time_left(rate: &Rate, left: u64) -> String {
    rate.time_left(left)
        .map_or("time left unknown".into(), |time| {
            format!("{} left", size::duration(time))
        })
}

fn device_text(device: &DeviceProgress, rate: &Rate) -> String {
    let pass = &device.pass;
    let mut parts = vec![format!(
        "{} of {}",
        size::bytes(pass.done_bytes),
        size::bytes(pass.total_bytes)
    )];
    if pass.paused {
        parts.push("paused".into());
    } else {
        if let Some(rate) = rate.per_second() {
            parts.push(format!("{}/s", size::bytes(rate)));
        }
        let left = pass.total_bytes.saturating_sub(pass.done_bytes);
        parts.push(time_left(rate, left));
    }
    if pass.differing_bytes > 0 {
        parts.push(format!("{} differ", size::bytes(pass.differing_bytes)));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use dtloop_api::Pass;

    use super::*;

    fn device(done_bytes: u64, paused: bool) -> DeviceProgress {
        DeviceProgress {
            number: 1,
            label: "vol".into(),
            job: Job::FullMirror,
            pass: Pass {
                done_bytes,
                total_bytes: 1 << 30,
                paused,
                ..Pass::default()
            },
        }
    }

    #[test]
    fn the_time_left_is_unknown_until_there_is_data() {
        let (base, mut rate) = (Instant::now(), Rate::default());
        rate.note(base, 0);
        let text = device_text(&device(0, false), &rate);
        assert_eq!(text, "0 B of 1 GiB, time left unknown");
        rate.note(base + Duration::from_secs(2), 256 << 20);
        let text = device_text(&device(256 << 20, false), &rate);
        assert_eq!(text, "256 MiB of 1 GiB, 128 MiB/s, 6.0s left");
        let text = device_text(&device(256 << 20, true), &rate);
        assert_eq!(text, "256 MiB of 1 GiB, paused");
    }
}
