//! Section 2 of the specification: a packet is `IV | CBC(payload | padding | P | CRC)`.

use super::Cipher;
use super::cipher::KEY;

/// The content of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// A message, not data.
    pub control: bool,
    /// The payload.
    pub payload: Vec<u8>,
}

/// Why a packet was not decrypted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not whole blocks, or fewer than two.
    Length,
    /// The CRC does not match.
    Crc,
    /// Padding longer than the packet, or a type that is never sent.
    P,
}

/// Whether a datagram is under a dynamic key of its sender.
pub(super) fn is_dynamic(datagram: &[u8]) -> bool {
    datagram.first().is_some_and(|octet| octet & 0x80 != 0)
}

/// Makes a packet under `key`, a dynamic or the static one; the IV and the padding are random.
pub fn seal(cipher: Cipher, key: &[u8; KEY], dynamic: bool, control: bool, payload: &[u8]) -> Vec<u8> {
    let mut iv: [u8; 8] = [0; 8];
    // The 31 bits after the flag must not all be zero.
    while iv[..4] == [0; 4] {
        iv = rand::random();
        iv[0] &= 0x7F;
    }
    iv[0] |= if dynamic { 0x80 } else { 0 };
    let mut plain = payload.to_vec();
    let mut padding = 0;
    while !(plain.len() + 5).is_multiple_of(8) {
        plain.push(rand::random());
        padding += 1;
    }
    plain.push(padding << 4 | if control { 2 } else { 0 });
    plain.extend(crc(&plain).to_be_bytes());
    cipher.encrypt(key, iv, &mut plain);
    [&iv[..], &plain].concat()
}

/// Decrypts a packet as the original does: it ignores the reserved bits of P.
///
/// # Errors
/// Why it would be dropped.
pub fn open(cipher: Cipher, key: &[u8; KEY], datagram: &[u8]) -> Result<Opened, Refused> {
    if datagram.len() < 16 || !datagram.len().is_multiple_of(8) {
        return Err(Refused::Length);
    }
    let iv = std::array::from_fn(|i| datagram[i]);
    let mut plain = datagram[8..].to_vec();
    cipher.decrypt(key, iv, &mut plain);
    let sum = plain.split_off(plain.len() - 4);
    if crc(&plain).to_be_bytes() != sum[..] {
        return Err(Refused::Crc);
    }
    let p = plain.pop().ok_or(Refused::P)?;
    let control = match p >> 1 & 3 {
        0 => false,
        1 => true,
        _ => return Err(Refused::P),
    };
    let n = plain.len().checked_sub(usize::from(p >> 4 & 7)).ok_or(Refused::P)?;
    plain.truncate(n);
    Ok(Opened { control, payload: plain })
}

/// CRC-32 bit by bit: reflected polynomial 0xEDB88320, from 0, not inverted.
pub(super) fn crc(data: &[u8]) -> u32 {
    let mut crc = 0;
    for octet in data {
        crc ^= u32::from(*octet);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    crc
}
