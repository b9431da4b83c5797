//! Layout of a packet (section 3): `80000000 | epoch, counter | AEAD(type | payload) | tag`.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Refused;
use super::cipher::{Key, TAG, iv};
use super::counter::{self, BITS};

/// The first octets of each sealed datagram.
pub const PREFIX: [u8; 4] = [0x80, 0, 0, 0];
/// Octets in front of what is encrypted.
pub const HEADER: usize = 8;
/// Octets in front of the payload.
pub const HEADROOM: usize = HEADER + 1;
/// Octets behind the payload.
pub const TAILROOM: usize = TAG;
/// Octets of the datagram beside the payload; also its least length.
pub const OVERHEAD: usize = HEADROOM + TAILROOM;

/// The number of a receive key, chosen by its owner: 1, 2 or 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "u8", try_from = "u8")]
pub struct Epoch(u8);

impl From<Epoch> for u8 {
    fn from(epoch: Epoch) -> Self {
        epoch.0
    }
}

impl TryFrom<u8> for Epoch {
    type Error = String;

    fn try_from(number: u8) -> Result<Self, String> {
        Self::new(number).ok_or_else(|| format!("{number} is not an epoch; 1, 2 and 3 are"))
    }
}

impl Epoch {
    /// All of them.
    pub const ALL: [Self; 3] = [Self(1), Self(2), Self(3)];

    /// The epoch of this number; `None` unless it is 1, 2 or 3.
    pub const fn new(number: u8) -> Option<Self> {
        match number {
            1..=3 => Some(Self(number)),
            _ => None,
        }
    }

    /// Its number.
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Its place in an array of three.
    pub const fn index(self) -> usize {
        self.0 as usize - 1
    }
}

/// The type of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// 0: an IP packet or an Ethernet frame.
    Data,
    /// 1: nothing, or a control message.
    Control,
}

/// What the header of a sealed datagram says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Header {
    /// Epoch 0: a handshake message of this kind.
    Handshake(u32),
    /// A packet under a receive key.
    Packet(Epoch, LowBits),
}

/// The low bits of a packet's counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LowBits(u32);

impl LowBits {
    /// The counter, if `top` is the highest one that was authentic under the key.
    #[inline]
    pub const fn complete(self, top: u64) -> u64 {
        counter::complete(self.0, top)
    }
}

/// Whether a datagram is of this kind, and not of protocol 3.
#[inline]
pub fn is_sealed(datagram: &[u8]) -> bool {
    datagram.starts_with(&PREFIX)
}

/// Reads the header of a datagram that [`is_sealed`].
///
/// # Errors
/// [`Refused::BadLength`].
#[inline]
pub fn parse(datagram: &[u8]) -> Result<Header, Refused> {
    let word = datagram.get(4..HEADER).and_then(|octets| octets.try_into().ok()).ok_or(Refused::BadLength)?;
    let word = u32::from_be_bytes(word);
    match Epoch::new((word >> BITS) as u8) {
        None => Ok(Header::Handshake(word)),
        Some(_) if datagram.len() < OVERHEAD => Err(Refused::BadLength),
        Some(epoch) => Ok(Header::Packet(epoch, LowBits(counter::low(word.into())))),
    }
}

fn header(epoch: Epoch, counter: u64) -> [u8; HEADER] {
    let word = u32::from(epoch.0) << BITS | counter::low(counter);
    (u64::from(u32::from_be_bytes(PREFIX)) << 32 | u64::from(word)).to_be_bytes()
}

/// Seals the payload of `n` octets at `buffer[HEADROOM..]` in place, and returns the datagram's length, `n + OVERHEAD`. The
/// caller must use each counter once under a key.
///
/// # Panics
/// If `buffer` is shorter than that.
#[inline]
pub fn seal(key: &Key, epoch: Epoch, counter: u64, content: Content, buffer: &mut [u8], n: usize) -> usize {
    let header = header(epoch, counter);
    let (front, rest) = buffer[..n + OVERHEAD].split_at_mut(HEADER);
    let (data, tag) = rest.split_at_mut(1 + n);
    front.copy_from_slice(&header);
    data[0] = match content {
        Content::Data => 0,
        Content::Control => 1,
    };
    tag.copy_from_slice(&key.seal(iv(counter), &header, data));
    n + OVERHEAD
}

/// What a packet holds: its type, if it is a defined one, and the place of its payload.
pub type Opened = (Result<Content, Refused>, Range<usize>);

