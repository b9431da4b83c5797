//! The two halves of a session, as an engine uses them. Each is shared by all workers.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Refused;
use super::cipher::Key;
use super::counter;
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

    /// Takes the counters of the next `count` packets, which the caller seals at once. A worker must not keep a batch while others
    /// send: its packets would be too old at the receiver.
    #[inline]
    pub fn batch(&self, count: u64) -> Batch<'_, N> {
        Batch { key: self, counters: counter::take(self.next.as_ref(), count) }
    }

    /// The counter of its next packet.
    pub fn next_counter(&self) -> u64 {
        self.next.as_ref().load(Ordering::Relaxed)
    }

    /// Whether it has sent so much that new keys are due.
    #[inline]
    pub fn is_worn(&self) -> bool {
        self.next_counter() >= counter::RENEW
    }
}

/// Counters of a key for one batch of packets. They are of no use under another key; those that are left over are never used.
pub struct Batch<'a, N = Box<AtomicU64>> {
    key: &'a SendKey<N>,
    counters: Range<u64>,
}

impl<N> Batch<'_, N> {
    /// Seals the payload of `n` octets at `buffer[HEADROOM..]` in place, and returns the datagram's length. `None`: the batch or
    /// the key is used up.
    ///
    /// # Panics
    /// If `buffer` is shorter than `n + OVERHEAD`.
    #[inline]
    pub fn seal(&mut self, content: Content, buffer: &mut [u8], n: usize) -> Option<usize> {
        let counter = self.counters.next()?;
        Some(packet::seal(&self.key.key, self.key.epoch, counter, content, buffer, n))
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

    fn send_key(next: u64) -> SendKey {
        SendKey::new(Key::new(Suite::Aes256Gcm, &[3; 32]), EPOCH, Box::new(AtomicU64::new(next)))
    }

    fn receive_key() -> ReceiveKey {
        ReceiveKey::new(Key::new(Suite::Aes256Gcm, &[3; 32]), Window::default())
    }

    fn packet(batch: &mut Batch) -> Vec<u8> {
        let mut buffer = vec![1; 4 + OVERHEAD];
        assert_eq!(batch.seal(Content::Data, &mut buffer, 4), Some(29));
        buffer
    }

    fn open(receive: &ReceiveKey, datagram: &[u8]) -> Result<(Content, Range<usize>), Refused> {
        let Ok(Header::Packet(EPOCH, low)) = packet::parse(datagram) else { panic!("not a packet") };
        receive.open(low, &mut datagram.to_vec())
    }

    #[test]
    fn each_packet_is_opened_once_in_any_order_and_a_forged_one_changes_nothing() {
        let (send, receive) = (send_key(0), receive_key());
        let mut batch = send.batch(1000);
        let packets: Vec<_> = (0..1000).map(|_| packet(&mut batch)).collect();
        assert_eq!(batch.seal(Content::Data, &mut [0; OVERHEAD], 0), None, "a packet more than was asked for");
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

    /// One worker sends a packet now and then, while another one sends a thousand.
    #[test]
    fn a_slow_worker_sends_the_newest_counter() {
        let (send, receive) = (send_key(0), receive_key());
        for _ in 0..100 {
            for _ in 0..16 {
                let mut fast = send.batch(64);
                assert!((0..64).all(|_| open(&receive, &packet(&mut fast)).is_ok()));
            }
            let newest = receive.window.top();
            assert!(open(&receive, &packet(&mut send.batch(64))).is_ok());
            assert_eq!(receive.window.top(), newest + 1);
        }
    }

    #[test]
    fn batches_of_one_key_and_the_next_engine_use_other_counters() {
        let (send, receive) = (send_key(0), receive_key());
        let (mut first, mut second) = (send.batch(700), send.batch(700));
        for _ in 0..500 {
            assert!(open(&receive, &packet(&mut first)).is_ok() && open(&receive, &packet(&mut second)).is_ok());
        }
        // The engine is killed; the next one has the same number.
        let next = SendKey::new(Key::new(Suite::Aes256Gcm, &[3; 32]), EPOCH, send.next);
        let mut batch = next.batch(2);
        assert!(open(&receive, &packet(&mut batch)).is_ok());
        assert_eq!(receive.window.top(), 1400);
    }

    #[test]
    fn counters_above_thirty_bits_are_understood() {
        let receive = receive_key();
        for next in [1 << 29, 1 << 30, (3 << 29) - 5, 1 << 31] {
            let send = send_key(next);
            let mut batch = send.batch(10);
            assert!((0..10).all(|_| open(&receive, &packet(&mut batch)).is_ok()), "{next}");
        }
    }

    #[test]
    fn a_key_is_worn_and_used_up() {
        let worn = send_key(counter::RENEW - 1);
        assert!(!worn.is_worn());
        worn.batch(1);
        assert!(worn.is_worn());
        assert_eq!(send_key(counter::END).batch(1).seal(Content::Control, &mut [0; OVERHEAD], 0), None);
    }
}
