//! The UDP socket that owns a tunnel's carrier port. It receives and sends many datagrams per call, as superframes if
//! the device supports them (`UDP_SEGMENT` and `UDP_GRO`, udp(7)).

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::{SocketAddr, UdpSocket};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use arrayvec::ArrayVec;
use cipe_common::Verdict;
use nix::errno::Errno;
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg, sendmsg, setsockopt, sockopt,
};
use rustix::net::sockopt::{
    Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
    set_socket_recv_buffer_size_force, set_socket_send_buffer_size_force,
};

use super::options::{FragmentSize, Ipv6FragmentSize};
use super::{Arrival, Ask, Door, Group, GroupRoute, MAX_DATAGRAMS, Room, Segmentation, SegmentationChange, Via};
use crate::engine::carrier::outer::{FRESH, Marks};
use crate::xsk::{Frame, Pool, Umem};

/// Size of the socket buffers in octets: 2 ms of full packets at 10 Gbit/s, with the kernel's overhead.
const BUFFER_OCTETS: usize = 4 << 20;

/// A bound UDP socket that receives superframes, as used by one worker.
pub(crate) struct UdpCarrier {
    shared: Arc<Shared>,
    /// Losses that are already reported.
    losses: u64,
    /// Whether the kernel refused a datagram as too large for the path, which is not reported yet.
    too_large: bool,
    /// When such a refusal was last reported.
    told: Option<Instant>,
    /// A change of segmentation that is not reported yet.
    change: Option<SegmentationChange>,
    /// Whether to send the next group as a group even if groups are given up: it is a question whether groups arrive.
    asks: bool,
    /// No attempt to send the last datagram has found a way to its destination.
    is_unreachable: AtomicBool,
}

/// The socket, shared by all workers.
struct Shared {
    socket: UdpSocket,
    inode: u64,
    /// Whether the kernel must not fragment sent datagrams; `None`: the kernel's default. Read-locked while sending,
    /// write-locked for a change.
    dont_fragment: RwLock<Option<bool>>,
    segmentation: Arc<Segmentation>,
}

/// Minimum time between two reports of a smaller path MTU: with `forcemtu`, it is met all the time.
const MIN_REPORT_INTERVAL: Duration = Duration::from_millis(100);

