//! Blowfish with AVX-512 gathers: groups of 16 blocks of one key, up to four groups interleaved.
//!
//! Fills the gap between the scalar kernel and [`super::planes`] where the CPU's gathers are fast.

use super::{ROUNDS, Schedule};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::{Rows, WIDTH};
use crate::cipher::transpose;
use std::arch::x86_64::*;

/// Blocks of a vector of each of their words.
const GROUP: usize = 16;

/// A gather keeps the load ports busy for longer than it takes to wait for it; four groups hide the waiting.
const LANES: usize = 4 * GROUP;

/// The kernel. There is one only where the CPU has the instructions.
pub(super) struct Gather(());

impl Gather {
    /// The kernel, if the CPU has what it needs.
    pub(super) fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx512f").then_some(Self(()))
    }
}

impl Kernel<Schedule> for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn lanes(&self) -> usize {
        LANES
    }

    fn mixes_keys(&self) -> bool {
        false
    }

    fn constant_time(&self) -> bool {
        false
    }

    fn encrypt(&mut self, keys: &[&Schedule], chain: &mut [u64], rows: &mut Rows, steps: usize) {
        let rows = &mut rows[..steps];
        // SAFETY: `detect` found the instructions.
        unsafe {
            match keys.len().div_ceil(GROUP) {
                1 => encrypt::<1>(keys[0], chain, rows),
                2 => encrypt::<2>(keys[0], chain, rows),
                3 => encrypt::<3>(keys[0], chain, rows),
                _ => encrypt::<4>(keys[0], chain, rows),
            }
        }
    }

    fn decrypt(&mut self, key: &Schedule, blocks: &mut [u64]) {
        for some in blocks.chunks_mut(LANES) {
            // SAFETY: `detect` found the instructions.
            unsafe {
                match some.len().div_ceil(GROUP) {
                    1 => decrypt::<1>(key, some),
                    2 => decrypt::<2>(key, some),
                    3 => decrypt::<3>(key, some),
                    _ => decrypt::<4>(key, some),
                }
            }
        }
    }
}

/// The left and the right words of 16 blocks.
type State = [__m512i; 2];

#[target_feature(enable = "avx512f")]
fn encrypt<const G: usize>(key: &Schedule, chain: &mut [u64], rows: &mut [[u64; WIDTH]]) {
    let mut last: [State; G] = words(chain);
    for row in rows {
        let block: [State; G] = words(row);
        for (last, block) in last.iter_mut().flatten().zip(block.as_flattened()) {
            *last = _mm512_xor_si512(*last, *block);
        }
        crypt(key, |i| i, &mut last);
        blocks(&last, row);
    }
    blocks(&last, chain);
}

#[target_feature(enable = "avx512f")]
fn decrypt<const G: usize>(key: &Schedule, some: &mut [u64]) {
    let mut padded = [0; LANES];
    padded[..some.len()].copy_from_slice(some);
    let mut state: [State; G] = words(&padded);
    crypt(key, |i| ROUNDS + 1 - i, &mut state);
    blocks(&state, &mut padded);
    some.copy_from_slice(&padded[..some.len()]);
}

/// All rounds of `G` times 16 blocks; `order` gives the round keys' numbers.
#[target_feature(enable = "avx512f")]
#[inline]
fn crypt<const G: usize>(key: &Schedule, order: impl Fn(usize) -> usize, state: &mut [State; G]) {
    let p = |i| _mm512_set1_epi32(key.p[order(i)] as i32);
    for [left, _] in &mut *state {
        *left = _mm512_xor_si512(*left, p(0));
    }
    for round in 0..ROUNDS {
        for [left, right] in &mut *state {
            // The next key goes with the result.
            let next = _mm512_ternarylogic_epi32::<0x96>(*right, round_function(key, *left), p(round + 1));
            [*left, *right] = [next, *left];
        }
    }
    for [left, right] in state {
        [*left, *right] = [_mm512_xor_si512(*right, p(ROUNDS + 1)), *left];
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn round_function(key: &Schedule, x: __m512i) -> __m512i {
    let octet = _mm512_set1_epi32(0xff);
    let a = look_up(&key.s[0], _mm512_srli_epi32::<24>(x));
    let b = look_up(&key.s[1], _mm512_and_si512(_mm512_srli_epi32::<16>(x), octet));
    let c = look_up(&key.s[2], _mm512_and_si512(_mm512_srli_epi32::<8>(x), octet));
    let d = look_up(&key.s[3], _mm512_and_si512(x, octet));
    _mm512_add_epi32(_mm512_xor_si512(_mm512_add_epi32(a, b), c), d)
}

/// The words of a table for indices below 256.
#[target_feature(enable = "avx512f")]
#[inline]
fn look_up(table: &[u32; 256], index: __m512i) -> __m512i {
    // SAFETY: `round_function` keeps every index below the table's length.
    unsafe { _mm512_i32gather_epi32::<4>(index, table.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn words<const G: usize>(from: &[u64]) -> [State; G] {
    let low = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    let high = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
    let mut state = [[_mm512_setzero_si512(); 2]; G];
    for (state, eights) in state.iter_mut().zip(from.as_chunks::<8>().0.as_chunks::<2>().0) {
        let [a, b] = [transpose::load(&eights[0]), transpose::load(&eights[1])];
        *state = [_mm512_permutex2var_epi32(a, low, b), _mm512_permutex2var_epi32(a, high, b)];
    }
    state
}

#[target_feature(enable = "avx512f")]
#[inline]
fn blocks<const G: usize>(state: &[State; G], to: &mut [u64]) {
    let first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    let second = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
    for ([left, right], eights) in state.iter().zip(to.as_chunks_mut::<8>().0.as_chunks_mut::<2>().0) {
        transpose::store(_mm512_permutex2var_epi32(*left, first, *right), &mut eights[0]);
        transpose::store(_mm512_permutex2var_epi32(*left, second, *right), &mut eights[1]);
    }
}
