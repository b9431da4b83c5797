//! Detects a tunnel's own datagrams that routes, firewall rules or bridges lead back into it.

use aya_ebpf::programs::TcContext;
use cipe_common::{Verdict, maps::CarrierAddress};

use crate::{
    frame::{
        BEHIND_ONE, BEHIND_TWO, ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Fragment, Front, IPV6_FRAGMENT, Ipv4, Ipv6, PROTOCOL_UDP,
        behind_tags, is_v4, is_v6,
    },
    verdicts::Drop,
};

/// Returns the drop for such a datagram, or for a superframe of `segments` of them. It counts all segments but one
/// here; the caller counts that one with the drop.
#[inline(always)]
pub fn looped(tunnel: u32, segments: u32) -> Drop {
    let drop = Drop { tunnel, verdict: Verdict::RouteLoop };
    drop.count_others(segments);
    drop
}

/// Returns whether a frame holds a datagram to `target`, the tunnel's own, behind up to two VLAN tags. A tag that the
/// kernel keeps in the metadata is not one of the two.
#[inline(always)]
pub fn is_own_tagged(ctx: &TcContext, target: &CarrierAddress) -> bool {
    match behind_tags(Front::of_tc(ctx)) {
        Some((0, ethertype)) => is_own::<ETHERNET>(ctx, ethertype, target),
        Some((1, ethertype)) => is_own::<BEHIND_ONE>(ctx, ethertype, target),
        Some((_, ethertype)) => is_own::<BEHIND_TWO>(ctx, ethertype, target),
        None => false,
    }
}

/// Returns whether the IP packet at offset `IP` is a datagram to `target`, or the first fragment of one.
#[inline(always)]
pub fn is_own<const IP: usize>(ctx: &TcContext, ethertype: [u8; 2], target: &CarrierAddress) -> bool {
    if target.port == [0; 2] {
        return false;
    }
    let front = Front::of_tc(ctx);
    // Our own datagrams have no IP options, and no extension header but the fragment header.
    let udp = match ethertype {
        ETHERTYPE_IPV4 => match front.at::<Ipv4>(IP) {
            Some(ip) if ip.protocol == PROTOCOL_UDP && ip.begins() && is_v4(target, ip.destination) => {
                IP + size_of::<Ipv4>()
            }
            _ => return false,
        },
        ETHERTYPE_IPV6 => match front.at::<Ipv6>(IP) {
            Some(ip) if is_v6(target, ip.destination) => match ip.next_header {
                PROTOCOL_UDP => IP + size_of::<Ipv6>(),
                IPV6_FRAGMENT => match front.at::<Fragment>(IP + size_of::<Ipv6>()) {
                    Some(fragment) if fragment.begins() && fragment.next_header == PROTOCOL_UDP => {
                        IP + size_of::<Ipv6>() + size_of::<Fragment>()
                    }
                    _ => return false,
                },
                _ => return false,
            },
            _ => return false,
        },
        _ => return false,
    };
    // The front may end behind the IP header.
    ctx.load::<[u8; 2]>(udp + DESTINATION_PORT).is_ok_and(|port| port == target.port)
}

/// Offset of the port in a UDP header.
const DESTINATION_PORT: usize = 2;
