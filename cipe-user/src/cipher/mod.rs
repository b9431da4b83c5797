//! Blowfish and IDEA in CBC mode, many packets wide.
//!
//! CBC encryption is serial within a message and parallel across messages; decryption is parallel within a message too.
//! So a batch of [`Job`]s is spread over *lanes* ([`lanes`]), and the fastest kernel of this CPU for that number of
//! lanes works on them in lock step ([`kernel_choice`]).
//!
//! Knows blocks, keys and lanes, but no packets, sockets or clocks. Imported by `wire` and `engine`.

mod block_copy;
mod blowfish;
mod counter;
mod idea;
mod kernel;
mod kernel_choice;
mod lanes;
mod stage;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod transpose;

pub use counter::cycles;
pub use kernel_choice::KernelReport;
pub use lanes::Lanes;

/// Octets of a cipher block and of an IV; every length here is a multiple of it.
pub const BLOCK: usize = 8;

/// Octets of a key.
pub const KEY: usize = 16;

/// The cipher and its wire variant (protocol sections 1 and 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Blowfish with a textbook key schedule and blocks of two little-endian words.
    Blowfish,
    /// IDEA with four big-endian words a block, as in the textbook.
    Idea,
    /// IDEA with little-endian words: the four of a block and the eight of the key (`idea_words=little`).
    IdeaLittle,
}

/// An expanded key, ready for both directions: 8.4 KiB for Blowfish, 208 octets for IDEA. Zeroized on drop; not
/// `Debug`, so that it cannot reach a log.
pub struct Key {
    algorithm: Algorithm,
    schedule: Schedule,
}

/// Boxed, so that a key can be moved without leaving a copy behind.
enum Schedule {
    Blowfish(Box<blowfish::Schedule>),
    Idea(Box<idea::Schedule>),
}

impl Key {
    /// Expands 16 key octets.
    pub fn new(algorithm: Algorithm, octets: &[u8; KEY]) -> Self {
        let schedule = match algorithm {
            Algorithm::Blowfish => Schedule::Blowfish(blowfish::Schedule::new(octets)),
            Algorithm::Idea => Schedule::Idea(idea::Schedule::new(octets, u16::from_be_bytes)),
            Algorithm::IdeaLittle => Schedule::Idea(idea::Schedule::new(octets, u16::from_le_bytes)),
        };
        Self { algorithm, schedule }
    }

    /// Calls `set` with the place and value of each word that the programs need to decrypt
    /// ([`cipe_common::shield::ShieldKey::words`]).
    pub fn for_decryption(&self, mut set: impl FnMut(usize, u32)) {
        match &self.schedule {
            Schedule::Blowfish(schedule) => {
                schedule.for_decryption().enumerate().for_each(|(place, word)| set(place, word));
            }
            Schedule::Idea(schedule) => {
                schedule.for_decryption().enumerate().for_each(|(place, word)| set(place, word));
            }
        }
    }

    /// The algorithm that the key was expanded for.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

/// One CBC message, processed in place.
pub struct Job<'a> {
    /// Key of this message; jobs of one batch may have different keys and algorithms.
    pub key: &'a Key,
    /// The IV, exactly as on the wire.
    pub iv: [u8; BLOCK],
    /// Whole blocks: plaintext before [`Lanes::encrypt`] and ciphertext after, or the reverse for [`Lanes::decrypt`].
    /// Octets beyond the last whole block are not changed.
    pub data: &'a mut [u8],
}
