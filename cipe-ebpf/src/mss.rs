//! Clamping the MSS option of TCP SYN packets, so that TCP never needs the path MTU to be discovered.

use aya_ebpf::{helpers::generated::bpf_skb_load_bytes, programs::TcContext};

use crate::{
    bounds,
    frame::{ETHERNET, Front, Ipv4, Ipv6, PROTOCOL_TCP},
};

/// Octets by which an IPv6 header is longer than an IPv4 header.
const IPV6_LONGER: u32 = 20;
const TCP_HEADER: usize = 20;
const TCP_DATA_OFFSET: usize = 12;
const TCP_CHECKSUM: usize = 16;
const MAX_OPTIONS: usize = 40;
/// The least mask that each place of an option passes.
const MASK: usize = 63;
/// Octets for all that can be read behind a masked place.
const ROOM: usize = MASK + 4 + 1;
/// Options looked at; every known stack sends the MSS first.
const MAX_STEPS: usize = 10;

const SYN: u8 = 0x02;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;

/// Clamps if it is a SYN (first fragment or whole); leaves every other packet alone. `mss` 0 means no limit.
#[inline(always)]
pub fn clamp_ipv4(ctx: &TcContext, mss: u32) {
    let Some(ip) = Front::of_tc(ctx).at::<Ipv4>(ETHERNET) else { return };
    if mss == 0 || ip.protocol != PROTOCOL_TCP || ip.is_fragment() {
        return;
    }
    let header = usize::from(ip.version_ihl & 0x0F) * 4;
    clamp(ctx, ETHERNET + header, mss);
}

/// The same for IPv6 without extension headers.
#[inline(always)]
pub fn clamp_ipv6(ctx: &TcContext, mss: u32) {
    let Some(ip) = Front::of_tc(ctx).at::<Ipv6>(ETHERNET) else { return };
    if mss == 0 || ip.next_header != PROTOCOL_TCP {
        return;
    }
    clamp(ctx, ETHERNET + size_of::<Ipv6>(), mss.saturating_sub(IPV6_LONGER));
}

#[inline(always)]
fn clamp(ctx: &TcContext, tcp: usize, mss: u32) {
    let Ok([data_offset, flags]) = ctx.load::<[u8; 2]>(tcp + TCP_DATA_OFFSET) else { return };
    if flags & SYN == 0 {
        return;
    }
    let length = (usize::from(data_offset >> 4) * 4).wrapping_sub(TCP_HEADER);
    let mut options = [0u8; ROOM];
    // Options come in words of four octets.
    let Some(length) = bounds::within::<4, { MAX_OPTIONS as u64 }>(length as u64) else { return };
    let length = length as usize;
    if !load_options(ctx, tcp + TCP_HEADER, &mut options, length) {
        return;
    }
    // Where kind, length and a 16-bit value have room.
    let last = length - 4;
    let mut at = 0;
    for _ in 0..MAX_STEPS {
        if at > last {
            return;
        }
        // A mask is a bound that each verifier follows; the compiler knows nothing of `last` and leaves it in.
        at &= MASK;
        match (options[at], options[at + 1]) {
            (OPTION_END, _) => return,
            (OPTION_NOP, _) => at += 1,
            (OPTION_MSS, 4) => {
                lower(ctx, tcp, TCP_HEADER + at + 2, [options[at + 2], options[at + 3]], mss);
                return;
            }
            (_, 0 | 1) => return,
            (_, skip) => at += usize::from(skip),
        }
    }
}

/// Writes a lower value and corrects the TCP checksum. `value` is the offset of the value from the TCP header.
///
/// A checksum that the sender has completed (forwarded packets) is updated by the difference. One that is left to the
/// device (`CHECKSUM_PARTIAL`, packets of this host) holds the pseudo-header's sum only, in which options have no part:
/// `bpf_l4_csum_replace` without `BPF_F_PSEUDO_HDR` leaves it as it is, and whoever completes it sums up the new value.
#[inline(always)]
fn lower(ctx: &TcContext, tcp: usize, value: usize, old: [u8; 2], mss: u32) {
    if u32::from(u16::from_be_bytes(old)) <= mss {
        return;
    }
    let new = (mss as u16).to_be_bytes();
    // The sum runs over 16-bit words from the header's start; behind an odd number of NOPs the value lies across two.
    let word = |octets: [u8; 2]| {
        let word = u16::from_ne_bytes(octets);
        u64::from(if value.is_multiple_of(2) { word } else { word.swap_bytes() })
    };
    // Of the two a failure leaves the packet unclamped or with a wrong checksum, never a wrong value accepted.
    if ctx.l4_csum_replace(tcp + TCP_CHECKSUM, word(old), word(new), 2).is_ok() {
        let _ = ctx.store(tcp + value, &new, 0);
    }
}

/// Copies `length` octets (1 to 40) of options.
#[inline(always)]
fn load_options(ctx: &TcContext, offset: usize, options: &mut [u8; ROOM], length: usize) -> bool {
    // SAFETY: the context is the one the kernel called us with, and the caller has checked that the octets fit.
    unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), offset as u32, options.as_mut_ptr().cast(), length as u32) == 0 }
}
