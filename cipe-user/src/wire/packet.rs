//! Packet layout (protocol section 2): `IV | CBC(payload | padding | P | CRC)`.

use cipe_common::{Verdict, shield};

use super::crc::crc;
use crate::cipher::{BLOCK, Job, Key, Lanes};

/// Octets of the IV in front of the ciphertext.
pub const IV: usize = 8;
/// Octets of P and the CRC behind the padding.
pub const TRAILER: usize = 5;
/// Smallest datagram of the protocol.
pub const MIN: usize = 16;

/// The key that encrypts a packet, static or dynamic: bit 7 of the first IV octet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyKind {
    /// The pre-shared key.
    Static,
    /// The sender's dynamic key.
    Dynamic,
}

impl KeyKind {
    /// Reads the flag from the first octet of a datagram.
    pub fn of(first_octet: u8) -> Self {
        if first_octet & 0x80 == 0 { Self::Static } else { Self::Dynamic }
    }

    /// Returns `iv` with the flag set to this kind.
    pub fn mark(self, mut iv: [u8; IV]) -> [u8; IV] {
        iv[0] = match self {
            Self::Static => iv[0] & 0x7F,
            Self::Dynamic => iv[0] | 0x80,
        };
        iv
    }
}

/// Whether an IV is reserved: the 31 bits behind the key flag are zero. A datagram that begins with 32 zero bits is a
/// control message in clear.
const fn is_reserved(iv: [u8; IV]) -> bool {
    matches!(iv, [0x00 | 0x80, 0, 0, 0, ..])
}

/// Draws the IV of a packet under a key of this kind, from a source of random octets.
pub fn draw_iv(kind: KeyKind, mut random: impl FnMut() -> [u8; IV]) -> [u8; IV] {
    loop {
        let iv = kind.mark(random());
        if !is_reserved(iv) {
            return iv;
        }
    }
}

/// Packet type, bits 2-1 of P.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// 00: an IP packet.
    Data,
    /// 01: a key-exchange or control message.
    Control,
}

/// Octets of padding behind a payload of `n` octets, 0 to 7.
pub const fn padding(n: usize) -> usize {
    3usize.wrapping_sub(n) % 8
}

/// Octets of the datagram for a payload of `n` octets.
pub const fn sealed_len(n: usize) -> usize {
    IV + n + padding(n) + TRAILER
}

/// Whether a datagram of `len` octets can be a packet of the protocol: whole blocks, and at least [`MIN`] octets.
pub const fn is_packet_len(len: usize) -> bool {
    len >= MIN && len.is_multiple_of(BLOCK)
}

/// Completes a plaintext in place before encryption: writes `iv`, padding, P and CRC around the payload of `n` octets
/// at `buffer[8..8 + n]`, and returns the datagram's length, [`sealed_len`]`(n)`. The octets from 8 on are then ready
/// for CBC encryption under `iv`, which must already be [`KeyKind::mark`]ed.
///
/// # Panics
/// If `buffer` is shorter than [`sealed_len`]`(n)`.
pub fn frame(buffer: &mut [u8], n: usize, kind: Type, iv: [u8; IV], filler: [u8; 7]) -> usize {
    let p = padding(n);
    let end = IV + n + p;
    buffer[..IV].copy_from_slice(&iv);
    buffer[IV + n..end].copy_from_slice(&filler[..p]);
    let kind = match kind {
        Type::Data => 0,
        Type::Control => 1,
    };
    buffer[end] = (p as u8) << 4 | kind << 1;
    let sum = crc(&buffer[IV..=end]);
    buffer[end + 1..end + TRAILER].copy_from_slice(&sum.to_be_bytes());
    end + TRAILER
}

/// Checks a decrypted plaintext (the datagram without its IV) and returns its type and payload length.
///
/// # Errors
/// The verdict that the packet is dropped under: [`Verdict::BadLength`], [`Verdict::BadCrc`],
/// [`Verdict::BadPadding`] or [`Verdict::BadType`].
pub fn unframe(plain: &[u8]) -> Result<(Type, usize), Verdict> {
    if !is_packet_len(IV + plain.len()) {
        return Err(Verdict::BadLength);
    }
    let (body, sum) = plain.split_at(plain.len() - 4);
    if crc(body).to_be_bytes() != sum {
        return Err(Verdict::BadCrc);
    }
    let p = body[body.len() - 1];
    let kind = type_of(p)?;
    let n = (body.len() - 1).checked_sub(padding_of(p)).ok_or(Verdict::BadPadding)?;
    Ok((kind, n))
}

