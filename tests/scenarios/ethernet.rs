//! Ethernet tunnels (protocol 4): two LANs in one network, joined by tunnel devices in bridges.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cipe_tests::bridge::{self, Port, host};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::joined::{Joined, MTU, addressless, lans_reach_each_other};
use cipe_tests::net::pattern;
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options, PORT};
use cipe_tests::peer::{Cipher, Config, Peer};
use cipe_tests::ping::{self, HEADERS, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, process, traffic};
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, set_ip_mtu_discover};
use rustix::process::Signal;

/// Octets of an Ethernet header.
const ETHERNET: usize = 14;
/// Time to wait for frames that must not arrive, after another one has arrived.
const A_WHILE: Duration = Duration::from_millis(300);

/// A frame from an address that no device has.
fn frame(to: [u8; 6], header: &[u8], content: &[u8]) -> Vec<u8> {
    [&to, &[0x02, 0, 0, 0, 0, 0x77][..], header, content].concat()
}

const BROADCAST: [u8; 6] = [0xFF; 6];

#[test]
fn bridged_lans_are_one_ethernet() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (daemon, offload) in [
        (Daemon::EthernetBlowfish, Offload::On),
        (Daemon::EthernetBlowfish, Offload::Raw),
        (Daemon::EthernetIdea, Offload::On),
        (Daemon::EthernetIdea, Offload::Off),
    ] {
        let joined = Joined::new(daemon, offload, |_, options| options)?;
        joined.everything_passes()?;
        for side in [Side::A, Side::B] {
            let status = joined.gateway(side).status()?;
            let refused = ["bad-inner", "bad-crc", "too-big", "private-malformed", "private-full"];
            for verdict in refused {
                assert_eq!(status.count(verdict), 0, "{daemon:?} {offload:?} {verdict}: {status:?}");
            }
            // ARP found the other side's host, and the bridge learned its address at the tunnel's port.
            let mac = joined.net.lan(side.other()).mac("eth0")?.map(|octet| format!("{octet:02x}")).join(":");
            let learned = bridge::learned_at(joined.net.gw(side), daemon.device())?;
            assert!(learned.contains(&mac), "{mac} is not among {learned:?}");
        }
        for status in joined.pair.stop()? {
            assert!(status.success(), "a daemon ended with {status}");
        }
    }
    Ok(())
}

#[test]
fn bridged_lans_are_one_ethernet_sealed_by_each_door() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (carrier, offload) in [("udp", Offload::On), ("xdp", Offload::Raw)] {
        let change = |_, options: Options| options.set("carrier", carrier).sealed();
        let joined = Joined::new(Daemon::EthernetIdea, offload, change)?;
        joined.everything_passes()?;
        joined.passes(&frame([0x02, 0, 0, 0, 0, 0x99], &[0x88, 0xB5], &pattern(2, MTU)), "the largest frame")?;
        for status in joined.pair.stop()? {
            assert!(status.success(), "a daemon ended with {status}");
        }
    }
    Ok(())
}

#[test]
fn every_door_carries_frames() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (carrier, mode, offload) in [
        ("udp", "auto", Offload::On),
        ("xdp", "native", Offload::On),
        ("xdp", "generic", Offload::Off),
        ("auto", "native", Offload::Raw),
        ("udp", "native", Offload::Off),
    ] {
        let change = |_, options: Options| options.set("carrier", carrier).set("xdp-mode", mode);
        let joined = Joined::new(Daemon::EthernetBlowfish, offload, change)?;
        joined.everything_passes()?;
    }
    Ok(())
}

