// SPDX-License-Identifier: GPL-2.0-only

//! What a device or file holds, in a few figures: to be compared with another one, here or on another machine. Emulated
//! processors are slow at `sha256sum` and pipes, and nobody forges the contents of a test.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};
use xxhash_rust::xxh3::Xxh3;

/// Read at once.
const PIECE: usize = 1 << 20;

/// Alignment of direct reads.
const ALIGNMENT: usize = 4096;

/// Length in bytes and hash, read past the page cache: that of a disk knows nothing of what the module writes there.
pub(crate) fn digest(path: &str) -> Result<String> {
    let mut file = File::options()
        .read(true)
        .custom_flags(nix::libc::O_DIRECT)
        .open(path)
        .with_context(|| format!("cannot open {path}"))?;
    let mut memory = vec![0; PIECE + ALIGNMENT];
    let from = memory.as_ptr().align_offset(ALIGNMENT);
    let piece = &mut memory[from..from + PIECE];
    let (mut hash, mut bytes) = (Xxh3::new(), 0);
    loop {
        let count = file
            .read(piece)
            .with_context(|| format!("cannot read {path} at byte {bytes}"))?;
        if count == 0 {
            return Ok(format!("{bytes} {:032x}", hash.digest128()));
        }
        hash.update(&piece[..count]);
        bytes += count;
    }
}
