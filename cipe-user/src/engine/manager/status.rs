//! What is told of the tunnels to those who ask.

use std::time::Instant;

use cipe_common::Verdict;
use cipe_common::maps::{Slot, key_index};

use super::loops::{self, PeerRoute};
use super::tunnels::Tenant;
use super::{Manager, Outcome};
use crate::control::protocol::{Status, WorkerShare};
use crate::engine::worker::Command;
use crate::repeats::has_doubled;

/// Tunnels whose counters are looked at in one go for what their daemons are told unasked.
const LOOKS: usize = 64;

/// Times that the manager looks at the clock until each tunnel has had its turn, at the least.
const LEAST_TURNS: usize = 4;

impl Manager {
    /// Tells a connection the status of every tunnel.
    pub(super) fn tell_status(&mut self, connection: u64) {
        let mut numbers = self.tunnels.numbers(|_| true);
        numbers.sort_unstable();
        self.tell_status_of(connection, numbers);
    }

    /// Tells a connection the status of these tunnels.
    pub(super) fn tell_status_of(&mut self, connection: u64, numbers: Vec<u16>) {
        // They answer when they are done with the batch at hand: what has left this host before the question is counted in the
        // answer. One that does not get the CPU for so long leaves it for the next status.
        let counted = self.platform.workers.ask_all(|_, done| Command::CountLosses(done));
        self.jobs.start(async move {
            counted.in_time().await;
            Outcome::Counted { connection, numbers }
        });
    }

    /// Tells a connection the status of these tunnels, whose losses are counted.
    pub(super) fn tell_counted(&self, connection: u64, numbers: Vec<u16>) {
        self.daemons.report(connection, numbers.into_iter().filter_map(|number| self.status(number)).collect());
    }

    /// Tells of datagrams that came into their own tunnel, and of datagrams of impossible lengths when there are twice as many
    /// as when it was told last. What the programs drop has lost its length.
    pub(super) fn tell_of_drops(&mut self, at: Instant) {
        let mut lines = Vec::new();
        // Some each time, and each every two seconds at most: a look costs system calls, and an idle engine should cost nothing.
        let turns = self.tunnels.len().div_ceil(LOOKS).max(LEAST_TURNS);
        self.turn = (self.turn + 1) % turns;
        for (number, tenant) in self.tunnels.iter_mut() {
            if usize::from(number) % turns != self.turn {
                continue;
            }
            let Some(in_programs) = self.platform.verdicts(number) else { continue };
            if tenant.loops.see(in_programs[Verdict::RouteLoop as usize], at)
                && let Some(target) = tenant.target()
            {
                lines.push((number, loops::line(target, tenant.protocol)));
            }
            // Where the look-up shows that the way goes round, that has been said.
            if tenant.rounds.see(tenant.counters.of(Verdict::RouteLoop), at)
                && tenant.leads != PeerRoute::Round
                && let Some(target) = tenant.target()
            {
                lines.push((number, loops::line_of_round(target)));
            }
            let now = (in_programs[Verdict::BadLength as usize], tenant.counters.of(Verdict::BadLength));
            let (total, told) = (now.0 + now.1, tenant.bogus.0 + tenant.bogus.1);
            if !has_doubled(total, told) {
                continue;
            }
            lines.push(match now.1 > tenant.bogus.1 {
                true => (number, format!("got bogus length={}; {total} so far", tenant.counters.bogus_length())),
                false => (number, format!("got bogus length, dropped by XDP; {total} so far")),
            });
            tenant.bogus = now;
        }
        for (number, line) in lines {
            self.daemons.notice(number, line);
        }
    }

    fn status(&self, number: u16) -> Option<Status> {
        let tenant = self.tunnels.get(number)?;
        let in_programs = self.platform.verdicts(number)?;
        let verdicts = Verdict::ALL
            .iter()
            .map(|verdict| (verdict.name().to_owned(), in_programs[*verdict as usize] + tenant.counters.of(*verdict)))
            .filter(|(_, count)| *count > 0)
            .collect();
        let reader = self.keys.reader();
        let slots =
            [(Slot::Static, "static"), (Slot::Send, "send"), (Slot::Receive, "receive"), (Slot::Previous, "previous")];
        let live = |slot| reader.read(key_index(number.into(), slot)).is_some();
        let age = |slot| self.keys.age(number, slot).map(|age| age.as_secs());
        let mut doors = tenant.notes.clone();
        doors.extend(self.carrier_note(tenant));
        doors.extend(tenant.door.clone());
        doors.extend(tenant.carrier_socket.segmentation().note());
        doors.extend(self.lans.note(number));
        Some(Status {
            device: tenant.device.name.clone(),
            protocol: tenant.protocol,
            cipher: tenant.cipher,
            me: tenant.me,
            peer: tenant.peer,
            keys: slots.iter().filter(|(slot, _)| live(*slot)).map(|(_, name)| (*name).to_owned()).collect(),
            key_seconds: slots.iter().filter_map(|(slot, name)| Some(((*name).to_owned(), age(*slot)?))).collect(),
            verdicts,
            octets: tenant.counters.octets(),
            doors,
            lacks: self.platform.lacks.iter().map(ToString::to_string).collect(),
            workers: (0..self.platform.workers.count()).map(|worker| self.share(tenant, worker)).collect(),
        })
    }

    fn share(&self, tenant: &Tenant, worker: usize) -> WorkerShare {
        let counters = tenant.counters.of_worker(worker);
        let (sent, delivered) = (counters.of(Verdict::Sent), counters.of(Verdict::Delivered));
        WorkerShare { sent, delivered, helped: self.platform.workers.helped(worker) }
    }
}
