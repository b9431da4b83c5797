//! One AF_XDP socket: one queue of one device.

use std::collections::VecDeque;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::xdp::{SocketAddrXdpFlags, XdpDesc, XdpOptionsFlags};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, netdevice, sockopt};

use super::bind;
use super::config::SocketConfig;
use super::frames::{Packet, Pool};
use super::held::Held;
use super::map::Ring;
use super::queue::{Anomalies, Queue};
use super::rings::Rings;
use super::{Error, Umem};

/// Maximum wait of [`Socket::close`] for packets in flight.
const COMPLETION_TIMEOUT: Duration = Duration::from_millis(100);

/// The kernel's default of packets per system call in copy mode (`TX_BATCH_SIZE`).
const DEFAULT_TX_BUDGET: u32 = 32;

/// The result of [`Socket::kick`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Kick {
    /// The kernel has taken all packets.
    Done,
    /// The kernel takes no more packets now (device queue or send buffer full): call again later.
    Again,
}

/// The frames of a closed socket.
pub struct Closed {
    /// Number of frames returned to the pool.
    pub returned: usize,
    /// Frames that the kernel may still read or write, lost until the UMEM is dropped.
    pub lost: usize,
    /// Frames that the kernel releases later.
    pub held: Option<Held>,
}

/// Counters of a socket since its bind: the kernel's (`XDP_STATISTICS`) and ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Packets dropped for other reasons than invalid descriptors; in copy mode mostly because the fill ring was empty.
    pub rx_dropped: u64,
    /// Invalid addresses in the fill ring.
    pub rx_invalid_descs: u64,
    /// Invalid descriptors in the transmit ring.
    pub tx_invalid_descs: u64,
    /// Packets dropped because the receive ring was full.
    pub rx_ring_full: u64,
    /// How often the kernel found the fill ring empty.
    pub rx_fill_ring_empty_descs: u64,
    /// How often the kernel found the transmit ring empty.
    pub tx_ring_empty_descs: u64,
    /// Counts of our own checks.
    pub anomalies: Anomalies,
}

/// A socket that is bound to one queue of one device. It sends, receives, or both.
///
/// If it is dropped without [`Socket::close`], the queue is released, and the frames that it holds are lost.
pub struct Socket {
    // Rings before the descriptor: a mapping keeps the socket alive in the kernel.
    queue: Queue<Ring<XdpDesc>, Ring<u64>>,
    socket: Arc<OwnedFd>,
    object: String,
    /// Index of its device, and number of its queue.
    place: (u32, u32),
    zero_copy: bool,
    multi_buffer: bool,
    need_wakeup: bool,
    /// Keeps the memory mapped.
    _umem: Umem,
}

impl Socket {
    /// Opens a socket with the memory of `umem` and binds it to queue `queue` of device `ifindex`.
    ///
    /// Waits up to 2 s while the queue is busy: the kernel frees the queue of a closed socket with some delay.
    ///
    /// # Errors
    /// Invalid ring sizes, or a refusal of the kernel; the message has device, queue and a remedy.
    pub fn bind(umem: &Umem, ifindex: u32, queue: u32, config: SocketConfig) -> Result<Self, Error> {
        let place = (ifindex, queue);
        let object = format!("{} queue {queue}", device_name(ifindex));
        let (socket, rings, flags) = bind::open(umem, place, &object, &config)?;
        let failed = |call| {
            let object = &object;
            move |errno| Error::socket(object, call, errno)
        };
        let options = sockopt::xdp_options(&socket).map_err(failed("XDP_OPTIONS"))?;
        let zero_copy = options.contains(XdpOptionsFlags::XDP_OPTIONS_ZEROCOPY);
        let Rings { receive, transmit, fill, completion } = rings;
        if config.tx > 0 && !zero_copy {
            prepare_copies(&socket, config.tx, umem.frame_size());
        }
        let multi_buffer = flags.contains(SocketAddrXdpFlags::XDP_USE_SG);
        let queue = Queue::new(umem.layout(), multi_buffer, receive, transmit, fill, completion);
        Ok(Self {
            queue,
            socket,
            object,
            place,
            zero_copy,
            multi_buffer,
            need_wakeup: config.need_wakeup,
            _umem: umem.clone(),
        })
    }

