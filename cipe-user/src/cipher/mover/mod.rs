//! Moving blocks between messages and stage.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use super::Job;
use super::stage::{Lane, Piece, WIDTH};

/// How blocks get on the stage and off again: with AVX-512 where there is, without which it takes as long as the widest
/// kernels.
#[derive(Clone, Copy)]
pub(in crate::cipher) struct Mover {
    #[cfg(target_arch = "x86_64")]
    avx512: bool,
}

impl Mover {
    pub(in crate::cipher) fn detect() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            avx512: is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl"),
        }
    }

    /// Puts the next blocks of each lane into its column, as many as `rows` has rows.
    pub(in crate::cipher) fn fill(self, jobs: &[Job<'_>], lanes: &[Lane], rows: &mut [[u64; WIDTH]]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 && lanes.len() > 1 {
            // SAFETY: `detect` found the instructions.
            return unsafe { avx512::fill(jobs, lanes, rows) };
        }
        plain::fill(jobs, lanes, 0, rows);
    }

    /// Puts each lane's column back where [`Self::fill`] took it from.
    pub(in crate::cipher) fn drain(self, jobs: &mut [Job<'_>], lanes: &[Lane], rows: &[[u64; WIDTH]]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 && lanes.len() > 1 {
            // SAFETY: `detect` found the instructions.
            return unsafe { avx512::drain(jobs, lanes, rows) };
        }
        plain::drain(jobs, lanes, 0, rows);
    }

    /// Puts a piece of a message on a row of its length.
    pub(in crate::cipher) fn lay(self, job: &Job<'_>, piece: &Piece, to: &mut [u64]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 {
            // SAFETY: `detect` found the instructions.
            return unsafe { avx512::lay(job, piece, to) };
        }
        plain::lay(job, piece, to);
    }

    /// Puts decrypted blocks back, chained with the ciphertext that they were.
    pub(in crate::cipher) fn take(self, job: &mut Job<'_>, piece: &Piece, blocks: &[u64], cipher: &[u64]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 {
            // SAFETY: `detect` found the instructions.
            return unsafe { avx512::take(job, piece, blocks, cipher) };
        }
        plain::take(job, piece, blocks, cipher);
    }
}