impl UdpCarrier {
    /// Configures `socket`: non-blocking, `UDP_GRO`, TOS and fragment sizes as control messages, large buffers.
    ///
    /// # Errors
    /// The kernel's error.
    pub(crate) fn new(socket: UdpSocket) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        setsockopt(&socket, sockopt::UdpGroSegment, &true)?;
        if socket.local_addr()?.is_ipv4() {
            setsockopt(&socket, FragmentSize, &true)?;
            setsockopt(&socket, sockopt::IpRecvTos, &true)?;
        } else {
            setsockopt(&socket, Ipv6FragmentSize, &true)?;
            setsockopt(&socket, sockopt::Ipv6RecvTClass, &true)?;
        }
        // Without CAP_NET_ADMIN in the initial namespace, the buffers keep their size, and bursts are lost (and
        // counted). Sent datagrams stay in the send buffer until a card has sent them, or the receiver on a veth has
        // read them: the kernel's default of 208 KiB holds 92 single datagrams, fewer than a batch.
        if let Err(error) = set_socket_recv_buffer_size_force(&socket, BUFFER_OCTETS) {
            tracing::debug!("receive buffer: {error}");
        }
        if let Err(error) = set_socket_send_buffer_size_force(&socket, BUFFER_OCTETS) {
            tracing::debug!("send buffer: {error}");
        }
        let inode = rustix::fs::fstat(&socket)?.st_ino;
        // The kernel numbers socket inodes consecutively, so no other open socket has this one.
        let segmentation = Arc::new(Segmentation::new(inode as u32, Instant::now()));
        let shared = Arc::new(Shared { socket, inode, dont_fragment: RwLock::new(None), segmentation });
        Ok(Self::of(shared))
    }

    /// Returns the same socket for another worker, for sending. Only one worker receives.
    pub(crate) fn for_another_worker(&self) -> Self {
        Self::of(self.shared.clone())
    }

    fn of(shared: Arc<Shared>) -> Self {
        let is_unreachable = AtomicBool::new(false);
        Self { shared, losses: 0, too_large: false, told: None, change: None, asks: false, is_unreachable }
    }

    /// Binds the socket to the device of this name.
    ///
    /// # Errors
    /// There is no such device.
    pub(crate) fn bind_to_device(&self, name: &str) -> io::Result<()> {
        Ok(setsockopt(&self.shared.socket, sockopt::BindToDevice, &name.into())?)
    }

    /// Whether datagrams are sent in groups.
    pub(crate) fn segmentation(&self) -> &Arc<Segmentation> {
        &self.shared.segmentation
    }

    /// Returns the next question to the peer about groups, and a change, if any. Call it while sending.
    pub(crate) fn poll_segmentation(&mut self, now: Instant) -> (Option<Ask>, Option<SegmentationChange>) {
        let (ask, change) = self.shared.segmentation.poll(now);
        (ask, change.or(self.change.take()))
    }

    /// Sets whether the next group is a question whether groups arrive, and so is sent as a group in any case.
    pub(crate) fn set_asks(&mut self, asks: bool) {
        self.asks = asks;
    }

    /// Returns the number of datagrams that the kernel dropped at this socket since the last call; `of_all` comes from
    /// [`super::losses::of_all_sockets`].
    pub(crate) fn new_losses(&mut self, of_all: &HashMap<u64, u64>) -> u64 {
        let losses = of_all.get(&self.shared.inode).copied().unwrap_or(self.losses);
        losses.saturating_sub(std::mem::replace(&mut self.losses, losses))
    }

    /// Whether the kernel has refused a datagram as too large: it knows a path MTU that no ICMP error has reported to
    /// this socket.
    pub(crate) fn met_smaller_path(&mut self, now: Instant) -> bool {
        let tells = self.too_large && self.told.is_none_or(|told| now.duration_since(told) >= MIN_REPORT_INTERVAL);
        if tells {
            (self.too_large, self.told) = (false, Some(now));
        }
        tells
    }

    /// Sends with or without DF. With DF, routers must not fragment the datagram, and this host refuses it if it is
    /// larger than the device's MTU. Path MTUs that the kernel has learned from ICMP are ignored, except over IPv6
    /// without DF, where no router fragments. Other workers may send with the other setting at the same time.
    fn send_with<T>(&self, dont_fragment: bool, to: SocketAddr, send: impl FnOnce() -> T) -> T {
        let state = &self.shared.dont_fragment;
        let present = state.read().unwrap_or_else(PoisonError::into_inner);
        if *present == Some(dont_fragment) {
            return send();
        }
        drop(present);
        let mut present = state.write().unwrap_or_else(PoisonError::into_inner);
        let socket = &self.shared.socket;
        let set = match (to, dont_fragment) {
            (SocketAddr::V4(_), true) => set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::PROBE),
            (SocketAddr::V4(_), false) => set_ip_mtu_discover(socket, Ipv4PathMtuDiscovery::OMIT),
            (SocketAddr::V6(_), true) => set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::PROBE),
            (SocketAddr::V6(_), false) => set_ipv6_mtu_discover(socket, Ipv6PathMtuDiscovery::DONT),
        };
        match set {
            Ok(()) => *present = Some(dont_fragment),
            Err(error) => tracing::debug!("{to}: DF stays as it was: {error}"),
        }
        send()
    }

    /// Sends one datagram; a full buffer drops it.
    pub(crate) fn send_one(&self, to: SocketAddr, marks: Marks, parts: &[IoSlice<'_>]) -> bool {
        self.send_with(marks.dont_fragment, to, || self.send_parts(to, marks, parts, parts.len())).is_ok()
    }

    /// Sends datagrams of `of_one` parts each in one call. All have one size; the last may be smaller.
    fn send_parts(&self, to: SocketAddr, marks: Marks, parts: &[IoSlice<'_>], of_one: usize) -> Result<(), Errno> {
        let Marks { tos, ttl, .. } = marks;
        let size = parts.iter().take(of_one).map(|part| part.len()).sum::<usize>() as u16;
        let (class, ttl) = (i32::from(tos), i32::from(ttl));
        let mut control: ArrayVec<ControlMessage<'_>, 3> = ArrayVec::new();
        match to {
            SocketAddr::V4(_) => control.extend([ControlMessage::Ipv4Tos(&tos), ControlMessage::Ipv4Ttl(&ttl)]),
            SocketAddr::V6(_) => {
                control.extend([ControlMessage::Ipv6TClass(&class), ControlMessage::Ipv6HopLimit(&ttl)]);
            }
        }
        if parts.len() > of_one {
            control.push(ControlMessage::UdpGsoSegments(&size));
        }
        let to = SockaddrStorage::from(to);
        let send = || sendmsg(self.shared.socket.as_raw_fd(), parts, &control, MsgFlags::MSG_DONTWAIT, Some(&to));
        let mut sent = send();
        for attempt in 0..self.attempts() {
            // The error of an earlier datagram, which the peer's host or a router has refused, must not affect this one. Each
            // ICMP error leaves one, and more may come meanwhile. One that is too large is refused each time.
            match sent {
                Err(Errno::ECONNREFUSED | Errno::EHOSTUNREACH | Errno::ENETUNREACH) => sent = send(),
                Err(Errno::EMSGSIZE) if attempt == 0 => sent = send(),
                _ => break,
            }
        }
        self.is_unreachable.store(matches!(sent, Err(Errno::EHOSTUNREACH | Errno::ENETUNREACH)), Ordering::Relaxed);
        sent.map(drop)
    }

    /// The most further attempts to send a datagram. If no attempt found a way for the last one, there is most likely no route, and
    /// further attempts are system calls for nothing.
    fn attempts(&self) -> usize {
        if self.is_unreachable.load(Ordering::Relaxed) { 1 } else { ATTEMPTS }
    }
}

impl Door for UdpCarrier {
    fn receive(&mut self, most: usize, room: &mut Room<'_>, arrivals: &mut Vec<Arrival>) -> io::Result<bool> {
        let mut more = room.inbox.receive(&self.shared.socket)?;
        let before = arrivals.len();
        for message in room.inbox.messages() {
            let via = if message.datagrams().nth(1).is_some() { Via::Superframe } else { Via::Alone };
            for octets in message.datagrams() {
                let datagram = in_frame(octets, room.umem, room.pool);
                let (was_joined, tos) = (message.is_joined, message.tos);
                arrivals.push(Arrival { to: None, from: message.from, tos, was_joined, via, datagram });
            }
        }
        more |= arrivals.len() - before >= most;
        Ok(more)
    }

    fn send(&mut self, group: Group, route: &GroupRoute, room: &mut Room<'_>) -> usize {
        let is_even = is_even(group.iter().map(|sealed| sealed.datagram.len()));
        let mut parts = Parts::new();
        for sealed in &group {
            parts.extend(route.relayed.as_ref().map(|header| IoSlice::new(header)));
            parts.push(IoSlice::new(&room.umem.chunk(&sealed.frame)[sealed.datagram.clone()]));
        }
        let of_one = parts.len() / group.len().max(1);
        room.stats.send(group.len());
        let in_one = is_even && (group.len() == 1 || self.asks || self.shared.segmentation.works());
        let sent = match in_one {
            true => self.send_even(route, &parts, of_one),
            false => self.send_uneven(route, &parts, of_one),
        };
        drop(parts);
        group.into_iter().for_each(|sealed| room.pool.put(sealed.frame));
        sent
    }
}

impl UdpCarrier {
    /// Sends datagrams of `of_one` parts each; all have one size, the last may be smaller. Returns how many were sent.
    fn send_even(&mut self, route: &GroupRoute, parts: &[IoSlice<'_>], of_one: usize) -> usize {
        let is_group = parts.len() > of_one;
        let send = || self.send_parts(route.to, route.marks, parts, of_one);
        match self.send_with(route.marks.dont_fragment, route.to, send) {
            Ok(()) => {
                if is_group && !self.asks {
                    self.shared.segmentation.sent();
                }
                parts.len() / of_one
            }
            Err(errno) if is_group && may_refuse_groups(errno) => self.send_refused(route, parts, of_one, errno),
            // The kernel knows a smaller path MTU. The tunnel may not know it yet, or must ignore it (`forcemtu`). The
            // kernel's IP then fragments single datagrams without DF, but no segments.
            Err(Errno::EMSGSIZE | Errno::EINVAL) => {
                self.too_large = true;
                let alone =
                    |datagram: &&[IoSlice<'_>]| self.send_parts(route.to, route.marks, datagram, of_one).is_ok();
                self.send_with(false, route.to, || parts.chunks(of_one).take_while(alone).count())
            }
            Err(error) => {
                tracing::debug!("{}: {error}", route.to);
                0
            }
        }
    }

    /// Sends a refused group as single datagrams. If the kernel accepts these, it refused the group as such.
    fn send_refused(&mut self, route: &GroupRoute, parts: &[IoSlice<'_>], of_one: usize, errno: Errno) -> usize {
        let was_too_large = std::mem::take(&mut self.too_large);
        let sent = self.send_uneven(route, parts, of_one);
        if sent == parts.len() / of_one && !self.too_large && !self.asks {
            self.change = Some(self.shared.segmentation.refused(errno, Instant::now()));
        }
        self.too_large |= was_too_large;
        sent
    }

    /// Sends datagrams of any sizes, many per call (sendmmsg(2)). Returns how many were sent.
    fn send_uneven(&mut self, route: &GroupRoute, parts: &[IoSlice<'_>], of_one: usize) -> usize {
        let datagrams: ArrayVec<&[IoSlice<'_>], MAX_DATAGRAMS> = parts.chunks(of_one).collect();
        let mut sent = 0;
        loop {
            let send = || self.send_many(route, &datagrams[sent..]);
            sent += self.send_with(route.marks.dont_fragment, route.to, send);
            // The datagram at which a call ended is sent alone, which handles its error.
            match datagrams.get(sent) {
                Some(next) if self.send_even(route, next, of_one) == 1 => sent += 1,
                _ => return sent,
            }
        }
    }

    /// Sends datagrams in one call. Returns how many the kernel took.
    fn send_many(&self, route: &GroupRoute, datagrams: &[&[IoSlice<'_>]]) -> usize {
        if datagrams.is_empty() {
            return 0;
        }
        let Marks { tos, ttl, .. } = route.marks;
        let (class, ttl) = (i32::from(tos), i32::from(ttl));
        let control = match route.to {
            SocketAddr::V4(_) => [ControlMessage::Ipv4Tos(&tos), ControlMessage::Ipv4Ttl(&ttl)],
            SocketAddr::V6(_) => [ControlMessage::Ipv6TClass(&class), ControlMessage::Ipv6HopLimit(&ttl)],
        };
        let mut headers = MultiHeaders::preallocate(datagrams.len(), Some(nix::cmsg_space!(i32, i32)));
        let to: ArrayVec<_, MAX_DATAGRAMS> = datagrams.iter().map(|_| Some(SockaddrStorage::from(route.to))).collect();
        let socket = self.shared.socket.as_raw_fd();
        let sent =
            sendmmsg(socket, &mut headers, datagrams, &to, control, MsgFlags::MSG_DONTWAIT).map_or(0, Iterator::count);
        if sent > 0 {
            self.is_unreachable.store(false, Ordering::Relaxed);
        }
        sent
    }
}

/// Most further attempts to send after an error that an earlier datagram has left. Somebody who sends ICMP errors as fast as he can
/// meets many attempts, but not so many in a row.
const ATTEMPTS: usize = 32;

/// Errors by which the kernel may refuse a group although it accepts its datagrams: `EIO` without checksum offload or
/// with IPsec on the path, `EINVAL` for a socket or a size that it does not segment, the others if it does not support
/// segmentation.
fn may_refuse_groups(errno: Errno) -> bool {
    matches!(errno, Errno::EIO | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOPROTOOPT)
}

/// Whether datagrams of these lengths can be sent in one UDP_SEGMENT call: all have one size; the last may be smaller.
fn is_even(mut lengths: impl Iterator<Item = usize>) -> bool {
    let Some(size) = lengths.next() else { return true };
    let mut is_over = false;
    lengths.all(|length| !std::mem::replace(&mut is_over, length < size) && length <= size)
}

/// The parts of a group's datagrams: for each the SOCKS5 header, if needed, and the datagram.
type Parts<'a> = ArrayVec<IoSlice<'a>, { 2 * MAX_DATAGRAMS }>;

/// Copies a datagram into a frame of its own, where it is decrypted. The copy is cheap compared with the decryption.
fn in_frame(octets: &[u8], umem: &Umem, pool: &mut Pool) -> Result<(Frame, Range<usize>), Verdict> {
    let place = FRESH..FRESH + octets.len();
    if place.end > umem.frame_size() as usize {
        return Err(Verdict::BadLength);
    }
    let mut frame = pool.take().ok_or(Verdict::NoFrame)?;
    umem.chunk_mut(&mut frame)[place.clone()].copy_from_slice(octets);
    Ok((frame, place))
}

impl AsFd for UdpCarrier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

impl AsRawFd for UdpCarrier {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.socket.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
