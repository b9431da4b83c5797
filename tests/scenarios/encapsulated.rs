//! The kernel's tunnels (VXLAN, Geneve, GRE, IP in IP and the rest) through the tunnel: their traffic, also in superframes,
//! arrives unchanged, both ways, and no checksum is wrong. A kind that this kernel does not have is skipped, with its name
//! printed.

use std::io::{IoSlice, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::net::pattern;
use cipe_tests::offload::Offload;
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, ping};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// A kind of tunnel.
struct Kind {
    name: &'static str,
    /// Arguments of `ip link add DEVICE`; LOCAL and REMOTE stand for addresses.
    link: &'static str,
    /// Arguments of an `ip fou add` before it, if any.
    fou: Option<&'static str>,
    /// Its own packets are IPv6.
    outer6: bool,
    /// Which inner IP versions it carries, IPv4 and IPv6.
    inner: [bool; 2],
}

const fn over4(name: &'static str, link: &'static str) -> Kind {
    Kind { name, link, fou: None, outer6: false, inner: [true; 2] }
}

const fn over6(name: &'static str, link: &'static str) -> Kind {
    Kind { outer6: true, ..over4(name, link) }
}

const fn by_fou(name: &'static str, link: &'static str, fou: &'static str, inner: [bool; 2]) -> Kind {
    Kind { fou: Some(fou), inner, ..over4(name, link) }
}

const KINDS: [Kind; 25] = [
    over4("VXLAN", "vxlan id 7 local LOCAL remote REMOTE dstport 4789 noudpcsum"),
    over4("VXLAN with checksums", "vxlan id 7 local LOCAL remote REMOTE dstport 4789 udpcsum"),
    over4("VXLAN on Linux's old port", "vxlan id 7 local LOCAL remote REMOTE dstport 8472"),
    over4("VXLAN on a port of one's own", "vxlan id 7 local LOCAL remote REMOTE dstport 14789 udpcsum"),
    over6("VXLAN over IPv6", "vxlan id 7 local LOCAL remote REMOTE dstport 4789 udp6zerocsumtx udp6zerocsumrx"),
    over6("VXLAN over IPv6 with checksums", "vxlan id 7 local LOCAL remote REMOTE dstport 24789"),
    over4("Geneve", "geneve id 7 remote REMOTE noudpcsum"),
    over4("Geneve on a port of one's own", "geneve id 7 remote REMOTE dstport 16081 udpcsum"),
    over6("Geneve over IPv6", "geneve id 7 remote REMOTE"),
    over4("GRE", "gre local LOCAL remote REMOTE"),
    over4("GRE with key and checksum", "gre local LOCAL remote REMOTE key 9 csum"),
    over4("GRE with sequence numbers", "gre local LOCAL remote REMOTE seq"),
    over4("GRE, bridged", "gretap local LOCAL remote REMOTE"),
    over4("ERSPAN", "erspan local LOCAL remote REMOTE seq key 1 erspan_ver 1 erspan 1"),
    Kind { inner: [true, false], ..over4("IP in IP", "ipip local LOCAL remote REMOTE") },
    Kind { inner: [false, true], ..over4("SIT", "sit local LOCAL remote REMOTE") },
    over6("GRE over IPv6", "ip6gre local LOCAL remote REMOTE"),
    over6("GRE over IPv6, bridged", "ip6gretap local LOCAL remote REMOTE"),
    over6("IP in IPv6", "ip6tnl local LOCAL remote REMOTE mode any"),
    over6("IP in IPv6 without a limit", "ip6tnl local LOCAL remote REMOTE mode any encaplimit none"),
    by_fou(
        "FOU",
        "ipip local LOCAL remote REMOTE encap fou encap-sport auto encap-dport 5555",
        "port 5555 ipproto 4",
        [true, false],
    ),
    by_fou(
        "FOU with checksums",
        "sit local LOCAL remote REMOTE encap fou encap-sport auto encap-dport 5555 encap-csum",
        "port 5555 ipproto 41",
        [false, true],
    ),
    by_fou(
        "GRE in FOU",
        "gre local LOCAL remote REMOTE encap fou encap-sport auto encap-dport 5555",
        "port 5555 ipproto 47",
        [true; 2],
    ),
    by_fou(
        "GUE",
        "ipip local LOCAL remote REMOTE encap gue encap-sport auto encap-dport 5556",
        "port 5556 gue",
        [true, false],
    ),
    by_fou(
        "GUE with checksums",
        "sit local LOCAL remote REMOTE encap gue encap-sport auto encap-dport 5556 encap-csum",
        "port 5556 gue",
        [false, true],
    ),
];

