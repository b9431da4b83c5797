//! Which events happen, and in which order: the seed alone decides.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::topology::Side;

/// How the counters of a gateway and of its surroundings compare after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// Each packet that came to the gateway is counted under one verdict.
    Exact,
    /// The same for the carrier; the LAN's card counts superframes.
    Carrier,
    /// Some were lost outside: no more were counted than came.
    AtMost,
    /// The tunnel was made again at some time: counting starts anew.
    Anew,
}

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $weight:literal, $rule:ident;)*) => {
        /// A kind of event.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Kind { $($(#[$doc])* $name,)* }

        impl Kind {
            /// Every kind.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// Its name on the command line and in the report.
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            /// How often it happens, compared with the others.
            fn weight(self) -> u32 {
                match self { $(Self::$name => $weight,)* }
            }

            /// How counters compare after it.
            pub(super) fn rule(self) -> Rule {
                match self { $(Self::$name => Rule::$rule,)* }
            }
        }
    };
}

kinds! {
    /// UDP and TCP both ways.
    Traffic = "traffic", 4, Carrier;
    /// Both ends change their keys.
    Keys = "keys", 2, Exact;
    /// The daemon is stopped and started again.
    DaemonRestart = "daemon-restart", 1, Anew;
    /// The daemon is killed and started again.
    DaemonKill = "daemon-kill", 1, Anew;
    /// The engine is killed.
    EngineKill = "engine-kill", 1, Anew;
    /// The engine is asked to end.
    EngineTerm = "engine-term", 1, Anew;
    /// Both are killed, and the daemon is started again.
    BothKill = "both-kill", 1, Anew;
    /// Daemon and engine are replaced by those of the other build.
    Replace = "replace", 1, Anew;
    /// The engine gets no CPU for a second.
    Hang = "hang", 2, Exact;
    /// An end of the hub is set down and up.
    HubDown = "hub-down", 1, Anew;
    /// An end of the hub is deleted.
    HubDelete = "hub-delete", 1, Anew;
    /// The interface is set down or deleted, and the daemon is started again.
    Interface = "interface", 1, Anew;
    /// An end of the carrier's cable is set down and up.
    CarrierDown = "carrier-down", 2, AtMost;
    /// The carrier's MTU falls for a second.
    Mtu = "mtu", 2, AtMost;
    /// The gateway gets another carrier address.
    Address = "address", 2, AtMost;
    /// The other end seems to have another port, as behind a NAT that has lost its mapping.
    Nat = "nat", 2, AtMost;
    /// Datagrams are lost, duplicated, damaged, delayed and reordered for some seconds.
    Impair = "impair", 4, Exact;
    /// Thousands of forged datagrams.
    Flood = "flood", 3, Exact;
    /// Forged ICMP errors.
    Icmp = "icmp", 2, Exact;
    /// What was recorded, once more, as if from the peer.
    Replay = "replay", 3, Exact;
    /// The same from another address.
    ReplayElsewhere = "replay-elsewhere", 2, AtMost;
}

impl Kind {
    /// Whether each datagram that was sent meanwhile has arrived.
    pub(super) fn is_lossless(self) -> bool {
        matches!(self.rule(), Rule::Exact | Rule::Carrier) && self != Self::Impair
    }

    /// Whether more comes than an engine must have room for.
    pub(super) fn is_flood(self) -> bool {
        matches!(self, Self::Flood | Self::Replay | Self::ReplayElsewhere | Self::Hang)
    }

    /// The kind of that name.
    ///
    /// # Errors
    /// The names that there are.
    pub fn parse(name: &str) -> Result<Self, String> {
        let names = || Self::ALL.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
        let found = Self::ALL.iter().copied().find(|kind| kind.name() == name);
        found.ok_or_else(|| format!("no kind of event is called {name}; there are: {}", names()))
    }
}

/// One event.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Event {
    /// Its place in the order, from 1.
    pub(super) number: usize,
    /// What happens.
    pub(super) kind: Kind,
    /// At which gateway.
    pub(super) side: Side,
    /// How much of it: 0 to 1.
    pub(super) dose: f64,
    /// For random numbers within it.
    pub(super) seed: u64,
}

/// An endless order of events.
pub(super) struct Plan {
    rng: StdRng,
    kinds: Vec<Kind>,
    number: usize,
}

impl Plan {
    /// The order that belongs to a seed and to these kinds; none means all.
    pub(super) fn new(seed: u64, only: &[Kind]) -> Self {
        let kinds = if only.is_empty() { Kind::ALL } else { only };
        Self { rng: StdRng::seed_from_u64(seed), kinds: kinds.to_vec(), number: 0 }
    }
}

impl Iterator for Plan {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        self.number += 1;
        let total: u32 = self.kinds.iter().map(|kind| kind.weight()).sum();
        let mut place = self.rng.random_range(0..total);
        let side = if self.rng.random() { Side::A } else { Side::B };
        let (dose, seed) = (self.rng.random(), self.rng.random());
        let kind = self.kinds.iter().copied().find(|kind| match place.checked_sub(kind.weight()) {
            Some(rest) => {
                place = rest;
                false
            }
            None => true,
        })?;
        Some(Event { number: self.number, kind, side, dose, seed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_repeats_its_events_and_another_has_others() {
        let events = |seed, only: &[Kind]| Plan::new(seed, only).take(100).collect::<Vec<_>>();
        assert_eq!(events(7, &[]), events(7, &[]));
        assert_ne!(events(7, &[]), events(8, &[]));
        assert_eq!(events(7, &[])[99].number, 100);
        assert!(events(7, &[Kind::Nat, Kind::Mtu]).iter().all(|event| [Kind::Nat, Kind::Mtu].contains(&event.kind)));
    }

    #[test]
    fn every_kind_happens_at_either_gateway() {
        let events: Vec<_> = Plan::new(1, &[]).take(2000).collect();
        for kind in Kind::ALL {
            for side in [Side::A, Side::B] {
                assert!(events.iter().any(|event| (event.kind, event.side) == (*kind, side)), "{kind:?} {side:?}");
            }
        }
    }

    #[test]
    fn names_are_understood() {
        for kind in Kind::ALL {
            assert_eq!(Kind::parse(kind.name()), Ok(*kind));
        }
        assert!(Kind::parse("keys,mtu").unwrap_err().contains("engine-kill, engine-term"));
    }
}
