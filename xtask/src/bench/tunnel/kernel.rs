//! The kernel's own tunnels, for comparison: VXLAN, plain routes, WireGuard, ESP.

use std::fs;
use std::net::{SocketAddr, UdpSocket};

use anyhow::{Context, Result};
use cipe_tests::namespace::Namespace;
use cipe_tests::topology::{Side, Topology};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::SetStruct;

use super::device::configure;
use crate::bench::program;
use crate::bench::program::{Need, Source};
use crate::tools;

/// The program that configures the kernel's WireGuard.
pub(super) const NEEDS_WIREGUARD: &[Need] =
    &[Need { program: "wg", source: Source::Debian("wireguard-tools"), version: &["--version"] }];

const DEVICE: &str = "vxlan0";

/// VXLAN between the carrier addresses.
pub(super) fn vxlan(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let (local, remote) = (side.carrier().to_string(), side.other().carrier().to_string());
        let kind = ["link", "add", DEVICE, "type", "vxlan", "id", "42", "dstport", "4789", "dev", "wire0"];
        net.gw(side).ip(&[&kind[..], &["local", &local, "remote", &remote]].concat())?;
        configure(net, side, DEVICE)?;
    }
    Ok(())
}

/// The inner addresses on the wire itself.
pub(super) fn veth(net: &Topology) -> Result<()> {
    for side in [Side::A, Side::B] {
        let (gw, peer) = (net.gw(side), side.other().tunnel().to_string());
        gw.ip(&["addr", "add", &format!("{}/32", side.tunnel()), "peer", &peer, "dev", "wire0"])?;
        gw.ip(&["route", "replace", &side.other().lan(), "via", &peer, "dev", "wire0", "onlink"])?;
    }
    Ok(())
}

const WIREGUARD: &str = "wgk0";
const WIREGUARD_PORT: u16 = 51820;

/// Private and public key of a side, in Base64. Made once for this bench; not a secret.
fn keys(side: Side) -> (&'static str, &'static str) {
    match side {
        Side::A => ("AAi04jDUqK7Qvy1jxiEHJMu5SH1ECRKgUgcOzFcLLno=", "yDOqtA+ndf0d2Mc6+RRZweW/mkq7u8DAR7FLwEie3Ws="),
        Side::B => ("kHiEk3fHJJrLevki91Vg2H++BPJh0Pss9xv9shqT53g=", "i5gQflGI0puWaOw734v1RcEFqhozPbvleZBmbnmYe08="),
    }
}

/// The kernel's WireGuard.
pub(super) fn wireguard(net: &Topology) -> Result<()> {
    let wg = program::find("wg").context("wg is not installed")?;
    for side in [Side::A, Side::B] {
        let gw = net.gw(side);
        gw.ip(&["link", "add", WIREGUARD, "type", "wireguard"])?;
        let key = net.directory().join(format!("{WIREGUARD}.{}.key", side.letter()));
        fs::write(&key, keys(side).0)?;
        let mut set = gw.command(&wg);
        set.args(["set", WIREGUARD, "listen-port", &WIREGUARD_PORT.to_string(), "private-key"]).arg(key);
        set.args(["peer", keys(side.other()).1, "allowed-ips", "0.0.0.0/0", "endpoint"]);
        set.arg(SocketAddr::from((side.other().carrier(), WIREGUARD_PORT)).to_string());
        tools::check(&mut set)?;
        configure(net, side, WIREGUARD)?;
    }
    Ok(())
}

const XFRM: &str = "ipsec0";
/// Binds states and policies to the device.
const XFRM_ID: &str = "1";
/// RFC 3948, section 2.
const ESP_PORT: u16 = 4500;

/// Makes the kernel decapsulate ESP from the datagrams of a socket (udp(7), RFC 3948).
#[derive(Clone, Copy)]
struct EspInUdp;

nix::setsockopt_impl!(EspInUdp, libc::IPPROTO_UDP, libc::UDP_ENCAP, libc::c_int, SetStruct<libc::c_int>);
/// `UDP_ENCAP_ESPINUDP` of linux/udp.h.
const ESP_IN_UDP: libc::c_int = 2;

/// ESP in UDP with AES-128-GCM between the carrier addresses, by an xfrm interface. The sockets receive as long as they live.
pub(super) fn esp(net: &Topology) -> Result<Vec<UdpSocket>> {
    let mut sockets = Vec::new();
    for side in [Side::A, Side::B] {
        let gw = net.gw(side);
        let socket = gw.run(|| UdpSocket::bind((side.carrier(), ESP_PORT)))?;
        setsockopt(&socket, EspInUdp, &ESP_IN_UDP).context("UDP_ENCAP")?;
        sockets.push(socket);
        gw.ip(&["link", "add", XFRM, "type", "xfrm", "dev", "wire0", "if_id", XFRM_ID])?;
        for from in [Side::A, Side::B] {
            associate(gw, side, from)?;
        }
        configure(net, side, XFRM)?;
    }
    Ok(sockets)
}

/// State and policies at one side for the direction from `from` to the other.
fn associate(gw: &Namespace, side: Side, from: Side) -> Result<()> {
    let (src, dst) = (from.carrier().to_string(), from.other().carrier().to_string());
    let (spi, port) = (if from == Side::A { "0x1001" } else { "0x1002" }, ESP_PORT.to_string());
    // A key of 128 bits and a salt of 32 for each direction. Not a secret.
    let key = format!("0x{}{}", "6369706562656e63".repeat(2), if from == Side::A { "0000000a" } else { "0000000b" });
    let ends = ["src", &src, "dst", &dst, "proto", "esp"];
    let state = ["spi", spi, "mode", "tunnel", "if_id", XFRM_ID, "aead", "rfc4106(gcm(aes))", &key, "128"];
    let encapsulation = ["encap", "espinudp", &port, &port, "0.0.0.0"];
    gw.ip(&[&["xfrm", "state", "add"][..], &ends, &state, &encapsulation].concat())?;
    let directions: &[&str] = if from == side { &["out"] } else { &["in", "fwd"] };
    for direction in directions {
        let policy = [
            "xfrm",
            "policy",
            "add",
            "dir",
            direction,
            "src",
            "0.0.0.0/0",
            "dst",
            "0.0.0.0/0",
            "if_id",
            XFRM_ID,
            "tmpl",
        ];
        gw.ip(&[&policy[..], &ends, &["mode", "tunnel"]].concat())?;
    }
    Ok(())
}

/// Why this machine's kernel cannot make a device of `kind`, such as `wireguard`; `None`: it can.
pub(super) fn lacks(kind: &str) -> Option<String> {
    let further: &[&str] = if kind == "xfrm" { &["dev", "lo", "if_id", XFRM_ID] } else { &[] };
    let try_it = || -> Result<()> {
        let namespace = Namespace::new("probe")?;
        namespace.ip(&[&["link", "add", "probe0", "type", kind], further].concat()).map(drop)
    };
    try_it().err().map(|error| format!("this kernel has none: {error:#}"))
}
