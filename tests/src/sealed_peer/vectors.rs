//! Makes tests/vectors/sealed-*.json, which the first implementation's unit tests read.

use serde_json::{Value, json};

use super::*;

fn at(name: &str) -> String {
    format!("{}/vectors/{name}", env!("CARGO_MANIFEST_DIR"))
}

/// Octets that are the same in each run and look like nothing.
fn octets<const N: usize>(label: &str) -> [u8; N] {
    let seed = primitives::sha256(&[label.as_bytes()]);
    std::array::from_fn(|i| seed[i % 32] ^ (i / 32) as u8)
}

fn handshakes() -> Value {
    let case = |n: u8| {
        let label = |what: &str| format!("{what} {n}");
        let static_key = octets(&label("static key"));
        let carries = if n < 3 { 3 } else { 4 };
        let initiator =
            SealedPeer { static_key, id: octets(&label("id of the initiator")), fast_aes: n & 1 == 0, carries };
        let responder =
            SealedPeer { static_key, id: octets(&label("id of the responder")), fast_aes: n & 2 == 0, carries };
        let (e_i, e_r) = (octets(&label("initiator")), octets(&label("responder")));
        let stamp = 1_796_000_000_123_456_789 + u64::from(n);
        let (first, begun) = initiator.begin(e_i, stamp, 1);
        let (_, answer, session) = responder.answer(&first, e_r, 1).expect("it is genuine");
        assert_eq!(initiator.finish(begun, &answer).as_ref(), Some(&session));
        let (iv, cookie): ([u8; 12], [u8; 16]) = (octets(&label("iv")), octets(&label("cookie")));
        let retry = responder.retry(&first, iv, stamp + 5, &cookie);
        let suite = if session.of_initiator.suite == Suite::Aes256Gcm { "aes-256-gcm" } else { "chacha20-poly1305" };
        json!({
            "static_key": hex::encode(static_key),
            "carries": carries,
            "stamp": stamp,
            "initiator": {
                "id": hex::encode(initiator.id), "fast_aes": initiator.fast_aes, "epoch": 1, "ephemeral": hex::encode(e_i),
            },
            "responder": {
                "id": hex::encode(responder.id), "fast_aes": responder.fast_aes, "epoch": 1, "ephemeral": hex::encode(e_r),
            },
            "psk": hex::encode(initiator.psk()),
            "first": hex::encode(&first),
            "answer": hex::encode(answer),
            "suite": suite,
            "key_of_initiator": hex::encode(session.of_initiator.key),
            "key_of_responder": hex::encode(session.of_responder.key),
            "retry": {
                "iv": hex::encode(iv), "newest": stamp + 5, "cookie": hex::encode(cookie), "datagram": hex::encode(retry),
            },
            "first_with_cookie": hex::encode(initiator.with_cookie(&first, &cookie)),
        })
    };
    json!({ "format": "Sealed packets, version 1 (docs/SEALED.md): handshakes. `ephemeral` are private keys of X25519; octets in hex.",
        "cases": (0..4).map(case).collect::<Vec<_>>() })
}

fn packets() -> Value {
    let counters = [0, 1, 0x3FFF_FFFF, 0x4000_0000, 0x1_2345_6789, (1 << 36) - 1];
    let mut cases = Vec::new();
    for (suite, name) in [(Suite::Aes256Gcm, "aes-256-gcm"), (Suite::ChaCha20Poly1305, "chacha20-poly1305")] {
        for (n, counter) in counters.into_iter().enumerate() {
            for length in [0, 1, 20, 64, 133] {
                let direction = Direction { suite, epoch: n as u8 % 3 + 1, key: octets(&format!("key {name} {n}")) };
                let payload = &octets::<133>(&format!("payload {n}"))[..length];
                let kind = u8::from(length == 0);
                cases.push(json!({
                    "suite": name, "key": hex::encode(direction.key), "epoch": direction.epoch, "counter": counter,
                    "type": kind, "payload": hex::encode(payload),
                    "datagram": hex::encode(direction.seal(counter, kind, payload)),
                }));
            }
        }
    }
    json!({ "format": "Sealed packets, version 1 (docs/SEALED.md): packets. Octets in hex.", "cases": cases })
}

/// With CIPE_WRITE_VECTORS in the environment it writes the files.
#[test]
fn the_vectors_in_the_tree_are_those_that_this_implementation_makes() {
    for (name, value) in [("sealed-handshakes.json", handshakes()), ("sealed-packets.json", packets())] {
        let text = serde_json::to_string_pretty(&value).expect("plain values") + "\n";
        if std::env::var_os("CIPE_WRITE_VECTORS").is_some() {
            std::fs::write(at(name), &text).expect("the folder is there");
        }
        let known: Value = serde_json::from_str(&std::fs::read_to_string(at(name)).expect(name)).expect("JSON");
        assert!(known == value, "{name} differs; CIPE_WRITE_VECTORS=1 writes it anew");
    }
}
