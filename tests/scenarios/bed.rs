//! The bed itself: without any tunnel, over plain routes. A failure here is a fault of the bed, not of the project.

use std::time::Duration;

use anyhow::Result;
use cipe_tests::net::{Frame, in_clear};
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::traffic::{self, Pace};
use cipe_tests::{SOON, may_make_namespaces};

#[test]
fn plain_routes_carry_every_size_and_the_tap_sees_them_in_clear() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Tapped, Offload::Raw)?;
    net.route_plainly()?;
    let capture = net.capture_carrier(10_000)?;
    let report = ping::run(net.lan(Side::A), Side::B.host(), &Plan::sizes((28..=1500).collect()))?;
    assert_eq!((report.received(), report.lost.len(), report.damaged), (1473, 0, 0));
    capture.wait_for(SOON, in_clear).expect("pings without a tunnel are in clear");
    let frames = capture.finish()?;
    let packets = frames.iter().filter(|frame| Frame::parse(&frame.octets).is_some_and(|f| f.ipv4().is_some())).count();
    assert_eq!(packets, 2 * 1473, "each packet is captured once, each way");
    Ok(())
}

#[test]
fn superframes_travel_only_with_offloads_on() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (offload, superframes) in [(Offload::On, true), (Offload::Off, false), (Offload::Raw, false)] {
        let net = Topology::new(Carrier::Tapped, offload)?;
        net.route_plainly()?;
        let capture = net.capture_carrier(10_000)?;
        let to = (net.lan(Side::B), Side::B.host());
        traffic::tcp_transfer(net.lan(Side::A), to, &[7; 1_000_000])?;
        let frames = capture.finish()?;
        assert!(frames.len() > 10);
        assert_eq!(frames.iter().any(|frame| frame.octets.len() > 1514), superframes, "{offload:?}");
    }
    Ok(())
}

#[test]
fn without_a_route_nothing_passes() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let plan = Plan { timeout: Duration::from_millis(100), window: 5, ..Plan::count(5) };
    let report = ping::run(net.lan(Side::A), Side::B.host(), &plan)?;
    assert_eq!((report.sent, report.received(), report.lost.len()), (5, 0, 5));
    Ok(())
}

#[test]
fn streams_and_datagrams_arrive_whole_and_are_counted() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Off)?;
    net.route_plainly()?;
    let (from, to) = (net.lan(Side::A), (net.lan(Side::B), Side::B.host()));
    let octets: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    assert!(traffic::tcp_transfer(from, to, &octets)? == octets);

    let mut seconds = 0;
    let report = traffic::tcp(from, to, 2, Duration::from_millis(1500), |_, _| seconds += 1)?;
    assert_eq!(seconds, 2);
    assert!(report.total.octets > 0);

    let report = traffic::udp(from, to, 1400, Pace::Fixed(1000), Duration::from_secs(1), |_, _| {})?;
    assert!(report.sent > 0, "{report:?}");
    assert_eq!((report.total.datagrams, report.reordered, report.damaged), (report.sent, 0, 0));
    Ok(())
}

#[test]
fn a_namespace_goes_with_the_processes_in_it() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let path = net.lan(Side::A).path();
    let mut child = net.lan(Side::A).command("cat").stdin(std::process::Stdio::piped()).spawn()?;
    // `ip netns exec` enters the namespace and then executes the program: wait for that.
    let inside = net.lan(Side::A);
    while !inside.processes()?.contains(&child.id()) {
        std::thread::yield_now();
    }
    drop(net);
    assert!(!path.exists());
    assert!(!child.wait()?.success());
    Ok(())
}
