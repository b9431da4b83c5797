//! Live frames, over a real veth pair.

use std::{io::Read as _, os::fd::AsFd as _};

use cipe_common::maps::{CHUNK, Departure};
use socket2::Socket;

use super::{
    attachment::{CHUNKS, Veth, in_namespace, tap},
    frames::udp,
    *,
};
use crate::kernel::netdev;
use crate::xsk::{Frame, Pool, Umem, UmemConfig};

/// Offset of the frames in their chunks.
const OFFSET: usize = 214;

fn memory(programs: &Programs) -> (Umem, Pool) {
    let config = UmemConfig { frames: CHUNKS, frame_size: CHUNK as u32, ..UmemConfig::default() };
    Umem::over(programs.chunks(), config).unwrap()
}

/// A frame to an unused address, with its number in the payload.
fn frame(number: usize) -> Vec<u8> {
    udp("192.0.2.9:4000".parse().unwrap(), &vec![number as u8; 1 + number * 7 % 1400])
}

fn put(umem: &Umem, frame: &mut Frame, octets: &[u8]) -> Departure {
    umem.chunk_mut(frame)[OFFSET..OFFSET + octets.len()].copy_from_slice(octets);
    Departure::new(frame.index(), OFFSET, octets.len()).unwrap()
}

/// The next received frame that looks like one of ours; skips transmitted frames.
fn arrived(mut tap: &Socket) -> Vec<u8> {
    let mut octets = vec![0; 2048];
    loop {
        let length = tap.read(&mut octets).unwrap();
        if octets[..length].starts_with(&frame(0)[..14]) {
            return octets[..length].to_vec();
        }
    }
}

#[test]
fn live_frames_arrive_whole_and_in_order() {
    in_namespace(|programs, Veth { visible, hidden }| {
        let (umem, mut pool) = memory(programs);
        for end in [visible, hidden] {
            programs.attach_carrier(end, XdpMode::Native).unwrap();
        }
        let mut live = programs.live_frames(0).unwrap();
        let tap = tap();
        // All frames of a call arrive before the first is read.
        rustix::net::sockopt::set_socket_recv_buffer_size_force(&tap, 8 << 20).unwrap();
        let mut number = 0;
        // A single frame, several, and more than the kernel makes at once.
        for count in [1, 16, 200] {
            let mut frames: Vec<Frame> = (0..count).map(|_| pool.take().unwrap()).collect();
            let sent: Vec<Vec<u8>> = (number..number + count).map(frame).collect();
            let departures: Vec<_> =
                frames.iter_mut().zip(&sent).map(|(frame, octets)| put(&umem, frame, octets)).collect();
            assert_eq!(live.send(visible, &departures), count);
            sent.iter().for_each(|octets| assert_eq!(&arrived(&tap), octets));
            frames.into_iter().for_each(|frame| pool.put(frame));
            number += count;
        }
        assert_eq!(live.send(visible, &[]), 0);
    });
}

#[test]
fn a_veth_takes_live_frames_while_its_peer_runs_native_xdp() {
    in_namespace(|programs, Veth { visible, hidden }| {
        assert!(!netdev::takes_xdp_frames(visible));
        programs.attach_carrier(hidden, XdpMode::Native).unwrap();
        assert!(netdev::takes_xdp_frames(visible));
        assert!(!netdev::takes_xdp_frames(hidden));
        programs.detach_carrier(hidden);
        assert!(!netdev::takes_xdp_frames(visible));
        programs.attach_carrier(hidden, XdpMode::Generic).unwrap();
        assert!(!netdev::takes_xdp_frames(visible));
        assert!(!netdev::takes_xdp_frames(4_000_000));
    });
}

#[test]
fn a_umem_is_no_larger_than_the_map_below_it() {
    let Some(programs) = programs_with(LoadOptions { chunks: 4, ..LoadOptions::default() }) else { return };
    let config = |frames| UmemConfig { frames, frame_size: CHUNK as u32, ..UmemConfig::default() };
    assert!(Umem::over(programs.chunks(), config(4)).is_ok());
    assert!(Umem::over(programs.chunks().as_fd(), config(4096)).is_err());
}

#[test]
fn a_run_sends_nothing_from_outside_the_chunks() {
    in_namespace(|programs, Veth { visible, hidden }| {
        for end in [visible, hidden] {
            programs.attach_carrier(end, XdpMode::Native).unwrap();
        }
        let mut live = programs.live_frames(0).unwrap();
        let beyond = Departure::new(CHUNKS, OFFSET, 100).unwrap();
        let (none, endless) = (Departure(0), Departure(u64::MAX));
        assert_eq!(live.send(visible, &[beyond, none, endless]), 0);
    });
}
