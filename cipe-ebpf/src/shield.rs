//! The shield: while the engine has set it for a tunnel, datagrams that none of its keys can open are dropped here, by their first
//! and last block.

use aya_ebpf::{
    helpers::generated::{bpf_ktime_get_ns, bpf_skb_load_bytes, bpf_xdp_load_bytes},
    programs::{TcContext, XdpContext},
};
use cipe_common::{
    Verdict,
    maps::{Budgets, Tunnel},
    shield::{self, BLOCK, Shield, ShieldKey},
};

use crate::{
    maps::{BUDGETS, SHIELDS},
    verdicts::Drop,
};

/// Indexes in [`Shield::keys`].
const STATIC: usize = 0;
const RECEIVE: usize = 1;
const PREVIOUS: usize = 2;

/// Two consecutive blocks, as little-endian numbers (every target is little-endian): the one that is XORed, and the encrypted one.
pub type TwoBlocks = [u64; 2];

/// A packet whose octets can be copied.
pub trait Octets {
    /// Copies two blocks at an offset.
    fn two_blocks(&self, offset: usize) -> Option<TwoBlocks>;
}

impl Octets for XdpContext {
    #[inline(always)]
    fn two_blocks(&self, offset: usize) -> Option<TwoBlocks> {
        let mut blocks: TwoBlocks = [0; 2];
        // SAFETY: the context is the one the kernel called us with; the length is that of the buffer.
        let copied = unsafe {
            bpf_xdp_load_bytes(self.ctx, offset as u32, blocks.as_mut_ptr().cast(), size_of::<TwoBlocks>() as u32)
        };
        (copied == 0).then_some(blocks)
    }
}

impl Octets for TcContext {
    #[inline(always)]
    fn two_blocks(&self, offset: usize) -> Option<TwoBlocks> {
        let mut blocks: TwoBlocks = [0; 2];
        // SAFETY: as above.
        let copied = unsafe {
            bpf_skb_load_bytes(
                self.skb.skb.cast(),
                offset as u32,
                blocks.as_mut_ptr().cast(),
                size_of::<TwoBlocks>() as u32,
            )
        };
        (copied == 0).then_some(blocks)
    }
}

/// Lets the datagram of `len` octets at offset `at` pass if its tunnel is not shielded or one of its keys may open it.
///
/// # Errors
/// The drop, if no key can open it.
#[inline(always)]
pub fn check(packet: &impl Octets, tunnel: u32, state: &Tunnel, at: usize, len: usize) -> Result<(), Drop> {
    if state.shield == 0 {
        return Ok(());
    }
    let Some(shield) = SHIELDS.get_ptr(state.shield - 1) else { return Ok(()) };
    let (Some(head), Some(tail)) = (packet.two_blocks(at), packet.two_blocks(at + len - 2 * BLOCK)) else {
        return Ok(());
    };
    if is_refused(shield, &head, &tail, len) { pass_some(tunnel, Verdict::BadCrc) } else { Ok(()) }
}

/// Whether there is a key for the flag, and no such key may open a datagram with these ends.
#[inline(never)]
fn is_refused(shield: *const Shield, head: &TwoBlocks, tail: &TwoBlocks, len: usize) -> bool {
    // SAFETY: the pointer comes from a successful array look-up, is aligned, and stays valid as long as the map. The writer marks
    // its writes in `generation`; on a CPU that reorders loads by hundreds, a datagram during a change of keys may be judged wrong.
    unsafe {
        let generation = (&raw const (*shield).generation).read_volatile();
        let refused = if head[0] & 0x80 == 0 {
            opens(shield, STATIC, head, tail, len) == Some(false)
        } else {
            match opens(shield, RECEIVE, head, tail, len) {
                Some(true) => false,
                Some(false) => opens(shield, PREVIOUS, head, tail, len) != Some(true),
                None => opens(shield, PREVIOUS, head, tail, len) == Some(false),
            }
        };
        refused && generation & 1 == 0 && (&raw const (*shield).generation).read_volatile() == generation
    }
}

