//! Sockets on real devices: veth pairs in a network namespace for each test. Skipped without root, with the reason
//! printed.
//!
//! ```text
//! round trip       [one]==veth==[two]          AF_XDP transmit on one, XDP redirect and AF_XDP receive on two
//! forwarding  Tap->[lan]==[inner]  [outer]==[wire]->Tap    one UMEM: received on inner, sent on outer
//! ```

use std::collections::VecDeque;

use super::net::{Tap, frame, in_namespace, ip, payload, until, veth, wait};
use super::program::{Hook, Redirect};
use rustix::event::PollFlags;
use rustix::io::Errno;

use super::super::probe::superframe_is_taken;
use super::super::{
    Error, Kick, Mode, MultiBuffer, PACKET_HEADROOM, Packet, Pool, Socket, SocketConfig, Umem, UmemConfig,
};

const HEADROOM: u32 = 64;

fn umem(frames: u32) -> (Umem, Pool) {
    Umem::new(UmemConfig { frames, frame_size: 4096, headroom: HEADROOM, huge_pages: false }).unwrap()
}

fn small() -> SocketConfig {
    SocketConfig { rx: 64, tx: 64, fill: 64, completion: 64, ..SocketConfig::default() }
}

/// Puts `octets` into a free frame.
fn packet(umem: &Umem, pool: &mut Pool, octets: &[u8]) -> Packet {
    let frame = pool.take().expect("a free frame");
    let mut packet = Packet { frame, offset: PACKET_HEADROOM, len: octets.len() as u32, more: false };
    packet.data_mut(umem).copy_from_slice(octets);
    packet
}

/// Sends everything in `packets`, and reclaims completions as they come.
fn send_all(socket: &mut Socket, packets: &mut VecDeque<Packet>, pool: &mut Pool) {
    until("transmission", || {
        socket.send(packets);
        let kicked = socket.kick().unwrap();
        socket.reclaim(pool);
        packets.is_empty() && kicked == Kick::Done
    });
}

/// Receives one test packet, skipping other traffic.
fn receive(umem: &Umem, socket: &mut Socket, pool: &mut Pool) -> Packet {
    let mut packets = Vec::new();
    let mut found = None;
    until("reception", || {
        if socket.recv(&mut packets, 1) == 0 {
            wait(socket, PollFlags::IN);
        }
        for packet in packets.drain(..) {
            if found.is_none() && payload(packet.data(umem)).is_some() {
                found = Some(packet);
            } else {
                pool.put(packet.frame);
            }
        }
        found.is_some()
    });
    found.expect("`until` waited for it")
}

fn close_all(sockets: impl IntoIterator<Item = Socket>, pool: &mut Pool) {
    for socket in sockets {
        assert_eq!(socket.statistics().unwrap().anomalies, Default::default());
        let held = socket.in_kernel();
        let closed = socket.close(pool);
        assert_eq!((closed.returned, closed.lost), (held, 0));
    }
    assert_eq!(pool.free(), pool.total());
}

fn round_trip(hook: Hook) {
    in_namespace(move || {
        let (one, two) = veth("one", "two");
        let (umem, mut pool) = umem(256);
        let redirect = Redirect::attach(two, hook).unwrap();
        let mut sender = Socket::bind(&umem, one, 0, SocketConfig { rx: 0, ..small() }).unwrap();
        let mut receiver = Socket::bind(&umem, two, 0, SocketConfig { tx: 0, ..small() }).unwrap();
        assert!(!sender.zero_copy() && !receiver.zero_copy());
        redirect.insert(0, &receiver).unwrap();

        // The indices pass the end of every ring many times.
        for round in 0..100_u32 {
            receiver.fill(&mut pool, 64);
            receiver.wake_rx();
            let batch = 0..20;
            let body = |n: u32| [round.to_be_bytes(), n.to_be_bytes()].concat().repeat(5 + n as usize);
            let mut packets = batch.clone().map(|n| packet(&umem, &mut pool, &frame(&body(n)))).collect();
            send_all(&mut sender, &mut packets, &mut pool);
            for n in batch {
                let packet = receive(&umem, &mut receiver, &mut pool);
                assert_eq!((packet.offset, packet.more), (PACKET_HEADROOM + HEADROOM, false));
                assert_eq!(payload(packet.data(&umem)), Some(&*body(n)));
                pool.put(packet.frame);
            }
            let everywhere = pool.free() + sender.in_kernel() + receiver.in_kernel();
            assert_eq!(everywhere, pool.total());
        }
        close_all([sender, receiver], &mut pool);
    });
}

