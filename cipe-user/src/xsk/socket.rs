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

/// How long [`Socket::close`] waits for packets in flight.
const LAST_COMPLETIONS: Duration = Duration::from_millis(100);

/// Packets that copy mode takes in one system call unless told otherwise (`TX_BATCH_SIZE`).
const DEFAULT_BUDGET: u32 = 32;

/// Answer to [`Socket::kick`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Kick {
    /// The kernel needs nothing more from us.
    Done,
    /// The kernel took no more for now (device queue or send buffer full): kick again later.
    Again,
}

/// What [`Socket::close`] got back.
pub struct Closed {
    /// Frames given to the pool.
    pub returned: usize,
    /// Frames that the kernel may still read or write, lost until the UMEM is dropped.
    pub lost: usize,
    /// Frames that come back later.
    pub held: Option<Held>,
}

/// Counters of a socket since its bind: the kernel's (`XDP_STATISTICS`) and ours.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Packets dropped for other reasons than invalid descriptors, above all for an empty fill ring in copy mode.
    pub rx_dropped: u64,
    /// Invalid addresses in the fill ring.
    pub rx_invalid_descs: u64,
    /// Invalid descriptors in the transmit ring.
    pub tx_invalid_descs: u64,
    /// Packets dropped because the receive ring was full.
    pub rx_ring_full: u64,
    /// Times that the kernel found no frame in the fill ring.
    pub rx_fill_ring_empty_descs: u64,
    /// Times that the kernel found nothing in the transmit ring.
    pub tx_ring_empty_descs: u64,
    /// What we refused.
    pub anomalies: Anomalies,
}

/// A socket bound to one queue of one device. Sends, receives, or both.
///
/// Dropping it without [`Socket::close`] releases the queue and loses the frames that it holds.
pub struct Socket {
    // Rings before the descriptor: a mapping keeps the socket alive in the kernel.
    queue: Queue<Ring<XdpDesc>, Ring<u64>>,
    socket: Arc<OwnedFd>,
    object: String,
    /// Its device and queue.
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
    /// Ring sizes out of range; whatever the kernel refuses, with device, queue and a way out.
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

    /// Whether the driver works on the UMEM itself (`XDP_OPTIONS`).
    pub fn zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Whether packets larger than a frame come, and may be sent, as several descriptors.
    pub fn multi_buffer(&self) -> bool {
        self.multi_buffer
    }

    /// Tops the fill ring up until `want` frames wait in it, as far as ring and pool allow; frames added.
    ///
    /// An empty fill ring drops packets without a word; keep it above half.
    ///
    /// # Panics
    /// If the pool is of another UMEM.
    pub fn fill(&mut self, pool: &mut Pool, want: u32) -> usize {
        self.queue.fill(pool, want)
    }

    /// Appends received packets to `out`; descriptors appended. Stops at `max` descriptors or, since a packet of
    /// several descriptors comes whole, at the end of the packet that goes past it.
    pub fn recv(&mut self, out: &mut impl Extend<Packet>, max: usize) -> usize {
        self.queue.recv(out, max)
    }

    /// Moves packets from the front of `packets` to the transmit ring; descriptors moved. What does not fit stays, a
    /// packet of several descriptors as a whole; so does a last one that has no end yet. Packets that the kernel would
    /// refuse are dropped and counted in [`Anomalies::send`]. [`Socket::kick`] afterwards.
    ///
    /// # Panics
    /// If a frame belongs to another UMEM.
    pub fn send(&mut self, packets: &mut VecDeque<Packet>) -> usize {
        self.queue.send(packets)
    }

    /// Gives the frames of transmitted packets back to the pool; how many.
    ///
    /// # Panics
    /// If the pool is of another UMEM.
    pub fn reclaim(&mut self, pool: &mut Pool) -> usize {
        self.queue.reclaim(pool)
    }

    /// Descriptors that [`Socket::send`] would take now.
    pub fn room(&mut self) -> usize {
        self.queue.room()
    }

