//! One end: the state machine, with the parts of engine and daemon that it needs.

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::super::super::cipher::Key;
use super::super::super::direction::{ReceiveKey, SendKey};
use super::super::super::message::Carries;
use super::super::super::packet::{self, Content, HEADROOM, Header, OVERHEAD};
use super::super::super::secrets::Secrets;
use super::super::super::window::Window;
use super::super::*;

/// What the engine has of a send key. It outlives an engine that is killed.
pub(super) struct Sending {
    pub(super) key: DirectionKey,
    shared: SendKey,
    renew_at: Duration,
}

/// What was ever done with keys, at either end, however often it was restarted.
#[derive(Default)]
pub(super) struct Book {
    /// Keys under which each end could ever receive.
    received_under: [HashSet<[u8; 32]>; 2],
    /// IVs that were used under each key.
    ivs: HashSet<([u8; 32], u64)>,
    /// Payloads that each end was given.
    delivered: [HashSet<u64>; 2],
    /// The sender of each payload.
    sent_by: Vec<usize>,
}

impl Book {
    pub(super) fn sent(&self) -> usize {
        self.sent_by.len()
    }

    pub(super) fn delivered(&self, end: usize) -> usize {
        self.delivered[end].len()
    }
}

/// An address and port, on the outer side of a NAT. No two ends ever have the same.
pub(super) type Address = u64;

pub(super) struct End {
    number: usize,
    pub(super) address: Address,
    /// Where its peer is, as far as it knows.
    pub(super) peer: Option<Address>,
    machine: Handshake<StdRng>,
    /// What the daemon has on disk.
    pub(super) kept: Kept,
    /// How far this end's clock is ahead.
    pub(super) clock: i64,
    pub(super) sending: Option<Sending>,
    pub(super) receiving: HashMap<u8, (u64, [u8; 32], ReceiveKey, bool)>,
    /// Since when packets have come that did not open, and none that did.
    failing: Option<Duration>,
    /// Datagrams and where they go.
    pub(super) out: Vec<(Vec<u8>, Option<Address>)>,
    pub(super) sessions: u32,
}

fn profile(number: usize) -> Profile {
    Profile { fast_aes: number == 0, carries: Carries::Ip }
}

impl End {
    pub(super) fn new(number: usize, seed: u64, kept: Kept) -> Self {
        let machine = Handshake::new(Secrets::new(&[0x5A; 16]), profile(number), kept, StdRng::seed_from_u64(seed));
        Self {
            number,
            address: number as Address,
            peer: Some(1 - number as Address),
            machine,
            kept,
            clock: 0,
            sending: None,
            receiving: HashMap::new(),
            failing: None,
            out: Vec::new(),
            sessions: 0,
        }
    }

    /// Another process with what the last one has kept.
    pub(super) fn restart(&mut self, seed: u64) {
        let Self { clock, address, peer, .. } = *self;
        *self = Self { clock, address, peer, ..Self::new(self.number, seed, self.kept) };
    }

    /// Another engine goes on under the same keys: counters that a worker had taken are lost.
    pub(super) fn replace_engine(&mut self) {
        if let Some(sending) = &mut self.sending {
            sending.shared.batch(64);
        }
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.machine.deadline()
    }

    pub(super) fn input(&mut self, input: Input<'_>, at: Duration, book: &mut Book) {
        self.input_from(input, None, at, book);
    }

    /// `source` is that of a datagram.
    fn input_from(&mut self, input: Input<'_>, source: Option<Address>, at: Duration, book: &mut Book) {
        let unix = 1_700_000_000_000_000_000_i64 + at.as_nanos() as i64 + self.clock;
        for action in self.machine.handle(input, Now { at, unix_nanos: unix as u64 }) {
            match action {
                Action::Keep(kept) => self.kept = kept,
                Action::Receive(key) => {
                    book.received_under[self.number].insert(*key.octets);
                    let receive = ReceiveKey::new(Key::new(key.suite, &key.octets), Window::default());
                    let former = self.receiving.insert(key.epoch.number(), (key.serial, *key.octets, receive, false));
                    assert!(former.is_none(), "a key that was not forgotten");
                }
                Action::Forget(serial) => {
                    let before = self.receiving.len();
                    self.receiving.retain(|_, known| known.0 != serial);
                    assert_eq!(self.receiving.len(), before - 1);
                }
                Action::Send(key, renew) => {
                    let shared = SendKey::new(Key::new(key.suite, &key.octets), key.epoch, Box::default());
                    self.sending = Some(Sending { key, shared, renew_at: at + renew });
                    self.sessions += 1;
                }
                Action::StopSending => assert!(self.sending.take().is_some()),
                Action::Confirm => self.seal(Content::Control, &[], book),
                Action::Transmit(datagram, To::Peer) => self.out.push((datagram, self.peer)),
                Action::Transmit(datagram, To::Source) => self.out.push((datagram, source)),
                Action::Refused(_) | Action::Log(_) => {}
            }
        }
    }

