//! The stage: a buffer with blocks of many messages side by side, for a kernel.
//!
//! A block is a `u64` in the form that its cipher uses: Blowfish has the first word low, IDEA the first word high.
//! Exclusive or works in either form, so chains use it too.

use super::{Algorithm, BLOCK};

/// Lanes of the widest kernel.
pub(super) const WIDTH: usize = 128;

/// Maximum blocks of a lane on the stage. Frames start at multiples of a power of two, so the cache lines of all lanes
/// compete for few sets of the cache: the lines at the ends of a stretch are fetched four times, those within it twice.
pub(super) const STEPS: usize = 48;

/// Blocks of `WIDTH` messages, row by row: column `l` of row `s` is the `s`th block of lane `l`.
pub(super) type Rows = [[u64; WIDTH]; STEPS];

/// A message that is being processed in a lane.
#[derive(Clone, Copy, Default)]
pub(super) struct Lane {
    /// Index of the job.
    pub(super) job: usize,
    /// Octets processed so far.
    pub(super) done: usize,
    /// Blocks that remain; never 0 in a busy lane.
    pub(super) left: usize,
}

/// Consecutive blocks of a message.
#[derive(Clone, Copy, Default)]
pub(super) struct Piece {
    /// Index of the job.
    pub(super) job: usize,
    /// Octets of the message before the piece.
    pub(super) start: usize,
    pub(super) blocks: usize,
    /// The block before the piece, or the IV.
    pub(super) chain: u64,
}

impl Algorithm {
    /// Converts wire octets to blocks, as many as both slices have.
    #[inline(always)]
    pub(super) fn load(self, wire: &[u8], blocks: &mut [u64]) {
        let pairs = wire.as_chunks().0.iter().zip(blocks);
        match self {
            Self::Blowfish => pairs.for_each(|(octets, block)| *block = u64::from_le_bytes(*octets)),
            Self::Idea => pairs.for_each(|(octets, block)| *block = u64::from_be_bytes(*octets)),
            Self::IdeaLittle => pairs.for_each(|(octets, block)| *block = reverse_words(u64::from_le_bytes(*octets))),
        }
    }

    /// Converts blocks to wire octets, as many as both slices have.
    #[inline(always)]
    pub(super) fn store(self, wire: &mut [u8], blocks: &[u64]) {
        let pairs = wire.as_chunks_mut().0.iter_mut().zip(blocks);
        match self {
            Self::Blowfish => pairs.for_each(|(octets, block)| *octets = block.to_le_bytes()),
            Self::Idea => pairs.for_each(|(octets, block)| *octets = block.to_be_bytes()),
            Self::IdeaLittle => pairs.for_each(|(octets, block)| *octets = reverse_words(*block).to_le_bytes()),
        }
    }

    /// As [`Self::store`], with each block combined with its chain by exclusive or.
    #[inline(always)]
    pub(super) fn store_chained(self, wire: &mut [u8], blocks: &[u64], chain: &[u64]) {
        let all = wire.as_chunks_mut().0.iter_mut().zip(blocks).zip(chain);
        match self {
            Self::Blowfish => all.for_each(|((octets, block), chain)| *octets = (block ^ chain).to_le_bytes()),
            Self::Idea => all.for_each(|((octets, block), chain)| *octets = (block ^ chain).to_be_bytes()),
            Self::IdeaLittle => {
                all.for_each(|((octets, block), chain)| *octets = reverse_words(block ^ chain).to_le_bytes());
            }
        }
    }

    /// Converts one block from wire octets.
    pub(super) fn block(self, octets: [u8; BLOCK]) -> u64 {
        let mut block = [0];
        self.load(&octets, &mut block);
        block[0]
    }

    /// Converts one block to wire octets.
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
