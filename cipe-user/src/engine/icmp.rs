//! The sockets that tell senders of inner packets what is too large.

use std::net::SocketAddr;

use rustix::fd::OwnedFd;
use rustix::io::Result;
use rustix::net::{AddressFamily, Protocol, SendFlags, SocketFlags, SocketType, ipproto, sendto, socket_with, sockopt};

use crate::inner::too_big::TooBigMessage;

/// Raw ICMP sockets. What they send goes the way of the kernel's own errors: routed by the kernel to the sender, which
/// may be this host, from an address that belongs to that way. A packet put into the tunnel device instead would have to
/// bear an address of ours as its source, and the kernel drops such as martians.
pub(super) struct Icmp {
    v4: OwnedFd,
    /// `None` where the kernel has no IPv6.
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
        // A sender that cannot be told learns it from its next packet, or by the MSS.
        let to = SocketAddr::new(message.to, 0);
        if let Some(socket) = socket
            && let Err(error) = sendto(socket, &message.octets, SendFlags::empty(), &to)
        {
            tracing::debug!("{}: cannot be told that its packet is too big: {error}", message.to);
        }
    }
}

fn open(family: AddressFamily, protocol: Protocol) -> Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(family, SocketType::RAW, flags, Some(protocol))?;
    // Nobody reads: the kernel keeps the least that it allows of the ICMP that arrives.
    sockopt::set_socket_recv_buffer_size(&socket, 0)?;
    Ok(socket)
}
