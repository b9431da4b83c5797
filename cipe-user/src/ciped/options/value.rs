//! Parsers of option values, one a type, from the octets of the text. Total: any octets give a value or a mistake.
//! Names of hosts and services are kept as text here and resolved by `resolve`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use super::problem::Mistake;
use super::secret::masked;
use crate::control::protocol::CarrierChoice;
use crate::kernel::bpf::XdpMode;

pub(super) type Parsed<T> = Result<T, Mistake>;

/// The text of a value.
pub(super) trait Show {
    /// Returns one line for `cipe check`, without text that may be a key; `-` for none.
    fn show(&self) -> String;

    /// Returns the text for the environment of a script; empty for none.
    fn plain(&self) -> OsString {
        self.show().into()
    }
}

macro_rules! show_by_display {
    ($($type:ty),*) => { $(impl Show for $type { fn show(&self) -> String { self.to_string() } })* };
}
show_by_display!(u8, u32, i32, Mask, Mac);

/// Free text, which may contain a key by mistake.
macro_rules! show_masked {
    ($($type:ty),*) => { $(impl Show for $type {
        fn show(&self) -> String {
            masked(&self.to_string()).into_owned()
        }

        fn plain(&self) -> OsString {
            self.to_string().into()
        }
    })* };
}
show_masked!(String, HostName);

impl Show for bool {
    fn show(&self) -> String {
        if *self { "yes" } else { "no" }.to_owned()
    }
}

impl Show for OsString {
    fn show(&self) -> String {
        masked(&self.to_string_lossy()).into_owned()
    }

    fn plain(&self) -> OsString {
        self.clone()
    }
}

impl Show for PathBuf {
    fn show(&self) -> String {
        masked(&self.to_string_lossy()).into_owned()
    }

    fn plain(&self) -> OsString {
        self.into()
    }
}

impl<T: Show> Show for Option<T> {
    fn show(&self) -> String {
        self.as_ref().map_or_else(|| "-".to_owned(), Show::show)
    }

    fn plain(&self) -> OsString {
        self.as_ref().map(Show::plain).unwrap_or_default()
    }
}

/// A value out of a fixed list.
pub(super) trait Choice: Copy + PartialEq + 'static {
    /// The names and their values.
    const ALL: &'static [(&'static str, Self)];
}

impl<T: Choice> Show for T {
    fn show(&self) -> String {
        T::ALL.iter().find(|(_, value)| value == self).map_or("?", |(name, _)| *name).to_owned()
    }
}

macro_rules! choice {
    ($(#[$doc:meta])* $type:ident { $($(#[$variant_doc:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $type { $($(#[$variant_doc])* $variant,)* }

        impl Choice for $type {
            const ALL: &'static [(&'static str, Self)] = &[$(($name, Self::$variant),)*];
        }
    };
}

choice! {
    /// `cipher`.
    CipherName {
        /// Blowfish.
        Blowfish = "blowfish",
        /// IDEA.
        Idea = "idea",
    }
}
choice! {
    /// `idea_words`.
    IdeaWords {
        /// As in the textbook.
        Big = "big",
        /// The other reading of the original.
        Little = "little",
    }
}

choice! {
    /// `guard`.
    GuardPolicy {
        /// Until a stop that was asked for.
        Yes = "yes",
        /// After it, too, until `cipe unguard`.
        Always = "always",
        /// None.
        No = "no",
    }
}

choice! {
    /// `sealed`.
    SealedPolicy {
        /// With a peer that can; without fallback once it was.
        Auto = "auto",
        /// Nothing else.
        Require = "require",
        /// Never.
        No = "no",
    }
}

impl Choice for CarrierChoice {
    const ALL: &'static [(&'static str, Self)] = &[("auto", Self::Auto), ("xdp", Self::Xdp), ("udp", Self::Udp)];
}

impl Choice for XdpMode {
    const ALL: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("native", Self::Native), ("generic", Self::Generic)];
}

/// The value as UTF-8, not empty.
pub(super) fn word(text: &[u8]) -> Parsed<&str> {
    match std::str::from_utf8(text) {
        Ok("") => Err(Mistake::new("has no value", "write one behind the name")),
        Ok(word) if word.chars().any(|c| c.is_whitespace() || c.is_control()) => {
            Err(Mistake::new(format!("`{}` has blanks in it", word.escape_debug()), "write one word"))
        }
        Ok(word) => Ok(word),
        Err(_) => Err(Mistake::new(format!("`{}` is not plain text", text.escape_ascii()), "write ASCII")),
    }
}

