//! Everything that reads or changes inner packets: any octets get a result, and changes keep the length.

use cipe_user::inner::ethernet::EthernetFrame;
use cipe_user::inner::fragment::Fragments;
use cipe_user::inner::headers::Headers;
use cipe_user::inner::too_big::TooBigMessage;
use cipe_user::inner::{checksum, ecn, ethernet, ip, mss, nested};

/// Runs one input: TOS and MTU, then the packet.
pub fn run(input: &[u8]) {
    let Some(([tos, high, low], packet)) = input.split_first_chunk() else { return };
    let mtu = usize::from(u16::from_be_bytes([*high, *low]));
    if let Ok(headers) = Headers::parse(packet) {
        assert!(headers.transport <= headers.ip.total);
    }
    if let Ok(inner) = ip::check(packet) {
        assert_eq!(inner.total, packet.len());
    }
    if let Some(frame) = EthernetFrame::parse(packet) {
        assert!(frame.header() <= packet.len() && frame.content().len() <= packet.len());
        let _ = (frame.is_tagged(), frame.ip(), frame.plain_ip().map(<[u8]>::len));
    }
    let _ = (ethernet::is_surely_frame(packet), ethernet::is_bare_ip(packet), TooBigMessage::too_big(packet, mtu));
    if let Ok(mut fragments) = Fragments::parse(packet, mtu) {
        let mut buffer = vec![0; packet.len() + 64];
        let mut octets = 0;
        while let Some(len) = fragments.cut(&mut buffer) {
            assert!(len <= mtu);
            octets += len;
        }
        assert!(octets >= packet.len());
    }
    assert!(ethernet::link_header(packet).is_none_or(|header| header <= packet.len()));
    for change in [checksum::complete_partial, nested::complete_inside, nested::complete_hidden] {
        change(&mut packet.to_vec());
    }
    mss::clamp(&mut packet.to_vec(), mtu);
    let _ = ecn::decapsulate(&mut packet.to_vec(), *tos);
}
