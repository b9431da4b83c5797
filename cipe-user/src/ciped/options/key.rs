//! The text of the static key (protocol section 2). No part of it may reach a message: it is the key, or almost the
//! key.

use std::ffi::OsString;
use std::fmt;

use zeroize::{Zeroize, ZeroizeOnDrop};

use super::problem::Mistake;
use super::value::{Parsed, Show};

/// Digits of a key.
const KEY_DIGITS: usize = 32;
const FIX: &str = "write 32 hexadecimal digits, such as the output of `cipe genkey` or md5sum";

/// A static key in both readings. Never shown.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct KeyText {
    /// With the hexadecimal meaning of the digits.
    pub octets: [u8; 16],
    /// With `keybug`: a to f mean 1 to 6.
    pub keybug_octets: [u8; 16],
    /// Number of digits in the text; the first 32 are used.
    pub digits: usize,
}

impl fmt::Debug for KeyText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyText(..)")
    }
}

impl Show for KeyText {
    fn show(&self) -> String {
        "(not shown)".to_owned()
    }

    fn plain(&self) -> OsString {
        OsString::new()
    }
}

/// Reads a static key: 32 hexadecimal digits of either case; ignores everything after the first word. Uses the first 32
/// digits of a longer word: keys that old and new versions read alike have about 40.
pub(super) fn key(text: &[u8]) -> Parsed<Option<KeyText>> {
    let word = text.split(u8::is_ascii_whitespace).next().unwrap_or_default();
    if word.is_empty() {
        return Err(Mistake::new("has no value", FIX));
    }
    if !word.iter().all(u8::is_ascii_hexdigit) {
        return Err(Mistake::new("the key has characters other than hexadecimal digits", FIX));
    }
    let Some(digits) = word.first_chunk::<KEY_DIGITS>() else {
        return Err(Mistake::new(format!("the key has {} digits", word.len()), FIX));
    };
    let mut key = KeyText { octets: [0; 16], keybug_octets: [0; 16], digits: word.len() };
    for (index, digit) in digits.iter().enumerate() {
        // Exact for every hexadecimal digit; others were refused above.
        let value = char::from(*digit).to_digit(16).unwrap_or_default() as u8;
        let shift = if index % 2 == 0 { 4 } else { 0 };
        key.octets[index / 2] |= value << shift;
        key.keybug_octets[index / 2] |= (if value > 9 { value - 9 } else { value }) << shift;
    }
    // No other digit is 0 in either reading.
    if key.octets == [0; 16] {
        return Err(Mistake::new("the key is all zeros, which the protocol reserves", FIX));
    }
    Ok(Some(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_is_32_digits_of_either_case_and_the_rest_is_ignored() {
        let parsed = key(b"000102030405060708090a0B0c0D0e0F  -").unwrap().unwrap();
        assert_eq!(parsed.octets, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(parsed.keybug_octets, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6]);
        for text in ["", " ", "00", "000102030405060708090a0b0c0d0e0", "g00102030405060708090a0b0c0d0e0f"] {
            assert!(key(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn of_a_longer_key_the_first_32_digits_count() {
        let parsed = key(b"000102030405060708090a0b0c0d0e0f12345678").unwrap().unwrap();
        assert_eq!((parsed.octets[15], parsed.digits), (15, 40));
        assert!(key(b"000102030405060708090a0b0c0d0e0f1234567x").is_err());
    }

    #[test]
    fn a_key_of_zeros_is_refused() {
        let zeros = "0".repeat(40);
        for digits in [32, 40] {
            let mistake = key(&zeros.as_bytes()[..digits]).unwrap_err();
            assert!(mistake.what.contains("reserves"), "{mistake:?}");
        }
        assert!(key(format!("{}1", &zeros[..31]).as_bytes()).is_ok());
    }

    #[test]
    fn no_message_and_no_debug_text_holds_key_digits() {
        let short = key(b"deadbeefdeadbeefdeadbeefdeadbee").unwrap_err();
        assert!(!format!("{short:?}").contains("dead"));
        let good = key(b"deadbeefdeadbeefdeadbeefdeadbeef").unwrap().unwrap();
        assert!(!format!("{good:?}").contains("222") && !good.show().contains("dead") && good.plain().is_empty());
    }

    proptest! {
        #[test]
        fn any_octets_are_a_key_or_a_mistake(text: Vec<u8>) {
            let _ = key(&text);
        }
    }
}