/// Boolean: no value, `1`, `yes`, `true` and `on` mean true; `0`, `no`, `false` and `off` mean false.
pub(super) fn flag_if_any(text: &[u8]) -> Parsed<Option<bool>> {
    flag(text).map(Some)
}

pub(super) fn flag(text: &[u8]) -> Parsed<bool> {
    match text {
        b"" | b"1" | b"yes" | b"true" | b"on" => Ok(true),
        b"0" | b"no" | b"false" | b"off" => Ok(false),
        _ => Err(Mistake::new(
            format!("`{}` is neither true nor false", text.escape_ascii()),
            "write yes, no, true, false, on, off, 1, 0, or the name alone for yes",
        )),
    }
}

/// Decimal number from `MIN` to `MAX`, which must fit `T`.
pub(super) fn number<T: TryFrom<i64>, const MIN: i64, const MAX: i64>(text: &[u8]) -> Parsed<T> {
    let word = word(text)?;
    let value = word.parse::<i64>().ok().filter(|value| (MIN..=MAX).contains(value));
    value.and_then(|value| T::try_from(value).ok()).ok_or_else(|| {
        Mistake::new(
            format!("`{}` is not a number in range", clip(word)),
            format!("write a whole number from {MIN} to {MAX}"),
        )
    })
}

/// A mark in the form of ip-rule(8) and `wg`: decimal, or hexadecimal behind `0x`.
pub(super) fn mark(text: &[u8]) -> Parsed<u32> {
    let word = word(text)?;
    let mark = match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        // `from_str_radix` would accept a sign here.
        Some(digits) if digits.starts_with(|c: char| c.is_ascii_hexdigit()) => u32::from_str_radix(digits, 16).ok(),
        Some(_) => None,
        None => word.parse().ok().filter(|_| !word.starts_with('+')),
    };
    mark.ok_or_else(|| {
        Mistake::new(
            format!("`{}` is not a mark", clip(word)),
            "write a number from 0 to 4294967295, or 0x0 to 0xffffffff",
        )
    })
}

pub(super) fn clip(word: &str) -> String {
    word.chars().take(60).collect()
}

/// One of [`Choice::ALL`].
pub(super) fn choice<T: Choice>(text: &[u8]) -> Parsed<T> {
    let word = word(text)?;
    T::ALL.iter().find(|(name, _)| *name == word).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = T::ALL.iter().map(|(name, _)| *name).collect();
        Mistake::new(format!("`{}` is not known", clip(word)), format!("write one of: {}", names.join(", ")))
    })
}

/// Interface name, as the kernel takes it.
pub(super) fn device(text: &[u8]) -> Parsed<Option<String>> {
    let word = word(text)?;
    let bad = word.len() > 15 || matches!(word, "." | "..") || word.contains(['/', ':', '%']) || !word.is_ascii();
    if bad {
        let what = format!("`{}` cannot be the name of an interface", clip(word));
        return Err(Mistake::new(what, "write at most 15 octets without `/`, `:` and `%`, such as cipcb0"));
    }
    Ok(Some(word.to_owned()))
}

/// An IP address or a host name, not yet resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName(pub String);

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// IP address or host name.
pub(super) fn host(text: &[u8]) -> Parsed<Option<HostName>> {
    word(text).map(|word| Some(HostName(word.to_owned())))
}

/// Absolute path.
pub(super) fn path(text: &[u8]) -> Parsed<PathBuf> {
    if text.starts_with(b"/") {
        return Ok(PathBuf::from(OsStr::from_bytes(text)));
    }
    Err(Mistake::new(format!("`{}` is not an absolute path", text.escape_ascii()), "write the path from / on"))
}

/// Any octets but NUL, which no argument can hold.
pub(super) fn text(text: &[u8]) -> Parsed<OsString> {
    if text.contains(&0) {
        return Err(Mistake::new("has a NUL octet in it", "remove it"));
    }
    Ok(OsString::from_vec(text.to_vec()))
}

