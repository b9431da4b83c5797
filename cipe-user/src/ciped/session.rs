//! The daemon's reaction to each event of the engine: key exchange, pings, errors, log lines.
//!
//! A state machine without sockets or clocks, like the [`Exchange`] inside it; [`super::daemon`] carries out the steps.

mod clear;
mod sealed;
mod step;
mod topic;

use std::collections::HashMap;
use std::time::Duration;

use rand::CryptoRng;

use super::exchange::{Action, Exchange, Input, Note, Now, TakenKeys};
use super::health::{ErrorAction, Health, HealthOptions};
use super::options::Options;
use super::sealing::Sealing;
use crate::control::protocol::{Event, MessageOctets, Request, Under};
use crate::kernel::zone::Shown;
use crate::repeats::{Repeats, counted};
use crate::wire::clear::Configuration;
use crate::wire::message::{self, Message};

pub use self::step::{End, Level, Past, Step};
pub(super) use self::topic::Topic;
use self::topic::{level, topic};

/// Maximum packets under one send key towards an original, which drops a receive key after twice as many (protocol
/// section 3).
pub const ORIGINAL_PACKETS: u64 = 32_767;
/// Maximum packets under one send key towards a peer that runs this program.
pub const OWN_PACKETS: u64 = 1 << 18;
/// Maximum octets under one send key: far below the birthday bound of 64-bit blocks.
pub const SEND_OCTETS: u64 = 256 << 20;
/// Maximum packets under one receive key. Senders have lower limits; no correct sender reaches this one.
pub const RECEIVE_PACKETS: u64 = 2 * OWN_PACKETS;

/// How much older than the newest one a key exchange message of the peer's may be, in seconds: datagrams overtake each other.
const REORDERED: u32 = 2;
/// How far a time stamp may be ahead of our clock to be remembered, in seconds. One of us has a wrong clock then; when it is
/// corrected, the peer's messages must not seem old.
const MAX_AHEAD: u32 = 600;

/// A peer of ours identifies itself in each exchange. A message may be lost, but after so many keys the peer is an original.
const MAX_UNIDENTIFIED_KEYS: u32 = 2;

/// One tunnel's state.
pub struct Session<R> {
    exchange: Exchange<R>,
    health: Health,
    tokxts: u32,
    peer_keeps_keys: bool,
    /// The option `staticdata`.
    static_data: Option<bool>,
    /// Whether the peer runs this program, as far as is known. It stays so while the peer is doubted or away.
    is_ours: bool,
    /// Send keys in a row that a peer has acknowledged without identifying itself.
    unidentified_keys: u32,
    /// What the engine was told of data under the static key.
    static_data_told: bool,
    /// How long a send key is useful towards an original, which drops it after twice tokey: one and a half tokey, so
    /// that packets in flight at the end still arrive in time.
    key_life: Duration,
    /// When the send key in use stops being useful.
    key_ends: Option<Duration>,
    repeats: HashMap<Topic, Repeats>,
    /// The configuration of this end, for requests in clear.
    configuration: Configuration,
    /// The newest time stamp of the peer's key exchange.
    newest_stamp: Option<u32>,
    /// When the last such request was answered.
    configuration_told: Option<Duration>,
    /// Whether nothing is encrypted.
    nokey: bool,
    /// When a CT_PING in clear was answered last.
    pong_sent: Option<Duration>,
    /// Sealed packets; `None`: there are none.
    sealing: Option<Sealing<R>>,
    /// Handshakes without an answer since there was a session, by what is logged of them.
    attempts: HashMap<Topic, u64>,
    /// Whether sealed packets have taken the place of protocol 3.
    is_sealed: bool,
    /// The interface, for log lines that name a command.
    device: String,
    rng: R,
}

