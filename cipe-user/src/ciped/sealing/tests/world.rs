//! Two ends, each a [`Sealing`] with an engine and a file that are played, and the path between them.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::super::*;
use crate::ciped::options::{self, Draft, Program};

pub(super) const MS: Duration = Duration::from_millis(1);
pub(super) const SECOND: Duration = Duration::from_secs(1);
const LATENCY: Duration = Duration::from_millis(10);
/// Least time between two wishes of an engine for the same reason.
const PATIENCE: Duration = Duration::from_millis(250);

pub(super) fn options(extra: &str) -> Options {
    let text = format!(
        "ipaddr 10.9.0.1\nptpaddr 10.9.0.2\npeer 192.0.2.2:6789\nkey 000102030405060708090a0b0c0d0e0f\n{extra}\n"
    );
    let (mut draft, mut problems) = (Draft::new(Program::Cb), Vec::new());
    options::read_text(text.as_bytes(), Path::new("/x"), &mut draft, &mut problems);
    options::settle(&draft, problems).0.unwrap()
}

pub(super) fn at(now: Duration) -> Now {
    Now { at: now, unix_nanos: 1_700_000_000_000_000_000 + now.as_nanos() as u64 }
}

/// What goes over the path. A sealed packet is its key and epoch, and whether it is data.
#[derive(Clone)]
pub(super) enum Datagram {
    Handshake(MessageOctets),
    Sealed(SealedKey, bool),
    Plain,
}

/// One end.
pub(super) struct End {
    pub(super) policy: &'static str,
    /// `None`: an original, which drops what is sealed.
    pub(super) sealing: Option<Sealing<StdRng>>,
    /// What it has on disk.
    pub(super) kept: Option<Kept>,
    pub(super) unsealed: Unsealed,
    pub(super) send: Option<(SealedKey, Duration)>,
    pub(super) receive: Vec<SealedKey>,
    opened: HashSet<u64>,
    wished: [Option<Duration>; 3],
    /// Whether somebody has removed the file.
    pub(super) is_forgotten: bool,
    pub(super) notes: Vec<Note>,
    /// Data packets that came sealed, and those that came in protocol 3.
    pub(super) delivered: (u32, u32),
    pub(super) refused_plain: u32,
    seeds: StdRng,
}

pub(super) struct World {
    pub(super) ends: [End; 2],
    pub(super) now: Duration,
    queue: BTreeMap<(Duration, u64), (usize, Datagram)>,
    number: u64,
    /// Whether this datagram is lost.
    pub(super) lose: fn(&Datagram, &mut StdRng) -> bool,
    rng: StdRng,
}

impl End {
    fn new(policy: &'static str, seed: u64) -> Self {
        let mut end = Self {
            policy,
            sealing: None,
            kept: None,
            unsealed: Unsealed { sends: true, accepts: true },
            send: None,
            receive: Vec::new(),
            opened: HashSet::new(),
            wished: [None; 3],
            is_forgotten: false,
            notes: Vec::new(),
            delivered: (0, 0),
            refused_plain: 0,
            seeds: StdRng::seed_from_u64(seed),
        };
        end.start(Duration::ZERO);
        end
    }

    /// A daemon starts, with what the last one has kept.
    fn start(&mut self, now: Duration) {
        (self.send, self.unsealed) = (None, Unsealed { sends: true, accepts: true });
        self.receive.clear();
        self.opened.clear();
        let options = options(&format!("sealed {}", self.policy));
        let mut rng = || StdRng::seed_from_u64(self.seeds.random());
        self.sealing = Sealing::new(&options, self.kept, None, (rng(), rng()), at(now));
        if let Some(sealing) = &self.sealing {
            let attach = sealing.attach(at(now));
            assert!(attach.resume.is_none());
            self.unsealed = attach.unsealed;
        }
    }

    /// The send key's octets.
    pub(super) fn send_key(&self) -> Option<[u8; 32]> {
        self.send.as_ref().map(|(key, _)| *key.key)
    }

    pub(super) fn has_noted(&self, what: impl Fn(&Note) -> bool) -> bool {
        self.notes.iter().any(what)
    }

