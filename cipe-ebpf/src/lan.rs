//! The short cut from a LAN card to the engine. It forwards plain packets as a router does, and passes all others to the kernel.
//!
//! The program takes a packet only if the kernel would forward it to a live tunnel without an error:
//! - Its headers are valid and have no options.
//! - It is not a fragment, and not one of the tunnel's own datagrams.
//! - It fits the tunnel's MTU, and its TTL allows one more hop.
//! - The route to its source address leads to the card that it came from.
//! - It does not open a connection.
//!
//! All other packets pass unchanged, so that the kernel handles errors, fragments and firewall rules for new connections.

use core::ptr::null_mut;

use aya_ebpf::{
    bindings::xdp_action::{XDP_DROP, XDP_PASS},
    helpers::generated::{bpf_csum_diff, bpf_ktime_get_ns, bpf_xdp_get_buff_len},
    maps::lpm_trie::{Key, LpmTrie},
    programs::XdpContext,
};
use cipe_common::{
    Stamp, Verdict,
    maps::{LAN_QUEUES, Lan, LanRoute, NO_TUNNEL, Tunnel},
};

use crate::{
    frame::{
        ETHERNET, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Ethernet, Front, Ipv4, Ipv6, PROTOCOL_ICMP, PROTOCOL_ICMPV6,
        PROTOCOL_TCP, PROTOCOL_UDP, Tcp, Udp, is_v4, is_v6,
    },
    maps::{LAN_DEVICES, LAN_ROUTES4, LAN_ROUTES6, LAN_SOCKETS, TUNNELS},
    verdicts::Drop,
};

/// Time for which all TCP of a card passes to the kernel after one packet that had to, in nanoseconds. The packets of a
/// stream then take one path and keep their order.
const UNFINISHED_HOLD_NS: u64 = 1_000_000_000;

/// Octets of the shortest IP packet that fills an Ethernet frame. Padding follows a shorter one.
const MIN_ETHERNET_PAYLOAD: usize = 46;

/// The most octets of a transport packet whose checksum the program verifies.
const MAX_SUMMED_OCTETS: usize = 2048;
/// Octets that it sums up at a time.
const SUM_BLOCK: usize = 64;

const SYN: u8 = 0x02;

/// The card that a packet was received on.
struct Card {
    ifindex: u32,
    lan: *mut Lan,
}

impl Card {
    #[inline(always)]
    fn lan(&self) -> &Lan {
        // SAFETY: the pointer comes from a successful look-up and stays valid while the program runs; all fields are plain
        // integers and octets. If user space replaces the value meanwhile, at worst one packet is judged by the old address or
        // socket.
        unsafe { &*self.lan }
    }
}

/// A word of 16 bits in memory order. The byte order does not matter for a one's complement sum.
type Word = [u8; 2];

/// Returns the XDP action.
#[inline(always)]
pub fn shorten(ctx: &XdpContext) -> Result<u32, Drop> {
    let front = Front::of_xdp(ctx);
    let ifindex = ctx.ingress_ifindex() as u32;
    let Some(lan) = LAN_DEVICES.get_ptr_mut(ifindex) else { return Ok(XDP_PASS) };
    let card = Card { ifindex, lan };
    let Some(ethernet) = front.at::<Ethernet>(0) else { return Ok(XDP_PASS) };
    if ethernet.destination != card.lan().mac {
        return Ok(XDP_PASS);
    }
    // SAFETY: the context is the one the kernel called us with. The helper counts all fragments of the frame.
    let frame = unsafe { bpf_xdp_get_buff_len(ctx.ctx) } as usize;
    let socket = card.lan().sockets + ctx.rx_queue_index();
    let tunnel = match ethernet.ethertype {
        ETHERTYPE_IPV4 => judge_ipv4(front, frame, &card),
        ETHERTYPE_IPV6 => judge_ipv6(front, frame, &card),
        _ => None,
    };
    let Some(tunnel) = tunnel else { return Ok(XDP_PASS) };
    // The packet is changed from here on, so it must have a socket that takes it.
    if ctx.rx_queue_index() >= LAN_QUEUES || LAN_SOCKETS.get(socket).is_none() {
        return Ok(XDP_PASS);
    }
    let stamp = Stamp { tunnel: tunnel as u16, ..Stamp::default() }.to_mac();
    let hopped = match front.at::<Ipv4>(ETHERNET) {
        Some(ip) if ip.version_ihl == 0x45 => hop_ipv4(front, ip.ttl, ip.checksum),
        _ => hop_ipv6(front),
    };
    if !hopped || !front.put(0, stamp) {
        return Ok(XDP_PASS);
    }
    let refused = Drop { tunnel, verdict: Verdict::NoEngine };
    LAN_SOCKETS.redirect(socket, u64::from(XDP_DROP)).map_err(|_| refused)
}

