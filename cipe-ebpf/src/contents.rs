//! Properties of a packet that the kernel knows but shows to programs in no field.

use aya_ebpf::{
    bindings::{BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_FIXED_GSO, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers::generated::{bpf_l4_csum_replace, bpf_skb_adjust_room},
    programs::TcContext,
};

use crate::frame::{ETHERTYPE_IPV4, Front, Ipv4, Ipv6, PROTOCOL_TCP};

/// The kind of a packet, for its segmentation.
pub enum Contents {
    /// A single packet, or a superframe of TCP or UDP, which the engine segments.
    Plain,
    /// The kernel has encapsulated it in another packet.
    Encapsulated,
    /// A superframe of any other kind.
    Other,
}

/// Octets of the outer header that [`contents`] requests.
const REQUESTED_OCTETS: i32 = 1;
/// The length of the inner Ethernet header, as flags of the request. It is longer than the requested octets, so the kernel always
/// refuses.
const INNER_ETHERNET_FLAGS: u64 = 0xFF << 56;

/// Errors of `bpf_skb_adjust_room`.
const EINVAL: i64 = -22;
const EALREADY: i64 = -114;

/// Returns the kind of a packet. Programs cannot read `skb->encapsulation` or the type of a superframe, so this
/// function makes a request for an outer header that the kernel always refuses, and reads the error. An encapsulated
/// packet gives `EALREADY`, a superframe that is neither TCP nor UDP another error. Any other packet gives `EINVAL`,
/// since the request contradicts itself. The packet never changes (net/core/filter.c, bpf_skb_net_grow).
/// `skb->protocol` must be IPv4 or IPv6, and the frame must have no tag.
#[inline(always)]
pub fn contents(ctx: &TcContext) -> Contents {
    let flags = INNER_ETHERNET_FLAGS | u64::from(BPF_F_ADJ_ROOM_ENCAP_L3_IPV4) | u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    // SAFETY: the context is the one the kernel called us with; no reference into the packet is kept.
    match unsafe { bpf_skb_adjust_room(ctx.skb.skb, REQUESTED_OCTETS, BPF_ADJ_ROOM_MAC, flags) } {
        EINVAL => Contents::Plain,
        EALREADY => Contents::Encapsulated,
        _ => Contents::Other,
    }
}

/// Returns whether a TCP header follows the IP header at offset `IP`. The kernel never encapsulates packets in TCP.
#[inline(always)]
pub fn is_tcp<const IP: usize>(front: Front<'_>, ethertype: [u8; 2]) -> bool {
    match ethertype {
        ETHERTYPE_IPV4 => front.at::<Ipv4>(IP).is_some_and(|ip| ip.protocol == PROTOCOL_TCP),
        _ => front.at::<Ipv6>(IP).is_some_and(|ip| ip.next_header == PROTOCOL_TCP),
    }
}

/// Offset of the field that [`is_unfinished`] changes for a moment: the ethertype, which every frame has.
const PROBED_FIELD: usize = 12;
/// Octets of that field.
const PROBED_OCTETS: u64 = 2;

/// Returns whether the checksum of a packet is left to the device (`CHECKSUM_PARTIAL`). The kernel ignores a request to update a
/// checksum of such a packet, and carries it out for any other packet, at any offset (net/core/utils.c, inet_proto_csum_replace4).
///
/// # Errors
/// The field could not be read or restored.
#[inline(always)]
pub fn is_unfinished(ctx: &TcContext) -> Result<bool, i64> {
    let before: [u8; 2] = ctx.load(PROBED_FIELD)?;
    // SAFETY: the context is the one the kernel called us with; no reference into the packet is kept.
    if unsafe { bpf_l4_csum_replace(ctx.skb.skb, PROBED_FIELD as u32, 0, 1, PROBED_OCTETS) } < 0 {
        return Err(EINVAL);
    }
    let is_unfinished = ctx.load::<[u8; 2]>(PROBED_FIELD)? == before;
    if !is_unfinished {
        ctx.store(PROBED_FIELD, &before, 0)?;
    }
    Ok(is_unfinished)
}
