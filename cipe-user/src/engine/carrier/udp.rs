//! The UDP socket that owns a tunnel's carrier port: datagrams in many a call, and in superframes where the device
//! delivers such (`UDP_GRO`, udp(7)).

use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use arrayvec::ArrayVec;
use nix::sys::socket::{setsockopt, sockopt};
use quinn_udp::{RecvMeta, UdpSocketState};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

/// Octets that may wait in the kernel: 2 ms of full packets at 10 Gbit/s and what the kernel counts beside them.
const WAITING: usize = 4 << 20;

/// A bound UDP socket that receives superframes.
pub struct UdpCarrier {
    socket: UdpSocket,
    state: UdpSocketState,
    inode: u64,
    /// Losses that were told already.
    losses: u64,
}

impl UdpCarrier {
    /// Makes `socket` ready: not blocking, `UDP_GRO`, a large receive buffer.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn new(socket: UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        // The two that quinn-udp turns on and nobody here reads; time stamps would cost every packet of the host.
        setsockopt(&socket, sockopt::ReceiveTimestampns, &false)?;
        if socket.local_addr()?.is_ipv4() {
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &false)?;
        }
        // Without CAP_NET_ADMIN over the first namespace the buffer stays as it is, and bursts are lost (and counted).
        if let Err(error) = set_socket_recv_buffer_size_force(&socket, WAITING) {
            tracing::debug!("receive buffer: {error}");
        }
        let inode = rustix::fs::fstat(&socket)?.st_ino;
        Ok(Self { socket, state, inode, losses: 0 })
    }

    /// Datagrams that the kernel dropped at this socket since the last call, as [`super::losses::of_all_sockets`] has it.
    pub fn new_losses(&mut self, of_all: &HashMap<u64, u64>) -> u64 {
        let losses = of_all.get(&self.inode).copied().unwrap_or(self.losses);
        losses.saturating_sub(std::mem::replace(&mut self.losses, losses))
    }
}

impl AsFd for UdpCarrier {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for UdpCarrier {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

/// Messages of one call.
const MESSAGES: usize = 16;

/// Octets of the largest message, and some more, so that buffers do not fall on each other in the caches.
const BUFFER: usize = 65_536 + 4_096 + 320;

/// Room for what one call receives. Memory is used as far as messages reach.
#[derive(Default)]
pub struct Inbox {
    buffers: Vec<u8>,
    metas: Vec<RecvMeta>,
    messages: usize,
}

impl Inbox {
    /// An empty one.
    pub fn new() -> Self {
        Self { buffers: vec![0; MESSAGES * BUFFER], metas: vec![RecvMeta::default(); MESSAGES], messages: 0 }
    }

    /// Receives what has arrived, as much as there is room for; returns whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if nothing has arrived; else the error of an earlier datagram, whose details are in the socket's error
    /// queue.
    pub fn receive(&mut self, carrier: &UdpCarrier) -> io::Result<bool> {
        self.messages = 0;
        let mut slices: ArrayVec<IoSliceMut<'_>, MESSAGES> =
            self.buffers.chunks_exact_mut(BUFFER).map(IoSliceMut::new).collect();
        self.messages = carrier.state.recv((&carrier.socket).into(), &mut slices, &mut self.metas)?;
        Ok(self.messages == MESSAGES)
    }

    /// The messages of the last call, in order.
    pub fn messages(&self) -> impl Iterator<Item = Message<'_>> {
        let received = self.buffers.chunks_exact(BUFFER).zip(&self.metas).take(self.messages);
        received.map(|(buffer, meta)| Message {
            from: meta.addr,
            octets: buffer.get(..meta.len).unwrap_or_default(),
            stride: meta.stride,
        })
    }
}

/// One datagram, or a superframe of several from one sender.
#[derive(Clone, Copy, Debug)]
pub struct Message<'a> {
    /// Where it came from.
    pub from: SocketAddr,
    octets: &'a [u8],
    stride: usize,
}

impl<'a> Message<'a> {
    /// The datagrams; one may be empty.
    pub fn datagrams(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let alone = self.octets.is_empty().then_some(&[][..]);
        alone.into_iter().chain(self.octets.chunks(self.stride.max(1)))
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg};

    use super::*;

    fn pair() -> (UdpSocket, UdpCarrier) {
        let sender = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let carrier = UdpCarrier::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).unwrap();
        sender.connect(carrier.socket.local_addr().unwrap()).unwrap();
        (sender, carrier)
    }

    fn received(inbox: &Inbox) -> Vec<Vec<usize>> {
        inbox.messages().map(|message| message.datagrams().map(<[u8]>::len).collect()).collect()
    }

    #[test]
    fn datagrams_arrive_one_by_one_or_in_superframes() {
        let (sender, carrier) = pair();
        let mut inbox = Inbox::new();
        assert_eq!(inbox.receive(&carrier).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        sender.send(&[]).unwrap();
        sender.send(&[1; 100]).unwrap();
        let (octets, size) = ([7; 1000], 300_u16);
        let pieces = [io::IoSlice::new(&octets)];
        let control = [ControlMessage::UdpGsoSegments(&size)];
        sendmsg(sender.as_raw_fd(), &pieces, &control, MsgFlags::empty(), None::<&SockaddrStorage>).unwrap();
        assert!(!inbox.receive(&carrier).unwrap());
        assert_eq!(received(&inbox), [vec![0], vec![100], vec![300, 300, 300, 100]]);
        let from = inbox.messages().map(|message| message.from).collect::<Vec<_>>();
        assert_eq!(from, [sender.local_addr().unwrap(); 3]);
        assert!(inbox.receive(&carrier).is_err());
        assert_eq!(inbox.messages().count(), 0, "an empty call leaves nothing of the one before");
    }

    #[test]
    fn what_the_kernel_drops_is_told_once() {
        let (sender, mut carrier) = pair();
        assert_eq!(carrier.new_losses(&super::super::losses::of_all_sockets()), 0);
        // The buffer cannot be made smaller than it is large enough for two of these.
        rustix::net::sockopt::set_socket_recv_buffer_size(&carrier, 1).unwrap();
        const SENT: usize = 100;
        for _ in 0..SENT {
            sender.send(&[0; 1000]).unwrap();
        }
        let (mut inbox, mut received) = (Inbox::new(), 0);
        while inbox.receive(&carrier).is_ok() {
            received += inbox.messages().count();
        }
        let losses = super::super::losses::of_all_sockets();
        assert_eq!(carrier.new_losses(&losses), (SENT - received) as u64);
        assert!(received < SENT);
        assert_eq!(carrier.new_losses(&losses), 0);
    }

    #[test]
    fn a_full_inbox_says_that_there_may_be_more() {
        let (sender, carrier) = pair();
        for size in 1..=MESSAGES + 1 {
            sender.send(&vec![0; size]).unwrap();
        }
        let mut inbox = Inbox::new();
        assert!(inbox.receive(&carrier).unwrap());
        assert_eq!(inbox.messages().count(), MESSAGES);
        assert!(!inbox.receive(&carrier).unwrap());
        assert_eq!(received(&inbox), [[MESSAGES + 1]]);
    }
}
