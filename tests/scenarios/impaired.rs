//! A carrier that loses, duplicates, damages and reorders datagrams: the ends always agree on keys, packets arrive, and the
//! counters of both ends match the relay's exactly.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use cipe_tests::gateway::{Daemon, Gateway};
use cipe_tests::impair::{Impairment, Passed};
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::relayed::{Relayed, inbound};
use cipe_tests::status::Status;
use cipe_tests::topology::Side;
use cipe_tests::{SOON, may_make_namespaces};

/// Least time between two key exchanges, in seconds. Three times this bounds each exchange, so it also bounds how long the
/// machine may be busy with other things.
const TOKXC: u64 = 3;

/// How long each exchange of a gateway took, by its log, in milliseconds.
fn exchanges(gateway: &Gateway) -> Vec<u64> {
    let after = |line: &str| line.split_once("acknowledged after ")?.1.split_once(" ms")?.0.parse().ok();
    gateway.log().lines().iter().filter_map(|line| after(&line.text)).collect()
}

/// Changes keys again and again while pings go both ways, and compares the counters with the relay's.
fn recovers(daemon: Daemon, impairment: Impairment) -> Result<Option<([Status; 2], [Passed; 2])>> {
    /// Key changes of each end.
    const CHANGES: usize = 4;
    if !may_make_namespaces() {
        return Ok(None);
    }
    let link = Relayed::start(daemon, 2026, |options| options.set("tokey", 1).set("tokxc", TOKXC))?;
    link.relay.impair(impairment);
    let deadline = Instant::now() + patient(SOON + Duration::from_secs(3 * TOKXC * 2 * CHANGES as u64));
    // All may be in flight, so that the test waits for the lost ones together.
    let timeout = Duration::from_secs(1);
    let plan = Plan { window: 100, interval: Duration::from_millis(2), timeout, ..Plan::count(100) };
    let (mut sent, mut received) = (0, 0);
    while exchanges(&link.pair.a).len().min(exchanges(&link.pair.b).len()) < CHANGES {
        for side in [Side::A, Side::B] {
            let report = ping::run(link.net.lan(side), side.other().host(), &plan)?;
            assert_eq!(report.damaged, 0, "from {side:?}");
            (sent, received) = (sent + report.sent, received + report.received());
        }
        if Instant::now() > deadline {
            bail!("too few key changes:\n{}\n{}", link.pair.a.log().text(), link.pair.b.log().text());
        }
    }
    for side in [Side::A, Side::B] {
        let gateway = link.pair.of(side);
        let slowest = exchanges(gateway).into_iter().max().unwrap_or_default();
        assert!(slowest <= 3 * TOKXC * 1000, "{side:?} needed {slowest} ms for a key");
        assert!(!gateway.log().text().contains("no answer to NK_"), "{side:?}:\n{}", gateway.log().text());
    }
    // Both ways, and some more for losses at the changes.
    let both_arrive = (1.0 - impairment.loss) * (1.0 - impairment.corruption);
    let expected = sent as f64 * both_arrive * both_arrive * 0.7;
    assert!(received as f64 > expected, "{received} of {sent} pings were answered");
    let settled = link.settle()?;
    for (side, status) in [Side::A, Side::B].into_iter().zip(&settled.0) {
        for verdict in ["bad-length", "bad-type", "bad-inner", "bad-message", "reflected", "wrong-peer", "no-frame"] {
            assert_eq!(status.count(verdict), 0, "{verdict} at {side:?}: {status:?}");
        }
    }
    Ok(Some(settled))
}

fn loss(daemon: Daemon, loss: f64) -> Result<()> {
    let Some((ends, passed)) = recovers(daemon, Impairment { loss, ..Impairment::default() })? else { return Ok(()) };
    for (status, passed) in ends.iter().zip(&passed) {
        assert!(passed.lost > 0, "{passed:?}");
        assert_eq!(status.count("bad-crc") + status.count("replayed"), 0, "{status:?}");
    }
    Ok(())
}

#[test]
fn keys_are_agreed_where_one_in_a_hundred_is_lost() -> Result<()> {
    loss(Daemon::Blowfish, 0.01)
}

