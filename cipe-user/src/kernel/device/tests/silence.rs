//! The proof that a tunnel device without programs lets nothing out: neither forwarded nor delivered.

use std::net::UdpSocket;
use std::time::Instant;

use netlink_packet_route::neighbour::NeighbourState;

use super::*;
use crate::kernel::testnet::{DEADLINE, Other, in_namespace};

const HERE: [u8; 4] = [192, 0, 2, 1];
const THERE: [u8; 4] = [192, 0, 2, 2];
const PACKETS: u64 = 20;

/// A counter of this thread's namespace, from a file of two lines a group: names, then values.
fn counter(file: &str, group: &str, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap();
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(group)?.strip_prefix(':'));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let place = names.split_whitespace().position(|word| word == name).unwrap();
    values.split_whitespace().nth(place).unwrap().parse().unwrap()
}

/// Packets that came in by the hidden end.
async fn arrived(netlink: &Netlink, device: &Device) -> u64 {
    let link = link(netlink, device.hidden_index).await;
    let stats = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(stats.rx_packets),
        _ => None,
    });
    stats.unwrap()
}

/// What must not change however many packets fall out of the hidden end.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    forwarded: u64,
    delivered: u64,
}

fn outcome() -> Outcome {
    Outcome { forwarded: counter("snmp", "Ip", "ForwDatagrams"), delivered: counter("snmp", "Ip", "InDelivers") }
}

/// A gateway with a LAN, a tunnel without programs that all else is routed into, and forwarding on.
async fn gateway(netlink: &Netlink, lan: &Other) -> Device {
    netlink.cable("lan0", HERE, lan, "host0", THERE).await;
    let device = netlink.make(&wanted()).await.unwrap();
    netlink.add_route([10, 50, 0, 0], 16, [10, 9, 0, 2]).await;
    // Written last: it turns forwarding on at the hidden end too, as an operator may at any time.
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    std::fs::write("/proc/sys/net/ipv4/conf/all/rp_filter", "0").unwrap();
    device
}

/// Sends datagrams from the gateway itself into the tunnel and waits until the hidden end has got them all.
async fn send(netlink: &Netlink, device: &Device, to: IpAddr) {
    let before = arrived(netlink, device).await;
    let socket = UdpSocket::bind((LOCAL, 0)).unwrap();
    socket.set_broadcast(true).unwrap();
    socket.set_multicast_loop_v4(false).unwrap();
    for _ in 0..PACKETS {
        socket.send_to(b"secret", (to, 9)).unwrap();
    }
    let start = Instant::now();
    while arrived(netlink, device).await < before + PACKETS {
        assert!(start.elapsed() < DEADLINE);
        tokio::task::yield_now().await;
    }
}

#[test]
fn what_the_gateway_sends_into_a_tunnel_without_programs_goes_nowhere() {
    in_namespace(|netlink| async move {
        let lan = Other::new();
        let device = gateway(&netlink, &lan).await;
        // Somebody listens on every address of the gateway.
        let listener = UdpSocket::bind("0.0.0.0:9").unwrap();
        listener.set_nonblocking(true).unwrap();
        let before = outcome();
        for to in [PEER, "10.50.0.1".parse().unwrap()] {
            send(&netlink, &device, to).await;
        }
        assert_eq!(outcome(), before);
        assert!(listener.recv(&mut [0; 16]).is_err());
    });
}

#[test]
fn what_a_lan_sends_into_a_tunnel_without_programs_goes_nowhere() {
    in_namespace(|netlink| async move {
        let lan = Other::new();
        let device = gateway(&netlink, &lan).await;
        let (before, came) = (outcome(), arrived(&netlink, &device).await);
        lan.run(|netlink| async move {
            netlink.add_route([10, 50, 0, 0], 16, HERE).await;
            let socket = UdpSocket::bind("192.0.2.2:0").unwrap();
            for _ in 0..PACKETS {
                socket.send_to(b"secret", "10.50.0.1:9").unwrap();
            }
        })
        .await;
        let start = Instant::now();
        while arrived(&netlink, &device).await < came + PACKETS {
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
        let device = gateway(&netlink, &lan).await;
        // As an operator does for a routing daemon.
        let up = rtnetlink::LinkUnspec::new_with_name(&device.name).multicast(true).build();
        netlink.handle.link().set(up).execute().await.unwrap();
        netlink.add_device_route([224, 0, 0, 0], 4, device.index).await;
        netlink.add_device_route([255, 255, 255, 255], 32, device.index).await;
        let before = outcome();
        for to in ["224.0.0.1", "224.0.0.5", "239.1.2.3"] {
            send(&netlink, &device, to.parse().unwrap()).await;
        }
        assert_eq!(outcome(), before);
        send(&netlink, &device, "255.255.255.255".parse().unwrap()).await;
        // A sender of broadcasts gets its own copy, before the device.
        assert_eq!(outcome(), Outcome { delivered: before.delivered + PACKETS, ..before });
    });
}

#[test]
fn not_even_frames_addressed_to_the_hidden_end_get_on() {
    in_namespace(|netlink| async move {
        let lan = Other::new();
        let device = gateway(&netlink, &lan).await;
        let neighbours = netlink.handle.neighbours();
        let neighbour = neighbours.add(device.index, PEER).link_layer_address(&device.hidden_mac);
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
