//! The short cut of gateways (`lan`): which packets bypass the kernel, which must not, and that none is lost between the two.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::capture::Capture;
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::net::{Frame, ICMP, Ipv4, checksum, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, traffic};
use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use socket2::{Domain, Protocol, Socket, Type};

/// The device MTU that the protocol sets (section 2).
const MTU: usize = 1442;

/// Two gateways with a short cut each, keys exchanged.
fn start(net: &Topology, extra: &[(&str, &str)]) -> Result<Pair> {
    let pair = Pair::start(net, Daemon::Idea, |_, options| {
        extra.iter().fold(options.set("lan", "lan0"), |options, (name, value)| options.set(name, value))
    })?;
    pair.wait_for_keys(net)?;
    for side in [Side::A, Side::B] {
        pair.of(side).wait_for_status("a short cut", |status| has_door(&status.doors, "lan0: short cut"))?;
    }
    Ok(pair)
}

fn has_door(doors: &[String], words: &str) -> bool {
    doors.iter().any(|door| door.contains(words))
}

/// Packets that the kernel of a gateway has forwarded.
fn forwarded(gateway: &Namespace, v6: bool) -> Result<u64> {
    let file = if v6 { "snmp6" } else { "snmp" };
    let text = gateway.run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")))?;
    let count = if v6 {
        text.lines().find_map(|line| line.strip_prefix("Ip6OutForwDatagrams"))
    } else {
        // Names, then values: Forwarding DefaultTTL InReceives InHdrErrors InAddrErrors ForwDatagrams.
        text.lines().filter_map(|line| line.strip_prefix("Ip: ")).nth(1).and_then(|values| values.split(' ').nth(5))
    };
    Ok(count.context("a count of forwarded packets")?.trim().parse()?)
}

fn both_forwarded(net: &Topology) -> Result<[u64; 2]> {
    Ok([forwarded(net.gw(Side::A), false)?, forwarded(net.gw(Side::B), false)?])
}

/// Pings from A to B until the gateways' kernels no longer forward them.
fn wait_for_short_cut(net: &Topology, pair: &Pair) -> Result<()> {
    wait(pair, "the kernel still forwards", || {
        let before = both_forwarded(net)?;
        Ok(one_ping(net)? && both_forwarded(net)? == before)
    })
}

fn wait(pair: &Pair, what: &str, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + patient(SOON);
    while !done()? {
        if Instant::now() > deadline {
            let (a, b) = (pair.a.status()?, pair.b.status()?);
            bail!("{what}\nA: {a:?}\nB: {b:?}\n{}\n{}", pair.a.log().text(), pair.b.log().text());
        }
    }
    Ok(())
}

/// Whether a ping is answered soon: for callers that try again.
fn one_ping(net: &Topology) -> Result<bool> {
    let one = Plan { timeout: Duration::from_millis(200), ..Plan::count(1) };
    Ok(ping::run(net.lan(Side::A), Side::B.host(), &one)?.received() == 1)
}

/// A ping that must be answered, also on a slow machine.
fn surely_one_ping(net: &Topology) -> Result<()> {
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(1))?.received(), 1);
    Ok(())
}