#[test]
fn frames_of_every_kind_arrive_octet_for_octet() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let joined = Joined::new(Daemon::EthernetBlowfish, Offload::On, |_, options| options)?;
    let unicast = [0x02, 0, 0, 0, 0, 0x99];
    for (what, frame) in [
        ("a foreign ethertype", frame(unicast, &[0x88, 0xB5], &pattern(1, 100))),
        ("the shortest frame", frame(unicast, &[0x88, 0xB5], &[])),
        ("a frame of the largest size", frame(unicast, &[0x88, 0xB5], &pattern(2, MTU))),
        ("broadcast", frame(BROADCAST, &[0x88, 0xB5], &pattern(3, 46))),
        ("multicast", frame([0x01, 0, 0x5E, 1, 2, 3], &[0x88, 0xB5], &pattern(4, 46))),
        ("multicast of IPv6", frame([0x33, 0x33, 0, 0, 0, 1], &[0x88, 0xB5], &pattern(5, 46))),
        ("IEEE 802.3 with LLC", frame(unicast, &[0, 46], &[&[0x42, 0x42, 3][..], &pattern(6, 43)].concat())),
        ("a VLAN tag", frame(unicast, &[0x81, 0x00, 0x60, 0x05, 0x88, 0xB5], &pattern(7, 200))),
        ("a VLAN tag of the largest size", frame(unicast, &[0x81, 0, 0, 5, 0x88, 0xB5], &pattern(8, MTU))),
        ("two tags", frame(unicast, &[0x88, 0xA8, 0, 9, 0x81, 0, 0, 5, 0x88, 0xB5], &pattern(9, 200))),
        ("a tag like the stamp's", frame(unicast, &[0x88, 0xA8, 0x05, 0x78, 0x88, 0xB5], &pattern(12, 200))),
        ("two such", frame(unicast, &[0x88, 0xA8, 0, 0, 0x88, 0xA8, 0xFF, 0xFF, 0x88, 0xB5], &pattern(13, 200))),
        ("an address like an IPv6 header", frame([0x60, 0, 0, 0, 0, 74], &[0x88, 0xB5], &pattern(10, 100))),
        ("an address like a stamp", frame([0xC2, 0, 0, 0, 0, 0], &[0x88, 0xB5], &pattern(11, 100))),
    ] {
        joined.passes(&frame, what)?;
    }
    Ok(())
}

#[test]
fn the_second_implementation_and_ours_carry_each_others_frames() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (daemon, cipher) in [(Daemon::EthernetBlowfish, Cipher::Blowfish), (Daemon::EthernetIdea, Cipher::Idea)] {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        bridge::join_lans(&net)?;
        let tap = bridge::tap(net.gw(Side::B), "theirs0")?;
        net.gw(Side::B).ip(&["link", "set", "theirs0", "mtu", &MTU.to_string()])?;
        bridge::join(net.gw(Side::B), "theirs0")?;
        let mut key = [0; 16];
        hex::decode_to_slice(KEY, &mut key)?;
        let config = Config {
            echo: false,
            shortest_inner: ETHERNET,
            peer: Some(SocketAddr::from((Side::A.carrier(), PORT))),
            ..Config::original(cipher, key)
        };
        let socket = net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), PORT)))?;
        let mut ours = Gateway::start(&net, Side::A, daemon, &addressless(Options::of(Side::A)))?;
        bridge::join(net.gw(Side::A), &ours.wait_up()?)?;
        // Start it after ours: its first frame announces a key, and it announces no other within tokxc.
        let (theirs, _events) = Peer::start_with_device(socket, config, tap.as_fd().try_clone_to_owned()?)?;
        let ports = [Port::new(net.gw(Side::A), "port0")?, Port::new(net.gw(Side::B), "port0")?];
        for side in [Side::A, Side::B] {
            let came = ping::wait_for_answer(net.lan(side), host(side.other()), Duration::from_millis(200), SOON)?;
            assert!(came, "from {side:?}: {:?}\n{:?}", theirs.counters(), ours.status());
        }
        lans_reach_each_other(&net)?;
        for (at, frame) in [
            frame(BROADCAST, &[0x88, 0xB5], &pattern(1, 46)),
            frame([2, 0, 0, 0, 0, 0x99], &[0x81, 0, 0, 5, 0x88, 0xB5], &pattern(2, 1000)),
        ]
        .iter()
        .enumerate()
        {
            for (from, to) in [(0, 1), (1, 0)] {
                ports[from].send(frame)?;
                let came = ports[to].wait_for(SOON, |came| came == frame)?;
                came.with_context(|| format!("frame {at} from {from}: {:?}", theirs.counters()))?;
            }
        }
        let counters = theirs.stop()?;
        assert!(counters.sent_dynamic > 0 && counters.delivered_dynamic > 0, "{counters:?}");
        assert_eq!((counters.bad_crc, counters.bad_p, counters.bad_length, counters.short_inner), (0, 0, 0, 0));
        let status = ours.status()?;
        assert_eq!((status.count("bad-inner"), status.count("bad-crc")), (0, 0), "{status:?}");
    }
    Ok(())
}

