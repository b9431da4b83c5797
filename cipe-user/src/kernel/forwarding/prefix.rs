//! Prefixes of addresses, and longest-prefix match.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// A network: the addresses whose first `bits` bits are those of `address`, whose other bits are zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Prefix {
    /// Its first address.
    pub address: IpAddr,
    /// 0 to 32, or 0 to 128.
    pub bits: u8,
}

impl Prefix {
    /// The network of this size around an address. A larger `bits` is limited to the length of the address.
    pub fn new(address: IpAddr, bits: u8) -> Self {
        match address {
            IpAddr::V4(ip) => {
                let bits = bits.min(32);
                let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
                Self { address: Ipv4Addr::from_bits(ip.to_bits() & mask).into(), bits }
            }
            IpAddr::V6(ip) => {
                let bits = bits.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
                Self { address: Ipv6Addr::from_bits(ip.to_bits() & mask).into(), bits }
            }
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

/// Values by prefix.
#[derive(Clone, Debug)]
pub struct PrefixMap<T> {
    values: HashMap<Prefix, T>,
    /// Lengths in use for IPv4 and IPv6, longest first.
    lengths: [Vec<u8>; 2],
}

impl<T> Default for PrefixMap<T> {
    fn default() -> Self {
        Self { values: HashMap::new(), lengths: [Vec::new(), Vec::new()] }
    }
}

impl<T> FromIterator<(Prefix, T)> for PrefixMap<T> {
    fn from_iter<I: IntoIterator<Item = (Prefix, T)>>(entries: I) -> Self {
        let mut map = Self { values: entries.into_iter().collect(), ..Self::default() };
        for prefix in map.values.keys() {
            let lengths = &mut map.lengths[usize::from(prefix.address.is_ipv6())];
            if !lengths.contains(&prefix.bits) {
                lengths.push(prefix.bits);
            }
        }
        map.lengths.iter_mut().for_each(|lengths| lengths.sort_unstable_by(|a, b| b.cmp(a)));
        map
    }
}

impl<T> PrefixMap<T> {
    /// The value of the longest prefix that contains an address.
    pub fn longest(&self, address: IpAddr) -> Option<&T> {
        self.around(Prefix::new(address, 128)).next()
    }

    /// The values of all prefixes that contain a prefix, itself included, longest first.
    pub fn around(&self, prefix: Prefix) -> impl Iterator<Item = &T> {
        let lengths = &self.lengths[usize::from(prefix.address.is_ipv6())];
        let shorter = lengths.iter().filter(move |bits| **bits <= prefix.bits);
        shorter.filter_map(move |bits| self.values.get(&Prefix::new(prefix.address, *bits)))
    }

    /// The value of exactly this prefix.
    pub fn get(&self, prefix: &Prefix) -> Option<&T> {
        self.values.get(prefix)
    }

    /// All prefixes and values, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&Prefix, &T)> {
        self.values.iter()
    }

    /// Number of prefixes.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn prefix(text: &str) -> Prefix {
        let (address, bits) = text.split_once('/').unwrap();
        Prefix::new(address.parse().unwrap(), bits.parse().unwrap())
    }

    #[test]
    fn the_longest_prefix_wins_and_the_versions_do_not_mix() {
        let names = ["0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "::/0", "2001:db8::/32"];
        let map: PrefixMap<&str> = names.iter().map(|name| (prefix(name), *name)).collect();
        for (address, expected) in [
            ("10.1.2.3", "10.1.2.3/32"),
            ("10.1.2.4", "10.1.0.0/16"),
            ("10.2.0.0", "10.0.0.0/8"),
            ("11.0.0.0", "0.0.0.0/0"),
            ("2001:db8:1::1", "2001:db8::/32"),
            ("::ffff:10.1.2.3", "::/0"),
        ] {
            assert_eq!(map.longest(address.parse().unwrap()), Some(&expected), "{address}");
        }
        let around: Vec<_> = map.around(prefix("10.1.0.0/24")).copied().collect();
        assert_eq!(around, ["10.1.0.0/16", "10.0.0.0/8", "0.0.0.0/0"]);
    }

    proptest! {
        #[test]
        fn a_prefix_holds_its_own_address(address in any::<IpAddr>(), bits in any::<u8>()) {
            let prefix = Prefix::new(address, bits);
            prop_assert_eq!(Prefix::new(prefix.address, prefix.bits), prefix);
            let map: PrefixMap<()> = [(prefix, ())].into_iter().collect();
            prop_assert_eq!(map.longest(address), Some(&()));
        }
    }
}
