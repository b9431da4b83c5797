//! IDEA on arrays of words, which compilers turn into the target's vectors. Runs on any CPU.

use super::{ROUNDS, SUBKEYS, Schedule, multiply};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::Rows;
use crate::cipher::{Algorithm, BLOCK};

/// Lanes of two 128-bit vectors of words: while one vector waits for a result, the other is in work.
const LANES: usize = 8;

/// The kernel.
pub(super) struct Portable;

impl Kernel<Schedule> for Portable {
    fn name(&self) -> &'static str {
        "scalar"
    }

    fn lanes(&self) -> usize {
        LANES
    }

    fn mixes_keys(&self) -> bool {
        true
    }

    fn constant_time(&self) -> bool {
        true
    }

    fn encrypt(&mut self, keys: &[&Schedule], chain: &mut [u64], rows: &mut Rows, steps: usize) {
        match keys.len() {
            1 => encrypt::<1>(keys, chain, rows, steps),
            2 => encrypt::<2>(keys, chain, rows, steps),
            3..=4 => encrypt::<4>(keys, chain, rows, steps),
            _ => encrypt::<LANES>(keys, chain, rows, steps),
        }
    }

    fn encrypt_alone(&mut self, key: &Schedule, algorithm: Algorithm, chain: u64, blocks: &mut [[u8; BLOCK]]) -> bool {
        let mut last = chain;
        for octets in blocks {
            last = encrypt_one(&key.encrypt, last ^ algorithm.block(*octets));
            *octets = algorithm.octets(last);
        }
        true
    }

    fn decrypt(&mut self, key: &Schedule, blocks: &mut [u64]) {
        for blocks in blocks.chunks_mut(LANES) {
            match blocks.len() {
                1 => decrypt::<1>(key, blocks),
                2 => decrypt::<2>(key, blocks),
                3..=4 => decrypt::<4>(key, blocks),
                _ => decrypt::<LANES>(key, blocks),
            }
        }
    }
}

/// Encrypts one block, in scalar registers.
fn encrypt_one(k: &[u16; SUBKEYS], block: u64) -> u64 {
    let k = |i: usize| u32::from(k[i]);
    let [mut x1, mut x2, mut x3, mut x4] = [48, 32, 16, 0].map(|shift| u32::from((block >> shift) as u16));
    for i in (0..6 * ROUNDS).step_by(6) {
        let (y1, y2) = (multiply_alone(x1, k(i)), x2.wrapping_add(k(i + 1)) & 0xffff);
        let (y3, y4) = (x3.wrapping_add(k(i + 2)) & 0xffff, multiply_alone(x4, k(i + 3)));
        let t = multiply_alone(y1 ^ y3, k(i + 4));
        let u = multiply_alone((y2 ^ y4).wrapping_add(t) & 0xffff, k(i + 5));
        let v = t.wrapping_add(u) & 0xffff;
        [x1, x2, x3, x4] = [y1 ^ u, y3 ^ u, y2 ^ v, y4 ^ v];
    }
    let (y1, y4) = (multiply_alone(x1, k(SUBKEYS - 4)), multiply_alone(x4, k(SUBKEYS - 1)));
    let (y2, y3) = (x3.wrapping_add(k(SUBKEYS - 3)) & 0xffff, x2.wrapping_add(k(SUBKEYS - 2)) & 0xffff);
    u64::from(y1) << 48 | u64::from(y2) << 32 | u64::from(y3) << 16 | u64::from(y4)
}

/// As [`multiply`], for words below 2^16 in wider registers. Few operations depend on the product: the test for a
/// factor 0 uses the factors.
#[inline(always)]
fn multiply_alone(a: u32, b: u32) -> u32 {
    let is_zero = |x: u32| (x.wrapping_sub(1) as i32 >> 31) as u32;
    let instead = 1u32.wrapping_sub(a).wrapping_sub(b) & (is_zero(a) | is_zero(b));
    let product = a * b;
    let regular = (product & 0xffff).wrapping_sub(product >> 16);
    regular.wrapping_add(instead).wrapping_add(regular >> 31) & 0xffff
}

