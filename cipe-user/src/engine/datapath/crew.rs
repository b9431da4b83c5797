//! Work sharing: a busy worker lends chunks of packets, with their frames, to idle workers, which do the cipher work. The
//! lender continues only when all chunks are back, so that the packets keep their order.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use arrayvec::ArrayVec;
use rustix::event::{EventfdFlags, eventfd};

use super::packets::{IDENTITY, Incoming, Outgoing, jobs};
use super::recent::RecentDatagrams;
use super::rounds::Rounds;
use crate::cipher::Lanes;
use crate::engine::BATCH;
use crate::engine::locked;
use crate::engine::tunnel::keys::LiveKey;
use crate::engine::watchdog::Pulse;
use crate::xsk::Umem;

/// The state that the workers share.
pub struct Crew {
    members: Vec<Member>,
    rounds: Rounds,
}

struct Member {
    /// Wakes the worker, for a command or to help.
    wake: OwnedFd,
    /// The worker waits for events, so it can help.
    asleep: AtomicBool,
    /// Chunks of this worker that any worker may take, with their positions.
    open: Mutex<VecDeque<(usize, Chunk)>>,
    /// Chunks that other workers have finished.
    done: Mutex<Vec<(usize, Chunk)>>,
    /// The number of chunks that other workers have taken and not returned.
    taken: AtomicUsize,
    /// The number of packets that it has processed for other workers.
    helped: AtomicU64,
    /// The identities of the datagrams that it sent last.
    recent: RecentDatagrams,
    pulse: Arc<Pulse>,
}

/// At most [`BATCH`] packets to seal or to open, and their keys.
pub struct Chunk {
    /// The packets.
    pub packets: Packets,
    /// For each packet the index of its key in `keys`; `u8::MAX` for a packet without a key.
    places: ArrayVec<u8, BATCH>,
    keys: ArrayVec<Arc<LiveKey>, BATCH>,
}

/// The packets of a chunk, by the work to do.
pub enum Packets {
    /// Decrypt.
    Incoming(Vec<Incoming>),
    /// Encrypt.
    Outgoing(Vec<Outgoing>),
}

impl Chunk {
    /// Returns a chunk of packets with the key of each. Packets without a key stay unchanged.
    fn new<'a>(packets: Packets, keys_of: impl IntoIterator<Item = Option<&'a Arc<LiveKey>>>) -> Self {
        let (mut places, mut keys) = (ArrayVec::new(), ArrayVec::<Arc<LiveKey>, BATCH>::new());
        for key in keys_of {
            let Some(key) = key else {
                places.push(u8::MAX);
                continue;
            };
            let known = keys.iter().rposition(|known| Arc::ptr_eq(known, key));
            places.push(known.unwrap_or(keys.len()) as u8);
            if known.is_none() {
                keys.push(key.clone());
            }
        }
        Self { packets, places, keys }
    }

    /// Splits `packets` into chunks; `key_of` returns the key of a packet.
    pub fn cut<'a, T>(
        mut packets: impl ExactSizeIterator<Item = T>,
        wrap: fn(Vec<T>) -> Packets,
        key_of: impl Fn(&T) -> Option<&'a Arc<LiveKey>>,
    ) -> Vec<Self> {
        let mut chunks = Vec::with_capacity(packets.len().div_ceil(BATCH));
        while packets.len() > 0 {
            let some: Vec<T> = packets.by_ref().take(BATCH).collect();
            let keys: ArrayVec<_, BATCH> = some.iter().map(&key_of).collect();
            chunks.push(Self::new(wrap(some), keys));
        }
        chunks
    }

    fn len(&self) -> usize {
        self.places.len()
    }

    fn work(&mut self, umem: &Umem, lanes: &mut Lanes) {
        let keys = self.places.iter().map(|place| self.keys.get(usize::from(*place)));
        match &mut self.packets {
            Packets::Incoming(packets) => {
                lanes.decrypt(&mut jobs(packets.iter_mut().zip(keys), |packet| packet.sealed(umem)));
            }
            Packets::Outgoing(packets) => {
                lanes.encrypt(&mut jobs(packets.iter_mut().zip(keys), |packet| packet.framed(umem)));
            }
        }
    }
}

/// Counts a chunk as returned when it is dropped, even after a panic.
struct Return<'a>(&'a AtomicUsize);

impl Drop for Return<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Crew {
    /// Returns the shared state of `count` workers.
    ///
    /// # Errors
    /// If the kernel refuses event descriptors.
    pub fn new(count: usize) -> rustix::io::Result<Self> {
        let member = |_| {
            Ok(Member {
                wake: eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?,
                asleep: AtomicBool::new(false),
                open: Mutex::default(),
                done: Mutex::default(),
                taken: AtomicUsize::new(0),
                helped: AtomicU64::new(0),
                recent: RecentDatagrams::default(),
                pulse: Arc::default(),
            })
        };
        let members = (0..count).map(member).collect::<rustix::io::Result<_>>()?;
        Ok(Self { members, rounds: Rounds::default() })
    }