    /// Sends a payload that no other has, or asks for a key.
    pub(super) fn send_data(&mut self, at: Duration, book: &mut Book) {
        if self.peer.is_some() && self.sending.as_ref().is_none_or(|sending| sending.renew_at <= at) {
            self.input(Input::Wanted(Wanted::Send), at, book);
        }
        if self.sending.is_some() {
            let payload = book.sent_by.len() as u64;
            book.sent_by.push(self.number);
            self.seal(Content::Data, &payload.to_be_bytes(), book);
        }
    }

    fn seal(&mut self, content: Content, payload: &[u8], book: &mut Book) {
        let sending = self.sending.as_mut().expect("a key to confirm");
        let key = *sending.key.octets;
        assert!(book.received_under[1 - self.number].contains(&key), "a key that the peer never had");
        let mut buffer = vec![0; payload.len() + OVERHEAD];
        buffer[HEADROOM..HEADROOM + payload.len()].copy_from_slice(payload);
        sending.shared.batch(1).seal(content, &mut buffer, payload.len()).expect("few packets");
        // These tests send few packets, so the low bits are the counter.
        let counter = u64::from(u32::from_be_bytes(buffer[4..8].try_into().unwrap()) & 0x3FFF_FFFF);
        assert!(book.ivs.insert((key, counter)), "an IV twice under one key");
        self.out.push((buffer, self.peer));
    }

    /// A datagram comes from `source`. `is_peer`: a challenge that is sent there would reach the peer.
    pub(super) fn arrive(
        &mut self,
        datagram: &[u8],
        (source, is_peer): (Address, bool),
        at: Duration,
        book: &mut Book,
    ) {
        if !packet::is_sealed(datagram) {
            return;
        }
        let from = if self.peer == Some(source) { Source::Peer } else { Source::Other };
        match packet::parse(datagram) {
            Err(_) => {}
            Ok(Header::Handshake(_)) => {
                self.input_from(Input::Datagram(datagram, from), Some(source), at, book);
            }
            Ok(Header::Packet(epoch, low)) => {
                let Some((serial, _, key, was_opened)) = self.receiving.get_mut(&epoch.number()) else {
                    return self.fail(at, book);
                };
                let mut datagram = datagram.to_vec();
                match key.open(low, &mut datagram) {
                    Ok((content, payload)) => {
                        self.failing = None;
                        if is_peer {
                            self.peer = Some(source);
                        }
                        let (serial, was_opened) = (*serial, std::mem::replace(was_opened, true));
                        if !was_opened {
                            self.input(Input::Opened(serial), at, book);
                        }
                        match content {
                            Content::Control => self.input(Input::Probed(serial), at, book),
                            Content::Data => {
                                let number = u64::from_be_bytes(datagram[payload].try_into().unwrap());
                                assert_eq!(book.sent_by[number as usize], 1 - self.number, "not of the peer");
                                assert!(book.delivered[self.number].insert(number), "delivered twice");
                            }
                        }
                    }
                    Err(Refused::BadTag) => self.fail(at, book),
                    Err(_) => {}
                }
            }
        }
    }

    /// A packet did not open. Without any key that is a reason for a handshake; else if none was accepted for a second.
    fn fail(&mut self, at: Duration, book: &mut Book) {
        let since = *self.failing.get_or_insert(at);
        if self.peer.is_some() && (self.receiving.is_empty() || at - since >= Duration::from_secs(1)) {
            self.failing = Some(at);
            self.input(Input::Wanted(Wanted::Receive), at, book);
        }
    }
}
