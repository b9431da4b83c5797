//! What may be on the carrier: sealed datagrams, ARP, and ICMP errors about datagrams. Nothing else, ever.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::capture::Capture;
use crate::net::{ETHERTYPE_ARP, ETHERTYPE_IPV4, Frame, ICMP, Ipv4, UDP, in_clear};
use crate::options::PORT;
use crate::topology::Topology;

/// A frame of the carrier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// A datagram from or to the port of a gateway, or a later fragment of one.
    Sealed,
    Arp,
    /// An ICMP error about such a datagram.
    Error,
    /// Something that must not be here.
    Foreign,
}

/// Networks of hosts and of the tunnel: their packets are private.
const PRIVATE: [[u8; 2]; 2] = [[10, 210], [10, 201]];

fn classify(frame: &[u8]) -> Seen {
    let Some(frame) = Frame::parse(frame) else { return Seen::Foreign };
    match frame.kind {
        ETHERTYPE_ARP => Seen::Arp,
        ETHERTYPE_IPV4 => of_ipv4(&frame),
        _ => Seen::Foreign,
    }
}

fn of_ipv4(frame: &Frame<'_>) -> Seen {
    let Some(packet) = frame.ipv4() else { return Seen::Foreign };
    let is_private = |octets: [u8; 4]| PRIVATE.iter().any(|network| octets.starts_with(network));
    if is_private(packet.source.octets()) || is_private(packet.destination.octets()) || in_clear(frame.payload) {
        return Seen::Foreign;
    }
    let is_later_fragment = u16::from_be_bytes([frame.payload[6], frame.payload[7]]) & 0x1FFF != 0;
    match packet.protocol {
        UDP if is_later_fragment => Seen::Sealed,
        UDP if of_gateway(packet.payload) => Seen::Sealed,
        ICMP if is_error(&packet) => Seen::Error,
        _ => Seen::Foreign,
    }
}

/// Whether a UDP header names the port of a gateway.
fn of_gateway(header: &[u8]) -> bool {
    let [s0, s1, d0, d1, ..] = *header else { return false };
    [u16::from_be_bytes([s0, s1]), u16::from_be_bytes([d0, d1])].contains(&PORT)
}

/// Whether it is an error (unreachable, redirect, time exceeded) about a datagram of a tunnel.
fn is_error(packet: &Ipv4<'_>) -> bool {
    let [3 | 5 | 11, _, _, _, _, _, _, _, ref quoted @ ..] = *packet.payload else { return false };
    let header = quoted.first().map_or(0, |first| usize::from(first & 15) * 4);
    quoted.get(9) == Some(&UDP) && quoted.get(header..).is_some_and(of_gateway)
}

#[derive(Default)]
struct Counts {
    sealed: AtomicU64,
    arp: AtomicU64,
    errors: AtomicU64,
    foreign: AtomicU64,
    first: Mutex<Option<Vec<u8>>>,
}

/// A look at every frame of the carrier, as long as it lives.
pub(super) struct Watch {
    capture: Capture,
    counts: Arc<Counts>,
    missed: u64,
}

/// Frames so far.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Frames {
    /// Sealed datagrams.
    pub(super) sealed: u64,
    /// ARP.
    pub(super) arp: u64,
    /// ICMP errors.
    pub(super) errors: u64,
    /// Frames that must not be there.
    pub(super) foreign: u64,
    /// Frames that the kernel did not show.
    pub(super) missed: u64,
}

impl Watch {
    /// Starts to look.
    ///
    /// # Errors
    /// There is no tap, or a packet socket cannot be opened.
    pub(super) fn start(net: &Topology) -> Result<Self> {
        let counts = Arc::<Counts>::default();
        let counting = counts.clone();
        let capture = Capture::start(net.tap().context("a tapped carrier has a tap")?, 0, move |frame| {
            match classify(frame) {
                Seen::Sealed => counting.sealed.fetch_add(1, Relaxed),
                Seen::Arp => counting.arp.fetch_add(1, Relaxed),
                Seen::Error => counting.errors.fetch_add(1, Relaxed),
                Seen::Foreign => {
                    let mut first = counting.first.lock().unwrap_or_else(PoisonError::into_inner);
                    first.get_or_insert_with(|| frame.to_vec());
                    counting.foreign.fetch_add(1, Relaxed)
                }
            };
            false
        })?;
        Ok(Self { capture, counts, missed: 0 })
    }

    /// The frames so far.
    ///
    /// # Errors
    /// The kernel does not tell how many it did not show.
    pub(super) fn frames(&mut self) -> Result<Frames> {
        self.missed += u64::from(self.capture.missed()?);
        let Counts { sealed, arp, errors, foreign, .. } = &*self.counts;
        let [sealed, arp, errors, foreign] = [sealed, arp, errors, foreign].map(|count| count.load(Relaxed));
        Ok(Frames { sealed, arp, errors, foreign, missed: self.missed })
    }

    /// The first frame that must not be there, in hexadecimal digits.
    pub(super) fn first_foreign(&self) -> Option<String> {
        self.counts.first.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(hex::encode)
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::*;
    use crate::forged::{ATTACKER, PORT_UNREACHABLE, TO_THE_PEER, datagram, packet, unreachable};
    use crate::net::pattern;
    use crate::topology::Side;

    fn framed(packet: &[u8]) -> Vec<u8> {
        [&[0; 12][..], &ETHERTYPE_IPV4.to_be_bytes(), packet].concat()
    }

    #[test]
    fn sealed_datagrams_and_errors_about_them_may_be_there() {
        let (a, b) = (SocketAddrV4::new(Side::A.carrier(), PORT), SocketAddrV4::new(Side::B.carrier(), 40_000));
        assert_eq!(classify(&framed(&datagram(a, b, &[7; 48]))), Seen::Sealed);
        assert_eq!(classify(&framed(&datagram(b, a, &[7; 48]))), Seen::Sealed);
        assert_eq!(classify(&framed(&unreachable(PORT_UNREACHABLE, 0, TO_THE_PEER))), Seen::Error);
        let mut fragment = packet(*a.ip(), *b.ip(), UDP, &[7; 48]);
        fragment[7] = 185;
        assert_eq!(classify(&framed(&fragment)), Seen::Sealed);
        assert_eq!(classify(&[&[0; 12][..], &ETHERTYPE_ARP.to_be_bytes(), &[0; 28]].concat()), Seen::Arp);
    }

    #[test]
    fn nothing_else_may() {
        let (a, b) = (SocketAddrV4::new(Side::A.carrier(), PORT), SocketAddrV4::new(Side::B.carrier(), PORT));
        let other = SocketAddrV4::new(ATTACKER, 53);
        let echo = packet(Side::A.host(), Side::B.host(), ICMP, &[8, 0, 0, 0, 0, 0, 0, 0]);
        for frame in [
            framed(&datagram(a, b, &pattern(1, 64))),
            framed(&datagram(other, other, &[7; 48])),
            framed(&datagram(SocketAddrV4::new(Side::A.host(), PORT), b, &[7; 48])),
            framed(&datagram(a, SocketAddrV4::new(Ipv4Addr::new(10, 201, 0, 2), PORT), &[7; 48])),
            framed(&echo),
            framed(&packet(*a.ip(), *b.ip(), ICMP, &[8, 0, 0, 0, 0, 0, 0, 0])),
            framed(&packet(*a.ip(), *b.ip(), 6, &[0; 20])),
            vec![0; 60],
            vec![0; 5],
        ] {
            assert_eq!(classify(&frame), Seen::Foreign, "{}", hex::encode(&frame));
        }
    }
}
