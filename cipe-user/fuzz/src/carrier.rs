//! What stands around a datagram on the carrier: any frame, SOCKS5 header or message in clear has an answer, whose parts are
//! inside the input and which reads back when it is written again.

use cipe_user::engine::outer::{CarrierDatagram, Hop, Marks, parse_frame, parse_front, room, write_frame};
use cipe_user::engine::socks;
use cipe_user::wire::clear::{self, Clear, is_clear};
use rand::SeedableRng;
use rand::rngs::StdRng;

/// Runs one input: a frame, a datagram of a SOCKS5 server, and a message in clear.
pub fn run(input: &[u8]) {
    in_a_frame(input);
    if let Some(peer) = socks::parse(input) {
        assert_eq!(socks::header(peer).as_ref(), input.first_chunk());
    }
    if is_clear(input) {
        in_clear(input);
    }
}

fn in_a_frame(frame: &[u8]) {
    let front = parse_front(frame);
    let whole = front.clone().filter(|datagram| datagram.payload.end <= frame.len());
    assert_eq!(parse_frame(frame), whole);
    let Some(CarrierDatagram { from, to, tos, payload }) = whole else { return };
    let start = room(to.ip());
    let mut written = vec![0; start + payload.len()];
    written[start..].copy_from_slice(&frame[payload]);
    let payload = start..written.len();
    let marks = Marks { tos, ttl: 64, dont_fragment: true };
    let hop = Hop { source: [2; 6], destination: [4; 6] };
    assert_eq!(write_frame(&mut written, payload.clone(), hop, (from, to), marks, 1, true), 0);
    assert_eq!(parse_frame(&written), Some(CarrierDatagram { from, to, tos, payload }));
}

fn in_clear(datagram: &[u8]) {
    let mut rng = StdRng::seed_from_u64(1);
    match Clear::parse(datagram) {
        Clear::Request(Some(configuration)) | Clear::Answer(Some(configuration)) => {
            assert!(configuration.mismatches(&configuration).is_empty());
            let answer = configuration.answer(1, &mut rng);
            // Numbers may be digits, which only the peer's answers are.
            assert!(
                matches!(Clear::parse(&answer), Clear::Answer(Some(again)) if again.cipher == configuration.cipher)
            );
        }
        Clear::Ping(text) | Clear::Pong(text) => {
            let pong = clear::datagram(&cipe_user::wire::message::Message::Pong(text), 1, &mut rng);
            assert!(matches!(Clear::parse(&pong), Clear::Pong(again) if again.starts_with(text)));
        }
        Clear::Request(None) | Clear::Answer(None) | Clear::Forbidden(_) | Clear::Other => {}
    }
}
