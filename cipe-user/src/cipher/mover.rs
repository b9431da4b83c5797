//! Moving blocks on and off the stage with AVX-512: eight blocks of eight messages at a time.

use super::stage::{Lane, Piece, WIDTH, plain};
use super::transpose::{self, load, store};
use super::{Algorithm, BLOCK, Job};
use std::arch::x86_64::*;

/// Messages, and blocks of each, that are turned at once.
const EIGHT: usize = 8;

/// Octets of so many blocks: a vector.
const LINE: usize = EIGHT * BLOCK;

/// As [`super::stage::Mover::fill`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn fill(jobs: &[Job<'_>], lanes: &[Lane], rows: &mut [[u64; WIDTH]]) {
    for (group, lanes) in lanes.chunks(EIGHT).enumerate() {
        let Some(algorithm) = one_algorithm(jobs, lanes) else {
            plain::fill(jobs, lanes, group * EIGHT, rows);
            continue;
        };
        let order = octet_order(algorithm);
        // Columns beyond the last lane may hold anything.
        let mut lines = [line(jobs, lanes[0], rows.len()); EIGHT];
        for (pointer, lane) in lines.iter_mut().zip(lanes) {
            *pointer = line(jobs, *lane, rows.len());
        }
        for (part, rows) in rows.chunks_mut(EIGHT).enumerate() {
            let mask = first(rows.len());
            // SAFETY: `line` checked the length; the mask keeps to it, and the instruction asks for no alignment.
            let load = |line: *const u8| unsafe { _mm512_maskz_loadu_epi64(mask, line.add(part * LINE).cast()) };
            let vectors = lines.map(|line| reorder(load(line), order));
            for (row, column) in rows.iter_mut().zip(transpose::vectors(vectors)) {
                store(column, &mut row.as_chunks_mut().0[group]);
            }
        }
    }
}

/// As [`super::stage::Mover::drain`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn drain(jobs: &mut [Job<'_>], lanes: &[Lane], rows: &[[u64; WIDTH]]) {
    for (group, lanes) in lanes.chunks(EIGHT).enumerate() {
        let Some(algorithm) = one_algorithm(jobs, lanes) else {
            plain::drain(jobs, lanes, group * EIGHT, rows);
            continue;
        };
        let order = octet_order(algorithm);
        let mut lines = [std::ptr::null_mut(); EIGHT];
        for (pointer, lane) in lines.iter_mut().zip(lanes) {
            *pointer = jobs[lane.job].data[lane.done..][..rows.len() * BLOCK].as_mut_ptr();
        }
        for (part, rows) in rows.chunks(EIGHT).enumerate() {
            let mut columns = [_mm512_setzero_si512(); EIGHT];
            for (column, row) in columns.iter_mut().zip(rows) {
                *column = load(&row.as_chunks().0[group]);
            }
            let mask = first(rows.len());
            let turned = transpose::vectors(columns).map(|vector| reorder(vector, order));
            for (vector, line) in turned.iter().zip(&lines[..lanes.len()]) {
                // SAFETY: slicing checked the lengths of the lines, to which the mask keeps; no two lanes have the same
                // job; and the instruction asks for no alignment.
                unsafe { _mm512_mask_storeu_epi64(line.add(part * LINE).cast(), mask, *vector) };
            }
        }
    }
}

/// The next `blocks` blocks of a lane.
#[inline(always)]
fn line(jobs: &[Job<'_>], lane: Lane, blocks: usize) -> *const u8 {
    jobs[lane.job].data[lane.done..][..blocks * BLOCK].as_ptr()
}

/// The algorithm of all lanes, if it is the same.
#[inline(always)]
fn one_algorithm(jobs: &[Job<'_>], lanes: &[Lane]) -> Option<Algorithm> {
    let of = |lane: &Lane| jobs[lane.job].key.algorithm;
    let first = of(lanes.first()?);
    lanes.iter().all(|lane| of(lane) == first).then_some(first)
}

/// As [`super::stage::Mover::lay`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn lay(job: &Job<'_>, piece: &Piece, to: &mut [u64]) {
    plain::lay(job, piece, to);
}

/// As [`super::stage::Mover::take`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn take(job: &mut Job<'_>, piece: &Piece, blocks: &[u64], cipher: &[u64]) {
    plain::take(job, piece, blocks, cipher);
}

/// Which octet of a quarter goes where between wire and stage, the same both ways; none if all stay.
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

/// A mask of the first `blocks` of eight.
#[inline(always)]
fn first(blocks: usize) -> __mmask8 {
    if blocks < EIGHT { (1 << blocks) - 1 } else { !0 }
}
