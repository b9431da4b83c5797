//! ICMP echo by a raw socket: exact sizes, limited packets in flight, round-trip times.

use std::collections::BTreeMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, recv};
use socket2::{Domain, Protocol, Socket, Type};

use crate::namespace::Namespace;
use crate::net::{ICMP, Ipv4, checksum, pattern};
use crate::process::{patient, wait_readable};

/// Octets of the IPv4 and ICMP headers, the smallest ping.
pub const HEADERS: usize = 28;

/// The packets to send.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Total length in octets of each IP packet, at least [`HEADERS`]; one packet each, in order.
    pub sizes: Vec<usize>,
    /// Most unanswered packets before the next one waits: the limit of packets in flight.
    pub window: usize,
    /// Least time between two packets.
    pub interval: Duration,
    /// After this, a packet counts as lost.
    pub timeout: Duration,
}

impl Plan {
    /// `count` packets of 84 octets, as ping(8) sends them, one after the other.
    pub fn count(count: usize) -> Self {
        Self::sizes(vec![84; count])
    }

    /// One packet of each size, one after the other. The timeout suits answers that must arrive; a test that expects losses
    /// sets another one.
    pub fn sizes(sizes: Vec<usize>) -> Self {
        Self { sizes, window: 1, interval: Duration::ZERO, timeout: Duration::from_secs(10) }
    }
}

/// The result.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Packets sent.
    pub sent: usize,
    /// Round-trip times of the answered ones, sorted.
    pub times: Vec<Duration>,
    /// Sizes without an answer, or whose answer had other octets.
    pub lost: Vec<usize>,
    /// Answers whose octets differ from the request's.
    pub damaged: usize,
    /// Longest time without a right answer, from the first packet to the last answer.
    pub longest_gap: Duration,
}

impl Report {
    /// Packets with a right answer.
    pub fn received(&self) -> usize {
        self.times.len()
    }

    /// The round-trip time that a share `p` (0 to 1) of the answers did not exceed.
    pub fn quantile(&self, p: f64) -> Option<Duration> {
        let last = self.times.len().checked_sub(1)?;
        self.times.get((last as f64 * p).round() as usize).copied()
    }
}

/// Sends the packets of `plan` from `namespace` to `to` and waits for the answers.
///
/// # Errors
/// A raw socket cannot be opened. A packet that the kernel refuses to send counts as lost.
pub fn run(namespace: &Namespace, to: Ipv4Addr, plan: &Plan) -> io::Result<Report> {
    run_while(namespace, to, plan, || true)
}

/// Like [`run`], but ends early, after the outstanding answers, once `go_on` returns false; it is called before each packet.
///
/// # Errors
/// As [`run`].
pub fn run_while(namespace: &Namespace, to: Ipv4Addr, plan: &Plan, go_on: impl Fn() -> bool) -> io::Result<Report> {
    let socket = namespace.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)))?;
    socket.connect(&SocketAddr::from((to, 0)).into())?;
    socket.set_recv_buffer_size(1 << 20)?;
    let mut run = Run::new(socket);
    let (mut next_at, timeout) = (Instant::now(), patient(plan.timeout));
    let mut sizes = plan.sizes.iter().copied().take_while(|_| go_on()).peekable();
    loop {
        let now = Instant::now();
        run.expire(now, timeout);
        if run.in_flight.len() < plan.window && now >= next_at {
            if let Some(size) = sizes.next() {
                run.send(size, now);
                next_at = now + plan.interval;
                continue;
            }
            if run.in_flight.is_empty() {
                break;
            }
        }
        // The oldest packet's timeout, or the time of the next packet if the window has room for it.
        let oldest = run.in_flight.values().next().map(|(_, at)| *at + timeout);
        let next = (run.in_flight.len() < plan.window && sizes.peek().is_some()).then_some(next_at);
        let until = [oldest, next].into_iter().flatten().min().unwrap_or(next_at);
        if wait_readable(&run.socket, until)? {
            run.receive()?;
        }
    }
    run.report.times.sort();
    Ok(run.report)
}

/// Pings at each `interval` until one is answered; false if none was `within` that time.
///
/// # Errors
/// No raw socket.
pub fn wait_for_answer(namespace: &Namespace, to: Ipv4Addr, interval: Duration, within: Duration) -> io::Result<bool> {
    let socket = namespace.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)))?;
    let target = SocketAddr::from((to, 0)).into();
    let mut run = Run::new(socket);
    let mut next_at = Instant::now();
    let deadline = next_at + patient(within);
    while run.report.times.is_empty() {
        let now = Instant::now();
        if now >= deadline {
            return Ok(false);
        }
        if now >= next_at {
            // The kernel refuses it while there is no route.
            if run.socket.connect(&target).is_ok() {
                run.send(84, now);
            }
            next_at = now + interval;
        }
        if wait_readable(&run.socket, next_at.min(deadline))? {
            run.receive()?;
        }
    }
    Ok(true)
}

struct Run {
    socket: Socket,
    identifier: u16,
    /// By number of the packet: its size and when it was sent.
    in_flight: BTreeMap<u32, (usize, Instant)>,
    /// When the last right answer came, or the run began.
    answered: Instant,
    report: Report,
}

impl Run {
    fn new(socket: Socket) -> Self {
        let (in_flight, report) = (BTreeMap::new(), Report::default());
        Self { socket, identifier: rand::random(), in_flight, answered: Instant::now(), report }
    }

    fn send(&mut self, size: usize, now: Instant) {
        let number = self.report.sent as u32;
        let mut packet = vec![8, 0, 0, 0];
        packet.extend(self.identifier.to_be_bytes());
        packet.extend((number as u16).to_be_bytes());
        packet.extend(pattern(number, size - HEADERS));
        let sum = checksum(&packet);
        packet[2..4].copy_from_slice(&sum.to_be_bytes());
        self.report.sent += 1;
        match self.socket.send(&packet) {
            Ok(_) => _ = self.in_flight.insert(number, (size, now)),
            Err(_) => self.report.lost.push(size),
        }
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut buffer = [0; 1 << 16];
        loop {
            let length = match recv(&self.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((length, _)) => length,
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                // ICMP errors arrive here; their packet times out.
                Err(_) => continue,
            };
            let Some(packet) = Ipv4::parse(&buffer[..length]) else { continue };
            let [0, 0, _, _, i0, i1, n0, n1, ref payload @ ..] = *packet.payload else { continue };
            if packet.protocol != ICMP || u16::from_be_bytes([i0, i1]) != self.identifier {
                continue;
            }
            let low = u16::from_be_bytes([n0, n1]);
            let Some(number) = self.in_flight.keys().copied().find(|&number| number as u16 == low) else { continue };
            let Some((size, at)) = self.in_flight.remove(&number) else { continue };
            if payload == pattern(number, size - HEADERS) && checksum(packet.payload) == 0 {
                self.report.times.push(at.elapsed());
                self.report.longest_gap = self.report.longest_gap.max(self.answered.elapsed());
                self.answered = Instant::now();
            } else {
                self.report.damaged += 1;
                self.report.lost.push(size);
            }
        }
    }

    fn expire(&mut self, now: Instant, timeout: Duration) {
        while let Some(entry) = self.in_flight.first_entry()
            && now >= entry.get().1 + timeout
        {
            self.report.lost.push(entry.remove().0);
        }
    }
}
