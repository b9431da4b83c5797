//! The stage: where blocks of many messages stand side by side while a kernel works on them.
//!
//! A block is a `u64` in the form its cipher likes: Blowfish has the first word low, IDEA the first word high. CBC's
//! exclusive or does not mind, so that chains live in this form, too.

use super::{Algorithm, BLOCK, Job};

/// Lanes of the widest kernel.
pub(super) const WIDTH: usize = 64;

/// Blocks that each lane puts on the stage at once: one cache line of a message.
pub(super) const STEPS: usize = 8;

/// Blocks of `WIDTH` messages, row by row: column `l` of row `s` is the `s`th block of lane `l`.
pub(super) type Rows = [[u64; WIDTH]; STEPS];

/// Eight blocks of eight messages.
pub(super) type Tile = [[u64; STEPS]; STEPS];

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

/// How blocks get on the stage and off again. All of it is plain Rust; the second form lets the compiler use AVX-512,
/// without which this takes as long as the widest kernels.
#[derive(Clone, Copy)]
pub(super) struct Mover {
    #[cfg(target_arch = "x86_64")]
    avx512: bool,
}

/// Makes for `$name` a method that calls [`plain`]'s function of that name, compiled for what the CPU has.
macro_rules! moves {
    ($(#[$doc:meta])* $name:ident($($arg:ident: $Type:ty),*)) => {
        $(#[$doc])*
        pub(super) fn $name(self, $($arg: $Type),*) {
            #[cfg(target_arch = "x86_64")]
            if self.avx512 {
                #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
                fn avx512($($arg: $Type),*) {
                    plain::$name($($arg),*, |tile| super::transpose::avx512(tile));
                }
                // SAFETY: `detect` found the instructions.
                return unsafe { avx512($($arg),*) };
            }
            plain::$name($($arg),*, plain::transpose);
        }
    };
}

impl Mover {
    pub(super) fn detect() -> Self {
        Self {
            #[cfg(target_arch = "x86_64")]
            avx512: is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vl"),
        }
    }

    moves! {
        /// Puts the next blocks of each lane into its column, as many as `rows` has rows.
        fill(jobs: &[Job<'_>], lanes: &[Lane], rows: &mut [[u64; WIDTH]])
    }

    moves! {
        /// Puts each lane's column back where [`Self::fill`] took it from.
        drain(jobs: &mut [Job<'_>], lanes: &[Lane], rows: &[[u64; WIDTH]])
    }

    moves! {
        /// Puts a piece of a message on a row of its length.
        lay(job: &Job<'_>, piece: &Piece, to: &mut [u64])
    }

    moves! {
        /// Puts decrypted blocks back, chained with the ciphertext that they were.
        take(job: &mut Job<'_>, piece: &Piece, plain: &[u64], cipher: &[u64])
    }
}

mod plain {
    use super::*;

    #[inline(always)]
    pub(super) fn fill(jobs: &[Job<'_>], lanes: &[Lane], rows: &mut [[u64; WIDTH]], transpose: impl Fn(&Tile) -> Tile) {
        let octets = rows.len() * BLOCK;
        for (group, lanes) in lanes.chunks(STEPS).enumerate() {
            let mut tile = Tile::default();
            for (line, lane) in tile.iter_mut().zip(lanes) {
                let job = &jobs[lane.job];
                job.key.algorithm.load(&job.data[lane.done..][..octets], line);
            }
            for (row, line) in rows.iter_mut().zip(transpose(&tile)) {
                row.as_chunks_mut().0[group] = line;
            }
        }
    }

    #[inline(always)]
    pub(super) fn drain(
        jobs: &mut [Job<'_>],
        lanes: &[Lane],
        rows: &[[u64; WIDTH]],
        transpose: impl Fn(&Tile) -> Tile,
    ) {
        let octets = rows.len() * BLOCK;
        for (group, lanes) in lanes.chunks(STEPS).enumerate() {
            let mut tile = Tile::default();
            for (line, row) in tile.iter_mut().zip(rows) {
                *line = row.as_chunks().0[group];
            }
            for (line, lane) in transpose(&tile).iter().zip(lanes) {
                let job = &mut jobs[lane.job];
                job.key.algorithm.store(&mut job.data[lane.done..][..octets], line);
            }
        }
    }

    #[inline(always)]
    pub(super) fn lay(job: &Job<'_>, piece: &Piece, to: &mut [u64], _: impl Fn(&Tile) -> Tile) {
        job.key.algorithm.load(&job.data[piece.start..], to);
    }

    #[inline(always)]
    pub(super) fn take(job: &mut Job<'_>, piece: &Piece, plain: &[u64], cipher: &[u64], _: impl Fn(&Tile) -> Tile) {
        let data = &mut job.data[piece.start..][..piece.blocks * BLOCK];
        let (Some((first, plain)), Some((head, data))) = (plain.split_first(), data.split_at_mut_checked(BLOCK)) else {
            return;
        };
        let algorithm = job.key.algorithm;
        algorithm.store(head, &[first ^ piece.chain]);
        algorithm.store_chained(data, plain, cipher);
    }

    #[inline(always)]
    pub(super) fn transpose(tile: &Tile) -> Tile {
        let mut to = Tile::default();
        for (i, line) in tile.iter().enumerate() {
            for (to, block) in to.iter_mut().zip(line) {
                to[i] = *block;
            }
        }
        to
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
}

/// Reverses the order of the four 16-bit words.
#[inline(always)]
fn reverse_words(block: u64) -> u64 {
    const LOW: u64 = 0x0000_ffff_0000_ffff;
    let block = block.rotate_left(32);
    (block & LOW) << 16 | (block >> 16) & LOW
}