/// Device of the tunnel under test, and the largest packet for it and ours together.
const DEVICE: &str = "inner0";
const MTU: &str = "1280";

fn inner4(side: Side) -> IpAddr {
    Ipv4Addr::new(10, 220, 0, if side == Side::A { 1 } else { 2 }).into()
}

fn inner6(side: Side) -> IpAddr {
    Ipv6Addr::new(0xfd22, 0, 0, 0, 0, 0, 0, if side == Side::A { 1 } else { 2 }).into()
}

/// The two hosts that a tunnel joins, with their addresses.
struct Ends<'a> {
    hosts: [&'a Namespace; 2],
    v4: [IpAddr; 2],
    v6: [IpAddr; 2],
}

const SIDES: [Side; 2] = [Side::A, Side::B];

impl Kind {
    /// Makes both ends, if this kernel can.
    fn make(&self, ends: &Ends<'_>) -> Result<Option<()>> {
        for (index, side) in SIDES.into_iter().enumerate() {
            let host = ends.hosts[index];
            let addresses = if self.outer6 { ends.v6 } else { ends.v4 };
            let (local, remote) = (addresses[index].to_string(), addresses[1 - index].to_string());
            if let Some(fou) = self.fou {
                // Only `modprobe` loads it: its netlink family has no alias for the kernel to load it by.
                let _ = Command::new("modprobe").args(["-q", "-a", "fou", "fou6"]).status();
                let arguments: Vec<&str> = ["fou", "add"].into_iter().chain(fou.split(' ')).collect();
                if self.is_missing(host.ip(&arguments))? {
                    return Ok(None);
                }
            }
            let link = self.link.replace("LOCAL", &local).replace("REMOTE", &remote);
            let arguments: Vec<&str> =
                ["link", "add", DEVICE, "mtu", MTU, "type"].into_iter().chain(link.split(' ')).collect();
            if self.is_missing(host.ip(&arguments))? {
                return Ok(None);
            }
            host.sysctl(&format!("net.ipv6.conf.{DEVICE}.disable_ipv6"), "0")?;
            host.ip(&["addr", "add", &format!("{}/24", inner4(side)), "dev", DEVICE])?;
            host.ip(&["addr", "add", &format!("{}/64", inner6(side)), "dev", DEVICE, "nodad"])?;
            host.ip(&["link", "set", DEVICE, "up"])?;
        }
        Ok(Some(()))
    }

    /// Whether this kernel lacks it; prints that.
    fn is_missing(&self, made: Result<String>) -> Result<bool> {
        const MISSING: [&str; 4] =
            ["Unknown device type", "Operation not supported", "Protocol not supported", "Error talking to the kernel"];
        let Err(error) = made else { return Ok(false) };
        let text = format!("{error:#}");
        if !MISSING.iter().any(|missing| text.contains(missing)) {
            return Err(error).context(self.name);
        }
        eprintln!("skipped: {}: this kernel does not have it ({text})", self.name);
        Ok(true)
    }

    fn remove(&self, ends: &Ends<'_>) {
        for host in ends.hosts {
            // If it was not made, the removal fails, which is no error.
            let _ = host.ip(&["link", "del", DEVICE]);
            if let Some(fou) = self.fou {
                let _ = host.ip(&["fou", "del", "port", fou.split(' ').nth(1).unwrap_or_default()]);
            }
        }
    }

    /// Sends TCP and UDP through it, both ways.
    fn check(&self, ends: &Ends<'_>) -> Result<()> {
        for (is_carried, address) in self.inner.into_iter().zip([inner4 as fn(Side) -> IpAddr, inner6]) {
            if !is_carried {
                continue;
            }
            let before = wrong_checksums(ends)?;
            for (from, to, side) in [(0, 1, Side::B), (1, 0, Side::A)] {
                stream(ends.hosts[from], ends.hosts[to], address(side))?;
                datagrams(ends.hosts[from], ends.hosts[to], address(side), address(side.other()))?;
            }
            ensure!(wrong_checksums(ends)? == before, "wrong checksums: {before:?}, then {:?}", wrong_checksums(ends)?);
        }
        Ok(())
    }
}

