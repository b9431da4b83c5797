//! Clamps the MSS option of TCP SYN packets in Ethernet frames, in both directions. It is needed because a bridge
//! silently drops frames that are too large for a port, and an original CIPE at the other end does not clamp.
//!
//! Accepts any octets and never panics.

use crate::inner::headers::{Headers, IpVersion, Part, TCP};

/// Octets of IP and TCP headers without options, in IPv4 and in IPv6.
const HEADERS: [usize; 2] = [40, 60];
const TCP_HEADER: usize = 20;
const TCP_FLAGS: usize = 13;
const TCP_CHECKSUM: usize = 16;
const SYN: u8 = 0x02;

const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_MSS: u8 = 2;

/// Lowers the MSS of a SYN at the start of `octets`, whose headers were read before, to what packets of `mtu` octets have room
/// for; everything else stays as it is. The checksum is updated by the difference (RFC 1624), so that a wrong one stays wrong.
pub fn clamp(octets: &mut [u8], headers: &Headers, mtu: usize) {
    let is_whole = headers.part == Part::Whole && headers.total() <= octets.len();
    if headers.protocol != TCP || !is_whole || headers.transport_len() < TCP_HEADER {
        return;
    }
    let tcp = &mut octets[headers.transport()..headers.total()];
    let largest = mtu.saturating_sub(HEADERS[usize::from(headers.version == IpVersion::V6)]).max(1);
    let Some(value) = mss_of_syn(tcp) else { return };
    let old = u16::from_be_bytes([tcp[value], tcp[value + 1]]);
    let Some(new) = u16::try_from(largest).ok().filter(|new| *new < old) else { return };
    tcp[value..value + 2].copy_from_slice(&new.to_be_bytes());
    // At an odd offset, the value lies in two words of the sum.
    let word = |value_of: u16| if value % 2 == 0 { value_of } else { value_of.swap_bytes() };
    let sum = u16::from_be_bytes([tcp[TCP_CHECKSUM], tcp[TCP_CHECKSUM + 1]]);
    let total = u32::from(!sum) + u32::from(!word(old)) + u32::from(word(new));
    let folded = (total & 0xFFFF) + (total >> 16);
    let folded = (folded & 0xFFFF) + (folded >> 16);
    tcp[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&(!(folded as u16)).to_be_bytes());
}

/// Returns the offset of the MSS value in the TCP header of a SYN.
fn mss_of_syn(tcp: &[u8]) -> Option<usize> {
    let end = (usize::from(tcp[12] >> 4) * 4).min(tcp.len());
    if tcp[TCP_FLAGS] & SYN == 0 {
        return None;
    }
    let mut at = TCP_HEADER;
    while at + 4 <= end {
        match (tcp[at], tcp[at + 1]) {
            (OPTION_END, _) => return None,
            (OPTION_NOP, _) => at += 1,
            (OPTION_MSS, 4) => return Some(at + 2),
            (_, 0 | 1) => return None,
            (_, length) => at += usize::from(length),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::inner::checksum::Sum;
    use crate::inner::test_packets::Flow;

    fn clamp(packet: &mut [u8], mtu: usize) {
        if let Ok(headers) = Headers::parse(packet) {
            super::clamp(packet, &headers, mtu);
        }
    }

    /// A SYN with these options, a multiple of four octets.
    fn syn(flow: &Flow, options: &[u8]) -> Vec<u8> {
        let mut segment = vec![0; TCP_HEADER];
        segment[..4].copy_from_slice(&[0x9C, 0x40, 0, 80]);
        segment[12] = ((TCP_HEADER + options.len()) as u8 / 4) << 4;
        segment[TCP_FLAGS] = SYN;
        segment.extend(options);
        let mut packet = Flow { protocol: TCP, ..flow.clone() }.carrying(&segment);
        let headers = Headers::parse(&packet).unwrap();
        let (ip, tcp) = packet.split_at_mut(headers.transport());
        let mut sum = Sum::pseudo_header(headers.version, ip, TCP, tcp.len());
        sum.add(tcp);
        tcp[TCP_CHECKSUM..TCP_CHECKSUM + 2].copy_from_slice(&sum.checksum());
        packet
    }

    #[test]
    fn an_mss_is_lowered_and_never_raised_and_the_sum_stays_right() {
        for (flow, room) in [(Flow::tcp4(), 1388_u16), (Flow::tcp6(), 1368)] {
            for before in [&[][..], &[1, 1, 1, 1], &[1, 8, 3, 7]] {
                for mss in [536_u16, room, room + 1, 1460, 9000, u16::MAX] {
                    let with = |mss: u16| {
                        let mss = mss.to_be_bytes();
                        let option = [2, 4, mss[0], mss[1]];
                        // With an odd offset, too.
                        let options = match before {
                            [] => [&[1][..], &option, &[3, 3, 7]].concat(),
                            _ => [before, &option, &[1, 3, 3, 7]].concat(),
                        };
                        syn(&flow, &options)
                    };
                    let mut packet = with(mss);
                    clamp(&mut packet, 1428);
                    assert_eq!(packet, with(mss.min(room)), "{before:?} {mss}");
                }
            }
        }
    }

    #[test]
    fn all_else_stays_as_it_is() {
        let mss = [2, 4, 0x23, 0x28];
        let mut ack = syn(&Flow::tcp4(), &mss);
        ack[20 + TCP_FLAGS] = 0x10;
        let mut fragment = syn(&Flow::tcp4(), &mss);
        fragment[6] = 0x20;
        let cut = syn(&Flow::tcp4(), &mss)[..43].to_vec();
        let none = syn(&Flow::tcp4(), &[1, 1, 1, 0]);
        let endless = syn(&Flow::tcp4(), &[8, 0, 2, 4]);
        for mut packet in [ack, fragment, cut, none, endless, Flow::udp4().packet(&mss), Vec::new()] {
            let before = packet.clone();
            clamp(&mut packet, 1428);
            assert_eq!(packet, before);
        }
    }

    proptest! {
        #[test]
        fn any_octets_are_taken(
            mut octets in prop::collection::vec(any::<u8>(), 0..120), options in prop::collection::vec(any::<u8>(), 40), mtu in 0usize..2000,
        ) {
            clamp(&mut octets, mtu);
            clamp(&mut syn(&Flow::tcp4(), &options), mtu);
        }
    }
}
