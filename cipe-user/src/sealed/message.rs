//! Layout of handshake messages (section 5).

use rand::CryptoRng;

use super::Refused;
use super::cipher::{Key, Suite, TAG};
use super::noise::PUBLIC;
use super::packet::{Epoch, HEADER, PREFIX};
use super::secrets::{MAC, Secrets};

/// Octets of a first message.
pub const FIRST: usize = 112;
/// Octets of an answer.
pub const ANSWER: usize = 96;
/// Octets of a retry.
pub const RETRY: usize = 80;
/// Octets of a cookie.
pub const COOKIE: usize = 16;
/// Octets by which an answer names the first message that it answers: the front of that one's MAC.
pub(super) const ECHO: usize = 8;

pub(super) const FIRST_PAYLOAD: usize = 24;
pub(super) const ANSWER_PAYLOAD: usize = 16;
const RETRY_PAYLOAD: usize = 28;

const _: () = assert!(FIRST == HEADER + PUBLIC + FIRST_PAYLOAD + TAG + 2 * MAC);
const _: () = assert!(ANSWER == HEADER + PUBLIC + ANSWER_PAYLOAD + TAG + ECHO + MAC);
const _: () = assert!(RETRY == HEADER + 12 + RETRY_PAYLOAD + TAG + MAC);

/// The kind of a handshake message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Of the initiator.
    First = 1,
    /// Of the responder.
    Answer = 2,
    /// Of the responder, instead of an answer.
    Retry = 3,
}

impl Kind {
    /// The kind of a datagram with this header word, of the right length.
    ///
    /// # Errors
    /// [`Refused::BadMessage`] or [`Refused::BadLength`].
    pub fn of(word: u32, len: usize) -> Result<Self, Refused> {
        let kind = match word {
            1 => Self::First,
            2 => Self::Answer,
            3 => Self::Retry,
            _ => return Err(Refused::BadMessage),
        };
        if len == kind.len() { Ok(kind) } else { Err(Refused::BadLength) }
    }

    const fn len(self) -> usize {
        match self {
            Self::First => FIRST,
            Self::Answer => ANSWER,
            Self::Retry => RETRY,
        }
    }

    /// Where its (first) MAC stands, which covers all before it.
    pub(super) const fn mac_at(self) -> usize {
        match self {
            Self::First => FIRST - 2 * MAC,
            Self::Answer | Self::Retry => self.len() - MAC,
        }
    }

    /// The octets that such a message begins with.
    pub(super) fn header(self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&PREFIX);
        header[4..].copy_from_slice(&(self as u32).to_be_bytes());
        header
    }
}

/// What a tunnel carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Carries {
    /// IP packets, as protocol 3 does.
    Ip = 3,
    /// Ethernet frames, as protocol 4 does.
    Ethernet = 4,
}

/// What both ends say of themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sender {
    pub(super) id: u64,
    /// For packets to the sender.
    pub(super) epoch: Epoch,
    pub(super) fast_aes: bool,
    pub(super) carries: Carries,
}

impl Sender {
    /// Of the payload of an answer, and of a first message behind its time stamp.
    fn parse(payload: &[u8; ANSWER_PAYLOAD]) -> Option<Self> {
        let [id @ .., epoch, ciphers, carries, _, _, _, _, _] = payload;
        let id: &[u8; 8] = id;
        Some(Self {
            id: u64::from_be_bytes(*id),
            epoch: Epoch::new(*epoch)?,
            fast_aes: ciphers & 1 != 0,
            carries: match carries {
                3 => Carries::Ip,
                4 => Carries::Ethernet,
                _ => return None,
            },
        })
    }

    pub(super) fn octets(self) -> [u8; ANSWER_PAYLOAD] {
        let mut payload = [0; ANSWER_PAYLOAD];
        payload[..8].copy_from_slice(&self.id.to_be_bytes());
        payload[8..11].copy_from_slice(&[self.epoch.number(), self.fast_aes.into(), self.carries as u8]);
        payload
    }

    /// Reads an answer's payload.
    ///
    /// # Errors
    /// [`Refused::BadMessage`].
    pub(super) fn of_answer(payload: &[u8; ANSWER_PAYLOAD]) -> Result<Self, Refused> {
        Self::parse(payload).ok_or(Refused::BadMessage)
    }

