//! The coalescer: each packet is in one run, and segmenting a superframe again gives the same packets.

use arbitrary::Arbitrary;
use cipe_user::inner::checksum::{Sum, transport_checksum};
use cipe_user::inner::coalesce::Coalescer;
use cipe_user::inner::headers::{Headers, IpVersion, TCP, UDP};
use cipe_user::inner::segment::Superframe;

use crate::read;

#[derive(Arbitrary, Debug)]
struct Spec {
    flow: u8,
    is_tcp: bool,
    payload: u16,
    flags: u8,
    /// Added to the expected sequence number and IPv4 id.
    skips: Option<(u8, u8)>,
    /// The position of an octet that is changed, and how.
    damage: Option<(u8, u8)>,
}

/// The state of a flow's sender.
#[derive(Clone, Copy, Default)]
struct State {
    sequence: u32,
    id: u16,
}

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(specs) = read::<Vec<Spec>>(input) else { return };
    let mut states = [State::default(); 4];
    let packets: Vec<Vec<u8>> = specs.iter().take(256).map(|spec| packet(spec, &mut states)).collect();
    let mut coalescer = Coalescer::default();
    for packet in &packets {
        let headers = Headers::parse(packet);
        coalescer.push(headers.as_ref().ok().map(|headers| (&packet[..], headers)));
    }
    let mut seen = vec![false; packets.len()];
    for run in coalescer.runs() {
        let members: Vec<usize> = run.packets().collect();
        assert_eq!(members.len(), run.count());
        for member in &members {
            assert!(!std::mem::replace(&mut seen[*member], true), "a packet is in two runs");
        }
        if members.len() == 1 {
            continue;
        }
        let headers = run.headers();
        let mut pieces = vec![headers];
        pieces.extend(members.iter().map(|member| &packets[*member][headers.len()..]));
        let mut superframe = Superframe::parse(&pieces, run.gso_size()).expect("a run is a superframe");
        let mut buffer = vec![0; superframe.longest()];
        for member in members {
            let len = superframe.cut(&mut buffer).expect("a segment for each packet");
            assert!(buffer[..len] == packets[member], "octet for octet");
        }
        assert_eq!(superframe.cut(&mut buffer), None);
    }
    assert!(seen.iter().all(|seen| *seen));
}

/// The next packet of a flow.
fn packet(spec: &Spec, states: &mut [State; 4]) -> Vec<u8> {
    let state = &mut states[usize::from(spec.flow) % 4];
    let (protocol, header) = if spec.is_tcp { (TCP, 20) } else { (UDP, 8) };
    let payload = usize::from(spec.payload % 1500);
    let (more, further) = spec.skips.unwrap_or((0, 0));
    let sequence = state.sequence.wrapping_add(more.into());
    let id = state.id.wrapping_add(further.into());
    *state = State { sequence: sequence.wrapping_add(payload as u32), id: id.wrapping_add(1) };

    let mut packet = vec![0x45, 0];
    packet.extend(((20 + header + payload) as u16).to_be_bytes());
    packet.extend(id.to_be_bytes());
    packet.extend([0x40, 0, 64, protocol, 0, 0, 192, 0, 2, spec.flow % 4, 198, 51, 100, 1]);
    let mut sum = Sum::default();
    sum.add(&packet);
    packet[10..12].copy_from_slice(&sum.checksum());
    packet.extend([1, 2, 3, 4]);
    if spec.is_tcp {
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 9, 0x50, spec.flags, 1, 2, 0, 0, 0, 0]);
    } else {
        packet.extend(((8 + payload) as u16).to_be_bytes());
        packet.extend([0, 0]);
    }
    packet.extend((0..payload).map(|at| (at * 7) as u8));
    let mut sum = Sum::pseudo_header(IpVersion::V4, &packet[..20], protocol, header + payload);
    sum.add(&packet[20..]);
    let field = if spec.is_tcp { 36 } else { 26 };
    packet[field..field + 2].copy_from_slice(&transport_checksum(sum, protocol));
    if let Some((at, change)) = spec.damage {
        let at = usize::from(at) % packet.len();
        packet[at] ^= change;
    }
    packet
}
