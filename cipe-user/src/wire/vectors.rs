//! Files of known answers in the format of `tests/vectors/cipe-v3.json`.

use serde::Deserialize;

use super::packet::{self, IV, KeyKind, Type};
use crate::cipher::{Algorithm, KEY, Key, Lanes};

/// A parsed file.
#[derive(Deserialize)]
pub struct Vectors {
    /// The known answers, at least one, in file order.
    pub cases: Vec<Case>,
}

/// What is wrong with a file of vectors.
#[derive(Debug, thiserror::Error)]
pub enum BadFile {
    /// Not JSON, or a field is missing or has an invalid value.
    #[error("not in the format of cipe-v3.json: {0}")]
    Format(#[from] serde_json::Error),
    /// No cases to run.
    #[error("holds no cases")]
    Empty,
    /// An unknown cipher or variant.
    #[error("case {name}: unknown cipher {cipher} with variant {variant}; known are {KNOWN_CIPHERS}")]
    Cipher {
        /// Name of the case.
        name: String,
        /// Its cipher.
        cipher: String,
        /// Its variant.
        variant: String,
    },
}

const KNOWN_CIPHERS: &str = "blowfish le32-words, idea standard-be16, idea le16-words";

/// One packet before and after sealing. Some fields follow from others; they are checked all the same.
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
    #[serde(with = "hex::serde")]
    iv_on_wire_hex: [u8; IV],
    key_kind: Kind,
    r#type: Content,
    plaintext_len: usize,
    #[serde(with = "hex::serde")]
    plaintext_hex: Vec<u8>,
    #[serde(with = "hex::serde")]
    padding_hex: Vec<u8>,
    #[serde(with = "hex::serde", rename = "P_hex")]
    p_hex: [u8; 1],
    #[serde(with = "hex::serde")]
    crc32_hex: [u8; 4],
    wire_len: usize,
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
    /// One line that gives the error and its position.
    pub fn parse(text: &str) -> Result<Self, BadFile> {
        let vectors: Self = serde_json::from_str(text)?;
        if vectors.cases.is_empty() {
            return Err(BadFile::Empty);
        }
        if let Some(case) = vectors.cases.iter().find(|case| case.algorithm().is_none()) {
            let (name, cipher, variant) = (case.name.clone(), case.cipher.clone(), case.cipher_variant.clone());
            return Err(BadFile::Cipher { name, cipher, variant });
        }
        Ok(vectors)
    }
}

impl Case {
    /// The algorithm of the case in its own word order, if it is known.
    fn algorithm(&self) -> Option<Algorithm> {
        match (self.cipher.as_str(), self.cipher_variant.as_str()) {
            ("blowfish", "le32-words") => Some(Algorithm::Blowfish),
            ("idea", "standard-be16") => Some(Algorithm::Idea),
            ("idea", "le16-words") => Some(Algorithm::IdeaLittle),
            _ => None,
        }
    }

    /// Seals the plaintext and opens the wire octets, and compares both with the file.
    ///
    /// # Errors
    /// A few words that name the difference.
    pub fn check(&self, lanes: &mut Lanes) -> Result<(), String> {
        let key = Key::new(self.algorithm().ok_or("unknown cipher")?, &self.key_hex);
        let kind = match self.key_kind {
            Kind::Static => KeyKind::Static,
            Kind::Dynamic => KeyKind::Dynamic,
        };
        let content = match self.r#type {
            Content::Data => Type::Data,
            Content::Keyxchg => Type::Control,
        };
        let n = self.plaintext_hex.len();
        same("plaintext_len", &self.plaintext_len, &n)?;
        same("length of the padding", &self.padding_hex.len(), &packet::padding(n))?;
        same("wire_len", &self.wire_len, &packet::sealed_len(n))?;
        let iv = kind.mark(self.iv_hex);
        same("IV", &self.iv_on_wire_hex, &iv)?;

        let mut filler = [0; 7];
        filler[..self.padding_hex.len()].copy_from_slice(&self.padding_hex);
        let mut buffer = vec![0; packet::sealed_len(n)];
        buffer[IV..IV + n].copy_from_slice(&self.plaintext_hex);
        packet::frame(&mut buffer, n, content, iv, filler);
        same("P", &self.p_hex[..], &buffer[buffer.len() - 5..buffer.len() - 4])?;
        same("CRC", &self.crc32_hex[..], &buffer[buffer.len() - 4..])?;
        packet::seal(lanes, &key, &mut buffer, n, content, iv, filler);
        same("sealed packet", &self.wire_hex, &buffer)?;

        let mut wire = self.wire_hex.clone();
        let opened = packet::open(lanes, &key, &mut wire).map_err(|verdict| format!("opening: {}", verdict.name()))?;
        same("opened packet", &(content, &*self.plaintext_hex), &opened)
    }
}

fn same<T: PartialEq + ?Sized>(what: &str, file: &T, ours: &T) -> Result<(), String> {
    if file == ours { Ok(()) } else { Err(format!("{what} differs")) }
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
        let wrong = |change: fn(&mut Case)| {
            let mut case = Vectors::parse(FILE).unwrap().cases.swap_remove(0);
            change(&mut case);
            case.check(&mut Lanes::new()).unwrap_err()
        };
        assert_eq!(wrong(|case| case.wire_hex[9] ^= 1), "sealed packet differs");
        assert_eq!(wrong(|case| case.key_hex[0] ^= 1), "sealed packet differs");
        assert_eq!(wrong(|case| case.crc32_hex[0] ^= 1), "CRC differs");
        assert_eq!(wrong(|case| case.p_hex[0] ^= 1), "P differs");
        assert_eq!(wrong(|case| case.iv_on_wire_hex[0] ^= 0x80), "IV differs");
        assert_eq!(wrong(|case| case.padding_hex.push(0)), "length of the padding differs");
        assert_eq!(wrong(|case| case.wire_len += 1), "wire_len differs");
        assert_eq!(wrong(|case| case.cipher_variant = "le16-words".into()), "unknown cipher");
    }

    #[test]
    fn a_bad_file_is_told_in_one_line() {
        let unknown = FILE.replace("standard-be16", "be16");
        let odd = FILE.replace("67161bfd", "67161bf");
        for (text, start) in [
            ("", "not in the format of cipe-v3.json: EOF"),
            ("[]", "not in the format"),
            (r#"{"cases": []}"#, "holds no cases"),
            (r#"{"cases": [{"name": "a"}]}"#, "not in the format of cipe-v3.json: missing field `cipher`"),
            (&unknown, "case idea-be-data-1024-dyn: unknown cipher idea with variant be16; known are"),
            (&odd, "not in the format of cipe-v3.json: Odd number of digits"),
        ] {
            let message = Vectors::parse(text).map(|_| ()).unwrap_err().to_string();
            assert!(message.starts_with(start) && !message.contains('\n'), "{message}");
        }
    }
}
