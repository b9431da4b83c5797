//! Keys are renewed under traffic, and nothing is lost.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cipe_tests::gateway::{Daemon, Pair};
use cipe_tests::net::Frame;
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces, traffic};

/// Required changes of one direction's key.
const CHANGES: usize = 4;
/// Limit of pings in flight.
const WINDOW: usize = 4;

/// Whether a frame of the carrier is a datagram under a static key (protocol section 2).
fn is_under_static_key(frame: &[u8]) -> bool {
    let datagram =
        Frame::parse(frame).and_then(|frame| frame.ipv4()?.udp().map(|(_, _, octets)| octets.first().copied()));
    matches!(datagram, Some(Some(first)) if first & 0x80 == 0)
}

fn renewal(daemon: Daemon) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let pair = Pair::start(&net, daemon, |_, options| options.set("tokey", 1).set("tokxc", 1))?;
    pair.wait_for_keys(&net)?;
    // The end of the first exchange.
    ping::run(net.lan(Side::A), Side::B.host(), &Plan::count(1))?;

    let capture = net.capture_carrier(1_000_000)?;
    let start = [pair.a.send_keys(), pair.b.send_keys()];
    let (mut sent, mut changes) = (0, 0);
    let deadline = Instant::now() + patient(SOON + Duration::from_secs(2 * CHANGES as u64));
    let plan = Plan { window: WINDOW, interval: Duration::from_millis(1), ..Plan::count(250) };
    while changes < CHANGES {
        let report = ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
        sent += report.sent;
        changes = (pair.a.send_keys() - start[0]).min(pair.b.send_keys() - start[1]);
        assert_eq!((report.lost.len(), report.damaged), (0, 0), "of {sent} pings and {changes} key changes");
        if Instant::now() > deadline {
            bail!("{changes} key changes in {sent} pings\n{}\n{}", pair.a.log().text(), pair.b.log().text());
        }
    }
    let frames = capture.finish()?;
    assert!(frames.len() >= 2 * sent, "{} frames of {sent} pings", frames.len());
    let under_static = frames.iter().filter(|captured| is_under_static_key(&captured.octets)).count();
    assert_eq!(under_static, 0, "of {} datagrams", frames.len());
    for side in [&pair.a, &pair.b] {
        let status = side.status()?;
        let lost = ["no-send-key", "no-receive-key", "bad-crc", "replayed"].map(|verdict| status.count(verdict));
        assert_eq!(lost, [0; 4], "{status:?}");
    }
    Ok(())
}

#[test]
fn renewal_loses_no_packet_and_sends_none_under_the_static_key_with_blowfish() -> Result<()> {
    renewal(Daemon::Blowfish)
}

#[test]
fn renewal_loses_no_packet_and_sends_none_under_the_static_key_with_idea() -> Result<()> {
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
    let deadline = Instant::now() + patient(SOON + Duration::from_secs(2 * CHANGES as u64));
    let to = (net.lan(Side::B), Side::B.host());
    while pair.a.send_keys() < start + CHANGES {
        assert!(traffic::tcp_transfer(net.lan(Side::A), to, &octets)? == octets);
        if Instant::now() > deadline {
            bail!("too few key changes; A's log:\n{}", pair.a.log().text());
        }
    }
    Ok(())
}
