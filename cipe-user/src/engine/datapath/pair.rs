//! Two datapaths and the queue between them. Tests, fuzzers and benchmarks use them in place of a kernel, devices and a network.

mod sealed;

use std::io::IoSlice;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cipe_common::maps::Slot;
use cipe_common::stamp::STAMP_TPID;
use cipe_common::{Stamp, Verdict, stamp};
use tokio::sync::mpsc;

use super::{ControlMessage, Crew, Datapath, Device, Devices, Injected, Outgoing};
use crate::cipher::Algorithm;
use crate::control::protocol::Protocol;
use crate::engine::carrier::outer::{ETHERNET, FRESH};
use crate::engine::carrier::{Arrival, Via};
use crate::engine::report::WorkerReport;
use crate::engine::tunnel::counters::Counters;
use crate::engine::tunnel::keys::Keys;
use crate::engine::tunnel::{KeyLimits, Tunnel};
use crate::inner::checksum::{Sum, transport_checksum};
use crate::inner::coalesce::VNET_HEADER;
use crate::inner::headers::{IpVersion, TCP};
use crate::inner::segment::Superframe;
use crate::kernel::keys::{KEY, KeyWriter};
use crate::wire::packet::Type;
use crate::xsk::{PACKET_HEADROOM, Packet, Pool, Umem, UmemConfig};

#[cfg(test)]
pub(crate) use sealed::{REQUIRED, STATIC_KEY};

/// The only tunnel of an end.
const TUNNEL: u16 = 0;
/// Frames of an end.
const FRAMES: u32 = 1024;
/// Octets of a chunk.
const CHUNK: u32 = 2048;
/// Reports that the queue to the control thread can hold.
const REPORT_QUEUE: usize = 64;
/// The most payload octets of a UDP datagram over IPv4.
const MAX_DATAGRAM_OCTETS: usize = 65_507;

/// A datagram in flight between the ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// The UDP payload.
    pub octets: Vec<u8>,
    /// TOS of the outer header.
    pub tos: u8,
}

/// One end of a tunnel: a datapath, and substitutes for its surroundings.
pub struct End {
    /// The datapath.
    pub datapath: Datapath,
    /// The device of opened packets.
    pub device: Recorder,
    /// Reports for the control thread.
    pub reports: mpsc::Receiver<(u16, WorkerReport)>,
    keys: KeyWriter,
    me: SocketAddr,
    received: Vec<Packet>,
    outgoing: Vec<Outgoing>,
    arrivals: Vec<Arrival>,
}

/// A device that records its frames.
#[derive(Default)]
pub struct Recorder {
    /// Frames with their Ethernet headers, in order. A superframe is recorded as its segments.
    pub frames: Vec<Vec<u8>>,
    /// The number of superframes.
    pub superframes: usize,
    /// The number of frames that it still has room for; `None`: no limit.
    pub room: Option<usize>,
    /// It refuses superframes.
    pub refuses: bool,
    /// The device was removed.
    pub is_gone: bool,
    /// It does not record frames, so that a benchmark does not measure the cost.
    pub forgets: bool,
}

/// The two ends, `a` and `b`, each the peer of the other.
pub struct Pair {
    /// One end.
    pub a: End,
    /// The other.
    pub b: End,
}

impl Pair {
    /// Returns two ends with each other's addresses, without keys.
    ///
    /// # Errors
    /// No memory, or no random octets.
    pub fn new(algorithm: Algorithm, protocol: Protocol) -> anyhow::Result<Self> {
        let [a, b] = [1, 2].map(|host| SocketAddr::from(([192, 0, 2, host], 6789)));
        Ok(Self { a: End::new(algorithm, protocol, a, b)?, b: End::new(algorithm, protocol, b, a)? })
    }

    /// Sets `a`'s send key and `b`'s receive key to `key`; `previous` becomes `b`'s previous key.
    pub fn change_key(&mut self, key: &[u8; KEY], previous: Option<&[u8; KEY]>) {
        if let Some(previous) = previous {
            self.b.set_key(Slot::Previous, previous);
        }
        self.b.set_key(Slot::Receive, key);
        self.a.set_key(Slot::Send, key);
    }

    /// Swaps the two ends.
    pub fn turn(&mut self) {
        std::mem::swap(&mut self.a, &mut self.b);
    }

