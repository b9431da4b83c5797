//! The common code of IDEA's vector kernels, without the instructions.
//!
//! A vector holds one of the four words of many blocks. The shuffles between blocks and words work within 128-bit
//! parts, so the words of a block are at a position ([`place`]) that is the same in all four vectors but is not the
//! block's number.

use super::{ROUNDS, SUBKEYS};
use zeroize::Zeroize;

/// Subkeys that are factors of a multiplication: four a round, and two at the end.
const FACTORS: usize = 4 * ROUNDS + 2;

/// The subkeys, and behind them two words for each that is a factor; these handle the factor 0, which means 65536.
pub(super) const ENTRIES: usize = SUBKEYS + 2 * FACTORS;

/// Index of the entry 1 - subkey `i`, for the product if either factor is 0; `i` is a subkey that multiplies.
pub(super) const fn zero_of(i: usize) -> usize {
    let (round, place) = (i / 6, i % 6);
    SUBKEYS
        + 4 * round
        + if place < 3 {
            0
        } else if round < ROUNDS {
            place - 2
        } else {
            1
        }
}

/// Index of the mask for the other factor; after the mask, that factor is 0 if either factor is 0.
pub(super) const fn mask_of(i: usize) -> usize {
    zero_of(i) + FACTORS
}

/// The entries of one direction of a key.
fn entries(subkeys: &[u16; SUBKEYS]) -> [u16; ENTRIES] {
    let mut entries = [0; ENTRIES];
    entries[..SUBKEYS].copy_from_slice(subkeys);
    for (i, subkey) in subkeys.iter().enumerate() {
        if matches!(i % 6, 0 | 3..=5) {
            entries[zero_of(i)] = 1u16.wrapping_sub(*subkey);
            entries[mask_of(i)] = u16::from(*subkey != 0).wrapping_neg();
        }
    }
    entries
}

/// One key for all lanes. Each entry is stored twice, because only the broadcast of 32 bits costs no more than a load.
pub(super) struct Uniform(pub(super) [u32; ENTRIES]);

impl Uniform {
    pub(super) fn new() -> Self {
        Self([0; ENTRIES])
    }

    pub(super) fn set(&mut self, subkeys: &[u16; SUBKEYS]) {
        let mut entries = entries(subkeys);
        for (both, entry) in self.0.iter_mut().zip(entries) {
            *both = u32::from(entry) * 0x0001_0001;
        }
        entries.zeroize();
    }

    pub(super) fn wipe(&mut self) {
        self.0.zeroize();
    }
}

/// Added to the address of a key, it stands for the key's other direction. All addresses of keys are even.
pub(super) const DECRYPTS: usize = 1;

/// A key for each lane: row `i` is entry `i` of `W` lanes, at their positions.
#[repr(align(64))]
pub(super) struct Mixed<const W: usize>(pub(super) [[u16; W]; ENTRIES]);

impl<const W: usize> Mixed<W> {
    pub(super) fn new() -> Self {
        Self([[0; W]; ENTRIES])
    }

    /// Sets the key of the lane at `place`.
    pub(super) fn set(&mut self, place: usize, subkeys: &[u16; SUBKEYS]) {
        let mut entries = entries(subkeys);
        for (row, entry) in self.0.iter_mut().zip(entries) {
            row[place] = entry;
        }
        entries.zeroize();
    }

    pub(super) fn wipe(&mut self) {
        self.0.iter_mut().for_each(Zeroize::zeroize);
    }
}

/// The position of block `lane` in vectors of `n` words.
pub(super) const fn place(lane: usize, n: usize) -> usize {
    let (group, lane) = (lane / n, lane % n);
    let (vector, block) = (lane / (n / 4), lane % (n / 4));
    group * n + block / 2 * 8 + vector * 2 + block % 2
}

