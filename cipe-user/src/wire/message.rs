//! Key-exchange and control messages (protocol section 3): `type | data | random filler`, with the sender's time.

use cipe_common::Verdict;
use rand::{CryptoRng, RngExt};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use super::crc::crc;
use crate::cipher::KEY;

/// Octets of data after the type in a control message with a time stamp: octet 47 ends it, and the stamp follows.
pub const STAMPED_DATA: usize = 46;
/// Maximum octets of a text in a control message; it needs no stamp.
pub const MAX_TEXT: usize = 254;
/// Octets of a CT_PING that its CT_PONG copies: all of the longest message.
pub const MAX_ECHO: usize = BASE_OCTETS + u8::MAX as usize - 1;

/// Offsets of a time stamp: version 1.4.5 has it at the first, later versions perhaps at the second. Both are written.
const STAMP_OFFSETS: [usize; 2] = [48, 56];
/// Octets of a message without its random tail.
const BASE_OCTETS: usize = 56;
/// Minimum octets of the random tail: the second time stamp needs them.
const MIN_TAIL_OCTETS: usize = 4;

/// Type octets.
pub(super) mod number {
    pub(crate) const NK_REQ: u8 = 1;
    pub(crate) const NK_IND: u8 = 2;
    pub(crate) const NK_ACK: u8 = 3;
    pub(crate) const CT_DUMMY: u8 = 0x70;
    pub(crate) const CT_DEBUG: u8 = 0x71;
    pub(crate) const CT_PING: u8 = 0x72;
    pub(crate) const CT_PONG: u8 = 0x73;
    pub(crate) const CT_KILL: u8 = 0x74;
    pub(crate) const CT_CONFREQ: u8 = 0x75;
    pub(crate) const CT_CONF: u8 = 0x76;
}

/// The octets of a dynamic key in transit. Zeroized on drop; not `Debug`, so that they cannot reach a log.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct DynamicKey(pub [u8; KEY]);

impl DynamicKey {
    /// A new random key.
    pub fn random(rng: &mut impl CryptoRng) -> Self {
        let mut key = Self([0; KEY]);
        rng.fill_bytes(&mut key.0);
        key
    }

    /// The check sum that identifies this key in NK_IND and NK_ACK, in the octet order that we send.
    pub fn sum(&self) -> [u8; 4] {
        crc(&self.0).to_be_bytes()
    }

    /// Whether `sum` identifies this key, in either octet order: no source settles which one the originals use.
    pub fn has_sum(&self, sum: [u8; 4]) -> bool {
        let own = self.sum();
        let [a, b, c, d] = own;
        sum == own || sum == [d, c, b, a]
    }
}

