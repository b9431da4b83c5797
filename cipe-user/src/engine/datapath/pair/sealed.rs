//! Sealed packets between the two ends of a pair.

use std::sync::Arc;
use std::time::Duration;

use super::{End, Pair};
#[cfg(test)]
use crate::control::protocol::Protocol;
use crate::control::protocol::{KeyOctets, SealedKey, Unsealed};
use crate::engine::ledger::{Handed, Ledger};
use crate::engine::tunnel::sealed::{SealedTunnel, SealedView};
use crate::sealed::cipher::Suite;
use crate::sealed::packet::Epoch;

/// The static key that handshake messages depend on.
pub(crate) const STATIC_KEY: [u8; 16] = [0x5E; 16];
/// Only sealed packets.
#[cfg(test)]
pub(crate) const REQUIRED: Unsealed = Unsealed { sends: false, accepts: false };

impl End {
    /// Uses sealed packets from now on, without a key yet.
    pub(crate) fn use_sealed(&mut self, unsealed: Unsealed) {
        let (ledger, _) = Ledger::new().expect("memory for a ledger");
        let shared = SealedTunnel::new(&STATIC_KEY, unsealed, ledger, self.datapath.now).expect("random octets");
        self.tunnel().sealed = Some(SealedView::new(shared));
    }

    /// The sealed packets of its tunnel.
    pub(crate) fn sealed(&mut self) -> Arc<SealedTunnel> {
        self.tunnel().sealed.as_ref().expect("the end uses sealed packets").shared.clone()
    }
}

impl Pair {
    /// Returns two ends that use sealed packets only, in a first session.
    #[cfg(test)]
    pub(crate) fn sealed(suite: Suite, protocol: Protocol) -> Self {
        let mut pair = Self::new(crate::cipher::Algorithm::Blowfish, protocol).expect("memory and random octets");
        pair.a.use_sealed(REQUIRED);
        pair.b.use_sealed(REQUIRED);
        pair.new_session(1, suite);
        pair
    }

    /// Both ends take the keys of a new session into use. Serials grow.
    pub(crate) fn new_session(&mut self, serial: u64, suite: Suite) {
        let epoch = Epoch::ALL[serial as usize % Epoch::ALL.len()];
        let key = |direction: u8| {
            let mut octets = [direction; 32];
            octets[..8].copy_from_slice(&serial.to_be_bytes());
            SealedKey { serial, epoch, suite, key: KeyOctets::new(&octets) }
        };
        let (a, b) = (self.a.sealed(), self.b.sealed());
        let lost = "a record for each key";
        b.receive(&key(1), Handed::New).expect(lost);
        a.receive(&key(2), Handed::New).expect(lost);
        b.send(&key(2), Duration::from_secs(120), Handed::New).expect(lost);
        a.send(&key(1), Duration::from_secs(120), Handed::New).expect(lost);
        for end in [&mut self.a, &mut self.b] {
            // The records of keys before are free again.
            let now = end.datapath.now;
            end.tunnel().refresh(now);
        }
    }
}

/// Carries out an operation of a fuzzer's input: what the daemons of both ends ask for.
pub(super) fn operate(pair: &mut Pair, operation: u8, serial: &mut u64) {
    for end in [&mut pair.a, &mut pair.b] {
        if end.tunnel().sealed.is_none() {
            end.use_sealed(Unsealed { sends: true, accepts: true });
        }
    }
    match operation {
        0..=3 => {
            *serial += 1;
            pair.new_session(*serial, if operation & 1 == 0 { Suite::Aes256Gcm } else { Suite::ChaCha20Poly1305 });
        }
        4..=7 => {
            let unsealed = Unsealed { sends: operation & 1 != 0, accepts: operation & 2 != 0 };
            pair.a.sealed().set_unsealed(unsealed);
            pair.b.sealed().set_unsealed(unsealed);
        }
        8 => pair.a.sealed().stop_sending(),
        9 => pair.b.sealed().forget(*serial),
        10 => pair.b.sealed().clear(),
        11 => pair.a.tunnel().sealed = None,
        12 => pair.a.pass(Duration::from_secs(1)),
        _ => {
            let mut outgoing = Vec::new();
            pair.a.datapath.seal_confirmation(0, &mut outgoing);
            pair.a.datapath.queue_handshake(0, &[operation; 112], None, &mut outgoing);
            outgoing.into_iter().for_each(|out| pair.a.datapath.pool.put(out.frame));
        }
    }
    pair.assert_frames_are_back();
}