#[test]
fn ipv6_neighbours_are_found_through_the_tunnel() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let joined = Joined::new(Daemon::EthernetBlowfish, Offload::On, |_, options| options)?;
    for side in [Side::A, Side::B] {
        let lan = joined.net.lan(side);
        lan.sysctl("net.ipv6.conf.eth0.accept_dad", "0")?;
        lan.sysctl("net.ipv6.conf.eth0.disable_ipv6", "0")?;
        lan.ip(&[
            "addr",
            "add",
            &format!("fd00:220::{}/64", if side == Side::A { 1 } else { 2 }),
            "dev",
            "eth0",
            "nodad",
        ])?;
    }
    let server = joined.net.lan(Side::B).run(|| std::net::TcpListener::bind("[fd00:220::2]:0"))?;
    let address = server.local_addr()?;
    let mut client =
        joined.net.lan(Side::A).run(|| std::net::TcpStream::connect_timeout(&address, process::patient(SOON)))?;
    let (mut accepted, _) = server.accept()?;
    let octets = pattern(1, 100_000);
    std::thread::scope(|scope| -> Result<()> {
        let sender = scope.spawn(|| std::io::Write::write_all(&mut client, &octets));
        let mut came = vec![0; octets.len()];
        std::io::Read::read_exact(&mut accepted, &mut came)?;
        assert!(came == octets);
        sender.join().expect("the sender does not panic")?;
        Ok(())
    })
}

#[test]
fn what_is_larger_than_the_path_is_cut_outside_or_told() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    // Bridges forward full frames of hosts, the carrier does not.
    let change = |_, options: Options| options.set("mtu", 1500);
    let joined = Joined::new(Daemon::EthernetBlowfish, Offload::Off, change)?;
    for (what, frame) in [
        ("a frame that no IP forbids to cut", frame([2, 0, 0, 0, 0, 0x99], &[0x88, 0xB5], &pattern(1, 1500))),
        ("a tagged one", frame([2, 0, 0, 0, 0, 0x99], &[0x81, 0, 0, 5, 0x88, 0xB5], &pattern(2, 1500))),
    ] {
        joined.passes(&frame, what)?;
    }
    let came = joined.gateway(Side::B).wait_for_status("fragments", |status| status.count("fragmented") >= 2)?;
    assert_eq!(came.count("bad-crc"), 0, "{came:?}");
    // DF: dropped and counted; TCP's segments are clamped to what fits.
    let lan = joined.net.lan(Side::A);
    lan.run(|| -> Result<()> {
        let socket = UdpSocket::bind((host(Side::A), 0))?;
        set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::PROBE)?;
        socket.send_to(&pattern(3, 1472), (host(Side::B), 9))?;
        Ok(())
    })?;
    joined.gateway(Side::A).wait_for_status("too big", |status| status.count("too-big") == 1)?;
    joined.everything_passes()
}

#[test]
fn a_frame_larger_than_the_device_is_counted_where_it_arrives() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let change = |side, options: Options| options.set("mtu", if side == Side::A { 1428 } else { 1000 });
    let joined = Joined::new(Daemon::EthernetBlowfish, Offload::Off, change)?;
    let small = frame(BROADCAST, &[0x88, 0xB5], &pattern(1, 1000));
    let large = frame(BROADCAST, &[0x88, 0xB5], &pattern(2, 1400));
    joined.port(Side::A).send(&large)?;
    joined.gateway(Side::B).wait_for_status("the large one", |status| status.count("private-full") == 1)?;
    joined.passes(&small, "one that fits")
}