/// Makes a kernel `$name` for vectors `$Vector` of `$n` words, four at a time, from the instructions in scope: `load`,
/// `store`, `spread` (a 32-bit broadcast), `add`, `xor`, `multiply` (its parameter is the number of vectors), `unpack`
/// (low and high halves by 16, 32, 64 bits).
macro_rules! kernel {
    ($Kernel:ident, $name:literal, $feature:literal, $Vector:ty, $n:literal) => {
        /// The kernel. It exists only if the CPU has the instructions.
        pub(in crate::cipher) struct $Kernel {
            uniform: Uniform,
            mixed: Box<Mixed<LANES>>,
            /// Addresses of the keys in `uniform` (the first entry) and in each lane of `mixed` (the others); 0 for
            /// none. They are valid until [`Kernel::wipe`], because no key of a batch is dropped before that.
            holds: [usize; LANES + 1],
        }

        const LANES: usize = 4 * $n;

        impl $Kernel {
            /// Returns the kernel if the CPU has the instructions.
            pub(in crate::cipher) fn detect() -> Option<Self> {
                detected().then(|| Self {
                    uniform: Uniform::new(),
                    mixed: Box::new(Mixed::new()),
                    holds: [0; LANES + 1],
                })
            }
        }

        impl Kernel<Schedule> for $Kernel {
            fn name(&self) -> &'static str {
                $name
            }

            fn lanes(&self) -> usize {
                LANES
            }

            fn mixes_keys(&self) -> bool {
                true
            }

            fn constant_time(&self) -> bool {
                true
            }

            fn encrypt(&mut self, keys: &[&Schedule], chain: &mut [u64], rows: &mut Rows, steps: usize) {
                let rows = &mut rows[..steps];
                let Some(chain) = chain.first_chunk_mut::<LANES>() else { unreachable!("a chain for every lane") };
                if keys.iter().all(|key| std::ptr::eq(*key, keys[0])) {
                    let address = std::ptr::from_ref(keys[0]).addr();
                    if std::mem::replace(&mut self.holds[0], address) != address {
                        self.uniform.set(&keys[0].encrypt);
                    }
                    // SAFETY: `detect` found the instructions.
                    unsafe { encrypt_uniform(&self.uniform, keys.len(), chain, rows) };
                } else {
                    for ((lane, key), holds) in keys.iter().enumerate().zip(&mut self.holds[1..]) {
                        let address = std::ptr::from_ref(*key).addr();
                        if std::mem::replace(holds, address) != address {
                            self.mixed.set(place(lane, $n), &key.encrypt);
                        }
                    }
                    // SAFETY: `detect` found the instructions.
                    unsafe { encrypt_mixed(&self.mixed, keys.len(), chain, rows) };
                }
            }

            fn decrypt(&mut self, key: &Schedule, blocks: &mut [u64]) {
                let address = std::ptr::from_ref(key).addr() | DECRYPTS;
                if std::mem::replace(&mut self.holds[0], address) != address {
                    self.uniform.set(&key.decrypt);
                }
                // SAFETY: `detect` found the instructions.
                unsafe { decrypt(&self.uniform, blocks) };
            }

            fn wipe(&mut self) {
                if self.holds[0] != 0 {
                    self.uniform.wipe();
                }
                if self.holds[1..].iter().any(|address| *address != 0) {
                    self.mixed.wipe();
                }
                self.holds = [0; LANES + 1];
            }
        }

        #[target_feature(enable = $feature)]
        fn encrypt_uniform(keys: &Uniform, lanes: usize, chain: &mut [u64; LANES], rows: &mut [[u64; WIDTH]]) {
            match lanes.div_ceil($n) {
                1 => chain_rows::<1>(|i, _| spread(keys.0[i]), chain, rows),
                2 => chain_rows::<2>(|i, _| spread(keys.0[i]), chain, rows),
                3 => chain_rows::<3>(|i, _| spread(keys.0[i]), chain, rows),
                _ => chain_rows::<4>(|i, _| spread(keys.0[i]), chain, rows),
            }
        }

        #[target_feature(enable = $feature)]
        fn encrypt_mixed(keys: &Mixed<LANES>, lanes: usize, chain: &mut [u64; LANES], rows: &mut [[u64; WIDTH]]) {
            let key = |i: usize, group: usize| load_words(&keys.0[i].as_chunks().0[group]);
            match lanes.div_ceil($n) {
                1 => chain_rows::<1>(key, chain, rows),
                2 => chain_rows::<2>(key, chain, rows),
                3 => chain_rows::<3>(key, chain, rows),
                _ => chain_rows::<4>(key, chain, rows),
            }
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn chain_rows<const G: usize>(
            key: impl Fn(usize, usize) -> $Vector + Copy,
            chain: &mut [u64; LANES],
            rows: &mut [[u64; WIDTH]],
        ) {
            let mut last = words::<G>(chain);
            for row in rows {
                let block = words::<G>(row);
                for group in 0..G {
                    for word in 0..4 {
                        last[group][word] = xor(last[group][word], block[group][word]);
                    }
                }
                crypt(key, &mut last);
                blocks(&last, row);
            }
            blocks(&last, chain);
        }

        #[target_feature(enable = $feature)]
        fn decrypt(keys: &Uniform, all: &mut [u64]) {
            let (whole, rest) = all.as_chunks_mut::<LANES>();
            for blocks in whole {
                decrypt_groups::<4>(keys, blocks);
            }
            if rest.is_empty() {
                return;
            }
            let mut padded = [0; LANES];
            padded[..rest.len()].copy_from_slice(rest);
            match rest.len().div_ceil($n) {
                1 => decrypt_groups::<1>(keys, &mut padded),
                2 => decrypt_groups::<2>(keys, &mut padded),
                3 => decrypt_groups::<3>(keys, &mut padded),
                _ => decrypt_groups::<4>(keys, &mut padded),
            }
            rest.copy_from_slice(&padded[..rest.len()]);
        }

        #[target_feature(enable = $feature)]
        #[inline]
        fn decrypt_groups<const G: usize>(keys: &Uniform, padded: &mut [u64; LANES]) {
            let mut x = words::<G>(padded);
            crypt(|i, _| spread(keys.0[i]), &mut x);
            blocks(&x, padded);
        }

        /// The four words of `$n` blocks a group, the first word first.
        #[target_feature(enable = $feature)]
        #[inline]
        fn words<const G: usize>(from: &[u64]) -> [[$Vector; 4]; G] {
            let mut x = [[spread(0); 4]; G];
            for (x, from) in x.iter_mut().zip(from.as_chunks::<$n>().0) {
                let [a, b, c, d] = [0, 1, 2, 3].map(|i| load(&from.as_chunks().0[i]));
                let ([ab0, ab1], [cd0, cd1]) = (unpack16(a, b), unpack16(c, d));
                let ([ab0, ab1], [cd0, cd1]) = (unpack16(ab0, ab1), unpack16(cd0, cd1));
                let ([x4, x3], [x2, x1]) = (unpack64(ab0, cd0), unpack64(ab1, cd1));
                *x = [x1, x2, x3, x4];
            }
            x
        }

        /// The inverse.
        #[target_feature(enable = $feature)]
        #[inline]
        fn blocks<const G: usize>(x: &[[$Vector; 4]; G], to: &mut [u64]) {
            for (x, to) in x.iter().zip(to.as_chunks_mut::<$n>().0) {
                let [x1, x2, x3, x4] = *x;
                let ([ab43, cd43], [ab21, cd21]) = (unpack16(x4, x3), unpack16(x2, x1));
                let ([a, b], [c, d]) = (unpack32(ab43, ab21), unpack32(cd43, cd21));
                for (vector, to) in [a, b, c, d].into_iter().zip(to.as_chunks_mut().0) {
                    store(vector, to);
                }
            }
        }

        /// Eight and a half rounds on `G` groups of blocks; `key(i, group)` gives entry `i`. Each step is done for all
        /// groups before the next one, because each step waits for the one before.
        #[target_feature(enable = $feature)]
        #[inline]
        fn crypt<const G: usize>(key: impl Fn(usize, usize) -> $Vector, x: &mut [[$Vector; 4]; G]) {
            let multiply_by =
                |x, i, group| multiply::<G>(x, key(i, group), key(zero_of(i), group), key(mask_of(i), group));
            let (mut t, mut u) = ([spread(0); G], [spread(0); G]);
            for i in (0..6 * ROUNDS).step_by(6) {
                for (group, [x1, x2, x3, x4]) in x.iter_mut().enumerate() {
                    *x1 = multiply_by(*x1, i, group);
                    *x3 = add(*x3, key(i + 2, group));
                    *x4 = multiply_by(*x4, i + 3, group);
                    *x2 = add(*x2, key(i + 1, group));
                }
                for (group, [x1, _, x3, _]) in x.iter().enumerate() {
                    t[group] = multiply_by(xor(*x1, *x3), i + 4, group);
                }
                for (group, [_, x2, _, x4]) in x.iter().enumerate() {
                    u[group] = multiply_by(add(xor(*x2, *x4), t[group]), i + 5, group);
                }
                for (group, [x1, x2, x3, x4]) in x.iter_mut().enumerate() {
                    let (u, v) = (u[group], add(t[group], u[group]));
                    [*x1, *x2, *x3, *x4] = [xor(*x1, u), xor(*x3, u), xor(*x2, v), xor(*x4, v)];
                }
            }
            let i = 6 * ROUNDS;
            for (group, [x1, x2, x3, x4]) in x.iter_mut().enumerate() {
                *x1 = multiply_by(*x1, i, group);
                [*x2, *x3] = [add(*x3, key(i + 1, group)), add(*x2, key(i + 2, group))];
                *x4 = multiply_by(*x4, i + 3, group);
            }
        }

        #[cfg(test)]
        mod tests {
            use super::*;

            #[test]
            fn multiplication_is_right_for_every_zero_operand_and_a_grid() {
                if detected() {
                    // SAFETY: `detected` found the instructions.
                    unsafe { multiplies() };
                }
            }

            #[target_feature(enable = $feature)]
            fn multiplies() {
                for b in [0, 1, 2, 0x7fff, 0x8000, 0xfffe, 0xffff, 40503] {
                    for first in (0..=u16::MAX).step_by($n) {
                        for swap in [false, true] {
                            let mut a: [u16; $n] = std::array::from_fn(|i| first + i as u16);
                            let mut b = [b; $n];
                            if swap {
                                std::mem::swap(&mut a, &mut b);
                            }
                            let zero = load_words(&b.map(|b| 1u16.wrapping_sub(b)));
                            let mask = load_words(&b.map(|b| u16::from(b != 0).wrapping_neg()));
                            let alone = multiply::<1>(load_words(&a), load_words(&b), zero, mask);
                            let many = multiply::<4>(load_words(&a), load_words(&b), zero, mask);
                            for product in [alone, many] {
                                let mut blocks = [0; $n / 4];
                                store(product, &mut blocks);
                                for i in 0..$n {
                                    let product = (blocks[i / 4] >> (16 * (i % 4))) as u16;
                                    assert_eq!(product, crate::cipher::idea::multiply(a[i], b[i]), "{}*{}", a[i], b[i]);
                                }
                            }
                        }
                    }
                }
            }
        }
    };
}
pub(super) use kernel;
