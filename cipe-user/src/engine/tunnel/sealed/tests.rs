//! The keys of a tunnel's sealed packets, over the engine's life and its successor's.

use std::os::fd::AsFd;

use super::*;
use crate::control::protocol::SealedKeys;
use crate::sealed::cipher::Suite;
use crate::sealed::packet::{Content, Epoch, HEADROOM, Header, OVERHEAD, parse};

const BOTH: Unsealed = Unsealed { sends: true, accepts: true };

fn key(serial: u64, epoch: u8) -> SealedKey {
    let epoch = Epoch::new(epoch).unwrap();
    SealedKey { serial, epoch, suite: Suite::Aes256Gcm, key: KeyOctets::new(&[serial as u8; 32]) }
}

fn tunnel(ledger: &Arc<Ledger>) -> Arc<SealedTunnel> {
    SealedTunnel::new(&[7; STATIC_KEY], BOTH, ledger.clone(), Instant::now()).unwrap()
}

/// A packet under the send key of a view, with the next counter.
fn packet(view: &SealedView) -> Vec<u8> {
    let mut datagram = vec![1; 4 + OVERHEAD];
    let send = view.keys().send.as_ref().unwrap();
    send.key.batch(1).seal(Content::Data, &mut datagram, 4).unwrap();
    datagram
}

fn open(view: &SealedView, datagram: &[u8]) -> Result<(), Refused> {
    let Ok(Header::Packet(epoch, low)) = parse(datagram) else { panic!("not a packet") };
    let key = view.keys().receive_key(epoch).ok_or(Refused::NoKey)?;
    let (content, place) = key.key.open(low, &mut datagram.to_vec())?;
    assert_eq!((content, place), (Content::Data, HEADROOM..HEADROOM + 4));
    Ok(())
}

#[test]
fn a_view_follows_at_its_next_look_and_its_old_keys_live_as_long() {
    let (ledger, _memory) = Ledger::new().unwrap();
    let tunnel = tunnel(&ledger);
    let mut views = [SealedView::new(tunnel.clone()), SealedView::new(tunnel.clone())];
    tunnel.receive(&key(1, 2), Handed::New).unwrap();
    tunnel.send(&key(1, 2), Duration::from_secs(120), Handed::New).unwrap();
    assert!(views[0].keys().send.is_none());
    views.iter_mut().for_each(SealedView::refresh);
    let of_one = packet(&views[0]);
    assert_eq!(open(&views[1], &of_one), Ok(()));
    assert_eq!(open(&views[0], &of_one), Err(Refused::Replayed), "workers share a window");
    assert_eq!(open(&views[1], &packet(&views[1])), Ok(()), "and a counter");
    let old = Arc::downgrade(views[0].keys().receive_key(Epoch::ALL[1]).unwrap());
    tunnel.clear();
    views[0].refresh();
    assert!(!views[0].keys().can_receive() && old.upgrade().is_some());
    views[1].refresh();
    assert!(old.upgrade().is_none(), "the key is not wiped");
}

#[test]
fn many_sessions_come_and_go_while_a_worker_does_not_look() {
    let (ledger, _memory) = Ledger::new().unwrap();
    let tunnel = tunnel(&ledger);
    let mut busy = SealedView::new(tunnel.clone());
    for serial in 1..200 {
        tunnel.receive(&key(serial, 1 + (serial % 3) as u8), Handed::New).unwrap();
        tunnel.send(&key(serial, 1 + (serial % 3) as u8), Duration::from_secs(120), Handed::New).unwrap();
        // It holds the keys of one session before.
        let before = packet_if_any(&busy);
        busy.refresh();
        assert_eq!(open(&busy, &packet(&busy)), Ok(()));
        assert_eq!(before.map(|datagram| open(&busy, &datagram)), (serial > 1).then_some(Ok(())));
    }
    assert_eq!(tunnel.status().receive_seconds.len(), 3);
    tunnel.forget(199);
    tunnel.forget(1);
    assert_eq!(tunnel.status().receive_seconds.len(), 2);
}

fn packet_if_any(view: &SealedView) -> Option<Vec<u8>> {
    view.keys().send.as_ref().map(|_| packet(view))
}

