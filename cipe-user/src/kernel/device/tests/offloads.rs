//! The frames that arrive on the hidden end, captured by AF_PACKET.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};

use netlink_packet_route::link::LinkAttribute;
use rtnetlink::LinkUnspec;
use socket2::{Domain, Protocol, Socket, Type};

use super::*;
use crate::kernel::ethtool::{Offloads, has_gro, set_offloads};
use crate::kernel::testnet::{Other, in_namespace};

const ETHERNET: usize = 14;
const ETH_P_IP: u16 = 0x0800;
const MTU: usize = 1442;
/// Octets of the TCP stream; large enough for the stack to build superframes.
const STREAM_OCTETS: usize = 300_000;

/// A frame from the visible end, as received on the hidden end.
struct Frame {
    protocol: u8,
    /// Octets of the IP packet.
    length: usize,
    /// Whether the TCP or UDP checksum is correct.
    complete: bool,
}

/// Receives the IPv4 frames that arrive on any device of the calling thread's namespace.
struct Capture(Socket);

impl Capture {
    fn open() -> Self {
        let protocol = Protocol::from(i32::from(ETH_P_IP.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol)).unwrap();
        socket.set_recv_buffer_size(8 << 20).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    /// All TCP and UDP packets so far.
    fn frames(&mut self) -> Vec<Frame> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 1 << 17];
        while let Ok(length) = (&self.0).read(&mut buffer) {
            frames.extend(parse(&buffer[ETHERNET..length]));
        }
        frames
    }
}

fn parse(packet: &[u8]) -> Option<Frame> {
    let header = usize::from(packet[0] & 15) * 4;
    let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
    let (protocol, segment) = (packet[9], &packet[header..total]);
    let words = segment.chunks(2).map(|octets| u32::from(octets[0]) << 8 | u32::from(*octets.get(1).unwrap_or(&0)));
    let addresses = packet[12..20].chunks(2).map(|octets| u32::from(octets[0]) << 8 | u32::from(octets[1]));
    let mut sum: u32 = words.chain(addresses).sum::<u32>() + u32::from(protocol) + u32::try_from(segment.len()).ok()?;
    while sum > 0xFFFF {
        sum = (sum & 0xFFFF) + (sum >> 16);
    }
    matches!(protocol, 6 | 17).then_some(Frame { protocol, length: total, complete: sum == 0xFFFF })
}

/// Sends datagrams and a stream through the visible end, to a host that owns the hidden end and the peer's address.
async fn frames_with(netlink: &Netlink, offloads: Offloads) -> Vec<Frame> {
    let other = Other::new();
    let hub = hub(netlink).await;
    let device = netlink.make(&hub, &wanted()).await.unwrap();
    set_offloads(&hub.name, hub.index, offloads).unwrap();
    let hidden = netlink.card(hub.hidden_index).await.unwrap().name;
    netlink.move_to(&hidden, &other).await;
    let mac = device.mac;
    let (listener, mut capture) = other
        .run(move |netlink| async move {
            // A device without ARP addresses frames to its own address: the host needs the same address to accept them.
            netlink.set_attribute(&hidden, LinkAttribute::Address(mac.to_vec())).await;
            netlink.add_address(&hidden, PEER, 24).await;
            netlink.handle.link().set(LinkUnspec::new_with_name(&hidden).up().build()).execute().await.unwrap();
            (TcpListener::bind((PEER, 0)).unwrap(), Capture::open())
        })
        .await;
    // The kernel drops everything that is sent before it has noticed that the other end is up.
    while !netlink.card(device.index).await.unwrap().running {
        tokio::task::yield_now().await;
    }
    let datagrams = UdpSocket::bind((LOCAL, 0)).unwrap();
    for length in [1, 2, 511, 1000, MTU - 28] {
        datagrams.send_to(&vec![0x5A; length], (PEER, 9)).unwrap();
    }
    let address = listener.local_addr().unwrap();
    let reader = std::thread::spawn(move || {
        let mut received = Vec::new();
        listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
        received.len()
    });
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(&vec![0xA5; STREAM_OCTETS]).unwrap();
    drop(stream);
    assert_eq!(reader.join().unwrap(), STREAM_OCTETS);
    let frames = capture.frames();
    assert_eq!(frames.iter().filter(|frame| frame.protocol == 17).count(), 5);
    assert!(frames.iter().any(|frame| frame.protocol == 6));
    frames
}

#[test]
fn without_offloads_every_frame_fits_and_has_its_checksum() {
    in_namespace(|netlink| async move {
        let frames = frames_with(&netlink, Offloads::SINGLE_FRAMES).await;
        assert!(frames.iter().all(|frame| frame.complete));
        assert!(frames.iter().all(|frame| frame.length <= MTU));
    });
}

#[test]
fn with_offloads_superframes_arrive_with_partial_checksums() {
    in_namespace(|netlink| async move {
        let frames = frames_with(&netlink, Offloads::SUPERFRAMES).await;
        assert!(frames.iter().any(|frame| frame.length > MTU && !frame.complete));
    });
}

#[test]
fn with_checksum_offload_alone_frames_fit_but_their_checksums_are_partial() {
    in_namespace(|netlink| async move {
        let frames = frames_with(&netlink, Offloads { tx_checksum: true, ..Offloads::SINGLE_FRAMES }).await;
        assert!(frames.iter().all(|frame| frame.length <= MTU));
        assert!(frames.iter().any(|frame| !frame.complete));
    });
}

#[test]
fn whether_a_device_joins_what_it_receives_can_be_asked() {
    in_namespace(|netlink| async move {
        let hub = hub(&netlink).await;
        for gro in [true, false] {
            set_offloads(&hub.name, hub.index, Offloads { gro, ..Offloads::SUPERFRAMES }).unwrap();
            assert_eq!(has_gro(hub.index), Some(gro));
        }
        assert_eq!(has_gro(4_000_000), None);
    });
}

#[test]
fn a_device_that_is_gone_is_named_in_the_refusal() {
    in_namespace(|_| async {
        let error = set_offloads("cipcb0", 4_000_000, Offloads::SINGLE_FRAMES).unwrap_err().to_string();
        assert!(error.starts_with("cipcb0: cannot set offloads to "), "{error}");
        assert!(error.ends_with("No such device (os error 19)"), "{error}");
    });
}
