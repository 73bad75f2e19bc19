// SPDX-License-Identifier: GPL-2.0-only

//! The first process of a test machine, and the hand of the harness in it.
//!
//! As `/init` of the initial RAM disk it loads modules and moves to the root file system; as `dtguest init` there it
//! brings the system up and reaps; `dtguest serve` runs what the harness asks for.

mod boot;
mod device;
mod digest;
mod serve;
mod settle;

use std::env;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            boot::log(&format!("{error:#}"));
            eprintln!("dtguest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args: Vec<String> = env::args().collect();
    if args[0] == "/init" {
        return boot::early();
    }
    match args.get(1).map(String::as_str) {
        Some("init") => boot::system(),
        Some("serve") => serve::serve(),
        Some("poweroff") => boot::power_off(),
        Some("settle") => settle::settle(&args[2..]),
        Some("device") => {
            let serial = args.get(2).context("usage: dtguest device SERIAL")?;
            println!(
                "{}",
                device::find(serial).with_context(|| format!("no disk with serial {serial}"))?
            );
            Ok(())
        }
        Some("digest") => args[2..]
            .iter()
            .try_for_each(|path| digest::digest(path).map(|digest| println!("{digest}"))),
        _ => bail!(
            "usage: dtguest init|serve|poweroff|settle [OPTION...]|device SERIAL|digest PATH..."
        ),
    }
}