/// A megabyte and a half by TCP.
fn stream(from: &Namespace, to: &Namespace, address: IpAddr) -> Result<()> {
    let octets = pattern(7, 1_500_000);
    let listener = to.run(|| TcpListener::bind((address, 0)))?;
    let target = listener.local_addr()?;
    let mut sender =
        from.run(|| TcpStream::connect_timeout(&target, patient(SOON))).with_context(|| format!("TCP to {target}"))?;
    let mut receiver = listener.accept()?.0;
    sender.set_write_timeout(Some(patient(SOON)))?;
    receiver.set_read_timeout(Some(patient(SOON)))?;
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            sender.write_all(&octets)?;
            sender.shutdown(Shutdown::Write)
        });
        let mut received = Vec::new();
        receiver.read_to_end(&mut received).with_context(|| format!("TCP to {target}: {} octets", received.len()))?;
        ensure!(received == octets, "TCP to {target}: {} octets, or others than were sent", received.len());
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))?.context("sending")
    })
}

/// Datagrams one by one and in superframes.
fn datagrams(from: &Namespace, to: &Namespace, address: IpAddr, source: IpAddr) -> Result<()> {
    let server = to.run(|| UdpSocket::bind((address, 0)))?;
    let client = from.run(|| UdpSocket::bind((source, 0)))?;
    server.set_read_timeout(Some(patient(SOON)))?;
    client.connect(server.local_addr()?)?;
    let mut buffer = [0; 2000];
    for size in [1_u16, 333, 1200] {
        for segments in [1, 2, 7, 24] {
            // The last is shorter if the size allows it.
            let payload = pattern(size.into(), segments * usize::from(size) - usize::from(size) / 3);
            let pieces = [IoSlice::new(&payload)];
            let cut = [ControlMessage::UdpGsoSegments(&size)];
            sendmsg::<()>(client.as_raw_fd(), &pieces, &cut, MsgFlags::empty(), None)?;
            for expected in payload.chunks(size.into()) {
                let length = server.recv(&mut buffer).with_context(|| format!("{segments} of {size} to {address}"))?;
                ensure!(buffer[..length] == *expected, "{segments} of {size} to {address}: {length} octets, or others");
            }
        }
    }
    Ok(())
}

/// Packets that the hosts have dropped for a wrong checksum: IP headers, TCP, UDP, UDP over IPv6.
fn wrong_checksums(ends: &Ends<'_>) -> Result<Vec<u64>> {
    let mut counts = Vec::new();
    for host in ends.hosts {
        let read = |file: &str| host.run(|| std::fs::read_to_string(format!("/proc/thread-self/net/{file}")));
        let text = read("snmp")?;
        for protocol in ["Tcp:", "Udp:"] {
            let mut lines = text.lines().filter(|line| line.starts_with(protocol));
            let (Some(names), Some(values)) = (lines.next(), lines.next()) else { bail!("no {protocol} in snmp") };
            let at = names.split(' ').position(|name| name == "InCsumErrors").context("InCsumErrors")?;
            counts.push(values.split(' ').nth(at).context("a value")?.parse()?);
        }
        let text = read("snmp6")?;
        let line = text.lines().find(|line| line.starts_with("Udp6InCsumErrors")).context("Udp6InCsumErrors")?;
        counts.push(line.split_whitespace().nth(1).context("a value")?.parse()?);
    }
    Ok(counts)
}

/// Checks all kinds between two hosts, and returns how many there were.
fn check_all(ends: &Ends<'_>, pair: &Pair) -> Result<usize> {
    let mut checked = 0;
    for kind in &KINDS {
        let made = kind.make(ends);
        let result = match made {
            Ok(None) => Ok(()),
            Ok(Some(())) => {
                checked += 1;
                kind.check(ends)
            }
            Err(error) => Err(error),
        };
        kind.remove(ends);
        let state = || format!("{}\nA: {:?}\nB: {:?}", kind.name, pair.a.status(), pair.b.status());
        result.with_context(state)?;
    }
    Ok(checked)
}

