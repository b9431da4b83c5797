//! Ours at one end, sealed; at the other the second implementation of sealed packets (docs/SEALED.md) on a socket.

use std::cell::Cell;
use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use cipe_tests::gateway::{Daemon, Gateway};
use cipe_tests::net::{ICMP, Ipv4, checksum, echo_request, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options, PORT};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::sealed_peer::live::{Config, Counters, Event, LivePeer};
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

const MTU: usize = 1442;
/// Types of control messages.
const CT_PING: u8 = 0x72;
const CT_PONG: u8 = 0x73;

struct Link {
    net: Topology,
    ours: Gateway,
    theirs: LivePeer,
    events: Receiver<Event>,
    config: Config,
}

/// Ours is gateway A; the other implementation plays gateway B and every host behind it.
fn link(change: impl Fn(Options) -> Options, configure: impl Fn(&mut Config)) -> Result<Link> {
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut key = [0; 16];
    hex::decode_to_slice(KEY, &mut key)?;
    let mut config = Config::new(key, [0x80; 8]);
    (config.peer, config.tell_packets) = (Some(SocketAddr::from((Side::A.carrier(), PORT))), true);
    configure(&mut config);
    let (theirs, events) = LivePeer::start(bind(&net)?, config.clone())?;
    let mut ours = Gateway::start(&net, Side::A, Daemon::Blowfish, &change(Options::of(Side::A).sealed()))?;
    ours.wait_up()?;
    Ok(Link { net, ours, theirs, events, config })
}

fn bind(net: &Topology) -> Result<UdpSocket> {
    Ok(net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), PORT)))?)
}

fn is_answer(event: &Event, number: u32) -> bool {
    let Event::Delivered(packet) = event else { return false };
    let reply = Ipv4::parse(packet).filter(|reply| reply.protocol == ICMP && checksum(reply.payload) == 0);
    reply.is_some_and(|reply| reply.payload[0] == 0 && reply.payload[8..] == pattern(number, 100))
}

impl Link {
    /// Lets the other implementation ping lanA, and waits for the answer at its end.
    fn ping_back(&self, number: u32) -> Result<()> {
        self.theirs.send(echo_request([Side::B.host(), Side::A.host()], &pattern(number, 100)));
        self.wait_for_event("the answer to its ping", |event| is_answer(event, number))
    }

    fn wait_for_event(&self, what: &str, wanted: impl Fn(&Event) -> bool) -> Result<()> {
        let deadline = Instant::now() + patient(SOON);
        let left = || deadline.saturating_duration_since(Instant::now());
        let seen = std::iter::from_fn(|| self.events.recv_timeout(left()).ok()).any(|event| wanted(&event));
        ensure!(seen, "not seen: {what}\n{}", self.told());
        Ok(())
    }

    /// Pings from lanA until one is answered.
    fn wait_for_pings(&self) -> Result<()> {
        let answered = ping::wait_for_answer(self.lan(), Side::B.host(), Duration::from_millis(100), SOON)?;
        ensure!(answered, "no ping was answered\n{}", self.told());
        Ok(())
    }

    fn lan(&self) -> &cipe_tests::namespace::Namespace {
        self.net.lan(Side::A)
    }

    fn told(&self) -> String {
        format!("{:?}\n{:?}\n{}", self.theirs.counters(), self.ours.status(), self.ours.log().text())
    }

    /// Waits until the other implementation's counters are as wanted.
    fn wait_for_counters(&self, what: &str, wanted: impl Fn(&Counters) -> bool) -> Result<()> {
        let deadline = Instant::now() + patient(SOON);
        while !wanted(&self.theirs.counters()) {
            ensure!(Instant::now() < deadline, "not seen: {what}\n{}", self.told());
            // Its host answers; nothing but packets moves a tunnel.
            ping::run(self.lan(), Side::B.host(), &Plan { timeout: Duration::from_millis(200), ..Plan::count(1) })?;
        }
        Ok(())
    }
}

