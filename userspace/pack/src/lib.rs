// SPDX-License-Identifier: GPL-2.0-only

//! Compression of runs of frames: zstd and lz4 behind one interface.
//!
//! Both directions work from one slice into another one whose length is the limit, so that nothing grows with what a
//! peer says: [`Unpacker::unpack`] writes into the receiver's buffer and fails unless exactly that much comes out. A
//! block of zstd is unpacked in one go into contiguous memory, so its window needs none of its own, whatever the frame
//! header says.
//!
//! lz4 is `lz4_flex` in its safe form: no C and no `unsafe` looks at bytes of a peer there. zstd is the reference
//! library: there is no encoder in safe Rust that comes near its speed, and its decoder has been fuzzed for years.

#![forbid(unsafe_code)]

use dtloop_proto::Codec;

/// How a run is to be compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Method {
    /// lz4: the least time.
    Lz4,
    /// zstd at this level.
    Zstd(i32),
}

impl Method {
    /// The codec, as the frame names it.
    #[must_use]
    pub fn codec(self) -> Codec {
        match self {
            Self::Lz4 => Codec::Lz4,
            Self::Zstd(_) => Codec::Zstd,
        }
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd-{level}"),
        }
    }
}

/// Why a run cannot be unpacked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    /// The bytes are not of that codec, or unpack to more than was said.
    #[error("A compressed run cannot be unpacked: {0}")]
    Damaged(String),
    /// It gives less than was said.
    #[error("A compressed run unpacks to {found} bytes instead of {expected}")]
    Short {
        /// What came out.
        found: usize,
        /// What was said.
        expected: usize,
    },
}

/// Compresses. Its tables are kept from run to run; they are made when a codec is first used.
#[derive(Default)]
pub struct Packer {
    zstd: Option<zstd_safe::CCtx<'static>>,
    out: Vec<u8>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").finish_non_exhaustive()
    }
}

impl Packer {
    /// The compressed form of `raw`, if it has less than `limit` bytes.
    pub fn pack(&mut self, method: Method, raw: &[u8], limit: usize) -> Option<&[u8]> {
        // Room for whatever comes out; it is kept, and never more than the largest run needs.
        let bound = match method {
            Method::Lz4 => lz4_flex::block::get_maximum_output_size(raw.len()),
            Method::Zstd(_) => zstd_safe::compress_bound(raw.len()),
        };
        if self.out.len() < bound {
            self.out.resize(bound, 0);
        }
        let packed = match method {
            Method::Lz4 => lz4_flex::block::compress_into(raw, &mut self.out).ok()?,
            Method::Zstd(level) => {
                let context = self.zstd.get_or_insert_with(zstd_safe::CCtx::create);
                context.compress(&mut self.out[..], raw, level).ok()?
            }
        };
        (packed < limit).then(|| &self.out[..packed])
    }
}

/// Unpacks. Its tables are kept from run to run.
#[derive(Default)]
pub struct Unpacker {
    zstd: Option<zstd_safe::DCtx<'static>>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// Fills `out` with what the bytes unpack to.
    ///
    /// # Errors
    ///
    /// If they are damaged, or give more or less than fills it. What is in `out` then is of no use.
    pub fn unpack(
        &mut self,
        codec: Codec,
        packed: &[u8],
        out: &mut [u8],
    ) -> Result<(), UnpackError> {
        let found = match codec {
            Codec::Lz4 => lz4_flex::block::decompress_into(packed, out)
                .map_err(|error| UnpackError::Damaged(error.to_string()))?,
            Codec::Zstd => {
                let context = self.zstd.get_or_insert_with(zstd_safe::DCtx::create);
                context.decompress(&mut *out, packed).map_err(|code| {
                    UnpackError::Damaged(zstd_safe::get_error_name(code).to_owned())
                })?
            }
        };
        if found == out.len() {
            Ok(())
        } else {
            Err(UnpackError::Short {
                found,
                expected: out.len(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const METHODS: [Method; 4] = [
        Method::Lz4,
        Method::Zstd(1),
        Method::Zstd(3),
        Method::Zstd(9),
    ];

    #[test]
    fn what_does_not_shrink_is_not_packed() {
        let mut packer = Packer::default();
        let mut state = 1_u64;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            state.to_be_bytes()[0]
        })
        .take(65536)
        .collect();
        for method in METHODS {
            assert!(
                packer.pack(method, &noise, noise.len()).is_none(),
                "{method}"
            );
            assert!(
                packer.pack(method, &[7; 65536], 65536).is_some(),
                "{method}"
            );
            assert!(packer.pack(method, &[], 0).is_none(), "{method}");
        }
    }

    #[test]
    fn a_bomb_fills_its_buffer_and_no_more() {
        let raw = vec![0; 2 << 20];
        let mut packer = Packer::default();
        for method in METHODS {
            let bomb = packer.pack(method, &raw, raw.len()).unwrap().to_vec();
            let mut unpacker = Unpacker::default();
            // It says 4 KiB and gives 2 MiB.
            let mut small = [0xaa; 4096];
            let error = unpacker
                .unpack(method.codec(), &bomb, &mut small)
                .unwrap_err();
            assert!(
                matches!(error, UnpackError::Damaged(_)),
                "{method}: {error}"
            );
            // It says more than it gives.
            let mut large = vec![0; (2 << 20) + 1];
            let error = unpacker
                .unpack(method.codec(), &bomb, &mut large)
                .unwrap_err();
            assert_eq!(
                error,
                UnpackError::Short {
                    found: 2 << 20,
                    expected: (2 << 20) + 1
                }
            );
            // And the tables are none the worse for it.
            unpacker
                .unpack(method.codec(), &bomb, &mut large[1..])
                .unwrap();
        }
    }

    proptest! {
        #[test]
        fn what_was_packed_is_unpacked(
            words in proptest::collection::vec(0_u8..4, 100..5000),
            method in 0..METHODS.len(),
        ) {
            let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
            let method = METHODS[method];
            let packed = packer.pack(method, &words, usize::MAX).unwrap().to_vec();
            let mut out = vec![0; words.len()];
            unpacker.unpack(method.codec(), &packed, &mut out).unwrap();
            prop_assert_eq!(&out, &words);
        }

        #[test]
        fn damage_is_an_error_or_other_bytes_of_the_same_length(
            at in 0_usize..1000, bit in 0_u8..8, method in 0..METHODS.len(),
        ) {
            let (mut packer, mut unpacker) = (Packer::default(), Unpacker::default());
            let raw: Vec<u8> = (0..5000_u32).map(|n| (n % 251).to_le_bytes()[0]).collect();
            let method = METHODS[method];
            let mut packed = packer.pack(method, &raw, usize::MAX).unwrap().to_vec();
            let at = at % packed.len();
            packed[at] ^= 1 << bit;
            let mut out = vec![0; raw.len()];
            // The frames inside have their own checksums.
            let _ = unpacker.unpack(method.codec(), &packed, &mut out);
        }
    }
}
