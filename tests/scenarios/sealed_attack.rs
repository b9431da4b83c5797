//! Somebody on the path between two sealed gateways, who drops handshakes, splices, repeats and reflects: nothing forged is delivered,
//! nothing is delivered twice, and with `sealed require` nothing leaves unsealed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cipe_tests::attacked::{Attacked, Data, is_handshake};
use cipe_tests::options::Options;
use cipe_tests::ping::{self, Plan};
use cipe_tests::process::patient;
use cipe_tests::status::Status;
use cipe_tests::topology::Side;
use cipe_tests::{SOON, may_make_namespaces};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use rustix::process::Signal;

const BOTH: [Side; 2] = [Side::A, Side::B];
/// Datagrams of data each way.
const DATAGRAMS: u32 = 200;
/// Three of the longest intervals between two repetitions: a tunnel is sealed so soon after the path has healed (docs/SEALED.md,
/// section 6.5).
const HEALED_WITHIN: Duration = Duration::from_millis(18_750);

fn pass(side: usize, datagram: Vec<u8>) -> Vec<(usize, Vec<u8>)> {
    vec![(side, datagram)]
}

fn drop_handshakes(side: usize, datagram: Vec<u8>) -> Vec<(usize, Vec<u8>)> {
    if is_handshake(&datagram) { vec![] } else { vec![(side, datagram)] }
}

#[test]
fn who_drops_every_handshake_stops_a_sealed_tunnel_and_cannot_unseal_it() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let path = Attacked::start(Options::sealed, drop_handshakes)?;
    path.nothing_passes()?;
    let seen = [path.recorded(0), path.recorded(1)].concat();
    assert!(!seen.is_empty() && seen.iter().all(|datagram| is_handshake(datagram)), "{}", path.told());
    assert_eq!(path.unsealed(), 0);
    path.act(pass);
    let healed = Instant::now();
    path.link.pair.wait_for_keys(&path.link.net)?;
    assert!(healed.elapsed() <= patient(HEALED_WITHIN), "{:?}\n{}", healed.elapsed(), path.told());
    path.pings_pass()?;
    assert_eq!(path.unsealed(), 0);
    Ok(())
}

#[test]
fn who_drops_every_handshake_keeps_a_first_contact_on_protocol_3_and_no_later_one() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut path = Attacked::start(|options| options.set("sealed", "auto"), drop_handshakes)?;
    let (from, to) = (path.link.net.lan(Side::A), Side::B.host());
    ensure!(ping::wait_for_answer(from, to, Duration::from_millis(50), SOON)?, "{}", path.told());
    path.pings_pass()?;
    assert!(path.statuses()?.iter().all(|status| !status.is_sealed()), "{}", path.told());
    let tried = || [0, 1].iter().any(|side| path.recorded(*side).iter().any(|datagram| is_handshake(datagram)));
    assert!(tried(), "they would be sealed\n{}", path.told());

    path.act(pass);
    path.link.pair.wait_for_keys(&path.link.net)?;
    for gateway in [&path.link.pair.a, &path.link.pair.b] {
        gateway.wait_for_status("nothing else accepted", |status| {
            status.sealed.as_ref().is_some_and(|sealed| !sealed.accepts_unsealed)
        })?;
    }
    path.act(drop_handshakes);
    let before = path.unsealed();
    for side in BOTH {
        let gateway = match side {
            Side::A => &mut path.link.pair.a,
            Side::B => &mut path.link.pair.b,
        };
        gateway.restart_after(Signal::KILL, path.link.net.gw(side))?;
    }
    path.nothing_passes()?;
    assert_eq!(path.unsealed(), before, "of ends that were sealed\n{}", path.told());
    Ok(())
}

/// Each way: every eighth datagram has a bit inverted, which one depends on its octets.
fn flip(side: usize, mut datagram: Vec<u8>) -> Vec<(usize, Vec<u8>)> {
    let sum: usize = datagram.iter().map(|octet| usize::from(*octet)).sum();
    if sum.is_multiple_of(8) {
        let bit = (sum / 8).wrapping_mul(7919) % (datagram.len() * 8);
        datagram[bit / 8] ^= 1 << (bit % 8);
    }
    vec![(side, datagram)]
}

