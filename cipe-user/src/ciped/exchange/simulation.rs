//! Two ends of a tunnel on a bad path, in virtual time: what a hundred seeds of loss and reorder do to the exchange.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::wire::message::DynamicKey;

type Octets = [u8; 16];

const TOKXC: Duration = Duration::from_secs(10);
const MS: Duration = Duration::from_millis(1);

/// A datagram: the key it is under (`None`: static), and a message, or `None` for data.
#[derive(Clone)]
struct Datagram {
    under: Option<Octets>,
    message: Option<Vec<u8>>,
}

#[derive(Default)]
struct Counters {
    delivered: u32,
    sent_static: u32,
    lost: u32,
    changes: u32,
}

/// An end as an engine and a daemon make it, ours or the original's.
struct End {
    kind: Kind,
    send: Option<Octets>,
    receive: Option<Octets>,
    previous: Option<Octets>,
    /// How long the previous key is kept once the new one is in use.
    keep: Duration,
    /// When the previous key goes.
    previous_ends: Option<Duration>,
    /// Packets under one send key before another one is wanted.
    send_limit: u32,
    /// Packets under one receive key before it is forgotten.
    receive_limit: u32,
    sent: u32,
    received: u32,
    send_wanted: Option<Duration>,
    receive_wanted: Option<Duration>,
    counters: Counters,
    out: Vec<Datagram>,
    rng: StdRng,
}

enum Kind {
    Ours(Box<Exchange<StdRng>>),
    /// Never resends; stops using its send key before it announces another; takes a key at the NK_IND.
    Original {
        pending: Option<DynamicKey>,
    },
}

fn at(now: Duration) -> Now {
    Now { at: now, unix: now.as_secs() as u32 }
}

/// Whether an event that is told at most once per tokxc is told now.
fn allowed(last: &mut Option<Duration>, now: Duration) -> bool {
    let yes = last.is_none_or(|last| now >= last + TOKXC);
    if yes {
        *last = Some(now);
    }
    yes
}

impl End {
    fn new(kind: Kind, seed: u64) -> Self {
        Self {
            kind,
            send: None,
            receive: None,
            previous: None,
            keep: Duration::ZERO,
            previous_ends: None,
            send_limit: u32::MAX,
            receive_limit: u32::MAX,
            sent: 0,
            received: 0,
            send_wanted: None,
            receive_wanted: None,
            counters: Counters::default(),
            out: Vec::new(),
            rng: StdRng::seed_from_u64(seed),
        }
    }

    fn ours(seed: u64) -> Self {
        Self::new(Kind::Ours(Box::new(Exchange::new(TOKXC, StdRng::seed_from_u64(!seed)))), seed)
    }

    fn original(seed: u64) -> Self {
        Self::new(Kind::Original { pending: None }, seed)
    }

    fn with_limits(mut self, send: u32, receive: u32) -> Self {
        (self.send_limit, self.receive_limit) = (send, receive);
        self
    }

    fn deadline(&self) -> Option<Duration> {
        match &self.kind {
            Kind::Ours(exchange) => exchange.deadline(),
            Kind::Original { .. } => None,
        }
    }

    fn put(&mut self, message: Option<Vec<u8>>) {
        self.out.push(Datagram { under: self.send, message });
    }

    fn input(&mut self, input: Input<'_>, now: Duration) {
        let Kind::Ours(exchange) = &mut self.kind else { panic!("the original has no inputs") };
        for action in exchange.handle(input, at(now)) {
            match action {
                Action::SendMessage(payload) => self.put(Some(payload.to_vec())),
                Action::SetSendKey(key) => {
                    (self.send, self.sent, self.send_wanted) = (Some(key.0), 0, None);
                    self.counters.changes += 1;
                }
                Action::DropSendKey => self.send = None,
                Action::SetReceiveKey { key, keep } => {
                    (self.previous, self.keep, self.previous_ends) = (self.receive, keep, None);
                    (self.receive, self.received, self.receive_wanted) = (Some(key.0), 0, None);
                }
                Action::Log(_) => {}
            }
        }
    }

    /// The original announces another key.
    fn announce(&mut self, now: Duration) {
        let key = DynamicKey::random(&mut self.rng);
        let payload = Message::indication(&key).build(0, &mut self.rng);
        self.send = None;
        self.put(Some(payload.to_vec()));
        (self.kind, self.send_wanted) = (Kind::Original { pending: Some(key) }, Some(now));
    }

