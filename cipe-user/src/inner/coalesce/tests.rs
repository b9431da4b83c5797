//! Packets are joined, and the superframes cut again: the result must be the same packets.

use proptest::prelude::*;

use super::*;
use crate::inner::segment::Superframe;
use crate::inner::test_packets::Flow;

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 13 + at / 256) as u8).collect()
}

/// The packets of a flow with payloads of these `sizes`, in order; the last has PSH.
fn stream(flow: &Flow, sizes: &[usize]) -> Vec<Vec<u8>> {
    let mut flow = flow.clone();
    let last = sizes.len() - 1;
    let segment = |(index, size): (usize, &usize)| {
        flow.flags |= if index == last { PSH } else { 0 };
        let packet = flow.packet(&payload(*size));
        flow.id = flow.id.wrapping_add(1);
        flow.sequence = flow.sequence.wrapping_add(*size as u32);
        packet
    };
    sizes.iter().enumerate().map(segment).collect()
}

fn push(coalescer: &mut Coalescer, packet: &[u8]) {
    let headers = Headers::parse(packet);
    coalescer.push(headers.as_ref().ok().map(|headers| (packet, headers)));
}

/// The packet numbers of each run.
fn runs_of(coalescer: &mut Coalescer, packets: &[Vec<u8>]) -> Vec<Vec<usize>> {
    coalescer.clear();
    packets.iter().for_each(|packet| push(coalescer, packet));
    coalescer.runs().map(|run| run.packets().collect()).collect()
}

fn runs(packets: &[Vec<u8>]) -> Vec<Vec<usize>> {
    runs_of(&mut Coalescer::default(), packets)
}

/// Builds each superframe as the kernel gets it, cuts it again, and returns the packets run by run.
fn sent(coalescer: &mut Coalescer, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for run in coalescer.runs() {
        let headers = run.headers();
        let mut pieces = vec![headers];
        pieces.extend(run.packets().map(|packet| &packets[packet][headers.len()..]));
        if run.count() == 1 {
            assert_eq!((run.gso_size(), run.vnet_header(14)), (0, [0; VNET_HEADER]));
            all.push(pieces.concat());
            continue;
        }
        let mut superframe = Superframe::parse(&pieces, run.gso_size()).unwrap();
        assert_eq!(superframe.segments(), run.count());
        let mut buffer = vec![0; superframe.longest()];
        while let Some(len) = superframe.cut(&mut buffer) {
            all.push(buffer[..len].to_vec());
        }
    }
    all
}

#[test]
fn a_stream_becomes_one_superframe() {
    for flow in [Flow::tcp4(), Flow::tcp6(), Flow::udp4(), Flow::udp6()] {
        let packets = stream(&flow, &[1402; 46]);
        let mut coalescer = Coalescer::default();
        assert_eq!(runs_of(&mut coalescer, &packets), [(0..46).collect::<Vec<_>>()]);
        assert_eq!(sent(&mut coalescer, &packets), packets);
    }
}

#[test]
fn the_headers_are_those_of_the_packet_that_was_never_cut() {
    for flow in [Flow::tcp4(), Flow::tcp6()] {
        let mut coalescer = Coalescer::default();
        runs_of(&mut coalescer, &stream(&flow, &[100, 100, 40]));
        let run = coalescer.runs().next().unwrap();
        let whole = Flow { flags: flow.flags | PSH, ..flow.clone() }.with_partial_checksum(&payload(240));
        assert_eq!(run.headers(), &whole[..flow.transport() + 32]);

        let (transport, gso_type) = if flow.v6() { (40, 4) } else { (20, 1) };
        let mut expected = vec![1, gso_type];
        for field in [14 + transport + 32, 100, 14 + transport, 16u16] {
            expected.extend(field.to_ne_bytes());
        }
        assert_eq!(run.vnet_header(14), *expected);
    }
}