/// Packets of all sizes both ways, in sessions that either end has begun.
fn both_ways(suite: &str, carrier: &str, configure: impl Fn(&mut Config)) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(|options| options.set("carrier", carrier), configure)?;
    link.wait_for_pings()?;
    for round in 0..2 {
        let report = ping::run(link.lan(), Side::B.host(), &Plan::sizes((ping::HEADERS..=MTU).step_by(3).collect()))?;
        assert_eq!((report.lost.as_slice(), report.damaged), (&[][..], 0), "{round}: {}", link.told());
        for number in 0..20 {
            link.ping_back(number)?;
        }
        let counters = link.theirs.counters();
        assert_eq!((counters.initiated, counters.confirmed), (round, 1), "{}", link.told());
        if round == 0 {
            link.theirs.begin();
            link.wait_for_event("a session that it has begun", |event| *event == Event::Session)?;
            while link.theirs.counters().initiated == 0 {
                link.wait_for_event("a session that it has begun", |event| *event == Event::Session)?;
            }
        }
    }
    let status = link.ours.status()?;
    let counters = link.theirs.stop()?;
    assert_eq!((counters.unsealed, counters.refused, counters.no_key, counters.replayed), (0, 0, 0, 0), "{counters:?}");
    let refused = ["bad-tag", "bad-length", "too-old", "replayed", "bad-type", "bad-inner", "bad-message", "unsealed"];
    assert!(refused.iter().all(|verdict| status.count(verdict) == 0), "{status:?}");
    assert_eq!(status.sealed.and_then(|sealed| sealed.suite).as_deref(), Some(suite));
    Ok(())
}

#[test]
fn another_implementation_is_understood_both_ways_with_aes_256_gcm() -> Result<()> {
    both_ways("aes256-gcm", "xdp", |_| {})
}

#[test]
fn another_implementation_is_understood_both_ways_with_chacha20_poly1305() -> Result<()> {
    both_ways("cha-cha20-poly1305", "udp", |config| config.identity.fast_aes = false)
}

#[test]
fn lost_answers_cookies_and_a_newer_stamp_are_borne() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let hour = Duration::from_secs(3600).as_nanos() as u64;
    let link = link(
        |options| options,
        |config| (config.lose_answers, config.asks_cookies, config.newest) = (2, true, config.clock + hour),
    )?;
    link.wait_for_pings()?;
    let counters = link.theirs.counters();
    // A retry asks for the cookie and says the stamp.
    assert!(counters.retries_sent >= 1 && counters.answers >= 3, "{}", link.told());
    assert_eq!((counters.begun, counters.confirmed), (0, 1), "{}", link.told());
    // Its own clock is behind what it has taken, and so is its own stamp: ours takes it.
    link.theirs.begin();
    link.wait_for_counters("a session that it has begun", |counters| counters.initiated == 1)?;
    link.wait_for_pings()
}

#[test]
fn a_stamp_that_is_not_newer_is_answered_by_a_retry_that_says_the_newest() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let hour = Duration::from_secs(3600).as_nanos() as u64;
    // Ours has no file, and begins with its own clock.
    let link = link(|options| options, |config| config.clock -= hour)?;
    link.ping_back(1)?;
    let counters = link.theirs.counters();
    assert_eq!((counters.begun, counters.initiated, counters.retries_received), (2, 1, 1), "{}", link.told());
    link.ours.wait_for_status("the first one refused", |status| status.count("replayed") == 1)?;
    Ok(())
}

