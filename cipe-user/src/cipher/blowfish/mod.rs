//! Blowfish with a 128-bit key: 16 rounds of four table look-ups.

#[cfg(target_arch = "x86_64")]
mod gather;
mod pi;
#[cfg(target_arch = "x86_64")]
mod planes;
mod scalar;

use super::kernel::Kernel;
use super::{BLOCK, KEY};
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Rounds of a block.
const ROUNDS: usize = 16;

/// An expanded key.
#[derive(Zeroize, ZeroizeOnDrop)]
#[repr(C, align(64))]
pub(super) struct Schedule {
    /// The four tables of the round function, most significant octet of its argument first.
    s: [[u32; 256]; 4],
    /// Round keys and the two words of the output whitening, in the order of encryption.
    p: [u32; ROUNDS + 2],
    #[cfg(target_arch = "x86_64")]
    tables: planes::Tables,
}

impl Schedule {
    /// The textbook key schedule: key octets big-endian and repeated, then 521 encryptions in a chain.
    pub(super) fn new(octets: &[u8; KEY]) -> Box<Self> {
        let mut schedule = Box::new(Self {
            s: pi::S,
            p: pi::P,
            #[cfg(target_arch = "x86_64")]
            tables: planes::Tables::zero(),
        });
        let (words, _) = octets.as_chunks::<4>();
        for (p, word) in schedule.p.iter_mut().zip(words.iter().cycle()) {
            *p ^= u32::from_be_bytes(*word);
        }
        let mut block = 0;
        for i in (0..ROUNDS + 2).step_by(2) {
            block = scalar::encrypt_one(&schedule, block);
            [schedule.p[i], schedule.p[i + 1]] = split(block);
        }
        for table in 0..4 {
            for i in (0..256).step_by(2) {
                block = scalar::encrypt_one(&schedule, block);
                [schedule.s[table][i], schedule.s[table][i + 1]] = split(block);
            }
        }
        #[cfg(target_arch = "x86_64")]
        {
            let Self { s, p, tables } = &mut *schedule;
            tables.set(s, p);
        }
        schedule
    }
}

impl Schedule {
    /// The tables, and the round keys in the order of decryption.
    pub(super) fn for_decryption(&self) -> impl Iterator<Item = u32> {
        self.s.as_flattened().iter().chain(self.p.iter().rev()).copied()
    }
}

/// The kernels that this CPU can run, narrowest first.
pub(super) fn kernels() -> Vec<Box<dyn Kernel<Schedule>>> {
    #[cfg(target_arch = "x86_64")]
    let wide = {
        let gather: Option<Box<dyn Kernel<Schedule>>> = gather::Gather::detect().map(|kernel| Box::new(kernel) as _);
        let pairs = planes::Planes::<false>::detect().map(|kernel| Box::new(kernel) as _);
        let quarters = planes::Planes::<true>::detect().map(|kernel| Box::new(kernel) as _);
        gather.into_iter().chain(pairs).chain(quarters)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let wide = [];
    let scalar: Box<dyn Kernel<Schedule>> = Box::new(scalar::Scalar);
    std::iter::once(scalar).chain(wide).collect()
}

/// A block's words.
fn split(block: u64) -> [u32; 2] {
    [block as u32, (block >> 32) as u32]
}

/// The block of two words.
fn join([first, second]: [u32; 2]) -> u64 {
    u64::from(first) | u64::from(second) << 32
}

const _: () = assert!(size_of::<Schedule>() <= 10 * 1024 && size_of::<[u32; 2]>() == BLOCK);
