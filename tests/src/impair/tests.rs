use std::collections::VecDeque;

use super::*;

struct Bench {
    ends: [UdpSocket; 2],
    relay: Relay,
    inner: [SocketAddr; 2],
}

fn bench(seed: u64) -> Bench {
    let socket = || UdpSocket::bind("127.0.0.1:0").expect("loopback has ports");
    let (ends, inside) = ([socket(), socket()], [socket(), socket()]);
    let address = |socket: &UdpSocket| socket.local_addr().expect("a bound socket has an address");
    for end in &ends {
        end.set_read_timeout(Some(crate::process::patient(crate::SOON))).expect("a wait is not zero");
    }
    let inner = [address(&inside[0]), address(&inside[1])];
    let relay = Relay::start(inside, [address(&ends[0]), address(&ends[1])], seed).expect("a relay");
    Bench { ends, relay, inner }
}

impl Bench {
    /// Sends numbers from side 0 one by one and returns what arrives until the relay is empty.
    fn run(&self, count: u8) -> Vec<Vec<u8>> {
        for number in 0..count {
            self.ends[0].send_to(&[number; 20], self.inner[0]).expect("loopback takes it");
        }
        let mut arrived = Vec::new();
        loop {
            let passed = self.relay.passed()[0];
            if passed.received == u64::from(count) && self.relay.waiting() == 0 && arrived.len() as u64 == passed.sent {
                return arrived;
            }
            let mut buffer = [0; 64];
            self.ends[1].set_read_timeout(Some(Duration::from_millis(10))).expect("a wait is not zero");
            if let Ok(length) = self.ends[1].recv(&mut buffer) {
                arrived.push(buffer[..length].to_vec());
            }
        }
    }
}

#[test]
fn a_relay_without_impairment_passes_everything_in_order() {
    let bench = bench(1);
    let arrived = bench.run(200);
    assert!(arrived.iter().zip(0..200_u8).all(|(got, number)| *got == [number; 20]));
    assert_eq!(arrived.len(), 200);
    bench.ends[1].send_to(b"back", bench.inner[1]).expect("loopback takes it");
    let mut buffer = [0; 64];
    assert_eq!(bench.ends[0].recv(&mut buffer).expect("it comes back"), 4);
}

#[test]
fn the_same_seed_gives_the_same_fates() {
    let impairment = Impairment { loss: 0.2, duplication: 0.1, corruption: 0.1, ..Impairment::default() };
    let [one, same, other] = [7, 7, 8].map(|seed| {
        let bench = bench(seed);
        bench.relay.impair(impairment);
        bench.run(200)
    });
    assert_eq!(one, same);
    assert_ne!(one, other);
}

#[test]
fn what_is_done_is_counted() {
    let bench = bench(3);
    bench.relay.impair(Impairment { loss: 0.2, duplication: 0.2, corruption: 0.2, ..Impairment::default() });
    let arrived = bench.run(250);
    let passed = bench.relay.passed()[0];
    assert_eq!(passed.sent, arrived.len() as u64);
    let sound = |datagram: &[u8]| datagram.iter().all(|octet| *octet == datagram[0]);
    assert_eq!(passed.damaged, arrived.iter().filter(|datagram| !sound(datagram)).count() as u64);
    assert!(passed.lost > 20 && passed.doubled > 10 && passed.damaged > 20, "{passed:?}");
    assert_eq!(bench.relay.recent(0).len(), 250);
}

#[test]
fn a_narrow_line_takes_its_time_for_each_octet_and_loses_what_finds_no_room() {
    let (now, rate) = (Instant::now(), Rate { octets: 100_000, queue: Duration::from_millis(25) });
    let mut lane = Lane { rng: StdRng::seed_from_u64(1), held: VecDeque::new(), free: now };
    let mut leaves = |after| {
        let at = now + Duration::from_millis(after);
        lane.leaves(1_000 - HEADERS, Some(rate), at).map(|left| (left - now).as_millis())
    };
    assert_eq!([0, 0, 0, 0].map(&mut leaves), [Some(10), Some(20), Some(30), None]);
    assert_eq!([5, 5, 100].map(&mut leaves), [Some(40), None, Some(110)]);
    assert_eq!(lane.leaves(70_000, None, now), Some(now));
}

#[test]
fn reordered_datagrams_are_overtaken_and_none_is_lost() {
    let bench = bench(4);
    bench.relay.impair(Impairment { reorder: 0.2, span: 5, ..Impairment::default() });
    let mut arrived = bench.run(250);
    assert!(!arrived.is_sorted());
    arrived.sort();
    assert!(arrived.iter().zip(0..250_u8).all(|(got, number)| *got == [number; 20]));
}

#[test]
fn somebody_on_the_path_decides_what_goes_on() {
    let bench = bench(5);
    bench.relay.attack(Some(Box::new(|side, datagram| match (side, datagram[0] % 3) {
        (0, 0) => vec![(1, datagram)],
        (0, 1) => vec![(0, datagram.clone()), (0, datagram)],
        _ => vec![(side, datagram)],
    })));
    let arrived = bench.run(9);
    assert_eq!(arrived.iter().map(|datagram| datagram[0]).collect::<Vec<_>>(), [1, 1, 2, 4, 4, 5, 7, 7, 8]);
    bench.relay.inject(0, [vec![42; 20]]);
    let mut buffer = [0; 64];
    assert_eq!(bench.ends[0].recv(&mut buffer).expect("it is reflected"), 20);
    assert_eq!(buffer[..20], [0; 20]);
    assert_eq!(bench.ends[1].recv(&mut buffer).expect("it is passed on"), 20);
    assert_eq!(buffer[..20], [42; 20]);
}
