//! What of a packet the kernel knows and tells programs in no field.

use aya_ebpf::{
    bindings::{BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_adjust_room},
    programs::TcContext,
};

use crate::frame::{ETHERTYPE_IPV4, Front, Ipv4, Ipv6, PROTOCOL_TCP};

/// What a packet is to the kernel, as far as cutting it goes.
pub enum Contents {
    /// TCP or UDP, which the engine cuts, or nothing to cut.
    Plain,
    /// Put into another packet by the kernel.
    Encapsulated,
    /// Anything else that is to be cut.
    Other,
}

/// Octets that are asked for, and octets of an inner Ethernet header that they have no room for.
const ASKED: i32 = 1;
const NO_ROOM_FOR: u64 = 0xFF << 56;

/// Errors of `bpf_skb_adjust_room`.
const EINVAL: i64 = -22;
const EALREADY: i64 = -114;

/// Asks the kernel, which tells programs nothing of `skb->encapsulation` and the type of a superframe: a request for an outer
/// header is refused with an error of its own where there is one already, and for superframes that are neither TCP nor UDP.
/// Anywhere else the request is refused since it contradicts itself, so that the packet never changes (net/core/filter.c,
/// bpf_skb_net_grow). `skb->protocol` must be that of IP, without a tag in the frame.
#[inline(always)]
pub fn contents(ctx: &TcContext) -> Contents {
    let flags = NO_ROOM_FOR | u64::from(BPF_F_ADJ_ROOM_ENCAP_L3_IPV4) | u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    // SAFETY: the context is the one the kernel called us with; no reference into the packet is kept.
    match unsafe { bpf_skb_adjust_room(ctx.skb.skb, ASKED, BPF_ADJ_ROOM_MAC, flags) } {
        EINVAL => Contents::Plain,
        EALREADY => Contents::Encapsulated,
        _ => Contents::Other,
    }
}

/// Whether a TCP header follows the IP header at offset `IP`. The kernel puts nothing into TCP.
#[inline(always)]
pub fn is_tcp<const IP: usize>(front: Front<'_>, ethertype: [u8; 2]) -> bool {
    match ethertype {
        ETHERTYPE_IPV4 => front.at::<Ipv4>(IP).is_some_and(|ip| ip.protocol == PROTOCOL_TCP),
        _ => front.at::<Ipv6>(IP).is_some_and(|ip| ip.next_header == PROTOCOL_TCP),
    }
}

/// Where a number stands that the question changes for a moment: any frame has its ethertype.
const ANY_FIELD: usize = 12;
/// Octets of that field.
const FIELD: u64 = 2;

/// Whether the checksum of a packet is left to the device (CHECKSUM_PARTIAL): the kernel then passes over a request to correct one,
/// which it does at any other time, wherever that is said to stand (net/core/utils.c, inet_proto_csum_replace4).
///
/// # Errors
/// The field could not be read, or put back.
#[inline(always)]
pub fn is_unfinished(ctx: &TcContext) -> Result<bool, i64> {
    let before: [u8; 2] = ctx.load(ANY_FIELD)?;
    // SAFETY: the context is the one the kernel called us with; no reference into the packet is kept.
    if unsafe { bpf_l4_csum_replace(ctx.skb.skb, ANY_FIELD as u32, 0, 1, FIELD) } < 0 {
        return Err(EINVAL);
    }
    let is_unfinished = ctx.load::<[u8; 2]>(ANY_FIELD)? == before;
    if !is_unfinished {
        ctx.store(ANY_FIELD, &before, 0)?;
    }
    Ok(is_unfinished)
}
