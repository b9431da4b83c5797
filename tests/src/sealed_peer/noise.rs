//! `Noise_NNpsk0_25519_ChaChaPoly_SHA256` (Noise, revision 34), spelled out: section 5 for the names of functions, 9 for the
//! PSK and for what `e` means in patterns with one.

use x25519_dalek::{PublicKey, StaticSecret};

use super::NAME;
use super::primitives::{hmac, poly_open, poly_seal, sha256};

#[derive(Clone)]
pub(super) struct Noise {
    h: [u8; 32],
    ck: [u8; 32],
    k: [u8; 32],
    n: u64,
    e: StaticSecret,
    re: Option<PublicKey>,
}

fn hkdf(ck: &[u8; 32], input: &[u8]) -> [[u8; 32]; 3] {
    let temp = hmac(ck, input);
    let one = hmac(&temp, &[1]);
    let two = hmac(&temp, &[&one[..], &[2]].concat());
    let three = hmac(&temp, &[&two[..], &[3]].concat());
    [one, two, three]
}

impl Noise {
    /// Initialize, MixHash(prologue), and the token `psk`: MixKeyAndHash.
    pub(super) fn new(psk: &[u8; 32], private: [u8; 32]) -> Self {
        // The name is longer than a hash.
        let h = sha256(&[b"Noise_NNpsk0_25519_ChaChaPoly_SHA256"]);
        let mut noise = Self { h, ck: h, k: [0; 32], n: 0, e: private.into(), re: None };
        noise.mix_hash(NAME);
        let [ck, temp_h, k] = hkdf(&noise.ck, psk);
        noise.ck = ck;
        noise.mix_hash(&temp_h);
        (noise.k, noise.n) = (k, 0);
        noise
    }

    fn mix_hash(&mut self, data: &[u8]) {
        self.h = sha256(&[&self.h, data]);
    }

    fn mix_key(&mut self, input: &[u8]) {
        [self.ck, self.k, _] = hkdf(&self.ck, input);
        self.n = 0;
    }

    /// The token `e`, written.
    pub(super) fn send_ephemeral(&mut self) -> [u8; 32] {
        let public = PublicKey::from(&self.e).to_bytes();
        self.mix_hash(&public);
        self.mix_key(&public);
        public
    }

    /// The token `e`, read.
    pub(super) fn take_ephemeral(&mut self, public: [u8; 32]) {
        self.mix_hash(&public);
        self.mix_key(&public);
        self.re = Some(public.into());
    }

    /// The token `ee`.
    pub(super) fn mix_shared_secret(&mut self) -> Option<()> {
        let secret = self.e.diffie_hellman(&self.re?).to_bytes();
        self.mix_key(&secret);
        (secret != [0; 32]).then_some(())
    }

    fn iv(&mut self) -> [u8; 12] {
        let mut iv = [0; 12];
        iv[4..].copy_from_slice(&self.n.to_le_bytes());
        self.n += 1;
        iv
    }

    /// EncryptAndHash.
    pub(super) fn encrypt(&mut self, payload: &[u8]) -> Vec<u8> {
        let iv = self.iv();
        let sealed = poly_seal(&self.k, &iv, &self.h, payload);
        self.mix_hash(&sealed);
        sealed
    }

    /// DecryptAndHash.
    pub(super) fn decrypt(&mut self, sealed: &[u8]) -> Option<Vec<u8>> {
        let iv = self.iv();
        let payload = poly_open(&self.k, &iv, &self.h, sealed)?;
        self.mix_hash(sealed);
        Some(payload)
    }

    /// Split, and the handshake hash.
    pub(super) fn split(self) -> ([[u8; 32]; 2], [u8; 32]) {
        let [one, two, _] = hkdf(&self.ck, &[]);
        ([one, two], self.h)
    }
}
