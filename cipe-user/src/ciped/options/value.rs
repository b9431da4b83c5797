//! Parsers of option values, one a type, from the octets of the text. Total: any octets give a value or a mistake.
//! Names of hosts and services are kept as text here and resolved by `resolve`.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use zeroize::{Zeroize, ZeroizeOnDrop};

use super::problem::Mistake;
use crate::control::protocol::{Carrier, XdpMode};

type Parsed<T> = Result<T, Mistake>;

/// Text of a value for `cipe check`.
pub trait Show {
    /// One line, without secrets.
    fn show(&self) -> String;
}

macro_rules! show_by_display {
    ($($type:ty),*) => { $(impl Show for $type { fn show(&self) -> String { self.to_string() } })* };
}
show_by_display!(u8, u32, i32, String, HostName, EndpointName, Mask, Mac);

impl Show for bool {
    fn show(&self) -> String {
        if *self { "yes" } else { "no" }.to_owned()
    }
}

impl Show for OsString {
    fn show(&self) -> String {
        self.to_string_lossy().into_owned()
    }
}

impl Show for PathBuf {
    fn show(&self) -> String {
        self.display().to_string()
    }
}

impl<T: Show> Show for Option<T> {
    fn show(&self) -> String {
        self.as_ref().map_or_else(|| "-".to_owned(), Show::show)
    }
}

/// A value out of a fixed list.
pub trait Choice: Copy + PartialEq + 'static {
    /// Names and what they stand for.
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

impl Choice for Carrier {
    const ALL: &'static [(&'static str, Self)] = &[("auto", Self::Auto), ("xdp", Self::Xdp), ("udp", Self::Udp)];
}

impl Choice for XdpMode {
    const ALL: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("native", Self::Native), ("generic", Self::Generic)];
}

/// The value as UTF-8, not empty.
fn word(text: &[u8]) -> Parsed<&str> {
    match std::str::from_utf8(text) {
        Ok("") => Err(Mistake::new("has no value", "write one behind the name")),
        Ok(word) if word.chars().any(|c| c.is_whitespace() || c.is_control()) => {
            Err(Mistake::new(format!("`{}` has blanks in it", word.escape_debug()), "write one word"))
        }
        Ok(word) => Ok(word),
        Err(_) => Err(Mistake::new(format!("`{}` is not plain text", text.escape_ascii()), "write ASCII")),
    }
}

/// Boolean: no value, `1` and `yes` are true, `0` and `no` false.
pub fn flag(text: &[u8]) -> Parsed<bool> {
    match text {
        b"" | b"1" | b"yes" => Ok(true),
        b"0" | b"no" => Ok(false),
        _ => Err(Mistake::new(
            format!("`{}` is neither true nor false", text.escape_ascii()),
            "write yes, no, 1, 0, or the name alone for yes",
        )),
    }
}

/// Decimal number from `MIN` to `MAX`, which must fit `T`.
pub fn number<T: TryFrom<i64>, const MIN: i64, const MAX: i64>(text: &[u8]) -> Parsed<T> {
    let word = word(text)?;
    let value = word.parse::<i64>().ok().filter(|value| (MIN..=MAX).contains(value));
    value.and_then(|value| T::try_from(value).ok()).ok_or_else(|| {
        Mistake::new(
            format!("`{}` is not a number in range", clip(word)),
            format!("write a whole number from {MIN} to {MAX}"),
        )
    })
}

fn clip(word: &str) -> String {
    word.chars().take(60).collect()
}

/// One of [`Choice::ALL`].
pub fn choice<T: Choice>(text: &[u8]) -> Parsed<T> {
    let word = word(text)?;
    T::ALL.iter().find(|(name, _)| *name == word).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<&str> = T::ALL.iter().map(|(name, _)| *name).collect();
        Mistake::new(format!("`{}` is not known", clip(word)), format!("write one of: {}", names.join(", ")))
    })
}

/// Interface name, as the kernel takes it.
pub fn device(text: &[u8]) -> Parsed<Option<String>> {
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
pub fn host(text: &[u8]) -> Parsed<Option<HostName>> {
    word(text).map(|word| Some(HostName(word.to_owned())))
}

/// `host:port` or `[IPv6]:port`, not yet resolved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointName {
    /// IP address without brackets, or host name.
    pub host: String,
    /// Number or service name.
    pub port: String,
}

impl fmt::Display for EndpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

/// Carrier address and port.
pub fn endpoint(text: &[u8]) -> Parsed<Option<EndpointName>> {
    let word = word(text)?;
    let mistake = || {
        let what = format!("`{}` is not an address and a port", clip(word));
        Mistake::new(what, "write address:port, such as 192.0.2.1:6789 or [2001:db8::1]:6789")
    };
    let (host, port) = match word.strip_prefix('[') {
        Some(rest) => rest.split_once("]:").ok_or_else(mistake)?,
        None => word.rsplit_once(':').filter(|(host, _)| !host.contains(':')).ok_or_else(mistake)?,
    };
    if host.is_empty() || port.is_empty() || host.contains(['[', ']']) {
        return Err(mistake());
    }
    Ok(Some(EndpointName { host: host.to_owned(), port: port.to_owned() }))
}

