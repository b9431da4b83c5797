//! Detects loops through several tunnels of this engine. A tunnel may carry datagrams of another tunnel. But if a tunnel's datagram
//! comes back to that tunnel inside of others, the routes, firewall rules or bridges form a loop.
//!
//! Eight octets identify a datagram ([`identity`](super::packets::identity)). For each datagram that holds one of another tunnel, this module records the
//! tunnels inside. For any other datagram the cost is to read its header and one bit.
//!
//! There are two limits:
//! - Under `nokey` the first octets are those of an IP header, which several packets share. So a datagram may be taken
//!   for another; it is dropped only if that other one is looped.
//! - Only the first fragment of a datagram is identified. The others may loop once more, until the datagram that they
//!   are sealed into is identified.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use super::packets::IDENTITY;
use crate::inner::headers::{Headers, Part, UDP};
use arrayvec::ArrayVec;

/// The most tunnels inside each other. More count as a loop.
const MAX_NESTED_TUNNELS: usize = 8;

/// The number of datagrams that are remembered, for all tunnels together. A busy engine seals that many in some milliseconds, and a
/// datagram needs less time from one tunnel of a host to the next.
const REMEMBERED: usize = 1 << 14;

/// Numbers of the tunnels whose datagrams are inside a datagram, the outermost last.
pub(super) type Inside = ArrayVec<u16, MAX_NESTED_TUNNELS>;

/// The tunnels inside the datagrams that were sealed last. All workers share it.
#[derive(Debug, Default)]
pub struct Rounds(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    inside: HashMap<[u8; IDENTITY], Inside>,
    order: VecDeque<[u8; IDENTITY]>,
}

impl Rounds {
    /// Returns the tunnels whose datagrams are inside the one with this identity; none if it is not remembered.
    pub fn inside(&self, identity: &[u8; IDENTITY]) -> Inside {
        self.known().inside.get(identity).cloned().unwrap_or_default()
    }

