//! A card that accepts groups of datagrams (UDP_SEGMENT) and loses them: the engine sends single datagrams, and tries groups
//! again later.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::namespace::Namespace;
use cipe_tests::offload::Offload;
use cipe_tests::process::patient;
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::traffic::{self, Pace};
use cipe_tests::{SOON, may_make_namespaces};

/// The table that drops superframes: on a veth they arrive unsegmented, as large as they were sent.
const TABLE: &str = "broken-card";

fn nft(namespace: &Namespace, words: &str) -> Result<bool> {
    let mut command: Command = namespace.command("nft");
    Ok(command.args(words.split_whitespace()).output()?.status.success())
}

fn is_given_up(status: &Status) -> bool {
    status.doors.iter().any(|door| door.contains("groups (UDP_SEGMENT) do not arrive"))
}

/// 1 MB of TCP from A to B.
fn transfer(net: &Topology) -> Result<()> {
    let octets: Vec<u8> = (0..250_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    let to = (net.lan(Side::B), Side::B.host());
    ensure!(traffic::tcp_transfer(net.lan(Side::A), to, &octets)? == octets, "another stream arrived");
    Ok(())
}

/// A second of datagrams from A to B, at a rate at which they leave in groups.
fn flood(net: &Topology) -> Result<()> {
    let to = (net.lan(Side::B), Side::B.host());
    traffic::udp(net.lan(Side::A), to, 1200, Pace::Flood, Duration::from_secs(1), |_, _| {}).map(drop)
}

#[test]
fn a_card_that_loses_groups_is_sent_single_datagrams_until_groups_arrive_again() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let card = net.gw(Side::B);
    if !nft(card, &format!("add table ip {TABLE}"))? {
        eprintln!("skipped: no nftables here, which play the broken card");
        return Ok(());
    }
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options.set("carrier", "udp"))?;
    pair.wait_for_keys(&net)?;
    transfer(&net)?;
    ensure!(!is_given_up(&pair.a.status()?), "groups arrive");
    ensure!(nft(card, &format!("add chain ip {TABLE} in {{ type filter hook prerouting priority -300 ; }}"))?);
    ensure!(nft(card, &format!("add rule ip {TABLE} in iifname wire0 ip length > 1600 counter drop"))?);
    // The periodic test of groups detects it after some time.
    let start = Instant::now();
    while !is_given_up(&pair.a.status()?) {
        ensure!(start.elapsed() < patient(3 * SOON), "not noticed: {:?}", pair.a.status()?);
        flood(&net)?;
    }
    pair.a.wait_for_line("the reason", |line| line.contains("do not arrive, and single datagrams do"))?;
    // No datagram is lost any more, and the other direction was never affected.
    transfer(&net)?;
    ensure!(!is_given_up(&pair.b.status()?), "B's groups arrive");
    ensure!(nft(card, &format!("delete table ip {TABLE}"))?);
    while is_given_up(&pair.a.status()?) {
        ensure!(start.elapsed() < patient(6 * SOON), "not tried again: {:?}", pair.a.status()?);
        flood(&net)?;
    }
    pair.a.wait_for_line("the end", |line| line.contains("arrive again"))?;
    transfer(&net)
}
