//! Sends superframes on a device, by an `AF_PACKET` socket with `PACKET_VNET_HDR` (packet(7), linux/virtio_net.h).
//! AF_XDP has no field for a frame's GSO data.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType};

use super::Error;

/// A socket that transmits frames with GSO and checksum metadata on one device. It receives nothing.
#[derive(Debug)]
pub struct Injector {
    socket: OwnedFd,
    ifindex: u32,
}

impl Injector {
    /// Opens a socket for device `ifindex`.
    ///
    /// # Errors
    /// Any error of the kernel, with the device.
    pub fn open(ifindex: u32) -> Result<Self, Error> {
        let injector = Self::before_tc(ifindex)?;
        set(&injector.socket, libc::PACKET_QDISC_BYPASS)
            .map_err(|errno| failed(ifindex, "PACKET_QDISC_BYPASS", errno))?;
        Ok(injector)
    }

    /// Opens a socket for device `ifindex` whose frames pass the device's TC programs.
    ///
    /// # Errors
    /// Any error of the kernel, with the device.
    pub fn before_tc(ifindex: u32) -> Result<Self, Error> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // A socket of protocol 0 receives nothing.
        let socket = rustix::net::socket_with(AddressFamily::PACKET, SocketType::RAW, flags, None)
            .map_err(|errno| failed(ifindex, "socket", errno))?;
        bind(&socket, ifindex).map_err(|errno| failed(ifindex, "bind", errno))?;
        set(&socket, libc::PACKET_VNET_HDR).map_err(|errno| failed(ifindex, "PACKET_VNET_HDR", errno))?;
        Ok(Self { socket, ifindex })
    }

    /// Transmits one frame: the `virtio_net_hdr`, then the frame from its Ethernet header on, in any number of pieces.
    ///
    /// # Errors
    /// `ENOBUFS` and `EAGAIN` mean that the queue is full for now.
    pub fn send(&self, pieces: &[IoSlice<'_>]) -> Result<(), Errno> {
        rustix::net::sendmsg(&self.socket, pieces, &mut SendAncillaryBuffer::default(), SendFlags::DONTWAIT).map(drop)
    }
}

impl AsFd for Injector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl std::fmt::Display for Injector {
    /// Shows the device only.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&super::socket::device_name(self.ifindex))
    }
}

fn failed(ifindex: u32, call: &'static str, errno: Errno) -> Error {
    Error::socket(&format!("device {ifindex}: superframe injection"), call, errno)
}

fn bind(socket: &OwnedFd, ifindex: u32) -> Result<(), Errno> {
    let index = i32::try_from(ifindex).map_err(|_| Errno::NODEV)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel reads `length` octets, those of `address`, which lives through the call.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })
}

fn set(socket: &OwnedFd, option: libc::c_int) -> Result<(), Errno> {
    let on: libc::c_int = 1;
    let length = size_of_val(&on) as libc::socklen_t;
    // SAFETY: the kernel reads `length` octets, those of `on`, which lives through the call.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_PACKET, option, (&raw const on).cast(), length) })
}

fn check(result: libc::c_int) -> Result<(), Errno> {
    if result < 0 {
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL))
    } else {
        Ok(())
    }
}
