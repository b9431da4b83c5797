//! The CT_DUMMY by which two of this program know each other. Originals ignore it.

/// Begins the data: the sender keeps the old key at a change. The next octet asks for an answer (1) or not (0).
pub(super) const MARKER: &[u8; 8] = b"CIPEkeep";
/// The sender uses sealed packets (docs/SEALED.md, section 9). The next octet is the highest version that it speaks. Versions of this
/// program that do not know it read no further than the part before it.
const SEALS: &[u8; 8] = b"CIPEseal";
/// The version of docs/SEALED.md.
const SEALED_VERSION: u8 = 1;

/// A name and its octet.
const PART: usize = MARKER.len() + 1;

/// What a marker says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Marker {
    /// Whether the sender wants an answer; `None`: it does not say that it keeps keys.
    pub(super) asks: Option<bool>,
    /// Whether the sender uses sealed packets of our version.
    pub(super) seals: bool,
}

impl Marker {
    /// Reads the data of a CT_DUMMY up to the first part that is not known, such as filler.
    pub(super) fn read(mut data: &[u8]) -> Self {
        let mut marker = Self::default();
        while let Some((part, rest)) = data.split_first_chunk::<PART>() {
            let [name @ .., octet] = part;
            match name {
                MARKER => marker.asks = Some(*octet == 1),
                SEALS => marker.seals = *octet >= SEALED_VERSION,
                _ => break,
            }
            data = rest;
        }
        marker
    }

    /// The data of a CT_DUMMY.
    pub(super) fn data(self) -> Vec<u8> {
        let asks = self.asks.map(|asks| [&MARKER[..], &[asks.into()]].concat());
        let seals = self.seals.then(|| [&SEALS[..], &[SEALED_VERSION]].concat());
        asks.into_iter().chain(seals).flatten().collect()
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    use super::*;
    use crate::wire::message::Message;

    #[test]
    fn markers_come_back_from_the_filler_behind_them() {
        for (asks, seals) in [(Some(true), true), (Some(false), true), (Some(true), false), (None, true)] {
            let marker = Marker { asks, seals };
            let payload = Message::Dummy(&marker.data()).build(0, &mut StdRng::seed_from_u64(1));
            let Ok(Message::Dummy(data)) = Message::parse(&payload) else { panic!("no CT_DUMMY") };
            assert_eq!(Marker::read(data), marker);
        }
    }

    #[test]
    fn parts_have_any_order_and_what_is_not_known_ends_them() {
        let expected = Marker { asks: Some(true), seals: true };
        for (data, expected) in [
            (&b"CIPEkeep\x01CIPEseal\x01"[..], expected),
            (b"CIPEseal\x01CIPEkeep\x01", expected),
            (b"CIPEkeep\x01CIPEseal\xFF", expected),
            (b"CIPEkeep\x01CIPEseal\x00", Marker { seals: false, ..expected }),
            (b"CIPEkeep\x01CIPEseal", Marker { seals: false, ..expected }),
            (b"CIPEkeep\x01\x00CIPEseal\x01", Marker { seals: false, ..expected }),
            (b"something else", Marker::default()),
            (b"", Marker::default()),
        ] {
            assert_eq!(Marker::read(data), expected, "{}", data.escape_ascii());
        }
    }

    /// As a version of 2026-11 reads it.
    #[test]
    fn an_earlier_version_of_this_program_reads_whether_it_is_asked() {
        for asks in [true, false] {
            let data = Marker { asks: Some(asks), seals: true }.data();
            let read = data.strip_prefix(MARKER).and_then(|rest| rest.first());
            assert_eq!(read, Some(&u8::from(asks)));
        }
    }
}
