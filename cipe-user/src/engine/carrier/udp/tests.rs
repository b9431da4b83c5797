//! A UDP door and a plain socket on the loopback device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};

use netlink_packet_route::link::LinkAttribute;
use nix::sys::socket::{ControlMessage, MsgFlags, SockaddrStorage, sendmsg, sockopt};

use super::super::options::NoChecksum;
use super::super::{DoorStats, Inbox, Sealed, losses};
use super::*;
use crate::engine::BATCH;
use crate::kernel::testnet::in_namespace;
use crate::xsk::UmemConfig;

/// A door, the worker's resources for it, and a socket that is connected to it.
struct Bench {
    sender: UdpSocket,
    carrier: UdpCarrier,
    umem: Umem,
    pool: Pool,
    inbox: Inbox,
}

impl Bench {
    fn new() -> Self {
        Self::at(Ipv4Addr::LOCALHOST.into())
    }

    fn at(address: IpAddr) -> Self {
        let sender = UdpSocket::bind((address, 0)).unwrap();
        let carrier = UdpCarrier::new(UdpSocket::bind((address, 0)).unwrap()).unwrap();
        sender.connect(carrier.shared.socket.local_addr().unwrap()).unwrap();
        let (umem, pool) = Umem::new(UmemConfig { frames: 128, ..UmemConfig::default() }).unwrap();
        Self { sender, carrier, umem, pool, inbox: Inbox::new() }
    }

    /// Returns the lengths of the datagrams received in one call, or their verdicts; and whether there may be more.
    fn receive(&mut self) -> io::Result<(Vec<Result<usize, Verdict>>, bool)> {
        let Self { sender, carrier, umem, pool, inbox } = self;
        let mut arrivals = Vec::new();
        let more = carrier.receive(
            BATCH,
            &mut Room { umem, pool, inbox, stats: &mut DoorStats::new(Instant::now()) },
            &mut arrivals,
        )?;
        let lengths = arrivals.into_iter().map(|Arrival { to, from, datagram, .. }| {
            assert_eq!((to, from), (None, sender.local_addr().unwrap()));
            datagram.map(|(frame, place)| {
                pool.put(frame);
                place.len()
            })
        });
        Ok((lengths.collect(), more))
    }

    /// Sends datagrams of these lengths as one group.
    fn send(&mut self, lengths: &[usize], relayed: Option<[u8; 10]>) -> usize {
        let to = self.sender.local_addr().unwrap();
        let marks = Marks { tos: 0, ttl: 64, dont_fragment: true };
        let group = lengths.iter().map(|len| {
            let mut frame = self.pool.take().unwrap();
            let datagram = FRESH..FRESH + len;
            self.umem.chunk_mut(&mut frame)[datagram.clone()].fill(*len as u8);
            Sealed { frame, datagram }
        });
        let group = group.collect();
        let route = GroupRoute { to, relayed, marks, checksum: false, ip_id: 0, path: None };
        let mut room = Room {
            umem: &self.umem,
            pool: &mut self.pool,
            inbox: &mut self.inbox,
            stats: &mut DoorStats::new(Instant::now()),
        };
        self.carrier.send(group, &route, &mut room)
    }
}

