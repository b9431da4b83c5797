//! IDEA with AVX2: 32 blocks, constant time.

use super::wide::{Mixed, Uniform, place, zero_of};
use super::{ROUNDS, Schedule};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::{Rows, WIDTH};
use std::arch::x86_64::*;

super::wide::kernel!(Avx2, "avx2", "avx2", __m256i, 16);

fn detected() -> bool {
    is_x86_feature_detected!("avx2")
}

#[target_feature(enable = "avx2")]
#[inline]
fn load(from: &[u64; 4]) -> __m256i {
    // SAFETY: the array has the vector's 32 octets, and the instruction asks for no alignment.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn load_words(from: &[u16; 16]) -> __m256i {
    // SAFETY: as in `load`.
    unsafe { _mm256_loadu_si256(from.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn store(vector: __m256i, to: &mut [u64; 4]) {
    // SAFETY: as in `load`.
    unsafe { _mm256_storeu_si256(to.as_mut_ptr().cast(), vector) }
}

#[target_feature(enable = "avx2")]
#[inline]
fn spread(both: u32) -> __m256i {
    _mm256_set1_epi32(both as i32)
}

#[target_feature(enable = "avx2")]
#[inline]
fn add(a: __m256i, b: __m256i) -> __m256i {
    _mm256_add_epi16(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn xor(a: __m256i, b: __m256i) -> __m256i {
    _mm256_xor_si256(a, b)
}

#[target_feature(enable = "avx2")]
#[inline]
fn unpack16(a: __m256i, b: __m256i) -> [__m256i; 2] {
    [_mm256_unpacklo_epi16(a, b), _mm256_unpackhi_epi16(a, b)]
}

#[target_feature(enable = "avx2")]
#[inline]
fn unpack32(a: __m256i, b: __m256i) -> [__m256i; 2] {
    [_mm256_unpacklo_epi32(a, b), _mm256_unpackhi_epi32(a, b)]
}

#[target_feature(enable = "avx2")]
#[inline]
fn unpack64(a: __m256i, b: __m256i) -> [__m256i; 2] {
    [_mm256_unpacklo_epi64(a, b), _mm256_unpackhi_epi64(a, b)]
}

/// The product modulo 65537, as [`super::multiply`]; `zero` is 1 less `b`. Low less high half is 0 only for a product of
/// 0: equal halves make a multiple of 65537, which is prime.
#[target_feature(enable = "avx2")]
#[inline]
fn multiply(a: __m256i, b: __m256i, zero: __m256i) -> __m256i {
    let (low, high) = (_mm256_mullo_epi16(a, b), _mm256_mulhi_epu16(a, b));
    let difference = _mm256_sub_epi16(low, high);
    let is_zero = _mm256_cmpeq_epi16(difference, _mm256_setzero_si256());
    // There is no unsigned comparison; the maximum is the low half unless that is less.
    let borrows_not = _mm256_cmpeq_epi16(_mm256_max_epu16(low, high), low);
    let borrow = _mm256_add_epi16(borrows_not, _mm256_set1_epi16(1));
    let product = _mm256_add_epi16(difference, borrow);
    _mm256_or_si256(product, _mm256_and_si256(is_zero, _mm256_sub_epi16(zero, a)))
}
