//! Packet layout (protocol section 2): `IV | CBC(payload | padding | P | CRC)`.

use cipe_common::Verdict;

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

/// Whether `packet` is probably sealed under `key`. Checks only its first and last block, without changing them: P must
/// be possible, and the payload must begin as an IP packet of that length or as a message. Tells a late packet under
/// the previous receive key from a packet under the current key before either is decrypted in place: the right key is
/// never rejected, a wrong key is accepted with a probability near 2^-10. `false` as well if there is no packet at all.
pub fn looks_like(lanes: &mut Lanes, key: &Key, packet: &[u8]) -> bool {
    if !is_packet_len(packet.len()) {
        return false;
    }
    let (Some(first), Some(last)) = (packet.first_chunk(), packet.last_chunk()) else { return false };
    let (mut first, mut last): ([u8; 2 * BLOCK], [u8; 2 * BLOCK]) = (*first, *last);
    let (Ok(head), Ok(tail)) = (job(key, &mut first), job(key, &mut last)) else { return false };
    lanes.decrypt(&mut [head, tail]);
    let p = last[2 * BLOCK - TRAILER];
    let Some(n) = (packet.len() - IV - TRAILER).checked_sub(padding_of(p)) else { return false };
    let first = &first[IV..];
    match type_of(p) {
        Ok(Type::Data) => match first[0] >> 4 {
            4 => usize::from(u16::from_be_bytes([first[2], first[3]])) == n,
            6 => usize::from(u16::from_be_bytes([first[4], first[5]])) + 40 == n,
            _ => false,
        },
        Ok(Type::Control) => n > 0 && super::message::is_known(first[0]),
        Err(_) => false,
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

    #[test]
    fn the_first_and_last_block_tell_the_key() {
        let (right, wrong) = (key(Algorithm::Blowfish), Key::new(Algorithm::Blowfish, &[1; 16]));
        let mut lanes = Lanes::new();
        let mut ip = vec![0; 84];
        ip[..4].copy_from_slice(&[0x45, 0, 0, 84]);
        let mut ip6 = vec![0; 41];
        ip6[0] = 0x60;
        ip6[5] = 1;
        for (payload, kind) in [(ip, Type::Data), (ip6, Type::Data), (vec![2; 60], Type::Control)] {
            let packet = sealed(&right, &payload, kind);
            assert!(looks_like(&mut lanes, &right, &packet));
            assert!(!looks_like(&mut lanes, &wrong, &packet));
            assert!(!looks_like(&mut lanes, &right, &packet[..packet.len() - 1]));
        }
        assert!(!looks_like(&mut lanes, &right, &[]));
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
            looks_like(&mut Lanes::new(), &key, &octets);
            let _ = unframe(&octets);
            prop_assert!(open(&mut Lanes::new(), &key, &mut octets).is_err());
        }
    }
}