    /// Does what a daemon and its engine do. Returns what is sent, and the verdicts.
    fn carry_out(&mut self, effects: Vec<Effect>, now: Duration) -> (Vec<Datagram>, Vec<Option<Refused>>) {
        let (mut out, mut verdicts, mut effects) = (Vec::new(), Vec::new(), std::collections::VecDeque::from(effects));
        while let Some(effect) = effects.pop_front() {
            match effect {
                Effect::Keep(kept) => self.kept = Some(kept),
                Effect::Forget => {
                    if std::mem::take(&mut self.is_forgotten) {
                        self.kept = None;
                        effects.extend(self.sealing.as_mut().unwrap().forget(at(now)));
                    }
                }
                Effect::Log(note) => self.notes.push(note),
                Effect::Request(request) => match request {
                    SealedRequest::Receive(key) => {
                        self.receive.retain(|known| known.epoch != key.epoch);
                        self.receive.push(key);
                        assert!(self.kept.is_some() || self.send.is_none(), "an answer without a file");
                    }
                    SealedRequest::Forget { serial } => self.receive.retain(|known| known.serial != serial),
                    SealedRequest::Send { key, renew_ms } => self.send = Some((key, now + renew_ms as u32 * MS)),
                    SealedRequest::StopSending => self.send = None,
                    SealedRequest::Unsealed(unsealed) => self.unsealed = unsealed,
                    SealedRequest::Confirm => {
                        let (key, _) = self.send.as_ref().expect("a key to confirm");
                        out.push(Datagram::Sealed(key.clone(), false));
                    }
                    SealedRequest::Transmit { datagram, .. } => out.push(Datagram::Handshake(datagram)),
                    SealedRequest::Judged { refused } => verdicts.push(refused),
                },
            }
        }
        (out, verdicts)
    }

    fn wish(&mut self, reason: SealedWanted, now: Duration) -> Vec<Effect> {
        let last = &mut self.wished[reason as usize];
        if last.is_some_and(|last| now < last + PATIENCE) {
            return Vec::new();
        }
        *last = Some(now);
        self.sealing.as_mut().map_or_else(Vec::new, |sealing| sealing.event(&SealedEvent::Wanted { reason }, at(now)))
    }

    fn receive(&mut self, datagram: Datagram, now: Duration) -> Vec<Datagram> {
        let Some(sealing) = &mut self.sealing else {
            self.delivered.1 += u32::from(matches!(datagram, Datagram::Plain));
            return Vec::new();
        };
        match datagram {
            Datagram::Plain if self.unsealed.accepts => {
                self.delivered.1 += 1;
                Vec::new()
            }
            Datagram::Plain => {
                self.refused_plain += 1;
                let effects = self.wish(SealedWanted::Unsealed, now);
                self.carry_out(effects, now).0
            }
            Datagram::Handshake(datagram) => {
                let from = "192.0.2.2:6789".parse::<SocketAddr>().unwrap();
                let event = SealedEvent::Handshake { datagram, from, from_peer: true };
                let effects = sealing.event(&event, at(now));
                let (out, verdicts) = self.carry_out(effects, now);
                assert_eq!(verdicts.len(), 1, "each message is judged once");
                out
            }
            Datagram::Sealed(key, is_data) => {
                let known = self.receive.iter().find(|known| known.epoch == key.epoch && known.key == key.key);
                let Some(serial) = known.map(|known| known.serial) else {
                    let effects = self.wish(SealedWanted::Receive, now);
                    return self.carry_out(effects, now).0;
                };
                let mut out = Vec::new();
                if self.opened.insert(serial) {
                    let effects = sealing.event(&SealedEvent::Opened { serial }, at(now));
                    out.extend(self.carry_out(effects, now).0);
                }
                match (is_data, &mut self.sealing) {
                    (false, Some(sealing)) => {
                        let effects = sealing.event(&SealedEvent::Probed { serial }, at(now));
                        out.extend(self.carry_out(effects, now).0);
                    }
                    _ => self.delivered.0 += 1,
                }
                out
            }
        }
    }
}

