//! A carrier route that leads into the tunnel: nothing goes round, each packet is counted, one line says so.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::ping::{self, Plan};
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

/// Packets for the peer that have had their verdict.
fn outward(status: &Status) -> u64 {
    ["sent", "route-loop", "no-route", "no-send-key"].iter().map(|verdict| status.count(verdict)).sum()
}

fn told(gateway: &Gateway) -> usize {
    gateway.log().text().lines().filter(|line| line.contains("looped route")).count()
}

#[test]
fn a_carrier_route_into_the_tunnel_is_dropped_counted_and_told_once() -> Result<()> {
    const PINGS: usize = 50;
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Blowfish, |_, options| options.set("tokxc", 1))?;
    pair.wait_for_keys(&net)?;
    let peer = Side::B.carrier().to_string();
    for round in 1..=2 {
        let (start, device_at_start) = (pair.a.status()?, net.gw(Side::A).counters("cipcb0")?);
        net.gw(Side::A).ip(&["route", "add", &peer, "dev", "cipcb0"])?;
        let deadline = Instant::now() + SOON;
        while told(&pair.a) < round {
            if Instant::now() > deadline {
                bail!("the loop was not noticed:\n{}", pair.a.log().text());
            }
            let one = Plan { timeout: Duration::from_millis(50), ..Plan::count(1) };
            ping::run(net.lan(Side::A), Side::B.host(), &one)?;
        }
        // The last of these pings may be on its way yet.
        let device = net.gw(Side::A).counters("cipcb0")?;
        let due = outward(&start) + device.tx_packets - device_at_start.tx_packets;
        let before = pair.a.wait_for_status("all of these counted", |status| outward(status) >= due)?;
        let plan = Plan { window: PINGS, timeout: Duration::from_millis(500), ..Plan::count(PINGS) };
        assert_eq!(ping::run(net.lan(Side::A), Side::B.host(), &plan)?.received(), 0);
        let due = before.count("route-loop") + PINGS as u64;
        let after = pair.a.wait_for_status("every ping counted", |status| status.count("route-loop") >= due)?;
        let device_after = net.gw(Side::A).counters("cipcb0")?;
        assert_eq!(after.count("route-loop"), due, "{after:?}");
        assert_eq!(after.count("sent"), before.count("sent"), "{after:?}");
        // Nothing but the pings went into the tunnel device.
        assert_eq!(device_after.tx_packets - device.tx_packets, PINGS as u64);
        assert_eq!(told(&pair.a), round, "{}", pair.a.log().text());
        assert!(after.count("route-loop") > start.count("route-loop"));

        net.gw(Side::A).ip(&["route", "del", &peer, "dev", "cipcb0"])?;
        pair.wait_for_keys(&net)?;
        let deadline = Instant::now() + SOON;
        let one = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
        while ping::run(net.lan(Side::A), Side::B.host(), &one)?.received() == 0 {
            if Instant::now() > deadline {
                bail!("the right route was not taken again:\n{}\n{:?}", pair.a.log().text(), pair.a.status()?);
            }
        }
    }
    Ok(())
}