#[test]
fn keys_are_agreed_where_one_in_ten_is_lost() -> Result<()> {
    loss(Daemon::Idea, 0.1)
}

#[test]
fn keys_are_agreed_where_one_in_five_is_lost() -> Result<()> {
    loss(Daemon::Blowfish, 0.2)
}

#[test]
fn a_doubled_datagram_is_delivered_once_and_counted_as_replayed() -> Result<()> {
    let impairment = Impairment { duplication: 0.3, ..Impairment::default() };
    let Some((ends, passed)) = recovers(Daemon::Blowfish, impairment)? else { return Ok(()) };
    for (to, from) in [(0, 1), (1, 0)] {
        assert!(passed[from].doubled > 0, "{passed:?}");
        assert_eq!(ends[to].count("replayed"), passed[from].doubled, "{:?}", ends[to]);
        assert_eq!(ends[to].count("bad-crc"), 0, "{:?}", ends[to]);
    }
    Ok(())
}

#[test]
fn a_damaged_datagram_is_dropped_and_counted_as_bad_crc() -> Result<()> {
    let impairment = Impairment { corruption: 0.1, ..Impairment::default() };
    let Some((ends, passed)) = recovers(Daemon::Idea, impairment)? else { return Ok(()) };
    for (to, from) in [(0, 1), (1, 0)] {
        assert!(passed[from].damaged > 0, "{passed:?}");
        // An inverted key flag selects another key, which may not exist.
        let refused = ends[to].count("bad-crc") + ends[to].count("no-receive-key");
        assert_eq!(refused, passed[from].damaged, "{:?}", ends[to]);
        assert_eq!(ends[to].count("replayed"), 0, "{:?}", ends[to]);
    }
    Ok(())
}

#[test]
fn reordered_datagrams_are_delivered_also_across_key_changes() -> Result<()> {
    let impairment = Impairment { reorder: 0.2, span: 6, ..Impairment::default() };
    let Some((ends, passed)) = recovers(Daemon::Blowfish, impairment)? else { return Ok(()) };
    for (to, from) in [(0, 1), (1, 0)] {
        assert!(passed[from].overtaken > 0, "{passed:?}");
        assert_eq!(ends[to].count("bad-crc") + ends[to].count("no-receive-key"), 0, "{:?}", ends[to]);
    }
    Ok(())
}

#[test]
fn all_at_once_is_borne() -> Result<()> {
    let impairment = Impairment {
        loss: 0.1,
        duplication: 0.1,
        corruption: 0.05,
        reorder: 0.1,
        span: 4,
        delay: Duration::from_millis(5),
        rate: None,
    };
    let Some((ends, passed)) = recovers(Daemon::Blowfish, impairment)? else { return Ok(()) };
    for (to, from) in [(0, 1), (1, 0)] {
        assert_eq!(ends[to].count("replayed"), passed[from].doubled, "{:?}", ends[to]);
        let refused = ends[to].count("bad-crc") + ends[to].count("no-receive-key");
        assert_eq!(refused, passed[from].damaged, "{:?}", ends[to]);
    }
    Ok(())
}

/// The longest time that the ends of a sealed tunnel may take to agree: three of the longest intervals between two repetitions
/// (docs/SEALED.md, section 6.5).
const SEALED_WITHIN: Duration = Duration::from_millis(18_750);

/// How long each handshake of a gateway took, by its log, in milliseconds.
fn handshakes(gateway: &Gateway) -> Vec<u64> {
    let after = |line: &str| line.split_once("sealed by ")?.1.split_once("after ")?.1.split_once(" ms")?.0.parse().ok();
    gateway.log().lines().iter().filter_map(|line| after(&line.text)).collect()
}

