//! The shield in the programs, compared with the ciphers of the engine.

use cipe_common::maps::{Budgets, Slot};
use cipe_common::shield;
use proptest::prelude::*;
use rand::SeedableRng as _;
use rand::rngs::StdRng;

use super::{
    frames::{self, tagged, udp},
    *,
};
use crate::cipher::{Algorithm, Key, Lanes};
use crate::kernel::keys::KeyWriter;
use crate::wire::packet::{self, Ends, KeyKind, Type};

const LOCAL: &str = "192.0.2.1:4000";
const LOCAL_V6: &str = "[2001:db8::1]:4000";
const ALGORITHMS: [Algorithm; 3] = [Algorithm::Blowfish, Algorithm::Idea, Algorithm::IdeaLittle];
/// Keys of the slots, and one that the tunnel does not have.
const STATIC: [u8; 16] = [1; 16];
const RECEIVE: [u8; 16] = [2; 16];
const PREVIOUS: [u8; 16] = [3; 16];
const FOREIGN: [u8; 16] = [4; 16];

/// Programs with a shielded tunnel, and the writers of its keys.
struct Bed {
    programs: Programs,
    keys: KeyWriter,
    shields: ShieldWriter,
    _socket: OwnedFd,
}

impl Bed {
    fn new(algorithm: Algorithm, carries_ip: bool) -> Option<Self> {
        let mut programs = programs()?;
        let (mut keys, mut shields) = (programs.take_keys().unwrap(), programs.take_shields().unwrap());
        keys.set(TUNNEL, Slot::Static, &STATIC);
        keys.set(TUNNEL, Slot::Receive, &RECEIVE);
        keys.set(TUNNEL, Slot::Previous, &PREVIOUS);
        assert!(
            shields.add(0, Algorithm::Idea, true, &keys.reader()),
            "another tunnel's, so that this one's is not the first"
        );
        assert!(shields.add(TUNNEL as u16, algorithm, carries_ip, &keys.reader()));
        let socket = xdp_socket();
        for local in [LOCAL, LOCAL_V6] {
            programs.add_carrier_address(local.parse().unwrap(), TUNNEL).unwrap();
        }
        programs.set_carrier_device(DEVICE, 0).unwrap();
        programs.set_carrier_socket(0, &socket).unwrap();
        let mut bed = Self { programs, keys, shields, _socket: socket };
        bed.set(Tunnel::ALIVE);
        Some(bed)
    }

    fn set(&mut self, flags: u32) {
        let shield = self.shields.number_of(TUNNEL as u16);
        self.programs.set_tunnel(TUNNEL, Tunnel { flags, shield, ..Tunnel::default() }).unwrap();
    }

    /// Whether XDP lets the datagram in a frame pass, and TC, too. One of many refused ones passes, so that it is sent several times.
    fn passes(&mut self, frame: &[u8]) -> bool {
        let by_xdp = (0..5).all(|_| self.programs.run_xdp(names::CARRIER_XDP, frame) == XDP_REDIRECT);
        let by_tc = (0..5).all(|_| self.programs.run_tc_of(names::SHIELD_TC, frame, 0).0 == TC_PIPE);
        assert_eq!(by_xdp, by_tc);
        by_xdp
    }

    fn refused(&self) -> u64 {
        self.programs.counted(TUNNEL, Verdict::BadCrc)
    }
}

/// Value of `TC_ACT_PIPE`; the test run gives it as it is.
const TC_PIPE: u32 = 3;

fn sealed(algorithm: Algorithm, key: &[u8; 16], flag: KeyKind, payload: &[u8], kind: Type) -> Vec<u8> {
    let mut packet = vec![0; packet::sealed_len(payload.len())];
    packet[packet::IV..][..payload.len()].copy_from_slice(payload);
    let (key, iv) = (Key::new(algorithm, key), flag.mark([0x5C; 8]));
    packet::seal(&mut scalar(), &key, &mut packet, payload.len(), kind, iv, [7; 7]);
    packet
}

