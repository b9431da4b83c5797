//! Packets that are joined on ingress are segmented again into the same packets: a packet arrives at the other LAN with the
//! octets that it had, except for the changes of the two hops.

use std::io::{IoSlice, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::capture::Capture;
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::net::{Frame, UDP, checksum, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use rustix::process::Signal;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

const TCP: u8 = 6;
const SYN: u8 = 0x02;
/// Octets of the IPv4 and UDP headers.
const HEADERS: usize = 28;
/// More than any packet of a link with an MTU of 1500 has.
const SUPERFRAME: usize = 1600;
const MANY_FRAMES: usize = 100_000;

/// An IPv4 packet of a protocol from lanA's host to lanB's, without Ethernet's padding.
fn from_a_to_b(frame: &[u8], protocol: u8) -> Option<&[u8]> {
    let frame = Frame::parse(frame)?;
    let packet = frame.ipv4()?;
    let ours = packet.protocol == protocol && (packet.source, packet.destination) == (Side::A.host(), Side::B.host());
    let total = usize::from(u16::from_be_bytes([frame.payload[2], frame.payload[3]]));
    if ours { frame.payload.get(..total) } else { None }
}

fn capture(namespace: &Namespace, protocol: u8, least: usize) -> Result<Capture> {
    Capture::start(namespace, MANY_FRAMES, move |frame| {
        from_a_to_b(frame, protocol).is_some_and(|packet| packet.len() >= least)
    })
}

/// The packets of a capture as they would be `hops` hops later, without TTL and header checksum.
fn packets(capture: Capture, protocol: u8, hops: u8) -> Result<Vec<Vec<u8>>> {
    let later = |frame: &[u8]| {
        let mut packet = from_a_to_b(frame, protocol)?.to_vec();
        packet[8] -= hops;
        packet[10..12].fill(0);
        Some(packet)
    };
    Ok(capture.finish()?.iter().filter_map(|captured| later(&captured.octets)).collect())
}

/// Captures of one protocol on both LANs, and of the joined packets at the tunnel's device at B.
struct Captures {
    sent: Capture,
    joined: Capture,
    received: Capture,
}

impl Captures {
    fn start(net: &Topology, protocol: u8) -> Result<Self> {
        Ok(Self {
            sent: capture(net.lan(Side::A), protocol, 0)?,
            joined: capture(net.gw(Side::B), protocol, SUPERFRAME)?,
            received: capture(net.lan(Side::B), protocol, 0)?,
        })
    }

    fn have_joined(&self) -> bool {
        self.joined.wait_for(Duration::ZERO, |_| true).is_some()
    }
}

/// Stops B's engine while `send` sends, so that the engine finds all packets at once.
fn at_once(gateway: &Gateway, send: impl FnOnce() -> Result<()>) -> Result<()> {
    let engine = gateway.engine_pid().context("an engine")?;
    process::signal(engine, Signal::STOP)?;
    let sent = send();
    process::signal(engine, Signal::CONT)?;
    sent
}

/// A flow of UDP packets.
struct Flow {
    port: u16,
    payload: fn(u32) -> usize,
    tos: fn(u32) -> u8,
    id: fn(u32) -> u16,
    has_checksum: bool,
}

const PLAIN: Flow = Flow { port: 0, payload: |_| 900, tos: |_| 0, id: |n| 1000 + n as u16, has_checksum: true };

/// Kinds of packets that may and may not be joined.
const FLOWS: [Flow; 9] = [
    PLAIN,
    // Odd, so that checksums end in half a word.
    Flow { payload: |_| 333, tos: |_| 0xB9, ..PLAIN },
    // As the packets of one segmented message: the last is shorter.
    Flow { payload: |n| if n % 5 == 4 { 77 } else { 1200 }, ..PLAIN },
    Flow { payload: |n| (n.wrapping_mul(0x9E37_79B1) >> 16) as usize % 1400, ..PLAIN },
    // A router on the path marks some of them (CE).
    Flow { tos: |n| if n % 4 == 2 { 0x03 } else { 0x02 }, ..PLAIN },
    Flow { has_checksum: false, ..PLAIN },
    Flow { id: |n| 60_000 - n as u16, ..PLAIN },
    Flow { id: |_| 7, ..PLAIN },
    Flow { payload: |n| if n % 3 == 0 { 0 } else { 1 }, ..PLAIN },
];

impl Flow {
    /// Packet number `n`, with the number in the payload as far as there is room.
    fn packet(&self, n: u32) -> Vec<u8> {
        let payload = [&n.to_be_bytes()[..], &pattern(n, 1500)].concat();
        let payload = &payload[..(self.payload)(n)];
        let (length, udp) = ((HEADERS + payload.len()) as u16, (8 + payload.len()) as u16);
        let mut packet = vec![0x45, (self.tos)(n)];
        packet.extend(length.to_be_bytes());
        packet.extend((self.id)(n).to_be_bytes());
        packet.extend([0x40, 0, 64, UDP, 0, 0]);
        packet.extend(Side::A.host().octets());
        packet.extend(Side::B.host().octets());
        let addresses = packet[12..20].to_vec();
        packet.extend(self.port.to_be_bytes());
        packet.extend(self.port.to_be_bytes());
        packet.extend(udp.to_be_bytes());
        packet.extend([0, 0]);
        packet.extend(payload);
        if self.has_checksum {
            let sum = checksum(&[&addresses, &[0, UDP][..], &udp.to_be_bytes(), &packet[20..]].concat());
            // Zero would mean that there is no checksum.
            packet[26..28].copy_from_slice(&if sum == 0 { 0xFFFF } else { sum }.to_be_bytes());
        }
        packet
    }
}

fn ports(packet: &[u8]) -> [u8; 4] {
    [packet[20], packet[21], packet[22], packet[23]]
}

fn udp_by(door: &str) -> Result<()> {
    /// Packets of each flow in flight.
    const BURST: u32 = 16;
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("carrier", door))?;
    pair.wait_for_keys(&net)?;
    // A socket listens, so that no ICMP errors go back.
    let listener = net.lan(Side::B).run(|| UdpSocket::bind((Side::B.host(), 0)))?;
    let base = listener.local_addr()?.port();
    let flows: Vec<Flow> = (0..).zip(FLOWS).map(|(n, flow)| Flow { port: base ^ n, ..flow }).collect();
    let others: Result<Vec<_>, _> =
        net.lan(Side::B).run(|| flows[1..].iter().map(|flow| UdpSocket::bind((Side::B.host(), flow.port))).collect());
    let _others = others?;
    let raw = net.lan(Side::A).run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))))?;
    let to: SockAddr = SocketAddr::from((Side::B.host(), 0)).into();
    let captures = Captures::start(&net, UDP)?;
    let can_join = pair.b.status()?.has_feature("UDP superframes");
    let deadline = Instant::now() + process::patient(SOON);
    for burst in 0.. {
        let numbers = burst * BURST..(burst + 1) * BURST;
        at_once(&pair.b, || {
            // In two turns: first runs of one flow, then flows mixed packet by packet.
            for flow in &flows {
                for n in numbers.clone().take(BURST as usize / 2) {
                    raw.send_to(&flow.packet(n), &to)?;
                }
            }
            for n in numbers.clone().skip(BURST as usize / 2) {
                for flow in &flows {
                    raw.send_to(&flow.packet(n), &to)?;
                }
            }
            Ok(())
        })?;
        for flow in &flows {
            let last = flow.packet(numbers.end - 1);
            let is_last = |frame: &[u8]| {
                from_a_to_b(frame, UDP).is_some_and(|packet| packet[20..] == last[20..] && packet[4..6] == last[4..6])
            };
            let seen = captures.received.wait_for(SOON, is_last);
            seen.with_context(|| format!("{door}: port {}, burst {burst}: {:?}", flow.port, pair.b.status()))?;
        }
        if burst >= 4 && (captures.have_joined() || !can_join) {
            break;
        }
        ensure!(Instant::now() < deadline, "{door}: nothing was ever joined");
    }
    let (sent, received) = (packets(captures.sent, UDP, 2)?, packets(captures.received, UDP, 0)?);
    for flow in &flows {
        let of_flow = |packets: &[Vec<u8>]| -> Vec<Vec<u8>> {
            let ports_of_flow = [flow.port.to_be_bytes(), flow.port.to_be_bytes()].concat();
            packets.iter().filter(|packet| ports(packet)[..] == ports_of_flow).cloned().collect()
        };
        let (sent, received) = (of_flow(&sent), of_flow(&received));
        assert_eq!(sent.len(), received.len(), "{door}: port {}", flow.port);
        for (n, (sent, received)) in sent.iter().zip(&received).enumerate() {
            assert_eq!(hex::encode(received), hex::encode(sent), "{door}: port {}, packet {n}", flow.port);
        }
    }
    Ok(())
}

