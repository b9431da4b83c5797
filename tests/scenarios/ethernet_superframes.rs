//! What hosts leave to the card in an Ethernet tunnel (protocol 4): superframes, which the engine cuts, and unfinished checksums.

use std::io::IoSlice;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use cipe_tests::bridge::host;
use cipe_tests::capture::Capture;
use cipe_tests::gateway::Daemon;
use cipe_tests::joined::Joined;
use cipe_tests::namespace::Namespace;
use cipe_tests::net::{checksum, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::topology::{Carrier, Side};
use cipe_tests::{SOON, may_make_namespaces, traffic};
use cipe_user::xsk::Injector;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

const TCP: u8 = 6;
const UDP: u8 = 17;
/// Payload octets of each segment.
const SEGMENT: usize = 1000;
const SEGMENTS: usize = 7;
/// The largest frame that no superframe is, tags included.
const LARGEST: usize = 1522;
/// First of the two octets of the stamp's tag.
const STAMP: [u8; 2] = [0x88, 0xA8];

#[test]
fn superframes_of_hosts_reach_the_engine_and_leave_as_datagrams_that_fit() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let change = |_, options: cipe_tests::options::Options| options.set("carrier", "xdp");
    let joined = Joined::over(Carrier::Tapped, Daemon::EthernetBlowfish, Offload::On, change)?;
    let has_multi_buffer = joined.pair.a.status()?.has_feature("AF_XDP multi-buffer");
    let seen = Capture::start(joined.net.gw(Side::A), 1, |frame| frame.len() > LARGEST && frame[12..14] == STAMP)?;
    let carrier = joined.net.capture_carrier(100_000)?;
    let octets = pattern(1, 4 << 20);
    for side in [Side::A, Side::B] {
        let to = (joined.net.lan(side.other()), host(side.other()));
        ensure!(traffic::tcp_transfer(joined.net.lan(side), to, &octets)? == octets, "TCP from {side:?}");
        datagrams(joined.net.lan(side), joined.net.lan(side.other()), side)?;
    }
    assert_eq!(!seen.finish()?.is_empty(), has_multi_buffer, "superframes at the tunnel's device");
    let largest = carrier.finish()?.iter().map(|frame| frame.octets.len()).max();
    assert!(largest.is_some_and(|octets| octets <= 1514), "{largest:?}");
    for side in [Side::A, Side::B] {
        let status = joined.gateway(side).status()?;
        for verdict in ["bad-inner", "bad-crc", "too-big", "private-malformed", "private-not-ip", "private-full"] {
            assert_eq!(status.count(verdict), 0, "{verdict}: {status:?}");
        }
    }
    Ok(())
}

/// Datagrams in superframes of UDP, each for itself at the other side.
fn datagrams(from: &Namespace, to: &Namespace, side: Side) -> Result<()> {
    let server = to.run(|| UdpSocket::bind((host(side.other()), 0)))?;
    let client = from.run(|| UdpSocket::bind((host(side), 0)))?;
    server.set_read_timeout(Some(SOON))?;
    client.connect(server.local_addr()?)?;
    let mut buffer = [0; 2000];
    for size in [1_u16, 333, 1200] {
        for segments in [2, 7, 40] {
            // The last is shorter where it can be.
            let payload = pattern(size.into(), segments * usize::from(size) - usize::from(size) / 3);
            let cut = [ControlMessage::UdpGsoSegments(&size)];
            sendmsg::<()>(client.as_raw_fd(), &[IoSlice::new(&payload)], &cut, MsgFlags::empty(), None)?;
            for expected in payload.chunks(size.into()) {
                let length = server.recv(&mut buffer).with_context(|| format!("{segments} of {size} from {side:?}"))?;
                ensure!(
                    buffer[..length] == *expected,
                    "{segments} of {size} from {side:?}: {length} octets, or others"
                );
            }
        }
    }
    Ok(())
}

/// What stands between addresses and packet, and whether this host's kernel sends superframes behind it that come from a program.
const BEFORE: [(&str, &[u8], bool); 7] = [
    ("nothing", &[0x08, 0x00], true),
    ("a tag", &[0x81, 0, 0x20, 5, 0x08, 0x00], true),
    ("two tags", &[0x88, 0xA8, 0, 7, 0x81, 0, 0, 5, 0x08, 0x00], true),
    ("three tags", &[0x88, 0xA8, 0, 7, 0x81, 0, 0, 6, 0x81, 0, 0, 5, 0x08, 0x00], true),
    // With a module of its own only.
    ("MPLS", &[0x88, 0x47, 0, 1, 0x20, 64, 0, 1, 0x31, 64], false),
    ("PPPoE", &[0x88, 0x64, 0x11, 0, 0, 1, 0, 50, 0, 0x21], false),
    ("NSH", &[0x89, 0x4F, 0x0F, 0xC2, 1, 1, 0, 0, 0, 255], false),
];