/// Whether a key may open a datagram with these ends; `None` if there is no such key.
///
/// # Safety
/// `shield` points to a value of `SHIELDS`.
#[inline(always)]
unsafe fn opens(shield: *const Shield, key: usize, head: &TwoBlocks, tail: &TwoBlocks, len: usize) -> Option<bool> {
    // SAFETY: as the caller promises; `key` is one of the constants.
    let (cipher, carries_ip, key) =
        unsafe { ((*shield).cipher, (*shield).carries_ip != 0, &raw const (*shield).keys[key]) };
    // SAFETY: as above.
    unsafe {
        if (*key).live == 0 {
            return None;
        }
        let mut blocks = [second(head), second(tail)];
        decrypt(cipher, key, &mut blocks);
        let [first, last] = blocks;
        Some(shield::is_possible(xor(first, head), xor(last, tail), len, carries_ip))
    }
}

/// As [`shield::decrypt`], with the code of a cipher once for all callers.
///
/// # Safety
/// `key` points to a key in a value of `SHIELDS`.
#[inline(always)]
unsafe fn decrypt(cipher: u32, key: *const ShieldKey, blocks: &mut [u64; 2]) {
    // SAFETY: as the caller promises.
    unsafe {
        match cipher {
            Shield::BLOWFISH => blowfish(key, blocks),
            Shield::IDEA => *blocks = blocks.map(|block| idea(key, block.swap_bytes()).swap_bytes()),
            _ => {
                *blocks = blocks
                    .map(|block| shield::swap_words(idea(key, shield::swap_words(block.swap_bytes()))).swap_bytes())
            }
        }
    }
}

/// [`shield::blowfish`] on two blocks.
#[inline(never)]
unsafe fn blowfish(key: *const ShieldKey, blocks: &mut [u64; 2]) {
    // SAFETY: as the caller promises.
    *blocks = shield::blowfish(unsafe { &(*key).words }, *blocks);
}

/// [`shield::idea`] on a block.
#[inline(never)]
unsafe fn idea(key: *const ShieldKey, block: u64) -> u64 {
    // SAFETY: as the caller promises.
    shield::idea(unsafe { &(*key).words }, block)
}

#[inline(always)]
fn second(blocks: &TwoBlocks) -> u64 {
    blocks[1]
}

/// Undoes the chaining: the first of two blocks is what the second was XORed with.
#[inline(always)]
fn xor(plain: u64, blocks: &TwoBlocks) -> [u8; BLOCK] {
    (plain ^ blocks[0]).to_le_bytes()
}

/// Lets one packet per [`Budgets::KEYLESS_INTERVAL`] pass, so that the engine may ask for a key. Two CPUs may let one pass each at the
/// same time.
///
/// # Errors
/// The rate limit is reached: a drop under `verdict`.
#[inline(always)]
pub fn pass_some(tunnel: u32, verdict: Verdict) -> Result<(), Drop> {
    let refused = Drop { tunnel, verdict };
    let budgets = BUDGETS.get_ptr_mut(tunnel).ok_or(refused)?;
    // SAFETY: the helper takes no arguments; the pointer comes from a successful array look-up, is aligned, and stays
    // valid as long as the map, which the program holds.
    unsafe {
        let last = &raw mut (*budgets).keyless;
        let now = bpf_ktime_get_ns();
        if now.wrapping_sub(*last) < Budgets::KEYLESS_INTERVAL && *last != 0 {
            return Err(refused);
        }
        *last = now;
    }
    Ok(())
}

/// Lets a message in clear pass while the tunnel's budget lasts. Two CPUs may take the same part of the budget at the same time.
///
/// # Errors
/// The drop, if the budget is spent.
#[inline(always)]
pub fn pass_few_in_clear(tunnel: u32) -> Result<(), Drop> {
    let refused = Drop { tunnel, verdict: Verdict::ClearControl };
    let budgets = BUDGETS.get_ptr_mut(tunnel).ok_or(refused)?;
    // SAFETY: as in `pass_some`.
    unsafe {
        let full = &raw mut (*budgets).clear;
        let now = bpf_ktime_get_ns();
        let missing = (*full).saturating_sub(now);
        if missing > (Budgets::CLEAR_BURST - 1) * Budgets::CLEAR_INTERVAL {
            return Err(refused);
        }
        *full = now + missing + Budgets::CLEAR_INTERVAL;
    }
    Ok(())
}
