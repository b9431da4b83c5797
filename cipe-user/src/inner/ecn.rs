//! Explicit congestion notification through the tunnel (RFC 6040). At the ingress, the outer header gets a copy of the
//! field, as of the rest of the TOS (normal mode). At the egress, a congestion mark of a router is copied to the inner
//! packet.

use cipe_common::Verdict;

use crate::inner::headers::{Headers, IpVersion};

/// Bits of the ECN field in TOS or traffic class.
const MASK: u8 = 3;
const NOT_ECT: u8 = 0;
const ECT_1: u8 = 1;
const ECT_0: u8 = 2;
const CE: u8 = 3;

/// Takes the mark of an outer header over to the inner packet and to what was read of it. Its IPv4 header checksum stays right or
/// wrong as it is. `tos` is the outer TOS or traffic class.
///
/// # Errors
/// [`Verdict::CongestionDrop`]: the packet met congestion, and its ends do not support ECN (RFC 6040, section 4.2).
#[inline]
pub fn decapsulate(packet: &mut [u8], headers: &mut Headers, tos: u8) -> Result<(), Verdict> {
    let outer = tos & MASK;
    // These two never change the inner field.
    if matches!(outer, NOT_ECT | ECT_0) {
        return Ok(());
    }
    let [first, second, ..] = packet else { return Ok(()) };
    let ecn = match (headers.tos & MASK, outer) {
        (NOT_ECT, CE) => return Err(Verdict::CongestionDrop),
        (ECT_0 | ECT_1, CE) => CE,
        (ECT_0, ECT_1) => ECT_1,
        _ => return Ok(()),
    };
    headers.tos = headers.tos & !MASK | ecn;
    if headers.version == IpVersion::V6 {
        *second = *second & !(MASK << 4) | ecn << 4;
        return Ok(());
    }
    let before = u16::from_be_bytes([*first, *second]);
    *second = *second & !MASK | ecn;
    let after = u16::from_be_bytes([*first, *second]);
    if let Some(field) = packet.get_mut(10..12) {
        let checksum = u16::from_be_bytes([field[0], field[1]]);
        field.copy_from_slice(&updated(checksum, before, after).to_be_bytes());
    }
    Ok(())
}

/// Updates a checksum after a change of one of the words that it covers (RFC 1624, equation 3).
fn updated(checksum: u16, before: u16, after: u16) -> u16 {
    let sum = u32::from(!checksum) + u32::from(!before) + u32::from(after);
    let sum = (sum & 0xFFFF) + (sum >> 16);
    !((sum & 0xFFFF) + (sum >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inner::test_packets::{Flow, checksums_are_right};

    /// Figure 4 of RFC 6040: inner field, outer field, and the resulting inner field; `None`: dropped.
    const TABLE: [(u8, u8, Option<u8>); 16] = [
        (NOT_ECT, NOT_ECT, Some(NOT_ECT)),
        (NOT_ECT, ECT_0, Some(NOT_ECT)),
        (NOT_ECT, ECT_1, Some(NOT_ECT)),
        (NOT_ECT, CE, None),
        (ECT_0, NOT_ECT, Some(ECT_0)),
        (ECT_0, ECT_0, Some(ECT_0)),
        (ECT_0, ECT_1, Some(ECT_1)),
        (ECT_0, CE, Some(CE)),
        (ECT_1, NOT_ECT, Some(ECT_1)),
        (ECT_1, ECT_0, Some(ECT_1)),
        (ECT_1, ECT_1, Some(ECT_1)),
        (ECT_1, CE, Some(CE)),
        (CE, NOT_ECT, Some(CE)),
        (CE, ECT_0, Some(CE)),
        (CE, ECT_1, Some(CE)),
        (CE, CE, Some(CE)),
    ];

    proptest! {
        #[test]
        fn the_table_of_the_rfc_holds_and_nothing_else_of_a_packet_changes(
            flow in Flow::any(), inner_dscp in any::<u8>(), outer_dscp in any::<u8>(),
        ) {
            for (inner, outer, expected) in TABLE {
                let with = |ecn| Flow { tos: inner_dscp & !MASK | ecn, ip_options: 0, ..flow.clone() }.packet(b"payload");
                let mut packet = with(inner);
                let mut headers = Headers::parse(&packet).unwrap();
                let done = decapsulate(&mut packet, &mut headers, outer_dscp & !MASK | outer);
                prop_assert_eq!(Headers::parse(&packet), Ok(headers));
                match expected {
                    Some(ecn) => {
                        prop_assert_eq!(done, Ok(()));
                        prop_assert_eq!(&packet, &with(ecn), "{} in {}", inner, outer);
                        prop_assert!(checksums_are_right(&packet));
                    }
                    None => {
                        prop_assert_eq!(done, Err(Verdict::CongestionDrop));
                        prop_assert_eq!(&packet, &with(inner));
                    }
                }
            }
        }

        #[test]
        fn any_octets_are_taken(mut octets in prop::collection::vec(any::<u8>(), 0..40), tos in any::<u8>()) {
            if let Ok(mut headers) = Headers::parse(&octets) {
                let _ = decapsulate(&mut octets, &mut headers, tos);
            }
        }
    }
}