/// The same for sealed packets. Returns the counters of the ends and the relay.
fn seals(impairment: Impairment) -> Result<Option<([Status; 2], [Passed; 2])>> {
    /// Packets of each end after which keys are surely renewed some times.
    const ROUNDS: usize = 8;
    if !may_make_namespaces() {
        return Ok(None);
    }
    let link = Relayed::start(Daemon::Blowfish, 2027, |options| options.sealed_anew("500"))?;
    link.relay.impair(impairment);
    let started = Instant::now();
    link.pair.wait_for_keys(&link.net)?;
    assert!(started.elapsed() <= patient(SEALED_WITHIN), "{:?} until both ends were sealed", started.elapsed());
    let timeout = Duration::from_secs(1);
    let plan = Plan { window: 100, interval: Duration::from_millis(2), timeout, ..Plan::count(100) };
    let (mut sent, mut received) = (0, 0);
    for _ in 0..ROUNDS {
        for side in [Side::A, Side::B] {
            let report = ping::run(link.net.lan(side), side.other().host(), &plan)?;
            assert_eq!(report.damaged, 0, "from {side:?}");
            (sent, received) = (sent + report.sent, received + report.received());
        }
    }
    let both_arrive = (1.0 - impairment.loss) * (1.0 - impairment.corruption);
    let expected = sent as f64 * both_arrive * both_arrive * 0.7;
    assert!(received as f64 > expected, "{received} of {sent} pings were answered");
    for side in [Side::A, Side::B] {
        let slowest = handshakes(link.pair.of(side)).into_iter().max().unwrap_or_default();
        assert!(u128::from(slowest) <= patient(SEALED_WITHIN).as_millis(), "{side:?} needed {slowest} ms for a key");
    }
    let settled = link.settle()?;
    for (side, status) in [Side::A, Side::B].into_iter().zip(&settled.0) {
        for verdict in ["bad-crc", "bad-inner", "reflected", "wrong-peer", "too-old", "no-frame"] {
            assert_eq!(status.count(verdict), 0, "{verdict} at {side:?}: {status:?}");
        }
    }
    Ok(Some(settled))
}

/// Datagrams that an end has refused, other than repeated ones.
fn refused(status: &Status) -> u64 {
    let taken = ["delivered", "control-received", "replayed"].map(|verdict| status.count(verdict));
    inbound(status) - taken.iter().sum::<u64>()
}

#[test]
fn sealed_keys_are_agreed_where_one_in_five_is_lost() -> Result<()> {
    let impairment = Impairment { loss: 0.2, ..Impairment::default() };
    let Some((ends, passed)) = seals(impairment)? else { return Ok(()) };
    for (status, passed) in ends.iter().zip(&passed) {
        assert!(passed.lost > 0, "{passed:?}");
        assert_eq!(status.count("bad-tag"), 0, "{status:?}");
    }
    Ok(())
}

#[test]
fn a_doubled_sealed_datagram_is_delivered_once_and_a_damaged_one_never() -> Result<()> {
    let impairment = Impairment { duplication: 0.3, corruption: 0.1, ..Impairment::default() };
    let Some((ends, passed)) = seals(impairment)? else { return Ok(()) };
    for (to, from) in [(0, 1), (1, 0)] {
        assert!(passed[from].doubled > 0 && passed[from].damaged > 0, "{passed:?}");
        // The place of the cookie in a first message is looked at under load only: damage there changes nothing.
        let taken = passed[from].damaged.checked_sub(refused(&ends[to]));
        assert!(taken.is_some_and(|taken| taken <= 10), "{taken:?} of {:?}: {:?}", passed[from], ends[to]);
        // A handshake message that comes twice is taken, or is a replay, as one that its sender has repeated is.
        let replayed = ends[to].count("replayed");
        assert!(
            replayed.abs_diff(passed[from].doubled) <= 20,
            "{replayed} of {}: {:?}",
            passed[from].doubled,
            ends[to]
        );
    }
    Ok(())
}

#[test]
fn reordered_sealed_datagrams_are_delivered_also_across_key_changes() -> Result<()> {
    let impairment = Impairment { reorder: 0.2, span: 6, ..Impairment::default() };
    let Some((ends, passed)) = seals(impairment)? else { return Ok(()) };
    for (to, from) in [(0, 1), (1, 0)] {
        assert!(passed[from].overtaken > 0, "{passed:?}");
        assert_eq!(refused(&ends[to]), 0, "{:?}", ends[to]);
    }
    Ok(())
}
