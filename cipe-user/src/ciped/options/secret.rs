//! Keeps key material out of messages. A key in the wrong place of an option file is still a key.

use std::borrow::Cow;

/// A run of this many hexadecimal digits may be a part of a key.
const MIN_KEY_RUN_DIGITS: usize = 8;
/// This many hexadecimal digits in groups, as some tools print keys, may be a key.
const MIN_KEY_GROUPED_DIGITS: usize = 24;
/// Replaces hidden text.
pub(super) const HIDDEN: &str = "(not shown)";

/// Replaces each run of 8 or more hexadecimal digits; replaces the whole text if it has nothing but groups of digits,
/// 24 or more in all.
pub fn masked(text: &str) -> Cow<'_, str> {
    if is_grouped(text) {
        return Cow::Borrowed(HIDDEN);
    }
    let is_digit = |octet: &u8| octet.is_ascii_hexdigit();
    let runs = text.as_bytes().chunk_by(|a, b| is_digit(a) == is_digit(b));
    if runs.clone().all(|run| run.len() < MIN_KEY_RUN_DIGITS || !is_digit(&run[0])) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len());
    let mut from = 0;
    for run in runs {
        // The cuts are beside ASCII characters, so never within another character.
        let part = &text[from..from + run.len()];
        shown.push_str(if run.len() >= MIN_KEY_RUN_DIGITS && is_digit(&run[0]) { HIDDEN } else { part });
        from += run.len();
    }
    Cow::Owned(shown)
}

fn is_grouped(text: &str) -> bool {
    let digits = text.bytes().filter(u8::is_ascii_hexdigit).count();
    let separator = |octet: u8| octet.is_ascii_whitespace() || matches!(octet, b':' | b'-' | b'.' | b'_' | b',');
    digits >= MIN_KEY_GROUPED_DIGITS && text.bytes().all(|octet| octet.is_ascii_hexdigit() || separator(octet))
}

/// The form of an unknown option's name that may be shown: without a value behind `=`, which may be a key; [`HIDDEN`]
/// if the name itself may be a key, even one with typing errors.
pub(super) fn shown_name(name: &str) -> String {
    let (name, rest) = name.split_at(name.find('=').unwrap_or(name.len()));
    let digits = name.bytes().filter(u8::is_ascii_hexdigit).count();
    let decimal = name.bytes().filter(u8::is_ascii_digit).count();
    let run = name.as_bytes().chunk_by(|a, b| a.is_ascii_hexdigit() == b.is_ascii_hexdigit());
    let longest = run.filter(|run| run[0].is_ascii_hexdigit()).map(<[u8]>::len).max().unwrap_or(0);
    if longest >= MIN_KEY_RUN_DIGITS || digits >= MIN_KEY_RUN_DIGITS && decimal > 0 {
        return HIDDEN.to_owned();
    }
    // Quoted with escapes, since another kind of file may have any contents; cut, since its lines may be long.
    let mut shown: String = name.chars().take(40).flat_map(char::escape_debug).collect();
    if !rest.is_empty() {
        shown.push('=');
    }
    format!("`{shown}`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_may_be_a_key_is_not_shown_and_all_else_is() {
        for (text, shown) in [
            ("`192.0.2.1` is not an address", "`192.0.2.1` is not an address"),
            ("2001:db8::1", "2001:db8::1"),
            ("[2001:0db8:0000:0000:0000:0000:0000:0001]:1", "[2001:0db8:0000:0000:0000:0000:0000:0001]:1"),
            ("`00112233445566778899aabbccddeeff`", "`(not shown)`"),
            ("x=DEADBEEF;", "x=(not shown);"),
            ("1234567", "1234567"),
            ("über 12345678 \u{FFFD}", "über (not shown) \u{FFFD}"),
            ("00:11:22:33:44:55:66:77:88:99:aa:bb", "(not shown)"),
            ("0011 2233 4455 6677 8899 aabb ccdd eeff", "(not shown)"),
        ] {
            assert_eq!(masked(text), shown);
        }
    }

    #[test]
    fn names_are_shown_unless_they_may_be_keys() {
        for (name, shown) in [
            ("pear", "`pear`"),
            ("mtu=1400", "`mtu=`"),
            ("KEY=00112233445566778899aabbccddeeff", "`KEY=`"),
            ("IPADDR=10.20.1.1", "`IPADDR=`"),
            ("00112233445566778899aabbccddeeff", HIDDEN),
            ("0O1l2z3E4455q6677", HIDDEN),
            ("00:11:22:33:44", HIDDEN),
            ("key00112233", HIDDEN),
            ("deadbeef", HIDDEN),
            ("faced", "`faced`"),
            ("forcefield", "`forcefield`"),
            ("#", "`#`"),
        ] {
            assert_eq!(shown_name(name), shown, "{name}");
        }
    }

    proptest! {
        #[test]
        fn no_long_run_of_digits_is_left(text in "\\PC{0,60}", digits in "[0-9a-fA-F]{8,40}", behind in "\\PC{0,20}") {
            let whole = format!("{text}{digits}{behind}");
            for shown in [masked(&whole).into_owned(), shown_name(&whole)] {
                let longest = shown.split(|c: char| !c.is_ascii_hexdigit()).map(str::len).max();
                prop_assert!(longest < Some(MIN_KEY_RUN_DIGITS), "{shown}");
            }
        }
    }
}
