//! A TCP stream continues between ours and a peer that behaves as the original does, while keys change faster than once a
//! second: that peer forgets keys, asks for new ones, uses them at once, never retransmits messages, and sends under the static
//! key in between.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cipe_tests::gateway::Daemon;
use cipe_tests::original::Original;
use cipe_tests::peer::{Config, Counters, Order, Stamp};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::stream::Stream;
use cipe_tests::topology::Side;
use cipe_tests::{SOON, may_make_namespaces};

/// Key changes of the data's direction.
const CHANGES: u64 = 20;

/// Number of changes in a row that are timed.
const RUN: usize = 5;

/// Keys that the sender of the stream has used, as the original counts them.
fn changes(sender: Side, counters: &Counters) -> u64 {
    match sender {
        // Ours sends under the keys that the original receives.
        Side::A => counters.receive_keys,
        Side::B => counters.send_keys,
    }
}

/// Streams from `sender`'s LAN until its key has changed often enough; returns the original's counters, and how long its
/// fastest [`RUN`] changes took: a machine that is busy for a while does not slow down all of them.
fn stream(sender: Side, count: u64, link: &Original) -> Result<(Counters, Option<Duration>)> {
    link.wait_for_pings()?;
    let (net, receiver) = (&link.net, sender.other());
    let stream = Stream::start(net.lan(sender), (net.lan(receiver), receiver.host()))?;
    stream.wait_for_more()?;
    let (start, before) = (Instant::now(), changes(sender, &link.theirs.counters()));
    let deadline = start + patient(SOON + Duration::from_secs(10 * count));
    let mut times = vec![start];
    loop {
        let changed = changes(sender, &link.theirs.counters()) - before;
        // Several changes seen at once have the time of the last one.
        times.resize(changed as usize + 1, Instant::now());
        if changed >= count {
            break;
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if link.events.recv_timeout(left).is_err() || !stream.is_running() {
            let (log, status) = (link.ours.log().text(), link.ours.status()?);
            bail!("{} octets\n{:#?}\n{status:?}\n{log}", stream.arrived(), link.theirs.counters());
        }
    }
    let took = start.elapsed();
    let fastest = times.windows(RUN + 1).map(|run| run[RUN] - run[0]).min();
    stream.wait_for_more()?;
    let octets = stream.finish()?;
    let counters = link.theirs.counters();
    eprintln!("{octets} octets, {count} key changes in {took:?}, the fastest {RUN} in {fastest:?}; {counters:?}");
    Ok((counters, fastest))
}

/// Limits that make an original change keys several times a second.
fn hasty(config: &mut Config) {
    (config.send_packets, config.receive_packets) = (1_000, 2_000);
    config.tokxc = Duration::from_millis(100);
}

fn outlives_hasty_keys(daemon: Daemon, sender: Side, stamp: Stamp, order: Order) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = Original::start(
        daemon,
        |options| options.set("tokey", 1).set("tokxc", 1).set("tokxts", 60),
        |config| {
            hasty(config);
            (config.stamp, config.order, config.tokxts) = (stamp, order, 60);
        },
    )?;
    let (counters, fastest) = stream(sender, CHANGES, &link)?;
    assert!(fastest.is_some_and(|took| took < Duration::from_secs(RUN as u64)), "{RUN} key changes took {fastest:?}");
    assert_eq!((counters.bad_message, counters.bad_p, counters.bad_length), (0, 0, 0), "{counters:?}");
    match sender {
        // It lost its receive key again and again, and asked for another.
        Side::A => assert!(counters.requests_sent > 0 && counters.no_receive_key > 0, "{counters:?}"),
        Side::B => assert!(counters.sent_static > 0, "{counters:?}"),
    }
    let status = link.ours.status()?;
    for verdict in ["bad-length", "bad-padding", "bad-type", "bad-inner", "bad-message", "replayed", "reflected"] {
        assert_eq!(status.count(verdict), 0, "{verdict}: {status:?}");
    }
    Ok(())
}

#[test]
fn ours_sends_with_blowfish() -> Result<()> {
    outlives_hasty_keys(Daemon::Blowfish, Side::A, Stamp::First, Order::Big)
}

#[test]
fn ours_receives_with_blowfish() -> Result<()> {
    outlives_hasty_keys(Daemon::Blowfish, Side::B, Stamp::Second, Order::Little)
}

#[test]
fn ours_sends_with_idea() -> Result<()> {
    outlives_hasty_keys(Daemon::Idea, Side::A, Stamp::Second, Order::Big)
}

#[test]
fn ours_receives_with_idea() -> Result<()> {
    outlives_hasty_keys(Daemon::Idea, Side::B, Stamp::First, Order::Little)
}

/// An original forgets a receive key after twice tokey; later packets under it are lost, and with them the NK_ACK that would
/// have given the original a key again.
#[test]
fn the_first_packet_after_a_long_pause_arrives() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let second = Duration::from_secs(1);
    let link = Original::start(
        Daemon::Blowfish,
        |options| options.set("tokey", 1).set("tokxc", 1),
        |config| (config.tokey, config.tokxc) = (second, second),
    )?;
    for from in [Side::A, Side::B] {
        link.wait_for_pings()?;
        let deadline = Instant::now() + patient(SOON);
        while link.ours.status()?.has_key("send") {
            if Instant::now() > deadline {
                bail!("the old key is still there: {:?}\n{}", link.ours.status()?, link.ours.log().text());
            }
        }
        let before = link.theirs.counters();
        let report = ping::run(link.net.lan(from), from.other().host(), &Plan::count(1))?;
        assert_eq!(report.received(), 1, "from {from:?}: {:?}", link.theirs.counters());
        assert_eq!(link.theirs.counters().no_receive_key, before.no_receive_key);
    }
    Ok(())
}

/// With the limits of 1.4.5: ours renews in time, so the original can always decrypt.
fn keeps_the_limits(sender: Side) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let link = Original::start(Daemon::Idea, |options| options, |_| {})?;
    let (counters, _) = stream(sender, 3, &link)?;
    assert_eq!((counters.no_receive_key, counters.requests_sent), (0, 0), "{counters:?}");
    assert_eq!((counters.bad_message, counters.bad_p, counters.bad_length), (0, 0, 0), "{counters:?}");
    Ok(())
}

#[test]
fn an_original_is_never_deafened_when_ours_sends() -> Result<()> {
    keeps_the_limits(Side::A)
}

#[test]
fn an_original_is_never_deafened_when_ours_receives() -> Result<()> {
    keeps_the_limits(Side::B)
}
