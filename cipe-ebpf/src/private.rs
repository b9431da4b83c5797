//! Private side: the stamp where the tunnel devices' frames enter a hub, and the way from its hidden end to the engine. Fails
//! closed.

use aya_ebpf::{
    bindings::xdp_action::XDP_DROP,
    helpers::generated::bpf_get_hash_recalc,
    programs::{TcContext, XdpContext},
};
use cipe_common::{
    Stamp, Verdict,
    maps::{NO_TUNNEL, PRIVATE_QUEUES, PrivateAddress, Tunnel, private_socket_index},
};

use crate::{
    contents::{Contents, contents, is_tcp},
    frame::{ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Front},
    loops::{is_own, looped},
    maps::{PRIVATE_ADDRESSES, PRIVATE_SOCKETS, TUNNELS},
    mss,
    verdicts::Drop,
};

/// Checks, clamps and stamps a frame that a tunnel device hands to its hub.
#[inline(always)]
pub fn stamp(ctx: &TcContext) -> Result<(), Drop> {
    // SAFETY: the context is the one the kernel called us with; the verifier checks each field access.
    let (protocol, tag, gso_size, segments) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).protocol, (*skb).vlan_present, (*skb).gso_size, (*skb).gso_segs)
    };
    let tunnel = tunnel_of(Front::of_tc(ctx));
    let dead = Drop { tunnel, verdict: Verdict::TunnelDead };
    let state = TUNNELS.get(tunnel).ok_or(dead)?;
    if state.flags & Tunnel::ALIVE == 0 {
        return Err(dead);
    }
    let not_ip = Drop { tunnel, verdict: Verdict::PrivateNotIp };
    if tag != 0 {
        // A VLAN tag beside the frame would get lost on the way.
        return Err(not_ip);
    }
    // The field holds the ethertype in network order in its low half.
    let ethertype = (protocol as u16).to_ne_bytes();
    match ethertype {
        ETHERTYPE_IPV4 => mss::clamp_ipv4(ctx, state.mss),
        ETHERTYPE_IPV6 => mss::clamp_ipv6(ctx, state.mss),
        _ => return Err(not_ip),
    }
    if is_own::<ETHERNET>(ctx, ethertype, &state.target) {
        return Err(looped(tunnel, segments));
    }
    spread(ctx);
    let mut stamp =
        Stamp { hub: state.hub as u8, encapsulated: false, gso_size: gso_size as u16, tunnel: tunnel as u16 };
    if !is_tcp::<ETHERNET>(Front::of_tc(ctx), ethertype) {
        match contents(ctx) {
            Contents::Plain => {}
            Contents::Encapsulated => (stamp.encapsulated, stamp.gso_size) = (true, 0),
            // SCTP, or UDP that is to be cut into fragments.
            Contents::Other => stamp.gso_size = 0,
        }
    }
    let mac = stamp.to_mac();
    // Not even room for an Ethernet header: nothing that a network device hands us.
    ctx.store(0, &mac, 0).map_err(|_| Drop { tunnel, verdict: Verdict::PrivateMalformed })
}

/// How many workers serve a hub.
#[unsafe(no_mangle)]
static WORKERS: u32 = 1;

/// Chooses the queue of the hub, and so the worker, by the flow, not by where a forwarded packet came in. What is written
/// is taken for the receive queue and one more, for which the kernel picks the transmit queue of that number: 1 to the
/// number of workers. Generic XDP at the hidden end then sees the receive queue before it, native XDP that queue itself.
#[inline(always)]
pub fn spread(ctx: &TcContext) {
    // SAFETY: the loader sets it before the program is loaded, and nothing does later.
    let workers = unsafe { core::ptr::read_volatile(&raw const WORKERS) };
    if workers > 1 {
        let skb = ctx.skb.skb;
        // SAFETY: the context is the one the kernel called us with.
        unsafe { (*skb).queue_mapping = 2 + bpf_get_hash_recalc(skb) % workers };
    }
}

/// Hands a stamped frame to the engine's socket for its hub and queue.
#[inline(always)]
pub fn redirect(ctx: &XdpContext) -> Result<u32, Drop> {
    let front = Front::of_xdp(ctx);
    let stamp = front.at::<Ethernet>(0).and_then(|ethernet| Stamp::from_mac(ethernet.destination));
    let Some(stamp) = stamp else {
        return Err(Drop { tunnel: tunnel_of(front), verdict: Verdict::PrivateUnstamped });
    };
    let refused = Drop { tunnel: u32::from(stamp.tunnel), verdict: Verdict::NoEngine };
    let queue = ctx.rx_queue_index();
    if queue >= PRIVATE_QUEUES {
        return Err(refused);
    }
    // A forged hub leads nowhere: the kernel gives a frame only to a socket bound to its own device and queue.
    let socket = private_socket_index(u32::from(stamp.hub), queue);
    PRIVATE_SOCKETS.redirect(socket, u64::from(XDP_DROP)).map_err(|_| refused)
}

/// The tunnel whose device a frame comes from, by its source address; none is as good as dead.
#[inline(always)]
fn tunnel_of(front: Front<'_>) -> u32 {
    let Some(ethernet) = front.at::<Ethernet>(0) else { return NO_TUNNEL };
    // Mostly it says its number itself, which costs no look-up but the one that is needed anyway.
    let number = u32::from(u16::from_be_bytes([ethernet.source[4], ethernet.source[5]]));
    if TUNNELS.get(number).is_some_and(|tunnel| tunnel.device.mac == ethernet.source) {
        return number;
    }
    // SAFETY: values are plain u32; a device that is being removed may be counted under another tunnel, no more.
    unsafe { PRIVATE_ADDRESSES.get(PrivateAddress::new(ethernet.source)) }.copied().unwrap_or(NO_TUNNEL)
}
