//! The size of frames. A packet stays in one frame from the receiving to the sending socket.

use crate::control::protocol::MAX_MTU;
use crate::engine::carrier::outer::{ETHERNET, FRESH, IPV6, UDP};
use crate::wire::packet;
use crate::xsk::PACKET_HEADROOM;

/// Maximum MTU, in octets, of tunnels for which small frames are enough. With frames of twice the size, packets use
/// only half of each cache's sets.
pub const USUAL_MTU: u32 = 1600;

const SMALL: u32 = 2048;
const LARGE: u32 = 4096;

/// Whether a packet with all its headers fits, both as received by AF_XDP and as built by the engine.
const fn fits(mtu: u32, frame: u32) -> bool {
    FRESH + ETHERNET + IPV6 + UDP + packet::sealed_len(mtu as usize) <= frame as usize
}
const _: () = assert!(fits(USUAL_MTU, SMALL) && fits(MAX_MTU, LARGE));

/// Returns the octets of a frame for tunnels with MTUs of up to `largest` octets.
pub fn frame_size(largest: u32) -> u32 {
    if largest <= USUAL_MTU { SMALL } else { LARGE }
}

/// Returns the maximum MTU of a tunnel in octets, for frames of this size.
pub fn largest_mtu(frame_size: u32) -> u32 {
    if frame_size < LARGE { USUAL_MTU } else { MAX_MTU }
}

/// Returns the octets of the largest frame that AF_XDP can receive into one of these.
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