    /// Asserts that all frames of each end are free.
    ///
    /// # Panics
    /// If one is not.
    pub fn assert_frames_are_back(&self) {
        for end in [&self.a, &self.b] {
            assert_eq!(end.datapath.pool.free(), end.datapath.pool.total(), "frames of {}", end.me);
        }
    }
}

impl End {
    fn new(algorithm: Algorithm, protocol: Protocol, me: SocketAddr, peer: SocketAddr) -> anyhow::Result<Self> {
        let (umem, pool) = Umem::new(UmemConfig { frames: FRAMES, frame_size: CHUNK, headroom: 0, huge_pages: false })?;
        let (sender, reports) = mpsc::channel(REPORT_QUEUE);
        let mut datapath = Datapath::new(0, Arc::new(Crew::new(0)?), umem, pool, sender)?;
        let keys = KeyWriter::anonymous(4);
        let tunnel = Tunnel::with_keys(TUNNEL, Keys::alone(algorithm, keys.reader(), TUNNEL), NO_LIMITS);
        datapath.tunnels.insert(TUNNEL, Tunnel { protocol, peer: Some(peer), ..tunnel });
        datapath.add_address(me, TUNNEL);
        let (received, outgoing, arrivals) = (Vec::new(), Vec::new(), Vec::new());
        Ok(Self { datapath, device: Recorder::default(), reports, keys, me, received, outgoing, arrivals })
    }

    /// Returns its own carrier address.
    pub fn me(&self) -> SocketAddr {
        self.me
    }

    /// Sets a key. It is valid from the next batch on.
    pub fn set_key(&mut self, slot: Slot, key: &[u8; KEY]) {
        self.keys.set(TUNNEL.into(), slot, key);
        self.pass(Duration::from_nanos(1));
    }

    /// Removes a key.
    pub fn clear_key(&mut self, slot: Slot) {
        self.keys.clear(TUNNEL.into(), slot);
        self.pass(Duration::from_nanos(1));
    }

    /// Advances the datapath's clock.
    pub fn pass(&mut self, time: Duration) {
        self.datapath.now += time;
    }

    /// Returns the tunnel.
    ///
    /// # Panics
    /// If it was removed.
    pub fn tunnel(&mut self) -> &mut Tunnel {
        self.datapath.tunnels.get_mut(&TUNNEL).expect("it was put in by `new`")
    }

    /// Returns the tunnel's counters.
    pub fn counters(&self) -> Arc<Counters> {
        self.datapath.tunnels.get(&TUNNEL).expect("it was put in by `new`").counters.clone()
    }

    /// Queues a frame as the private program redirects it: the stamp, the rest of an Ethernet header, and an IP packet, which is a
    /// superframe unless `gso_size` is 0. Returns `false` if no frames of memory are left.
    pub fn push(&mut self, packet: &[u8], gso_size: u16) -> bool {
        let stamp = Stamp { hub: 0, encapsulated: false, gso_size, tunnel: TUNNEL };
        let ethertype = if packet.first().is_some_and(|first| first >> 4 == 6) { [0x86, 0xDD] } else { [0x08, 0x00] };
        self.push_frame(&[&stamp.to_mac()[..], &[2; stamp::LEN], &ethertype, packet].concat())
    }

    /// Queues a whole frame, unchanged. Returns `false` if no frames of memory are left.
    pub fn push_frame(&mut self, frame: &[u8]) -> bool {
        let before = self.received.len();
        let mut pieces = frame.chunks((CHUNK - PACKET_HEADROOM) as usize).peekable();
        while let Some(piece) = pieces.next() {
            let Some(mut chunk) = self.datapath.pool.take() else {
                self.received.drain(before..).for_each(|packet| self.datapath.pool.put(packet.frame));
                return false;
            };
            let place = PACKET_HEADROOM as usize..PACKET_HEADROOM as usize + piece.len();
            self.datapath.umem.chunk_mut(&mut chunk)[place].copy_from_slice(piece);
            let (len, more) = (piece.len() as u32, pieces.peek().is_some());
            self.received.push(Packet { frame: chunk, offset: PACKET_HEADROOM, len, more });
        }
        true
    }

