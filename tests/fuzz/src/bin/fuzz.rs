// SPDX-License-Identifier: GPL-2.0-only

//! The target that the variable `DTLOOP_FUZZ` names, under libFuzzer. One program for all of them: it is built once, and
//! what is covered tells them apart by itself.

#![no_main]

use std::sync::LazyLock;

use dtloop_fuzz::Target;

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = std::env::var("DTLOOP_FUZZ").unwrap_or_default();
    dtloop_fuzz::find(&name).unwrap_or_else(|| {
        let names: Vec<&str> = dtloop_fuzz::TARGETS
            .iter()
            .map(|target| target.name)
            .collect();
        eprintln!("DTLOOP_FUZZ must be one of {}", names.join(", "));
        std::process::exit(2)
    })
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    TARGET.run(data);
});
