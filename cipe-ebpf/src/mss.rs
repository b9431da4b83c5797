//! Clamps the MSS option of TCP SYN packets, so that TCP through the tunnel does not depend on path MTU discovery.

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
const MAX_OPTION_OCTETS: usize = 40;
/// The smallest mask that keeps every offset of an option.
const OFFSET_MASK: usize = 63;
/// Octets of the buffer: any read at a masked offset is inside.
const OPTION_BUFFER: usize = OFFSET_MASK + 4 + 1;
/// The most options that the program reads. Every known stack sends the MSS first.
const MAX_OPTIONS_READ: usize = 10;

const SYN: u8 = 0x02;
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;

/// Clamps the MSS of an IPv4 SYN packet to `mss` octets. Any other packet, and a fragment, stays as it is. `mss` 0 means no limit.
#[inline(always)]
pub fn clamp_ipv4(ctx: &TcContext, mss: u32) {
    let Some(ip) = Front::of_tc(ctx).at::<Ipv4>(ETHERNET) else { return };
    if mss == 0 || ip.protocol != PROTOCOL_TCP || ip.is_fragment() {
        return;
    }
    let header = usize::from(ip.version_ihl & 0x0F) * 4;
    clamp(ctx, ETHERNET + header, mss);
}

/// Clamps the MSS of an IPv6 SYN packet without extension headers. `mss` is the limit for IPv4.
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
    let mut options = [0u8; OPTION_BUFFER];
    // The options' length is a multiple of four octets.
    let Some(length) = bounds::within::<4, { MAX_OPTION_OCTETS as u64 }>(length as u64) else { return };
    let length = length as usize;
    if !load_options(ctx, tcp + TCP_HEADER, &mut options, length) {
        return;
    }
    // The last offset at which kind, length and a 16-bit value fit.
    let last = length - 4;
    let mut at = 0;
    for _ in 0..MAX_OPTIONS_READ {
        if at > last {
            return;
        }
        // Every verifier understands a mask as a bound. The compiler does not know `last`, so it keeps the mask.
        at &= OFFSET_MASK;
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

/// Writes `mss` if it is lower than the old value, and updates the TCP checksum. `value` is the offset of the value
/// from the TCP header.
///
/// A finished checksum (forwarded packets) is updated by the difference. One that is left to the device
/// (`CHECKSUM_PARTIAL`, packets of this host) holds the sum of the pseudo header only, without the options.
/// `bpf_l4_csum_replace` without `BPF_F_PSEUDO_HDR` does not change it, and the code that completes it later includes
/// the new value.
#[inline(always)]
fn lower(ctx: &TcContext, tcp: usize, value: usize, old: [u8; 2], mss: u32) {
    if u32::from(u16::from_be_bytes(old)) <= mss {
        return;
    }
    let new = (mss as u16).to_be_bytes();
    // The checksum is over 16-bit words from the start of the header. After an odd number of NOPs the value spans two words.
    let word = |octets: [u8; 2]| {
        let word = u16::from_ne_bytes(octets);
        u64::from(if value.is_multiple_of(2) { word } else { word.swap_bytes() })
    };
    // If the first call fails, the packet is not clamped. If the second fails, the checksum is wrong, and the receiver
    // drops the packet.
    if ctx.l4_csum_replace(tcp + TCP_CHECKSUM, word(old), word(new), 2).is_ok() {
        let _ = ctx.store(tcp + value, &new, 0);
    }
}

/// Copies `length` octets (4 to 40) of options. Returns `false` if the packet ends before.
#[inline(always)]
fn load_options(ctx: &TcContext, offset: usize, options: &mut [u8; OPTION_BUFFER], length: usize) -> bool {
    // SAFETY: the context is the one the kernel called us with, and the caller has checked that the octets fit.
    unsafe { bpf_skb_load_bytes(ctx.skb.skb.cast(), offset as u32, options.as_mut_ptr().cast(), length as u32) == 0 }
}