impl<R: CryptoRng> Session<R> {
    /// Starts at `now`. `rngs` make keys and filler.
    pub fn new(options: &Options, past: Past, now: Now, rngs: (R, R)) -> Self {
        let tokxc = Duration::from_secs(options.tokxc.into());
        Self {
            exchange: Exchange::new(tokxc, past.taken, rngs.0),
            health: Health::new(limits(options), tokxc, now.at),
            tokxts: options.tokxts,
            peer_keeps_keys: false,
            static_data: options.static_data,
            is_ours: past.is_ours,
            unidentified_keys: 0,
            static_data_told: options.static_data.unwrap_or(!past.is_ours),
            key_life: Duration::from_secs(options.tokey.into()) * 3 / 2,
            key_ends: None,
            repeats: HashMap::new(),
            configuration: clear::configuration(options),
            newest_stamp: past.newest_stamp,
            configuration_told: None,
            nokey: options.key.is_none(),
            pong_sent: None,
            sealing: None,
            attempts: HashMap::new(),
            is_sealed: false,
            device: String::new(),
            rng: rngs.1,
        }
    }

    /// Applies the options that may change while the tunnel runs.
    pub fn reload(&mut self, options: &Options, now: Now) {
        self.tokxts = options.tokxts;
        self.health.set_limits(limits(options), now.at);
    }

    /// The newest time stamp of the peer's key exchange, in seconds since 1970; to be kept for the next daemon.
    pub fn newest_stamp(&self) -> Option<u32> {
        self.newest_stamp
    }

    /// The keys that the peer has announced; to be kept for the next daemon.
    pub fn taken_keys(&self) -> &TakenKeys {
        self.exchange.taken_keys()
    }

    /// Takes the peer's messages of any age once more, since its clock may have gone back, and the peer for one that was never sealed.
    pub fn forget(&mut self, now: Now) -> Vec<Step> {
        self.newest_stamp = None;
        self.with_sealing(now, |sealing| sealing.forget(now))
    }

    /// The interface has this name.
    pub fn name(&mut self, device: &str) {
        device.clone_into(&mut self.device);
    }

    /// Maximum packets under one send key towards the peer, by what is known about the peer.
    pub fn send_packets(&self) -> u64 {
        if self.peer_keeps_keys || self.seals() { OWN_PACKETS } else { ORIGINAL_PACKETS }
    }

    /// Whether data may be sent under the static key while there is no other. By default not to a peer that runs this program:
    /// an exchange with it takes a round trip, and packets are held meanwhile. Towards an original that would cost packets at
    /// each change of keys.
    pub fn static_data(&self) -> bool {
        self.static_data.unwrap_or(!self.is_ours)
    }

    /// Whether the peer runs this program; to be kept for the next daemon.
    pub fn is_ours(&self) -> bool {
        self.is_ours
    }

    /// A new engine has taken over the tunnel, without dynamic keys and with the initial limits.
    pub fn start_over(&mut self) {
        self.static_data_told = self.static_data();
        self.exchange.start_over();
        self.peer_keeps_keys = self.seals();
        self.key_ends = None;
    }

    /// When [`Session::tick`] is due, on the clock of [`Now::at`].
    pub fn deadline(&self) -> Option<Duration> {
        let sealing = self.sealing.as_ref().and_then(Sealing::deadline);
        [self.exchange.deadline(), self.health.deadline(), self.key_ends, sealing].into_iter().flatten().min()
    }

    /// Checks the deadlines at `now`.
    pub fn tick(&mut self, now: Now) -> Vec<Step> {
        let mut steps = self.tick_sealing(now);
        let actions = self.exchange.handle(Input::Tick, now);
        steps.extend(self.steps(actions, now));
        if self.key_ends.take_if(|at| *at <= now.at).is_some() {
            let actions = self.exchange.handle(Input::SendKeyForgotten, now);
            steps.extend(self.steps(actions, now));
        }
        let due = self.health.tick(now.at);
        if due.unanswered {
            let action = self.health.error();
            self.error("no answer to a ping", action, now, &mut steps);
        }
        if due.silent && self.seals() {
            steps.extend(self.with_sealing(now, |sealing| sealing.unanswered(now)));
        } else if due.silent {
            let actions = self.exchange.handle(Input::Unanswered, now);
            steps.extend(self.steps(actions, now));
        }
        if due.ping {
            steps.push(self.control(&Message::Ping(&[]), now));
        }
        if let Some(count) = due.gone {
            steps.push(give_up("no answer from the peer", count));
        }
        steps
    }

