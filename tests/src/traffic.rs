//! TCP and UDP load between two namespaces, with a figure every second.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, sendmmsg};
use socket2::{Domain, Socket, Type};

use crate::namespace::Namespace;
use crate::net::pattern;

/// What arrived in one second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Second {
    /// Length of the interval, about a second.
    pub length: Duration,
    /// Payload octets that arrived.
    pub octets: u64,
    /// Datagrams that arrived; 0 for TCP.
    pub datagrams: u64,
}

impl Second {
    /// Payload in megabits a second.
    pub fn mbit(&self) -> f64 {
        self.octets as f64 * 8e-6 / self.length.as_secs_f64().max(1e-9)
    }

    /// Datagrams a second.
    pub fn datagrams_a_second(&self) -> f64 {
        self.datagrams as f64 / self.length.as_secs_f64().max(1e-9)
    }
}

/// What came of a load.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Sum over all seconds.
    pub total: Second,
    /// UDP: datagrams sent.
    pub sent: u64,
    /// UDP: datagrams that arrived behind a later one.
    pub reordered: u64,
    /// UDP: datagrams whose octets were not those that were sent.
    pub damaged: u64,
}

impl Report {
    /// UDP: share of datagrams that did not arrive, 0 to 1.
    pub fn loss(&self) -> f64 {
        1.0 - self.total.datagrams as f64 / self.sent.max(1) as f64
    }
}

#[derive(Default)]
struct Arrived {
    octets: AtomicU64,
    datagrams: AtomicU64,
    lost: AtomicU64,
    reordered: AtomicU64,
    damaged: AtomicU64,
}

impl Arrived {
    fn second(&self, length: Duration) -> Second {
        Second { length, octets: self.octets.load(Relaxed), datagrams: self.datagrams.load(Relaxed) }
    }
}

/// Calls `on_second` about once a second until `duration` has passed; returns the sum.
fn watch(arrived: &Arrived, duration: Duration, mut on_second: impl FnMut(usize, Second)) -> Second {
    // Nothing is ever sent here: the channel is a timer that does not drift.
    let (_keep, timer) = mpsc::channel::<()>();
    let (start, first) = (Instant::now(), arrived.second(Duration::ZERO));
    let mut last = first;
    for number in 1.. {
        let due = Duration::from_secs(number as u64).min(duration);
        tick(&timer, start + due);
        let now = arrived.second(start.elapsed());
        on_second(number, difference(now, last));
        last = now;
        if due == duration {
            break;
        }
    }
    difference(last, first)
}

fn difference(now: Second, before: Second) -> Second {
    Second {
        length: now.length - before.length,
        octets: now.octets - before.octets,
        datagrams: now.datagrams - before.datagrams,
    }
}

/// Waits until `until`; true if the other end of the channel was dropped before.
fn tick(timer: &Receiver<()>, until: Instant) -> bool {
    let left = until.saturating_duration_since(Instant::now());
    timer.recv_timeout(left) == Err(RecvTimeoutError::Disconnected)
}

/// Sends over `streams` TCP connections for `duration`, as fast as they take it.
///
/// # Errors
/// A connection that cannot be made within ten seconds.
pub fn tcp(
    from: &Namespace,
    (to, address): (&Namespace, Ipv4Addr),
    streams: usize,
    duration: Duration,
    on_second: impl FnMut(usize, Second),
) -> Result<Report> {
    let listener = to.run(|| TcpListener::bind((address, 0)))?;
    let target = listener.local_addr()?;
    let mut pairs = Vec::new();
    for _ in 0..streams {
        // Accepting cannot block: the kernel has finished the handshake before connect returns.
        let sender = from
            .run(|| TcpStream::connect_timeout(&target, Duration::from_secs(10)))
            .with_context(|| format!("TCP to {target}"))?;
        pairs.push((sender, listener.accept()?.0));
    }
    let arrived = Arrived::default();
    let total = std::thread::scope(|scope| -> io::Result<Second> {
        let arrived = &arrived;
        for (sender, receiver) in &pairs {
            scope.spawn(move || {
                let block = vec![0x55; 128 * 1024];
                // Ends when the connection is shut down below.
                while { sender }.write_all(&block).is_ok() {}
            });
            scope.spawn(move || {
                let mut block = vec![0; 256 * 1024];
                while let Ok(length @ 1..) = { receiver }.read(&mut block) {
                    arrived.octets.fetch_add(length as u64, Relaxed);
                }
            });
        }
        let total = watch(arrived, duration, on_second);
        for (sender, receiver) in &pairs {
            // One that the peer has reset already is shut down, too.
            let _ = sender.shutdown(Shutdown::Both);
            let _ = receiver.shutdown(Shutdown::Both);
        }
        Ok(total)
    })?;
    Ok(Report { total, ..Report::default() })
}

/// Sends a number of octets over one TCP connection and returns what came out at the other end.
///
/// # Errors
/// A connection that cannot be made, or that stands still for a minute.
pub fn tcp_transfer(from: &Namespace, (to, address): (&Namespace, Ipv4Addr), octets: &[u8]) -> Result<Vec<u8>> {
    let listener = to.run(|| TcpListener::bind((address, 0)))?;
    let target = listener.local_addr()?;
    let mut sender = from
        .run(|| TcpStream::connect_timeout(&target, Duration::from_secs(10)))
        .with_context(|| format!("TCP to {target}"))?;
    let (mut receiver, _) = listener.accept()?;
    sender.set_write_timeout(Some(Duration::from_secs(60)))?;
    receiver.set_read_timeout(Some(Duration::from_secs(60)))?;
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || -> io::Result<()> {
            sender.write_all(octets)?;
            sender.shutdown(Shutdown::Write)
        });
        let mut got = Vec::with_capacity(octets.len());
        receiver.read_to_end(&mut got).with_context(|| format!("after {} octets", got.len()))?;
        sending.join().unwrap_or_else(|_| Err(io::Error::other("the sending thread panicked")))?;
        Ok(got)
    })
}

