//! A bad carrier: a UDP relay between two ends that loses, duplicates, damages, delays and reorders datagrams.
//!
//! Each end has the relay as its peer. The fate of a datagram depends only on its direction, its number in that direction and
//! the seed: the same datagrams in the same order have the same fates at any speed. The relay counts and records datagrams, so
//! that a scenario can compare them with the counters of both ends.

use std::collections::VecDeque;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;

/// Most datagrams read in a row from one side.
const BURST: usize = 64;
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

/// One direction.
struct Lane {
    rng: StdRng,
    held: VecDeque<Held>,
    /// When a line with a rate limit has sent all that it has accepted.
    free: Instant,
}

impl Lane {
    /// Returns when a datagram of `octets` octets that arrives now leaves the line; `None`: the queue has no room for it.
    fn leaves(&mut self, octets: usize, rate: Option<Rate>, now: Instant) -> Option<Instant> {
        let Some(Rate { octets: a_second, queue }) = rate else { return Some(now) };
        let begins = self.free.max(now);
        if begins - now > queue {
            return None;
        }
        self.free = begins + Duration::from_secs(1) * (octets + HEADERS) as u32 / a_second;
        Some(self.free)
    }
}

/// A waiting datagram.
struct Held {
    datagram: Vec<u8>,
    damaged: bool,
    /// Number of datagrams that must still overtake it.
    overtaken_by: usize,
    /// Earliest time to forward it.
    ready: Instant,
}

impl Held {
    /// Latest time to forward it.
    fn due(&self) -> Instant {
        if self.overtaken_by > 0 { self.ready + Impairment::PATIENCE } else { self.ready }
    }
}

struct Worker {
    sockets: [UdpSocket; 2],
    ends: [SocketAddr; 2],
    lanes: [Lane; 2],
    shared: Arc<Shared>,
    wake: Arc<OwnedFd>,
}

impl Worker {
    fn run(mut self) -> io::Result<()> {
        let mut buffer = vec![0; 65_536];
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.wait()?;
            if let Some((side, socket)) = self.shared.lock().moved.take() {
                self.sockets[side] = socket;
            }
            for side in [0, 1] {
                for _ in 0..BURST {
                    match self.sockets[side].recv_from(&mut buffer) {
                        Ok((length, from)) => {
                            self.ends[side] = from;
                            self.take(side, buffer[..length].to_vec());
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                        // An ICMP error about an end that does not exist.
                        Err(_) => {}
                    }
                }
                self.release(side);
            }
        }
        Ok(())
    }

    fn wait(&self) -> io::Result<()> {
        let mut count = [0; 8];
        let due = self.lanes.iter().flat_map(|lane| &lane.held).map(Held::due).min();
        let timeout = due.and_then(|due| Timespec::try_from(due.saturating_duration_since(Instant::now())).ok());
        let fds = [self.sockets[0].as_fd(), self.sockets[1].as_fd(), self.wake.as_fd()];
        let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let _ = rustix::io::read(&self.wake, &mut count);
        Ok(())
    }

    /// Decides the fate of a datagram from `side`.
    fn take(&mut self, side: usize, mut datagram: Vec<u8>) {
        let mut state = self.shared.lock();
        let impairment = state.impairment;
        let recent = &mut state.recent[side];
        recent.push_back(datagram.clone());
        if recent.len() > RECENT_DATAGRAMS {
            recent.pop_front();
        }
        let passed = &mut state.passed[side];
        passed.received += 1;
        let lane = &mut self.lanes[side];
        for held in &mut lane.held {
            held.overtaken_by = held.overtaken_by.saturating_sub(1);
        }
        let fate = impairment.fate(&mut lane.rng);
        if fate.lost {
            passed.lost += 1;
            return;
        }
        let Some(left) = lane.leaves(datagram.len(), impairment.rate, Instant::now()) else {
            passed.lost += 1;
            return;
        };
        let damaged = fate.damaged.is_some() && !datagram.is_empty();
        if let Some(bit) = fate.damaged.filter(|_| damaged) {
            let bit = bit as usize % (datagram.len() * 8);
            datagram[bit / 8] ^= 1 << (bit % 8);
        }
        passed.doubled += u64::from(fate.doubled && !damaged);
        passed.overtaken += u64::from(fate.overtaken_by > 0);
        let ready = left + impairment.delay;
        for _ in 0..=usize::from(fate.doubled) {
            let datagram = datagram.clone();
            lane.held.push_back(Held { datagram, damaged, overtaken_by: fate.overtaken_by, ready });
        }
        state.waiting = self.lanes.iter().map(|lane| lane.held.len()).sum();
    }

