//! IDEA with AVX-512BW: 64 blocks, constant time.

use super::wide::{Mixed, Uniform, place, zero_of};
use super::{ROUNDS, Schedule};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::{Rows, WIDTH};
use std::arch::x86_64::*;

super::wide::kernel!(Avx512, "avx512", "avx512f,avx512bw", __m512i, 32);

fn detected() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load(from: &[u64; 8]) -> __m512i {
    // SAFETY: the array has the vector's 64 octets, and the instruction asks for no alignment.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_words(from: &[u16; 32]) -> __m512i {
    // SAFETY: as in `load`.
    unsafe { _mm512_loadu_si512(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store(vector: __m512i, to: &mut [u64; 8]) {
    // SAFETY: as in `load`.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), vector) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn spread(both: u32) -> __m512i {
    _mm512_set1_epi32(both as i32)
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn add(a: __m512i, b: __m512i) -> __m512i {
    _mm512_add_epi16(a, b)
}

#[target_feature(enable = "avx512f")]
#[inline]
fn xor(a: __m512i, b: __m512i) -> __m512i {
    _mm512_xor_si512(a, b)
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn unpack16(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)]
}

#[target_feature(enable = "avx512f")]
#[inline]
fn unpack32(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b)]
}

#[target_feature(enable = "avx512f")]
#[inline]
fn unpack64(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
}

/// The product modulo 65537, as [`super::multiply`]; `zero` is 1 less `b`. Low less high half is 0 only for a product of
/// 0: equal halves make a multiple of 65537, which is prime.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn multiply(a: __m512i, b: __m512i, zero: __m512i) -> __m512i {
    let (low, high) = (_mm512_mullo_epi16(a, b), _mm512_mulhi_epu16(a, b));
    let difference = _mm512_sub_epi16(low, high);
    let is_zero = _mm512_testn_epi16_mask(difference, difference);
    let borrows = _mm512_cmplt_epu16_mask(low, high);
    let product = _mm512_mask_sub_epi16(difference, is_zero, zero, a);
    _mm512_mask_sub_epi16(product, borrows, product, _mm512_set1_epi16(-1))
}
