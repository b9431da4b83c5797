//! The peer is reached through a SOCKS5 server that relays UDP: a real one, in the place of the tap.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::options::{Options, PORT};
use cipe_tests::original::another_address;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::relayed::port_of;
use cipe_tests::socks::{self, Server};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, traffic};

/// The tunnel's MTU with room for the header of 10 octets, which is always reserved (protocol section 2).
const MTU: usize = 1442;

/// The server's address towards a gateway.
fn port(side: Side) -> Ipv4Addr {
    match port_of(side) {
        SocketAddr::V4(address) => *address.ip(),
        SocketAddr::V6(_) => unreachable!("the tap has IPv4 addresses"),
    }
}

/// Gateways that reach each other only through the server.
fn network() -> Result<Topology> {
    let net = Topology::new(Carrier::Tapped, Offload::On)?;
    let tap = net.tap().context("a tapped carrier has a tap")?;
    tap.sysctl("net.ipv4.ip_forward", "0")?;
    for side in [Side::A, Side::B] {
        tap.sysctl(&format!("net.ipv4.conf.port{}.proxy_arp", side.letter()), "0")?;
        net.gw(side).ip(&["route", "add", &port(side).to_string(), "dev", "wire0"])?;
    }
    Ok(net)
}

fn serve(net: &Topology, password: bool) -> Result<Server> {
    let tap = net.tap().context("a tapped carrier has a tap")?;
    Server::start(tap, net.directory(), (port(Side::A), port(Side::B)), password)
}

fn through(options: Options) -> Options {
    options.set("socks", format!("{}:{}", port(Side::A), socks::PORT)).set("maxerr", -1).set("tokxc", 1)
}

fn pair(net: &Topology) -> Result<Pair> {
    Pair::start(net, Daemon::Blowfish, |side, options| match side {
        Side::A => through(options),
        Side::B => options.set("peer", "0.0.0.0:0"),
    })
}

/// Lines of a gateway's log with the address of the relay or the peer.
fn places(gateway: &Gateway, what: &str) -> Vec<SocketAddr> {
    let place = |line: &str| line.split_once(what)?.1.trim().parse().ok();
    gateway.log().lines().iter().filter_map(|line| place(&line.text)).collect()
}

#[test]
fn everything_passes_through_a_socks_server() -> Result<()> {
    if !may_make_namespaces() || !socks::may_have_server() {
        return Ok(());
    }
    let net = network()?;
    let server = serve(&net, false)?;
    let pair = pair(&net)?;
    pair.wait_for_keys(&net).with_context(|| server.log())?;
    for side in [Side::A, Side::B] {
        let plan = Plan::sizes((ping::HEADERS..=MTU).step_by(7).chain([MTU]).collect());
        let report = ping::run(net.lan(side), side.other().host(), &plan)?;
        assert_eq!((report.received(), report.damaged), (report.sent, 0), "lost: {:?}", report.lost);
        let octets: Vec<u8> = (0..500_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
        let to = (net.lan(side.other()), side.other().host());
        assert!(traffic::tcp_transfer(net.lan(side), to, &octets)? == octets, "from {side:?}");
    }
    let status = pair.a.status()?;
    let relay = *places(&pair.a, "the SOCKS5 server relays at ").last().context("the log tells of the relay")?;
    let door = format!("wire0: UDP socket, by the relay {relay} of the SOCKS5 server {}:1080", port(Side::A));
    assert!(status.doors.contains(&door), "{status:?}");
    assert_eq!(status.count("bad-relay") + status.count("wrong-peer"), 0, "{status:?}");
    let peer = *places(&pair.b, "new peer ").last().context("B has learned where A is")?;
    assert_eq!(peer.ip(), port(Side::B), "B sees the server");
    Ok(())
}

/// The relay exists as long as its TCP connection: when the server ends, nothing reaches the peer, and nothing takes another
/// path.
#[test]
fn a_server_that_is_started_again_relays_again() -> Result<()> {
    if !may_make_namespaces() || !socks::may_have_server() {
        return Ok(());
    }
    let net = network()?;
    let mut server = serve(&net, false)?;
    let pair = pair(&net)?;
    pair.wait_for_keys(&net)?;
    let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
    for restart in 1..=3 {
        drop(server);
        pair.a.wait_for_status("no relay", |status| status.doors.iter().any(|door| door.contains("no relay")))?;
        let before = pair.a.status()?;
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &one)?.received(), 0);
        let after =
            pair.a.wait_for_status("the ping dropped", |status| status.count("no-route") > before.count("no-route"))?;
        assert_eq!(after.count("sent"), before.count("sent"), "{after:?}");
        let line = pair.a.wait_for_line("of the lost relay", |line| line.contains("SOCKS5 server 192.0.2.1:1080: "))?;
        assert!(line.text.contains("network error"), "{}", line.text);

        server = serve(&net, false)?;
        let deadline = Instant::now() + patient(SOON);
        while ping::run(net.lan(Side::A), Side::B.host(), &one)?.received() == 0 {
            if Instant::now() > deadline {
                bail!("restart {restart}: {}\n{}\n{}", server.log(), pair.a.log().text(), pair.b.log().text());
            }
        }
        assert!(places(&pair.a, "the SOCKS5 server relays at ").len() > restart);
    }
    Ok(())
}