    /// The message that tells the peer that this end stops, and why. An original would exit for good, so only a peer
    /// that runs this program gets one.
    pub fn farewell(&mut self, reason: &str, now: Now) -> Option<Request> {
        let is_ours = if self.seals() { self.has_sealed_key() } else { self.exchange.peer_keeps_keys() };
        is_ours.then(|| self.request(&Message::Kill(reason.as_bytes()), now))
    }

    /// Handles an event of the engine. Ignores [`Event::Attached`], [`Event::Renamed`] and the status events, which are
    /// handled elsewhere.
    pub fn event(&mut self, event: &Event, now: Now) -> Vec<Step> {
        match event {
            // The engine has asked before it was told that packets are sealed.
            Event::KeyWanted { .. } if self.seals() => Vec::new(),
            Event::KeyWanted { reason } => {
                let actions = self.exchange.handle(Input::KeyWanted(*reason), now);
                let mut steps = self.steps(actions, now);
                steps.extend(self.with_sealing(now, |sealing| sealing.data_goes_on(now)));
                steps
            }
            Event::Control { payload, sealed: true, .. } => self.sealed_message(payload, now),
            Event::Control { payload, under_static, .. } => self.message(payload, *under_static, now),
            Event::Sealed(event) => self.with_sealing(now, |sealing| sealing.event(event, now)),
            // Behind a NAT with a new mapping for each packet, each packet causes this event.
            Event::NewPeer { peer } => {
                if let Some(sealing) = &mut self.sealing {
                    sealing.learn_address();
                }
                let mut steps = vec![Step::Peer(*peer)];
                steps.extend(self.tell(Topic::NewPeer, Level::Info, &format!("new peer {}", Shown(*peer)), now));
                steps
            }
            // What is sent is sealed: nothing is answered in clear.
            Event::Clear { .. } if self.seals() => Vec::new(),
            Event::Clear { datagram, from } => self.clear(datagram, *from, now),
            Event::NewMe { me, before } if before.ip().is_unspecified() => {
                vec![Step::Me(*me), Step::Log(Level::Info, format!("my address is {}", Shown(*me)))]
            }
            // A packet from us shows the peer our new address. Without it, the peer learns the address only when we
            // have data to send.
            Event::NewMe { me, .. } => vec![
                Step::Me(*me),
                Step::Log(Level::Info, format!("changing my address: {}", Shown(*me))),
                self.control(&Message::Ping(&[]), now),
            ],
            Event::NetworkError { message, heard } => self.network_error(message, *heard, now),
            Event::Notice { message, well } => {
                vec![Step::Log(if *well { Level::Info } else { Level::Warning }, message.clone())]
            }
            Event::Failed { message } => {
                vec![Step::Log(Level::Warning, format!("the engine refused a request: {message}"))]
            }
            Event::DeviceDown => vec![Step::End(End::Down("the interface was taken down".to_owned()))],
            Event::DeviceLost => {
                vec![Step::End(End::Again("the hub of the interface has gone; the tunnel starts over".to_owned()))]
            }
            Event::Stop => vec![Step::End(End::Asked("asked to stop by `cipe down`".to_owned()))],
            Event::Attached { .. }
            | Event::Beat
            | Event::StandbyWanted
            | Event::HubPart { .. }
            | Event::Hub { .. }
            | Event::HubGone { .. }
            | Event::HubsTold
            | Event::Dismissed
            | Event::Replaceable { .. }
            | Event::Renamed { .. }
            | Event::Status(_)
            | Event::StatusEnd
            | Event::Ending { .. } => Vec::new(),
        }
    }