/// Decrements the TTL and updates the checksum as in RFC 1141. Returns `false` if the front is too short.
#[inline(always)]
fn hop_ipv4(front: Front<'_>, ttl: u8, checksum: Word) -> bool {
    const TTL: usize = ETHERNET + 8;
    const CHECKSUM: usize = ETHERNET + 10;
    let sum = u32::from(u16::from_be_bytes(checksum)) + 0x0100;
    let sum = (sum + (sum >> 16)) as u16;
    front.put(TTL, ttl.wrapping_sub(1)) && front.put(CHECKSUM, sum.to_be_bytes())
}

#[inline(always)]
fn hop_ipv6(front: Front<'_>) -> bool {
    const HOP_LIMIT: usize = ETHERNET + 7;
    let Some(limit) = front.at::<u8>(HOP_LIMIT).copied() else { return false };
    front.put(HOP_LIMIT, limit.wrapping_sub(1))
}

/// Returns the tunnel that an IPv4 packet may take the short cut to; `None` if the kernel has to forward it.
#[inline(always)]
fn judge_ipv4(front: Front<'_>, frame: usize, card: &Card) -> Option<u32> {
    let words = front.at::<[Word; size_of::<Ipv4>() / 2]>(ETHERNET)?;
    let ip = front.at::<Ipv4>(ETHERNET)?;
    let total = usize::from(u16::from_be_bytes(ip.total_length));
    let sound = ip.version_ihl == 0x45 && !ip.is_fragment() && ip.ttl > 1 && fold(sum(words)) == 0xFFFF;
    if !sound || total < size_of::<Ipv4>() || !holds(frame, total) {
        return None;
    }
    let [_, _, _, _, _, _, a, b, c, d] = *words;
    let pseudo = sum(&[a, b, c, d]);
    let transport = total - size_of::<Ipv4>();
    may_pass::<{ ETHERNET + size_of::<Ipv4>() }>(front, card, ip.protocol, pseudo, (frame, transport))?;
    let tunnel = into(&LAN_ROUTES4, (ip.source, ip.destination), total, card)?;
    let target = &TUNNELS.get(tunnel)?.target;
    let round = ip.protocol == PROTOCOL_UDP
        && is_v4(target, ip.destination)
        && front.at::<Udp>(ETHERNET + size_of::<Ipv4>())?.destination == target.port;
    (!round).then_some(tunnel)
}

/// Returns the tunnel that an IPv6 packet may take the short cut to; `None` if the kernel has to forward it.
#[inline(always)]
fn judge_ipv6(front: Front<'_>, frame: usize, card: &Card) -> Option<u32> {
    let ip = front.at::<Ipv6>(ETHERNET)?;
    let transport = usize::from(u16::from_be_bytes(ip.payload_length));
    let total = size_of::<Ipv6>() + transport;
    if ip.version_class_flow[0] >> 4 != 6 || ip.hop_limit <= 1 || transport == 0 || !holds(frame, total) {
        return None;
    }
    const ADDRESSES: usize = ETHERNET + 8;
    let pseudo = sum(front.at::<[Word; 16]>(ADDRESSES)?);
    may_pass::<{ ETHERNET + size_of::<Ipv6>() }>(front, card, ip.next_header, pseudo, (frame, transport))?;
    let tunnel = into(&LAN_ROUTES6, (ip.source, ip.destination), total, card)?;
    let target = &TUNNELS.get(tunnel)?.target;
    let round = ip.next_header == PROTOCOL_UDP
        && is_v6(target, ip.destination)
        && front.at::<Udp>(ETHERNET + size_of::<Ipv6>())?.destination == target.port;
    (!round).then_some(tunnel)
}

/// Returns whether a frame holds one packet of this length and nothing else but Ethernet's padding.
#[inline(always)]
fn holds(frame: usize, total: usize) -> bool {
    frame >= ETHERNET + total && frame <= ETHERNET + if total < MIN_ETHERNET_PAYLOAD { MIN_ETHERNET_PAYLOAD } else { total }
}

