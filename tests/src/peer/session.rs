//! Keys, timers and counters of a peer, without its socket.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Instant;

use super::message::{self, CT_CONFREQ, CT_PING, CT_PONG, NK_ACK, NK_IND, NK_REQ};
use super::packet::{self, Opened, Refused};
use super::{Cipher, Config, Counters, Event, KEY, OldKey, echo};

/// A dynamic key in use, its time of creation and its count of packets.
struct Dynamic {
    key: [u8; KEY],
    since: Instant,
    packets: u64,
}

impl Dynamic {
    fn new(key: [u8; KEY], since: Instant) -> Self {
        Self { key, since, packets: 0 }
    }
}

pub(super) struct Session {
    config: Config,
    /// Events to send.
    pub events: Vec<Event>,
    pub counters: Counters,
    /// Received inner packets, for a device.
    pub inside: Vec<Vec<u8>>,
    /// Datagrams to send.
    pub out: Vec<(SocketAddr, Vec<u8>)>,
    peer: Option<SocketAddr>,
    send: Option<Dynamic>,
    receive: Option<Dynamic>,
    /// The key announced last, until it is acknowledged, and when.
    pending: Option<Dynamic>,
    /// When it last asked for a key.
    asked: Option<Instant>,
    /// All receive keys so far.
    taken: HashSet<[u8; KEY]>,
}

impl Session {
    pub(super) fn new(config: Config) -> Self {
        let peer = config.peer;
        let asks = config.asks_configuration;
        let mut session = Self {
            config,
            events: Vec::new(),
            counters: Counters::default(),
            inside: Vec::new(),
            out: Vec::new(),
            peer,
            send: None,
            receive: None,
            pending: None,
            asked: None,
            taken: HashSet::new(),
        };
        if asks {
            session.send_clear(CT_CONFREQ);
        }
        session
    }

    /// Sends its configuration in clear, as a message of any type.
    pub(super) fn send_clear(&mut self, number: u8) {
        let Some(to) = self.peer else { return };
        let cipher = if self.config.cipher == Cipher::Blowfish { b'b' } else { b'i' };
        self.out.push((to, message::configuration(number, cipher)));
    }

