//! What a UMEM remembers of the sockets that are bound with it.

use std::os::fd::OwnedFd;
use std::sync::Weak;

use rustix::net::xdp::SocketAddrXdpFlags;

/// A bound socket that others may share a kernel UMEM with.
pub(super) struct Registration {
    pub(super) socket: Weak<OwnedFd>,
    /// Its device and queue.
    pub(super) queue: (u32, u32),
    /// What it was bound with.
    pub(super) flags: SocketAddrXdpFlags,
}
