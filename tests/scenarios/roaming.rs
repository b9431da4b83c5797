//! An end moves to another address while pings pass both ways, and still receives at the address before: no ping is lost.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::may_make_namespaces;
use cipe_tests::net::{ICMP, checksum};
use cipe_tests::offload::Offload;
use cipe_tests::options::PORT;
use cipe_tests::original::{Original, another_address};
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};

/// Pings between the LANs both ways while `change` runs; none may be lost.
fn loses_nothing(net: &Topology, change: impl FnOnce() -> Result<()>) -> Result<()> {
    let plan = Plan { interval: Duration::from_millis(2), window: 1000, ..Plan::count(100_000) };
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let pings = [Side::A, Side::B].map(|side| {
            let (plan, lan, done) = (&plan, net.lan(side), &done);
            scope.spawn(move || ping::run_while(lan, side.other().host(), plan, || !done.load(Ordering::Relaxed)))
        });
        let changed = change();
        done.store(true, Ordering::Relaxed);
        for (pings, side) in pings.into_iter().zip([Side::A, Side::B]) {
            let report = pings.join().expect("pings do not panic")?;
            let lost = report.lost.len();
            assert_eq!(lost, 0, "{lost} of {} from {side:?}", report.sent);
        }
        changed
    })
}

fn a_peer_of_ours_roams(carriers: &[&str], sealed: &str) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for carrier in carriers {
        let net = Topology::new(Carrier::Direct, Offload::On)?;
        let [a, b, c, d] = Side::B.carrier().octets();
        let another = Ipv4Addr::new(a, b, c, d + 20);
        net.gw(Side::B).ip(&["addr", "add", &format!("{another}/32"), "dev", "wire0"])?;
        let pair = Pair::start(&net, Daemon::Blowfish, |side, options| {
            let options = options.set("carrier", carrier).set("sealed", sealed);
            if side == Side::B { options.flag("dynip") } else { options }
        })?;
        pair.wait_for_keys(&net)?;
        loses_nothing(&net, || {
            for from in [another, Side::B.carrier()] {
                let (to, from) = (format!("{}/32", Side::A.carrier()), from.to_string());
                net.gw(Side::B).ip(&["route", "replace", &to, "dev", "wire0", "src", &from])?;
                let told = format!("new peer {from}:{PORT}");
                pair.a.wait_for_line("of the new peer", |line| line.ends_with(&told))?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_peer_of_ours_roams_without_a_loss() -> Result<()> {
    a_peer_of_ours_roams(&["auto", "xdp", "udp"], "no")
}

#[test]
fn a_sealed_peer_roams_without_a_loss() -> Result<()> {
    a_peer_of_ours_roams(&["xdp", "udp"], "require")
}

#[test]
fn an_original_roams_without_a_loss() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = Original::start(Daemon::Blowfish, |options| options, |_| {})?;
    link.wait_for_pings()?;
    let to = another_address(&link.net, Side::B)?;
    let socket = link.net.gw(Side::B).run(|| UdpSocket::bind(to))?;
    loses_nothing(&link.net, || {
        link.theirs.roam_to(socket)?;
        link.ours.wait_for_line("of the new peer", |line| line.contains(&format!("new peer {to}")))?;
        Ok(())
    })
}

/// `nokey` authenticates nothing, but a move needs an answer from there, too.
#[test]
fn a_peer_without_a_key_moves_when_it_answers() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let [a, b, c, d] = Side::B.carrier().octets();
    let another = Ipv4Addr::new(a, b, c, d + 20);
    net.gw(Side::B).ip(&["addr", "add", &format!("{another}/32"), "dev", "wire0"])?;
    let pair = Pair::start(&net, Daemon::Blowfish, |side, options| {
        let options = options.without("key").flag("nokey");
        if side == Side::B { options.flag("dynip") } else { options }
    })?;
    assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(1))?.received(), 1);
    // Nobody answers for this source.
    let forger = net.gw(Side::B).run(|| UdpSocket::bind((another, PORT + 1)))?;
    let mut bare = [0; 28];
    (bare[0], bare[3], bare[8], bare[9]) = (0x45, 28, 64, ICMP);
    bare[12..16].copy_from_slice(&Side::B.host().octets());
    bare[16..20].copy_from_slice(&Side::A.host().octets());
    let sum = checksum(&bare[..20]).to_be_bytes();
    bare[10..12].copy_from_slice(&sum);
    forger.send_to(&bare, (Side::A.carrier(), PORT))?;
    forger.set_read_timeout(Some(cipe_tests::SOON))?;
    let mut question = [0; 512];
    let length = forger.recv(&mut question)?;
    assert_eq!(question[..9], *b"\0\0\0\0\0\0\0\0\x72", "{length} octets");
    loses_nothing(&net, || {
        let to = format!("{}/32", Side::A.carrier());
        net.gw(Side::B).ip(&["route", "replace", &to, "dev", "wire0", "src", &another.to_string()])?;
        let me = SocketAddr::new(IpAddr::V4(another), PORT);
        pair.a.wait_for_line("of the new peer", |line| line.ends_with(&format!("new peer {me}")))?;
        Ok(())
    })?;
    assert!(!pair.a.log().text().contains(&format!("new peer {another}:{}", PORT + 1)));
    Ok(())
}