    /// Reads a first message's payload: the time stamp, and the rest, or why it is refused.
    pub(super) fn of_first(payload: &[u8; FIRST_PAYLOAD]) -> (u64, Result<Self, Refused>) {
        let [stamp @ .., a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *payload;
        (u64::from_be_bytes(stamp), Self::of_answer(&[a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]))
    }

    pub(super) fn first_octets(self, stamp: u64) -> [u8; FIRST_PAYLOAD] {
        let mut payload = [0; FIRST_PAYLOAD];
        payload[..8].copy_from_slice(&stamp.to_be_bytes());
        payload[8..].copy_from_slice(&self.octets());
        payload
    }
}

/// The ephemeral public key of a first message or an answer.
pub(super) fn ephemeral(message: &[u8]) -> &[u8] {
    &message[HEADER..HEADER + PUBLIC]
}

/// What a responder says instead of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retry {
    /// The newest time stamp that it has taken; 0: the time stamp was not the reason.
    pub newest: u64,
    /// A cookie; zeros: none is needed.
    pub cookie: [u8; COOKIE],
}

impl Retry {
    /// Makes the datagram for the sender of this first message.
    pub fn build(&self, secrets: &Secrets, first: &[u8; FIRST], rng: &mut impl CryptoRng) -> [u8; RETRY] {
        let mut datagram = [0; RETRY];
        let mut iv = [0; 12];
        rng.fill_bytes(&mut iv);
        let header = Kind::Retry.header();
        datagram[..HEADER].copy_from_slice(&header);
        datagram[8..20].copy_from_slice(&iv);
        datagram[20..28].copy_from_slice(&self.newest.to_be_bytes());
        datagram[28..44].copy_from_slice(&self.cookie);
        let tag = Self::key(secrets, ephemeral(first)).seal(iv, &header, &mut datagram[20..48]);
        datagram[48..64].copy_from_slice(&tag);
        let mac = secrets.mac.mac(&datagram[..64]);
        datagram[64..].copy_from_slice(&mac);
        datagram
    }

    /// Reads one whose MAC was verified, for the first message with this ephemeral key.
    pub(super) fn open(secrets: &Secrets, datagram: &[u8; RETRY], ephemeral: &[u8]) -> Option<Self> {
        let mut datagram = *datagram;
        let (front, sealed) = datagram[..64].split_at_mut(20);
        let iv = front[HEADER..].try_into().ok()?;
        let plain = Self::key(secrets, ephemeral).open(iv, &front[..HEADER], sealed)?;
        let (newest, rest) = plain.split_first_chunk()?;
        Some(Self { newest: u64::from_be_bytes(*newest), cookie: *rest.first_chunk()? })
    }

    fn key(secrets: &Secrets, ephemeral: &[u8]) -> Key {
        Key::new(Suite::ChaCha20Poly1305, &secrets.retry_key(ephemeral))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SENDER: Sender =
        Sender { id: 0x0102_0304_0506_0708, epoch: Epoch::ALL[2], fast_aes: true, carries: Carries::Ethernet };

    #[test]
    fn payloads_are_read_as_they_were_written_and_unknown_bits_are_ignored() {
        let mut first = SENDER.first_octets(77);
        assert_eq!(Sender::of_first(&first), (77, Ok(SENDER)));
        first[17] |= 0xFE;
        first[19..].fill(0xFF);
        assert_eq!(Sender::of_first(&first), (77, Ok(SENDER)));
        let answer = SENDER.octets();
        assert_eq!(Sender::of_answer(&answer), Ok(SENDER));
        for (at, octet) in [(8, 0), (8, 4), (10, 2), (10, 5)] {
            let mut bad = answer;
            bad[at] = octet;
            assert_eq!(Sender::of_answer(&bad), Err(Refused::BadMessage));
        }
    }

    #[test]
    fn each_kind_has_one_length() {
        assert_eq!(Kind::of(1, FIRST), Ok(Kind::First));
        assert_eq!(Kind::of(1, ANSWER), Err(Refused::BadLength));
        assert_eq!(Kind::of(0, FIRST), Err(Refused::BadMessage));
        assert_eq!(Kind::of(4, RETRY), Err(Refused::BadMessage));
        // An original does not log a wrong length, and nothing is amplified.
        assert!([FIRST, ANSWER, RETRY].iter().all(|len| len.is_multiple_of(8) && *len <= FIRST));
    }

    #[test]
    fn a_retry_opens_for_its_first_message_only() {
        let secrets = Secrets::new(&[1; 16]);
        let retry = Retry { newest: 9, cookie: [7; COOKIE] };
        let first = [5; FIRST];
        let datagram = retry.build(&secrets, &first, &mut rand::rng());
        assert_eq!(Retry::open(&secrets, &datagram, ephemeral(&first)), Some(retry));
        assert_eq!(Retry::open(&secrets, &datagram, ephemeral(&[6; FIRST])), None);
        assert_eq!(Retry::open(&Secrets::new(&[2; 16]), &datagram, ephemeral(&first)), None);
    }
}
