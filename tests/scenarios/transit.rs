//! A gateway also routes for other hosts: a tunnel must not take datagrams that it forwards, whatever their port.

use std::net::{Ipv4Addr, UdpSocket};

use anyhow::{Context, Result};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::options::PORT;
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

/// Another address of A's host, which B's gateway reaches past the tunnel.
const TARGET: Ipv4Addr = Ipv4Addr::new(10, 240, 1, 2);

/// Number of datagrams sent, each with a length of the protocol's packets.
const DATAGRAMS: u8 = 10;

#[test]
fn datagrams_in_transit_pass_a_tunnel_that_listens_on_their_port_at_any_address() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    net.lan(Side::A).ip(&["addr", "add", &format!("{TARGET}/32"), "dev", "eth0"])?;
    let (via_host, via_gateway) = (Side::A.host().to_string(), Side::A.carrier().to_string());
    net.gw(Side::A).ip(&["route", "add", &TARGET.to_string(), "via", &via_host])?;
    net.gw(Side::B).ip(&["route", "add", &TARGET.to_string(), "via", &via_gateway])?;
    let receiver = net.lan(Side::A).run(|| UdpSocket::bind((TARGET, PORT)))?;
    receiver.set_read_timeout(Some(patient(SOON)))?;
    let sender = net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), 0)))?;
    // With `dynip` a tunnel listens at any address.
    for dynip in [true, false] {
        let pair = Pair::start(&net, Daemon::Blowfish, |side, options| {
            let options = options.set("carrier", "xdp");
            if dynip && side == Side::A { options.flag("dynip") } else { options }
        })?;
        pair.wait_for_keys(&net)?;
        for number in 0..DATAGRAMS {
            sender.send_to(&[number; 24], (TARGET, PORT))?;
            let mut datagram = [0; 100];
            let length =
                receiver.recv(&mut datagram).with_context(|| format!("dynip {dynip}: datagram {number} in transit"))?;
            assert_eq!(datagram[..length], [number; 24], "dynip {dynip}");
        }
        assert_eq!(pair.a.status()?.count("bad-crc"), 0, "dynip {dynip}");
        pair.stop()?;
    }
    Ok(())
}
