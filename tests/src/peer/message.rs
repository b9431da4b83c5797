//! Section 3 of the specification: frames of the key exchange and of control messages.

use super::cipher::KEY;
use super::packet::crc;
use super::{Order, Stamp};

pub(super) const NK_REQ: u8 = 1;
pub(super) const NK_IND: u8 = 2;
pub(super) const NK_ACK: u8 = 3;
pub(crate) const CT_PING: u8 = 0x72;
pub(crate) const CT_PONG: u8 = 0x73;
pub(super) const CT_CONFREQ: u8 = 0x75;

/// The datagram in clear that an original of 1.5 sends at its start: its configuration, and a request for the peer's. `number`:
/// its type octet.
pub(super) fn configuration(number: u8, cipher: u8) -> Vec<u8> {
    let mut datagram = vec![0; 8];
    datagram.extend([number, rand::random(), rand::random(), rand::random()]);
    datagram.extend(b"CIPE");
    // Protocol, cipher, release 1.5, the key parser of 1.4.
    datagram.extend([3, cipher, 1, 5, 1]);
    datagram.extend(std::iter::repeat_with(rand::random::<u8>).take(50 + usize::from(rand::random::<u8>() % 8)));
    datagram
}

impl Stamp {
    fn place(self) -> usize {
        match self {
            Self::First => 48,
            Self::Second => 56,
        }
    }

    /// Whether the stamp of a message is at most `window` seconds from now.
    pub(super) fn is_near(self, payload: &[u8], window: u32) -> bool {
        let Some(octets) = payload.get(self.place()..self.place() + 4) else { return false };
        let stamp = octets.iter().fold(0, |sum, octet| sum << 8 | i64::from(*octet));
        (stamp - unix_time()).abs() <= window.into()
    }
}

/// Builds a frame: type, data, random octets after it, and the time.
pub(super) fn frame(number: u8, data: &[u8], stamp: Stamp) -> Vec<u8> {
    let random = usize::from(rand::random::<u8>());
    // The frame must have room for a stamp at the second place.
    let len = 56 + random.max(if stamp == Stamp::Second { 4 } else { 0 });
    let mut frame: Vec<u8> = std::iter::repeat_with(rand::random).take(len).collect();
    frame[0] = number;
    frame[1..=data.len()].copy_from_slice(data);
    if number >= 0x70 {
        frame[47] = 0;
    }
    frame[stamp.place()..][..4].copy_from_slice(&(unix_time() as u32).to_be_bytes());
    frame
}

/// NK_IND of one of ours: a key, and the time in seconds since 1970 at both places.
pub fn announcement(key: &[u8; KEY], unix: u32) -> Vec<u8> {
    let mut frame = vec![0x5A; 64];
    frame[0] = NK_IND;
    frame[1..=KEY].copy_from_slice(key);
    frame[1 + KEY..][..4].copy_from_slice(&key_sum(key, Order::Big));
    for stamp in [Stamp::First, Stamp::Second] {
        frame[stamp.place()..][..4].copy_from_slice(&unix.to_be_bytes());
    }
    frame
}

/// The check sum of a key in some order.
pub(super) fn key_sum(key: &[u8; KEY], order: Order) -> [u8; 4] {
    match order {
        Order::Big => crc(key).to_be_bytes(),
        Order::Little => crc(key).to_le_bytes(),
    }
}

/// Whether `sum` is the check sum of `key` in any order.
pub(super) fn is_sum(key: &[u8; KEY], sum: &[u8]) -> bool {
    [Order::Big, Order::Little].iter().any(|order| key_sum(key, *order) == *sum)
}

fn unix_time() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs() as i64)
}
