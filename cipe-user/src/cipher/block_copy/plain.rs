//! Copies blocks on any CPU. Inlined into functions for which the compiler may use more instructions.

use crate::cipher::stage::{Lane, Piece, STEPS, WIDTH};
use crate::cipher::{BLOCK, Job};

#[inline(always)]
pub(super) fn fill(jobs: &[Job<'_>], lanes: &[Lane], from: usize, rows: &mut [[u64; WIDTH]]) {
    for (column, lane) in (from..).zip(lanes) {
        let job = &jobs[lane.job];
        let mut line = [0; STEPS];
        job.key.algorithm.load(&job.data[lane.done..][..rows.len() * BLOCK], &mut line);
        for (row, block) in rows.iter_mut().zip(line) {
            row[column] = block;
        }
    }
}

#[inline(always)]
pub(super) fn drain(jobs: &mut [Job<'_>], lanes: &[Lane], from: usize, rows: &[[u64; WIDTH]]) {
    for (column, lane) in (from..).zip(lanes) {
        let job = &mut jobs[lane.job];
        let mut line = [0; STEPS];
        for (row, block) in rows.iter().zip(&mut line) {
            *block = row[column];
        }
        job.key.algorithm.store(&mut job.data[lane.done..][..rows.len() * BLOCK], &line);
    }
}

#[inline(always)]
pub(super) fn load_piece(job: &Job<'_>, piece: &Piece, to: &mut [u64]) {
    job.key.algorithm.load(&job.data[piece.start..], to);
}

#[inline(always)]
pub(super) fn store_piece(job: &mut Job<'_>, piece: &Piece, plain: &[u64], cipher: &[u64]) {
    let data = &mut job.data[piece.start..][..piece.blocks * BLOCK];
    let (Some((first, plain)), Some((head, data))) = (plain.split_first(), data.split_at_mut_checked(BLOCK)) else {
        return;
    };
    let algorithm = job.key.algorithm;
    algorithm.store(head, &[first ^ piece.chain]);
    algorithm.store_chained(data, plain, cipher);
}
