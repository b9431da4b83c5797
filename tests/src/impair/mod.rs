//! A bad carrier: a UDP relay between two ends that loses, duplicates, damages, delays and reorders datagrams.
//!
//! Each end has the relay as its peer. The fate of a datagram depends only on its direction, its number in that direction and
//! the seed: the same datagrams in the same order have the same fates at any speed. The relay counts and records datagrams, so
//! that a scenario can compare them with the counters of both ends. An [`Attack`] takes the place of chance: it decides what goes on
//! in the place of each datagram.

mod worker;

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

use self::worker::{Lane, Worker};

/// Datagrams recorded for [`Relay::recent`].
const RECENT_DATAGRAMS: usize = 256;

/// Impairments of datagrams; shares are from 0 to 1.
#[derive(Clone, Copy, Debug, Default)]
pub struct Impairment {
    /// Share that is lost.
    pub loss: f64,
    /// Share that is duplicated.
    pub duplication: f64,
    /// Share with one bit inverted.
    pub corruption: f64,
    /// Share that is overtaken by later datagrams.
    pub reorder: f64,
    /// How many datagrams overtake it, if as many arrive within [`Self::PATIENCE`].
    pub span: usize,
    /// Delay of every datagram.
    pub delay: Duration,
    /// Rate limit of the line; `None`: no limit.
    pub rate: Option<Rate>,
}

/// The rate limit of a line, for each direction.
#[derive(Clone, Copy, Debug)]
pub struct Rate {
    /// Rate of IP packets, in octets a second.
    pub octets: u32,
    /// Longest time that a datagram waits in the queue; one that would wait longer is lost.
    pub queue: Duration,
}

/// Octets of the IPv4 and UDP headers, which a line carries in addition to a datagram.
const HEADERS: usize = 28;

/// Receive buffer of the relay's sockets in octets, as the kernel counts them.
const RECEIVE_BUFFER: usize = 8 << 20;

impl Impairment {
    /// Longest time that a datagram waits for others to overtake it.
    pub const PATIENCE: Duration = Duration::from_millis(50);

    fn fate(&self, rng: &mut StdRng) -> Fate {
        // Draw the same number of values for each datagram, whatever its fate.
        let [loss, duplication, corruption, reorder]: [f64; 4] = std::array::from_fn(|_| rng.random());
        let bit = rng.random();
        Fate {
            lost: loss < self.loss,
            doubled: duplication < self.duplication,
            damaged: (corruption < self.corruption).then_some(bit),
            overtaken_by: if reorder < self.reorder { self.span } else { 0 },
        }
    }
}

/// The fate of one datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fate {
    lost: bool,
    doubled: bool,
    /// Selects the bit.
    damaged: Option<u32>,
    overtaken_by: usize,
}

/// Counts of one direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Datagrams received.
    pub received: u64,
    /// Datagrams lost, also for lack of room on a line with a rate limit.
    pub lost: u64,
    /// Datagrams forwarded twice, both copies undamaged.
    pub doubled: u64,
    /// Damaged datagrams forwarded, copies included.
    pub damaged: u64,
    /// Datagrams that waited to be overtaken.
    pub overtaken: u64,
    /// Datagrams forwarded, copies included.
    pub sent: u64,
    /// Datagrams that the kernel refused to send, because of an ICMP error or a full buffer.
    pub refused: u64,
}

/// Somebody on the path: gets each datagram with the side that it came from, and returns those that go on in its place, each with the
/// side that it seems to come from.
pub type Attack = Box<dyn FnMut(usize, Vec<u8>) -> Vec<(usize, Vec<u8>)> + Send>;

/// A running relay between side 0 and side 1; ends when dropped.
pub struct Relay {
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    stop: AtomicBool,
}

