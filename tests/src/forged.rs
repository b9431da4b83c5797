//! Packets of somebody on the carrier who has no key: whole IP packets with any source, and ICMP errors.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};

use anyhow::{Context, Result};
use socket2::{Domain, Protocol, Socket, Type};

use crate::net::{ICMP, UDP, checksum};
use crate::options::PORT;
use crate::topology::{Side, Topology};

/// The source of forged errors: neither the peer nor a router on the path.
pub const ATTACKER: Ipv4Addr = Ipv4Addr::new(10, 200, 9, 9);

/// Which of a gateway's datagrams an error claims to be about.
#[derive(Clone, Copy, Debug)]
pub struct Quoted {
    /// Its destination.
    pub to: Ipv4Addr,
    /// Octets of the UDP payload.
    pub payload: &'static [u8],
}

/// A datagram to a host that is not the peer.
pub const TO_ANYBODY: Quoted = Quoted { to: Ipv4Addr::new(10, 200, 9, 77), payload: &[] };
/// A datagram to gateway B, without an octet of its payload.
pub const TO_THE_PEER: Quoted = Quoted { to: Ipv4Addr::new(10, 200, 0, 2), payload: &[] };
/// A datagram to gateway B with an IV that no datagram had.
pub const WITH_ANOTHER_IV: Quoted =
    Quoted { to: Ipv4Addr::new(10, 200, 0, 2), payload: &[0x91, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] };

/// Code of "port unreachable" (RFC 792).
pub const PORT_UNREACHABLE: u8 = 3;
/// Code of "fragmentation needed" (RFC 792).
pub const FRAGMENTATION_NEEDED: u8 = 4;

/// An IPv4 packet.
pub fn packet(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, content: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, protocol, 0, 0];
    packet[2..4].copy_from_slice(&(20 + content.len() as u16).to_be_bytes());
    packet.extend(from.octets());
    packet.extend(to.octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(content);
    packet
}

/// An IPv4 packet with a UDP datagram without a checksum.
pub fn datagram(from: SocketAddrV4, to: SocketAddrV4, payload: &[u8]) -> Vec<u8> {
    let mut datagram = Vec::with_capacity(8 + payload.len());
    datagram.extend(from.port().to_be_bytes());
    datagram.extend(to.port().to_be_bytes());
    datagram.extend((8 + payload.len() as u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    packet(*from.ip(), *to.ip(), UDP, &datagram)
}

/// A destination-unreachable message to gateway A (RFC 792, RFC 1191) about one of its datagrams of 1472 octets.
pub fn unreachable(code: u8, mtu: u16, quoted: Quoted) -> Vec<u8> {
    unreachable_to(Side::A.carrier(), code, mtu, quoted)
}

/// The same to any gateway, by its carrier address.
pub fn unreachable_to(gateway: Ipv4Addr, code: u8, mtu: u16, quoted: Quoted) -> Vec<u8> {
    let mut datagram = Vec::new();
    datagram.extend(PORT.to_be_bytes());
    datagram.extend(PORT.to_be_bytes());
    datagram.extend((8 + 1472u16).to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(quoted.payload);
    let mut message = vec![3, code, 0, 0, 0, 0];
    message.extend(mtu.to_be_bytes());
    message.extend(packet(gateway, quoted.to, UDP, &datagram));
    let sum = checksum(&message);
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    packet(ATTACKER, gateway, ICMP, &message)
}

/// Somebody at the tap of a carrier who sends packets with any source.
pub struct Attacker(Socket);

impl Attacker {
    /// Opens a raw socket.
    ///
    /// # Errors
    /// The carrier has no tap, or the kernel reports an error.
    pub fn new(net: &Topology) -> Result<Self> {
        let tap = net.tap().context("a tapped carrier has a router")?;
        let raw = tap.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))))?;
        Ok(Self(raw))
    }

    /// Sends an IP packet to gateway A.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.send_to(packet, Side::A.carrier())
    }

    /// Sends an IP packet to the gateway that has this carrier address.
    ///
    /// # Errors
    /// The kernel does not take it.
    pub fn send_to(&self, packet: &[u8], gateway: Ipv4Addr) -> io::Result<()> {
        self.0.send_to(packet, &SocketAddr::from((gateway, 0)).into()).map(drop)
    }
}
