//! What the daemon does about each event of the engine: key exchange, pings, errors, log lines.
//!
//! A state machine without sockets or clocks, like the [`Exchange`] inside it; [`super::daemon`] carries out the steps.

use std::net::SocketAddr;
use std::time::Duration;

use rand::CryptoRng;

use super::exchange::{Action, Exchange, Input, Note, Now};
use super::health::{Health, Limits, Verdict};
use super::options::Options;
use crate::control::protocol::{Event, Request};
use crate::wire::message::{self, Message};

/// Packets under one send key towards an original, which forgets a receive key after twice as many (protocol
/// section 3).
pub const ORIGINAL_PACKETS: u64 = 32_767;
/// Packets under one send key towards our own kind.
pub const OWN_PACKETS: u64 = 1 << 18;
/// Octets under one send key: far below the birthday bound of 64-bit blocks.
pub const SEND_OCTETS: u64 = 256 << 20;
/// Packets under one receive key. The sender keeps the real limits; this one ends what no honest sender does.
pub const RECEIVE_PACKETS: u64 = 2 * OWN_PACKETS;

/// How important a log line is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Something is wrong.
    Warning,
    /// Worth knowing.
    Info,
    /// For those who look closely.
    Debug,
}

/// Why the tunnel ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// Somebody wants it so.
    Asked(String),
    /// Something is wrong.
    Failed(String),
}

/// What to do, in order. Not `Debug`: requests hold keys.
pub enum Step {
    /// Tell the engine.
    Send(Request),
    /// Tell the operator; without the interface name.
    Log(Level, String),
    /// The peer is here now.
    Peer(SocketAddr),
    /// We are here now.
    Me(SocketAddr),
    /// The peer does not answer: if it was given by name, that may mean another address by now.
    LookUpPeer,
    /// Stop.
    End(End),
}

/// One tunnel's state.
pub struct Session<R> {
    exchange: Exchange<R>,
    health: Health,
    tokxts: u32,
    peer_keeps_keys: bool,
    /// How long a send key may be of use to an original, which forgets it after twice tokey: half-way between, so that
    /// what is on its way then still arrives.
    key_life: Duration,
    /// When the send key in use is of no more use.
    key_ends: Option<Duration>,
    rng: R,
}

impl<R: CryptoRng> Session<R> {
    /// Starts at `now`. `rngs` make keys and filler.
    pub fn new(options: &Options, now: Now, rngs: (R, R)) -> Self {
        let tokxc = Duration::from_secs(options.tokxc.into());
        Self {
            exchange: Exchange::new(tokxc, rngs.0),
            health: Health::new(limits(options), now.at),
            tokxts: options.tokxts,
            peer_keeps_keys: false,
            key_life: Duration::from_secs(options.tokey.into()) * 3 / 2,
            key_ends: None,
            rng: rngs.1,
        }
    }

    /// Takes over what may change while the tunnel runs.
    pub fn reload(&mut self, options: &Options, now: Now) {
        self.tokxts = options.tokxts;
        self.health.set_limits(limits(options), now.at);
    }

    /// Packets under one send key towards the peer as it is known now.
    pub fn send_packets(&self) -> u64 {
        if self.peer_keeps_keys { OWN_PACKETS } else { ORIGINAL_PACKETS }
    }

    /// Another engine has taken the tunnel over, which knows no dynamic key and the limits of the start.
    pub fn start_over(&mut self) {
        self.exchange.start_over();
        self.peer_keeps_keys = false;
        self.key_ends = None;
    }

    /// When [`Session::tick`] is due, on the clock of [`Now::at`].
    pub fn deadline(&self) -> Option<Duration> {
        [self.exchange.deadline(), self.health.deadline(), self.key_ends].into_iter().flatten().min()
    }

    /// Takes note of the time.
    pub fn tick(&mut self, now: Now) -> Vec<Step> {
        let actions = self.exchange.handle(Input::Tick, now);
        let mut steps = self.steps(actions, now);
        if self.key_ends.take_if(|at| *at <= now.at).is_some() {
            let actions = self.exchange.handle(Input::SendKeyForgotten, now);
            steps.extend(self.steps(actions, now));
        }
        let due = self.health.tick(now.at);
        if due.unanswered {
            self.error("no answer to a ping", &mut steps);
        }
        if due.ping {
            steps.push(self.control(&Message::Ping(&[]), now));
        }
        steps
    }

    /// The message that says good-bye.
    pub fn farewell(&mut self, now: Now) -> Request {
        control(&Message::Kill, now, &mut self.rng)
    }

    /// Takes an event of the engine. [`Event::Attached`], [`Event::Renamed`] and the status events are not for here, and do nothing.
    pub fn event(&mut self, event: &Event, now: Now) -> Vec<Step> {
        match event {
            Event::KeyWanted { reason } => {
                let actions = self.exchange.handle(Input::KeyWanted(*reason), now);
                self.steps(actions, now)
            }
            Event::Control { payload, under_static, .. } => match hex::decode(payload) {
                Ok(payload) => self.message(&zeroize::Zeroizing::new(payload), *under_static, now),
                Err(_) => {
                    vec![Step::Log(Level::Warning, "the engine passed on a message that is not hexadecimal".into())]
                }
            },
            Event::NewPeer { peer } => {
                vec![Step::Peer(*peer), Step::Log(Level::Info, format!("new peer {peer}"))]
            }
            Event::NewMe { me, before } if before.ip().is_unspecified() => {
                vec![Step::Me(*me), Step::Log(Level::Info, format!("my address is {me}"))]
            }
            // A packet of ours tells the peer, which may have nothing to send and so nothing to be missed.
            Event::NewMe { me, .. } => vec![
                Step::Me(*me),
                Step::Log(Level::Info, format!("changing my address: {me}")),
                self.control(&Message::Ping(&[]), now),
            ],
            Event::NetworkError { message } => self.network_error(message),
            Event::Notice { message, well } => {
                vec![Step::Log(if *well { Level::Info } else { Level::Warning }, message.clone())]
            }
            Event::Failed { message } => {
                vec![Step::Log(Level::Warning, format!("the engine refused a request: {message}"))]
            }
            Event::DeviceDown => vec![Step::End(End::Asked("the interface was taken down".to_owned()))],
            Event::Attached { .. } | Event::Renamed { .. } | Event::Status(_) | Event::StatusEnd => Vec::new(),
        }
    }