#[derive(Default)]
struct State {
    impairment: Impairment,
    passed: [Passed; 2],
    recent: [VecDeque<Vec<u8>>; 2],
    waiting: usize,
    /// A socket that replaces the one of a side.
    moved: Option<(usize, UdpSocket)>,
    attack: Option<Attack>,
    /// Datagrams to send as if they had come from a side.
    injected: Vec<(usize, Vec<u8>)>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Relay {
    /// Starts between two bound sockets. A datagram received on `sockets[0]` leaves by `sockets[1]` to `ends[1]`, and the other
    /// way round; if an end sends from a new address, the relay sends to that address from then on.
    ///
    /// # Errors
    /// Sockets that cannot be made non-blocking, or no thread or event descriptor.
    pub fn start(sockets: [UdpSocket; 2], ends: [SocketAddr; 2], seed: u64) -> io::Result<Self> {
        for socket in &sockets {
            socket.set_nonblocking(true)?;
            // The line's limit must drop bursts, not a buffer that fills on a busy machine.
            set_socket_recv_buffer_size_force(socket, RECEIVE_BUFFER)?;
        }
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let shared = Arc::new(Shared::default());
        let lane = |side: u64| Lane {
            // Each direction has its own random numbers, so that the other direction's traffic does not change them.
            rng: StdRng::seed_from_u64(seed.wrapping_mul(2).wrapping_add(side)),
            held: VecDeque::new(),
            free: Instant::now(),
        };
        let worker = Worker { sockets, ends, lanes: [lane(0), lane(1)], shared: shared.clone(), wake: wake.clone() };
        let thread = std::thread::Builder::new().name("relay".into()).spawn(move || worker.run())?;
        Ok(Self { shared, wake, thread: Some(thread) })
    }

    /// Sets the impairments of datagrams from now on.
    pub fn impair(&self, impairment: Impairment) {
        self.shared.lock().impairment = impairment;
    }

    /// Lets somebody decide about each datagram from now on, instead of chance; `None`: chance again.
    pub fn attack(&self, attack: Option<Attack>) {
        self.shared.lock().attack = attack;
    }

    /// Sends datagrams as if they had come from `side`, from the address that the other end knows. [`Passed::sent`] counts them.
    pub fn inject(&self, side: usize, datagrams: impl IntoIterator<Item = Vec<u8>>) {
        let mut state = self.shared.lock();
        let before = state.injected.len();
        state.injected.extend(datagrams.into_iter().map(|datagram| (side, datagram)));
        state.waiting += state.injected.len() - before;
        drop(state);
        self.rouse();
    }

    /// Counts of the datagrams from side 0, and of those from side 1.
    pub fn passed(&self) -> [Passed; 2] {
        self.shared.lock().passed
    }

    /// Datagrams that wait to be forwarded.
    pub fn waiting(&self) -> usize {
        self.shared.lock().waiting
    }

    /// The last datagrams received from a side, also those that were lost, unchanged, the oldest first.
    pub fn recent(&self, side: usize) -> Vec<Vec<u8>> {
        self.shared.lock().recent[side].iter().cloned().collect()
    }

    /// Forgets the datagrams recorded so far.
    pub fn forget_recent(&self) {
        self.shared.lock().recent = Default::default();
    }

    /// Replaces the socket towards the end on `side`, as a NAT that has lost its mapping.
    ///
    /// # Errors
    /// A socket that cannot be made non-blocking, or that gets no larger buffer.
    pub fn rebind(&self, side: usize, socket: UdpSocket) -> io::Result<()> {
        socket.set_nonblocking(true)?;
        set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER)?;
        self.shared.lock().moved = Some((side, socket));
        self.rouse();
        Ok(())
    }

    fn rouse(&self) {
        // A full descriptor wakes the thread anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.rouse();
        if let Some(thread) = self.thread.take() {
            match thread.join() {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("relay: {error}"),
                Err(_) => eprintln!("relay: its thread panicked"),
            }
        }
    }
}

#[cfg(test)]
mod tests;