/// Netmask of the interface, as the bits that are set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mask(pub u8);

impl fmt::Display for Mask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bits = u32::MAX.checked_shl(32 - u32::from(self.0)).unwrap_or(0);
        write!(f, "{}", std::net::Ipv4Addr::from(bits))
    }
}

/// IPv4 netmask, such as 255.255.255.0.
pub(super) fn mask(text: &[u8]) -> Parsed<Option<Mask>> {
    let word = word(text)?;
    let bits = word.parse::<std::net::Ipv4Addr>().ok().map(u32::from);
    bits.filter(|bits| bits.leading_ones() + bits.trailing_zeros() == 32).map_or_else(
        || Err(Mistake::new(format!("`{}` is not a netmask", clip(word)), "write it as 255.255.255.0")),
        // At most 32.
        |bits| Ok(Some(Mask(bits.leading_ones() as u8))),
    )
}

/// Ethernet address of one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Ethernet address: six octets in hexadecimal with colons between; not a group address, not all zeros.
pub(super) fn hwaddr(text: &[u8]) -> Parsed<Option<Mac>> {
    let word = word(text)?;
    let octet = |part: &str| u8::from_str_radix(part, 16).ok().filter(|_| part.len() <= 2 && !part.starts_with('+'));
    let octets: Option<Vec<u8>> = word.split(':').map(octet).collect();
    let octets = octets.and_then(|octets| <[u8; 6]>::try_from(octets).ok());
    octets.filter(|octets| octets[0] & 1 == 0 && *octets != [0; 6]).map_or_else(
        || Err(Mistake::new(format!("`{}` is not an Ethernet address", clip(word)), "write it as 02:00:00:00:00:01")),
        |octets| Ok(Some(Mac(octets))),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn booleans_need_no_value_and_take_eight() {
        for (text, value) in [
            ("", true),
            ("1", true),
            ("yes", true),
            ("true", true),
            ("on", true),
            ("0", false),
            ("no", false),
            ("false", false),
            ("off", false),
        ] {
            assert_eq!(flag(text.as_bytes()), Ok(value), "{text}");
        }
        for text in ["YES", "2", "yes no", "enabled", "of"] {
            assert!(flag(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_keep_their_range() {
        let ttl = number::<u8, 0, 255>;
        assert_eq!(ttl(b"255"), Ok(255));
        for text in ["256", "-1", "", "1 2", "0x40", "1.5", "99999999999999999999"] {
            assert!(ttl(text.as_bytes()).is_err(), "{text}");
        }
        assert_eq!(number::<i32, -1, 100>(b"-1"), Ok(-1));
    }

    #[test]
    fn masks_are_ones_and_then_zeros() {
        for (text, bits) in [("255.255.255.255", 32), ("255.255.255.0", 24), ("255.255.254.0", 23), ("0.0.0.0", 0)] {
            assert_eq!(mask(text.as_bytes()), Ok(Some(Mask(bits))));
            assert_eq!(Mask(bits).to_string(), text);
        }
        for text in ["", "24", "255.0.255.0", "0.0.0.1", "255.255.255.256", "ffffff00"] {
            assert!(mask(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn ethernet_addresses_are_of_one_device() {
        assert_eq!(hwaddr(b"2:0:0:0:a:FF").map(|mac| mac.map(|mac| mac.0)), Ok(Some([2, 0, 0, 0, 10, 255])));
        assert_eq!(Mac([2, 0, 0, 0, 10, 255]).to_string(), "02:00:00:00:0a:ff");
        for text in ["", "02:00:00:00:00", "02:00:00:00:00:001", "03:00:00:00:00:01", "0:0:0:0:0:0", "2:0:0:0:0:+1"] {
            assert!(hwaddr(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn devices_are_names_that_the_kernel_takes() {
        assert_eq!(device(b"cipcb0"), Ok(Some("cipcb0".to_owned())));
        for text in ["", "..", "a/b", "a:1", "cipcb%d", "sixteen_octets__", "a b"] {
            assert!(device(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_parser_panics(text: Vec<u8>) {
            let _ = (flag(&text), number::<u32, 0, 9>(&text), choice::<CarrierChoice>(&text), device(&text), host(&text));
            let _ = (path(&text), super::text(&text), hwaddr(&text), mask(&text));
        }
    }
}