/// A server relays to a client only datagrams from addresses that the client has sent to. So a peer that has moved is found by
/// its name, and a client that has moved by its packets.
#[test]
fn either_end_may_move_while_a_server_stands_between() -> Result<()> {
    if !may_make_namespaces() || !socks::may_have_server() {
        return Ok(());
    }
    let net = network()?;
    let server = serve(&net, false)?;
    let hosts = |address| net.gw(Side::A).set_etc("hosts", &format!("127.0.0.1 localhost\n{address} gw-b.test\n"));
    hosts(Side::B.carrier().into())?;
    let named = |options: Options| through(options).set("peer", format!("gw-b.test:{PORT}"));
    let mut pair = Pair::start(&net, Daemon::Blowfish, |side, options| match side {
        Side::A => named(options),
        Side::B => options.set("peer", "0.0.0.0:0"),
    })?;
    pair.wait_for_keys(&net)?;

    let moved = SocketAddr::new(another_address(&net, Side::B)?.ip(), PORT);
    pair.b.stop()?;
    pair.b = Gateway::start(
        &net,
        Side::B,
        Daemon::Blowfish,
        &Options::of(Side::B).set("peer", "0.0.0.0:0").set("me", moved),
    )?;
    pair.b.wait_up()?;
    hosts(moved.ip())?;
    pair.wait_for_keys(&net).with_context(|| server.log())?;
    pair.a.wait_for_line("of the new peer", |line| line.ends_with(&format!("new peer {moved}")))?;

    let moved = another_address(&net, Side::A)?;
    pair.a.stop()?;
    pair.a = Gateway::start(&net, Side::A, Daemon::Blowfish, &named(Options::of(Side::A)).set("me", moved))?;
    pair.a.wait_up()?;
    pair.wait_for_keys(&net).with_context(|| server.log())?;
    let last = *places(&pair.b, "new peer ").last().context("B has learned where A is now")?;
    assert_eq!(last.ip(), port(Side::B));
    Ok(())
}

#[test]
fn a_password_opens_the_server_and_a_wrong_one_is_said() -> Result<()> {
    if !may_make_namespaces() || !socks::may_have_server() {
        return Ok(());
    }
    let net = network()?;
    let server = serve(&net, true)?;
    let gateway = net.gw(Side::A);
    let start = |password: Option<&str>| {
        let environment: Vec<(&str, &str)> =
            password.iter().flat_map(|password| [("SOCKS5_USER", socks::USER), ("SOCKS5_PASSWD", password)]).collect();
        let options = through(Options::of(Side::A));
        Gateway::start_with(&net, (gateway, "A"), &[Side::B.lan()], Daemon::Blowfish, &options, &environment)
    };
    for (password, word) in [(None, "set SOCKS5_USER"), (Some("guess"), "refuses SOCKS5_USER")] {
        let Err(error) = start(password)?.wait_up() else { bail!("up with {password:?}") };
        assert!(format!("{error:#}").contains(word), "{error:#}\n{}", server.log());
    }
    assert_eq!(gateway.devices()?, ["lo", "lan0", "wire0"]);

    let mut a = start(Some(socks::PASSWORD))?;
    a.wait_up().with_context(|| server.log())?;
    let mut b = Gateway::start(&net, Side::B, Daemon::Blowfish, &Options::of(Side::B).set("peer", "0.0.0.0:0"))?;
    b.wait_up()?;
    Pair { a, b }.wait_for_keys(&net)
}