/// Octets of padding according to P.
const fn padding_of(p: u8) -> usize {
    (p >> 4 & 7) as usize
}

/// The type according to P. A correct sender never sets bits 7, 3 and 0 of P.
const fn type_of(p: u8) -> Result<Type, Verdict> {
    match (p & 0b1000_1001, p >> 1 & 3) {
        (0, 0) => Ok(Type::Data),
        (0, 1) => Ok(Type::Control),
        (0, _) => Err(Verdict::BadType),
        _ => Err(Verdict::BadPadding),
    }
}

/// The cipher job of a whole packet: of a [`frame`]d one for [`Lanes::encrypt`], of a received one for
/// [`Lanes::decrypt`]. The IV in front of `packet` is the IV of the job and stays as it is.
///
/// # Errors
/// [`Verdict::BadLength`] unless [`is_packet_len`].
pub fn job<'a>(key: &'a Key, packet: &'a mut [u8]) -> Result<Job<'a>, Verdict> {
    if !is_packet_len(packet.len()) {
        return Err(Verdict::BadLength);
    }
    let (iv, data) = packet.split_first_chunk_mut().ok_or(Verdict::BadLength)?;
    Ok(Job { key, iv: *iv, data })
}

/// Makes one packet in place: [`frame`], then encryption. Returns the datagram's length. A batch does the same with
/// one [`Lanes::encrypt`] over the [`job`]s of all its packets.
///
/// # Panics
/// If `buffer` is shorter than [`sealed_len`]`(n)`.
pub fn seal(
    lanes: &mut Lanes,
    key: &Key,
    buffer: &mut [u8],
    n: usize,
    kind: Type,
    iv: [u8; IV],
    filler: [u8; 7],
) -> usize {
    let len = frame(buffer, n, kind, iv, filler);
    let job = job(key, &mut buffer[..len]).expect("a framed packet is whole blocks");
    lanes.encrypt(&mut [job]);
    len
}

/// Opens one packet in place: decryption, then [`unframe`]. Returns its type and payload. The caller must choose the
/// key that [`KeyKind::of`] asks for.
///
/// # Errors
/// The verdict that the packet is dropped under; its contents are then lost.
pub fn open<'a>(lanes: &mut Lanes, key: &Key, packet: &'a mut [u8]) -> Result<(Type, &'a [u8]), Verdict> {
    lanes.decrypt(&mut [job(key, packet)?]);
    let (kind, n) = unframe(&packet[IV..])?;
    Ok((kind, &packet[IV..IV + n]))
}

/// The first and the last block of a sealed packet, copied from it. They are decrypted apart from the rest and tell a packet that
/// the key cannot open, at the cost of two blocks.
#[derive(Clone, Copy, Debug)]
pub struct Ends {
    /// What is XORed onto each block: the IV or the block before it.
    chain: [[u8; BLOCK]; 2],
    blocks: [[u8; BLOCK]; 2],
    /// Octets of the packet.
    len: usize,
}

impl Ends {
    /// Copies the ends of `packet`; `None` unless [`is_packet_len`].
    pub fn of(packet: &[u8]) -> Option<Self> {
        let ([iv, first, ..], [.., before, last]) = (packet.as_chunks().0, packet.as_chunks().0) else { return None };
        is_packet_len(packet.len()).then_some(Self {
            chain: [*iv, *before],
            blocks: [*first, *last],
            len: packet.len(),
        })
    }

