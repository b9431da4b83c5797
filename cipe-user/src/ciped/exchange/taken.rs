//! The keys that the peer has announced: none is taken twice, so that a replayed NK_IND cannot restore it.

use std::collections::{HashSet, VecDeque};

use sha2::{Digest, Sha256};

use crate::wire::message::DynamicKey;

/// Keys as salted hashes. Beyond [`TakenKeys::CAPACITY`], the oldest are dropped: 20 years of keys at the default tokey, and at
/// most 32 MiB.
#[derive(Clone, Debug)]
pub struct TakenKeys {
    salt: [u8; 16],
    hashes: HashSet<u64>,
    order: VecDeque<u64>,
}

impl TakenKeys {
    const CAPACITY: usize = 1 << 20;

    /// None yet. The salt is random.
    pub fn new(salt: [u8; 16]) -> Self {
        Self { salt, hashes: HashSet::new(), order: VecDeque::new() }
    }

    /// Those of an earlier daemon, oldest first.
    pub fn restored(salt: [u8; 16], hashes: impl IntoIterator<Item = u64>) -> Self {
        let mut taken = Self::new(salt);
        for hash in hashes {
            taken.insert_hash(hash);
        }
        taken
    }

    /// The salt of the hashes.
    pub fn salt(&self) -> [u8; 16] {
        self.salt
    }

    /// The newest `most` hashes, oldest first.
    pub fn newest(&self, most: usize) -> impl Iterator<Item = u64> {
        self.order.iter().skip(self.order.len().saturating_sub(most)).copied()
    }

    /// Number of keys.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    pub(super) fn hash(&self, key: &DynamicKey) -> u64 {
        let digest = Sha256::new().chain_update(self.salt).chain_update(key.0).finalize();
        digest.first_chunk().map_or(0, |first| u64::from_be_bytes(*first))
    }

    /// Adds a key; `false` if it was there already.
    pub fn insert(&mut self, key: &DynamicKey) -> bool {
        self.insert_hash(self.hash(key))
    }

    fn insert_hash(&mut self, hash: u64) -> bool {
        if !self.hashes.insert(hash) {
            return false;
        }
        if self.order.len() == Self::CAPACITY
            && let Some(oldest) = self.order.pop_front()
        {
            self.hashes.remove(&oldest);
        }
        self.order.push_back(hash);
        true
    }
}
