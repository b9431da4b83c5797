//! Where UDP sockets receive: many messages a call, each a datagram or a superframe of several.

use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};

use arrayvec::ArrayVec;
use quinn_udp::{RecvMeta, UdpSocketState};

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
    /// Messages of one call.
    pub const MESSAGES: usize = 16;

    /// An empty one.
    pub fn new() -> Self {
        Self {
            buffers: vec![0; Self::MESSAGES * BUFFER],
            metas: vec![RecvMeta::default(); Self::MESSAGES],
            messages: 0,
        }
    }

    /// Receives what has arrived, as much as there is room for; returns whether there may be more.
    ///
    /// # Errors
    /// `WouldBlock` if nothing has arrived; else the error of an earlier datagram, whose details are in the socket's error
    /// queue.
    pub fn receive(&mut self, socket: &UdpSocket, state: &UdpSocketState) -> io::Result<bool> {
        self.messages = 0;
        let mut slices: ArrayVec<IoSliceMut<'_>, { Self::MESSAGES }> =
            self.buffers.chunks_exact_mut(BUFFER).map(IoSliceMut::new).collect();
        self.messages = state.recv(socket.into(), &mut slices, &mut self.metas)?;
        Ok(self.messages == Self::MESSAGES)
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
