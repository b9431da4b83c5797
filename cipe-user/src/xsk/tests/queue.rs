use std::collections::VecDeque;

use proptest::prelude::*;
use rustix::net::xdp::{XdpDesc, XdpDescOptions};

use super::super::frames::{Packet, Pool};
use super::super::queue::{Anomalies, Queue};
use super::super::ring::{Consumer, Memory, Producer};
use super::super::umem::Layout;
use super::heap::Heap;

const LAYOUT: Layout = Layout { umem: 7, frames: 48, frame_size: 2048, headroom: 0 };
const SLOTS: u32 = 16;

/// Rings of descriptors; `XdpDesc` has no default value, so they store tuples.
#[derive(Clone)]
struct Descriptors(Heap<(u64, u32, u32)>);

impl Memory for Descriptors {
    type Slot = XdpDesc;

    fn slots(&self) -> u32 {
        self.0.slots()
    }

    fn producer(&self) -> &std::sync::atomic::AtomicU32 {
        self.0.producer()
    }

    fn consumer(&self) -> &std::sync::atomic::AtomicU32 {
        self.0.consumer()
    }

    fn flags(&self) -> &std::sync::atomic::AtomicU32 {
        self.0.flags()
    }

    fn read(&self, index: u32) -> XdpDesc {
        let (addr, len, options) = self.0.read(index);
        XdpDesc { addr, len, options: XdpDescOptions::from_bits_retain(options) }
    }

    fn write(&self, index: u32, slot: XdpDesc) {
        self.0.write(index, (slot.addr, slot.len, slot.options.bits()));
    }
}

/// The kernel's end of all four rings.
struct Kernel {
    receive: Producer<Descriptors>,
    transmit: Consumer<Descriptors>,
    fill: Consumer<Heap<u64>>,
    completion: Producer<Heap<u64>>,
    /// Frames picked up from the transmit ring and not completed.
    in_flight: VecDeque<u64>,
}

type TestQueue = Queue<Descriptors, Heap<u64>>;

fn queue(multi_buffer: bool) -> (TestQueue, Kernel, Pool) {
    let start = u32::MAX - 20;
    let descriptors = || Descriptors(Heap::new(SLOTS, start));
    let addresses = || Heap::new(SLOTS, start);
    let (receive, transmit, fill, completion) = (descriptors(), descriptors(), addresses(), addresses());
    let kernel = Kernel {
        receive: Producer::new(receive.clone()),
        transmit: Consumer::new(transmit.clone()),
        fill: Consumer::new(fill.clone()),
        completion: Producer::new(completion.clone()),
        in_flight: VecDeque::new(),
    };
    (Queue::new(LAYOUT, multi_buffer, Some(receive), Some(transmit), fill, completion), kernel, Pool::full(LAYOUT))
}

impl Kernel {
    fn descriptor(&mut self, addr: u64, len: u32, more: bool) {
        let options = if more { XdpDescOptions::XDP_PKT_CONTD } else { XdpDescOptions::empty() };
        assert!(self.receive.push(XdpDesc { addr, len, options }));
        self.receive.submit();
    }

    /// Delivers a packet in `parts` descriptors, if the rings allow.
    fn deliver(&mut self, parts: u32) -> bool {
        if self.fill.available() < parts || self.receive.free(parts) < parts {
            return false;
        }
        for part in 0..parts {
            let addr = self.fill.peek(part) + 256;
            self.descriptor(addr, 100, part + 1 < parts);
        }
        self.fill.release(parts);
        true
    }

    /// Picks up what the transmit ring holds.
    fn pick_up(&mut self) -> Vec<(u32, bool)> {
        let available = self.transmit.available();
        let descriptors: Vec<XdpDesc> = (0..available).map(|n| self.transmit.peek(n)).collect();
        self.transmit.release(available);
        self.in_flight.extend(descriptors.iter().map(|d| d.addr));
        descriptors.iter().map(|d| (d.len, d.options.contains(XdpDescOptions::XDP_PKT_CONTD))).collect()
    }

    fn complete(&mut self, count: usize) {
        for _ in 0..count {
            if self.completion.free(1) == 0 {
                break;
            }
            let Some(address) = self.in_flight.pop_front() else { break };
            assert!(self.completion.push(address));
        }
        self.completion.submit();
    }
}

fn packet(pool: &mut Pool, len: u32, more: bool) -> Packet {
    Packet { frame: pool.take().expect("a free frame"), offset: 256, len, more }
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Fill(u32),
    Deliver(u32),
    Nonsense(u64, u32, bool),
    Receive(usize),
    Send,
    PickUp,
    Complete(usize),
    FalseCompletion(u64),
    Reclaim,
}

