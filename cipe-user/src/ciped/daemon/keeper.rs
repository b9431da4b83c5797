//! Keeps what the daemon knows of the peer's messages in the tunnel's file.

use std::time::Duration;

use futures_util::FutureExt as _;
use rand::{CryptoRng, RngExt as _};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::Daemon;
use crate::ciped::exchange::TakenKeys;
use crate::ciped::memory::{Memory, MemoryFile};
use crate::ciped::session::{Past, Step};
use crate::control::run_dir;
use crate::control::small_file::Flush;
use crate::sealed::handshake::Kept;

/// Least time between two writes.
const INTERVAL: Duration = Duration::from_secs(1);

/// What is known at some time: the newest stamp, the number of keys, and whether the peer runs this program.
type Known = (Option<u32>, usize, bool);

/// What is known of a peer that nothing came from.
const NOTHING: Known = (None, 0, false);

/// Writes the file in the background.
pub(super) struct Keeper {
    file: MemoryFile,
    /// Of handshakes, also of those before a start with `sealed no`.
    sealed: Option<Kept>,
    written: Known,
    /// The last write has not waited for the disk, so that another one is to follow that does.
    is_unflushed: bool,
    /// When the next write may begin.
    next: Instant,
    writing: Option<JoinHandle<anyhow::Result<()>>>,
    /// The last write failed, which was logged.
    fails: bool,
    /// The file was there: if it is gone, somebody has asked to forget.
    was_there: bool,
}

impl Keeper {
    /// Reads the file of the tunnel. What cannot be read is as if it were new, but for this: the peer counts as one that was sealed, since
    /// that may have been in it.
    pub(super) fn open(file: MemoryFile, unix_nanos: u64, rng: &mut impl CryptoRng) -> (Self, Past) {
        let (memory, lost) = match file.read() {
            Ok(memory) => (memory, None),
            Err(error) => {
                tracing::warn!(
                    "what the last daemon knew is lost: {error:#}; recorded key exchanges of the peer may be taken once more, and with \
                     `sealed auto` nothing but sealed packets is used; if the peer was never sealed, remove the file with `cipe forget`"
                );
                (None, Some(Kept { was_sealed: true, ..Kept::without_file(unix_nanos, rng) }))
            }
        };
        let was_there = memory.is_some() || lost.is_some();
        let is_named = memory.as_ref().is_some_and(|memory| memory.tunnel.is_some());
        let newest_stamp = memory.as_ref().and_then(|memory| memory.newest_stamp);
        let is_ours = memory.as_ref().is_some_and(|memory| memory.is_ours);
        let sealed = memory.as_ref().map_or(lost, |memory| memory.sealed);
        let taken = memory.and_then(|memory| memory.taken_keys()).unwrap_or_else(|| TakenKeys::new(rng.random()));
        // A file of a former version does not say whose it is; it will.
        let written = if is_named { (newest_stamp, taken.len(), is_ours) } else { NOTHING };
        let next = Instant::now();
        let keeper = Self { file, sealed, written, is_unflushed: false, next, writing: None, fails: false, was_there };
        (keeper, Past { newest_stamp, taken, is_ours, sealed })
    }

    /// When [`Daemon::keep`] is due.
    pub(super) fn deadline(&self, known: Known) -> Option<Instant> {
        (known != self.written || self.is_unflushed).then_some(self.next)
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

    /// Writes the file if that is due, and no write is under way. Returns what follows if somebody has asked to forget.
    pub(super) async fn keep(&mut self) -> Vec<Step> {
        let now = Instant::now();
        if self.keep_deadline().is_none_or(|at| at > now) {
            return Vec::new();
        }
        self.keeper.next = now + INTERVAL;
        if self.keeper.writing.as_ref().is_some_and(|writing| !writing.is_finished()) {
            return Vec::new();
        }
        self.end_write().await;
        let forgotten = self.forget_if_asked();
        let (file, memory) = (self.keeper.file.clone(), self.memory());
        (self.keeper.written, self.keeper.is_unflushed) = (self.known(), false);
        self.keeper.writing = Some(tokio::task::spawn_blocking(move || file.write(&memory, Flush::Yes)));
        forgotten.unwrap_or_default()
    }

    /// Keeps what is known of handshakes, before an answer is sent, so without waiting for the disk. Returns what follows if somebody has
    /// asked to forget: then there is nothing to keep.
    pub(super) async fn keep_sealed(&mut self, kept: Kept) -> Vec<Step> {
        // A former write must not take the place of this one.
        self.end_write().await;
        if let Some(steps) = self.forget_if_asked() {
            return steps;
        }
        self.keeper.sealed = Some(kept);
        (self.keeper.written, self.keeper.is_unflushed) = (self.known(), true);
        let written = self.keeper.file.write(&self.memory(), Flush::No);
        self.wrote(written);
        Vec::new()
    }

    fn memory(&self) -> Memory {
        let (newest_stamp, _, is_ours) = self.known();
        let mut memory = Memory::new(&self.facts.device, newest_stamp, self.session.taken_keys());
        (memory.is_ours, memory.sealed) = (is_ours, self.keeper.sealed);
        (memory.tunnel, memory.namespace) = (Some(self.setup.identity()), run_dir::namespace().ok());
        memory
    }

    /// Writes what is new, at the end.
    pub(super) async fn keep_last(&mut self) {
        self.end_write().await;
        self.keeper.next = Instant::now();
        self.keep().await;
        self.end_write().await;
    }

    async fn end_write(&mut self) {
        if let Some(writing) = self.keeper.writing.take() {
            let written = writing.await.map_err(anyhow::Error::from).flatten();
            self.wrote(written);
        }
    }

    fn wrote(&mut self, written: anyhow::Result<()>) {
        match written {
            Ok(()) => (self.keeper.fails, self.keeper.was_there) = (false, true),
            Err(error) => {
                // So that the next look tries again.
                self.keeper.written = NOTHING;
                if std::mem::replace(&mut self.keeper.fails, true) {
                    return;
                }
                tracing::warn!(
                    "{}: cannot keep what is known of the peer's key exchanges: {error:#}; after a restart recorded ones may be taken, and a \
                     peer that was sealed counts as one that was not",
                    self.facts.device
                );
            }
        }
    }

    /// Forgets the peer if somebody has removed the file, and returns what follows.
    pub(super) fn forget_if_asked(&mut self) -> Option<Vec<Step>> {
        // The file that was removed may be the one that was written last.
        if self.keeper.writing.as_ref().is_some_and(JoinHandle::is_finished) {
            self.end_write().now_or_never();
        }
        if !self.keeper.was_there || !self.keeper.file.is_removed() {
            return None;
        }
        tracing::info!(
            "{}: {} was removed: the peer's clock may have any time, and the peer counts as one that was never sealed",
            self.facts.device,
            self.keeper.file.path().display()
        );
        let keeper = &mut self.keeper;
        (keeper.was_there, keeper.sealed, keeper.written) = (false, None, NOTHING);
        Some(self.session.forget(self.clock.now()))
    }
}