#[test]
fn inverted_bits_lose_a_packet_and_forge_none() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    // A message of a handshake is repeated with the same octets, and so would always have the same bit inverted.
    let path = Attacked::start(Options::sealed, pass)?;
    path.link.pair.wait_for_keys(&path.link.net)?;
    path.act(flip);
    let data = Data::new(&path)?;
    data.send(0..DATAGRAMS)?;
    let came = data.take(0..DATAGRAMS)?;
    assert!(came.iter().all(|came| (1..DATAGRAMS as usize).contains(came)), "{came:?}\n{}", path.told());
    path.link.settle()?;
    let refused: u64 = path.statuses()?.iter().map(|status| status.count("bad-tag")).sum();
    assert!(refused > 0, "{}", path.told());
    assert_eq!(path.unsealed(), 0);
    path.act(pass);
    path.pings_pass()
}

/// Beginnings and ends of genuine datagrams, cut at any octet or at those of a block.
fn spliced(real: &[Vec<u8>], count: usize, rng: &mut StdRng) -> Vec<Vec<u8>> {
    let mut splice = || {
        let mut pick = || real.choose(rng).map(Vec::as_slice).unwrap_or_default();
        let (head, tail) = (pick(), pick());
        let most = head.len().min(tail.len());
        let at = if rng.random() { rng.random_range(0..most) } else { most / 32 * 16 };
        [&head[..at], &tail[at..]].concat()
    };
    let all: Vec<_> = std::iter::repeat_with(&mut splice).take(count).collect();
    all.into_iter().filter(|datagram| !real.contains(datagram)).collect()
}

#[test]
fn what_is_spliced_of_genuine_datagrams_is_not_taken() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let (path, mut rng) = (Attacked::sealed()?, StdRng::seed_from_u64(2026));
    let data = Data::new(&path)?;
    data.send(0..DATAGRAMS)?;
    assert_eq!(data.take(0..DATAGRAMS)?, [DATAGRAMS as usize; 2]);
    path.link.settle()?;
    let before = path.statuses()?;
    let mut thrown = 0;
    for side in [0, 1] {
        let spliced = spliced(&path.recorded(side), 1000, &mut rng);
        assert!(spliced.len() > 500);
        thrown += spliced.len() as u64;
        path.inject(side, spliced)?;
    }
    assert_eq!(data.take(0..0)?, [0; 2]);
    let after = path.statuses()?;
    let more = |verdict: &str| -> u64 {
        before.iter().zip(&after).map(|(before, after)| after.count(verdict) - before.count(verdict)).sum()
    };
    assert_eq!(more("delivered"), 0, "{}", path.told());
    let refused = ["bad-tag", "no-receive-key", "bad-length", "bad-message", "unsealed"].map(more).iter().sum::<u64>();
    assert!(refused >= thrown, "{refused} of {thrown}\n{}", path.told());
    path.pings_pass()
}

/// Replays everything to both ends, after `restart` too.
fn replays_are_refused(restart: Option<(Side, Signal)>) -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    let mut path = Attacked::sealed()?;
    let data = Data::new(&path)?;
    data.send(0..DATAGRAMS)?;
    assert_eq!(data.take(0..DATAGRAMS)?, [DATAGRAMS as usize; 2]);
    path.link.settle()?;
    let recorded = [path.recorded(0), path.recorded(1)];
    if let Some((side, how)) = restart {
        let gateway = match side {
            Side::A => &mut path.link.pair.a,
            Side::B => &mut path.link.pair.b,
        };
        gateway.restart_after(how, path.link.net.gw(side))?;
        path.link.pair.wait_for_keys(&path.link.net)?;
        path.pings_pass()?;
    }
    let before = path.statuses()?;
    let thrown: u64 = recorded.iter().map(|recorded| recorded.len() as u64).sum();
    for (side, recorded) in recorded.into_iter().enumerate() {
        // The relay's counts are of one life of the ends only.
        if restart.is_none() {
            path.inject(side, recorded)?;
        } else {
            path.link.relay.inject(side, recorded);
        }
    }
    assert_eq!(data.take(0..0)?, [0; 2]);
    let refused = |status: &[Status; 2]| -> u64 {
        let verdicts = ["replayed", "too-old", "bad-tag", "no-receive-key", "control-received"];
        status.iter().flat_map(|status| verdicts.map(|verdict| status.count(verdict))).sum()
    };
    let deadline = Instant::now() + patient(SOON);
    while refused(&path.statuses()?) < refused(&before) + thrown {
        ensure!(Instant::now() < deadline, "{thrown} thrown\n{before:?}\n{}", path.told());
    }
    assert_eq!(data.take(0..0)?, [0; 2]);
    path.pings_pass()?;
    // New keys would be a session that a recorded first message has made.
    for (before, after) in before.iter().zip(path.statuses()?) {
        assert!(after.send_counter() >= before.send_counter(), "{before:?}\n{after:?}");
    }
    assert_eq!(path.unsealed(), 0);
    Ok(())
}

