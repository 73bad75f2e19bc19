// SPDX-License-Identifier: GPL-2.0-only

//! Odd I/O on a block device, for which source and replica have to stay the same.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use clap::{Args, Parser, ValueEnum};
use dtloop_tools::direct::{Aligned, open_write, size};
use dtloop_tools::random::Random;
use nix::errno::Errno;
use nix::libc;
use nix::sys::uio::{preadv, pwritev};

#[derive(Debug, Parser)]
enum Command {
    /// Change the buffer of every write while it is in flight
    Scribble(Common),
    /// Writes and reads of strange shapes, checked against what they should give
    Shapes(Common),
    /// Several threads write the same blocks at the same time
    Overlap(Common),
    /// One write of a special kind; says what became of it: "written" or "refused"
    Once(Once),
}

#[derive(Args, Debug)]
struct Once {
    kind: Kind,
    device: PathBuf,
    /// Byte of the device
    #[arg(long, default_value_t = 0)]
    at: u64,
    #[arg(long, default_value_t = 4096)]
    bytes: usize,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// It must not wait
    Nowait,
    /// It must not be torn
    Atomic,
}

impl Kind {
    /// `RWF_*` of `include/uapi/linux/fs.h`.
    const fn flag(self) -> i32 {
        match self {
            Self::Nowait => libc::RWF_NOWAIT,
            Self::Atomic => 0x40,
        }
    }
}

#[derive(Args, Debug)]
struct Common {
    device: PathBuf,
    #[arg(long, default_value_t = 200)]
    times: u64,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Work within this many bytes
    #[arg(long, default_value_t = 8 << 20)]
    within: u64,
}

fn main() -> Result<()> {
    match Command::parse() {
        Command::Scribble(args) => scribble(&args),
        Command::Shapes(args) => shapes(&args),
        Command::Overlap(args) => overlap(&args),
        Command::Once(args) => once(&args),
    }
}

/// Memory that is written by one thread while the kernel reads it for another: made of atomics, so that this is no
/// data race in this program.
struct Scribbled {
    words: Vec<AtomicU64>,
    start: usize,
    length: usize,
}

impl Scribbled {
    fn new(bytes: usize) -> Self {
        let mut words = Vec::new();
        words.resize_with((bytes + 4096) / 8, AtomicU64::default);
        let start = words.as_ptr().cast::<u8>().align_offset(4096) / 8;
        Self {
            words,
            start,
            length: bytes / 8,
        }
    }

    fn words(&self) -> &[AtomicU64] {
        &self.words[self.start..self.start + self.length]
    }

    /// Writes the memory to a file as it is from moment to moment.
    fn write(&self, file: BorrowedFd<'_>, bytes: usize, at: u64) -> Result<()> {
        let words = self.words();
        ensure!(bytes <= words.len() * 8, "buffer too small");
        // SAFETY: The range lies within `words`, which is borrowed for the call. The kernel only reads it, with whole
        // bytes; that another thread stores to it meanwhile is what atomics allow.
        let count = unsafe {
            libc::pwrite(
                file.as_raw_fd(),
                words.as_ptr().cast(),
                bytes,
                libc::off_t::try_from(at)?,
            )
        };
        let count = Errno::result(count).context("write")?;
        ensure!(
            usize::try_from(count) == Ok(bytes),
            "short write of {count} bytes"
        );
        Ok(())
    }
}

fn scribble(args: &Common) -> Result<()> {
    let file = open_write(&args.device, 0)?;
    let buffer = Scribbled::new(256 << 10);
    let over = AtomicBool::new(false);
    let mut random = Random::new(args.seed);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut random = Random::new(args.seed ^ 0x5c21_bb1e);
            while !over.load(Ordering::Relaxed) {
                let value = random.next();
                for word in buffer.words().iter().step_by(7) {
                    word.store(value, Ordering::Relaxed);
                }
            }
        });
        let outcome = (0..args.times).try_for_each(|_| {
            let sectors = 1 + random.below(512);
            let at = random.below(args.within / 512 - sectors);
            buffer.write(file.as_fd(), usize::try_from(sectors)? * 512, at * 512)
        });
        over.store(true, Ordering::Relaxed);
        outcome
    })?;
    println!("{} writes of changing buffers", args.times);
    Ok(())
}

/// A write, and what the device holds afterwards.
struct Shapes {
    file: File,
    model: Vec<u8>,
    random: Random,
    block: u64,
}

fn shapes(args: &Common) -> Result<()> {
    let mut file = open_write(&args.device, 0)?;
    let bytes = size(&mut file)?.min(args.within);
    let mut model = Aligned::new(usize::try_from(bytes)?, 4096);
    file.read_exact_at(&mut model, 0).context("read")?;
    let block = if file.read_at(&mut Aligned::new(512, 512), 512).is_ok() {
        512
    } else {
        4096
    };
    let mut shapes = Shapes {
        file,
        model: model.to_vec(),
        random: Random::new(args.seed),
        block,
    };
    for _ in 0..args.times {
        shapes.many_segments()?;
        shapes.tail()?;
        shapes.large()?;
    }
    shapes.read_back()?;
    println!("{bytes} bytes as expected");
    Ok(())
}

impl Shapes {
    /// A position from which `bytes` fit.
    fn place(&mut self, bytes: usize) -> u64 {
        let blocks = (self.model.len() - bytes) as u64 / self.block;
        self.random.below(blocks + 1) * self.block
    }