#[test]
fn packets_cross_a_veth_unchanged_and_in_order_in_generic_mode() {
    round_trip(Hook::Generic);
}

#[test]
fn packets_cross_a_veth_unchanged_and_in_order_in_native_mode() {
    round_trip(Hook::Native);
}

#[test]
fn a_received_frame_leaves_on_another_device_in_place_with_headers_in_front() {
    in_namespace(|| {
        let ((lan, inner), (outer, wire)) = (veth("lan", "inner"), veth("outer", "wire"));
        let (umem, mut pool) = umem(256);
        let redirect = Redirect::attach(inner, Hook::Generic).unwrap();
        let mut from = Socket::bind(&umem, inner, 0, small()).unwrap();
        let mut to = Socket::bind(&umem, outer, 0, small()).unwrap();
        redirect.insert(0, &from).unwrap();
        from.fill(&mut pool, 64);
        let (sender, receiver) = (Tap::open(lan, false).unwrap(), Tap::open(wire, false).unwrap());

        for n in 0..200_u8 {
            sender.send(&frame(&[n; 100]));
            let mut packet = receive(&umem, &mut from, &mut pool);
            let header = frame(&[0xAA; 36]);
            packet.offset -= header.len() as u32;
            packet.len += header.len() as u32;
            packet.data_mut(&umem)[..header.len()].copy_from_slice(&header);
            let chunk = packet.frame.index();
            let mut packets = VecDeque::from([packet]);
            send_all(&mut to, &mut packets, &mut pool);
            let expected = [&[0xAA; 36][..], &frame(&[n; 100])].concat();
            assert_eq!(receiver.receive(), expected, "through chunk {chunk}");
            from.fill(&mut pool, 64);
        }
        close_all([from, to], &mut pool);
    });
}

#[test]
fn any_socket_may_close_first_and_later_ones_still_share() {
    in_namespace(|| {
        let ((a, b), (c, d)) = (veth("a", "b"), veth("c", "d"));
        let (umem, mut pool) = umem(256);
        let redirect = Redirect::attach(d, Hook::Generic).unwrap();
        let first = Socket::bind(&umem, a, 0, small()).unwrap();
        let mut second = Socket::bind(&umem, c, 0, small()).unwrap();
        first.close(&mut pool);
        let mut third = Socket::bind(&umem, d, 0, small()).unwrap();
        let fourth =
            Socket::bind(&umem, b, 0, SocketConfig { mode: Mode::Copy, multi_buffer: MultiBuffer::No, ..small() })
                .unwrap();
        redirect.insert(0, &third).unwrap();
        third.fill(&mut pool, 64);
        let mut packets = VecDeque::from([packet(&umem, &mut pool, &frame(b"still here"))]);
        send_all(&mut second, &mut packets, &mut pool);
        let packet = receive(&umem, &mut third, &mut pool);
        assert_eq!(payload(packet.data(&umem)), Some(&b"still here"[..]));
        pool.put(packet.frame);
        close_all([second, third, fourth], &mut pool);
    });
}

#[test]
fn a_superframe_arrives_whole_in_several_descriptors() {
    in_namespace(|| {
        let (one, two) = veth("one", "two");
        let (umem, mut pool) = umem(256);
        let redirect = Redirect::attach(two, Hook::Generic).unwrap();
        let mut receiver = Socket::bind(&umem, two, 0, small()).unwrap();
        redirect.insert(0, &receiver).unwrap();
        receiver.fill(&mut pool, 64);

        let body: Vec<u8> = (0..60_000_u32).map(|n| (n % 251) as u8).collect();
        let superframe = tcp_superframe(&body);
        let sender = Tap::open(one, true).unwrap();
        for _ in 0..10 {
            // A `virtio_net_hdr`: no checksum at 16 octets from 34 on; TCP over IPv4, 54 octets of headers, segments of
            // 1400.
            let words = [54, 1400, 34, 16].map(u16::to_ne_bytes).concat();
            sender.send(&[&[1, 1][..], &words, &superframe].concat());
            let mut parts: Vec<Packet> = Vec::new();
            until("reception", || {
                receiver.recv(&mut parts, 1);
                // Other traffic comes in one descriptor.
                if parts.len() == 1 {
                    parts.drain(..).for_each(|part| pool.put(part.frame));
                }
                !parts.is_empty()
            });
            assert_eq!(parts.len(), superframe.len().div_ceil((4096 - PACKET_HEADROOM - HEADROOM) as usize));
            let last = parts.len() - 1;
            assert!(parts.iter().enumerate().all(|(n, part)| part.more == (n < last)));
            let octets: Vec<u8> = parts.iter().flat_map(|part| part.data(&umem)).copied().collect();
            assert_eq!(octets.len(), superframe.len());
            assert_eq!(octets[54..], body);
            parts.into_iter().for_each(|part| pool.put(part.frame));
            receiver.fill(&mut pool, 64);
        }
        close_all([receiver], &mut pool);
    });
}