    /// When [`Self::tick`] must be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        Some(self.pending.as_ref()?.since + self.config.resend?)
    }

    /// Retransmits an unanswered NK_IND, if the configuration asks for it.
    pub(super) fn tick(&mut self, now: Instant) {
        if self.deadline().is_some_and(|deadline| deadline <= now)
            && let Some(pending) = &mut self.pending
        {
            pending.since = now;
            let key = pending.key;
            self.indicate(&key);
        }
    }

    /// Handles an inner packet. Only this function checks the age of keys, as in the original.
    pub(super) fn send(&mut self, packet: &[u8], now: Instant) {
        let config = &self.config;
        let is_worn = |key: &Dynamic| key.packets > config.send_packets || now > key.since + config.tokey;
        let is_announced = self.pending.as_ref().is_some_and(|pending| now < pending.since + config.tokxc);
        if self.send.as_ref().is_none_or(is_worn) && !is_announced {
            self.announce(false, now);
        }
        if self.peer.is_none() || self.send.is_none() && !self.config.static_data {
            self.counters.unsent += 1;
            return;
        }
        match &mut self.send {
            Some(key) => {
                key.packets += 1;
                self.counters.sent_dynamic += 1;
            }
            None => self.counters.sent_static += 1,
        }
        self.seal(false, packet);
    }

    pub(super) fn send_control(&mut self, number: u8, data: &[u8]) {
        let frame = message::frame(number, &data[..data.len().min(46)], self.config.stamp);
        self.seal(true, &frame);
    }

    /// Announces another send key, by itself or because the other end `asked`.
    pub(super) fn announce(&mut self, asked: bool, now: Instant) {
        let key = rand::random();
        if asked || self.config.old_key == OldKey::Forgotten {
            self.send = None;
        }
        self.pending = Some(Dynamic::new(key, now));
        self.indicate(&key);
        if self.config.old_key == OldKey::Announces {
            self.send = None;
        }
    }

    fn indicate(&mut self, key: &[u8; KEY]) {
        self.counters.indications_sent += 1;
        let data = [&key[..], &message::key_sum(key, self.config.order)].concat();
        self.send_control(NK_IND, &data);
    }

    fn seal(&mut self, control: bool, payload: &[u8]) {
        let Some(to) = self.peer else { return };
        let (key, dynamic) = match &self.send {
            Some(key) => (&key.key, true),
            None => (&self.config.key, false),
        };
        self.out.push((to, packet::seal(self.config.cipher, key, dynamic, control, payload)));
    }

    /// Handles a datagram from the carrier.
    pub(super) fn datagram(&mut self, datagram: &[u8], from: SocketAddr, now: Instant) {
        self.counters.datagrams += 1;
        if datagram.len() > 8 && datagram[..8] == [0; 8] {
            self.events.push(Event::Clear(datagram[8..].to_vec()));
            return;
        }
        if datagram.len() < 16 || !datagram.len().is_multiple_of(8) {
            self.counters.bad_length += 1;
            return;
        }
        let dynamic = packet::is_dynamic(datagram);
        if dynamic {
            self.wear_out(now);
        }
        let key = match (&self.receive, dynamic) {
            (_, false) => self.config.key,
            (Some(receive), true) => receive.key,
            (None, true) => {
                self.counters.no_receive_key += 1;
                self.ask(now);
                return;
            }
        };
        match packet::open(self.config.cipher, &key, datagram) {
            Ok(opened) => {
                if let Some(receive) = self.receive.as_mut().filter(|_| !dynamic) {
                    // Every valid packet counts.
                    receive.packets += 1;
                }
                if self.peer != Some(from) {
                    self.peer = Some(from);
                    self.counters.moves += 1;
                    self.events.push(Event::Moved(from));
                }
                self.opened(opened, dynamic, now);
            }
            Err(Refused::Length) => self.counters.bad_length += 1,
            Err(Refused::Crc) => self.counters.bad_crc += 1,
            Err(Refused::P) => self.counters.bad_p += 1,
        }
    }

    /// Counts a packet under the receive key, and forgets the key at its limit of packets or time.
    fn wear_out(&mut self, now: Instant) {
        let Some(key) = &mut self.receive else { return };
        key.packets += 1;
        if key.packets > self.config.receive_packets || now > key.since + 2 * self.config.tokey {
            self.receive = None;
            self.events.push(Event::Deaf);
        }
    }

    fn ask(&mut self, now: Instant) {
        if self.asked.is_none_or(|asked| now >= asked + self.config.tokxc) {
            self.asked = Some(now);
            self.counters.requests_sent += 1;
            self.send_control(NK_REQ, &[]);
        }
    }

    fn opened(&mut self, opened: Opened, dynamic: bool, now: Instant) {
        let payload = opened.payload;
        if opened.control {
            if self.message(&payload, dynamic, now).is_none() {
                self.counters.bad_message += 1;
            }
            return;
        }
        if payload.len() < self.config.shortest_inner {
            self.counters.short_inner += 1;
            return;
        }
        match dynamic {
            true => self.counters.delivered_dynamic += 1,
            false => self.counters.delivered_static += 1,
        }
        if self.config.echo
            && let Some(answer) = echo::answer(&payload)
        {
            self.counters.echoed += 1;
            self.send(&answer, now);
        }
        if self.config.tell_packets {
            self.events.push(Event::Delivered(payload.clone()));
        }
        self.inside.push(payload);
    }

    /// `None` for an invalid message.
    fn message(&mut self, payload: &[u8], dynamic: bool, now: Instant) -> Option<()> {
        let config = &self.config;
        if config.tokxts > 0 && !config.stamp.is_near(payload, config.tokxts) {
            return None;
        }
        let (number, data) = payload.split_first()?;
        match *number {
            NK_REQ => {
                self.counters.requests_received += 1;
                self.announce(true, now);
            }
            NK_IND => {
                let key = *data.first_chunk()?;
                if !message::is_sum(&key, data.get(KEY..KEY + 4)?) {
                    return None;
                }
                self.counters.chained_keys += u64::from(dynamic);
                if !self.taken.insert(key) && self.config.refuse_old {
                    self.counters.refused_keys += 1;
                    return Some(());
                }
                self.receive = Some(Dynamic::new(key, now));
                self.counters.receive_keys += 1;
                match self.config.lose_acks.checked_sub(1) {
                    Some(left) => self.config.lose_acks = left,
                    None => self.send_control(NK_ACK, &message::key_sum(&key, self.config.order)),
                }
                self.events.push(Event::ReceiveKey);
            }
            NK_ACK => {
                let sum = data.get(..4)?;
                if let Some(pending) = self.pending.take_if(|pending| message::is_sum(&pending.key, sum)) {
                    self.send = Some(Dynamic::new(pending.key, now));
                    self.counters.send_keys += 1;
                    self.events.push(Event::SendKey);
                }
            }
            CT_PING => {
                let data = data.get(..46).unwrap_or(data).to_vec();
                self.send_control(CT_PONG, &data);
                self.events.push(Event::Message(CT_PING));
            }
            number @ 0x70..=0x76 => self.events.push(Event::Message(number)),
            _ => return None,
        }
        Some(())
    }
}
