//! The list of bound sockets that a UMEM keeps.

use std::os::fd::OwnedFd;
use std::sync::Weak;

use rustix::net::xdp::SocketAddrXdpFlags;

/// A bound socket. Others may share its kernel UMEM.
pub(super) struct Registration {
    pub(super) socket: Weak<OwnedFd>,
    /// Its device and queue.
    pub(super) queue: (u32, u32),
    /// The flags that it was bound with.
    pub(super) flags: SocketAddrXdpFlags,
}