    /// Seals the queued packets, counts them as sent and returns them. Packets whose key was removed are not sent.
    pub fn seal(&mut self) -> Vec<Datagram> {
        self.seal_in_place();
        let Self { datapath, outgoing, .. } = self;
        let mut datagrams = Vec::with_capacity(outgoing.len());
        for out in outgoing.drain(..) {
            if out.ready {
                let octets = datapath.umem.chunk(&out.frame)[out.datagram.clone()].to_vec();
                datagrams.push(Datagram { octets, tos: out.marks.tos });
            }
            if let Some(tunnel) = datapath.tunnels.get(&out.tunnel) {
                match (out.ready, out.kind) {
                    (true, Type::Data) => tunnel.counters.sent(out.octets),
                    (true, Type::Control) => tunnel.counters.count(Verdict::ControlSent),
                    (false, Type::Data) => tunnel.counters.count(Verdict::NoSendKey),
                    (false, Type::Control) => tunnel.counters.count(Verdict::ControlUnsent),
                }
            }
            datapath.pool.put(out.frame);
        }
        datagrams
    }

    /// Seals a message of the daemon.
    pub fn seal_message(&mut self, message: &ControlMessage) -> Vec<Datagram> {
        self.datapath.seal_message(TUNNEL, message, &mut self.outgoing);
        self.seal()
    }

    /// Seals and returns the packets that had to wait, if they may leave now.
    pub fn release(&mut self) -> Vec<Datagram> {
        self.datapath.release_held(&mut self.outgoing);
        self.seal()
    }

    /// Seals the questions to addresses where the peer may be now, and returns them with the addresses.
    pub fn challenges(&mut self) -> Vec<(SocketAddr, Datagram)> {
        self.datapath.seal_challenges(&mut self.outgoing);
        let to: Vec<SocketAddr> = self.outgoing.iter().filter_map(|out| out.to.as_deref().copied()).collect();
        to.into_iter().zip(self.seal()).collect()
    }

    /// Seals the queued packets, and leaves them for [`End::seal`].
    pub fn seal_in_place(&mut self) {
        let Self { datapath, received, outgoing, .. } = self;
        match datapath.tunnels.get(&TUNNEL).map(|tunnel| tunnel.protocol) {
            Some(Protocol::Ethernet) => datapath.seal_frames(Some(TUNNEL), received, outgoing),
            _ => datapath.seal(received, outgoing),
        }
    }

    /// Queues a datagram from `from` for [`End::open`], as AF_XDP does. A datagram for which there is no free frame is counted.
    pub fn push_datagram(&mut self, from: SocketAddr, Datagram { octets, tos }: &Datagram) {
        let place = FRESH..FRESH + octets.len().min(MAX_DATAGRAM_OCTETS);
        let datagram = match self.datapath.pool.take() {
            Some(frame) if place.end > CHUNK as usize => {
                self.datapath.pool.put(frame);
                Err(Verdict::BadLength)
            }
            Some(mut frame) => {
                self.datapath.umem.chunk_mut(&mut frame)[place.clone()].copy_from_slice(octets);
                Ok((frame, place))
            }
            None => Err(Verdict::NoFrame),
        };
        self.arrivals.push(Arrival { to: Some(self.me), from, tos: *tos, was_joined: false, via: Via::Card, datagram });
    }

    /// Opens the queued datagrams and delivers their packets.
    pub fn open(&mut self) {
        self.datapath.open(&mut self.arrivals, None);
        self.datapath.deliver(&mut self.device);
    }

    /// Receives datagrams of the peer, and returns the packets that were delivered, without Ethernet headers.
    pub fn receive(&mut self, from: &Self, datagrams: &[Datagram]) -> Vec<Vec<u8>> {
        datagrams.iter().for_each(|datagram| self.push_datagram(from.me, datagram));
        self.open();
        self.device.frames.drain(..).map(|frame| frame.get(ETHERNET..).unwrap_or_default().to_vec()).collect()
    }

    /// Adds a second tunnel's target, so that the datapath checks each packet for that tunnel's datagrams.
    #[cfg(feature = "harness")]
    pub fn add_other_target(&mut self) {
        let here = self.tunnel().target();
        self.datapath.targets.set(TUNNEL, here);
        self.datapath.targets.set(TUNNEL + 1, Some(SocketAddr::from(([192, 0, 2, 3], 6789))));
    }

    /// Fills the queue of reports.
    pub fn fill_reports(&mut self) {
        while self.datapath.reports.try_send((TUNNEL, WorkerReport::ManySent)).is_ok() {}
    }