#[test]
fn a_short_segment_ends_a_run_and_a_longer_one_begins_the_next() {
    assert_eq!(runs(&stream(&Flow::tcp4(), &[100, 100, 99, 99, 100, 100])), [vec![0, 1, 2], vec![3], vec![4, 5]]);
}

#[test]
fn a_run_has_64_segments_and_64_kib_at_most() {
    let lengths = |sizes: &[usize]| runs(&stream(&Flow::tcp6(), sizes)).iter().map(Vec::len).collect::<Vec<_>>();
    assert_eq!(lengths(&[10; 130]), [64, 64, 2]);
    // 72 octets of headers.
    assert_eq!(lengths(&[(65_535 - 72) / 7; 10]), [7, 3]);
    assert_eq!(lengths(&[(65_535 - 72) / 7 + 1; 10]), [6, 4]);
}

#[test]
fn flows_that_come_mixed_are_joined_each() {
    let a = stream(&Flow::tcp4(), &[50; 4]);
    let b = stream(&Flow::tcp6(), &[60; 4]);
    let mixed: Vec<Vec<u8>> = a.into_iter().zip(b).flat_map(|(a, b)| [a, b]).collect();
    assert_eq!(runs(&mixed), [[0, 2, 4, 6], [1, 3, 5, 7]]);
}

/// A stream of three segments; `change` changes the middle one.
fn with_middle(flow: &Flow, change: impl Fn(&mut Flow)) -> Vec<Vec<u8>> {
    let mut packets = stream(flow, &[100; 3]);
    let mut middle = Flow { id: flow.id + 1, sequence: flow.sequence + 100, ..flow.clone() };
    change(&mut middle);
    packets[1] = middle.packet(&payload(100));
    packets
}

