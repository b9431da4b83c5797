//! The status of tunnels, for those who ask.

use cipe_common::Verdict;
use cipe_common::maps::{Slot, key_index};

use super::doors::Doors;
use super::jobs::Outcome;
use super::keys::Keyring;
use super::lan::Lans;
use super::shared::Shared;
use super::tunnels::Tenant;
use crate::control::protocol::{Status, WorkerShare};
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
            sealed: None,
            verdicts,
            octets: tenant.counters.octets(),
            doors,
            lacks: platform.lacks.iter().map(ToString::to_string).collect(),
            workers: (0..platform.workers.count()).map(|worker| self.share(tenant, worker)).collect(),
        })
    }

    fn share(&self, tenant: &Tenant, worker: usize) -> WorkerShare {
        let counters = tenant.counters.of_worker(worker);
        let (sent, delivered) = (counters.of(Verdict::Sent), counters.of(Verdict::Delivered));
        WorkerShare { sent, delivered, helped: self.shared.platform.workers.helped(worker) }
    }
}
