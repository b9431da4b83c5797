//! Opens a batch of datagrams in place, and returns what each of them is. It knows keys and frames, but no sockets.

use std::sync::Arc;

use arrayvec::ArrayVec;
use cipe_common::Verdict;
use cipe_common::maps::Slot;

use super::TunnelTable;
use super::packets::{Incoming, jobs};
use crate::cipher::Lanes;
use crate::engine::BATCH;
use crate::engine::tunnel::keys::LiveKey;
use crate::engine::tunnel::{Candidates, Opened, Tunnel};
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
    /// that were in flight. Decryption is in place, so it is undone first.
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

#[cfg(test)]
mod tests;
