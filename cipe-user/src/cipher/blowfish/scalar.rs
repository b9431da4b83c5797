//! Blowfish in scalar registers, six to eight blocks interleaved. Runs on any CPU, with any mix of keys.
//!
//! A single block waits for its table look-ups most of the time, because each round needs the result of the previous
//! one. Blocks of other lanes use this time.

use super::{ROUNDS, Schedule, join, split};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::{Rows, WIDTH};
use crate::cipher::{Algorithm, BLOCK};
use std::hint::black_box;

/// Maximum lanes of a call: eight at once are faster than six and then two.
const LANES: usize = 8;

/// Lanes that keep a core busy; more lanes would only spill more registers.
const STEADY_LANES: usize = 6;

/// Lanes that [`encrypt_columns`] encrypts in full steps.
#[cfg(target_arch = "x86_64")]
pub(super) const FULL_STEP_LANES: usize = 5 * STEADY_LANES;

/// The kernel.
pub(super) struct Scalar;

impl Kernel<Schedule> for Scalar {
    fn name(&self) -> &'static str {
        "scalar"
    }

    fn lanes(&self) -> usize {
        LANES
    }

    fn steady_lanes(&self) -> usize {
        STEADY_LANES
    }

    fn mixes_keys(&self) -> bool {
        true
    }

    fn constant_time(&self) -> bool {
        false
    }

    fn encrypt(&mut self, keys: &[&Schedule], chain: &mut [u64], rows: &mut Rows, steps: usize) {
        encrypt_some(keys, 0, chain, &mut rows[..steps]);
    }

    fn encrypt_alone(&mut self, key: &Schedule, _: Algorithm, chain: u64, blocks: &mut [[u8; BLOCK]]) -> bool {
        let mut last = chain;
        for block in blocks {
            last = encrypt_one(key, last ^ u64::from_le_bytes(*block));
            *block = last.to_le_bytes();
        }
        true
    }

    fn decrypt(&mut self, key: &Schedule, blocks: &mut [u64]) {
        let (whole, rest) = blocks.as_chunks_mut::<STEADY_LANES>();
        for blocks in whole {
            *blocks = decrypt(key, *blocks);
        }
        match rest.len() {
            0 => {}
            1 => decrypt_rest::<1>(key, rest),
            2 => decrypt_rest::<2>(key, rest),
            3 => decrypt_rest::<3>(key, rest),
            4 => decrypt_rest::<4>(key, rest),
            _ => decrypt_rest::<5>(key, rest),
        }
    }
}

/// Encrypts one block, round by round. Each round key is XORed in one round early, so that only the look-ups are on the
/// critical path.
#[inline]
pub(super) fn encrypt_one(key: &Schedule, block: u64) -> u64 {
    let [mut left, mut right] = split(block);
    left ^= key.p[0];
    right ^= key.p[1];
    for p in &key.p[2..] {
        (left, right) = (right ^ key.f(left), black_box(left ^ p));
    }
    join([right, left])
}

/// As [`Scalar::encrypt`] for any number of lanes; the first has column `from` of `rows`, and the first entry of
/// `chain`.
#[cfg(target_arch = "x86_64")]
pub(super) fn encrypt_columns(keys: &[&Schedule], from: usize, chain: &mut [u64], rows: &mut [[u64; WIDTH]]) {
    for (i, (keys, chain)) in keys.chunks(STEADY_LANES).zip(chain.chunks_mut(STEADY_LANES)).enumerate() {
        encrypt_some(keys, from + i * STEADY_LANES, chain, rows);
    }
}

/// Encrypts up to [`LANES`] lanes.
fn encrypt_some(keys: &[&Schedule], from: usize, chain: &mut [u64], rows: &mut [[u64; WIDTH]]) {
    match keys.len() {
        1 => encrypt::<1>(keys, from, chain, rows),
        2 => encrypt::<2>(keys, from, chain, rows),
        3 => encrypt::<3>(keys, from, chain, rows),
        4 => encrypt::<4>(keys, from, chain, rows),
        5 => encrypt::<5>(keys, from, chain, rows),
        6 => encrypt::<6>(keys, from, chain, rows),
        7 => encrypt::<7>(keys, from, chain, rows),
        _ => encrypt::<LANES>(keys, from, chain, rows),
    }
}

fn encrypt<const N: usize>(keys: &[&Schedule], from: usize, chain: &mut [u64], rows: &mut [[u64; WIDTH]]) {
    let (Some(keys), Some(chain)) = (keys.first_chunk::<N>(), chain.first_chunk_mut::<N>()) else {
        unreachable!("a lane has a key and a chain");
    };
    if keys.iter().all(|key| std::ptr::eq(*key, keys[0])) {
        let keys = &[keys[0]; N];
        encrypt_rows(keys, from, chain, rows);
    } else {
        encrypt_rows(keys, from, chain, rows);
    }
}

#[inline(always)]
fn encrypt_rows<const N: usize>(keys: &[&Schedule; N], from: usize, chain: &mut [u64; N], rows: &mut [[u64; WIDTH]]) {
    let mut last = *chain;
    for row in rows {
        let row = &mut row[from..][..N];
        for (last, block) in last.iter_mut().zip(&*row) {
            *last ^= block;
        }
        last = crypt(keys, last, |p, i| p[i]);
        row.copy_from_slice(&last);
    }
    *chain = last;
}

#[inline(always)]
fn decrypt<const N: usize>(key: &Schedule, blocks: [u64; N]) -> [u64; N] {
    crypt(&[key; N], blocks, |p, i| p[ROUNDS + 1 - i])
}

fn decrypt_rest<const N: usize>(key: &Schedule, rest: &mut [u64]) {
    if let Some(blocks) = rest.first_chunk_mut::<N>() {
        *blocks = decrypt(key, *blocks);
    }
}

/// `N` blocks at once; `p` gives the round keys in the order of the direction. Plain loops, because `array::map` over
/// all lanes is not inlined.
#[inline(always)]
fn crypt<const N: usize>(
    keys: &[&Schedule; N],
    mut blocks: [u64; N],
    p: impl Fn(&[u32; ROUNDS + 2], usize) -> u32,
) -> [u64; N] {
    let (mut left, mut right) = ([0; N], [0; N]);
    for lane in 0..N {
        [left[lane], right[lane]] = split(blocks[lane]);
    }
    for lane in 0..N {
        left[lane] ^= p(&keys[lane].p, 0);
    }
    for round in (0..ROUNDS).step_by(2) {
        // Two rounds of one lane at a time halve the spilled registers; round keys are XORed in before they are needed.
        for lane in 0..N {
            let (mut l, mut r) = (left[lane], right[lane]);
            r ^= p(&keys[lane].p, round + 1);
            r ^= keys[lane].f(l);
            l ^= p(&keys[lane].p, round + 2);
            l ^= keys[lane].f(r);
            (left[lane], right[lane]) = (l, r);
        }
    }
    for lane in 0..N {
        right[lane] ^= p(&keys[lane].p, ROUNDS + 1);
        blocks[lane] = join([right[lane], left[lane]]);
    }
    blocks
}

impl Schedule {
    /// The round function.
    #[inline(always)]
    fn f(&self, x: u32) -> u32 {
        let octet = |shift| usize::from((x >> shift) as u8);
        (self.s[0][octet(24)].wrapping_add(self.s[1][octet(16)]) ^ self.s[2][octet(8)])
            .wrapping_add(self.s[3][octet(0)])
    }
}
