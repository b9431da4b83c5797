//! Random octets for IVs and padding: a ChaCha generator per worker, seeded by the kernel.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng, rngs::SysRng};

/// A buffered generator: one refill serves some dozens of packets.
pub(super) struct Random {
    generator: StdRng,
    buffer: [u8; 1024],
    used: usize,
}

impl Random {
    /// Seeds the generator from the kernel.
    ///
    /// # Errors
    /// The kernel has no random octets (early boot, seccomp).
    pub(super) fn new() -> anyhow::Result<Self> {
        let generator = StdRng::try_from_rng(&mut SysRng)
            .map_err(|error| anyhow::anyhow!("getrandom: {error}; the kernel gives no random numbers"))?;
        Ok(Self { generator, buffer: [0; 1024], used: 1024 })
    }

    /// Returns the generator.
    pub(super) fn generator(&mut self) -> &mut StdRng {
        &mut self.generator
    }

    /// Returns the next `N` random octets.
    pub(super) fn octets<const N: usize>(&mut self) -> [u8; N] {
        const { assert!(N <= 64) };
        if self.buffer.len() - self.used < N {
            self.generator.fill_bytes(&mut self.buffer);
            self.used = 0;
        }
        let mut octets = [0; N];
        octets.copy_from_slice(&self.buffer[self.used..self.used + N]);
        self.used += N;
        octets
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_draws_are_alike() {
        let mut random = Random::new().unwrap();
        let draws: std::collections::HashSet<[u8; 15]> = (0..10_000).map(|_| random.octets()).collect();
        assert_eq!(draws.len(), 10_000);
    }
}
