//! What the vector kernels of IDEA have in common: everything but the instructions.
//!
//! A vector holds one of the four words of many blocks. The shuffles between blocks and words work within 128-bit parts,
//! so that the words of a block stand in a place of their own ([`place`]), the same in all four vectors.

use super::{ROUNDS, SUBKEYS};
use zeroize::Zeroize;

/// Subkeys, and behind them what a product of zero wants: 1 less each subkey that multiplies, four a round and two.
pub(super) const ENTRIES: usize = SUBKEYS + 4 * ROUNDS + 2;

/// Where the difference for subkey `i` stands; `i` is one that multiplies.
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

/// The entries of a direction of a key.
fn entries(subkeys: &[u16; SUBKEYS]) -> [u16; ENTRIES] {
    let mut entries = [0; ENTRIES];
    entries[..SUBKEYS].copy_from_slice(subkeys);
    for round in 0..=ROUNDS {
        for place in [0, 3, 4, 5] {
            if let Some(subkey) = subkeys.get(6 * round + place) {
                entries[zero_of(6 * round + place)] = 1u16.wrapping_sub(*subkey);
            }
        }
    }
    entries
}

/// One key for all lanes: each entry twice, for the broadcast of 32 bits is the one that costs nothing but a load.
pub(super) struct Uniform(pub(super) [u32; ENTRIES]);

impl Uniform {
    pub(super) fn new(subkeys: &[u16; SUBKEYS]) -> Self {
        let mut uniform = [0; ENTRIES];
        for (both, entry) in uniform.iter_mut().zip(entries(subkeys)) {
            *both = u32::from(entry) * 0x0001_0001;
        }
        Self(uniform)
    }
}

impl Drop for Uniform {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

/// A key for each lane: row `i` is entry `i` of `W` lanes, in their places.
#[repr(align(64))]
pub(super) struct Mixed<const W: usize>(pub(super) [[u16; W]; ENTRIES]);

impl<const W: usize> Mixed<W> {
    pub(super) fn new() -> Self {
        Self([[0; W]; ENTRIES])
    }

    /// Gives the lane at `place` a key.
    pub(super) fn set(&mut self, place: usize, subkeys: &[u16; SUBKEYS]) {
        let mut entries = entries(subkeys);
        for (row, entry) in self.0.iter_mut().zip(entries) {
            row[place] = entry;
        }
        entries.zeroize();
    }