    /// Whether the driver uses the UMEM directly (`XDP_OPTIONS`).
    pub fn zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Whether packets larger than a frame can be received and sent, as several descriptors.
    pub fn multi_buffer(&self) -> bool {
        self.multi_buffer
    }

    /// Fills the fill ring until it has `want` frames, as far as ring and pool allow. Returns the number of frames
    /// added.
    ///
    /// If the fill ring is empty, the kernel silently drops packets; keep it above half.
    ///
    /// # Panics
    /// If the pool is of another UMEM.
    pub fn fill(&mut self, pool: &mut Pool, want: u32) -> usize {
        self.queue.fill(pool, want)
    }

    /// Appends received packets to `out`. Returns the number of descriptors, about `max`: a packet of several
    /// descriptors is never split, so the last packet may exceed `max`.
    pub fn recv(&mut self, out: &mut impl Extend<Packet>, max: usize) -> usize {
        self.queue.recv(out, max)
    }

    /// Moves packets from the front of `packets` to the transmit ring. Returns the number of descriptors moved. Packets
    /// stay in `packets` if they do not fit, or have no end yet. Packets that the kernel would refuse are dropped and
    /// counted in [`Anomalies::send`]. Call [`Socket::kick`] afterwards.
    ///
    /// # Panics
    /// If a frame belongs to another UMEM.
    pub fn send(&mut self, packets: &mut VecDeque<Packet>) -> usize {
        self.queue.send(packets)
    }

    /// Returns the frames of transmitted packets to the pool. Returns their number.
    ///
    /// # Panics
    /// If the pool is of another UMEM.
    pub fn reclaim(&mut self, pool: &mut Pool) -> usize {
        self.queue.reclaim(pool)
    }

    /// Returns the number of descriptors that [`Socket::send`] would take now.
    pub fn room(&mut self) -> usize {
        self.queue.room()
    }

    /// Makes the kernel transmit the queued packets. In copy mode this system call does the work; in zero-copy mode it
    /// wakes the driver if it sleeps. If nothing is queued, there is no system call.
    ///
    /// # Errors
    /// The device is down or gone. Back-pressure is no error.
    pub fn kick(&mut self) -> Result<Kick, Error> {
        let mut unsent = self.queue.unsent();
        if self.zero_copy && self.need_wakeup && !self.queue.transmit_sleeps() {
            return Ok(Kick::Done);
        }
        while unsent > 0 {
            match rustix::net::send(&self.socket, &[], SendFlags::DONTWAIT) {
                Ok(_) if self.zero_copy => return Ok(Kick::Done),
                // Back-pressure, or the budget is used up: it depends on whether packets were taken
                // (`xsk_generic_xmit`).
                Ok(_) | Err(Errno::AGAIN | Errno::BUSY | Errno::NOBUFS | Errno::INTR) => {}
                Err(errno) => return Err(Error::socket(&self.object, "sendto", errno)),
            }
            let left = self.queue.unsent();
            if left == unsent {
                return Ok(Kick::Again);
            }
            unsent = left;
        }
        Ok(Kick::Done)
    }

