//! Shows that no packet escapes from a tunnel device whose hub has no programs: none is forwarded or delivered.

use std::net::UdpSocket;
use std::time::Instant;

use netlink_packet_route::neighbour::NeighbourState;

use super::*;
use crate::kernel::testnet::{DEADLINE, Other, in_namespace};

const HERE: [u8; 4] = [192, 0, 2, 1];
const THERE: [u8; 4] = [192, 0, 2, 2];
const PACKETS: u64 = 20;

/// A counter of this thread's namespace, from a file with two lines for each group: names, then values.
fn counter(file: &str, group: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(':'));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split_whitespace().position(|word| word == name).unwrap();
    values.split_whitespace().nth(place).unwrap().parse().unwrap()
}

/// Packets received on the hidden end.
async fn arrived(netlink: &Netlink, hub: &Hub) -> u64 {
    let link = link(netlink, hub.hidden_index).await;
    let stats = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(stats.rx_packets),
        _ => None,
    });
    stats.unwrap()
}

/// Counters that must not change, however many packets reach the hidden end.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    forwarded: u64,
    delivered: u64,
}

fn outcome() -> Outcome {
    Outcome { forwarded: counter("snmp", "Ip", "ForwDatagrams"), delivered: counter("snmp", "Ip", "InDelivers") }
}

/// A gateway with a LAN, forwarding, and a tunnel without programs that has the routes to everything else.
async fn gateway(netlink: &Netlink, lan: &Other) -> (Hub, Device) {
    netlink.cable("lan0", HERE, lan, "host0", THERE).await;
    let hub = hub(netlink).await;
    let device = netlink.make(&hub, &wanted()).await.unwrap();
    netlink.add_route([10, 50, 0, 0], 16, [10, 9, 0, 2]).await;
    // Written last: it enables forwarding on the hidden end too, as an operator may do at any time.
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "0").unwrap();
    (hub, device)
}

/// Sends datagrams from the gateway itself into the tunnel and waits until the hidden end has received all.
async fn send(netlink: &Netlink, hub: &Hub, to: IpAddr) {
    let before = arrived(netlink, hub).await;
    let socket = UdpSocket::bind((LOCAL, 0)).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_multicast_loop_v4(false).unwrap();
    for _ in 0..PACKETS {
        socket.send_to(b"secret", (to, 9)).unwrap();
    }
    let start = Instant::now();
    while arrived(netlink, hub).await < before + PACKETS {
        assert!(start.elapsed() < DEADLINE);
        tokio::task::yield_now().await;
    }
}

#[test]
fn what_the_gateway_sends_into_a_tunnel_without_programs_goes_nowhere() {
    in_namespace(|netlink| async move {
        let lan = Other::new();
        let (hub, _) = gateway(&netlink, &lan).await;
        // A listener on every address of the gateway.
        let listener = UdpSocket::bind("0.0.0.0:9").unwrap();
        listener.set_nonblocking(true).unwrap();
        let before = outcome();
        for to in [PEER, "10.50.0.1".parse().unwrap()] {
            send(&netlink, &hub, to).await;
        }
        assert_eq!(outcome(), before);
        assert!(listener.recv(&mut [0; 16]).is_err());
    });
}

#[test]
fn what_a_lan_sends_into_a_tunnel_without_programs_goes_nowhere() {
    in_namespace(|netlink| async move {
        let lan = Other::new();
        let (hub, _) = gateway(&netlink, &lan).await;
        let (before, came) = (outcome(), arrived(&netlink, &hub).await);
        lan.run(|netlink| async move {
            netlink.add_route([10, 50, 0, 0], 16, HERE).await;
            let socket = UdpSocket::bind("192.0.2.2:0").unwrap();
            for _ in 0..PACKETS {
                socket.send_to(b"secret", "10.50.0.1:9").unwrap();
            }
        })
        .await;
        let start = Instant::now();
        while arrived(&netlink, &hub).await < came + PACKETS {
            assert!(start.elapsed() < DEADLINE);
            tokio::task::yield_now().await;
        }
        // Forwarded once, into the tunnel; not a second time, out of it.
        assert_eq!(outcome(), Outcome { forwarded: before.forwarded + PACKETS, ..before });
    });
}