    /// Lets the kernel transmit what `send` has queued. In copy mode this call does the work, in zero-copy mode it
    /// wakes the driver if that sleeps. Nothing queued: no system call.
    ///
    /// # Errors
    /// What is not mere back-pressure: the device is down or gone.
    pub fn kick(&mut self) -> Result<Kick, Error> {
        let mut unsent = self.queue.unsent();
        if self.zero_copy && self.need_wakeup && !self.queue.transmit_sleeps() {
            return Ok(Kick::Done);
        }
        while unsent > 0 {
            match rustix::net::send(&self.socket, &[], SendFlags::DONTWAIT) {
                Ok(_) if self.zero_copy => return Ok(Kick::Done),
                // Back-pressure, or a budget used up: progress tells which (`xsk_generic_xmit`).
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

    /// Makes the driver look at the rings after the first [`Socket::fill`]. It found the fill ring empty at the bind, and not
    /// every driver says then that it wants to be woken: it sleeps until it is.
    pub fn start(&self) {
        if self.zero_copy && self.need_wakeup {
            // A poll wakes for both directions. What is wrong with the device shows later, in `kick`.
            let _ = rustix::event::poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&Timespec::default()));
        }
        self.wake_rx();
    }

    /// Wakes a driver that sleeps because the fill ring ran empty. To be called after [`Socket::fill`].
    pub fn wake_rx(&self) {
        if self.need_wakeup && self.queue.fill_sleeps() {
            // Whatever is wrong with the device shows in `poll` and `kick`; there is nothing to receive here.
            let _ = rustix::net::recv(&self.socket, &mut [0; 0], RecvFlags::DONTWAIT);
        }
    }

    /// Frames that this socket holds: in the fill ring, under way in the kernel, in completions not yet reclaimed.
    pub fn in_kernel(&self) -> usize {
        self.queue.in_kernel()
    }

    /// Counters since the bind.
    ///
    /// # Errors
    /// The kernel's.
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

    /// Closes the socket and gives every frame to the pool that the kernel no longer uses. Waits up to 100 ms for
    /// packets in flight.
    ///
    /// In copy mode only transmit frames that were picked up and never completed stay lost. A zero-copy driver lets go
    /// of its frames some time after the close, without telling, and a bind on another thread may have the socket for a moment;
    /// [`Held::wait`] for those.
    ///
    /// # Panics
    /// If the pool is of another UMEM.
    pub fn close(mut self, pool: &mut Pool) -> Closed {
        let before = pool.free();
        let deadline = Instant::now() + LAST_COMPLETIONS;
        self.queue.reclaim(pool);
        while self.queue.sending() > 0 && Instant::now() < deadline && self.kick().is_ok() {
            // No event tells of a completion; its arrival is looked for each millisecond.
            let millisecond = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
            let _ = rustix::event::poll(&mut [PollFd::new(&self.socket, PollFlags::empty())], Some(&millisecond));
            self.queue.reclaim(pool);
        }
        let mut received = Vec::new();
        self.queue.recv(&mut received, usize::MAX);
        received.into_iter().for_each(|packet| pool.put(packet.frame));
        let Self { queue, socket, zero_copy, place, _umem: umem, .. } = self;
        let others = Arc::downgrade(&socket);
        // Whoever binds at this moment may still have it, to share its memory.
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
    /// Closes it as if a zero-copy driver had all its frames.
    pub(super) fn close_held(self) -> Held {
        let Self { queue, socket, place, _umem: umem, .. } = self;
        let others = Arc::downgrade(&socket);
        let frames = queue.abandon();
        drop(socket);
        Held::new(frames, others, place, umem)
    }

    /// What a bind has that shares its memory.
    pub(super) fn shared(&self) -> Arc<OwnedFd> {
        self.socket.clone()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The device's name for messages; its number where it has none any more.
pub(super) fn device_name(ifindex: u32) -> String {
    rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|socket| netdevice::index_to_name(socket, ifindex))
        .unwrap_or_else(|_| format!("device {ifindex}"))
}

/// Makes copy mode take a whole transmit ring at a time. Neither is needed for correctness, so neither may fail.
fn prepare_copies(socket: &OwnedFd, tx: u32, frame_size: u32) {
    // Each packet in flight is an skb charged to the send buffer, whose default holds less than a hundred of them.
    let octets = tx as usize * frame_size as usize;
    if sockopt::set_socket_send_buffer_size_force(socket, octets).is_err() {
        let _ = sockopt::set_socket_send_buffer_size(socket, octets);
    }
    if tx > DEFAULT_BUDGET {
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
