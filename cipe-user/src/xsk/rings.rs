//! The rings of a socket. They are created and mapped before the socket is bound, because Linux 6.1 refuses to map
//! those of a bound socket (`EBUSY`).

use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::xdp::{
    XDP_PGOFF_RX_RING, XDP_PGOFF_TX_RING, XDP_UMEM_PGOFF_COMPLETION_RING, XDP_UMEM_PGOFF_FILL_RING, XdpDesc,
};
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::config::SocketConfig;
use super::map::Ring;

/// The system call that the kernel refused, and its reason.
pub(super) type Refusal = (&'static str, Errno);

/// A socket's four rings.
pub(super) struct Rings {
    /// `None` for a socket that only sends.
    pub(super) receive: Option<Ring<XdpDesc>>,
    /// `None` for a socket that only receives.
    pub(super) transmit: Option<Ring<XdpDesc>>,
    pub(super) fill: Ring<u64>,
    pub(super) completion: Ring<u64>,
}

/// Opens an unbound socket and maps its rings.
pub(super) fn open(config: &SocketConfig) -> Result<(OwnedFd, Rings), Refusal> {
    let socket = rustix::net::socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None)
        .map_err(|errno| ("socket", errno))?;
    let size = |call, set: fn(&OwnedFd, u32) -> rustix::io::Result<()>, slots: u32| {
        if slots == 0 { Ok(()) } else { set(&socket, slots).map_err(|errno| (call, errno)) }
    };
    size("XDP_RX_RING", |fd, n| sockopt::set_xdp_rx_ring_size(fd, n), config.rx)?;
    size("XDP_TX_RING", |fd, n| sockopt::set_xdp_tx_ring_size(fd, n), config.tx)?;
    size("XDP_UMEM_FILL_RING", |fd, n| sockopt::set_xdp_umem_fill_ring_size(fd, n), config.fill)?;
    size("XDP_UMEM_COMPLETION_RING", |fd, n| sockopt::set_xdp_umem_completion_ring_size(fd, n), config.completion)?;
    let at = sockopt::xdp_mmap_offsets(&socket).map_err(|errno| ("XDP_MMAP_OFFSETS", errno))?;
    let fd = socket.as_fd();
    let failed = |call| move |errno: Errno| (call, errno);
    let descriptors = |page, at, slots| (slots > 0).then(|| Ring::map(fd, page, at, slots)).transpose();
    let rings = Rings {
        receive: descriptors(XDP_PGOFF_RX_RING, at.rx, config.rx).map_err(failed("mmap of the rx ring"))?,
        transmit: descriptors(XDP_PGOFF_TX_RING, at.tx, config.tx).map_err(failed("mmap of the tx ring"))?,
        fill: Ring::map(fd, XDP_UMEM_PGOFF_FILL_RING, at.fr, config.fill).map_err(failed("mmap of the fill ring"))?,
        completion: Ring::map(fd, XDP_UMEM_PGOFF_COMPLETION_RING, at.cr, config.completion)
            .map_err(failed("mmap of the completion ring"))?,
    };
    Ok((socket, rings))
}