    /// Forwards datagrams from `side` that are due, in the order of arrival, except those that wait to be overtaken.
    fn release(&mut self, side: usize) {
        let now = Instant::now();
        let other = 1 - side;
        let mut at = 0;
        while let Some(held) = self.lanes[side].held.get(at) {
            if held.due() > now {
                at += 1;
                continue;
            }
            let Some(held) = self.lanes[side].held.remove(at) else { break };
            let sent = self.sockets[other].send_to(&held.datagram, self.ends[other]);
            let mut state = self.shared.lock();
            state.waiting = state.waiting.saturating_sub(1);
            let passed = &mut state.passed[side];
            match sent {
                Ok(_) => {
                    passed.sent += 1;
                    passed.damaged += u64::from(held.damaged);
                }
                Err(_) => passed.refused += 1,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Bench {
        ends: [UdpSocket; 2],
        relay: Relay,
        inner: [SocketAddr; 2],
    }

    fn bench(seed: u64) -> Bench {
        let socket = || UdpSocket::bind("127.0.0.1:0").expect("loopback has ports");
        let (ends, inside) = ([socket(), socket()], [socket(), socket()]);
        let address = |socket: &UdpSocket| socket.local_addr().expect("a bound socket has an address");
        for end in &ends {
            end.set_read_timeout(Some(crate::process::patient(crate::SOON))).expect("a wait is not zero");
        }
        let inner = [address(&inside[0]), address(&inside[1])];
        let relay = Relay::start(inside, [address(&ends[0]), address(&ends[1])], seed).expect("a relay");
        Bench { ends, relay, inner }
    }

    impl Bench {
        /// Sends numbers from side 0 one by one and returns what arrives until the relay is empty.
        fn run(&self, count: u8) -> Vec<Vec<u8>> {
            for number in 0..count {
                self.ends[0].send_to(&[number; 20], self.inner[0]).expect("loopback takes it");
            }
            let mut arrived = Vec::new();
            loop {
                let passed = self.relay.passed()[0];
                if passed.received == u64::from(count)
                    && self.relay.waiting() == 0
                    && arrived.len() as u64 == passed.sent
                {
                    return arrived;
                }
                let mut buffer = [0; 64];
                self.ends[1].set_read_timeout(Some(Duration::from_millis(10))).expect("a wait is not zero");
                if let Ok(length) = self.ends[1].recv(&mut buffer) {
                    arrived.push(buffer[..length].to_vec());
                }
            }
        }
    }

    #[test]
    fn a_relay_without_impairment_passes_everything_in_order() {
        let bench = bench(1);
        let arrived = bench.run(200);
        assert!(arrived.iter().zip(0..200_u8).all(|(got, number)| *got == [number; 20]));
        assert_eq!(arrived.len(), 200);
        bench.ends[1].send_to(b"back", bench.inner[1]).expect("loopback takes it");
        let mut buffer = [0; 64];
        assert_eq!(bench.ends[0].recv(&mut buffer).expect("it comes back"), 4);
    }

    #[test]
    fn the_same_seed_gives_the_same_fates() {
        let impairment = Impairment { loss: 0.2, duplication: 0.1, corruption: 0.1, ..Impairment::default() };
        let [one, same, other] = [7, 7, 8].map(|seed| {
            let bench = bench(seed);
            bench.relay.impair(impairment);
            bench.run(200)
        });
        assert_eq!(one, same);
        assert_ne!(one, other);
    }

    #[test]
    fn what_is_done_is_counted() {
        let bench = bench(3);
        bench.relay.impair(Impairment { loss: 0.2, duplication: 0.2, corruption: 0.2, ..Impairment::default() });
        let arrived = bench.run(250);
        let passed = bench.relay.passed()[0];
        assert_eq!(passed.sent, arrived.len() as u64);
        let sound = |datagram: &[u8]| datagram.iter().all(|octet| *octet == datagram[0]);
        assert_eq!(passed.damaged, arrived.iter().filter(|datagram| !sound(datagram)).count() as u64);
        assert!(passed.lost > 20 && passed.doubled > 10 && passed.damaged > 20, "{passed:?}");
        assert_eq!(bench.relay.recent(0).len(), 250);
    }

    #[test]
    fn a_narrow_line_takes_its_time_for_each_octet_and_loses_what_finds_no_room() {
        let (now, rate) = (Instant::now(), Rate { octets: 100_000, queue: Duration::from_millis(25) });
        let mut lane = Lane { rng: StdRng::seed_from_u64(1), held: VecDeque::new(), free: now };
        let mut leaves = |after| {
            let at = now + Duration::from_millis(after);
            lane.leaves(1_000 - HEADERS, Some(rate), at).map(|left| (left - now).as_millis())
        };
        assert_eq!([0, 0, 0, 0].map(&mut leaves), [Some(10), Some(20), Some(30), None]);
        assert_eq!([5, 5, 100].map(&mut leaves), [Some(40), None, Some(110)]);
        assert_eq!(lane.leaves(70_000, None, now), Some(now));
    }

    #[test]
    fn reordered_datagrams_are_overtaken_and_none_is_lost() {
        let bench = bench(4);
        bench.relay.impair(Impairment { reorder: 0.2, span: 5, ..Impairment::default() });
        let mut arrived = bench.run(250);
        assert!(!arrived.is_sorted());
        arrived.sort();
        assert!(arrived.iter().zip(0..250_u8).all(|(got, number)| *got == [number; 20]));
    }
}
