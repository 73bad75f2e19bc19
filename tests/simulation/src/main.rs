// SPDX-License-Identifier: GPL-2.0-only

//! Runs the agent and the target, as they are, in simulated worlds: one for each seed.
//!
//! ```text
//! dtsim run --from 1 --count 200000     many seeds, on all processors, and those of `seeds.txt`
//! dtsim one 4711                        one, with everything that happens
//! dtsim outage                          a day without a network, of some seeds
//! dtsim canaries                        every seeded bug must be found
//! ```

#![allow(
    clippy::cast_possible_truncation,
    reason = "a world is small, and so are its numbers"
)]

mod disk;
mod history;
mod kernel;
mod random;
mod run;
mod source;
mod target;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use corosensei::stack::DefaultStack;
use dtloop_canary::Canary;

use run::Figures;

/// Seeds that failed once.
const SEEDS: &str = include_str!("../seeds.txt");

/// A seeded bug is found within this many seeds.
const CANARY_SEEDS: u64 = 15_000;

fn known_seeds() -> Vec<u64> {
    let seeds = SEEDS
        .lines()
        .filter_map(|line| line.split('#').next()?.trim().parse().ok());
    seeds.collect()
}

/// Runs a schedule; a panic is a failure like any other.
fn attempt(seed: u64, traces: bool, stacks: &mut Vec<DefaultStack>) -> Result<Figures, String> {
    let result = catch_unwind(AssertUnwindSafe(|| run::run(seed, traces, stacks)));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        // What lives in the world that was is not dropped in order; the next one is another.
        stacks.clear();
        Err(format!("panic: {}", text.unwrap_or_default()))
    })
}

#[derive(Default)]
struct Tally {
    schedules: AtomicU64,
    turns: AtomicU64,
    crashes: AtomicU64,
    inspections: AtomicU64,
    simulated_s: AtomicU64,
    over: AtomicBool,
    failures: Mutex<Vec<(u64, String)>>,
}

impl Tally {
    fn add(&self, figures: &Figures) {
        self.schedules.fetch_add(1, Ordering::Relaxed);
        self.turns.fetch_add(figures.turns, Ordering::Relaxed);
        self.crashes.fetch_add(figures.crashes, Ordering::Relaxed);
        self.inspections
            .fetch_add(figures.inspections, Ordering::Relaxed);
        self.simulated_s
            .fetch_add(figures.simulated.as_secs(), Ordering::Relaxed);
    }
}

/// Runs those seeds on all processors. Stops at the first failure if asked.
fn many(seeds: impl Iterator<Item = u64> + Send, canary: Option<Canary>, first: bool) -> Tally {
    let (tally, seeds) = (Tally::default(), Mutex::new(seeds));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                dtloop_canary::let_out(canary);
                let mut stacks = vec![];
                loop {
                    let seed = seeds.lock().ok().and_then(|mut seeds| seeds.next());
                    let Some(seed) = seed.filter(|_| !tally.over.load(Ordering::Relaxed)) else {
                        break;
                    };
                    match attempt(seed, false, &mut stacks) {
                        Ok(figures) => tally.add(&figures),
                        Err(text) => {
                            if let Ok(mut failures) = tally.failures.lock() {
                                failures.push((seed, text));
                                let enough = first || failures.len() >= 10;
                                tally.over.store(enough, Ordering::Relaxed);
                            }
                        }
                    }
                }
            });
        }
    });
    tally
}

fn run_all(from: u64, count: u64) -> bool {
    let began = Instant::now();
    let seeds = known_seeds().into_iter().chain(from..from + count);
    let tally = many(seeds, None, false);
    let failures = tally.failures.into_inner().unwrap_or_default();
    for (seed, text) in &failures {
        println!("seed {seed}: {text}");
    }
    let get = |figure: &AtomicU64| figure.load(Ordering::Relaxed);
    println!(
        "simulation: {} schedules ({} known), {} turns, {} crashes, {} inspections, {} days, in {:.0} s; {} failed",
        get(&tally.schedules),
        known_seeds().len(),
        get(&tally.turns),
        get(&tally.crashes),
        get(&tally.inspections),
        get(&tally.simulated_s) / 86_400,
        began.elapsed().as_secs_f64(),
        failures.len()
    );
    failures.is_empty()
}

fn run_canaries(names: &[String]) -> bool {
    let mut good = true;
    for canary in Canary::ALL {
        if !names.is_empty() && !names.contains(&format!("{canary:?}")) {
            continue;
        }
        let began = Instant::now();
        let tally = many(1..=CANARY_SEEDS, Some(canary), true);
        let ran = tally.schedules.load(Ordering::Relaxed);
        let failures = tally.failures.into_inner().unwrap_or_default();
        match failures.first() {
            Some((seed, text)) => println!(
                "canary {canary:?}: found after {ran} schedules, {:.1} s, by seed {seed}: {text}",
                began.elapsed().as_secs_f64()
            ),
            None => {
                println!("canary {canary:?}: NOT found in {ran} schedules");
                good = false;
            }
        }
    }
    good
}

/// Outages of a day: so many.
const OUTAGES: u64 = 4;

fn run_outages() -> bool {
    (1..=OUTAGES).all(|seed| {
        let began = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| run::outage(seed, false, &mut vec![])));
        let result = result.unwrap_or_else(|_| Err("a panic".to_owned()));
        match &result {
            Ok(figures) => println!(
                "outage, seed {seed}: {} hours, {} turns, {:.1} s",
                figures.simulated.as_secs() / 3600,
                figures.turns,
                began.elapsed().as_secs_f64()
            ),
            Err(text) => println!("outage, seed {seed}: {text}"),
        }
        result.is_ok()
    })
}

fn number(argument: Option<&String>) -> Option<u64> {
    argument?.parse().ok()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let good = match arguments.first().map(String::as_str) {
        Some("run") => {
            std::panic::set_hook(Box::new(|_| {}));
            let from = number(arguments.get(1)).unwrap_or(1);
            run_all(from, number(arguments.get(2)).unwrap_or(1000))
        }
        Some("one") => {
            let filter = tracing_subscriber::EnvFilter::from_default_env();
            tracing_subscriber::fmt()
                .with_env_filter(filter)
                .without_time()
                .init();
            let seed = number(arguments.get(1)).unwrap_or(1);
            let canary = arguments.get(2).and_then(|name| {
                Canary::ALL
                    .into_iter()
                    .find(|canary| format!("{canary:?}") == *name)
            });
            dtloop_canary::let_out(canary);
            let result = attempt(seed, true, &mut vec![]);
            println!("seed {seed}: {result:?}");
            result.is_ok()
        }
        Some("outage") => run_outages(),
        Some("canaries") => {
            std::panic::set_hook(Box::new(|_| {}));
            run_canaries(&arguments[1..])
        }
        _ => {
            eprintln!("usage: dtsim run [FROM] [COUNT] | one SEED [CANARY] | outage | canaries");
            false
        }
    };
    if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
