//! UDP load: datagrams in batches, up to 64 of them in a system call at either end, without segmentation offload.

use std::io::{self, IoSliceMut};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::socket::sockopt::{RcvBufForce, SndBufForce};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, recvmmsg, setsockopt};
use rustix::net::addr::SocketAddrArg;
use rustix::net::{MMsgHdr, SendAncillaryBuffer, SendFlags, SocketAddrAny, sendmmsg};
use socket2::{Domain, Socket, Type};

use super::{Arrived, Report, Second, tick, watch};
use crate::namespace::Namespace;
use crate::net::pattern;

/// The rate of the sender.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// This number of datagrams a second, in bursts of at most 64 and at most a millisecond's share.
    Fixed(u64),
    /// As many as arrive: the rate starts here and grows in large steps until a datagram is lost; then it grows in small steps
    /// while fewer than one in 200 are lost, and falls while more are.
    Found(u64),
    /// As many as the sender's socket accepts.
    Flood,
}

impl Pace {
    /// The initial rate; `None`: no limit.
    fn rate(self) -> Option<f64> {
        match self {
            Self::Fixed(rate) | Self::Found(rate) => Some(rate.max(1) as f64),
            Self::Flood => None,
        }
    }
}

/// Most datagrams that are sent or received in one call.
const BATCH: usize = 64;
/// A late sender catches up with at most this number at once: bursts would measure queues, not the rate.
const MAX_CATCH_UP: Duration = Duration::from_millis(1);
/// How long the receiver waits for late datagrams.
const LATE_DATAGRAM_WAIT: Duration = Duration::from_millis(300);

/// Sends datagrams of `length` payload octets (at least 8) for `duration`; sequence numbers show the loss.
///
/// # Errors
/// A socket cannot be opened.
pub fn udp(
    from: &Namespace,
    (to, address): (&Namespace, Ipv4Addr),
    length: usize,
    pace: Pace,
    duration: Duration,
    on_second: impl FnMut(usize, Second),
) -> Result<Report> {
    let receiver = receiver(to, address)?;
    let sender = sender(from)?;
    sender.connect(&receiver.local_addr()?)?;
    Ok(load((&sender, &[]), &receiver, (length, pace), duration, on_second))
}

/// The same to many addresses of `to`: each datagram to one of them, picked at random.
///
/// # Errors
/// As [`udp`].
pub fn udp_scattered(
    from: &Namespace,
    (to, addresses): (&Namespace, &[Ipv4Addr]),
    length: usize,
    pace: Pace,
    duration: Duration,
) -> Result<Report> {
    let receiver = receiver(to, Ipv4Addr::UNSPECIFIED)?;
    let port = receiver.local_addr()?.as_socket_ipv4().map_or(0, |address| address.port());
    let targets: Vec<_> = addresses.iter().map(|address| SocketAddrV4::new(*address, port).as_any()).collect();
    Ok(load((&sender(from)?, &targets), &receiver, (length, pace), duration, |_, _| {}))
}

fn receiver(to: &Namespace, address: Ipv4Addr) -> Result<Socket> {
    let receiver = to.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None))?;
    // By force: a buffer of the default limit is full after two milliseconds.
    setsockopt(&receiver, RcvBufForce, &(8 << 20))?;
    receiver.bind(&SocketAddr::from((address, 0)).into())?;
    receiver.set_read_timeout(Some(LATE_DATAGRAM_WAIT))?;
    Ok(receiver)
}

fn sender(from: &Namespace) -> Result<Socket> {
    let sender = from.run(|| Socket::new(Domain::IPV4, Type::DGRAM, None))?;
    setsockopt(&sender, SndBufForce, &(4 << 20))?;
    Ok(sender)
}

/// Sends from a socket to its peer, or to `targets` if there are any.
fn load(
    (sender, targets): (&Socket, &[SocketAddrAny]),
    receiver: &Socket,
    (length, pace): (usize, Pace),
    duration: Duration,
    on_second: impl FnMut(usize, Second),
) -> Report {
    let (arrived, sent, done) = (Arrived::default(), AtomicU64::new(0), AtomicBool::new(false));
    let mut total = std::thread::scope(|scope| {
        let (arrived, sent, done) = (&arrived, &sent, &done);
        scope.spawn(|| receive(receiver, length, arrived, done));
        let (stop, stopped) = mpsc::channel();
        let sending = scope.spawn(move || {
            offer((sender, targets), length, pace, arrived, sent, &stopped);
            done.store(true, Relaxed);
        });
        let total = watch(arrived, duration, on_second);
        drop(stop);
        // The receiver ends by itself when no more datagrams arrive.
        let _ = sending.join();
        total
    });
    let all = arrived.second(total.length);
    (total.octets, total.datagrams) = (all.octets, all.datagrams);
    Report {
        total,
        sent: sent.into_inner(),
        reordered: arrived.reordered.into_inner(),
        damaged: arrived.damaged.into_inner(),
    }
}

