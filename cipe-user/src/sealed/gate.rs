//! Which handshake messages a worker passes on to the state machine (section 7): those with a right MAC, and under load only
//! those first messages that have a right cookie as well.

use std::time::Duration;

use rand::CryptoRng;

use super::Refused;
use super::cipher::KeyOctets;
use super::message::{COOKIE, FIRST, Kind, RETRY, Retry};
use super::packet::{self, Header};
use super::secrets::{MAC, MacKey, Secrets};

/// How long a secret for cookies is in use; it is taken for as long again.
pub const COOKIE_LIFE: Duration = Duration::from_secs(120);

/// What to do with a handshake message.
#[derive(Debug, PartialEq, Eq)]
pub enum Passage {
    /// Pass it on.
    Pass,
    /// Drop it.
    Drop(Refused),
    /// Drop it as [`Refused::NoCookie`], and send this to its source.
    Challenge([u8; RETRY]),
}

/// The kind of a datagram whose MAC verifies.
///
/// # Errors
/// [`Refused::BadMessage`], [`Refused::BadLength`] or [`Refused::BadTag`].
pub(super) fn check_mac(secrets: &Secrets, datagram: &[u8]) -> Result<Kind, Refused> {
    let Header::Handshake(word) = packet::parse(datagram)? else { return Err(Refused::BadMessage) };
    let kind = Kind::of(word, datagram.len())?;
    let (text, mac) = datagram.split_at(kind.mac_at());
    if secrets.mac.verifies(text, &mac[..MAC]) { Ok(kind) } else { Err(Refused::BadTag) }
}

/// The gate of one tunnel. All workers of an engine share it, so that any of them takes a cookie of any other.
pub struct Gate(MacKey);

impl Gate {
    /// A gate whose cookies depend on these octets, which an engine draws for each tunnel.
    pub fn new(drawn: &KeyOctets) -> Self {
        Self(MacKey::new(&**drawn))
    }

    /// Judges a handshake message from `source`, which are the octets of an address and a port. `now` is on any clock that
    /// does not go back, the same in all workers.
    pub fn judge(
        &self,
        secrets: &Secrets,
        datagram: &[u8],
        source: &[u8],
        loaded: bool,
        now: Duration,
        rng: &mut impl CryptoRng,
    ) -> Passage {
        let kind = match check_mac(secrets, datagram) {
            Ok(kind) => kind,
            Err(refused) => return Passage::Drop(refused),
        };
        let first: Option<&[u8; FIRST]> = if kind == Kind::First { datagram.try_into().ok() } else { None };
        let Some(first) = first.filter(|_| loaded) else { return Passage::Pass };
        let (text, mac) = first.split_at(FIRST - MAC);
        let period = now.as_secs() / COOKIE_LIFE.as_secs();
        let mut valid = [Some(period), period.checked_sub(1)].into_iter().flatten();
        if valid.any(|period| MacKey::new(&self.cookie(period, source)).verifies(text, mac)) {
            return Passage::Pass;
        }
        let cookie = self.cookie(period, source);
        Passage::Challenge(Retry { newest: 0, cookie }.build(secrets, first, rng))
    }

    /// The cookie of an address in the given period of [`COOKIE_LIFE`].
    fn cookie(&self, period: u64, source: &[u8]) -> [u8; COOKIE] {
        MacKey::new(&self.0.mac(&period.to_be_bytes())).mac(source)
    }
}

/// Writes the second MAC of a first message.
pub(super) fn use_cookie(first: &mut [u8; FIRST], cookie: &[u8; COOKIE]) {
    let mac = MacKey::new(cookie).mac(&first[..FIRST - MAC]);
    first[FIRST - MAC..].copy_from_slice(&mac);
}

#[cfg(test)]
mod tests {
    use super::super::message::{ANSWER, ephemeral};
    use super::*;

    fn first(secrets: &Secrets) -> [u8; FIRST] {
        let mut first = [9; FIRST];
        first[..8].copy_from_slice(&Kind::First.header());
        let mac = secrets.mac.mac(&first[..80]);
        first[80..96].copy_from_slice(&mac);
        first[96..].fill(0);
        first
    }

    fn judge(gate: &Gate, datagram: &[u8], source: &[u8], loaded: bool, at: u64) -> Passage {
        gate.judge(&Secrets::new(&[1; 16]), datagram, source, loaded, Duration::from_secs(at), &mut rand::rng())
    }

    #[test]
    fn nothing_without_the_static_key_passes() {
        let (secrets, gate) = (Secrets::new(&[1; 16]), Gate::new(&KeyOctets::default()));
        let good = first(&secrets);
        assert_eq!(judge(&gate, &good, b"a", false, 0), Passage::Pass);
        for at in 0..96 * 8 {
            let mut bad = good;
            bad[at / 8] ^= 1 << (at % 8);
            assert!(matches!(judge(&gate, &bad, b"a", false, 0), Passage::Drop(_)), "bit {at}");
        }
        for (datagram, refused) in [
            (first(&Secrets::new(&[2; 16])).to_vec(), Refused::BadTag),
            (good[..111].to_vec(), Refused::BadLength),
            (good[..6].to_vec(), Refused::BadLength),
            ([&Kind::Answer.header()[..], &[0; ANSWER - 8]].concat(), Refused::BadTag),
            ([&[0x80, 0, 0, 0, 0, 0, 0, 9][..], &[0; 104]].concat(), Refused::BadMessage),
        ] {
            assert_eq!(judge(&gate, &datagram, b"a", false, 0), Passage::Drop(refused));
        }
    }

    #[test]
    fn under_load_a_cookie_of_the_same_address_passes_for_its_time() {
        let (secrets, gate) = (Secrets::new(&[1; 16]), Gate::new(&KeyOctets::default()));
        let mut message = first(&secrets);
        let Passage::Challenge(retry) = judge(&gate, &message, b"a", true, 0) else { panic!("no cookie asked for") };
        assert_eq!(check_mac(&secrets, &retry), Ok(Kind::Retry));
        let retry = Retry::open(&secrets, &retry, ephemeral(&message)).unwrap();
        assert_eq!(retry.newest, 0);
        use_cookie(&mut message, &retry.cookie);
        assert_eq!(judge(&gate, &message, b"a", true, 100), Passage::Pass);
        assert!(matches!(judge(&gate, &message, b"b", true, 100), Passage::Challenge(_)));
        // Another secret is drawn at 130; the old one is taken still.
        assert!(matches!(judge(&gate, &message, b"b", true, 130), Passage::Challenge(_)));
        assert_eq!(judge(&gate, &message, b"a", true, 239), Passage::Pass);
        assert!(matches!(judge(&gate, &message, b"a", true, 240), Passage::Challenge(_)));
        assert_eq!(judge(&gate, &message, b"a", false, 240), Passage::Pass);
    }
}
