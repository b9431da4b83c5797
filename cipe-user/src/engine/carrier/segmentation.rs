//! Whether a socket's datagrams leave in groups (`UDP_SEGMENT`), and what is done where such groups do not arrive.
//!
//! Two things go wrong. The kernel refuses a group that it takes datagram by datagram: `EIO` where IPsec is on the path, or the
//! device cannot complete checksums on some kernels. That costs nothing but a call. Or a card, its driver or a host below takes
//! the group and loses it, without a word. No counter of this host tells; only the peer knows. So it is asked now and then,
//! while groups leave: by a group of CT_PINGs as large as full datagrams. If no answer comes, one CT_PING of the same size goes
//! alone. Only where the peer answers that one, and not the group, and does so [`STRIKES`] times in a row, groups are given up:
//! a peer that is away, answers no CT_PING, or is behind a line that loses much, does not look like that.
//!
//! What was given up is tried again later: what the kernel refused by data, which it refuses again at no loss, and what was lost
//! by asking the peer first.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

/// How long an answer may take. A line with a longer round trip tells nothing either way.
const ANSWER: Duration = Duration::from_secs(1);

/// Groups unanswered in a row, each with a datagram alone that is answered, until groups are given up.
const STRIKES: u32 = 3;

/// Between two questions while groups arrive.
const CHECK: Duration = Duration::from_secs(10);

/// How long groups are given up for, at first and at most; it doubles where they still do not arrive.
const LEAST_WAIT: Duration = Duration::from_secs(10);
const MOST_WAIT: Duration = Duration::from_secs(640);

/// Octets of a question's mark, which its answer copies: which question, and whether it went in a group.
pub(super) const MARK: usize = 9;

/// A question's mark.
pub(super) type Mark = [u8; MARK];

/// What is to be asked of the peer now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Some CT_PINGs in one group, with this mark.
    Group(Mark),
    /// One alone.
    Alone(Mark),
}

/// What has changed, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SegmentationChange {
    /// The kernel refuses groups.
    Refused(Errno, Duration),
    /// Groups do not arrive.
    Lost(Duration),
    /// Groups are sent again.
    Works,
}

impl SegmentationChange {
    /// A line for the log, and whether it is good news.
    pub fn notice(self) -> (String, bool) {
        match self {
            Self::Refused(errno, wait) => {
                let (errno, wait) = (errno.desc(), wait.as_secs());
                (format!("the kernel refuses UDP_SEGMENT ({errno}): single datagrams, tried again in {wait} s"), false)
            }
            Self::Lost(wait) => {
                let what = "what leaves by UDP_SEGMENT does not arrive, and single datagrams do";
                let wait = wait.as_secs();
                let cure = "the card or its driver cannot cut UDP (ethtool -K DEVICE tx-udp-segmentation off)";
                (format!("{what}: single datagrams, tried again in {wait} s; {cure}"), false)
            }
            Self::Works => ("what leaves by UDP_SEGMENT arrives again".to_owned(), true),
        }
    }
}

/// Of one socket, whichever worker sends by it.
#[derive(Debug)]
pub struct Segmentation {
    /// Groups leave as such.
    works: AtomicBool,
    /// Groups sent.
    groups: AtomicU64,
    /// When there is something to do at the earliest, in ms since `start`.
    due: AtomicU64,
    start: Instant,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// Begins the marks of this socket's questions.
    salt: u32,
    number: u32,
    question: Option<Question>,
    strikes: u32,
    /// Groups sent when the peer was asked last.
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
    /// Why, if it was the kernel.
    refused: Option<Errno>,
}

impl Segmentation {
    /// Groups leave until something is known against it. `salt` is any number that other sockets do not have.
    pub fn new(salt: u32, now: Instant) -> Self {
        let inner =
            Inner { salt, number: 0, question: None, strikes: 0, asked_at: 0, given_up: None, wait: LEAST_WAIT };
        Self {
            works: AtomicBool::new(true),
            groups: AtomicU64::new(0),
            due: AtomicU64::new(0),
            start: now,
            inner: Mutex::new(inner),
        }
    }

    /// Whether groups leave as such.
    pub fn works(&self) -> bool {
        self.works.load(Ordering::Relaxed)
    }

    /// A group has left.
    pub fn sent(&self) {
        self.groups.fetch_add(1, Ordering::Relaxed);
    }

