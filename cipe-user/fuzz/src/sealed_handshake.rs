//! Two ends and any sequence of events, with any datagram of the past delivered, changed or not, to either end: a key is used
//! only if the other end has received under it, there are never more receive keys than epochs, and timers go forward.

use std::collections::HashSet;
use std::time::Duration;

use arbitrary::Arbitrary;
use cipe_user::sealed::handshake::{Action, DirectionKey, Handshake, Input, Kept, Now, Profile, Source, Wanted};
use cipe_user::sealed::message::Carries;
use cipe_user::sealed::secrets::Secrets;
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::read;

#[derive(Arbitrary, Debug)]
enum Op {
    WantedForData,
    WantedForPackets,
    /// Delivers a datagram that was sent before; an odd number: from another address than the peer's.
    Deliver(u8),
    /// The same, changed.
    Change(u8, u8, u8),
    Octets(Vec<u8>),
    /// A packet opens under one of the receive keys.
    Opened(u8),
    Probed(u8),
    KeysLost,
    Restart,
    Wait(u16),
    Deadline,
    Clock(i64),
}

struct End {
    machine: Handshake<StdRng>,
    kept: Kept,
    clock: i64,
    receiving: Vec<DirectionKey>,
    is_sending: bool,
    /// Keys that it has ever received and sent under.
    received_under: HashSet<[u8; 32]>,
    sent_under: HashSet<[u8; 32]>,
}

fn machine(number: usize, kept: Kept, seed: u64) -> Handshake<StdRng> {
    let profile = Profile { fast_aes: number == 0, carries: Carries::Ethernet };
    Handshake::new(Secrets::new(&[7; 16]), profile, kept, StdRng::seed_from_u64(seed))
}

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(ops) = read::<Vec<(bool, Op)>>(input) else { return };
    let mut ends = [0, 1].map(|number| {
        let kept = Kept { id: number as u64, newest: 0, was_sealed: false };
        let machine = machine(number, kept, number as u64);
        let (received_under, sent_under) = Default::default();
        End { machine, kept, clock: 1 << 40, receiving: Vec::new(), is_sending: false, received_under, sent_under }
    });
    let mut now = Duration::ZERO;
    let mut sent: Vec<Vec<u8>> = Vec::new();
    for (step, (second, op)) in ops.into_iter().enumerate() {
        let number = usize::from(second);
        let pick = |which: u8| sent.get(usize::from(which) % sent.len().max(1)).cloned();
        // The serial of a receive key under which the other end can have sent something.
        let used = |which: u8| {
            let key = ends[number].receiving.get(usize::from(which) % 3)?;
            ends[1 - number].sent_under.contains(&*key.octets).then_some(key.serial)
        };
        let datagram;
        let input = match op {
            Op::WantedForData => Input::Wanted(Wanted::Send),
            Op::WantedForPackets => Input::Wanted(Wanted::Receive),
            Op::Deliver(which) => {
                let Some(picked) = pick(which) else { continue };
                datagram = picked;
                Input::Datagram(&datagram, if which % 2 == 0 { Source::Peer } else { Source::Other })
            }
            Op::Change(which, at, with) => {
                let Some(mut picked) = pick(which) else { continue };
                let at = usize::from(at) % picked.len();
                picked[at] ^= with;
                datagram = picked;
                Input::Datagram(&datagram, Source::Other)
            }
            Op::Octets(octets) => {
                datagram = octets;
                Input::Datagram(&datagram, Source::Other)
            }
            Op::Opened(which) => Input::Opened(used(which).unwrap_or(u64::MAX)),
            Op::Probed(which) => Input::Probed(used(which).unwrap_or(u64::MAX)),
            Op::KeysLost => Input::KeysLost,
            Op::Restart => {
                let end = &mut ends[number];
                end.machine = machine(number, end.kept, step as u64 + 2);
                (end.receiving, end.is_sending) = (Vec::new(), false);
                continue;
            }
            Op::Wait(ms) => {
                now += Duration::from_millis(ms.into());
                Input::Tick
            }
            Op::Deadline => {
                now = now.max(ends[number].machine.deadline().unwrap_or_default());
                Input::Tick
            }
            Op::Clock(to) => {
                ends[number].clock = to;
                continue;
            }
        };
        let ticked = matches!(input, Input::Tick);
        let end = &mut ends[number];
        let unix_nanos = (end.clock as u64).saturating_add(now.as_nanos() as u64);
        let actions = end.machine.handle(input, Now { at: now, unix_nanos });
        assert!(actions.len() <= 12);
        for action in actions {
            let end = &mut ends[number];
            match action {
                Action::Keep(kept) => {
                    assert!(kept.newest >= end.kept.newest && kept.id == end.kept.id);
                    end.kept = kept;
                }
                Action::Receive(key) => {
                    assert!(end.receiving.iter().all(|known| known.epoch != key.epoch));
                    end.received_under.insert(*key.octets);
                    end.receiving.push(key);
                }
                Action::Forget(serial) => {
                    let before = end.receiving.len();
                    end.receiving.retain(|key| key.serial != serial);
                    assert_eq!(end.receiving.len() + 1, before);
                }
                Action::Send(key, _) => {
                    end.is_sending = true;
                    end.sent_under.insert(*key.octets);
                    assert!(ends[1 - number].received_under.contains(&*key.octets), "a key that the peer never had");
                }
                Action::StopSending => assert!(std::mem::take(&mut end.is_sending)),
                Action::Confirm => assert!(end.is_sending),
                Action::Transmit(datagram, _) => sent.push(datagram),
                Action::Refused(_) | Action::Log(_) => {}
            }
        }
        if ticked {
            assert!(ends[number].machine.deadline().is_none_or(|next| next > now));
        }
    }
}
