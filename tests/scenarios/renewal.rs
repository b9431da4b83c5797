//! Keys are renewed under traffic, and no more is lost than was in flight.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, traffic};

/// Changes of one direction's key to see.
const CHANGES: usize = 4;
/// Packets that may be in flight.
const WINDOW: usize = 4;
/// After this, a ping counts as lost: far more than it takes, and no more than the bound of losses can wait for.
const PATIENCE: Duration = Duration::from_secs(2);

fn renewal(daemon: Daemon) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, daemon, |_, options| options.set("tokey", 1).set("tokxc", 1))?;
    pair.wait_for_keys(&net)?;

    let start = [pair.a.send_keys(), pair.b.send_keys()];
    let (mut sent, mut lost, mut changes) = (0, 0, 0);
    let deadline = Instant::now() + SOON + Duration::from_secs(2 * CHANGES as u64);
    let plan = Plan { window: WINDOW, interval: Duration::from_millis(1), timeout: PATIENCE, ..Plan::count(250) };
    while changes < CHANGES {
        let report = ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
        assert_eq!(report.damaged, 0);
        (sent, lost) = (sent + report.sent, lost + report.lost.len());
        changes = (pair.a.send_keys() - start[0]).min(pair.b.send_keys() - start[1]);
        if Instant::now() > deadline {
            bail!("{changes} key changes in {sent} pings\n{}\n{}", pair.a.log().text(), pair.b.log().text());
        }
    }
    let changed = pair.a.send_keys() - start[0] + pair.b.send_keys() - start[1];
    let in_flight = changed * WINDOW;
    assert!(lost <= in_flight, "{lost} of {sent} pings lost in {changed} key changes");
    Ok(())
}

#[test]
fn renewal_loses_no_more_than_the_packets_in_flight_with_blowfish() -> Result<()> {
    renewal(Daemon::Blowfish)
}

#[test]
fn renewal_loses_no_more_than_the_packets_in_flight_with_idea() -> Result<()> {
    renewal(Daemon::Idea)
}

#[test]
fn a_stream_outlives_key_changes_whole() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("tokey", 1).set("tokxc", 1))?;
    pair.wait_for_keys(&net)?;
    let start = pair.a.send_keys();
    let octets: Vec<u8> = (0..2_000_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    let deadline = Instant::now() + SOON + Duration::from_secs(2 * CHANGES as u64);
    let to = (net.lan(Side::B), Side::B.host());
    while pair.a.send_keys() < start + CHANGES {
        assert!(traffic::tcp_transfer(net.lan(Side::A), to, &octets)? == octets);
        if Instant::now() > deadline {
            bail!("too few key changes; A's log:\n{}", pair.a.log().text());
        }
    }
    Ok(())
}
