//! What is told of the tunnels to those who ask.

use std::time::Duration;

use cipe_common::Verdict;
use cipe_common::maps::{Slot, key_index};

use super::Manager;
use crate::control::protocol::{Event, Status};
use crate::engine::worker::Command;

impl Manager {
    /// Tells a connection the status of every tunnel.
    pub(super) fn tell_status(&self, connection: u64) {
        let (done, counted) = std::sync::mpsc::channel();
        self.worker.send(Command::CountLosses(done));
        // A worker that is too busy to answer leaves its last losses for the next status.
        let _ = counted.recv_timeout(Duration::from_millis(100));
        let mut numbers: Vec<u16> = self.tenants.keys().copied().collect();
        numbers.sort_unstable();
        let statuses: Vec<Status> = numbers.into_iter().filter_map(|number| self.status(number)).collect();
        let Some(events) = self.connections.get(&connection).map(|daemon| daemon.events.clone()) else {
            return;
        };
        // More than the queue holds: they go as fast as the reader takes them.
        tokio::spawn(async move {
            let events_of = statuses.into_iter().map(|status| Event::Status(Box::new(status)));
            for event in events_of.chain([Event::StatusEnd]) {
                if events.send(event).await.is_err() {
                    return;
                }
            }
        });
    }

    fn status(&self, number: u16) -> Option<Status> {
        let tenant = self.tenants.get(&number)?;
        let in_programs = self.programs.verdicts(number.into()).ok()?;
        let verdicts = Verdict::ALL
            .iter()
            .map(|verdict| (verdict.name().to_owned(), in_programs[*verdict as usize] + tenant.counters.of(*verdict)))
            .filter(|(_, count)| *count > 0)
            .collect();
        let reader = self.keys.reader();
        let slots =
            [(Slot::Static, "static"), (Slot::Send, "send"), (Slot::Receive, "receive"), (Slot::Previous, "previous")];
        let live = |slot| reader.read(key_index(number.into(), slot)).is_some();
        let mut doors = tenant.notes.clone();
        doors.extend(tenant.carrier.and_then(|carrier| self.carrier_note(carrier)).map(str::to_owned));
        Some(Status {
            device: tenant.device.name.clone(),
            cipher: tenant.cipher,
            me: tenant.me,
            peer: tenant.peer,
            keys: slots.iter().filter(|(slot, _)| live(*slot)).map(|(_, name)| (*name).to_owned()).collect(),
            verdicts,
            octets: tenant.counters.octets(),
            doors,
        })
    }
}
