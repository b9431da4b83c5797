//! A tunnel's own datagrams that come into it: what the rules of routes and firewalls, or bridges, have led back, whatever they say.

use aya_ebpf::programs::TcContext;
use cipe_common::{Verdict, maps::CarrierAddress};

use crate::{
    frame::{
        BEHIND_ONE, BEHIND_TWO, ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Fragment, Front, IPV6_FRAGMENT, Ipv4, Ipv6, PROTOCOL_UDP,
        behind_tags, is_v4, is_v6,
    },
    verdicts::Drop,
};

/// The drop of such a datagram, or of a superframe of them, whose `segments` but one are counted here.
#[inline(always)]
pub fn looped(tunnel: u32, segments: u32) -> Drop {
    let drop = Drop { tunnel, verdict: Verdict::RouteLoop };
    drop.count_others(segments);
    drop
}

/// Whether a frame holds a datagram to `target`, the tunnel's own, behind up to two VLAN tags. One that the kernel keeps beside the
/// frame does not count.
#[inline(always)]
pub fn is_own_tagged(ctx: &TcContext, target: &CarrierAddress) -> bool {
    match behind_tags(Front::of_tc(ctx)) {
        Some((0, ethertype)) => is_own::<ETHERNET>(ctx, ethertype, target),
        Some((1, ethertype)) => is_own::<BEHIND_ONE>(ctx, ethertype, target),
        Some((_, ethertype)) => is_own::<BEHIND_TWO>(ctx, ethertype, target),
        None => false,
    }
}

/// Whether the IP packet at offset `IP` is a datagram to `target`, or the first piece of one.
#[inline(always)]
pub fn is_own<const IP: usize>(ctx: &TcContext, ethertype: [u8; 2], target: &CarrierAddress) -> bool {
    if target.port == [0; 2] {
        return false;
    }
    let front = Front::of_tc(ctx);
    // Our own datagrams have no IP options, and of extension headers that of fragments at most.
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
