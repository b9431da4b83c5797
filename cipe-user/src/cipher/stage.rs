//! The stage: where blocks of many messages stand side by side while a kernel works on them.
//!
//! A block is a `u64` in the form its cipher likes: Blowfish has the first word low, IDEA the first word high. CBC's
//! exclusive or does not mind, so that chains live in this form, too.

use super::{Algorithm, BLOCK};

/// Lanes of the widest kernel.
pub(super) const WIDTH: usize = 64;

/// Blocks that each lane puts on the stage at once: one cache line of a message.
pub(super) const STEPS: usize = 8;

/// Blocks of `WIDTH` messages, row by row: column `l` of row `s` is the `s`th block of lane `l`.
pub(super) type Rows = [[u64; WIDTH]; STEPS];

impl Algorithm {
    /// Takes whole blocks off the wire.
    ///
    /// # Panics
    /// If `wire` holds fewer blocks than `blocks` yields.
    #[inline]
    pub(super) fn load<'a>(self, wire: &[u8], blocks: impl Iterator<Item = &'a mut u64>) {
        let wire = wire.as_chunks::<BLOCK>().0.iter().zip(blocks);
        match self {
            Self::Blowfish => wire.for_each(|(octets, block)| *block = u64::from_le_bytes(*octets)),
            Self::Idea => wire.for_each(|(octets, block)| *block = u64::from_be_bytes(*octets)),
            Self::IdeaLittle => wire.for_each(|(octets, block)| *block = reverse_words(u64::from_le_bytes(*octets))),
        }
    }

    /// Puts whole blocks back on the wire, as many as `blocks` yields.
    #[inline]
    pub(super) fn store(self, wire: &mut [u8], blocks: impl Iterator<Item = u64>) {
        let wire = wire.as_chunks_mut::<BLOCK>().0.iter_mut().zip(blocks);
        match self {
            Self::Blowfish => wire.for_each(|(octets, block)| *octets = block.to_le_bytes()),
            Self::Idea => wire.for_each(|(octets, block)| *octets = block.to_be_bytes()),
            Self::IdeaLittle => wire.for_each(|(octets, block)| *octets = reverse_words(block).to_le_bytes()),
        }
    }

    /// One block, as [`Self::load`] does.
    pub(super) fn block(self, octets: [u8; BLOCK]) -> u64 {
        let mut block = 0;
        self.load(&octets, std::iter::once(&mut block));
        block
    }
}

/// Reverses the order of the four 16-bit words.
fn reverse_words(block: u64) -> u64 {
    const LOW: u64 = 0x0000_ffff_0000_ffff;
    let block = block.rotate_left(32);
    (block & LOW) << 16 | (block >> 16) & LOW
}