fn scalar() -> Lanes {
    Lanes::with(Some("scalar"), Some("scalar"))
}

/// An IPv4 packet of `n` octets, as far as the shield looks.
fn ip(n: u16) -> Vec<u8> {
    let mut packet = vec![0x45; n.into()];
    packet[2..4].copy_from_slice(&n.to_be_bytes());
    packet
}

/// Whether one of the keys for its flag may open a datagram, by the rules and the engine's ciphers.
fn is_possible(algorithm: Algorithm, datagram: &[u8], carries_ip: bool) -> bool {
    let keys = match KeyKind::of(datagram[0]) {
        KeyKind::Static => &[STATIC][..],
        KeyKind::Dynamic => &[RECEIVE, PREVIOUS],
    };
    keys.iter().any(|key| {
        let mut ends = Ends::of(datagram).unwrap();
        scalar().decrypt(&mut ends.jobs(&Key::new(algorithm, key)));
        ends.are_possible(carries_ip)
    })
}

#[test]
fn genuine_datagrams_pass_under_each_key_of_their_flag_and_no_others() {
    for algorithm in ALGORITHMS {
        let Some(mut bed) = Bed::new(algorithm, true) else { return };
        for n in [20, 21, 27, 28, 84, 500, 1442] {
            for (key, flag, passes) in [
                (STATIC, KeyKind::Static, true),
                (RECEIVE, KeyKind::Dynamic, true),
                (PREVIOUS, KeyKind::Dynamic, true),
                (RECEIVE, KeyKind::Static, false),
                (STATIC, KeyKind::Dynamic, false),
                (FOREIGN, KeyKind::Static, false),
                (FOREIGN, KeyKind::Dynamic, false),
            ] {
                let datagram = sealed(algorithm, &key, flag, &ip(n), Type::Data);
                let (v4, v6) = (udp(LOCAL.parse().unwrap(), &datagram), udp(LOCAL_V6.parse().unwrap(), &datagram));
                // Under a wrong key, a few are possible by chance.
                let is_possible = is_possible(algorithm, &datagram, true);
                assert!(is_possible || !passes);
                for frame in [&v4, &v6, &tagged(&v4, [0x81, 0])] {
                    assert_eq!(bed.passes(frame), is_possible, "{algorithm:?} {n} {key:?} {flag:?}");
                }
            }
        }
        assert!(bed.refused() > 0);
    }
}

#[test]
fn a_datagram_of_several_buffers_is_judged_by_its_real_end() {
    let Some(mut bed) = Bed::new(Algorithm::Blowfish, true) else { return };
    let datagram = sealed(Algorithm::Blowfish, &RECEIVE, KeyKind::Dynamic, &ip(16_000), Type::Data);
    let mut frame = udp(LOCAL.parse().unwrap(), &datagram);
    assert_eq!(bed.programs.run_xdp(names::CARRIER_XDP, &frame), XDP_REDIRECT);
    let last = frame.len() - 1;
    frame[last] ^= 1;
    assert!((0..5).any(|_| bed.programs.run_xdp(names::CARRIER_XDP, &frame) == XDP_DROP));
}

#[test]
fn every_message_passes_and_control_in_clear_too() {
    let Some(mut bed) = Bed::new(Algorithm::Idea, true) else { return };
    for number in (0..=255).filter(|number| shield::is_message(*number)) {
        for n in [1, 8, 56, 311] {
            let payload = [&[number][..], &vec![0xEE; n - 1]].concat();
            let datagram = sealed(Algorithm::Idea, &RECEIVE, KeyKind::Dynamic, &payload, Type::Control);
            assert!(bed.passes(&udp(LOCAL.parse().unwrap(), &datagram)), "{number} {n}");
        }
    }
    assert!(bed.passes(&udp(LOCAL.parse().unwrap(), &[&[0; 8][..], &[7; 56]].concat())));
    assert_eq!(bed.refused(), 0);
}