/// Ethernet, IPv4 and TCP headers (54 octets) before `body`.
fn tcp_superframe(body: &[u8]) -> Vec<u8> {
    let total = (40 + body.len()) as u16;
    let mut ip =
        [&[0x45, 0][..], &total.to_be_bytes(), &[0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]].concat();
    let sum: u32 = ip.chunks_exact(2).map(|w| u32::from(u16::from_be_bytes([w[0], w[1]]))).sum();
    let checksum = !((sum & 0xFFFF) + (sum >> 16)) as u16;
    ip[10..12].copy_from_slice(&checksum.to_be_bytes());
    let tcp = [0x13, 0x88, 0x13, 0x89, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xFF, 0xFF, 0, 0, 0, 0];
    [&[0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0x00][..], &ip, &tcp, body].concat()
}

#[test]
fn a_packet_in_several_descriptors_leaves_as_one_frame() {
    in_namespace(|| {
        let (one, two) = veth("one", "two");
        let (umem, mut pool) = umem(64);
        let mut sender = Socket::bind(&umem, one, 0, small()).unwrap();
        let receiver = Tap::open(two, false).unwrap();
        let octets = frame(&(0..1200_u16).map(|n| n as u8).collect::<Vec<_>>());
        let mut packets: VecDeque<_> = octets.chunks(500).map(|part| packet(&umem, &mut pool, part)).collect();
        let last = packets.len() - 1;
        packets.range_mut(..last).for_each(|part| part.more = true);
        send_all(&mut sender, &mut packets, &mut pool);
        assert_eq!(receiver.receive(), octets[14..]);
        close_all([sender], &mut pool);
    });
}

#[test]
fn a_starved_fill_ring_drops_counts_and_recovers() {
    in_namespace(|| {
        let (one, two) = veth("one", "two");
        let (umem, mut pool) = umem(64);
        let redirect = Redirect::attach(two, Hook::Generic).unwrap();
        let mut receiver = Socket::bind(&umem, two, 0, small()).unwrap();
        redirect.insert(0, &receiver).unwrap();
        let sender = Tap::open(one, false).unwrap();
        until("a drop", || {
            sender.send(&frame(b"lost"));
            let statistics = receiver.statistics().unwrap();
            statistics.rx_dropped > 0 && statistics.rx_fill_ring_empty_descs > 0
        });
        receiver.fill(&mut pool, 64);
        receiver.wake_rx();
        sender.send(&frame(b"found"));
        until("recovery", || {
            let packet = receive(&umem, &mut receiver, &mut pool);
            let found = payload(packet.data(&umem)) == Some(b"found");
            pool.put(packet.frame);
            found
        });
        close_all([receiver], &mut pool);
    });
}

#[test]
fn a_queue_can_be_bound_again_at_once() {
    in_namespace(|| {
        let (one, _) = veth("one", "two");
        let (umem, mut pool) = umem(64);
        for _ in 0..20 {
            let mut socket = Socket::bind(&umem, one, 0, small()).unwrap();
            socket.fill(&mut pool, 32);
            close_all([socket], &mut pool);
        }
    });
}

#[test]
fn a_queue_that_stays_taken_is_refused_with_its_name_and_a_way_out() {
    in_namespace(|| {
        let (one, _) = veth("one", "two");
        let (mine, theirs) = (umem(64), umem(64));
        let _owner = Socket::bind(&theirs.0, one, 0, small()).unwrap();
        let error = Socket::bind(&mine.0, one, 0, small()).err().expect("a taken queue");
        assert_eq!(error.errno(), Some(Errno::BUSY));
        let text = error.to_string();
        assert!(text.starts_with("one queue 0: bind: ") && text.contains("another AF_XDP socket"), "{text}");
    });
}

#[test]
fn devices_and_queues_that_are_not_there_are_refused_by_name() {
    in_namespace(|| {
        let (one, _) = veth("one", "two");
        let (umem, _pool) = umem(64);
        let no_queue = Socket::bind(&umem, one, 7, small()).err().expect("no such queue").to_string();
        assert!(no_queue.starts_with("one queue 7: bind: ") && no_queue.contains("no such queue"), "{no_queue}");
        let no_device = Socket::bind(&umem, 9999, 0, small()).err().expect("no such device").to_string();
        assert!(no_device.starts_with("device 9999 queue 0: bind: "), "{no_device}");
        let forced = SocketConfig { mode: Mode::ZeroCopy, ..small() };
        assert!(Socket::bind(&umem, one, 0, forced).is_err(), "veth has no zero copy");
    });
}

