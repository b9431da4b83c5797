//! IDEA with AVX-512BW: 32 blocks a vector, up to 128, constant time.

use super::wide::{DECRYPTS, Mixed, Uniform, mask_of, place, zero_of};
use super::{ROUNDS, Schedule};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::{Rows, WIDTH};
use std::arch::asm;
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

/// The product modulo 65537, as [`super::multiply`]: `zero` is 1 - `b`; `mask` is 0 if `b` is 0, else all ones. The
/// test for a factor 0 uses the factors, not the product, which is ready later.
///
/// In assembly, because the compiler turns intrinsics into comparisons, masks and widening that take twice the time.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn multiply<const G: usize>(a: __m512i, b: __m512i, zero: __m512i, mask: __m512i) -> __m512i {
    if G > 1 { multiply_many(a, b, zero, mask) } else { multiply_alone(a, b, zero, mask) }
}

/// In eight operations: the correction of a product is the borrow, or, under a mask, replaces the borrow.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn multiply_many(a: __m512i, b: __m512i, zero: __m512i, mask: __m512i) -> __m512i {
    let product;
    // SAFETY: instructions of the enabled features that touch nothing but their operands.
    unsafe {
        asm!(
            "vptestmw {regular}, {a}, {mask}",
            "vpmulhuw {high}, {a}, {b}",
            "vpmullw {product}, {a}, {b}",
            "vpsubw {more}, {zero}, {a}",
            "vpsubusw {borrow}, {high}, {product}",
            "vpsubw {product}, {product}, {high}",
            "vpminuw {more} {{{regular}}}, {borrow}, {one}",
            "vpaddw {product}, {product}, {more}",
            product = out(zmm_reg) product,
            high = out(zmm_reg) _,
            borrow = out(zmm_reg) _,
            more = out(zmm_reg) _,
            regular = out(kreg) _,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            zero = in(zmm_reg) zero,
            mask = in(zmm_reg) mask,
            one = in(zmm_reg) _mm512_set1_epi16(1),
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    product
}

/// In nine operations, none of which waits for a mask after the product: a single vector is bound by latency, not by
/// the number of operations.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
fn multiply_alone(a: __m512i, b: __m512i, zero: __m512i, mask: __m512i) -> __m512i {
    let product;
    // SAFETY: as in `multiply_many`.
    unsafe {
        asm!(
            "vpmulhuw {high}, {a}, {b}",
            "vpmullw {product}, {a}, {b}",
            "vptestnmw {is_zero}, {a}, {mask}",
            "vpsubw {instead} {{{is_zero}}}{{z}}, {zero}, {a}",
            "vpsubusw {borrow}, {high}, {product}",
            "vpsubw {product}, {product}, {high}",
            "vpminuw {borrow}, {borrow}, {one}",
            "vpaddw {product}, {product}, {instead}",
            "vpaddw {product}, {product}, {borrow}",
            product = out(zmm_reg) product,
            high = out(zmm_reg) _,
            borrow = out(zmm_reg) _,
            instead = out(zmm_reg) _,
            is_zero = out(kreg) _,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            zero = in(zmm_reg) zero,
            mask = in(zmm_reg) mask,
            one = in(zmm_reg) _mm512_set1_epi16(1),
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    product
}
