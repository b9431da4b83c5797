//! Blowfish with AVX-512 VBMI: 64 or 128 blocks of one key, constant time.
//!
//! A vector holds one of the eight octets of 64 blocks: a *plane*. The tables are in vectors too, so a look-up of an
//! octet is a permutation of a table: no address depends on data. A table of 256 words fills 16 vectors, four for each
//! octet of the result. Additions carry from plane to plane.

mod pairs;
mod quarters;

use super::{ROUNDS, Schedule};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::{Rows, WIDTH};
use crate::cipher::transpose;
use std::arch::x86_64::*;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Blocks in a vector: it holds one octet of each of them.
const GROUP: usize = 64;

/// Two groups hide each other's latency.
const LANES: usize = 2 * GROUP;

/// The expanded key in the form that this kernel uses.
#[derive(Zeroize, ZeroizeOnDrop)]
#[repr(C, align(64))]
pub(super) struct Tables {
    /// The octets of the four tables' words, least significant first, in quarters of 64 entries.
    s: [[[[u8; 64]; 4]; 4]; 4],
    /// The octets of the round keys, least significant first, each repeated four times for a broadcast.
    p: [[u32; 4]; ROUNDS + 2],
}

impl Tables {
    pub(super) fn zero() -> Self {
        Self { s: [[[[0; 64]; 4]; 4]; 4], p: [[0; 4]; ROUNDS + 2] }
    }

    pub(super) fn set(&mut self, s: &[[u32; 256]; 4], p: &[u32; ROUNDS + 2]) {
        for (planes, words) in self.s.iter_mut().zip(s) {
            for (octet, plane) in planes.iter_mut().enumerate() {
                for (to, word) in plane.as_flattened_mut().iter_mut().zip(words) {
                    *to = (word >> (8 * octet)) as u8;
                }
            }
        }
        for (planes, word) in self.p.iter_mut().zip(p) {
            *planes = word.to_le_bytes().map(|octet| u32::from(octet) * 0x0101_0101);
        }
    }
}

/// The kernel, with look-ups by [`quarters`] or else by [`pairs`]. It exists only if the CPU has the instructions.
pub(super) struct Planes<const QUARTERS: bool>(());

impl<const QUARTERS: bool> Planes<QUARTERS> {
    /// Returns the kernel if the CPU has the instructions.
    pub(super) fn detect() -> Option<Self> {
        let detected = is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("gfni");
        detected.then_some(Self(()))
    }
}

impl<const QUARTERS: bool> Kernel<Schedule> for Planes<QUARTERS> {
    fn name(&self) -> &'static str {
        if QUARTERS { "planes-quarters" } else { "planes-pairs" }
    }

    fn lanes(&self) -> usize {
        LANES
    }

    fn mixes_keys(&self) -> bool {
        false
    }

    fn constant_time(&self) -> bool {
        true
    }

    fn encrypt(&mut self, keys: &[&Schedule], chain: &mut [u64], rows: &mut Rows, steps: usize) {
        let (groups, _) = chain.as_chunks_mut();
        let (table, rows) = (&keys[0].tables, &mut rows[..steps]);
        match groups {
            [first, second, ..] if keys.len() > GROUP => {
                // SAFETY: `detect` found the instructions.
                unsafe { encrypt::<2, QUARTERS>(table, [first, second], rows) };
            }
            [first, ..] => {
                // SAFETY: `detect` found the instructions.
                unsafe { encrypt::<1, QUARTERS>(table, [first], rows) };
            }
            [] => {}
        }
    }

    fn decrypt(&mut self, key: &Schedule, blocks: &mut [u64]) {
        // SAFETY: `detect` found the instructions.
        unsafe { decrypt::<QUARTERS>(&key.tables, blocks) };
    }
}

