//! Sends sealed datagrams to the carrier, in groups that a door can send in one call.

use std::net::SocketAddr;

use arrayvec::ArrayVec;
use cipe_common::Verdict;

use super::{CarrierEndpoint, Worker};
use crate::engine::carrier::{
    Door, GroupRoute, MAX_DATAGRAMS, MAX_GROUP, Path, Room, Sealed, Share, XdpCarrier, outer, socks,
};
use crate::engine::datapath::Outgoing;
use crate::engine::tunnel::{Egress, Tunnel};
use crate::wire::packet::Type;

impl Worker {
    /// Sends all sealed datagrams, and counts them.
    pub(super) fn transmit(&mut self, outgoing: &mut Vec<Outgoing>) {
        let mut mostly_alone = None;
        let many = outgoing.len() >= MIN_LIVE_BATCH;
        // Whether packets are queued for a card.
        let mut begun = false;
        let mut last = None;
        let mut ask = None;
        let mut rest = outgoing.drain(..);
        while let group @ [first, ..] = group(rest.as_slice()) {
            let (number, kind) = (first.tunnel, first.kind);
            let octets: ArrayVec<usize, MAX_DATAGRAMS> = group.iter().map(|out| out.octets).collect();
            let endpoint = self.endpoints.get_mut(&number);
            let (Some(CarrierEndpoint { udp, .. }), Some(tunnel)) = (endpoint, self.datapath.tunnels.get_mut(&number))
            else {
                rest.by_ref().take(octets.len()).for_each(|out| self.datapath.pool.put(out.frame));
                continue;
            };
            let (sent, verdict) = match route(tunnel, group) {
                Ok(mut route) => {
                    let alone =
                        || octets.len() == 1 && *mostly_alone.get_or_insert_with(|| is_mostly_alone(rest.as_slice()));
                    route.path = route.path.and_then(|path| choose_path(path, many, alone));
                    let sealed = |out: Outgoing| Sealed { frame: out.frame, datagram: out.datagram };
                    let group = rest.by_ref().take(octets.len()).map(sealed).collect();
                    let door: &mut dyn Door = match route.path.and_then(|path| card(&mut self.carriers, path.carrier)) {
                        Some(card) => {
                            begun = true;
                            card
                        }
                        None => {
                            // The packets that are queued for a card are older.
                            if std::mem::take(&mut begun) {
                                let carriers = self.carriers.iter_mut().flatten();
                                carriers.for_each(|carrier| _ = carrier.flush(&mut self.datapath.pool));
                            }
                            udp
                        }
                    };
                    let (umem, pool) = (&self.datapath.umem, &mut self.datapath.pool);
                    let mut room = Room { umem, pool, inbox: &mut self.inbox, stats: &mut self.stats };
                    (door.send(group, &route, &mut room), Verdict::CarrierFull)
                }
                Err(verdict) => {
                    rest.by_ref().take(octets.len()).for_each(|out| self.datapath.pool.put(out.frame));
                    (0, verdict)
                }
            };
            let (sent, refused) = octets.split_at(sent);
            sent.iter().for_each(|octets| count(tunnel, *octets, kind));
            let verdict = if kind == Type::Control { Verdict::ControlUnsent } else { verdict };
            tunnel.counters.count_all(verdict, refused.len() as u64);
            last = Some(number);
            if udp.met_smaller_path(self.datapath.now)
                && let Some(target) = tunnel.target()
            {
                self.next_hops.look_again(target.ip());
            }
            if ask.is_none() {
                let (asked, change) = udp.poll_segmentation(self.datapath.now);
                ask = asked.map(|ask| (number, ask));
                if let Some(change) = change {
                    self.datapath.note_change(number, change);
                }
            }
        }
        drop(rest);
        if let Some((number, ask)) = ask {
            self.ask_peer(number, ask);
            self.asking.push(number);
        }
        if let Some(last) = last {
            self.report_door_hint(last);
        }
    }
}