#[test]
fn everything_recorded_is_refused_at_once() -> Result<()> {
    replays_are_refused(None)
}

#[test]
fn everything_recorded_is_refused_after_an_end_was_killed() -> Result<()> {
    replays_are_refused(Some((Side::A, Signal::KILL)))
}

#[test]
fn everything_recorded_is_refused_after_the_other_end_was_restarted() -> Result<()> {
    replays_are_refused(Some((Side::B, Signal::TERM)))
}

#[test]
fn reflected_datagrams_are_refused_and_an_end_makes_no_session_with_itself() -> Result<()> {
    if !may_make_namespaces() {
        return Ok(());
    }
    // In the place of the peer.
    let path = Attacked::start(Options::sealed, |side, datagram| vec![(1 - side, datagram)])?;
    path.nothing_passes()?;
    for (status, side) in path.statuses()?.iter().zip(BOTH) {
        assert!(!status.is_sealed() && status.count("reflected") > 0, "{side:?}\n{}", path.told());
        assert_eq!((status.count("delivered"), status.count("sent")), (0, 0), "{side:?}\n{}", path.told());
    }
    // And beside it.
    path.act(|side, datagram| vec![(side, datagram.clone()), (1 - side, datagram)]);
    let (from, to) = (path.link.net.lan(Side::A), Side::B.host());
    ensure!(ping::wait_for_answer(from, to, Duration::from_millis(50), SOON)?, "{}", path.told());
    path.link.pair.wait_for_keys(&path.link.net)?;
    let data = Data::new(&path)?;
    data.send(0..DATAGRAMS)?;
    assert_eq!(data.take(0..DATAGRAMS)?, [DATAGRAMS as usize; 2], "{}", path.told());
    path.pings_pass()?;
    assert_eq!(path.unsealed(), 0);
    Ok(())
}

/// An end gets its messages twice, late: the same answer comes after the session is confirmed, and a session that was answered is
/// confirmed when its first packet comes after others.
#[test]
fn handshakes_that_are_late_and_repeated_make_one_session() -> Result<()> {
    static IS_HELD: AtomicBool = AtomicBool::new(true);
    static HELD: Mutex<Vec<(usize, Vec<u8>)>> = Mutex::new(Vec::new());
    if !may_make_namespaces() {
        return Ok(());
    }
    /// Holds handshakes back until the next message of that kind, and sends both.
    fn late(side: usize, datagram: Vec<u8>) -> Vec<(usize, Vec<u8>)> {
        if !is_handshake(&datagram) {
            return vec![(side, datagram)];
        }
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        held.push((side, datagram));
        if IS_HELD.fetch_xor(true, Ordering::Relaxed) { vec![] } else { held.drain(..).rev().collect() }
    }
    let path = Attacked::start(|options| options.sealed_anew("500"), late)?;
    path.link.pair.wait_for_keys(&path.link.net)?;
    let plan = Plan { interval: Duration::from_millis(2), window: 64, ..Plan::count(1500) };
    let report = ping::run(path.link.net.lan(Side::A), Side::B.host(), &plan)?;
    assert_eq!((report.lost, report.damaged), (vec![], 0), "{}", path.told());
    assert_eq!(path.unsealed(), 0);
    Ok(())
}