/// The eight planes of 64 blocks, least significant octet first: those of the left word, then those of the right word.
type State = [__m512i; 8];

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
fn encrypt<const G: usize, const QUARTERS: bool>(
    key: &Tables,
    chain: [&mut [u64; GROUP]; G],
    rows: &mut [[u64; WIDTH]],
) {
    let mut last = chain.each_ref().map(|chain| planes(chain));
    for row in rows {
        let (groups, _) = row.as_chunks_mut();
        for (last, group) in last.iter_mut().zip(&*groups) {
            for (last, block) in last.iter_mut().zip(planes(group)) {
                *last = _mm512_xor_si512(*last, block);
            }
        }
        crypt::<G, QUARTERS>(key, |i| i, &mut last);
        for (last, group) in last.iter().zip(groups) {
            *group = blocks(*last);
        }
    }
    for (last, chain) in last.into_iter().zip(chain) {
        *chain = blocks(last);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
fn decrypt<const QUARTERS: bool>(key: &Tables, all: &mut [u64]) {
    let (whole, rest) = all.as_chunks_mut::<GROUP>();
    let (pairs, single) = whole.as_chunks_mut();
    for pair in pairs {
        *pair = decrypt_groups::<2, QUARTERS>(key, pair);
    }
    for group in single {
        [*group] = decrypt_groups::<1, QUARTERS>(key, &[*group]);
    }
    if !rest.is_empty() {
        let mut padded = [0; GROUP];
        padded[..rest.len()].copy_from_slice(rest);
        [padded] = decrypt_groups::<1, QUARTERS>(key, &[padded]);
        rest.copy_from_slice(&padded[..rest.len()]);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn decrypt_groups<const G: usize, const QUARTERS: bool>(key: &Tables, groups: &[[u64; GROUP]; G]) -> [[u64; GROUP]; G] {
    let mut state = groups.each_ref().map(|group| planes(group));
    crypt::<G, QUARTERS>(key, |i| ROUNDS + 1 - i, &mut state);
    state.map(|state| blocks(state))
}

/// All rounds of `G` times 64 blocks; `order` gives the indices of the round keys.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn crypt<const G: usize, const QUARTERS: bool>(key: &Tables, order: impl Fn(usize) -> usize, state: &mut [State; G]) {
    let whiten = |half: &mut [__m512i], i| {
        for (plane, octet) in half.iter_mut().zip(key.p[order(i)]) {
            *plane = _mm512_xor_si512(*plane, _mm512_set1_epi32(octet as i32));
        }
    };
    for state in &mut *state {
        whiten(&mut state[..4], 0);
    }
    // Two rounds at a time, after which the words are in their places again. The next round key is XORed in together
    // with a round's result, so that the argument of the next round is ready at once.
    for round in (0..ROUNDS).step_by(2) {
        let next = [&key.p[order(round + 1)], &key.p[order(round + 2)]];
        if QUARTERS {
            quarters::two_rounds(key, next, state);
        } else {
            pairs::two_rounds(key, next, state);
        }
    }
    for state in state {
        whiten(&mut state[4..], ROUNDS + 1);
        state.rotate_left(4);
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(quarter: &[u8; 64]) -> __m512i {
    // SAFETY: the array has the vector's 64 octets, and the instruction asks for no alignment.
    unsafe { _mm512_loadu_si512(quarter.as_ptr().cast()) }
}

/// The permutation that puts equal octets of eight blocks side by side; it is its own inverse.
const OCTET_TRANSPOSE: [u8; 64] = {
    let mut order = [0; 64];
    let mut i = 0;
    while i < 64 {
        order[i] = (i % 8 * 8 + i / 8) as u8;
        i += 1;
    }
    order
};

#[target_feature(enable = "avx512f,avx512vbmi")]
#[inline]
fn planes(blocks: &[u64; GROUP]) -> State {
    let order = load(&OCTET_TRANSPOSE);
    let eights = blocks.as_chunks::<8>().0;
    let vectors = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| _mm512_permutexvar_epi8(order, transpose::load(&eights[i])));
    transpose::vectors(vectors)
}

#[target_feature(enable = "avx512f,avx512vbmi")]
#[inline]
fn blocks(state: State) -> [u64; GROUP] {
    let order = load(&OCTET_TRANSPOSE);
    let mut blocks = [0; GROUP];
    for (vector, eight) in transpose::vectors(state).into_iter().zip(blocks.as_chunks_mut::<8>().0) {
        transpose::store(_mm512_permutexvar_epi8(order, vector), eight);
    }
    blocks
}
