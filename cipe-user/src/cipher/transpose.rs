//! Transposing eight blocks of eight messages in vectors.

use std::arch::x86_64::*;

/// Element `j` (64 bits) of vector `i` becomes element `i` of vector `j`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn vectors([a, b, c, d, e, f, g, h]: [__m512i; 8]) -> [__m512i; 8] {
    let (ab, cd, ef, gh) = (pairs(a, b), pairs(c, d), pairs(e, f), pairs(g, h));
    let turn = |ab, cd, ef, gh| {
        let ([abcd0, abcd2], [efgh0, efgh2]) = (quarters(ab, cd), quarters(ef, gh));
        (quarters(abcd0, efgh0), quarters(abcd2, efgh2))
    };
    let ([v0, v4], [v2, v6]) = turn(ab[0], cd[0], ef[0], gh[0]);
    let ([v1, v5], [v3, v7]) = turn(ab[1], cd[1], ef[1], gh[1]);
    [v0, v1, v2, v3, v4, v5, v6, v7]
}

/// The even elements of both vectors, and the odd elements of both.
#[target_feature(enable = "avx512f")]
#[inline]
fn pairs(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
}

/// The even quarters of both vectors, and the odd quarters of both.
#[target_feature(enable = "avx512f")]
#[inline]
fn quarters(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0xdd>(a, b)]
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn load(line: &[u64; 8]) -> __m512i {
    // SAFETY: the array has the vector's 64 octets, and the instruction asks for no alignment.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn store(vector: __m512i, line: &mut [u64; 8]) {
    // SAFETY: as in `load`.
    unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), vector) }
}
