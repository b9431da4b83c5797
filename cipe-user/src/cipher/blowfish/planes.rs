//! Blowfish with AVX-512 VBMI: 64 or 128 blocks of one key, constant time.
//!
//! A vector holds one of the eight octets of 64 blocks: a *plane*. A look-up of an octet is then a permutation of the
//! table, which stands in vectors itself: no address depends on data. A table of 256 words makes 16 vectors, four to an
//! octet of the result. Additions carry from plane to plane by masks.

use super::{ROUNDS, Schedule};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::{Rows, WIDTH};
use crate::cipher::transpose;
use std::arch::asm;
use std::arch::x86_64::*;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Blocks of a vector of each of their octets.
const GROUP: usize = 64;

/// Two groups share the loads of a table.
const LANES: usize = 2 * GROUP;

/// The parts of a key as this kernel wants them.
#[derive(Zeroize, ZeroizeOnDrop)]
#[repr(C, align(64))]
pub(super) struct Tables {
    /// The octets of the four tables' words, least significant first, in quarters of 64 entries.
    s: [[[[u8; 64]; 4]; 4]; 4],
    /// The octets of the round keys, least significant first, each four times, for a broadcast.
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

/// The kernel. There is one only where the CPU has the instructions.
pub(super) struct Planes(());

impl Planes {
    /// The kernel, if the CPU has what it needs.
    pub(super) fn detect() -> Option<Self> {
        let detected = is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("gfni");
        detected.then_some(Self(()))
    }
}

impl Kernel<Schedule> for Planes {
    fn name(&self) -> &'static str {
        "planes"
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
                unsafe { encrypt(table, [first, second], rows) };
            }
            [first, ..] => {
                // SAFETY: `detect` found the instructions.
                unsafe { encrypt(table, [first], rows) };
            }
            [] => {}
        }
    }

    fn decrypt(&mut self, key: &Schedule, blocks: &mut [u64]) {
        // SAFETY: `detect` found the instructions.
        unsafe { decrypt(&key.tables, blocks) };
    }
}

/// The eight planes of 64 blocks, least significant octet first: the left word's, then the right word's.
type State = [__m512i; 8];

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
fn encrypt<const G: usize>(key: &Tables, chain: [&mut [u64; GROUP]; G], rows: &mut [[u64; WIDTH]]) {
    let mut last = chain.each_ref().map(|chain| planes(chain));
    for row in rows {
        let (groups, _) = row.as_chunks_mut();
        for (last, group) in last.iter_mut().zip(&*groups) {
            for (last, block) in last.iter_mut().zip(planes(group)) {
                *last = _mm512_xor_si512(*last, block);
            }
        }
        crypt(key, |i| i, &mut last);
        for (last, group) in last.iter().zip(groups) {
            *group = blocks(*last);
        }
    }
    for (last, chain) in last.into_iter().zip(chain) {
        *chain = blocks(last);
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
fn decrypt(key: &Tables, all: &mut [u64]) {
    let backwards = |i| ROUNDS + 1 - i;
    for some in all.chunks_mut(LANES) {
        let mut padded = [[0; GROUP]; 2];
        padded.as_flattened_mut()[..some.len()].copy_from_slice(some);
        if some.len() > GROUP {
            let mut state = [planes(&padded[0]), planes(&padded[1])];
            crypt(key, backwards, &mut state);
            padded = [blocks(state[0]), blocks(state[1])];
        } else {
            let mut state = [planes(&padded[0])];
            crypt(key, backwards, &mut state);
            padded[0] = blocks(state[0]);
        }
        some.copy_from_slice(&padded.as_flattened()[..some.len()]);
    }
}

/// All rounds of `G` times 64 blocks; `order` gives the round keys' numbers.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn crypt<const G: usize>(key: &Tables, order: impl Fn(usize) -> usize, state: &mut [State; G]) {
    let whiten = |half: &mut [__m512i], i| {
        for (plane, octet) in half.iter_mut().zip(key.p[order(i)]) {
            *plane = _mm512_xor_si512(*plane, _mm512_set1_epi32(octet as i32));
        }
    };
    for state in &mut *state {
        whiten(&mut state[..4], 0);
    }
    for round in 0..ROUNDS {
        // The next key goes with the result, so that the argument of the next round is ready at once.
        let next = key.p[order(round + 1)];
        let sums = round_function(&key.s, state);
        for (state, sum) in state.iter_mut().zip(sums) {
            let [l0, l1, l2, l3, r0, r1, r2, r3] = *state;
            let mut right = [r0, r1, r2, r3];
            for ((plane, sum), octet) in right.iter_mut().zip(sum).zip(next) {
                *plane = _mm512_ternarylogic_epi32::<0x96>(*plane, sum, _mm512_set1_epi32(octet as i32));
            }
            let [r0, r1, r2, r3] = right;
            *state = [r0, r1, r2, r3, l0, l1, l2, l3];
        }
    }
    for state in state {
        whiten(&mut state[4..], ROUNDS + 1);
        state.rotate_left(4);
    }
}

/// The round function of the left words.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn round_function<const G: usize>(s: &[[[[u8; 64]; 4]; 4]; 4], state: &[State; G]) -> [[__m512i; 4]; G] {
    // Least significant first: carries make it ready first.
    let d = look_up(&s[3], state, 0);
    let c = look_up(&s[2], state, 1);
    let b = look_up(&s[1], state, 2);
    let a = look_up(&s[0], state, 3);
    let mut sums = a;
    for group in 0..G {
        let mut sum = add(a[group], b[group]);
        for (sum, c) in sum.iter_mut().zip(c[group]) {
            *sum = _mm512_xor_si512(*sum, c);
        }
        sums[group] = add(sum, d[group]);
    }
    sums
}

