//! Look-ups by `vpermt2b`, two quarters of a table at once: one operation on AMD's cores, three on Intel's.

use super::{State, Tables};
use std::arch::asm;
use std::arch::x86_64::*;

/// Two rounds of all groups; `p` holds the round keys that are XORed into their results.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
pub(super) fn two_rounds<const G: usize>(key: &Tables, p: [&[u32; 4]; 2], state: &mut [State; G]) {
    for p in p {
        let sums = round_function(&key.s, state);
        for (state, sum) in state.iter_mut().zip(sums) {
            let [l0, l1, l2, l3, r0, r1, r2, r3] = *state;
            let mut right = [r0, r1, r2, r3];
            for ((plane, sum), octet) in right.iter_mut().zip(sum).zip(*p) {
                *plane = _mm512_ternarylogic_epi32::<0x96>(*plane, sum, _mm512_set1_epi32(octet as i32));
            }
            let [r0, r1, r2, r3] = right;
            *state = [r0, r1, r2, r3, l0, l1, l2, l3];
        }
    }
}

/// The round function of the left words.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn round_function<const G: usize>(s: &[[[[u8; 64]; 4]; 4]; 4], state: &[State; G]) -> [[__m512i; 4]; G] {
    // The least significant octet first, because the carries start there.
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

/// The words of one table for one octet of the left words, as planes.
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

/// Looks up the octets of a plane by index; `upper` marks the indices with the top bit. In assembly, because the
/// compiler would move the loads of all tables out of all loops, and then reload them from a stack that is not aligned.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi,gfni")]
#[inline]
fn permute(quarters: &[[u8; 64]; 4], index: __m512i, upper: u64) -> __m512i {
    let found;
    // SAFETY: instructions of the enabled features; they read the four quarters, which are in a `Tables` and so aligned
    // to 64 octets.
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

/// As [`permute`], for two planes with one load of the table.
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
pub(super) fn add(a: [__m512i; 4], b: [__m512i; 4]) -> [__m512i; 4] {
    let mut sum = [0, 1, 2, 3].map(|i| _mm512_add_epi8(a[i], b[i]));
    for i in 0..3 {
        // The top bit carries if both operands have it, or if one has it and the sum has not. A bit matrix spreads it
        // over the octet.
        let carry = _mm512_ternarylogic_epi32::<0xd4>(a[i], b[i], sum[i]);
        let carry = _mm512_gf2p8affine_epi64_epi8::<0>(carry, _mm512_set1_epi8(0x80u8 as i8));
        sum[i + 1] = _mm512_sub_epi8(sum[i + 1], carry);
    }
    sum
}
