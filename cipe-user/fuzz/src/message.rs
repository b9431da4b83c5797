//! Any payload is a message or not; a message that is built and parsed again is the same.

use cipe_user::wire::message::{Message, is_fresh, is_known};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::read;

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(input) = read::<(u32, u32, &[u8])>(input) else { return };
    let (now, window, payload) = input;
    let _ = is_fresh(payload, now, window);
    let Ok(message) = Message::parse(payload) else { return };
    assert!(is_known(payload[0]));
    let built = message.build(now, &mut StdRng::seed_from_u64(window.into()));
    assert!((60..=311).contains(&built.len()) && built[0] == payload[0]);
    assert!(is_fresh(&built, now, 1));
    let Ok(again) = Message::parse(&built) else { panic!("a built message is refused") };
    match (&message, &again) {
        (Message::Dummy(old), Message::Dummy(new))
        | (Message::Ping(old), Message::Ping(new))
        | (Message::Pong(old), Message::Pong(new)) => assert!(new.starts_with(old)),
        _ => assert!(message == again),
    }
}
