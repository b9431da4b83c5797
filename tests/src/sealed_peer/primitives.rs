//! HMAC, HKDF, and the AEAD of handshakes.

use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{ChaCha20Poly1305, Nonce};
use sha2::{Digest, Sha256};

pub(super) fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().into()
}

/// HMAC-SHA-256 with a key of up to 64 octets.
pub(super) fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let pad = |with: u8| -> [u8; 64] { std::array::from_fn(|i| key.get(i).unwrap_or(&0) ^ with) };
    sha256(&[&pad(0x5C), &sha256(&[&pad(0x36), text])])
}

/// HKDF-Expand to 32 octets.
pub(super) fn expand(key: &[u8; 32], info: &[u8]) -> [u8; 32] {
    hmac(key, &[info, &[1]].concat())
}

/// The first half of an HMAC.
pub(super) fn mac(key: &[u8], text: &[u8]) -> [u8; 16] {
    let whole = hmac(key, text);
    std::array::from_fn(|i| whole[i])
}

pub(super) fn poly_seal(key: &[u8; 32], iv: &[u8; 12], aad: &[u8], msg: &[u8]) -> Vec<u8> {
    let cipher = ChaCha20Poly1305::new(&(*key).into());
    cipher.encrypt(&Nonce::from(*iv), Payload { msg, aad }).expect("it is short")
}

pub(super) fn poly_open(key: &[u8; 32], iv: &[u8; 12], aad: &[u8], msg: &[u8]) -> Option<Vec<u8>> {
    ChaCha20Poly1305::new(&(*key).into()).decrypt(&Nonce::from(*iv), Payload { msg, aad }).ok()
}
