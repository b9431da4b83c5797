//! `cipe-user`'s key exchange and wire on a plain socket: the engine and the daemon in their smallest form.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

use cipe_user::ciped::exchange::{Action, Exchange, Input, Now, TakenKeys};
use cipe_user::cipher::{Algorithm, Key, Lanes};
use cipe_user::control::protocol::{Under, Wanted};
use cipe_user::wire::message::{Message, is_fresh};
use cipe_user::wire::packet::{self, IV, KeyKind, Type};

pub(super) struct Ours {
    socket: UdpSocket,
    /// The peer's address.
    pub peer: SocketAddr,
    /// Packets under one send key before another is made.
    pub send_packets: u64,
    /// Send keys taken into use so far.
    pub send_keys: u32,
    /// Receive keys taken into use so far.
    pub receive_keys: u32,
    algorithm: Algorithm,
    static_key: Key,
    send: Option<Key>,
    receive: Option<Key>,
    sent: u64,
    exchange: Exchange<rand::rngs::ThreadRng>,
    lanes: Lanes,
    start: Instant,
}

impl Ours {
    pub(super) fn new(socket: UdpSocket, peer: SocketAddr, algorithm: Algorithm, secret: &[u8; 16]) -> Self {
        Self {
            socket,
            peer,
            send_packets: u64::MAX,
            send_keys: 0,
            receive_keys: 0,
            algorithm,
            static_key: Key::new(algorithm, secret),
            send: None,
            receive: None,
            sent: 0,
            exchange: Exchange::new(Duration::from_secs(10), TakenKeys::new([0; 16]), rand::rng()),
            lanes: Lanes::new(),
            start: Instant::now(),
        }
    }

    /// Sends an inner packet and waits for its echo, which must come.
    pub(super) fn ping(&mut self, packet: &[u8]) -> Vec<u8> {
        self.data(packet);
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(reply) = self.step(deadline) {
                return reply;
            }
            assert!(Instant::now() < deadline, "no reply");
        }
    }

    /// The same, but retransmits every 100 ms: for peers that have lost a key.
    pub(super) fn ping_until_answered(&mut self, packet: &[u8]) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Instant::now() < deadline {
            self.data(packet);
            let again = Instant::now() + Duration::from_millis(100);
            while Instant::now() < again {
                if self.step(again).is_some() {
                    return;
                }
            }
        }
        panic!("no reply");
    }

    fn now(&self) -> Now {
        let unix = SystemTime::UNIX_EPOCH.elapsed().expect("the clock is past 1970");
        Now { at: self.start.elapsed(), unix_nanos: unix.as_nanos() as u64 }
    }

    fn data(&mut self, packet: &[u8]) {
        if self.send.is_none() {
            self.input(Input::KeyWanted(Wanted::NoSendKey));
        } else if self.sent >= self.send_packets {
            self.input(Input::KeyWanted(Wanted::Packets));
        }
        self.sent += 1;
        self.seal(Type::Data, packet, &Under::Live);
    }

    fn seal(&mut self, kind: Type, payload: &[u8], under: &Under) {
        let retired;
        let (key, flag) = match (under, &self.send) {
            (Under::Retired(octets), _) => {
                retired = Key::new(self.algorithm, octets);
                (&retired, KeyKind::Dynamic)
            }
            (Under::Live, Some(key)) => (key, KeyKind::Dynamic),
            (Under::Live, None) | (Under::Static, _) => (&self.static_key, KeyKind::Static),
        };
        let mut buffer = vec![0; packet::sealed_len(payload.len())];
        buffer[IV..IV + payload.len()].copy_from_slice(payload);
        let iv = packet::draw_iv(flag, rand::random);
        packet::seal(&mut self.lanes, key, &mut buffer, payload.len(), kind, iv, rand::random());
        self.socket.send_to(&buffer, self.peer).expect("loopback takes it");
    }

    fn input(&mut self, input: Input<'_>) {
        for action in self.exchange.handle(input, self.now()) {
            match action {
                Action::SendMessage { payload, under, .. } => self.seal(Type::Control, &payload, &under),
                Action::SetSendKey(key) => {
                    self.send = Some(Key::new(self.algorithm, &key));
                    self.sent = 0;
                    self.send_keys += 1;
                }
                Action::DropSendKey => self.send = None,
                Action::SetReceiveKey { key, .. } => {
                    self.receive = Some(Key::new(self.algorithm, &key));
                    self.receive_keys += 1;
                }
                Action::PeerSeals { .. } | Action::Log(_) => {}
            }
        }
    }

    /// Receives one datagram, or waits for the exchange's deadline or `until`. Returns an inner packet.
    fn step(&mut self, until: Instant) -> Option<Vec<u8>> {
        let due = self.exchange.deadline().map_or(until, |at| until.min(self.start + at));
        let wait = due.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        self.socket.set_read_timeout(Some(wait)).expect("a wait is not zero");
        let mut buffer = [0; 2048];
        let Ok(len) = self.socket.recv(&mut buffer) else {
            self.input(Input::Tick);
            return None;
        };
        let under_static = KeyKind::of(buffer[0]) == KeyKind::Static;
        let key = if under_static { Some(&self.static_key) } else { self.receive.as_ref() };
        let Some(key) = key else {
            self.input(Input::KeyWanted(Wanted::NoReceiveKey));
            return None;
        };
        let (kind, payload) =
            packet::open(&mut self.lanes, key, &mut buffer[..len]).expect("honest packets are opened");
        let payload = payload.to_vec();
        match kind {
            Type::Data => Some(payload),
            Type::Control => {
                assert!(is_fresh(&payload, self.now().unix_seconds(), 30));
                let message = Message::parse(&payload).expect("honest messages are parsed");
                self.input(Input::Message { message, under_static });
                None
            }
        }
    }
}
