//! Sealed datagrams to the carrier, in groups that a door can send in one call.

use arrayvec::ArrayVec;
use cipe_common::Verdict;

use super::outbound::Outgoing;
use super::{BATCH, Worker};
use crate::engine::carrier::{Door, MAX_GROUP, Room, Route, Sealed, XdpCarrier};
use crate::engine::outer;
use crate::engine::socks;
use crate::engine::tunnel::{Tunnel, Way};
use crate::wire::packet::Type;

impl Worker {
    /// Sends all that is sealed, and counts it.
    pub(super) fn ship(&mut self, outgoing: &mut Vec<Outgoing>) {
        let mostly_alone = is_mostly_alone(outgoing);
        // The card that has some of this already.
        let mut begun = None;
        let mut last = None;
        let mut rest = outgoing.drain(..);
        while let Some(first) = rest.as_slice().first() {
            let (number, kind) = (first.tunnel, first.kind);
            let octets: ArrayVec<usize, BATCH> = group(rest.as_slice()).iter().map(|out| out.octets).collect();
            let Some(endpoint) = self.endpoints.get_mut(&number) else {
                rest.by_ref().take(octets.len()).for_each(|out| self.pool.put(out.frame));
                continue;
            };
            let tunnel = &mut endpoint.tunnel;
            let (sent, verdict) = match route(tunnel, first) {
                Ok(route) => {
                    let sealed = |out: Outgoing| Sealed { frame: out.frame, datagram: out.datagram };
                    let group = rest.by_ref().take(octets.len()).map(sealed).collect();
                    tunnel.ip_id = tunnel.ip_id.wrapping_add(octets.len() as u16);
                    let path = route.path.filter(|path| !path.only_alone || mostly_alone && octets.len() == 1);
                    let door: &mut dyn Door = match path.and_then(|path| card(&mut self.carriers, path.carrier)) {
                        Some(card) => {
                            begun = path.map(|path| path.carrier);
                            card
                        }
                        None => {
                            // What waits for the card came before.
                            if let Some(card) = begun.take().and_then(|slot| card(&mut self.carriers, slot)) {
                                card.ports().for_each(|port| _ = port.flush(&mut self.pool));
                            }
                            &mut tunnel.udp
                        }
                    };
                    let mut room =
                        Room { umem: &self.umem, pool: &mut self.pool, inbox: &mut self.inbox, sight: &mut self.sight };
                    (door.send(group, &route, &mut room), Verdict::CarrierFull)
                }
                Err(verdict) => {
                    rest.by_ref().take(octets.len()).for_each(|out| self.pool.put(out.frame));
                    (0, verdict)
                }
            };
            if tunnel.udp.met_smaller_path(self.now)
                && let Some(target) = tunnel.target()
            {
                self.next_hops.look_again(target.ip());
            }
            let (sent, refused) = octets.split_at(sent);
            sent.iter().for_each(|octets| count(tunnel, *octets, kind));
            tunnel.counters.count_all(verdict, refused.len() as u64);
            last = Some(number);
        }
        drop(rest);
        if let Some(last) = last {
            self.tell_of_single_frames(last);
        }
    }
}

/// A card that this worker has queues of.
fn card(carriers: &mut [Option<XdpCarrier>], slot: usize) -> Option<&mut XdpCarrier> {
    carriers.get_mut(slot)?.as_mut().filter(|card| card.has_queues())
}

/// Whether there are many, and most would leave alone: of tunnels in turn, of sizes in turn.
fn is_mostly_alone(outgoing: &[Outgoing]) -> bool {
    let (mut rest, mut groups) = (outgoing, 0);
    while !rest.is_empty() {
        rest = &rest[group(rest).len()..];
        groups += 1;
    }
    groups >= FEW && 2 * groups > outgoing.len()
}

/// Groups that cost more system calls than the one for a card.
const FEW: usize = 4;

/// Where a group goes that begins with `first`.
///
/// # Errors
/// The verdict that all of it is dropped under.
fn route(tunnel: &Tunnel, first: &Outgoing) -> Result<Route, Verdict> {
    // Its key went between admission and sealing: fail closed.
    if !first.ready {
        return Err(Verdict::NoSendKey);
    }
    let asker = || tunnel.common.asker().filter(|_| first.kind == Type::Control);
    let peer = tunnel.peer.or_else(asker).ok_or(Verdict::NoPeer)?;
    let path = match tunnel.way {
        Way::NoRoute => return Err(Verdict::NoRoute),
        Way::Looped => return Err(Verdict::RouteLoop),
        Way::Socket => None,
        // What is larger than the path takes, the kernel's IP cuts for the socket.
        Way::Carrier(path) => {
            let ip_len = outer::room(peer.ip()) - outer::ETHERNET + first.datagram.len();
            Some(path).filter(|path| ip_len <= path.mtu)
        }
    };
    let (to, relayed) = if tunnel.socks {
        // No relay, or one that cannot lead to this peer: never past the server.
        let (relay, header) = tunnel.relay.zip(socks::header(peer)).ok_or(Verdict::NoRoute)?;
        (relay, Some(header))
    } else {
        (peer, None)
    };
    Ok(Route { to, relayed, marks: first.marks, checksum: tunnel.checksum, ip_id: tunnel.ip_id, path })
}

fn count(tunnel: &Tunnel, octets: usize, kind: Type) {
    match kind {
        Type::Data => tunnel.counters.sent(octets),
        Type::Control => tunnel.counters.count(Verdict::ControlSent),
    }
}

/// What can leave in one call, from the front of `outgoing`: of one tunnel, and a [`crate::engine::carrier::Group`].
fn group(outgoing: &[Outgoing]) -> &[Outgoing] {
    let Some((first, rest)) = outgoing.split_first() else { return outgoing };
    let size = first.datagram.len();
    let mut total = size;
    let mut len = 1;
    for out in rest {
        let alike = out.tunnel == first.tunnel
            && out.kind == first.kind
            && out.ready == first.ready
            && out.marks == first.marks
            && out.datagram.len() <= size;
        total += out.datagram.len();
        if !alike || total > MAX_GROUP || len == BATCH {
            break;
        }
        len += 1;
        if out.datagram.len() < size {
            break;
        }
    }
    &outgoing[..len]
}
