//! Measures the cost of a packet in the datapath alone, without kernel, devices and network. `cargo xtask bench
//! datapath` runs it for nanoseconds, and under callgrind, which counts the instructions of [`seal`] and [`open`].
//!
//! Prints lines of `DIRECTION CIPHER TRAFFIC PACKETS NANOSECONDS`: the number of packets measured, and nanoseconds per
//! packet in the fastest round.

use std::hint::black_box;
use std::time::Instant;

use anyhow::Context as _;
use cipe_common::EthernetStamp;
use cipe_common::stamp::STAMP_TPID;
use cipe_user::cipher::Algorithm;
use cipe_user::control::protocol::Protocol;
use cipe_user::engine::pair::{Datagram, End, Pair, tcp, udp};

/// Packets of a round: one batch.
const BATCH: usize = 128;
/// Payload octets of a full TCP segment in a tunnel of MTU 1442.
const SEGMENT_OCTETS: usize = 1402;
/// Segments of a superframe.
const SEGMENTS: usize = 44;

/// The kinds of packets; those that begin with [`IN_FRAMES`] are in the frames of an Ethernet tunnel. `several`: of an engine
/// that has several tunnels, which looks for datagrams of the others.
const TRAFFIC: [&str; 10] = [
    "udp-64",
    "udp-1400",
    "udp-several",
    "tcp-1402",
    "superframes",
    "frame-udp-64",
    "frame-udp-1400",
    "frame-udp-several",
    "frame-tcp-1402",
    "frame-superframes",
];
const IN_FRAMES: &str = "frame-";
const CIPHERS: [&str; 3] = ["none", "blowfish", "idea"];
const DIRECTIONS: [&str; 2] = ["out", "in"];

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rounds = arguments.first().map_or(Ok(2000), |text| text.parse()).context("rounds")?;
    // Run a single case, for callgrind.
    let chosen = |place: usize, name: &str| arguments.get(place).is_none_or(|chosen| chosen == name);
    for direction in DIRECTIONS.into_iter().filter(|name| chosen(1, name)) {
        for cipher in CIPHERS.into_iter().filter(|name| chosen(2, name)) {
            for traffic in TRAFFIC.into_iter().filter(|name| chosen(3, name)) {
                let (packets, best) = measure(direction, cipher, traffic, rounds)?;
                println!("{direction} {cipher} {traffic} {packets} {best:.1}");
            }
        }
    }
    Ok(())
}

/// Total packets, and nanoseconds per packet in the fastest round.
fn measure(direction: &str, cipher: &str, traffic: &str, rounds: usize) -> anyhow::Result<(usize, f64)> {
    let algorithm = if cipher == "idea" { Algorithm::Idea } else { Algorithm::Blowfish };
    let protocol = if traffic.starts_with(IN_FRAMES) { Protocol::Ethernet } else { Protocol::Ip };
    let mut pair = Pair::new(algorithm, protocol)?;
    pair.change_key(&[1; 16], None);
    let Pair { a, b } = &mut pair;
    for end in [&mut *a, &mut *b] {
        end.tunnel().nokey = cipher == "none";
    }
    b.device.forgets = true;
    if traffic.ends_with("several") {
        a.add_other_target();
        b.add_other_target();
    }
    let (mut packets, mut best) = (0, f64::MAX);
    for _ in 0..rounds {
        push(a, traffic);
        let (count, nanoseconds) = match direction {
            "out" => {
                let start = Instant::now();
                seal(a);
                let nanoseconds = start.elapsed().as_nanos();
                (a.seal().len(), nanoseconds)
            }
            _ => {
                let sealed: Vec<Datagram> = a.seal();
                sealed.iter().for_each(|datagram| b.push_datagram(a.me(), datagram));
                let start = Instant::now();
                open(b);
                (sealed.len(), start.elapsed().as_nanos())
            }
        };
        packets += count;
        best = best.min(nanoseconds as f64 / count as f64);
    }
    Ok((packets, best))
}

/// Queues a batch of frames.
fn push(end: &mut End, traffic: &str) {
    let (traffic, in_frames) = traffic.strip_prefix(IN_FRAMES).map_or((traffic, false), |traffic| (traffic, true));
    let packets: Vec<(Vec<u8>, u16)> = match traffic {
        "udp-64" => vec![(udp(64 - 28), 0); BATCH],
        "udp-1400" | "udp-several" => vec![(udp(1400 - 28), 0); BATCH],
        "tcp-1402" => (0..BATCH).map(|n| (tcp((n * SEGMENT_OCTETS) as u32, n as u16, SEGMENT_OCTETS), 0)).collect(),
        _ => vec![(tcp(0, 0, SEGMENTS * SEGMENT_OCTETS), SEGMENT_OCTETS as u16); 3],
    };
    for (packet, gso_size) in packets {
        let has_room = match in_frames {
            true => end.push_frame(&frame(&packet, gso_size)),
            false => end.push(&packet, gso_size),
        };
        assert!(has_room, "a batch has its frames");
    }
}

/// A frame around an IPv4 packet, as the program of an Ethernet tunnel's pair redirects it: a superframe unless `gso_size` is 0.
fn frame(packet: &[u8], gso_size: u16) -> Vec<u8> {
    let stamp = [STAMP_TPID, EthernetStamp::Superframe(gso_size).to_tci().to_be_bytes()].concat();
    let tag = if gso_size > 0 { &stamp[..] } else { &[] };
    [&[2; 12], tag, &[0x08, 0x00], packet].concat()
}

#[inline(never)]
fn seal(end: &mut End) {
    black_box(end).seal_in_place();
}

#[inline(never)]
fn open(end: &mut End) {
    black_box(end).open();
}