/// Returns a card, if this worker has queues of it.
fn card(carriers: &mut [Option<XdpCarrier>], slot: usize) -> Option<&mut XdpCarrier> {
    carriers.get_mut(slot)?.as_mut().filter(|card| card.has_queues())
}

/// Returns the path for a group in a batch of `many`, or that is sent `alone`; `None` if the UDP socket is better.
fn choose_path(path: Path, many: bool, alone: impl FnOnce() -> bool) -> Option<Path> {
    match path.share {
        Share::All => Some(path),
        Share::Many if many => Some(path),
        Share::Alone | Share::Many => alone().then_some(Path { share: Share::Alone, ..path }),
    }
}

/// Minimum datagrams of a batch for live frames: from here on, a run of the program costs less than socket buffers.
const MIN_LIVE_BATCH: usize = 16;

/// Whether there are many groups, and most have one datagram, because tunnels or sizes alternate.
fn is_mostly_alone(outgoing: &[Outgoing]) -> bool {
    let (mut rest, mut groups) = (outgoing, 0);
    while !rest.is_empty() {
        rest = &rest[group(rest).len()..];
        groups += 1;
    }
    groups >= MIN_SINGLE_GROUPS && 2 * groups > outgoing.len()
}

/// Minimum groups for which AF_XDP needs fewer system calls than the UDP socket.
const MIN_SINGLE_GROUPS: usize = 4;

/// Returns the route of a group.
///
/// # Errors
/// The verdict for all dropped datagrams of the group.
fn route(tunnel: &mut Tunnel, group: &[Outgoing]) -> Result<GroupRoute, Verdict> {
    let first = group.first().ok_or(Verdict::NoFrame)?;
    let largest = group.iter().map(|out| out.datagram.len()).max().unwrap_or(0);
    // The key was removed between admission and sealing: fail closed.
    if !first.ready {
        return Err(Verdict::NoSendKey);
    }
    let ip_id = tunnel.ip_ids.take(group.len());
    if let Some(candidate) = first.to.as_deref() {
        let (to, relayed) = through_relay(tunnel, *candidate)?;
        return Ok(GroupRoute { to, relayed, marks: first.marks, checksum: tunnel.checksum, ip_id, path: None });
    }
    let asker = || tunnel.common.asker().filter(|_| first.kind == Type::Control);
    let peer = tunnel.peer.or_else(asker).ok_or(Verdict::NoPeer)?;
    let path = match tunnel.egress {
        Egress::NoRoute => return Err(Verdict::NoRoute),
        Egress::Looped => return Err(Verdict::RouteLoop),
        Egress::Socket => None,
        // The kernel's IP fragments packets that are too large for the path, so they go to the socket.
        Egress::Carrier(path) => {
            let ip_len = outer::room(peer.ip()) - outer::ETHERNET + largest;
            Some(path).filter(|path| ip_len <= path.mtu)
        }
    };
    let (to, relayed) = through_relay(tunnel, peer)?;
    Ok(GroupRoute { to, relayed, marks: first.marks, checksum: tunnel.checksum, ip_id, path })
}

/// Returns the address to send to for a datagram to `peer`, and the header for the relay there, if one is used.
///
/// # Errors
/// [`Verdict::NoRoute`]: without a relay, or with one that cannot reach this peer. The server is never bypassed.
fn through_relay(tunnel: &Tunnel, peer: SocketAddr) -> Result<(SocketAddr, Option<[u8; socks::HEADER]>), Verdict> {
    if !tunnel.socks {
        return Ok((peer, None));
    }
    let (relay, header) = tunnel.relay.zip(socks::header(peer)).ok_or(Verdict::NoRoute)?;
    Ok((relay, Some(header)))
}

fn count(tunnel: &Tunnel, octets: usize, kind: Type) {
    match kind {
        Type::Data => tunnel.counters.sent(octets),
        Type::Control => tunnel.counters.count(Verdict::ControlSent),
    }
}

