//! Policies of the host's network stack for the carrier's datagrams, which AF_XDP would bypass: `carrier auto` uses the UDP
//! socket, reports why, and returns to AF_XDP when the policy is removed; `carrier xdp` warns. And groups of datagrams that the
//! kernel refuses (EIO).

use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cipe_tests::exercise::{Line, everything_passes};
use cipe_tests::flows::Flows;
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::net::Frame;
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrIn, sendmsg};

const SIDES: [Side; 2] = [Side::A, Side::B];
const BY_XDP: &str = "native XDP";
const REFUSED: &str = "the kernel refuses UDP_SEGMENT";

/// Protocol number of ESP.
const ESP: u8 = 50;

fn has_door(status: &Status, words: &str) -> bool {
    status.doors.iter().any(|door| door.starts_with("wire0") && door.contains(words))
}

/// Sends single datagrams both ways until both ends use AF_XDP: an end without live frames changes only when it receives them.
fn until_xdp(net: &Topology, pair: &Pair) -> Result<()> {
    // In bursts, so that the rate is high enough on an emulated machine, too.
    let [a, b] = SIDES.map(|from| Flows::new(net, from, 8, true).map(|flows| flows.with_window(32)));
    let mut both = [a?, b?];
    let deadline = Instant::now() + patient(SOON);
    while !(has_door(&pair.a.status()?, BY_XDP) && has_door(&pair.b.status()?, BY_XDP)) {
        for _ in 0..10 {
            both.iter_mut().try_for_each(|flows| flows.round().map(drop))?;
        }
        ensure!(Instant::now() < deadline, "{:?}\n{:?}", pair.a.status()?, pair.b.status()?);
    }
    Ok(())
}

fn ip(namespace: &Namespace, words: &str) -> Result<()> {
    namespace.ip(&words.split_whitespace().collect::<Vec<_>>()).map(drop)
}

#[test]
fn a_rule_by_a_mark_takes_the_socket_while_it_is_there() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    until_xdp(&net, &pair)?;
    let rule = "fwmark 0x55 table 55 priority 500";
    ip(net.gw(Side::A), &format!("rule add {rule}"))?;
    let why = "UDP socket, netfilter may set the mark of the routing rule `500: fwmark 0x55`";
    pair.a.wait_for_status("the socket, and why", |status| has_door(status, why))?;
    everything_passes(&net, Line::Sound)?;
    ensure!(has_door(&pair.a.status()?, why), "{:?}", pair.a.status()?);
    ip(net.gw(Side::A), &format!("rule del {rule}"))?;
    pair.a.wait_for_status("no reason", |status| !has_door(status, "netfilter"))?;
    until_xdp(&net, &pair)?;
    everything_passes(&net, Line::Sound)
}

#[test]
fn carrier_xdp_warns_of_a_rule_by_a_mark() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Off)?;
    ip(net.gw(Side::A), "rule add fwmark 0x55 table 55 priority 500")?;
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("carrier", "xdp"))?;
    pair.wait_for_keys(&net)?;
    pair.a.wait_for_line("a warning", |line| line.contains("fwmark 0x55`, and `carrier xdp` passes it by"))?;
    ensure!(has_door(&pair.a.status()?, BY_XDP), "{:?}", pair.a.status()?);
    everything_passes(&net, Line::Sound)
}

#[test]
fn what_ipsec_blocks_does_not_leave() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let policy = format!("src {} dst {} proto udp dir out", Side::A.carrier(), Side::B.carrier());
    let (add, del) = (format!("xfrm policy add {policy} action block priority 7"), format!("xfrm policy del {policy}"));
    if let Err(error) = ip(net.gw(Side::A), &add) {
        eprintln!("skipped: this kernel has no IPsec policies: {error:#}");
        return Ok(());
    }
    ip(net.gw(Side::A), &del)?;
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    until_xdp(&net, &pair)?;
    ip(net.gw(Side::A), &add)?;
    let why = "UDP socket, an IPsec policy (dir out, priority 7) blocks these datagrams";
    pair.a.wait_for_status("the socket, and why", |status| has_door(status, why))?;
    let before = net.gw(Side::A).counters("wire0")?.tx_packets;
    let plan = Plan { timeout: Duration::from_millis(200), ..Plan::count(5) };
    ensure!(ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received() == 0, "what is blocked was answered");
    // ARP may ask for the peer.
    let sent = net.gw(Side::A).counters("wire0")?.tx_packets - before;
    ensure!(sent < 5, "{sent} packets left");
    ip(net.gw(Side::A), &del)?;
    pair.a.wait_for_status("no reason", |status| !has_door(status, "IPsec"))?;
    until_xdp(&net, &pair)?;
    everything_passes(&net, Line::Sound)
}

