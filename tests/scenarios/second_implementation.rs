//! Ours at one end; at the other the small second implementation of the protocol, which behaves as an original.

use std::net::{SocketAddr, UdpSocket};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cipe_tests::gateway::{Daemon, Gateway};
use cipe_tests::net::{ICMP, Ipv4, checksum, echo_request, pattern};
use cipe_tests::offload::Offload;
use cipe_tests::options::{KEY, Options, PORT};
use cipe_tests::peer::{Cipher, Config, Event, OldKey, Peer};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::topology::{Carrier, Side, Topology};
use cipe_tests::{SOON, may_make_namespaces};

/// Shortest inner packet that an original accepts (protocol section 1).
const SHORTEST: usize = 31;
const MTU: usize = 1442;

struct Link {
    net: Topology,
    ours: Gateway,
    theirs: Peer,
    events: Receiver<Event>,
    config: Config,
}

/// Ours is gateway A; the other implementation plays gateway B and every host behind it.
fn link(daemon: Daemon, change: impl Fn(Options) -> Options, configure: impl Fn(&mut Config)) -> Result<Link> {
    let net = Topology::new(Carrier::Direct, Offload::On)?;
    let mut key = [0; 16];
    hex::decode_to_slice(KEY, &mut key)?;
    let cipher = match daemon {
        Daemon::Blowfish | Daemon::EthernetBlowfish => Cipher::Blowfish,
        Daemon::Idea | Daemon::EthernetIdea => Cipher::Idea,
    };
    let mut config = Config::original(cipher, key);
    config.peer = Some(SocketAddr::from((Side::A.carrier(), PORT)));
    config.tell_packets = true;
    configure(&mut config);
    let socket = net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), PORT)))?;
    let (theirs, events) = Peer::start(socket, config.clone())?;
    let mut ours = Gateway::start(&net, Side::A, daemon, &change(Options::of(Side::A)))?;
    ours.wait_up()?;
    Ok(Link { net, ours, theirs, events, config })
}

impl Link {
    /// Pings from lanA until both ends have dynamic keys.
    fn wait_for_keys(&self) -> Result<()> {
        let deadline = Instant::now() + patient(SOON);
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

    fn bind(&self) -> Result<UdpSocket> {
        Ok(self.net.gw(Side::B).run(|| UdpSocket::bind((Side::B.carrier(), PORT)))?)
    }

    /// A third end replaces the other implementation and exchanges keys with ours; then the first returns, with its old keys.
    fn stand_in(&mut self) -> Result<()> {
        let elsewhere = self.net.gw(Side::B).run(|| UdpSocket::bind("127.0.0.1:0"))?;
        self.theirs.move_to(elsewhere)?;
        let deadline = Instant::now() + patient(SOON);
        // Its thread closes the old socket when it gets the new one.
        let port = loop {
            match self.bind() {
                Ok(port) => break port,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => std::thread::yield_now(),
            }
        };
        let (stand_in, events) = Peer::start(port, self.config.clone())?;
        let away = (std::mem::replace(&mut self.theirs, stand_in), std::mem::replace(&mut self.events, events));
        self.wait_for_keys()?;
        // A key that it has not used would not replace the previous one.
        self.ping_back(1)?;
        let (stand_in, events) =
            (std::mem::replace(&mut self.theirs, away.0), std::mem::replace(&mut self.events, away.1));
        stand_in.stop()?;
        drop(events);
        Ok(self.theirs.move_to(self.bind()?)?)
    }

    /// Lets the other implementation ping lanA, and waits for the answer at its end.
    fn ping_back(&self, number: u32) -> Result<()> {
        while self.events.try_recv().is_ok() {}
        let payload = pattern(number, 100);
        self.theirs.send(echo_request([Side::B.host(), Side::A.host()], &payload));
        let deadline = Instant::now() + patient(SOON);
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

/// It announces several keys before the first is acknowledged, and uses its old one meanwhile.
#[test]
fn keys_that_were_never_used_do_not_push_out_the_one_in_use() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(Daemon::Blowfish, |options| options, |config| config.old_key = OldKey::Kept)?;
    link.ping_back(1)?;
    link.wait_for_keys()?;
    for number in 2..7 {
        for _ in 0..3 {
            link.theirs.renew();
        }
        link.ping_back(number)?;
    }
    let status = link.ours.status()?;
    assert_eq!((status.count("bad-crc"), status.count("no-receive-key")), (0, 0), "{status:?}");
    Ok(())
}

/// Its NK_ACK is lost; it does not accept the same key again, so it does not acknowledge it again either.
#[test]
fn one_that_takes_no_key_twice_gets_another() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(
        Daemon::Idea,
        |options| options.set("tokxc", 2),
        |config| (config.refuse_old, config.lose_acks) = (true, 1),
    )?;
    link.wait_for_keys()?;
    let counters = link.theirs.counters();
    assert!(counters.refused_keys > 0 && counters.receive_keys == 2, "{counters:?}");
    assert!(!link.ours.log().text().contains("no answer to NK_IND"), "{}", link.ours.log().text());
    Ok(())
}

/// Neither end can decrypt the other's packets, and the other implementation does not report it.
#[test]
fn one_that_another_stood_in_for_is_heard_again_when_it_comes_back() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut link = link(Daemon::Blowfish, |options| options.set("tokxc", 1), |_| {})?;
    link.wait_for_keys()?;
    // If it came sooner, ours would assume that an earlier announcement may have overtaken the key's, and announce the key
    // again by itself.
    let old_enough = Instant::now() + Duration::from_secs(3);
    while Instant::now() < old_enough {
        link.ping_back(1)?;
    }
    link.stand_in()?;
    let deadline = Instant::now() + patient(SOON);
    let before = link.theirs.counters().delivered_dynamic;
    while link.theirs.counters().delivered_dynamic == before {
        link.theirs.send(echo_request([Side::B.host(), Side::A.host()], &pattern(3, 100)));
        if Instant::now() > deadline {
            bail!("{:?}\n{:?}\n{}", link.theirs.counters(), link.ours.status()?, link.ours.log().text());
        }
        // Ours answers when it has a key again; until then, send a packet now and then.
        let _ = link.events.recv_timeout(Duration::from_millis(200));
    }
    assert!(link.ours.status()?.count("bad-crc") > 0);
    link.ping_back(4)
}