/// Returns `Some` if a transport packet may take the short cut: it opens no connection, is no superframe, and has a
/// finished checksum. `frame` and `length` are the octets of the frame and of the transport packet; `addresses` is the
/// sum over both IP addresses.
#[inline(always)]
fn may_pass<const OFFSET: usize>(
    front: Front<'_>,
    card: &Card,
    protocol: u8,
    addresses: u32,
    (frame, length): (usize, usize),
) -> Option<()> {
    let generic = card.lan().flags & Lan::GENERIC != 0;
    let checksum = match protocol {
        PROTOCOL_TCP => {
            let tcp = front.at::<Tcp>(OFFSET)?;
            if tcp.flags & SYN != 0 {
                return None;
            }
            tcp.checksum
        }
        PROTOCOL_UDP => {
            let checksum = front.at::<Udp>(OFFSET)?.checksum;
            // In generic mode, encapsulated packets without an outer checksum may be a superframe.
            if generic && checksum == [0; 2] {
                return None;
            }
            checksum
        }
        PROTOCOL_ICMP | PROTOCOL_ICMPV6 => return Some(()),
        _ => return None,
    };
    if !generic {
        // The driver delivers the packet as it was on the wire. On a veth device the sender is a local stack, which may leave the
        // checksum to the device; the engine completes it.
        return Some(());
    }
    let length = u16::from_ne_bytes((length as u16).to_be_bytes());
    let pseudo = addresses + u32::from(length) + u32::from(u16::from_ne_bytes([0, protocol]));
    // An unfinished checksum field holds the sum of the pseudo header. One finished checksum in 65,536 has the same
    // value by chance, which under load is one a second or more, so such a checksum is verified.
    if fold(pseudo) == u16::from_ne_bytes(checksum) && !is_right::<OFFSET>(front, frame, pseudo) {
        // SAFETY: the pointer is valid as in `Card::lan`; the helper takes no arguments. Two CPUs that write at once
        // write nearly the same time.
        unsafe { (*card.lan).unfinished = bpf_ktime_get_ns() };
        return None;
    }
    let unfinished = card.lan().unfinished;
    if protocol == PROTOCOL_TCP && unfinished != 0 {
        // SAFETY: the helper takes no arguments.
        let now = unsafe { bpf_ktime_get_ns() };
        if now.wrapping_sub(unfinished) < UNFINISHED_HOLD_NS {
            return None;
        }
    }
    Some(())
}

/// Returns whether the checksum of a transport packet is correct. It sums the octets from `OFFSET` to the end of the
/// frame and the pseudo header. Returns `false` for a frame that the program cannot read to its end, for one longer
/// than [`MAX_SUMMED_OCTETS`], and if the padding is not zero.
#[inline(always)]
fn is_right<const OFFSET: usize>(front: Front<'_>, frame: usize, pseudo: u32) -> bool {
    if frame > OFFSET + MAX_SUMMED_OCTETS || front.len() != frame {
        return false;
    }
    let mut sum = pseudo;
    let mut at = OFFSET;
    while at < OFFSET + MAX_SUMMED_OCTETS {
        let Some(block) = front.at::<[u8; SUM_BLOCK]>(at) else { break };
        // SAFETY: the helper reads the octets of the block, a multiple of its word size, and keeps no pointer.
        let added = unsafe { bpf_csum_diff(null_mut(), 0, block.as_ptr().cast_mut().cast(), SUM_BLOCK as u32, sum) };
        sum = added as u32;
        at += SUM_BLOCK;
    }
    let mut rest = u32::from(fold(sum));
    for _ in 0..SUM_BLOCK / 2 {
        let Some(word) = front.at::<Word>(at) else { break };
        rest += u32::from(u16::from_ne_bytes(*word));
        at += 2;
    }
    if let Some(last) = front.at::<u8>(at) {
        rest += u32::from(u16::from_ne_bytes([*last, 0]));
    }
    fold(rest) == 0xFFFF
}

/// Returns the live tunnel that the destination is routed to, if it takes packets of `total` octets from this card, and
/// if the route to the source leads back to this card.
#[inline(always)]
fn into<const N: usize>(
    routes: &LpmTrie<[u8; N], LanRoute>,
    (source, destination): ([u8; N], [u8; N]),
    total: usize,
    card: &Card,
) -> Option<u32> {
    let bits = 8 * N as u32;
    let route = routes.get(Key::new(bits, destination))?;
    if route.lan != card.ifindex || route.tunnel == NO_TUNNEL {
        return None;
    }
    let tunnel = route.tunnel;
    let state = TUNNELS.get(tunnel)?;
    if state.flags & Tunnel::ALIVE == 0 || total > state.mtu as usize {
        return None;
    }
    let back = routes.get(Key::new(bits, source))?;
    (back.lan == card.ifindex && back.tunnel == NO_TUNNEL).then_some(tunnel)
}

#[inline(always)]
fn sum<const N: usize>(words: &[Word; N]) -> u32 {
    let mut sum = 0;
    for word in words {
        sum += u32::from(u16::from_ne_bytes(*word));
    }
    sum
}

#[inline(always)]
fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xFFFF) + (sum >> 16);
    ((sum & 0xFFFF) + (sum >> 16)) as u16
}