#[test]
fn if_all_records_are_held_the_keys_are_lost_and_none_is_shared() {
    let (ledger, _memory) = Ledger::new().unwrap();
    let tunnel = tunnel(&ledger);
    let mut views = Vec::new();
    let lost = (1..20).find(|serial| {
        let sent = tunnel.send(&key(*serial, 1), Duration::ZERO, Handed::New);
        views.push(SealedView::new(tunnel.clone()));
        sent == Err(KeysLost)
    });
    assert_eq!(lost, Some(4));
    assert!(tunnel.keys().send.is_none());
    views.clear();
    assert_eq!(tunnel.send(&key(9, 1), Duration::ZERO, Handed::New), Ok(()));
}

#[test]
fn the_next_engine_goes_on_under_used_keys_or_under_none() {
    let (ledger, memory) = Ledger::new().unwrap();
    let before = tunnel(&ledger);
    for (serial, epoch) in [(1, 1), (2, 2)] {
        before.receive(&key(serial, epoch), Handed::New).unwrap();
    }
    before.send(&key(2, 2), Duration::from_secs(120), Handed::New).unwrap();
    let view = SealedView::new(before);
    let packets: Vec<Vec<u8>> = (0..50).map(|_| packet(&view)).collect();
    assert!(packets.iter().all(|datagram| open(&view, datagram).is_ok()));

    let next = Ledger::take_over(memory.as_fd()).unwrap();
    let static_key = KeyOctets::new(&[7; STATIC_KEY]);
    let attach = |receive: Vec<SealedKey>| {
        let resume = Some(SealedKeys { send: Some((key(2, 2), 500)), receive });
        SealedTunnel::attach(&static_key, &AttachSealed { unsealed: BOTH, resume }, next.clone()).unwrap()
    };
    let (after, resumed) = attach(vec![key(1, 1), key(2, 2)]);
    assert_eq!(resumed, Ok(()));
    let view = SealedView::new(after.clone());
    assert!(packets.iter().all(|datagram| open(&view, datagram) == Err(Refused::Replayed)));
    assert_eq!(after.status().send_counter, Some(50));
    assert_eq!(open(&view, &packet(&view)), Ok(()));

    let (after, resumed) = attach(vec![key(1, 1), key(3, 3)]);
    assert_eq!(resumed, Err(KeysLost));
    assert!(after.keys().send.is_none() && !after.keys().can_receive());
}

#[test]
fn a_send_key_is_due_at_its_age() {
    let (ledger, _memory) = Ledger::new().unwrap();
    let tunnel = tunnel(&ledger);
    tunnel.send(&key(1, 1), Duration::from_secs(120), Handed::New).unwrap();
    let send = tunnel.keys().send.clone().unwrap();
    tunnel.poll(boottime());
    assert!(!send.is_due());
    tunnel.poll(boottime() + Duration::from_secs(120));
    assert!(send.is_due());
}

#[test]
fn a_handshake_is_wanted_when_packets_fail_for_a_second_or_there_is_no_key() {
    let (ledger, _memory) = Ledger::new().unwrap();
    let tunnel = tunnel(&ledger);
    let at = |millis| tunnel.start + Duration::from_millis(millis);
    assert!(tunnel.failed(false, at(0)), "no key");
    assert!(!tunnel.failed(true, at(999)));
    assert!(tunnel.failed(true, at(1000)));
    tunnel.opened();
    assert!(!tunnel.failed(true, at(1001)), "one has opened");
    assert!(tunnel.failed(true, at(2001)));

    assert!(tunnel.may_ask(SealedWanted::Send, at(0)) && !tunnel.may_ask(SealedWanted::Send, at(249)));
    assert!(tunnel.may_ask(SealedWanted::Receive, at(0)), "another reason");
    assert!(tunnel.may_ask(SealedWanted::Send, at(250)));
    tunnel.ask_again(SealedWanted::Send);
    assert!(tunnel.may_ask(SealedWanted::Send, at(251)));
}

#[test]
fn the_first_packet_of_a_session_is_told_until_the_daemon_has_heard() {
    let (ledger, _memory) = Ledger::new().unwrap();
    let tunnel = tunnel(&ledger);
    tunnel.receive(&key(1, 1), Handed::New).unwrap();
    let view = SealedView::new(tunnel.clone());
    let tells = |hears: bool| {
        let mut told = false;
        view.keys().receive_key(Epoch::ALL[0]).unwrap().opened(|| {
            told = true;
            hears
        });
        told
    };
    assert!(tells(false) && tells(true) && !tells(true));
    tunnel.tell_again(2);
    assert!(!tells(true), "of another session");
    tunnel.tell_again(1);
    assert!(tells(true));
}
