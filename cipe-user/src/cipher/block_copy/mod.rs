//! Copies blocks between messages and the stage.

#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;

use super::Job;
use super::stage::{Lane, Piece, WIDTH};

/// Copies blocks to the stage and back: with AVX-512 if the CPU has it. Without it, the copies take as long as the
/// widest kernels.
#[derive(Clone, Copy)]
pub(in crate::cipher) struct BlockCopier {
    #[cfg(target_arch = "x86_64")]
    avx512: bool,
}

impl BlockCopier {
    pub(in crate::cipher) fn detect() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            avx512: is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl"),
        }
    }

    /// Copies the next blocks of each lane to its column: one for each row of `rows`.
    pub(in crate::cipher) fn fill(self, jobs: &[Job<'_>], lanes: &[Lane], rows: &mut [[u64; WIDTH]]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 && lanes.len() > 1 {
            // SAFETY: `detect` found the instructions.
            return unsafe { avx512::fill(jobs, lanes, rows) };
        }
        plain::fill(jobs, lanes, 0, rows);
    }

    /// Copies each lane's column back to the octets that [`Self::fill`] copied.
    pub(in crate::cipher) fn drain(self, jobs: &mut [Job<'_>], lanes: &[Lane], rows: &[[u64; WIDTH]]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 && lanes.len() > 1 {
            // SAFETY: `detect` found the instructions.
            return unsafe { avx512::drain(jobs, lanes, rows) };
        }
        plain::drain(jobs, lanes, 0, rows);
    }

    /// Copies a piece of a message to a row of the same length.
    pub(in crate::cipher) fn load_piece(self, job: &Job<'_>, piece: &Piece, to: &mut [u64]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 {
            // SAFETY: `detect` found the instructions.
            return unsafe { avx512::load_piece(job, piece, to) };
        }
        plain::load_piece(job, piece, to);
    }

    /// Copies decrypted blocks back, after exclusive or with the previous ciphertext.
    pub(in crate::cipher) fn store_piece(self, job: &mut Job<'_>, piece: &Piece, blocks: &[u64], cipher: &[u64]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 {
            // SAFETY: `detect` found the instructions.
            return unsafe { avx512::store_piece(job, piece, blocks, cipher) };
        }
        plain::store_piece(job, piece, blocks, cipher);
    }
}