/// `ip link set cipdb0 mtu N`, at both gateways.
#[test]
fn an_mtu_that_an_operator_sets_is_followed() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let joined = Joined::new(Daemon::EthernetBlowfish, Offload::Off, |_, options| options)?;
    let large = frame(BROADCAST, &[0x88, 0xB5], &pattern(2, 1500));
    let set = |side: Side, mtu: &str| -> Result<()> {
        joined.net.gw(side).ip(&["link", "set", "cipdb0", "mtu", mtu])?;
        let line = format!("the interface's MTU is {mtu} now");
        joined.gateway(side).wait_for_line("of the MTU", |text| text.contains(&line)).map(drop)
    };
    set(Side::A, "1500")?;
    joined.port(Side::A).send(&large)?;
    joined.gateway(Side::B).wait_for_status("it is too large", |status| status.count("private-full") == 1)?;
    set(Side::B, "1500")?;
    joined.passes(&large, "a larger frame")?;
    // Pings may fill the MTU if the carrier is allowed to fragment.
    let plan = Plan::sizes(vec![HEADERS, MTU]);
    assert_eq!(ping::run(joined.net.lan(Side::A), host(Side::B), &plan)?.received(), 2);
    set(Side::B, "1000")?;
    joined.port(Side::A).send(&large)?;
    joined.gateway(Side::B).wait_for_status("it is too large again", |status| status.count("private-full") == 2)?;
    joined.passes(&frame(BROADCAST, &[0x88, 0xB5], &pattern(3, 1000)), "a frame that fits")
}

#[test]
fn the_device_stays_in_its_bridge_while_the_engine_is_dead_and_drops() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let joined = Joined::new(Daemon::EthernetBlowfish, Offload::On, |_, options| options)?;
    let gateway = joined.net.gw(Side::A);
    let index = bridge::index_in_bridge(gateway, "cipdb0")?;
    let engine = joined.pair.a.engine_pid().context("an engine runs")?;
    process::signal(joined.pair.a.pid(), Signal::STOP)?;
    process::signal(engine, Signal::KILL)?;
    process::wait_gone(engine, SOON)?;
    let probe = frame(BROADCAST, &[0x88, 0xB5], &pattern(1, 100));
    joined.port(Side::A).send(&probe)?;
    assert_eq!(joined.port(Side::B).wait_for(A_WHILE, |came| came == probe)?, None, "nothing may pass");
    process::signal(joined.pair.a.pid(), Signal::CONT)?;
    assert!(
        ping::wait_for_answer(joined.net.lan(Side::A), host(Side::B), Duration::from_millis(100), SOON)?,
        "the tunnel comes back"
    );
    assert_eq!(bridge::index_in_bridge(gateway, "cipdb0")?, index, "the same device");
    joined.everything_passes()?;
    // If a daemon dies with its engine, the next one takes over the device.
    let Joined { pair, net, .. } = joined;
    let engine = pair.a.engine_pid().context("an engine runs")?;
    process::signal(engine, Signal::KILL)?;
    pair.a.kill()?;
    process::wait_gone(engine, SOON)?;
    let options = addressless(Options::of(Side::A));
    let mut again = Gateway::start(&net, Side::A, Daemon::EthernetBlowfish, &options)?;
    assert_eq!(again.wait_up()?, "cipdb0", "what was left has gone");
    assert!(again.stop()?.success());
    // The engine removes the device after its daemon has ended, and ends then.
    for pid in net.gw(Side::A).processes()? {
        process::wait_gone(pid, SOON)?;
    }
    let left: Vec<String> = net.gw(Side::A).devices()?.into_iter().filter(|name| name.starts_with("cip")).collect();
    assert_eq!(left, [""; 0]);
    Ok(())
}

