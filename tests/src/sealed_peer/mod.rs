//! A second implementation of sealed packets, to test the first one with: written from docs/SEALED.md alone, with the Noise
//! pattern spelled out and the primitives of other libraries. It shares no code with `cipe-user`. [`SealedPeer`] has no timers and keeps
//! no state but what a caller holds: the messages of one handshake, and packets under its keys. [`live`] is an end on a socket.

pub mod live;
mod noise;
mod packet;
mod primitives;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;

use self::noise::Noise;
pub use self::packet::{Direction, Suite};
use self::primitives::{expand, hmac, mac, poly_open, poly_seal};

const NAME: &[u8] = b"CIPE sealed 1";

/// One end of a tunnel, and what it says of itself.
#[derive(Clone, Copy, Debug)]
pub struct SealedPeer {
    /// The tunnel's static key.
    pub static_key: [u8; 16],
    /// Its id.
    pub id: [u8; 8],
    /// Whether AES-256-GCM is fast at it.
    pub fast_aes: bool,
    /// 3: the tunnel carries IP packets, 4: Ethernet frames.
    pub carries: u8,
}

/// A handshake that was begun.
#[derive(Clone)]
pub struct Begun {
    noise: Noise,
    first: Vec<u8>,
    epoch: u8,
}

/// What a first message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct First {
    /// Its time stamp.
    pub stamp: u64,
    /// The id of its sender.
    pub id: [u8; 8],
}

/// The keys of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Session {
    /// For packets of the initiator.
    pub of_initiator: Direction,
    /// For packets of the responder.
    pub of_responder: Direction,
}

impl SealedPeer {
    fn root(&self) -> [u8; 32] {
        hmac(NAME, &self.static_key)
    }

    fn psk(&self) -> [u8; 32] {
        expand(&self.root(), b"psk")
    }

    fn mac(&self, text: &[u8]) -> [u8; 16] {
        mac(&expand(&self.root(), b"mac"), text)
    }

    /// What both messages say at their payload's end: id, epoch, ciphers, kind of tunnel, zeros.
    fn profile(&self, epoch: u8) -> Vec<u8> {
        [&self.id[..], &[epoch, self.fast_aes.into(), self.carries], &[0; 5]].concat()
    }

    fn session(&self, keys: [[u8; 32]; 2], hash: &[u8; 32], peer: &[u8], epochs: [u8; 2]) -> Session {
        let suite = if self.fast_aes && peer[9] & 1 == 1 { Suite::Aes256Gcm } else { Suite::ChaCha20Poly1305 };
        let octet = if suite == Suite::Aes256Gcm { 1 } else { 2 };
        let info = [b"CIPE sealed 1 packets", &[octet][..], hash].concat();
        let [of_initiator, of_responder] =
            [0, 1].map(|i| Direction { suite, epoch: epochs[i], key: expand(&keys[i], &info) });
        Session { of_initiator, of_responder }
    }

    /// Makes a first message, with an ephemeral private key, a time stamp and an epoch for packets to this end.
    pub fn begin(&self, private: [u8; 32], stamp: u64, epoch: u8) -> (Vec<u8>, Begun) {
        let mut noise = Noise::new(&self.psk(), private);
        let payload = [&stamp.to_be_bytes()[..], &self.profile(epoch)].concat();
        let mut first = vec![0x80, 0, 0, 0, 0, 0, 0, 1];
        first.extend(noise.send_ephemeral());
        first.extend(noise.encrypt(&payload));
        first.extend(self.mac(&first));
        first.extend([0; 16]);
        (first.clone(), Begun { noise, first, epoch })
    }

    /// The same first message with a cookie.
    pub fn with_cookie(&self, first: &[u8], cookie: &[u8; 16]) -> Vec<u8> {
        let text = &first[..96];
        [text, &mac(cookie, text)].concat()
    }

    /// Reads a first message and answers it. `None`: it is not of this tunnel.
    pub fn answer(&self, first: &[u8], private: [u8; 32], epoch: u8) -> Option<(First, Vec<u8>, Session)> {
        if first.len() != 112 || first[..8] != [0x80, 0, 0, 0, 0, 0, 0, 1] || self.mac(&first[..80]) != first[80..96] {
            return None;
        }
        let mut noise = Noise::new(&self.psk(), private);
        noise.take_ephemeral(first[8..40].try_into().ok()?);
        let payload = noise.decrypt(&first[40..80])?;
        let (stamp, peer) = (u64::from_be_bytes(payload[..8].try_into().ok()?), &payload[8..]);
        let said = First { stamp, id: peer[..8].try_into().ok()? };
        if said.id == self.id || peer[10] != self.carries || !(1..=3).contains(&peer[8]) {
            return None;
        }
        let mut answer = vec![0x80, 0, 0, 0, 0, 0, 0, 2];
        answer.extend(noise.send_ephemeral());
        noise.mix_shared_secret()?;
        answer.extend(noise.encrypt(&self.profile(epoch)));
        answer.extend(&first[80..88]);
        answer.extend(self.mac(&answer));
        let (keys, hash) = noise.split();
        Some((said, answer, self.session(keys, &hash, peer, [epoch, peer[8]])))
    }

    /// Reads an answer. `None`: it is not one to this first message.
    pub fn finish(&self, begun: Begun, answer: &[u8]) -> Option<Session> {
        let Begun { mut noise, first, epoch } = begun;
        if answer.len() != 96
            || answer[..8] != [0x80, 0, 0, 0, 0, 0, 0, 2]
            || answer[72..80] != first[80..88]
            || self.mac(&answer[..80]) != answer[80..]
        {
            return None;
        }
        noise.take_ephemeral(answer[8..40].try_into().ok()?);
        noise.mix_shared_secret()?;
        let peer = noise.decrypt(&answer[40..72])?;
        if peer[..8] == self.id || peer[10] != self.carries || !(1..=3).contains(&peer[8]) {
            return None;
        }
        let (keys, hash) = noise.split();
        Some(self.session(keys, &hash, &peer, [peer[8], epoch]))
    }

    fn retry_key(&self, first: &[u8]) -> [u8; 32] {
        expand(&expand(&self.root(), b"retry"), &first[8..40])
    }

    /// Makes a retry for a first message.
    pub fn retry(&self, first: &[u8], iv: [u8; 12], newest: u64, cookie: &[u8; 16]) -> Vec<u8> {
        let mut retry = vec![0x80, 0, 0, 0, 0, 0, 0, 3];
        let payload = [&newest.to_be_bytes()[..], cookie, &[0; 4]].concat();
        let sealed = poly_seal(&self.retry_key(first), &iv, &retry, &payload);
        retry.extend(iv);
        retry.extend(sealed);
        retry.extend(self.mac(&retry));
        retry
    }

    /// Reads a retry for a first message: the newest time stamp, and the cookie.
    pub fn read_retry(&self, first: &[u8], retry: &[u8]) -> Option<(u64, [u8; 16])> {
        if retry.len() != 80 || self.mac(&retry[..64]) != retry[64..] {
            return None;
        }
        let payload = poly_open(&self.retry_key(first), retry[8..20].try_into().ok()?, &retry[..8], &retry[20..64])?;
        Some((u64::from_be_bytes(payload[..8].try_into().ok()?), payload[8..24].try_into().ok()?))
    }
}
