//! How large the frames are that a packet lives in from one socket to the other.

use crate::control::protocol::MAX_MTU;
use crate::engine::carrier::outer::{ETHERNET, FRESH, IPV6, UDP};
use crate::wire::packet;
use crate::xsk::PACKET_HEADROOM;

/// The largest MTU, in octets, of tunnels that small frames serve. With frames of twice the size, packets stand in
/// half of each cache's sets only.
pub const USUAL_MTU: u32 = 1600;

const SMALL: u32 = 2048;
const LARGE: u32 = 4096;

/// The packet with all its headers fits, as it is received by AF_XDP and as it is made here.
const fn fits(mtu: u32, frame: u32) -> bool {
    FRESH + ETHERNET + IPV6 + UDP + packet::sealed_len(mtu as usize) <= frame as usize
}
const _: () = assert!(fits(USUAL_MTU, SMALL) && fits(MAX_MTU, LARGE));

/// Octets of the frames of an engine whose tunnels have MTUs of up to `largest` octets.
pub fn frame_size(largest: u32) -> u32 {
    if largest <= USUAL_MTU { SMALL } else { LARGE }
}

/// The largest MTU of a tunnel in octets, by the frames of the engine.
pub fn largest_mtu(frame_size: u32) -> u32 {
    if frame_size < LARGE { USUAL_MTU } else { MAX_MTU }
}

/// Octets of the largest frame that AF_XDP puts into one of these.
pub fn largest_received(frame_size: u32) -> u32 {
    frame_size - PACKET_HEADROOM
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_engine_takes_the_tunnels_that_it_was_started_for() {
        for mtu in [68, 1442, USUAL_MTU, USUAL_MTU + 1, MAX_MTU] {
            assert!(largest_mtu(frame_size(mtu)) >= mtu, "{mtu}");
        }
        assert_eq!(frame_size(1442), SMALL);
    }
}