    /// Wakes the driver after the first [`Socket::fill`]. At the bind, the fill ring was empty, so the driver sleeps,
    /// and not every driver then sets the need_wakeup flag.
    pub fn start(&self) {
        if self.zero_copy && self.need_wakeup {
            // A poll wakes the driver for both directions. `kick` reports errors of the device later.
            let _ = rustix::event::poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&Timespec::default()));
        }
        self.wake_rx();
    }

    /// Wakes a driver that sleeps because the fill ring was empty. Call it after [`Socket::fill`].
    pub fn wake_rx(&self) {
        if self.need_wakeup && self.queue.fill_sleeps() {
            // `poll` and `kick` report errors of the device; there is nothing to receive here.
            let _ = rustix::net::recv(&self.socket, &mut [0; 0], RecvFlags::DONTWAIT);
        }
    }

    /// Number of frames that this socket holds: in the fill ring, in use by the kernel, and in completions that are not
    /// reclaimed.
    pub fn in_kernel(&self) -> usize {
        self.queue.in_kernel()
    }

    /// Returns the counters since the bind.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn statistics(&self) -> Result<Statistics, Error> {
        let kernel = sockopt::xdp_statistics(&self.socket)
            .map_err(|errno| Error::socket(&self.object, "XDP_STATISTICS", errno))?;
        Ok(Statistics {
            rx_dropped: kernel.rx_dropped,
            rx_invalid_descs: kernel.rx_invalid_descs,
            tx_invalid_descs: kernel.tx_invalid_descs,
            rx_ring_full: kernel.rx_ring_full.unwrap_or(0),
            rx_fill_ring_empty_descs: kernel.rx_fill_ring_empty_descs.unwrap_or(0),
            tx_ring_empty_descs: kernel.tx_ring_empty_descs.unwrap_or(0),
            anomalies: self.queue.anomalies,
        })
    }

    /// Closes the socket and returns all frames that the kernel no longer uses to the pool. Waits up to 100 ms for
    /// packets in flight.
    ///
    /// In copy mode, only transmit frames that were picked up and never completed are lost. A zero-copy driver releases
    /// its frames some time after the close, without a notification, and a bind on another thread may have the socket
    /// for a moment; use [`Held::wait`] for these.
    ///
    /// # Panics
    /// If the pool is of another UMEM.
    pub fn close(mut self, pool: &mut Pool) -> Closed {
        let before = pool.free();
        let deadline = Instant::now() + COMPLETION_TIMEOUT;
        self.queue.reclaim(pool);
        while self.queue.sending() > 0 && Instant::now() < deadline && self.kick().is_ok() {
            // No event reports a completion, so this polls every millisecond.
            let millisecond = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            let _ = rustix::event::poll(&mut [PollFd::new(&self.socket, PollFlags::empty())], Some(&millisecond));
            self.queue.reclaim(pool);
        }
        let mut received = Vec::new();
        self.queue.recv(&mut received, usize::MAX);
        received.into_iter().for_each(|packet| pool.put(packet.frame));
        let Self { queue, socket, zero_copy, place, _umem: umem, .. } = self;
        let others = Arc::downgrade(&socket);
        // A bind on another thread may still use the socket, to share its memory.
        let only = Arc::into_inner(socket);
        match only {
            Some(socket) if !zero_copy => {
                let lost = queue.dismantle(pool, socket).len();
                Closed { returned: pool.free() - before, lost, held: None }
            }
            shared => {
                let frames = queue.abandon();
                drop(shared);
                Closed { returned: pool.free() - before, lost: 0, held: Some(Held::new(frames, others, place, umem)) }
            }
        }
    }
}

#[cfg(test)]
impl Socket {
    /// Closes it as if a zero-copy driver still had all its frames.
    pub(super) fn close_held(self) -> Held {
        let Self { queue, socket, place, _umem: umem, .. } = self;
        let others = Arc::downgrade(&socket);
        let frames = queue.abandon();
        drop(socket);
        Held::new(frames, others, place, umem)
    }

    /// Returns the reference that a bind has while it shares the memory.
    pub(super) fn shared(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Returns the device's name for messages, or its number if the device is gone.
pub(super) fn device_name(ifindex: u32) -> String {
    rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|socket| netdevice::index_to_name(socket, ifindex))
        .unwrap_or_else(|_| format!("device {ifindex}"))
}

/// Makes copy mode take a whole transmit ring at once. Errors are ignored, because this affects only the speed.
fn prepare_copies(socket: &OwnedFd, tx: u32, frame_size: u32) {
    // Each packet in flight is an skb that counts against the send buffer; the default has space for less than a
    // hundred.
    let octets = tx as usize * frame_size as usize;
    if sockopt::set_socket_send_buffer_size_force(socket, octets).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, octets);
    }
    if tx > DEFAULT_TX_BUDGET {
        set_budget(socket, tx);
    }
}

/// `XDP_MAX_TX_SKB_BUDGET` (kernel 6.17): packets that one system call transmits in copy mode.
fn set_budget(socket: &OwnedFd, packets: u32) {
    const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;
    let len = size_of::<u32>() as libc::socklen_t;
    // SAFETY: the kernel reads `len` octets, those of `packets`, which lives through the call.
    unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, (&raw const packets).cast(), len);
    }
}
