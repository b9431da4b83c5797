//! `cipe decode`: shows the contents of a carrier datagram.

use std::fmt::{self, Display, Write as _};
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use cipe_common::Verdict;
use zeroize::Zeroizing;

use crate::cipher::{Algorithm, KEY, Key, Lanes};
use crate::inner::headers::{Headers, IpVersion};
use crate::inner::ip;
use crate::wire::crc::crc;
use crate::wire::message::Message;
use crate::wire::packet::{self, IV, KeyKind, TRAILER, Type};

/// Shows a carrier datagram: its fields, its octets, and beside them the decrypted octets.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// File whose first word is the packet's key, 32 hexadecimal digits.
    #[arg(long, value_name = "FILE", required_unless_present = "nokey", conflicts_with = "nokey")]
    key: Option<PathBuf>,
    /// The datagram is a bare IP packet.
    #[arg(long)]
    nokey: bool,
    /// Cipher, with the word order of IDEA on the wire.
    #[arg(long, value_enum, default_value = "blowfish")]
    cipher: Cipher,
    /// UDP payload in hexadecimal; spaces, line ends and colons are ignored. Read from standard input if omitted.
    datagram: Vec<String>,
}

#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Cipher {
    Blowfish,
    Idea,
    IdeaLittle,
}

/// Prints the datagram; exits with 1 if a receiver would drop it.
///
/// # Errors
/// The key file cannot be read or holds no key; the datagram is not hexadecimal.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let algorithm = match args.cipher {
        Cipher::Blowfish => Algorithm::Blowfish,
        Cipher::Idea => Algorithm::Idea,
        Cipher::IdeaLittle => Algorithm::IdeaLittle,
    };
    let key = args.key.as_deref().map(read_key).transpose()?.map(|octets| Key::new(algorithm, &octets));
    let mut text = args.datagram.concat();
    if args.datagram.is_empty() {
        std::io::stdin().read_to_string(&mut text).context("standard input: cannot be read")?;
    }
    let datagram = parse_hex(&text)?;
    let decoded = decode(key.as_ref(), &datagram);
    print!("{decoded}");
    Ok(if decoded.verdict().is_drop() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn read_key(path: &Path) -> anyhow::Result<Zeroizing<[u8; KEY]>> {
    let file = path.display();
    let text = Zeroizing::new(std::fs::read_to_string(path).with_context(|| format!("{file}: cannot be read"))?);
    let mut octets = Zeroizing::new([0; KEY]);
    let word = text.split_ascii_whitespace().next().unwrap_or_default();
    if hex::decode_to_slice(word, &mut *octets).is_err() {
        bail!("{file}: does not begin with a key; a key is 32 hexadecimal digits");
    }
    Ok(octets)
}

fn parse_hex(text: &str) -> anyhow::Result<Vec<u8>> {
    let digits: String = text.chars().filter(|c| !c.is_ascii_whitespace() && *c != ':').collect();
    hex::decode(digits).context("the datagram is not hexadecimal octets")
}

/// A decoded datagram. Its `Display` is for a terminal of 80 columns and omits the octets of new keys.
pub struct Decoded {
    wire: Vec<u8>,
    /// As long as `wire`, with the IV in front; `None` if nothing can be decrypted (`nokey`, or no whole blocks).
    plain: Option<Zeroizing<Vec<u8>>>,
    result: Result<(Type, usize), Verdict>,
}

/// Decodes a datagram with its key; `None` stands for `nokey`.
pub fn decode(key: Option<&Key>, datagram: &[u8]) -> Decoded {
    let wire = datagram.to_vec();
    let Some(key) = key else {
        return Decoded { result: Ok((Type::Data, wire.len())), wire, plain: None };
    };
    let mut plain = Zeroizing::new(wire.clone());
    match packet::job(key, &mut plain) {
        Ok(job) => Lanes::new().decrypt(&mut [job]),
        Err(verdict) => return Decoded { wire, plain: None, result: Err(verdict) },
    }
    let result = packet::unframe(&plain[IV..]);
    Decoded { wire, plain: Some(plain), result }
}

impl Decoded {
    /// The verdict of a receiver, without the checks for replays and addresses.
    pub fn verdict(&self) -> Verdict {
        match (self.result, self.payload()) {
            (Err(verdict), _) => verdict,
            (Ok((Type::Data, _)), payload) => ip::check(payload).err().unwrap_or(Verdict::Delivered),
            (Ok((Type::Control, _)), payload) => Message::parse(payload).err().unwrap_or(Verdict::ControlReceived),
        }
    }

    fn payload(&self) -> &[u8] {
        match (self.result, &self.plain) {
            (Ok((_, n)), Some(plain)) => &plain[IV..IV + n],
            (Ok(_), None) => &self.wire,
            (Err(_), _) => &[],
        }
    }

    /// Whether octet `at` of the plaintext belongs to a new key.
    fn is_secret(&self, at: usize) -> bool {
        matches!(self.result, Ok((Type::Control, _)))
            && matches!(Message::parse(self.payload()), Ok(Message::Indication { .. }))
            && (IV + 1..IV + 1 + KEY).contains(&at)
    }
}

impl Display for Decoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.plain {
            Some(plain) => {
                writeln!(f, "{:<6}  {:<23}  {:<23}  text", "offset", "carrier", "decrypted")?;
                for (row, wire) in self.wire.chunks(8).enumerate() {
                    let range = row * 8..row * 8 + wire.len();
                    let (mut octets, mut text) = (String::from("(IV)"), String::new());
                    if row > 0 {
                        let shown = range.clone().map(|at| (!self.is_secret(at)).then_some(plain[at]));
                        (octets, text) = columns(shown);
                    }
                    let line = format!(
                        "{:06x}  {:<23}  {octets:<23}  {text}",
                        range.start,
                        columns(wire.iter().copied().map(Some)).0
                    );
                    writeln!(f, "{}", line.trim_end())?;
                }
            }
            None => {
                writeln!(f, "{:<6}  {:<23}  text", "offset", "carrier")?;
                for (row, wire) in self.wire.chunks(8).enumerate() {
                    let (octets, text) = columns(wire.iter().copied().map(Some));
                    writeln!(f, "{:06x}  {octets:<23}  {text}", row * 8)?;
                }
            }
        }
        writeln!(f)?;
        if let Some(plain) = &self.plain {
            write_fields(plain, f)?;
        }
        match self.result {
            Ok((Type::Data, n)) => match ip::check(self.payload()) {
                Ok(headers) => writeln!(f, "payload  {n} octets: {}", summary(&headers, self.payload()))?,
                Err(_) => writeln!(f, "payload  {n} octets, not exactly one IP packet")?,
            },
            Ok((Type::Control, n)) => match Message::parse(self.payload()) {
                Ok(message) => writeln!(f, "payload  {n} octets: {}", message_summary(&message))?,
                Err(_) => writeln!(f, "payload  {n} octets, no known message")?,
            },
            Err(Verdict::BadLength) => {
                writeln!(f, "length   {} octets; a packet has at least 16, in whole blocks of 8", self.wire.len())?;
            }
            Err(_) => {}
        }
        writeln!(f, "verdict  {}", self.verdict().name())
    }
}

