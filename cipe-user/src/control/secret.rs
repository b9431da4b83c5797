//! Octets on the control socket that are keys, or hold one: hexadecimal text there, wiped in memory, and never in Debug output.

use std::fmt;
use std::ops::Deref;

use serde::de::{Error, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, Zeroizing};

/// Key octets, 16 unless said otherwise. They stand in one place however often they are handed on: a value that moves leaves a copy of itself behind, such as
/// in the slots of a channel.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyOctets<const N: usize = 16>(Box<[u8; N]>);

impl<const N: usize> KeyOctets<N> {
    /// Takes a copy.
    pub fn new(octets: &[u8; N]) -> Self {
        Self(Box::new(*octets))
    }
}

impl<const N: usize> Drop for KeyOctets<N> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl<const N: usize> Deref for KeyOctets<N> {
    type Target = [u8; N];

    fn deref(&self) -> &[u8; N] {
        &self.0
    }
}

/// The octets of a control message. An NK_IND holds a key.
#[derive(Clone, PartialEq, Eq)]
pub struct MessageOctets(pub Zeroizing<Vec<u8>>);

impl Deref for MessageOctets {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl From<&[u8]> for MessageOctets {
    fn from(octets: &[u8]) -> Self {
        Self(octets.to_vec().into())
    }
}

impl<const N: usize> fmt::Debug for KeyOctets<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyOctets(..)")
    }
}

impl fmt::Debug for MessageOctets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MessageOctets({} octets)", self.0.len())
    }
}

impl<const N: usize> Serialize for KeyOctets<N> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize(&self[..], serializer)
    }
}

impl Serialize for MessageOctets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize(&self.0, serializer)
    }
}

impl<'de, const N: usize> Deserialize<'de> for KeyOctets<N> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let octets = deserializer.deserialize_str(Digits)?;
        let octets = octets
            .as_slice()
            .try_into()
            .map_err(|_| D::Error::custom(format!("a key is {} hexadecimal digits", 2 * N)))?;
        Ok(Self::new(octets))
    }
}

impl<'de> Deserialize<'de> for MessageOctets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(Self(deserializer.deserialize_str(Digits)?))
    }
}

fn serialize<S: Serializer>(octets: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    let mut digits = Zeroizing::new(vec![0; 2 * octets.len()]);
    hex::encode_to_slice(octets, &mut digits).map_err(serde::ser::Error::custom)?;
    serializer.serialize_str(str::from_utf8(&digits).map_err(serde::ser::Error::custom)?)
}

/// Reads hexadecimal digits where they stand, without a copy of the text.
struct Digits;

impl Visitor<'_> for Digits {
    type Value = Zeroizing<Vec<u8>>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("hexadecimal digits")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        let mut octets = Zeroizing::new(vec![0; text.len() / 2]);
        // The error is not passed on: it would repeat a digit.
        hex::decode_to_slice(text, &mut octets).map_err(|_| E::custom("not hexadecimal digits, two for each octet"))?;
        Ok(octets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn no_debug_text_and_no_error_holds_a_digit() {
        assert_eq!(format!("{:?}", KeyOctets::new(&[0xAB; 16])), "KeyOctets(..)");
        assert_eq!(format!("{:?}", MessageOctets::from(&[0xAB; 60][..])), "MessageOctets(60 octets)");
        for text in ["\"abcdefabcdef\"", "\"ab\"", "\"abz\"", "171", "null"] {
            let error = serde_json::from_str::<KeyOctets>(text).unwrap_err().to_string();
            assert!(!error.contains("ab") && !error.contains('z'), "{error}");
        }
        for text in ["\"abz\"", "\"abc\"", "{}"] {
            assert!(serde_json::from_str::<MessageOctets>(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn octets_survive_the_socket(key: [u8; 16], message: Vec<u8>) {
            let text = serde_json::to_string(&(KeyOctets::new(&key), MessageOctets::from(&message[..]))).unwrap();
            let (key_back, message_back): (KeyOctets, MessageOctets) = serde_json::from_str(&text).unwrap();
            prop_assert_eq!((&*key_back, &message_back[..]), (&key, &message[..]));
            let digits = hex::encode(&message);
            prop_assert!(text.contains(&digits));
        }
    }
}
