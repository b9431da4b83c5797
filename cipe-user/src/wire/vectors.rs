//! Files of known answers in the format of `tests/vectors/cipe-v3.json`.

use serde::Deserialize;

use super::packet::{self, IV, KeyKind, Type};
use crate::cipher::{Algorithm, KEY, Key, Lanes};

/// A parsed file: cases in file order, each with its name and cipher variant checked to be known.
#[derive(Deserialize)]
pub struct Vectors {
    /// The known answers.
    pub cases: Vec<Case>,
}

/// One packet before and after sealing.
#[derive(Deserialize)]
pub struct Case {
    /// Name in the file.
    pub name: String,
    /// `blowfish` or `idea`.
    pub cipher: String,
    /// Word order: `le32-words`, `standard-be16` or `le16-words`.
    pub cipher_variant: String,
    #[serde(with = "hex::serde")]
    key_hex: [u8; KEY],
    #[serde(with = "hex::serde")]
    iv_hex: [u8; IV],
    key_kind: Kind,
    r#type: Content,
    #[serde(with = "hex::serde")]
    plaintext_hex: Vec<u8>,
    #[serde(with = "hex::serde")]
    padding_hex: Vec<u8>,
    #[serde(with = "hex::serde")]
    wire_hex: Vec<u8>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Static,
    Dynamic,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Content {
    Data,
    Keyxchg,
}

impl Vectors {
    /// Reads the text of a file.
    ///
    /// # Errors
    /// Not JSON, or not this format; the message says where.
    pub fn parse(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

impl Case {
    /// The algorithm of the case in its own word order.
    ///
    /// # Errors
    /// One line that names a cipher or variant that is not known.
    pub fn algorithm(&self) -> Result<Algorithm, String> {
        match (self.cipher.as_str(), self.cipher_variant.as_str()) {
            ("blowfish", "le32-words") => Ok(Algorithm::Blowfish),
            ("idea", "standard-be16") => Ok(Algorithm::Idea),
            ("idea", "le16-words") => Ok(Algorithm::IdeaLittle),
            (cipher, variant) => Err(format!("unknown cipher {cipher}, variant {variant}")),
        }
    }

    /// Seals the plaintext and opens the wire octets, and compares both with the file.
    ///
    /// # Errors
    /// One line that says what differs.
    pub fn check(&self, lanes: &mut Lanes) -> Result<(), String> {
        let key = Key::new(self.algorithm()?, &self.key_hex);
        let kind = match self.key_kind {
            Kind::Static => KeyKind::Static,
            Kind::Dynamic => KeyKind::Dynamic,
        };
        let content = match self.r#type {
            Content::Data => Type::Data,
            Content::Keyxchg => Type::Control,
        };
        let n = self.plaintext_hex.len();
        if self.padding_hex.len() != packet::padding(n) {
            return Err(format!(
                "{} octets of padding, the protocol wants {}",
                self.padding_hex.len(),
                packet::padding(n)
            ));
        }
        let mut filler = [0; 7];
        filler[..self.padding_hex.len()].copy_from_slice(&self.padding_hex);

        let mut sealed = vec![0; packet::sealed_len(n)];
        sealed[IV..IV + n].copy_from_slice(&self.plaintext_hex);
        packet::seal(lanes, &key, &mut sealed, n, content, kind.mark(self.iv_hex), filler);
        if sealed != self.wire_hex {
            return Err("sealed packet differs".into());
        }
        let mut wire = self.wire_hex.clone();
        match packet::open(lanes, &key, &mut wire) {
            Ok(opened) if opened == (content, &*self.plaintext_hex) => Ok(()),
            Ok(_) => Err("opened packet differs".into()),
            Err(verdict) => Err(format!("opening it ends in {}", verdict.name())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = include_str!("../../../tests/vectors/cipe-v3.json");

    #[test]
    fn every_known_answer_is_met() {
        let vectors = Vectors::parse(FILE).unwrap();
        assert_eq!(vectors.cases.len(), 108);
        let mut lanes = Lanes::new();
        for case in vectors.cases {
            assert_eq!(case.check(&mut lanes), Ok(()), "{}", case.name);
        }
    }

    #[test]
    fn a_wrong_answer_is_told() {
        let mut vectors = Vectors::parse(FILE).unwrap();
        let mut lanes = Lanes::new();
        let case = &mut vectors.cases[0];
        case.wire_hex[9] ^= 1;
        assert!(case.check(&mut lanes).is_err());
        case.cipher_variant = "be32-words".into();
        assert_eq!(case.check(&mut lanes), Err("unknown cipher blowfish, variant be32-words".into()));
    }
}
