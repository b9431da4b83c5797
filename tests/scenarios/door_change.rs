//! `carrier auto` on a device that may deliver superframes: it changes to AF_XDP when single frames arrive, and back to the UDP
//! socket when the device is calm, without an effect on traffic.

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use cipe_tests::flows::Flows;
use cipe_tests::gateway::{Daemon, Gateway, Pair};
use cipe_tests::offload::Offload;
use cipe_tests::options::Options;
use cipe_tests::status::Status;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{may_make_namespaces, traffic};

const BY_SOCKET: &str = "UDP socket, until single frames";
const BY_XDP: &str = "native XDP, copy mode";
const LIVE: &str = "sends live frames";
/// The feature without which live frames are never sent.
const FOR_LIVE: &str = "XDP features by netlink";

/// Time between two rounds of a flow that keeps the door calm.
const CALM: Duration = Duration::from_millis(50);

fn has_door(status: &Status, words: &str) -> bool {
    status.doors.iter().any(|door| door.starts_with("wire0") && door.contains(words))
}

/// Runs flows both ways while `meanwhile` runs, each with `pause` between its rounds; returns the datagrams of A and of B.
fn under_flows(
    net: &Topology,
    flows: usize,
    pause: Duration,
    meanwhile: impl FnOnce() -> Result<()>,
) -> Result<[u64; 2]> {
    let run = |from, stop: Receiver<()>| -> Result<u64> {
        let mut flows = Flows::new(net, from, flows, true)?;
        let mut datagrams = 0;
        loop {
            datagrams += flows.round().with_context(|| format!("from {from:?}"))?;
            // The channel is a timer; the end of `meanwhile` stops it.
            if stop.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
                return Ok(datagrams);
            }
        }
    };
    std::thread::scope(|scope| {
        let start = |from| {
            let (stop, stopped): (Sender<()>, _) = channel();
            (stop, scope.spawn(move || run(from, stopped)))
        };
        let [(a, from_a), (b, from_b)] = [start(Side::A), start(Side::B)];
        let outcome = meanwhile();
        drop((a, b));
        let datagrams = [from_a, from_b].map(|flow| flow.join().map_err(|_| anyhow!("a flow panicked"))?);
        let [a, b] = datagrams;
        let datagrams = [a?, b?];
        outcome.map(|()| datagrams)
    })
}

/// Waits until each end has delivered all that the other one has sent, and nothing was dropped.
fn adds_up(pair: &Pair) -> Result<()> {
    for (from, to) in [(&pair.a, &pair.b), (&pair.b, &pair.a)] {
        let sent = from.status()?.count("sent");
        to.wait_for_status("all that was sent", |status| status.count("delivered") == sent)?;
    }
    for gateway in [&pair.a, &pair.b] {
        let status = gateway.status()?;
        let fine = ["sent", "delivered", "control-sent", "control-received"];
        let drops: Vec<_> = status.verdicts.iter().filter(|(name, _)| !fine.contains(&name.as_str())).collect();
        ensure!(drops.is_empty(), "{drops:?}");
    }
    Ok(())
}

fn both(pair: &Pair, door: &str) -> Result<()> {
    let wait = |gateway: &Gateway| gateway.wait_for_status(door, |status| has_door(status, door)).map(drop);
    wait(&pair.a)?;
    wait(&pair.b)
}

