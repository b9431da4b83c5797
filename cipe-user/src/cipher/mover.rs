//! Moving blocks on and off the stage with AVX-512: eight blocks of eight messages at a time.

use super::stage::{Lane, Piece, WIDTH, plain};
use super::transpose::{load, store, vectors};
use super::{Algorithm, Job};
use std::arch::x86_64::*;

/// Messages, and blocks of each, that are turned at once.
const EIGHT: usize = 8;

/// As [`super::stage::Mover::fill`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn fill(jobs: &[Job<'_>], lanes: &[Lane], rows: &mut [[u64; WIDTH]]) {
    let (parts, rest) = rows.as_chunks_mut::<EIGHT>();
    for (group, lanes) in lanes.chunks(EIGHT).enumerate() {
        for (part, rows) in parts.iter_mut().enumerate() {
            let mut lines = [_mm512_setzero_si512(); EIGHT];
            for (line, lane) in lines.iter_mut().zip(lanes) {
                let job = &jobs[lane.job];
                if let Some(octets) = job.data[lane.done + part * 64..].first_chunk() {
                    *line = _mm512_shuffle_epi8(load_octets(octets), order(job.key.algorithm));
                }
            }
            for (row, column) in rows.iter_mut().zip(vectors(lines)) {
                store(column, &mut row.as_chunks_mut().0[group]);
            }
        }
    }
    if !rest.is_empty() {
        plain::fill(jobs, &advanced(lanes, parts.len() * 64)[..lanes.len()], rest);
    }
}

/// As [`super::stage::Mover::drain`].
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn drain(jobs: &mut [Job<'_>], lanes: &[Lane], rows: &[[u64; WIDTH]]) {
    let (parts, rest) = rows.as_chunks::<EIGHT>();
    for (group, lanes) in lanes.chunks(EIGHT).enumerate() {
        for (part, rows) in parts.iter().enumerate() {
            let columns = [0, 1, 2, 3, 4, 5, 6, 7].map(|i| load(&rows[i].as_chunks().0[group]));
            for (line, lane) in vectors(columns).into_iter().zip(lanes) {
                let job = &mut jobs[lane.job];
                if let Some(octets) = job.data[lane.done + part * 64..].first_chunk_mut() {
                    store_octets(_mm512_shuffle_epi8(line, order(job.key.algorithm)), octets);
                }
            }
        }
    }
    if !rest.is_empty() {
        plain::drain(jobs, &advanced(lanes, parts.len() * 64)[..lanes.len()], rest);
    }
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

/// The lanes some octets further on.
fn advanced(lanes: &[Lane], octets: usize) -> [Lane; WIDTH] {
    let mut ahead = [Lane::default(); WIDTH];
    for (ahead, lane) in ahead.iter_mut().zip(lanes) {
        *ahead = Lane { done: lane.done + octets, ..*lane };
    }
    ahead
}

/// Which octet goes where between wire and stage; the same both ways.
#[target_feature(enable = "avx512f")]
#[inline]
fn order(algorithm: Algorithm) -> __m512i {
    _mm512_broadcast_i32x4(match algorithm {
        Algorithm::Blowfish => _mm_set_epi64x(0x0f0e_0d0c_0b0a_0908, 0x0706_0504_0302_0100),
        Algorithm::Idea => _mm_set_epi64x(0x0809_0a0b_0c0d_0e0f, 0x0001_0203_0405_0607),
        Algorithm::IdeaLittle => _mm_set_epi64x(0x0908_0b0a_0d0c_0f0e, 0x0100_0302_0504_0706),
    })
}

#[target_feature(enable = "avx512f")]
#[inline]
fn load_octets(line: &[u8; 64]) -> __m512i {
    // SAFETY: the array has the vector's 64 octets, and the instruction asks for no alignment.
    unsafe { _mm512_loadu_si512(line.as_ptr().cast()) }
}

#[target_feature(enable = "avx512f")]
#[inline]
fn store_octets(vector: __m512i, line: &mut [u8; 64]) {
    // SAFETY: as in `load_octets`.
    unsafe { _mm512_storeu_si512(line.as_mut_ptr().cast(), vector) }
}
