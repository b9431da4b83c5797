//! Whether a socket's datagrams are sent in groups (`UDP_SEGMENT`), and what to do if such groups are lost.
//!
//! There are two faults. First, the kernel refuses a group but accepts its datagrams one by one: `EIO` if IPsec is on
//! the path, or on some kernels if the device has no checksum offload. This costs only a call. Second, a card, its
//! driver or a host below accepts the group and silently loses it. No counter of this host shows this; only the peer
//! knows. So the peer is asked now and then while groups are sent: by a group of CT_PINGs as large as full datagrams.
//! If there is no answer, a single CT_PING of the same size follows. Groups are given up only if the peer answers the
//! single one but not the group, [`MAX_LOST_GROUPS`] times in a row. A peer that is away, answers no CT_PING, or is
//! behind a lossy path does not look like that.
//!
//! After a while, groups are tried again: with data if the kernel refused them, because a refusal loses nothing; with
//! questions to the peer if they were lost.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

/// Maximum time for an answer. On a path with a longer round trip, questions have no effect.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Number of lost groups in a row, each with an answered single datagram, after which groups are given up.
const MAX_LOST_GROUPS: u32 = 3;

/// Interval between two questions while groups arrive.
const CHECK_INTERVAL: Duration = Duration::from_secs(10);

/// How long groups are given up: at first, and at most. The time doubles if they still do not arrive.
const MIN_RETRY_WAIT: Duration = Duration::from_secs(10);
const MAX_RETRY_WAIT: Duration = Duration::from_secs(640);

/// Octets of the mark in a question, which the answer copies: the number of the question, and whether it was a group.
pub(super) const MARK: usize = 9;

/// The mark of a question.
pub(super) type Mark = [u8; MARK];

/// A question to the peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Several CT_PINGs in one group, with this mark.
    Group(Mark),
    /// A single CT_PING.
    Alone(Mark),
}

/// A change, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentationChange {
    /// The kernel refuses groups.
    Refused(Errno, Duration),
    /// Groups are lost.
    Lost(Duration),
    /// Groups are sent again.
    Works,
}

impl SegmentationChange {
    /// Returns a line for the log, and whether it is good news.
    pub fn notice(self) -> (String, bool) {
        match self {
            Self::Refused(errno, wait) => {
                let (errno, wait) = (errno.desc(), wait.as_secs());
                (format!("the kernel refuses UDP_SEGMENT ({errno}): single datagrams, tried again in {wait} s"), false)
            }
            Self::Lost(wait) => {
                let what = "groups of datagrams (UDP_SEGMENT) do not arrive, and single datagrams do";
                let wait = wait.as_secs();
                let cure = "the card or its driver cannot segment UDP (ethtool -K DEVICE tx-udp-segmentation off)";
                (format!("{what}: single datagrams, tried again in {wait} s; {cure}"), false)
            }
            Self::Works => ("groups of datagrams (UDP_SEGMENT) arrive again".to_owned(), true),
        }
    }
}

/// The state of one socket, shared by all workers.
#[derive(Debug)]
pub struct Segmentation {
    /// Whether datagrams are sent in groups.
    works: AtomicBool,
    /// Number of groups sent.
    groups: AtomicU64,
    /// When to poll next, in ms since `start`.
    due: AtomicU64,
    start: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// First octets of this socket's marks.
    salt: u32,
    number: u32,
    question: Option<Question>,
    lost_groups: u32,
    /// Number of groups sent at the time of the last question.
    asked_at: u64,
    given_up: Option<GivenUp>,
    wait: Duration,
}

#[derive(Debug)]
struct Question {
    in_group: bool,
    answered: bool,
}

#[derive(Clone, Copy, Debug)]
struct GivenUp {
    /// The error, if the kernel refused groups.
    refused: Option<Errno>,
}

impl Segmentation {
    /// Creates the initial state: datagrams are sent in groups. `salt` must differ from that of other sockets.
    pub fn new(salt: u32, now: Instant) -> Self {
        let inner = Inner {
            salt,
            number: 0,
            question: None,
            lost_groups: 0,
            asked_at: 0,
            given_up: None,
            wait: MIN_RETRY_WAIT,
        };
        Self {
            works: AtomicBool::new(true),
            groups: AtomicU64::new(0),
            due: AtomicU64::new(0),
            start: now,
            inner: Mutex::new(inner),
        }
    }

    /// Whether datagrams are sent in groups.
    pub fn works(&self) -> bool {
        self.works.load(Ordering::Relaxed)
    }

    /// Counts a sent group.
    pub fn sent(&self) {
        self.groups.fetch_add(1, Ordering::Relaxed);
    }

    /// Records that the kernel refused a group but accepted its datagrams one by one.
    pub fn refused(&self, errno: Errno, now: Instant) -> SegmentationChange {
        let mut inner = self.inner();
        let wait = inner.give_up(Some(errno));
        self.works.store(false, Ordering::Relaxed);
        self.set_due(now + wait);
        SegmentationChange::Refused(errno, wait)
    }