    /// Drops the last queued piece.
    pub fn drop_last_piece(&mut self) {
        self.received.pop().into_iter().for_each(|piece| self.datapath.pool.put(piece.frame));
    }

    /// Returns the sum over all verdicts but `Fragmented`: the number of packets with an outcome.
    pub fn accounted(&self) -> u64 {
        let counters = self.counters();
        Verdict::ALL
            .iter()
            .filter(|verdict| **verdict != Verdict::Fragmented)
            .map(|verdict| counters.of(*verdict))
            .sum()
    }
}

pub(super) const NO_LIMITS: KeyLimits = KeyLimits {
    send_packets: u64::MAX,
    send_octets: u64::MAX,
    send_age: Duration::MAX,
    receive_packets: 0,
    receive_age: Duration::MAX,
    retry: Duration::from_secs(10),
};

impl Devices for Recorder {
    type Device = Self;

    fn hub(&mut self, slot: usize) -> Option<&mut Self> {
        (slot == 0 && !self.is_gone).then_some(self)
    }

    fn lan(&mut self, _slot: usize) -> Option<&mut Self> {
        None
    }
}

impl Device for Recorder {
    fn transmit(&mut self, packet: Packet, umem: &Umem, pool: &mut Pool) -> Result<(), Packet> {
        if self.room == Some(0) {
            return Err(packet);
        }
        self.room = self.room.map(|room| room - 1);
        if !self.forgets {
            self.frames.push(packet.data(umem).to_vec());
        }
        pool.put(packet.frame);
        Ok(())
    }

    fn takes_superframes(&self, _headers: &[u8], _now: Instant) -> bool {
        true
    }

    fn inject(&mut self, _headers: &[u8], pieces: &[IoSlice<'_>], _pool: &mut Pool, _now: Instant) -> Injected {
        if self.refuses {
            return Injected::Refused;
        }
        if self.room == Some(0) {
            return Injected::Dropped;
        }
        if self.forgets {
            return Injected::Sent;
        }
        let octets: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).collect();
        let (ethernet, packet) = octets[VNET_HEADER..].split_at(ETHERNET);
        let gso_size = u16::from_ne_bytes([octets[4], octets[5]]);
        let whole = [packet];
        let mut superframe = Superframe::parse(&whole, gso_size).expect("it was joined of packets");
        let mut segment = vec![0; superframe.longest()];
        while let Some(len) = superframe.cut(&mut segment) {
            self.frames.push([ethernet, &segment[..len]].concat());
        }
        self.superframes += 1;
        Injected::Sent
    }
}

/// Returns an IPv4 TCP packet with DF and `payload` octets of payload. All of these packets belong to one flow.
pub fn tcp(sequence: u32, id: u16, payload: usize) -> Vec<u8> {
    let [high, low] = ((40 + payload) as u16).to_be_bytes();
    let mut packet = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, TCP, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2];
    packet[4..6].copy_from_slice(&id.to_be_bytes());
    let mut sum = Sum::default();
    sum.add(&packet);
    packet[10..12].copy_from_slice(&sum.checksum());
    packet.extend([0x9C, 0x40, 0x14, 0x51]);
    packet.extend(sequence.to_be_bytes());
    packet.extend([0, 0, 0, 9, 0x50, 0x10, 1, 2, 0, 0, 0, 0]);
    packet.resize(40 + payload, 7);
    let mut sum = Sum::pseudo_header(IpVersion::V4, &packet[..20], TCP, 20 + payload);
    sum.add(&packet[20..]);
    packet[36..38].copy_from_slice(&transport_checksum(sum, TCP));
    packet
}

/// Returns an IPv4 UDP packet with DF and `payload` octets of payload.
pub fn udp(payload: usize) -> Vec<u8> {
    let [high, low] = ((28 + payload) as u16).to_be_bytes();
    let mut packet = vec![0x45, 0, high, low, 0, 1, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 198, 51, 100, 2];
    let mut sum = Sum::default();
    sum.add(&packet);
    packet[10..12].copy_from_slice(&sum.checksum());
    let [high, low] = ((8 + payload) as u16).to_be_bytes();
    packet.extend([0x9C, 0x40, 0x14, 0x51, high, low, 0, 0]);
    packet.resize(28 + payload, 7);
    packet
}

