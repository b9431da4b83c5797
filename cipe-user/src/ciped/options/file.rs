//! Syntax of option files and arguments (protocol section 5).
//!
//! Each line has one `name value`. A `#` in the first column makes the line a comment. There is no quoting and no
//! continuation: the value begins after the blanks behind the name, and ends with the last octet of the line that is no
//! blank. Blanks are space, tab and carriage return (from DOS editors). Octets beyond ASCII are kept as they are, so
//! comments and `arg` may be in any encoding.

/// One assignment of an option file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Line<'a> {
    /// Line number; the first is 1.
    pub number: usize,
    /// Option name, not yet checked; never empty.
    pub name: &'a [u8],
    /// Value; empty if there was none.
    pub value: &'a [u8],
}

const fn is_blank(octet: u8) -> bool {
    matches!(octet, b' ' | b'\t' | b'\r')
}

fn trim(mut text: &[u8]) -> &[u8] {
    while let [first, rest @ ..] = text
        && is_blank(*first)
    {
        text = rest;
    }
    while let [rest @ .., last] = text
        && is_blank(*last)
    {
        text = rest;
    }
    text
}

/// Assignments of a file's text, in order.
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = Line<'_>> {
    text.split(|octet| *octet == b'\n').enumerate().filter_map(|(index, line)| {
        if line.starts_with(b"#") {
            return None;
        }
        let line = trim(line);
        let end = line.iter().position(|octet| is_blank(*octet)).unwrap_or(line.len());
        let (name, value) = line.split_at(end);
        (!name.is_empty()).then(|| Line { number: index + 1, name, value: trim(value) })
    })
}

/// Splits a command line argument `name=value`; without `=` the value is empty.
pub(super) fn split_argument(argument: &[u8]) -> (&[u8], &[u8]) {
    match argument.iter().position(|octet| *octet == b'=') {
        Some(at) => (&argument[..at], &argument[at + 1..]),
        None => (argument, &[]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Parts<'a> = (usize, &'a [u8], &'a [u8]);

    fn parsed(text: &[u8]) -> Vec<Parts<'_>> {
        lines(text).map(|l| (l.number, l.name, l.value)).collect()
    }

    #[test]
    fn examples_of_the_file_syntax() {
        let cases: &[(&[u8], &[Parts<'_>])] = &[
            (b"", &[]),
            (b"\n\n  \n", &[]),
            (b"# comment\n#key 00\n", &[]),
            (b"nokey", &[(1, b"nokey", b"")]),
            (b"mtu 1400\n", &[(1, b"mtu", b"1400")]),
            (b"mtu\t \t1400  \r\n", &[(1, b"mtu", b"1400")]),
            (b"  mtu 1400", &[(1, b"mtu", b"1400")]),
            (b"arg two words # no comment", &[(1, b"arg", b"two words # no comment")]),
            (b"arg \"quoted\"", &[(1, b"arg", b"\"quoted\"")]),
            (b"arg a\\\nmtu 9", &[(1, b"arg", b"a\\"), (2, b"mtu", b"9")]),
            (b"#\xE4\xF6\narg \xFC", &[(2, b"arg", b"\xFC")]),
            (b" # indented", &[(1, b"#", b"indented")]),
            (b"a=b", &[(1, b"a=b", b"")]),
        ];
        for (text, expected) in cases {
            assert_eq!(parsed(text), *expected, "{}", text.escape_ascii());
        }
    }

    #[test]
    fn arguments_split_at_the_first_equals_sign() {
        assert_eq!(split_argument(b"arg=a=b"), (&b"arg"[..], &b"a=b"[..]));
        assert_eq!(split_argument(b"debug"), (&b"debug"[..], &b""[..]));
        assert_eq!(split_argument(b"arg="), (&b"arg"[..], &b""[..]));
    }

    proptest! {
        #[test]
        fn every_text_parses_and_names_and_values_have_no_outer_blanks(text: Vec<u8>) {
            for line in lines(&text) {
                prop_assert!(!line.name.is_empty() && !line.name.iter().any(|o| is_blank(*o) || *o == b'\n'));
                prop_assert_eq!(trim(line.value), line.value);
            }
        }

        #[test]
        fn a_written_line_reads_back(name in "[a-z_]{1,12}", value in "[!-~]([ -~]{0,20}[!-~])?") {
            let text = format!("{name} {value}\n");
            prop_assert_eq!(parsed(text.as_bytes()), vec![(1, name.as_bytes(), value.as_bytes())]);
        }
    }
}
