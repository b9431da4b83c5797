use rustix::event::PollFlags;

use super::*;
use crate::xsk::tests::net::{Tap, frame, in_namespace, until, veth, wait};
use crate::xsk::tests::program::{Hook, Redirect};
use crate::xsk::{Mode, SocketConfig, Umem, UmemConfig};

const FRAMES: u32 = 64;

/// Queues of these lengths; returns which were asked, and for how many packets.
fn turns(waiting: &mut [usize], most: usize, turns: &mut Turns) -> (usize, bool) {
    turns.take(waiting.len(), most, |queue, most| {
        let got = waiting[queue].min(most);
        waiting[queue] -= got;
        got
    })
}

#[test]
fn no_queue_starves_beside_a_busy_one() {
    for queues in 2..=5 {
        let mut order = Turns::default();
        let mut waiting = vec![1; queues];
        waiting[0] = usize::MAX;
        for _ in 0..queues {
            turns(&mut waiting, 64, &mut order);
            assert!(waiting[1..].iter().all(|left| *left == 0), "{waiting:?}");
            waiting[1..].fill(1);
        }
    }
}

#[test]
fn one_queue_alone_fills_a_batch() {
    let mut waiting = [0, 1000, 0];
    assert_eq!(turns(&mut waiting, 64, &mut Turns::default()), (64, true));
}

#[test]
fn queues_that_give_more_than_they_were_asked_for_leave_the_others_their_turn() {
    // A packet of several descriptors is received as a whole.
    let mut asked = Vec::new();
    let (taken, more) = Turns::default().take(3, 4, |queue, most| {
        asked.push((queue, most));
        17
    });
    assert_eq!((taken, more), (51, true));
    assert_eq!(asked, [(1, 1), (2, 1), (0, 1)]);
}

#[test]
fn more_queues_than_packets_wanted_still_all_get_a_turn() {
    let mut waiting = [5; 10];
    let (taken, more) = turns(&mut waiting, 4, &mut Turns::default());
    assert_eq!((taken, more), (10, true));
    assert_eq!(turns(&mut [0; 10], 4, &mut Turns::default()), (0, false));
    assert_eq!(turns(&mut [], 4, &mut Turns::default()), (0, false));
}

#[test]
fn a_fill_ring_that_ran_empty_while_the_pool_was_is_filled_again() {
    in_namespace(|| {
        let (one, two) = veth("one", "two");
        let (_umem, mut pool) = Umem::new(UmemConfig { frames: FRAMES, ..UmemConfig::default() }).unwrap();
        let tap = Tap::open(one, false).unwrap();
        let redirect = Redirect::attach(two, Hook::Generic).unwrap();
        let rings =
            SocketConfig { rx: 64, tx: 64, fill: 64, completion: 64, mode: Mode::Copy, ..SocketConfig::default() };
        let socket = Socket::bind(&_umem, two, 0, rings).unwrap();
        redirect.insert(0, &socket).unwrap();
        let mut port = XskPort::new(socket, FRAMES / 2, &mut pool);

        // All frames are elsewhere: in use by ciphers, or in other rings.
        let mut elsewhere: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        let mut packets = Vec::new();
        (0..FRAMES).for_each(|_| tap.send(&frame(b"filler")));
        until("an empty fill ring", || {
            port.receive(&mut packets, usize::MAX, &mut pool);
            port.flush(&mut pool);
            packets.len() >= FRAMES as usize / 2
        });
        assert!(!port.flush(&mut pool), "it must be called again");
        elsewhere.drain(..).for_each(|frame| pool.put(frame));
        packets.drain(..).for_each(|packet| pool.put(packet.frame));

        assert!(port.flush(&mut pool));
        tap.send(&frame(b"heard"));
        assert!(wait(&port.socket, PollFlags::IN), "deaf");
        assert!(port.receive(&mut packets, 1, &mut pool) == 1);
        packets.drain(..).for_each(|packet| pool.put(packet.frame));
        port.close(&mut pool);
        assert_eq!(pool.free(), pool.total());
    });
}