/// Returns the datagrams at the front of `outgoing` that can be sent in one call: of one tunnel, and a valid
/// [`crate::engine::carrier::Group`].
fn group(outgoing: &[Outgoing]) -> &[Outgoing] {
    let Some(first) = outgoing.first() else { return outgoing };
    if begins_run(outgoing) {
        return &outgoing[..run_length(outgoing)];
    }
    // Take datagrams of alternating sizes, up to where a run of equal sizes begins.
    let (mut len, mut total) = (1, first.datagram.len());
    while len < MAX_DATAGRAMS && !begins_run(&outgoing[len..]) {
        let Some(next) = outgoing.get(len).filter(|next| is_alike(first, next)) else { break };
        total += next.datagram.len();
        if total > MAX_GROUP {
            break;
        }
        len += 1;
    }
    &outgoing[..len]
}

/// Whether the first two can be in one group and have one size.
fn begins_run(outgoing: &[Outgoing]) -> bool {
    matches!(outgoing, [one, other, ..] if is_alike(one, other) && one.datagram.len() == other.datagram.len())
}

fn is_alike(one: &Outgoing, other: &Outgoing) -> bool {
    other.tunnel == one.tunnel
        && other.kind == one.kind
        && other.ready == one.ready
        && other.marks == one.marks
        && other.to == one.to
}

/// Number of datagrams at the front of `outgoing` that can be in one group and have one size; the last may be smaller.
fn run_length(outgoing: &[Outgoing]) -> usize {
    let Some((first, rest)) = outgoing.split_first() else { return 0 };
    let size = first.datagram.len();
    let mut total = size;
    let mut len = 1;
    for out in rest {
        let alike = is_alike(first, out) && out.datagram.len() <= size;
        total += out.datagram.len();
        if !alike || total > MAX_GROUP || len == MAX_DATAGRAMS {
            break;
        }
        len += 1;
        if out.datagram.len() < size {
            break;
        }
    }
    len
}

#[cfg(test)]
mod tests {
    use cipe_common::maps::Slot;
    use proptest::prelude::*;

    use super::*;
    use crate::engine::carrier::outer::{FRESH, Marks};
    use crate::engine::datapath::Form;
    use crate::xsk::{Umem, UmemConfig};

    proptest! {
        #[test]
        fn groups_are_all_of_what_leaves_in_order_and_as_a_door_wants_them(
            sizes in prop::collection::vec((0..2u16, prop_oneof![Just(1400usize), 1..1400usize, Just(100)]), 0..200)
        ) {
            let (_umem, mut pool) = Umem::new(UmemConfig { frames: 256, ..UmemConfig::default() }).unwrap();
            let marks = Marks { tos: 0, ttl: 64, dont_fragment: false };
            let out = |(tunnel, octets): &(u16, usize)| {
                Outgoing::new(*tunnel, pool.take().unwrap(), FRESH, *octets, Type::Data, Form::Keyed(Slot::Send), marks)
            };
            let all: Vec<Outgoing> = sizes.iter().map(out).collect();
            let mut rest = &all[..];
            while let group @ [first, ..] = group(rest) {
                prop_assert!(group.len() <= MAX_DATAGRAMS && group.iter().all(|out| out.tunnel == first.tunnel));
                prop_assert!(group.iter().map(|out| out.datagram.len()).sum::<usize>() <= MAX_GROUP);
                let lengths: Vec<usize> = group.iter().map(|out| out.datagram.len()).collect();
                let is_run = lengths[..lengths.len() - 1].iter().all(|length| *length == lengths[0])
                    && lengths.last() <= lengths.first();
                prop_assert!(is_run || lengths.windows(2).all(|pair| pair[0] != pair[1]), "{lengths:?}");
                rest = &rest[group.len()..];
            }
            prop_assert!(rest.is_empty());
            all.into_iter().for_each(|out| pool.put(out.frame));
        }
    }
}