/// The words of one table for an octet of the left words, as planes.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn look_up<const G: usize>(table: &[[[u8; 64]; 4]; 4], state: &[State; G], octet: usize) -> [[__m512i; 4]; G] {
    let masks = state.each_ref().map(|state| _mm512_movepi8_mask(state[octet]));
    let mut words = [[_mm512_setzero_si512(); 4]; G];
    for (plane, quarters) in table.iter().enumerate() {
        match G {
            1 => words[0][plane] = permute(quarters, state[0][octet], masks[0]),
            _ => {
                let index = [state[0][octet], state[1][octet]];
                [words[0][plane], words[1][plane]] = permute_two(quarters, index, [masks[0], masks[1]]);
            }
        }
    }
    words
}

/// Octets of a plane by index; `upper` tells which indices have the top bit. In assembly, for the compiler would move
/// the loads of all tables out of all loops, and back in from a stack that is not aligned.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn permute(quarters: &[[u8; 64]; 4], index: __m512i, upper: u64) -> __m512i {
    let found;
    // SAFETY: instructions of the enabled features; they read the four quarters, which stand in a `Tables` and so at
    // multiples of 64 octets.
    unsafe {
        asm!(
            "vmovdqa64 {found}, [{quarters}]",
            "vmovdqa64 {above}, [{quarters} + 128]",
            "vpermt2b {found}, {index}, [{quarters} + 64]",
            "vpermt2b {above}, {index}, [{quarters} + 192]",
            "vmovdqu8 {found} {{{upper}}}, {above}",
            quarters = in(reg) quarters.as_ptr(),
            index = in(zmm_reg) index,
            upper = in(kreg) upper,
            found = out(zmm_reg) found,
            above = out(zmm_reg) _,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    found
}

/// As [`permute`], twice with one load of the table.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn permute_two(quarters: &[[u8; 64]; 4], index: [__m512i; 2], upper: [u64; 2]) -> [__m512i; 2] {
    let (first, second);
    // SAFETY: as in `permute`.
    unsafe {
        asm!(
            "vmovdqa64 {second}, [{quarters}]",
            "vmovdqa64 {table}, [{quarters} + 64]",
            "vmovdqa64 {first}, {first_index}",
            "vpermi2b {first}, {second}, {table}",
            "vpermt2b {second}, {second_index}, {table}",
            "vmovdqa64 {second_above}, [{quarters} + 128]",
            "vmovdqa64 {table}, [{quarters} + 192]",
            "vmovdqa64 {first_above}, {first_index}",
            "vpermi2b {first_above}, {second_above}, {table}",
            "vpermt2b {second_above}, {second_index}, {table}",
            "vmovdqu8 {first} {{{first_upper}}}, {first_above}",
            "vmovdqu8 {second} {{{second_upper}}}, {second_above}",
            quarters = in(reg) quarters.as_ptr(),
            first_index = in(zmm_reg) index[0],
            second_index = in(zmm_reg) index[1],
            first_upper = in(kreg) upper[0],
            second_upper = in(kreg) upper[1],
            first = out(zmm_reg) first,
            second = out(zmm_reg) second,
            first_above = out(zmm_reg) _,
            second_above = out(zmm_reg) _,
            table = out(zmm_reg) _,
            options(pure, readonly, nostack, preserves_flags),
        );
    }
    [first, second]
}

/// Sums of words modulo 2^32.
#[target_feature(enable = "avx512f,avx512bw,gfni")]
#[inline]
fn add(a: [__m512i; 4], b: [__m512i; 4]) -> [__m512i; 4] {
    let mut sum = [0, 1, 2, 3].map(|i| _mm512_add_epi8(a[i], b[i]));
    for i in 0..3 {
        // The top bit carries where both have it, or either while the sum has not. A bit matrix makes all bits of it.
        let carry = _mm512_ternarylogic_epi32::<0xd4>(a[i], b[i], sum[i]);
        let carry = _mm512_gf2p8affine_epi64_epi8::<0>(carry, _mm512_set1_epi8(0x80u8 as i8));
        sum[i + 1] = _mm512_sub_epi8(sum[i + 1], carry);
    }
    sum
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(quarter: &[u8; 64]) -> __m512i {
    // SAFETY: the array has the vector's 64 octets, and the instruction asks for no alignment.
    unsafe { _mm512_loadu_si512(quarter.as_ptr().cast()) }
}

/// Which octet of eight blocks goes where, so that equal octets of the blocks stand together; and the other way round.
const TOGETHER: [u8; 64] = {
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
    let order = load(&TOGETHER);
    let eights = blocks.as_chunks::<8>().0;
    let vectors = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| _mm512_permutexvar_epi8(order, transpose::load(&eights[i])));
    transpose::vectors(vectors)
}

#[target_feature(enable = "avx512f,avx512vbmi")]
#[inline]
fn blocks(state: State) -> [u64; GROUP] {
    let order = load(&TOGETHER);
    let mut blocks = [0; GROUP];
    for (vector, eight) in transpose::vectors(state).into_iter().zip(blocks.as_chunks_mut::<8>().0) {
        transpose::store(_mm512_permutexvar_epi8(order, vector), eight);
    }
    blocks
}
