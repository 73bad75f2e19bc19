// SPDX-License-Identifier: GPL-2.0-only

//! Compares two block devices or files byte for byte.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail};

use crate::direct::{Aligned, open_read, size};

const STEP: usize = 1 << 20;
const ALIGN: usize = 4096;

/// What a comparison found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Differences {
    /// Bytes compared.
    pub bytes: u64,
    /// Sectors that differ.
    pub sectors: u64,
    /// The first runs of them: first sector and length.
    pub runs: Vec<(u64, u64)>,
}

/// Compares `bytes` bytes (0: all of `a`) of `a` from `a_offset` on with the beginning of `b`.
pub fn compare(a: &Path, a_offset: u64, b: &Path, bytes: u64) -> Result<Differences> {
    let (mut a, mut b) = (open_read(a)?, open_read(b)?);
    let (size_a, size_b) = (size(&mut a)?, size(&mut b)?);
    let bytes = if bytes == 0 {
        size_a.saturating_sub(a_offset)
    } else {
        bytes
    };
    if size_b < bytes || size_a < a_offset + bytes {
        bail!("sizes do not allow it: {size_a} and {size_b} bytes for {bytes}");
    }
    let (mut left, mut right) = (Aligned::new(STEP, ALIGN), Aligned::new(STEP, ALIGN));
    let mut found = Differences {
        bytes,
        ..Differences::default()
    };
    let mut at = 0;
    while at < bytes {
        let count = usize::try_from((bytes - at).min(STEP as u64))?;
        read(&a, &mut left[..count], a_offset + at)?;
        read(&b, &mut right[..count], at)?;
        if left[..count] != right[..count] {
            note(&mut found, at / 512, &left[..count], &right[..count]);
        }
        at += count as u64;
    }
    Ok(found)
}

fn read(file: &File, buffer: &mut [u8], at: u64) -> Result<()> {
    Ok(file.read_exact_at(buffer, at)?)
}

fn note(found: &mut Differences, first: u64, left: &[u8], right: &[u8]) {
    for (sector, (a, b)) in (first..).zip(left.chunks(512).zip(right.chunks(512))) {
        if a == b {
            continue;
        }
        found.sectors += 1;
        let room = found.runs.len() < 20;
        match found.runs.last_mut() {
            Some((start, length)) if *start + *length == sector => *length += 1,
            _ if room => found.runs.push((sector, 1)),
            _ => {}
        }
    }
}
