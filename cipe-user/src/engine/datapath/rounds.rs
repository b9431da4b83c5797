//! Datagrams of tunnels that other tunnels of this engine carry. One tunnel inside another is fine; what comes back to a tunnel
//! inside of others has gone round, whatever routes, rules and bridges say.
//!
//! A datagram is known by its first eight octets, the IV. Of each one that holds a datagram of another tunnel it is remembered
//! which tunnels' are inside; one that holds none costs its header and a look at a bit. Under `nokey` the octets are those of an
//! IP header, which packets share: such a datagram may be taken for another, and dropped only if that one went round. Of a datagram that was cut only the first piece is
//! known: the others may go round once more, as what they are sealed into is whole again.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use crate::inner::headers::{Headers, Part, UDP};
use crate::wire::packet::IV;
use arrayvec::ArrayVec;

/// Tunnels inside each other; more are taken for a round.
const DEEPEST: usize = 8;

/// Datagrams that are remembered, of all tunnels: what a busy engine seals in some milliseconds, which is longer than one is on its
/// way from one tunnel of a host to the next.
const REMEMBERED: usize = 1 << 14;

/// Numbers of the tunnels whose datagrams are in one, outermost last.
pub(super) type Inside = ArrayVec<u16, DEEPEST>;

/// What is inside the datagrams that were sealed last. All workers share it.
#[derive(Debug, Default)]
pub struct Rounds(Mutex<Known>);

#[derive(Debug, Default)]
struct Known {
    inside: HashMap<[u8; IV], Inside>,
    order: VecDeque<[u8; IV]>,
}

impl Rounds {
    /// The tunnels whose datagrams are inside the one of this IV, as far as it is remembered.
    pub fn inside(&self, iv: &[u8; IV]) -> Inside {
        self.known().inside.get(iv).cloned().unwrap_or_default()
    }

    /// Remembers what is inside a datagram, in place of the oldest one.
    pub fn remember(&self, iv: [u8; IV], inside: Inside) {
        let mut known = self.known();
        if let Some(present) = known.inside.get_mut(&iv) {
            *present = inside;
            return;
        }
        if known.order.len() == REMEMBERED
            && let Some(oldest) = known.order.pop_front()
        {
            known.inside.remove(&oldest);
        }
        known.order.push_back(iv);
        known.inside.insert(iv, inside);
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What tells the datagrams of a tunnel from others': where they go, and the port that they leave.
type Flow = (IpAddr, u16, u16);

/// The tunnels of a worker by the flows of their datagrams.
pub(super) struct Targets {
    tunnels: HashMap<Flow, u16>,
    flows: HashMap<u16, Flow>,
    /// The port that each tunnel has of its own.
    own: HashMap<u16, u16>,
    /// A bit for each port that some target has, or has had.
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
    /// Whether there are several, so that one may carry another.
    pub(super) fn has_several(&self) -> bool {
        self.flows.len() > 1
    }

    /// Takes up the port that a tunnel's datagrams leave, for the targets that follow.
    pub(super) fn set_port(&mut self, number: u16, port: u16) {
        self.own.insert(number, port);
    }

    /// Takes up that a tunnel's datagrams go to `target`, or nowhere.
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
            // One that shares it has it alone now.
            let other = self.flows.iter().find(|(_, flow)| **flow == before).map(|(other, _)| *other);
            self.tunnels.extend(other.map(|other| (before, other)));
        }
        if let Some(flow @ (_, port, _)) = flow {
            self.flows.insert(number, flow);
            self.tunnels.insert(flow, number);
            self.ports[usize::from(port / 64)] |= 1 << (port % 64);
        }
    }

    /// The tunnel that a packet is a datagram of, or the first fragment of one, and the payload of UDP.
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
        // Again, it takes no place of another's.
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
            // Two share a flow for a while: the later one has it, and keeps it when the other goes.
            targets.set_port(9, from);
            targets.set(9, Some(target));
            targets.set_port(4, from);
            targets.set(4, None);
            assert_eq!(find(&targets, &packet), Some((9, &b"sealed octets"[..])));
            // And the earlier one, when the later goes.
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
    fn of_a_datagram_that_was_cut_the_first_piece_is_found() {
        let mut targets = Targets::default();
        let (v4, v6) = (Packets::udp4(), Packets::udp6());
        let mut first = v4.packet(b"sealed octets");
        first[6] |= 0x20;
        let target = |flow: &Packets| SocketAddr::new(flow.destination, flow.ports[1]);
        targets.set_port(1, v4.ports[0]);
        targets.set(1, Some(target(&v4)));
        assert_eq!(find(&targets, &first).map(|found| found.0), Some(1));
        first[7] |= 1;
        assert_eq!(find(&targets, &first), None, "a later piece");

        let mut packet = v6.packet(b"sealed octets");
        targets.set_port(2, v6.ports[0]);
        targets.set(2, Some(target(&v6)));
        packet[6] = IPV6_FRAGMENT;
        packet.splice(40..40, [UDP, 0, 0, 1, 0, 0, 0, 7]);
        let length = (packet.len() - 40) as u16;
        packet[4..6].copy_from_slice(&length.to_be_bytes());
        assert_eq!(find(&targets, &packet).map(|found| found.0), Some(2));
        packet[43] = 9;
        assert_eq!(find(&targets, &packet), None, "a later piece");
    }
}