/// Keys of ESP, AES-128-GCM with its salt. No secrets.
const ESP_KEY: &str = "0x000102030405060708090a0b0c0d0e0f10111213";

/// ESP in transport mode for UDP between the carrier addresses, both ways, at both gateways; the error if this kernel has none.
fn protect(net: &Topology, done: &str) -> Result<()> {
    for side in SIDES {
        for from in SIDES {
            let ends = format!("src {} dst {}", from.carrier(), from.other().carrier());
            let spi = if from == Side::A { "0x1001" } else { "0x1002" };
            let state = if done == "add" {
                format!(" mode transport aead rfc4106(gcm(aes)) {ESP_KEY} 128")
            } else {
                String::new()
            };
            ip(net.gw(side), &format!("xfrm state {done} {ends} proto esp spi {spi}{state}"))?;
            let direction = if from == side { "out" } else { "in" };
            let template =
                if done == "add" { format!(" priority 7 tmpl {ends} proto esp mode transport") } else { String::new() };
            ip(net.gw(side), &format!("xfrm policy {done} {ends} proto udp dir {direction}{template}"))?;
        }
    }
    Ok(())
}

#[test]
fn what_ipsec_is_to_protect_leaves_as_esp() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    if let Err(error) = protect(&net, "add") {
        eprintln!("skipped: this kernel has no IPsec: {error:#}");
        return Ok(());
    }
    protect(&net, "del")?;
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    protect(&net, "add")?;
    let why = "UDP socket, an IPsec policy (dir out, priority 7) is for these datagrams";
    for side in SIDES {
        pair.of(side).wait_for_status("the socket, and why", |status| has_door(status, why))?;
    }
    pair.wait_for_keys(&net)?;
    let capture = net.capture_carrier(100_000)?;
    everything_passes(&net, Line::Sound)?;
    let frames = capture.finish()?;
    let gateways = SIDES.map(Side::carrier);
    let between = |from: Ipv4Addr, to: Ipv4Addr| gateways.contains(&from) && gateways.contains(&to);
    let mut protected = 0;
    for frame in &frames {
        let Some(packet) = Frame::parse(&frame.octets).and_then(|frame| frame.ipv4()) else { continue };
        if between(packet.source, packet.destination) {
            ensure!(packet.protocol == ESP, "protocol {} between the gateways", packet.protocol);
            protected += 1;
        }
    }
    ensure!(protected > 1_000, "{protected} packets of ESP");
    // A kernel that refuses groups which must pass IPsec gets their datagrams one by one; 7.3 takes them.
    if takes_groups(&net)? {
        ensure!(!pair.a.log().text().contains(REFUSED), "{}", pair.a.log().text());
    } else {
        pair.a.wait_for_line("the refusal", |line| line.contains(REFUSED))?;
    }
    protect(&net, "del")?;
    for side in SIDES {
        pair.of(side).wait_for_status("no reason", |status| !has_door(status, "IPsec"))?;
    }
    pair.wait_for_keys(&net)?;
    everything_passes(&net, Line::Sound)
}

/// Whether the kernel accepts a group for A's carrier device.
fn takes_groups(net: &Topology) -> Result<bool> {
    let socket = net.gw(Side::A).run(|| UdpSocket::bind((Side::A.carrier(), 0)))?;
    let to = SockaddrIn::from(std::net::SocketAddrV4::new(Side::B.carrier(), 9));
    let (octets, size) = ([0; 200], 100);
    let parts = [std::io::IoSlice::new(&octets)];
    let control = [ControlMessage::UdpGsoSegments(&size)];
    match sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&to)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EIO) => Ok(false),
        Err(error) => Err(error).context("a group of two datagrams"),
    }
}

/// Before 6.11 the kernel segments no groups for a device without checksum offload.
#[test]
fn groups_that_a_device_without_checksums_is_refused_leave_as_single_datagrams() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    if takes_groups(&net)? {
        eprintln!("skipped: this kernel cuts groups for devices without checksums as well");
        return Ok(());
    }
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("carrier", "udp"))?;
    pair.wait_for_keys(&net)?;
    everything_passes(&net, Line::Sound)?;
    pair.a.wait_for_line("the refusal", |line| line.contains(REFUSED))?;
    let status = pair.a.wait_for_status("the refusal", |status| {
        status.doors.iter().any(|door| door.contains(REFUSED)) && status.count("carrier-full") == 0
    })?;
    println!("{}", status.doors.join(", "));
    Ok(())
}
