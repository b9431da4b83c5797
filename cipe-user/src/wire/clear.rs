//! Control messages in clear, of versions 1.5 and later (protocol section 3): 8 zero octets in place of a packet's IV,
//! then the message from its type octet on.
//!
//! Anybody can forge one. They report a peer with another configuration; nothing else in them is trusted.

use rand::{CryptoRng, RngExt};

use super::message::{Message, STAMPED_DATA, number};
use super::packet::IV;

/// Offset from the type octet of the letters that begin a configuration.
const LETTERS_OFFSET: usize = 4;
const LETTERS: &[u8; 4] = b"CIPE";
/// Offsets of the time stamps from the first zero octet.
const STAMP_OFFSETS: [usize; 2] = [48, 56];
/// Octets of our message without its random tail.
const BASE_OCTETS: usize = 60;

/// Whether a datagram is a control message in clear. No packet begins with these octets: such IVs are reserved.
pub fn is_clear(datagram: &[u8]) -> bool {
    datagram.len() > IV && datagram[..4] == [0; 4]
}

/// The configuration of one end of a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// Version of the protocol: 3, or 4 for Ethernet frames.
    pub protocol: u8,
    /// `b` for Blowfish, `i` for IDEA.
    pub cipher: u8,
    /// Major and minor number of the release.
    pub release: [u8; 2],
    /// Whether the digits a to f of a key are read as such; releases before 1.4 read them as 1 to 6.
    pub reads_letters: bool,
}

impl Configuration {
    /// Reads a configuration from the octets behind the type octet. The letters may come a little later than specified,
    /// and numbers may be digits: no source settles that.
    fn parse(data: &[u8]) -> Option<Self> {
        let at = data.windows(LETTERS.len()).position(|window| window == LETTERS)?;
        let behind = &data[at + LETTERS.len()..];
        // Five octets are reserved for four letters.
        let behind = behind.strip_prefix(&[0]).unwrap_or(behind);
        let [protocol, cipher, major, minor, parser] = *behind.first_chunk()?;
        let plain = |number: u8| if number.is_ascii_digit() { number - b'0' } else { number };
        Some(Self {
            protocol: plain(protocol),
            cipher: cipher.to_ascii_lowercase(),
            release: [plain(major), plain(minor)],
            reads_letters: plain(parser) != 0,
        })
    }

    /// The settings of `other`, the peer's configuration, that do not fit this one.
    pub fn mismatches(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        if self.protocol != other.protocol {
            found.push(format!("protocol {} there, {} here", other.protocol, self.protocol));
        }
        if self.cipher != other.cipher {
            found.push(format!("cipher {} there, {} here", name(other.cipher), name(self.cipher)));
        }
        if self.reads_letters != other.reads_letters {
            let way = |letters| if letters { "as such" } else { "as 1 to 6 (option `keybug`)" };
            let (there, here) = (way(other.reads_letters), way(self.reads_letters));
            found.push(format!("digits a to f of the key are read {there} there, {here} here"));
        }
        found
    }

    /// Builds the whole datagram of a CT_CONF, stamped with `unix_time` (seconds), with random filler like any message.
    pub fn answer(&self, unix_time: u32, rng: &mut impl CryptoRng) -> Vec<u8> {
        let mut datagram = vec![0; BASE_OCTETS + rng.random_range(0..=usize::from(u8::MAX))];
        rng.fill_bytes(&mut datagram[IV..]);
        datagram[IV] = number::CT_CONF;
        let [major, minor] = self.release;
        let body = [self.protocol, self.cipher, major, minor, self.reads_letters.into()];
        let at = IV + LETTERS_OFFSET;
        datagram[at..at + LETTERS.len()].copy_from_slice(LETTERS);
        datagram[at + LETTERS.len()..at + LETTERS.len() + body.len()].copy_from_slice(&body);
        for at in STAMP_OFFSETS {
            datagram[at..at + 4].copy_from_slice(&unix_time.to_be_bytes());
        }
        datagram
    }
}

/// Builds the whole datagram of a message in clear, stamped with `unix_time` (seconds).
pub fn datagram(message: &Message<'_>, unix_time: u32, rng: &mut impl CryptoRng) -> Vec<u8> {
    [&[0; IV][..], &message.build(unix_time, rng)].concat()
}

fn name(cipher: u8) -> String {
    match cipher {
        b'b' => "Blowfish".to_owned(),
        b'i' => "IDEA".to_owned(),
        other => other.escape_ascii().to_string(),
    }
}