#[test]
fn a_udp_flow_is_the_same_on_both_lans() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    udp_by("xdp")?;
    udp_by("udp")
}

fn tcp_by(door: &str) -> Result<()> {
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("carrier", door))?;
    pair.wait_for_keys(&net)?;
    for side in [Side::A, Side::B] {
        net.lan(side).sysctl("net.ipv4.tcp_ecn", "1")?;
    }
    let captures = Captures::start(&net, TCP)?;
    let listener = net.lan(Side::B).run(|| TcpListener::bind((Side::B.host(), 0)))?;
    let target = listener.local_addr()?;
    let mut sender = net.lan(Side::A).run(|| TcpStream::connect_timeout(&target, process::patient(SOON)))?;
    let (mut receiver, _) = listener.accept()?;
    sender.set_nodelay(true)?;
    sender.set_write_timeout(Some(process::patient(SOON)))?;
    receiver.set_read_timeout(Some(process::patient(SOON)))?;
    let deadline = Instant::now() + process::patient(SOON);
    for round in 0.. {
        // Each write ends in PSH: single segments, full ones among them, and runs of both.
        for size in [1, 100, 1390, 1391, 3000, 40_000, 7, 60_000] {
            let octets = pattern(round, size);
            sender.write_all(&octets)?;
            let mut received = vec![0; size];
            receiver.read_exact(&mut received).with_context(|| format!("{door}: round {round}, {size} octets"))?;
            assert!(received == octets, "{door}: round {round}, {size} octets");
        }
        if round >= 4 && captures.have_joined() {
            break;
        }
        ensure!(Instant::now() < deadline, "{door}: nothing was ever joined");
    }
    sender.shutdown(Shutdown::Write)?;
    assert_eq!(receiver.read(&mut [0])?, 0);
    let (sent, received) = (packets(captures.sent, TCP, 2)?, packets(captures.received, TCP, 0)?);
    // SYNs have another MSS. Lost segments were retransmitted, which is no fault.
    let mut sent = sent.iter().filter(|packet| packet[33] & SYN == 0);
    for (n, received) in received.iter().filter(|packet| packet[33] & SYN == 0).enumerate() {
        ensure!(sent.any(|sent| sent == received), "{door}: packet {n} was never sent so: {}", hex::encode(received));
    }
    Ok(())
}

