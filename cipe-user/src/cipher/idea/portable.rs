//! IDEA on arrays of words, which compilers turn into whatever vectors the target has. Runs on any CPU.

use super::{ROUNDS, SUBKEYS, Schedule, multiply};
use crate::cipher::kernel::Kernel;
use crate::cipher::stage::Rows;

/// Two 128-bit vectors of words: one waits while the other works.
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

/// `N` blocks at once; `k` gives the subkey of each lane. Plain loops, which compilers turn into vectors.
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
