//! The choice between zero copy, where a card's driver works on the engine's frames itself, and copy mode; and the status note on it.

use crate::kernel::links::Card;
use crate::kernel::netdev;
use crate::xsk::{Mode, PACKET_HEADROOM, Socket};

/// Octets of a received frame beside its IP packet: Ethernet header, two VLAN tags, and the check sequence that some drivers leave.
const FRAME_OVERHEAD: u32 = 14 + 2 * 4 + 4;

/// Drivers whose cards have receive buffers in steps of 1 KiB. With less behind the headroom, a card cuts frames into several
/// descriptors, and without scatter-gather each passes for a frame (SRRCTL.BSIZEPKT in the manuals of 82576, I210, I225, 82599).
const COARSE_DRIVERS: [&str; 3] = ["igb", "igc", "ixgbe"];

/// The mode that is asked of a card.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Copying {
    /// The mode to bind sockets with.
    pub mode: Mode,
    /// Why it is not zero copy, where the driver has that.
    why: Option<String>,
}

/// The modes that the kernel granted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Got {
    /// Number of sockets.
    pub queues: usize,
    /// Number of sockets with zero copy.
    pub zero_copy: usize,
    /// All of them take packets in several pieces.
    multi_buffer: bool,
}

impl Copying {
    /// The mode for a card; `generic`: with generic XDP; `frame_size`: in octets; `given_up`: nothing came by zero copy.
    pub(super) fn of(card: &Card, generic: bool, frame_size: u32, given_up: bool) -> Self {
        // Generic XDP sees the socket buffers that the driver makes; of the engine's frames it would make none.
        if generic || netdev::has_zero_copy(card.ifindex) == Some(false) {
            return Self { mode: Mode::Copy, why: None };
        }
        if given_up {
            return Self { mode: Mode::Copy, why: Some("nothing came by zero copy; it is tried again".to_owned()) };
        }
        let driver = card.driver.as_deref().unwrap_or_default();
        let (room, wanted) = (room(driver, frame_size), card.mtu + FRAME_OVERHEAD);
        if room >= wanted {
            return Self { mode: Mode::Auto, why: None };
        }
        let why =
            format!("no zero copy: with frames of {frame_size} octets it takes {room}, and the MTU wants {wanted}");
        let remedy =
            if room_of_largest(driver) >= wanted { "; CIPE_LARGEST_MTU=3500 makes frames of 4096" } else { "" };
        Self { mode: Mode::Copy, why: Some(why + remedy) }
    }

    /// The note for the status.
    pub(super) fn note(&self, got: Got) -> String {
        let Got { queues, zero_copy, multi_buffer } = got;
        let what = match (zero_copy, &self.why) {
            (0, None) => "copy mode".to_owned(),
            (0, Some(why)) => format!("copy mode ({why})"),
            _ if zero_copy == queues => "zero copy".to_owned(),
            _ => format!("zero copy on {zero_copy} of {queues} queues"),
        };
        if multi_buffer || zero_copy == 0 { what } else { format!("{what} without scatter-gather") }
    }
}

impl Got {
    /// The modes of these sockets.
    pub(super) fn of(sockets: &[Socket]) -> Self {
        Self {
            queues: sockets.len(),
            zero_copy: sockets.iter().filter(|socket| socket.zero_copy()).count(),
            multi_buffer: sockets.iter().all(Socket::multi_buffer),
        }
    }
}

/// The largest received frame that a driver puts into a frame of the engine, in octets.
fn room(driver: &str, frame_size: u32) -> u32 {
    let room = frame_size - PACKET_HEADROOM;
    if COARSE_DRIVERS.contains(&driver) { room / 1024 * 1024 } else { room }
}

fn room_of_largest(driver: &str) -> u32 {
    room(driver, 4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn got(queues: usize, zero_copy: usize, multi_buffer: bool) -> Got {
        Got { queues, zero_copy, multi_buffer }
    }

    #[test]
    fn a_full_frame_fits_a_chunk_behind_the_headroom_but_where_buffers_are_coarse() {
        assert!(room("virtio_net", 2048) >= 1500 + FRAME_OVERHEAD);
        assert!(room("igb", 2048) < 1500 + FRAME_OVERHEAD);
        assert!(room("igb", 4096) >= 1500 + FRAME_OVERHEAD);
        assert!(room("ice", 4096) < 9000 + FRAME_OVERHEAD);
    }

    #[test]
    fn the_status_says_what_was_got_and_why_not_more() {
        let auto = Copying { mode: Mode::Auto, why: None };
        assert_eq!(auto.note(got(2, 0, true)), "copy mode");
        assert_eq!(auto.note(got(2, 0, false)), "copy mode");
        assert_eq!(auto.note(got(2, 2, true)), "zero copy");
        assert_eq!(auto.note(got(1, 1, false)), "zero copy without scatter-gather");
        assert_eq!(auto.note(got(4, 1, false)), "zero copy on 1 of 4 queues without scatter-gather");
        let copy = Copying { mode: Mode::Copy, why: Some("no zero copy: small".into()) };
        assert_eq!(copy.note(got(1, 0, true)), "copy mode (no zero copy: small)");
    }
}
