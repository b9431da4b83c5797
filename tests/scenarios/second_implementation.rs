//! Ours at one end, the small second implementation of the wire at the other, behaving as an original does.

use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway};
use cipe_tests::net::{ICMP, Ipv4, checksum, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options, PORT};
use cipe_tests::peer::{Cipher, Config, Event, Peer};
use cipe_tests::ping::{self, Plan};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

/// Shortest inner packet that an original takes (protocol section 1).
const SHORTEST: usize = 31;
const MTU: usize = 1442;

struct Link {
    net: Topology,
    ours: Gateway,
    theirs: Peer,
    events: Receiver<Event>,
}

/// Ours is gateway A; the other implementation stands for gateway B and for every host behind it.
fn link(daemon: Daemon, change: impl Fn(Options) -> Options, configure: impl Fn(&mut Config)) -> Result<Link> {
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut key = [0; 16];
    hex::decode_to_slice(KEY, &mut key)?;
    let cipher = match daemon {
        Daemon::Blowfish => Cipher::Blowfish,
        Daemon::Idea => Cipher::Idea,
    };
    let mut config = Config::original(cipher, key);
    config.peer = Some(SocketAddr::from((Side::A.carrier(), PORT)));
    config.tell_packets = true;
    configure(&mut config);
    let socket = net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), PORT)))?;
    let (theirs, events) = Peer::start(socket, config)?;
    let mut ours = Gateway::start(&net, Side::A, daemon, &change(Options::of(Side::A)))?;
    ours.wait_up()?;
    Ok(Link { net, ours, theirs, events })
}

impl Link {
    /// Pings from lanA until both ends have dynamic keys.
    fn wait_for_keys(&self) -> Result<()> {
        let deadline = Instant::now() + SOON;
        let plan = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
        loop {
            ping::run(self.net.lan(Side::A), Side::B.host(), &plan)?;
            let (status, counters) = (self.ours.status()?, self.theirs.counters());
            let ours = status.has_key("send") && status.has_key("receive");
            if ours && counters.send_keys > 0 && counters.receive_keys > 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("no keys: {status:?}\n{counters:?}\n{}", self.ours.log().text());
            }
        }
    }

    /// Lets the other implementation ping lanA, and waits for the answer to come out at its end.
    fn ping_back(&self, number: u32) -> Result<()> {
        while self.events.try_recv().is_ok() {}
        let payload = pattern(number, 100);
        self.theirs.send(echo_request(&payload));
        let deadline = Instant::now() + SOON;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let event = self.events.recv_timeout(left).context("no answer came to the other implementation")?;
            let Event::Delivered(packet) = event else { continue };
            let reply = Ipv4::parse(&packet).context("what ours delivers is an IPv4 packet")?;
            if reply.protocol == ICMP && reply.payload[0] == 0 && reply.payload[8..] == payload {
                assert_eq!((reply.source, reply.destination), (Side::A.host(), Side::B.host()));
                assert_eq!(checksum(reply.payload), 0);
                return Ok(());
            }
        }
    }
}

/// A ping from lanB's address to lanA's.
fn echo_request(payload: &[u8]) -> Vec<u8> {
    let mut icmp = [&[8, 0, 0, 0, 0x12, 0x34, 0, 1], payload].concat();
    let sum = checksum(&icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    let total = (20 + icmp.len()) as u16;
    let mut packet = vec![0x45, 0];
    packet.extend(total.to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, ICMP, 0, 0]);
    packet.extend(Side::B.host().octets());
    packet.extend(Side::A.host().octets());
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(icmp);
    packet
}

fn both_ways(daemon: Daemon) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(daemon, |options| options, |_| {})?;
    link.wait_for_keys()?;

    let report = ping::run(link.net.lan(Side::A), Side::B.host(), &Plan::sizes((SHORTEST..=MTU).collect()))?;
    assert_eq!((report.lost.as_slice(), report.damaged), (&[][..], 0));
    for number in 0..20 {
        link.ping_back(number)?;
    }
    let counters = link.theirs.stop()?;
    let pings = (MTU - SHORTEST + 1) as u64;
    assert!(counters.delivered_dynamic >= pings + 20, "{counters:?}");
    assert!(counters.sent_dynamic >= pings + 20, "{counters:?}");
    let refused = counters.bad_length + counters.bad_crc + counters.bad_p + counters.bad_message;
    assert_eq!((refused, counters.no_receive_key), (0, 0), "{counters:?}");
    let status = link.ours.status()?;
    for verdict in ["bad-crc", "bad-length", "bad-padding", "bad-type", "bad-inner", "bad-message", "replayed"] {
        assert_eq!(status.count(verdict), 0, "{verdict}: {status:?}");
    }
    Ok(())
}

#[test]
fn another_implementation_is_understood_both_ways_with_blowfish() -> Result<()> {
    both_ways(Daemon::Blowfish)
}

#[test]
fn another_implementation_is_understood_both_ways_with_idea() -> Result<()> {
    both_ways(Daemon::Idea)
}

#[test]
fn either_end_may_speak_first() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(Daemon::Blowfish, |options| options, |_| {})?;
    link.ping_back(1)?;
    link.wait_for_keys()
}

#[test]
fn keys_change_while_another_implementation_listens() -> Result<()> {
    const CHANGES: u64 = 3;
    const WINDOW: usize = 4;
    const PATIENCE: Duration = Duration::from_secs(2);
    if !may_make_namespaces() {
        return Ok(());
    }
    let renew = |config: &mut Config| {
        config.tokey = Duration::from_secs(1);
        config.tokxc = Duration::from_secs(1);
        config.tell_packets = false;
    };
    let link = link(Daemon::Blowfish, |options| options.set("tokey", 1).set("tokxc", 1), renew)?;
    link.wait_for_keys()?;
    let start = link.theirs.counters();
    let deadline = Instant::now() + SOON + Duration::from_secs(2 * CHANGES);
    let (mut lost, mut sent) = (0, 0);
    let plan = Plan { window: WINDOW, interval: Duration::from_millis(1), timeout: PATIENCE, ..Plan::count(250) };
    let changes = loop {
        let report = ping::run(link.net.lan(Side::A), Side::B.host(), &plan)?;
        (lost, sent) = (lost + report.lost.len(), sent + report.sent);
        let now = link.theirs.counters();
        let (ours, theirs) = (now.receive_keys - start.receive_keys, now.send_keys - start.send_keys);
        if ours.min(theirs) >= CHANGES {
            break (ours + theirs) as usize;
        }
        if Instant::now() > deadline {
            bail!("{now:?}\n{}", link.ours.log().text());
        }
    };
    // An original forgets the old receive key at once: what is in flight then is lost.
    assert!(lost <= changes * WINDOW, "{lost} of {sent} pings lost in {changes} key changes");
    Ok(())
}
