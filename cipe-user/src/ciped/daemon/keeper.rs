//! Keeps what the daemon knows of the peer's messages in the tunnel's file.

use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::Daemon;
use crate::ciped::exchange::TakenKeys;
use crate::ciped::memory::{Memory, MemoryFile};
use crate::ciped::session::Past;
use crate::control::run_dir;

/// Least time between two writes.
const INTERVAL: Duration = Duration::from_secs(1);

/// What is known at some time: the newest stamp, the number of keys, and whether the peer runs this program.
type Known = (Option<u32>, usize, bool);

/// What is known of a peer that nothing came from.
const NOTHING: Known = (None, 0, false);

/// Writes the file in the background.
pub(super) struct Keeper {
    file: MemoryFile,
    written: Known,
    /// When the next write may begin.
    next: Instant,
    writing: Option<JoinHandle<anyhow::Result<()>>>,
    /// The last write failed, which was logged.
    fails: bool,
    /// The file was there: if it is gone, somebody has asked to forget.
    was_there: bool,
}

impl Keeper {
    /// Reads the file of the tunnel. What cannot be read is as if it were new.
    pub(super) fn open(file: MemoryFile, salt: [u8; 16]) -> (Self, Past) {
        let memory = file.read().unwrap_or_else(|error| {
            tracing::warn!("what the last daemon knew is lost: {error:#}; recorded key exchanges of the peer may be taken once more");
            None
        });
        let was_there = memory.is_some();
        let is_named = memory.as_ref().is_some_and(|memory| memory.tunnel.is_some());
        let newest_stamp = memory.as_ref().and_then(|memory| memory.newest_stamp);
        let is_ours = memory.as_ref().is_some_and(|memory| memory.is_ours);
        let taken = memory.and_then(|memory| memory.taken_keys()).unwrap_or_else(|| TakenKeys::new(salt));
        // A file of a former version does not say whose it is; it will.
        let written = if is_named { (newest_stamp, taken.len(), is_ours) } else { NOTHING };
        let keeper = Self { file, written, next: Instant::now(), writing: None, fails: false, was_there };
        (keeper, Past { newest_stamp, taken, is_ours })
    }

    /// When [`Daemon::keep`] is due.
    pub(super) fn deadline(&self, known: Known) -> Option<Instant> {
        (known != self.written).then_some(self.next)
    }
}

impl Daemon {
    fn known(&self) -> Known {
        (self.session.newest_stamp(), self.session.taken_keys().len(), self.session.is_ours())
    }

    /// When there is something to write.
    pub(super) fn keep_deadline(&self) -> Option<Instant> {
        self.keeper.deadline(self.known())
    }

    /// Writes the file if that is due, and no write is under way.
    pub(super) async fn keep(&mut self) {
        let (known, now) = (self.known(), Instant::now());
        if self.keeper.deadline(known).is_none_or(|at| at > now) {
            return;
        }
        self.keeper.next = now + INTERVAL;
        if self.keeper.writing.as_ref().is_some_and(|writing| !writing.is_finished()) {
            return;
        }
        self.end_write().await;
        let mut memory = Memory::new(&self.facts.device, known.0, self.session.taken_keys());
        memory.is_ours = known.2;
        (memory.tunnel, memory.namespace) = (Some(self.setup.identity()), run_dir::namespace().ok());
        let file = self.keeper.file.clone();
        self.keeper.written = known;
        self.keeper.writing = Some(tokio::task::spawn_blocking(move || file.write(&memory)));
    }

    /// Writes what is new, at the end.
    pub(super) async fn keep_last(&mut self) {
        self.end_write().await;
        self.keeper.next = Instant::now();
        self.keep().await;
        self.end_write().await;
    }

    async fn end_write(&mut self) {
        let Some(writing) = self.keeper.writing.take() else { return };
        let written = writing.await.map_err(anyhow::Error::from).flatten();
        match written {
            Ok(()) => (self.keeper.fails, self.keeper.was_there) = (false, true),
            Err(error) => {
                // So that the next look tries again.
                self.keeper.written = NOTHING;
                if std::mem::replace(&mut self.keeper.fails, true) {
                    return;
                }
                tracing::warn!(
                    "{}: cannot keep what is known of the peer's key exchanges: {error:#}; after a restart recorded ones may be taken",
                    self.facts.device
                );
            }
        }
    }

    /// Forgets the newest stamp if somebody has removed the file.
    pub(super) fn forget_if_asked(&mut self) {
        // The file that was removed may be the one that was written last.
        if self.keeper.writing.as_ref().is_some_and(JoinHandle::is_finished) {
            self.end_write().now_or_never();
        }
        if std::mem::take(&mut self.keeper.was_there) {
            if self.keeper.file.exists() {
                self.keeper.was_there = true;
            } else {
                tracing::info!(
                    "{}: {} was removed: the peer's clock may have any time",
                    self.facts.device,
                    self.keeper.file.path().display()
                );
                self.session.forget_stamps();
                self.keeper.written = NOTHING;
            }
        }
    }
}