    /// An error of the carrier network.
    pub fn network_error(&mut self, what: &str) -> Vec<Step> {
        let mut steps = Vec::new();
        self.error(what, &mut steps);
        steps
    }

    fn message(&mut self, payload: &[u8], under_static: bool, now: Now) -> Vec<Step> {
        if !message::is_fresh(payload, now.unix, self.tokxts) {
            let text = format!(
                "a key exchange message is off by more than tokxts={} s; dropped; compare the clocks",
                self.tokxts
            );
            return vec![Step::Log(Level::Warning, text)];
        }
        let Ok(message) = Message::parse(payload) else {
            let number = payload.first().copied().unwrap_or_default();
            return vec![Step::Log(Level::Info, format!("dropped an unknown control message of type {number:#04x}"))];
        };
        let mut steps = match &message {
            Message::Ping(data) => vec![self.control(&Message::Pong(data), now)],
            Message::Pong(_) => {
                self.health.answered();
                Vec::new()
            }
            Message::Kill => vec![Step::Log(Level::Info, "the peer goes away (CT_KILL)".to_owned())],
            Message::Debug(text) => {
                // The peer's text is not trusted to be one line.
                vec![Step::Log(Level::Info, format!("the peer says: {}", text.escape_ascii()))]
            }
            _ => Vec::new(),
        };
        let actions = self.exchange.handle(Input::Message { message, under_static }, now);
        steps.extend(self.steps(actions, now));
        steps
    }

    fn steps(&mut self, actions: Vec<Action>, now: Now) -> Vec<Step> {
        let mut steps = Vec::with_capacity(actions.len());
        for action in actions {
            match action {
                Action::SendMessage(payload) => {
                    steps.push(Step::Send(Request::SendControl { payload: hex::encode(&*payload) }))
                }
                Action::SetSendKey(key) => {
                    self.health.exchanged();
                    self.key_ends = Some(now.at + self.key_life);
                    steps.push(Step::Send(Request::SetSendKey { key }));
                }
                Action::DropSendKey => {
                    self.key_ends = None;
                    steps.push(Step::Send(Request::DropSendKey));
                }
                Action::SetReceiveKey { key, keep } => {
                    self.health.exchanged();
                    let keep_ms = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
                    steps.push(Step::Send(Request::SetReceiveKey { key, keep_ms }));
                }
                Action::Log(note) => {
                    steps.push(Step::Log(level(note), note.to_string()));
                    if matches!(note, Note::NoAcknowledgement { .. } | Note::NoIndication { .. }) {
                        steps.push(Step::LookUpPeer);
                    }
                }
            }
        }
        if self.peer_keeps_keys != self.exchange.peer_keeps_keys() {
            self.peer_keeps_keys = self.exchange.peer_keeps_keys();
            let packets = self.send_packets();
            steps.push(Step::Send(Request::SetSendLimits {
                packets,
                octets: SEND_OCTETS,
                paced: !self.peer_keeps_keys,
            }));
        }
        steps
    }

    fn control(&mut self, message: &Message<'_>, now: Now) -> Step {
        Step::Send(control(message, now, &mut self.rng))
    }

    fn error(&mut self, what: &str, steps: &mut Vec<Step>) {
        steps.push(Step::LookUpPeer);
        match self.health.error() {
            // Told at 1, 2, 4, 8, ...: a dead peer must not fill the log.
            Verdict::Bear(count) if count.is_power_of_two() => {
                let text = format!("{what}; network error {count} since the last key exchange");
                steps.push(Step::Log(Level::Warning, text));
            }
            Verdict::Bear(_) => {}
            Verdict::GiveUp(count) => {
                let text = format!(
                    "{what}; {count} network errors since the last key exchange; raise maxerr, or set it to -1 to stay"
                );
                steps.push(Step::End(End::Failed(text)));
            }
        }
    }
}

fn control(message: &Message<'_>, now: Now, rng: &mut impl CryptoRng) -> Request {
    Request::SendControl { payload: hex::encode(&*message.build(now.unix, rng)) }
}

fn limits(options: &Options) -> Limits {
    let seconds = |value: u32| Duration::from_secs(value.into());
    Limits { ping: seconds(options.ping), toping: seconds(options.toping), maxerr: options.maxerr }
}

fn level(note: Note) -> Level {
    match note {
        Note::ReusedKey | Note::NoAcknowledgement { .. } | Note::NoIndication { .. } => Level::Warning,
        Note::NewSendKey { .. } | Note::NewReceiveKey | Note::PeerKeepsKeys => Level::Info,
        Note::Requested | Note::Forgotten | Note::StrayAcknowledgement => Level::Debug,
    }
}

#[cfg(test)]
mod tests;