/// A message in clear. Borrowed data points into the datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Clear<'a> {
    /// CT_CONFREQ: the sender's configuration and a request for ours. `None`: it cannot be read.
    Request(Option<Configuration>),
    /// CT_CONF: the sender's configuration.
    Answer(Option<Configuration>),
    /// CT_PING: under `nokey`, a question whether the receiver is at its address.
    Ping(&'a [u8]),
    /// CT_PONG: the answer, with the same octets.
    Pong(&'a [u8]),
    /// A message that must be encrypted, by name; in clear, anybody may have sent it.
    Forbidden(&'static str),
    /// A message of another type, or of none.
    Other,
}

impl<'a> Clear<'a> {
    /// Reads a datagram that [`is_clear`].
    pub fn parse(datagram: &'a [u8]) -> Self {
        let message = datagram.get(IV..).unwrap_or_default();
        match message.split_first() {
            Some((&number::CT_CONFREQ, data)) => Self::Request(Configuration::parse(data)),
            Some((&number::CT_CONF, data)) => Self::Answer(Configuration::parse(data)),
            Some((&number::CT_PING, data)) => Self::Ping(&data[..data.len().min(STAMPED_DATA)]),
            Some((&number::CT_PONG, data)) => Self::Pong(&data[..data.len().min(STAMPED_DATA)]),
            Some((&kind @ (number::NK_REQ..=number::NK_ACK | number::CT_KILL), _)) => {
                Self::Forbidden(Message::name_of(kind))
            }
            _ => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;

    const OURS: Configuration = Configuration { protocol: 3, cipher: b'b', release: [1, 6], reads_letters: true };

    fn request(body: &[u8]) -> Clear<'static> {
        match Clear::parse(&[&[0; IV][..], &[number::CT_CONFREQ, 9, 9, 9], body].concat()) {
            Clear::Request(configuration) => Clear::Request(configuration),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn only_what_begins_with_32_zero_bits_is_clear() {
        let mut datagram = [0; 24];
        assert!(is_clear(&datagram) && is_clear(&datagram[..9]));
        assert!(!is_clear(&datagram[..8]) && !is_clear(&[]));
        datagram[4..].fill(0xFF);
        assert!(is_clear(&datagram));
        for (at, octet) in [(0, 0x80), (0, 1), (3, 1)] {
            let mut packet = datagram;
            packet[at] = octet;
            assert!(!is_clear(&packet));
        }
    }

    #[test]
    fn a_configuration_is_read_in_every_form_that_the_sources_leave_open() {
        for body in
            [&b"CIPE\x03b\x01\x06\x01"[..], b"CIPE3b161", b"CIPE\x003b161 and more", b"xyCIPE\x00\x03B\x01\x06\x01"]
        {
            assert_eq!(request(body), Clear::Request(Some(OURS)), "{body:?}");
        }
        for body in [&b""[..], b"CIP", b"CIPE3b16", b"cipe3b161", b"CIPE"] {
            assert_eq!(request(body), Clear::Request(None), "{body:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        assert!(OURS.mismatches(&Configuration { release: [1, 5], ..OURS }).is_empty());
        let other = Configuration { protocol: 4, cipher: b'i', release: [1, 3], reads_letters: false };
        let found = OURS.mismatches(&other);
        assert_eq!(
            found,
            [
                "protocol 4 there, 3 here",
                "cipher IDEA there, Blowfish here",
                "digits a to f of the key are read as 1 to 6 (option `keybug`) there, as such here"
            ]
        );
    }

    #[test]
    fn an_answer_is_a_message_in_clear_and_reads_back() {
        let mut rng = StdRng::seed_from_u64(1);
        for _ in 0..1000 {
            let datagram = OURS.answer(0x6543_2100, &mut rng);
            assert!(is_clear(&datagram) && datagram[..IV] == [0; IV]);
            assert_eq!(Clear::parse(&datagram), Clear::Answer(Some(OURS)));
            assert_eq!(
                (&datagram[48..52], &datagram[56..60]),
                (&[0x65, 0x43, 0x21, 0][..], &[0x65, 0x43, 0x21, 0][..])
            );
        }
    }

    #[test]
    fn a_ping_in_clear_and_its_answer_read_back() {
        let mut rng = StdRng::seed_from_u64(1);
        for data in [&b"0123456789abcdef"[..], b"", &[7; STAMPED_DATA]] {
            let ping = datagram(&Message::Ping(data), 0x6543_2100, &mut rng);
            let pong = datagram(&Message::Pong(data), 0x6543_2100, &mut rng);
            assert!(is_clear(&ping) && is_clear(&pong));
            assert!(matches!(Clear::parse(&ping), Clear::Ping(read) if read.starts_with(data)));
            assert!(matches!(Clear::parse(&pong), Clear::Pong(read) if read.starts_with(data)));
        }
        for kind in [number::CT_PING, number::CT_PONG] {
            assert!(matches!(Clear::parse(&[0, 0, 0, 0, 0, 0, 0, 0, kind]), Clear::Ping(&[]) | Clear::Pong(&[])));
        }
    }

    #[test]
    fn messages_that_have_to_be_encrypted_are_named() {
        let datagram = |number| [&[0; IV][..], &[number; 60]].concat();
        for (number, name) in [(1, "NK_REQ"), (2, "NK_IND"), (3, "NK_ACK"), (0x74, "CT_KILL")] {
            assert_eq!(Clear::parse(&datagram(number)), Clear::Forbidden(name));
        }
        for number in [0, 4, 0x70, 0x71, 0x77] {
            assert_eq!(Clear::parse(&datagram(number)), Clear::Other);
        }
    }

    proptest! {
        #[test]
        fn any_octets_are_read(datagram: Vec<u8>) {
            Clear::parse(&datagram);
        }
    }
}