    /// The kernel refused a group whose datagrams it took one by one.
    pub fn refused(&self, errno: Errno, now: Instant) -> SegmentationChange {
        let mut inner = self.inner();
        let wait = inner.give_up(Some(errno));
        self.works.store(false, Ordering::Relaxed);
        self.set_due(now + wait);
        SegmentationChange::Refused(errno, wait)
    }

    /// The way to the peer is another one: what was known of groups is of the one before.
    pub fn start_over(&self) {
        let mut inner = self.inner();
        (inner.question, inner.strikes, inner.given_up, inner.wait) = (None, 0, None, LEAST_WAIT);
        self.works.store(true, Ordering::Relaxed);
        self.due.store(0, Ordering::Relaxed);
    }

    /// Whether an answer is waited for: [`Segmentation::tend`] is to be called then, whether anything leaves or not.
    pub fn is_asking(&self) -> bool {
        self.inner().question.is_some()
    }

    /// What is to be done now, if anything: to be called while something leaves.
    pub fn tend(&self, now: Instant) -> (Option<Ask>, Option<SegmentationChange>) {
        if self.ms(now) < self.due.load(Ordering::Relaxed) {
            return (None, None);
        }
        let mut inner = self.inner();
        // Another worker may have come first.
        if self.ms(now) < self.due.load(Ordering::Relaxed) {
            return (None, None);
        }
        match (inner.given_up, inner.question.take()) {
            (Some(GivenUp { refused: Some(_), .. }), _) => {
                inner.given_up = None;
                self.works.store(true, Ordering::Relaxed);
                self.set_due(now + ANSWER);
                // No change to tell of before a group has been taken.
                (None, None)
            }
            (Some(_), None) => (Some(self.ask(&mut inner, true, now)), None),
            // Still nothing: an answer would have ended this.
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
                inner.strikes += 1;
                if inner.strikes < STRIKES {
                    return (Some(self.ask(&mut inner, true, now)), None);
                }
                let wait = inner.give_up(None);
                self.works.store(false, Ordering::Relaxed);
                self.set_due(now + wait);
                (None, Some(SegmentationChange::Lost(wait)))
            }
            (None, Some(Question { in_group: false, answered: false })) => {
                inner.strikes = 0;
                self.set_due(now + CHECK);
                (None, None)
            }
        }
    }

    /// Takes up the data of a CT_PONG; `None` if it answers no question of ours.
    pub fn answered(&self, data: &[u8], now: Instant) -> Option<Option<SegmentationChange>> {
        let mut inner = self.inner();
        let mark: &Mark = data.first_chunk()?;
        if mark[..4] != inner.salt.to_be_bytes() {
            return None;
        }
        if mark[8] == 0 {
            // Alone: of use for the question that is open only.
            let is_open = mark[4..8] == inner.number.to_be_bytes();
            if let Some(question) = inner.question.as_mut().filter(|question| is_open && !question.in_group) {
                question.answered = true;
            }
            return Some(None);
        }
        // Whenever it was asked: groups arrive.
        let had_given_up = inner.given_up.take_if(|given_up| given_up.refused.is_none()).is_some();
        (inner.question, inner.strikes, inner.wait) = (None, 0, LEAST_WAIT);
        if inner.given_up.is_none() {
            self.works.store(true, Ordering::Relaxed);
            self.set_due(now + CHECK);
        }
        Some(had_given_up.then_some(SegmentationChange::Works))
    }

    /// Why no groups leave, for people.
    pub fn note(&self) -> Option<String> {
        let given_up = self.inner().given_up?;
        Some(match given_up.refused {
            Some(errno) => format!("single datagrams, the kernel refuses UDP_SEGMENT: {}", errno.desc()),
            None => "single datagrams, what leaves by UDP_SEGMENT does not arrive".to_owned(),
        })
    }

    fn ask(&self, inner: &mut Inner, in_group: bool, now: Instant) -> Ask {
        inner.number = inner.number.wrapping_add(1);
        inner.question = Some(Question { in_group, answered: false });
        self.set_due(now + ANSWER);
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
    /// Gives groups up for the returned time, and for longer the next time.
    fn give_up(&mut self, refused: Option<Errno>) -> Duration {
        let wait = self.wait;
        self.wait = (2 * wait).min(MOST_WAIT);
        self.given_up = Some(GivenUp { refused });
        (self.question, self.strikes) = (None, 0);
        wait
    }
}

#[cfg(test)]
mod tests;