    /// Returns the record of datagrams that hold datagrams of other tunnels.
    pub fn rounds(&self) -> &Rounds {
        &self.rounds
    }

    /// Remembers the [identity](super::packets::identity) of a datagram that a worker has sealed.
    pub fn remember_sent(&self, member: usize, identity: [u8; IDENTITY]) {
        if let Some(member) = self.members.get(member) {
            member.recent.remember(identity);
        }
    }

    /// Returns whether one of the datagrams that were sealed last, by any worker for any tunnel, had this identity.
    pub fn has_sent(&self, identity: [u8; IDENTITY]) -> bool {
        self.members.iter().any(|member| member.recent.contains(identity))
    }

    /// Returns the number of workers.
    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// Returns the event descriptor that wakes a worker.
    pub fn wake_of(&self, member: usize) -> &OwnedFd {
        &self.members[member].wake
    }

    /// Wakes a worker.
    pub fn rouse(&self, member: usize) {
        // It fails only if the counter is full, and then the worker wakes anyway.
        let _ = rustix::io::write(&self.members[member].wake, &1u64.to_ne_bytes());
    }

    /// Returns the count of a worker's rounds.
    pub(in crate::engine) fn pulse(&self, member: usize) -> &Arc<Pulse> {
        &self.members[member].pulse
    }

    /// Sets whether a worker waits for events.
    pub fn set_asleep(&self, member: usize, asleep: bool) {
        self.members[member].asleep.store(asleep, Ordering::Relaxed);
    }

    /// Returns the number of packets that a worker has processed for others.
    pub fn helped(&self, member: usize) -> u64 {
        self.members[member].helped.load(Ordering::Relaxed)
    }

    /// Returns whether a worker other than `member` is idle and can help it.
    pub fn has_help(&self, member: usize) -> bool {
        self.members.iter().enumerate().any(|(other, one)| other != member && one.asleep.load(Ordering::Relaxed))
    }

