//! Keys are renewed under traffic, and nothing is lost.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::net::Frame;
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::stream::Stream;
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

/// Counts sealed sessions of an end, by its status: each begins with counter 0.
#[derive(Default)]
struct Sessions {
    counter: u64,
    changes: usize,
}

impl Sessions {
    fn look(&mut self, end: &Gateway) -> Result<usize> {
        let counter = end.status()?.send_counter();
        self.changes += usize::from(counter < self.counter);
        self.counter = counter;
        Ok(self.changes)
    }
}

/// The first octets of a carrier datagram.
fn datagram(frame: &[u8]) -> Option<[u8; 8]> {
    let packet = Frame::parse(frame)?.ipv4()?;
    packet.udp()?.2.first_chunk().copied()
}

#[test]
fn renewal_of_sealed_keys_loses_no_packet_and_sends_none_unsealed() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    let capture = net.capture_carrier(1_000_000)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.sealed_anew("500"))?;
    pair.wait_for_keys(&net)?;
    let (mut sent, mut ends) = (0, [Sessions::default(), Sessions::default()]);
    let deadline = Instant::now() + patient(SOON + Duration::from_secs(2 * CHANGES as u64));
    let plan = Plan { window: WINDOW, interval: Duration::from_millis(1), ..Plan::count(250) };
    loop {
        let changes = ends[0].look(&pair.a)?.min(ends[1].look(&pair.b)?);
        if changes >= CHANGES {
            break;
        }
        let report = ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
        sent += report.sent;
        assert_eq!((report.lost.len(), report.damaged), (0, 0), "of {sent} pings and {changes} key changes");
        if Instant::now() > deadline {
            bail!("{changes} key changes in {sent} pings\n{}\n{}", pair.a.log().text(), pair.b.log().text());
        }
    }
    for side in [&pair.a, &pair.b] {
        let status = side.status()?;
        let lost = ["no-receive-key", "bad-tag", "too-old", "unsealed"].map(|verdict| status.count(verdict));
        assert_eq!(lost, [0; 4], "{status:?}");
    }
    let datagrams: Vec<_> = capture.finish()?.iter().filter_map(|captured| datagram(&captured.octets)).collect();
    assert!(datagrams.len() >= 2 * sent, "{} datagrams of {sent} pings", datagrams.len());
    let unsealed = datagrams.iter().filter(|octets| octets[..4] != [0x80, 0, 0, 0]).count();
    let answers = datagrams.iter().filter(|octets| **octets == [0x80, 0, 0, 0, 0, 0, 0, 2]).count();
    assert!(unsealed == 0 && answers > CHANGES, "{unsealed} unsealed, {answers} answers");
    Ok(())
}

#[test]
fn sealed_streams_outlive_key_changes_whole() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for offload in [Offload::On, Offload::Raw] {
        let net = Topology::new(Carrier::Direct, offload)?;
        let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.sealed_anew("500"))?;
        pair.wait_for_keys(&net)?;
        let stream = Stream::start(net.lan(Side::A), (net.lan(Side::B), Side::B.host()))?;
        let mut sessions = Sessions::default();
        let deadline = Instant::now() + patient(SOON);
        while sessions.look(&pair.a)? < CHANGES {
            stream.wait_for_more()?;
            if Instant::now() > deadline {
                bail!("too few key changes; A's log:\n{}", pair.a.log().text());
            }
        }
        assert!(stream.finish()? > 0);
        let status = pair.b.status()?;
        assert_eq!(
            status.count("bad-tag") + status.count("no-receive-key") + status.count("replayed"),
            0,
            "{status:?}"
        );
    }
    Ok(())
}