fn encrypt<const N: usize>(keys: &[&Schedule], chain: &mut [u64], rows: &mut Rows, steps: usize) {
    let mut last = [0; N];
    let lanes = keys.len();
    last[..lanes].copy_from_slice(&chain[..lanes]);
    let same = keys.iter().all(|key| std::ptr::eq(*key, keys[0]));
    for row in &mut rows[..steps] {
        for (last, block) in last.iter_mut().zip(&*row) {
            *last ^= block;
        }
        last = if same {
            crypt(last, |i| [keys[0].encrypt[i]; N])
        } else {
            crypt(last, |i| std::array::from_fn(|lane| keys.get(lane).map_or(0, |key| key.encrypt[i])))
        };
        row[..N].copy_from_slice(&last);
    }
    chain[..lanes].copy_from_slice(&last[..lanes]);
}

fn decrypt<const N: usize>(key: &Schedule, blocks: &mut [u64]) {
    let mut padded = [0; N];
    padded[..blocks.len()].copy_from_slice(blocks);
    padded = crypt(padded, |i| [key.decrypt[i]; N]);
    blocks.copy_from_slice(&padded[..blocks.len()]);
}

/// Processes `N` blocks at once; `k` gives the subkey of each lane. Plain loops, which compilers turn into vector
/// instructions.
#[inline(always)]
fn crypt<const N: usize>(mut blocks: [u64; N], k: impl Fn(usize) -> [u16; N]) -> [u64; N] {
    let [mut x1, mut x2, mut x3, mut x4] = [[0; N]; 4];
    for lane in 0..N {
        let block = blocks[lane];
        [x1[lane], x2[lane], x3[lane], x4[lane]] =
            [(block >> 48) as u16, (block >> 32) as u16, (block >> 16) as u16, block as u16];
    }
    for round in 0..ROUNDS {
        let i = 6 * round;
        let y1 = each(x1, k(i), multiply);
        let y2 = each(x2, k(i + 1), u16::wrapping_add);
        let y3 = each(x3, k(i + 2), u16::wrapping_add);
        let y4 = each(x4, k(i + 3), multiply);
        let t = each(each(y1, y3, xor), k(i + 4), multiply);
        let u = each(each(each(y2, y4, xor), t, u16::wrapping_add), k(i + 5), multiply);
        let v = each(t, u, u16::wrapping_add);
        x1 = each(y1, u, xor);
        x2 = each(y3, u, xor);
        x3 = each(y2, v, xor);
        x4 = each(y4, v, xor);
    }
    let y1 = each(x1, k(SUBKEYS - 4), multiply);
    let y2 = each(x3, k(SUBKEYS - 3), u16::wrapping_add);
    let y3 = each(x2, k(SUBKEYS - 2), u16::wrapping_add);
    let y4 = each(x4, k(SUBKEYS - 1), multiply);
    for lane in 0..N {
        let [y1, y2, y3, y4] = [y1, y2, y3, y4].map(|y| u64::from(y[lane]));
        blocks[lane] = y1 << 48 | y2 << 32 | y3 << 16 | y4;
    }
    blocks
}

#[inline(always)]
fn each<const N: usize>(mut a: [u16; N], b: [u16; N], f: impl Fn(u16, u16) -> u16) -> [u16; N] {
    for lane in 0..N {
        a[lane] = f(a[lane], b[lane]);
    }
    a
}

#[inline(always)]
fn xor(a: u16, b: u16) -> u16 {
    a ^ b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn multiplication_alone_is_right_for_every_zero_operand_and_a_grid() {
        for a in 0..=u16::MAX {
            for b in [0, 1, 2, 3, 0x7fff, 0x8000, 0x8001, 0xfffe, 0xffff, a, a.wrapping_neg(), 40503] {
                for (a, b) in [(a, b), (b, a)] {
                    assert_eq!(multiply_alone(a.into(), b.into()), u32::from(multiply(a, b)), "{a} * {b}");
                }
            }
        }
    }
}