#[test]
fn a_segment_that_differs_is_not_joined() {
    type Change = (&'static str, fn(&mut Flow));
    let changes: [Change; 11] = [
        ("tos", |flow| flow.tos ^= 4),
        ("ecn", |flow| flow.tos |= 3),
        ("ttl", |flow| flow.ttl -= 1),
        ("source port", |flow| flow.ports[0] ^= 1),
        ("gap", |flow| flow.sequence += 1),
        ("overlap", |flow| flow.sequence -= 1),
        ("acknowledgement", |flow| flow.ack += 1),
        ("window", |flow| flow.window += 1),
        ("time stamp", |flow| flow.options[7] ^= 1),
        ("echo flag", |flow| flow.flags |= 0x40),
        ("options missing", |flow| flow.options.clear()),
    ];
    for flow in [Flow::tcp4(), Flow::tcp6()] {
        assert_eq!(runs(&with_middle(&flow, |_| ())), [[0, 1, 2]]);
        for (what, change) in changes {
            let packets = with_middle(&flow, change);
            // Another port is another flow; the third segment still does not continue the first.
            assert_eq!(runs(&packets), [[0], [1], [2]], "{what}");
        }
    }
    let v4_only: [Change; 3] = [
        ("id that stays", |flow| flow.id -= 1),
        ("df", |flow| flow.dont_fragment = false),
        ("ip options", |flow| flow.ip_options = 1),
    ];
    for (what, change) in v4_only {
        assert_eq!(runs(&with_middle(&Flow::tcp4(), change)), [[0], [1], [2]], "{what}");
    }
}

#[test]
fn segments_with_flags_of_their_own_are_never_joined() {
    for flag in [SYN, RST, URG, CWR] {
        for flow in [Flow::tcp4(), Flow::tcp6()] {
            let flow = Flow { flags: flow.flags | flag, ..flow };
            assert_eq!(runs(&stream(&flow, &[100; 3])), [[0], [1], [2]], "{flag:#x}");
        }
    }
}

#[test]
fn push_and_fin_end_a_run() {
    for flag in [PSH, FIN, PSH | FIN] {
        let mut packets = with_middle(&Flow::tcp4(), |flow| flow.flags |= flag);
        packets.extend(with_middle(&Flow { sequence: 9, ..Flow::tcp4() }, |_| ()));
        assert_eq!(runs(&packets), [vec![0, 1], vec![2], vec![3, 4, 5]]);
    }
}

#[test]
fn a_pure_acknowledgement_is_not_joined_and_keeps_its_place() {
    let mut packets = stream(&Flow::tcp4(), &[100, 100, 100, 100]);
    packets.insert(2, Flow { sequence: Flow::tcp4().sequence + 200, id: 0, ..Flow::tcp4() }.packet(&[]));
    assert_eq!(runs(&packets), [vec![0, 1], vec![2], vec![3, 4]]);
}

#[test]
fn a_damaged_segment_stays_damaged_and_alone() {
    for flow in [Flow::tcp4(), Flow::tcp6()] {
        let whole = stream(&flow, &[100; 3]);
        for at in 0..whole[1].len() {
            let mut packets = whole.clone();
            packets[1][at] ^= 0x10;
            let mut coalescer = Coalescer::default();
            assert!(runs_of(&mut coalescer, &packets).contains(&vec![1]), "octet {at}");
            let mut sent = sent(&mut coalescer, &packets);
            sent.sort();
            packets.sort();
            assert_eq!(sent, packets);
        }
    }
}

#[test]
fn a_checksum_of_zero_in_its_other_form_is_kept() {
    for flow in [Flow::tcp4(), Flow::tcp6()] {
        let field = flow.transport() + flow.checksum_field();
        // A packet whose payload is its own checksum has a checksum of zero.
        let payload = flow.packet(&[0; 2])[field..field + 2].to_vec();
        let first = flow.packet(&payload);
        let mut packets = vec![first, Flow { id: flow.id + 1, sequence: flow.sequence + 2, ..flow }.packet(&payload)];
        assert_eq!((&packets[0][field..field + 2], runs(&packets)), (&[0, 0][..], vec![vec![0, 1]]));
        packets[0][field..field + 2].fill(0xFF);
        assert_eq!(runs(&packets), [[0], [1]]);
    }
}

#[test]
fn datagrams_keep_their_headers_and_their_borders() {
    for flow in [Flow::udp4(), Flow::udp6()] {
        let mut coalescer = Coalescer::default();
        let packets = stream(&flow, &[100, 100, 40, 100]);
        assert_eq!(runs_of(&mut coalescer, &packets), [vec![0, 1, 2], vec![3]]);
        let run = coalescer.runs().next().unwrap();
        assert_eq!(run.headers(), &flow.with_partial_checksum(&payload(240))[..flow.transport() + 8]);
        let mut expected = vec![1, 5];
        for field in [14 + flow.transport() + 8, 100, 14 + flow.transport(), 6] {
            expected.extend((field as u16).to_ne_bytes());
        }
        assert_eq!(run.vnet_header(14), *expected);
        assert_eq!(runs(&stream(&flow, &[0, 0])), [[0], [1]], "empty ones are not joined");
    }
}

#[test]
fn a_datagram_without_a_checksum_is_not_joined() {
    let mut packets = stream(&Flow::udp4(), &[100; 3]);
    packets.iter_mut().for_each(|packet| packet[26..28].fill(0));
    assert_eq!(runs(&packets), [[0], [1], [2]]);
}

#[test]
fn other_packets_pass_as_they_are() {
    assert_eq!(runs(&[vec![], vec![0x45], vec![0xFF; 60]]), [[0], [1], [2]]);
}

/// An event on the path of a segment.
#[derive(Clone, Debug)]
enum Event {
    Sent(usize),
    Lost(usize),
    Changed(usize, usize, u8),
    Swapped(usize),
    Twice(usize),
    Ack,
    Skip,
}

fn event() -> impl Strategy<Value = Event> {
    let size = prop_oneof![8 => Just(600usize), 2 => 1usize..900];
    prop_oneof![
        20 => size.clone().prop_map(Event::Sent),
        1 => size.clone().prop_map(Event::Lost),
        2 => (size.clone(), 0usize..72, any::<u8>()).prop_map(|(size, at, bits)| Event::Changed(size, at, bits)),
        1 => size.clone().prop_map(Event::Swapped),
        1 => size.prop_map(Event::Twice),
        1 => Just(Event::Ack),
        3 => Just(Event::Skip),
    ]
}

/// The packets of a flow after these events with these flags, and whether each still belongs to the flow.
fn travel(mut flow: Flow, events: &[(Event, u8)]) -> Vec<(Vec<u8>, bool)> {
    let mut packets = Vec::new();
    for (event, flags) in events {
        flow.flags = 0x10 | if flags % 8 == 0 { *flags } else { 0 };
        let size = match event {
            Event::Sent(size) | Event::Lost(size) | Event::Swapped(size) | Event::Twice(size) => *size,
            Event::Changed(size, ..) => *size,
            Event::Ack | Event::Skip => 0,
        };
        let packet = flow.packet(&payload(size));
        match event {
            Event::Lost(_) | Event::Skip => {}
            Event::Changed(_, at, bits) => {
                let mut packet = packet;
                let at = at % packet.len();
                packet[at] ^= bits;
                packets.push((packet, false));
            }
            Event::Swapped(_) => packets.insert(packets.len().saturating_sub(1), (packet, true)),
            Event::Twice(_) => packets.extend([(packet.clone(), true), (packet, true)]),
            Event::Sent(_) | Event::Ack => packets.push((packet, true)),
        }
        if !matches!(event, Event::Skip) {
            flow.id = flow.id.wrapping_add(1);
        }
        flow.sequence = flow.sequence.wrapping_add(size as u32);
    }
    packets
}

proptest! {
    #[test]
    fn cutting_gives_back_the_very_packets_in_the_order_of_each_flow(
        flows in prop::collection::vec((Flow::any(), prop::collection::vec((event(), any::<u8>()), 0..60)), 1..5),
        simple: bool, mix in prop::collection::vec(0usize..5, 0..250),
    ) {
        let mut queues: Vec<_> = flows
            .into_iter()
            .map(|(flow, events)| {
                // Half of the cases have no IP options, because a flow with IP options is never joined.
                let flow = if simple { Flow { ip_options: 0, ..flow } } else { flow };
                travel(flow, &events).into_iter()
            })
            .collect();
        let mut packets = Vec::new();
        let mut origins = Vec::new();
        for queue in mix {
            let queue = queue % queues.len();
            if let Some((packet, of_its_flow)) = queues[queue].next() {
                packets.push(packet);
                origins.push(of_its_flow.then_some(queue));
            }
        }

        let mut coalescer = Coalescer::default();
        let runs = runs_of(&mut coalescer, &packets);
        let order = runs.concat();
        let mut seen = order.clone();
        seen.sort_unstable();
        prop_assert!(seen.iter().copied().eq(0..packets.len()));
        prop_assert!(runs.is_sorted_by_key(|run| run[0]));
        for flow in 0..queues.len() {
            prop_assert!(order.iter().filter(|packet| origins[**packet] == Some(flow)).is_sorted());
        }
        let expected: Vec<_> = order.iter().map(|packet| packets[*packet].clone()).collect();
        prop_assert_eq!(sent(&mut coalescer, &packets), expected);
    }

    #[test]
    fn a_clean_stream_is_always_joined(
        flow in Flow::any(), is_udp: bool, count in 2usize..60, size in 1usize..1000, last in 1usize..1000,
    ) {
        let protocol = if is_udp { UDP } else { TCP };
        let flow = Flow { protocol, ip_options: 0, flags: 0x10, ..flow };
        let mut sizes = vec![size; count];
        sizes.push(last.min(size));
        let packets = stream(&flow, &sizes);
        prop_assert_eq!(runs(&packets).len(), 1);
    }

    #[test]
    fn any_octets_are_taken(packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 0..10)) {
        prop_assert_eq!(runs(&packets).len(), packets.len());
    }
}