#[test]
fn two_protocols_do_not_meet_and_both_ends_say_so_once() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut packets = Gateway::start(&net, Side::A, Daemon::Blowfish, &Options::of(Side::A))?;
    let options = Options::of(Side::B).set("mask", "255.255.255.0");
    let mut frames = Gateway::start(&net, Side::B, Daemon::EthernetBlowfish, &options)?;
    packets.wait_up()?;
    frames.wait_up()?;
    let plan = Plan { timeout: A_WHILE, ..Plan::count(3) };
    let count = |gateway: &Gateway| gateway.status().map(|status| status.count("bad-inner"));
    let deadline = Instant::now() + process::patient(SOON);
    while count(&packets)? < 3 || count(&frames)? < 3 {
        for side in [Side::A, Side::B] {
            assert_eq!(ping::run(net.gw(side), side.other().tunnel(), &plan)?.received(), 0);
        }
        assert!(Instant::now() < deadline, "{:?}\n{:?}", packets.status()?, frames.status()?);
    }
    for gateway in [&packets, &frames] {
        assert_eq!(gateway.status()?.count("delivered"), 0);
    }
    packets.wait_for_lines(1, "of frames", |line| line.contains("the peer sends Ethernet frames (protocol 4)"))?;
    frames.wait_for_lines(1, "of packets", |line| line.contains("the peer sends IP packets (protocol 3)"))
}

#[test]
fn the_interface_is_as_its_options_say() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let options = Options::of(Side::A).set("hwaddr", "02:11:22:33:44:55").set("mask", "255.255.255.0");
    let mut gateway =
        Gateway::start(&net, Side::A, Daemon::EthernetIdea, &options.clone().set("bcast", "10.201.0.127"))?;
    assert_eq!(gateway.wait_up()?, "cipdi0");
    let shown = || -> Result<serde_json::Value> {
        Ok(serde_json::from_str(&net.gw(Side::A).ip(&["-j", "addr", "show", "dev", "cipdi0"])?)?)
    };
    let device = &shown()?[0];
    assert_eq!((&device["address"], &device["mtu"]), (&"02:11:22:33:44:55".into(), &MTU.into()));
    let flags = device["flags"].to_string();
    assert!(flags.contains("BROADCAST") && flags.contains("MULTICAST") && !flags.contains("NOARP"), "{flags}");
    let address = &device["addr_info"][0];
    assert_eq!(
        (&address["local"], &address["prefixlen"], &address["broadcast"]),
        (&"10.201.0.1".into(), &24.into(), &"10.201.0.127".into())
    );
    let json = String::from_utf8(gateway.cipe(&["show", "--json"]).output()?.stdout)?;
    assert!(json.replace(' ', "").contains("\"protocol\":4"), "{json}");
    let text = String::from_utf8(gateway.cipe(&["show"]).output()?.stdout)?;
    assert!(text.contains("4, Ethernet frames"), "{text}");
    assert!(gateway.stop()?.success());

    // Without `bcast` the broadcast address of the network; without `mask` a route to the peer alone.
    let mut gateway = Gateway::start(&net, Side::A, Daemon::EthernetIdea, &options.clone())?;
    gateway.wait_up()?;
    assert_eq!(shown()?[0]["addr_info"][0]["broadcast"], "10.201.0.255");
    assert!(gateway.stop()?.success());
    let mut gateway = Gateway::start(&net, Side::A, Daemon::EthernetIdea, &options.without("mask"))?;
    gateway.wait_up()?;
    let address = &shown()?[0]["addr_info"][0];
    assert_eq!((&address["address"], &address["prefixlen"]), (&Side::B.tunnel().to_string().into(), &32.into()));
    assert!(gateway.stop()?.success());
    Ok(())
}

#[test]
fn addresses_on_the_tunnel_work_without_a_bridge() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::EthernetBlowfish, |_, options| options.set("mask", "255.255.255.0"))?;
    for side in [Side::A, Side::B] {
        let to: Ipv4Addr = side.other().tunnel();
        assert!(ping::wait_for_answer(net.gw(side), to, Duration::from_millis(100), SOON)?, "from {side:?}");
    }
    let octets = pattern(1, 1 << 20);
    let to = (net.gw(Side::B), Side::B.tunnel());
    assert!(traffic::tcp_transfer(net.gw(Side::A), to, &octets)? == octets);
    for status in pair.stop()? {
        assert!(status.success());
    }
    Ok(())
}

const _: () = assert!(ETHERNET + MTU == 1442);