#[test]
fn every_frame_of_an_ethernet_tunnel_passes() {
    let Some(mut bed) = Bed::new(Algorithm::Blowfish, false) else { return };
    for n in 14..80 {
        let datagram = sealed(Algorithm::Blowfish, &STATIC, KeyKind::Static, &vec![0xA5; n], Type::Data);
        assert!(bed.passes(&udp(LOCAL.parse().unwrap(), &datagram)), "{n}");
    }
    assert_eq!(bed.refused(), 0);
}

#[test]
fn without_a_shield_or_a_key_everything_passes() {
    let Some(mut bed) = Bed::new(Algorithm::Blowfish, true) else { return };
    let dynamic = udp(LOCAL.parse().unwrap(), &[0xF3; 64]);
    let by_static = udp(LOCAL.parse().unwrap(), &[0x73; 64]);
    assert!(!bed.passes(&dynamic) && !bed.passes(&by_static));
    bed.keys.clear(TUNNEL, Slot::Static);
    bed.shields.update(TUNNEL as u16, &bed.keys.reader());
    assert!(!bed.passes(&dynamic) && bed.passes(&by_static));
    bed.keys.set(TUNNEL, Slot::Static, &STATIC);
    bed.shields.update(TUNNEL as u16, &bed.keys.reader());
    bed.set(Tunnel::ALIVE | Tunnel::NOKEY);
    assert!(bed.passes(&by_static));
    bed.set(Tunnel::ALIVE);
    assert!(!bed.passes(&by_static));
    // The programs may still have the number of a shield that has gone.
    bed.shields.remove(TUNNEL as u16);
    assert!(bed.passes(&dynamic) && bed.passes(&by_static));
    bed.set(Tunnel::ALIVE);
    assert!(bed.passes(&dynamic) && bed.passes(&by_static));
}

#[test]
fn of_what_is_refused_a_few_reach_the_engine_which_may_ask_for_a_key() {
    let Some(mut bed) = Bed::new(Algorithm::Blowfish, true) else { return };
    let frame = udp(LOCAL.parse().unwrap(), &[0xF3; 64]);
    const SENT: u64 = 1_000;
    let passed = (0..SENT).filter(|_| bed.programs.run_xdp(names::CARRIER_XDP, &frame) == XDP_REDIRECT).count() as u64;
    assert!((1..SENT / 2).contains(&passed), "{passed}");
    assert_eq!(bed.refused(), SENT - passed);
}

#[test]
fn of_messages_in_clear_a_few_pass_with_and_without_a_shield() {
    for is_shielded in [true, false] {
        let Some(mut bed) = Bed::new(Algorithm::Blowfish, true) else { return };
        if !is_shielded {
            bed.shields.remove(TUNNEL as u16);
            bed.set(Tunnel::ALIVE);
        }
        const SENT: u64 = 2_000;
        let lengths = [9, 16, 64, 61].iter().cycle().take(SENT as usize);
        let frames: Vec<_> = lengths.map(|n| udp(LOCAL.parse().unwrap(), &vec![0; *n])).collect();
        let by_xdp = |bed: &mut Bed, frame: &[u8]| bed.programs.run_xdp(names::CARRIER_XDP, frame) == XDP_REDIRECT;
        let by_tc = |bed: &mut Bed, frame: &[u8]| bed.programs.run_tc_of(names::SHIELD_TC, frame, 0).0 == TC_PIPE;
        let start = std::time::Instant::now();
        let passed = frames.iter().filter(|frame| by_xdp(&mut bed, frame)).count() as u64;
        // One budget for both programs, and only of datagrams in clear.
        let passed = passed + frames.iter().filter(|frame| by_tc(&mut bed, frame)).count() as u64;
        let earned = start.elapsed().as_nanos() as u64 / Budgets::CLEAR_INTERVAL;
        let few = Budgets::CLEAR_BURST..=Budgets::CLEAR_BURST + earned + 1;
        assert!(few.contains(&passed), "{passed} of {}, {earned} earned", 2 * SENT);
        assert_eq!(bed.programs.counted(TUNNEL, Verdict::ClearControl), 2 * SENT - passed);
        let genuine = sealed(Algorithm::Blowfish, &RECEIVE, KeyKind::Dynamic, &ip(84), Type::Data);
        assert!(bed.passes(&udp(LOCAL.parse().unwrap(), &genuine)));
        // Without keys everything is in clear.
        bed.set(Tunnel::ALIVE | Tunnel::NOKEY);
        assert!((0..100).all(|_| by_xdp(&mut bed, &frames[2]) && by_tc(&mut bed, &frames[2])));
    }
}

