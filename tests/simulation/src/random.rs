// SPDX-License-Identifier: GPL-2.0-only

//! Random numbers that are the same for the same seed.

/// xorshift64*, G. Marsaglia and S. Vigna.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        let mut random = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678_9abc_def1 | 1);
        for _ in 0..4 {
            random.draw();
        }
        random
    }

    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below that one; 0 if there is none.
    pub fn below(&mut self, end: u64) -> u64 {
        if end == 0 {
            0
        } else {
            (self.draw() >> 11) % end
        }
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}
