//! Notices to daemons of dropped datagrams that the operator should know of: those that came into their own tunnel, and those of
//! impossible lengths.

use std::time::Instant;

use cipe_common::Verdict;

use super::loops::{self, PeerRoute};
use super::platform::Platform;
use super::shared::Shared;
use super::tunnels::Tunnels;
use crate::repeats::has_doubled;

/// Tunnels whose counters one poll reads, on average.
const TUNNELS_PER_POLL: usize = 64;

/// Polls in which each tunnel has its turn once, at the least.
const MIN_TURNS: usize = 4;

/// Watches the counters of drops.
#[derive(Default)]
pub(super) struct DropNotices {
    /// The turn of the last poll: the tunnels whose number leaves this remainder.
    turn: usize,
}

impl DropNotices {
    /// Reads the counters of some tunnels, and tells their daemons of drops. Lengths are told of when their number has doubled since
    /// the last notice. What the programs drop has no length any more.
    pub(super) fn poll(&mut self, now: Instant, shared: &mut Shared) {
        // A part each time, and each tunnel every two seconds at most: reading costs system calls, and an idle engine should cost
        // nothing.
        let turns = shared.tunnels.len().div_ceil(TUNNELS_PER_POLL).max(MIN_TURNS);
        self.turn = (self.turn + 1) % turns;
        let Shared { tunnels, platform, daemons, .. } = shared;
        for (number, line) in notices(tunnels, platform, |number| usize::from(number) % turns == self.turn, now) {
            daemons.notice(number, line);
        }
    }
}

/// What is to be told of which tunnel.
fn notices(
    tunnels: &mut Tunnels,
    platform: &Platform,
    has_turn: impl Fn(u16) -> bool,
    now: Instant,
) -> Vec<(u16, String)> {
    let mut lines = Vec::new();
    for (number, tenant) in tunnels.iter_mut().filter(|(number, _)| has_turn(*number)) {
        let Some(in_programs) = platform.verdicts(number) else { continue };
        if tenant.loops.is_news(in_programs[Verdict::RouteLoop as usize], now)
            && let Some(target) = tenant.target()
        {
            lines.push((number, loops::inward_notice(target, tenant.protocol)));
        }
        // If the look-up of the route shows the loop, the daemon was told then.
        if tenant.rounds.is_news(tenant.counters.of(Verdict::RouteLoop), now)
            && tenant.leads != PeerRoute::Round
            && let Some(target) = tenant.target()
        {
            lines.push((number, loops::round_notice(target)));
        }
        let counts = (in_programs[Verdict::BadLength as usize], tenant.counters.of(Verdict::BadLength));
        let (total, told) = (counts.0 + counts.1, tenant.bogus.0 + tenant.bogus.1);
        if !has_doubled(total, told) {
            continue;
        }
        lines.push(match counts.1 > tenant.bogus.1 {
            true => (number, format!("got bogus length={}; {total} so far", tenant.counters.bogus_length())),
            false => (number, format!("got bogus length, dropped by XDP; {total} so far")),
        });
        tenant.bogus = counts;
    }
    lines
}
