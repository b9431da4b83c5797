//! Where UDP sockets receive: many messages a call, each a datagram or a superframe of several.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

use arrayvec::ArrayVec;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, MultiHeaders, RecvMsg, SockaddrStorage, recvmmsg};

/// Octets of the largest message, and some more, so that buffers do not fall on each other in the caches.
const BUFFER: usize = 65_536 + 4_096 + 320;

/// Room for what one call receives. Memory is used as far as messages reach.
#[derive(Default)]
pub(crate) struct Inbox {
    buffers: Vec<u8>,
    headers: ArrayVec<Header, { Self::MESSAGES }>,
}

/// What is said beside a message.
struct Header {
    from: SocketAddr,
    /// Of the whole message.
    octets: usize,
    /// Of each datagram but the last.
    stride: usize,
    tos: u8,
    joined: bool,
}

impl Inbox {
    /// Messages of one call.
    pub(crate) const MESSAGES: usize = 16;

    /// An empty one.
    pub(crate) fn new() -> Self {
        Self { buffers: vec![0; Self::MESSAGES * BUFFER], headers: ArrayVec::new() }
    }

    /// Receives what has arrived, as much as there is room for; returns whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if nothing has arrived; else the error of an earlier datagram, whose details are in the socket's error
    /// queue.
    pub(crate) fn receive(&mut self, socket: &impl AsRawFd) -> io::Result<bool> {
        self.headers.clear();
        // The size of a superframe's datagrams, that of a joined one's fragments, and TOS. Not kept for the next call: the
        // kernel writes into the headers how much it used, and nix does not undo that.
        let control = nix::cmsg_space!(i32, i32, i32);
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(Self::MESSAGES, Some(control));
        let mut chunks = self.buffers.chunks_exact_mut(BUFFER);
        let mut slices: [_; Self::MESSAGES] =
            std::array::from_fn(|_| [IoSliceMut::new(chunks.next().unwrap_or_default())]);
        let received = recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, MsgFlags::MSG_DONTWAIT, None)?;
        self.headers.extend(received.map(|message| Header::of(&message)));
        Ok(self.headers.is_full())
    }

    /// The messages of the last call, in order.
    pub(crate) fn messages(&self) -> impl Iterator<Item = ReceivedMessage<'_>> {
        self.buffers.chunks_exact(BUFFER).zip(&self.headers).map(|(buffer, header)| ReceivedMessage {
            from: header.from,
            tos: header.tos,
            is_joined: header.joined,
            octets: buffer.get(..header.octets).unwrap_or_default(),
            stride: header.stride,
        })
    }
}

impl Header {
    fn of(message: &RecvMsg<'_, '_, SockaddrStorage>) -> Self {
        let mut header = Self {
            from: address(message.address),
            octets: message.bytes,
            stride: message.bytes,
            tos: 0,
            joined: false,
        };
        // There is room for all that is asked for, so nothing is cut off.
        for control in message.cmsgs().into_iter().flatten() {
            match control {
                ControlMessageOwned::UdpGroSegments(size) => header.stride = usize::try_from(size).unwrap_or(0),
                ControlMessageOwned::Ipv4Tos(tos) => header.tos = tos,
                ControlMessageOwned::Ipv6TClass(class) => header.tos = class as u8,
                // That of fragments; nix knows no name for it.
                ControlMessageOwned::Unknown(_) => header.joined = true,
                _ => {}
            }
        }
        header
    }
}

fn address(from: Option<SockaddrStorage>) -> SocketAddr {
    let v4 = from.as_ref().and_then(|from| from.as_sockaddr_in()).map(|v4| SocketAddrV4::from(*v4).into());
    let v6 = || from.as_ref().and_then(|from| from.as_sockaddr_in6()).map(|v6| SocketAddrV6::from(*v6).into());
    // The kernel gives every datagram of an IP socket one of the two.
    v4.or_else(v6).unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)))
}

/// One datagram, or a superframe of several from one sender.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReceivedMessage<'a> {
    /// Where it came from.
    pub from: SocketAddr,
    /// TOS or traffic class, of a superframe that of all its datagrams: the kernel joins none that differ.
    pub tos: u8,
    /// It came in fragments, which the kernel has joined.
    pub is_joined: bool,
    octets: &'a [u8],
    stride: usize,
}

impl<'a> ReceivedMessage<'a> {
    /// The datagrams; one may be empty.
    pub(crate) fn datagrams(&self) -> impl Iterator<Item = &'a [u8]> + use<'a> {
        let alone = self.octets.is_empty().then_some(&[][..]);
        alone.into_iter().chain(self.octets.chunks(self.stride.max(1)))
    }
}