fn octets() -> Vec<u8> {
    (0..500_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect()
}

fn everything_passes(offload: Offload, mode: &str, short: bool, sealed: &str) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, offload)?;
    let pair = start(&net, &[("xdp-mode", mode), ("sealed", sealed)])?;
    if short {
        wait_for_short_cut(&net, &pair)?;
    }
    let (before, counted) = (both_forwarded(&net)?, [pair.a.status()?, pair.b.status()?]);
    let device = Daemon::Idea.device();
    let on_device = |side| net.gw(side).counters(device);
    let devices = [on_device(Side::A)?, on_device(Side::B)?];
    for side in [Side::A, Side::B] {
        let sizes: Vec<usize> = (ping::HEADERS..=MTU).step_by(7).chain([MTU]).collect();
        let report = ping::run(net.lan(side), side.other().host(), &Plan::sizes(sizes))?;
        assert_eq!((report.lost.as_slice(), report.damaged), (&[][..], 0), "from {side:?}");
    }
    let pings = 2 * ((MTU - ping::HEADERS) / 7 + 2) as u64;
    for (gateway, before) in [&pair.a, &pair.b].into_iter().zip(&counted) {
        for verdict in ["sent", "delivered"] {
            let due = before.count(verdict) + pings;
            let after = gateway.wait_for_status("each ping counted", |status| status.count(verdict) >= due)?;
            assert_eq!(after.count(verdict), due, "{verdict}: {after:?}");
        }
    }
    if short {
        assert_eq!(both_forwarded(&net)?, before, "not one went through the kernel");
        for (side, before) in [Side::A, Side::B].into_iter().zip(devices) {
            let after = on_device(side)?;
            let packets = [after.rx_packets - before.rx_packets, after.tx_packets - before.tx_packets];
            assert_eq!(packets, [0, 0], "the tunnel's device has no part in it");
        }
    }
    only_openings_take_the_kernels_way(&net, short)?;
    datagrams_stay_apart(&net)?;
    Ok(())
}

/// A TCP stream from either side arrives, and of a short one only the SYN and its answer pass the kernel.
fn only_openings_take_the_kernels_way(net: &Topology, short: bool) -> Result<()> {
    /// A host repeats an opening if the answer takes more than a second, as it may on an emulated machine.
    const ATTEMPTS: usize = 3;
    let octets = octets();
    let mut seen = Vec::new();
    for _ in 0..ATTEMPTS {
        let before = both_forwarded(net)?;
        for side in [Side::A, Side::B] {
            let to = (net.lan(side.other()), side.other().host());
            assert!(traffic::tcp_transfer(net.lan(side), to, &octets)? == octets, "from {side:?}");
        }
        let after = both_forwarded(net)?;
        seen.push([after[0] - before[0], after[1] - before[1]]);
        if !short || seen.ends_with(&[[4, 4]]) {
            return Ok(());
        }
    }
    bail!("more than the openings of streams went through the kernel each time: {seen:?}")
}

/// Segments of one UDP_SEGMENT call, small enough that the frame looks like one packet if its segment size is ignored.
fn datagrams_stay_apart(net: &Topology) -> Result<()> {
    const SEGMENTS: usize = 4;
    const OCTETS: u16 = 100;
    let server = net.lan(Side::B).run(|| UdpSocket::bind((Side::B.host(), 0)))?;
    let client = net.lan(Side::A).run(|| UdpSocket::bind((Side::A.host(), 0)))?;
    server.set_read_timeout(Some(patient(SOON)))?;
    client.connect(server.local_addr()?)?;
    let payload = pattern(7, SEGMENTS * usize::from(OCTETS));
    let (pieces, segments) = ([std::io::IoSlice::new(&payload)], [ControlMessage::UdpGsoSegments(&OCTETS)]);
    match sendmsg::<()>(client.as_raw_fd(), &pieces, &segments, MsgFlags::empty(), None) {
        Err(Errno::EIO) => {
            eprintln!("skipped: superframes of UDP, which Linux refuses for a card without checksums before 6.11");
            return Ok(());
        }
        sent => sent?,
    };
    let mut buffer = [0; 2000];
    for expected in payload.chunks(OCTETS.into()) {
        let length = server.recv(&mut buffer)?;
        assert!(buffer[..length] == *expected, "{length} octets");
    }
    Ok(())
}

#[test]
fn everything_passes_by_native_xdp_and_past_the_kernel() -> Result<()> {
    everything_passes(Offload::Raw, "native", true, "no")
}

#[test]
fn everything_passes_sealed_and_past_the_kernel() -> Result<()> {
    everything_passes(Offload::Raw, "native", true, "require")
}

