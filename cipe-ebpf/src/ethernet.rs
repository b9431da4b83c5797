//! Private side of Ethernet tunnels (protocol 4). Each tunnel has its own veth pair, so the device identifies the
//! tunnel, and no octet of a frame is changed. Further data for the engine are in a VLAN tag in front of the frame
//! ([`crate::tag`]). Frames are dropped, never passed, if anything is wrong.

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

/// Checks and stamps a frame at the device's egress. The device has no VLAN offload, so the kernel writes the stamp's tag from the
/// metadata into the frame after this program.
///
/// # Errors
/// The tunnel is not alive, the frame is the tunnel's own datagram, or it could not be stamped.
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
    tag::stamp(ctx, gso_size as u16).map_err(|_| Drop { tunnel: device.tunnel, verdict: Verdict::PrivateMalformed })
}

/// Redirects a frame to the engine's socket for the pair and the queue.
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

/// Returns the device and the tunnel for the ifindex of one end of a pair, if the tunnel is alive.
#[inline(always)]
fn alive(ifindex: u32) -> Result<(EthernetDevice, &'static Tunnel), Drop> {
    // SAFETY: values are two u32 in a preallocated element. A torn or reused one gives another tunnel's socket, which the kernel
    // refuses for a frame of this device.
    let device = unsafe { ETHERNET_DEVICES.get(ifindex) }.copied();
    let dead = Drop { tunnel: device.map_or(NO_TUNNEL, |device| device.tunnel), verdict: Verdict::TunnelDead };
    let device = device.ok_or(dead)?;
    let state = TUNNELS.get(device.tunnel).ok_or(dead)?;
    if state.flags & Tunnel::ALIVE == 0 {
        return Err(dead);
    }
    Ok((device, state))
}
