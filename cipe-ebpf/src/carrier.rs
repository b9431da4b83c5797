//! Carrier side: finds the UDP datagrams of our tunnels and redirects those that the engine can use.

use aya_ebpf::{
    bindings::xdp_action::XDP_PASS,
    helpers::generated::bpf_xdp_get_buff_len,
    programs::{TcContext, XdpContext},
};
use aya_log_ebpf::debug;
use cipe_common::{
    Verdict,
    maps::{CARRIER_QUEUES, CarrierAddress, Slot, Tunnel, key_index},
};

use crate::{
    frame::{ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Front, Ipv4, Ipv6, PROTOCOL_UDP, Udp, Vlan, is_tag},
    maps::{CARRIER_ADDRESSES, CARRIER_DEVICES, CARRIER_SOCKETS, KEYS, LOCAL_ADDRESSES, TUNNELS},
    shield::{self, pass_some},
    verdicts::Drop,
};

/// A UDP datagram whose headers are where we expect them.
struct Datagram {
    local: CarrierAddress,
    from: CarrierAddress,
    /// The UDP header's length field: header and payload.
    length: usize,
    /// Octets from the UDP header to the end of the IP packet or of the frame, whichever comes first.
    room: usize,
    /// Offset of the UDP payload in the frame.
    payload: usize,
}

/// A frame as either program sees it.
struct Frame<'a> {
    front: Front<'a>,
    /// Octets of the whole frame.
    octets: usize,
    /// Ifindex of the device that it came by.
    device: u32,
}

/// Returns the XDP action. A packet that is not clearly a datagram to one of our addresses passes unchanged. This
/// includes packets with IP options or extension headers, and fragments: the kernel delivers them, reassembled, to the
/// engine's UDP socket, which counts them.
#[inline(always)]
pub fn classify(ctx: &XdpContext) -> Result<u32, Drop> {
    let front = Front::of_xdp(ctx);
    // SAFETY: the context is the one the kernel called us with. The helper counts all fragments of the frame.
    let octets = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as usize;
    let frame = Frame { front, octets, device: ctx.ingress_ifindex() as u32 };
    let Some(datagram) = parse(&frame) else { return Ok(XDP_PASS) };
    let Some(tunnel) = tunnel_of(datagram.local) else { return Ok(XDP_PASS) };
    let Some(state) = TUNNELS.get(tunnel) else { return Ok(XDP_PASS) };
    if state.flags & Tunnel::ALIVE == 0 {
        return Ok(XDP_PASS);
    }
    let n = datagram.length.wrapping_sub(size_of::<Udp>());
    if datagram.length < size_of::<Udp>() || datagram.length > datagram.room {
        return Err(Drop { tunnel, verdict: Verdict::BadLength });
    }
    if state.flags & Tunnel::PINNED != 0 && datagram.from != state.target {
        return Err(Drop { tunnel, verdict: Verdict::WrongPeer });
    }
    match kind(front, datagram.payload, n, state.flags) {
        Kind::Any => {}
        Kind::Sealed if n < Tunnel::LEAST_SEALED => return Err(Drop { tunnel, verdict: Verdict::BadLength }),
        Kind::Sealed => {}
        Kind::Unsealed => pass_some(tunnel, Verdict::Unsealed)?,
        Kind::Clear => shield::pass_few_in_clear(tunnel)?,
        Kind::Packet => {
            if !is_packet(n) {
                return Err(Drop { tunnel, verdict: Verdict::BadLength });
            }
            // The program can only read the front. The engine checks a payload beyond it.
            if let Some(first) = front.at::<u8>(datagram.payload)
                && first & 0x80 != 0
                && !has_receive_key(tunnel)
            {
                pass_some(tunnel, Verdict::NoReceiveKey)?;
                debug!(
                    ctx,
                    "tunnel {}: dynamic key flag without a receive key, handed on so that a key is asked for", tunnel
                );
            }
            shield::check(ctx, tunnel, state, datagram.payload, n)?;
        }
    }
    // An index beyond the last queue would be that of another device's socket.
    if frame.octets > largest_frame() || ctx.rx_queue_index() >= CARRIER_QUEUES {
        return Ok(XDP_PASS);
    }
    // SAFETY: values are plain u32 in a preallocated element. A reused element gives another device's base, and the kernel
    // refuses its sockets for a frame of this device.
    let Some(base) = (unsafe { CARRIER_DEVICES.get(frame.device) }) else { return Ok(XDP_PASS) };
    Ok(CARRIER_SOCKETS.redirect(base + ctx.rx_queue_index(), u64::from(XDP_PASS)).unwrap_or_else(|action| action))
}