#[test]
fn everything_passes_by_generic_xdp_and_past_the_kernel() -> Result<()> {
    everything_passes(Offload::Raw, "generic", true, "no")
}

#[test]
fn unfinished_checksums_are_finished_behind_native_xdp() -> Result<()> {
    everything_passes(Offload::On, "native", true, "no")
}

#[test]
fn superframes_and_unfinished_checksums_take_the_kernels_way_under_generic_xdp() -> Result<()> {
    everything_passes(Offload::On, "generic", false, "no")
}

/// Sends an echo request with a TTL; returns the address and the ICMP type of the answer.
fn probe(from: &Namespace, to: Ipv4Addr, ttl: u32) -> Result<(Ipv4Addr, u8)> {
    let socket = from.run(|| Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4)))?;
    socket.set_ttl_v4(ttl)?;
    socket.set_read_timeout(Some(patient(SOON)))?;
    let mut request = [8, 0, 0, 0, 0x7A, ttl as u8, 0, 1];
    let sum = checksum(&request);
    request[2..4].copy_from_slice(&sum.to_be_bytes());
    socket.send_to(&request, &SocketAddr::from((to, 0)).into())?;
    let mut buffer = [0; 2000];
    loop {
        let (length, _) = rustix::net::recv(&socket, &mut buffer[..], rustix::net::RecvFlags::empty())?;
        let Some(packet) = Ipv4::parse(&buffer[..length]) else { continue };
        let answers = match packet.payload {
            [0, _, _, _, id @ ..] => id.starts_with(&request[4..6]),
            [11 | 3, ..] => packet.payload.windows(2).any(|two| *two == request[4..6]),
            _ => false,
        };
        if answers {
            return Ok((packet.source, packet.payload[0]));
        }
    }
}

#[test]
fn each_gateway_is_a_hop() -> Result<()> {
    const ECHO_REPLY: u8 = 0;
    const TIME_EXCEEDED: u8 = 11;
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let pair = start(&net, &[])?;
    wait_for_short_cut(&net, &pair)?;
    let capture = Capture::start(net.lan(Side::B), 1000, |frame| {
        Frame::parse(frame).and_then(|frame| frame.ipv4()).is_some_and(|ip| ip.protocol == ICMP)
    })?;
    let far = Side::B.host();
    assert_eq!(probe(net.lan(Side::A), far, 1)?, (Side::A.gateway(), TIME_EXCEEDED));
    assert_eq!(probe(net.lan(Side::A), far, 2)?, (Side::B.tunnel(), TIME_EXCEEDED));
    assert_eq!(probe(net.lan(Side::A), far, 3)?, (far, ECHO_REPLY));
    assert_eq!(probe(net.lan(Side::A), far, 64)?, (far, ECHO_REPLY));
    let arrived = capture.finish()?;
    let requests: Vec<&[u8]> = arrived.iter().map(|frame| &frame.octets[14..]).filter(|ip| ip[20] == 8).collect();
    assert_eq!(requests.iter().map(|ip| ip[8]).collect::<Vec<_>>(), [1, 62]);
    assert!(requests.iter().all(|ip| checksum(&ip[..20]) == 0));
    Ok(())
}

#[test]
fn what_is_too_large_is_told_or_cut() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let pair = start(&net, &[])?;
    wait_for_short_cut(&net, &pair)?;
    let large = Plan { timeout: Duration::from_millis(200), ..Plan::sizes(vec![1500]) };
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &large)?.received(), 0);
    wait(&pair, "the sender is not told", || {
        let learned = net.lan(Side::A).ip(&["route", "get", &Side::B.host().to_string()])?;
        Ok(learned.contains(&format!("mtu {MTU}")))
    })?;
    for side in [Side::A, Side::B] {
        net.lan(side).sysctl("net.ipv4.ip_no_pmtu_disc", "1")?;
    }
    net.lan(Side::A).ip(&["route", "flush", "cache"])?;
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes(vec![1500]))?.received(), 1);
    Ok(())
}