    fn expect(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let at = usize::try_from(at)?;
        self.model[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Up to 1024 pieces of memory at odd places of their pages.
    fn many_segments(&mut self) -> Result<()> {
        let count = usize::try_from(2 + self.random.below(1023))?;
        let block = usize::try_from(self.block)?;
        // Pieces of one block each, with gaps of 512 bytes between them: many cross a page.
        let mut memory = Aligned::new(count * (block + 512), 4096);
        self.random.fill(&mut memory);
        let bytes = (count * block).min(self.model.len());
        let pieces = bytes / block;
        let slices: Vec<IoSlice<'_>> = memory
            .chunks(block + 512)
            .take(pieces)
            .map(|chunk| IoSlice::new(&chunk[..block]))
            .collect();
        let at = self.place(bytes);
        let written = pwritev(&self.file, &slices, i64::try_from(at)?).context("pwritev")?;
        ensure!(written == bytes, "pwritev wrote {written} of {bytes} bytes");
        let whole: Vec<u8> = slices
            .iter()
            .flat_map(|slice| slice.iter().copied())
            .collect();
        self.expect(at, &whole)?;
        let mut back = Aligned::new(pieces * (block + 512), 4096);
        let mut slices: Vec<IoSliceMut<'_>> = back
            .chunks_mut(block + 512)
            .map(|chunk| IoSliceMut::new(&mut chunk[..block]))
            .collect();
        let read = preadv(&self.file, &mut slices, i64::try_from(at)?).context("preadv")?;
        ensure!(read == bytes, "preadv read {read} of {bytes} bytes");
        let same = slices
            .iter()
            .flat_map(|slice| slice.iter())
            .eq(whole.iter());
        ensure!(
            same,
            "{bytes} bytes in {pieces} pieces at {at} come back different"
        );
        Ok(())
    }

    /// A length that is no multiple of a page, from memory that begins inside of one.
    fn tail(&mut self) -> Result<()> {
        let most = (self.model.len() as u64 / self.block).min(300);
        let bytes = usize::try_from((1 + self.random.below(most)) * self.block)?;
        let skip = usize::try_from(self.random.below(8))? * 512;
        let mut memory = Aligned::new(bytes + skip, 4096);
        self.random.fill(&mut memory);
        let at = self.place(bytes);
        self.file
            .write_all_at(&memory[skip..], at)
            .context("write with a tail")?;
        self.expect(at, &memory[skip..])
    }

    /// More than one record holds.
    fn large(&mut self) -> Result<()> {
        let most = (self.model.len() as u64 / self.block) - 1;
        let bytes = usize::try_from(self.random.below(most).max(1) * self.block)?;
        let mut memory = Aligned::new(bytes, 2 << 20);
        self.random.fill(&mut memory);
        let at = self.place(bytes);
        self.file.write_all_at(&memory, at).context("large write")?;
        self.expect(at, &memory)
    }

    fn read_back(&self) -> Result<()> {
        let mut found = Aligned::new(self.model.len(), 4096);
        self.file.read_exact_at(&mut found, 0)?;
        let differs = found.iter().zip(&self.model).position(|(a, b)| a != b);
        ensure!(
            differs.is_none(),
            "byte {differs:?} is not what was written"
        );
        Ok(())
    }
}

fn once(args: &Once) -> Result<()> {
    let file = open_write(&args.device, 0)?;
    let mut memory = Aligned::new(args.bytes, 4096);
    Random::new(7).fill(&mut memory);
    let piece = IoSlice::new(&memory);
    // SAFETY: An `IoSlice` is an `iovec`; it and the memory behind it outlive the call, which only reads them.
    let count = unsafe {
        libc::pwritev2(
            file.as_raw_fd(),
            (&raw const piece).cast(),
            1,
            libc::off_t::try_from(args.at)?,
            args.kind.flag(),
        )
    };
    match Errno::result(count) {
        Ok(count) if usize::try_from(count) == Ok(args.bytes) => println!("written"),
        Ok(count) => bail!("short write of {count} bytes"),
        Err(Errno::EAGAIN) => println!("refused"),
        Err(errno) => return Err(errno).context("pwritev2"),
    }
    Ok(())
}

fn overlap(args: &Common) -> Result<()> {
    let file = open_write(&args.device, 0)?;
    thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|index| {
                scope.spawn({
                    let file = &file;
                    move || write_over(file, args, index)
                })
            })
            .collect();
        writers
            .into_iter()
            .try_for_each(|writer| writer.join().map_err(|_| anyhow!("a writer panicked"))?)
    })?;
    println!("{} overlapping writes", args.times * 4);
    Ok(())
}

fn write_over(file: &File, args: &Common, index: u64) -> Result<()> {
    let mut random = Random::new(args.seed.wrapping_mul(31) + index);
    let mut buffer = Aligned::new(256 << 10, 4096);
    for _ in 0..args.times {
        let blocks = 1 + random.below(64);
        let bytes = usize::try_from(blocks)? * 4096;
        random.fill(&mut buffer[..512]);
        let (head, rest) = buffer.split_at_mut(512);
        for chunk in rest[..bytes - 512].chunks_mut(512) {
            chunk.copy_from_slice(head);
        }
        let at = random.below(args.within / 4096 - blocks) * 4096;
        file.write_all_at(&buffer[..bytes], at)?;
    }
    Ok(())
}