#[test]
fn datagrams_arrive_in_frames_also_out_of_superframes() {
    let mut bench = Bench::new();
    assert_eq!(bench.receive().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    bench.sender.send(&[]).unwrap();
    bench.sender.send(&[1; 100]).unwrap();
    bench.sender.send(&[1; 5000]).unwrap();
    let (octets, size) = ([7; 1000], 300_u16);
    let pieces = [IoSlice::new(&octets)];
    let control = [ControlMessage::UdpGsoSegments(&size)];
    sendmsg(bench.sender.as_raw_fd(), &pieces, &control, MsgFlags::empty(), None::<&SockaddrStorage>).unwrap();
    let expected = [Ok(0), Ok(100), Err(Verdict::BadLength), Ok(300), Ok(300), Ok(300), Ok(100)];
    assert_eq!(bench.receive().unwrap(), (expected.to_vec(), false));
    assert!(bench.receive().is_err(), "an empty call returns nothing of the previous one");
    assert_eq!(bench.pool.free(), bench.pool.total());
}

#[test]
fn what_there_is_no_frame_for_is_said() {
    let mut bench = Bench::new();
    let taken: Vec<_> = std::iter::from_fn(|| bench.pool.take()).collect();
    bench.sender.send(&[1; 100]).unwrap();
    assert_eq!(bench.receive().unwrap().0, [Err(Verdict::NoFrame)]);
    taken.into_iter().for_each(|frame| bench.pool.put(frame));
}

#[test]
fn a_group_leaves_as_datagrams_of_its_sizes_and_gives_its_frames_back() {
    let mut bench = Bench::new();
    for (lengths, relayed) in [
        (vec![16], None),
        (vec![160, 160, 160, 24], None),
        (vec![48, 48, 16], Some([3; 10])),
        (vec![160, 48, 200, 16, 24], None),
        (vec![48, 160, 16], Some([3; 10])),
    ] {
        assert_eq!(bench.send(&lengths, relayed), lengths.len());
        for len in lengths {
            let mut octets = [0; 2000];
            let received = bench.sender.recv(&mut octets).unwrap();
            let expected = [relayed.as_ref().map_or(&[][..], |header| header), &vec![len as u8; len]].concat();
            assert_eq!(octets[..received], expected);
        }
    }
    assert_eq!(bench.pool.free(), bench.pool.total());
}

#[test]
fn a_batch_that_leaves_datagram_by_datagram_has_room_in_the_kernel() {
    /// Octets that the kernel counts for a full datagram, including its overhead.
    const COUNTED: usize = 2304;
    in_namespace(|_| async {
        let room = rustix::net::sockopt::socket_send_buffer_size(&Bench::new().carrier).unwrap();
        assert!(room >= 2 * BATCH * COUNTED, "{room} octets");
    });
}

#[test]
fn what_the_kernel_drops_is_told_once() {
    let mut bench = Bench::new();
    assert_eq!(bench.carrier.new_losses(&losses::of_all_sockets()), 0);
    // The minimum size of the buffer is enough for two of these.
    rustix::net::sockopt::set_socket_recv_buffer_size(&bench.carrier, 1).unwrap();
    const SENT: usize = 100;
    for _ in 0..SENT {
        bench.sender.send(&[0; 1000]).unwrap();
    }
    let received: usize = std::iter::from_fn(|| bench.receive().ok()).map(|(arrivals, _)| arrivals.len()).sum();
    let losses = losses::of_all_sockets();
    assert_eq!(bench.carrier.new_losses(&losses), (SENT - received) as u64);
    assert!(received < SENT);
    assert_eq!(bench.carrier.new_losses(&losses), 0);
}

#[test]
fn a_full_inbox_says_that_there_may_be_more() {
    const MORE: usize = Inbox::MESSAGES + 1;
    let mut bench = Bench::new();
    for size in 1..=MORE {
        bench.sender.send(&vec![0; size]).unwrap();
    }
    assert_eq!(bench.receive().unwrap(), ((1..MORE).map(Ok).collect(), true));
    assert_eq!(bench.receive().unwrap(), (vec![Ok(MORE)], false));
}

#[test]
fn what_is_larger_than_the_path_goes_in_fragments_and_is_told_of() {
    in_namespace(|netlink| async move {
        netlink.set_attribute("lo", LinkAttribute::Mtu(1300)).await;
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let mut bench = Bench::at(address);
            let start = Instant::now();
            assert_eq!(bench.send(&[1200, 1200, 16], None), 3);
            assert!(!bench.carrier.met_smaller_path(start), "it fits {address}");
            for lengths in [&[1400][..], &[1400, 1400, 16], &[16, 1400, 24, 1408]] {
                assert_eq!(bench.send(lengths, None), lengths.len(), "{address}");
            }
            assert!(bench.carrier.met_smaller_path(start));
            assert!(!bench.carrier.met_smaller_path(start + MIN_REPORT_INTERVAL), "told once");
            for len in [1200, 1200, 16, 1400, 1400, 1400, 16, 16, 1400, 24, 1408] {
                assert_eq!(bench.sender.recv(&mut [0; 2000]).unwrap(), len);
            }
        }
    });
}

