//! The output of `cipe show --json`, parsed without the project's own types.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::Value;

/// Verdicts on datagrams from the carrier.
pub const INBOUND: &[&str] = &[
    "delivered",
    "control-received",
    "bad-length",
    "no-receive-key",
    "bad-crc",
    "bad-tag",
    "bad-padding",
    "bad-type",
    "bad-inner",
    "congestion-drop",
    "replayed",
    "too-old",
    "reflected",
    "wrong-peer",
    "bad-relay",
    "unsealed",
    "bad-message",
    "clear-control",
    "control-full",
    "private-full",
];

/// The work of one worker thread for a tunnel, and for other workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Share {
    /// Packets sent.
    pub sent: u64,
    /// Packets delivered.
    pub delivered: u64,
    /// Packets of other workers, of any tunnel, that it encrypted or decrypted.
    pub helped: u64,
}

/// Sealed packets of a tunnel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sealed {
    /// Whether it sends packets of protocol 3 or 4 while it has no key for sealed ones.
    pub sends_unsealed: bool,
    /// Whether it accepts such packets.
    pub accepts_unsealed: bool,
    /// The AEAD of the send key, if there is one.
    pub suite: Option<String>,
    /// Age of the send key in seconds.
    pub send_seconds: Option<u64>,
    /// Counter of the next packet under the send key.
    pub send_counter: Option<u64>,
    /// Ages of the receive keys in seconds, the newest first.
    pub receive_seconds: Vec<u64>,
}

impl Sealed {
    fn of(object: &Value) -> Option<Self> {
        object.is_object().then(|| Self {
            sends_unsealed: object["unsealed"]["sends"] == true,
            accepts_unsealed: object["unsealed"]["accepts"] == true,
            suite: object["suite"].as_str().map(str::to_owned),
            send_seconds: object["send_seconds"].as_u64(),
            send_counter: object["send_counter"].as_u64(),
            receive_seconds: object["receive_seconds"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_u64)
                .collect(),
        })
    }
}

/// Status of one tunnel.
#[derive(Clone, Debug, Default)]
pub struct Status {
    /// Interface name.
    pub device: String,
    /// Its daemon has gone without a word.
    pub is_orphaned: bool,
    /// Key slots with a live key: `static`, `send`, `receive`, `previous`.
    pub keys: Vec<String>,
    /// Ages of the live keys in seconds, by slot.
    pub key_seconds: BTreeMap<String, u64>,
    /// Sealed packets; `None`: the tunnel does not use them.
    pub sealed: Option<Sealed>,
    /// Packets by verdict, without zeros.
    pub verdicts: BTreeMap<String, u64>,
    /// Doors and modes in use.
    pub doors: Vec<String>,
    /// Features that the kernel lacks, and the cost.
    pub lacks: Vec<String>,
    /// The share of each worker thread.
    pub workers: Vec<Share>,
}

impl Status {
    /// Reads the status of every tunnel from one JSON array, or from objects one after the other.
    ///
    /// # Errors
    /// Text that is not JSON.
    pub fn parse(text: &str) -> Result<Vec<Self>> {
        let mut tunnels = Vec::new();
        for value in serde_json::Deserializer::from_str(text).into_iter() {
            let value: Value = value.with_context(|| format!("cipe show --json: {text}"))?;
            match value {
                Value::Array(list) => tunnels.extend(list.iter().map(Self::of)),
                object => tunnels.push(Self::of(&object)),
            }
        }
        Ok(tunnels)
    }

    fn of(object: &Value) -> Self {
        let texts = |name: &str| {
            let list = object[name].as_array().map(Vec::as_slice).unwrap_or_default();
            list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let numbers = |name: &str| {
            let fields = object[name].as_object().into_iter().flatten();
            fields.filter_map(|(name, number)| Some((name.clone(), number.as_u64()?))).collect()
        };
        let workers = object["workers"].as_array().into_iter().flatten();
        let share = |share: &Value| {
            let number = |name: &str| share[name].as_u64().unwrap_or_default();
            Share { sent: number("sent"), delivered: number("delivered"), helped: number("helped") }
        };
        Self {
            device: object["device"].as_str().unwrap_or_default().to_owned(),
            is_orphaned: object["orphaned_seconds"].is_u64(),
            keys: texts("keys"),
            key_seconds: numbers("key_seconds"),
            sealed: Sealed::of(&object["sealed"]),
            verdicts: numbers("verdicts"),
            doors: texts("doors"),
            lacks: texts("lacks"),
            workers: workers.map(share).collect(),
        }
    }

    /// Packets under a verdict.
    pub fn count(&self, verdict: &str) -> u64 {
        self.verdicts.get(verdict).copied().unwrap_or_default()
    }

    /// Whether the kernel has a feature, by the beginning of its name; if not, prints that.
    pub fn has_feature(&self, name: &str) -> bool {
        let lacked = self.lacks.iter().find(|lacked| lacked.starts_with(name));
        if let Some(lacked) = lacked {
            eprintln!("skipped: this kernel has no {lacked}");
        }
        lacked.is_none()
    }

    /// Whether it has sealed keys for both directions.
    pub fn is_sealed(&self) -> bool {
        let has_both = |sealed: &Sealed| {
            sealed.suite.is_some() && sealed.send_seconds.is_some() && !sealed.receive_seconds.is_empty()
        };
        self.sealed.as_ref().is_some_and(has_both)
    }

    /// Counter of the next sealed packet, 0 without a key.
    pub fn send_counter(&self) -> u64 {
        self.sealed.as_ref().and_then(|sealed| sealed.send_counter).unwrap_or_default()
    }

    /// Whether a key slot has a live key.
    pub fn has_key(&self, slot: &str) -> bool {
        self.keys.iter().any(|key| key == slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_shapes_of_a_status_are_read() {
        let one = r#"{"device":"cipcb0","keys":["static","send"],"key_seconds":{"send":3},"verdicts":{"sent":7},"doors":["wire0: native"],
                      "lacks":["tcx links (Linux 6.6): a filter stays"]}"#;
        for text in [one.to_owned(), format!("[{one}]")] {
            let all = Status::parse(&text).expect("JSON");
            assert_eq!((all.len(), all[0].count("sent"), all[0].count("replayed")), (1, 7, 0));
            assert_eq!(all[0].key_seconds.get("send"), Some(&3));
            assert!(all[0].has_key("send") && !all[0].has_key("receive"));
            assert!(all[0].has_feature("AF_XDP") && !all[0].has_feature("tcx"));
        }
        let sealed = r#"{"sealed":{"unsealed":{"sends":false,"accepts":true},"suite":"aes256-gcm","send_seconds":7,"send_counter":9,
                         "receive_seconds":[]}}"#;
        let status = &Status::parse(sealed).expect("JSON")[0];
        let read = status.sealed.as_ref().expect("it is there");
        assert_eq!((read.sends_unsealed, read.accepts_unsealed, read.send_counter), (false, true, Some(9)));
        assert!(!status.is_sealed() && !Status::parse(one).expect("JSON")[0].is_sealed());
        assert!(Status::parse("[]").expect("JSON").is_empty());
        assert!(Status::parse("no engine").is_err());
    }
}