#[test]
fn ring_sizes_that_the_kernel_refuses_are_refused_by_name() {
    let (umem, _pool) = umem(64);
    let cases = [
        (SocketConfig { rx: 100, ..small() }, "rx ring is 100"),
        (SocketConfig { tx: 1 << 21, ..small() }, "tx ring is 2097152"),
        (SocketConfig { fill: 0, ..small() }, "fill ring is 0"),
        (SocketConfig { completion: 3, ..small() }, "completion ring is 3"),
        (SocketConfig { rx: 0, tx: 0, ..small() }, "needs an rx ring or a tx ring"),
    ];
    for (config, expected) in cases {
        let error = Socket::bind(&umem, 1, 0, config).err().expect("a refusal");
        assert!(matches!(error, Error::Size { .. }) && error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn every_frame_comes_back_when_the_device_is_deleted_under_traffic() {
    in_namespace(|| {
        let (one, two) = veth("one", "two");
        let (umem, mut pool) = umem(256);
        let redirect = Redirect::attach(two, Hook::Generic).unwrap();
        let mut sender = Socket::bind(&umem, one, 0, small()).unwrap();
        let mut receiver = Socket::bind(&umem, two, 0, small()).unwrap();
        redirect.insert(0, &receiver).unwrap();
        receiver.fill(&mut pool, 64);
        let mut packets: VecDeque<_> = (0..32).map(|n| packet(&umem, &mut pool, &frame(&[n; 64]))).collect();
        send_all(&mut sender, &mut packets, &mut pool);
        packets = (0..32).map(|n| packet(&umem, &mut pool, &frame(&[n; 64]))).collect();
        sender.send(&mut packets);
        ip("link delete one");
        assert!(matches!(sender.kick(), Err(Error::Socket { call: "sendto", .. })));
        close_all([sender, receiver], &mut pool);
    });
}

#[test]
fn frames_of_a_closed_socket_come_back_when_its_queue_is_free() {
    in_namespace(|| {
        let (_, two) = veth("one", "two");
        let (umem, mut pool) = umem(64);
        let socket = |pool: &mut Pool| {
            let mut socket = Socket::bind(&umem, two, 0, small()).unwrap();
            socket.fill(pool, 32);
            socket
        };
        // Simulates a driver that still holds all frames, because a veth has no zero copy.
        let held = socket(&mut pool).close_held();
        assert_eq!(pool.free(), 32);
        held.wait().into_iter().for_each(|frame| pool.put(frame));
        assert_eq!(pool.free(), pool.total());
        // Another socket already has the queue.
        let held = socket(&mut pool).close_held();
        let next = socket(&mut pool);
        held.wait().into_iter().for_each(|frame| pool.put(frame));
        close_all([next], &mut pool);
        // The device is removed.
        let held = socket(&mut pool).close_held();
        ip("link del one");
        held.wait().into_iter().for_each(|frame| pool.put(frame));
        assert_eq!(pool.free(), pool.total());
    });
}

/// The kernel uses a socket as long as anybody has its descriptor.
#[test]
fn frames_of_a_socket_that_a_bind_still_has_come_back_when_that_has_ended() {
    in_namespace(|| {
        let (_, two) = veth("one", "two");
        let (umem, mut pool) = umem(64);
        let mut socket = Socket::bind(&umem, two, 0, small()).unwrap();
        socket.fill(&mut pool, 32);
        let shared = socket.shared();
        let closed = socket.close(&mut pool);
        assert_eq!((pool.free(), closed.returned, closed.lost), (32, 0, 0));
        let waiting = std::thread::spawn(|| closed.held.expect("frames that come later").wait());
        // Until then, no socket can bind to its queue.
        let one_more = SocketConfig { rx: 0, ..small() };
        assert!(matches!(Socket::bind(&umem, two, 0, one_more), Err(Error::Socket { .. })));
        assert!(!waiting.is_finished());
        drop(shared);
        waiting.join().unwrap().into_iter().for_each(|frame| pool.put(frame));
        assert_eq!(pool.free(), pool.total());
    });
}

/// The loopback device of a new network namespace is down, and no packet can be sent on it.
#[test]
fn a_kernel_is_asked_for_superframes_where_the_loopback_device_is_down() {
    in_namespace(|| {
        let answer = superframe_is_taken();
        assert!(answer.is_some());
        ip("link set lo up");
        assert_eq!(superframe_is_taken(), answer);
    });
}
