// SPDX-License-Identifier: GPL-2.0-only

//! Intent files to give to a stream.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result};

/// Where the machines have an ordinary file system on a disk of its own.
pub const DIR: &str = "/var/lib";

/// Makes an empty file of `bytes` that is written to its end. A former one goes: the kernel may still hold that.
pub fn make(name: &str, bytes: usize) -> Result<File> {
    let path = Path::new(DIR).join(name);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", path.display()));
        }
        _ => (),
    }
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .with_context(|| format!("cannot make {}", path.display()))?;
    file.write_all(&vec![0; bytes])?;
    file.sync_all()?;
    Ok(file)
}
