//! Private side of Ethernet tunnels (protocol 4): each has a veth pair of its own, so that the pair says whose a frame is, and no
//! octet of the frame is touched. What else the engine must know stands in front of it ([`crate::tag`]). Fails closed.

use aya_ebpf::{
    bindings::xdp_action::XDP_DROP,
    programs::{TcContext, XdpContext},
};
use cipe_common::{
    Verdict,
    maps::{EthernetDevice, NO_TUNNEL, PRIVATE_QUEUES, Tunnel, private_socket_index},
};

use crate::{
    loops::{is_own_tagged, looped},
    maps::{ETHERNET_DEVICES, PRIVATE_SOCKETS, TUNNELS},
    private::spread,
    tag,
    verdicts::Drop,
};

/// Checks and stamps a frame that leaves by the device. The kernel writes the tag beside it, the stamp at last, into the frame behind
/// this program: the device has no VLAN offload.
#[inline(always)]
pub fn check(ctx: &TcContext) -> Result<(), Drop> {
    // SAFETY: the context is the one the kernel called us with; the verifier checks each field access.
    let (ifindex, segments, gso_size) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).ifindex, (*skb).gso_segs, (*skb).gso_size)
    };
    let (device, state) = alive(ifindex)?;
    if is_own_tagged(ctx, &state.target) {
        return Err(looped(device.tunnel, segments));
    }
    spread(ctx);
    // No header, or no memory for one more tag.
    tag::stamp(ctx, gso_size as u16).map_err(|_| Drop { tunnel: device.tunnel, verdict: Verdict::PrivateMalformed })
}

/// Hands a frame to the engine's socket for the pair and the queue.
#[inline(always)]
pub fn redirect(ctx: &XdpContext) -> Result<u32, Drop> {
    let (device, _) = alive(ctx.ingress_ifindex() as u32)?;
    let refused = Drop { tunnel: device.tunnel, verdict: Verdict::NoEngine };
    let queue = ctx.rx_queue_index();
    if queue >= PRIVATE_QUEUES {
        return Err(refused);
    }
    let socket = private_socket_index(device.hub, queue);
    PRIVATE_SOCKETS.redirect(socket, u64::from(XDP_DROP)).map_err(|_| refused)
}

/// The live tunnel of one of its pair's ends, and its state.
#[inline(always)]
fn alive(ifindex: u32) -> Result<(EthernetDevice, &'static Tunnel), Drop> {
    // SAFETY: values are two u32 that live in a preallocated element; a torn or reused one names another tunnel's socket, which
    // the kernel refuses for a frame of this device.
    let device = unsafe { ETHERNET_DEVICES.get(ifindex) }.copied();
    let dead = Drop { tunnel: device.map_or(NO_TUNNEL, |device| device.tunnel), verdict: Verdict::TunnelDead };
    let device = device.ok_or(dead)?;
    let state = TUNNELS.get(device.tunnel).ok_or(dead)?;
    if state.flags & Tunnel::ALIVE == 0 {
        return Err(dead);
    }
    Ok((device, state))
}