/// Applies the shield to a packet that its tunnel's UDP socket receives. A superframe passes, and so does all that is not clearly a
/// datagram to one of our addresses.
///
/// # Errors
/// The drop, if no key can open the datagram, or if it is one message in clear too many.
#[inline(always)]
pub fn shield(ctx: &TcContext) -> Result<(), Drop> {
    // SAFETY: the context is the one the kernel called us with; the verifier checks each field access.
    let (octets, device, gso_size) = unsafe {
        let skb = ctx.skb.skb;
        ((*skb).len as usize, (*skb).ifindex, (*skb).gso_size)
    };
    let frame = Frame { front: Front::of_tc(ctx), octets, device };
    let Some(datagram) = parse(&frame).filter(|_| gso_size == 0) else { return Ok(()) };
    let Some(tunnel) = tunnel_of(datagram.local) else { return Ok(()) };
    let Some(state) = TUNNELS.get(tunnel) else { return Ok(()) };
    let n = datagram.length.wrapping_sub(size_of::<Udp>());
    let is_whole = datagram.length >= size_of::<Udp>() && datagram.length <= datagram.room;
    if !is_whole || state.flags & Tunnel::ALIVE == 0 {
        return Ok(());
    }
    match kind(frame.front, datagram.payload, n, state.flags) {
        Kind::Any | Kind::Sealed => Ok(()),
        Kind::Unsealed => pass_some(tunnel, Verdict::Unsealed),
        Kind::Clear => shield::pass_few_in_clear(tunnel),
        Kind::Packet if is_packet(n) => shield::check(ctx, tunnel, state, datagram.payload, n),
        Kind::Packet => Ok(()),
    }
}

/// What a datagram is to its tunnel, by its first octets.
enum Kind {
    /// The program cannot tell: without encryption there is nothing to check, and of a sealed tunnel's datagram it cannot read a
    /// payload beyond the front.
    Any,
    /// A sealed packet or a handshake message.
    Sealed,
    /// Another datagram, and the tunnel accepts sealed ones only.
    Unsealed,
    /// A control message in clear text.
    Clear,
    /// A packet of protocol 3 or 4.
    Packet,
}

#[inline(always)]
fn kind(front: Front<'_>, payload: usize, n: usize, flags: u32) -> Kind {
    if flags & Tunnel::NOKEY != 0 {
        return Kind::Any;
    }
    if flags & Tunnel::SEALED != 0 {
        match front.at::<[u8; 4]>(payload) {
            None if n >= Tunnel::SEALED_PREFIX.len() => return Kind::Any,
            None => {}
            Some(first) if *first == Tunnel::SEALED_PREFIX => return Kind::Sealed,
            Some(_) if flags & Tunnel::SEALED_ONLY != 0 => return Kind::Unsealed,
            Some(_) => {}
        }
    }
    if is_clear(front, payload, n) { Kind::Clear } else { Kind::Packet }
}

/// Returns whether the protocol has packets of `n` octets.
#[inline(always)]
fn is_packet(n: usize) -> bool {
    n >= 16 && n.is_multiple_of(8)
}