#[test]
fn the_door_follows_what_comes_and_no_flow_notices() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let pair = Pair::start(&net, Daemon::Idea, |_, options| options)?;
    pair.wait_for_keys(&net)?;
    let octets: Vec<u8> = (0..1_000_000_u32).flat_map(|n| n.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
    let stream = |from: Side| {
        let to = (net.lan(from.other()), from.other().host());
        assert!(traffic::tcp_transfer(net.lan(from), to, &octets)? == octets, "4 MB from {from:?}");
        anyhow::Ok(())
    };

    // Superframes, and few other packets.
    stream(Side::A)?;
    stream(Side::B)?;
    both(&pair, BY_SOCKET)?;

    let doors = if pair.a.status()?.has_feature(FOR_LIVE) { &[BY_XDP, LIVE][..] } else { &[BY_XDP] };
    let datagrams = under_flows(&net, 8, Duration::ZERO, || doors.iter().try_for_each(|door| both(&pair, door)))?;
    assert!(datagrams.iter().all(|datagrams| *datagrams > 0));
    adds_up(&pair)?;
    // In bursts, large enough for live frames.
    under_flows(&net, 64, Duration::ZERO, || stream(Side::A).and_then(|()| stream(Side::B)))?;
    adds_up(&pair)?;

    under_flows(&net, 1, CALM, || both(&pair, BY_SOCKET))?;
    for gateway in [&pair.a, &pair.b] {
        gateway.wait_for_line("why", |line| line.contains("wire0: calm for 10 s; UDP socket"))?;
    }
    adds_up(&pair)?;
    stream(Side::A)?;
    stream(Side::B)?;
    both(&pair, BY_SOCKET)
}

#[test]
fn who_sends_much_sends_live_frames_while_the_peer_runs_native_xdp() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::Raw)?;
    let forced = |side, options: Options| {
        if side == Side::B { options.set("carrier", "xdp") } else { options }
    };
    let pair = Pair::start(&net, Daemon::Idea, forced)?;
    pair.wait_for_keys(&net)?;
    if !pair.a.status()?.has_feature(FOR_LIVE) {
        return Ok(());
    }
    let octets = vec![7; 4_000_000];
    let stream = || {
        let to = (net.lan(Side::B), Side::B.host());
        traffic::tcp_transfer(net.lan(Side::A), to, &octets).is_ok_and(|received| received == octets)
    };
    pair.a.wait_for_status(LIVE, |status| stream() && has_door(status, LIVE))?;
    assert!(stream());
    // TCP retransmits packets that a veth loses when a program is attached; everything else is right.
    let fine = ["sent", "delivered", "control-sent", "control-received"];
    assert!(pair.a.status()?.verdicts.iter().all(|(name, _)| fine.contains(&name.as_str())));
    // The option asks for AF_XDP, also for sending.
    let asked = pair.b.status()?;
    assert!(has_door(&asked, BY_XDP) && !has_door(&asked, LIVE), "{asked:?}");
    pair.b.stop()?;
    pair.a.wait_for_status("no live frames", |status| !has_door(status, LIVE))?;
    Ok(())
}

#[test]
fn superframes_that_generic_xdp_cannot_read_are_counted_and_warned_of() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let generic = |side, options: Options| match side {
        Side::A => options.set("carrier", "xdp").set("xdp-mode", "generic"),
        Side::B => options.set("carrier", "udp"),
    };
    let pair = Pair::start(&net, Daemon::Idea, generic)?;
    pair.wait_for_keys(&net)?;
    pair.a.wait_for_line("of the loss", |line| line.contains("wire0: generic XDP loses"))?;
    let sender = net.lan(Side::B).run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))?;
    sender.connect((Side::A.host(), 9))?;
    pair.a.wait_for_status("a superframe", |status| {
        // All of one size, so that the packets of one read at B leave in one call, and so small that a kernel without AF_XDP
        // multi-buffer has them in one piece, which fails its CRC; larger ones go there to the UDP socket, and nothing is lost.
        // Nothing listens: ignore the errors.
        (0..8).for_each(|_| drop(sender.send(&[0; 100])));
        status.count("bad-length") + status.count("bad-crc") > 0
    })?;
    Ok(())
}

#[test]
fn a_door_that_was_asked_for_stays_when_it_is_calm() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let forced = |side, options: Options| {
        if side == Side::A { options.set("carrier", "xdp") } else { options }
    };
    let pair = Pair::start(&net, Daemon::Idea, forced)?;
    pair.wait_for_keys(&net)?;
    under_flows(&net, 8, Duration::ZERO, || {
        pair.b.wait_for_status("AF_XDP", |status| has_door(status, BY_XDP)).map(drop)
    })?;
    under_flows(&net, 1, CALM, || pair.b.wait_for_status("UDP", |status| has_door(status, BY_SOCKET)).map(drop))?;
    assert!(has_door(&pair.a.status()?, BY_XDP));
    adds_up(&pair)
}
