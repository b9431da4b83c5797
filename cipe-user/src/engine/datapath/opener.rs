//! Opens a batch of datagrams in place, and returns what each of them is. It knows keys and frames, but no sockets.

use std::sync::Arc;

use arrayvec::ArrayVec;
use cipe_common::maps::Slot;
use cipe_common::{Verdict, shield};

use super::TunnelTable;
use super::packets::{Incoming, jobs};
use crate::cipher::{BLOCK, Job, Lanes};
use crate::control::protocol::Protocol;
use crate::engine::BATCH;
use crate::engine::tunnel::keys::LiveKey;
use crate::engine::tunnel::{Candidates, Head, Opened, Tunnel};
use crate::wire::packet::Ends;
use crate::xsk::Umem;

/// The parts of a datapath that open datagrams.
pub(super) struct Opener<'a> {
    /// The tunnels, with their keys.
    pub tunnels: &'a TunnelTable<Tunnel>,
    /// The memory of all frames.
    pub umem: &'a Umem,
    /// The ciphers.
    pub lanes: &'a mut Lanes,
}

impl<'a> Opener<'a> {
    /// Returns the key to open a datagram with; `None` for one without encryption, or if the key was removed.
    pub(super) fn key_of(&self, item: &Incoming) -> Option<&'a Arc<LiveKey>> {
        self.tunnels.get(&item.tunnel)?.keys.get(item.slot?)
    }

    /// Decrypts each datagram under its key.
    pub(super) fn decrypt(&mut self, incoming: &mut [Incoming]) {
        for batch in incoming.chunks_mut(BATCH) {
            let keys: ArrayVec<_, BATCH> = batch.iter().map(|item| self.key_of(item)).collect();
            let mut jobs = jobs(batch.iter_mut().zip(keys), |item| item.sealed(self.umem));
            self.lanes.decrypt(&mut jobs);
        }
    }

    /// Removes the datagrams that no key can open, by their first and last blocks, and returns them. Chooses the previous key for
    /// those that only this one may open.
    #[inline(never)]
    pub(super) fn sieve(&mut self, incoming: &mut Vec<Incoming>) -> Vec<Incoming> {
        let mut may_pass: Vec<bool> = Vec::with_capacity(incoming.len());
        for batch in incoming.chunks_mut(BATCH) {
            let possible = self.are_possible(batch, Self::key_of);
            let retried = self.are_possible(batch, Self::previous_key_of);
            for ((item, possible), by_previous) in batch.iter_mut().zip(possible).zip(retried) {
                if possible == Some(false) && by_previous == Some(true) {
                    item.slot = Some(Slot::Previous);
                }
                may_pass.push(possible != Some(false) || by_previous == Some(true));
            }
        }
        let mut may_pass = may_pass.into_iter();
        incoming.extract_if(.., |_| may_pass.next() == Some(false)).collect()
    }

    /// Whether the first and the last block of each datagram may be those of a packet under the key that `key_of` returns. `None`
    /// without such a key.
    fn are_possible(
        &mut self,
        batch: &[Incoming],
        key_of: impl Fn(&Self, &Incoming) -> Option<&'a Arc<LiveKey>>,
    ) -> ArrayVec<Option<bool>, BATCH> {
        let keyed = |item: &Incoming| {
            let ends = Ends::of(&self.umem.chunk(&item.frame)[item.datagram.clone()])?;
            Some((ends, key_of(self, item)?))
        };
        let mut ends: ArrayVec<Option<(Ends, &Arc<LiveKey>)>, BATCH> = batch.iter().map(keyed).collect();
        let jobs = ends.iter_mut().flatten().flat_map(|(ends, live)| ends.jobs(&live.key));
        self.lanes.decrypt(&mut jobs.collect::<ArrayVec<_, { 2 * BATCH }>>());
        let possible = |(item, ends): (&Incoming, Option<(Ends, _)>)| Some(ends?.0.are_possible(self.carries_ip(item)));
        batch.iter().zip(ends).map(possible).collect()
    }

    fn carries_ip(&self, item: &Incoming) -> bool {
        self.tunnels.get(&item.tunnel).is_some_and(|tunnel| tunnel.protocol == Protocol::Ip)
    }

    /// Returns the previous key, if a datagram is to be opened with the current receive key.
    fn previous_key_of(&self, item: &Incoming) -> Option<&'a Arc<LiveKey>> {
        self.tunnels.get(&item.tunnel)?.keys.get(Slot::Previous).filter(|_| item.slot == Some(Slot::Receive))
    }

    /// Checks each decrypted datagram, and appends what it is, or why it is dropped, to `opened`, which must be empty.
    // If this is inlined, the compiler generates slower code for the decryption next to it.
    #[inline(never)]
    pub(super) fn judge_all(&mut self, incoming: &mut [Incoming], opened: &mut Vec<Result<Opened, Verdict>>) {
        opened.extend(incoming.iter().map(|item| self.judge(item)));
        self.try_previous(incoming, opened);
        self.accept(incoming, opened);
    }

    #[inline(always)]
    fn judge(&self, item: &Incoming) -> Result<Opened, Verdict> {
        let tunnel = self.tunnels.get(&item.tunnel).ok_or(Verdict::TunnelDead)?;
        let datagram = &self.umem.chunk(&item.frame)[item.datagram.clone()];
        match item.slot {
            Some(slot) => tunnel.judge(datagram, &item.head, slot),
            None => tunnel.judge_bare(datagram),
        }
    }

    /// Drops replayed packets. Consecutive packets of one key are looked up together.
    fn accept(&self, incoming: &[Incoming], opened: &mut [Result<Opened, Verdict>]) {
        let mut opened = opened.iter_mut();
        let mut good = Candidates::new();
        let of_one_key = incoming.chunk_by(|a, b| (a.tunnel, a.slot) == (b.tunnel, b.slot));
        for run in of_one_key.flat_map(|run| run.chunks(BATCH)) {
            let heads = run.iter().map(|item| &item.head);
            good.clear();
            good.extend(heads.zip(opened.by_ref()).filter(|(_, opened)| opened.is_ok()));
            if let (Some(tunnel), Some(slot)) = (self.tunnels.get(&run[0].tunnel), run[0].slot) {
                tunnel.accept(slot, &mut good);
            }
        }
    }

    /// Tries the previous key for datagrams that the current receive key did not open: after a key change, these are the packets
    /// that were in flight. Decryption is in place, so it is undone first; but only for datagrams whose first block, which is kept,
    /// may begin a packet under the previous key.
    fn try_previous(&mut self, incoming: &mut [Incoming], opened: &mut [Result<Opened, Verdict>]) {
        let keys_of = |item: &Incoming| {
            let keys = &self.tunnels.get(&item.tunnel)?.keys;
            Some((keys.get(Slot::Receive)?, keys.get(Slot::Previous)?))
        };
        let mut failed = incoming.iter_mut().zip(opened).filter_map(|(item, opened)| {
            let failed_crc = *opened == Err(Verdict::BadCrc) && item.slot == Some(Slot::Receive);
            let (current, previous) = keys_of(item).filter(|_| failed_crc)?;
            Some((item, opened, current, previous))
        });
        loop {
            let mut batch: ArrayVec<_, BATCH> = failed.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                return;
            }
            let mut firsts: ArrayVec<_, BATCH> = batch.iter().map(|(item, ..)| first_of(&item.head)).collect();
            let under_previous = firsts.iter_mut().zip(&batch);
            let under_previous =
                under_previous.map(|((iv, data), (.., previous))| Job { key: &previous.key, iv: *iv, data });
            self.lanes.decrypt(&mut under_previous.collect::<ArrayVec<_, BATCH>>());
            let mut firsts = firsts.iter();
            batch.retain(|(item, ..)| {
                let len = item.datagram.len();
                firsts.next().is_some_and(|(_, first)| shield::may_begin(*first, len, self.carries_ip(item)))
            });
            let current = batch.iter_mut().map(|(item, _, current, _)| (&mut **item, Some(*current)));
            self.lanes.encrypt(&mut jobs(current, |item| item.sealed(self.umem)));
            let previous = batch.iter_mut().map(|(item, _, _, previous)| (&mut **item, Some(*previous)));
            self.lanes.decrypt(&mut jobs(previous, |item| item.sealed(self.umem)));
            for (item, opened, ..) in batch {
                item.slot = Some(Slot::Previous);
                *opened = self.judge(item);
            }
        }
    }
}

/// Returns the IV and the first cipher block of a datagram.
fn first_of(head: &Head) -> ([u8; BLOCK], [u8; BLOCK]) {
    let ([iv, first], _) = head.as_chunks() else { unreachable!("a head is two blocks") };
    (*iv, *first)
}

#[cfg(test)]
mod tests;
