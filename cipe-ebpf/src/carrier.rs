//! Carrier side: finds the UDP datagrams of our tunnels and redirects those that the engine can use.

use aya_ebpf::{
    bindings::xdp_action::XDP_PASS,
    helpers::generated::{bpf_ktime_get_ns, bpf_xdp_get_buff_len},
    programs::XdpContext,
};
use aya_log_ebpf::debug;
use cipe_common::{
    Verdict,
    maps::{CARRIER_QUEUES, CarrierAddress, Slot, Tunnel, key_index},
};

use crate::{
    frame::{
        ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Front, Ipv4, Ipv6, is_tag,
        PROTOCOL_UDP, Udp, Vlan,
    },
    maps::{CARRIER_ADDRESSES, CARRIER_DEVICES, CARRIER_SOCKETS, KEYLESS, KEYS, LOCAL_ADDRESSES, TUNNELS},
    verdicts::Drop,
};

/// Rate limit of packets for which we have no receive key: one per tunnel in this many nanoseconds is redirected to the
/// engine, which then asks for a key. The others are dropped here.
const KEYLESS_INTERVAL_NS: u64 = 100_000_000;

/// A UDP datagram whose headers are where we expect them.
struct Datagram {
    local: CarrierAddress,
    /// The UDP header's length field: header and payload.
    length: usize,
    /// Octets from the UDP header to the end of the IP packet or of the frame, whichever comes first.
    room: usize,
    /// Offset of the UDP payload in the frame.
    payload: usize,
    /// Octets of the frame.
    frame: usize,
}

/// Returns the XDP action. A packet that is not clearly a datagram to one of our addresses passes unchanged. This
/// includes packets with IP options or extension headers, and fragments: the kernel delivers them, reassembled, to the
/// engine's UDP socket, which counts them.
#[inline(always)]
pub fn classify(ctx: &XdpContext) -> Result<u32, Drop> {
    let front = Front::of_xdp(ctx);
    let Some(datagram) = parse(ctx, front) else { return Ok(XDP_PASS) };
    let Some(tunnel) = tunnel_of(datagram.local) else { return Ok(XDP_PASS) };
    let Some(state) = TUNNELS.get(tunnel) else { return Ok(XDP_PASS) };
    if state.flags & Tunnel::ALIVE == 0 {
        return Ok(XDP_PASS);
    }
    let n = datagram.length.wrapping_sub(size_of::<Udp>());
    if datagram.length < size_of::<Udp>() || datagram.length > datagram.room {
        return Err(Drop { tunnel, verdict: Verdict::BadLength });
    }
    if state.flags & Tunnel::NOKEY == 0 {
        if (n < 16 || !n.is_multiple_of(8)) && !is_clear(front, datagram.payload, n) {
            return Err(Drop { tunnel, verdict: Verdict::BadLength });
        }
        // The program can only read the front. The engine checks a payload beyond it.
        if let Some(first) = front.at::<u8>(datagram.payload)
            && first & 0x80 != 0
            && !has_receive_key(tunnel)
        {
            may_ask_for_key(ctx, tunnel)?;
        }
    }
    // An index beyond the last queue would be that of another device's socket.
    if datagram.frame > largest_frame() || ctx.rx_queue_index() >= CARRIER_QUEUES {
        return Ok(XDP_PASS);
    }
    let device = ctx.ingress_ifindex() as u32;
    // SAFETY: values are plain u32 in a preallocated element. A reused element gives another device's base, and the kernel
    // refuses its sockets for a frame of this device.
    let Some(base) = (unsafe { CARRIER_DEVICES.get(device) }) else { return Ok(XDP_PASS) };
    Ok(CARRIER_SOCKETS.redirect(base + ctx.rx_queue_index(), u64::from(XDP_PASS)).unwrap_or_else(|action| action))
}

/// Returns whether the payload of `n` octets is a control message in clear text, which may have any length. Such a
/// message has 8 zero octets in place of the IV. Checking the first four is enough.
#[inline(always)]
fn is_clear(front: Front<'_>, payload: usize, n: usize) -> bool {
    n > 8 && front.at::<[u8; 4]>(payload).is_some_and(|first| *first == [0; 4])
}

#[inline(always)]
fn parse(ctx: &XdpContext, front: Front<'_>) -> Option<Datagram> {
    let mut ethertype = front.at::<Ethernet>(0)?.ethertype;
    if !is_tag(ethertype) {
        return parse_ip::<ETHERNET>(ctx, front, ethertype);
    }
    ethertype = front.at::<Vlan>(ETHERNET)?.ethertype;
    if !is_tag(ethertype) {
        return parse_ip::<{ ETHERNET + size_of::<Vlan>() }>(ctx, front, ethertype);
    }
    ethertype = front.at::<Vlan>(ETHERNET + size_of::<Vlan>())?.ethertype;
    parse_ip::<{ ETHERNET + 2 * size_of::<Vlan>() }>(ctx, front, ethertype)
}

#[inline(always)]
fn parse_ip<const OFFSET: usize>(ctx: &XdpContext, front: Front, ethertype: [u8; 2]) -> Option<Datagram> {
    match ethertype {
        ETHERTYPE_IPV4 => parse_ipv4::<OFFSET>(ctx, front),
        ETHERTYPE_IPV6 => parse_ipv6::<OFFSET>(ctx, front),
        _ => None,
    }
}

