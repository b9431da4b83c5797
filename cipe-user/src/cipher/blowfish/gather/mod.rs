//! Blowfish with AVX-512 gathers: groups of 16 blocks, up to four groups interleaved, with any mix of keys.
//!
//! Faster than the scalar kernel and [`super::planes`] for numbers of lanes between theirs, if the CPU's gathers are
//! fast.

mod keys;

use super::{ROUNDS, Schedule, scalar};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::{Rows, WIDTH};
use crate::cipher::transpose;
use arrayvec::ArrayVec;
use keys::{Each, Keys};
use std::arch::x86_64::*;
use std::ptr;

/// Blocks in a vector: it holds one word of each of them.
const GROUP: usize = 16;

/// A gather has a latency longer than its use of the load ports; four interleaved groups hide the latency.
const LANES: usize = 4 * GROUP;

/// Limits of keys and lanes that run together: at most (keys, lanes). The tables of a key fill 4 KiB of the cache, and
/// more groups at once use them more often.
const MAX_KEYS_AND_LANES: [(usize, usize); 2] = [(8, LANES), (16, 2 * GROUP)];

/// With several keys, at least so many lanes are needed for two groups; fewer are faster in scalar registers.
const MIN_MIXED_LANES: usize = 21;

/// The kernel. It exists only if the CPU has the instructions.
pub(super) struct Gather {
    each: Box<Each>,
}

impl Gather {
    /// Returns the kernel if the CPU has the instructions.
    pub(super) fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx512f").then(|| Self { each: Box::new(Each::new()) })
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
        true
    }

    fn constant_time(&self) -> bool {
        false
    }

    fn encrypt(&mut self, keys: &[&Schedule], chain: &mut [u64], rows: &mut Rows, steps: usize) {
        let rows = &mut rows[..steps];
        let mut from = 0;
        while from < keys.len() {
            // Groups are always whole: they must not overwrite columns of other lanes.
            let together = together(&keys[from..]).filter(|lanes| from + lanes.next_multiple_of(GROUP) <= WIDTH);
            let lanes = together.unwrap_or(scalar::FULL_STEP_LANES).min(keys.len() - from);
            self.encrypt_some(&keys[from..][..lanes], together.is_some(), from, &mut chain[from..], rows);
            from += lanes;
        }
    }

    fn decrypt(&mut self, key: &Schedule, blocks: &mut [u64]) {
        let key = Keys::one(key, &self.each);
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

    fn wipe(&mut self) {
        self.each.wipe();
    }
}

impl Gather {
    /// Encrypts lanes, the first of which has column `from` of `rows`: all of them `together`, or a few at a time.
    fn encrypt_some(
        &mut self,
        keys: &[&Schedule],
        together: bool,
        from: usize,
        chain: &mut [u64],
        rows: &mut [[u64; WIDTH]],
    ) {
        let groups = keys.len().div_ceil(GROUP);
        if together && keys.iter().all(|key| ptr::eq(*key, keys[0])) {
            // SAFETY: `detect` found the instructions.
            unsafe { encrypt_groups(Keys::one(keys[0], &self.each), groups, from, chain, rows) };
        } else if together && let Some(keys) = Keys::many(keys, &mut self.each) {
            // SAFETY: `detect` found the instructions.
            unsafe { encrypt_groups(keys, groups, from, chain, rows) };
        } else {
            scalar::encrypt_columns(keys, from, chain, rows);
        }
    }
}

/// Returns how many of the lanes to process together; `None` if a few at a time are faster.
fn together(keys: &[&Schedule]) -> Option<usize> {
    let mut seen = ArrayVec::<&Schedule, { MAX_KEYS_AND_LANES[1].0 }>::new();
    let mut most = 0;
    for (lane, key) in keys.iter().enumerate().take(LANES) {
        if !seen.iter().any(|seen| ptr::eq(*seen, *key)) && seen.try_push(key).is_err() {
            break;
        }
        if MAX_KEYS_AND_LANES.iter().any(|(keys, lanes)| seen.len() <= *keys && lane < *lanes) {
            most = lane + 1;
        }
    }
    // Other lanes follow: the last group must not write to their columns.
    let most = if most < keys.len() { most - most % GROUP } else { most };
    (most >= MIN_MIXED_LANES || seen.len() == 1).then_some(most)
}

/// The left and the right words of 16 blocks.
type State = [__m512i; 2];

#[target_feature(enable = "avx512f")]
fn encrypt_groups<const MANY: bool>(
    keys: Keys<'_, MANY>,
    groups: usize,
    from: usize,
    chain: &mut [u64],
    rows: &mut [[u64; WIDTH]],
) {
    match groups {
        1 => encrypt::<1, MANY>(keys, from, chain, rows),
        2 => encrypt::<2, MANY>(keys, from, chain, rows),
        3 => encrypt::<3, MANY>(keys, from, chain, rows),
        _ => encrypt::<4, MANY>(keys, from, chain, rows),
    }
}

#[target_feature(enable = "avx512f")]
fn encrypt<const G: usize, const MANY: bool>(
    keys: Keys<'_, MANY>,
    from: usize,
    chain: &mut [u64],
    rows: &mut [[u64; WIDTH]],
) {
    let mut last: [State; G] = words(chain);
    for row in rows {
        let row = &mut row[from..];
        let block: [State; G] = words(row);
        for (last, block) in last.iter_mut().flatten().zip(block.as_flattened()) {
            *last = _mm512_xor_si512(*last, *block);
        }
        crypt(keys, |i| i, &mut last);
        blocks(&last, row);
    }
    blocks(&last, chain);
}

#[target_feature(enable = "avx512f")]
fn decrypt<const G: usize>(key: Keys<'_, false>, some: &mut [u64]) {
    let mut padded = [0; LANES];
    padded[..some.len()].copy_from_slice(some);
    let mut state: [State; G] = words(&padded);
    crypt(key, |i| ROUNDS + 1 - i, &mut state);
    blocks(&state, &mut padded);
    some.copy_from_slice(&padded[..some.len()]);
}

/// All rounds of `G` times 16 blocks; `order` gives the indices of the round keys.
#[target_feature(enable = "avx512f")]
#[inline]
fn crypt<const G: usize, const MANY: bool>(
    keys: Keys<'_, MANY>,
    order: impl Fn(usize) -> usize,
    state: &mut [State; G],
) {
    let p = |i, group| keys.p(order(i), group);
    for (group, [left, _]) in state.iter_mut().enumerate() {
        *left = _mm512_xor_si512(*left, p(0, group));
    }
    for round in 0..ROUNDS {
        for (group, [left, right]) in state.iter_mut().enumerate() {
            // The next round key is XORed in together with the result.
            let sum = round_function(keys, *left, group);
            let next = _mm512_ternarylogic_epi32::<0x96>(*right, sum, p(round + 1, group));
            [*left, *right] = [next, *left];
        }
    }
    for (group, [left, right]) in state.iter_mut().enumerate() {
        [*left, *right] = [_mm512_xor_si512(*right, p(ROUNDS + 1, group)), *left];
    }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn round_function<const MANY: bool>(keys: Keys<'_, MANY>, x: __m512i, group: usize) -> __m512i {
    let a = keys.look_up(0, _mm512_srli_epi32::<24>(x), group);
    let b = keys.look_up(1, _mm512_srli_epi32::<16>(x), group);
    let c = keys.look_up(2, _mm512_srli_epi32::<8>(x), group);
    let d = keys.look_up(3, x, group);
    _mm512_add_epi32(_mm512_xor_si512(_mm512_add_epi32(a, b), c), d)
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
