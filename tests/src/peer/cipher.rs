//! The two ciphers in CBC mode by the plain crates, one packet at a time.

use blowfish::BlowfishLE;
use cbc::{Decryptor, Encryptor};
use cipher::{Array, BlockModeDecrypt, BlockModeEncrypt, InnerIvInit, KeyInit};
use idea::Idea;

/// Octets of a key.
pub const KEY: usize = 16;

/// Cipher and the order of octets in its words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cipher {
    /// Blowfish on two little-endian words.
    Blowfish,
    /// IDEA on four big-endian words.
    Idea,
    /// IDEA on four little-endian words, key included.
    IdeaLittle,
}

impl Cipher {
    /// CBC-encrypts whole blocks in place.
    pub(super) fn encrypt(self, key: &[u8; KEY], iv: [u8; 8], data: &mut [u8]) {
        self.run(key, iv, data, true);
    }

    /// CBC-decrypts whole blocks in place.
    pub(super) fn decrypt(self, key: &[u8; KEY], iv: [u8; 8], data: &mut [u8]) {
        self.run(key, iv, data, false);
    }

    fn run(self, key: &[u8; KEY], mut iv: [u8; 8], data: &mut [u8], encrypt: bool) {
        let mut key = *key;
        // The octets of each word are swapped before and after the cipher; XOR works in either order.
        if self == Self::IdeaLittle {
            swap(&mut key);
            swap(&mut iv);
            swap(data);
        }
        let blocks = Array::slice_as_chunks_mut(data).0;
        match (self, encrypt) {
            (Self::Blowfish, true) => Encryptor::inner_iv_init(blowfish(&key), &iv.into()).encrypt_blocks(blocks),
            (Self::Blowfish, false) => Decryptor::inner_iv_init(blowfish(&key), &iv.into()).decrypt_blocks(blocks),
            (_, true) => Encryptor::inner_iv_init(Idea::new(&key.into()), &iv.into()).encrypt_blocks(blocks),
            (_, false) => Decryptor::inner_iv_init(Idea::new(&key.into()), &iv.into()).decrypt_blocks(blocks),
        }
        if self == Self::IdeaLittle {
            swap(data);
        }
    }
}

fn blowfish(key: &[u8; KEY]) -> BlowfishLE {
    BlowfishLE::new_from_slice(key).expect("Blowfish takes 4 to 56 octets")
}

fn swap(octets: &mut [u8]) {
    octets.chunks_exact_mut(2).for_each(<[u8]>::reverse);
}
