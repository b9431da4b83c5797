//! The receive buffers of UDP sockets: many messages per call, each a datagram or a superframe.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd;

use arrayvec::ArrayVec;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, MultiHeaders, RecvMsg, SockaddrStorage, recvmmsg};

/// Octets of a buffer: the largest message, and an offset so that buffers do not collide in the caches.
const BUFFER_OCTETS: usize = 65_536 + 4_096 + 320;

/// Buffers for the messages of one call. Memory is used only as far as messages reach.
#[derive(Default)]
pub(crate) struct Inbox {
    buffers: Vec<u8>,
    headers: ArrayVec<Header, { Self::MESSAGES }>,
}

/// The metadata of a message.
struct Header {
    from: SocketAddr,
    /// Octets of the whole message.
    octets: usize,
    /// Octets of each datagram but the last.
    stride: usize,
    tos: u8,
    joined: bool,
}

impl Inbox {
    /// Maximum messages of one call.
    pub(crate) const MESSAGES: usize = 16;

    /// Creates empty buffers.
    pub(crate) fn new() -> Self {
        Self { buffers: vec![0; Self::MESSAGES * BUFFER_OCTETS], headers: ArrayVec::new() }
    }

    /// Receives as many messages as there are buffers. Returns whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if there are none; otherwise the error of an earlier datagram, with details in the socket's error
    /// queue.
    pub(crate) fn receive(&mut self, socket: &impl AsRawFd) -> io::Result<bool> {
        self.headers.clear();
        // The size of a superframe's datagrams, the size of fragments, and the TOS. Not kept for the next call: the
        // kernel overwrites the lengths in the headers, and nix does not reset them.
        let control = nix::cmsg_space!(i32, i32, i32);
        let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(Self::MESSAGES, Some(control));
        let mut chunks = self.buffers.chunks_exact_mut(BUFFER_OCTETS);
        let mut slices: [_; Self::MESSAGES] =
            std::array::from_fn(|_| [IoSliceMut::new(chunks.next().unwrap_or_default())]);
        let received = recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, MsgFlags::MSG_DONTWAIT, None)?;
        self.headers.extend(received.map(|message| Header::of(&message)));
        Ok(self.headers.is_full())
    }

    /// Returns the messages of the last call, in order.
    pub(crate) fn messages(&self) -> impl Iterator<Item = ReceivedMessage<'_>> {
        self.buffers.chunks_exact(BUFFER_OCTETS).zip(&self.headers).map(|(buffer, header)| ReceivedMessage {
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
        // There is space for all requested control messages, so none is cut off.
        for control in message.cmsgs().into_iter().flatten() {
            match control {
                ControlMessageOwned::UdpGroSegments(size) => header.stride = usize::try_from(size).unwrap_or(0),
                ControlMessageOwned::Ipv4Tos(tos) => header.tos = tos,
                ControlMessageOwned::Ipv6TClass(class) => header.tos = class as u8,
                // The size of fragments, which nix does not know.
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
    /// Its source address.
    pub from: SocketAddr,
    /// TOS or traffic class. All datagrams of a superframe have the same: the kernel does not join others.
    pub tos: u8,
    /// Whether the kernel has reassembled it from fragments.
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