fn receive(socket: &Socket, length: usize, arrived: &Arrived, done: &AtomicBool) {
    // One octet more than the sender uses, to detect a longer datagram.
    let mut buffers = vec![vec![0; length + 1]; BATCH];
    let mut headers = MultiHeaders::<SockaddrIn>::preallocate(BATCH, None);
    let mut lengths = Vec::with_capacity(BATCH);
    let tail = pattern(0, length - 8);
    let mut next = 0;
    loop {
        lengths.clear();
        let mut slices: Vec<_> = buffers.iter_mut().map(|buffer| [IoSliceMut::new(buffer)]).collect();
        match recvmmsg(socket.as_raw_fd(), &mut headers, &mut slices, MsgFlags::MSG_WAITFORONE, None) {
            Ok(messages) => lengths.extend(messages.map(|message| message.bytes)),
            Err(_) if done.load(Relaxed) => return,
            Err(_) => continue,
        }
        for (buffer, &got) in buffers.iter().zip(&lengths) {
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
    }
}

fn offer(
    (socket, targets): (&Socket, &[SocketAddrAny]),
    length: usize,
    pace: Pace,
    arrived: &Arrived,
    sent: &AtomicU64,
    stopped: &Receiver<()>,
) {
    // The default slack of 50 microseconds is half a batch's time at a high rate; if the smaller one cannot be set, the sender
    // is only late.
    let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1000));
    let mut packets: Vec<Vec<u8>> = vec![[vec![0; 8], pattern(0, length - 8)].concat(); BATCH];
    let mut rate = pace.rate();
    let mut step = 1.5;
    let mut number = 0_u64;
    let mut random = 0x9E37_79B9_7F4A_7C15;
    let mut due = Instant::now();
    let mut looked = (due, 0, 0, 0);
    while !tick(stopped, due) {
        let burst = rate.map_or(BATCH, |rate| ((rate / 1000.0) as usize).clamp(1, BATCH));
        for (place, packet) in packets[..burst].iter_mut().enumerate() {
            packet[..8].copy_from_slice(&(number + place as u64).to_be_bytes());
        }
        let taken = send(socket, targets, &mut random, &packets[..burst]);
        number += taken as u64;
        sent.store(number, Relaxed);
        let now = Instant::now();
        due = match rate {
            Some(rate) => (due + Duration::from_secs_f64(taken as f64 / rate)).max(now - MAX_CATCH_UP),
            None => now,
        };
        if let (Pace::Found(_), Some(rate)) = (pace, &mut rate)
            && now > looked.0 + Duration::from_millis(100)
        {
            let (got, lost) = (arrived.datagrams.load(Relaxed), arrived.lost.load(Relaxed));
            let (new, missing) = (got - looked.2, lost - looked.3);
            let offered = (number - looked.1) as f64 / (now - looked.0).as_secs_f64();
            if missing * 200 > new || new == 0 {
                (*rate, step) = ((*rate * 0.9).max(1000.0), 1.02);
            } else {
                // A sender that is too slow must not accumulate its delay.
                *rate = rate.min(offered * 1.1) * step;
            }
            looked = (now, number, got, lost);
        }
    }
}

/// Sends the packets and returns how many of them were sent. Packets that the kernel refuses count as sent, and so as lost: the
/// rate is then too high.
fn send(socket: &Socket, targets: &[SocketAddrAny], random: &mut u64, packets: &[Vec<u8>]) -> usize {
    let vectors: Vec<_> = packets.iter().map(|packet| [io::IoSlice::new(packet)]).collect();
    let mut ancillary: Vec<_> = packets.iter().map(|_| SendAncillaryBuffer::default()).collect();
    let mut messages = Vec::with_capacity(packets.len());
    for (vector, more) in vectors.iter().zip(&mut ancillary) {
        messages.push(match targets.len() as u64 {
            0 => MMsgHdr::new(vector, more),
            n => {
                // Xorshift: the numbers need not be secret, they only must not follow the order of the tunnels.
                *random ^= *random << 13;
                *random ^= *random >> 7;
                *random ^= *random << 17;
                MMsgHdr::new_with_addr(&targets[(*random % n) as usize], vector, more)
            }
        });
    }
    sendmmsg(socket, &mut messages, SendFlags::empty()).unwrap_or(packets.len())
}