    /// The jobs that decrypt the two blocks under `key`.
    pub fn jobs<'a>(&'a mut self, key: &'a Key) -> [Job<'a>; 2] {
        let [first, last] = &mut self.blocks;
        [Job { key, iv: self.chain[0], data: first }, Job { key, iv: self.chain[1], data: last }]
    }

    /// Whether a packet with these ends, decrypted, may be accepted ([`shield::is_possible`]).
    pub fn are_possible(&self, carries_ip: bool) -> bool {
        let [first, last] = self.blocks;
        shield::is_possible(first, last, self.len, carries_ip)
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn reserved_ivs_are_drawn_again() {
        for (kind, first) in [(KeyKind::Static, 0x7F), (KeyKind::Dynamic, 0xFF)] {
            let draws = [[0; IV], [0x80, 0, 0, 0, 1, 2, 3, 4], [0, 0, 0, 0, 9, 9, 9, 9], [0xFF, 0, 0, 0, 5, 6, 7, 8]];
            let mut draws = draws.into_iter();
            let iv = draw_iv(kind, || draws.next().expect("the fourth is good"));
            assert_eq!(iv, [first, 0, 0, 0, 5, 6, 7, 8]);
        }
        for good in [[0, 0, 0, 1, 0, 0, 0, 0], [0x80, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]] {
            let mut draws = std::iter::once(good);
            draw_iv(KeyKind::of(good[0]), || draws.next().expect("one draw is enough"));
        }
    }

    use proptest::prelude::*;

    use super::*;
    use crate::cipher::Algorithm;

    fn key(algorithm: Algorithm) -> Key {
        Key::new(algorithm, b"0123456789abcdef")
    }

    fn sealed(key: &Key, payload: &[u8], kind: Type) -> Vec<u8> {
        let mut packet = vec![0; sealed_len(payload.len())];
        packet[IV..IV + payload.len()].copy_from_slice(payload);
        seal(&mut Lanes::new(), key, &mut packet, payload.len(), kind, *b"\x12nitvect", [7; 7]);
        packet
    }

    #[test]
    fn the_crc_has_the_protocols_check_value() {
        assert_eq!(crc(b"123456789"), 0x2DFD_2D88);
        assert_eq!(crc(b""), 0);
    }

    #[test]
    fn the_flag_says_which_key() {
        assert_eq!(KeyKind::of(KeyKind::Static.mark([0xFF; 8])[0]), KeyKind::Static);
        assert_eq!(KeyKind::of(KeyKind::Dynamic.mark([0; 8])[0]), KeyKind::Dynamic);
        assert_eq!(KeyKind::Static.mark([0xFF; 8])[1..], [0xFF; 7]);
    }

    #[test]
    fn every_length_comes_back() {
        for algorithm in [Algorithm::Blowfish, Algorithm::Idea, Algorithm::IdeaLittle] {
            let key = key(algorithm);
            for n in 0..200 {
                let payload: Vec<u8> = (0..n).map(|i| i as u8).collect();
                for kind in [Type::Data, Type::Control] {
                    let mut packet = sealed(&key, &payload, kind);
                    assert!(is_packet_len(packet.len()) && packet.len() == sealed_len(n));
                    assert_eq!(open(&mut Lanes::new(), &key, &mut packet), Ok((kind, &*payload)));
                }
            }
        }
    }

    #[test]
    fn each_fault_has_its_verdict() {
        let framed = |p: u8| {
            let mut plain = [0, 0, 0, p, 0, 0, 0, 0];
            let sum = crc(&plain[..4]);
            plain[4..].copy_from_slice(&sum.to_be_bytes());
            plain
        };
        assert_eq!(unframe(&framed(0x30)), Ok((Type::Data, 0)));
        assert_eq!(unframe(&framed(0x32)), Ok((Type::Control, 0)));
        for reserved in [0x80, 0x08, 0x01] {
            assert_eq!(unframe(&framed(0x30 | reserved)), Err(Verdict::BadPadding));
        }
        assert_eq!(unframe(&framed(0x40)), Err(Verdict::BadPadding));
        assert_eq!(unframe(&framed(0x34)), Err(Verdict::BadType));
        assert_eq!(unframe(&framed(0x36)), Err(Verdict::BadType));
        assert_eq!(unframe(&[0; 7]), Err(Verdict::BadLength));
        assert_eq!(unframe(&[]), Err(Verdict::BadLength));
        let mut wrong = framed(0x30);
        wrong[0] ^= 1;
        assert_eq!(unframe(&wrong), Err(Verdict::BadCrc));
    }

    /// Whether the ends of a packet are possible under a key.
    fn is_possible(key: &Key, packet: &[u8], carries_ip: bool) -> bool {
        let Some(mut ends) = Ends::of(packet) else { return false };
        Lanes::with(Some("scalar"), Some("scalar")).decrypt(&mut ends.jobs(key));
        assert!(!ends.are_possible(carries_ip) || shield::may_begin(ends.blocks[0], packet.len(), carries_ip));
        ends.are_possible(carries_ip)
    }

    #[test]
    fn the_first_and_last_block_tell_the_key() {
        let (right, wrong) = (key(Algorithm::Blowfish), Key::new(Algorithm::Blowfish, &[1; 16]));
        let mut ip = vec![0; 84];
        ip[..4].copy_from_slice(&[0x45, 0, 0, 84]);
        let mut ip6 = vec![0; 41];
        ip6[0] = 0x60;
        ip6[5] = 1;
        for (payload, kind) in [(ip, Type::Data), (ip6, Type::Data), (vec![2; 60], Type::Control)] {
            let packet = sealed(&right, &payload, kind);
            assert!(is_possible(&right, &packet, true));
            assert!(!is_possible(&wrong, &packet, true));
            assert!(!is_possible(&right, &packet[..packet.len() - 1], true));
            assert!(is_possible(&right, &packet, false));
        }
        assert!(!is_possible(&right, &[], true));
    }

    #[test]
    fn of_ethernet_frames_every_content_is_possible() {
        let key = key(Algorithm::Idea);
        for n in 0..100 {
            let packet = sealed(&key, &vec![0xA5; n], Type::Data);
            assert_eq!(is_possible(&key, &packet, false), n >= 14, "{n}");
            assert!(!is_possible(&key, &packet, true), "{n}");
        }
    }

    #[test]
    fn every_message_is_possible_at_every_length() {
        let key = key(Algorithm::Blowfish);
        for number in (0..=255).filter(|number| super::super::message::is_known(*number)) {
            for n in 1..80 {
                let packet = sealed(&key, &[&[number][..], &vec![0; n - 1]].concat(), Type::Control);
                assert!(is_possible(&key, &packet, true) && is_possible(&key, &packet, false), "{number}, {n}");
            }
        }
    }

    #[test]
    fn few_random_packets_are_possible() {
        use rand::{RngExt as _, SeedableRng as _};
        let key = key(Algorithm::Idea);
        let mut rng = rand::rngs::StdRng::seed_from_u64(14);
        let mut lanes = Lanes::new();
        let mut possible = |carries_ip| {
            (0..100_000)
                .filter(|_| {
                    let packet: [u8; 72] = std::array::from_fn(|_| rng.random());
                    let mut ends = Ends::of(&packet).unwrap();
                    lanes.decrypt(&mut ends.jobs(&key));
                    ends.are_possible(carries_ip)
                })
                .count()
        };
        // 98 and 3,223 are expected.
        assert!((1..200).contains(&possible(true)));
        assert!((2_500..4_000).contains(&possible(false)));
    }

    proptest! {
        #[test]
        fn a_changed_packet_is_refused(payload in proptest::collection::vec(any::<u8>(), 0..300),
                                       at in any::<prop::sample::Index>(), flip in 1u8..) {
            let key = key(Algorithm::Blowfish);
            let mut packet = sealed(&key, &payload, Type::Data);
            let at = at.index(packet.len());
            packet[at] ^= flip;
            // The CRC finds every burst of up to 32 bits, such as a change of the IV. A changed ciphertext octet
            // scrambles its whole block, so that the CRC matches with a probability of 2^-32.
            prop_assert!(open(&mut Lanes::new(), &key, &mut packet).is_err());
        }

        #[test]
        fn any_octets_get_a_verdict(mut octets in proptest::collection::vec(any::<u8>(), 0..200)) {
            let key = key(Algorithm::Idea);
            is_possible(&key, &octets, true);
            let _ = unframe(&octets);
            prop_assert!(open(&mut Lanes::new(), &key, &mut octets).is_err());
        }
    }
}
