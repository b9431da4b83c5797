//! The two halves of a session, as an engine uses them. Each is shared by all workers.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Refused;
use super::cipher::Key;
use super::counter::{self, Counters};
use super::packet::{self, Content, Epoch, LowBits};
use super::window::{WORDS, Window};

/// A key for sending, with its next counter in memory of the caller's choice.
pub struct SendKey<N = Box<AtomicU64>> {
    key: Key,
    epoch: Epoch,
    next: N,
}

impl<N: AsRef<AtomicU64>> SendKey<N> {
    /// A key for packets of this epoch of the peer's. `next` holds its next free counter: 0 for a new key; for one that another
    /// engine has used, the very memory that the other one used.
    pub fn new(key: Key, epoch: Epoch, next: N) -> Self {
        Self { key, epoch, next }
    }

    /// What one worker seals with.
    pub fn sealer(self: &Arc<Self>) -> Sealer<N> {
        Sealer { key: self.clone(), counters: Counters::default() }
    }

    /// Whether it has sent so much that new keys are due.
    #[inline]
    pub fn is_worn(&self) -> bool {
        self.next.as_ref().load(Ordering::Relaxed) >= counter::RENEW
    }
}

/// A key for sending, in one worker. The counters that the worker has taken live and die with its use of the key, so they are
/// never used under another one.
pub struct Sealer<N = Box<AtomicU64>> {
    key: Arc<SendKey<N>>,
    counters: Counters,
}

impl<N: AsRef<AtomicU64>> Sealer<N> {
    /// Seals the payload of `n` octets at `buffer[HEADROOM..]` in place, and returns the datagram's length. `None`: the key is
    /// used up.
    ///
    /// # Panics
    /// If `buffer` is shorter than `n + OVERHEAD`.
    #[inline]
    pub fn seal(&mut self, content: Content, buffer: &mut [u8], n: usize) -> Option<usize> {
        let key = &*self.key;
        let counter = self.counters.next(key.next.as_ref())?;
        Some(packet::seal(&key.key, key.epoch, counter, content, buffer, n))
    }

    /// The key.
    pub fn key(&self) -> &SendKey<N> {
        &self.key
    }
}

/// A key for receiving, with its window in memory of the caller's choice.
pub struct ReceiveKey<W = Box<[AtomicU64; WORDS]>> {
    key: Key,
    window: Window<W>,
}

impl<W: AsRef<[AtomicU64; WORDS]>> ReceiveKey<W> {
    /// A key with the counters that were accepted under it.
    pub fn new(key: Key, window: Window<W>) -> Self {
        Self { key, window }
    }

    /// Opens a packet in place and accepts its counter.
    ///
    /// # Errors
    /// The verdict that it is dropped under.
    #[inline]
    pub fn open(&self, low: LowBits, datagram: &mut [u8]) -> Result<(Content, Range<usize>), Refused> {
        let counter = low.complete(self.window.top());
        let (content, payload) = packet::open(&self.key, counter, datagram)?;
        self.window.accept(counter)?;
        Ok((content?, payload))
    }
}

#[cfg(test)]
mod tests {
    use super::super::cipher::Suite;
    use super::super::packet::{HEADROOM, Header, OVERHEAD};
    use super::*;

    const EPOCH: Epoch = Epoch::ALL[0];

    fn sealer(next: u64) -> Sealer {
        let key = Key::new(Suite::Aes256Gcm, &[3; 32]);
        Arc::new(SendKey::new(key, EPOCH, Box::new(AtomicU64::new(next)))).sealer()
    }

    fn receive_key() -> ReceiveKey {
        ReceiveKey::new(Key::new(Suite::Aes256Gcm, &[3; 32]), Window::default())
    }

    fn packet(sealer: &mut Sealer) -> Vec<u8> {
        let mut buffer = vec![1; 4 + OVERHEAD];
        assert_eq!(sealer.seal(Content::Data, &mut buffer, 4), Some(29));
        buffer
    }

    fn open(receive: &ReceiveKey, datagram: &[u8]) -> Result<(Content, Range<usize>), Refused> {
        let Ok(Header::Packet(EPOCH, low)) = packet::parse(datagram) else { panic!("not a packet") };
        receive.open(low, &mut datagram.to_vec())
    }

    #[test]
    fn each_packet_is_opened_once_in_any_order_and_a_forged_one_changes_nothing() {
        let (mut sealer, receive) = (sealer(0), receive_key());
        let packets: Vec<_> = (0..1000).map(|_| packet(&mut sealer)).collect();
        // A forged packet with a counter far ahead.
        let mut forged = packets[0].clone();
        forged[4..8].copy_from_slice(&0x4FFF_FFFF_u32.to_be_bytes());
        assert_eq!(open(&receive, &forged), Err(Refused::BadTag));
        for packet in packets.iter().rev() {
            assert_eq!(open(&receive, packet), Ok((Content::Data, HEADROOM..HEADROOM + 4)));
        }
        for packet in &packets {
            assert_eq!(open(&receive, packet), Err(Refused::Replayed));
        }
    }

    #[test]
    fn workers_of_one_key_and_the_next_engine_use_other_counters() {
        let (mut first, receive) = (sealer(0), receive_key());
        let mut second = first.key.sealer();
        for _ in 0..500 {
            assert!(open(&receive, &packet(&mut first)).is_ok() && open(&receive, &packet(&mut second)).is_ok());
        }
        let mut next = first.key.sealer();
        drop((first, second));
        assert!(open(&receive, &packet(&mut next)).is_ok());
    }

    #[test]
    fn counters_above_thirty_bits_are_understood() {
        let receive = receive_key();
        for next in [1 << 29, 1 << 30, (3 << 29) - 5, 1 << 31] {
            let mut sealer = sealer(next);
            assert!((0..10).all(|_| open(&receive, &packet(&mut sealer)).is_ok()), "{next}");
        }
    }

    #[test]
    fn a_key_is_worn_and_used_up() {
        let mut worn = sealer(counter::RENEW - 1);
        assert!(!worn.key().is_worn());
        packet(&mut worn);
        assert!(worn.key().is_worn());
        assert_eq!(sealer(counter::END).seal(Content::Control, &mut [0; OVERHEAD], 0), None);
    }
}
