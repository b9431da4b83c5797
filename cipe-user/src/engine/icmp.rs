//! The sockets for ICMP errors to senders of inner packets that are too large.

use std::net::SocketAddr;

use rustix::fd::OwnedFd;
use rustix::io::Result;
use rustix::net::{AddressFamily, Protocol, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with, sockopt};

use crate::inner::too_big::TooBigMessage;

/// Raw ICMP sockets. Their messages take the path of the kernel's own errors: the kernel routes them to the sender,
/// which may be this host, and chooses a source address for that path. A packet in the tunnel device instead would need
/// an address of ours as its source, and the kernel drops such packets as martians.
pub(super) struct Icmp {
    v4: OwnedFd,
    /// `None` if the kernel has no IPv6.
    v6: Option<OwnedFd>,
}

impl Icmp {
    /// Opens the sockets in the namespace of this thread.
    ///
    /// # Errors
    /// No CAP_NET_RAW, or no more descriptors.
    pub(super) fn open() -> Result<Self> {
        let v4 = open(AddressFamily::INET, ipproto::ICMP)?;
        let v6 = open(AddressFamily::INET6, ipproto::ICMPV6).ok();
        Ok(Self { v4, v6 })
    }

    /// Sends one message.
    pub(super) fn send(&self, message: &TooBigMessage) {
        let socket = if message.to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        // If the error cannot be sent, the sender gets it for its next packet, or knows the MSS.
        let to = SocketAddr::new(message.to, 0);
        if let Some(socket) = socket
            && let Err(error) = sendto(socket, &message.octets, SendFlags::empty(), &to)
        {
            tracing::debug!("{}: cannot send that its packet is too big: {error}", message.to);
        }
    }
}

fn open(family: AddressFamily, protocol: Protocol) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::RAW, flags, Some(protocol))?;
    // Nobody reads these sockets, so the receive buffer is as small as the kernel allows.
    sockopt::set_socket_recv_buffer_size(&socket, 0)?;
    Ok(socket)
}