    /// Handles an error of the carrier network. `heard`: an authentic packet has come from the peer since the last one.
    pub fn network_error(&mut self, what: &str, heard: bool, now: Now) -> Vec<Step> {
        let mut steps = Vec::new();
        let action = self.health.network_error(heard, now.at);
        self.error(what, action, now, &mut steps);
        steps
    }

    fn message(&mut self, payload: &[u8], under_static: bool, now: Now) -> Vec<Step> {
        let Ok(message) = Message::parse(payload) else { return self.unknown(payload, now) };
        if self.seals() {
            return self.unsealed_message(&message, now);
        }
        if message.is_stamped() && !message::is_fresh(payload, now.unix_seconds(), self.tokxts) {
            let text = format!(
                "a key exchange message is off by more than tokxts={} s; dropped; compare the clocks",
                self.tokxts
            );
            return self.tell(Topic::Stale, Level::Warning, &text, now);
        }
        if let Some(stamp) = message::stamp(payload).filter(|_| message.is_stamped()) {
            if let Some(behind) =
                self.newest_stamp.map(|newest| newest.wrapping_sub(stamp)).filter(|behind| is_old(*behind))
            {
                let text = format!(
                    "a key exchange message is {behind} s older than one that came before; dropped: it is a recorded one, or the peer's \
                     clock went back; if that is so, `cipe forget`"
                );
                let mut steps = vec![Step::Forget];
                steps.extend(self.tell(Topic::Old, Level::Warning, &text, now));
                return steps;
            }
            let is_newer = self.newest_stamp.is_none_or(|newest| stamp.wrapping_sub(newest).cast_signed() > 0);
            if is_newer && stamp.wrapping_sub(now.unix_seconds()).cast_signed() <= MAX_AHEAD.cast_signed() {
                self.newest_stamp = Some(stamp);
            }
        }
        let mut steps = self.hear(&message, now);
        let actions = self.exchange.handle(Input::Message { message, under_static }, now);
        steps.extend(self.steps(actions, now));
        steps
    }

    fn unknown(&mut self, payload: &[u8], now: Now) -> Vec<Step> {
        let number = payload.first().copied().unwrap_or_default();
        let text = format!("dropped a control message that is unknown or damaged, of type {number:#04x}");
        self.tell(Topic::Unknown, Level::Info, &text, now)
    }

    /// Handles what a message says, but for keys.
    fn hear(&mut self, message: &Message<'_>, now: Now) -> Vec<Step> {
        self.health.heard(now.at);
        match message {
            Message::Ping(data) => vec![self.control(&Message::Pong(data), now)],
            Message::Pong(_) => {
                self.health.answered();
                Vec::new()
            }
            // The peer's text may contain line ends.
            Message::Kill(text) => {
                let why = if text.is_empty() { String::new() } else { format!(": {}", text.escape_ascii()) };
                self.tell(Topic::Kill, Level::Info, &format!("the peer goes away (CT_KILL){why}"), now)
            }
            Message::Debug(text) => {
                self.tell(Topic::PeerSays, Level::Info, &format!("the peer says: {}", text.escape_ascii()), now)
            }
            _ => Vec::new(),
        }
    }