#[test]
fn a_tcp_flow_is_the_same_on_both_lans() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    tcp_by("xdp")?;
    tcp_by("udp")
}

/// A superframe of a host is segmented at one gateway and joined at the other: the receiver gets the datagrams.
#[test]
fn datagrams_of_a_superframe_arrive_each_for_itself() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    'links: for (offload, door) in [(Offload::On, "auto"), (Offload::On, "xdp"), (Offload::Raw, "xdp")] {
        let net = Topology::new(Carrier::Direct, offload)?;
        let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("carrier", door))?;
        pair.wait_for_keys(&net)?;
        let server = net.lan(Side::B).run(|| UdpSocket::bind((Side::B.host(), 0)))?;
        let client = net.lan(Side::A).run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
        server.set_read_timeout(Some(process::patient(SOON)))?;
        client.connect(server.local_addr()?)?;
        let mut buffer = [0; 2000];
        for size in [1_u16, 100, 537, 1200, 1414] {
            for segments in [2, 9, 40] {
                // The last is shorter if the size allows it.
                let payload = pattern(size.into(), segments * usize::from(size) - usize::from(size) / 3);
                let pieces = [IoSlice::new(&payload)];
                let cut = [ControlMessage::UdpGsoSegments(&size)];
                match sendmsg::<()>(client.as_raw_fd(), &pieces, &cut, MsgFlags::empty(), None) {
                    // Not all kernels segment datagrams for a card without checksum offload.
                    Err(Errno::EIO) if offload == Offload::Raw => {
                        eprintln!("skipped: superframes of UDP over raw links: this kernel refuses them");
                        continue 'links;
                    }
                    sent => sent?,
                };
                for expected in payload.chunks(size.into()) {
                    let length = server.recv(&mut buffer).with_context(|| format!("{door}: {segments} of {size}"))?;
                    assert!(buffer[..length] == *expected, "{door}: {segments} of {size}: {length} octets");
                }
            }
        }
    }
    Ok(())
}