#[test]
fn multicast_and_broadcast_into_a_tunnel_without_programs_go_nowhere() {
    in_namespace(|netlink| async move {
        let lan = Other::new();
        let (hub, device) = gateway(&netlink, &lan).await;
        // As an operator does for a routing daemon.
        let up = rtnetlink::LinkUnspec::new_with_name(&device.name).multicast(true).build();
        netlink.handle.link().set(up).execute().await.unwrap();
        netlink.add_device_route([224, 0, 0, 0], 4, device.index).await;
        netlink.add_device_route([255, 255, 255, 255], 32, device.index).await;
        let before = outcome();
        for to in ["224.0.0.1", "224.0.0.5", "239.1.2.3"] {
            send(&netlink, &hub, to.parse().unwrap()).await;
        }
        assert_eq!(outcome(), before);
        send(&netlink, &hub, "255.255.255.255".parse().unwrap()).await;
        // The kernel delivers a copy of a broadcast to its sender, before the device.
        assert_eq!(outcome(), Outcome { delivered: before.delivered + PACKETS, ..before });
    });
}

#[test]
fn not_even_frames_addressed_to_the_hidden_end_get_on() {
    in_namespace(|netlink| async move {
        let lan = Other::new();
        let (hub, device) = gateway(&netlink, &lan).await;
        let neighbours = netlink.handle.neighbours();
        let neighbour = neighbours.add(device.index, PEER).link_layer_address(&hub.hidden_mac);
        neighbour.state(NeighbourState::Permanent).replace().execute().await.unwrap();
        let (before, filtered) = (outcome(), counter("netstat", "TcpExt", "IPReversePathFilter"));
        lan.run(|netlink| async move {
            netlink.add_route([10, 50, 0, 0], 16, HERE).await;
            let socket = UdpSocket::bind("192.0.2.2:0").unwrap();
            for _ in 0..PACKETS {
                socket.send_to(b"secret", "10.50.0.1:9").unwrap();
            }
        })
        .await;
        let start = Instant::now();
        while counter("netstat", "TcpExt", "IPReversePathFilter") < filtered + PACKETS {
            assert!(start.elapsed() < DEADLINE, "{:?}", outcome());
            tokio::task::yield_now().await;
        }
        assert_eq!(outcome(), Outcome { forwarded: before.forwarded + PACKETS, ..before });
    });
}

/// Root, who can send raw frames, may use any destination address.
#[test]
fn a_frame_that_falls_out_of_the_visible_end_goes_nowhere() {
    in_namespace(|netlink| async move {
        let lan = Other::new();
        let (hub, device) = gateway(&netlink, &lan).await;
        let injector = crate::xsk::Injector::open(hub.hidden_index).unwrap();
        let visible = netlink.card(hub.index).await.unwrap().mac.unwrap();
        let before = outcome();
        assert_eq!(injected(&injector, &[visible, [0x1E, 9, 9, 9, 9, 9]]), 2);
        // The device that has the destination address delivers the same packet.
        assert_eq!(injected(&injector, &[device.mac]), 1);
        let start = Instant::now();
        while outcome().delivered == before.delivered {
            assert!(start.elapsed() < DEADLINE);
            tokio::task::yield_now().await;
        }
        assert_eq!(outcome(), Outcome { delivered: before.delivered + 1, ..before });
    });
}

/// Injects a packet from the tunnel's peer to the own address once for each destination; returns how many were
/// accepted.
fn injected(injector: &crate::xsk::Injector, destinations: &[[u8; 6]]) -> usize {
    let ip = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 17, 0x66, 0xC5, 10, 9, 0, 2, 10, 9, 0, 1];
    let frame = |to: &[u8; 6]| [&to[..], &[0x1E, 8, 8, 8, 8, 8], &[0x08, 0x00], &ip].concat();
    let send =
        |to: &&[u8; 6]| injector.send(&[std::io::IoSlice::new(&[0; 10]), std::io::IoSlice::new(&frame(to))]).is_ok();
    destinations.iter().filter(send).count()
}