    pub(super) fn wipe(&mut self) {
        self.0.iter_mut().for_each(|row| row.zeroize());
    }
}

/// The place of block `lane` in vectors of `n` words.
pub(super) const fn place(lane: usize, n: usize) -> usize {
    let (group, lane) = (lane / n, lane % n);
    let (vector, block) = (lane / (n / 4), lane % (n / 4));
    group * n + block / 2 * 8 + vector * 2 + block % 2
}

/// Makes a kernel `$name` for vectors `$Vector` of `$n` words, two at a time, out of the instructions in scope: `load`,
/// `store`, `spread` (a 32-bit broadcast), `add`, `xor`, `multiply`, `unpack` (low and high halves by 16, 32, 64 bits).
macro_rules! kernel {
    ($Kernel:ident, $name:literal, $feature:literal, $Vector:ty, $n:literal) => {
        /// The kernel. There is one only where the CPU has the instructions.
        pub(in crate::cipher) struct $Kernel {
            mixed: Box<Mixed<LANES>>,
            dirty: bool,
        }

        const LANES: usize = 2 * $n;

        impl $Kernel {
            /// The kernel, if the CPU has what it needs.
            pub(in crate::cipher) fn detect() -> Option<Self> {
                detected().then(|| Self { mixed: Box::new(Mixed::new()), dirty: false })
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

            fn encrypt(&mut self, keys: &[&Schedule], fresh: u64, chain: &mut [u64], rows: &mut Rows, steps: usize) {
                let rows = &mut rows[..steps];
                let Some(chain) = chain.first_chunk_mut::<LANES>() else { unreachable!("a chain for every lane") };
                if keys.iter().all(|key| std::ptr::eq(*key, keys[0])) {
                    let uniform = Uniform::new(&keys[0].encrypt);
                    // SAFETY: `detect` found the instructions.
                    unsafe { encrypt_uniform(&uniform, keys.len(), chain, rows) };
                } else {
                    for (lane, key) in keys.iter().enumerate() {
                        if !self.dirty || fresh & 1 << lane != 0 {
                            self.mixed.set(place(lane, $n), &key.encrypt);
                        }
                    }
                    self.dirty = true;
                    // SAFETY: `detect` found the instructions.
                    unsafe { encrypt_mixed(&self.mixed, keys.len(), chain, rows) };
                }
            }

            fn decrypt(&mut self, key: &Schedule, blocks: &mut [u64]) {
                let uniform = Uniform::new(&key.decrypt);
                // SAFETY: `detect` found the instructions.
                unsafe { decrypt(&uniform, blocks) };
            }

            fn wipe(&mut self) {
                if std::mem::take(&mut self.dirty) {
                    self.mixed.wipe();
                }
            }
        }

        #[target_feature(enable = $feature)]
        fn encrypt_uniform(keys: &Uniform, lanes: usize, chain: &mut [u64; LANES], rows: &mut [[u64; WIDTH]]) {
            if lanes > $n {
                chain_rows::<2>(|i, _| spread(keys.0[i]), chain, rows);
            } else {
                chain_rows::<1>(|i, _| spread(keys.0[i]), chain, rows);
            }
        }

        #[target_feature(enable = $feature)]
        fn encrypt_mixed(keys: &Mixed<LANES>, lanes: usize, chain: &mut [u64; LANES], rows: &mut [[u64; WIDTH]]) {
            if lanes > $n {
                chain_rows::<2>(|i, group| load_words(&keys.0[i].as_chunks().0[group]), chain, rows);
            } else {
                chain_rows::<1>(|i, group| load_words(&keys.0[i].as_chunks().0[group]), chain, rows);
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
            for some in all.chunks_mut(LANES) {
                let mut padded = [0; LANES];
                padded[..some.len()].copy_from_slice(some);
                if some.len() > $n {
                    let mut x = words::<2>(&padded);
                    crypt(|i, _| spread(keys.0[i]), &mut x);
                    blocks(&x, &mut padded);
                } else {
                    let mut x = words::<1>(&padded);
                    crypt(|i, _| spread(keys.0[i]), &mut x);
                    blocks(&x, &mut padded);
                }
                some.copy_from_slice(&padded[..some.len()]);
            }
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

        /// The other way round.
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

        /// Eight rounds and a half on `G` groups of blocks; `key(i, group)` gives entry `i`.
        #[target_feature(enable = $feature)]
        #[inline]
        fn crypt<const G: usize>(key: impl Fn(usize, usize) -> $Vector, x: &mut [[$Vector; 4]; G]) {
            for round in 0..ROUNDS {
                let i = 6 * round;
                for (group, [x1, x2, x3, x4]) in x.iter_mut().enumerate() {
                    let multiply_by = |x, i| multiply(x, key(i, group), key(zero_of(i), group));
                    let y1 = multiply_by(*x1, i);
                    let y2 = add(*x2, key(i + 1, group));
                    let y3 = add(*x3, key(i + 2, group));
                    let y4 = multiply_by(*x4, i + 3);
                    let t = multiply_by(xor(y1, y3), i + 4);
                    let u = multiply_by(add(xor(y2, y4), t), i + 5);
                    let v = add(t, u);
                    [*x1, *x2, *x3, *x4] = [xor(y1, u), xor(y3, u), xor(y2, v), xor(y4, v)];
                }
            }
            let i = 6 * ROUNDS;
            for (group, [x1, x2, x3, x4]) in x.iter_mut().enumerate() {
                let multiply_by = |x, i| multiply(x, key(i, group), key(zero_of(i), group));
                [*x1, *x2, *x3, *x4] = [
                    multiply_by(*x1, i),
                    add(*x3, key(i + 1, group)),
                    add(*x2, key(i + 2, group)),
                    multiply_by(*x4, i + 3),
                ];
            }
        }
    };
}
pub(super) use kernel;
