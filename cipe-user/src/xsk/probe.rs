//! Asks the kernel which AF_XDP features it has.

use std::io::IoSlice;
use std::os::fd::AsRawFd;

use rustix::io::Errno;
use rustix::net::xdp::{SocketAddrXdp, SocketAddrXdpFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::injector::Injector;

/// An index that no device has: the kernel checks the flags of a bind before it looks for the device.
const NO_DEVICE: u32 = i32::MAX as u32;
/// The loopback device of every network namespace.
const LOOPBACK: u32 = 1;

/// Whether a packet may have several descriptors (`XDP_USE_SG`). True if the kernel cannot be asked: the bind then
/// reports the error.
pub fn has_multi_buffer() -> bool {
    let Ok(socket) = rustix::net::socket_with(AddressFamily::XDP, SocketType::RAW, SocketFlags::CLOEXEC, None) else {
        return true;
    };
    let address = SocketAddrXdp::new(SocketAddrXdpFlags::XDP_USE_SG, 0, NO_DEVICE);
    rustix::net::bind(&socket, &address) != Err(Errno::INVAL)
}

/// Whether an [`Injector`] accepts superframes of UDP. True if the kernel cannot be asked.
pub fn has_udp_superframes() -> bool {
    superframe_is_taken().unwrap_or(true)
}

/// Sends a superframe that no station receives on the loopback device, or, if that device is down, on the loopback
/// device of a temporary network namespace. Returns whether the kernel accepts it; `None` if the test is not permitted.
pub(super) fn superframe_is_taken() -> Option<bool> {
    let answer = match send_superframe() {
        Err(Errno::NETDOWN) => in_namespace(),
        answer => answer,
    };
    answer.ok()
}

/// Whether the loopback device of the calling thread's network namespace accepts the superframe.
fn send_superframe() -> Result<bool, Errno> {
    // If no packet socket can be opened, the result is unknown.
    let injector = Injector::open(LOOPBACK).map_err(|_| Errno::NOTSUP)?;
    match injector.send(&[IoSlice::new(&SUPERFRAME)]) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Does the same in a new network namespace, whose loopback device it sets up.
fn in_namespace() -> Result<bool, Errno> {
    let ask = || {
        // SAFETY: a new network namespace for this thread alone; no memory or descriptor changes.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
        set_loopback_up()?;
        send_superframe()
    };
    let thread = std::thread::Builder::new().name("probe".to_owned()).spawn(ask).map_err(|_| Errno::AGAIN)?;
    thread.join().unwrap_or(Err(Errno::NOTSUP))
}

fn set_loopback_up() -> Result<(), Errno> {
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: all fields are numbers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[..2].copy_from_slice(&[b'l' as libc::c_char, b'o' as libc::c_char]);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the kernel reads name and flags of `request`, which lives through the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &raw const request) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::NOTSUP)),
    }
}

/// A `virtio_net_hdr` with a partial checksum and GSO for UDP, and a frame of two datagrams of one octet each, from and
/// to 192.0.2.1. The loopback device does not have the frame's destination address.
const SUPERFRAME: [u8; 54] = [
    1, 5, 42, 0, 1, 0, 34, 0, 6,
    0, // flags, kind, length of headers, size of segments, checksum's start and offset
    2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, // Ethernet
    0x45, 0, 0, 30, 0, 0, 0x40, 0, 1, 17, 0xF5, 0xCC, 192, 0, 2, 1, 192, 0, 2, 1, // IPv4
    0, 9, 0, 9, 0, 10, 0, 0, // UDP
    0, 0,
];
