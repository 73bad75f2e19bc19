// SPDX-License-Identifier: GPL-2.0-only

//! Writes the seeds of the corpus: well-formed inputs of every target, from which the fuzzer goes on.
//!
//!     seed DIRECTORY
//!
//! Or prints the names of all targets, without a directory.

use std::path::Path;
use std::{env, fs, io};

fn main() -> io::Result<()> {
    let Some(dir) = env::args_os().nth(1) else {
        for target in dtloop_fuzz::TARGETS {
            println!("{}", target.name);
        }
        return Ok(());
    };
    for target in dtloop_fuzz::TARGETS {
        let dir = Path::new(&dir).join(target.name);
        fs::create_dir_all(&dir)?;
        for (name, bytes) in (target.seeds)() {
            fs::write(dir.join(name), bytes)?;
        }
    }
    Ok(())
}
