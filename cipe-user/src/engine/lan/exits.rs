//! A worker's copy of the table, and a cache of its results.

use std::net::IpAddr;
use std::sync::Arc;

use super::table::{Exit, LanTable};

/// Number of cached flows, if their hashes differ.
const CACHE_SLOTS: usize = 1024;

#[derive(Clone)]
struct Answer {
    tunnel: u16,
    source: IpAddr,
    destination: IpAddr,
    exit: Option<Exit>,
}

/// The table, and the cache.
pub struct Exits {
    table: Arc<LanTable>,
    answers: Box<[Option<Answer>]>,
}

impl Default for Exits {
    fn default() -> Self {
        Self { table: Arc::default(), answers: vec![None; CACHE_SLOTS].into() }
    }
}

impl Exits {
    /// Replaces the table.
    pub fn set(&mut self, table: Arc<LanTable>) {
        self.table = table;
        self.answers.fill(None);
    }

    /// Whether no packets leave directly.
    pub fn is_empty(&self) -> bool {
        self.table.is_empty()
    }

    /// As [`LanTable::exit`], and records that the neighbour is in use.
    pub fn find(&mut self, tunnel: u16, source: IpAddr, destination: IpAddr) -> Option<Exit> {
        let slot = &mut self.answers[hash(source, destination) % CACHE_SLOTS];
        let known = slot
            .as_ref()
            .filter(|answer| answer.tunnel == tunnel && answer.source == source && answer.destination == destination);
        let exit = match known {
            Some(answer) => answer.exit,
            None => {
                let exit = self.table.exit(tunnel, source, destination);
                *slot = Some(Answer { tunnel, source, destination, exit });
                exit
            }
        };
        self.table.note_use(exit.as_ref()?);
        exit
    }
}

fn hash(source: IpAddr, destination: IpAddr) -> usize {
    let bits = |address| match address {
        IpAddr::V4(ip) => u64::from(ip.to_bits()),
        IpAddr::V6(ip) => {
            let bits = ip.to_bits();
            (bits >> 64) as u64 ^ bits as u64
        }
    };
    // Fibonacci hashing: the high bits of the product depend on all bits of the factor.
    let mixed = (bits(source).rotate_left(32) ^ bits(destination)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed >> 40) as usize
}