    /// Records the tunnels inside a datagram, in place of the oldest record.
    pub fn remember(&self, identity: [u8; IDENTITY], inside: Inside) {
        let mut known = self.known();
        if let Some(present) = known.inside.get_mut(&identity) {
            *present = inside;
            return;
        }
        if known.order.len() == REMEMBERED
            && let Some(oldest) = known.order.pop_front()
        {
            known.inside.remove(&oldest);
        }
        known.order.push_back(identity);
        known.inside.insert(identity, inside);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The flow of a tunnel's datagrams: destination address, destination port, source port.
type Flow = (IpAddr, u16, u16);

/// The tunnels of a worker by the flows of their datagrams.
pub(super) struct Targets {
    tunnels: HashMap<Flow, u16>,
    flows: HashMap<u16, Flow>,
    /// The source port of each tunnel.
    own: HashMap<u16, u16>,
    /// A bit for each port that a target has, or has had.
    ports: Box<[u64]>,
}

impl Default for Targets {
    fn default() -> Self {
        Self {
            tunnels: HashMap::new(),
            flows: HashMap::new(),
            own: HashMap::new(),
            ports: vec![0; (1 << 16) / u64::BITS as usize].into(),
        }
    }
}

impl Targets {
    /// Returns whether there are several tunnels, so that one may carry another.
    pub(super) fn has_several(&self) -> bool {
        self.flows.len() > 1
    }

    /// Sets the source port of a tunnel's datagrams. Call it before [`Targets::set`].
    pub(super) fn set_port(&mut self, number: u16, port: u16) {
        self.own.insert(number, port);
    }

    /// Sets the address that a tunnel's datagrams are sent to; `None` if there is none.
    pub(super) fn set(&mut self, number: u16, target: Option<SocketAddr>) {
        let from = self.own.get(&number).copied().unwrap_or(0);
        let flow = target.map(|target| (target.ip(), target.port(), from));
        if self.flows.get(&number).copied() == flow {
            return;
        }
        if let Some(before) = self.flows.remove(&number)
            && self.tunnels.get(&before) == Some(&number)
        {
            self.tunnels.remove(&before);
            // Another tunnel with the same flow now owns it.
            let other = self.flows.iter().find(|(_, flow)| **flow == before).map(|(other, _)| *other);
            self.tunnels.extend(other.map(|other| (before, other)));
        }
        if let Some(flow @ (_, port, _)) = flow {
            self.flows.insert(number, flow);
            self.tunnels.insert(flow, number);
            self.ports[usize::from(port / 64)] |= 1 << (port % 64);
        }
    }

    /// Returns the tunnel whose datagram, or first fragment of one, a packet is, and the UDP payload.
    pub(super) fn find<'a>(&self, packet: &'a [u8], headers: &Headers) -> Option<(u16, &'a [u8])> {
        if headers.protocol != UDP || headers.part == Part::Later {
            return None;
        }
        let (header, payload) = packet.get(headers.transport()..)?.split_first_chunk::<8>()?;
        let (from, to) = (u16::from_be_bytes([header[0], header[1]]), u16::from_be_bytes([header[2], header[3]]));
        if self.ports[usize::from(to / 64)] & 1 << (to % 64) == 0 {
            return None;
        }
        let (_, destination) = headers.addresses(packet)?;
        Some((*self.tunnels.get(&(destination, to, from))?, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inner::test_packets::Flow as Packets;

    const IPV6_FRAGMENT: u8 = 44;

    fn find<'a>(targets: &Targets, packet: &'a [u8]) -> Option<(u16, &'a [u8])> {
        targets.find(packet, &Headers::parse(packet).ok()?)
    }

    #[test]
    fn what_is_inside_is_known_until_as_many_others_came() {
        let (rounds, iv) = (Rounds::default(), |n: u64| n.to_be_bytes());
        rounds.remember(iv(0), Inside::from_iter([3, 5]));
        for n in 1..REMEMBERED as u64 {
            rounds.remember(iv(n), Inside::from_iter([7]));
        }
        assert_eq!(rounds.inside(&iv(0))[..], [3, 5]);
        rounds.remember(iv(REMEMBERED as u64), Inside::new());
        assert!(rounds.inside(&iv(0)).is_empty());
        // The same IV again replaces its own record only.
        (0..10).for_each(|_| rounds.remember(iv(REMEMBERED as u64), Inside::new()));
        assert_eq!(rounds.inside(&iv(1))[..], [7]);
    }

    #[test]
    fn a_tunnel_s_datagram_is_found_by_target_and_port_and_only_that() {
        let mut targets = Targets::default();
        for flow in [Packets::udp4(), Packets::udp6()] {
            let packet = flow.packet(b"sealed octets");
            let [from, to] = flow.ports;
            let target = SocketAddr::new(flow.destination, to);
            assert_eq!(find(&targets, &packet), None);
            targets.set_port(4, from);
            targets.set(4, Some(target));
            assert_eq!(find(&targets, &packet), Some((4, &b"sealed octets"[..])));
            let others = [
                (Some(SocketAddr::new(flow.source, to)), from),
                (Some(SocketAddr::new(flow.destination, to ^ 1)), from),
                (Some(target), from ^ 1),
                (None, from),
            ];
            for (target, from) in others {
                targets.set_port(4, from);
                targets.set(4, target);
                assert_eq!(find(&targets, &packet), None);
            }
            targets.set_port(4, from);
            targets.set(4, Some(target));
            // Two tunnels share a flow for a while: the later one owns it, and keeps it when the other is removed.
            targets.set_port(9, from);
            targets.set(9, Some(target));
            targets.set_port(4, from);
            targets.set(4, None);
            assert_eq!(find(&targets, &packet), Some((9, &b"sealed octets"[..])));
            // The earlier one owns it again when the later is removed.
            targets.set(4, Some(target));
            assert!(targets.has_several());
            targets.set(4, None);
            assert_eq!(find(&targets, &packet), Some((9, &b"sealed octets"[..])));
            targets.set_port(9, from);
            targets.set(9, None);
            for length in 0..packet.len() {
                assert_eq!(find(&targets, &packet[..length]), None);
            }
        }
        assert!(targets.tunnels.is_empty() && targets.flows.is_empty());
    }

    #[test]
    fn the_first_fragment_of_a_datagram_is_found() {
        let mut targets = Targets::default();
        let (v4, v6) = (Packets::udp4(), Packets::udp6());
        let mut first = v4.packet(b"sealed octets");
        first[6] |= 0x20;
        let target = |flow: &Packets| SocketAddr::new(flow.destination, flow.ports[1]);
        targets.set_port(1, v4.ports[0]);
        targets.set(1, Some(target(&v4)));
        assert_eq!(find(&targets, &first).map(|found| found.0), Some(1));
        first[7] |= 1;
        assert_eq!(find(&targets, &first), None, "a later fragment");

        let mut packet = v6.packet(b"sealed octets");
        targets.set_port(2, v6.ports[0]);
        targets.set(2, Some(target(&v6)));
        packet[6] = IPV6_FRAGMENT;
        packet.splice(40..40, [UDP, 0, 0, 1, 0, 0, 0, 7]);
        let length = (packet.len() - 40) as u16;
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        assert_eq!(find(&targets, &packet).map(|found| found.0), Some(2));
        packet[43] = 9;
        assert_eq!(find(&targets, &packet), None, "a later fragment");
    }
}
