//! Copies blocks to and from the stage with AVX-512: eight blocks of eight messages at a time.

use super::plain;
use crate::cipher::stage::{Lane, Piece, WIDTH};
use crate::cipher::transpose::{self, load, store};
use crate::cipher::{Algorithm, BLOCK, Job};
use std::arch::x86_64::*;

/// Side of a tile: the number of messages, and of blocks of each, that are transposed at once.
const TILE: usize = 8;

/// Octets of a tile's row: a vector.
const VECTOR_OCTETS: usize = TILE * BLOCK;

/// As [`super::BlockCopier::fill`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn fill(jobs: &[Job<'_>], lanes: &[Lane], rows: &mut [[u64; WIDTH]]) {
    for (group, lanes) in lanes.chunks(TILE).enumerate() {
        let Some(algorithm) = one_algorithm(jobs, lanes) else {
            plain::fill(jobs, lanes, group * TILE, rows);
            continue;
        };
        let order = octet_order(algorithm);
        // Columns beyond the last lane may have any contents.
        let mut lines = [std::ptr::null(); TILE];
        for (i, line) in lines.iter_mut().enumerate() {
            let lane = lanes[i.min(lanes.len() - 1)];
            *line = jobs[lane.job].data[lane.done..][..rows.len() * BLOCK].as_ptr();
        }
        let (parts, rest) = rows.as_chunks_mut::<TILE>();
        for (part, rows) in parts.iter_mut().enumerate() {
            // SAFETY: slicing checked the lengths of the lines.
            let columns = unsafe { take_part(lines, part, !0, order) };
            for i in 0..TILE {
                store(columns[i], &mut rows[i].as_chunks_mut().0[group]);
            }
        }
        if !rest.is_empty() {
            // SAFETY: slicing checked the lengths of the lines, and the mask selects only blocks within them.
            let columns = unsafe { take_part(lines, parts.len(), (1 << rest.len()) - 1, order) };
            for (row, column) in rest.iter_mut().zip(columns) {
                store(column, &mut row.as_chunks_mut().0[group]);
            }
        }
    }
}

/// As [`super::BlockCopier::drain`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn drain(jobs: &mut [Job<'_>], lanes: &[Lane], rows: &[[u64; WIDTH]]) {
    for (group, lanes) in lanes.chunks(TILE).enumerate() {
        let Some(algorithm) = one_algorithm(jobs, lanes) else {
            plain::drain(jobs, lanes, group * TILE, rows);
            continue;
        };
        let order = octet_order(algorithm);
        let mut lines = [std::ptr::null_mut(); TILE];
        for (line, lane) in lines.iter_mut().zip(lanes) {
            *line = jobs[lane.job].data[lane.done..][..rows.len() * BLOCK].as_mut_ptr();
        }
        let lines = &lines[..lanes.len()];
        let (parts, rest) = rows.as_chunks::<TILE>();
        let mut columns = [_mm512_setzero_si512(); TILE];
        for (part, rows) in parts.iter().enumerate() {
            for i in 0..TILE {
                columns[i] = load(&rows[i].as_chunks().0[group]);
            }
            // SAFETY: slicing checked the lengths of the lines, and no two lanes have the same job.
            unsafe { put_part(lines, part, !0, order, columns) };
        }
        if !rest.is_empty() {
            for (column, row) in columns.iter_mut().zip(rest) {
                *column = load(&row.as_chunks().0[group]);
            }
            // SAFETY: as above; the mask selects only blocks within the lengths.
            unsafe { put_part(lines, parts.len(), (1 << rest.len()) - 1, order, columns) };
        }
    }
}

/// Loads the blocks of part `part` of eight lines that `mask` selects, as columns.
///
/// # Safety
/// Each line has these blocks.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn take_part(lines: [*const u8; TILE], part: usize, mask: __mmask8, order: Option<__m512i>) -> [__m512i; TILE] {
    let mut vectors = [_mm512_setzero_si512(); TILE];
    for i in 0..TILE {
        // SAFETY: the caller guarantees the blocks; the instruction requires no alignment.
        let vector = unsafe { _mm512_maskz_loadu_epi64(mask, lines[i].add(part * VECTOR_OCTETS).cast()) };
        vectors[i] = reorder(vector, order);
    }
    transpose::vectors(vectors)
}

/// Stores columns as the blocks of part `part` of up to eight lines, those that `mask` selects.
///
/// # Safety
/// Each line has these blocks.
#[target_feature(enable = "avx512f,avx512bw")]
#[inline]
unsafe fn put_part(lines: &[*mut u8], part: usize, mask: __mmask8, order: Option<__m512i>, columns: [__m512i; TILE]) {
    let vectors = transpose::vectors(columns);
    for i in 0..TILE {
        if i < lines.len() {
            // SAFETY: the caller guarantees the blocks; the instruction requires no alignment.
            unsafe {
                _mm512_mask_storeu_epi64(lines[i].add(part * VECTOR_OCTETS).cast(), mask, reorder(vectors[i], order));
            }
        }
    }
}

/// Returns the algorithm of all lanes; `None` if they differ.
#[inline(always)]
fn one_algorithm(jobs: &[Job<'_>], lanes: &[Lane]) -> Option<Algorithm> {
    let of = |lane: &Lane| jobs[lane.job].key.algorithm;
    let first = of(lanes.first()?);
    lanes.iter().all(|lane| of(lane) == first).then_some(first)
}

/// As [`super::BlockCopier::load_piece`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn load_piece(job: &Job<'_>, piece: &Piece, to: &mut [u64]) {
    plain::load_piece(job, piece, to);
}

/// As [`super::BlockCopier::store_piece`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn store_piece(job: &mut Job<'_>, piece: &Piece, blocks: &[u64], cipher: &[u64]) {
    plain::store_piece(job, piece, blocks, cipher);
}

/// Returns the permutation of octets within a quarter between wire and stage, the same in both directions; `None` if no
/// octet moves.
#[target_feature(enable = "avx512f")]
#[inline]
fn octet_order(algorithm: Algorithm) -> Option<__m512i> {
    match algorithm {
        Algorithm::Blowfish => None,
        Algorithm::Idea => Some(_mm_set_epi64x(0x0809_0a0b_0c0d_0e0f, 0x0001_0203_0405_0607)),
        Algorithm::IdeaLittle => Some(_mm_set_epi64x(0x0908_0b0a_0d0c_0f0e, 0x0100_0302_0504_0706)),
    }
    .map(|order| _mm512_broadcast_i32x4(order))
}

#[target_feature(enable = "avx512bw")]
#[inline]
fn reorder(vector: __m512i, order: Option<__m512i>) -> __m512i {
    match order {
        Some(order) => _mm512_shuffle_epi8(vector, order),
        None => vector,
    }
}