#[test]
fn superframes_and_other_datagrams_pass_the_program_of_the_socket() {
    let Some(mut bed) = Bed::new(Algorithm::Blowfish, true) else { return };
    let ours = udp(LOCAL.parse().unwrap(), &[0xF3; 64]);
    assert!(!bed.passes(&ours));
    let tc = |bed: &mut Bed, frame: &[u8], gso| {
        (0..5).all(|_| bed.programs.run_tc_of(names::SHIELD_TC, frame, gso).0 == TC_PIPE)
    };
    assert!(tc(&mut bed, &ours, 32));
    assert!(tc(&mut bed, &udp("192.0.2.1:4001".parse().unwrap(), &[0xF3; 64]), 0));
    assert!(tc(&mut bed, &udp(LOCAL.parse().unwrap(), &[0xF3; 63]), 0));
    assert!(tc(&mut bed, &ours[..60], 0));
}

#[test]
fn only_the_peer_s_datagrams_reach_a_pinned_tunnel() {
    let Some(mut bed) = Bed::new(Algorithm::Blowfish, true) else { return };
    bed.shields.remove(TUNNEL as u16);
    for local in [LOCAL, LOCAL_V6] {
        let frame = udp(local.parse().unwrap(), &[0x73; 64]);
        let peer = frames::source(local.parse().unwrap());
        let other = SocketAddr::new(peer.ip(), peer.port() + 1);
        for (target, action) in [(peer, XDP_REDIRECT), (other, XDP_DROP)] {
            let flags = Tunnel::ALIVE | Tunnel::PINNED;
            let tunnel = Tunnel { flags, target: carrier_address(target), ..Tunnel::default() };
            bed.programs.set_tunnel(TUNNEL, tunnel).unwrap();
            assert_eq!(bed.programs.run_xdp(names::CARRIER_XDP, &frame), action, "{target}");
        }
    }
    assert_eq!(bed.programs.counted(TUNNEL, Verdict::WrongPeer), 2);
}

#[test]
fn any_datagram_is_judged_as_by_the_engine() {
    for (algorithm, carries_ip) in [
        (Algorithm::Blowfish, true),
        (Algorithm::Idea, true),
        (Algorithm::IdeaLittle, true),
        (Algorithm::Blowfish, false),
    ] {
        let Some(bed) = Bed::new(algorithm, carries_ip) else { return };
        let bed = std::cell::RefCell::new(bed);
        // Of frames, one random datagram of 32 is possible; of packets, one of 1,000.
        proptest!(ProptestConfig::with_cases(200), |(seed in any::<u64>(), blocks in 2usize..180, key in 0usize..5, cut in any::<bool>())| {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut datagram: Vec<u8> = match key {
                4 => (0..8 * blocks).map(|_| rng.random()).collect(),
                key => {
                    let flag = if rng.random() { KeyKind::Static } else { KeyKind::Dynamic };
                    let n = (8 * blocks as u16).max(28) - rng.random_range(0..8);
                    sealed(algorithm, &[STATIC, RECEIVE, PREVIOUS, FOREIGN][key], flag, &ip(n), Type::Data)
                }
            };
            if cut {
                datagram.truncate(8 * blocks);
            }
            let is_clear = datagram.starts_with(&[0; 4]);
            let expected = is_clear || is_possible(algorithm, &datagram, carries_ip);
            let frame = udp(LOCAL.parse().unwrap(), &datagram);
            prop_assert_eq!(bed.borrow_mut().passes(&frame), expected, "{:02X?}", datagram);
        });
    }
}
