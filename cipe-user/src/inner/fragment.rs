//! Fragments IPv4 packets without DF (RFC 791, section 3.2, "An Example Fragmentation Procedure").

use cipe_common::Verdict;

use crate::inner::checksum::Sum;
use crate::inner::headers::Headers;
use crate::inner::ip::IPV4;

/// Maximum octets of an IPv4 header.
const LONGEST_HEADER: usize = 60;
/// Octets of a fragment offset unit.
const UNIT: usize = 8;
/// Number of units in the range of the 13-bit offset field.
const UNITS: usize = 1 << 13;

const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1FFF;

const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;
/// The flag of options that are copied to all fragments.
const COPIED: u8 = 0x80;

/// A packet that is being fragmented, from front to back.
pub struct Fragments<'a> {
    /// The header of the first fragment, which is that of the packet; below, that of all later fragments. Lengths and
    /// flags are not set yet.
    first: &'a [u8],
    later: Header,
    payload: &'a [u8],
    /// Payload octets cut so far; `None` after the last fragment.
    cut: Option<usize>,
    /// The packet's own fragment offset, in units.
    offset: usize,
    /// Whether the packet is itself a fragment, but not the last one.
    more: bool,
    mtu: usize,
}

struct Header {
    octets: [u8; LONGEST_HEADER],
    len: usize,
}

impl<'a> Fragments<'a> {
    /// A whole IPv4 packet, whose headers were read before, that is to be cut into packets of at most `mtu` octets. Octets behind
    /// its end are ignored.
    ///
    /// # Errors
    /// [`Verdict::TooBig`] for packets that must not be cut (DF, IPv6) or cannot be (`mtu` leaves no room behind the
    /// header); [`Verdict::PrivateMalformed`] where the slice ends before the packet, or the packet beyond what an
    /// offset can say.
    pub fn new(packet: &'a [u8], headers: &Headers, mtu: usize) -> Result<Self, Verdict> {
        if headers.dont_fragment || mtu < headers.header() + UNIT {
            return Err(Verdict::TooBig);
        }
        let packet = packet.get(..headers.total()).ok_or(Verdict::PrivateMalformed)?;
        let (first, payload) = packet.split_at(headers.header());
        let field = u16::from_be_bytes([first[6], first[7]]);
        let offset = usize::from(field & OFFSET);
        if offset + payload.len().div_ceil(UNIT) > UNITS {
            return Err(Verdict::PrivateMalformed);
        }
        let more = field & MORE_FRAGMENTS != 0;
        Ok(Self { first, later: later_header(first), payload, cut: Some(0), offset, more, mtu })
    }

    /// Writes the next fragment, a complete IPv4 packet, to the start of `buffer`. Returns its length; `None` after the
    /// last fragment.
    ///
    /// # Panics
    /// If `buffer` is shorter than the MTU.
    pub fn cut(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let at = self.cut?;
        let header = if at == 0 { self.first } else { &self.later.octets[..self.later.len] };
        let rest = self.payload.len() - at;
        let room = self.mtu - header.len();
        let (octets, last) = if rest <= room { (rest, true) } else { (room / UNIT * UNIT, false) };
        self.cut = (!last).then_some(at + octets);

        let more = if last && !self.more { 0 } else { MORE_FRAGMENTS };
        let field = more | (self.offset + at / UNIT) as u16;
        let len = header.len() + octets;
        let (ip, payload) = buffer[..len].split_at_mut(header.len());
        ip.copy_from_slice(header);
        payload.copy_from_slice(&self.payload[at..at + octets]);
        ip[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        ip[6..8].copy_from_slice(&field.to_be_bytes());
        ip[10..12].fill(0);
        let mut sum = Sum::default();
        sum.add(ip);
        ip[10..12].copy_from_slice(&sum.checksum());
        Some(len)
    }
}

/// Returns the header without the options that only the first fragment has. It is never longer than the first header.
fn later_header(first: &[u8]) -> Header {
    let mut octets = [0; LONGEST_HEADER];
    octets[..IPV4].copy_from_slice(&first[..IPV4]);
    let (mut at, mut len) = (IPV4, IPV4);
    while let Some(kind) = first.get(at).filter(|kind| **kind != END_OF_OPTIONS) {
        let option = match first.get(at + 1) {
            _ if *kind == NO_OPERATION => 1,
            Some(option) if *option >= 2 && at + usize::from(*option) <= first.len() => usize::from(*option),
            // A malformed option is not copied.
            _ => break,
        };
        if kind & COPIED != 0 {
            octets[len..len + option].copy_from_slice(&first[at..at + option]);
            len += option;
        }
        at += option;
    }
    // Options end at a whole word; the octets up to there are zero, which means "end of options".
    len = len.next_multiple_of(4);
    octets[0] = 0x40 | (len / 4) as u8;
    Header { octets, len }
}

#[cfg(test)]
mod tests;
