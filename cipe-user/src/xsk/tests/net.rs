//! A network namespace for one thread, and what the tests need in it. Nothing here is visible outside; the kernel
//! removes all of it when the thread has ended and its sockets are closed.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketType, netdevice};

/// Maximum wait of a test for an event; after it the test fails.
pub(crate) const EVENT_DEADLINE: Duration = Duration::from_secs(10);

/// EtherType of test frames: local experimental (IEEE 802), which tells them apart from the kernel's own frames.
pub(crate) const ETHERTYPE: [u8; 2] = [0x88, 0xB5];

/// Runs `test` in a new network namespace, or prints why it was skipped.
pub(crate) fn in_namespace(test: impl FnOnce() + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root, for a network namespace, BPF and AF_XDP");
        return;
    }
    let body = move || {
        // SAFETY: a new network namespace for this thread alone; no memory or descriptor changes.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.expect("unshare");
        test();
    };
    let outcome = std::thread::Builder::new().name("namespace".into()).spawn(body).expect("thread").join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with these words.
pub(crate) fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().expect("ip (package iproute2)");
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes a veth pair, both ends up, and returns their interface indices.
pub(crate) fn veth(one: &str, other: &str) -> (u32, u32) {
    ip(&format!("link add name {one} type veth peer name {other}"));
    for end in [one, other] {
        ip(&format!("link set dev {end} addrgenmode none up"));
    }
    (index(one), index(other))
}

fn index(name: &str) -> u32 {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None).expect("socket");
    netdevice::name_to_index(socket, name).expect("interface index")
}

/// Waits for events on a descriptor; false if none came before the deadline.
pub(crate) fn wait(fd: &impl AsFd, events: PollFlags) -> bool {
    let timeout = Timespec::try_from(EVENT_DEADLINE).expect("seconds");
    rustix::event::poll(&mut [PollFd::new(fd, events)], Some(&timeout)).is_ok_and(|ready| ready > 0)
}

/// Repeats `step` until it returns true, with a millisecond between attempts; panics after the deadline.
pub(crate) fn until(what: &str, mut step: impl FnMut() -> bool) {
    let deadline = Instant::now() + EVENT_DEADLINE;
    while !step() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        let _ = rustix::event::poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 }));
    }
}

/// A test frame with this payload.
pub(crate) fn frame(payload: &[u8]) -> Vec<u8> {
    [&[0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2][..], &ETHERTYPE, payload].concat()
}

/// The payload of a test frame; `None` for any other frame that a kernel may send.
pub(crate) fn payload(frame: &[u8]) -> Option<&[u8]> {
    (frame.get(12..14)? == ETHERTYPE).then(|| &frame[14..])
}

/// A packet socket on one device: sends and receives by the kernel's own path.
pub(crate) struct Tap(OwnedFd);

impl Tap {
    /// With `vnet_header`, each sent frame starts with a `virtio_net_hdr`.
    pub(crate) fn open(ifindex: u32, vnet_header: bool) -> io::Result<Self> {
        const ETH_P_ALL: u16 = 3;
        let protocol = Protocol::from_raw(std::num::NonZeroU32::new(u32::from(ETH_P_ALL.to_be())).expect("not 0"));
        let socket = rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, Some(protocol))?;
        let sockaddr = libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: ETH_P_ALL.to_be(),
            sll_ifindex: ifindex as i32,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 0,
            sll_addr: [0; 8],
        };
        let fd = std::os::fd::AsRawFd::as_raw_fd(&socket);
        // SAFETY: the kernel reads the address, whose size is given.
        let bound = unsafe { libc::bind(fd, (&raw const sockaddr).cast(), size_of_val(&sockaddr) as u32) };
        if bound < 0 {
            return Err(io::Error::last_os_error());
        }
        if vnet_header {
            let one: libc::c_int = 1;
            // SAFETY: the kernel reads the integer, whose size is given.
            let set = unsafe {
                libc::setsockopt(
                    fd,
                    libc::SOL_PACKET,
                    libc::PACKET_VNET_HDR,
                    (&raw const one).cast(),
                    size_of_val(&one) as u32,
                )
            };
            if set < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(socket))
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        let sent = rustix::net::send(&self.0, frame, SendFlags::empty()).expect("send on the packet socket");
        assert_eq!(sent, frame.len());
    }

    /// The next test frame's payload.
    pub(crate) fn receive(&self) -> Vec<u8> {
        let mut buffer = vec![0; 1 << 16];
        loop {
            assert!(wait(&self.0, PollFlags::IN), "no frame arrived");
            let (_, len) = rustix::net::recv(&self.0, buffer.as_mut_slice(), RecvFlags::DONTWAIT).expect("receive");
            if let Some(payload) = payload(&buffer[..len]) {
                return payload.to_vec();
            }
        }
    }
}