/// Writes IV, padding, P and CRC, and whether they are right.
fn write_fields(plain: &[u8], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let (flag, whose) = match KeyKind::of(plain[0]) {
        KeyKind::Static => (0, "the static key"),
        KeyKind::Dynamic => (1, "the sender's dynamic key"),
    };
    writeln!(f, "IV       {}, key flag {flag}: {whose}", hex::encode(&plain[..IV]))?;
    let (body, sum) = plain.split_at(plain.len() - 4);
    let p = plain[plain.len() - TRAILER];
    let kind = ["data", "control", "10, never sent", "11, reserved"][usize::from(p >> 1 & 3)];
    let reserved = if p & 0b1000_1001 == 0 { "" } else { ", RESERVED BITS SET" };
    writeln!(f, "P        {p:08b}: {} octets of padding, type {kind}{reserved}", p >> 4 & 7)?;
    let right = crc(&body[IV..]).to_be_bytes();
    match right == sum {
        true => writeln!(f, "CRC      {} ok", hex::encode(sum)),
        false => {
            writeln!(f, "CRC      {} BAD, not {}: damaged, or under another key", hex::encode(sum), hex::encode(right))
        }
    }
}

/// Octets as hexadecimal and as text; `None` is hidden.
fn columns(octets: impl Iterator<Item = Option<u8>>) -> (String, String) {
    let (mut digits, mut text) = (String::new(), String::new());
    for octet in octets {
        let space = if digits.is_empty() { "" } else { " " };
        let _ = match octet {
            Some(octet) => write!(digits, "{space}{octet:02x}"),
            None => write!(digits, "{space}**"),
        };
        text.push(
            octet.map_or('*', |octet| if octet.is_ascii_graphic() || octet == b' ' { octet.into() } else { '.' }),
        );
    }
    (digits, text)
}

