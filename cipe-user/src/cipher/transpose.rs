//! Turning eight blocks of eight messages by vectors.

use super::stage::Tile;
use std::arch::x86_64::*;

/// Line `i` of the result is column `i` of `tile`.
#[target_feature(enable = "avx512f")]
#[inline]
pub(super) fn avx512(tile: &Tile) -> Tile {
    // SAFETY: each line has the vector's 64 octets, and the instruction asks for no alignment.
    let [a, b, c, d, e, f, g, h] = tile.each_ref().map(|line| unsafe { _mm512_loadu_si512(line.as_ptr().cast()) });
    let (ab, cd, ef, gh) = (pairs(a, b), pairs(c, d), pairs(e, f), pairs(g, h));
    let mut to = Tile::default();
    for odd in 0..2 {
        let ([abcd0, abcd2], [efgh0, efgh2]) = (quarters(ab[odd], cd[odd]), quarters(ef[odd], gh[odd]));
        let ([line0, line4], [line2, line6]) = (quarters(abcd0, efgh0), quarters(abcd2, efgh2));
        for (i, line) in [(0, line0), (2, line2), (4, line4), (6, line6)] {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(to[i + odd].as_mut_ptr().cast(), line) };
        }
    }
    to
}

/// Even blocks of both, and odd blocks of both.
#[target_feature(enable = "avx512f")]
#[inline]
fn pairs(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b)]
}

/// Even quarters of both, and odd quarters of both.
#[target_feature(enable = "avx512f")]
#[inline]
fn quarters(a: __m512i, b: __m512i) -> [__m512i; 2] {
    [_mm512_shuffle_i64x2::<0x88>(a, b), _mm512_shuffle_i64x2::<0xdd>(a, b)]
}
