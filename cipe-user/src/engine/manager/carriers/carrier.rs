//! A carrier device that AF_XDP serves.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use crate::engine::carrier::Traffic;

/// A device whose datagrams come by AF_XDP.
pub(crate) struct Carrier {
    /// AF_XDP transmits from the UMEM itself.
    pub zero_copy: bool,
    /// Index in the workers' tables, and of its first socket in the map when multiplied by [`CARRIER_QUEUES`](cipe_common::maps::CARRIER_QUEUES).
    pub slot: usize,
    /// Modes got, for people.
    pub note: String,
    /// Its name when it was opened.
    pub name: String,
    pub tunnels: BTreeSet<u16>,
    /// Number of the program that was attached.
    pub program: Option<u32>,
    /// XDP runs in the network stack.
    pub generic: bool,
    /// It might deliver superframes, if native XDP did not keep the other end from it.
    pub superframes: bool,
    /// The workers can send live frames on it, while it takes such.
    pub can_live: bool,
    /// It takes live frames now: the other end runs native XDP, too.
    pub takes_live: bool,
    /// Datagrams through it, both ways.
    pub traffic: Arc<Traffic>,
    /// When it was opened.
    pub opened: Instant,
    /// Some of its queues are zero copy.
    pub some_zero_copy: bool,
}

impl Carrier {
    /// Whether superframes of the other end come uncut, of which AF_XDP can make nothing.
    pub(crate) fn loses_superframes(&self) -> bool {
        self.generic && self.superframes
    }

    /// Whether what is sent in numbers leaves as live frames, if the choice is ours.
    pub(crate) fn sends_live(&self) -> bool {
        self.takes_live
    }
}