impl World {
    pub(super) fn new(policies: [&'static str; 2]) -> Self {
        Self::of_seed(policies, 1)
    }

    pub(super) fn of_seed(policies: [&'static str; 2], seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let ends = policies.map(|policy| End::new(policy, rng.random()));
        Self { ends, now: Duration::ZERO, queue: BTreeMap::new(), number: 0, lose: |_, _| false, rng }
    }

    /// The daemon of an end, and its engine, start anew.
    pub(super) fn restart(&mut self, end: usize) {
        let now = self.now;
        self.ends[end].start(now);
    }

    pub(super) fn send(&mut self, from: usize, datagrams: Vec<Datagram>) {
        for datagram in datagrams {
            if !(self.lose)(&datagram, &mut self.rng) {
                self.number += 1;
                self.queue.insert((self.now + LATENCY, self.number), (1 - from, datagram));
            }
        }
    }

    /// Has an end do something.
    pub(super) fn act(&mut self, end: usize, act: impl FnOnce(&mut Sealing<StdRng>, Now) -> Vec<Effect>) {
        let now = self.now;
        let Some(sealing) = &mut self.ends[end].sealing else { return };
        let effects = act(sealing, at(now));
        let (out, _) = self.ends[end].carry_out(effects, now);
        self.send(end, out);
    }

    /// Both ends learn from a key exchange of protocol 3 that the other one seals: 0 has asked, and 1 has answered.
    pub(super) fn introduce(&mut self) {
        self.act(1, |sealing, now| sealing.peer_seals(true, now));
        self.run_for(LATENCY);
        self.act(0, |sealing, now| sealing.peer_seals(false, now));
    }

    /// An end has one packet of data to send.
    pub(super) fn data(&mut self, from: usize) {
        let now = self.now;
        let end = &mut self.ends[from];
        if end.send.as_ref().is_none_or(|(_, renew)| *renew <= now) && !end.unsealed.sends {
            let effects = end.wish(SealedWanted::Send, now);
            let (out, _) = end.carry_out(effects, now);
            self.send(from, out);
        }
        let end = &self.ends[from];
        match &end.send {
            Some((key, _)) => self.send(from, vec![Datagram::Sealed(key.clone(), true)]),
            None if end.unsealed.sends => self.send(from, vec![Datagram::Plain]),
            None => {}
        }
    }

    /// Time passes, without data.
    pub(super) fn run_for(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            let arrival = self.queue.first_key_value().map(|((when, _), _)| *when);
            let deadlines = self.ends.each_ref().map(|end| end.sealing.as_ref().and_then(Sealing::deadline));
            let next = deadlines.into_iter().chain([arrival]).flatten().min();
            let Some(next) = next.filter(|next| *next <= end) else { break };
            self.now = self.now.max(next);
            if arrival == Some(next) {
                let Some((_, (to, datagram))) = self.queue.pop_first() else { break };
                let now = self.now;
                let out = self.ends[to].receive(datagram, now);
                self.send(to, out);
                continue;
            }
            for number in [0, 1] {
                if deadlines[number].is_some_and(|at| at <= next) {
                    self.act(number, Sealing::tick);
                    let due = self.ends[number].sealing.as_ref().and_then(Sealing::deadline);
                    assert!(due.is_none_or(|at| at > self.now), "a deadline stays");
                }
            }
        }
        self.now = end;
    }

    /// Time passes, and both ends send data each 100 ms.
    pub(super) fn talk_for(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            (0..2).for_each(|number| self.data(number));
            self.run_for(100 * MS);
        }
    }

    /// Whether both ends send under keys that the other one has.
    pub(super) fn is_sealed(&self) -> bool {
        let agrees = |from: usize| {
            let key = self.ends[from].send_key();
            key.is_some_and(|key| self.ends[1 - from].receive.iter().any(|known| *known.key == key))
        };
        agrees(0) && agrees(1)
    }

    pub(super) fn delivered(&self) -> [(u32, u32); 2] {
        self.ends.each_ref().map(|end| end.delivered)
    }
}
