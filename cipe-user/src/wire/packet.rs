//! Packet layout (protocol section 2): `IV | CBC(payload | padding | P | CRC)`.

use cipe_common::Verdict;

/// Octets of the IV in front of the ciphertext.
pub const IV: usize = 8;
/// Octets of P and the CRC behind the padding.
pub const TRAILER: usize = 5;
/// Smallest datagram of the protocol.
pub const MIN: usize = 16;

/// Which of the sender's keys a packet is under: bit 7 of the first IV octet.
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

    /// Returns `iv` with the flag forced to this kind.
    pub fn mark(self, mut iv: [u8; IV]) -> [u8; IV] {
        iv[0] = match self {
            Self::Static => iv[0] & 0x7F,
            Self::Dynamic => iv[0] | 0x80,
        };
        iv
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

/// Octets of the datagram that carries a payload of `n` octets.
pub const fn sealed_len(n: usize) -> usize {
    IV + n + padding(n) + TRAILER
}

/// CRC-32 as the protocol wants it: reflected 0xEDB88320, initial value 0, no final inversion (trap 2).
pub fn crc(data: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(!0);
    hasher.update(data);
    !hasher.finalize()
}

/// Completes a plaintext in place before encryption: writes `iv`, padding, P and CRC around the payload of `n` octets
/// that stands at `buffer[8..8 + n]`, and returns the datagram's length, [`sealed_len`]`(n)`. The octets from 8 on are
/// then ready for CBC encryption under `iv`, which must already be [`KeyKind::mark`]ed.
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
    if plain.len() < MIN - IV || !plain.len().is_multiple_of(8) {
        return Err(Verdict::BadLength);
    }
    let (body, sum) = plain.split_at(plain.len() - 4);
    if crc(body).to_be_bytes() != sum {
        return Err(Verdict::BadCrc);
    }
    let p = body[body.len() - 1];
    let n = body.len() - 1;
    let pad = usize::from(p >> 4 & 7);
    if p & 0b1000_1001 != 0 || pad > n {
        return Err(Verdict::BadPadding);
    }
    match p >> 1 & 3 {
        0 => Ok((Type::Data, n - pad)),
        1 => Ok((Type::Control, n - pad)),
        _ => Err(Verdict::BadType),
    }
}
