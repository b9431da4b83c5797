//! Holds private frames that cannot leave yet but probably can in a moment: while keys are exchanged and data must not go
//! under the static key (`staticdata no`), while there is no key for sealed packets and no others may leave, and while a
//! peer whose address is not proven is asked.
//!
//! Frames are held as they came, in order, and are admitted like others when the wait is over. If that ends with a refusal,
//! they get the verdict of the refusal then.

use std::time::{Duration, Instant};

use cipe_common::Verdict;
use cipe_common::maps::Slot;

use super::Datapath;
use super::admission::{Pieces, data_form};
use super::packets::Outgoing;
use crate::control::protocol::Protocol;
use crate::engine::tunnel::Tunnel;
use crate::xsk::Packet;

/// Maximum frames of memory that one tunnel holds in one worker, and their octets: a short burst, and a few superframes.
const MAX_FRAMES: usize = 256;
const MAX_OCTETS: usize = 256 * 1024;
/// Of the frames of a worker, this part may be held by all tunnels together.
const MAX_SHARE: usize = 8;
/// How long frames are held, from the first one on: longer than an exchange takes, on any path.
const MAX_TIME: Duration = Duration::from_secs(1);

/// The frames of one tunnel.
struct Queue {
    tunnel: u16,
    pieces: Vec<Packet>,
    octets: usize,
    until: Instant,
}

/// The held frames of a worker.
#[derive(Default)]
pub(super) struct HeldFrames {
    queues: Vec<Queue>,
    /// The wait is over for the frames that are being admitted.
    is_over: bool,
}

/// Whether data of a tunnel cannot leave now but probably can soon.
fn waits(tunnel: &Tunnel, now: Instant) -> bool {
    match data_form(tunnel) {
        Err(Verdict::NoSendKey) => tunnel.keys.get(Slot::Static).is_some(),
        Err(Verdict::NoPeer) => tunnel.common.challenge.candidate(now).is_some(),
        _ => false,
    }
}

impl HeldFrames {
    /// Takes the pieces of a frame if its tunnel waits and there is room; `most`: frames of memory of the worker.
    pub(super) fn take(&mut self, tunnel: &Tunnel, pieces: &mut Pieces, most: usize, now: Instant) -> bool {
        if self.is_over || !waits(tunnel, now) {
            return false;
        }
        let all: usize = self.queues.iter().map(|queue| queue.pieces.len()).sum();
        let place = self.queues.iter().position(|queue| queue.tunnel == tunnel.number).unwrap_or_else(|| {
            let until = now + MAX_TIME;
            self.queues.push(Queue { tunnel: tunnel.number, pieces: Vec::new(), octets: 0, until });
            self.queues.len() - 1
        });
        let queue = &mut self.queues[place];
        let octets: usize = pieces.iter().map(|piece| piece.len as usize).sum();
        let fits = queue.pieces.len() + pieces.len() <= MAX_FRAMES
            && queue.octets + octets <= MAX_OCTETS
            && all + pieces.len() <= most / MAX_SHARE;
        if fits {
            queue.pieces.extend(pieces.drain(..));
            queue.octets += octets;
        }
        fits
    }

    /// Whether there are none, or those that there are are being admitted.
    fn is_idle(&self) -> bool {
        self.queues.is_empty() || self.is_over
    }
}

impl Datapath {
    /// Admits the held frames whose tunnels no longer wait, or that have waited for too long, and appends their packets to
    /// `outgoing`. Call it before other frames are admitted, and when [`Self::next_held`] has passed.
    pub fn release_held(&mut self, outgoing: &mut Vec<Outgoing>) {
        if self.held.is_idle() {
            return;
        }
        let now = self.now;
        let tunnels = &mut self.tunnels;
        let is_over = |queue: &mut Queue| {
            let Some(tunnel) = tunnels.get_mut(&queue.tunnel) else { return true };
            tunnel.refresh(now);
            queue.until <= now || !waits(tunnel, now)
        };
        let over: Vec<Queue> = self.held.queues.extract_if(.., is_over).collect();
        self.held.is_over = true;
        for Queue { tunnel: number, mut pieces, .. } in over {
            match self.tunnels.get(&number).map(|tunnel| tunnel.protocol) {
                Some(Protocol::Ip) => self.seal(&mut pieces, outgoing),
                Some(Protocol::Ethernet) => self.seal_frames(Some(number), &mut pieces, outgoing),
                None => pieces.into_iter().for_each(|piece| self.pool.put(piece.frame)),
            }
        }
        self.held.is_over = false;
    }

    /// Frees the held frames of a tunnel that is removed.
    pub fn drop_held(&mut self, number: u16) {
        for queue in self.held.queues.extract_if(.., |queue| queue.tunnel == number) {
            queue.pieces.into_iter().for_each(|piece| self.pool.put(piece.frame));
        }
    }

    /// Whether frames are held.
    pub fn has_held(&self) -> bool {
        !self.held.queues.is_empty()
    }

    /// Returns the time until the first frames have waited for too long.
    pub fn next_held(&self, now: Instant) -> Duration {
        let next = self.held.queues.iter().map(|queue| queue.until).min();
        next.map_or(Duration::MAX, |next| next.saturating_duration_since(now))
    }
}