/// How fast UDP is offered.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// So many datagrams a second.
    Fixed(u64),
    /// As many as arrive: from this rate up in great steps until something is lost; then up in small steps while under one
    /// in 200 is lost, and down while more.
    Found(u64),
}

/// Datagrams that leave together.
const BATCH: usize = 64;
/// How long the receiver listens for stragglers.
const STRAGGLERS: Duration = Duration::from_millis(300);

/// Sends datagrams of `length` payload octets (at least 8) for `duration`; loss is read off sequence numbers.
///
/// # Errors
/// Sockets that cannot be had.
pub fn udp(
    from: &Namespace,
    (to, address): (&Namespace, Ipv4Addr),
    length: usize,
    pace: Pace,
    duration: Duration,
    on_second: impl FnMut(usize, Second),
) -> Result<Report> {
    let receiver = to.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None))?;
    receiver.set_recv_buffer_size(8 << 20)?;
    receiver.bind(&SocketAddr::from((address, 0)).into())?;
    receiver.set_read_timeout(Some(STRAGGLERS))?;
    let target = receiver.local_addr()?;
    let sender = from.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None))?;
    sender.connect(&target)?;
    sender.set_send_buffer_size(4 << 20)?;
    let (arrived, sent, done) = (Arrived::default(), AtomicU64::new(0), AtomicBool::new(false));
    let mut total = std::thread::scope(|scope| {
        let (arrived, sent, done) = (&arrived, &sent, &done);
        scope.spawn(|| receive(&receiver, length, arrived, done));
        let (stop, stopped) = mpsc::channel();
        let sending = scope.spawn(move || {
            offer(&sender, length, pace, arrived, sent, &stopped);
            done.store(true, Relaxed);
        });
        let total = watch(arrived, duration, on_second);
        drop(stop);
        // The receiver ends by itself once nothing comes any more.
        let _ = sending.join();
        total
    });
    let all = arrived.second(total.length);
    (total.octets, total.datagrams) = (all.octets, all.datagrams);
    Ok(Report {
        total,
        sent: sent.into_inner(),
        reordered: arrived.reordered.into_inner(),
        damaged: arrived.damaged.into_inner(),
    })
}

fn receive(socket: &Socket, length: usize, arrived: &Arrived, done: &AtomicBool) {
    let mut buffer = vec![0; 1 << 16];
    let tail = pattern(0, length - 8);
    let mut next = 0;
    loop {
        match { socket }.read(&mut buffer) {
            Ok(got) => {
                let (Some(head), Some(rest)) = (buffer.first_chunk::<8>(), buffer.get(8..got)) else { continue };
                if rest != tail {
                    arrived.damaged.fetch_add(1, Relaxed);
                    continue;
                }
                let number = u64::from_be_bytes(*head);
                if number >= next {
                    arrived.lost.fetch_add(number - next, Relaxed);
                    next = number + 1;
                } else {
                    arrived.reordered.fetch_add(1, Relaxed);
                }
                arrived.octets.fetch_add(got as u64, Relaxed);
                arrived.datagrams.fetch_add(1, Relaxed);
            }
            Err(_) if done.load(Relaxed) => return,
            Err(_) => {}
        }
    }
}

fn offer(socket: &Socket, length: usize, pace: Pace, arrived: &Arrived, sent: &AtomicU64, stopped: &Receiver<()>) {
    let mut packets: Vec<Vec<u8>> = vec![[vec![0; 8], pattern(0, length - 8)].concat(); BATCH];
    let mut rate = match pace {
        Pace::Fixed(rate) | Pace::Found(rate) => rate as f64,
    };
    let mut step = 1.5;
    let mut number = 0_u64;
    let mut due = Instant::now();
    let mut looked = (due, 0, 0, 0);
    while !tick(stopped, due) {
        for packet in &mut packets {
            packet[..8].copy_from_slice(&number.to_be_bytes());
            number += 1;
        }
        let vectors: Vec<_> = packets.iter().map(|packet| [io::IoSlice::new(packet)]).collect();
        let mut ancillary: Vec<_> = (0..BATCH).map(|_| SendAncillaryBuffer::default()).collect();
        let mut messages: Vec<_> =
            vectors.iter().zip(&mut ancillary).map(|(vector, more)| MMsgHdr::new(vector, more)).collect();
        // What a full buffer does not take counts as sent and lost: the rate is then too high.
        let _ = sendmmsg(socket, &mut messages, SendFlags::empty());
        sent.store(number, Relaxed);
        due += Duration::from_secs_f64(BATCH as f64 / rate);
        let now = Instant::now();
        if let Pace::Found(_) = pace
            && now > looked.0 + Duration::from_millis(100)
        {
            let (got, lost) = (arrived.datagrams.load(Relaxed), arrived.lost.load(Relaxed));
            let (new, missing) = (got - looked.2, lost - looked.3);
            let offered = (number - looked.1) as f64 / (now - looked.0).as_secs_f64();
            if missing * 200 > new || new == 0 {
                (rate, step) = ((rate * 0.9).max(1000.0), 1.02);
            } else {
                // A sender that cannot keep its rate must not run away from it.
                rate = rate.min(offered * 1.1) * step;
            }
            (looked, due) = ((now, number, got, lost), due.max(now));
        }
    }
}
