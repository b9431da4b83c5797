//! IDEA with AVX2: 16 blocks a vector, up to 64, constant time.

use super::wide::{DECRYPTS, Mixed, Uniform, mask_of, place, zero_of};
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

/// The product modulo 65537, as [`super::multiply`]: `zero` is 1 - `b`; `mask` is 0 if `b` is 0, else all ones. The
/// test for a factor 0 uses the factors, not the product, which is ready later.
///
/// In assembly, because the compiler turns intrinsics into comparisons and widening that take twice the time.
#[target_feature(enable = "avx2")]
#[inline]
fn multiply<const G: usize>(a: __m256i, b: __m256i, zero: __m256i, mask: __m256i) -> __m256i {
    let product;
    // SAFETY: instructions of the enabled feature that touch nothing but their operands.
    unsafe {
        std::arch::asm!(
            "vpmullw {product}, {a}, {b}",
            "vpmulhuw {high}, {a}, {b}",
            "vpsubw {instead}, {zero}, {a}",
            "vpand {is_zero}, {a}, {mask}",
            "vpcmpeqw {is_zero}, {is_zero}, {none}",
            "vpand {instead}, {instead}, {is_zero}",
            "vpsubusw {borrow}, {high}, {product}",
            "vpsubw {product}, {product}, {high}",
            "vpminuw {borrow}, {borrow}, {one}",
            "vpaddw {borrow}, {borrow}, {instead}",
            "vpaddw {product}, {product}, {borrow}",
            product = out(ymm_reg) product,
            high = out(ymm_reg) _,
            borrow = out(ymm_reg) _,
            is_zero = out(ymm_reg) _,
            instead = out(ymm_reg) _,
            a = in(ymm_reg) a,
            b = in(ymm_reg) b,
            zero = in(ymm_reg) zero,
            mask = in(ymm_reg) mask,
            none = in(ymm_reg) _mm256_setzero_si256(),
            one = in(ymm_reg) _mm256_set1_epi16(1),
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    product
}
