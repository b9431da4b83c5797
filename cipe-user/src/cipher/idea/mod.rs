//! IDEA: eight and a half rounds of addition modulo 2^16, exclusive or, and multiplication modulo 65537, where the word
//! 0 means 65536.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
#[cfg(target_arch = "x86_64")]
mod wide;

use super::KEY;
use super::kernel::Kernel;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// Full rounds of a block; half a round follows.
const ROUNDS: usize = 8;

/// Subkeys of a direction: six a round, four for the half round.
const SUBKEYS: usize = 6 * ROUNDS + 4;

/// An expanded key.
#[derive(Zeroize, ZeroizeOnDrop)]
pub(super) struct Schedule {
    encrypt: [u16; SUBKEYS],
    decrypt: [u16; SUBKEYS],
}

impl Schedule {
    /// The textbook key schedule: the key's words, then the key rotated left by 25 bits, repeatedly; for decryption the
    /// inverses in reverse order. `word` gives the octet order.
    pub(super) fn new(octets: &[u8; KEY], word: fn([u8; 2]) -> u16) -> Box<Self> {
        let mut schedule = Box::new(Self { encrypt: [0; SUBKEYS], decrypt: [0; SUBKEYS] });
        let words = octets.as_chunks().0.iter();
        let mut key = words.fold(0, |key, octets| key << 16 | u128::from(word(*octets)));
        for words in schedule.encrypt.chunks_mut(8) {
            for (i, word) in words.iter_mut().enumerate() {
                *word = (key >> (112 - 16 * i)) as u16;
            }
            key = key.rotate_left(25);
        }
        key.zeroize();
        let Self { encrypt, decrypt } = &mut *schedule;
        for round in 0..=ROUNDS {
            let (to, from) = (6 * round, 6 * (ROUNDS - round));
            // A full round swaps its middle words, so their subkeys are swapped too, except at the two ends.
            let (second, third) = if (1..ROUNDS).contains(&round) { (2, 1) } else { (1, 2) };
            decrypt[to] = invert(encrypt[from]);
            decrypt[to + 1] = encrypt[from + second].wrapping_neg();
            decrypt[to + 2] = encrypt[from + third].wrapping_neg();
            decrypt[to + 3] = invert(encrypt[from + 3]);
            if round < ROUNDS {
                decrypt[to + 4] = encrypt[from - 2];
                decrypt[to + 5] = encrypt[from - 1];
            }
        }
        schedule
    }
}

impl Schedule {
    /// The subkeys of decryption.
    pub(super) fn for_decryption(&self) -> impl Iterator<Item = u32> {
        self.decrypt.iter().map(|subkey| u32::from(*subkey))
    }
}

const _: () = assert!(size_of::<Schedule>() <= 512);

/// The kernels that this CPU can run, narrowest first.
pub(super) fn kernels() -> Vec<Box<dyn Kernel<Schedule>>> {
    #[cfg(target_arch = "x86_64")]
    let wide = {
        let avx2: Option<Box<dyn Kernel<Schedule>>> = avx2::Avx2::detect().map(|kernel| Box::new(kernel) as _);
        avx2.into_iter().chain(avx512::Avx512::detect().map(|kernel| Box::new(kernel) as _))
    };
    #[cfg(not(target_arch = "x86_64"))]
    let wide = [];
    let portable: Box<dyn Kernel<Schedule>> = Box::new(portable::Portable);
    std::iter::once(portable).chain(wide).collect()
}

/// The product modulo 65537, where 0 means 65536, without a branch: 2^16 is -1, so the high half of the product is
/// subtracted. A product of 0 has a factor 65536, which is -1, so the result is minus the other factor.
#[inline(always)]
fn multiply(a: u16, b: u16) -> u16 {
    let product = u32::from(a) * u32::from(b);
    let (low, high) = (product as u16, (product >> 16) as u16);
    let regular = low.wrapping_sub(high).wrapping_add(u16::from(low < high));
    let zero = 1u16.wrapping_sub(a).wrapping_sub(b);
    let mask = u16::from(product == 0).wrapping_neg();
    regular | zero & mask
}

/// The multiplicative inverse modulo 65537: the 65535th power, because the group has 65536 elements. Constant time.
fn invert(a: u16) -> u16 {
    let mut power = a;
    for _ in 0..15 {
        power = multiply(multiply(power, power), a);
    }
    power
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Multiplication as in its definition.
    fn defined(a: u16, b: u16) -> u16 {
        let whole = |x| if x == 0 { 65536u64 } else { u64::from(x) };
        (whole(a) * whole(b) % 65537) as u16
    }

    #[test]
    fn multiplication_is_right_for_every_zero_operand_and_a_grid() {
        for a in 0..=u16::MAX {
            for b in [0, 1, 2, 3, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff, a, a.wrapping_neg(), 40503] {
                assert_eq!(multiply(a, b), defined(a, b), "{a} * {b}");
                assert_eq!(multiply(b, a), defined(b, a), "{b} * {a}");
            }
        }
    }

    #[test]
    fn every_inverse_multiplies_to_one() {
        for a in 0..=u16::MAX {
            assert_eq!(multiply(a, invert(a)), 1, "{a}");
        }
    }
}