#[test]
fn routes_and_rules_are_followed() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let pair = start(&net, &[])?;
    wait_for_short_cut(&net, &pair)?;
    let (gateway, far, host) = (net.gw(Side::A), Side::B.lan(), format!("{}/32", Side::B.host()));
    let device = Daemon::Idea.device();
    let silent = || Ok(!one_ping(&net)?);

    gateway.ip(&["route", "del", &far, "dev", device])?;
    wait(&pair, "the route that has gone is still taken", silent)?;
    gateway.ip(&["route", "add", &far, "dev", device])?;
    wait_for_short_cut(&net, &pair)?;

    gateway.ip(&["route", "add", "blackhole", &host])?;
    wait(&pair, "a longer route to nowhere does not win", silent)?;
    gateway.ip(&["route", "del", "blackhole", &host])?;
    wait_for_short_cut(&net, &pair)?;

    gateway.ip(&["route", "add", &host, "dev", device, "metric", "5"])?;
    gateway.ip(&["route", "del", &far, "dev", device])?;
    wait_for_short_cut(&net, &pair)?;

    // With any rule, the prefix of the destination alone no longer decides the route.
    gateway.ip(&["rule", "add", "fwmark", "7", "lookup", "100"])?;
    pair.a.wait_for_status("a rule", |status| has_door(&status.doors, "routing rules decide"))?;
    let before = forwarded(gateway, false)?;
    surely_one_ping(&net)?;
    assert_eq!(forwarded(gateway, false)? - before, 2);
    gateway.ip(&["rule", "del", "fwmark", "7", "lookup", "100"])?;
    wait_for_short_cut(&net, &pair)?;

    gateway.sysctl("net.ipv4.ip_forward", "0")?;
    wait(&pair, "what the kernel does not forward goes past it", silent)?;
    Ok(())
}

#[test]
fn neighbours_are_followed_and_nothing_is_lost_while_they_are_asked_for() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let pair = start(&net, &[])?;
    wait_for_short_cut(&net, &pair)?;
    let (gateway, host) = (net.gw(Side::B), Side::B.host().to_string());
    for _ in 0..5 {
        gateway.ip(&["neigh", "flush", "dev", "lan0"])?;
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(3))?.received(), 3);
        wait_for_short_cut(&net, &pair)?;
    }
    // The host gets another card: the kernel learns it, and so does the engine.
    let lan = net.lan(Side::B);
    lan.ip(&["link", "set", "eth0", "down"])?;
    lan.ip(&["link", "set", "eth0", "address", "02:00:00:00:00:77"])?;
    lan.ip(&["link", "set", "eth0", "up"])?;
    lan.ip(&["route", "replace", "default", "via", &Side::B.gateway().to_string()])?;
    gateway.ip(&["neigh", "replace", &host, "lladdr", "02:00:00:00:00:77", "dev", "lan0", "nud", "reachable"])?;
    wait_for_short_cut(&net, &pair)?;
    // If the host does not answer any more, the kernel reports it to senders.
    let before = forwarded(gateway, false)?;
    gateway.ip(&["neigh", "replace", &host, "dev", "lan0", "nud", "failed"])?;
    wait(&pair, "the kernel never gets to ask", || {
        one_ping(&net)?;
        Ok(forwarded(gateway, false)? > before)
    })
}