    /// Processes `chunks` with the help of idle workers. Returns them in order when all are done.
    pub fn work(&self, member: usize, chunks: Vec<Chunk>, umem: &Umem, lanes: &mut Lanes) -> Vec<Chunk> {
        let me = &self.members[member];
        let mut mine: Vec<(usize, Chunk)> = Vec::with_capacity(chunks.len());
        let mut chunks = chunks.into_iter().enumerate();
        let first = chunks.next();
        let spare = chunks.len();
        locked(&me.open).extend(chunks);
        let sleepers = self
            .members
            .iter()
            .enumerate()
            .filter(|(other, one)| *other != member && one.asleep.load(Ordering::Relaxed));
        for (other, _) in sleepers.take(spare) {
            self.rouse(other);
        }
        let mut next = first;
        while let Some((place, mut chunk)) = next {
            chunk.work(umem, lanes);
            mine.push((place, chunk));
            next = locked(&me.open).pop_front();
        }
        // Other workers process the last chunks. The wait is at most the time of one chunk.
        let mut looks = 0_u32;
        while me.taken.load(Ordering::Acquire) > 0 {
            looks += 1;
            if looks.is_multiple_of(64) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        mine.append(&mut locked(&me.done));
        mine.sort_unstable_by_key(|(place, _)| *place);
        mine.into_iter().map(|(_, chunk)| chunk).collect()
    }

    /// Processes the chunks that other workers lend.
    pub fn help(&self, member: usize, umem: &Umem, lanes: &mut Lanes) {
        for other in self.members.iter().enumerate().filter(|(other, _)| *other != member).map(|(_, one)| one) {
            loop {
                let taken = {
                    let mut open = locked(&other.open);
                    let taken = open.pop_front();
                    // The lock is held, so that a worker that sees an empty queue also sees this count.
                    other.taken.fetch_add(usize::from(taken.is_some()), Ordering::Relaxed);
                    taken
                };
                let Some((place, mut chunk)) = taken else { break };
                let _return = Return(&other.taken);
                chunk.work(umem, lanes);
                self.members[member].helped.fetch_add(chunk.len() as u64, Ordering::Relaxed);
                locked(&other.done).push((place, chunk));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use cipe_common::maps::Slot;

    use super::super::packets::Form;
    use super::*;
    use crate::cipher::Algorithm;
    use crate::engine::carrier::outer::{FRESH, Marks};
    use crate::engine::tunnel::keys::Keys;
    use crate::kernel::keys::KeyWriter;
    use crate::wire::packet::{self, Type};
    use crate::xsk::{Pool, UmemConfig};

    const OCTETS: usize = 300;
    const CHUNKS: usize = 9;

    struct Bench {
        umem: Umem,
        pool: Pool,
        keys: [Keys; 2],
        _writer: KeyWriter,
    }

    impl Bench {
        fn new() -> Self {
            let mut writer = KeyWriter::anonymous(8);
            let keys = [0_u8, 1].map(|number| {
                writer.set(number.into(), Slot::Send, &[number; 16]);
                let mut keys = Keys::alone(Algorithm::Blowfish, writer.reader(), number.into());
                keys.refresh(Instant::now());
                keys
            });
            let (umem, pool) = Umem::new(UmemConfig { frames: 2048, ..UmemConfig::default() }).unwrap();
            Self { umem, pool, keys, _writer: writer }
        }

        /// Returns chunks of packets that alternate between two tunnels. Each packet holds its number; every fifth has no key.
        fn chunks(&mut self) -> Vec<Chunk> {
            let mut number = 0_u32;
            let mut chunk = |_| {
                let packets: Vec<Outgoing> = (0..BATCH)
                    .map(|_| {
                        let mut frame = self.pool.take().unwrap();
                        let whole = FRESH - packet::IV..FRESH - packet::IV + packet::sealed_len(OCTETS);
                        let octets = &mut self.umem.chunk_mut(&mut frame)[whole];
                        octets.fill(7);
                        octets[packet::IV..][..4].copy_from_slice(&number.to_be_bytes());
                        number += 1;
                        let marks = Marks { tos: 0, ttl: 64, dont_fragment: false };
                        let tunnel = (number % 2) as u16;
                        Outgoing::new(tunnel, frame, FRESH, OCTETS, Type::Data, Form::Keyed(Slot::Send), marks)
                    })
                    .collect();
                let key_of = |(index, out): (usize, &Outgoing)| {
                    self.keys[usize::from(out.tunnel)].get(Slot::Send).filter(|_| !index.is_multiple_of(5))
                };
                let keys: ArrayVec<_, BATCH> = packets.iter().enumerate().map(key_of).collect();
                Chunk::new(Packets::Outgoing(packets), keys)
            };
            (0..CHUNKS).map(&mut chunk).collect()
        }

        /// Returns for each packet, in order, whether it may be sent, and its octets.
        fn take(&mut self, chunks: Vec<Chunk>) -> Vec<(bool, Vec<u8>)> {
            let packets = chunks.into_iter().flat_map(|chunk| match chunk.packets {
                Packets::Outgoing(packets) => packets,
                Packets::Incoming(_) => unreachable!("none of those was put in"),
            });
            let taken = packets.map(|out| {
                let octets = self.umem.chunk(&out.frame)[out.datagram.clone()].to_vec();
                self.pool.put(out.frame);
                (out.ready, octets)
            });
            taken.collect()
        }
    }

    fn alone(bench: &mut Bench) -> Vec<(bool, Vec<u8>)> {
        let chunks = bench.chunks();
        let done = Crew::new(1).unwrap().work(0, chunks, &bench.umem, &mut Lanes::new());
        bench.take(done)
    }

    #[test]
    fn packets_with_a_key_are_encrypted_and_the_others_may_not_be_sent() {
        let mut bench = Bench::new();
        let packets = alone(&mut bench);
        assert_eq!(packets.len(), CHUNKS * BATCH);
        for (index, (ready, octets)) in packets.iter().enumerate() {
            assert_eq!(*ready, !(index % BATCH).is_multiple_of(5));
            assert_eq!(octets[packet::IV..][..4] == (index as u32).to_be_bytes(), !ready, "packet {index}");
        }
    }

    #[test]
    fn a_helper_returns_all_chunks_complete_and_in_order() {
        let mut bench = Bench::new();
        let expected = alone(&mut bench);
        let crew = Crew::new(2).unwrap();
        let mut chunks = bench.chunks();
        let rest = chunks.split_off(1);
        locked(&crew.members[0].open).extend(rest.into_iter().enumerate().map(|(place, chunk)| (place + 1, chunk)));
        crew.help(1, &bench.umem, &mut Lanes::new());
        assert_eq!((crew.helped(1), crew.helped(0)), (((CHUNKS - 1) * BATCH) as u64, 0));
        let done = crew.work(0, chunks, &bench.umem, &mut Lanes::new());
        assert!(bench.take(done) == expected);
        assert_eq!(bench.pool.free(), bench.pool.total());
    }

    #[test]
    fn the_order_stays_while_others_help() {
        let mut bench = Bench::new();
        let expected = alone(&mut bench);
        let crew = Crew::new(3).unwrap();
        let over = AtomicBool::new(false);
        let as_expected = std::thread::scope(|scope| {
            for helper in [1, 2] {
                let (crew, over, umem) = (&crew, &over, bench.umem.clone());
                scope.spawn(move || {
                    let mut lanes = Lanes::new();
                    while !over.load(Ordering::Relaxed) {
                        crew.help(helper, &umem, &mut lanes);
                    }
                });
            }
            let mut lanes = Lanes::new();
            let as_expected = (0..50).all(|_| {
                let chunks = bench.chunks();
                let done = crew.work(0, chunks, &bench.umem, &mut lanes);
                bench.take(done) == expected
            });
            over.store(true, Ordering::Relaxed);
            as_expected
        });
        assert!(as_expected);
        assert_eq!(bench.pool.free(), bench.pool.total());
    }

    #[test]
    fn only_idle_workers_can_help() {
        let crew = Crew::new(2).unwrap();
        crew.set_asleep(0, true);
        assert!(!crew.has_help(0) && crew.has_help(1));
        crew.set_asleep(0, false);
        assert!(!crew.has_help(1));
    }
}