/// A message. Borrowed data points into the payload that was parsed.
#[derive(Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// NK_REQ: asks the receiver for a new send key.
    Request,
    /// NK_IND: carries the sender's next send key. Exists only if the check sum was right.
    Indication {
        /// The key.
        key: DynamicKey,
        /// Its check sum in the sender's octet order, to be echoed as it is.
        sum: [u8; 4],
    },
    /// NK_ACK: the sender has accepted the key with this check sum.
    Acknowledgement {
        /// The check sum, as in the NK_IND.
        sum: [u8; 4],
    },
    /// CT_DUMMY: anything; originals ignore it.
    Dummy(&'a [u8]),
    /// CT_DEBUG: text to log, up to its terminating zero.
    Debug(&'a [u8]),
    /// CT_PING: asks the receiver to echo these octets.
    Ping(&'a [u8]),
    /// CT_PONG: the echo.
    Pong(&'a [u8]),
    /// CT_KILL: asks the receiver to exit; a text gives the reason, up to its terminating zero.
    Kill(&'a [u8]),
}

impl<'a> Message<'a> {
    /// Reads the payload of a control packet. Only the fields of its type are required, since no source settles the
    /// layout of every version; [`is_fresh`] checks the time separately.
    ///
    /// # Errors
    /// [`Verdict::BadMessage`] for an unknown type, missing octets, or a key whose check sum is wrong.
    pub fn parse(payload: &'a [u8]) -> Result<Self, Verdict> {
        let (&number, rest) = payload.split_first().ok_or(Verdict::BadMessage)?;
        let data = &rest[..rest.len().min(MAX_ECHO)];
        let text = rest[..rest.len().min(MAX_TEXT)].split(|octet| *octet == 0).next().unwrap_or_default();
        Ok(match number {
            number::NK_REQ => Self::Request,
            number::NK_IND => {
                let (octets, rest) = rest.split_first_chunk().ok_or(Verdict::BadMessage)?;
                let sum = *rest.first_chunk().ok_or(Verdict::BadMessage)?;
                let key = DynamicKey(*octets);
                if !key.has_sum(sum) {
                    return Err(Verdict::BadMessage);
                }
                Self::Indication { key, sum }
            }
            number::NK_ACK => Self::Acknowledgement { sum: *rest.first_chunk().ok_or(Verdict::BadMessage)? },
            number::CT_DUMMY => Self::Dummy(data),
            number::CT_DEBUG => Self::Debug(text),
            number::CT_PING => Self::Ping(data),
            number::CT_PONG => Self::Pong(data),
            number::CT_KILL => Self::Kill(text),
            // A configuration is sent in clear only.
            _ => return Err(Verdict::BadMessage),
        })
    }

    /// Whether a time stamp may be required: in key-exchange messages only.
    pub const fn is_stamped(&self) -> bool {
        matches!(self, Self::Request | Self::Indication { .. } | Self::Acknowledgement { .. })
    }

    const fn number(&self) -> u8 {
        match self {
            Self::Request => number::NK_REQ,
            Self::Indication { .. } => number::NK_IND,
            Self::Acknowledgement { .. } => number::NK_ACK,
            Self::Dummy(_) => number::CT_DUMMY,
            Self::Debug(_) => number::CT_DEBUG,
            Self::Ping(_) => number::CT_PING,
            Self::Pong(_) => number::CT_PONG,
            Self::Kill(_) => number::CT_KILL,
        }
    }

    /// The name in logs.
    pub const fn name(&self) -> &'static str {
        Self::name_of(self.number())
    }

    /// The name of a type octet in logs.
    pub const fn name_of(number: u8) -> &'static str {
        match number {
            number::NK_REQ => "NK_REQ",
            number::NK_IND => "NK_IND",
            number::NK_ACK => "NK_ACK",
            number::CT_DUMMY => "CT_DUMMY",
            number::CT_DEBUG => "CT_DEBUG",
            number::CT_PING => "CT_PING",
            number::CT_PONG => "CT_PONG",
            number::CT_KILL => "CT_KILL",
            number::CT_CONFREQ => "CT_CONFREQ",
            number::CT_CONF => "CT_CONF",
            _ => "a message of an unknown type",
        }
    }

    /// Builds the NK_IND that announces `key`.
    pub fn indication(key: &DynamicKey) -> Self {
        Self::Indication { key: key.clone(), sum: key.sum() }
    }

    /// Octets of data or text, and their greatest number.
    const fn data(&self) -> (&'a [u8], usize) {
        match self {
            Self::Request | Self::Indication { .. } | Self::Acknowledgement { .. } => (&[], 0),
            Self::Debug(text) | Self::Kill(text) => (text, MAX_TEXT),
            Self::Dummy(data) | Self::Ping(data) | Self::Pong(data) => (data, MAX_ECHO),
        }
    }

    /// Builds the content of a sealed control packet, of a message other than NK_*: type and data, without filler and time stamp.
    pub fn bare(&self) -> Vec<u8> {
        let (data, most) = self.data();
        [&[self.number()], &data[..data.len().min(most)]].concat()
    }

    /// Builds the payload: 60 to 311 octets, filled up with random octets, stamped with `unix_time` (seconds) at both
    /// offsets. Data longer than [`STAMPED_DATA`] replaces the stamps; a text beyond [`MAX_TEXT`] octets is cut off,
    /// and other data beyond [`MAX_ECHO`].
    pub fn build(&self, unix_time: u32, rng: &mut impl CryptoRng) -> Zeroizing<Vec<u8>> {
        let (data, most) = self.data();
        let data = &data[..data.len().min(most)];
        // Octets for the type, the data, and the zero that ends a text.
        let room = (1 + data.len() + usize::from(most == MAX_TEXT)).saturating_sub(BASE_OCTETS).max(MIN_TAIL_OCTETS);
        let tail = rng.random_range(room..=usize::from(u8::MAX).max(room));
        let mut payload = Zeroizing::new(vec![0; BASE_OCTETS + tail]);
        rng.fill_bytes(&mut payload);
        payload[0] = self.number();
        match self {
            Self::Request => {}
            Self::Indication { key, sum } => {
                payload[1..1 + KEY].copy_from_slice(&key.0);
                payload[1 + KEY..5 + KEY].copy_from_slice(sum);
            }
            Self::Acknowledgement { sum } => payload[1..5].copy_from_slice(sum),
            Self::Dummy(_) | Self::Debug(_) | Self::Ping(_) | Self::Pong(_) | Self::Kill(_) => {
                payload[1..=data.len()].copy_from_slice(data);
                if let Some(end) = payload.get_mut(1 + data.len()) {
                    *end = 0;
                }
            }
        }
        if data.len() <= STAMPED_DATA {
            if !self.is_stamped() {
                payload[1 + STAMPED_DATA] = 0;
            }
            for at in STAMP_OFFSETS {
                payload[at..at + 4].copy_from_slice(&unix_time.to_be_bytes());
            }
        }
        payload
    }
}

/// Whether this octet is the type of an encrypted message of section 3.
pub const fn is_known(number: u8) -> bool {
    cipe_common::shield::is_message(number)
}

/// Whether a message's time stamp, at either offset, is within `tokxts` seconds of `unix_time`. If `tokxts` is 0, every
/// message is fresh; else a message too short for a stamp is not fresh.
pub fn is_fresh(payload: &[u8], unix_time: u32, tokxts: u32) -> bool {
    tokxts == 0
        || STAMP_OFFSETS.iter().any(|&at| {
            let stamp = payload.get(at..).and_then(|rest| rest.first_chunk());
            // The difference modulo 2^32, so that the window is right in 2106 too.
            stamp.is_some_and(|octets| {
                let ahead = u32::from_be_bytes(*octets).wrapping_sub(unix_time);
                ahead.min(ahead.wrapping_neg()) <= tokxts
            })
        })
}

/// The time stamp of a message that bears the same one at both offsets, as ours do. One of an original may have random octets at
/// either.
pub fn stamp(payload: &[u8]) -> Option<u32> {
    let [first, second] = STAMP_OFFSETS.map(|at| payload.get(at..)?.first_chunk().copied().map(u32::from_be_bytes));
    first.filter(|_| first == second)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    fn rng() -> StdRng {
        StdRng::seed_from_u64(3)
    }

    #[test]
    fn every_message_comes_back() {
        let key = DynamicKey::random(&mut rng());
        let messages = [
            Message::Request,
            Message::indication(&key),
            Message::Acknowledgement { sum: key.sum() },
            Message::Debug(b"the quick brown fox jumps over the lazy dogs.."),
            Message::Debug(b"short"),
            Message::Debug(b""),
            Message::Debug(&[b'y'; MAX_TEXT]),
            Message::Kill(b"asked to stop"),
            Message::Kill(b""),
        ];
        for message in messages {
            let payload = message.build(1_000_000, &mut rng());
            assert!(Message::parse(&payload).is_ok_and(|parsed| parsed == message), "{}", message.name());
            assert!(is_known(payload[0]));
        }
    }

    #[test]
    fn the_data_of_ping_pong_and_dummy_comes_first() {
        for message in [Message::Ping(b"12345678"), Message::Pong(b"12345678"), Message::Dummy(b"12345678")] {
            let payload = message.build(0, &mut rng());
            let Ok(Message::Ping(data) | Message::Pong(data) | Message::Dummy(data)) = Message::parse(&payload) else {
                panic!("{}", message.name());
            };
            assert!(data.starts_with(b"12345678\0") && data.len() > STAMPED_DATA);
        }
    }

    #[test]
    fn a_bare_message_comes_back_as_it_is() {
        let messages = [
            Message::Dummy(b""),
            Message::Ping(b""),
            Message::Ping(b"12345678"),
            Message::Pong(&[7; MAX_ECHO]),
            Message::Debug(b"hello"),
            Message::Kill(b"asked to stop"),
        ];
        for message in messages {
            let bare = message.bare();
            assert!(Message::parse(&bare).is_ok_and(|parsed| parsed == message), "{}", message.name());
            assert_eq!(bare.len(), 1 + message.data().0.len());
        }
    }

    #[test]
    fn the_frame_is_that_of_the_protocol() {
        let mut rng = rng();
        let mut lengths = std::collections::BTreeSet::new();
        for _ in 0..10_000 {
            let payload = Message::Debug(&[b'x'; STAMPED_DATA]).build(0x6543_2100, &mut rng);
            lengths.insert(payload.len());
            assert_eq!(payload[..47], [&[0x71][..], &[b'x'; 46]].concat());
            assert_eq!(payload[47], 0);
            assert_eq!(payload[48..52], [0x65, 0x43, 0x21, 0]);
            assert_eq!(payload[56..60], [0x65, 0x43, 0x21, 0]);
        }
        assert_eq!((lengths.first(), lengths.last()), (Some(&60), Some(&311)));
    }

    #[test]
    fn a_long_text_takes_the_place_of_the_stamps_and_ends_with_a_zero() {
        let mut rng = rng();
        for length in STAMPED_DATA + 1..=MAX_TEXT + 10 {
            let text = vec![b'x'; length];
            let payload = Message::Debug(&text).build(0, &mut rng);
            let length = length.min(MAX_TEXT);
            assert_eq!((&payload[1..=length], payload[1 + length]), (&text[..length], 0));
            assert!(payload.len() <= BASE_OCTETS + usize::from(u8::MAX));
            assert!(Message::parse(&payload).is_ok_and(|parsed| parsed == Message::Debug(&text[..length])));
        }
    }

    /// Pings of any version, whatever their contents.
    #[test]
    fn a_pong_copies_all_of_a_ping() {
        let mut rng = rng();
        for length in [2, 47, 48, 60, 200, BASE_OCTETS + usize::from(u8::MAX)] {
            let ping: Vec<u8> = (0..length).map(|n| if n == 0 { 0x72 } else { n as u8 }).collect();
            let Ok(Message::Ping(data)) = Message::parse(&ping) else { panic!("no ping") };
            let pong = Message::Pong(data).build(0, &mut rng);
            assert_eq!((pong[0], &pong[1..length]), (0x73, &ping[1..]));
        }
    }

    #[test]
    fn stamps_are_for_the_key_exchange() {
        let key = DynamicKey([1; KEY]);
        assert!(Message::Request.is_stamped() && Message::indication(&key).is_stamped());
        assert!(Message::Acknowledgement { sum: [0; 4] }.is_stamped());
        let control =
            [Message::Dummy(b""), Message::Debug(b""), Message::Ping(b""), Message::Pong(b""), Message::Kill(b"")];
        assert!(control.iter().all(|message| !message.is_stamped()));
    }

    #[test]
    fn a_key_sum_counts_in_either_octet_order_and_is_echoed() {
        let key = DynamicKey::random(&mut rng());
        let mut payload = Message::indication(&key).build(0, &mut rng());
        payload[17..21].reverse();
        let mut reversed = key.sum();
        reversed.reverse();
        let Ok(Message::Indication { key: parsed, sum }) = Message::parse(&payload) else { panic!("refused") };
        assert!(parsed == key && sum == reversed && key.has_sum(sum));
        payload[1] ^= 1;
        assert!(Message::parse(&payload).is_err());
    }

    #[test]
    fn unknown_and_short_messages_are_refused() {
        let long = Message::indication(&DynamicKey([1; KEY])).build(0, &mut rng());
        assert!(Message::parse(&[]).is_err());
        for end in 1..21 {
            assert!(Message::parse(&long[..end]).is_err());
        }
        assert!(Message::parse(&long[..21]).is_ok());
        assert!(Message::parse(&[3, 0, 0, 0]).is_err());
        for number in (0..=255).filter(|number| !is_known(*number)) {
            assert!(Message::parse(&[number; 60]).is_err());
        }
    }

    #[test]
    fn either_stamp_inside_the_window_will_do() {
        let mut payload = Message::Request.build(1_000, &mut rng());
        for (now, window, fresh) in
            [(1_000, 1, true), (1_005, 5, true), (995, 5, true), (1_006, 5, false), (994, 5, false), (9_999, 0, true)]
        {
            assert_eq!(is_fresh(&payload, now, window), fresh, "{now} {window}");
        }
        payload[48] = 0xFF;
        assert!(is_fresh(&payload, 1_000, 1));
        payload[48] = 0;
        payload[56] = 0xFF;
        assert!(is_fresh(&payload, 1_000, 1));
        payload[48] = 0xFF;
        assert!(!is_fresh(&payload, 1_000, 1));
        assert!(!is_fresh(&payload[..51], 1_000, 1));
        assert!(is_fresh(&[], 1_000, 0));
    }

    #[test]
    fn a_stamp_is_told_if_both_places_agree() {
        let mut payload = Message::Request.build(1_000, &mut rng());
        assert_eq!(stamp(&payload), Some(1_000));
        payload[50] ^= 1;
        assert_eq!(stamp(&payload), None);
        assert_eq!(stamp(&payload[..51]), None);
    }

    #[test]
    fn the_window_holds_when_the_stamp_wraps() {
        let payload = Message::Request.build(u32::MAX, &mut rng());
        assert!(is_fresh(&payload, 3, 4) && !is_fresh(&payload, 4, 4));
    }

    proptest! {
        #[test]
        fn any_octets_get_a_verdict(first in prop_oneof![0u8..4, 0x70u8..0x78, any::<u8>()],
                                    rest in proptest::collection::vec(any::<u8>(), 0..80), now: u32, window: u32) {
            let payload: Vec<u8> = std::iter::once(first).chain(rest).collect();
            is_fresh(&payload, now, window);
            if Message::parse(&payload).is_ok() {
                prop_assert!(is_known(first));
            }
        }
    }
}