/// No host behind it sends anything: only its CT_PONGs are missing.
#[test]
fn pings_that_stay_unanswered_bring_another_key() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut link = link(
        Daemon::Blowfish,
        |options| options.set("tokxc", 1).set("ping", 1).set("toping", 1).set("maxerr", -1),
        |_| {},
    )?;
    link.wait_for_keys()?;
    link.stand_in()?;
    let plan = Plan { timeout: Duration::from_millis(500), ..Plan::count(1) };
    let deadline = Instant::now() + patient(SOON);
    while ping::run(link.net.lan(Side::A), Side::B.host(), &plan)?.received() == 0 {
        if Instant::now() > deadline {
            bail!("{:?}\n{:?}\n{}", link.theirs.counters(), link.ours.status()?, link.ours.log().text());
        }
    }
    Ok(())
}

/// As 1.5 at its start: a CT_CONFREQ in clear, of a length that no packet has, is answered at once, by either door.
#[test]
fn a_question_about_the_configuration_in_clear_is_answered() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    for (carrier, daemon, cipher) in [("udp", Daemon::Blowfish, b'b'), ("xdp", Daemon::Idea, b'i')] {
        let link = link(daemon, |options| options.set("carrier", carrier), |config| config.asks_configuration = true)?;
        link.wait_for_keys()?;
        let deadline = Instant::now() + patient(SOON);
        let answer = loop {
            // The first one may have arrived before ours was up.
            link.theirs.send_clear(0x75);
            match link.events.recv_timeout(Duration::from_secs(1)) {
                Ok(Event::Clear(message)) => break message,
                _ if Instant::now() > deadline => bail!("{:?}\n{}", link.ours.status()?, link.ours.log().text()),
                _ => {}
            }
        };
        assert_eq!((answer[0], &answer[4..10]), (0x76, &[b'C', b'I', b'P', b'E', 3, cipher][..]));
        assert!(link.ours.status()?.count("clear-control") > 0);
        assert_eq!(link.ours.status()?.count("bad-length"), 0);
        assert!(!link.ours.log().text().contains("another way"), "{}", link.ours.log().text());
    }
    Ok(())
}

/// Anybody who can reach the port can send them.
#[test]
fn nothing_in_clear_stops_ours_or_changes_its_keys() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = link(Daemon::Blowfish, |options| options, |_| {})?;
    link.wait_for_keys()?;
    let before = link.theirs.counters();
    // One after the other: of many at once, only some are forwarded to the daemon.
    for (count, number) in [1, 2, 3, 0x74].into_iter().enumerate() {
        link.theirs.send_clear(number);
        let deadline = Instant::now() + patient(SOON);
        while link.ours.status()?.count("clear-control") <= count as u64 {
            if Instant::now() > deadline {
                bail!("{:?}", link.ours.status()?);
            }
        }
    }
    link.ours.wait_for_line("of what was refused", |line| line.contains("refused NK_REQ in clear from"))?;
    link.ping_back(1)?;
    let after = link.theirs.counters();
    assert_eq!((after.receive_keys, after.send_keys), (before.receive_keys, before.send_keys), "{after:?}");
    Ok(())
}

/// Each key is announced under the previous one, both ways; only the first ones under the static key.
#[test]
fn keys_are_chained() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let renew = |config: &mut Config| (config.tokey, config.tokxc) = (Duration::from_secs(1), Duration::from_secs(1));
    let link = link(Daemon::Blowfish, |options| options.set("tokey", 1).set("tokxc", 1), renew)?;
    link.wait_for_keys()?;
    let deadline = Instant::now() + patient(SOON);
    loop {
        let counters = link.theirs.counters();
        if counters.chained_keys >= 3 && counters.send_keys >= 4 {
            break;
        }
        if Instant::now() > deadline {
            bail!("{counters:?}\n{}", link.ours.log().text());
        }
        ping::run(link.net.lan(Side::A), Side::B.host(), &Plan::count(1))?;
    }
    Ok(())
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
    let deadline = Instant::now() + patient(SOON + Duration::from_secs(2 * CHANGES));
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
    // An original forgets the old receive key at once: packets in flight are lost.
    assert!(lost <= changes * WINDOW, "{lost} of {sent} pings lost in {changes} key changes");
    Ok(())
}
