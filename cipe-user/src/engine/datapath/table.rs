//! Look-up tables for packets: by tunnel number, and by carrier address.

use std::net::SocketAddr;

/// Values by tunnel number, with one indirection for each look-up. Small numbers are assigned first, so few rows are empty.
pub struct TunnelTable<T> {
    rows: Vec<Option<Box<T>>>,
}

impl<T> Default for TunnelTable<T> {
    fn default() -> Self {
        Self { rows: Vec::new() }
    }
}

impl<T> TunnelTable<T> {
    /// Returns the value of a number.
    pub fn get(&self, number: &u16) -> Option<&T> {
        self.rows.get(usize::from(*number))?.as_deref()
    }

    /// Returns the value of a number, for a change.
    pub fn get_mut(&mut self, number: &u16) -> Option<&mut T> {
        self.rows.get_mut(usize::from(*number))?.as_deref_mut()
    }

    /// Sets the value of a number, and drops the one before.
    pub fn insert(&mut self, number: u16, value: T) {
        let row = usize::from(number);
        if self.rows.len() <= row {
            self.rows.resize_with(row + 1, || None);
        }
        self.rows[row] = Some(Box::new(value));
    }

    /// Removes and returns the value of a number.
    pub fn remove(&mut self, number: &u16) -> Option<T> {
        self.rows.get_mut(usize::from(*number))?.take().map(|value| *value)
    }

    /// Returns all values, in the order of their numbers.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.rows.iter().flatten().map(|value| &**value)
    }

    /// Returns all values, for a change.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.rows.iter_mut().flatten().map(|value| &mut **value)
    }
}

/// Tunnel numbers by carrier address. Each port has a list of addresses. It has one entry, unless several addresses share the port.
pub(super) struct Addresses {
    /// By port: index of the list's first entry in `entries`, plus 1; 0: none. The kernel allocates only pages with ports in use.
    first: Box<[u32]>,
    entries: Vec<Entry>,
    /// Unused entries.
    free: Vec<u32>,
}

struct Entry {
    /// The address; with its zone if it is link-local, since several devices may have the same address.
    address: SocketAddr,
    number: u16,
    /// As in [`Addresses::first`].
    next: u32,
}

impl Default for Addresses {
    fn default() -> Self {
        Self { first: vec![0; 1 << 16].into(), entries: Vec::new(), free: Vec::new() }
    }
}

impl Addresses {
    /// Returns the tunnel that owns an address.
    pub(super) fn get(&self, address: &SocketAddr) -> Option<u16> {
        let mut place = self.first[usize::from(address.port())];
        while let Some(entry) = place.checked_sub(1).and_then(|place| self.entries.get(place as usize)) {
            if entry.address == *address {
                return Some(entry.number);
            }
            place = entry.next;
        }
        None
    }

    /// Assigns an address to a tunnel. Another tunnel that had it loses it.
    pub(super) fn insert(&mut self, address: SocketAddr, number: u16) {
        self.remove(&address);
        let first = &mut self.first[usize::from(address.port())];
        let entry = Entry { address, number, next: *first };
        match self.free.pop() {
            Some(place) => {
                self.entries[place as usize - 1] = entry;
                *first = place;
            }
            None => {
                self.entries.push(entry);
                *first = self.entries.len() as u32;
            }
        }
    }

    /// Removes an address. Does nothing if no tunnel has it.
    pub(super) fn remove(&mut self, address: &SocketAddr) {
        let port = usize::from(address.port());
        let (mut before, mut place) = (None, self.first[port]);
        while let Some(entry) = place.checked_sub(1).and_then(|place| self.entries.get(place as usize)) {
            let next = entry.next;
            if entry.address == *address {
                match before {
                    None => self.first[port] = next,
                    Some(before) => self.entries[before as usize - 1].next = next,
                }
                self.free.push(place);
                return;
            }
            (before, place) = (Some(place), next);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_table_gives_back_what_was_put_in_by_number() {
        let mut table = TunnelTable::default();
        assert_eq!(table.get(&0), None::<&&str>);
        table.insert(9, "nine");
        table.insert(0, "none");
        assert_eq!((table.get(&9), table.get(&8), table.get(&u16::MAX)), (Some(&"nine"), None, None));
        assert_eq!(table.values().collect::<Vec<_>>(), [&"none", &"nine"]);
        assert_eq!((table.remove(&9), table.remove(&9)), (Some("nine"), None));
    }

    #[test]
    fn a_link_local_address_is_another_one_on_each_device() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let mut addresses = Addresses::default();
        addresses.insert(at("[fe80::1%2]:6789"), 1);
        addresses.insert(at("[fe80::1%3]:6789"), 2);
        let found = ["[fe80::1%2]:6789", "[fe80::1%3]:6789", "[fe80::1%4]:6789", "[fe80::1]:6789"];
        assert_eq!(found.map(|text| addresses.get(&at(text))), [Some(1), Some(2), None, None]);
        addresses.remove(&at("[fe80::1%2]:6789"));
        assert_eq!(found.map(|text| addresses.get(&at(text))), [None, Some(2), None, None]);
    }

    proptest! {
        #[test]
        fn addresses_are_a_map(operations in prop::collection::vec((any::<bool>(), 0..4u8, 0..3u16, any::<u16>()), 0..200)) {
            let (mut addresses, mut map) = (Addresses::default(), HashMap::new());
            for (insert, ip, port, number) in operations {
                let address = SocketAddr::from(([192, 0, 2, ip], port));
                if insert {
                    addresses.insert(address, number);
                    map.insert(address, number);
                } else {
                    addresses.remove(&address);
                    map.remove(&address);
                }
                for (ip, port) in (0..4).flat_map(|ip| (0..3).map(move |port| (ip, port))) {
                    let address = SocketAddr::from(([192, 0, 2, ip], port));
                    prop_assert_eq!(addresses.get(&address), map.get(&address).copied());
                }
            }
            prop_assert!(addresses.entries.len() <= 12, "freed entries are used again");
        }
    }
}
