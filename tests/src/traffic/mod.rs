//! TCP and UDP load between two namespaces, with a figure every second.

mod udp;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::SOON;
use crate::namespace::Namespace;
use crate::process::patient;

pub use udp::{Pace, udp, udp_scattered};

/// The load that arrived in one second.
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

/// The result of a load.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Sum over all seconds.
    pub total: Second,
    /// UDP: datagrams sent.
    pub sent: u64,
    /// UDP: datagrams that arrived after a later one.
    pub reordered: u64,
    /// UDP: datagrams that arrived with wrong octets.
    pub damaged: u64,
}

impl Report {
    /// UDP: share of datagrams that did not arrive, 0 to 1.
    pub fn loss(&self) -> f64 {
        1.0 - self.total.datagrams as f64 / self.sent.max(1) as f64
    }

    /// UDP: datagrams sent a second; less than the requested rate if the sender was too slow.
    pub fn sent_a_second(&self) -> f64 {
        self.sent as f64 / self.total.length.as_secs_f64().max(1e-9)
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
    // Nothing is sent on this channel: it is a timer that does not drift.
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

/// Sends over `streams` TCP connections for `duration`, as fast as possible.
///
/// # Errors
/// No connection within [`SOON`].
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
            .run(|| TcpStream::connect_timeout(&target, patient(SOON)))
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
            // This does no harm to a connection that the peer has reset.
            let _ = sender.shutdown(Shutdown::Both);
            let _ = receiver.shutdown(Shutdown::Both);
        }
        Ok(total)
    })?;
    Ok(Report { total, ..Report::default() })
}

/// Sends a number of octets over one TCP connection and returns the octets that arrived.
///
/// # Errors
/// The connection cannot be made within [`SOON`], or stalls for that time.
pub fn tcp_transfer(from: &Namespace, (to, address): (&Namespace, Ipv4Addr), octets: &[u8]) -> Result<Vec<u8>> {
    let listener = to.run(|| TcpListener::bind((address, 0)))?;
    let target = listener.local_addr()?;
    let mut sender =
        from.run(|| TcpStream::connect_timeout(&target, patient(SOON))).with_context(|| format!("TCP to {target}"))?;
    let (mut receiver, _) = listener.accept()?;
    sender.set_write_timeout(Some(patient(SOON)))?;
    receiver.set_read_timeout(Some(patient(SOON)))?;
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