    /// Forgets everything about groups, because the path to the peer has changed.
    pub fn start_over(&self) {
        let mut inner = self.inner();
        (inner.question, inner.lost_groups, inner.given_up, inner.wait) = (None, 0, None, MIN_RETRY_WAIT);
        self.works.store(true, Ordering::Relaxed);
        self.due.store(0, Ordering::Relaxed);
    }

    /// Whether a question is open. Call [`Segmentation::poll`] then, even if nothing is sent.
    pub fn is_asking(&self) -> bool {
        self.inner().question.is_some()
    }

    /// Returns the next question and a change, if any. Call it while sending.
    pub fn poll(&self, now: Instant) -> (Option<Ask>, Option<SegmentationChange>) {
        if self.ms(now) < self.due.load(Ordering::Relaxed) {
            return (None, None);
        }
        let mut inner = self.inner();
        // Another worker may have polled meanwhile.
        if self.ms(now) < self.due.load(Ordering::Relaxed) {
            return (None, None);
        }
        match (inner.given_up, inner.question.take()) {
            (Some(GivenUp { refused: Some(_), .. }), _) => {
                inner.given_up = None;
                self.works.store(true, Ordering::Relaxed);
                self.set_due(now + ANSWER_TIMEOUT);
                // No change is reported before a group has been accepted.
                (None, None)
            }
            (Some(_), None) => (Some(self.ask(&mut inner, true, now)), None),
            // The question about groups is still not answered.
            (Some(_), Some(_)) => {
                let wait = inner.give_up(None);
                self.set_due(now + wait);
                (None, None)
            }
            (None, None) => {
                let groups = self.groups.load(Ordering::Relaxed);
                if groups == inner.asked_at {
                    return (None, None);
                }
                inner.asked_at = groups;
                (Some(self.ask(&mut inner, true, now)), None)
            }
            (None, Some(Question { in_group: true, .. })) => (Some(self.ask(&mut inner, false, now)), None),
            (None, Some(Question { in_group: false, answered: true })) => {
                inner.lost_groups += 1;
                if inner.lost_groups < MAX_LOST_GROUPS {
                    return (Some(self.ask(&mut inner, true, now)), None);
                }
                let wait = inner.give_up(None);
                self.works.store(false, Ordering::Relaxed);
                self.set_due(now + wait);
                (None, Some(SegmentationChange::Lost(wait)))
            }
            (None, Some(Question { in_group: false, answered: false })) => {
                inner.lost_groups = 0;
                self.set_due(now + CHECK_INTERVAL);
                (None, None)
            }
        }
    }

    /// Handles the data of a CT_PONG. Returns `None` if it does not answer a question of ours.
    pub fn answered(&self, data: &[u8], now: Instant) -> Option<Option<SegmentationChange>> {
        let mut inner = self.inner();
        let mark: &Mark = data.first_chunk()?;
        if mark[..4] != inner.salt.to_be_bytes() {
            return None;
        }
        if mark[8] == 0 {
            // An answer to a single datagram counts for the open question only.
            let is_open = mark[4..8] == inner.number.to_be_bytes();
            if let Some(question) = inner.question.as_mut().filter(|question| is_open && !question.in_group) {
                question.answered = true;
            }
            return Some(None);
        }
        // An answer to any group means that groups arrive.
        let had_given_up = inner.given_up.take_if(|given_up| given_up.refused.is_none()).is_some();
        (inner.question, inner.lost_groups, inner.wait) = (None, 0, MIN_RETRY_WAIT);
        if inner.given_up.is_none() {
            self.works.store(true, Ordering::Relaxed);
            self.set_due(now + CHECK_INTERVAL);
        }
        Some(had_given_up.then_some(SegmentationChange::Works))
    }

    /// Returns why no groups are sent, for the operator.
    pub fn note(&self) -> Option<String> {
        let given_up = self.inner().given_up?;
        Some(match given_up.refused {
            Some(errno) => format!("single datagrams, the kernel refuses UDP_SEGMENT: {}", errno.desc()),
            None => "single datagrams, groups (UDP_SEGMENT) do not arrive".to_owned(),
        })
    }

    fn ask(&self, inner: &mut Inner, in_group: bool, now: Instant) -> Ask {
        inner.number = inner.number.wrapping_add(1);
        inner.question = Some(Question { in_group, answered: false });
        self.set_due(now + ANSWER_TIMEOUT);
        let mut mark = [0; MARK];
        mark[..4].copy_from_slice(&inner.salt.to_be_bytes());
        mark[4..8].copy_from_slice(&inner.number.to_be_bytes());
        mark[8] = u8::from(in_group);
        if in_group { Ask::Group(mark) } else { Ask::Alone(mark) }
    }

    fn set_due(&self, at: Instant) {
        self.due.store(self.ms(at), Ordering::Relaxed);
    }

    fn ms(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.start).as_millis() as u64
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Gives groups up. Returns for how long; the next time is longer.
    fn give_up(&mut self, refused: Option<Errno>) -> Duration {
        let wait = self.wait;
        self.wait = (2 * wait).min(MAX_RETRY_WAIT);
        self.given_up = Some(GivenUp { refused });
        (self.question, self.lost_groups) = (None, 0);
        wait
    }
}

#[cfg(test)]
mod tests;
