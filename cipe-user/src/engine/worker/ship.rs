//! Sealed datagrams to the carrier: by AF_XDP, each in its frame, or by the tunnel's UDP socket, many a call.

use std::io::IoSlice;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use arrayvec::ArrayVec;
use cipe_common::Verdict;
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, set_ip_mtu_discover};

use super::outbound::Outgoing;
use super::{BATCH, Worker};
use crate::engine::outer::{self, Marks};
use crate::engine::socks;
use crate::engine::tunnel::{Path, Tunnel, Way};
use crate::wire::packet::Type;
use crate::xsk::{Packet, Umem};

/// Most octets of one UDP_SEGMENT send: what the IPv4 length field can say, less IP and UDP headers, and a SOCKS5 header for
/// each datagram.
const MAX_SEND: usize = 65_535 - 20 - 8 - BATCH * socks::HEADER;

/// The parts of a group's datagrams: of each its SOCKS5 header, if it needs one, and itself.
type Parts<'a> = ArrayVec<IoSlice<'a>, { 2 * BATCH }>;

/// Sealed datagrams that can leave in one call: of one tunnel, with equal headers, of one size but for the last.
type Group = ArrayVec<Outgoing, BATCH>;

impl Worker {
    /// Sends all that is sealed, and counts it.
    pub(super) fn ship(&mut self, outgoing: &mut Vec<Outgoing>) {
        let mut rest = outgoing.drain(..);
        while !rest.as_slice().is_empty() {
            let len = group_len(rest.as_slice());
            let group: Group = rest.by_ref().take(len).collect();
            let Some(endpoint) = self.endpoints.get_mut(&group[0].tunnel) else {
                group.into_iter().for_each(|out| self.pool.put(out.frame));
                continue;
            };
            let tunnel = &mut endpoint.tunnel;
            let to = tunnel.peer.or(tunnel.asker.filter(|_| group[0].kind == Type::Control));
            let path = match (to, tunnel.way) {
                // Its key went between admission and sealing: fail closed.
                _ if !group[0].ready => Err(Verdict::NoSendKey),
                (None, _) => Err(Verdict::NoPeer),
                (_, Way::NoRoute) => Err(Verdict::NoRoute),
                (_, Way::Looped) => Err(Verdict::RouteLoop),
                (Some(peer), Way::Socket) => Ok((peer, None)),
                (Some(peer), Way::Carrier(path)) => {
                    let ip_len = outer::room(peer.ip()) - outer::ETHERNET + group[0].datagram.len();
                    Ok((peer, Some(path).filter(|path| ip_len <= path.mtu)))
                }
            };
            let (sent, verdict) = match path {
                Ok((peer, Some(path))) => {
                    for out in group {
                        let port =
                            self.carriers.get_mut(path.carrier).and_then(Option::as_mut).and_then(|c| c.first_mut());
                        let Some(port) = port else {
                            tunnel.counters.count(Verdict::CarrierFull);
                            self.pool.put(out.frame);
                            continue;
                        };
                        let (octets, kind) = (out.octets, out.kind);
                        match port.transmit(frame(tunnel, &self.umem, &path, peer, out), &mut self.pool) {
                            Ok(()) => count(tunnel, octets, kind),
                            Err(packet) => {
                                tunnel.counters.count(Verdict::CarrierFull);
                                self.pool.put(packet.frame);
                            }
                        }
                    }
                    continue;
                }
                Ok((peer, None)) => (send_by_socket(tunnel, &self.umem, peer, &group), Verdict::CarrierFull),
                Err(verdict) => (0, verdict),
            };
            for (index, out) in group.into_iter().enumerate() {
                if index < sent {
                    count(tunnel, out.octets, out.kind)
                } else {
                    tunnel.counters.count(verdict)
                }
                self.pool.put(out.frame);
            }
        }
    }
}

fn count(tunnel: &Tunnel, octets: usize, kind: Type) {
    match kind {
        Type::Data => tunnel.counters.sent(octets),
        Type::Control => tunnel.counters.count(Verdict::ControlSent),
    }
}

/// How many from the front of `outgoing`, which is not empty, make a [`Group`].
fn group_len(outgoing: &[Outgoing]) -> usize {
    let (first, rest) = outgoing.split_first().expect("the caller has seen one");
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
        if !alike || total > MAX_SEND || len == BATCH {
            break;
        }
        len += 1;
        if out.datagram.len() < size {
            break;
        }
    }
    len
}

