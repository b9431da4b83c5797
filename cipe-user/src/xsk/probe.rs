//! What this kernel's AF_XDP can do, asked of the kernel.

use rustix::io::Errno;
use rustix::net::xdp::{SocketAddrXdp, SocketAddrXdpFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::injector::Injector;

/// No device has this index: the kernel looks at the flags of a bind before it looks for the device.
const NO_DEVICE: u32 = i32::MAX as u32;
/// The loopback device of every network namespace.
const LOOPBACK: u32 = 1;

/// Whether a packet may have several descriptors (`XDP_USE_SG`). Without an answer it may: binding then says what is wrong.
pub fn has_multi_buffer() -> bool {
    let Ok(socket) = rustix::net::socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None) else {
        return true;
    };
    let address = SocketAddrXdp::new(SocketAddrXdpFlags::XDP_USE_SG, 0, NO_DEVICE);
    rustix::net::bind(&socket, &address) != Err(Errno::INVAL)
}

/// Whether an [`Injector`] takes superframes of UDP. Asked with one of two octets for nobody on the loopback device; without an
/// answer it does.
pub fn has_udp_superframes() -> bool {
    let Ok(injector) = Injector::open(LOOPBACK) else { return true };
    injector.send(&[std::io::IoSlice::new(&SUPERFRAME)]) != Err(Errno::INVAL)
}

/// A `virtio_net_hdr` with an unfinished checksum and GSO for UDP, and a frame of two datagrams of one octet, from and to
/// 192.0.2.1, for a station that no loopback device is.
const SUPERFRAME: [u8; 54] = [
    1, 5, 42, 0, 1, 0, 34, 0, 6,
    0, // flags, kind, length of headers, size of segments, checksum's start and offset
    2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, // Ethernet
    0x45, 0, 0, 30, 0, 0, 0x40, 0, 1, 17, 0xF5, 0xCC, 192, 0, 2, 1, 192, 0, 2, 1, // IPv4
    0, 9, 0, 9, 0, 10, 0, 0, // UDP
    0, 0,
];
