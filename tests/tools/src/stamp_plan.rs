// SPDX-License-Identifier: GPL-2.0-only

//! Where a writer of stamps writes next: drawn from its seed alone, so that it can be told afterwards without a log.

use anyhow::Result;
use clap::Args;

use crate::random::Random;
use crate::stamp::SECTOR;

/// What the writes are like.
#[derive(Args, Clone, Debug)]
pub struct Shape {
    /// Writers at a time.
    #[arg(long, default_value_t = 4)]
    pub threads: u32,
    /// What everything is drawn from.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Largest write in bytes
    #[arg(long, default_value_t = 64 << 10)]
    pub most: usize,
    /// Every thread writes where it likes, not only in its own part
    #[arg(long)]
    pub overlap: bool,
    /// Of a thousand writes, so many are followed by a flush
    #[arg(long, default_value_t = 30)]
    pub flush: u64,
    /// Of a thousand writes, so many are with forced unit access
    #[arg(long, default_value_t = 30)]
    pub fua: u64,
}

/// A write to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// Index of the device.
    pub device: usize,
    /// First sector.
    pub start: u64,
    /// Length in sectors.
    pub sectors: u64,
    /// With forced unit access.
    pub fua: bool,
    /// A flush comes after it.
    pub flush: bool,
}

/// The writes of one thread.
#[derive(Debug)]
pub struct Plan<'a> {
    shape: &'a Shape,
    sectors: &'a [u64],
    block: u64,
    thread: u32,
    random: Random,
}

impl<'a> Plan<'a> {
    /// Begins the writes of a thread to devices of so many sectors, in whole blocks of `block` sectors.
    pub const fn new(shape: &'a Shape, sectors: &'a [u64], block: u64, thread: u32) -> Self {
        Self {
            shape,
            sectors,
            block,
            thread,
            random: Random::new(shape.seed.wrapping_mul(1000) + thread as u64),
        }
    }

    /// The next one.
    ///
    /// # Errors
    ///
    /// If a device does not fit this machine's numbers.
    #[expect(clippy::should_implement_trait, reason = "there is no end, but errors")]
    pub fn next(&mut self) -> Result<Next> {
        let device = usize::try_from(self.random.below(self.sectors.len() as u64))?;
        let (start, sectors) = self.place(device);
        Ok(Next {
            device,
            start,
            sectors,
            fua: self.random.below(1000) < self.shape.fua,
            flush: self.random.below(1000) < self.shape.flush,
        })
    }

    /// Small ones mostly.
    fn place(&mut self, device: usize) -> (u64, u64) {
        let block = self.block;
        let most = (self.shape.most as u64 / SECTOR as u64 / block).max(1);
        let log = self.random.below(u64::from(most.ilog2()) + 1);
        let blocks = (1 + self.random.below(1 << log)).min(most);
        let all = self.sectors[device] / block;
        let (from, count) = if self.shape.overlap {
            (0, all)
        } else {
            let part = all / u64::from(self.shape.threads);
            (part * u64::from(self.thread), part)
        };
        let start = from + self.random.below(count - blocks.min(count - 1));
        (start * block, blocks * block)
    }
}
