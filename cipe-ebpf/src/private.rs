//! Private side: stamps the frames of tunnel devices where they enter a hub, and redirects them from its hidden end to the engine.
//! Frames are dropped, never passed, if anything is wrong.

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

/// Checks, clamps and stamps a frame that a tunnel device transmits through its hub.
///
/// # Errors
/// The tunnel is not alive, the frame holds no IP packet, or it is the tunnel's own datagram.
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
        // A VLAN tag in the metadata would get lost on the way to the engine.
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
            // SCTP, or UDP that the kernel cuts into fragments.
            Contents::Other => stamp.gso_size = 0,
        }
    }
    let mac = stamp.to_mac();
    // It fails only for a frame shorter than an Ethernet header, which no network device sends.
    ctx.store(0, &mac, 0).map_err(|_| Drop { tunnel, verdict: Verdict::PrivateMalformed })
}

/// Number of workers that serve a hub. The loader sets it.
#[unsafe(no_mangle)]
static WORKERS: u32 = 1;

/// Chooses the queue of the hub, and so the worker, by the flow. Without this, the receive queue of a forwarded packet
/// would decide.
///
/// The kernel takes `queue_mapping` as a receive queue plus one, and picks the transmit queue with that receive queue's
/// number: from 1 to the number of workers. At the hidden end, generic XDP sees this number minus one, native XDP the
/// number itself.
#[inline(always)]
pub fn spread(ctx: &TcContext) {
    // SAFETY: the loader sets the value before it loads the program; nothing writes it later.
    let workers = unsafe { core::ptr::read_volatile(&raw const WORKERS) };
    if workers > 1 {
        let skb = ctx.skb.skb;
        // SAFETY: the context is the one the kernel called us with.
        unsafe { (*skb).queue_mapping = 2 + bpf_get_hash_recalc(skb) % workers };
    }
}

/// Redirects a stamped frame to the engine's socket for its hub and queue.
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
    // A forged hub does no harm: the kernel delivers a frame only to a socket that is bound to the frame's own device and queue.
    let socket = private_socket_index(u32::from(stamp.hub), queue);
    PRIVATE_SOCKETS.redirect(socket, u64::from(XDP_DROP)).map_err(|_| refused)
}

/// Returns the number of the tunnel whose device sent a frame, by its source address, or [`NO_TUNNEL`].
#[inline(always)]
fn tunnel_of(front: Front<'_>) -> u32 {
    let Some(ethernet) = front.at::<Ethernet>(0) else { return NO_TUNNEL };
    // Most addresses end with the tunnel's number. Then the only look-up is one in `TUNNELS`, which the caller needs anyway.
    let number = u32::from(u16::from_be_bytes([ethernet.source[4], ethernet.source[5]]));
    if TUNNELS.get(number).is_some_and(|tunnel| tunnel.device.mac == ethernet.source) {
        return number;
    }
    // SAFETY: values are plain u32. At worst, a frame of a device that is being removed is counted for another tunnel.
    unsafe { PRIVATE_ADDRESSES.get(PrivateAddress::new(ethernet.source)) }.copied().unwrap_or(NO_TUNNEL)
}
