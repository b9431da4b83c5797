//! Two live peers speak with each other over the loopback.

use std::time::Duration;

use super::*;
use crate::SOON;
use crate::net::{ICMP, Ipv4};
use crate::process::patient;

struct Both {
    ends: [LivePeer; 2],
    events: [Receiver<Event>; 2],
    addresses: [SocketAddr; 2],
}

fn both(configure: impl Fn(usize, &mut Config)) -> Both {
    let sockets = [0, 1].map(|_| UdpSocket::bind("127.0.0.1:0").expect("loopback has ports"));
    let addresses = [0, 1].map(|end: usize| sockets[end].local_addr().expect("a bound socket has an address"));
    let mut number = 0;
    let started = sockets.map(|socket| {
        let mut config = Config::new([7; 16], [number as u8; 8]);
        (config.peer, config.tell_packets) = (Some(addresses[1 - number]), true);
        configure(number, &mut config);
        number += 1;
        LivePeer::start(socket, config).expect("a thread")
    });
    let [(a, of_a), (b, of_b)] = started;
    Both { ends: [a, b], events: [of_a, of_b], addresses }
}

/// A ping of ten octets of payload.
fn ping(number: u8) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 38, 0, 1, 0, 0, 64, ICMP, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
    packet.extend([8, 0, 0, 0, 0, 1, 0, number]);
    packet.extend([number; 10]);
    packet
}

impl Both {
    /// End 0 pings, and waits for the answer.
    fn answers(&self, number: u8) {
        self.ends[0].send(ping(number));
        loop {
            match self.events[0].recv_timeout(patient(SOON)).expect("an answer comes") {
                Event::Delivered(packet) if Ipv4::parse(&packet).is_some_and(|ip| ip.payload[7] == number) => return,
                _ => {}
            }
        }
    }
}

#[test]
fn packets_pass_after_a_handshake_and_through_later_ones() {
    let both = both(|_, _| {});
    for number in 0..10 {
        both.answers(number);
        both.ends[usize::from(number % 2)].begin();
    }
    both.answers(10);
    let [a, b] = both.ends.map(|end| end.stop().expect("it has not ended"));
    assert_eq!((a.delivered, b.delivered, b.echoed), (11, 11, 11), "{a:?}\n{b:?}");
    assert!(a.initiated + b.initiated >= 3, "{a:?}\n{b:?}");
    assert_eq!(a.refused + b.refused, 0, "{a:?}\n{b:?}");
}

#[test]
fn lost_answers_cookies_and_a_clock_that_was_set_back_are_borne() {
    let behind = Duration::from_secs(3600).as_nanos() as u64;
    let both = both(|end, config| match end {
        0 => config.clock -= behind,
        _ => (config.lose_answers, config.asks_cookies, config.newest) = (1, true, config.clock),
    });
    both.answers(1);
    let [a, b] = both.ends.map(|end| end.stop().expect("it has not ended"));
    assert_eq!((a.begun, a.initiated, a.retries_received), (2, 1, b.retries_sent), "{a:?}\n{b:?}");
    assert!(b.retries_sent >= 1 && b.answers >= 2, "{b:?}");
}

#[test]
fn an_end_that_forgot_its_keys_begins_again() {
    let mut both = both(|_, _| {});
    both.answers(1);
    let elsewhere = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let (none, _) = LivePeer::start(elsewhere, Config::new([7; 16], [9; 8])).expect("a thread");
    std::mem::replace(&mut both.ends[1], none).stop().expect("it has not ended");
    let socket = UdpSocket::bind(both.addresses[1]).expect("the port is free again");
    let config = Config { peer: Some(both.addresses[0]), ..Config::new([7; 16], [1; 8]) };
    both.ends[1] = LivePeer::start(socket, config).expect("a thread").0;
    // The first ping is under a key that is lost.
    both.ends[0].send(ping(2));
    assert_eq!(both.events[0].recv_timeout(patient(SOON)), Ok(Event::Session));
    both.answers(3);
    assert!(both.ends[1].counters().no_key > 0);
}