    fn send_data(&mut self, now: Duration) {
        let ours = matches!(self.kind, Kind::Ours(_));
        if self.send.is_none() {
            if allowed(&mut self.send_wanted, now) {
                if ours { self.input(Input::KeyWanted(Wanted::NoSendKey), now) } else { self.announce(now) }
            }
        } else if self.sent >= self.send_limit && (!ours || allowed(&mut self.send_wanted, now)) {
            if ours { self.input(Input::KeyWanted(Wanted::Packets), now) } else { self.announce(now) }
        }
        self.sent += 1;
        self.counters.sent_static += u32::from(self.send.is_none());
        self.put(None);
    }

    fn want_receive_key(&mut self, reason: Wanted, now: Duration) {
        if !allowed(&mut self.receive_wanted, now) {
            return;
        }
        if let Kind::Ours(_) = self.kind {
            self.input(Input::KeyWanted(reason), now);
        } else {
            let payload = Message::Request.build(0, &mut self.rng);
            self.put(Some(payload.to_vec()));
        }
    }

    fn arrive(&mut self, datagram: &Datagram, now: Duration) {
        self.previous = self.previous.filter(|_| self.previous_ends.is_none_or(|ends| now < ends));
        if let Some(key) = datagram.under {
            if self.receive.is_some_and(|_| self.received >= self.receive_limit) {
                (self.receive, self.receive_wanted) = (None, None);
                self.want_receive_key(Wanted::ReceiveKeySpent, now);
            }
            let previous = self.previous == Some(key);
            if self.receive != Some(key) && !previous {
                self.counters.lost += u32::from(datagram.message.is_none());
                if self.receive.is_none() {
                    self.want_receive_key(Wanted::NoReceiveKey, now);
                }
                return;
            }
            if !previous {
                self.received += 1;
                self.previous_ends.get_or_insert(now + self.keep);
            }
        }
        match &datagram.message {
            None => self.counters.delivered += 1,
            Some(payload) => {
                let message = Message::parse(payload).expect("ends send messages only");
                match &mut self.kind {
                    Kind::Ours(_) => {
                        self.input(Input::Message { message, under_static: datagram.under.is_none() }, now)
                    }
                    Kind::Original { pending } => match message {
                        Message::Request => self.announce(now),
                        Message::Indication { key, sum } => {
                            (self.receive, self.received) = (Some(key.0), 0);
                            let payload = Message::Acknowledgement { sum }.build(0, &mut self.rng);
                            self.put(Some(payload.to_vec()));
                        }
                        Message::Acknowledgement { sum } => {
                            if let Some(key) = pending.take_if(|key| key.has_sum(sum)) {
                                (self.send, self.sent) = (Some(key.0), 0);
                                self.counters.changes += 1;
                            }
                        }
                        _ => {}
                    },
                }
            }
        }
    }
}

struct World {
    ends: [End; 2],
    now: Duration,
    queue: BTreeMap<(Duration, u64), Event>,
    number: u64,
    rng: StdRng,
    latency: Duration,
    /// Added to the latency at random, so that datagrams overtake each other.
    jitter: Duration,
    loss: f64,
    duplication: f64,
    /// Which messages get lost: sender, type octet, and how many of that type it had sent before.
    lose: fn(usize, u8, u32) -> bool,
    messages: BTreeMap<(usize, u8), u32>,
}

enum Event {
    Arrival(usize, Datagram),
    Data(usize, Duration),
}

impl World {
    fn new(ends: [End; 2], seed: u64) -> Self {
        Self {
            ends,
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            number: 0,
            rng: StdRng::seed_from_u64(seed),
            latency: 15 * MS,
            jitter: Duration::ZERO,
            loss: 0.0,
            duplication: 0.0,
            lose: |_, _, _| false,
            messages: BTreeMap::new(),
        }
    }

    fn schedule(&mut self, when: Duration, event: Event) {
        self.number += 1;
        self.queue.insert((when, self.number), event);
    }

    /// End `from` sends a packet of data now and then every `interval`.
    fn traffic(mut self, from: usize, interval: Duration) -> Self {
        self.schedule(self.now, Event::Data(from, interval));
        self
    }

    fn run_until(&mut self, end: Duration) {
        loop {
            let timer = (0..2).filter_map(|i| self.ends[i].deadline().map(|when| (when, i))).min();
            let event = self.queue.first_key_value().map(|((when, _), _)| *when);
            match (timer, event) {
                (Some((when, i)), _) if event.is_none_or(|event| when <= event) && when <= end => {
                    assert!(when >= self.now, "a deadline in the past");
                    self.now = when;
                    self.ends[i].input(Input::Tick, when);
                }
                (_, Some(when)) if when <= end => {
                    let Some((_, event)) = self.queue.pop_first() else { return };
                    self.now = when;
                    match event {
                        Event::Arrival(to, datagram) => self.ends[to].arrive(&datagram, when),
                        Event::Data(from, interval) => {
                            self.ends[from].send_data(when);
                            self.schedule(when + interval, Event::Data(from, interval));
                        }
                    }
                }
                _ => {
                    self.now = end;
                    return;
                }
            }
            self.carry();
        }
    }