#[test]
fn a_card_that_comes_goes_or_is_called_otherwise() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("lan", "later0"))?;
    pair.wait_for_keys(&net)?;
    pair.a.wait_for_line("no card yet", |line| line.contains("later0: no such network device"))?;
    let gateway = net.gw(Side::A);
    let has = |words: &'static str| move |status: &cipe_tests::status::Status| has_door(&status.doors, words);

    gateway.ip(&["link", "set", "lan0", "down"])?;
    gateway.ip(&["link", "set", "lan0", "name", "later0"])?;
    gateway.ip(&["link", "set", "later0", "up"])?;
    pair.a.wait_for_status("a card of that name", has("later0: short cut"))?;
    wait(&pair, "pings after a new name", || one_ping(&net))?;

    gateway.ip(&["link", "set", "later0", "mtu", "1400"])?;
    surely_one_ping(&net)?;

    gateway.ip(&["link", "set", "later0", "down"])?;
    gateway.ip(&["link", "set", "later0", "name", "lan0"])?;
    gateway.ip(&["link", "set", "lan0", "up"])?;
    pair.a.wait_for_status("another name", has("no short cut: later0: it is called lan0 now"))?;
    wait(&pair, "pings without a short cut", || one_ping(&net))?;

    gateway.ip(&["link", "set", "lan0", "down"])?;
    gateway.ip(&["link", "set", "lan0", "name", "later0"])?;
    gateway.ip(&["link", "set", "later0", "up"])?;
    pair.a.wait_for_status("the name again", has("later0: short cut"))?;
    gateway.ip(&["link", "del", "later0"])?;
    pair.a.wait_for_status("no card", has("no short cut: later0: it has gone"))?;
    assert!(pair.stop()?.iter().all(std::process::ExitStatus::success));
    Ok(())
}

#[test]
fn a_carrier_card_is_refused_and_one_without_xdp_taken() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    for (carrier, words) in [("xdp", "no short cut: wire0: AF_XDP serves it as a carrier"), ("udp", "wire0: short cut")]
    {
        let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("lan", "wire0").set("carrier", carrier))?;
        pair.wait_for_keys(&net)?;
        let status = pair.a.wait_for_status(words, |status| {
            // The engine opens the carrier's card when the route to the peer is known, which may be after the short cut.
            has_door(&status.doors, words) || has_door(&status.doors, "wire0: UDP socket, the short cut (`lan`)")
        })?;
        assert!(carrier == "xdp" || has_door(&status.doors, words), "{status:?}");
        surely_one_ping(&net)?;
    }
    Ok(())
}

#[test]
fn two_tunnels_share_a_card() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let pair = start(&net, &[])?;
    let far = Ipv4Addr::new(10, 220, 2, 2);
    let inner = |side| match side {
        Side::A => "10.202.0.1",
        Side::B => "10.202.0.2",
    };
    net.lan(Side::B).ip(&["addr", "add", &format!("{far}/32"), "dev", "lo"])?;
    net.gw(Side::B).ip(&["route", "add", &format!("{far}/32"), "via", &Side::B.host().to_string()])?;
    let second = |side: Side, routes: &[String]| {
        let options = Options::of(side)
            .set("lan", "lan0")
            .set("ipaddr", inner(side))
            .set("ptpaddr", inner(side.other()))
            .set("me", format!("{}:{}", side.carrier(), PORT + 1))
            .set("peer", format!("{}:{}", side.other().carrier(), PORT + 1));
        let name = side.letter().to_string();
        let mut gateway = Gateway::start_in(&net, (net.gw(side), &name), routes, Daemon::Idea, &options)?;
        gateway.wait_up()?;
        Ok::<_, anyhow::Error>(gateway)
    };
    let others = [second(Side::A, &[format!("{far}/32")])?, second(Side::B, &[])?];
    // Answers go by the first tunnel, where the other end's short cut does not expect their source: the kernel forwards them.
    wait(&pair, "requests never go past the kernel", || {
        let before = forwarded(net.gw(Side::A), false)?;
        let one = Plan { timeout: Duration::from_millis(200), ..Plan::count(1) };
        Ok(ping::run(net.lan(Side::A), far, &one)?.received() == 1 && forwarded(net.gw(Side::A), false)? - before == 1)
    })?;
    let before = forwarded(net.gw(Side::A), false)?;
    assert_eq!(ping::run(net.lan(Side::A), far, &Plan::count(10))?.received(), 10);
    assert_eq!(forwarded(net.gw(Side::A), false)? - before, 10, "answers only");
    drop(others);
    wait_for_short_cut(&net, &pair)
}

