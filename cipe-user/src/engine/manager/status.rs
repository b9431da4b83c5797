//! The status of tunnels, for those who ask.

use std::collections::BTreeMap;

use cipe_common::Verdict;
use cipe_common::maps::{Slot, key_index};

use super::doors::Doors;
use super::jobs::Outcome;
use super::keys::Keyring;
use super::lan::Lans;
use super::shared::Shared;
use crate::control::protocol::{Status, WorkerShare};
use crate::engine::tunnel::counters::Tally;
use crate::engine::worker::Command;

/// Starts the job that answers the status request of a connection: the workers count their losses first.
pub(super) fn begin(connection: u64, numbers: Vec<u16>, shared: &mut Shared) {
    // They answer when they are done with the batch at hand: the answer counts all that has left this host before the question. A
    // worker that gets no CPU for so long leaves its losses for the next status.
    let counted = shared.platform.workers.ask_all(|_, done| Command::CountLosses(done));
    shared.jobs.start(async move {
        counted.in_time().await;
        Outcome::Counted { connection, numbers }
    });
}

/// The rooms that a status is made from.
pub(super) struct StatusSources<'a> {
    pub shared: &'a Shared,
    pub keys: &'a Keyring,
    pub doors: &'a Doors,
    pub lans: &'a Lans,
}

impl StatusSources<'_> {
    /// The status of a tunnel; `None` if it has gone.
    pub(super) fn of(&self, number: u16) -> Option<Status> {
        let Shared { platform, tunnels, .. } = self.shared;
        let tenant = tunnels.get(number)?;
        let in_programs = platform.verdicts(number)?;
        let (verdicts, workers) = counts(&in_programs, &tenant.counters, |worker| platform.workers.helped(worker));
        let reader = self.keys.reader();
        let slots =
            [(Slot::Static, "static"), (Slot::Send, "send"), (Slot::Receive, "receive"), (Slot::Previous, "previous")];
        let live = |slot| reader.read(key_index(number.into(), slot)).is_some();
        let age = |slot| self.keys.age(number, slot).map(|age| age.as_secs());
        let mut doors = tenant.notes.clone();
        doors.extend(self.doors.carrier_note(tenant));
        doors.extend(tenant.door.clone());
        doors.extend(tenant.carrier_socket.segmentation().note());
        doors.extend(self.lans.note(number));
        Some(Status {
            device: tenant.device.name.clone(),
            name: tenant.name.clone(),
            orphaned_seconds: tenant.orphaned.map(|since| since.elapsed().as_secs()),
            protocol: tenant.protocol,
            cipher: tenant.cipher,
            me: tenant.me,
            peer: tenant.peer,
            keys: slots.iter().filter(|(slot, _)| live(*slot)).map(|(_, name)| (*name).to_owned()).collect(),
            key_seconds: slots.iter().filter_map(|(slot, name)| Some(((*name).to_owned(), age(*slot)?))).collect(),
            sealed: tenant.sealed.as_ref().map(|sealed| sealed.status()),
            verdicts,
            octets: tenant.counters.octets(),
            doors,
            lacks: platform.lacks.iter().map(ToString::to_string).collect(),
            workers,
        })
    }
}

/// The packets by verdict, without zeros, and the share of each worker. Workers go on counting meanwhile, so each counter is read once:
/// the shares add up to the packets.
fn counts(
    in_programs: &[u64; Verdict::COUNT],
    tally: &Tally,
    helped: impl Fn(usize) -> u64,
) -> (BTreeMap<String, u64>, Vec<WorkerShare>) {
    let control = tally.of_control().all();
    let mut sums: [u64; Verdict::COUNT] = std::array::from_fn(|verdict| in_programs[verdict] + control[verdict]);
    let share = |worker| {
        let counted = tally.of_worker(worker).all();
        sums.iter_mut().zip(counted).for_each(|(sum, count)| *sum += count);
        let [sent, delivered] = [Verdict::Sent, Verdict::Delivered].map(|verdict| counted[verdict as usize]);
        WorkerShare { sent, delivered, helped: helped(worker) }
    };
    let workers = (0..tally.workers()).map(share).collect();
    let of = |verdict: &Verdict| (verdict.name().to_owned(), sums[*verdict as usize]);
    (Verdict::ALL.iter().map(of).filter(|(_, count)| *count > 0).collect(), workers)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn what_programs_workers_and_the_control_thread_have_counted_is_added() {
        let (tally, mut in_programs) = (Tally::new(2), [0; Verdict::COUNT]);
        in_programs[Verdict::Replayed as usize] = 100;
        (0..2).for_each(|worker| tally.of_worker(worker).count_all(Verdict::Replayed, 10));
        tally.of_control().count(Verdict::Replayed);
        assert_eq!(counts(&in_programs, &tally, |_| 0).0, [("replayed".to_owned(), 121)].into());
    }

    #[test]
    fn the_shares_of_the_workers_add_up_to_the_packets_while_these_count() {
        let (tally, ends) = (Tally::new(2), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ends.load(Ordering::Relaxed) {
                    tally.of_worker(1).count(Verdict::Sent);
                }
            });
            for _ in 0..100_000 {
                let (verdicts, workers) = counts(&[0; Verdict::COUNT], &tally, |_| 0);
                let sent = workers.iter().map(|share| share.sent).sum::<u64>();
                if verdicts.get("sent").copied().unwrap_or(0) != sent {
                    ends.store(true, Ordering::Relaxed);
                    panic!("{verdicts:?}, {workers:?}");
                }
            }
            ends.store(true, Ordering::Relaxed);
        });
    }
}
