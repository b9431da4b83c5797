//! ICMP errors about datagrams that a tunnel sent, by any door: they name its carrier port, so its UDP socket receives
//! them.
//!
//! Anybody can send such errors. An error counts only if it quotes a datagram of ours: to the peer, and with the
//! [`identity`] of one that was sent last. This also holds for "fragmentation needed" and "packet too big"; if the quote
//! is too short for that, the peer is asked (see [`crate::engine::tunnel::path_probe`]).

use std::io::IoSliceMut;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg};

use super::{BATCH, Worker};
use crate::control::protocol::Event;
use crate::engine::carrier::socks;
use crate::engine::datapath::{IDENTITY, identity};
use crate::engine::tunnel::path_probe::Probing;
use crate::kernel::zone;
use crate::sealed::packet::HEADER;

/// How long a proven path MTU applies: as long as in the kernel.
const PROVEN_MTU_LIFE: Duration = Duration::from_secs(600);
/// How long a path MTU applies if the only evidence is that the peer did not answer probes of the old size.
const UNPROVEN_MTU_LIFE: Duration = Duration::from_secs(60);

/// An error of the network about one datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct NetworkError {
    errno: Errno,
    /// The path MTU in the error, in octets, if it has one.
    mtu: u32,
    /// Whether this host made the error, for example because a datagram was too large for the device.
    is_local: bool,
}

/// The part of our datagram that an error quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Quote {
    /// The quote has what identifies the datagram.
    Of([u8; IDENTITY]),
    /// The quote is too short for that.
    Short,
}

/// Returns what is quoted of a UDP payload; its first `header` octets are for a relay.
fn quote(payload: &[u8], header: usize) -> Quote {
    payload.get(header..).and_then(identity).map_or(Quote::Short, Quote::Of)
}

impl Worker {
    /// Reads a tunnel's error queue. Path MTUs are applied; the last of all other errors is reported to the daemon.
    pub(super) fn read_errors(&mut self, number: u16) {
        let mark = self.datapath.draw();
        let (Some(endpoint), Some(tunnel)) = (self.endpoints.get(&number), self.datapath.tunnels.get(&number)) else {
            return;
        };
        let Some(target) = tunnel.target() else { return };
        let header = if tunnel.socks { socks::HEADER } else { 0 };
        let (mut lookup, mut too_large, mut other) = (false, None, None);
        let mut room = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in6);
        for _ in 0..BATCH {
            let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
            let mut payload = [0; socks::HEADER + HEADER + IDENTITY];
            let mut parts = [IoSliceMut::new(&mut payload)];
            let received = recvmsg::<SockaddrStorage>(endpoint.udp.as_raw_fd(), &mut parts, Some(&mut room), flags);
            let Ok(message) = received else { break };
            let (length, to) = (message.bytes, message.address.as_ref().and_then(address));
            let error = message.cmsgs().into_iter().flatten().find_map(|control| match control {
                ControlMessageOwned::Ipv4RecvErr(error, _) | ControlMessageOwned::Ipv6RecvErr(error, _) => {
                    Some(NetworkError {
                        errno: Errno::from_raw(error.ee_errno as i32),
                        mtu: error.ee_info,
                        is_local: error.ee_origin == libc::SO_EE_ORIGIN_LOCAL,
                    })
                }
                _ => None,
            });
            let Some(error) = error else { continue };
            if error.is_local {
                lookup = true;
                continue;
            }
            if to.is_none_or(|to| to.ip() != target.ip() || to.port() != target.port()) {
                continue;
            }
            let is_proven = match quote(&payload[..length], header) {
                Quote::Of(sent) if self.error_budget.take(self.datapath.now) && self.crew.has_sent(sent) => true,
                Quote::Of(_) => continue,
                Quote::Short => false,
            };
            match error.errno {
                Errno::EMSGSIZE => too_large = Some((error.mtu, is_proven)),
                errno => other = Some(errno),
            }
        }
        let now = self.datapath.now;
        if lookup {
            self.next_hops.look_again(target.ip());
        }
        match too_large {
            Some((mtu, true)) => self.next_hops.set_path_mtu(target.ip(), mtu, PROVEN_MTU_LIFE),
            // A peer that is not known to be ours may not accept CT_PINGs of that size.
            Some((mtu, false)) if !tunnel.has_our_peer() => {
                self.next_hops.set_path_mtu(target.ip(), mtu, UNPROVEN_MTU_LIFE);
            }
            Some((mtu, false)) if tunnel.common.path_probe.doubt(mtu, mark, now) => self.probing.push(number),
            Some((_, false)) | None => {}
        }
        if let Some(errno) = other {
            let heard = tunnel.common.was_heard();
            let message = format!("{}: {}", zone::Shown(target), errno.desc());
            self.tell(number, Event::NetworkError { message, heard });
        }
        self.poll_probes(now);
    }

    /// Sends the path probes that are due, and applies path MTUs whose probes were not answered.
    pub(super) fn poll_probes(&mut self, now: Instant) {
        if self.probing.is_empty() {
            return;
        }
        self.datapath.now = now;
        let mut probing = std::mem::take(&mut self.probing);
        probing.retain(|number| {
            let Some(tunnel) = self.datapath.tunnels.get(number) else { return false };
            match (tunnel.common.path_probe.poll(now), tunnel.target()) {
                (Some(Probing::Send(mark)), _) => {
                    let mut outgoing = std::mem::take(&mut self.outgoing);
                    self.datapath.seal_path_probe(*number, &mark, &mut outgoing);
                    self.transmit(&mut outgoing);
                    self.outgoing = outgoing;
                    self.flush();
                    true
                }
                (Some(Probing::Believe(mtu)), Some(target)) => {
                    self.next_hops.set_path_mtu(target.ip(), mtu, UNPROVEN_MTU_LIFE);
                    false
                }
                (Some(Probing::Believe(_)), None) => false,
                (None, _) => tunnel.common.path_probe.is_open(),
            }
        });
        probing.append(&mut self.probing);
        self.probing = probing;
    }
}

/// The destination of the datagram.
fn address(storage: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = storage.as_sockaddr_in().map(|address| SocketAddr::V4((*address).into()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|address| SocketAddr::V6((*address).into())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_identifies_a_datagram_is_read_where_the_quote_holds_all_of_it() {
        assert_eq!(quote(&[1, 2, 3, 4, 5, 6, 7, 8, 9], 0), Quote::Of([1, 2, 3, 4, 5, 6, 7, 8]));
        assert_eq!(quote(&[1, 2, 3, 4, 5, 6, 7], 0), Quote::Short);
        assert_eq!(quote(&[], 0), Quote::Short);
        let mut relayed = [0; 18];
        relayed[10..].copy_from_slice(&[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(quote(&relayed, socks::HEADER), Quote::Of([1, 2, 3, 4, 5, 6, 7, 8]));
        assert_eq!(quote(&relayed[..17], socks::HEADER), Quote::Short);
        let sealed = [0x80, 0, 0, 0, 0x40, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(quote(&sealed, 0), Quote::Of([1, 2, 3, 4, 5, 6, 7, 8]));
        assert_eq!(quote(&sealed[..15], 0), Quote::Short);
        assert_eq!(quote(&sealed[..8], 0), Quote::Short, "what anybody can guess");
    }
}