fn step() -> impl Strategy<Value = Step> {
    let address = || prop_oneof![0..u64::from(LAYOUT.frames) * 2048 + 4096, any::<u64>()];
    prop_oneof![
        (0..20_u32).prop_map(Step::Fill),
        (1..5_u32).prop_map(Step::Deliver),
        (address(), 0..5000_u32, any::<bool>()).prop_map(|(a, l, m)| Step::Nonsense(a, l, m)),
        (0..8_usize).prop_map(Step::Receive),
        Just(Step::Send),
        Just(Step::PickUp),
        (0..8_usize).prop_map(Step::Complete),
        address().prop_map(Step::FalseCompletion),
        Just(Step::Reclaim),
    ]
}

proptest! {
    #[test]
    fn no_frame_is_lost_or_doubled_whatever_the_kernel_says(steps in prop::collection::vec(step(), 0..300)) {
        let (mut queue, mut kernel, mut pool) = queue(true);
        let mut packets = VecDeque::new();
        for step in steps {
            match step {
                Step::Fill(want) => { queue.fill(&mut pool, want); }
                Step::Deliver(parts) => { kernel.deliver(parts); }
                Step::Nonsense(addr, len, more) => {
                    if kernel.receive.free(1) > 0 {
                        kernel.descriptor(addr, len, more);
                    }
                }
                Step::Receive(max) => { queue.recv(&mut packets, max); }
                Step::Send => { queue.send(&mut packets); }
                Step::PickUp => { kernel.pick_up(); }
                Step::Complete(count) => kernel.complete(count),
                Step::FalseCompletion(address) => {
                    if kernel.completion.push(address) {
                        kernel.completion.submit();
                    }
                }
                Step::Reclaim => { queue.reclaim(&mut pool); }
            }
            prop_assert_eq!(pool.free() + packets.len() + queue.in_kernel(), pool.total());
            prop_assert!(packets.iter().all(|p| p.offset + p.len <= LAYOUT.frame_size));
        }
        packets.into_iter().for_each(|packet| pool.put(packet.frame));
        let lost = queue.dismantle(&mut pool, ());
        prop_assert_eq!(pool.free() + lost.len(), pool.total());
        let mut seen: Vec<u32> = std::iter::from_fn(|| pool.take()).map(|frame| frame.index()).collect();
        seen.sort_unstable();
        seen.dedup();
        prop_assert_eq!(seen.len() + lost.len(), LAYOUT.frames as usize);
    }
}

#[test]
fn a_packet_is_received_whole_or_not_yet() {
    let (mut queue, mut kernel, mut pool) = queue(true);
    queue.fill(&mut pool, SLOTS);
    assert!(kernel.deliver(1) && kernel.deliver(4) && kernel.deliver(1));
    let unfinished = kernel.fill.peek(0);
    kernel.fill.release(1);
    kernel.descriptor(unfinished, 10, true);
    let mut packets = Vec::new();
    assert_eq!(queue.recv(&mut packets, 2), 5, "the end of the packet that goes past two descriptors");
    assert_eq!(packets.iter().map(|p| p.more).collect::<Vec<_>>(), [false, true, true, true, false]);
    assert_eq!(queue.recv(&mut packets, 64), 1, "and not the one without an end");
    assert_eq!(queue.recv(&mut packets, 64), 0);
    let end = kernel.fill.peek(0);
    kernel.fill.release(1);
    kernel.descriptor(end, 10, false);
    assert_eq!(queue.recv(&mut packets, 64), 2);
    assert_eq!(queue.anomalies, Default::default());
}

#[test]
fn nonsense_from_the_kernel_is_counted_and_dropped_with_its_packet() {
    let (mut queue, mut kernel, mut pool) = queue(true);
    queue.fill(&mut pool, 4);
    let addresses: Vec<u64> = (0..4).map(|n| kernel.fill.peek(n)).collect();
    kernel.fill.release(4);
    kernel.descriptor(u64::MAX, 10, false);
    kernel.descriptor(addresses[0] + 2000, 100, false);
    kernel.descriptor(addresses[1], 100, true);
    kernel.descriptor(addresses[1], 100, false);
    kernel.descriptor(addresses[2], u32::MAX, false);
    kernel.descriptor(addresses[3], 100, false);
    let mut packets = Vec::new();
    assert_eq!(queue.recv(&mut packets, 64), 1);
    assert_eq!(queue.anomalies.receive, 4);
    packets.into_iter().for_each(|packet| pool.put(packet.frame));
    queue.reclaim(&mut pool);
    assert_eq!(pool.free(), pool.total());
}