fn message_summary(message: &Message<'_>) -> String {
    let name = message.name();
    match message {
        Message::Indication { sum, .. } => format!("{name}, a key with check sum {}", hex::encode(sum)),
        Message::Acknowledgement { sum } => format!("{name} of the key with check sum {}", hex::encode(sum)),
        Message::Debug(text) => format!("{name} {:?}", String::from_utf8_lossy(text)),
        _ => name.into(),
    }
}

/// Addresses, protocol, ports and the fields that the outer header copies.
fn summary(headers: &Headers, payload: &[u8]) -> String {
    let rest = payload.get(headers.transport()..).unwrap_or_default();
    let addresses =
        headers.addresses(payload).map(|(source, destination)| (source.to_string(), destination.to_string()));
    let (mut source, mut destination) = addresses.unwrap_or_default();
    let mut ports = |name| match *rest {
        [a, b, c, d, ..] => {
            let _ = write!(source, " port {}", u16::from_be_bytes([a, b]));
            let _ = write!(destination, " port {}", u16::from_be_bytes([c, d]));
            String::from(name)
        }
        _ => format!("short {name}"),
    };
    let protocol = match (headers.protocol, rest.first()) {
        (6, _) => ports("TCP"),
        (17, _) => ports("UDP"),
        (1, Some(8)) | (58, Some(128)) => "ICMP echo request".into(),
        (1, Some(0)) | (58, Some(129)) => "ICMP echo reply".into(),
        (1 | 58, Some(kind)) => format!("ICMP type {kind}"),
        (number, _) => format!("protocol {number}"),
    };
    let (version, fragment) = match headers.version {
        IpVersion::V4 => (4, if headers.dont_fragment { ", DF" } else { "" }),
        IpVersion::V6 => (6, ""),
    };
    format!(
        "IPv{version} {source} to {destination}\n         {protocol}, TTL {}, TOS {:#04x}{fragment}",
        headers.ttl, headers.tos
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::message::DynamicKey;

    const ECHO: [u8; 32] = *b"\x45\x00\x00\x20\x00\x01\x40\x00\x3f\x01\x27\xda\x0a\x00\x00\x01\x0a\x00\x00\x02\
        \x08\x00\x9c\x63\x00\x07\x00\x01Zzz!";

    fn key() -> Key {
        Key::new(Algorithm::Blowfish, b"0123456789abcdef")
    }

    fn sealed(payload: &[u8], kind: Type) -> Vec<u8> {
        let mut packet = vec![0; packet::sealed_len(payload.len())];
        packet[IV..IV + payload.len()].copy_from_slice(payload);
        let iv = KeyKind::Dynamic.mark([1, 2, 3, 4, 5, 6, 7, 8]);
        packet::seal(&mut Lanes::new(), &key(), &mut packet, payload.len(), kind, iv, [0xAA; 7]);
        packet
    }

    #[test]
    fn a_data_packet_is_shown_beside_its_plaintext() {
        let packet = sealed(&ECHO, Type::Data);
        let shown = decode(Some(&key()), &packet).to_string();
        let row = |n: usize| columns(packet[8 * n..][..8].iter().copied().map(Some)).0;
        let expected = format!(
            "\
offset  carrier                  decrypted                text
000000  81 02 03 04 05 06 07 08  (IV)
000008  {}  45 00 00 20 00 01 40 00  E.. ..@.
000010  {}  3f 01 27 da 0a 00 00 01  ?.'.....
000018  {}  0a 00 00 02 08 00 9c 63  .......c
000020  {}  00 07 00 01 5a 7a 7a 21  ....Zzz!
000028  {}  aa aa aa 30 ",
            row(1),
            row(2),
            row(3),
            row(4),
            row(5)
        );
        assert!(shown.starts_with(&expected), "{shown}");
        let fields = "
IV       8102030405060708, key flag 1: the sender's dynamic key
P        00110000: 3 octets of padding, type data
";
        assert!(shown.contains(fields), "{shown}");
        let end = " ok
payload  32 octets: IPv4 10.0.0.1 to 10.0.0.2
         ICMP echo request, TTL 63, TOS 0x00, DF
verdict  delivered
";
        assert!(shown.ends_with(end), "{shown}");
        assert!(shown.lines().all(|line| line.len() <= 80));
    }

    #[test]
    fn a_wrong_key_shows_as_a_bad_crc() {
        let decoded = decode(Some(&Key::new(Algorithm::Blowfish, &[0; 16])), &sealed(&ECHO, Type::Data));
        assert_eq!(decoded.verdict(), Verdict::BadCrc);
        let shown = decoded.to_string();
        assert!(shown.contains(" BAD, not ") && shown.ends_with("verdict  bad-crc\n"), "{shown}");
    }

    #[test]
    fn a_new_key_is_not_shown() {
        let indication = Message::indication(&DynamicKey([0xC5; 16])).build(0, &mut rand::rng());
        let decoded = decode(Some(&key()), &sealed(&indication, Type::Control));
        assert_eq!(decoded.verdict(), Verdict::ControlReceived);
        let shown = decoded.to_string();
        assert!(shown.contains("02 ** ** ** ** ** ** **  .*******"), "{shown}");
        let hidden: usize =
            shown.lines().filter_map(|line| line.get(33..56)).map(|line| line.matches("**").count()).sum();
        assert_eq!(hidden, 16);
        assert!(shown.contains("NK_IND, a key with check sum "), "{shown}");
    }

    #[test]
    fn nokey_and_odd_lengths_are_shown_as_they_are() {
        let shown = decode(None, &ECHO).to_string();
        assert!(
            shown.starts_with("offset  carrier                  text\n000000  45 00 00 20 00 01 40 00  E.. ..@.\n")
        );
        assert!(shown.ends_with("DF\nverdict  delivered\n"));
        assert_eq!(decode(None, &ECHO[..31]).verdict(), Verdict::BadInner);
        let shown = decode(Some(&key()), &[7; 17]).to_string();
        assert!(
            shown
                .ends_with("length   17 octets; a packet has at least 16, in whole blocks of 8\nverdict  bad-length\n")
        );
        assert_eq!(decode(Some(&key()), &[]).verdict(), Verdict::BadLength);
    }

    #[test]
    fn hexadecimal_is_read_as_tools_print_it() {
        assert_eq!(parse_hex("de:ad BE\n EF\n").unwrap(), [0xDE, 0xAD, 0xBE, 0xEF]);
        assert!(parse_hex("0x12").is_err() && parse_hex("123").is_err());
    }

    #[test]
    fn the_key_is_the_first_word_of_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("key");
        std::fs::write(&file, "000102030405060708090a0B0c0D0e0f  -\n").unwrap();
        assert_eq!(read_key(&file).unwrap()[..3], [0, 1, 2]);
        for text in ["", "0001\n", "000102030405060708090a0b0c0d0e0f00", "key 00"] {
            std::fs::write(&file, text).unwrap();
            let message = format!("{:#}", read_key(&file).unwrap_err());
            assert!(message.ends_with("key: does not begin with a key; a key is 32 hexadecimal digits"), "{message}");
        }
        assert!(read_key(&directory.path().join("none")).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_octets_can_be_shown(octets in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..120)) {
            let _ = decode(Some(&key()), &octets).to_string();
            let _ = decode(None, &octets).to_string();
            let _ = decode(Some(&key()), &sealed(&octets, Type::Data)).to_string();
            let _ = decode(Some(&key()), &sealed(&octets, Type::Control)).to_string();
        }
    }
}