fn host6(side: Side) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x210, lan6(side), 0, 0, 0, 0, 2)
}

fn lan6(side: Side) -> u16 {
    if side == Side::A { 1 } else { 2 }
}

#[test]
fn ipv6_goes_past_the_kernel_too() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    for side in [Side::A, Side::B] {
        let (gateway, lan) = (net.gw(side), net.lan(side));
        gateway.sysctl("net.ipv6.conf.default.disable_ipv6", "0")?;
        for (namespace, device) in [(gateway, "lan0"), (lan, "eth0")] {
            namespace.sysctl(&format!("net.ipv6.conf.{device}.accept_dad"), "0")?;
            namespace.sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), "0")?;
        }
        let router = format!("fd00:210:{}::1", lan6(side));
        gateway.ip(&["-6", "addr", "add", &format!("{router}/64"), "dev", "lan0", "nodad"])?;
        lan.ip(&["-6", "addr", "add", &format!("{}/64", host6(side)), "dev", "eth0", "nodad"])?;
        lan.ip(&["-6", "route", "add", "default", "via", &router])?;
    }
    let pair = start(&net, &[])?;
    for side in [Side::A, Side::B] {
        let gateway = net.gw(side);
        gateway.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        let far = format!("fd00:210:{}::/64", lan6(side.other()));
        gateway.ip(&["-6", "route", "add", &far, "dev", Daemon::Idea.device()])?;
    }
    let server = net.lan(Side::B).run(|| UdpSocket::bind((host6(Side::B), 0)))?;
    let client = net.lan(Side::A).run(|| UdpSocket::bind((host6(Side::A), 0)))?;
    client.connect(server.local_addr()?)?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    }
    const FIRST: &[u8] = b"first";
    let mut buffer = [0; 2000];
    let mut echo = |octets: &[u8]| -> Result<bool> {
        client.send(octets)?;
        // One of the first packets may be late.
        let late = |got: &[u8]| got == FIRST && got != octets;
        loop {
            let Ok((length, from)) = server.recv_from(&mut buffer) else { return Ok(false) };
            if !late(&buffer[..length]) {
                server.send_to(&buffer[..length], from)?;
                break;
            }
        }
        loop {
            let Ok(length) = client.recv(&mut buffer) else { return Ok(false) };
            if !late(&buffer[..length]) {
                return Ok(buffer[..length] == *octets);
            }
        }
    };
    let kernels = || Ok::<_, anyhow::Error>([forwarded(net.gw(Side::A), true)?, forwarded(net.gw(Side::B), true)?]);
    wait(&pair, "IPv6 never goes past the kernel", || {
        let before = kernels()?;
        Ok(echo(FIRST)? && kernels()? == before)
    })?;
    // None may be lost from here on.
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(patient(SOON)))?;
    }
    let before = kernels()?;
    for size in (1..=MTU - 48).step_by(31) {
        assert!(echo(&pattern(size as u32, size))?, "{size} octets");
    }
    assert_eq!(kernels()?, before);
    let listener = net.lan(Side::B).run(|| TcpListener::bind((host6(Side::B), 0)))?;
    let mut sender = net.lan(Side::A).run(|| TcpStream::connect(listener.local_addr()?))?;
    let mut receiver = listener.accept()?.0;
    let (octets, mut received) = (octets(), Vec::new());
    std::thread::scope(|scope| -> Result<()> {
        let sending = scope.spawn(|| {
            std::io::Write::write_all(&mut sender, &octets)?;
            sender.shutdown(std::net::Shutdown::Write)
        });
        std::io::Read::read_to_end(&mut receiver, &mut received)?;
        Ok(sending.join().expect("writing does not panic")?)
    })?;
    assert!(received == octets);
    for (before, after) in before.into_iter().zip(kernels()?) {
        assert_eq!(after - before, 2, "only the opening went through the kernel");
    }
    Ok(())
}
