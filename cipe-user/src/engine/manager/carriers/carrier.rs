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
    /// The modes got, for people.
    pub note: String,
    /// Its name when it was opened.
    pub name: String,
    /// The tunnels that use it.
    pub tunnels: BTreeSet<u16>,
    /// Id of the XDP program that was attached; `None`: unknown.
    pub program: Option<u32>,
    /// It has generic XDP.
    pub generic: bool,
    /// It might deliver superframes without XDP; native XDP makes the other end cut them.
    pub superframes: bool,
    /// The workers can send live frames on it, while it takes them.
    pub can_live: bool,
    /// It takes live frames now: its other end has native XDP, too.
    pub takes_live: bool,
    /// The count of datagrams through it, both ways.
    pub traffic: Arc<Traffic>,
    /// When it was opened.
    pub opened: Instant,
    /// Some of its queues are zero copy.
    pub some_zero_copy: bool,
}

impl Carrier {
    /// Whether superframes of the other end come uncut, which AF_XDP cannot take apart.
    pub(crate) fn loses_superframes(&self) -> bool {
        self.generic && self.superframes
    }

    /// Whether datagrams that are sent in numbers leave as live frames, for a tunnel without a `carrier` option.
    pub(crate) fn sends_live(&self) -> bool {
        self.takes_live
    }
}
