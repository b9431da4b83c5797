//! The answers of a host behind the peer: to pings, and to UDP on any port.

/// The answer to an inner packet: an echo reply, or a UDP datagram sent back. `None` for anything else.
pub(crate) fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    let mut answer = packet.to_vec();
    // Swapping addresses and ports changes no checksum.
    let (protocol, header) = match packet.first()? >> 4 {
        4 if packet.len() >= 20 => {
            swap(&mut answer, 12, 16, 4);
            (packet[9], usize::from(packet[0] & 15) * 4)
        }
        6 if packet.len() >= 40 => {
            swap(&mut answer, 8, 24, 16);
            (packet[6], 40)
        }
        _ => return None,
    };
    if packet.len() < header + 8 {
        return None;
    }
    match (protocol, packet[header]) {
        (17, _) => swap(&mut answer, header, header + 2, 2),
        (1, 8) => set_type(&mut answer[header..], 0),
        (58, 128) => set_type(&mut answer[header..], 129),
        _ => return None,
    }
    Some(answer)
}

fn swap(packet: &mut [u8], a: usize, b: usize, len: usize) {
    (0..len).for_each(|i| packet.swap(a + i, b + i));
}

/// Changes the ICMP type and the checksum with it (RFC 1624, equation 3).
fn set_type(icmp: &mut [u8], new: u8) {
    let old = u16::from_be_bytes([icmp[0], icmp[1]]);
    icmp[0] = new;
    let sum = u32::from(!u16::from_be_bytes([icmp[2], icmp[3]]))
        + u32::from(!old)
        + u32::from(u16::from_be_bytes([icmp[0], icmp[1]]));
    let sum = (sum & 0xFFFF) + (sum >> 16);
    let sum = (sum & 0xFFFF) + (sum >> 16);
    icmp[2..4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
}
