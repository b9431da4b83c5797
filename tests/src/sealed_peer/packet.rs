//! Section 3: `80000000 | epoch, counter | AEAD(type | payload) | tag`.

use aes_gcm::aead::{Aead, KeyInit, Payload};
use aes_gcm::{Aes256Gcm, Nonce};

use super::primitives::{poly_open, poly_seal};

/// An AEAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// AES-256-GCM.
    Aes256Gcm,
    /// ChaCha20-Poly1305.
    ChaCha20Poly1305,
}

/// The key of one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Direction {
    /// Its AEAD.
    pub suite: Suite,
    /// Its number at the receiver, 1 to 3.
    pub epoch: u8,
    /// Its octets.
    pub key: [u8; 32],
}

impl Direction {
    /// Makes a packet with a counter and a type octet.
    pub fn seal(&self, counter: u64, kind: u8, payload: &[u8]) -> Vec<u8> {
        let word = u32::from(self.epoch) << 30 | (counter & 0x3FFF_FFFF) as u32;
        let header = [&[0x80, 0, 0, 0][..], &word.to_be_bytes()].concat();
        let plain = [&[kind], payload].concat();
        let sealed = match self.suite {
            Suite::Aes256Gcm => {
                let payload = Payload { msg: &plain, aad: &header };
                self.aes().encrypt(&Nonce::from(iv(counter)), payload).expect("it is short")
            }
            Suite::ChaCha20Poly1305 => poly_seal(&self.key, &iv(counter), &header, &plain),
        };
        [header, sealed].concat()
    }

    /// Opens a packet whose counter lies near `top`. Returns the counter, the type octet and the payload.
    pub fn open(&self, top: u64, datagram: &[u8]) -> Option<(u64, u8, Vec<u8>)> {
        if datagram.len() < 25 || datagram[..4] != [0x80, 0, 0, 0] || datagram[4] >> 6 != self.epoch {
            return None;
        }
        let (header, sealed) = datagram.split_at(8);
        let counter = nearest(u32::from_be_bytes(header[4..].try_into().ok()?) & 0x3FFF_FFFF, top);
        let plain = match self.suite {
            Suite::Aes256Gcm => {
                self.aes().decrypt(&Nonce::from(iv(counter)), Payload { msg: sealed, aad: header }).ok()?
            }
            Suite::ChaCha20Poly1305 => poly_open(&self.key, &iv(counter), header, sealed)?,
        };
        let (kind, payload) = plain.split_first()?;
        Some((counter, *kind, payload.to_vec()))
    }

    fn aes(&self) -> Aes256Gcm {
        Aes256Gcm::new(&self.key.into())
    }
}

fn iv(counter: u64) -> [u8; 12] {
    let mut iv = [0; 12];
    iv[4..].copy_from_slice(&counter.to_be_bytes());
    iv
}

/// Section 4, by trial: of all counters with these low bits, the one nearest to `top`; of two, the greater one.
fn nearest(low: u32, top: u64) -> u64 {
    let around = (top >> 30).saturating_sub(1)..=(top >> 30) + 1;
    let candidates = around.map(|high| high << 30 | u64::from(low));
    candidates.rev().min_by_key(|counter| counter.abs_diff(top)).unwrap_or(0)
}