    /// Puts what the ends have sent on the path.
    fn carry(&mut self) {
        for from in 0..2 {
            for datagram in std::mem::take(&mut self.ends[from].out) {
                if let Some(payload) = &datagram.message {
                    let before = self.messages.entry((from, payload[0])).or_default();
                    *before += 1;
                    if (self.lose)(from, payload[0], *before - 1) {
                        continue;
                    }
                }
                if self.rng.random_bool(self.loss) {
                    continue;
                }
                for _ in 0..=u8::from(self.rng.random_bool(self.duplication)) {
                    let when = self.now + self.latency + self.jitter.mul_f64(self.rng.random());
                    self.schedule(when, Event::Arrival(1 - from, datagram.clone()));
                }
            }
        }
    }

    /// Whether what `from` sends goes under a dynamic key that the other end has.
    fn keyed(&self, from: usize) -> bool {
        self.ends[from].send.is_some() && self.ends[from].send == self.ends[1 - from].receive
    }

    /// Data gets through from `from` to the other end during the next half second.
    fn passes(&mut self, from: usize) -> bool {
        let before = self.ends[1 - from].counters.delivered;
        self.run_until(self.now + 500 * MS);
        self.ends[1 - from].counters.delivered > before
    }
}

fn pair(first: bool, second: bool, seed: u64) -> World {
    let end = |ours, seed| if ours { End::ours(seed) } else { End::original(seed) };
    World::new([end(first, seed), end(second, seed + 1_000_000)], seed).traffic(0, 50 * MS).traffic(1, 50 * MS)
}

const KINDS: [(bool, bool); 3] = [(true, true), (true, false), (false, true)];

#[test]
fn both_sides_at_once_get_their_keys_within_a_round_trip() {
    for (first, second) in KINDS {
        let mut world = pair(first, second, 1);
        world.run_until(31 * MS);
        assert!(world.keyed(0) && world.keyed(1));
        assert_eq!(world.ends[0].counters.changes, 1);
    }
}

#[test]
fn between_our_own_no_packet_is_lost_or_static_at_a_key_change() {
    let ends = [End::ours(1).with_limits(20, u32::MAX), End::ours(2).with_limits(30, u32::MAX)];
    let mut world = World::new(ends, 3).traffic(0, 5 * MS).traffic(1, 5 * MS);
    world.jitter = 10 * MS;
    world.run_until(Duration::from_secs(1));
    let at_start = [0, 1].map(|i| world.ends[i].counters.sent_static);
    world.run_until(Duration::from_secs(20));
    for (end, at_start) in world.ends.iter().zip(at_start) {
        assert!(end.counters.changes > 90, "{}", end.counters.changes);
        assert_eq!((end.counters.lost, end.counters.sent_static), (0, at_start));
    }
}

#[test]
fn an_original_loses_only_what_was_in_flight_at_a_key_change() {
    let ends = [End::ours(1).with_limits(200, u32::MAX), End::original(2).with_limits(300, 500)];
    let mut world = World::new(ends, 3).traffic(0, MS).traffic(1, MS);
    world.run_until(Duration::from_secs(20));
    let changes = world.ends[0].counters.changes;
    assert!(changes > 60 && world.ends[1].counters.changes > 50);
    // 15 ms of latency: the old key goes before the NK_IND, so nothing is under way when the original takes the new.
    assert_eq!((world.ends[0].counters.lost, world.ends[1].counters.lost), (0, 0));
}

#[test]
fn an_original_that_went_deaf_gets_a_key() {
    // Ours does not renew, so that the original reaches its limit, 1,000 packets here.
    let mut world = World::new([End::ours(1), End::original(2).with_limits(u32::MAX, 1_000)], 3).traffic(0, MS);
    world.run_until(Duration::from_secs(20));
    assert!(world.ends[0].counters.changes > 15);
    assert!(world.ends[1].counters.lost < 50 * world.ends[0].counters.changes);
}

#[test]
fn any_one_lost_message_is_made_good_within_half_a_second() {
    for (first, second) in [(true, true), (true, false)] {
        for lose in [
            |from, number, before| from == 0 && number == 2 && before == 0,
            |from, number, before| from == 1 && number == 3 && before == 0,
            |from, number, before| from == 0 && number == 0x70 && before == 0,
            |from, number, before| from == 1 && number == 0x70 && before == 0,
        ] {
            let mut world = pair(first, second, 1);
            world.lose = lose;
            world.run_until(500 * MS);
            assert!(world.keyed(0));
        }
    }
}