/// A static key as read, in both readings. Never shown.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct KeyText {
    /// As hexadecimal digits mean.
    pub octets: [u8; 16],
    /// With `keybug`: a to f mean 1 to 6.
    pub keybug_octets: [u8; 16],
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
}

/// Static key: 32 hexadecimal digits of either case; anything after the first word is ignored (protocol section 2).
pub fn key(text: &[u8]) -> Parsed<Option<KeyText>> {
    // Nothing of the text may reach a message: it is, or nearly is, the key.
    const FIX: &str = "write 32 hexadecimal digits, such as the output of `cipe genkey` or md5sum";
    let word = text.split(u8::is_ascii_whitespace).next().unwrap_or_default();
    if word.is_empty() {
        return Err(Mistake::new("has no value", FIX));
    }
    if !word.iter().all(u8::is_ascii_hexdigit) {
        return Err(Mistake::new("the key has characters other than hexadecimal digits", FIX));
    }
    let Ok(digits) = <&[u8; 32]>::try_from(word) else {
        return Err(Mistake::new(format!("the key has {} digits", word.len()), FIX));
    };
    let mut key = KeyText { octets: [0; 16], keybug_octets: [0; 16] };
    for (index, digit) in digits.iter().enumerate() {
        // Exact for every hexadecimal digit; others were refused above.
        let value = char::from(*digit).to_digit(16).unwrap_or_default() as u8;
        let shift = if index % 2 == 0 { 4 } else { 0 };
        key.octets[index / 2] |= value << shift;
        key.keybug_octets[index / 2] |= (if value > 9 { value - 9 } else { value }) << shift;
    }
    Ok(Some(key))
}

/// Absolute path.
pub fn path(text: &[u8]) -> Parsed<PathBuf> {
    if text.starts_with(b"/") {
        return Ok(PathBuf::from(OsStr::from_bytes(text)));
    }
    Err(Mistake::new(format!("`{}` is not an absolute path", text.escape_ascii()), "write the path from / on"))
}

/// Any octets but NUL, which no argument can hold.
pub fn text(text: &[u8]) -> Parsed<OsString> {
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
pub fn mask(text: &[u8]) -> Parsed<Option<Mask>> {
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

/// Ethernet address: six octets in hexadecimal with colons between, neither a group's nor all zeros.
pub fn hwaddr(text: &[u8]) -> Parsed<Option<Mac>> {
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
    fn booleans_need_no_value_and_take_four() {
        for (text, value) in [("", true), ("1", true), ("yes", true), ("0", false), ("no", false)] {
            assert_eq!(flag(text.as_bytes()), Ok(value));
        }
        for text in ["true", "on", "YES", "2", "yes no"] {
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
    fn endpoints_have_a_host_and_a_port() {
        for (text, host, port) in [
            ("192.0.2.1:6789", "192.0.2.1", "6789"),
            ("gw.example.org:cipe", "gw.example.org", "cipe"),
            ("[2001:db8::1]:6789", "2001:db8::1", "6789"),
        ] {
            let expected = EndpointName { host: host.to_owned(), port: port.to_owned() };
            assert_eq!(expected.to_string(), text);
            assert_eq!(endpoint(text.as_bytes()), Ok(Some(expected)));
        }
        for text in
            ["", "192.0.2.1", ":1", "a:", "2001:db8::1", "2001:db8::1:6789", "[::1]", "[::1]6", "a b:1", "[[::]:1"]
        {
            assert!(endpoint(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn a_key_is_32_digits_of_either_case_and_the_rest_is_ignored() {
        let parsed = key(b"000102030405060708090a0B0c0D0e0F  -").unwrap().unwrap();
        assert_eq!(parsed.octets, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(parsed.keybug_octets, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6]);
        for text in [
            "",
            " ",
            "00",
            "000102030405060708090a0b0c0d0e0",
            "000102030405060708090a0b0c0d0e0f0",
            "g00102030405060708090a0b0c0d0e0f",
        ] {
            assert!(key(text.as_bytes()).is_err(), "{text}");
        }
    }

    #[test]
    fn no_message_and_no_debug_text_holds_key_digits() {
        let short = key(b"deadbeefdeadbeefdeadbeefdeadbee").unwrap_err();
        assert!(!format!("{short:?}").contains("dead"));
        let good = key(b"deadbeefdeadbeefdeadbeefdeadbeef").unwrap();
        assert!(!format!("{good:?}").contains("222") && !good.show().contains("dead"));
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
            let _ = (flag(&text), number::<u32, 0, 9>(&text), choice::<Carrier>(&text), device(&text), host(&text));
            let _ = (endpoint(&text), key(&text), path(&text), super::text(&text), hwaddr(&text));
            let _ = mask(&text);
        }

        #[test]
        fn an_endpoint_reads_back_as_written(word in "[!-~]{1,40}") {
            if let Ok(Some(endpoint_name)) = endpoint(word.as_bytes()) {
                prop_assert_eq!(endpoint_name.to_string().parse::<std::net::SocketAddr>().ok(), word.parse().ok());
            }
        }
    }
}