#[test]
fn a_ring_full_of_a_packet_without_end_does_not_stop_reception() {
    let (mut queue, mut kernel, mut pool) = queue(true);
    queue.fill(&mut pool, SLOTS);
    for n in 0..SLOTS {
        let address = kernel.fill.peek(n);
        kernel.descriptor(address, 10, true);
    }
    kernel.fill.release(SLOTS);
    let mut packets = Vec::new();
    assert_eq!(queue.recv(&mut packets, 64), 0);
    assert_eq!(queue.anomalies.receive, 1);
    queue.fill(&mut pool, SLOTS);
    assert!(kernel.deliver(1));
    assert_eq!(queue.recv(&mut packets, 64), 1);
}

#[test]
fn a_packet_of_several_descriptors_is_sent_whole_or_stays() {
    let (mut queue, mut kernel, mut pool) = queue(true);
    let mut packets: VecDeque<_> = (0..14).map(|n| packet(&mut pool, n + 1, false)).collect();
    packets.extend([packet(&mut pool, 100, true), packet(&mut pool, 101, true), packet(&mut pool, 102, false)]);
    assert_eq!(queue.send(&mut packets), 14);
    assert_eq!((packets.len(), queue.unsent()), (3, 14));
    kernel.pick_up();
    assert_eq!(queue.send(&mut packets), 3);
    assert_eq!(kernel.pick_up(), [(100, true), (101, true), (102, false)]);
    kernel.complete(17);
    queue.reclaim(&mut pool);
    kernel.complete(1);
    queue.reclaim(&mut pool);
    assert_eq!((pool.free(), queue.in_kernel()), (pool.total(), 0));
}

#[test]
fn a_last_packet_without_end_waits_for_the_rest() {
    let (mut queue, mut kernel, mut pool) = queue(true);
    let mut packets = VecDeque::from([packet(&mut pool, 1, false), packet(&mut pool, 2, true)]);
    assert_eq!((queue.send(&mut packets), packets.len()), (1, 1));
    packets.push_back(packet(&mut pool, 3, false));
    assert_eq!((queue.send(&mut packets), packets.len()), (2, 0));
    assert_eq!(kernel.pick_up().len(), 3);
}

#[test]
fn what_the_kernel_would_refuse_never_reaches_it() {
    let (mut queue, mut kernel, mut pool) = queue(false);
    let mut packets = VecDeque::from([
        packet(&mut pool, 0, false),
        packet(&mut pool, 2048 - 255, false),
        packet(&mut pool, 100, true),
        packet(&mut pool, 100, false),
        packet(&mut pool, 2048 - 256, false),
    ]);
    packets[1].offset = 256;
    assert_eq!(queue.send(&mut packets), 1);
    assert_eq!(queue.anomalies.send, 3, "empty, beyond the chunk, and in pieces without multi-buffer");
    assert_eq!(kernel.pick_up(), [(2048 - 256, false)]);
    queue.reclaim(&mut pool);
    assert_eq!(pool.free(), pool.total() - 1);
}

#[test]
fn what_was_picked_up_and_never_completed_stays_countable() {
    let (mut queue, mut kernel, mut pool) = queue(true);
    let mut packets: VecDeque<_> = (0..3).map(|_| packet(&mut pool, 60, false)).collect();
    queue.send(&mut packets);
    kernel.pick_up();
    packets.extend((0..2).map(|_| packet(&mut pool, 60, false)));
    queue.send(&mut packets);
    queue.fill(&mut pool, 8);
    kernel.deliver(2);
    kernel.complete(1);
    queue.reclaim(&mut pool);
    assert_eq!(queue.in_kernel(), 2 + 2 + 8);
    let lost = queue.dismantle(&mut pool, ());
    assert_eq!((lost.len(), pool.free()), (2, pool.total() - 2));
}

#[test]
fn a_full_ring_that_nothing_is_wanted_of_stays_as_it_is() {
    let (mut queue, mut kernel, mut pool) = queue(true);
    queue.fill(&mut pool, SLOTS);
    while kernel.deliver(1) {}
    let mut out = Vec::new();
    assert_eq!(queue.recv(&mut out, 0), 0);
    assert_eq!(queue.anomalies, Anomalies::default());
    assert_eq!(queue.recv(&mut out, usize::MAX), SLOTS as usize);
}