/// Puts carrier headers in front of a datagram.
fn frame(tunnel: &mut Tunnel, umem: &Umem, path: &Path, peer: SocketAddr, out: Outgoing) -> Packet {
    tunnel.ip_id = tunnel.ip_id.wrapping_add(1);
    let Outgoing { mut frame, datagram, marks, .. } = out;
    let end = datagram.end;
    let chunk = umem.chunk_mut(&mut frame);
    let addresses = (path.source, peer);
    let start = outer::write_frame(chunk, datagram, path.hop, addresses, marks, tunnel.ip_id, tunnel.checksum);
    Packet { frame, offset: start as u32, len: (end - start) as u32, more: false }
}

/// Sends a group by the tunnel's own socket: one datagram, or all in one call (UDP_SEGMENT, udp(7)). Returns how many
/// the kernel took.
fn send_by_socket(tunnel: &mut Tunnel, umem: &Umem, peer: SocketAddr, group: &Group) -> usize {
    let (to, header) = match tunnel.relay.filter(|_| tunnel.socks).zip(socks::header(peer)) {
        Some((relay, header)) => (relay, Some(header)),
        // No relay, or one that cannot lead to this peer: never past the server.
        None if tunnel.socks => return 0,
        None => (peer, None),
    };
    let mut parts = Parts::new();
    for out in group {
        parts.extend(header.as_ref().map(|header| IoSlice::new(header)));
        parts.push(IoSlice::new(&umem.chunk(&out.frame)[out.datagram.clone()]));
    }
    let of_one = parts.len() / group.len();
    let marks = group[0].marks;
    set_dont_fragment(tunnel, to, marks.dont_fragment);
    match send(tunnel, to, marks, &parts, of_one) {
        Ok(()) => group.len(),
        // Larger than the path takes, as the kernel knows it; the tunnel may not yet, or is to ignore it (`forcemtu`).
        // The kernel's IP then fragments each, but none with DF, and no segments.
        Err(Errno::EMSGSIZE | Errno::EINVAL) => {
            set_dont_fragment(tunnel, to, false);
            let alone = |datagram: &&[IoSlice<'_>]| send(tunnel, to, marks, datagram, of_one).is_ok();
            parts.chunks(of_one).take_while(alone).count()
        }
        Err(error) => {
            tracing::debug!("{to}: {error}");
            0
        }
    }
}

/// Lets what the UDP socket sends carry DF, or not. IPv6 has no such flag.
fn set_dont_fragment(tunnel: &mut Tunnel, peer: SocketAddr, on: bool) {
    if peer.is_ipv6() || tunnel.socket_df == Some(on) {
        return;
    }
    let discovery = if on { Ipv4PathMtuDiscovery::DO } else { Ipv4PathMtuDiscovery::DONT };
    match set_ip_mtu_discover(&tunnel.udp, discovery) {
        Ok(()) => tunnel.socket_df = Some(on),
        Err(error) => tracing::debug!("{peer}: DF stays as it was: {error}"),
    }
}

/// Sends datagrams of `of_one` parts each, of one size but for the last.
fn send(tunnel: &Tunnel, to: SocketAddr, marks: Marks, parts: &[IoSlice<'_>], of_one: usize) -> Result<(), Errno> {
    let Marks { tos, ttl, .. } = marks;
    let size = parts.iter().take(of_one).map(|part| part.len()).sum::<usize>() as u16;
    let (class, ttl) = (i32::from(tos), i32::from(ttl));
    let mut control: ArrayVec<ControlMessage<'_>, 3> = ArrayVec::new();
    match to {
        SocketAddr::V4(_) => control.extend([ControlMessage::Ipv4Tos(&tos), ControlMessage::Ipv4Ttl(&ttl)]),
        SocketAddr::V6(_) => control.extend([ControlMessage::Ipv6TClass(&class), ControlMessage::Ipv6HopLimit(&ttl)]),
    }
    if parts.len() > of_one {
        control.push(ControlMessage::UdpGsoSegments(&size));
    }
    let to = SockaddrStorage::from(to);
    let send = || sendmsg(tunnel.udp.as_raw_fd(), parts, &control, MsgFlags::MSG_DONTWAIT, Some(&to));
    // The error of an earlier datagram, which the peer's host or a router refused, must not cost this one.
    let earlier = |error: &Errno| {
        matches!(error, Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH | Errno::EMSGSIZE)
    };
    let sent = send();
    let sent = if sent.as_ref().is_err_and(earlier) { send() } else { sent };
    sent.map(drop)
}