#[test]
fn keys_that_the_peer_renews_under_traffic_lose_nothing() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    const SESSIONS: u64 = 8;
    let link = link(|options| options, |config| config.tell_packets = false)?;
    link.wait_for_pings()?;
    let plan = Plan { window: 64, interval: Duration::from_millis(1), ..Plan::count(100_000) };
    // The peer is asked once for each session that it is to begin.
    let (theirs, asked) = (&link.theirs, Cell::new(0));
    let report = ping::run_while(link.lan(), Side::B.host(), &plan, || {
        let done = theirs.counters().initiated;
        if done == asked.get() {
            asked.set(done + 1);
            theirs.begin();
        }
        done < SESSIONS
    })?;
    assert_eq!(report.lost, [0; 0], "of {}\n{}", report.sent, link.told());
    let (status, counters) = (link.ours.status()?, link.theirs.counters());
    assert_eq!((counters.refused, counters.no_key), (0, 0), "{}", link.told());
    assert_eq!(status.count("bad-tag") + status.count("no-receive-key"), 0, "{status:?}");
    Ok(())
}

#[test]
fn a_peer_that_forgot_its_keys_gets_new_ones() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut link = link(|options| options, |_| {})?;
    link.wait_for_pings()?;
    let (spare, _) = LivePeer::start(UdpSocket::bind("127.0.0.1:0")?, link.config.clone())?;
    std::mem::replace(&mut link.theirs, spare).stop()?;
    (link.theirs, link.events) = LivePeer::start(bind(&link.net)?, link.config.clone())?;
    link.wait_for_pings()?;
    link.ping_back(1)?;
    assert!(link.theirs.counters().no_key > 0, "{}", link.told());
    Ok(())
}

#[test]
fn a_peer_whose_address_is_not_known_begins() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(|options| options.set("peer", "0.0.0.0:0"), |_| {})?;
    let plan = Plan { timeout: Duration::from_millis(100), ..Plan::count(3) };
    assert_eq!(ping::run(link.lan(), Side::B.host(), &plan)?.received(), 0);
    assert_eq!(link.theirs.counters().datagrams, 0, "an end without an address begins nothing");
    // It is asked where it is as soon as there is a key to ask with, and gets the answer to its first packet.
    link.ping_back(1)?;
    link.wait_for_pings()
}

#[test]
fn a_peer_that_moves_is_asked_there_before_anything_goes_there() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(|options| options, |_| {})?;
    link.wait_for_pings()?;
    let elsewhere = SocketAddr::from((Side::B.carrier(), PORT + 1));
    link.theirs.roam_to(link.net.gw(Side::B).run(|| UdpSocket::bind(elsewhere))?)?;
    link.theirs.send(echo_request([Side::B.host(), Side::A.host()], &pattern(1, 100)));
    link.wait_for_event("a question", |event| *event == Event::Message(CT_PING))?;
    link.ours.wait_for_line("of the new peer", |line| line.ends_with(&format!("new peer {elsewhere}")))?;
    link.ping_back(2)
}

#[test]
fn messages_inside_are_those_of_protocol_3_but_none_makes_keys() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(|options| options, |_| {})?;
    link.wait_for_pings()?;
    link.theirs.send_message([&[CT_PING][..], b"data"].concat());
    link.wait_for_event("an answer", |event| *event == Event::Message(CT_PONG))?;
    let before = link.ours.status()?.count("bad-message");
    // NK_REQ, NK_IND, NK_ACK, a type that does not exist.
    for number in [1, 2, 3, 0x7F] {
        link.theirs.send_message([&[number][..], &[7; 60]].concat());
    }
    let status = link.ours.wait_for_status("them refused", |status| status.count("bad-message") >= before + 4)?;
    assert!(status.is_sealed() && !status.has_key("send"), "{status:?}");
    // CT_KILL: the peer ends, and with it its keys.
    let sessions = link.theirs.counters().confirmed;
    link.theirs.send_message(b"\x74bye\0".to_vec());
    link.ours.wait_for_status("no send key", |status| !status.is_sealed())?;
    link.wait_for_pings()?;
    if link.theirs.counters().confirmed == sessions {
        bail!("the keys of a peer that has ended are still in use\n{}", link.told());
    }
    Ok(())
}
