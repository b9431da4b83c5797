//! The sockets that tell senders of inner packets what is too large.

use std::io;
use std::net::SocketAddr;

use socket2::{Domain, Protocol, Socket, Type};

use crate::inner::too_big::Message;

/// Raw ICMP sockets. What they send goes the way of the kernel's own errors: routed by the kernel to the sender, which
/// may be this host, from an address that belongs to that way. A packet put into the tunnel device instead would have to
/// bear an address of ours as its source, and the kernel drops such as martians.
pub struct Icmp {
    v4: Socket,
    /// `None` where the kernel has no IPv6.
    v6: Option<Socket>,
}

impl Icmp {
    /// Opens the sockets in the namespace of this thread.
    ///
    /// # Errors
    /// No CAP_NET_RAW, or no more descriptors.
    pub fn open() -> io::Result<Self> {
        let v4 = open(Domain::IPV4, Protocol::ICMPV4)?;
        let v6 = open(Domain::IPV6, Protocol::ICMPV6).ok();
        Ok(Self { v4, v6 })
    }

    /// Sends one message.
    pub fn send(&self, message: &Message) {
        let socket = if message.to.is_ipv4() { Some(&self.v4) } else { self.v6.as_ref() };
        // A sender that cannot be told learns it from its next packet, or by the MSS.
        if let Some(Err(error)) =
            socket.map(|socket| socket.send_to(&message.octets, &SocketAddr::new(message.to, 0).into()))
        {
            tracing::debug!("{}: cannot be told that its packet is too big: {error}", message.to);
        }
    }
}

fn open(domain: Domain, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    socket.set_nonblocking(true)?;
    // Nobody reads: the kernel keeps the least that it allows of the ICMP that arrives.
    socket.set_recv_buffer_size(0)?;
    Ok(socket)
}
