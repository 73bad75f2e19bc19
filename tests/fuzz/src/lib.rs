// SPDX-License-Identifier: GPL-2.0-only

//! Fuzz targets: every parser that faces the network, a file or an ioctl.
//!
//! Each is a function of bytes that panics when something is wrong, and each asserts more than that nothing panics: what
//! was decoded encodes to the same bytes, nothing is read beyond the end, and no more memory is taken than the limits
//! allow. Memory is counted by the allocator of this crate, so that holds without a sanitizer.
//!
//! | target | parsers |
//! |---|---|
//! | `frames` | `dtloop_proto::decode` over a stream of frames, their headers, record bodies, messages |
//! | `messages` | each message body by itself, the handshake among them |
//! | `packed` | compressed runs: codecs, lengths, the frames inside |
//! | `journal` | headers of segments and batches |
//! | `state` | state files of agent and target |
//! | `config` | `dtloop.toml`, `dttarget.toml` |
//! | `api` | lines of the agent's control socket, and of `dtloop`'s side of it |
//! | `trust` | pairing codes, pins of keys, the files of who is paired, the file of the hash chain |
//! | `intent` | the intent file, as the kernel module reads it, and its marks |
//! | `ring` | geometry and descriptors of a ring whose kernel module is broken |

mod files;
mod intent;
mod memory;
mod ring;
mod trust;
mod wire;

pub use memory::peak;

/// A fuzz target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name, and that of its corpus.
    pub name: &'static str,
    /// Most bytes that may be allocated for one input.
    pub memory_max: usize,
    body: fn(&[u8]),
    /// Well-formed inputs, by name.
    pub seeds: fn() -> Vec<(String, Vec<u8>)>,
}

impl Target {
    /// Tries an input.
    ///
    /// # Panics
    ///
    /// If something is wrong.
    pub fn run(&self, data: &[u8]) {
        let peak = peak(|| (self.body)(data));
        assert!(
            peak <= self.memory_max,
            "{} bytes of memory for an input of {}; the limit is {}",
            peak,
            data.len(),
            self.memory_max
        );
    }
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target {
        name: "frames",
        memory_max: 1 << 20,
        body: wire::frames,
        seeds: wire::frame_seeds,
    },
    Target {
        name: "messages",
        memory_max: 1 << 20,
        body: wire::messages,
        seeds: wire::message_seeds,
    },
    Target {
        name: "packed",
        memory_max: 8 << 20,
        body: wire::packed,
        seeds: wire::packed_seeds,
    },
    Target {
        name: "journal",
        memory_max: 64 << 10,
        body: files::journal,
        seeds: files::journal_seeds,
    },
    Target {
        name: "state",
        memory_max: 8 << 20,
        body: files::state,
        seeds: files::state_seeds,
    },
    Target {
        name: "config",
        memory_max: 16 << 20,
        body: files::config,
        seeds: files::config_seeds,
    },
    Target {
        name: "api",
        memory_max: 8 << 20,
        body: files::api,
        seeds: files::api_seeds,
    },
    Target {
        name: "trust",
        memory_max: 1 << 20,
        body: trust::trust,
        seeds: trust::trust_seeds,
    },
    Target {
        name: "intent",
        // The map of a device of 8 GiB in regions of 64 KiB.
        memory_max: 256 << 10,
        body: intent::intent,
        seeds: intent::intent_seeds,
    },
    Target {
        name: "ring",
        memory_max: 1 << 20,
        body: ring::ring,
        seeds: ring::seeds,
    },
];

/// The target of that name.
#[must_use]
pub fn find(name: &str) -> Option<Target> {
    TARGETS.iter().find(|target| target.name == name).copied()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::{env, fs};

    use super::*;

    /// What the corpus holds, crashes that were found among it, and all seeds.
    #[test]
    fn the_corpus_passes() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
        for target in TARGETS {
            let mut inputs = 0;
            for entry in fs::read_dir(dir.join(target.name)).unwrap() {
                target.run(&fs::read(entry.unwrap().path()).unwrap());
                inputs += 1;
            }
            assert!(inputs > 0, "{} has no corpus", target.name);
            for (_, seed) in (target.seeds)() {
                target.run(&seed);
            }
        }
    }

    #[test]
    fn memory_is_counted() {
        let hungry = peak(|| drop(vec![1_u8; 1 << 20]));
        assert!((1 << 20..1 << 21).contains(&hungry), "{hungry}");
    }
}