/// The first octet of an input's operations on sealed packets.
const SEALED_OPERATIONS: u8 = 240;

/// Runs the operations in `input`: packets, noise, damage, changes of keys and of the tunnel, in any order.
///
/// # Panics
/// If a frame of memory is missing afterwards, a datagram is not under one verdict, or a private frame under none.
pub fn run(input: &[u8]) {
    let mut input = Input(input);
    let mut pair = Pair::new(Algorithm::Blowfish, Protocol::Ip).expect("memory and random octets");
    let mut line: Vec<Datagram> = Vec::new();
    let mut key = [1; KEY];
    let mut serial = 0;
    pair.change_key(&key, None);
    while let Some(op) = input.octet() {
        let Pair { a, b } = &mut pair;
        let accounted = (a.accounted(), b.accounted());
        if op >= SEALED_OPERATIONS {
            sealed::operate(&mut pair, op - SEALED_OPERATIONS, &mut serial);
            continue;
        }
        match op % 12 {
            0 => {
                let (gso_size, len) = (input.number(), input.number());
                if a.push(input.octets(len.into()), gso_size) {
                    line = a.seal();
                    assert!(a.accounted() > accounted.0, "a private frame is under no verdict");
                }
            }
            1 => {
                let (gso_size, len) = (input.number(), input.number() % 9000);
                if a.push(&udp(len.into()), gso_size) {
                    line = a.seal();
                    assert!(a.accounted() > accounted.0, "a private packet is under no verdict");
                }
            }
            2 | 3 => {
                let (flip, at) = (if op % 12 == 2 { 0 } else { input.octet().unwrap_or(1) }, input.number());
                let Some(mut datagram) = line.pop() else { continue };
                let at = usize::from(at) % datagram.octets.len().max(1);
                datagram.octets.get_mut(at).into_iter().for_each(|octet| *octet ^= flip);
                b.receive(a, &[datagram]);
                assert_eq!(b.accounted() - accounted.1, 1, "a datagram is under one verdict");
            }
            4 => {
                let (len, tos) = (input.number(), input.octet().unwrap_or(0));
                b.receive(a, &[Datagram { octets: input.octets(len.into()).to_vec(), tos }]);
                assert_eq!(b.accounted() - accounted.1, 1, "noise is under one verdict");
            }
            5 => {
                let before = key;
                key[0] = key[0].wrapping_add(1);
                pair.change_key(&key, Some(&before));
            }
            6 => pair.turn(),
            7 => a.clear_key(Slot::Send),
            8 => {
                let octet = input.octet().unwrap_or(0);
                let tunnel = b.tunnel();
                tunnel.nokey = octet & 1 != 0;
                tunnel.pinned = octet & 2 != 0;
                tunnel.protocol = if octet & 4 != 0 { Protocol::Ethernet } else { Protocol::Ip };
                tunnel.clamp_mss = octet & 8 != 0;
                tunnel.ignore_df = octet & 16 != 0;
                tunnel.limits.receive_packets = u64::from(octet >> 5);
                b.device.refuses = octet & 32 != 0;
            }
            9 => {
                let (gso_size, len) = (input.number(), input.number() % 9000);
                if a.push(&tcp(0, 0, len.into()), gso_size) {
                    line = a.seal();
                    assert!(a.accounted() > accounted.0, "a private segment is under no verdict");
                }
            }
            10 => while a.reports.try_recv().is_ok() {},
            _ => {
                let (tci, len) = (input.number(), input.number() % 9000);
                let before = input.octet().unwrap_or(0);
                let before = input.octets(before.into());
                let content = if len & 1 == 0 { tcp(0, 0, len.into()) } else { udp(len.into()) };
                let stamp = [&STAMP_TPID, &tci.to_be_bytes()[..]].concat();
                a.tunnel().protocol = Protocol::Ethernet;
                if a.push_frame(&[&[2; 12][..], &stamp, before, &content].concat()) {
                    line = a.seal();
                    assert!(a.accounted() > accounted.0, "a private frame is under no verdict");
                }
            }
        }
        pair.assert_frames_are_back();
    }
}

/// The rest of an input.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn octet(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn number(&mut self) -> u16 {
        u16::from_be_bytes([self.octet().unwrap_or(0), self.octet().unwrap_or(0)])
    }

    fn octets(&mut self, len: usize) -> &'a [u8] {
        let (some, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        some
    }
}