/// Returns whether the payload of `n` octets is a control message in clear text, which may have any length. Such a
/// message has 8 zero octets in place of the IV. Checking the first four is enough.
#[inline(always)]
fn is_clear(front: Front<'_>, payload: usize, n: usize) -> bool {
    n > 8 && front.at::<[u8; 4]>(payload).is_some_and(|first| *first == [0; 4])
}

#[inline(always)]
fn parse(frame: &Frame<'_>) -> Option<Datagram> {
    let front = frame.front;
    let mut ethertype = front.at::<Ethernet>(0)?.ethertype;
    if !is_tag(ethertype) {
        return parse_ip::<ETHERNET>(frame, ethertype);
    }
    ethertype = front.at::<Vlan>(ETHERNET)?.ethertype;
    if !is_tag(ethertype) {
        return parse_ip::<{ ETHERNET + size_of::<Vlan>() }>(frame, ethertype);
    }
    ethertype = front.at::<Vlan>(ETHERNET + size_of::<Vlan>())?.ethertype;
    parse_ip::<{ ETHERNET + 2 * size_of::<Vlan>() }>(frame, ethertype)
}

#[inline(always)]
fn parse_ip<const OFFSET: usize>(frame: &Frame<'_>, ethertype: [u8; 2]) -> Option<Datagram> {
    match ethertype {
        ETHERTYPE_IPV4 => parse_ipv4::<OFFSET>(frame),
        ETHERTYPE_IPV6 => parse_ipv6::<OFFSET>(frame),
        _ => None,
    }
}

#[inline(always)]
fn parse_ipv4<const OFFSET: usize>(frame: &Frame<'_>) -> Option<Datagram> {
    let ip = frame.front.at::<Ipv4>(OFFSET)?;
    if ip.version_ihl != 0x45 || ip.is_fragment() || ip.protocol != PROTOCOL_UDP {
        return None;
    }
    let udp = frame.front.at::<Udp>(OFFSET + size_of::<Ipv4>())?;
    let mapped = |[a, b, c, d]: [u8; 4]| ([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xFF, 0xFF, a, b, c, d], 0);
    let carried = usize::from(u16::from_be_bytes(ip.total_length)).saturating_sub(size_of::<Ipv4>());
    Some(datagram(frame, udp, [ip.source, ip.destination].map(mapped), carried, OFFSET + size_of::<Ipv4>()))
}

#[inline(always)]
fn parse_ipv6<const OFFSET: usize>(frame: &Frame<'_>) -> Option<Datagram> {
    let ip = frame.front.at::<Ipv6>(OFFSET)?;
    if ip.version_class_flow[0] >> 4 != 6 || ip.next_header != PROTOCOL_UDP {
        return None;
    }
    // A tagged frame belongs to a VLAN device that this program does not know, so the kernel handles its link-local addresses.
    if OFFSET != ETHERNET
        && (CarrierAddress::is_link_local(&ip.source) || CarrierAddress::is_link_local(&ip.destination))
    {
        return None;
    }
    let zoned = |address| (address, if CarrierAddress::is_link_local(&address) { frame.device } else { 0 });
    let udp = frame.front.at::<Udp>(OFFSET + size_of::<Ipv6>())?;
    let carried = usize::from(u16::from_be_bytes(ip.payload_length));
    Some(datagram(frame, udp, [ip.source, ip.destination].map(zoned), carried, OFFSET + size_of::<Ipv6>()))
}

#[inline(always)]
fn datagram(
    frame: &Frame<'_>,
    udp: &Udp,
    [source, destination]: [([u8; 16], u32); 2],
    carried: usize,
    offset: usize,
) -> Datagram {
    let at = |(address, zone), port| CarrierAddress { address, port, reserved: [0; 2], zone };
    Datagram {
        local: at(destination, udp.destination),
        from: at(source, udp.source),
        length: usize::from(u16::from_be_bytes(udp.length)),
        room: carried.min(frame.octets.saturating_sub(offset)),
        payload: offset + size_of::<Udp>(),
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