#[test]
fn what_came_in_fragments_is_marked() {
    in_namespace(|netlink| async move {
        netlink.set_attribute("lo", LinkAttribute::Mtu(1300)).await;
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            let Bench { sender, mut carrier, umem, mut pool, mut inbox } = Bench::at(address);
            for len in [100, 1400, 200] {
                sender.send(&vec![0; len]).unwrap();
            }
            let mut arrivals = Vec::new();
            let mut room =
                Room { umem: &umem, pool: &mut pool, inbox: &mut inbox, stats: &mut DoorStats::new(Instant::now()) };
            carrier.receive(BATCH, &mut room, &mut arrivals).unwrap();
            let joined: Vec<bool> = arrivals.iter().map(|arrival| arrival.was_joined).collect();
            assert_eq!(joined, [false, true, false], "{address}");
        }
    });
}

/// The kernel does not segment for a socket without checksums: it returns EINVAL, as it returns EIO with IPsec on the
/// path.
#[test]
fn a_group_that_the_kernel_refuses_leaves_as_single_datagrams_and_so_do_later_ones() {
    let mut bench = Bench::new();
    let segmentation = bench.carrier.segmentation().clone();
    let set = |bench: &Bench, on: bool| setsockopt(&bench.carrier, NoChecksum, &on).unwrap();
    let arrives = |bench: &mut Bench, lengths: &[usize]| {
        assert_eq!(bench.send(lengths, None), lengths.len());
        for len in lengths {
            assert_eq!(bench.sender.recv(&mut [0; 2000]).unwrap(), *len);
        }
    };
    arrives(&mut bench, &[160, 160, 24]);
    assert!(segmentation.works());
    set(&bench, true);
    arrives(&mut bench, &[160, 160, 24]);
    assert!(!segmentation.works());
    let now = Instant::now();
    assert!(matches!(
        bench.carrier.poll_segmentation(now),
        (None, Some(SegmentationChange::Refused(Errno::EINVAL, _)))
    ));
    assert_eq!(bench.carrier.poll_segmentation(now), (None, None), "told once");
    arrives(&mut bench, &[160, 160, 24]);
    // Tried again, and refused again.
    bench.carrier.poll_segmentation(now + Duration::from_secs(60));
    assert!(segmentation.works());
    arrives(&mut bench, &[160, 160, 24]);
    assert!(!segmentation.works());
    set(&bench, false);
    bench.carrier.poll_segmentation(now + Duration::from_secs(60));
    bench.carrier.poll_segmentation(now + Duration::from_secs(600));
    arrives(&mut bench, &[160, 160, 24]);
    assert!(segmentation.works());
    assert_eq!(bench.pool.free(), bench.pool.total());
}

/// Errors come at any time, also between two attempts.
#[test]
fn errors_of_other_datagrams_lose_none() {
    const COUNT: usize = 20_000;
    let bench = Bench::new();
    setsockopt(&bench.carrier, sockopt::Ipv4RecvErr, &true).unwrap();
    let closed = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
    let (to, marks) = (bench.sender.local_addr().unwrap(), Marks { tos: 0, ttl: 64, dont_fragment: true });
    let (other, stop) = (bench.carrier.for_another_worker(), AtomicBool::new(false));
    let send = |carrier: &UdpCarrier, to| carrier.send_one(to, marks, &[IoSlice::new(&[0; 16])]);
    let refused = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                send(&other, closed);
            }
        });
        let refused = (0..COUNT).filter(|_| !send(&bench.carrier, to)).count();
        stop.store(true, Ordering::Relaxed);
        refused
    });
    assert_eq!(refused, 0);
}

#[test]
fn without_a_route_only_the_first_datagram_is_tried_often() {
    in_namespace(|_| async {
        let bench = Bench::new();
        let marks = Marks { tos: 0, ttl: 64, dont_fragment: false };
        let octets = [7; 64];
        let send = |to: SocketAddr| bench.carrier.send_one(to, marks, &[IoSlice::new(&octets)]);
        assert_eq!(bench.carrier.attempts(), ATTEMPTS);
        for _ in 0..3 {
            assert!(!send("192.0.2.1:9".parse().unwrap()));
            assert_eq!(bench.carrier.attempts(), 1);
        }
        assert!(send(bench.sender.local_addr().unwrap()));
        assert_eq!(bench.carrier.attempts(), ATTEMPTS);
    });
}