/// Opens a packet in place: verifies the tag. The caller must then accept the counter in the key's window, and only then look at
/// the type, since a packet of an unknown type is authentic and used up, too.
///
/// # Errors
/// [`Refused::BadLength`] or [`Refused::BadTag`]; the contents of `datagram` are then lost.
#[inline]
pub fn open(key: &Key, counter: u64, datagram: &mut [u8]) -> Result<Opened, Refused> {
    if datagram.len() < OVERHEAD {
        return Err(Refused::BadLength);
    }
    let (header, data) = datagram.split_at_mut(HEADER);
    let plain = key.open(iv(counter), header, data).ok_or(Refused::BadTag)?;
    let content = match plain.first() {
        Some(0) => Ok(Content::Data),
        Some(1) => Ok(Content::Control),
        _ => Err(Refused::BadType),
    };
    Ok((content, HEADROOM..HEADER + plain.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::cipher::Suite;
    use super::*;

    const EPOCH: Epoch = Epoch(2);

    fn sealed(key: &Key, counter: u64, payload: &[u8]) -> Vec<u8> {
        let mut buffer = vec![0xEE; payload.len() + OVERHEAD];
        buffer[HEADROOM..HEADROOM + payload.len()].copy_from_slice(payload);
        let len = seal(key, EPOCH, counter, Content::Data, &mut buffer, payload.len());
        assert_eq!(len, buffer.len());
        buffer
    }

    #[test]
    fn no_changed_bit_and_no_cut_is_opened() {
        for suite in [Suite::Aes256Gcm, Suite::ChaCha20Poly1305] {
            let key = Key::new(suite, &[7; 32]);
            let good = sealed(&key, 5, b"payload");
            for bit in 0..good.len() * 8 {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(open(&key, 5, &mut bad), Err(Refused::BadTag), "bit {bit}");
            }
            for len in 0..good.len() {
                let verdict = if len < OVERHEAD { Refused::BadLength } else { Refused::BadTag };
                assert_eq!(open(&key, 5, &mut good[..len].to_vec()), Err(verdict), "{len} octets");
            }
            assert_eq!(open(&key, 6, &mut good.clone()), Err(Refused::BadTag), "another counter");
            assert_eq!(open(&Key::new(suite, &[8; 32]), 5, &mut good.clone()), Err(Refused::BadTag), "another key");
        }
    }

    #[test]
    fn an_undefined_type_is_authentic_and_told() {
        let key = Key::new(Suite::Aes256Gcm, &[7; 32]);
        let mut data = [2, 9, 9];
        let header = header(EPOCH, 0);
        let tag = key.seal(iv(0), &header, &mut data);
        let mut datagram = [&header[..], &data, &tag].concat();
        assert_eq!(open(&key, 0, &mut datagram), Ok((Err(Refused::BadType), 9..11)));
    }

    #[test]
    fn headers_are_told_apart() {
        assert!(
            is_sealed(&[0x80, 0, 0, 0])
                && !is_sealed(&[0x80, 0, 0, 1])
                && !is_sealed(&[0; 8])
                && !is_sealed(&[0x80, 0, 0])
        );
        assert_eq!(parse(&[0x80, 0, 0, 0, 0, 0, 0, 1]), Ok(Header::Handshake(1)));
        assert_eq!(parse(&[0x80, 0, 0, 0, 0x3F, 255, 255, 255]), Ok(Header::Handshake(0x3FFF_FFFF)));
        assert_eq!(parse(&[0x80, 0, 0, 0, 0, 0, 0]), Err(Refused::BadLength));
        let mut packet = [0; OVERHEAD];
        packet[..8].copy_from_slice(&[0x80, 0, 0, 0, 0xFF, 255, 255, 255]);
        assert_eq!(parse(&packet), Ok(Header::Packet(Epoch(3), LowBits(0x3FFF_FFFF))));
        assert_eq!(parse(&packet[..24]), Err(Refused::BadLength));
    }

    proptest! {
        #[test]
        fn what_was_sealed_is_opened(
            octets: [u8; 32], aes: bool, counter in 0..counter::END, control: bool, payload: Vec<u8>, spare in 0usize..9,
        ) {
            let suite = if aes { Suite::Aes256Gcm } else { Suite::ChaCha20Poly1305 };
            let key = Key::new(suite, &octets);
            let content = if control { Content::Control } else { Content::Data };
            let mut buffer = vec![0; payload.len() + OVERHEAD + spare];
            buffer[HEADROOM..HEADROOM + payload.len()].copy_from_slice(&payload);
            let len = seal(&key, EPOCH, counter, content, &mut buffer, payload.len());
            prop_assert!(is_sealed(&buffer));
            prop_assert_eq!(parse(&buffer[..len]), Ok(Header::Packet(EPOCH, LowBits(counter::low(counter)))));
            let (told, place) = open(&key, counter, &mut buffer[..len]).unwrap();
            prop_assert_eq!(told, Ok(content));
            prop_assert_eq!(&buffer[place], &payload[..]);
            prop_assert!(buffer[len..].iter().all(|octet| *octet == 0));
        }
    }

    impl LowBits {
        fn of(counter: u64) -> Self {
            Self(counter::low(counter))
        }
    }

    #[test]
    fn low_bits_complete_to_the_counter() {
        assert_eq!(LowBits::of(counter::RENEW).complete(counter::RENEW + 9), counter::RENEW);
    }
}
