//! The engine that stands by: it has all that takes time to make, and takes the place of this one when this one dies. A daemon starts
//! it, since a confined engine executes nothing. This room decides when one is wanted.

use std::time::{Duration, Instant};

use super::shared::Shared;
use crate::control::protocol::Event;

/// Environment variable: how many seconds an engine with tunnels waits before another one is to stand by, or `no`.
const VARIABLE: &str = "CIPE_STANDBY";
/// The usual time: an engine that lives shortly needs none, and other programs start at the same time after a boot.
const DELAY: Duration = Duration::from_secs(10);
/// How long until the next one is asked for, if none came.
const RETRY: Duration = Duration::from_secs(600);

/// When an engine that stands by is wanted.
pub(super) struct Standby {
    /// `None`: never.
    delay: Option<Duration>,
    /// `None`: there is one, or no tunnel.
    due: Option<Instant>,
}

impl Standby {
    /// As the environment says.
    ///
    /// # Errors
    /// The value of the variable is not a number of seconds and not `no`.
    pub(super) fn from_environment() -> anyhow::Result<Self> {
        let value = std::env::var(VARIABLE).unwrap_or_default();
        Ok(Self { delay: delay(&value)?, due: None })
    }

    /// There is one now, perhaps for less than the time between two polls.
    pub(super) fn came(&mut self) {
        self.due = None;
    }

    /// Asks a daemon to start one if it is time.
    pub(super) fn poll(&mut self, now: Instant, shared: &Shared) {
        let Some(delay) = self.delay else { return };
        let open = shared.tunnels.iter().find(|(_, tenant)| tenant.is_open && tenant.orphaned.is_none());
        let Some((number, _)) = open.filter(|_| !shared.daemons.has_successor()) else {
            self.due = None;
            return;
        };
        if *self.due.get_or_insert(now + delay) <= now {
            self.due = Some(now + RETRY);
            shared.daemons.tell(number, Event::StandbyWanted);
        }
    }
}

fn delay(value: &str) -> anyhow::Result<Option<Duration>> {
    match (value, value.parse()) {
        ("", _) => Ok(Some(DELAY)),
        ("no", _) => Ok(None),
        (_, Ok(seconds)) => Ok(Some(Duration::from_secs(seconds))),
        _ => anyhow::bail!("{VARIABLE}: `{value}` is not a number of seconds, and not `no`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_says_when_or_never() {
        assert_eq!(delay("").unwrap(), Some(DELAY));
        assert_eq!(delay("0").unwrap(), Some(Duration::ZERO));
        assert_eq!(delay("no").unwrap(), None);
        assert!(delay("soon").unwrap_err().to_string().contains("`soon`"));
    }
}