    fn steps(&mut self, actions: Vec<Action>, now: Now) -> Vec<Step> {
        let mut steps = Vec::with_capacity(actions.len());
        for action in actions {
            match action {
                Action::SendMessage { payload, under, announces } => {
                    steps.push(Step::Send(Request::SendControl { payload: MessageOctets(payload), under, announces }));
                }
                Action::SetSendKey(key) => {
                    self.key_ends = Some(now.at + self.key_life);
                    steps.push(Step::Send(Request::SetSendKey { key }));
                }
                Action::DropSendKey => {
                    self.key_ends = None;
                    steps.push(Step::Send(Request::DropSendKey));
                }
                Action::SetReceiveKey { key, keep } => {
                    let keep_ms = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
                    steps.push(Step::Send(Request::SetReceiveKey { key, keep_ms }));
                }
                Action::PeerSeals { asks } => {
                    steps.extend(self.effects(now, |sealing| sealing.peer_seals(asks, now)));
                }
                Action::Log(note) => {
                    if matches!(note, Note::NewSendKey { .. }) {
                        self.unidentified_keys += 1;
                        self.repeats.remove(&Topic::NoAcknowledgement);
                    }
                    steps.extend(self.tell(topic(note), level(note), &note.to_string(), now));
                    if matches!(note, Note::NoAcknowledgement { .. } | Note::NoIndication { .. }) {
                        steps.extend([Step::FallBack, Step::LookUpPeer]);
                    }
                }
            }
        }
        if self.exchange.peer_keeps_keys() {
            (self.is_ours, self.unidentified_keys) = (true, 0);
        } else if self.unidentified_keys >= MAX_UNIDENTIFIED_KEYS {
            self.is_ours = false;
        }
        steps.extend(self.limits());
        steps
    }

    /// The request for other limits, if they depend on what has been learned about the peer.
    fn limits(&mut self) -> Option<Step> {
        let known = (self.exchange.peer_keeps_keys() || self.seals(), self.static_data());
        if known == (self.peer_keeps_keys, self.static_data_told) {
            return None;
        }
        (self.peer_keeps_keys, self.static_data_told) = known;
        Some(Step::Send(Request::SetSendLimits {
            packets: self.send_packets(),
            octets: SEND_OCTETS,
            paced: !self.peer_keeps_keys,
            static_data: self.static_data_told,
        }))
    }

    fn control(&mut self, message: &Message<'_>, now: Now) -> Step {
        Step::Send(self.request(message, now))
    }

    fn request(&mut self, message: &Message<'_>, now: Now) -> Request {
        let sealed = self.has_sealed_key().then(|| message.bare().into());
        let payload = MessageOctets(sealed.unwrap_or_else(|| message.build(now.unix_seconds(), &mut self.rng)));
        Request::SendControl { payload, under: Under::Live, announces: false }
    }

    /// Logs a line for the operator, unless lines of the same topic were frequent recently.
    pub(super) fn tell(&mut self, topic: Topic, level: Level, line: &str, now: Now) -> Vec<Step> {
        let total = self.repeats.entry(topic).or_default().once_more(now.at);
        total.map(|total| Step::Log(level, counted(line, total))).into_iter().collect()
    }

    fn error(&mut self, what: &str, action: ErrorAction, now: Now, steps: &mut Vec<Step>) {
        steps.push(Step::LookUpPeer);
        match action {
            ErrorAction::Tolerate(count) => {
                let text = format!("{what}; network error {count} since the peer was heard");
                if self.repeats.entry(Topic::NetworkError).or_default().once_more(now.at).is_some() {
                    steps.push(Step::Log(Level::Warning, text));
                }
            }
            ErrorAction::AskPeer(count) => {
                let text =
                    format!("{what}; {count} network errors since the peer was heard; asking it before giving up");
                steps.extend(self.tell(Topic::LastCall, Level::Warning, &text, now));
            }
            ErrorAction::GiveUp(count) => steps.push(give_up(what, count)),
        }
    }
}

fn give_up(what: &str, count: u32) -> Step {
    let text =
        format!("{what}; {count} network errors since the peer was heard; raise maxerr, or set it to -1 to stay");
    Step::End(End::Failed(text))
}

/// Whether a message so many seconds behind the newest one came too late; what is ahead of it is far behind modulo 2^32.
fn is_old(behind: u32) -> bool {
    (REORDERED + 1..1 << 31).contains(&behind)
}

fn limits(options: &Options) -> HealthOptions {
    let seconds = |value: u32| Duration::from_secs(value.into());
    HealthOptions { ping: seconds(options.ping), toping: seconds(options.toping), maxerr: options.maxerr }
}

#[cfg(test)]
mod tests;
