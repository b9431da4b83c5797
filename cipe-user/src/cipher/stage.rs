//! The stage: where blocks of many messages stand side by side while a kernel works on them.
//!
//! A block is a `u64` in the form its cipher likes: Blowfish has the first word low, IDEA the first word high. CBC's
//! exclusive or does not mind, so that chains live in this form, too.

use super::{Algorithm, BLOCK, Job};

/// Lanes of the widest kernel.
pub(super) const WIDTH: usize = 128;

/// Most blocks that each lane puts on the stage at once. Frames stand at powers of two, where few sets of the cache hold
/// all lanes' lines: those at the ends of a stretch are fetched four times, those within it twice.
pub(super) const STEPS: usize = 48;

/// Blocks of `WIDTH` messages, row by row: column `l` of row `s` is the `s`th block of lane `l`.
pub(super) type Rows = [[u64; WIDTH]; STEPS];

/// A message on its way through a lane.
#[derive(Clone, Copy, Default)]
pub(super) struct Lane {
    /// Which job.
    pub(super) job: usize,
    /// Octets done.
    pub(super) done: usize,
    /// Blocks to do; never 0 in a busy lane.
    pub(super) left: usize,
}

/// Consecutive blocks of a message.
#[derive(Clone, Copy, Default)]
pub(super) struct Piece {
    /// Which job.
    pub(super) job: usize,
    /// Octets of the message before.
    pub(super) start: usize,
    pub(super) blocks: usize,
    /// The block before, or the IV.
    pub(super) chain: u64,
}

/// How blocks get on the stage and off again: with AVX-512 where there is, without which it takes as long as the widest
/// kernels.
#[derive(Clone, Copy)]
pub(super) struct Mover {
    #[cfg(target_arch = "x86_64")]
    avx512: bool,
}

impl Mover {
    pub(super) fn detect() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            avx512: is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl"),
        }
    }

    /// Puts the next blocks of each lane into its column, as many as `rows` has rows.
    pub(super) fn fill(self, jobs: &[Job<'_>], lanes: &[Lane], rows: &mut [[u64; WIDTH]]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 && lanes.len() > 1 {
            // SAFETY: `detect` found the instructions.
            return unsafe { super::mover::fill(jobs, lanes, rows) };
        }
        plain::fill(jobs, lanes, 0, rows);
    }

    /// Puts each lane's column back where [`Self::fill`] took it from.
    pub(super) fn drain(self, jobs: &mut [Job<'_>], lanes: &[Lane], rows: &[[u64; WIDTH]]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 && lanes.len() > 1 {
            // SAFETY: `detect` found the instructions.
            return unsafe { super::mover::drain(jobs, lanes, rows) };
        }
        plain::drain(jobs, lanes, 0, rows);
    }

    /// Puts a piece of a message on a row of its length.
    pub(super) fn lay(self, job: &Job<'_>, piece: &Piece, to: &mut [u64]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 {
            // SAFETY: `detect` found the instructions.
            return unsafe { super::mover::lay(job, piece, to) };
        }
        plain::lay(job, piece, to);
    }

    /// Puts decrypted blocks back, chained with the ciphertext that they were.
    pub(super) fn take(self, job: &mut Job<'_>, piece: &Piece, blocks: &[u64], cipher: &[u64]) {
        #[cfg(target_arch = "x86_64")]
        if self.avx512 {
            // SAFETY: `detect` found the instructions.
            return unsafe { super::mover::take(job, piece, blocks, cipher) };
        }
        plain::take(job, piece, blocks, cipher);
    }
}

/// For any CPU; inlined into functions that the compiler may use more instructions for.
pub(super) mod plain {
    use super::*;

    #[inline(always)]
    pub(in crate::cipher) fn fill(jobs: &[Job<'_>], lanes: &[Lane], from: usize, rows: &mut [[u64; WIDTH]]) {
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
    pub(in crate::cipher) fn drain(jobs: &mut [Job<'_>], lanes: &[Lane], from: usize, rows: &[[u64; WIDTH]]) {
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
    pub(in crate::cipher) fn lay(job: &Job<'_>, piece: &Piece, to: &mut [u64]) {
        job.key.algorithm.load(&job.data[piece.start..], to);
    }

    #[inline(always)]
    pub(in crate::cipher) fn take(job: &mut Job<'_>, piece: &Piece, plain: &[u64], cipher: &[u64]) {
        let data = &mut job.data[piece.start..][..piece.blocks * BLOCK];
        let (Some((first, plain)), Some((head, data))) = (plain.split_first(), data.split_at_mut_checked(BLOCK)) else {
            return;
        };
        let algorithm = job.key.algorithm;
        algorithm.store(head, &[first ^ piece.chain]);
        algorithm.store_chained(data, plain, cipher);
    }
}

impl Algorithm {
    /// Takes blocks off the wire: as many as both sides have.
    #[inline(always)]
    fn load(self, wire: &[u8], blocks: &mut [u64]) {
        let pairs = wire.as_chunks().0.iter().zip(blocks);
        match self {
            Self::Blowfish => pairs.for_each(|(octets, block)| *block = u64::from_le_bytes(*octets)),
            Self::Idea => pairs.for_each(|(octets, block)| *block = u64::from_be_bytes(*octets)),
            Self::IdeaLittle => pairs.for_each(|(octets, block)| *block = reverse_words(u64::from_le_bytes(*octets))),
        }
    }

    /// Puts blocks back on the wire: as many as both sides have.
    #[inline(always)]
    fn store(self, wire: &mut [u8], blocks: &[u64]) {
        let pairs = wire.as_chunks_mut().0.iter_mut().zip(blocks);
        match self {
            Self::Blowfish => pairs.for_each(|(octets, block)| *octets = block.to_le_bytes()),
            Self::Idea => pairs.for_each(|(octets, block)| *octets = block.to_be_bytes()),
            Self::IdeaLittle => pairs.for_each(|(octets, block)| *octets = reverse_words(*block).to_le_bytes()),
        }
    }

    /// As [`Self::store`], each block after an exclusive or with its chain.
    #[inline(always)]
    fn store_chained(self, wire: &mut [u8], blocks: &[u64], chain: &[u64]) {
        let all = wire.as_chunks_mut().0.iter_mut().zip(blocks).zip(chain);
        match self {
            Self::Blowfish => all.for_each(|((octets, block), chain)| *octets = (block ^ chain).to_le_bytes()),
            Self::Idea => all.for_each(|((octets, block), chain)| *octets = (block ^ chain).to_be_bytes()),
            Self::IdeaLittle => {
                all.for_each(|((octets, block), chain)| *octets = reverse_words(block ^ chain).to_le_bytes());
            }
        }
    }

    /// One block off the wire.
    pub(super) fn block(self, octets: [u8; BLOCK]) -> u64 {
        let mut block = [0];
        self.load(&octets, &mut block);
        block[0]
    }

    /// One block back on the wire.
    pub(super) fn octets(self, block: u64) -> [u8; BLOCK] {
        let mut octets = [0; BLOCK];
        self.store(&mut octets, &[block]);
        octets
    }
}

/// Reverses the order of the four 16-bit words.
#[inline(always)]
fn reverse_words(block: u64) -> u64 {
    const LOW: u64 = 0x0000_ffff_0000_ffff;
    let block = block.rotate_left(32);
    (block & LOW) << 16 | (block >> 16) & LOW
}