/// Gives a host of a LAN an IPv6 address, with a gateway that has another one.
fn lan6(net: &Topology, side: Side) -> Result<IpAddr> {
    let number = if side == Side::A { 1 } else { 2 };
    let [gateway, host] = [1, 2].map(|last| Ipv6Addr::new(0xfd10, 0, 0, number, 0, 0, 0, last));
    for (namespace, device, address) in [(net.gw(side), "lan0", gateway), (net.lan(side), "eth0", host)] {
        namespace.sysctl(&format!("net.ipv6.conf.{device}.disable_ipv6"), "0")?;
        namespace.ip(&["addr", "add", &format!("{address}/64"), "dev", device, "nodad"])?;
    }
    net.gw(side).sysctl("net.ipv6.conf.all.forwarding", "1")?;
    net.lan(side).ip(&["route", "add", "default", "via", &gateway.to_string()])?;
    net.gw(side.other()).ip(&["route", "add", &format!("fd10:0:0:{number}::/64"), "dev", "cipcb0"])?;
    Ok(host.into())
}

fn start(mode: &'static str) -> Result<(Topology, Pair)> {
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("xdp-mode", mode))?;
    pair.wait_for_keys(&net)?;
    for side in SIDES {
        net.gw(side).sysctl("net.ipv6.conf.cipcb0.disable_ipv6", "0")?;
    }
    Ok((net, pair))
}

#[test]
fn what_a_gateway_encapsulates_arrives_octet_for_octet() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for mode in ["auto", "native"] {
        let (net, pair) = start(mode)?;
        let v6 = [1, 2].map(|number| IpAddr::from(Ipv6Addr::new(0xfd20, 0, 0, 0, 0, 0, 0, number)));
        for (side, address) in SIDES.into_iter().zip(v6) {
            net.gw(side).ip(&["addr", "add", &format!("{address}/64"), "dev", "cipcb0", "nodad"])?;
        }
        let ends = Ends { hosts: SIDES.map(|side| net.gw(side)), v4: SIDES.map(|side| side.tunnel().into()), v6 };
        let checked = check_all(&ends, &pair).with_context(|| format!("xdp-mode {mode}"))?;
        ensure!(checked > 0, "this kernel has no tunnels at all");
    }
    Ok(())
}

/// Frames of protocol 4, whose device the kernel's tunnels stand on like on a card.
#[test]
fn what_a_gateway_encapsulates_arrives_by_an_ethernet_tunnel() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::EthernetBlowfish, |_, options| options.set("mask", "255.255.255.0"))?;
    let v6 = [1, 2].map(|number| IpAddr::from(Ipv6Addr::new(0xfd20, 0, 0, 0, 0, 0, 0, number)));
    for (side, address) in SIDES.into_iter().zip(v6) {
        net.gw(side).sysctl("net.ipv6.conf.cipdb0.disable_ipv6", "0")?;
        net.gw(side).ip(&["addr", "add", &format!("{address}/64"), "dev", "cipdb0", "nodad"])?;
        let to = side.other().tunnel();
        ensure!(ping::wait_for_answer(net.gw(side), to, Duration::from_millis(100), SOON)?, "{:?}", pair.a.status());
    }
    let ends = Ends { hosts: SIDES.map(|side| net.gw(side)), v4: SIDES.map(|side| side.tunnel().into()), v6 };
    let checked = check_all(&ends, &pair)?;
    ensure!(checked > 0, "this kernel has no tunnels at all");
    Ok(())
}

/// The superframes of hosts arrive at the gateway whole, and it forwards them.
#[test]
fn what_hosts_of_the_lans_encapsulate_arrives_octet_for_octet() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let (net, pair) = start("auto")?;
    let ends = Ends {
        hosts: SIDES.map(|side| net.lan(side)),
        v4: SIDES.map(|side| side.host().into()),
        v6: [lan6(&net, Side::A)?, lan6(&net, Side::B)?],
    };
    let checked = check_all(&ends, &pair)?;
    ensure!(checked > 0, "this kernel has no tunnels at all");
    Ok(())
}