const ADDRESSES: [u8; 12] = [2, 0, 0, 0, 0, 0x99, 2, 0, 0, 0, 0, 0x77];

/// Hosts send the same behind headers of all kinds. What comes out is what this kernel makes of it for a card without offloads, the
/// test's own port in the first bridge.
#[test]
fn what_hosts_leave_to_the_card_is_done_as_the_kernel_does_it() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for mode in ["auto", "native"] {
        let change = |_, options: cipe_tests::options::Options| options.set("xdp-mode", mode);
        let joined = Joined::new(Daemon::EthernetIdea, Offload::On, change)?;
        let lan = joined.net.lan(Side::A);
        let links: serde_json::Value = serde_json::from_str(&lan.ip(&["-j", "link", "show", "dev", "eth0"])?)?;
        let index = links[0]["ifindex"].as_u64().context("eth0 has an index")?;
        let injector = lan.run(|| Injector::open(index as u32))?;
        for protocol in [TCP, UDP] {
            for (count, payload) in [(1, pattern(1, 700)), (SEGMENTS, pattern(2, SEGMENTS * SEGMENT - 300))] {
                if protocol == UDP && count > 1 && !joined.pair.a.status()?.has_feature("UDP superframes") {
                    continue;
                }
                let mut packets = Vec::new();
                for (what, before, has_superframes) in BEFORE {
                    if count > 1 && !has_superframes {
                        continue;
                    }
                    let what = format!("{what}, protocol {protocol}, {count}, {mode}");
                    send(&injector, before, protocol, &payload, count > 1).with_context(|| what.clone())?;
                    if packets.is_empty() {
                        packets =
                            receive(&joined, Side::A, before, count).with_context(|| format!("{what}: kernel"))?;
                    }
                    let came = receive(&joined, Side::B, before, count);
                    let came = came.with_context(|| format!("{what}: {:?}", joined.pair.a.status()))?;
                    ensure!(came == packets, "{what}\n{came:X?}\nnot\n{packets:X?}");
                }
            }
        }
        let status = joined.pair.a.status()?;
        assert_eq!((status.count("private-malformed"), status.count("too-big")), (0, 0), "{status:?}");
    }
    Ok(())
}

/// The next `count` packets behind such a header at a port.
fn receive(joined: &Joined, side: Side, before: &[u8], count: usize) -> Result<Vec<Vec<u8>>> {
    let header = [&ADDRESSES[..], before].concat();
    let next = || {
        let frame = joined.port(side).wait_for(SOON, |frame| frame.starts_with(&header))?;
        Ok(frame.context("nothing came")?[header.len()..].to_vec())
    };
    (0..count).map(|_| next()).collect()
}

/// Sends an IPv4 packet with an unfinished checksum, or a superframe.
fn send(injector: &Injector, before: &[u8], protocol: u8, payload: &[u8], is_superframe: bool) -> Result<()> {
    const NEEDS_CSUM: u8 = 1;
    let transport: Vec<u8> = match protocol {
        TCP => [&[0x9C, 0x40, 0, 80, 0, 0, 1, 0, 0, 0, 0, 9, 0x50, 0x18, 1, 2, 0, 0, 0, 0][..], payload].concat(),
        _ => {
            let [high, low] = (8 + payload.len() as u16).to_be_bytes();
            [&[0x9C, 0x40, 0, 53, high, low, 0, 0][..], payload].concat()
        }
    };
    let field = if protocol == TCP { 16 } else { 6 };
    let [high, low] = (20 + transport.len() as u16).to_be_bytes();
    let mut packet = vec![0x45, 0, high, low, 0x12, 0x34, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2];
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    let pseudo = [&packet[12..20], &[0, protocol], &(transport.len() as u16).to_be_bytes()].concat();
    packet.extend(&transport);
    packet[20 + field..22 + field].copy_from_slice(&(!checksum(&pseudo)).to_be_bytes());
    let frame = [&ADDRESSES[..], before, &packet].concat();
    let (kind, size) = match (is_superframe, protocol) {
        (false, _) => (0, 0),
        (true, TCP) => (1, SEGMENT as u16),
        (true, _) => (5, SEGMENT as u16),
    };
    let start = ADDRESSES.len() + before.len() + 20;
    let header_len = (start + if protocol == TCP { 20 } else { 8 }) as u16;
    let numbers = [header_len, size, start as u16, field as u16].map(u16::to_ne_bytes).concat();
    let vnet = [&[NEEDS_CSUM, kind][..], &numbers].concat();
    injector.send(&[IoSlice::new(&vnet), IoSlice::new(&frame)])?;
    Ok(())
}