#[inline(always)]
fn parse_ipv4<const OFFSET: usize>(ctx: &XdpContext, front: Front<'_>) -> Option<Datagram> {
    let ip = front.at::<Ipv4>(OFFSET)?;
    if ip.version_ihl != 0x45 || ip.is_fragment() || ip.protocol != PROTOCOL_UDP {
        return None;
    }
    let udp = front.at::<Udp>(OFFSET + size_of::<Ipv4>())?;
    let d = ip.destination;
    let address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, d[0], d[1], d[2], d[3]];
    let carried = usize::from(u16::from_be_bytes(ip.total_length)).saturating_sub(size_of::<Ipv4>());
    Some(datagram(ctx, udp, (address, 0), carried, OFFSET + size_of::<Ipv4>()))
}

#[inline(always)]
fn parse_ipv6<const OFFSET: usize>(ctx: &XdpContext, front: Front<'_>) -> Option<Datagram> {
    let ip = front.at::<Ipv6>(OFFSET)?;
    if ip.version_class_flow[0] >> 4 != 6 || ip.next_header != PROTOCOL_UDP {
        return None;
    }
    // A tagged frame belongs to a VLAN device that this program does not know, so the kernel handles its link-local addresses.
    if OFFSET != ETHERNET
        && (CarrierAddress::is_link_local(&ip.source) || CarrierAddress::is_link_local(&ip.destination))
    {
        return None;
    }
    let zone = if CarrierAddress::is_link_local(&ip.destination) { ctx.ingress_ifindex() as u32 } else { 0 };
    let udp = front.at::<Udp>(OFFSET + size_of::<Ipv6>())?;
    let carried = usize::from(u16::from_be_bytes(ip.payload_length));
    Some(datagram(ctx, udp, (ip.destination, zone), carried, OFFSET + size_of::<Ipv6>()))
}

#[inline(always)]
fn datagram(
    ctx: &XdpContext,
    udp: &Udp,
    (address, zone): ([u8; 16], u32),
    carried: usize,
    offset: usize,
) -> Datagram {
    // SAFETY: the context is the one the kernel called us with. The helper counts all fragments of the frame.
    let frame = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as usize;
    Datagram {
        local: CarrierAddress { address, port: udp.destination, reserved: [0; 2], zone },
        length: usize::from(u16::from_be_bytes(udp.length)),
        room: carried.min(frame.saturating_sub(offset)),
        payload: offset + size_of::<Udp>(),
        frame,
    }
}

/// Octets of the largest frame that a socket takes. The kernel delivers larger ones to the engine's UDP socket.
#[unsafe(no_mangle)]
static LARGEST_FRAME: u32 = u32::MAX;

#[inline(always)]
fn largest_frame() -> usize {
    // SAFETY: the loader sets the value before it loads the program; nothing writes it later.
    unsafe { core::ptr::read_volatile(&raw const LARGEST_FRAME) as usize }
}

/// Returns the tunnel that listens on this address, or on this port at any address of this host. A datagram to another host is in
/// transit and belongs to no tunnel.
#[inline(always)]
fn tunnel_of(local: CarrierAddress) -> Option<u32> {
    // SAFETY: values are plain u32. A reused element gives another tunnel's number, and the engine drops a datagram that does
    // not decrypt with that tunnel's keys.
    unsafe {
        if let Some(tunnel) = CARRIER_ADDRESSES.get(local) {
            return Some(*tunnel);
        }
        let tunnel = CARRIER_ADDRESSES.get(CarrierAddress { address: [0; 16], zone: 0, ..local })?;
        LOCAL_ADDRESSES.get(local.address)?;
        Some(*tunnel)
    }
}

#[inline(always)]
fn has_receive_key(tunnel: u32) -> bool {
    is_live(tunnel, Slot::Receive) || is_live(tunnel, Slot::Previous)
}

/// Returns whether a slot holds a live key. During a write the answer may be wrong; the engine decides with its own
/// copy of the keys.
#[inline(always)]
fn is_live(tunnel: u32, slot: Slot) -> bool {
    KEYS.get(key_index(tunnel, slot)).is_some_and(|slot| slot.live != 0)
}

/// Accepts one packet per [`KEYLESS_INTERVAL_NS`]. Two CPUs may accept one each at the same time.
///
/// # Errors
/// The rate limit is reached.
#[inline(always)]
fn may_ask_for_key(ctx: &XdpContext, tunnel: u32) -> Result<(), Drop> {
    let refused = Drop { tunnel, verdict: Verdict::NoReceiveKey };
    let last = KEYLESS.get_ptr_mut(tunnel).ok_or(refused)?;
    // SAFETY: the helper takes no arguments; the pointer comes from a successful array look-up, is aligned, and stays
    // valid as long as the map, which the program holds.
    unsafe {
        let now = bpf_ktime_get_ns();
        if now.wrapping_sub(*last) < KEYLESS_INTERVAL_NS && *last != 0 {
            return Err(refused);
        }
        *last = now;
    }
    debug!(ctx, "tunnel {}: dynamic key flag without a receive key, handed on so that a key is asked for", tunnel);
    Ok(())
}