#[test]
fn a_restarted_peer_is_heard_again_although_its_request_was_lost() {
    for other in [true, false] {
        let mut world = pair(true, other, 1);
        world.run_until(Duration::from_secs(30));
        // Ours starts again and only listens: it must ask for a key, and the first NK_REQ gets lost.
        world.ends[0] = End::ours(77);
        world.queue.retain(|_, event| !matches!(event, Event::Data(0, _)));
        world.messages.clear();
        world.lose = |from, number, before| from == 0 && number == 1 && before == 0;
        world.run_until(world.now + 500 * MS);
        assert!(world.keyed(1) && world.passes(1));
    }
}

#[test]
fn one_of_our_own_replaced_by_an_original_is_treated_as_one() {
    let mut world = pair(true, true, 1);
    world.ends[0].send_limit = 100;
    world.run_until(Duration::from_secs(30));
    world.ends[1] = End::original(99);
    world.run_until(world.now + TOKXC);
    let lost = world.ends[1].counters.lost;
    world.run_until(world.now + 3 * TOKXC);
    assert!(world.ends[0].counters.changes > 10 && world.keyed(0));
    assert_eq!(world.ends[1].counters.lost, lost);
}

#[test]
fn a_dead_peer_is_left_alone_when_there_is_no_traffic() {
    let mut world = World::new([End::ours(1), End::ours(2)], 3);
    world.loss = 1.0;
    world.ends[0].send_data(Duration::ZERO);
    world.run_until(4 * TOKXC);
    assert_eq!(world.ends[0].deadline(), None);
    assert!(world.messages[&(0, 2)] < 20);
}

/// Every exchange that an end of ours starts, on a path that loses one datagram in five.
fn recovers(first: bool, second: bool, seed: u64) {
    let mut world = pair(first, second, seed);
    (world.loss, world.duplication, world.jitter) = (0.2, 0.1, 100 * MS);
    world.run_until(3 * TOKXC);
    let check = |world: &mut World, what| {
        let own: Vec<_> = [first, second].into_iter().enumerate().filter(|(_, ours)| *ours).map(|(i, _)| i).collect();
        for i in own {
            assert!(world.keyed(i), "{what}: end {i} of {first} {second}, seed {seed}");
        }
        assert!(world.passes(0) && world.passes(1), "{what}: {first} {second}, seed {seed}");
    };
    check(&mut world, "start");
    for i in 0..2 {
        let ours = [first, second][i];
        world.ends[i] = if ours { End::ours(seed + 5) } else { End::original(seed + 5) };
        // An original that lost our key asks once per tokxc, and nobody else can know that it has to.
        world.run_until(world.now + if ours { 3 } else { 8 } * TOKXC);
        check(&mut world, "restart");
    }
}

#[test]
fn one_datagram_in_five_lost_delays_it_by_less_than_three_tokxc() {
    for seed in 0..40 {
        for (first, second) in KINDS {
            recovers(first, second, seed);
        }
    }
}

#[test]
fn renewal_goes_on_for_ever_on_a_lossy_path() {
    for seed in 0..10 {
        let ends = [End::ours(seed).with_limits(100, u32::MAX), End::ours(seed + 50).with_limits(100, 200)];
        let mut world = World::new(ends, seed).traffic(0, 5 * MS).traffic(1, 5 * MS);
        (world.loss, world.duplication, world.jitter) = (0.2, 0.1, 30 * MS);
        for _ in 0..10 {
            let before = [0, 1].map(|i| world.ends[i].counters.changes);
            world.run_until(world.now + 3 * TOKXC);
            for (end, before) in world.ends.iter().zip(before) {
                assert!(end.counters.changes > before, "seed {seed}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_is_lost_the_tunnel_comes_back_when_the_path_does(
        seed: u64, kinds in 0usize..3, loss in 0.0f64..1.0, jitter in 0u32..400, latency in 1u32..700,
        bad_seconds in 1u64..60, limit in 20u32..400,
    ) {
        let (first, second) = KINDS[kinds];
        let mut world = pair(first, second, seed % 1_000_000);
        for end in &mut world.ends {
            end.send_limit = limit;
        }
        (world.loss, world.jitter, world.latency) = (loss, jitter * MS, latency * MS);
        world.run_until(Duration::from_secs(bad_seconds));
        (world.loss, world.jitter) = (0.0, Duration::ZERO);
        for end in &mut world.ends {
            end.send_limit = u32::MAX;
        }
        world.run_until(world.now + 3 * TOKXC);
        prop_assert!(world.keyed(0) && world.keyed(1));
        prop_assert!(world.passes(0) && world.passes(1));
    }
}
